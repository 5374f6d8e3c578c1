"""RegMean: merge linear layers by regression on their inputs."""

from merging.method import Files, Fraction, NonNegative, merge_method
from merging.statistics import opened, regression, uncovered
from taskvec.deltas import Deltas
from taskvec.plan import Plan, Report


@merge_method(
    "regmean",
    paper="arXiv:2212.09849",
    unit="tensor",
    copies=24,
    data="statistics",
    cost="T products with n × n and one solve",
)
def regmean(
    deltas: Deltas, *, statistics_files: Files, off_diagonal: Fraction = 0.9, ridge: NonNegative = 1e-6
) -> Plan:
    """Find for each linear layer the weights whose outputs are nearest to each task's on that task's own inputs.

    Args:
        statistics_files: a file of input Gram matrices for each task, in the tasks' order (`taskvec learn statistics`
            with `method: regmean`, or `merging.learn.statistics.input_grams`).
        off_diagonal: what the off-diagonal entries of the Gram matrices are multiplied with (α in the paper; 0.1 for
            T5 there). 0 averages by input energy.
        ridge: held toward the plain average by so much of the mean diagonal, for inputs that never occur.

    W = (Σ W_t G_t)(Σ G_t)⁻¹ with G_t the mean of x xᵀ, so that tasks count alike whatever their number of examples. All
    other tensors, and matrices without statistics, are averaged. Float64. A task weight scales its task vector.

    Raises:
        ParameterError, MismatchError: files that are missing, of another kind, or of another model.
    """
    statistics = opened(statistics_files, deltas, "gram")
    yield Report(uncovered(statistics, deltas, matrices=True))
    return regression(statistics, off_diagonal, ridge)
