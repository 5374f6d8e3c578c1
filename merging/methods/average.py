"""Weighted averaging."""

from torch import Tensor

from merging.method import merge_method, weighted_mean
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Kernel


@merge_method("average", paper="arXiv:2203.05482", space="weight", passes=1)
def average(deltas: Deltas, *, normalize: bool = True) -> Kernel:
    """Average the models' weights, each times its task weight.

    Args:
        normalize: divide by the sum of the weights, so that they need not add up to one.

    The uniform soup of "Model soups" when all weights are equal. No base is needed. Weights that add up to zero cannot
    be normalised and are refused.
    """

    def kernel(tile: Tile) -> Tensor:
        return weighted_mean(tile) if normalize else tile.total()

    return kernel
