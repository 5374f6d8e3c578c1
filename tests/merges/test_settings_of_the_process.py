"""What the rest of a program has set (default dtype and device, modes of autograd, threads) changes no bit of a merge."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from merging import Recipe, merge, merge_stacks

METHODS = ["pcb", "ties", "dare", "slerp", "sce", "model_stock", "tsv_m", "breadcrumbs"]


def on_disk(zoo, out, name):
    merge(Recipe.from_data(zoo.recipe(method=name, tasks=[str(path) for path in zoo.tuned[:2]])), out)
    return load_file(out / "model.safetensors")


def in_memory(name):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(2, 300, 1000, generator=generator, dtype=torch.float32)
    return merge_stacks(name, {"w": stack})


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic algorithms": deterministic,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", METHODS)
def test_settings_of_torch_change_no_bit(zoo, tmp_path, name, setting):
    disk, memory = on_disk(zoo, tmp_path / "plain", name), in_memory(name)
    with SETTINGS[setting]():
        assert same(on_disk(zoo, tmp_path / "set", name), disk)
        assert same(in_memory(name), memory)


def test_threads_of_a_program_merge_at_once(zoo, tmp_path):
    expected = on_disk(zoo, tmp_path / "alone", "pcb")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: on_disk(zoo, tmp_path / f"thread{i}", "pcb"), range(4)))
    assert all(same(one, expected) for one in found)
