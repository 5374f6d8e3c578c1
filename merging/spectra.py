"""Singular value decompositions that stay inside the numerical rank of their input.

Directions in which a matrix is zero up to rounding are arbitrary: methods that flatten or whiten a spectrum would fill
them with noise that differs between devices and precisions. Everything here therefore works with the directions whose
singular value is above max(m, n) · ε · σ_1, ε of the *input's* precision, and says when that is fewer than min(m, n).

Arithmetic is float64. For float32 input the decomposition comes from the smaller Gram matrix: at the cut above, its
squared singular values still have nine correct digits, and it costs a product and a symmetric eigenproblem only. On a
GPU, where a product costs a five-hundredth of that eigenproblem, polar factors come from products (`merging.iterations`).
"""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice, repeat
from typing import Any, TypeVar

import torch
from torch import Tensor

from merging import iterations
from merging.iterations import side_by_side
from taskvec.blocks import is_matrix
from taskvec.deltas import Deltas, Tile

_PIECE = 1 << 22  # elements converted to float64 at once


@dataclass(frozen=True, slots=True)
class Svd:
    """A = left diag(values) rightᵀ within the numerical rank, largest directions first.

    Attributes:
        left, values, right: [m, kept], [kept] falling, [n, kept], float64.
        rank: the numerical rank.
        full: min(m, n).
        cut: singular values up to here count as zero.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    rank: int
    full: int
    cut: float

    def top(self, count: int) -> "Svd":
        """The `count` largest directions (fewer where the rank is lower)."""
        return Svd(self.left[:, :count], self.values[:count], self.right[:, :count], self.rank, self.full, self.cut)

    def above(self, floor: float) -> "Svd":
        """The directions whose singular value is at least this."""
        return self.top(int((self.values >= floor).sum()))

    def mostly_below(self, floor: float) -> bool:
        """Whether more than half of the directions have a singular value below this."""
        return 2 * int((self.values < floor).sum()) > len(self.values)

    def dense(self, values: Tensor | None = None) -> Tensor:
        """The matrix, with other singular values if given."""
        return (self.left * (self.values if values is None else values)) @ self.right.T


def svd(matrix: Tensor, dtype: torch.dtype | None = None, *, size: float | None = None, most: int | None = None) -> Svd:
    """The singular value decomposition within the numerical rank, in float64.

    Args:
        matrix: [m, n].
        dtype: precision of the data that it was made of; default: its own.
        size: what rounding is relative to; default: its largest singular value.
        most: largest number of directions wanted; default: all.
    """
    precision = torch.finfo(dtype or matrix.dtype).eps
    full = min(matrix.shape)
    wanted = full if most is None else min(most, full)
    if precision < _FINE:
        left, values, right_t = torch.linalg.svd(matrix.double(), full_matrices=False)
        rank, cut = _rank(values, matrix.shape, precision, size)
        keep = min(rank, wanted)
        return Svd(left[:, :keep], values[:keep], right_t[:keep].T, rank, full, cut)
    squares, vectors = torch.linalg.eigh(_gram(_tall(matrix)))
    return _from_gram(matrix, squares, vectors, precision, size, most)


def _tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] > matrix.shape[1] else matrix.T


def _from_gram(
    matrix: Tensor, squares: Tensor, vectors: Tensor, precision: float, size: float | None, most: int | None
) -> Svd:
    """The decomposition of a matrix, given the eigenvalues and eigenvectors of its smaller Gram matrix."""
    full, tall = min(matrix.shape), matrix.shape[0] > matrix.shape[1]
    values, vectors = squares.flip(0).clamp_(min=0).sqrt_(), vectors.flip(1)
    rank, cut = _rank(values, matrix.shape, precision, size)
    keep = min(rank, full if most is None else most)
    values, vectors = values[:keep], vectors[:, :keep]
    other = _times(_tall(matrix), vectors).div_(values)
    return Svd(other, values, vectors, rank, full, cut) if tall else Svd(vectors, values, other, rank, full, cut)


_FINE = 1e-10  # finer than this is float64, whose rank a Gram matrix cannot show


def _rank(values: Tensor, shape: Sequence[int], precision: float, size: float | None) -> tuple[int, float]:
    largest = float(values[0]) if len(values) else 0.0
    cut = max(shape) * precision * (largest if size is None else size)
    return int((values > cut).sum()), cut


def _gram(tall: Tensor) -> Tensor:
    """AᵀA in float64, a few rows at a time: no float64 copy of the whole."""
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for piece in tall.split(max(1, _PIECE // max(1, tall.shape[1]))):
        wide = piece.double()
        total.addmm_(wide.T, wide)
    return total


def _times(tall: Tensor, right: Tensor) -> Tensor:
    """A B in float64, a few rows at a time."""
    result = torch.empty(tall.shape[0], right.shape[1], dtype=torch.float64, device=tall.device)
    rows = max(1, _PIECE // max(1, tall.shape[1]))
    for piece, part in zip(tall.split(rows), result.split(rows)):
        torch.mm(piece.double(), right, out=part)
    return result


def svds(
    matrices: Iterable[Tensor], dtype: torch.dtype, *, size: Sequence[float] | None = None, most: int | None = None
) -> Iterator[Svd]:
    """The decompositions of several matrices of one shape, one after the other; on a GPU, several at a time.

    Args:
        matrices: each [m, n].
        dtype: precision of the data that they were made of.
        size: for each, what rounding is relative to; default: its largest singular value.
        most: largest number of directions wanted; default: all.
    """
    precision = torch.finfo(dtype).eps
    waiting = zip(matrices, repeat(None) if size is None else size)
    for first in waiting:
        if not _prefers_products(first[0], dtype):
            yield svd(first[0], dtype, size=first[1], most=most)
            continue
        group = [first, *islice(waiting, _ABREAST - 1)]
        found = side_by_side(torch.linalg.eigh, [_gram(_tall(matrix)) for matrix, _ in group])
        for (matrix, each), (squares, vectors) in zip(group, found):
            yield _from_gram(matrix, squares, vectors, precision, each, most)


def _prefers_products(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether to do without eigenproblems: on the CPU these cost no more; float64's rank no Gram matrix shows."""
    return matrix.device.type != "cpu" and torch.finfo(dtype).eps >= _FINE


_ABREAST = 8  # on an H100 eight eigenproblems at a time take 6.0 ms each instead of 8.9, more at a time no less


@dataclass(frozen=True, slots=True)
class Isometry:
    """The polar factor of a matrix within its numerical rank, or of its larger directions.

    Attributes:
        factor: U Vᵀ, [m, n], float64.
        total: sum of the singular values of these directions, float64 [].
        kept: how many directions these are.
        rank: the numerical rank.
        full: min(m, n).
        mostly_rounding: whether most of these are smaller than the floor.
    """

    factor: Tensor
    total: Tensor
    kept: int
    rank: int
    full: int
    mostly_rounding: bool


def isometry(matrix: Tensor, *, floor: float = 0.0, drop: bool = False) -> Isometry:
    """The polar factor of a matrix with what there is to know of its spectrum.

    Args:
        matrix: [m, n].
        floor: a size of singular values.
        drop: whether directions below it are left out.
    """
    if _prefers_products(matrix, matrix.dtype):
        found = isometry_by_products(matrix, floor=floor, drop=drop)
        if found is not None:
            return found
    whole = svd(matrix)
    kept = whole.above(floor) if drop else whole
    return Isometry(
        kept.left @ kept.right.T,
        kept.values.sum(),
        len(kept.values),
        whole.rank,
        whole.full,
        not drop and kept.mostly_below(floor),
    )


def isometry_by_products(matrix: Tensor, *, floor: float = 0.0, drop: bool = False) -> Isometry | None:
    """The same without an eigenproblem; None where the rank is not full, or directions are to be left out."""
    tall, full = _tall(matrix), min(matrix.shape)
    gram = _gram(tall)
    found = _polar_by_products(tall, gram, torch.finfo(matrix.dtype).eps)
    if found is None:
        return None
    low = floor > 0 and not bool(iterations.exceeds(gram[None], gram.new_tensor([floor * floor])))
    if low and drop:
        return None
    low = low and iterations.mostly_below(gram, floor * floor, iterations.bound(gram[None]))
    total = (found * tall).sum()
    return Isometry(found if tall is matrix else found.T, total, full, full, full, low)


def polar(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The polar factor U Vᵀ of U Σ Vᵀ within the numerical rank, float64: the nearest partial isometry.

    Args:
        matrix: [m, n], no wider than it is tall.
        dtype: precision of the data that it was made of.
    """
    precision = torch.finfo(dtype).eps
    if precision < _FINE or matrix.shape[0] < matrix.shape[1]:
        found = svd(matrix, dtype)
        return found.left @ found.right.T
    gram = _gram(matrix)
    if _prefers_products(matrix, dtype):
        factor = _polar_by_products(matrix, gram, precision)
        if factor is not None:
            return factor
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.clamp_(min=0).sqrt_()
    there = values > max(matrix.shape) * precision * (float(values[-1]) if len(values) else 0.0)
    inverse = (vectors[:, there] / values[there]) @ vectors[:, there].T
    return _times(matrix, inverse)


def polar_by_products(matrix: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The same without an eigenproblem; None where the rank is not shown to be full."""
    return _polar_by_products(matrix, _gram(matrix), torch.finfo(dtype).eps)


def _polar_by_products(tall: Tensor, gram: Tensor, precision: float) -> Tensor | None:
    share = max(tall.shape) * precision
    if precision < _FINE or share > 0.1 or not gram.numel():
        return None
    largest = iterations.bound(gram[None])
    # the numerical rank is full if no singular value is below the cut for this largest one, which is no smaller than the true one
    if not bool(iterations.exceeds(gram[None], largest * share**2)):
        return None
    return iterations.polar(tall.double()[None], largest.sqrt(), share)[0]


_HEADROOM = 1.1  # norms of finite random matrices were seen 2 % above their limit


def rounding_floor(tile: Tile, spacing: float) -> float:
    """The largest singular value of the rounding errors in one task's stored weights, about.

    Args:
        tile: a whole matrix, with its base.
        spacing: relative spacing of the stored dtype (ε), 0 for none.

    The errors are independent and uniform within half a unit in the last place: 0.21 ε of a weight in the root mean
    square (units are between ε/2 and ε of it), and a random m × n matrix of entries s has a norm of s (√m + √n).
    """
    if spacing == 0 or tile.base is None:
        return 0.0
    size = float(torch.linalg.vector_norm(tile.base, dtype=torch.float64)) / math.sqrt(tile.base.numel())
    rows, columns = tile.shape
    return _HEADROOM * 0.21 * spacing * size * (math.sqrt(rows) + math.sqrt(columns))


def weights_norm(tile: Tile) -> float:
    """Root of the sum over tasks of the squared weights (their mean over elements, where they differ)."""
    squares = tile.weights.double().square().reshape(len(tile.tasks), -1).mean(1)
    return math.sqrt(float(squares.sum()))


def without_matrices(deltas: Deltas, excluded: Sequence[str], consequence: str) -> list[str]:
    """A warning where a method for matrices finds none among the tensors of a model; else nothing.

    Args:
        deltas: the merge's.
        excluded: shell-style patterns of names that it does not treat as matrices.
        consequence: what becomes of all tensors then.
    """
    infos = deltas.infos
    # one tensor: statistics by tensor, where each asks for itself
    if len(infos) < 2 or any(is_weight_matrix(name, info.shape, excluded) for name, info in infos.items()):
        return []
    return [f"none of the {len(infos)} tensors is a matrix (kernels of convolutions are not), so all {consequence}"]


Found = TypeVar("Found", Svd, Isometry)


class RankWatch:
    """Collects over a merge which matrices had a low numerical rank, and says so once.

    Args:
        consequence: what the method does about it.
        warnings: what else to warn of.
    """

    def __init__(self, consequence: str, warnings: Sequence[str] = ()):
        self._consequence = consequence
        self._warnings = list(warnings)
        self._lock = threading.Lock()
        self._low: dict[str, tuple[int, int]] = {}
        self._notes: dict[str, str] = {}
        self._seen: set[str] = set()
        self._rounded: set[str] = set()

    def saw(self, name: str, found: Found) -> Found:
        """Notes the rank of a matrix (the lowest of several under the same name)."""
        with self._lock:
            self._seen.add(name)
            if found.rank < found.full and (name not in self._low or found.rank < self._low[name][0]):
                self._low[name] = (found.rank, found.full)
        return found

    def rounded(self, name: str, mostly: bool) -> None:
        """Notes whether most directions of a matrix are no larger than what rounding the stored weights adds."""
        if mostly:
            with self._lock:
                self._rounded.add(name)

    def counted(self, name: str) -> None:
        """Notes that a matrix was looked at."""
        with self._lock:
            self._seen.add(name)

    def note(self, name: str, text: str) -> None:
        """Another thing to warn of, once for each text."""
        with self._lock:
            if text not in self._notes or name < self._notes[text]:
                self._notes[text] = name

    def facts(self) -> dict[str, Any]:
        """What to report when the merge is done."""
        warnings = [*self._warnings, *(f"{text} (first: {name})" for text, name in sorted(self._notes.items()))]
        if self._low:
            name = min(self._low)
            rank, full = self._low[name]
            warnings.insert(
                0,
                f"{len(self._low)} of {len(self._seen)} matrices have a low numerical rank ({name}: {rank} of {full}); "
                + self._consequence,
            )
        if self._rounded:
            warnings.append(
                f"in {len(self._rounded)} of {len(self._seen)} matrices ({min(self._rounded)} …) most directions are no "
                "larger than the rounding of the stored weights, and are amplified as if they were the tasks'. Merge the "
                'adapters themselves if there are any, or leave those directions out (rounding="drop")'
            )
        return {"warnings": warnings, **({"low rank": len(self._low)} if self._low else {})}


def is_weight_matrix(name: str, shape: Sequence[int], excluded: Sequence[str]) -> bool:
    """Whether a method for matrices treats this tensor as one.

    Args:
        name: the tensor's name.
        shape: its shape; two dimensions, both larger than one.
        excluded: shell-style patterns of names that are not.
    """
    return is_matrix(tuple(shape)) and not any(fnmatchcase(name, pattern) for pattern in excluded)


def share_of_rank(share: float, full: int) -> int:
    """A share of min(m, n) as a number of directions, at least one."""
    return max(1, math.floor(share * full + 1e-9))
