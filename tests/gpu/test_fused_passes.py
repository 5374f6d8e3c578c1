"""The fused passes themselves: on a GPU, or on Triton's interpreter where Triton is installed without one."""

import os

import pytest
import torch
from torch import Tensor

from merging import merge_stacks
from taskvec.plan import Formula

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"even": (4, 256), "odd": (7, 11), "one": (1,)}  # even ones are read 16 bytes at a time
WEIGHTS = [1.0, 0.3, 2.0]


@pytest.fixture(scope="module")
def fused():
    if HERE.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    from taskvec import fused

    return fused


@pytest.fixture(scope="module")
def stacks() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(3, *shape, generator=draw).to(HERE) for name, shape in SHAPES.items()}


def entries(fused, stacks: dict[str, Tensor], weights=WEIGHTS, *, apart: bool = False):
    flat = {name: stack.reshape(3, -1) for name, stack in stacks.items()}
    return [
        fused.Entry(name, [row.clone() for row in stack] if apart else stack, None, weights)
        for name, stack in flat.items()
    ]


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "rows apart"])
def test_a_weighted_sum_is_that_of_the_plain_way(fused, stacks, apart):
    found = {name: torch.full(shape, torch.nan, device=HERE) for name, shape in SHAPES.items()}
    passes = fused.Resident(entries(fused, stacks, apart=apart))
    assert passes.merge(Formula("weighted sum", {}), found, scale=0.5)
    for name, expected in merge_stacks("task_arithmetic", stacks, weights=WEIGHTS, scale=0.5).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)
    squares = [sum(float(stack[task].double().square().sum()) for stack in stacks.values()) for task in range(3)]
    torch.testing.assert_close(torch.tensor(passes.squares), torch.tensor(squares), rtol=1e-6, atol=0)


def test_sums_go_onto_the_base_and_are_rounded_once(fused, stacks):
    draw = torch.Generator().manual_seed(1)
    base = {name: torch.randn(shape, generator=draw).to(HERE) for name, shape in SHAPES.items()}
    rows = {name: [(base[name] + delta).flatten() for delta in stack] for name, stack in stacks.items()}
    found = {name: torch.full(shape, torch.nan, device=HERE) for name, shape in SHAPES.items()}
    parts = [fused.Entry(name, rows[name], base[name].flatten(), WEIGHTS) for name in SHAPES]
    assert fused.Resident(parts).merge(Formula("weighted sum", {}), found, onto_base=True)
    for name in SHAPES:
        deltas = torch.stack([row.view(SHAPES[name]) - base[name] for row in rows[name]])
        expected = base[name] + merge_stacks("task_arithmetic", {name: deltas}, weights=WEIGHTS)[name]
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)


def test_inner_products_are_those_of_float64(fused, stacks):
    found = fused.Resident(entries(fused, stacks)).gram()
    for name, stack in stacks.items():
        flat = stack.reshape(3, -1).double().cpu()
        torch.testing.assert_close(found[name], flat @ flat.T, rtol=1e-12, atol=1e-12)


def test_the_same_tables_are_not_copied_again(fused, stacks):
    fused.Resident(entries(fused, stacks))
    before = fused._tables.cache_info().misses
    fused.Resident(entries(fused, stacks))
    assert fused._tables.cache_info().misses == before


def test_other_weights_are_other_tables(fused, stacks):
    one = fused.Resident(entries(fused, stacks, [1.0, 1.0, 1.0]))
    other = fused.Resident(entries(fused, stacks, [0.0, 0.0, 2.0]))
    found = {name: torch.empty(shape, device=HERE) for name, shape in SHAPES.items()}
    for passes, wanted in ((one, sum), (other, lambda stack: 2 * stack[2])):
        passes.merge(Formula("weighted sum", {}), found)
        for name, stack in stacks.items():
            torch.testing.assert_close(found[name], wanted(stack), rtol=1e-6, atol=1e-6)
