"""The task vectors of one merge, read together: for each name a stack `[task, *shape]`, one tile at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

import torch
from torch import Tensor

from taskvec.checkpoint import Checkpoint
from taskvec.errors import MismatchError
from taskvec.precision import compute_dtype, is_float
from taskvec.source import DeltaSource, TensorInfo, TensorSource

Watch = Callable[[TensorSource, str, Tensor], None]
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

    @property
    def numel(self) -> int:
        return sum(info.numel for info in self.infos.values())

    def inputs(self) -> list[TensorSource]:
        """The tasks' sources, in order."""
        return [task.source for task in self._tasks]

    def plain(self) -> bool:
        """Whether every delta is a whole model less the base, and nothing else."""
        whole = self.base is not None and self.space == "delta" and self._masks is None
        return whole and not any(task.is_delta for task in self._tasks)

    def weights_of(self, name: str, start: int, stop: int) -> Tensor:
        """The task weights that hold for these elements."""
        return self._weights(name, start, stop)

    def bytes_per_pass(self) -> int:
        """Bytes read from the inputs when every merged tensor is read once."""
        sources = [*([self.base] if self.base is not None else []), *(task.source for task in self._tasks)]
        return sum(source.infos[name].nbytes for name in self.infos for source in sources if name in source.infos)

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

    def tile(self, name: str, start: int, stop: int, watch: Watch | None = None, room: "Room | None" = None) -> Tile:
        """One tile; it lies in `room` where that is given and large enough, instead of in new memory."""
        info = self.infos[name]
        base = None
        if self.base is not None:
            raw = _read(self.base, name, start, stop, room)
            if watch is not None:
                watch(self.base, name, raw)
            # never the room's own memory: the next read would change it
            base = raw.to(info.dtype, copy=room is not None)
        count, size = len(self._tasks), stop - start
        if room is not None and info.dtype == room.stack.dtype and count * size <= room.stack.numel():
            stack = room.stack[: count * size].view(count, size)
        else:
            stack = torch.empty(count, size, dtype=info.dtype)
        for row, task in zip(stack, self._tasks):
            if name not in task.source.infos:
                row.zero_()  # a delta source lacks what it does not change; whole models were checked before
            else:
                raw = _read(task.source, name, start, stop, room)
                if watch is not None:
                    watch(task.source, name, raw)
                row.copy_(raw)
            if task.is_delta == (self.space == "delta") or base is None:
                continue
            if task.is_delta:
                row.add_(base)
            else:
                row.sub_(base)
        if self._masks is not None:
            stack.mul_(self._masks(name, start, stop).to(stack))
        return Tile(name, info.shape, start, stop, self.tasks, stack, base, self._weights(name, start, stop))


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that one thread uses for tile after tile: what is allocated anew must first be mapped and zeroed.

    Attributes:
        stack: flat float32, for the stack.
        raw: bytes, for what is read of one input.
    """

    stack: Tensor
    raw: Tensor

    @classmethod
    def of(cls, tasks: int, tile: int) -> "Room":
        return cls(torch.empty(tasks * tile), torch.empty(8 * tile, dtype=torch.uint8))


def _read(source: TensorSource, name: str, start: int, stop: int, room: Room | None) -> Tensor:
    """A piece as stored, in the room where the source can read into given memory."""
    if room is None or not isinstance(source, Checkpoint):
        return source.read_flat(name, start, stop)
    dtype = source.infos[name].dtype
    into = room.raw[: (stop - start) * dtype.itemsize].view(dtype)
    source.read_into(name, start, stop, into)
    return into


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

    def tile(self, name: str, start: int, stop: int, watch: Watch | None = None) -> Tile:
        return self._deltas.tile(name, start, stop, watch)


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
