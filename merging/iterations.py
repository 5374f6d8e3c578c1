"""Spectral answers by matrix products and Cholesky factors alone, for devices on which eigenproblems are slow.

On an H100 the eigenproblem of a 768 × 768 matrix takes 8.9 ms, a product 0.02 ms. Whatever is answered here is proved on the way
(a Cholesky factor exists exactly where a matrix is positive definite) and left to an eigenproblem where it cannot be. All
of it is float64, takes any number of matrices at once, and waits for the device only where a caller asks for an answer.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

_MARGIN = 1 + 1e-9  # what is summed in float64 over a matrix is off by far less
_CLEAR = (
    1.1  # a floor is shown to be cleared by so much: n ε of rounding is below a hundredth of the least floor's square
)
_SQUARINGS = 2  # the fourth power bounds a flat spectrum of 768 within a fifth


def bound(gram: Tensor) -> Tensor:
    """No eigenvalue is above this, [batch].

    Args:
        gram: positive semidefinite, [batch, n, n].
    """
    size = torch.linalg.matrix_norm(gram)
    power = gram / size[:, None, None]
    for _ in range(_SQUARINGS):
        power = power @ power
    return size * torch.linalg.matrix_norm(power) ** 2.0**-_SQUARINGS * _MARGIN


def exceeds(gram: Tensor, floor: Tensor) -> Tensor:
    """Whether every eigenvalue is shown to be above the floor, bool [batch]; False also where it is not far above.

    Args:
        gram: positive semidefinite, [batch, n, n].
        floor: [batch].
    """
    return clearance(gram, floor) > 0


def clearance(gram: Tensor, floor: Tensor) -> Tensor:
    """The least pivot where every eigenvalue is shown to be above the floor, else 0: [batch].

    Where no eigenvalue is far below all others it is their harmonic mean, about, and the least one is a few times smaller.
    """
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_(floor[:, None] * _CLEAR)
    factor, info = torch.linalg.cholesky_ex(shifted)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    return pivots.square().amin(-1).where((info == 0) & pivots.isfinite().all(-1), 0.0)


@cache
def _scalings(least: float) -> tuple[float, ...]:
    """Factors of Newton-Schulz steps that bring singular values within [least, 1] to 1 (Chen and Chow, 2014)."""
    found = []
    while 1 - least > 1e-15:
        factor = math.sqrt(3 / (1 + least + least * least))
        found.append(factor)
        least = min(1.0, factor * least * (3 - (factor * least) ** 2) / 2)
    return tuple(found)


def polar(matrix: Tensor, most: Tensor, least: float, likely: float = 0.0) -> Tensor:
    """The polar factors of matrices of full rank, [batch, m, n].

    Args:
        matrix: float64 [batch, m, n], no wider than tall.
        most: no singular value is above this, [batch].
        least: and none is below this share of it.
        likely: and probably none below this larger share, which takes fewer steps where it is so.

    X ← α X (3 - α² Xᵀ X) / 2, with the α that is best for what is known of the spectrum: 14 steps from 1e-4, 6 from 0.1.
    """
    found = _newton_schulz(matrix / most[:, None, None], max(least, likely))
    if likely > least:
        within = found.mT @ found
        within.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        if float(torch.linalg.matrix_norm(within).max()) > _ORTHONORMAL:
            return _newton_schulz(found, least)  # smaller ones have only grown
    return found


_ORTHONORMAL = 1e-12


def _newton_schulz(found: Tensor, least: float) -> Tensor:
    for factor in _scalings(least):
        found = torch.baddbmm(found, found, found.mT @ found, beta=1.5 * factor, alpha=-0.5 * factor**3)
    return found


_RESOLVED = 1e-6  # eigenvalues closer to the floor than this share of the largest are told apart by an eigenproblem


def mostly_below(gram: Tensor, floor: float, most: Tensor) -> bool:
    """Whether more than half of the eigenvalues are below the floor.

    Args:
        gram: positive semidefinite, [n, n].
        floor: positive.
        most: no eigenvalue is above this, [1].
    """
    size = len(gram)
    shifted = gram.clone()
    shifted.diagonal().sub_(floor)
    signs = polar(shifted[None], most + floor, _RESOLVED)
    # (1 - s) / 2 counts one where s is -1, none where it is 1; where it is neither, it is off by less than 1 - s²
    below, off = torch.stack([size - signs.diagonal(dim1=-2, dim2=-1).sum(), size - signs.square().sum()]).tolist()
    low, high = below - off - 0.5, below + off + 0.5  # twice the count
    if low > size or high <= size:
        return low > size
    return 2 * int((torch.linalg.eigvalsh(gram) < floor).sum()) > size


_GUARDS = 8  # at least so many directions beside the wanted ones: with them it is their gap that counts
_EDGE = 0.8  # of the guards' values, that from which on directions count as wanted ones: the last are still too low
_NATS = (14, 26, 14, 14)  # by how much (e to the power of it) each stage shall lift what is wanted over what is not
_SPREAD = 18.0  # what is lifted further apart than e to this is lost in rounding; then it is time to orthonormalise
_ROUNDS, _STEPS = 40, 160  # with more in one stage an eigenproblem is as fast
_AGREE = 1e-9  # sine of the largest angle between the subspaces found and true


def leading(gram: Tensor, count: int) -> tuple[Tensor, Tensor, list[bool]]:
    """The largest eigenvalues (falling, [batch, count]), their eigenvectors [batch, n, count], and which are proven.

    Args:
        gram: positive semidefinite, [batch, n, n].
        count: well below n.

    Subspace iteration with Chebyshev polynomials of the matrix as a filter (Zhou and Saad, 2007), from a start that is
    always the same. What is proven is within 1e-9 of the true subspace: residuals are that small against half the gap to
    the next value, and a Cholesky factor shows that without these directions every eigenvalue is below the middle of it.
    Where there is no gap, or a very steep spectrum, nothing is proven.
    """
    batch, size, _ = gram.shape
    width = min(size, count + max(count // 2, _GUARDS))
    squares, vectors, proven = gram.new_zeros(batch, count), gram.new_zeros(batch, size, count), [False] * batch
    if width == count:
        return squares, vectors, proven
    block = _draws(size, width).to(gram.device).expand(batch, size, width)
    for _ in range(2):
        block = _orthonormal(gram @ block)
    values, block = _ritz(gram, block)
    left = list(range(batch))
    for nats in _NATS:
        largest, least, edge = (values[:, at] for at in (0, count - 1, count + int((width - count) * _EDGE) - 1))
        rows = torch.stack([2 * least / edge - 1, 2 * largest / edge - 1], 1).tolist()
        degrees = [_degrees(wanted, most, nats) for wanted, most in rows]
        open_ = [at for at, known in enumerate(degrees) if known is not None]
        if not open_:
            break
        if len(open_) < len(left):
            left, gram, block, edge = [left[at] for at in open_], gram[open_], block[open_], edge[open_]
        steps, at_once = max(d[0] for d in degrees if d), min(d[1] for d in degrees if d)
        rounds = -(-steps // at_once)
        block = _filtered(gram, block, edge / 2, -(-steps // rounds), rounds)
        values, block = _ritz(gram, block)
        shown = _shown(gram, values, block, count)
        done = [at for at, known in enumerate(shown) if known]
        where = [left[at] for at in done]
        squares[where], vectors[where] = values[done, :count], block[done, :, :count]
        for at in where:
            proven[at] = True
        rest = [at for at, known in enumerate(shown) if not known]
        if not rest:
            break
        left, gram, block, values = [left[at] for at in rest], gram[rest], block[rest], values[rest]
    return squares, vectors, proven


@cache
def _draws(size: int, width: int) -> Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _degrees(least: float, largest: float, nats: float) -> tuple[int, int] | None:
    """Steps that lift the least wanted value (1 is the edge) by so much, and how many of them can be made at a time."""
    if not 1 < least <= largest < math.inf:
        return None
    steps, at_once = math.ceil(nats / math.acosh(least)), max(1, int(_SPREAD / math.acosh(largest)))
    return (steps, at_once) if steps <= min(_STEPS, _ROUNDS * at_once) else None


def _filtered(gram: Tensor, block: Tensor, middle: Tensor, degree: int, rounds: int) -> Tensor:
    """The block times a polynomial that is small from 0 to twice the middle, orthonormal again after each round."""
    centred = gram / middle[:, None, None]
    centred.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    for _ in range(rounds):
        before, block = block, centred @ block
        for _ in range(degree - 1):
            before, block = block, torch.baddbmm(before, centred, block, beta=-1, alpha=2)
        block = _orthonormal(block)
    return block


def _orthonormal(block: Tensor) -> Tensor:
    """Orthonormal columns with the same span; the first ones keep their directions best."""
    for shift in (1e-13, 0.0):  # where columns are dependent up to rounding, there is a factor all the same
        block = block / torch.linalg.vector_norm(block, dim=1, keepdim=True)
        gram = block.mT @ block
        gram.diagonal(dim1=-2, dim2=-1).add_(shift)
        factor, _ = torch.linalg.cholesky_ex(gram)
        block = torch.linalg.solve_triangular(factor.mT, block, left=False, upper=True)
    return block


def _ritz(gram: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues (falling) and eigenvectors of matrices within the span of orthonormal columns; NaN where there are none."""
    within = block.mT @ (gram @ block)
    within = (within + within.mT) / 2
    finite = within.isfinite().all(-1).all(-1)
    values, rotation = _small_eigh(within.where(finite[:, None, None], 0.0))
    return values.flip(-1).where(finite[:, None], math.nan), block @ rotation.flip(-1)


_SMALL = 256  # up to here a core of the host is at least half as fast as the GPU, and there are several


def _small_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    if matrices.device.type == "cpu" or matrices.shape[-1] > _SMALL:
        return torch.linalg.eigh(matrices)
    with ThreadPoolExecutor(min(len(matrices), len(os.sched_getaffinity(0))), "taskvec-eigh") as pool:
        values, vectors = zip(*pool.map(torch.linalg.eigh, matrices.cpu()))
    return torch.stack(values).to(matrices.device), torch.stack(vectors).to(matrices.device)


def _shown(gram: Tensor, values: Tensor, block: Tensor, count: int) -> list[bool]:
    """Whether the first columns are shown to span the subspace of the largest eigenvalues, for each matrix."""
    wanted, squares, following = block[:, :, :count], values[:, :count], values[:, count]
    least, largest = squares[:, -1], squares[:, 0]
    gap = (least - following) / 2
    residual = torch.linalg.matrix_norm(gram @ wanted - wanted * squares[:, None])
    rounding = len(gram[0]) * torch.finfo(gram.dtype).eps * largest
    within = wanted.mT @ wanted
    within.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    rest = torch.baddbmm(gram, wanted * squares[:, None], wanted.mT, beta=-1)
    rest.diagonal(dim1=-2, dim2=-1).add_((least - gap)[:, None])
    near = (residual <= _AGREE * gap) & (gap > 100 * rounding) & (torch.linalg.matrix_norm(within) < 1e-10)
    found: list[bool] = (near & exceeds(rest, torch.zeros_like(gap))).tolist()
    return found


def side_by_side(work: Callable[[Tensor], Sequence[Tensor]], items: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The work on each tensor; on a GPU by threads on streams of their own, since one alone leaves it waiting for launches.

    Args:
        work: gives tensors that it makes.
        items: on one device.
    """
    device = items[0].device
    if device.type != "cuda" or len(items) == 1:
        return [work(item) for item in items]
    current, streams = torch.cuda.current_stream(device), _streams(device, len(items))
    for stream in streams:
        stream.wait_stream(current)

    def alone(stream: Any, item: Tensor) -> Sequence[Tensor]:
        with torch.no_grad(), torch.cuda.stream(stream):
            return work(item)

    with ThreadPoolExecutor(len(items), "taskvec-streams") as pool:
        found = list(pool.map(alone, streams, items))
    for stream, item, results in zip(streams, items, found):
        current.wait_stream(stream)
        item.record_stream(stream)
        for result in results:  # its memory belongs to that stream, which may not use it again before this one has
            result.record_stream(current)
    return found


@cache
def _streams(device: torch.device, count: int) -> list[Any]:
    return [torch.cuda.Stream(device) for _ in range(count)]
