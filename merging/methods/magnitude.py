"""Magnitude pruning of task vectors."""

import torch
from taskvec.deltas import Deltas, Tile
from taskvec.order import order_statistics
from taskvec.plan import Plan, Report
from torch import Tensor

from merging.method import Density, merge_method, per_task


@merge_method("magnitude", paper="arXiv:1506.02626", role="preprocess", passes=2)
def magnitude(deltas: Deltas, *, density: Density = 0.2) -> Plan:
    """Keep the largest entries of each task vector, by magnitude.

    Args:
        density: fraction kept, k = max(1, int(density * d)); entries tied at the threshold are all kept.

    As `method: magnitude` the task vectors are then added. Passes: 1 for the thresholds, 1 to merge.
    """
    numel = deltas.numel
    ranks = [[numel - max(1, int(share * numel))] for share in per_task(density, len(deltas.tasks))]
    found = yield from order_statistics(lambda tile: tile.stack.abs(), ranks, numel)
    thresholds = [row[0].value for row in found]
    kept = [(numel - row[0].below) / numel for row in found]
    yield Report({"threshold": dict(zip(deltas.tasks, thresholds)), "kept": dict(zip(deltas.tasks, kept))})

    def kernel(tile: Tile) -> Tensor:
        stack = torch.empty_like(tile.stack)
        for task, threshold in enumerate(thresholds):
            row = tile.stack[task]
            torch.mul(row, row.abs() >= threshold, out=stack[task])
        return stack

    return kernel
