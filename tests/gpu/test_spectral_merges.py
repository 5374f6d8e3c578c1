"""Spectral merges on a GPU: the CPU's numbers within rounding, the same ranks, the same warnings."""

import pytest
import torch

from merging import iterations, merge_stacks
from merging.spectra import svds
from taskvec.sweep import Outcome

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = {"square": (192, 192), "up": (256, 128), "down": (96, 320), "bias": (77,)}


def zoo(tasks=9, rank=None, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    stacks = {}
    for name, shape in SHAPES.items():
        if rank is None or len(shape) < 2:
            stacks[name] = torch.randn(tasks, *shape, generator=draw) + 0.3 * torch.randn(*shape, generator=draw)
        else:
            stacks[name] = torch.randn(tasks, shape[0], rank, generator=draw) @ torch.randn(
                tasks, rank, shape[1], generator=draw
            )
    return {name: (stack * 1e-3).to(dtype) for name, stack in stacks.items()}


def both(method, stacks, **more):
    here, there = Outcome(), Outcome()
    expected = merge_stacks(method, stacks, outcome=here, **more)
    found = merge_stacks(method, {name: stack.cuda() for name, stack in stacks.items()}, outcome=there, **more)
    return expected, found, here, there


METHODS = [
    ("iso_c", {}),
    ("iso_cts", {}),
    ("tsv_m", {}),
    ("cart", {}),
    ("knots", {"rule": "mean"}),
    ("task_arithmetic", {"postprocess": [{"method": "subspace_boosting", "share": 0.5}]}),
    ("task_arithmetic", {"postprocess": ["svc"]}),
    ("low_rank", {"rank": 7}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [None, 3], ids=["full rank", "low rank"])
@pytest.mark.parametrize(("method", "more"), METHODS)
def test_spectral_merges_are_those_of_the_cpu(method, more, rank, dtype):
    if rank is not None and dtype is torch.bfloat16:
        pytest.skip("rounding to bfloat16 makes the rank full")
    expected, found, here, there = both(method, zoo(rank=rank, dtype=dtype), **more)
    for name, wanted in expected.items():
        error = float((found[name].cpu().double() - wanted.double()).norm() / wanted.double().norm())
        assert error < 2e-5, f"{name}: {error:.2e}"
    assert there.warnings == here.warnings
    assert there.facts == here.facts


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m"])
def test_the_same_spectral_merge_twice_is_the_same_bits(method):
    stacks = {name: stack.cuda() for name, stack in zoo().items()}
    one, two = (merge_stacks(method, stacks) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in stacks)


@pytest.mark.parametrize("method", ["iso_c", "tsv_m"])
def test_weighted_spectral_merges_are_those_of_the_cpu(method):
    expected, found, _, _ = both(method, zoo(tasks=3), weights=[1.0, 0.5, 2.0], scale=0.7)
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name].cpu(), wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m", "cart"])
def test_matrices_merged_together_are_those_merged_alone(method):
    draw = torch.Generator().manual_seed(1)
    shapes = {f"{kind}{layer}": shape for layer in range(3) for kind, shape in SHAPES.items()}
    shapes |= {"lying": SHAPES["up"][::-1], "empty": (0, 8)}
    stacks = {name: torch.randn(8, *shape, generator=draw).cuda() for name, shape in shapes.items()}
    stacks["up1"][:, :, 5:] = 0  # of low rank among others of full rank
    stacks["square2"][3] = 0
    told = Outcome()
    together = merge_stacks(method, stacks, outcome=told)
    for name, stack in stacks.items():
        if not stack.numel():
            continue
        alone = merge_stacks(method, {name: stack})[name]
        expected = merge_stacks(method, {name: stack.cpu()})[name].double()
        for found in (together[name], alone):
            error = float((found.cpu().double() - expected).norm() / expected.norm())
            assert error < 1e-6, f"{name}: {error:.2e}"
    here = Outcome()
    merge_stacks(method, {name: stack.cpu() for name, stack in stacks.items()}, outcome=here)
    assert told.warnings == here.warnings
    assert told.norms == pytest.approx(here.norms, rel=1e-6)


def test_the_largest_directions_are_found_without_eigenproblems_there():
    draw = torch.Generator("cuda").manual_seed(2)
    stack = torch.randn(10, 300, 260, device="cuda", generator=draw)
    wide = stack.double()
    _, _, proven = iterations.leading(wide.mT @ wide, 32)
    assert proven == [True] * 10
    for one, found in zip(wide, svds(stack, torch.float32, most=32), strict=True):
        left, values, right = torch.linalg.svd(one.cpu(), full_matrices=False)
        wanted = (left[:, :32] * values[:32]) @ right[:32]
        assert float((found.dense().cpu() - wanted).norm() / wanted.norm()) < 1e-9
        torch.testing.assert_close(found.values.cpu(), values[:32], rtol=1e-12, atol=0)


def test_what_is_not_proven_there_is_left_to_the_eigenproblem():
    stack = torch.zeros(4, 200, 160, device="cuda")
    stack[0] = torch.eye(200, 160)
    stack[1, :8, :8] = torch.eye(8)
    stack[2] = torch.randn(200, 160, generator=torch.Generator().manual_seed(3))
    ranks = [found.rank for found in svds(stack, torch.float32, most=20)]
    assert ranks[1::2] == [8, 0]
    assert all(rank >= 20 for rank in ranks[::2])
