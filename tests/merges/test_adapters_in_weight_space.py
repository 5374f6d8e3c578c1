"""Methods that work on weights see a whole model in an adapter: the base where it changes nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging import Recipe, merge


@pytest.fixture
def parts(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {
        "model.lin.weight": torch.randn(6, 4, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(6, generator=generator).bfloat16(),
    }
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    tuned = {}
    for name in ("one", "two"):
        low, high = torch.randn(2, 4, generator=generator), torch.randn(6, 2, generator=generator)
        (tmp_path / name).mkdir()
        key = "base_model.model.model.lin.lora_{}.weight"
        save_file({key.format("A"): low, key.format("B"): high}, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lin"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        tuned[name] = base["model.lin.weight"].float() + high @ low
    return tmp_path, base, tuned


@pytest.mark.parametrize("method", ["average", "linear", "passthrough", "slerp", "karcher", "multislerp"])
def test_a_tensor_that_no_adapter_changes_stays_the_bases(parts, method):
    place, base, tuned = parts
    names = ["one"] if method == "passthrough" else ["one", "two"]
    recipe = {"method": method, "base": str(place / "base"), "tasks": {name: str(place / name) for name in names}}
    merge(Recipe.from_data({**recipe, "output": {"dtype": "float32"}}), place / "out")
    merged = load_file(place / "out" / "model.safetensors")
    torch.testing.assert_close(merged["model.norm.weight"], base["model.norm.weight"].float(), rtol=1e-5, atol=1e-6)
    if method in ("average", "linear"):
        torch.testing.assert_close(merged["model.lin.weight"], (tuned["one"] + tuned["two"]) / 2)
