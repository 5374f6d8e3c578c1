"""Weighted averaging."""

from merging.method import merge_method, weighted_mean, weighted_sum
from taskvec.deltas import Deltas
from taskvec.plan import Kernel


@merge_method("average", paper="arXiv:2203.05482", space="weight", passes=1)
def average(deltas: Deltas, *, normalize: bool = True) -> Kernel:
    """Average the models' weights, each times its task weight.

    Args:
        normalize: divide by the sum of the weights, so that they need not add up to one.

    The uniform soup of "Model soups" when all weights are equal. No base is needed. Weights that add up to zero cannot
    be normalised and are refused.
    """
    return weighted_mean if normalize else weighted_sum
