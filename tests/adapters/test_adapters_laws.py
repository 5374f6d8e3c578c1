"""Laws of every plain LoRA, over shapes, ranks, scalings and orientations, against a float64 reading of the formula."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from taskvec import lora
from taskvec.adapter import Adapter
from taskvec.errors import NonFiniteError
from taskvec.source import in_memory

sizes = st.integers(1, 9)


@st.composite
def plain_loras(draw):
    """One plain LoRA over a base of one tensor: the base, the two files, and the delta by the formula."""
    kind = draw(st.sampled_from(["linear", "in out", "embedding", "convolution"]))
    rank, alpha, stable = draw(st.integers(1, 6)), draw(st.sampled_from([0.5, 1, 3, 16])), draw(st.booleans())
    out, inner = draw(sizes), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    kernel = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))] if kind == "convolution" else []
    a = torch.randn(rank, inner, *kernel, generator=generator)
    b = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
    scaling = alpha / math.sqrt(rank) if stable else alpha / rank
    delta = scaling * torch.tensordot(b.double().reshape(out, rank), a.double(), 1)
    delta = delta.T if kind in ("in out", "embedding") else delta
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": stable,
        "fan_in_fan_out": kind == "in out",
    }
    names = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    tensors = {f"base_model.model.layer.{name}": tensor for name, tensor in zip(names, (a, b))}
    return torch.zeros(delta.shape), config, tensors, delta


@settings(max_examples=60, deadline=None)
@given(plain_loras(), st.integers(1, 40), st.randoms(use_true_random=False))
def test_a_delta_is_its_formula_however_it_is_cut(made, block, random):
    base, config, tensors, expected = made
    before = lora.BLOCK
    lora.BLOCK = block  # small enough that a tensor has several blocks
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_file(tensors, Path(folder) / "adapter_model.safetensors")
            (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
            adapter = Adapter.open(folder, in_memory({"layer.weight": base}))
            whole, product = adapter.read("layer.weight"), adapter.low_rank("layer.weight")
            torch.testing.assert_close(whole.double(), expected, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(product.dense().double(), expected, atol=1e-4, rtol=1e-5)
            assert product.rank == config["r"]
            assert adapter.infos["layer.weight"].shape == tuple(whole.shape) == product.shape
            cuts = sorted(random.randint(0, whole.numel()) for _ in range(3))
            pieces = [adapter.read_flat("layer.weight", *cut) for cut in zip([0, *cuts], [*cuts, whole.numel()])]
            assert torch.equal(torch.cat(pieces), whole.reshape(-1))
    finally:
        lora.BLOCK = before


@pytest.mark.parametrize("threads", [1, 2])
def test_a_large_delta_has_the_same_bits_by_pieces_and_with_any_number_of_threads(tmp_path, threads):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "base_model.model.layer.lora_A.weight": torch.randn(16, 700, generator=generator),
        "base_model.model.layer.lora_B.weight": torch.randn(900, 16, generator=generator),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 8}))
    adapter = Adapter.open(tmp_path, in_memory({"layer.weight": torch.zeros(900, 700)}))
    whole = adapter.read("layer.weight").reshape(-1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in (99_991, 262_144, 350_000):
            pieces = [
                adapter.read_flat("layer.weight", i, min(i + step, len(whole))) for i in range(0, len(whole), step)
            ]
            assert torch.equal(torch.cat(pieces), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_every_stored_dtype_is_looked_through_for_nan(dtype):
    whole = torch.ones(5).to(dtype)
    assert lora.finite(whole, "w", "adapter") is whole
    spoilt = torch.tensor([1.0, float("nan"), 2.0, float("nan")]).to(dtype)
    with pytest.raises(NonFiniteError, match="w: adapter holds 2 NaN"):
        lora.finite(spoilt, "w", "adapter")


def test_finite_values_whose_sum_is_not_are_finite():
    large = torch.full((4,), 3e38)
    assert lora.finite(large, "w", "adapter") is large
