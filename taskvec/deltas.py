"""The task vectors of one merge, read together: for each name a stack `[task, *shape]`, one tile at a time."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from taskvec import native
from taskvec.checkpoint import Checkpoint, raw_bytes
from taskvec.errors import MismatchError
from taskvec.native import AS_IS, LESS_BASE, PLUS_BASE, Stored
from taskvec.precision import compute_dtype, is_float
from taskvec.source import DeltaSource, TensorInfo, TensorSource, origin_of

Watch = Callable[[TensorSource, str, "Tensor | memoryview"], None]
"""Called with each raw piece as it is read (source, tensor name, stored values), so that hashing costs no pass."""


@dataclass(slots=True)
class Tile:
    """One piece of one tensor, with all tasks together: what a kernel sees.

    Attributes:
        name: the tensor's name.
        shape: the whole tensor's shape.
        start, stop: the elements of it that this tile holds, in row-major order.
        tasks: the task names, in the recipe's order.
        stack: the deltas (or, for methods in weight space, the weights), [task, n]; for methods whose unit is the tensor
            [task, *shape]. Kernels do not write into it.
        base: the base's values, [n] or [*shape]; None when there is no base.
        weights: the task weights that hold for this tensor, [task] (or [task, n] when they differ by element).
        merged: for postprocessing, the merged delta so far; None before.
        squares: sums of squares of the stack, float64 [task, chunk], where reading made them and found the base finite.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tasks: tuple[str, ...]
    stack: Annotated[Tensor, "task *n"]
    base: Annotated[Tensor, "*n"] | None
    weights: Annotated[Tensor, "task"]
    merged: Annotated[Tensor, "*n"] | None = None
    squares: "np.ndarray[Any, Any] | None" = None

    def with_stack(self, stack: Tensor) -> "Tile":
        return replace(self, stack=stack)

    def with_merged(self, merged: Tensor) -> "Tile":
        return replace(self, merged=merged)

    def weight(self, task: int) -> Tensor | float:
        """The weight of one task: a number, or [n] (shaped as a delta) when it differs by element."""
        if self.weights.ndim == 1:
            return float(self.weights[task])
        return self.weights[task].view(self.stack.shape[1:])

    def total(self, stack: Tensor | None = None, *, weighted: bool = True) -> Tensor:
        """Sum over tasks, one after the other (never in another order), times the weights unless asked not to."""
        rows = self.stack if stack is None else stack
        if weighted:
            first = self.weight(0)
            result = rows[0] * first
            for task in range(1, len(rows)):
                weight = self.weight(task)
                if isinstance(weight, float):
                    result.add_(rows[task], alpha=weight)
                else:
                    result.addcmul_(rows[task], weight)
            return result
        result = rows[0].clone()
        for row in rows[1:]:
            result.add_(row)
        return result

    def columns(self) -> Tensor:
        """The weights shaped to multiply the stack, [task, 1, …] or [task, *n]."""
        if self.weights.ndim == 1:
            return self.weights.view(-1, *[1] * (self.stack.ndim - 1)).to(self.stack)
        return self.weights.view(self.stack.shape).to(self.stack)


class Deltas(Protocol):
    """The task vectors of one merge.

    Attributes:
        tasks: names, in order.
        infos: name to shape and dtype (float32, or float64 where an input is) of every merged tensor, tied ones once.
    """

    tasks: tuple[str, ...]
    infos: Mapping[str, TensorInfo]

    @property
    def numel(self) -> int:
        """Elements of all tensors: d of the papers."""
        ...

    def tile(self, name: str, start: int, stop: int, watch: Watch | None = None) -> Tile: ...


class WeightsOf(Protocol):
    """Task weights by tensor: numbers from the recipe, or a learned coefficients file."""

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """[task], or [task, stop - start] where they differ by element."""
        ...


def constant(weights: Sequence[float]) -> WeightsOf:
    """The same weights for every tensor."""
    fixed = torch.tensor(list(weights), dtype=torch.float64).float()
    return lambda name, start, stop: fixed


class StackDeltas:
    """Stacks in memory, name -> [task, *shape], on any device; the base's values too, for methods that look at them."""

    def __init__(
        self,
        stacks: Mapping[str, Tensor],
        tasks: Sequence[str] | None = None,
        weights: WeightsOf | None = None,
        base: Mapping[str, Tensor] | None = None,
    ):
        counts = {int(stack.shape[0]) if stack.ndim else 0 for stack in stacks.values()}
        if len(counts) != 1 or 0 in counts:
            raise MismatchError([f"stacks must be [task, *shape] with one number of tasks, found {sorted(counts)}"])
        (count,) = counts
        self.tasks = tuple(tasks) if tasks is not None else tuple(f"task {i}" for i in range(count))
        if len(self.tasks) != count:
            raise MismatchError([f"{len(self.tasks)} task names for {count} tasks"])
        wrong = [name for name, stack in stacks.items() if not is_float(stack.dtype)]
        if wrong:
            raise MismatchError(
                [f"{name}: stacks must be floating point, found {stacks[name].dtype}" for name in wrong]
            )
        self._flat = {name: stack.detach().reshape(count, -1) for name, stack in stacks.items()}
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(stack.shape[1:]), compute_dtype(stack.dtype)) for name, stack in stacks.items()
        }
        self._weights = weights or constant([1.0] * count)
        self._base: dict[str, Tensor] = {}
        if base is not None:
            odd = [name for name in stacks if name not in base or tuple(base[name].shape) != self.infos[name].shape]
            if odd:
                raise MismatchError([f"{name}: the base has no tensor of that name and shape" for name in odd])
            self._base = {name: base[name].detach().reshape(-1) for name in stacks}

    @property
    def device(self) -> torch.device:
        """Where the first stack lies."""
        return next(iter(self._flat.values())).device if self._flat else torch.device("cpu")

    def only(self, name: str) -> "StackDeltas":
        """One tensor of them, its memory shared."""
        stack = self._flat[name].reshape(len(self.tasks), *self.infos[name].shape)
        base = {name: self._base[name].reshape(self.infos[name].shape)} if self._base else None
        return StackDeltas({name: stack}, self.tasks, self._weights, base)

    def on_gpu(self) -> list[tuple[str, Tensor, list[float]]] | None:
        """Name, stack [task, n] and task weights of each tensor, if all lie on one GPU in at most single precision."""
        found = []
        for name, stack in self._flat.items():
            weights = self._weights(name, 0, stack.shape[1])
            plain = stack.is_cuda and stack.device == self.device and weights.ndim == 1 and not self._base
            if not plain or stack.stride(1) != 1 or self.infos[name].dtype != torch.float32:
                return None
            if stack.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                return None
            if stack.shape[1]:
                found.append((name, stack, weights.tolist()))
        return found or None

    @property
    def numel(self) -> int:
        return sum(info.numel for info in self.infos.values())

    masked = False

    @property
    def has_base(self) -> bool:
        """Whether the base's values are known."""
        return bool(self._base)

    def compiles(self, name: str) -> bool:
        """Whether compiled passes can take this tensor as it is stored."""
        return native.readable([self._flat[name].dtype], len(self.tasks)) and self._flat[name].stride(1) == 1

    def weights_of(self, name: str, start: int, stop: int) -> Tensor:
        """The task weights that hold for these elements."""
        return self._weights(name, start, stop)

    def pieces(
        self, name: str, start: int, stop: int, size: int, watch: Watch | None = None, room: "Room | None" = None
    ) -> Iterator[Stored]:
        """The elements from `start` to `stop` as they lie in memory, `size` at a time."""
        flat, base = self._flat[name], self._base.get(name)
        for begin in range(start, stop, size):
            end = min(begin + size, stop)
            rows: list[Tensor | None] = [row[begin:end] for row in flat]
            yield Stored(name, begin, end, rows, [AS_IS] * len(rows), None if base is None else base[begin:end])

    def gathered(self, name: str, blocks: Sequence[tuple[int, int]]) -> Stored:
        """Several blocks of elements side by side, as if they were one piece."""
        flat = self._flat[name]
        rows: list[Tensor | None] = [torch.cat([row[start:stop] for start, stop in blocks]) for row in flat]
        return Stored(name, 0, sum(stop - start for start, stop in blocks), rows, [AS_IS] * len(rows), None)

    def tile(self, name: str, start: int, stop: int, watch: Watch | None = None) -> Tile:
        info = self.infos[name]
        stack = self._flat[name][:, start:stop].to(info.dtype)
        weights = self._weights(name, start, stop).to(stack.device)
        base = self._base[name][start:stop].to(stack) if self._base else None
        return Tile(name, info.shape, start, stop, self.tasks, stack, base, weights)


@dataclass(frozen=True, slots=True)
class Task:
    """One input of a merge: a whole fine-tuned model, or differences to the base (an adapter, a stored vector)."""

    name: str
    source: TensorSource
    is_delta: bool = False


class ModelDeltas:
    """Task vectors of models over one base, read tile by tile.

    Args:
        base: the base; None only in weight space.
        tasks: the inputs, in order.
        names: the tensors that are merged, tied ones once.
        space: "delta" stacks tuned - base; "weight" stacks the weights themselves.
        weights: task weights by tensor.
        masks: optional element-wise masks, name, start, stop -> [n] or [task, n], that multiply the deltas.
    """

    def __init__(
        self,
        base: TensorSource | None,
        tasks: Sequence[Task],
        names: Iterable[str],
        *,
        space: str = "delta",
        weights: WeightsOf | None = None,
        masks: Callable[[str, int, int], Tensor] | None = None,
    ):
        self.base, self._tasks, self.space = base, tuple(tasks), space
        self.tasks = tuple(task.name for task in tasks)
        first = base if base is not None else tasks[0].source
        sources = [*([base] if base is not None else []), *(task.source for task in tasks)]
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(
                first.infos[name].shape,
                compute_dtype(*(source.infos[name].dtype for source in sources if name in source.infos)),
            )
            for name in names
        }
        self._weights = weights or constant([1.0] * len(tasks))
        self._masks = masks
        self._relations = [
            AS_IS if base is None or task.is_delta == (space == "delta") else PLUS_BASE if task.is_delta else LESS_BASE
            for task in tasks
        ]

    @property
    def numel(self) -> int:
        return sum(info.numel for info in self.infos.values())

    @property
    def masked(self) -> bool:
        """Whether masks multiply the deltas."""
        return self._masks is not None

    def inputs(self) -> list[TensorSource]:
        """The tasks' sources, in order."""
        return [task.source for task in self._tasks]

    def _sources(self) -> list[TensorSource]:
        """The base, where there is one, and the tasks' sources."""
        return [*([] if self.base is None else [self.base]), *self.inputs()]

    def plain(self) -> bool:
        """Whether every delta is a whole model less the base, and nothing else."""
        whole = self.base is not None and self.space == "delta" and self._masks is None
        return whole and not any(task.is_delta for task in self._tasks)

    @property
    def has_base(self) -> bool:
        """Whether there is a base."""
        return self.base is not None

    def compiles(self, name: str) -> bool:
        """Whether compiled passes can take this tensor as it is stored."""
        sources = self._sources()
        return native.readable([s.infos[name].dtype for s in sources if name in s.infos], len(self.tasks))

    def weights_of(self, name: str, start: int, stop: int) -> Tensor:
        """The task weights that hold for these elements."""
        return self._weights(name, start, stop)

    def bytes_per_pass(self, names: Iterable[str] | None = None) -> int:
        """Bytes read from the inputs when every merged tensor (or each of these) is read once."""
        sources = self._sources()
        wanted = self.infos if names is None else names
        return sum(source.infos[name].nbytes for name in wanted for source in sources if name in source.infos)

    def rounding(self, name: str) -> float:
        """Relative spacing of the coarsest dtype in which a fine-tuned model stores this tensor; 0 for differences."""
        stored = [
            task.source.infos[name].dtype for task in self._tasks if not task.is_delta and name in task.source.infos
        ]
        return max((torch.finfo(dtype).eps for dtype in stored), default=0.0)

    def read_ahead(self, name: str, start: int, stop: int) -> None:
        for source in (self.base, *(task.source for task in self._tasks)):
            ahead = getattr(source, "read_ahead", None)
            if ahead is not None and source is not None and name in source.infos:
                ahead(name, start, stop)

    def pieces(
        self, name: str, start: int, stop: int, size: int, watch: Watch | None = None, room: "Room | None" = None
    ) -> Iterator[Stored]:
        """The elements from `start` to `stop` as the inputs store them, `size` at a time, in order.

        With a `room` they lie there, each piece where the one before it lay: take what you need before you ask for the
        next.
        """
        # a delta source lacks what it does not change; whole models were checked before
        places = [place for place, task in enumerate(self._tasks) if name in task.source.infos]
        sources = [self._tasks[place].source for place in places] + ([] if self.base is None else [self.base])
        reading = _Reading(sources, name, room)
        stored: Stored | None = None
        for begin in range(start, max(stop, start + 1), size):
            end = min(begin + size, stop)
            found = reading(begin, end)
            if watch is not None:
                seen: Sequence[Tensor | memoryview] = reading.seen or found
                for source, raw in zip(sources, seen):
                    watch(source, name, raw)
            if stored is not None and reading.same and stored.count == end - begin:
                stored.start, stored.stop = begin, end
            else:
                rows: list[Tensor | None] = [None] * len(self._tasks)
                for place, raw in zip(places, found):
                    rows[place] = raw
                base = None if self.base is None else found[-1]
                stored = self._stored(name, begin, end, rows, base)
            yield stored

    def unhashed(self, name: str) -> "dict[int, tuple[Checkpoint, str]]":
        """Where the inputs' tensors of this name are stored, by the source's id, of those whose digest is not known yet.

        One that comes several times is left out, since a pass brings its pieces several times; it is hashed by itself.
        """
        sources = self._sources()
        origins = {at: found for at, s in enumerate(sources) if (found := origin_of(s, name)) is not None}
        often = Counter((id(checkpoint), own) for checkpoint, own in origins.values())
        return {
            id(sources[at]): (checkpoint, own)
            for at, (checkpoint, own) in origins.items()
            if often[id(checkpoint), own] == 1 and not checkpoint.knows_digest(own)
        }

    def streamed(self, name: str, start: int, stop: int, size: int, room: "Room") -> Stored | None:
        """The same elements as one tile, of which compiled passes read `size` at a time into the room.

        None where an input does not lie in a file as it is.
        """
        places = [place for place, task in enumerate(self._tasks) if name in task.source.infos]
        sources = [self._tasks[place].source for place in places] + ([] if self.base is None else [self.base])
        found = _Reading(sources, name, room).files(start, stop, size)
        if found is None:
            return None
        files, values = found
        rows: list[Tensor | None] = [None] * len(self._tasks)
        for place, raw in zip(places, values):
            rows[place] = raw
        stored = self._stored(name, start, stop, rows, None if self.base is None else values[-1])
        stored.files = files
        return stored

    def gathered(self, name: str, blocks: Sequence[tuple[int, int]]) -> Stored:
        """Several blocks of elements side by side, as if they were one piece."""
        sources = [task.source if name in task.source.infos else None for task in self._tasks] + [self.base]
        found = [None if source is None else _gathered(source, name, blocks) for source in sources]
        size = sum(stop - start for start, stop in blocks)
        return self._stored(name, 0, size, found[:-1], found[-1])

    def _stored(self, name: str, start: int, stop: int, rows: list[Tensor | None], base: Tensor | None) -> Stored:
        relations = list(self._relations)
        for place, row in enumerate(rows):
            if row is None and relations[place] == PLUS_BASE:
                # nothing added to the base is the base, not zero
                rows[place], relations[place] = base, AS_IS
        return Stored(name, start, stop, rows, relations, base)

    def tile(self, name: str, start: int, stop: int, watch: Watch | None = None, room: "Room | None" = None) -> Tile:
        """One tile; it lies in `room` where that is given and large enough, instead of in new memory."""
        info = self.infos[name]
        (stored,) = self.pieces(name, start, stop, max(1, stop - start), watch, room)
        count, size = len(self._tasks), stop - start
        if room is not None and info.dtype == room.stack.dtype and count * size <= room.stack.numel():
            stack = room.stack[: count * size].view(count, size)
        else:
            stack = torch.empty(count, size, dtype=info.dtype)
        squares = None
        if native.usable() and info.dtype == torch.float32 and stored.known():
            base = None if stored.base is None else torch.empty(size, dtype=torch.float32)
            sums = stored.squares() if watch is not None and self._masks is None else None
            if native.load(stored, stack, base, sums):
                squares = sums
        else:
            base = self._widened(stored, stack)
        if self._masks is not None:
            stack.mul_(self._masks(name, start, stop).to(stack))
        weights = self._weights(name, start, stop)
        return Tile(name, info.shape, start, stop, self.tasks, stack, base, weights, squares=squares)

    @staticmethod
    def _widened(stored: Stored, stack: Tensor) -> Tensor | None:
        """Fills the stack; gives the base in its dtype. The eager form of `native.load`."""
        # a copy, never the room's own memory: the next read would change it
        base = None if stored.base is None else stored.base.to(stack.dtype, copy=True)
        for row, raw, relation in zip(stack, stored.rows, stored.relations):
            if raw is None:
                row.zero_()
                continue
            row.copy_(raw)
            if base is not None and relation == PLUS_BASE:
                row.add_(base)
            elif base is not None and relation == LESS_BASE:
                row.sub_(base)
        return base


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that one thread uses for tile after tile: what is allocated anew must first be mapped and zeroed.

    Attributes:
        stack: flat float32, for the stack.
        raw: bytes, for what is read of the inputs; `each` for one of them.
    """

    stack: Tensor
    raw: Tensor
    each: int

    @classmethod
    def of(cls, tasks: int, tile: int) -> "Room":
        # memory that is never touched costs nothing, so wide dtypes may be provided for
        return cls(torch.empty(tasks * tile), torch.empty((tasks + 1) * 8 * tile, dtype=torch.uint8), 8 * tile)


class _Reading:
    """Reads pieces of one tensor from several sources, into the room where sources can read into given memory.

    Attributes:
        same: whether a piece lies where the one before it lay, and only its values changed.
        seen: the bytes of the last piece, in the order of the sources, where they were prepared.
    """

    def __init__(self, sources: Sequence[TensorSource], name: str, room: Room | None):
        self._sources, self._name, self._room = sources, name, room
        self._origins = [origin_of(source, name) for source in sources]
        extents = [None if found is None else found[0].extent(found[1], 0, 1) for found in self._origins]
        self.same = room is not None and None not in extents
        self.seen: list[memoryview] = []
        self._count = -1
        self._found: list[Tensor] = []
        if self.same:
            table = np.array(extents, np.int64).reshape(len(extents), 3)
            self._files, self._first, self._item = table[:, 0].astype(np.int32), table[:, 1].copy(), table[:, 2].copy()

    def __call__(self, start: int, stop: int) -> list[Tensor]:
        if not self.same:
            return [self._read(at, start, stop) for at in range(len(self._sources))]
        if stop - start != self._count:
            self._provide(stop - start)
        failed: int | None = 0
        if native.usable():
            failed = native.read(self._files, self._first + start * self._item, self._sizes, self._into)
        if failed is not None:  # again, or for the first time, with errors that name the file
            self._read_again(start, stop, failed)
        return self._found

    def _read(self, at: int, start: int, stop: int) -> Tensor:
        origin, source = self._origins[at], self._sources[at]
        if self._room is None or origin is None:
            return source.read_flat(self._name, start, stop)
        into = _place(self._room, at, stop - start, source.infos[self._name].dtype)
        origin[0].read_into(origin[1], start, stop, into)
        return into

    def _read_again(self, start: int, stop: int, first: int = 0) -> None:
        """Reads a piece from where it is stored, with errors that name the file."""
        for origin, into in zip(self._origins[first:], self._found[first:]):
            assert origin is not None
            origin[0].read_into(origin[1], start, stop, into[: stop - start])

    def files(self, start: int, stop: int, size: int) -> tuple[native.Files, list[Tensor]] | None:
        """For compiled passes that read these elements themselves, `size` at a time, and where these go."""
        if not self.same or not native.usable():
            return None
        self._provide(size)

        def again() -> None:
            for begin in range(start, stop, size):
                self._read_again(begin, min(begin + size, stop))

        offsets = self._first + start * self._item
        return native.Files(self._files, offsets, self._item, self._into, size, again), self._found

    def _provide(self, count: int) -> None:
        self._count, self._sizes = count, count * self._item
        self._found = [
            _place(self._room, at, count, source.infos[self._name].dtype) for at, source in enumerate(self._sources)
        ]
        self.seen = [raw_bytes(into) for into in self._found]
        self._into = np.array([into.data_ptr() for into in self._found], np.int64)


def _place(room: Room | None, index: int, count: int, dtype: torch.dtype) -> Tensor:
    assert room is not None
    return room.raw[index * room.each : index * room.each + count * dtype.itemsize].view(dtype)


def _gathered(source: TensorSource, name: str, blocks: Sequence[tuple[int, int]]) -> Tensor:
    """Blocks of a tensor side by side; from a file with one call for all of them."""
    origin = origin_of(source, name)
    extents = [] if origin is None else [origin[0].extent(origin[1], *block) for block in blocks]
    known = [extent for extent in extents if extent is not None]
    if known and native.usable():
        table = np.array(known, np.int64)
        into = torch.empty(int(table[:, 2].sum()), dtype=torch.uint8)
        ends = into.data_ptr() + np.cumsum(table[:, 2])
        files, starts = table[:, 0].astype(np.int32), ends - table[:, 2]
        if native.read(files, table[:, 1].copy(), table[:, 2].copy(), starts) is None:
            return into.view(source.infos[name].dtype)
    return torch.cat([source.read_flat(name, *block) for block in blocks])


class OneTensor:
    """One tensor of some deltas, so that a plan's statistics are those of that tensor alone."""

    def __init__(self, deltas: Deltas, name: str):
        self._deltas = deltas
        self.of_model: Mapping[str, TensorInfo] = getattr(deltas, "of_model", deltas.infos)
        self.rounding = lambda name: rounding_of(deltas, name)
        self.tasks = deltas.tasks
        self.infos: Mapping[str, TensorInfo] = {name: deltas.infos[name]}

    @property
    def numel(self) -> int:
        return sum(info.numel for info in self.infos.values())

    def tile(self, name: str, start: int, stop: int, watch: Watch | None = None, room: Room | None = None) -> Tile:
        if room is not None and isinstance(self._deltas, ModelDeltas):
            return self._deltas.tile(name, start, stop, watch, room)
        return self._deltas.tile(name, start, stop, watch)

    @property
    def whole(self) -> Deltas:
        """The deltas of which this is one tensor."""
        return self._deltas


def rounding_of(deltas: Deltas, name: str) -> float:
    """Relative spacing of the stored weights that a delta was taken of; 0 where deltas are given as such."""
    known: Callable[[str], float] | None = getattr(deltas, "rounding", None)
    return 0.0 if known is None else known(name)


def infos_of_model(deltas: Deltas) -> Mapping[str, TensorInfo]:
    """Shapes of every merged tensor, also where a plan runs on one tensor alone (to know its depth, for example)."""
    return getattr(deltas, "of_model", deltas.infos)


__all__ = [
    "DeltaSource",
    "Deltas",
    "ModelDeltas",
    "OneTensor",
    "StackDeltas",
    "Task",
    "Tile",
    "Watch",
    "WeightsOf",
    "constant",
    "infos_of_model",
    "rounding_of",
]
