"""The ways in which an adapter changes a tensor, each evaluated a few rows at a time in the base's own orientation.

A change is made ready once (its factors are read and checked) and then yields any range of rows. Whole tensors and
pieces come from the same fixed blocks of rows, so a delta has the same bits however it is cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import Tensor

from taskvec.errors import NonFiniteError
from taskvec.source import LowRank, TensorSource

# elements of one block of rows: 1 MiB of float32, which stays in the second-level cache while its rows are made
BLOCK = 1 << 18

Rows = Callable[[int, int], Tensor]
"""Rows `start` to `stop` of a tensor seen as [rows, columns]."""


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor's shape as [rows, columns]: its first dimension against all the others.

    >>> matrix_shape((8, 3, 2, 2)), matrix_shape((5,)), matrix_shape(())
    ((8, 12), (5, 1), (1, 1))
    """
    if not shape:
        return 1, 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    return shape[0], columns


@dataclass(frozen=True, slots=True)
class Ready:
    """A change whose factors are in memory: any rows of it, and the product it is, if it is one."""

    rows: Rows
    product: LowRank | None = None


class Change(Protocol):
    """One way of changing one tensor."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def factored(self) -> bool:
        """Whether it may be a product of factors."""
        ...

    def ready(self) -> Ready: ...


def base_rows(base: TensorSource, name: str, dtype: torch.dtype) -> Rows:
    """Reads rows of a tensor of the base in the dtype of the arithmetic."""
    rows, columns = matrix_shape(base.infos[name].shape)

    def read(start: int, stop: int) -> Tensor:
        if (start, stop) == (0, rows):
            return base.read(name).to(dtype).reshape(rows, columns)
        return base.read_flat(name, start * columns, stop * columns).to(dtype).reshape(stop - start, columns)

    return read


def blocks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The fixed row ranges in which every tensor of this shape is made."""
    rows, columns = matrix_shape(shape)
    step = max(1, BLOCK // max(1, columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True, slots=True)
class Product:
    """Delta = left @ right: LoRA on a matrix, an embedding or a convolution, with its scaling in `left`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    factors: Callable[[], tuple[Annotated[Tensor, "rows rank"], Annotated[Tensor, "rank columns"]]]
    factored: bool = True

    def ready(self) -> Ready:
        left, right = self.factors()
        left, right = left.to(self.dtype).contiguous(), right.to(self.dtype).contiguous()
        return Ready(lambda start, stop: left[start:stop] @ right, LowRank(left, right, self.shape))


@dataclass(frozen=True, slots=True)
class Dora:
    """Delta = diag(m / norm(W0 + product)) (W0 + product) - W0 (DoRA, arXiv:2402.09353, eq. 5).

    The norm is per output: a row where the base stores [out, in] (and for convolutions), a column where it stores
    [in, out] (Conv1D) or [vocabulary, features] (embeddings).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    product: Product
    magnitude: Callable[[], Tensor]
    per_column: bool
    base: TensorSource
    factored: bool = False

    def ready(self) -> Ready:
        weight = base_rows(self.base, self.name, self.dtype)
        product = self.product.ready().rows
        magnitude = self.magnitude().to(self.dtype).reshape(-1)
        if self.per_column:
            # sums of squares over the fixed blocks, in float64: a vocabulary has many rows
            squares = torch.zeros(matrix_shape(self.shape)[1], dtype=torch.float64)
            for start, stop in blocks(self.shape):
                squares += (weight(start, stop) + product(start, stop)).double().square().sum(0)
            factor = (magnitude.double() / squares.sqrt()).to(self.dtype)

        def rows(start: int, stop: int) -> Tensor:
            before = weight(start, stop)
            after = before + product(start, stop)
            if self.per_column:
                return after * factor - before
            norms = torch.linalg.vector_norm(after, dim=1, keepdim=True)
            return after * (magnitude[start:stop, None] / norms) - before

        return Ready(rows)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Delta = (l - 1) * W0 (IA3, arXiv:2205.05638): `l` multiplies outputs, or inputs in a feed-forward module."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    vector: Callable[[], Tensor]
    per_column: bool
    base: TensorSource
    groups: int = 1
    factored: bool = False

    def ready(self) -> Ready:
        weight = base_rows(self.base, self.name, self.dtype)
        change = self.vector().to(self.dtype).reshape(-1) - 1
        if not self.per_column:
            return Ready(lambda start, stop: weight(start, stop) * change[start:stop, None])
        rows, columns = matrix_shape(self.shape)
        # one row of factors for each group of outputs, repeated over a convolution's kernel
        factors = change.reshape(self.groups, -1)
        factors = factors.repeat_interleave(columns // factors.shape[1], dim=1)
        group_of = torch.arange(rows) // max(1, rows // self.groups)
        return Ready(lambda start, stop: weight(start, stop) * factors[group_of[start:stop]])


@dataclass(frozen=True, slots=True)
class Replaced:
    """Delta = saved - W0: `modules_to_save`, trained biases. A mere copy of the base that was saved with the adapter
    is no change: it is compared first, in the dtype it was saved in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    saved: Callable[[], Tensor]
    base: TensorSource
    is_copy: bool = False

    @property
    def factored(self) -> bool:
        return self.is_copy

    def is_unchanged(self) -> bool:
        """Whether the saved tensor is the base's, up to the rounding to the dtype it was saved in."""
        saved = self.saved()
        rows, columns = matrix_shape(self.shape)
        flat = saved.reshape(rows, columns)
        for start, stop in blocks(self.shape):
            values = self.base.read_flat(self.name, start * columns, stop * columns).reshape(stop - start, columns)
            if not torch.equal(values.to(saved.dtype), flat[start:stop]):
                return False
        return True

    def ready(self) -> Ready:
        weight = base_rows(self.base, self.name, self.dtype)
        rows, columns = matrix_shape(self.shape)
        if self.is_copy and self.is_unchanged():
            nothing = LowRank(
                torch.zeros(rows, 0, dtype=self.dtype), torch.zeros(0, columns, dtype=self.dtype), self.shape
            )
            return Ready(lambda start, stop: torch.zeros(stop - start, columns, dtype=self.dtype), nothing)
        saved = self.saved().reshape(rows, columns)
        return Ready(lambda start, stop: saved[start:stop].to(self.dtype) - weight(start, stop))


@dataclass(frozen=True, slots=True)
class ReplacedRows:
    """Delta = saved - W0 on a few rows, zero elsewhere (`trainable_token_indices`)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    saved: Callable[[], Tensor]
    indices: tuple[int, ...]
    base: TensorSource
    factored: bool = False

    def ready(self) -> Ready:
        weight = base_rows(self.base, self.name, self.dtype)
        columns = matrix_shape(self.shape)[1]
        saved = self.saved().to(self.dtype)
        changed = {index: saved[position] - weight(index, index + 1)[0] for position, index in enumerate(self.indices)}

        def rows(start: int, stop: int) -> Tensor:
            result = torch.zeros(stop - start, columns, dtype=self.dtype)
            for index, row in changed.items():
                if start <= index < stop:
                    result[index - start] = row
            return result

        return Ready(rows)


@dataclass(frozen=True, slots=True)
class Added:
    """Delta = a small tensor that the adapter holds as such (`lora_bias`)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Callable[[], Tensor]
    factored: bool = False

    def ready(self) -> Ready:
        values = self.values().to(self.dtype).reshape(matrix_shape(self.shape))
        return Ready(lambda start, stop: values[start:stop])


@dataclass(frozen=True, slots=True)
class Experts:
    """One product for each expert of a fused [expert, out, in] (or [expert, in, out]) parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    factors: Callable[[int], tuple[Tensor, Tensor]]
    factored: bool = False

    def ready(self) -> Ready:
        def rows(start: int, stop: int) -> Tensor:
            deltas = []
            for expert in range(start, stop):
                left, right = self.factors(expert)
                deltas.append((left.to(self.dtype) @ right.to(self.dtype)).reshape(1, -1))
            return torch.cat(deltas)

        return Ready(rows)


@dataclass(frozen=True, slots=True)
class Together:
    """Several changes of one tensor, added up (a saved copy of an embedding that differs, and LoRA on top of it)."""

    parts: tuple[Change, ...]

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if any(part.dtype == torch.float64 for part in self.parts) else torch.float32

    @property
    def factored(self) -> bool:
        return all(part.factored for part in self.parts)

    def ready(self) -> Ready:
        parts = [part.ready() for part in self.parts]
        products = [part.product for part in parts if part.product is not None]
        product = summed(products) if len(products) == len(parts) else None
        if product is not None:
            left, right = product.left.to(self.dtype), product.right.to(self.dtype)
            return Ready(lambda start, stop: left[start:stop] @ right, LowRank(left, right, self.shape))

        def rows(start: int, stop: int) -> Tensor:
            total = parts[0].rows(start, stop).to(self.dtype)
            for part in parts[1:]:
                total = total + part.rows(start, stop)
            return total

        return Ready(rows)


def summed(products: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """A weighted sum of products as one product, exact: factors side by side, rank = sum of ranks.

    Args:
        products: at least one, all of one shape.
        weights: one factor for each (any real number), 1 if left out.
    """
    weights = [1.0] * len(products) if weights is None else weights
    if not products or len(weights) != len(products):
        raise ValueError(f"{len(products)} products and {len(weights)} weights")
    shapes = {product.shape for product in products}
    if len(shapes) > 1:
        raise ValueError(f"products of different shapes cannot be summed: {sorted(shapes)}")
    dtype = torch.float64 if any(product.left.dtype == torch.float64 for product in products) else torch.float32
    left = torch.cat([product.left.to(dtype) * weight for product, weight in zip(products, weights)], dim=1)
    right = torch.cat([product.right.to(dtype) for product in products], dim=0)
    return LowRank(left, right, products[0].shape)


def finite(values: Tensor, tensor: str, source: str) -> Tensor:
    """The same tensor, if all of it is finite.

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    # a sum is finite only if all its terms are, and costs a fifth of looking at each
    wide = values.dtype if values.dtype == torch.float64 else torch.float32
    if bool(torch.isfinite(values.sum(dtype=wide))):
        return values
    bad = int((~torch.isfinite(values.to(wide))).sum())  # float8 has no isfinite of its own
    if bad:
        raise NonFiniteError(tensor, source, bad)
    return values
