"""The compiled passes of native.c: one call reads, widens, subtracts, selects, combines and rounds a tile.

Each has an eager twin that defines it (named at each function) and whose bits it reproduces; where there was no compiler
at installation, or the processor lacks AVX2, the twins run. Calls go through ctypes, which lets other threads run.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from taskvec.errors import ChangedFileError

CHUNK = 1 << 15
"""Elements whose squares make one partial sum."""

MOST_TASKS = 64
_VERSION = 4  # that of native.c: a library built from older sources is not used
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

AS_IS, LESS_BASE, PLUS_BASE = 0, 1, 2
_NOT_FINITE, _OVERFLOWN, _UNREAD = 1, 2, 4


class _Files(ctypes.Structure):
    _fields_ = [
        ("count", c_int64),
        ("piece", c_int64),
        ("files", c_void_p),
        ("offsets", c_void_p),
        ("sizes", c_void_p),
        ("into", c_void_p),
    ]


class _Tile(ctypes.Structure):
    _fields_ = [
        ("tasks", c_int32),
        ("base_kind", c_int32),
        ("count", c_int64),
        ("chunks", c_int64),
        ("files", POINTER(_Files)),
        ("rows", POINTER(c_void_p)),
        ("kinds", POINTER(c_int32)),
        ("relations", POINTER(c_int32)),
        ("base", c_void_p),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        ("type", c_int32),
        ("scaled", c_int32),
        ("low", POINTER(c_float)),
        ("high", POINTER(c_float)),
        ("factor", POINTER(c_float)),
        ("add", POINTER(c_uint32)),
        ("multiply", POINTER(c_uint32)),
        ("limit", POINTER(c_uint64)),
    ]


class _Ranked(ctypes.Structure):
    _fields_ = [
        ("width", c_int32),
        ("there", POINTER(c_int32)),
        ("rescale", POINTER(c_int32)),
        ("add", POINTER(c_uint32)),
        ("multiply", POINTER(c_uint32)),
        ("slope", POINTER(c_float)),
        ("least", POINTER(c_float)),
        ("stack", c_void_p),
        ("spare", c_void_p),
    ]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("combine", c_int32),
        ("steps", c_int32),
        ("step", POINTER(_Step)),
        ("weights", POINTER(c_float)),
        ("divided", c_int32),
        ("scaled", c_int32),
        ("onto_base", c_int32),
        ("out_kind", c_int32),
        ("divisor", c_float),
        ("factor", c_float),
        ("scale", c_float),
        ("multiplied", c_int32),
        ("position", c_uint32),
        ("least", c_float),
        ("keeps", POINTER(c_int32)),
        ("low", POINTER(c_float)),
        ("high", POINTER(c_float)),
        ("cut", POINTER(c_float)),
        ("top", POINTER(c_float)),
        ("ranked", POINTER(_Ranked)),
    ]


class _Values(ctypes.Structure):
    _fields_ = [("what", c_int32), ("low", POINTER(c_float)), ("high", POINTER(c_float))]


@dataclass(frozen=True, slots=True)
class Files:
    """Files from which compiled passes read a tile themselves, piece by piece, each to where the one before it lay.

    Attributes:
        files: descriptors, int32 [source].
        offsets, sizes: where the tile begins, and the bytes of one element; int64 [source].
        into: the addresses that pieces go to, int64 [source].
        piece: elements read at a time, a multiple of CHUNK or of whole rows.
        again: reads the tile once more, to say in words what is wrong with which file.
    """

    files: "np.ndarray[Any, Any]"
    offsets: "np.ndarray[Any, Any]"
    sizes: "np.ndarray[Any, Any]"
    into: "np.ndarray[Any, Any]"
    piece: int
    again: Callable[[], None]

    def struct(self) -> _Files:
        """As C sees it."""
        arrays = (self.files, self.offsets, self.sizes, self.into)
        return _Files(len(self.files), self.piece, *(array.ctypes.data for array in arrays))


@dataclass(slots=True)
class Stored:
    """One tile as it is stored, before any arithmetic: of each task, and of the base.

    Attributes:
        name, start, stop: the elements, as in `Tile`.
        rows: [n] of each task in its stored dtype; None where a delta source lacks the tensor (zero). With `files` these
            are the places of one piece.
        relations: for each row whether the base is taken off, added, or neither.
        base: [n]; None where there is none.
        files: where the values are read from meanwhile; None where they lie in memory.
    """

    name: str
    start: int
    stop: int
    rows: list[Tensor | None]
    relations: list[int]
    base: Tensor | None
    files: Files | None = None
    _struct: Any = field(default=None, repr=False)
    _known: bool | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        return self.stop - self.start

    def known(self) -> bool:
        """Whether the compiled passes can read all of it."""
        if self._known is None:
            self._known = self._readable()
        return self._known

    def _readable(self) -> bool:
        there = [row for row in (*self.rows, self.base) if row is not None]
        return len(self.rows) <= MOST_TASKS and all(
            row.dtype in _KINDS and row.device.type == "cpu" and row.is_contiguous() for row in there
        )

    @property
    def chunks(self) -> int:
        """How many partial sums there are of each row: chunks begin with each piece that is read."""
        piece = self.count if self.files is None else self.files.piece
        whole, rest = divmod(self.count, max(1, piece))
        return whole * -(-piece // CHUNK) + -(-rest // CHUNK)

    def part(self, start: int, stop: int) -> "Stored":
        """Some of the elements of a tile that lies in memory."""
        place = slice(start - self.start, stop - self.start)
        rows = [None if row is None else row[place] for row in self.rows]
        base = None if self.base is None else self.base[place]
        return Stored(self.name, start, stop, rows, self.relations, base)

    def gathered(self, blocks: Sequence[tuple[int, int]]) -> "Stored":
        """Several blocks of such a tile side by side, as if they were one tile."""
        parts = [self.part(*block) for block in blocks]
        rows = [None if rows[0] is None else torch.cat(rows) for rows in zip(*(part.rows for part in parts))]
        base = None if self.base is None else torch.cat([part.base for part in parts])  # type: ignore[misc]
        return Stored(self.name, 0, sum(part.count for part in parts), rows, self.relations, base)

    def squares(self) -> "np.ndarray[Any, Any]":
        """Memory for the sums of squares, float64 [task, chunk]."""
        return np.zeros((len(self.rows), self.chunks))


@dataclass(frozen=True, slots=True)
class Step:
    """One step of preprocessing, for each task its numbers.

    "trim" keeps magnitudes of at least `low` (eager: `torch.hardshrink`), "band" multiplies with whether they lie in
    [low, high], "drop" with whether the element's draw is below `limit` (eager: `taskvec.draws.keep`); then `factor`.
    """

    type: Literal["trim", "band", "drop"]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    factor: Sequence[float] = ()
    add: Sequence[int] = ()
    multiply: Sequence[int] = ()
    limit: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Ranked:
    """One task's numbers for dropping entries by rank: each is kept with the probability slope · rank + least, and divided
    by it if asked; `keys` make the draws (`taskvec.draws`). Eager twin: in `merging.methods.della`.
    """

    keys: tuple[int, int]
    slope: float
    least: float
    rescale: bool


@dataclass(frozen=True, slots=True)
class Combination:
    """How rows become one: steps, then the combination, then what it is divided by and multiplied with.

    "sce" takes the least variance that is kept as `least`, "pcb" for each task whether it takes part (`keeps`), the ends of
    its clip, its threshold and its largest score. One thread uses it at a time: the compiled form is kept in it and moved
    on from tile to tile. `ranked` (for each task, None: left alone) comes before everything else, in rows of `width`.
    """

    combine: Literal["weighted sum", "ties mean", "ties sum", "pcb", "sce"]
    weights: Sequence[float]
    steps: Sequence[Step] = ()
    divisor: float | None = None
    factor: float | None = None
    scale: float | None = None
    onto_base: bool = False
    least: float = 0.0
    keeps: Sequence[bool] = ()
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    cut: Sequence[float] = ()
    top: Sequence[float] = ()
    ranked: Sequence[Ranked | None] = ()
    width: int = 1
    _kept: list[Any] = field(default_factory=list, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Values:
    """Of what order statistics are taken: magnitudes, values as they are, PCB's scores, the variance over the tasks.

    Attributes:
        low, high: the ends of PCB's clip for each task.
    """

    what: Literal["magnitude", "value", "pcb score", "variance"]
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    def rows(self, tasks: int) -> int:
        """How many rows there are."""
        return 1 if self.what == "variance" else tasks

    def _struct(self) -> _Values:
        kind = ("magnitude", "value", "pcb score", "variance").index(self.what)
        return _Values(kind, _floats(self.low), _floats(self.high))


@cache
def _library() -> Any:
    """The library and the instruction set it uses; None where there is none."""
    if os.environ.get("TASKVEC_NATIVE") == "0":
        return None
    try:
        found = find_spec("taskvec._native")
        if found is None or found.origin is None:
            return None
        library = ctypes.CDLL(found.origin)
        if library.tv_version() != _VERSION or not library.tv_level():
            return None
    except (ImportError, OSError, AttributeError):
        return None
    library.tv_load.argtypes = [c_int, POINTER(_Tile), c_void_p, c_int64, c_void_p, c_void_p]
    library.tv_count.argtypes = [
        c_int, POINTER(_Tile), POINTER(_Values), c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p,
        c_void_p,
    ]  # fmt: skip
    library.tv_list.argtypes = [c_int, POINTER(_Tile), POINTER(_Values), c_void_p]
    library.tv_gram.argtypes = [c_int, POINTER(_Tile), c_int, c_float, c_void_p, c_void_p]
    library.tv_merge.argtypes = [c_int, POINTER(_Tile), POINTER(_Plan), c_void_p, c_void_p]
    library.tv_read.argtypes = [c_int, c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_int)]
    return library, int(library.tv_level())


def usable() -> bool:
    """Whether the compiled passes run here. TASKVEC_NATIVE=0 in the environment switches them off."""
    return _library() is not None


def readable(dtypes: Sequence[torch.dtype], tasks: int) -> bool:
    """Whether compiled passes take rows of these dtypes, so many together."""
    return tasks <= MOST_TASKS and all(dtype in _KINDS for dtype in dtypes)


def read(
    files: "np.ndarray[Any, Any]",
    offsets: "np.ndarray[Any, Any]",
    sizes: "np.ndarray[Any, Any]",
    into: "np.ndarray[Any, Any]",
) -> int | None:
    """Reads pieces by position, without holding up other threads.

    Args:
        files: file descriptors, int32 [piece].
        offsets, sizes, into: where each begins, its bytes, and the address it goes to; int64 [piece].

    Returns:
        None, or the index of the piece that could not be read whole.
    """
    library, _ = _library()
    error = c_int(0)
    at = library.tv_read(
        len(files), files.ctypes.data, offsets.ctypes.data, sizes.ctypes.data, into.ctypes.data, ctypes.byref(error)
    )
    return None if at < 0 else int(at)


def load(stored: Stored, stack: Tensor, base: Tensor | None, squares: "np.ndarray[Any, Any] | None") -> bool:
    """The stack in float32 and the base in float32.

    Args:
        stack: float32 [task, n], rows contiguous; written.
        base: float32 [n]; written. None: not wanted.
        squares: float64 [task, chunk], zeros; the sums of squares are added.

    Returns:
        Whether the base is finite. Eager twin: `ModelDeltas.tile`.
    """
    library, level = _library()
    tile = _tile(stored)
    bad = library.tv_load(
        level, ctypes.byref(tile), stack.data_ptr(), stack.stride(0), None if base is None else base.data_ptr(),
        None if squares is None else squares.ctypes.data,
    )  # fmt: skip
    return not _checked(bad, stored) & _NOT_FINITE


def _checked(bad: int, stored: Stored) -> int:
    """What a pass found wrong; raises where it could not read."""
    if bad & _UNREAD and stored.files is not None:
        stored.files.again()
        raise ChangedFileError(f"{stored.name}: a file could not be read whole, and then could.")
    return bad


@dataclass(slots=True)
class Counted:
    """What `count` found: [row, wanted, (below, at low, at high)], and the values strictly inside each bracket."""

    counts: "np.ndarray[Any, Any]"
    inside: "list[list[np.ndarray[Any, Any]]]"
    base_finite: bool = True


def count(
    stored: Stored,
    values: Values,
    low: "np.ndarray[Any, Any]",
    high: "np.ndarray[Any, Any]",
    squares: "np.ndarray[Any, Any] | None" = None,
) -> Counted:
    """Counts values against brackets, float32 [row, wanted].

    Eager twin: `taskvec.order`.
    """
    library, level = _library()
    tile, what = _tile(stored), values._struct()
    rows, wanted = low.shape
    bad = 0
    for room in (stored.count // _FEW + 1024, stored.count + _VECTOR):
        counts = np.zeros((rows, wanted, 3), np.int64)
        held = np.zeros((rows, wanted), np.int64)
        inside = _inside(rows * wanted * room).view(rows, wanted, room).numpy()
        bad |= library.tv_count(
            level, ctypes.byref(tile), ctypes.byref(what), wanted, low.ctypes.data, high.ctypes.data,
            counts.ctypes.data, inside.ctypes.data, room, held.ctypes.data, None if squares is None else squares.ctypes.data,
        )  # fmt: skip
        if held.size == 0 or int(held.max()) <= room - _VECTOR:
            break
        squares = None  # they are known by now
    kept = [[inside[t, k, : held[t, k]].copy() for k in range(wanted)] for t in range(rows)]
    return Counted(counts, kept, not _checked(bad, stored) & _NOT_FINITE)


_kept = threading.local()
_MOST_KEPT = 8 << 20  # values, 32 MB; hardly any of it is ever touched
_FEW = 8  # brackets hold a percent or less of a tile, so there is room for an eighth; where they hold more, for all
_VECTOR = 16  # values that are stored at once


def _inside(count: int) -> Tensor:
    """Memory for what lies inside brackets, which this thread uses again and again.

    Mapping and clearing it anew for each call took as long as counting, and giving it back stops the other threads.
    """
    room: Tensor | None = getattr(_kept, "room", None)
    if room is None or room.numel() < count:
        room = torch.empty(count, dtype=torch.float32)
        if count <= _MOST_KEPT:
            _kept.room = room
    return room[:count]


def listed(stored: Stored, values: Values) -> Tensor:
    """The values themselves, float32 [row, n]."""
    library, level = _library()
    tile, what = _tile(stored), values._struct()
    out = torch.empty(values.rows(len(stored.rows)), stored.count, dtype=torch.float32)
    library.tv_list(level, ctypes.byref(tile), ctypes.byref(what), out.data_ptr())
    return out


def gram(stored: Stored, squares: "np.ndarray[Any, Any] | None" = None) -> "tuple[np.ndarray[Any, Any], bool]":
    """Inner products of the rows, chunk by chunk: float64 [chunk, task, task]; and whether the base is finite.

    Eager twin: `taskvec.moments.gram`, to the last bits of double precision.
    """
    library, level = _library()
    tile, tasks = _tile(stored), len(stored.rows)
    products = np.zeros((stored.chunks, tasks, tasks))
    bad = library.tv_gram(
        level, ctypes.byref(tile), 0, 0.0, products.ctypes.data, None if squares is None else squares.ctypes.data
    )
    lower = np.tril(products, -1)
    return products + lower.transpose(0, 2, 1), not _checked(bad, stored) & _NOT_FINITE


def energies(
    stored: Stored, least: float, squares: "np.ndarray[Any, Any] | None" = None
) -> "tuple[np.ndarray[Any, Any], bool]":
    """Sums of squares of the entries whose variance over the tasks is at least `least`: float64 [chunk, task].

    Eager twin: in `merging.methods.sce`, to the last bits of double precision.
    """
    library, level = _library()
    tile = _tile(stored)
    sums = np.zeros((stored.chunks, len(stored.rows)))
    bad = library.tv_gram(
        level, ctypes.byref(tile), 1, least, sums.ctypes.data, None if squares is None else squares.ctypes.data
    )
    return sums, not _checked(bad, stored) & _NOT_FINITE


def merge(
    stored: Stored,
    how: Combination,
    out: Tensor,
    squares: "np.ndarray[Any, Any] | None" = None,
    stack: Tensor | None = None,
) -> tuple[bool, bool]:
    """The merged values, rounded once to `out`'s dtype (float32, bfloat16 or float16).

    Args:
        stored: with `how.ranked` it must hold whole rows, and its pieces too.
        stack: float32, room for the rows of one piece; needed with `how.ranked`.

    Returns:
        Whether the base is finite (looked at where squares are wanted), and whether every result is.
    """
    library, level = _library()
    tile, plan = _tile(stored), _plan(how, stored, out, stack)
    bad = library.tv_merge(
        level,
        ctypes.byref(tile),
        ctypes.byref(plan),
        out.data_ptr(),
        None if squares is None else squares.ctypes.data,
    )
    _checked(bad, stored)
    return not bad & _NOT_FINITE, not bad & _OVERFLOWN


def _tile(stored: Stored) -> Any:
    if stored._struct is None:
        stored._struct = _struct_of(stored)
    return stored._struct


def _struct_of(stored: Stored) -> _Tile:
    count = len(stored.rows)
    rows = (c_void_p * count)(*[None if row is None else row.data_ptr() for row in stored.rows])
    kinds = (c_int32 * count)(*[0 if row is None else _KINDS[row.dtype] for row in stored.rows])
    relations = (c_int32 * count)(*stored.relations)
    base = stored.base
    files = None if stored.files is None else ctypes.pointer(stored.files.struct())
    return _Tile(
        count, 0 if base is None else _KINDS[base.dtype], stored.count, stored.chunks, files, rows, kinds, relations,
        None if base is None else base.data_ptr(),
    )  # fmt: skip


def _plan(how: Combination, stored: Stored, out: Tensor, stack: Tensor | None) -> Any:
    plan: Any = how._kept[0] if how._kept else None
    if plan is not None and how._kept[1] == out.dtype:
        plan.position = stored.start & 0xFFFFFFFF
        return plan
    ranked, spare = None, None
    if how.ranked:
        assert stack is not None
        spare = torch.empty(6 * (how.width + 16), dtype=torch.int32)
        ranked = ctypes.pointer(_ranked_struct(how, stack, spare))
    steps = (_Step * max(1, len(how.steps)))()
    for place, step in enumerate(how.steps):
        steps[place] = _Step(
            ("trim", "band", "drop").index(step.type), bool(step.factor), _floats(step.low), _floats(step.high),
            _floats(step.factor), (c_uint32 * len(step.add))(*step.add), (c_uint32 * len(step.multiply))(*step.multiply),
            (c_uint64 * len(step.limit))(*step.limit),
        )  # fmt: skip
    combine = ("weighted sum", "ties mean", "ties sum", "pcb", "sce").index(how.combine)
    plan = _Plan(
        combine, len(how.steps), steps, _floats(how.weights), how.divisor is not None, how.scale is not None,
        how.onto_base, _KINDS[out.dtype], how.divisor or 0.0, how.factor or 0.0, how.scale or 0.0,
        how.factor is not None, stored.start & 0xFFFFFFFF, how.least,
        (c_int32 * len(how.keeps))(*map(int, how.keeps)), _floats(how.low), _floats(how.high), _floats(how.cut),
        _floats(how.top), ranked,
    )  # fmt: skip
    how._kept[:] = [plan, out.dtype, stack, spare]
    return plan


def _ranked_struct(how: Combination, stack: Tensor, spare: Tensor) -> _Ranked:
    alone = Ranked((0, 1), 0.0, 0.0, False)
    given = [ranked or alone for ranked in how.ranked]
    count = len(given)
    return _Ranked(
        how.width, (c_int32 * count)(*(ranked is not None for ranked in how.ranked)),
        (c_int32 * count)(*(ranked.rescale for ranked in given)), (c_uint32 * count)(*(r.keys[0] for r in given)),
        (c_uint32 * count)(*(r.keys[1] for r in given)), _floats([r.slope for r in given]),
        _floats([r.least for r in given]), stack.data_ptr(), spare.data_ptr(),
    )  # fmt: skip


def _floats(values: Sequence[float]) -> Any:
    return (c_float * len(values))(*values)
