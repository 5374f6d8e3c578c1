"""MagMax: keep the largest change of each entry."""

import torch
from torch import Tensor

from merging.method import merge_method, weighted_rows
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Kernel


@merge_method("magmax", paper="arXiv:2407.06322", passes=1)
def magmax(deltas: Deltas) -> Kernel:
    """Take each entry from the task that changed it most, by magnitude.

    A task weight scales its task vector before they are compared. Of equal magnitudes the earliest task's is taken
    (the authors' code: the latest); this shows only where they have opposite signs.
    """

    def kernel(tile: Tile) -> Tensor:
        first, *rest = weighted_rows(tile)
        best = first.clone()
        for row in rest:
            torch.where(row.abs() > best.abs(), row, best, out=best)
        return best

    return kernel
