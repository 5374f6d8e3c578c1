"""DELLA: drop by magnitude rank, at random."""

from typing import Literal

import torch
from torch import Tensor

from merging.method import Density, NonNegative, Seed, merge_method, per_task
from taskvec.deltas import Deltas, Tile
from taskvec.draws import uniform
from taskvec.errors import ParameterError
from taskvec.plan import Kernel


@merge_method("della", paper="arXiv:2406.11617", role="preprocess", unit="tensor", cost="one sort of each row")
def della(
    deltas: Deltas,
    *,
    density: Density = 0.5,
    epsilon: NonNegative | list[NonNegative] = 0.15,
    rescale: bool | Literal["l1"] = True,
    seed: Seed = 0,
) -> Kernel:
    """Drop entries of each task vector at random, small ones of a row more often, and rescale the rest (MagPrune).

    Args:
        density: mean probability that an entry is kept (1 - p in the paper). 1 keeps everything.
        epsilon: the smallest entry of a row is kept with probability density - epsilon, the largest with
            density + epsilon, in between linearly in the rank (mergekit's meaning; the paper's ε is the whole width).
        rescale: divide what is kept by its own probability, so that the expectation stays (the paper); "l1" multiplies
            the tensor by the ratio of its L1 norms before and after, as mergekit does.
        seed: the draws are keyed by it, the task, the tensor's name and the element.

    As `method: della` the task vectors are then added (DELLA-linear); as a preprocess of `ties` with a density of 1 it
    is DELLA. Vectors are one row, and entries alone in their row are kept with probability `density` (mergekit fails
    there). Equal magnitudes are ranked by position.

    Raises:
        ParameterError: density ± epsilon leaves (0, 1].
    """
    count = len(deltas.tasks)
    densities, spreads = per_task(density, count), per_task(epsilon, count)
    problems = [
        f"task {task!r}: density {share:g} ± epsilon {spread:g} must stay in (0, 1]"
        for task, share, spread in zip(deltas.tasks, densities, spreads)
        if share < 1 and not (share - spread > 0 and share + spread <= 1)
    ]
    if problems:
        raise ParameterError(problems, title="Parameters of della")

    def kernel(tile: Tile) -> Tensor:
        stack = torch.empty_like(tile.stack)
        for row, kept, task, share, spread in zip(tile.stack, stack, tile.tasks, densities, spreads):
            if share == 1:
                kept.copy_(row)
                continue
            probability = _probabilities(row, share, spread)
            draws = uniform(seed, task, tile.name, tile.start, tile.stop).to(row.device).view(row.shape)
            torch.mul(row, draws < probability, out=kept)
            if rescale is True:
                kept.div_(probability)
            elif rescale == "l1":
                left = float(kept.double().abs().sum())
                if left:
                    kept.mul_(float(row.double().abs().sum()) / left)
        return stack

    return kernel


def _probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Linear in the rank of each entry's magnitude within its row."""
    rows = delta.reshape(len(delta), -1) if delta.ndim > 1 else delta.reshape(1, -1)
    width = rows.shape[1]
    if width == 1:
        return torch.full_like(delta, density)
    steps = torch.arange(width, device=rows.device, dtype=torch.float64)
    steps = (density - epsilon + 2 * epsilon / (width - 1) * steps).to(rows.dtype)
    order = rows.abs().argsort(dim=1, stable=True)
    return torch.empty_like(rows).scatter_(1, order, steps.expand_as(rows)).reshape(delta.shape)
