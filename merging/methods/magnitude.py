"""Magnitude pruning of task vectors."""

from torch import Tensor

from merging.method import Density, merge_method, per_task, trimmed
from taskvec.deltas import Deltas, Tile
from taskvec.moments import l1_ratios
from taskvec.order import magnitudes, order_statistics
from taskvec.plan import Plan, Report, formula


@merge_method("magnitude", paper="arXiv:1506.02626", role="preprocess", passes=2)
def magnitude(deltas: Deltas, *, density: Density = 0.2, rescale: bool = False) -> Plan:
    """Keep the largest entries of each task vector, by magnitude.

    Args:
        density: fraction kept, k = max(1, int(density * d)); entries tied at the threshold are all kept.
        rescale: multiply what is kept so that the L1 norm stays (mergekit's `rescale` of ties), one pass more.

    As `method: magnitude` the task vectors are then added. Passes: 1 for the thresholds, 1 to merge.
    """
    numel = deltas.numel
    ranks = [[numel - max(1, int(share * numel))] for share in per_task(density, len(deltas.tasks))]
    found = yield from order_statistics(magnitudes, ranks, numel)
    thresholds = [row[0].value for row in found]
    kept = [(numel - row[0].below) / numel for row in found]
    yield Report({"threshold": dict(zip(deltas.tasks, thresholds)), "kept": dict(zip(deltas.tasks, kept))})

    factors = [1.0] * len(deltas.tasks)

    def kernel(tile: Tile) -> Tensor:
        stack = trimmed(tile.stack, thresholds)
        for task in range(len(factors)):
            if factors[task] != 1:
                stack[task].mul_(factors[task])
        return stack

    if rescale:
        factors[:] = yield from l1_ratios(kernel)
        return kernel
    return formula("trim", thresholds=thresholds)(kernel)
