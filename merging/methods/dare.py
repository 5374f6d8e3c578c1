"""DARE: drop and rescale."""

import torch
from taskvec.deltas import Deltas, Tile
from taskvec.draws import keep
from taskvec.plan import Kernel
from torch import Tensor

from merging.method import Density, Seed, merge_method, per_task


@merge_method("dare", paper="arXiv:2311.03099", role="preprocess", passes=1)
def dare(deltas: Deltas, *, density: Density = 0.5, rescale: bool = True, seed: Seed = 0) -> Kernel:
    """Drop entries of each task vector at random and rescale the rest by 1 / density.

    Args:
        density: probability that an entry is kept (1 - p in the paper).
        rescale: multiply what is kept by 1 / density, so that the expectation stays. mergekit scales by a ratio of L1
            norms instead, a random factor.
        seed: the draws are keyed by it, the task, the tensor's name and the element, so nothing else changes them.

    As `method: dare` the task vectors are then added (DARE with task arithmetic); as a preprocess of `ties` it is
    DARE-TIES.
    """
    densities = per_task(density, len(deltas.tasks))

    def kernel(tile: Tile) -> Tensor:
        stack = torch.empty_like(tile.stack)
        for row, kept, task, share in zip(tile.stack, stack, tile.tasks, densities):
            mask = keep(seed, task, tile.name, tile.start, tile.stop, share).to(row.device).view(row.shape)
            torch.mul(row, mask, out=kept)
            if rescale and share < 1:
                kept.mul_(1 / share)
        return stack

    return kernel
