"""mergekit's recipes, unchanged: its golden outputs come out of the files, and what it passes in silence is refused."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from merging import Recipe, merge
from taskvec.errors import RecipeError

GOLDENS = [
    "linear", "linear_unnormalised", "linear_gradient_filter", "task_arithmetic", "ties", "ties_weighted", "slerp", "nuslerp",
    "nuslerp_task_rowwise", "multislerp", "karcher", "breadcrumbs", "breadcrumbs_ties", "model_stock", "sce", "nearswap",
    "ramplus_tl", "arcee_fusion",
]  # fmt: skip


@pytest.fixture
def folder(goldens, tmp_path, monkeypatch):
    shutil.copytree(goldens / "mergekit" / "inputs", tmp_path / "inputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_recipes_give_golden_files(goldens, folder, name):
    recipe = Recipe.load(goldens / "mergekit" / "configs" / f"{name}.yml")
    merge(recipe.model_copy(update={"allow": ["zero_task"]}), folder / "out")
    found, expected = (
        load_file(folder / "out" / "model.safetensors"),
        load_file(goldens / "mergekit" / "expected" / f"{name}.safetensors"),
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if name == "arcee_fusion":
            assert float((found[key] != value).float().mean()) < 0.01
        else:
            assert_close(found[key], value, atol=1e-6, rtol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", GOLDENS)
def test_converted_recipes_are_the_same_recipes(goldens, folder, run, name):
    config = goldens / "mergekit" / "configs" / f"{name}.yml"
    code, out, _ = run("convert", config)
    assert code == 0
    assert Recipe.from_text(out) == Recipe.load(config)


def recipe(**changes):
    data = {
        "merge_method": "ties", "base_model": "inputs/base",
        "models": [{"model": f"inputs/ft{i}", "parameters": {"weight": 1.0, "density": 0.5}} for i in (1, 2)],
    }  # fmt: skip
    return json.dumps({**data, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"paramters": {}}, "paramters: mergekit has no such key. Did you mean 'parameters'"),
        ({"merge_method": "tie"}, "'tie' is not a method of mergekit that is known here. Did you mean 'ties'"),
        ({"parameters": {"densty": 0.2}}, "ties has no such parameter. Did you mean 'density'"),
        (
            {"models": [{"model": "inputs/ft1", "parameters": {"weigth": 1}}]},
            "has no parameter 'weigth'. Did you mean 'weight'",
        ),
        ({"models": [{"model": "inputs/ft1"}]}, "weight is missing"),
        ({"models": []}, "models: is missing or empty"),
        ({"models": [{"modle": "x"}]}, "is not a mapping with `model`"),
        ({"slices": [{"sources": []}], "models": []}, "slices.0: is not a mapping with `sources`"),
        ({"slices": [{"sources": [{"model": "x"}]}], "models": []}, "layer_range: write the first layer and one past the last"),
        ({"slices": [{"sources": [{"model": "x", "layer_range": [0, 1]}], "residual_weight": 1}], "models": []}, "slices.0.residual_weight: mergekit accepts it and does nothing"),
        ({"slices": [{"sources": []}]}, "models and slices: only one of them"),
        ({"modules": {"default": {}}, "models": []}, "modules.default: is not a mapping with either"),
        ({"tokenizer": "union"}, "tokenizer: is a mapping with `source`"),
        ({"tokenizer": {"sorce": "union"}}, "tokenizer.sorce: there is no such key. Did you mean 'source'"),
        ({"tokenizer": {"tokens": {"<a>": {"source": {"kind": "one"}}}}}, "tokenizer.tokens.<a>.source.kind: 'one' is unknown"),
        ({"tokenizer": {}, "tokenizer_source": "union"}, "tokenizer_source, tokenizer: only one"),
        ({"models": [{"model": "a", "parameters": {"weight": [{"pattern": "mlp", "value": 1}]}}]}, "weight.pattern: there is no such key"),
        ({"models": [{"model": "a", "parameters": {"weight": "much"}}]}, "weight: is neither a number nor a list; found 'much'"),
        ({"models": [{"model": {"model": "a", "override_architecture": "B"}, "parameters": {"weight": 1}}]}, "models.override_architecture is not supported"),
        ({"base_model": "a+b"}, "base_model: an adapter over a model cannot be the base"),
        ({"merge_method": "slerp"}, "parameters.t: is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_or_not_supported_is_refused_by_name(changes, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        Recipe.from_text(recipe(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": [{"model": "inputs/ft1", "parameters": {"weight": 1, "density": 20}}]}, "density: .*less than or equal to 1, found 20"),
        ({"models": [{"model": "inputs/ft1", "parameters": {"weight": 1, "density": -1}}]}, "density: .*greater than 0, found -1"),
        ({"merge_method": "linear", "base_model": None, "models": [{"model": f"inputs/ft{i}", "parameters": {"weight": w}} for i, w in ((1, 1), (2, -1))]}, "add up to zero"),
        ({"models": [{"model": "inputs/ft1", "parameters": {"weight": [{"filter": "mpl", "value": 1}], "density": 1}}]}, "pattern '\\*mpl\\*' matches no tensor"),
    ],
)  # fmt: skip
def test_what_mergekit_passes_in_silence_is_an_error(folder, changes, words):
    from merging.prepare import prepare

    with pytest.raises(RecipeError, match=words):
        prepare(Recipe.from_text(recipe(**changes)))


def test_the_base_among_the_models_is_no_task_vector():
    models = [{"model": "inputs/base"}, {"model": "inputs/ft1", "parameters": {"weight": 1.0}}]
    assert [task.path for task in Recipe.from_text(recipe(models=models)).tasks] == ["inputs/ft1"]


def test_adapters_written_with_a_plus_become_tasks():
    models = [{"model": "inputs/base+my-adapter", "parameters": {"weight": 1.0}}]
    assert Recipe.from_text(recipe(models=models)).tasks[0].path == "my-adapter"


@pytest.mark.parametrize("base", [None, "inputs/base"])
def test_one_model_alone_comes_out_of_multislerp_as_it_is(folder, base):
    models = [{"model": "inputs/ft1", "parameters": {"weight": 0.28}}]
    text = recipe(merge_method="multislerp", base_model=base, models=models, parameters={"normalize_weights": False})
    merge(Recipe.from_text(text), folder / "out")
    found, expected = load_file(folder / "out" / "model.safetensors"), load_file("inputs/ft1/model.safetensors")
    for key, value in expected.items():
        assert_close(found[key], value, atol=1e-6, rtol=1e-6)


def test_what_task_arithmetic_takes_without_effect_in_mergekit_has_none_here(folder):
    def read(own, whole):
        models = [{"model": "inputs/ft1", "parameters": {"weight": 0.7, **own}}]
        return Recipe.from_text(recipe(merge_method="task_arithmetic", models=models, parameters=whole))

    plain = read({}, {})
    assert read({"density": 0.5}, {"rescale": True, "int8_mask": True}) == plain
    assert read({"density": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 1}]}, {}) == plain
    with pytest.raises(RecipeError, match="density is a number above 0 and up to 1, found 53"):
        read({"density": 53}, {})
