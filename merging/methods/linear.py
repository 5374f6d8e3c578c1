"""The weighted average under the name that mergekit gives it."""

from merging.method import merge_method, weighted_mean, weighted_sum
from taskvec.deltas import Deltas
from taskvec.plan import Kernel


@merge_method("linear", paper="arXiv:2203.05482", space="weight", passes=1)
def linear(deltas: Deltas, *, normalize: bool = True) -> Kernel:
    """Average the models' weights, each times its task weight (`average` under mergekit's name).

    Args:
        normalize: divide by the sum of the weights.

    Raises:
        ParameterError: the weights add up to zero and are to be normalised.
    """
    return weighted_mean if normalize else weighted_sum
