"""A model written in another dtype says so in its configuration: transformers loads it in what is said there."""

import json

import pytest
import torch
from safetensors.torch import save_file

from taskvec import Checkpoint, write


@pytest.mark.parametrize(("dtype", "said"), [("bf16", "bfloat16"), (None, "float32"), ("float8_e4m3fn", "float32")])
def test_a_copy_in_another_dtype_says_which(tmp_path, dtype, said):
    config = {"model_type": "llama", "dtype": "float32", "vision_config": {"torch_dtype": "float32"}}
    (tmp_path / "in").mkdir()
    save_file({"w": torch.ones(2, 2)}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    write(Checkpoint.open(tmp_path / "in"), tmp_path / "out", dtype=dtype)
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == {"model_type": "llama", "dtype": said, "vision_config": {"torch_dtype": said}}
