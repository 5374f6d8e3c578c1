"""The first model lends the result its configuration, also where it is a model with an adapter over it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging import Recipe, merge

MORE = Path(__file__).parent.parent / "goldens" / "mergekit_more"
ADAPTED = "inputs/ft1+inputs/lora"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copytree(MORE / "layers" / "inputs", tmp_path / "inputs")
    (tmp_path / "inputs" / "lora").mkdir()
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    factors = {key.format("A"): torch.ones(2, 8), key.format("B"): torch.full((8, 2), 0.1)}
    save_file(factors, tmp_path / "inputs" / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "inputs" / "lora" / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configuration(folder, recipe):
    merge(Recipe.from_text(json.dumps(recipe)), folder / "out")
    return json.loads((folder / "out" / "config.json").read_text())


def test_its_dtype_is_that_of_the_result(folder):
    models = [{"model": model, "parameters": {"weight": 1}} for model in (ADAPTED, "inputs/ft2")]
    found = configuration(folder, {"merge_method": "linear", "models": models, "dtype": "float16"})
    assert found["torch_dtype"] == "float16"


def test_its_number_of_layers_is_that_of_the_result(folder):
    slices = [
        {"sources": [{"model": ADAPTED, "layer_range": [0, 3]}]},
        {"sources": [{"model": "inputs/ft2", "layer_range": [1, 4]}]},
    ]
    assert configuration(folder, {"merge_method": "passthrough", "slices": slices})["num_hidden_layers"] == 6


def test_a_first_model_under_other_names_lends_its_files_too(folder):
    tensors = load_file("inputs/ft1/model.safetensors")
    save_file({f"inner.{name}": value for name, value in tensors.items()}, "inputs/ft1/model.safetensors")
    tasks = [{"path": "inputs/ft1", "rename": {"inner.": ""}}, "inputs/ft2"]
    merge(Recipe.from_data({"method": "average", "tasks": tasks}), folder / "out")
    assert (folder / "out" / "config.json").read_bytes() == (folder / "inputs" / "ft1" / "config.json").read_bytes()
