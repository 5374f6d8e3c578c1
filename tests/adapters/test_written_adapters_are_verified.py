"""Adapters that were written can be checked and made again; merging adapters never makes anything of a model's size."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import taskvec.checkpoint
from merging import Recipe, merge
from merging.adapter_out import extract_lora, merge_to_adapter, verify_adapter
from taskvec.adapter import Adapter
from taskvec.checkpoint import Checkpoint
from taskvec.errors import BaseMismatchError, NotAModelError, RecipeError, VerificationError


@pytest.fixture
def zoo(llama, saved_adapter, tmp_path):
    """The base on disk and two adapters on it."""
    llama.save_pretrained(tmp_path / "base")
    kinds = [{"r": 2, "target_modules": ["q_proj", "up_proj"]}, {"r": 3, "target_modules": ["q_proj", "o_proj"]}]
    paths = [saved_adapter(llama, LoraConfig(**kind), tmp_path / f"a{i}") for i, kind in enumerate(kinds)]
    return {"base": str(tmp_path / "base"), "tasks": [str(path) for path in paths]}


def recipe(zoo, **changes):
    return Recipe.from_data({**zoo, "method": "task_arithmetic", **changes})


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"scale": 0.5}, {}),
        ({"method": "ties", "parameters": {"density": 0.5}}, {"rank": 4, "dtype": torch.bfloat16}),
        ({"method": "knots"}, {"rank": "energy=0.9"}),
        ({}, {"rank": "rank=2", "solver": "randomised", "other": "drop"}),
    ],
)
def test_a_written_adapter_is_verified_and_comes_out_again(zoo, tmp_path, run, changes, options):
    merge_to_adapter(recipe(zoo, **changes), tmp_path / "out", **options)
    assert verify_adapter(tmp_path / "out")["deep"] is False
    assert verify_adapter(tmp_path / "out", deep=True)["tensors"] == len(
        load_file(tmp_path / "out" / "adapter_model.safetensors")
    )
    code, out, _ = run("verify", tmp_path / "out", "--deep")
    assert code == 0
    assert "come out the same again" in out
    assert sorted(path.name for path in tmp_path.iterdir() if "verify" in path.name) == []


def test_an_extracted_adapter_is_verified_and_comes_out_again(zoo, tmp_path):
    merge(recipe(zoo), tmp_path / "tuned")
    base, tuned = Checkpoint.open(zoo["base"]), Checkpoint.open(tmp_path / "tuned")
    extract_lora(base, tuned, tmp_path / "out", rank=5, skip=["*o_proj*"])
    assert verify_adapter(tmp_path / "out", deep=True)["deep"]
    facts = json.loads((tmp_path / "out" / "taskvec.json").read_text())
    assert facts["extracted"]["skip"] == ["*o_proj*"]


def test_what_changed_since_is_named(zoo, tmp_path, run):
    merge_to_adapter(recipe(zoo), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(VerificationError, match=f"{name} differ from what was recorded"):
        verify_adapter(tmp_path / "out")
    assert run("verify", tmp_path / "out")[0] == 1
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(VerificationError, match=name):
        verify_adapter(tmp_path / "out")
    save_file(tensors, tmp_path / "out" / "adapter_model.safetensors")
    assert verify_adapter(tmp_path / "out")
    config = tmp_path / "out" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha"', '"lora_alpha" '))
    with pytest.raises(VerificationError, match=r"adapter_config.json changed since"):
        verify_adapter(tmp_path / "out")


def test_a_changed_input_is_named(zoo, tmp_path):
    merge_to_adapter(recipe(zoo), tmp_path / "out")
    path = tmp_path / "a1" / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(path).items()}, path)
    assert verify_adapter(tmp_path / "out")
    with pytest.raises(BaseMismatchError, match="these inputs have changed since: a1"):
        verify_adapter(tmp_path / "out", deep=True)


def test_adapters_of_others_have_no_provenance(zoo):
    with pytest.raises(NotAModelError, match=r"an adapter without provenance \(taskvec.json\)"):
        verify_adapter(zoo["tasks"][0])


def test_recipes_that_change_the_base_are_no_adapters(zoo, tmp_path):
    with pytest.raises(RecipeError, match="- tokenizer: an adapter changes the tensors of its base as they are"):
        merge_to_adapter(recipe(zoo, tokenizer="union"), tmp_path / "out")


@pytest.mark.parametrize("rule", ["ties", "mean"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
def test_knots_of_factors_is_knots_of_the_deltas(zoo, tmp_path, rule, weights):
    tasks = [{"path": path, "weight": weight} for path, weight in zip(zoo["tasks"], weights)]
    asked = recipe(zoo, method="knots", tasks=tasks, scale=0.8, parameters={"rule": rule, "density": 0.3})
    report = merge_to_adapter(asked, tmp_path / "out")
    assert report.error < 1e-6
    assert max(kept.rank for kept in report.kept) <= 5
    merge(asked, tmp_path / "merged")
    base, merged = Checkpoint.open(zoo["base"]), Checkpoint.open(tmp_path / "merged")
    written = Adapter.open(tmp_path / "out", base)
    moved = 0
    for name in base.infos:
        delta = merged.read(name) - base.read(name)
        found = written.read(name) if name in written.infos else torch.zeros_like(delta)
        # the checkpoint's deltas are base + delta less base, in float32
        assert_close(found, delta, atol=2e-5, rtol=1e-3)
        moved += bool(delta.any())
    assert moved == len(report.kept)


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation of this thread makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.largest = max(self.largest, tensor.numel())
        return out


SIDE, RANK, TASKS = 256, 2, 6


@pytest.fixture
def wide(tmp_path):
    """A model of square matrices and adapters on it, written by hand."""
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
    (tmp_path / "base").mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    state = {f"{name}.weight": torch.randn(SIDE, SIDE, generator=generator) for name in names}
    save_file(state, tmp_path / "base" / "model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    paths = []
    for task in range(TASKS):
        folder = tmp_path / f"a{task}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        factors = {}
        for name in names:
            key = f"base_model.model.{name}"
            factors[f"{key}.lora_A.weight"] = torch.randn(RANK, SIDE, generator=generator)
            factors[f"{key}.lora_B.weight"] = torch.randn(SIDE, RANK, generator=generator)
        save_file(factors, folder / "adapter_model.safetensors")
        paths.append(str(folder))
    return {"base": str(tmp_path / "base"), "tasks": paths}


@pytest.mark.parametrize(
    ("changes", "rank", "most"),
    [
        ({"method": "task_arithmetic"}, "exact", 4 * SIDE * RANK * TASKS),
        ({"method": "average"}, "rank=3", 4 * SIDE * RANK * TASKS),
        ({"method": "knots"}, "exact", SIDE * RANK * TASKS * TASKS),
    ],
)
def test_merging_many_adapters_reads_and_makes_nothing_of_a_matrix_s_size(
    wide, tmp_path, monkeypatch, changes, rank, most
):
    read: list[int] = []
    real = taskvec.checkpoint._File.read_into

    def noted(self, place, start, raw):
        read.append(raw.numel() // place.info.dtype.itemsize)
        real(self, place, start, raw)

    monkeypatch.setattr(taskvec.checkpoint._File, "read_into", noted)
    with Sizes() as sizes:
        report = merge_to_adapter(Recipe.from_data({**wide, **changes}), tmp_path / "out", rank=rank)
    assert len(report.kept) == 4
    assert read == []  # no tensor of the base is ever read
    # factors side by side (in bytes, for digests), or the coordinates of all tasks in the basis that they span
    assert SIDE * RANK < sizes.largest <= most
    assert most < SIDE * SIDE
