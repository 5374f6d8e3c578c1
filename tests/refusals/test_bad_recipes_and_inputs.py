"""Every wrong input gets its clear error, all of them at once, and no output."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging import Recipe, merge, merge_stacks
from merging.prepare import prepare
from taskvec import TaskVector, write
from taskvec.errors import (
    MismatchError,
    NonFiniteError,
    NotFoundError,
    OutputError,
    ParameterError,
    RecipeError,
    UsageError,
)


def refused(data, out, words, kind=RecipeError):
    with pytest.raises(kind, match=words) as error:
        merge(Recipe.from_data(data), out)
    assert not out.exists()
    assert not list(out.parent.glob("*partial*")) and not list(out.parent.glob(".*lock"))
    return str(error.value)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results" / "out"


def test_unknown_keys_come_with_their_line_and_the_nearest_known(tmp_path):
    text = (
        "base: b\nmethod: ties\ntasks:\n  - path: a\n    wieght: 2\nparamters: {density: 0.2}\noutput: {dtyp: bf16}\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        Recipe.load(tmp_path / "r.yaml")
    said = str(error.value)
    assert "line 5: tasks.0.wieght: there is no such key. Did you mean 'weight'?" in said
    assert "line 6: paramters: there is no such key. Did you mean 'parameters'?" in said
    assert "line 7: output.dtyp: there is no such key. Did you mean 'dtype'?" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: a\nbase: b\nmethod: ties\ntasks: [x]", 'line 2: found duplicate key "base"'),
        ("base: [a", "line 1"),
        ("- a\n- b", "expected a mapping of keys to values, found a list"),
        ("", "expected a mapping of keys to values, found nothing: the file is empty"),
        ("base: a\ntasks: [x]", "method: is missing"),
        ("method: ties\ntasks: []", "tasks: list should have at least 1 item"),
        ("method: ties\ntasks: [x]\nseed: -1", "line 3: seed: input should be greater than or equal to 0, found -1"),
        ("method: ties\ntasks: [x]\nstatistics: layer", "line 3: statistics"),
        ("method: ties\ntasks: [{path: x, weight: .nan}]", "weight: input should be a finite number"),
        ("method: ties\ntasks: {a: x, b: 3}", "line 2: tasks.1: input should be a valid string, found 3"),
        ("method: ties\ntasks: {a: {}}", "tasks.0.path: is missing"),
        ("base: " + 3000 * "[", "it is nested too deeply"),
        ("method: ties\ntasks: [5]", "tasks.0: should be a path, or a mapping with the key `path`, found 5"),
        ("method: ties\ntasks: [{path: x, weight: true}]", "tasks.0.weight: should be a number, found True"),
        (
            "method: ties\ntasks: [x]\noutput: bf16",
            "output: should be a mapping with the keys dtype, shard_size, found 'bf16'",
        ),
        ("method: ties\ntasks: [x]\nresize: 3", "resize: should be a mapping of keys to values, found 3"),
        ("method: ties\nmodels: [x]", "line 2: models: there is no such key. Here that is `tasks`"),
        ("method: ties\ntasks: [x]\nbase_model: y", "base_model: there is no such key. Here that is `base`"),
        ("method: ties\ntasks: [x]\ntokenizer: {source: union, token: {}}", "tokenizer.token: .*Did you mean 'tokens'"),
    ],
)
def test_broken_recipes_say_where(text, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.from_text(text)


def test_numbers_in_yaml_are_numbers():
    recipe = Recipe.from_text("method: ties\ntasks: [x]\nparameters: {density: 5e-2}\nscale: 1e0")
    assert recipe.parameters == {"density": 0.05} and recipe.scale == 1.0
    assert Recipe.from_text(recipe.dump()) == recipe


def test_a_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"nothing\.yaml: no such file"):
        Recipe.load(tmp_path / "nothing.yaml")


def test_a_recipe_that_is_no_text_or_no_file_is_named(tmp_path):
    (tmp_path / "odd.yaml").write_bytes(b"base: \xff\xfe")
    with pytest.raises(RecipeError, match=r"odd\.yaml cannot be used:\n  - is not text in UTF-8 \(byte 6\)"):
        Recipe.load(tmp_path / "odd.yaml")
    with pytest.raises(NotFoundError, match="is a folder; a YAML file is expected"):
        Recipe.load(tmp_path)


def test_all_problems_are_reported_at_once(zoo, out):
    data = zoo.recipe(
        tasks=["/no/such/model", str(zoo.tuned[0])], method="ties", parameters={"densty": 0.1, "density": 20},
        preprocess=["tie", {"dare": {"density": 0.5}}], postprocess=["dare"],
    )  # fmt: skip
    said = refused(data, out, "the recipe|The recipe")
    for words in (
        "/no/such/model: no such file or folder",
        "parameters.densty: ties has no such parameter. Did you mean 'density'?",
        "parameters.density: input should be less than or equal to 1, found 20",
        "preprocess: there is no method 'tie'. Did you mean 'ties'?",
        "preprocess: a step is a name, or a mapping with the key `method` beside its parameters; found dare without it",
        "postprocess: dare is a preprocess method",
    ):
        assert words in said


@pytest.mark.parametrize("density", [20, -1, 0, float("nan")])
def test_densities_out_of_range(zoo, out, density):
    refused(zoo.recipe(method="ties", parameters={"density": density}), out, "parameters.density: input should be")


def test_an_unknown_method(zoo, out):
    refused(zoo.recipe(method="tie"), out, "method: there is no method 'tie'. Did you mean 'ties'")


def test_filters_that_match_nothing(zoo, out):
    said = refused(
        zoo.recipe(
            include=["*.attention.*"], exclude=["visual.*"], keep_base=["lm_haed*"], resize={"*wte*": "base"},
            tasks=[{"path": str(zoo.tuned[0]), "weight": {"*mpl*": 2.0}}],
        ),
        out, "matches no tensor",
    )  # fmt: skip
    for words in (
        "include: the pattern '*.attention.*'",
        "exclude: the pattern 'visual.*'",
        "keep_base: the pattern 'lm_haed*'",
        "resize: the pattern '*wte*'",
        "weight of ft1: the pattern '*mpl*'",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("method", "weights", "words"),
    [
        ("average", (1.0, -1.0), "they add up to zero"),
        ("average", (0.0, 0.0), "all are zero"),
        ("task_arithmetic", (0.0, 0.0), "all are zero"),
    ],
)
def test_weights_that_leave_nothing(zoo, out, method, weights, words):
    tasks = [{"path": str(path), "weight": weight} for path, weight in zip(zoo.tuned, weights)]
    refused(zoo.recipe(method=method, tasks=tasks), out, words)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["base", "ft2", "kept"])
def test_values_that_are_not_numbers_are_named_by_tensor_and_model(zoo, out, value, where):
    path = zoo.base if where != "ft2" else zoo.tuned[1]
    state = load_file(path / "model.safetensors")
    state["model.norm.weight"][3] = value
    save_file(state, path / "model.safetensors")
    source = {"base": "the base", "ft2": "task 'ft2'", "kept": "base"}[where]
    data = zoo.recipe(method="ties", keep_base=["model.norm.*"] if where == "kept" else [])
    refused(data, out, rf"model\.norm\.weight: .*{source}.* holds 1 NaN or infinite", NonFiniteError)


def test_extra_missing_and_misshapen_tensors_are_listed_together(zoo, out):
    def change(state):
        state["vision.weight"] = torch.zeros(2)
        del state["model.norm.weight"]
        state["lm_head.weight"] = torch.zeros(16, 24)

    said = refused(zoo.recipe(tasks=[str(zoo.tune("odd", change=change))]), out, "odd")
    for words in (
        "1 tensors are not in",
        "vision.weight",
        "1 tensors of",
        "are missing: model.norm.weight",
        "odd has [16, 24]",
        "has [24, 16]",
        "`exclude` leaves tensors out",
    ):
        assert words in said


def test_another_architecture(zoo, out, tmp_path):
    save_file({"encoder.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    refused(
        zoo.recipe(tasks=[str(tmp_path / "other.safetensors")]),
        out,
        "has none of the 9 tensors .* Another architecture, or another prefix",
    )


def test_the_same_model_twice_and_the_base_as_a_task(zoo, out, tmp_path):
    said = refused(
        zoo.recipe(tasks=[str(zoo.tuned[0]), str(zoo.tuned[0] / ".." / "ft1"), str(zoo.base)]), out, "is there twice"
    )
    assert "is the base itself; its task vector is zero" in said
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in zoo.tuned[0].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    refused(zoo.recipe(tasks=[str(zoo.tuned[0]), str(copy)]), out, "ft1 and copy have the same content")
    merge(Recipe.from_data(zoo.recipe(tasks=[str(zoo.tuned[0]), str(copy)], allow=["duplicate_task"])), out)


def test_a_zero_task_vector(zoo, out, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((zoo.base / "model.safetensors").read_bytes())
    data = zoo.recipe(tasks=[str(zoo.tuned[0]), str(copy)])
    refused(data, out, "copy equals the base in every merged tensor")
    merge(Recipe.from_data({**data, "allow": ["zero_task"]}), out)


@pytest.mark.parametrize("patterns", [{"keep_base": ["*"]}, {"exclude": ["*"]}, {"include": ["nothing"]}])
def test_patterns_that_leave_nothing_to_merge(zoo, out, patterns):
    said = refused(zoo.recipe(**patterns), out, "include, exclude and keep_base leave no floating tensor")
    assert "Another architecture" not in said


def test_true_is_no_number_among_parameters(zoo, out):
    refused(zoo.recipe(method="ties", parameters={"density": True}), out, "density: should be a number, found True")
    with pytest.raises(ParameterError, match="density: should be a number"):
        merge_stacks("ties", {"w": torch.ones(2, 3)}, density=[0.5, True])


def test_a_single_step_needs_no_list(zoo):
    recipe = Recipe.from_data(zoo.recipe(preprocess={"method": "dare", "density": 0.5}, postprocess="norm_match"))
    assert (recipe.preprocess, recipe.postprocess) == ([{"method": "dare", "density": 0.5}], ["norm_match"])


def test_methods_with_a_number_of_models(zoo, out):
    refused(zoo.recipe(method="slerp"), out, "slerp merges exactly 2 models, found 3")


def test_a_base_is_asked_for_where_it_is_needed(zoo, out):
    refused(
        {"tasks": [str(zoo.tuned[0])], "method": "ties"}, out, "ties works on differences to a base; name the model"
    )


def test_an_adapter_without_its_base(zoo, out, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(
        {"tasks": [str(tmp_path / "adapter")], "method": "average"},
        out,
        "an adapter is a change to its base; name the base",
    )


def test_quantised_checkpoints_are_not_averaged_as_if_codes_were_numbers(zoo, out):
    (zoo.tuned[0] / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    refused(zoo.recipe(), out, "ft1: a gptq checkpoint; its numbers are codes or need their scales")


def test_float8_with_scales_is_refused_and_plain_float8_is_read_as_numbers(zoo, out, tmp_path):
    def with_scale(state):
        for name in list(state):
            if name.endswith("up_proj.weight"):
                state[name] = state[name].clamp(-2, 2).to(torch.float8_e4m3fn)

    plain = zoo.tune("plain8", seed=1, change=with_scale)
    merge(Recipe.from_data(zoo.recipe(tasks=[str(plain)])), tmp_path / "fine")
    merged = load_file(tmp_path / "fine" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(
        merged,
        load_file(plain / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float(),
        rtol=1e-6,
        atol=1e-6,
    )
    scaled = zoo.tune(
        "scaled8",
        seed=1,
        change=lambda s: (with_scale(s), s.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)})),
    )
    refused(zoo.recipe(tasks=[str(scaled)]), out, "a quantised checkpoint .*up_proj.weight.*Dequantise it first")


def test_outputs_that_cannot_be(zoo, out):
    merge(Recipe.from_data(zoo.recipe()), out)
    with pytest.raises(RecipeError, match="exists already. Choose another name, or pass --overwrite"):
        merge(Recipe.from_data(zoo.recipe()), out)
    for place in (zoo.base, zoo.base / "merged", zoo.folder):
        with pytest.raises(RecipeError, match="inputs are never written to"):
            merge(Recipe.from_data(zoo.recipe()), place, overwrite=True)


@pytest.mark.parametrize("command", ["apply", "save", "merge"])
def test_what_is_read_through_sums_and_differences_is_not_written_over(zoo, tmp_path, command):
    stored = TaskVector.between(zoo.base, zoo.tuned[0]).save(tmp_path / "v.safetensors")
    files = [zoo.base / "model.safetensors", zoo.tuned[0] / "model.safetensors", stored]
    before = [file.read_bytes() for file in files]
    vector = TaskVector.load(stored)
    for place in (zoo.base, stored, zoo.tuned[0]) if command == "save" else (zoo.base, stored):
        with pytest.raises((OutputError, RecipeError), match="inputs are never written to"):
            if command == "apply":
                write(vector.apply_to(zoo.base), place, overwrite=True)
            elif command == "save":
                (TaskVector.between(zoo.base, zoo.tuned[0]) + 0.5 * vector).save(place, overwrite=True)
            else:
                merge(Recipe.from_data(zoo.recipe(tasks=[str(stored)])), place, overwrite=True)
    with pytest.raises(OutputError, match="lies inside the input"):
        TaskVector.between(zoo.base, zoo.tuned[0]).save(zoo.tuned[0] / "v.safetensors")
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("wrong", [None, "recipe.yaml", {"base": "b"}])
def test_what_is_no_recipe_is_not_merged(out, wrong):
    with pytest.raises(UsageError, match="expected a Recipe .* found"):
        merge(wrong, out)


def test_a_task_vector_is_no_base(zoo, out, tmp_path):
    stored = TaskVector.between(zoo.base, zoo.tuned[0]).save(tmp_path / "v.safetensors")
    refused(zoo.recipe(base=str(stored)), out, "v.safetensors is a task vector; name the model")


def test_a_disk_that_is_too_small(zoo, out, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    refused(zoo.recipe(), out, "the output needs .* but only 10 B are free")


def test_a_memory_budget_that_is_too_small(zoo, out):
    refused(zoo.recipe(memory="10kB"), out, "task_arithmetic needs about .* for tiles; the budget is 10.0 kB")
    refused(zoo.recipe(memory=30), out, "the budget is 30 B")


@pytest.mark.parametrize("size", ["lots", ". GB", "-5GB", -1, 0, True, 1.5, ""])
@pytest.mark.parametrize("key", ["memory", "shard_size"])
def test_sizes_that_are_none_are_told_with_their_key(key, size):
    text = json.dumps({key: size} if key == "memory" else {"output": {key: size}})[1:-1]
    with pytest.raises(RecipeError, match=f"line 4: (output.)?{key}: .*Write it like 5GB"):
        Recipe.from_text(f"base: a\nmethod: ties\ntasks: [b]\n{text}")
    assert Recipe.from_text("base: a\nmethod: ties\ntasks: [b]\nmemory: 1e9").memory == 10**9


@pytest.mark.parametrize("key", ["seed", "workers"])
def test_true_is_no_whole_number(key):
    with pytest.raises(RecipeError, match=f"{key}: should be a number, found True"):
        Recipe.from_data({"base": "a", "method": "ties", "tasks": ["b"], key: True})


def test_what_belongs_to_slices_is_not_passed_over_where_whole_models_are_merged(zoo):
    recipe = zoo.recipe()
    with pytest.raises(RecipeError, match="`layers` of .* belongs to `slices`"):
        Recipe.from_data({**recipe, "tasks": [{"path": str(zoo.tuned[0]), "layers": [0, 1]}]})
    with pytest.raises(RecipeError, match="tower: says where the layers of `slices` are"):
        Recipe.from_data({**recipe, "tower": "model.layers"})


@pytest.mark.parametrize(("key", "value"), [("skip", ["classifier*"]), ("tied", "both")])
def test_what_belongs_to_adapters_is_not_passed_over_at_a_whole_model(zoo, out, key, value):
    refused(zoo.recipe(tasks=[{"path": str(zoo.tuned[0]), key: value}]), out, f"`{key}` is for adapters")


def test_a_method_in_capitals_is_recognised(zoo, out):
    refused(zoo.recipe(method="TIES"), out, "Did you mean 'ties'")


def test_devices_and_dtypes_that_are_not_there(zoo, out):
    refused(zoo.recipe(device="tpu9"), out, "device: 'tpu9' is not")
    if not torch.cuda.is_available():
        refused(zoo.recipe(device="cuda"), out, "no CUDA device is available")
    refused(zoo.recipe(output={"dtype": "int4"}), out, "output.dtype: 'int4' is not a floating dtype")


def test_files_that_vanish_or_change_while_they_are_read(zoo, out, monkeypatch):
    import merging.streamed as streamed

    sweep = streamed.sweep

    def late(*args, **kwargs):
        outcome = sweep(*args, **kwargs)
        file = zoo.tuned[0] / "model.safetensors"
        file.write_bytes(file.read_bytes() + b" ")
        return outcome

    monkeypatch.setattr(streamed, "sweep", late)
    from taskvec.errors import ChangedFileError

    refused(zoo.recipe(), out, r"ft1/model\.safetensors: the file was written to while it was read", ChangedFileError)


def test_a_file_deleted_after_opening_is_still_read_whole(zoo, out):
    ready = prepare(Recipe.from_data(zoo.recipe()))
    (zoo.tuned[0] / "model.safetensors").unlink()
    assert ready.deltas.tile("lm_head.weight", 0, 10).stack.shape == (3, 10)


def test_results_that_overflow_are_errors_not_infinities(zoo, out):
    refused(zoo.recipe(scale=3e38, output={"dtype": "float16"}), out, "NaN or infinite|do not fit float16", Exception)


def test_merging_in_memory_checks_too():
    stack = torch.randn(2, 4, 4)
    with pytest.raises(UsageError, match="there is no method 'pbc'. Did you mean 'pcb'"):
        merge_stacks("pbc", {"w": stack})
    with pytest.raises(ParameterError, match="3 weights for 2 tasks"):
        merge_stacks("pcb", {"w": stack}, weights=[1, 2, 3])
    with pytest.raises(ParameterError, match="densty: pcb has no such parameter"):
        merge_stacks("pcb", {"w": stack}, densty=0.1)
    with pytest.raises(MismatchError, match="one number of tasks"):
        merge_stacks("pcb", {"w": stack, "v": torch.randn(3, 2)})
    with pytest.raises(MismatchError, match="must be floating point"):
        merge_stacks("pcb", {"w": stack.int()})
    with pytest.raises(UsageError, match="there are no stacks"):
        merge_stacks("pcb", {})
    with pytest.raises(ParameterError, match="values for 2 tasks"):
        merge_stacks("ties", {"w": stack}, density=[0.1, 0.2, 0.3])
    with pytest.raises(UsageError, match="no contributions"):
        merge_stacks("ties", {"w": stack}, contributions=True)


def test_parameters_by_depth_are_checked_for_every_tensor_before_anything_is_read(zoo, out):
    by_depth = {"density": 0.5, "epsilon": {"gradient": [0.1, 0.6]}}
    data = zoo.recipe(method="della", statistics="tensor", parameters=by_depth)
    said = refused(data, out, r"parameters: task 1: density 0.5 ± epsilon 0.6 must stay in \(0, 1\]")
    assert "(for model.layers.1." in said
    by_pattern = {"density": {"*mlp*": 0.1}}
    data = zoo.recipe(method="ties", statistics="tensor", parameters=by_pattern)
    refused(data, out, r"parameters.density: no pattern matches .*, and there is no `default`")
