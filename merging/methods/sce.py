"""SCE: select, calculate, erase."""

import torch
from torch import Tensor

from merging.method import Share, merge_method
from taskvec.deltas import Deltas, Tile
from taskvec.moments import sums
from taskvec.order import order_statistics
from taskvec.plan import Fold, Plan, Report, formula


@merge_method("sce", paper="arXiv:2408.07990", statistics="tensor", tasks=(1, None), passes=4)
def sce(deltas: Deltas, *, density: Share = 1.0) -> Plan:
    """Keep the entries in which the tasks differ most, weigh tasks by their energy there, erase minority signs.

    Args:
        density: fraction kept of the entries with nonzero variance over the tasks (τ; mergekit's `select_topk`).
            1 keeps all. A single task has no variance: nothing of it is kept below 1, as in mergekit.

    Each task's coefficient is its share of the squares of what is kept, times its task weight. The sign elected is that
    of the plain sum. Entries tied at the cut are all kept.
    Passes: 1 to count, 1 for the threshold, 1 for the energies (fewer for a density of 1), 1 to merge.
    """
    count = len(deltas.tasks)

    def variance(tile: Tile) -> Tensor:
        mean = tile.total(weighted=False).div_(count)
        result = torch.zeros_like(mean)
        for row in tile.stack:
            result.add_((row - mean).square_())
        return result.div_(count)

    least = 0.0
    if density < 1:
        nonzero = formula("varied")(lambda tile: int(torch.count_nonzero(variance(tile))))
        varied = yield Fold(nonzero, int.__add__)
        kept = int(density * varied)
        if kept:
            rank = deltas.numel - kept
            found = yield from order_statistics(
                formula("variance")(lambda tile: variance(tile)[None]), [[rank]], deltas.numel
            )
            least = found[0][0].value
        else:
            least = float("inf")
            if count == 1:
                yield Report({"warnings": ["one task varies nowhere, so nothing of it is selected; use density 1"]})

    def selected(tile: Tile) -> Tensor:
        return tile.stack if least == 0.0 else tile.stack * (variance(tile) >= least)

    @formula("energies", least=least, shape=(count,))
    def squares(tile: Tile) -> Tensor:
        return selected(tile).double().square().sum(1)

    energies = yield from sums(squares)
    total = float(energies.sum())
    shares = [float(e) / total if total else 1 / count for e in energies]
    yield Report({"coefficients": dict(zip(deltas.tasks, shares)), "threshold": least})

    @formula("sce", shares=shares, least=least)
    def kernel(tile: Tile) -> Tensor:
        stack = selected(tile)
        positive = tile.total(stack, weighted=False) >= 0
        total, weights = torch.zeros_like(stack[0]), torch.zeros_like(stack[0])
        for task, row in enumerate(stack):
            agrees = torch.where(positive, row > 0, row < 0).to(row.dtype) * tile.weight(task) * shares[task]
            total.addcmul_(row, agrees)
            weights.add_(agrees)
        return total.div_(weights.masked_fill_(weights == 0, 1.0))

    return kernel
