"""The fused passes themselves: on a GPU, or on Triton's interpreter where Triton is installed without one."""

import numpy as np
import pytest
import torch
from torch import Tensor

from merging import merge_stacks
from taskvec.plan import Formula

# the interpreter computes with numpy, which warns of the infinities that a GPU takes in its stride
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"even": (4, 256), "odd": (7, 11), "one": (1,)}  # even ones are read 16 bytes at a time
WEIGHTS = [1.0, 0.3, 2.0]


@pytest.fixture(scope="module")
def fused():
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


def flat_of(stacks: dict[str, Tensor]) -> Tensor:
    return torch.cat([stack.reshape(3, -1) for stack in stacks.values()], 1)


def assert_ranked(found, scores: Tensor, ranks: list[list[int]], rtol: float) -> None:
    """Each statistic is the value of that rank; where the values are the same bits, its counts are exact."""
    for row, statistics, wanted in zip(scores, found, ranks):
        ordered = row.sort().values
        for statistic, rank in zip(statistics, wanted):
            assert statistic.value == pytest.approx(float(ordered[rank]), rel=rtol, abs=1e-12)
            if rtol == 0:
                assert statistic.below == int((row < statistic.value).sum())
                assert statistic.equal == int((row == statistic.value).sum())
            else:
                assert statistic.below <= rank < statistic.below + statistic.equal


@pytest.mark.parametrize("coarse", [False, True], ids=["all different", "many equal"])
def test_ranks_of_magnitudes_are_those_of_a_sort(fused, stacks, coarse):
    import triton

    if HERE.type == "cpu" and triton.__version__ < "3.5" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.4's interpreter loops up to a tensor only with an older numpy")
    if coarse:
        stacks = {name: (stack * 2).round() / 2 for name, stack in stacks.items()}
    magnitudes = flat_of(stacks).abs()
    numel = magnitudes.shape[1]
    ranks = [[3, numel * 9 // 10, numel - 1]] * 3
    found = fused.Resident(entries(fused, stacks)).order_statistics(Formula("magnitude", {}), ranks)
    assert_ranked(found, magnitudes.cpu(), ranks, 0)


def pcb_numbers(flat: Tensor) -> dict[str, list[float]]:
    ordered = flat.abs().sort(1).values
    return {"low": ordered[:, 2].tolist(), "high": ordered[:, -4].tolist(), "largest": ordered[:, -1].tolist()}


def pcb_scores(flat: Tensor, numbers: dict[str, list[float]]) -> Tensor:
    """Equation by equation in float64."""
    wide = flat.double().cpu()
    low, high = (torch.tensor(numbers[end], dtype=torch.float64)[:, None] for end in ("low", "high"))
    share = (wide.abs().clamp(low, high) - low) / (high - low)
    return torch.exp(3 * share.square()) * torch.tanh(wide * wide.sum(0))


@pytest.mark.parametrize("size", [1e-4, 0.1, 3.0], ids=["tiny", "tanh by its polynomial", "tanh saturated"])
@pytest.mark.parametrize("coarse", [False, True], ids=["all different", "many equal"])
def test_pcb_scores_and_merges_are_the_equations(fused, stacks, size, coarse):
    stacks = {name: (stack.round() if coarse else stack) * size for name, stack in stacks.items()}
    flat = flat_of(stacks)
    numbers, numel = pcb_numbers(flat), flat.shape[1]
    scores = pcb_scores(flat, numbers)
    ranks = [[numel * 9 // 10, numel - 1]] * 3
    found = fused.Resident(entries(fused, stacks)).order_statistics(Formula("pcb score", numbers), ranks)
    assert_ranked(found, scores, ranks, 2e-6)

    cut, top = ([row[k].value for row in found] for k in range(2))
    told = numbers | {"cut": cut, "top": top, "keeps": [t > c for t, c in zip(top, cut)]}
    merged = {name: torch.full(shape, torch.nan, device=HERE) for name, shape in SHAPES.items()}
    assert fused.Resident(entries(fused, stacks)).merge(Formula("pcb", told), merged)
    least, reach = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (cut, top))
    above = scores - least
    above[above < 3e-6 * scores.abs()] = 0.0  # many are the threshold itself, which was found in float32
    shares = above / (reach - least).clamp(min=1e-300) * (reach > least)
    ends = (torch.tensor(numbers[end], dtype=torch.float64)[:, None] for end in ("low", "high"))
    clipped = flat.double().cpu().abs().clamp(*ends) * flat.double().cpu().sign()
    wanted = (torch.tensor(WEIGHTS, dtype=torch.float64)[:, None] * clipped * shares).sum(0) / shares.sum(0).clamp(
        min=1e-12
    )
    got = torch.cat([part.flatten() for part in merged.values()]).double().cpu()
    # an entry at the threshold is a difference of nearly equal scores
    assert float(((got - wanted).abs() > 1e-4 * wanted.abs().max()).double().mean()) < 0.01


@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "mean"])
def test_in_ties_a_task_of_negative_weight_votes_with_its_weighted_sign(fused, stacks, normalize):
    weights = [1.0, -0.3, 2.0]
    thresholds = flat_of(stacks).abs().median(1).values.tolist()
    told = Formula("ties", {"thresholds": thresholds, "normalize": normalize})
    found = {name: torch.full(shape, torch.nan, device=HERE) for name, shape in SHAPES.items()}
    assert fused.Resident(entries(fused, stacks, weights)).merge(told, found)
    for name, stack in stacks.items():
        kept, factors = (
            torch.tensor(values, dtype=torch.float64, device=HERE).view(3, *[1] * (stack.ndim - 1))
            for values in (thresholds, weights)
        )
        moves = stack.double() * (stack.abs() >= kept) * factors
        agrees = moves * torch.where(moves.sum(0) >= 0, 1.0, -1.0) > 0
        wanted = (moves * agrees).sum(0)
        if normalize:
            divisor = (agrees * factors).sum(0)
            wanted = wanted / divisor.where(divisor != 0, 1.0)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)
