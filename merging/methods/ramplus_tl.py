"""RAM+ with tensor-level rescaling of what one task alone changed."""

import torch
from torch import Tensor

from merging.method import NonNegative, merge_method
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Fold, Plan, Report


@merge_method("ramplus_tl", paper="arXiv:2601.13572", statistics="tensor", passes=2)
def ramplus_tl(
    deltas: Deltas, *, epsilon: NonNegative = 1e-5, gain: NonNegative = 0.1, ceiling: NonNegative = 0.2
) -> Plan:
    """Average each entry over the tasks that changed it; amplify what one task alone changed.

    Args:
        epsilon: an entry counts as changed where its magnitude is above this.
        gain: r; a change that is one task's alone is multiplied by 1 + r · min(ρ, ceiling).
        ceiling: the largest ρ that counts (alpha). ρ is the task's number of shared changes over that of its own.

    ρ is taken in each tensor; with `statistics: model`, over the whole model. The mean is weighted by the task weights.
    Passes: 1 to count, 1 to merge.
    """

    def changes(tile: Tile) -> Tensor:
        changed = tile.stack.reshape(len(tile.tasks), -1).abs() > epsilon
        many = changed.sum(0)
        return torch.stack([(changed & (many > 1)).sum(1), (changed & (many == 1)).sum(1)])

    shared, own = yield Fold(changes, torch.add)
    ratio = [s / o if o else 0.0 for s, o in zip(shared.tolist(), own.tolist())]
    factors = [1 + gain * min(r, ceiling) for r in ratio]
    yield Report({"shared over own": dict(zip(deltas.tasks, ratio))})

    def kernel(tile: Tile) -> Tensor:
        changed = tile.stack.abs() > epsilon
        many = torch.zeros(tile.stack.shape[1:], dtype=torch.int16, device=tile.stack.device)
        for row in changed:
            many += row
        alone = many == 1
        total, weights = torch.zeros_like(tile.stack[0]), torch.zeros_like(tile.stack[0])
        for task, row in enumerate(tile.stack):
            weight = changed[task].to(row.dtype) * tile.weight(task)
            total.addcmul_(torch.where(alone, row * factors[task], row), weight)
            weights.add_(weight)
        return total.div_(weights.masked_fill_(weights == 0, 1.0))

    return kernel
