"""One model as it is, times a number."""

from torch import Tensor

from merging.method import merge_method
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Kernel


@merge_method("passthrough", paper="mergekit", space="weight", tasks=(1, 1), passes=1)
def passthrough(deltas: Deltas) -> Kernel:
    """Take the one model as it is, times its task weight (mergekit's `scale`): for stacking layers of several models.

    With a weight of 1 every value is taken bit for bit.
    """

    def kernel(tile: Tile) -> Tensor:
        return tile.total()

    return kernel
