"""Fisher merging: average by how much each entry matters to each task."""

from collections.abc import Sequence

import torch
from torch import Tensor

from merging.method import Files, NonNegative, merge_method
from merging.statistics import opened, uncovered
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Plan, Report


@merge_method("fisher", paper="arXiv:2111.09832", data="statistics", passes=1)
def fisher(deltas: Deltas, *, statistics_files: Files, normalize: bool = True, floor: NonNegative = 1e-6) -> Plan:
    """Average the models, each entry by the tasks' Fisher information.

    Args:
        statistics_files: a file of Fisher diagonals for each task, in the tasks' order (`taskvec learn statistics` with
            `method: fisher`, or `merging.learn.statistics.fisher_diagonal`).
        normalize: divide each task's Fisher diagonal by its Euclidean norm, so that tasks of different loss scale
            count alike.
        floor: least Fisher value (after that division), so that entries no task needs are averaged.

    Δ = Σ_t w_t F_t Δ_t / Σ_t w_t F_t with task weights w_t. Tensors without statistics are averaged, with a warning.

    Raises:
        ParameterError, MismatchError: files that are missing, of another kind, or of another model.
    """
    statistics = opened(statistics_files, deltas, "fisher")
    yield Report(uncovered(statistics, deltas, matrices=False))
    norms: Sequence[float] = [each.norm if normalize and each.norm > 0 else 1.0 for each in statistics]

    def kernel(tile: Tile) -> Tensor:
        there = all(tile.name in each for each in statistics)
        total = torch.zeros_like(tile.stack[0], dtype=torch.float64)
        weights = torch.zeros_like(total)
        for task, row in enumerate(tile.stack):
            share = torch.full_like(total, 1.0)
            if there:
                values = statistics[task].read_flat(tile.name, tile.start, tile.stop, row)
                share = (values / norms[task]).clamp_(min=floor).view(row.shape)
            share = share * tile.weight(task)
            total += share * row
            weights += share
        return total.div_(weights.masked_fill_(weights == 0, 1.0)).to(tile.stack.dtype)

    return kernel
