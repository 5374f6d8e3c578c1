"""Named tensors, read one at a time: what every checkpoint, adapter and state dict is to the rest of the library."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from taskvec.errors import BaseMismatchError, MissingTensorError, did_you_mean, shortened

Stack = Annotated[Tensor, "task *shape"]
"""One tensor of every task vector, stacked in task order."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors behind one door. Opening reads headers only; tensors are read when asked for.

    `label` names the source in messages. `infos` is in the order cheapest to read. `aliases` maps a name that shares
    another's storage (a tied head) to that other name; both are in `infos`.
    """

    @property
    def label(self) -> str: ...
    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...
    @property
    def aliases(self) -> Mapping[str, str]: ...
    def read(self, name: str) -> Tensor:
        """The whole tensor in its stored dtype. Callers do not write into it."""
        ...

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the tensor in row-major order, one-dimensional, stored dtype."""
        ...


class InMemory:
    """A state dict as a source. Tensors that share storage, shape and strides are one tensor with several names."""

    def __init__(self, tensors: Mapping[str, Tensor], *, label: str = "state dict"):
        self.label = label
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()
        }
        self.aliases: Mapping[str, str] = shared_storage(self._tensors)

    def read(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise MissingTensorError(f"{self.label} has no tensor {name!r}." + did_you_mean(name, self._tensors))
        return self._tensors[name]

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name).reshape(-1)[start:stop]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)


def in_memory(tensors: "Mapping[str, Tensor] | torch.nn.Module", *, label: str = "state dict") -> InMemory:
    """A state dict or a module as a source (no copy; tied parameters are noticed)."""
    if isinstance(tensors, torch.nn.Module):
        return InMemory(tensors.state_dict(keep_vars=True), label=type(tensors).__name__)
    return InMemory(tensors, label=label)


def shared_storage(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name to first name, for each tensor that is the same piece of memory as an earlier one."""
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.device.type == "meta":
            continue
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
    return aliases


def matches(patterns: Iterable[str], *spellings: str) -> bool:
    """Whether a name, in any of its spellings, matches any of the shell-style patterns (`*` also crosses dots)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in spellings)


def names_matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any of the shell-style patterns, in their own order."""
    return [name for name in names if matches(patterns, name)]


def origin_of(source: TensorSource, name: str) -> "tuple[Any, str] | None":
    """The checkpoint, and the name in it, of a tensor that a source hands on as it is stored there.

    None where the source makes the tensor, or holds it in memory.
    """
    ask = getattr(source, "origin", None)
    found: tuple[Any, str] | None = None if ask is None else ask(name)
    return found


def check_learned_with(where: str, *, base: str | None, here: str | None, changed: Sequence[str]) -> None:
    """Whether what was learned is used with the files that it was learned with.

    Args:
        where: how to name what was learned.
        base: content hash of the base that it was learned on, if known.
        here: that of the base it is used with, if known.
        changed: tasks whose files are others, with their hashes.

    Raises:
        BaseMismatchError: the base or a task is another file.
    """
    if here and base and here != base:
        raise BaseMismatchError(
            f"{where}: learned on a base with hash {base[:12]}, this base has {here[:12]}. "
            "Use the base they were learned on, or learn them again."
        )
    if changed:
        raise BaseMismatchError(
            f"{where}: learned with other files for {shortened(changed)}. "
            "Use the models they were learned with, or learn them again."
        )


def bare(source: Any) -> TensorSource:
    """The source behind renaming, resizing and leaving out."""
    while hasattr(source, "source"):
        source = source.source
    found: TensorSource = source
    return found


def paths_of(source: Any) -> list[Path]:
    """Every file or folder on disk that a source reads, through sums, differences and views.

    These are what an output must not touch.
    """
    own: Path | None = getattr(source, "path", None)
    inner = [getattr(source, key, None) for key in ("source", "base", "tuned", "vector")]
    inner += [term for _, term in getattr(source, "terms", ())]
    found = [own] if own is not None else []
    found += [path for part in inner if part is not None for path in paths_of(part)]
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class LowRank:
    """A delta kept as a product: `(left @ right).reshape(shape)`, in the orientation in which the base stores it.

    The scaling (alpha / r and the like) is already inside `left`. `left` is [rows, rank] and `right` [rank, columns],
    float32 (or float64); rows * columns = numel of `shape`. A convolution has rows = out, columns = in * kernel.
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return int(self.left.shape[1])

    def dense(self) -> Tensor:
        return (self.left @ self.right).reshape(self.shape)


@runtime_checkable
class DeltaSource(TensorSource, Protocol):
    """A source whose tensors are differences to a base, in float32 (or float64), shaped as the base's tensors.

    A name of the base that is absent here has a delta of zero.
    """

    def low_rank(self, name: str) -> LowRank | None:
        """The delta as a product of factors, or None if it is dense."""
        ...
