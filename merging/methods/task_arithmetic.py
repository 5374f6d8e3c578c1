"""Task arithmetic."""

from taskvec.deltas import Deltas
from taskvec.plan import Kernel

from merging.method import merge_method, weighted_sum


@merge_method("task_arithmetic", paper="arXiv:2212.04089", passes=1)
def task_arithmetic(deltas: Deltas) -> Kernel:
    """Add the task vectors to the base, each times its task weight, the whole times `scale`.

    A negative weight removes what a task vector taught (negation); weights and `scale` are the recipe's own.
    """
    return weighted_sum
