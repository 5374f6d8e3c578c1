"""Where the task vectors lie while coefficients are learned: on the device, in host memory, or in a file."""

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from taskvec.errors import MismatchError, NonFiniteError, OutputError, Problems, UsageError, did_you_mean
from taskvec.source import LowRank, TensorInfo

Place = Literal["model", "cpu", "pinned", "disk"]
BankDtype = Literal["float32", "bfloat16", "float16"]
_STORED: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_ALIGNMENT = 64
ROW = 64
CHUNK = 1 << 20  # elements of one task vector turned to float32 at a time: 4 MiB, about a core's L2 share


class GivenDeltas:
    """A mapping of names to dense or low-rank deltas, read like a task vector."""

    def __init__(self, deltas: Mapping[str, Tensor | LowRank], label: str):
        self.label = label
        self._deltas = deltas
        self.aliases: Mapping[str, str] = {}
        self.infos = {
            name: TensorInfo(tuple(delta.shape), delta.left.dtype if isinstance(delta, LowRank) else delta.dtype)
            for name, delta in deltas.items()
        }

    def read(self, name: str) -> Tensor:
        delta = self._deltas[name]
        return delta.dense() if isinstance(delta, LowRank) else delta.detach()

    def low_rank(self, name: str) -> LowRank | None:
        delta = self._deltas[name]
        return delta if isinstance(delta, LowRank) else None


@dataclass
class Block:
    """The task vectors' deltas of one tensor: [task, numel] for the dense ones, factors for the others."""

    shape: tuple[int, ...]
    tasks: tuple[int, ...] = ()
    values: Tensor | None = None
    scales: Tensor | None = None
    factors: dict[int, LowRank] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        dense = 0 if self.values is None else self.values.numel() * self.values.element_size()
        return dense + sum((f.left.numel() + f.right.numel()) * f.left.element_size() for f in self.factors.values())


def power_of_two_scale(values: Tensor) -> float:
    """The power of two that brings the largest magnitude into [2^14, 2^15), where float16 is most exact."""
    largest = float(values.abs().max())
    if largest == 0.0:
        return 1.0
    # at most 2^100, so that the scale and its inverse are float32 numbers
    return float(2.0 ** min(15 - math.frexp(largest)[1], 100))


class Bank:
    """Deltas of every task vector for the tensors that learning composes, stored once, zero blocks left out.

    Args:
        vectors: task name to task vector (`.infos`, `.read`, `.low_rank`).
        wanted: tensor name to its shape, the device it is composed on and the dtype of its sums.
        place: `model` (beside the parameter), `cpu`, `pinned` (page-locked host memory) or `disk` (a temporary file,
            mapped).
        dtype: dtype of the stored dense deltas; float64 sums store float64. float16 has one power-of-two scale per task
            vector and tensor, so that small deltas keep 11 bits.
        renamed: name in a task vector to the parameter it means (tied weights).
        folder: where the file of `disk` goes; the system's temporary folder by default.

    Raises:
        MismatchError: a delta of another shape than its tensor; all of them at once.
        NonFiniteError: a delta with NaN or infinity.
    """

    def __init__(
        self,
        vectors: Mapping[str, "GivenDeltas"],
        wanted: Mapping[str, tuple[tuple[int, ...], torch.device, torch.dtype]],
        *,
        place: Place = "model",
        dtype: BankDtype = "float32",
        renamed: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ):
        if dtype not in _STORED:
            raise UsageError(f"bank_dtype: {dtype!r} is not known." + did_you_mean(str(dtype), _STORED))
        if place not in ("model", "cpu", "pinned", "disk"):
            raise UsageError(
                f"bank: {place!r} is not known." + did_you_mean(str(place), ("model", "cpu", "pinned", "disk"))
            )
        self.place: Place = place
        self.tasks = tuple(vectors)
        self._wanted = dict(wanted)
        holders = _holders(vectors, wanted, renamed or {})
        self.blocks: dict[str, Block] = {}
        if place == "disk":
            size = 0
            for name, sources in holders.items():
                numel = 1
                for extent in wanted[name][0]:
                    numel *= extent
                kind = _stored_dtype(dtype, wanted[name][2])
                size += -(-len(sources) * numel * kind.itemsize // _ALIGNMENT) * _ALIGNMENT
            self._file = _mapped(max(size, 1), folder)
            self._used = 0
        for name, sources in holders.items():
            block = self._stored(name, sources, vectors, _stored_dtype(dtype, wanted[name][2]), dtype)
            if block.tasks or block.factors:
                self.blocks[name] = block

    def _stored(
        self,
        name: str,
        sources: Mapping[int, str],
        vectors: Mapping[str, "GivenDeltas"],
        kind: torch.dtype,
        dtype: BankDtype,
    ) -> Block:
        shape, device, sums = self._wanted[name]
        block = Block(shape)
        names = list(vectors)
        where = device if self.place == "model" else torch.device("cpu")
        dense: list[int] = []
        rows: list[Tensor] = []
        scales: list[float] = []
        stack: Tensor | None = None
        for task, source_name in sources.items():
            vector = vectors[names[task]]
            factors = vector.low_rank(source_name)
            if factors is not None:
                if not bool(torch.isfinite(factors.left).all()) or not bool(torch.isfinite(factors.right).all()):
                    raise NonFiniteError(source_name, names[task])
                if bool(factors.left.any()) and bool(factors.right.any()):
                    block.factors[task] = LowRank(
                        factors.left.detach().to(where, sums), factors.right.detach().to(where, sums), shape
                    )
                continue
            delta = vector.read(source_name).detach().reshape(-1)
            if not bool(torch.isfinite(delta).all()):
                raise NonFiniteError(source_name, names[task], int((~torch.isfinite(delta)).sum()))
            if not bool(delta.any()):
                continue
            if stack is None:
                stack = self._allocated(len(sources), delta.numel(), kind, where)
            scale = power_of_two_scale(delta.to(torch.float32)) if kind == torch.float16 else 1.0
            row = stack[len(dense)]
            row.copy_(delta.to(sums) * scale if scale != 1.0 else delta)
            rows.append(row)
            dense.append(task)
            scales.append(1.0 / scale)
        if stack is not None:
            block.values = stack if len(dense) == len(sources) else stack[: len(dense)]
            if len(dense) < len(sources) and self.place == "model":
                block.values = self._allocated(len(dense), stack.shape[1], kind, where).copy_(stack[: len(dense)])
            block.tasks = tuple(dense)
            if any(scale != 1.0 for scale in scales):
                block.scales = torch.tensor(scales, dtype=sums, device=device)
        return block

    def _allocated(self, tasks: int, numel: int, kind: torch.dtype, where: torch.device) -> Tensor:
        if self.place == "disk":
            size = tasks * numel * kind.itemsize
            piece = self._file[self._used : self._used + size].view(kind).view(tasks, numel)
            self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
            return piece
        pinned = self.place == "pinned" and torch.cuda.is_available()
        # rows start at multiples of 64 elements, so that the fused kernels read whole vectors
        stride = -(-numel // ROW) * ROW if self.place == "model" and where.type == "cuda" else numel
        return torch.empty((tasks, stride), dtype=kind, device=where, pin_memory=pinned)[:, :numel]

    def values(self, name: str) -> Tensor:
        """[task, numel] of the dense deltas, on the device on which the tensor is composed, in the stored dtype."""
        block = self.blocks[name]
        if block.values is None:
            raise UsageError(f"{name}: no task vector is dense here.")
        return block.values.to(self._wanted[name][1], non_blocking=self.place == "pinned")

    def factors(self, name: str) -> dict[int, LowRank]:
        """Task to factors, on the device on which the tensor is composed."""
        device = self._wanted[name][1]
        return {
            task: LowRank(f.left.to(device), f.right.to(device), f.shape)
            for task, f in self.blocks[name].factors.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all deltas as stored."""
        return sum(block.nbytes for block in self.blocks.values())


def _mapped(size: int, folder: Path | None) -> Tensor:
    """Bytes in a temporary file. It has no name any more once it is mapped, so a killed run leaves nothing either."""
    handle, path = tempfile.mkstemp(prefix="taskvec-bank-", dir=folder)
    os.close(handle)
    try:
        return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise OutputError(f"{path}: no room for {size} bytes of deltas ({error}). Choose a `bank_folder`.") from error
    finally:
        Path(path).unlink()


def _stored_dtype(dtype: BankDtype, sums: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == "float32" and sums == torch.float64 else _STORED[dtype]


def _holders(
    vectors: Mapping[str, "GivenDeltas"],
    wanted: Mapping[str, tuple[tuple[int, ...], torch.device, torch.dtype]],
    renamed: Mapping[str, str],
) -> dict[str, dict[int, str]]:
    """For each tensor, which task vectors have it and under which name; shapes are checked before anything is read."""
    problems = Problems()
    found: dict[str, dict[int, str]] = {name: {} for name in wanted}
    for task, (label, vector) in enumerate(vectors.items()):
        for name, info in vector.infos.items():
            target = renamed.get(name, name)
            if target not in wanted:
                continue
            if tuple(info.shape) != wanted[target][0]:
                problems.add(
                    f"{name}: task vector {label!r} has {list(info.shape)}, the model has {list(wanted[target][0])}. "
                    "Was it tuned from another base? A head of another size is left out with `exclude`."
                )
                continue
            if task in found[target]:
                first = found[target][task]
                if not torch.equal(vector.read(first), vector.read(name)):
                    problems.add(
                        f"{name}: tied to {target!r} in the model; task vector {label!r} changes the two differently."
                    )
                continue
            found[target][task] = name
    problems.raise_if_any(MismatchError)
    return {name: sources for name, sources in found.items() if sources}
