"""Exact order statistics: the same numbers as a full sort, for every input and every way of cutting it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskvec.order as order
from taskvec.deltas import StackDeltas
from taskvec.order import OrderStatistic, order_statistics, radix_statistics
from taskvec.plan import Report
from taskvec.sweep import Options, Stage, sweep


def statistics(stack, ranks, *, how=None, of=lambda tile: tile.stack, pieces=1, **options):
    """Runs a plan that only asks for order statistics; `pieces` tensors instead of one."""
    found = []

    def plan(deltas):
        if how == "radix":
            rows = yield from radix_statistics(of, ranks)
            found.append([[rows[i][rank] for rank in wanted] for i, wanted in enumerate(ranks)])
        else:
            found.append((yield from order_statistics(of, ranks, deltas.numel)))
        yield Report({})
        return lambda tile: tile.stack[0]

    parts = {f"w{i}": part for i, part in enumerate(stack.split(-(-stack.shape[1] // pieces), 1))}
    outcome = sweep(
        StackDeltas(parts), [Stage("probe", "combine", plan)], lambda tile: None, options=Options(**options)
    )
    return found[0], outcome


def by_sorting(stack, ranks):
    result = []
    for row, wanted in zip(stack.numpy(), ranks):
        ordered = np.sort(row)
        result.append(
            [
                OrderStatistic(float(ordered[k]), int((row < ordered[k]).sum()), int((row == ordered[k]).sum()))
                for k in wanted
            ]
        )
    return result


KINDS = {
    "gaussian": lambda g, n: torch.randn(n, generator=g),
    "heavy tails": lambda g, n: torch.randn(n, generator=g) / torch.rand(n, generator=g).clamp_(min=1e-4),
    "mostly zeros": lambda g, n: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.2),
    "bf16 ties": lambda g, n: torch.randn(n, generator=g).bfloat16().float(),
    "constant": lambda g, n: torch.full((n,), 0.25),
    "layers of different scale": lambda g, n: (
        torch.randn(n, generator=g) * 10 ** (torch.arange(n) // (n // 7) % 4 - 4.0)
    ),
    "two values": lambda g, n: (torch.rand(n, generator=g) < 0.5).float() - 0.5,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["bracket", "radix"])
def test_every_rank_is_that_of_a_full_sort(kind, how):
    size = 400_000
    generator = torch.Generator().manual_seed(5)
    stack = torch.stack([KINDS[kind](generator, size) for _ in range(2)])
    ranks = [[0, 40, size // 10, size // 2, int(size * 0.9), size - 41, size - 1]] * 2
    found, outcome = statistics(stack, ranks, how=how, pieces=3)
    assert found == by_sorting(stack, ranks)
    assert outcome.passes <= (3 if how == "radix" else 4)


def test_one_pass_is_enough_in_the_common_case():
    size = 600_000
    stack = torch.randn(3, size, generator=torch.Generator().manual_seed(0)).abs()
    _, outcome = statistics(stack, [[60, int(size * 0.9), size - 1]] * 3, pieces=2)
    assert outcome.passes == 2  # one for the statistics, one for the kernel


def test_a_bracket_that_misses_falls_back_to_the_exact_count(monkeypatch):
    size = 300_000
    stack = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    ranks = [[size // 2], [size // 3]]
    monkeypatch.setattr(order, "_brackets", lambda sample, ranks, numel: [order._Bracket(9.0, 10.0) for _ in ranks])
    found, outcome = statistics(stack, ranks)
    assert found == by_sorting(stack, ranks)
    assert outcome.passes == 4


def test_many_values_inside_a_bracket_are_compressed_and_stay_exact(monkeypatch):
    size = 300_000
    stack = torch.randn(1, size, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    monkeypatch.setattr(order, "_DISTINCT", 100)
    monkeypatch.setattr(order, "_brackets", lambda sample, ranks, numel: [order._Bracket(-3.0, 3.0) for _ in ranks])
    ranks = [[size // 2, size // 5]]
    assert statistics(stack, ranks)[0] == by_sorting(stack, ranks)
    monkeypatch.setattr(order, "_MOST", 10)
    assert statistics(stack, ranks)[0] == by_sorting(stack, ranks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_too_much_to_keep_is_counted_and_one_more_pass_finds_it(monkeypatch, kind, workers):
    size = 600_000
    stack = torch.stack([KINDS[kind](torch.Generator().manual_seed(seed), size) for seed in range(2)])
    monkeypatch.setattr(order, "_DISTINCT", 2_000)
    monkeypatch.setattr(order, "_MOST", 4_000)
    monkeypatch.setattr(order, "_EDGES", 300)

    def never(*_):
        raise AssertionError("the radix count was asked")

    monkeypatch.setattr(order, "radix_statistics", never)
    low, high = float(stack.min()), float(stack.max())

    def wide(sample, ranks, numel):
        return [order._Bracket(low, high, order._edges(np.sort(sample))) for _ in ranks]

    monkeypatch.setattr(order, "_brackets", wide)
    ranks = [[0, size // 2, size - 1], [7, size // 3, size - 2]]
    found, outcome = statistics(stack, ranks, pieces=40, workers=workers, tile=1 << 15)
    assert found == by_sorting(stack, ranks)
    assert outcome.passes <= 3  # one counts, one finds, one merges


def test_a_bracket_that_is_narrowed_in_vain_falls_back_to_the_exact_count(monkeypatch):
    size = 300_000
    stack = torch.randn(1, size, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(order, "_DISTINCT", 50)
    monkeypatch.setattr(order, "_MOST", 100)
    monkeypatch.setattr(order, "_EDGES", 2)
    monkeypatch.setattr(order, "_brackets", lambda sample, ranks, numel: [order._Bracket(-9.0, 9.0) for _ in ranks])
    found, outcome = statistics(stack, [[size // 2]], pieces=9)
    assert found == by_sorting(stack, [[size // 2]])
    assert outcome.passes == 3 + 2 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_zero_counts_as_zero_and_float64_keeps_all_bits(dtype):
    stack = torch.tensor([[-0.0, 0.0, 1e-30, -1.0, 5.0, -1e-30]], dtype=dtype).repeat(1, 50_000)
    ranks = [[0, 50_000, 100_000, 250_000]]
    for how in ("bracket", "radix"):
        values = [[s.value for s in row] for row in statistics(stack, ranks, how=how)[0]]
        assert values == [[-1.0, float(torch.tensor(-1e-30, dtype=dtype)), 0.0, 5.0]]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**31), st.sampled_from(sorted(KINDS)), st.floats(0, 1))
def test_small_inputs_at_any_rank(size, seed, kind, share):
    generator = torch.Generator().manual_seed(seed)
    if kind == "layers of different scale" and size < 7:
        kind = "gaussian"
    stack = KINDS[kind](generator, size)[None]
    ranks = [[min(size - 1, int(share * size))]]
    expected = by_sorting(stack, ranks)
    assert statistics(stack, ranks, pieces=min(3, size))[0] == expected
    assert statistics(stack, ranks, how="radix")[0] == expected


@pytest.mark.parametrize(
    "options", [{"workers": 1}, {"workers": 3}, {"tile": 1 << 15}, {"tile": 1 << 18}, {"memory": 1 << 20}]
)
def test_cutting_and_threads_change_nothing(options):
    size = 500_000
    stack = torch.randn(2, size, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    ranks = [[5, size // 3, size - 2]] * 2
    assert statistics(stack, ranks, pieces=4, **options)[0] == by_sorting(stack, ranks)
