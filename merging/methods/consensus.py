"""Consensus task arithmetic with TALL masks."""

import torch
from torch import Tensor

from merging.method import Count, NonNegative, merge_method, per_task
from taskvec.deltas import Deltas, Tile
from taskvec.errors import ParameterError
from taskvec.plan import Kernel


@merge_method("consensus", paper="arXiv:2405.07813", tasks=(2, None), passes=1)
def consensus(deltas: Deltas, *, mask_scale: NonNegative | list[NonNegative] = 0.4, agreement: Count = 2) -> Kernel:
    """Add the task vectors, but only where enough tasks have a use for the sum.

    Args:
        mask_scale: λ_t of the TALL mask 1[|τ_t| ≥ λ_t |τ_MTL - τ_t|], one number or one for each task. The larger, the
            fewer entries a task claims; the paper picks it from 0.2 … 0.6 on validation data.
        agreement: an entry is kept where at least so many tasks claim it (k; 1 drops only what nobody claims).

    τ_MTL is the sum of the task vectors, each times its task weight; `scale` is the paper's α.

    Raises:
        ParameterError: `agreement` is more than there are tasks.
    """
    count = len(deltas.tasks)
    if agreement > count:
        raise ParameterError(f"agreement: {agreement} of {count} tasks can never agree")
    scales = per_task(mask_scale, count)

    def kernel(tile: Tile) -> Tensor:
        total = tile.total()
        claims = torch.zeros(total.shape, dtype=torch.int16, device=total.device)
        for task, row in enumerate(tile.stack):
            own = row * tile.weight(task)
            claims += own.abs() >= (total - own).abs_().mul_(scales[task])
        return total.mul_(claims >= agreement)

    return kernel
