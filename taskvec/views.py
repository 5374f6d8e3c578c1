"""Sources seen through a change of names or shapes, without a copy."""

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskvec.errors import MismatchError
from taskvec.precision import compute_dtype, is_float
from taskvec.source import LowRank, TensorInfo, TensorSource, origin_of


def stored_dtype(source: TensorSource, name: str) -> torch.dtype:
    """The dtype in which the tensor is stored, also where the source gives it wider than that."""
    ask: Callable[[str], torch.dtype] | None = getattr(source, "stored_dtype", None)
    return source.infos[name].dtype if ask is None else ask(name)


class Renamed:
    """A source whose tensor names get another prefix.

    Args:
        source: the source.
        prefixes: old prefix to new one; the first that fits a name replaces it.

    Raises:
        MismatchError: two tensors would get the same name, or a prefix fits none.
    """

    def __init__(self, source: TensorSource, prefixes: Mapping[str, str]):
        self.source, self.label = source, source.label
        self.path: Path | None = getattr(source, "path", None)
        self._old: dict[str, str] = {}
        used = set()
        for name in source.infos:
            prefix = next((p for p in prefixes if name.startswith(p)), None)
            new = name if prefix is None else prefixes[prefix] + name[len(prefix) :]
            used.add(prefix)
            if new in self._old:
                raise MismatchError([f"{source.label}: {self._old[new]} and {name} would both be called {new}"])
            self._old[new] = name
        unused = [p for p in prefixes if p not in used]
        if unused:
            raise MismatchError([f"{source.label}: no tensor name starts with {prefix!r}" for prefix in unused])
        new_of = {old: new for new, old in self._old.items()}
        self.infos: Mapping[str, TensorInfo] = {new: source.infos[old] for new, old in self._old.items()}
        self.aliases: Mapping[str, str] = {new_of[a]: new_of[b] for a, b in source.aliases.items()}

    def read(self, name: str) -> Tensor:
        return self.source.read(self._old[name])

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.read_flat(self._old[name], start, stop)

    def origin(self, name: str) -> tuple[Any, str] | None:
        return origin_of(self.source, self._old[name]) if name in self._old else None

    def stored_dtype(self, name: str) -> torch.dtype:
        return stored_dtype(self.source, self._old[name])


class Selected:
    """Some tensors of a source under names of the caller's, one of them several times if wanted.

    Args:
        source: the source.
        names: new name to the source's own; those that the source lacks are left out.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str]):
        self.source, self.label = source, source.label
        self.path: Path | None = getattr(source, "path", None)
        self._old = {new: old for new, old in names.items() if old in source.infos}
        self.infos: Mapping[str, TensorInfo] = {new: source.infos[old] for new, old in self._old.items()}
        first: dict[str, str] = {}
        for new, old in self._old.items():
            first.setdefault(old, new)
        self.aliases: Mapping[str, str] = {
            new: first[source.aliases[old]]
            for new, old in self._old.items()
            if old in source.aliases and source.aliases[old] in first
        }

    def read(self, name: str) -> Tensor:
        return self.source.read(self._old[name])

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.read_flat(self._old[name], start, stop)

    def read_ahead(self, name: str, start: int, stop: int) -> None:
        ahead = getattr(self.source, "read_ahead", None)
        if ahead is not None:
            ahead(self._old[name], start, stop)

    def low_rank(self, name: str) -> LowRank | None:
        """The delta as a product of factors, where the source has it as one."""
        product: LowRank | None = self.source.low_rank(self._old[name]) if hasattr(self.source, "low_rank") else None
        return product

    def origin(self, name: str) -> tuple[Any, str] | None:
        return origin_of(self.source, self._old[name]) if name in self._old else None

    def stored_dtype(self, name: str) -> torch.dtype:
        return stored_dtype(self.source, self._old[name])


class Wide:
    """A sum that is rounded when it is read (`taskvec.vector.Applied`), seen before that rounding."""

    def __init__(self, source: Any):
        self.source, self.label, self.aliases = source, source.label, source.aliases
        self.path: Path | None = getattr(source, "path", None)
        self.companions: tuple[Path, ...] = source.companions
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(info.shape, compute_dtype(info.dtype)) if is_float(info.dtype) else info
            for name, info in source.infos.items()
        }

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        return self.read_flat(name, 0, info.numel).view(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        values: Tensor = self.source.read_unrounded(name, start, stop)
        return values.to(self.infos[name].dtype)

    def stored_dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self.source.infos[name].dtype
        return dtype


_RUN = 1 << 20  # elements of a table that are summed at once

Row = tuple[TensorSource, int]
"""One row of a table: whose, and which."""


class Mean(Enum):
    """What stands for a row that is the mean of all rows of its table but those like it."""

    OF_THE_OTHERS = "mean of the others"


MEAN = Mean.OF_THE_OTHERS
RowFrom = int | tuple[Row, ...] | Mean
"""Where a row comes from: a row of the same table, the mean of some rows anywhere (zero of none), or of the others here."""


class Rows:
    """A source in which some tables have other rows: each a row of a table, a mean of several, or zero.

    Tables are read in runs of consecutive rows, so that none is ever held as a whole.

    Args:
        source: the source.
        tables: name to the rows that the table has here: a number is a row of its own table, a tuple of `Row` the mean of
            these rows (of tables of the same name), an empty tuple zero, `MEAN` the mean of all others of this table.
    """

    def __init__(self, source: TensorSource, tables: Mapping[str, Sequence[RowFrom]]):
        self.source, self.label, self.aliases = source, source.label, source.aliases
        self.path: Path | None = getattr(source, "path", None)
        self._tables = {name: rows for name, rows in tables.items() if name in source.infos}
        self._means: dict[str, Tensor] = {}
        self.infos: Mapping[str, TensorInfo] = {
            name: self._info(name, info) if name in self._tables else info for name, info in source.infos.items()
        }

    def _info(self, name: str, info: TensorInfo) -> TensorInfo:
        rows = self._tables[name]
        means = any(
            row is MEAN or (isinstance(row, tuple) and len(row) > 1) for row in rows
        )  # not rounded before the merge
        return TensorInfo((len(rows), *info.shape[1:]), compute_dtype(info.dtype) if means else info.dtype)

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        return self.read_flat(name, 0, info.numel).view(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._tables:
            return self.source.read_flat(name, start, stop)
        info, rows = self.infos[name], self._tables[name]
        width = max(1, math.prod(info.shape[1:]))
        first, last = start // width, -(-stop // width)
        found = torch.zeros((last - first) * width, dtype=info.dtype)
        at = first
        while at < last:
            row, place = rows[at], (at - first) * width
            if isinstance(row, int):
                run = 1
                while at + run < last and rows[at + run] == row + run:
                    run += 1
                found[place : place + run * width] = self.source.read_flat(name, row * width, (row + run) * width)
                at += run
                continue
            if isinstance(row, Mean):
                found[place : place + width] = self._mean(name, width)
            elif row:
                parts = [source.read_flat(name, r * width, (r + 1) * width) for source, r in row]
                total = parts[0].to(compute_dtype(info.dtype))
                for part in parts[1:]:
                    total = total + part
                found[place : place + width] = (total / len(parts)).to(info.dtype)
            at += 1
        return found[start - first * width : stop - first * width]

    def _mean(self, name: str, width: int) -> Tensor:
        if name not in self._means:
            rows, step = [at for at, row in enumerate(self._tables[name]) if row is not MEAN], max(1, _RUN // width)
            total, at = torch.zeros(width, dtype=torch.float64), 0
            while at < len(rows):
                stop = at + 1
                while stop < len(rows) and stop - at < step and rows[stop] == rows[stop - 1] + 1:
                    stop += 1
                values = self.read_flat(name, rows[at] * width, (rows[stop - 1] + 1) * width)
                total += values.view(-1, width).sum(0, dtype=torch.float64)
                at = stop
            self._means[name] = total / max(1, len(rows))
        return self._means[name]

    def origin(self, name: str) -> tuple[Any, str] | None:
        return None if name in self._tables else origin_of(self.source, name)

    def stored_dtype(self, name: str) -> torch.dtype:
        return stored_dtype(self.source, name)


class Resized:
    """A source in which some tensors have more or fewer rows (first dimension).

    Rows beyond the source's own come from `filler`, so that their difference to it is zero.
    """

    def __init__(self, source: TensorSource, shapes: Mapping[str, tuple[int, ...]], filler: TensorSource):
        self.source, self.label, self.aliases = source, source.label, source.aliases
        self.path: Path | None = getattr(source, "path", None)
        self._filler, self._shapes = filler, dict(shapes)
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(self._shapes.get(name, info.shape), info.dtype) for name, info in source.infos.items()
        }

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        return self.read_flat(name, 0, info.numel).view(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        own = self.source.infos[name].numel
        if stop <= own:
            return self.source.read_flat(name, start, stop)
        rest = self._filler.read_flat(name, max(start, own), stop).to(self.infos[name].dtype)
        if start >= own:
            return rest
        return torch.cat([self.source.read_flat(name, start, own), rest])

    def origin(self, name: str) -> tuple[Any, str] | None:
        same = name in self.infos and self.infos[name] == self.source.infos[name]
        return origin_of(self.source, name) if same else None

    def stored_dtype(self, name: str) -> torch.dtype:
        return stored_dtype(self.source, name)


class Only:
    """The tensors of a source whose names pass a test."""

    def __init__(self, source: TensorSource, wanted: Callable[[str], bool]):
        self.source, self.label = source, source.label
        self.path: Path | None = getattr(source, "path", None)
        self.infos: Mapping[str, TensorInfo] = {n: info for n, info in source.infos.items() if wanted(n)}
        self.aliases: Mapping[str, str] = {
            a: b for a, b in source.aliases.items() if a in self.infos and b in self.infos
        }

    def read(self, name: str) -> Tensor:
        return self.source.read(name)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.read_flat(name, start, stop)

    def read_ahead(self, name: str, start: int, stop: int) -> None:
        ahead = getattr(self.source, "read_ahead", None)
        if ahead is not None:
            ahead(name, start, stop)

    def origin(self, name: str) -> tuple[Any, str] | None:
        return origin_of(self.source, name) if name in self.infos else None

    def stored_dtype(self, name: str) -> torch.dtype:
        return stored_dtype(self.source, name)
