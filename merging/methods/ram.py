"""RAM: average only among the models that changed an entry."""

import torch
from torch import Tensor

from merging.method import NonNegative, merge_method
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Kernel


@merge_method("ram", paper="arXiv:2601.13572", passes=1)
def ram(deltas: Deltas, *, epsilon: NonNegative = 1e-5) -> Kernel:
    """Average each entry over the tasks that changed it, so that a change only one task made stays whole.

    Args:
        epsilon: an entry counts as changed where its magnitude is above this.

    The mean is weighted by the task weights.
    """

    def kernel(tile: Tile) -> Tensor:
        total, weights = torch.zeros_like(tile.stack[0]), torch.zeros_like(tile.stack[0])
        for task, row in enumerate(tile.stack):
            changed = (row.abs() > epsilon).to(row.dtype) * tile.weight(task)
            total.addcmul_(row, changed)
            weights.add_(changed)
        return total.div_(weights.masked_fill_(weights == 0, 1.0))

    return kernel
