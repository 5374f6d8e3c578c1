"""Model breadcrumbs: drop the smallest and the largest entries."""

import math

import torch
from torch import Tensor

from merging.method import Density, Fraction, merge_method, per_task
from taskvec.deltas import Deltas, Tile
from taskvec.moments import l1_ratios
from taskvec.order import magnitudes, order_statistics
from taskvec.plan import Plan, formula


@merge_method("breadcrumbs", paper="arXiv:2312.06795", role="preprocess", statistics="tensor", passes=2)
def breadcrumbs(
    deltas: Deltas, *, density: Density = 0.9, gamma: Fraction | list[Fraction] = 0.01, rescale: bool = False
) -> Plan:
    """Keep the middle of each task vector: neither its smallest entries nor its largest outliers.

    Args:
        density: fraction kept (1 - beta - gamma in the paper).
        gamma: fraction of largest entries dropped, one number or one for each task. The kept ones are the
            int(density * d) largest below those; where both together exceed 1, fewer outliers are dropped (none for a
            density of 1), as in mergekit.
        rescale: multiply what is kept so that the L1 norm stays (mergekit's `rescale`), one pass more.

    The paper masks layer by layer, so the default takes the statistics of each tensor. As `method: breadcrumbs` the
    task vectors are then added. Entries tied at either end are all kept. Of tensors so small that int(density * d) is 0,
    nothing is kept.
    Passes: 1 for the two thresholds, 1 to merge.
    """
    numel = deltas.numel
    counts, ranks = [], []
    for share, outliers in zip(per_task(density, len(deltas.tasks)), per_task(gamma, len(deltas.tasks))):
        kept = int(share * numel)
        first = max(0, numel - kept - int(outliers * numel))
        counts.append(kept)
        ranks.append([first, first + kept - 1] if kept else [0, 0])
    found = yield from order_statistics(magnitudes, ranks, numel)

    factors = [1.0] * len(deltas.tasks)

    low = [row[0].value if kept else math.inf for kept, row in zip(counts, found)]
    high = [row[1].value for row in found]

    @formula("band", low=low, high=high, factors=factors)
    def kernel(tile: Tile) -> Tensor:
        stack = torch.empty_like(tile.stack)
        for task, (least, most) in enumerate(zip(low, high)):
            row = tile.stack[task]
            size = row.abs()
            torch.mul(row, (size >= least) & (size <= most), out=stack[task])
            if factors[task] != 1:
                stack[task].mul_(factors[task])
        return stack

    if rescale:
        factors[:] = yield from l1_ratios(kernel)
    return kernel
