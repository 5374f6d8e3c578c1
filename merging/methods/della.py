"""DELLA: drop by magnitude rank, at random."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from merging.method import Density, NonNegative, Seed, merge_method, per_task
from taskvec.deltas import Deltas, Tile
from taskvec.draws import uniform
from taskvec.plan import Kernel, formula

_BLOCK = 1 << 17  # elements sorted at once, so that keys and ranks stay in the cache


def _limits(given: Mapping[str, Any], count: int) -> list[str]:
    pairs = zip(per_task(given["density"], count), per_task(given["epsilon"], count))
    return [
        f"task {task + 1}: density {share:g} ± epsilon {spread:g} must stay in (0, 1]"
        for task, (share, spread) in enumerate(pairs)
        if share < 1 and not (share - spread > 0 and share + spread <= 1)
    ]


@merge_method(
    "della", paper="arXiv:2406.11617", role="preprocess", unit="tensor", cost="one sort of each row", limits=_limits
)
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
    there). Equal magnitudes share their mean rank (mergekit: by position).

    Raises:
        ParameterError: density ± epsilon leaves (0, 1].
    """
    count = len(deltas.tasks)
    densities, spreads = per_task(density, count), per_task(epsilon, count)

    def kernel(tile: Tile) -> Tensor:
        stack = torch.empty_like(tile.stack)
        for row, kept, task, share, spread in zip(tile.stack, stack, tile.tasks, densities, spreads):
            if share == 1 or row.numel() == 0:
                kept.copy_(row)
                continue
            rows = row.reshape(len(row) if row.ndim > 1 else 1, -1)
            width = max(1, rows.shape[1])
            at, step = tile.start, max(1, _BLOCK // width) if row.device.type == "cpu" else len(rows)
            for values, part in zip(rows.split(step), kept.view(rows.shape).split(step)):
                probability = _probabilities(values, share, spread)
                draws = uniform(seed, task, tile.name, at, at + values.numel()).to(row.device).view(values.shape)
                torch.mul(values, draws < probability, out=part)
                if rescale is True:
                    part.div_(probability)
                at += values.numel()
            if rescale == "l1":
                left = float(kept.double().abs().sum())
                if left:
                    kept.mul_(float(row.double().abs().sum()) / left)
        return stack

    if rescale == "l1":
        return kernel
    return formula("rank drop", seed=seed, densities=densities, spreads=spreads, rescale=rescale)(kernel)


def _probabilities(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """Linear in the rank of each entry's magnitude within its row; equal magnitudes share their mean rank."""
    width = rows.shape[1]
    if width == 1:
        return torch.full_like(rows, density)
    order, ranks = _ranked(rows.abs())
    ranks.mul_(2 * epsilon / (width - 1)).add_(density - epsilon)
    return torch.empty_like(rows).scatter_(1, order, ranks)


def _ranked(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """An order that sorts each row, and the ranks in that order, as values of the rows' dtype.

    Sharing ranks makes the sort's treatment of equal values immaterial, so it need not be stable: numpy's vectorised
    one takes 14 ns an element here, a stable one 69.
    """
    if sizes.device.type == "cpu":
        order = torch.from_numpy(np.argsort(sizes.numpy(), axis=1))
    else:
        order = sizes.argsort(dim=1)
    ordered = sizes.gather(1, order)
    same = ordered[:, 1:] == ordered[:, :-1]
    index = torch.arange(sizes.shape[1], device=sizes.device, dtype=torch.int32)
    ranks = index.to(sizes.dtype).repeat(len(sizes), 1)
    tied = same.any(1).nonzero().view(-1)
    if len(tied):
        same = same[tied]
        border = torch.ones(len(tied), 1, dtype=torch.bool, device=sizes.device)
        first = torch.where(torch.cat([border, ~same], 1), index, 0).cummax(1).values
        last = torch.where(torch.cat([~same, border], 1), index, sizes.shape[1]).flip(1).cummin(1).values.flip(1)
        ranks[tied] = (first + last).to(sizes.dtype).mul_(0.5)
    return order, ranks
