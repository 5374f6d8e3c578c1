"""EMR's unified task vector: elect by sign, then take the largest."""

import torch
from torch import Tensor

from merging.method import merge_method, weighted_rows
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Kernel


@merge_method("emr", paper="arXiv:2405.17461", passes=1)
def emr(deltas: Deltas) -> Kernel:
    """Elect the sign of the summed task vectors and take the largest magnitude that has it.

    This is the elected vector τ_u of EMR as a merge of its own. The masks and scales that turn it back into each task's
    model are written by `merging.task_masks.write_task_masks`. A sum of zero elects minus, as in the authors' code.
    A task weight scales its task vector first.
    """

    def kernel(tile: Tile) -> Tensor:
        largest = torch.zeros_like(tile.stack[0])
        smallest = torch.zeros_like(largest)
        for row in weighted_rows(tile):
            torch.maximum(largest, row, out=largest)
            torch.minimum(smallest, row, out=smallest)
        return torch.where(tile.total() > 0, largest, smallest)

    return kernel
