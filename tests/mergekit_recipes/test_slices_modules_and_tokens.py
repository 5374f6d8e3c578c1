"""mergekit's slices, modules, filters, documents and tokenizers: its own results come out of the files it was given."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from merging import Recipe, merge
from merging.streamed import verify
from merging.vocabulary import Tokenizer
from taskvec.errors import RecipeError

MORE = Path(__file__).parent.parent / "goldens" / "mergekit_more"
LAYERS = sorted(path.stem for path in (MORE / "layers" / "configs").glob("*.yml"))
TOKENS = sorted(path.stem for path in (MORE / "tokens" / "configs").glob("*.yml"))


@pytest.fixture
def layers(tmp_path, monkeypatch):
    shutil.copytree(MORE / "layers" / "inputs", tmp_path / "inputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    shutil.copytree(MORE / "tokens" / "inputs", tmp_path / "inputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", LAYERS)
def test_slices_modules_and_filters_give_mergekits_files(layers, name):
    merge(Recipe.load(MORE / "layers" / "configs" / f"{name}.yml"), layers / "out")
    found = load_file(layers / "out" / "model.safetensors")
    expected = load_file(MORE / "layers" / "expected" / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value, atol=1e-6, rtol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    depth = 1 + max(int(key.split(".")[2]) for key in expected if key.startswith("model.layers."))
    assert json.loads((layers / "out" / "config.json").read_text())["num_hidden_layers"] == depth


@pytest.mark.parametrize("parts", ["tasks", "slices"])
@pytest.mark.parametrize("said", ["dtype", "torch_dtype"])
def test_the_configuration_says_what_the_weights_are_stored_in(layers, parts, said):
    config = json.loads((layers / "inputs" / "base" / "config.json").read_text())
    del config["torch_dtype"]
    config |= {said: "float32", "text_config": {said: "float32", "depth": 3}}
    (layers / "inputs" / "base" / "config.json").write_text(json.dumps(config))
    tasks = [{"path": "inputs/ft1", **({"layers": [0, 4]} if parts == "slices" else {})}]
    recipe = {"method": "task_arithmetic", "base": "inputs/base", "output": {"dtype": "bf16"}}
    merge(Recipe.from_data(recipe | {parts: tasks if parts == "tasks" else [{"tasks": tasks}]}), layers / "out")
    found = json.loads((layers / "out" / "config.json").read_text())
    assert found == config | {said: "bfloat16", "text_config": {said: "bfloat16", "depth": 3}}
    assert {str(value.dtype) for value in load_file(layers / "out" / "model.safetensors").values()} == {
        "torch.bfloat16"
    }


@pytest.mark.parametrize("name", TOKENS)
def test_tokenizers_give_mergekits_embeddings_token_by_token(tokens, name):
    merge(Recipe.load(MORE / "tokens" / "configs" / f"{name}.yml"), tokens / "out")
    found = load_file(tokens / "out" / "model.safetensors")
    expected = load_file(MORE / "tokens" / "expected" / f"{name}.safetensors")
    ours = Tokenizer.parsed((tokens / "out" / "tokenizer.json").read_text("utf-8"), "ours").ids
    theirs = json.loads((MORE / "tokens" / "expected" / f"{name}.json").read_text("utf-8"))
    assert found.keys() == expected.keys()
    assert ours.keys() == theirs.keys()
    for key, value in expected.items():
        assert found[key].shape == value.shape
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            order = sorted(ours)
            assert_close(
                found[key][[ours[token] for token in order]],
                value[[theirs[token] for token in order]],
                atol=1e-6,
                rtol=1e-6,
            )
            assert_close(found[key][1 + max(ours.values()) :], value[1 + max(theirs.values()) :], atol=1e-6, rtol=1e-6)
        else:
            assert_close(found[key], value, atol=1e-6, rtol=1e-6)
    assert json.loads((tokens / "out" / "config.json").read_text())["vocab_size"] == len(value_rows(expected))


def value_rows(tensors):
    return tensors["model.embed_tokens.weight"]


@pytest.mark.parametrize("name", ["passthrough_scaled", "ties_slices", "chain", "modules_default"])
def test_a_stack_can_be_verified_by_making_it_again(layers, name):
    merge(Recipe.load(MORE / "layers" / "configs" / f"{name}.yml"), layers / "out")
    assert verify(layers / "out", deep=True)["deep"]


@pytest.mark.parametrize(("kind", "name"), [*(("layers", n) for n in LAYERS), *(("tokens", n) for n in TOKENS)])
def test_converted_recipes_are_the_same_recipes(kind, name, run):
    config = MORE / kind / "configs" / f"{name}.yml"
    code, out, _ = run("convert", config)
    assert code == 0
    assert Recipe.from_text(out) == Recipe.load(config)


def test_check_tells_the_parts_of_a_stack_and_the_stages_of_a_chain(layers, run):
    code, out, _ = run("check", MORE / "layers" / "configs" / "ties_slices.yml")
    assert code == 0
    assert "slices.1: ties of ft1 and ft2, 29 tensors" in out
    assert "written anew" in out and "config.json" in out
    code, out, _ = run("check", MORE / "layers" / "configs" / "chain.yml", "--json")
    assert code == 0
    assert list(json.loads(out)["stages"]) == ["first-merge", "second-merge"]
    assert not list(layers.glob("*first*"))


def stack(**changes):
    return {
        "method": "passthrough",
        "slices": [
            {"tasks": [{"path": "inputs/ft1", "layers": [0, 3]}]},
            {"tasks": [{"path": "inputs/ft2", "layers": [1, 4]}]},
        ],
        **changes,
    }


def test_our_own_recipe_stacks_layers(layers):
    merge(Recipe.from_data(stack()), layers / "out")
    expected = load_file(MORE / "layers" / "expected" / "passthrough_stack.safetensors")
    found = load_file(layers / "out" / "model.safetensors")
    assert all(bool((found[key] == value).all()) for key, value in expected.items())
    assert found.keys() == expected.keys()


def test_a_slice_says_which_tensors_outside_the_layers_it_brings(layers):
    recipe = stack()
    recipe["slices"][0]["tensors"] = ["lm_head.*", "model.embed_tokens.*"]
    merge(Recipe.from_data(recipe), layers / "out")
    found = load_file(layers / "out" / "model.safetensors")
    first, second = (load_file(f"inputs/{name}/model.safetensors") for name in ("ft1", "ft2"))
    assert bool((found["lm_head.weight"] == first["lm_head.weight"]).all())
    assert bool((found["model.norm.weight"] == second["model.norm.weight"]).all())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slices": [{"tasks": [{"path": "inputs/ft1", "layers": [2, 9]}]}]}, r"ft1 has the layers 0 to 3 \(range \[0, 4\]\); asked for \[2, 9\]"),
        ({"slices": [{"tasks": [{"path": "inputs/ft1", "layers": [2, 2]}]}]}, r"asked for \[2, 2\]"),
        ({"method": "average", "slices": [{"tasks": [{"path": "inputs/ft1", "layers": [0, 2]}, {"path": "inputs/ft2", "layers": [0, 3]}]}]}, "equally many layers; found ft1 2, ft2 3"),
        ({"slices": [{"tasks": [{"path": "inputs/none", "layers": [0, 2]}]}]}, "inputs/none: no such file or folder"),
        ({"tower": "model.block"}, "has no layers model.block.<number>; it has model.layers"),
        ({"keep_base": ["*nothing*"]}, r"keep_base: the pattern '\*nothing\*' matches no tensor"),
        ({"slices": [{"tasks": ["inputs/ft1"], "tensors": ["*nothing*"]}]}, "slices.0.tensors: the pattern"),
        ({"slices": [{"tasks": ["inputs/ft1"], "tensors": ["lm*"]}, {"tasks": ["inputs/ft2"], "tensors": ["lm_head.*"]}]}, "lm_head.weight is claimed by slices 1 and 2"),
        ({"masks": "m.safetensors"}, "masks: belong to whole models"),
        ({"method": "task_arithmetic", "base": "inputs/base", "postprocess": ["lines"]}, "lines scales by depth of the whole model"),
        ({"method": "task_arithmetic", "base": "inputs/base", "slices": [{"tasks": ["inputs/ft1"], "base_layers": [0, 2]}]}, r"base_layers: \[0, 2\] are not 4 layers"),
    ],
)  # fmt: skip
def test_stacks_that_cannot_be_are_refused(layers, changes, words):
    with pytest.raises(RecipeError, match=words):
        merge(Recipe.from_data(stack(**changes)), layers / "out")
    assert not (layers / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: linear\nname: a\nmodels: [{model: inputs/ft1, parameters: {weight: 1}}]\n---\nmerge_method: linear\nname: b\nmodels: [{model: inputs/ft2, parameters: {weight: 1}}]\n", "one merge is the result, used by no other; here that is a, b"),
        ("merge_method: linear\nname: a\nmodels: [{model: b, parameters: {weight: 1}}]\n---\nmerge_method: linear\nname: b\nmodels: [{model: a, parameters: {weight: 1}}]\n---\nmerge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n", "a and b wait for each other"),
        ("merge_method: linear\nname: a\nmodels: [{model: inputs/none, parameters: {weight: 1}}]\n---\nmerge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n", "stages.a: inputs/none: no such file"),
        ("merge_method: linear\nname: a\nmodels: [{model: inputs/ft1, parameters: {weight: 1}}]\n---\nmerge_method: linea\nmodels: [{model: a, parameters: {weight: 1}}]\n", "document 2: merge_method: 'linea'"),
        ("merge_method: linear\nname: a\nmodels: [{model: inputs/ft1, parameters: {weight: 1}}]\n---\n- a\n", "document 2: is list"),
        ("method: ties\ntasks: [a]\n---\nmethod: ties\ntasks: [a]\n", "2 documents; merges that come first stand under `stages`"),
    ],
)  # fmt: skip
def test_chains_that_cannot_be_are_refused(layers, text, words):
    with pytest.raises(RecipeError, match=words):
        merge(Recipe.from_text(text), layers / "out")
    assert sorted(path.name for path in layers.iterdir()) == ["inputs"]


def test_a_filter_that_leaves_tensors_without_a_weight_is_refused_by_name(layers):
    text = "merge_method: linear\nmodels:\n- {model: inputs/ft1, parameters: {weight: [{filter: mlp, value: 0.5}]}}\n- {model: inputs/ft2, parameters: {weight: 1}}\n"
    with pytest.raises(RecipeError, match="weight of ft1: is missing for lm_head.weight"):
        merge(Recipe.from_text(text), layers / "out")
