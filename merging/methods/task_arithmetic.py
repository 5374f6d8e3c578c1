"""Task arithmetic."""

from merging.method import merge_method, weighted_mean, weighted_sum
from taskvec.deltas import Deltas
from taskvec.plan import Kernel


@merge_method("task_arithmetic", paper="arXiv:2212.04089", passes=1)
def task_arithmetic(deltas: Deltas, *, normalize: bool = False) -> Kernel:
    """Add the task vectors to the base, each times its task weight, the whole times `scale`.

    Args:
        normalize: divide by the sum of the task weights.

    A negative weight removes what a task vector taught (negation); weights and `scale` are the recipe's own.
    """
    return weighted_mean if normalize else weighted_sum
