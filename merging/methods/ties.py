"""TIES-Merging: trim, elect sign, merge."""

import torch
from torch import Tensor

from merging.method import Density, merge_method, per_task, trimmed
from taskvec.deltas import Deltas, Tile
from taskvec.order import magnitudes, order_statistics
from taskvec.plan import Plan, Report, formula


@merge_method("ties", paper="arXiv:2306.01708", passes=2)
def ties(deltas: Deltas, *, density: Density = 0.2, normalize: bool = True) -> Plan:
    """Trim each task vector, elect a sign for each entry, average the tasks that agree with it.

    Args:
        density: fraction of each task vector kept, by magnitude (top-k% in the paper): k = max(1, int(density * d)).
        normalize: divide by the summed weights of the tasks that agree (the paper's disjoint mean).

    The sign elected is that of the weighted sum of the trimmed values, + where that sum is zero. A task of negative weight
    agrees where its weighted value has that sign, as in mergekit.
    Differs from the authors' code: it keeps k + 1 entries (its threshold is one rank lower); entries tied at the
    threshold are all kept in both. With `statistics: tensor` each tensor is trimmed by itself, as mergekit does.
    Passes: 1 for the thresholds, 1 to merge.
    """
    densities = per_task(density, len(deltas.tasks))
    numel = deltas.numel
    ranks = [[numel - max(1, int(share * numel))] for share in densities]
    thresholds = [0.0] * len(ranks)
    if any(share < 1 for share in densities):
        found = yield from order_statistics(magnitudes, ranks, numel)
        thresholds = [row[0].value for row in found]
        kept = [(numel - row[0].below) / numel for row in found]
        yield Report({"threshold": dict(zip(deltas.tasks, thresholds)), "kept": dict(zip(deltas.tasks, kept))})

    @formula("ties", thresholds=thresholds, normalize=normalize)
    def kernel(tile: Tile) -> Tensor:
        return disjoint_mean(tile.with_stack(trimmed(tile.stack, thresholds)), normalize=normalize)

    return kernel


def disjoint_mean(tile: Tile, *, normalize: bool) -> Tensor:
    """Sum (or mean) over the tasks whose weighted value has the sign of the weighted sum; a zero never agrees."""
    # arithmetic on signs instead of masks: converting bools costs several times as much as a product
    sign = tile.total().sign_().add_(0.5).sign_()
    total, weights = torch.zeros_like(sign), torch.zeros_like(sign)
    for task, row in enumerate(tile.stack):
        weight = tile.weight(task)
        agreeing = row * sign
        size = abs(weight) if isinstance(weight, float) else weight.abs()
        if not isinstance(weight, float):
            agreeing.mul_(weight.sign())
        elif weight < 0:
            agreeing.neg_()
        _add(total, agreeing.clamp_(min=0), size)
        if normalize:
            _add(weights, agreeing.sign_(), weight)
    total.mul_(sign)
    if normalize:
        total.div_(weights.add_(weights == 0))
    return total


def _add(total: Tensor, values: Tensor, weight: "Tensor | float") -> None:
    if isinstance(weight, float):
        total.add_(values, alpha=weight)
    else:
        total.addcmul_(values, weight)
