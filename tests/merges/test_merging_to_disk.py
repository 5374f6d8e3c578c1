"""Recipes carried out on real files: results, provenance, tied weights, integers, vocabularies, resume, overwrite."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merging import Recipe, merge, verify
from merging.streamed import file_hashes
from taskvec import Checkpoint
from taskvec.errors import BaseMismatchError, NotAModelError, RecipeError, VerificationError
from taskvec.writer import CheckpointWriter


def carry_out(data, out, **options):
    return merge(Recipe.from_data(data), out, **options)


def test_task_arithmetic_is_base_plus_the_weighted_differences(zoo, tmp_path):
    tasks = [{"path": str(path), "weight": weight} for path, weight in zip(zoo.tuned, (0.5, -1.0, 2.0))]
    carry_out(zoo.recipe(tasks=tasks, scale=0.7), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    tuned = [load_file(path / "model.safetensors") for path in zoo.tuned]
    for name, base in zoo.base_state.items():
        delta = sum(w * (t[name].double() - base.double()) for w, t in zip((0.5, -1.0, 2.0), tuned))
        torch.testing.assert_close(merged[name].double(), base.double() + 0.7 * delta, rtol=1e-6, atol=1e-6)


def test_provenance_tells_everything_and_verify_believes_only_what_it_sees(zoo, tmp_path):
    made = carry_out(zoo.recipe(method="pcb", seed=3), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "taskvec.json").read_text())
    assert found["method"]["parameters"] == {"density": 0.1, "clip": 1e-4, "inter": "sum", "variant": "reference"}
    assert found["seed"] == 3 and found["recipe"]["base"] == str(zoo.base)
    assert [entry["name"] for entry in found["inputs"]] == ["base", "ft1", "ft2", "ft3"]
    assert found["inputs"][1]["content_hash"] == Checkpoint.open(zoo.tuned[0]).content_hash()
    assert set(found["norms"]) == {"ft1", "ft2", "ft3"} and set(found["statistics"]["pcb"]["kept"]) == {
        "ft1",
        "ft2",
        "ft3",
    }
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["taskvec"])["outputs"] == found["outputs"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n") and "method `pcb`" in card and made.path.name in card
    assert verify(tmp_path / "out")["tensors"] == len(zoo.base_state)
    assert verify(tmp_path / "out", deep=True)["deep"]
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    with pytest.raises(VerificationError, match="1 tensors changed"):
        verify(tmp_path / "out")


def test_verify_notices_changed_companions_and_inputs(zoo, tmp_path):
    carry_out(zoo.recipe(), tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"config\.json changed or missing"):
        verify(tmp_path / "out")
    carry_out(zoo.recipe(), tmp_path / "other")
    zoo.tune("ft1", seed=77)
    with pytest.raises(BaseMismatchError, match="inputs have changed since: ft1"):
        verify(tmp_path / "other", deep=True)
    with pytest.raises(NotAModelError, match="no provenance of a merge"):
        verify(zoo.base)


def test_a_deep_check_says_when_other_versions_made_the_model(zoo, tmp_path):
    carry_out(zoo.recipe(), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "taskvec.json").read_text())
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    made = Checkpoint.open(tmp_path / "out")
    told["digests"] = made.digests()  # as if another machine had made other last bits
    told["outputs"] = file_hashes(made)
    for versions, said in (
        (told["versions"], "^(?!.*other versions)"),
        ({"torch": "1.0"}, r"other versions \(torch 1\.0, here"),
    ):
        told["versions"] = told["versions"] | versions
        (tmp_path / "out" / "taskvec.json").write_text(json.dumps(told))
        with pytest.raises(VerificationError, match=said):
            verify(tmp_path / "out", deep=True)


def test_two_runs_write_the_same_bytes(zoo, tmp_path):
    for name in ("one", "two"):
        carry_out(zoo.recipe(method="dare", seed=5), tmp_path / name)
    for file in ("model.safetensors", "taskvec.json", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_single_file_can_be_made(zoo, tmp_path):
    carry_out(zoo.recipe(), tmp_path / "merged.safetensors")
    assert verify(tmp_path / "merged.safetensors", deep=True)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "zoo") == ["merged.safetensors"]


def test_an_average_needs_no_base_and_the_first_model_lends_its_config(zoo, tmp_path):
    (zoo.tuned[0] / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    carry_out({"tasks": [str(path) for path in zoo.tuned], "method": "average"}, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    tuned = [load_file(path / "model.safetensors") for path in zoo.tuned]
    name = "lm_head.weight"
    torch.testing.assert_close(merged[name], sum(t[name] for t in tuned) / 3)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_result_loads_in_transformers(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    for index in range(2):
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        base.save_pretrained(tmp_path / f"ft{index}")
    recipe = {"base": str(tmp_path / "base"), "tasks": [str(tmp_path / "ft0"), str(tmp_path / "ft1")], "method": "ties"}
    carry_out(recipe, tmp_path / "out")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_tied_tensors_count_once_and_are_written_as_the_base_stores_them(zoo, tmp_path):
    def tie(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    tie(zoo.base_state)
    save_file(zoo.base_state, zoo.base / "model.safetensors")
    (zoo.base / "config.json").write_text('{"tie_word_embeddings": true}')
    tuned = [zoo.tune(f"tied{i}", seed=i, change=tie) for i in (1, 2)]
    for path in tuned:
        (path / "config.json").write_text('{"tie_word_embeddings": true}')
    made = carry_out(zoo.recipe(tasks=[str(path) for path in tuned], method="pcb"), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert made.provenance["tensors"]["merged"] == len(zoo.base_state) - 1
    apart = zoo.tune("apart", seed=9)
    with pytest.raises(
        RecipeError,
        match=r"apart: lm_head\.weight and model\.embed_tokens\.weight are one tensor in the base, but differ",
    ):
        carry_out(zoo.recipe(tasks=[str(apart)], method="pcb"), tmp_path / "other")


def test_integers_are_never_averaged(zoo, tmp_path):
    def count(number):
        return lambda state: state.update({"steps": torch.tensor(number), "flags": torch.tensor([True, False])})

    count(1)(zoo.base_state)
    save_file(zoo.base_state, zoo.base / "model.safetensors")
    tuned = [zoo.tune(f"int{i}", seed=i, change=count(i)) for i in (1, 5)]
    made = carry_out(zoo.recipe(tasks=[str(path) for path in tuned]), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["steps"].dtype == torch.int64 and int(merged["steps"]) == 1
    assert merged["flags"].tolist() == [True, False]
    assert any("steps: torch.int64 values differ in int5; integers are never averaged" in w for w in made.warnings)


def test_patterns_choose_what_is_merged(zoo, tmp_path):
    recipe = zoo.recipe(keep_base=["lm_head.*"], exclude=["model.norm.*"], include=["*.mlp.*", "lm_head.*"])
    carry_out(recipe, tmp_path / "out")
    merged, tuned = load_file(tmp_path / "out" / "model.safetensors"), load_file(zoo.tuned[0] / "model.safetensors")
    assert "model.norm.weight" not in merged
    assert torch.equal(merged["lm_head.weight"], zoo.base_state["lm_head.weight"])
    assert torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"], zoo.base_state["model.layers.0.self_attn.q_proj.weight"]
    )
    assert not torch.equal(
        merged["model.layers.0.mlp.up_proj.weight"], zoo.base_state["model.layers.0.mlp.up_proj.weight"]
    )
    assert "model.norm.weight" in tuned


def test_weights_by_pattern_and_over_depth(zoo, tmp_path):
    weight = {"*.layers.*.mlp.*": {"gradient": [0.0, 1.0]}, "lm_head.*": 2.0, "default": 0.0}
    carry_out(zoo.recipe(tasks=[{"path": str(zoo.tuned[0]), "weight": weight}, str(zoo.tuned[1])]), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    one, two = (load_file(path / "model.safetensors") for path in zoo.tuned[:2])
    for name, factor in (
        ("model.layers.0.mlp.up_proj.weight", 0),
        ("model.layers.1.mlp.up_proj.weight", 1),
        ("lm_head.weight", 2),
        ("model.norm.weight", 0),
    ):
        base = zoo.base_state[name]
        torch.testing.assert_close(
            merged[name], base + factor * (one[name] - base) + (two[name] - base), rtol=1e-5, atol=1e-5
        )


def test_densities_by_pattern_need_statistics_by_tensor(zoo, tmp_path):
    parameters = {"density": {"*mlp*": 0.5, "default": 1.0}}
    with pytest.raises(RecipeError, match="values by pattern or depth need `statistics: tensor`"):
        carry_out(zoo.recipe(method="ties", parameters=parameters), tmp_path / "out")
    carry_out(
        zoo.recipe(method="magnitude", parameters=parameters, statistics="tensor", tasks=[str(zoo.tuned[0])]),
        tmp_path / "out",
    )
    merged, tuned = load_file(tmp_path / "out" / "model.safetensors"), load_file(zoo.tuned[0] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    changed = int((merged[name] != zoo.base_state[name]).sum())
    assert 0.3 * merged[name].numel() < changed <= 0.5 * merged[name].numel()
    torch.testing.assert_close(merged["lm_head.weight"], tuned["lm_head.weight"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("how", "rows"), [("truncate", 20), ("base", 24)])
def test_vocabularies_of_another_size_are_resized_only_on_request(zoo, tmp_path, how, rows):
    def shrink(state):
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            state[name] = state[name][:20].clone()

    small = zoo.tune("small", seed=1, change=shrink)
    data = zoo.recipe(tasks=[str(small), str(zoo.tuned[1])])
    with pytest.raises(RecipeError, match="for a vocabulary of another size"):
        carry_out(data, tmp_path / "out")
    carry_out({**data, "resize": {"*embed_tokens*": how, "lm_head.*": how}}, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    one, two, base = (
        load_file(small / "model.safetensors"),
        load_file(zoo.tuned[1] / "model.safetensors"),
        zoo.base_state,
    )
    assert merged.shape == (rows, 16)
    expected = one["lm_head.weight"][:20] + two["lm_head.weight"][:20] - base["lm_head.weight"][:20]
    torch.testing.assert_close(merged[:20], expected, rtol=1e-5, atol=1e-5)
    if how == "base":
        torch.testing.assert_close(merged[20:], two["lm_head.weight"][20:])


def test_a_prefix_can_be_renamed_and_is_suggested(zoo, tmp_path):
    state = {"wrapper." + name: value for name, value in load_file(zoo.tuned[0] / "model.safetensors").items()}
    (tmp_path / "odd").mkdir()
    save_file(state, tmp_path / "odd" / "model.safetensors")
    with pytest.raises(RecipeError, match='rename: {"wrapper.": ""}'):
        carry_out(zoo.recipe(tasks=[str(tmp_path / "odd")]), tmp_path / "out")
    task = {"path": str(tmp_path / "odd"), "rename": {"wrapper.": ""}}
    carry_out(zoo.recipe(tasks=[task]), tmp_path / "out")
    merged, tuned = load_file(tmp_path / "out" / "model.safetensors"), load_file(zoo.tuned[0] / "model.safetensors")
    torch.testing.assert_close(merged["lm_head.weight"], tuned["lm_head.weight"], rtol=1e-6, atol=1e-6)


def test_stored_task_vectors_and_adapters_are_tasks_too(zoo, tmp_path):
    from taskvec import TaskVector

    TaskVector.between(Checkpoint.open(zoo.base), Checkpoint.open(zoo.tuned[0])).save(tmp_path / "vector")
    carry_out(zoo.recipe(tasks=[str(tmp_path / "vector"), str(zoo.tuned[1])]), tmp_path / "mixed")
    carry_out(zoo.recipe(tasks=[str(zoo.tuned[0]), str(zoo.tuned[1])]), tmp_path / "models")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("mixed", "models"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-6)
    with pytest.raises(RecipeError, match="a task vector is a difference to its base"):
        carry_out({"tasks": [str(tmp_path / "vector")], "method": "average"}, tmp_path / "x")
    with pytest.raises(RecipeError, match="made from another base"):
        carry_out(zoo.recipe(base=str(zoo.tuned[2]), tasks=[str(tmp_path / "vector")]), tmp_path / "x")


def test_output_dtype_is_one_rounding(zoo, tmp_path):
    carry_out(zoo.recipe(), tmp_path / "wide")
    carry_out(zoo.recipe(output={"dtype": "bf16"}), tmp_path / "narrow")
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "narrow"))
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)


def test_an_interrupted_run_resumes_from_its_finished_shards(zoo, tmp_path, monkeypatch):
    data = zoo.recipe(method="pcb", output={"shard_size": "4kB"})
    carry_out(data, tmp_path / "whole")
    written = []
    write = CheckpointWriter.write

    def stop_late(self, name, values, start=0):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, values, start)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", stop_late)
        with pytest.raises(KeyboardInterrupt):
            carry_out({**data, "workers": 1}, tmp_path / "out")
    assert not (tmp_path / "out").exists() and list(tmp_path.glob("out.partial-*"))
    said, again = [], []
    with monkeypatch.context() as patch:
        patch.setattr(
            CheckpointWriter, "write", lambda self, name, *a, **k: (again.append(name), write(self, name, *a, **k))[1]
        )
        carry_out({**data, "workers": 1}, tmp_path / "out", resume=True, notice=said.append)
    assert any("tensors are finished and verified" in message for message in said)
    assert 0 < len(again) < len(zoo.base_state)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert load_file(file).keys() == load_file(tmp_path / "out" / file.name).keys()
    assert Checkpoint.open(tmp_path / "out").content_hash() == Checkpoint.open(tmp_path / "whole").content_hash()
    assert verify(tmp_path / "out", deep=True)
    assert not list(tmp_path.glob("*partial*"))


def test_a_partial_output_of_another_recipe_is_removed_and_said_so(zoo, tmp_path):
    (tmp_path / "out.partial-123456789abc").mkdir()
    (tmp_path / "out.partial-123456789abc" / "model.safetensors").write_bytes(b"x")
    said = []
    carry_out(zoo.recipe(), tmp_path / "out", resume=True, notice=said.append)
    assert any("out.partial-123456789abc of an interrupted run: removed" in message for message in said)
    assert not list(tmp_path.glob("*partial*"))


def test_overwrite_swaps_in_the_new_merge_whole(zoo, tmp_path):
    carry_out(zoo.recipe(output={"shard_size": "4kB"}), tmp_path / "out")
    carry_out(zoo.recipe(method="ties"), tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "taskvec.json",
    ]
    assert verify(tmp_path / "out", deep=True)


def test_norms_that_differ_are_warned_of(zoo, tmp_path):
    big = zoo.tune(
        "big",
        seed=4,
        change=lambda s: s.update({k: zoo.base_state[k] + 9 * (v - zoo.base_state[k]) for k, v in s.items()}),
    )
    made = carry_out(zoo.recipe(tasks=[str(big), str(zoo.tuned[0])]), tmp_path / "out")
    assert any("the norms of the task vectors differ by a factor of" in warning for warning in made.warnings)


def test_tokenizers_with_other_vocabularies_are_warned_of(zoo, tmp_path):
    (zoo.base / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    (zoo.tuned[0] / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0, "a": 1}}}')
    (zoo.tuned[1] / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}, "added": []}')
    made = carry_out(zoo.recipe(), tmp_path / "out")
    assert [w for w in made.warnings if "ft1: its tokenizer has another vocabulary" in w]
    assert not [w for w in made.warnings if "ft2: its tokenizer" in w]


@pytest.mark.parametrize("key", ["recipe", "inputs", "outputs", "companions", "digests", "version"])
@pytest.mark.parametrize("value", [None, 5, "x"])
def test_damaged_provenance_is_said_to_be_damaged(zoo, tmp_path, key, value):
    out = tmp_path / "out"
    merge(Recipe.from_data(zoo.recipe()), out)
    facts = json.loads((out / "taskvec.json").read_text())
    (out / "taskvec.json").write_text(json.dumps({**facts, key: value}))
    with pytest.raises(NotAModelError, match="use a newer taskvec" if key == "version" else f"damaged; .* of {key}"):
        verify(out, deep=True)


def test_what_a_killed_check_left_is_removed_by_the_next(zoo, tmp_path):
    out = tmp_path / "out"
    merge(Recipe.from_data(zoo.recipe()), out)
    left = tmp_path / ".out.verify-abc"
    (left / "again.partial-1").mkdir(parents=True)
    (left / "lock").touch()
    verify(out, deep=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "zoo"]


def test_what_a_killed_run_left_of_its_stages_is_removed_and_a_living_one_is_left_alone(zoo, tmp_path):
    import fcntl

    dead, living = (tmp_path / f".out.stages-{name}" for name in ("dead", "living"))
    for folder in (dead, living):
        folder.mkdir()
        (folder / "lock").touch()
    stages = {"first": {"base": str(zoo.base), "tasks": [str(zoo.tuned[0])], "method": "task_arithmetic"}}
    data = zoo.recipe(tasks=["first", str(zoo.tuned[1])], stages=stages)
    said: list[str] = []
    with (living / "lock").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        carry_out(data, tmp_path / "out", notice=said.append)
    assert any("found .out.stages-dead of an interrupted run: removed" in text for text in said)
    assert not dead.exists() and living.is_dir() and (tmp_path / "out").is_dir()
    assert len(list(tmp_path.glob(".out.stages-*"))) == 1
