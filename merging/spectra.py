"""Singular value decompositions that stay inside the numerical rank of their input.

Directions in which a matrix is zero up to rounding are arbitrary: methods that flatten or whiten a spectrum would fill
them with noise that differs between devices and precisions. Everything here therefore works with the directions whose
singular value is above max(m, n) · ε · σ_1, ε of the *input's* precision, and says when that is fewer than min(m, n).

Arithmetic is float64. For float32 input the decomposition comes from the smaller Gram matrix: at the cut above, its
squared singular values still have nine correct digits, and it costs a product and a symmetric eigenproblem only.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from taskvec.blocks import is_matrix


@dataclass(frozen=True, slots=True)
class Svd:
    """A = left diag(values) rightᵀ within the numerical rank: left [m, rank], values [rank] falling, right [n, rank].

    Attributes:
        full: min(m, n).
        cut: singular values up to here count as zero.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    full: int
    cut: float

    @property
    def rank(self) -> int:
        return int(self.values.shape[0])

    def top(self, count: int) -> "Svd":
        """The `count` largest directions (fewer where the rank is lower)."""
        return Svd(self.left[:, :count], self.values[:count], self.right[:, :count], self.full, self.cut)

    def dense(self, values: Tensor | None = None) -> Tensor:
        """The matrix, with other singular values if given."""
        return (self.left * (self.values if values is None else values)) @ self.right.T


def svd(matrix: Tensor, dtype: torch.dtype | None = None, *, size: float | None = None) -> Svd:
    """The singular value decomposition within the numerical rank, in float64.

    Args:
        matrix: [m, n].
        dtype: precision of the data that it was made of; default: its own.
        size: what rounding is relative to; default: its largest singular value.
    """
    precision = torch.finfo(dtype or matrix.dtype).eps
    wide = matrix.double()
    full = min(wide.shape)
    if precision < 1e-10:
        left, values, right_t = torch.linalg.svd(wide, full_matrices=False)
        right = right_t.T
    else:
        tall = wide.shape[0] > wide.shape[1]
        squares, vectors = torch.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)
        values, vectors = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
        left = right = vectors
    largest = float(values[0]) if full else 0.0
    cut = max(wide.shape) * precision * (largest if size is None else size)
    rank = int((values > cut).sum())
    values = values[:rank]
    if precision < 1e-10:
        return Svd(left[:, :rank], values, right[:, :rank], full, cut)
    if tall:
        right = right[:, :rank]
        return Svd(wide @ right / values, values, right, full, cut)
    left = left[:, :rank]
    return Svd(left, values, wide.T @ left / values, full, cut)


def polar(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The polar factor U Vᵀ of U Σ Vᵀ within the numerical rank, float64: the nearest partial isometry.

    Args:
        matrix: [m, n].
        dtype: precision of the data that it was made of.
    """
    found = svd(matrix, dtype)
    return found.left @ found.right.T


class RankWatch:
    """Collects over a merge which matrices had a low numerical rank, and says so once.

    Args:
        consequence: what the method does about it.
    """

    def __init__(self, consequence: str):
        self._consequence = consequence
        self._lock = threading.Lock()
        self._low: dict[str, tuple[int, int]] = {}
        self._notes: dict[str, str] = {}
        self._seen: set[str] = set()

    def saw(self, name: str, found: Svd) -> Svd:
        """Notes the rank of a matrix (the lowest of several under the same name)."""
        with self._lock:
            self._seen.add(name)
            if found.rank < found.full and (name not in self._low or found.rank < self._low[name][0]):
                self._low[name] = (found.rank, found.full)
        return found

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
        warnings = [f"{text} (first: {name})" for text, name in sorted(self._notes.items())]
        if self._low:
            name = min(self._low)
            rank, full = self._low[name]
            warnings.insert(
                0,
                f"{len(self._low)} of {len(self._seen)} matrices have a low numerical rank ({name}: {rank} of {full}); "
                + self._consequence,
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
