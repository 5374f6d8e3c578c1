"""Learned masks as a small file: what multiplies each element of the task vectors.

Learning writes the file, merging reads it tile by tile, and neither needs to know how the other works. Weights are
kept as float16 (or float32), or, where a mask has one value besides zero, as one bit an element and that value.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from taskvec.errors import (
    CorruptFileError,
    MismatchError,
    MissingTensorError,
    NonFiniteError,
    NotFoundError,
    OutputError,
    Problems,
    UsageError,
    did_you_mean,
    shortened,
)
from taskvec.precision import dtype_named, rounded
from taskvec.source import TensorInfo, check_learned_with

FORMAT = "taskvec.masks"
VERSION = 1


@dataclass(frozen=True)
class Packed:
    """A tensor kept as bits: its shape, and the value of a set bit."""

    shape: tuple[int, ...]
    scale: float

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Masks:
    """Masks matched by tensor name, opened but not read.

    Attributes:
        path: the file.
        infos: tensor name to shape (as the base's tensor) and dtype (always float32, as `read_flat` gives them).
        tasks: task names the masks were learned with; the masks are shared by all of them.
        base_hash: content hash of the base, when it came from files.
        task_hashes: content hash of each task's source, when it came from files.
        task_kinds: what that source was: "model", "vector" or "adapter".
        details: how they were learned, for people.
    """

    path: Path
    infos: Mapping[str, TensorInfo]
    tasks: tuple[str, ...] = ()
    base_hash: str | None = None
    task_hashes: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    packed: Mapping[str, Packed] = field(default_factory=dict)
    task_kinds: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> Self:
        """Open a mask file; only its header is read.

        Raises:
            NotFoundError: no such file.
            CorruptFileError: not a mask file, or one that contradicts itself.
        """
        from safetensors import SafetensorError, safe_open

        file = Path(path)
        if not file.is_file():
            raise NotFoundError(f"{file}: no such mask file. `taskvec learn dam CONFIG OUT` writes one.")
        try:
            with safe_open(str(file), "pt") as opened:
                metadata = opened.metadata() or {}
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(f"{file}: not a readable safetensors file ({error}).") from error
        if metadata.get("format") != FORMAT:
            raise CorruptFileError(
                f"{file}: its metadata say format {metadata.get('format')!r}, expected {FORMAT!r}. Is it a checkpoint?"
            )
        try:
            header = json.loads(metadata["masks"])
            if header["version"] > VERSION:
                raise CorruptFileError(f"{file}: version {header['version']}; this library reads up to {VERSION}.")
            packed = {name: Packed(tuple(shape), float(scale)) for name, (shape, scale) in header["packed"].items()}
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{file}: its header is damaged ({error!r}).") from error
        infos = {}
        for name, shape in shapes.items():
            if name in packed:
                if shape != ((packed[name].numel + 7) // 8,):
                    raise CorruptFileError(
                        f"{file}: {name} has {list(shape)} bytes of bits for shape {packed[name].shape}."
                    )
                shape = packed[name].shape
            infos[name] = TensorInfo(shape, torch.float32)
        absent = [name for name in packed if name not in shapes]
        if absent:
            raise CorruptFileError(f"{file}: its header names {absent[0]}, which the file does not hold.")
        return cls(
            file,
            infos,
            tuple(header.get("tasks", ())),
            header.get("base_hash"),
            header.get("task_hashes", {}),
            header.get("details", {}),
            packed,
            header.get("task_kinds", {}),
        )

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Weights of the elements `start` to `stop` of one tensor, row-major, float32.

        Raises:
            MissingTensorError: the file has no mask for this tensor.
            NonFiniteError: the mask holds NaN or infinity.
        """
        from safetensors import safe_open

        if name not in self.infos:
            raise MissingTensorError(f"{self.path} has no mask for {name!r}." + did_you_mean(name, self.infos))
        with safe_open(str(self.path), "pt") as opened:
            part = opened.get_slice(name)
            if name not in self.packed:
                values = _rows(part, self.infos[name].shape, start, stop)
                if not bool(torch.isfinite(values).all()):
                    raise NonFiniteError(name, str(self.path))
                return values
            first = start // 8
            found = np.unpackbits(part[first : (stop + 7) // 8].numpy(), bitorder="little")
        bits = torch.from_numpy(found[start - 8 * first : stop - 8 * first].astype(np.float32))
        return bits.mul_(self.packed[name].scale)

    def check(
        self,
        shapes: Mapping[str, Sequence[int]] | None = None,
        *,
        base_hash: str | None = None,
        task_hashes: Mapping[str, str] | None = None,
        task_kinds: Mapping[str, str] | None = None,
    ) -> None:
        """Whether these masks belong to this base and these task vectors; every problem at once.

        Args:
            shapes: the merged tensors.
            base_hash: content hash of the base.
            task_hashes: content hash of each task. One is compared where a task of this name and kind was learned with:
                a task vector and the model that it leads to have different hashes.
            task_kinds: "model", "vector" or "adapter" of each task.

        Raises:
            BaseMismatchError: the base, or a task, is another file than the ones learned with.
            MismatchError: tensors without a mask, or with one of another shape.
        """
        changed = []
        for task, digest in (task_hashes or {}).items():
            kind = (task_kinds or {}).get(task)
            alike = {one: own for one, own in self.task_hashes.items() if self.task_kinds.get(one) == kind}
            if task in alike and digest not in alike.values():
                changed.append(f"{task} ({alike[task][:12]}, now {digest[:12]})")
        check_learned_with(str(self.path), base=self.base_hash, here=base_hash, changed=changed)
        shapes = shapes or {}
        problems = Problems()
        lacking = [name for name in shapes if name not in self.infos]
        if lacking:
            problems.add(
                f"has no mask for {len(lacking)} tensors: {shortened(lacking)} (`keep_base` would leave them)"
                + (did_you_mean(lacking[0], self.infos) if len(lacking) == len(shapes) else "")
            )
        problems.extend(
            f"{name}: the mask has {list(self.infos[name].shape)}, the base has {list(shape)}"
            for name, shape in shapes.items()
            if name in self.infos and tuple(self.infos[name].shape) != tuple(shape)
        )
        if problems:
            raise MismatchError(problems.found, title=f"{self.path} does not fit this merge")

    def read(self, name: str) -> Tensor:
        """The whole mask of one tensor, float32, in its shape."""
        numel = self.infos[name].numel if name in self.infos else 0
        return self.read_flat(name, 0, numel).view(self.infos[name].shape)


def _rows(part: Any, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Elements `start` to `stop` of a stored tensor; only the rows they lie in are read."""
    if not shape:
        return part[...].reshape(-1)[start:stop].to(torch.float32)
    width = int(np.prod(shape[1:], dtype=np.int64))
    if start >= stop or width == 0:
        return torch.empty(0)
    first = start // width
    rows = part[first : (stop + width - 1) // width].reshape(-1)
    return rows[start - first * width : stop - first * width].to(torch.float32)


def save_masks(
    path: "str | os.PathLike[str]",
    masks: Mapping[str, Tensor],
    *,
    tasks: tuple[str, ...] = (),
    base_hash: str | None = None,
    task_hashes: Mapping[str, str] | None = None,
    task_kinds: Mapping[str, str] | None = None,
    details: Mapping[str, Any] | None = None,
    dtype: Literal["float16", "float32"] = "float16",
) -> None:
    """Write masks to a file; the name appears once the content is complete.

    A mask with one value besides zero is packed to one bit an element, whatever the dtype.

    Args:
        path: the file; its folder must exist.
        masks: tensor name to weights, as they multiply the task vectors.
        tasks: names of the task vectors.
        base_hash: content hash of the base.
        task_hashes: content hashes of the tasks' sources.
        task_kinds: "model", "vector" or "adapter", what each source is.
        details: anything else worth keeping, as JSON.
        dtype: of masks that are not packed; float16 keeps a weight to 1 part in 2,048.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
        OutputError: the file cannot be written, or a weight does not fit float16.
    """
    from safetensors.torch import save_file

    if dtype not in ("float16", "float32"):
        raise UsageError(f"dtype: {dtype!r} is not one of 'float16', 'float32'")
    file = Path(path)
    packed: dict[str, tuple[list[int], float]] = {}
    stored: dict[str, Tensor] = {}
    for name, mask in masks.items():
        values = mask.detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(name, "the mask")
        # of a two-valued mask every set element is the same number
        top = float(values.max()) if values.numel() else 0.0
        if values.numel() > 1 and top > 0 and bool(((values == 0) | (values == top)).all()):
            bits = np.packbits((values != 0).numpy().reshape(-1), bitorder="little")
            stored[name] = torch.from_numpy(bits)
            packed[name] = (list(values.shape), top)
        else:
            stored[name] = rounded(values, dtype_named(dtype), where=name)[0].contiguous()
    header = {
        "version": VERSION,
        "packed": packed,
        "tasks": list(tasks),
        "base_hash": base_hash,
        "task_hashes": dict(task_hashes or {}),
        "task_kinds": dict(task_kinds or {}),
        "details": dict(details or {}),
    }
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        save_file(stored, str(partial), metadata={"format": FORMAT, "masks": json.dumps(header)})
        partial.replace(file)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error}).") from error
    finally:
        partial.unlink(missing_ok=True)
