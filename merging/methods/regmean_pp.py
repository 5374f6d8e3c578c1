"""RegMean++: regression on the inputs that the merged layers below really give."""

from merging.method import Files, Fraction, NonNegative, merge_method
from merging.statistics import opened, regression, uncovered
from taskvec.deltas import Deltas
from taskvec.plan import Plan, Report


@merge_method(
    "regmean_pp",
    paper="arXiv:2508.03121",
    unit="tensor",
    copies=24,
    data="statistics",
    cost="T products with n × n and one solve",
)
def regmean_pp(
    deltas: Deltas, *, statistics_files: Files, off_diagonal: Fraction = 0.9, ridge: NonNegative = 1e-6
) -> Plan:
    """RegMean with each layer's inputs taken from the merged layers below it, not from the task's own.

    Args:
        statistics_files: a file for each task, in the tasks' order, made for all tasks together, merging layer by layer
            (`taskvec learn statistics` with `method: regmean_pp`, or
            `merging.learn.statistics.input_grams_through_merged`).
        off_diagonal: what the off-diagonal entries of the Gram matrices are multiplied with; the value the files were
            made with.
        ridge: held toward the plain average by so much of the mean diagonal; the value the files were made with.

    The formula is RegMean's; all that differs is in the files.

    Raises:
        ParameterError, MismatchError: files that are missing, of another kind, or of another model.
    """
    statistics = opened(statistics_files, deltas, "gram++")
    yield Report(uncovered(statistics, deltas, matrices=True))
    return regression(statistics, off_diagonal, ridge)
