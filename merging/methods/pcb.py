"""PCB-Merging: parameter competition balancing."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from merging.method import Share, merge_method
from taskvec.compiled import pcb_scores
from taskvec.deltas import Deltas, Tile
from taskvec.moments import sums
from taskvec.order import magnitudes, order_statistics
from taskvec.plan import Fold, Kernel, Plan, Report, formula

Clip = Annotated[float, Field(ge=0, lt=0.5)]
_WIDE_FROM = 81  # exp(n) overflows float32 from n = 89 on
_FAINT = 1e-30  # products of task vectors below this lose bits to float32 underflow


@merge_method("pcb", paper="arXiv:2410.02396", passes=3, cost="2T exp and 2T tanh per element")
def pcb(
    deltas: Deltas,
    *,
    density: Share = 0.1,
    clip: Clip | tuple[Clip, Clip] = 1e-4,
    inter: Literal["sum", "sum_normalized", "pairwise"] = "sum",
    variant: Literal["reference", "paper"] = "reference",
    contributions: bool = False,
) -> Plan:
    """Balance the competition between task vectors: score every entry, keep the best, average by score.

    An entry's score is high where it is large within its own task (intra-balancing) and where the tasks agree
    (inter-balancing). The lowest scores are dropped, the others rescaled to (0, 1], and the result is the mean of the
    task vectors weighted by them; task weights enter the numerator only (lambda_i of the paper's search).

    Args:
        density: fraction of each task vector kept (`pcb_ratio` of the authors' code, "mask ratio" of the paper).
        clip: share of the magnitudes clipped at the low and the high end, one number or a pair; 0 switches it off.
            0.01 reproduces the authors' language and vision folders.
        inter: the agreement score. `sum`: tanh(τ_i Σ_j τ_j); `sum_normalized`: the other factor min-max normalised
            (the authors' vision folder); `pairwise`: Σ_j tanh(v_i v_j) of normalised values (their ES search).
        variant: `reference` is the authors' function `PCB_merge`; `paper` its equations: softmax in both scores,
            min-max Norm, a hard mask, no clip (then `clip` and `inter` have no meaning).
        contributions: return the parts P_i = C_i W_i / Σ_j W_j of each task; the merge is Σ_i λ_i P_i. For programs.

    Differs from the authors' code where that returns NaN: a task vector of zeros gets no weight (with a warning);
    constant magnitudes are scored by agreement alone; opposite vectors keep nothing; tied maxima keep weight 1; from
    81 tasks on scores are float64; products near the end of float32's range are scaled by a power of two first.
    Passes: 1 for the clip, 1 for the scores' threshold, 1 to merge (`paper`: 4).
    """
    if variant == "paper":
        return (yield from _paper(deltas, density, contributions))
    count, numel = len(deltas.tasks), deltas.numel
    ends = (clip, clip) if isinstance(clip, float | int) else clip
    ranks = [int(numel * ends[0]), int(numel * (1 - ends[1]) - 1), numel - 1]
    sizes = yield from order_statistics(magnitudes, [ranks] * count, numel)
    low, high, largest = ([row[k].value for row in sizes] for k in range(3))
    warnings = []
    for task, name in enumerate(deltas.tasks):
        if largest[task] == 0:
            warnings.append(f"task {name!r} equals the base everywhere: it gets no weight")
        elif high[task] == low[task] == 0:
            high[task] = largest[task]
            warnings.append(f"task {name!r} has too few non-zero entries for the high clip: not clipped there")
    # tanh is linear at this size and the rescaling removes the factor: a power of two changes no bit
    faint = max(largest) * sum(largest) < _FAINT and max(largest) > 0
    boost = 2.0 ** -math.floor(math.log2(max(largest))) * 2.0**-13 if faint else 1.0

    def clipped(row: Tensor, task: int) -> Tensor:
        """C of the authors' code: magnitudes between the two order statistics, zeros stay zero."""
        return row.abs().clamp_(low[task], high[task]).mul_(row.sign())

    def normalized(row: Tensor, task: int) -> Tensor:
        size = row.abs().clamp_(low[task], high[task])
        if high[task] == low[task]:
            return torch.zeros_like(size)
        return size.sub_(low[task]).div_(high[task] - low[task])

    plain = inter == "sum" and boost == 1.0 and count < _WIDE_FROM

    def scores(tile: Tile) -> Tensor:
        # every pass must see the same bits: the entry at the threshold gets no weight, its neighbour all of it
        known = pcb_scores(tile.stack, low, high) if plain else None
        if known is not None:
            return known
        stack = tile.stack if boost == 1.0 else tile.stack * boost
        result = torch.empty_like(stack, dtype=torch.float64 if count >= _WIDE_FROM else stack.dtype)
        if inter == "sum":
            total = tile.total(stack, weighted=False)
        else:
            signed = torch.stack([normalized(row, i).mul_(row.sign()) for i, row in enumerate(tile.stack)])
            total = tile.total(signed, weighted=False)
        for i in range(count):
            if inter == "pairwise":
                agreement = torch.zeros_like(stack[0])
                for j in range(count):
                    agreement.add_((signed[i] * signed[j]).tanh_())
            else:
                agreement = (stack[i] * total).tanh_()
            u = normalized(tile.stack[i], i)
            if count >= _WIDE_FROM:
                # exp(n u^2) / exp(n): the constant leaves with the rescaling
                torch.mul(u.double().square_().sub_(1.0).mul_(count).exp_(), agreement, out=result[i])
            else:
                torch.mul(u.square_().mul_(count).exp_(), agreement, out=result[i])
        return result

    if plain:
        formula("pcb score", low=low, high=high, largest=largest)(scores)
    best = [int(numel * (1 - density)), numel - 1]
    found = yield from order_statistics(scores, [best] * count, numel)
    cut, top = [row[0].value for row in found], [row[1].value for row in found]
    yield Report(
        {
            "clip": dict(zip(deltas.tasks, zip(low, high))),
            "threshold": dict(zip(deltas.tasks, cut)),
            "largest score": dict(zip(deltas.tasks, top)),
            "kept": {
                name: _kept(row, largest[i], numel) / numel for i, (name, row) in enumerate(zip(deltas.tasks, found))
            },
            "warnings": warnings,
        }
    )

    def rescaled(score: Tensor, task: int) -> Tensor:
        """W: 0 at the threshold, 1 at the largest score."""
        if largest[task] == 0 or top[task] == cut[task] <= 0:
            return torch.zeros_like(score)
        if top[task] == cut[task]:
            return (score == top[task]).to(score.dtype)
        return score.clamp_(min=cut[task]).sub_(cut[task]).div_(top[task] - cut[task])

    def kernel(tile: Tile) -> Tensor:
        score = scores(tile)
        weights = torch.stack([rescaled(score[i], i) for i in range(count)]).to(tile.stack.dtype)
        parts = [clipped(tile.stack[i], i).mul_(weights[i]) for i in range(count)]
        return _mean(tile, parts, weights, contributions)

    keeps = [largest[i] > 0 and top[i] > cut[i] for i in range(count)]
    if plain and all(keeps[i] or largest[i] == 0 or top[i] <= 0 for i in range(count)):
        kept = sum(_kept(row, largest[i], numel) for i, row in enumerate(found))
        name = "pcb parts" if contributions else "pcb"
        formula(name, low=low, high=high, largest=largest, cut=cut, top=top, keeps=keeps, kept=kept)(kernel)
    return kernel


def _kept(row: list[object], largest: float, numel: int) -> int:
    from taskvec.order import OrderStatistic

    cut, top = row
    assert isinstance(cut, OrderStatistic)
    assert isinstance(top, OrderStatistic)
    if largest == 0 or top.value == cut.value <= 0:
        return 0
    return top.equal if top.value == cut.value else numel - cut.below - cut.equal


def _mean(tile: Tile, parts: list[Tensor], weights: Tensor, contributions: bool) -> Tensor:
    divisor = tile.total(weights, weighted=False).clamp_(min=1e-12)
    stack = torch.stack(parts)
    if contributions:
        return stack.div_(divisor)
    return tile.total(stack).div_(divisor)


def _paper(deltas: Deltas, density: float, contributions: bool) -> Plan:
    """The paper's equations, in float64: no clip, softmax over all entries, hard mask."""
    count, numel = len(deltas.tasks), deltas.numel
    pairs = [(i, j) for i in range(count) for j in range(i, count)]

    def products(tile: Tile) -> Tensor:
        wide = tile.stack.double()
        return torch.stack([wide[i] * wide[j] for i, j in pairs])

    def extremes(tile: Tile) -> tuple[Tensor, Tensor]:
        values = products(tile).flatten(1)
        return values.amin(1), values.amax(1)

    least, most = yield Fold(extremes, lambda a, b: (torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1])))
    span = torch.where(most > least, most - least, torch.ones_like(most))
    own = [pairs.index((i, i)) for i in range(count)]

    def norms(tile: Tile) -> Tensor:
        shape = (-1, *[1] * (tile.stack.ndim - 1))
        return (products(tile) - least.view(shape)) / span.view(shape)

    def exponentials(tile: Tile) -> Tensor:
        norm = norms(tile).flatten(1)
        return torch.stack([norm.exp().sum(1), (norm * count).exp().sum(1)])

    denominators = yield from sums(exponentials)

    def scores(tile: Tile) -> Tensor:
        norm = norms(tile)
        result = torch.empty(tile.stack.shape, dtype=torch.float64, device=tile.stack.device)
        for i in range(count):
            intra = (norm[own[i]] * count).exp_() / denominators[1, own[i]]
            agreement = torch.zeros_like(intra)
            for j in range(count):
                pair = pairs.index((min(i, j), max(i, j)))
                agreement += norm[pair].exp() / denominators[0, pair]
            result[i] = intra * agreement
        return result

    found = yield from order_statistics(scores, [[int(numel * (1 - density))]] * count, numel)
    cut = [row[0].value for row in found]
    kept = {name: (numel - row[0].below) / numel for name, row in zip(deltas.tasks, found)}
    yield Report({"threshold": dict(zip(deltas.tasks, cut)), "kept": kept})

    def kernel(tile: Tile) -> Tensor:
        score = scores(tile)
        for i in range(count):
            score[i].mul_(score[i] >= cut[i])
        total = score.sum(0).clamp_(min=torch.finfo(torch.float64).tiny)
        stack = (score / total).mul_(tile.stack)
        merged = stack if contributions else tile.total(stack)
        return merged.to(tile.stack.dtype)

    return kernel


__all__ = ["Kernel", "pcb"]
