"""DARE: drop and rescale."""

from typing import Literal

import torch
from torch import Tensor

from merging.method import Density, Seed, merge_method, per_task
from taskvec.deltas import Deltas, Tile
from taskvec.draws import keep
from taskvec.moments import l1_ratios
from taskvec.plan import Plan, formula


@merge_method("dare", paper="arXiv:2311.03099", role="preprocess", passes=1)
def dare(deltas: Deltas, *, density: Density = 0.5, rescale: bool | Literal["l1"] = True, seed: Seed = 0) -> Plan:
    """Drop entries of each task vector at random and rescale the rest by 1 / density.

    Args:
        density: probability that an entry is kept (1 - p in the paper).
        rescale: multiply what is kept by 1 / density, so that the expectation stays. "l1" multiplies by the ratio of L1
            norms before and after instead, as mergekit does: a random factor, which costs one pass more.
        seed: the draws are keyed by it, the task, the tensor's name and the element, so nothing else changes them.

    As `method: dare` the task vectors are then added (DARE with task arithmetic); as a preprocess of `ties` it is
    DARE-TIES.
    """
    densities = per_task(density, len(deltas.tasks))

    factors = [1 / share if rescale is True else 1.0 for share in densities]

    @formula("drop", seed=seed, densities=densities, factors=factors)
    def kernel(tile: Tile) -> Tensor:
        stack = torch.empty_like(tile.stack)
        for row, kept, task, share, factor in zip(tile.stack, stack, tile.tasks, densities, factors):
            mask = keep(seed, task, tile.name, tile.start, tile.stop, share).to(row.device).view(row.shape)
            torch.mul(row, mask, out=kept)
            if factor != 1:
                kept.mul_(factor)
        return stack

    if rescale == "l1":
        factors[:] = yield from l1_ratios(kernel)
    return kernel
