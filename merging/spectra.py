"""Singular value decompositions that stay inside the numerical rank of their input.

Directions in which a matrix is zero up to rounding are arbitrary: methods that flatten or whiten a spectrum would fill
them with noise that differs between devices and precisions. Everything here therefore works with the directions whose
singular value is above max(m, n) · ε · σ_1, ε of the *input's* precision, and says when that is fewer than min(m, n).
Numbers that came through float32 on their way into float64 have float32's precision (`precision_of`).

Arithmetic is float64. For float32 input the decomposition comes from the smaller Gram matrix: at the cut above, its
squared singular values still have nine correct digits, and it costs a product and a symmetric eigenproblem only. On a
GPU, where a product costs a five-hundredth of that eigenproblem, polar factors and the largest directions come from
products (`merging.iterations`), for as many matrices of one shape at once as there are: kernels ask questions (`abreast`).
"""

import math
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice, repeat
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from merging import iterations
from merging.iterations import side_by_side
from taskvec.blocks import is_matrix
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Kernel, formula

Kind = TypeVar("Kind", bound=Hashable)

_PIECE = 1 << 22  # elements converted to float64 at once


@dataclass(frozen=True, slots=True)
class Svd:
    """A = left diag(values) rightᵀ within the numerical rank, largest directions first.

    Attributes:
        left, values, right: [m, kept], [kept] falling, [n, kept], float64.
        rank: the numerical rank; where only the largest directions were asked for, it may be their number if that is less.
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
        return floor > 0 and 2 * int((self.values < floor).sum()) > len(self.values)

    def dense(self, values: Tensor | None = None) -> Tensor:
        """The matrix, with other singular values if given."""
        return (self.left * (self.values if values is None else values)) @ self.right.T


def precision_of(stack: Tensor) -> torch.dtype:
    """The dtype whose rounding the values carry: float32 where float64 holds nothing but float32's numbers.

    Made in float32 and widened, a matrix of low rank has the rank of its rounding errors in float64.
    """
    widened = stack.dtype == torch.float64 and bool((stack.float() == stack).all())
    return torch.float32 if widened else stack.dtype


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
    matrices: Iterable[Tensor],
    dtype: torch.dtype,
    *,
    size: Sequence[float] | None = None,
    most: int | None = None,
    ranked: bool = False,
) -> Iterator[Svd]:
    """The decompositions of several matrices of one shape, one after the other; on a GPU, several at a time.

    Args:
        matrices: each [m, n].
        dtype: precision of the data that they were made of.
        size: for each, what rounding is relative to; default: its largest singular value.
        most: largest number of directions wanted; default: all.
        ranked: whether the rank is wanted even where it is above that.
    """
    waiting = zip(matrices, repeat(None) if size is None else size)
    for first in waiting:
        if not _prefers_products(first[0], dtype):
            yield svd(first[0], dtype, size=first[1], most=most)
            continue
        group = [first, *islice(waiting, _at_once(first[0].shape) - 1)]
        yield from svds_by_products([m for m, _ in group], dtype, [each for _, each in group], most, ranked=ranked)


def svds_by_products(
    matrices: Sequence[Tensor],
    dtype: torch.dtype,
    sizes: "Sequence[float | None]",
    most: int | None = None,
    *,
    ranked: bool = False,
) -> list[Svd]:
    """The same for a few matrices, their largest directions without an eigenproblem where that is proven."""
    precision, full = torch.finfo(dtype).eps, min(matrices[0].shape)
    grams = torch.stack([_gram(_tall(matrix)) for matrix in matrices])
    found: list[Svd | None] = [None] * len(matrices)
    if most is not None and not ranked and 0 < most <= full // _WELL_BELOW:
        squares, vectors, proven = iterations.leading(grams, most)
        for at, (largest, least) in enumerate(squares[:, [0, -1]].clamp(min=0).sqrt().tolist()):
            size = sizes[at]
            cut = max(matrices[at].shape) * precision * (largest if size is None else size)
            if proven[at] and least > _ABOVE * cut:
                values, other = squares[at].sqrt(), _times(_tall(matrices[at]), vectors[at])
                sides = (other.div_(values), vectors[at])
                left, right = sides if matrices[at].shape[0] > matrices[at].shape[1] else sides[::-1]
                found[at] = Svd(left, values, right, most, full, cut)
    missing = [at for at, known in enumerate(found) if known is None]
    for start in range(0, len(missing), _ABREAST):
        some = missing[start : start + _ABREAST]
        solved = side_by_side(torch.linalg.eigh, [grams[at] for at in some])
        for at, (squares, vectors) in zip(some, solved):
            found[at] = _from_gram(matrices[at], squares, vectors, precision, sizes[at], most)
    return [known for known in found if known is not None]


def _prefers_products(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether to do without eigenproblems: on the CPU these cost no more; float64's rank no Gram matrix shows."""
    return matrix.device.type != "cpu" and torch.finfo(dtype).eps >= _FINE


_ABREAST = 8  # on an H100 eight eigenproblems at a time take 6.0 ms each instead of 8.9, more at a time no less
_WELL_BELOW = 4  # up to this part of min(m, n) directions are found with half as many beside them
_ABOVE = 1.001  # the least of the directions is above the cut by so much, or its place is left to the eigenproblem
_ROOM = 1 << 30  # bytes of float64 copies of matrices that are worked on at once


def _at_once(shape: Sequence[int]) -> int:
    return max(1, _ROOM // max(1, 4 * 8 * math.prod(shape)))


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


def isometry(matrix: Tensor, dtype: torch.dtype | None = None, *, floor: float = 0.0, drop: bool = False) -> Isometry:
    """The polar factor of a matrix with what there is to know of its spectrum.

    Args:
        matrix: [m, n].
        dtype: precision of the data that it was made of; default: its own.
        floor: a size of singular values.
        drop: whether directions below it are left out.
    """
    (found,) = isometries([matrix], dtype or matrix.dtype, [floor], drop=drop)
    return found


def isometries(
    matrices: Sequence[Tensor], dtype: torch.dtype, floors: Sequence[float], *, drop: bool = False
) -> list[Isometry]:
    """The same for several matrices of one shape (or lying down), each with a floor of its own."""
    if not _prefers_products(matrices[0], dtype):
        return [_isometry_of(svd(matrix, dtype), floor, drop) for matrix, floor in zip(matrices, floors)]
    found: list[Isometry | None] = []
    step = _at_once(matrices[0].shape)
    for at in range(0, len(matrices), step):
        found += isometries_by_products(matrices[at : at + step], dtype, floors[at : at + step], drop=drop)
    missing = [at for at, known in enumerate(found) if known is None]
    wholes = svds([matrices[at] for at in missing], dtype)
    for at, whole in zip(missing, wholes):
        found[at] = _isometry_of(whole, floors[at], drop)
    return [known for known in found if known is not None]


def _isometry_of(whole: Svd, floor: float, drop: bool) -> Isometry:
    kept = whole.above(floor) if drop else whole
    return Isometry(
        kept.left @ kept.right.T,
        kept.values.sum(),
        len(kept.values),
        whole.rank,
        whole.full,
        not drop and kept.mostly_below(floor),
    )


def isometries_by_products(
    matrices: Sequence[Tensor], dtype: torch.dtype, floors: Sequence[float], *, drop: bool = False
) -> list[Isometry | None]:
    """The same without eigenproblems; None where the rank is not full, or directions are to be left out."""
    talls, full = [_tall(matrix) for matrix in matrices], min(matrices[0].shape)
    grams = torch.stack([_gram(tall) for tall in talls])
    factors = polars_by_products(talls, grams, torch.finfo(dtype).eps)
    found: list[Isometry | None] = []
    for matrix, tall, gram, factor, floor in zip(matrices, talls, grams, factors, floors):
        low = floor > 0 and not bool(iterations.exceeds(gram[None], gram.new_tensor([floor * floor])))
        if factor is None or (low and drop):
            found.append(None)
            continue
        low = low and iterations.mostly_below(gram, floor * floor, iterations.bound(gram[None]))
        total = (factor * tall).sum()
        found.append(Isometry(factor if tall is matrix else factor.T, total, full, full, full, low))
    return found


def polar(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The polar factor U Vᵀ of U Σ Vᵀ within the numerical rank, float64: the nearest partial isometry.

    Args:
        matrix: [m, n], no wider than it is tall.
        dtype: precision of the data that it was made of.
    """
    (found,) = polars([matrix], dtype)
    return found


def polars(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same for several matrices of one shape."""
    precision = torch.finfo(dtype).eps
    if precision < _FINE or matrices[0].shape[0] < matrices[0].shape[1]:
        return [found.left @ found.right.T for found in (svd(matrix, dtype) for matrix in matrices)]
    factors: list[Tensor] = []
    step = _at_once(matrices[0].shape)
    for at in range(0, len(matrices), step):
        some = matrices[at : at + step]
        grams = [_gram(matrix) for matrix in some]
        by_products = _prefers_products(some[0], dtype)
        known = polars_by_products(some, torch.stack(grams), precision) if by_products else [None] * len(some)
        for matrix, gram, factor in zip(some, grams, known):
            factors.append(_polar_by_eigenproblem(matrix, gram, precision) if factor is None else factor)
    return factors


def _polar_by_eigenproblem(tall: Tensor, gram: Tensor, precision: float) -> Tensor:
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.clamp_(min=0).sqrt_()
    there = values > max(tall.shape) * precision * (float(values[-1]) if len(values) else 0.0)
    inverse = (vectors[:, there] / values[there]) @ vectors[:, there].T
    return _times(tall, inverse)


_CAREFUL = 0.25  # of tall random matrices the least singular value is a half of what the pivots say


def polars_by_products(talls: Sequence[Tensor], grams: Tensor, precision: float) -> list[Tensor | None]:
    """Polar factors of tall matrices without eigenproblems; None where the rank is not shown to be full.

    Args:
        talls: matrices of one shape, no wider than tall.
        grams: their Gram matrices, float64 [matrix, n, n].
        precision: ε of the dtype that the matrices came in.
    """
    share = max(talls[0].shape) * precision
    if precision < _FINE or share > 0.1 or not grams.numel():
        return [None] * len(talls)
    largest = iterations.bound(grams)
    # the numerical rank is full if no singular value is below the cut for this largest one, which is no smaller than the true one
    clear = (iterations.clearance(grams, largest * share**2) / largest).tolist()
    there = [at for at, least in enumerate(clear) if least > 0]
    found: list[Tensor | None] = [None] * len(talls)
    if there:
        wide = torch.stack([talls[at].double() for at in there])
        # the least singular value of a square matrix may be by itself far below the others
        likely = _CAREFUL * min(clear[at] for at in there) ** 0.5 if wide.shape[1] >= 1.5 * wide.shape[2] else 0.0
        for at, factor in zip(there, iterations.polar(wide, largest[there].sqrt(), share, likely)):
            found[at] = factor
    return found


class Question(Protocol):
    """What a kernel asks of the spectra of its matrices."""

    @classmethod
    def answers(cls, asked: Sequence[Any]) -> Sequence[Any]:
        """The answers to several questions of this kind."""
        ...


@dataclass(frozen=True, slots=True)
class Decompositions:
    """Asks for the decomposition of each of several matrices of one shape: a list of `Svd`; see `svds`."""

    matrices: Iterable[Tensor]
    dtype: torch.dtype
    size: Sequence[float] | None = None
    most: int | None = None
    ranked: bool = False

    @classmethod
    def answers(cls, asked: "Sequence[Decompositions]") -> list[list[Svd]]:
        if len(asked) == 1:
            (one,) = asked
            return [list(svds(one.matrices, one.dtype, size=one.size, most=one.most, ranked=one.ranked))]
        given = [list(one.matrices) for one in asked]
        found: list[list[Svd]] = [[] for _ in asked]
        kinds = [(_tall(m[0]).shape, one.dtype, one.most, one.ranked, one.size is None) for m, one in zip(given, asked)]
        for (_, dtype, most, ranked, unsized), places in _alike(kinds):
            matrices = [matrix for at in places for matrix in given[at]]
            size = None if unsized else [each for at in places for each in asked[at].size or ()]
            several = svds(matrices, dtype, size=size, most=most, ranked=ranked)
            for at in places:
                found[at] = list(islice(several, len(given[at])))
        return found


@dataclass(frozen=True, slots=True)
class Polars:
    """Asks for the polar factors of matrices: a list of tensors; see `polar`."""

    matrices: Sequence[Tensor]
    dtype: torch.dtype

    @classmethod
    def answers(cls, asked: "Sequence[Polars]") -> list[list[Tensor]]:
        flat = [(matrix, one.dtype) for one in asked for matrix in one.matrices]
        found: dict[int, Tensor] = {}
        for (_, dtype), places in _alike([(matrix.shape, dtype) for matrix, dtype in flat]):
            found |= zip(places, polars([flat[at][0] for at in places], dtype))
        several = (found[at] for at in range(len(flat)))
        return [list(islice(several, len(one.matrices))) for one in asked]


@dataclass(frozen=True, slots=True)
class Isometric:
    """Asks for an `Isometry`; see `isometry`."""

    matrix: Tensor
    dtype: torch.dtype
    floor: float = 0.0
    drop: bool = False

    @classmethod
    def answers(cls, asked: "Sequence[Isometric]") -> list[Isometry]:
        found: dict[int, Isometry] = {}
        kinds = [(_tall(one.matrix).shape, one.dtype, one.drop) for one in asked]
        for (_, dtype, drop), places in _alike(kinds):
            some = [asked[at] for at in places]
            floors = [one.floor for one in some]
            found |= zip(places, isometries([one.matrix for one in some], dtype, floors, drop=drop))
        return [found[at] for at in range(len(asked))]


def _alike(kinds: Sequence[Kind]) -> list[tuple[Kind, list[int]]]:
    """Each kind with the places where it is."""
    places: dict[Kind, list[int]] = {}
    for at, kind in enumerate(kinds):
        places.setdefault(kind, []).append(at)
    return list(places.items())


Work = Generator[Question, Any, Tensor]


def abreast(work: Callable[[Tile], Work]) -> Kernel:
    """A kernel that asks for what it wants to know of spectra, so that several tensors can ask together.

    Args:
        work: on one tile: yields questions, is sent the answers, returns the kernel's result.
    """

    def together(tiles: Sequence[Tile]) -> list[Tensor]:
        works, found = [work(tile) for tile in tiles], [tile.stack[0] for tile in tiles]
        answers: dict[int, Any] = dict.fromkeys(range(len(tiles)))
        while answers:
            asked: list[tuple[int, Question]] = []
            for at, answer in answers.items():
                try:
                    asked.append((at, works[at].send(answer)))
                except StopIteration as done:
                    found[at] = done.value
            answers = {}
            for kind, places in _alike([type(question) for _, question in asked]):
                told = kind.answers([asked[place][1] for place in places])
                answers |= zip((asked[place][0] for place in places), told)
        return found

    @formula("abreast", of=together)
    def kernel(tile: Tile) -> Tensor:
        (found,) = together([tile])
        return found

    return kernel


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
