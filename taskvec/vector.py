"""Task vectors: differences between a fine-tuned model and its base, added, scaled, stored and applied lazily.

Nothing is computed until a tensor is read. Arithmetic keeps a list of (coefficient, difference) pairs, so a sum of ten
vectors reads each input once and low-rank differences (adapters) stay factored.
"""

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskvec.checkpoint import SEGMENT, Checkpoint, as_source, content_hash
from taskvec.errors import (
    BaseMismatchError,
    MismatchError,
    MissingTensorError,
    NonFiniteError,
    NotAModelError,
    Problems,
    UsageError,
    did_you_mean,
    shortened,
)
from taskvec.precision import all_finite, compute_dtype, dtype_name, dtype_named, is_float, rounded
from taskvec.source import DeltaSource, LowRank, TensorInfo, TensorSource, in_memory
from taskvec.writer import write

FORMAT = "taskvec.task_vector"
Model = TensorSource | str | os.PathLike[str] | Mapping[str, Tensor] | torch.nn.Module
"""A source of a model's tensors, or what `Checkpoint.open` makes one of."""


class Difference:
    """`tuned - base`, tensor by tensor, in float32 (float64 where either is). Integer tensors have no difference."""

    def __init__(self, base: TensorSource, tuned: TensorSource):
        self.base, self.tuned = base, tuned
        self.label = tuned.label
        assert_alike(base, {tuned.label: tuned})
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(info.shape, compute_dtype(info.dtype, tuned.infos[name].dtype))
            for name, info in base.infos.items()
            if is_float(info.dtype) and name in tuned.infos
        }
        self.aliases: Mapping[str, str] = {name: to for name, to in base.aliases.items() if name in self.infos}

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        return self.read_flat(name, 0, info.numel).view(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        dtype = self.infos[name].dtype
        tuned = self.tuned.read_flat(name, start, stop).to(dtype)
        return tuned.sub(self.base.read_flat(name, start, stop).to(dtype))

    def low_rank(self, name: str) -> LowRank | None:
        return None


class _Dense:
    """Stored or in-memory differences."""

    def __init__(self, source: TensorSource):
        self.source, self.label, self.aliases = source, source.label, source.aliases
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(info.shape, compute_dtype(info.dtype)) for name, info in source.infos.items()
        }

    def read(self, name: str) -> Tensor:
        return self.source.read(name).to(self.infos[name].dtype)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.read_flat(name, start, stop).to(self.infos[name].dtype)

    def low_rank(self, name: str) -> LowRank | None:
        return None


class TaskVector:
    """A task vector: a lazy linear combination of differences to one base.

    Make one with `between`, `from_adapter`, `from_deltas` or `load`; combine with `+ - *` and `sum`. As a source it has
    `infos`, `read(name)`, `read_flat(name, start, stop)` and `low_rank(name)`; a name that a term lacks counts as zero.

    Attributes:
        terms: pairs of coefficient and difference.
        base_hash: content hash of the base it was made from, when known.
    """

    def __init__(
        self,
        terms: Iterable[tuple[float, DeltaSource]],
        *,
        base_hash: str | None = None,
        base: TensorSource | None = None,
    ):
        self.terms = tuple(terms)
        self._base_hash, self._base = base_hash, base
        self.infos: Mapping[str, TensorInfo] = {}
        self.aliases: Mapping[str, str] = {}
        problems = Problems()
        infos: dict[str, TensorInfo] = {}
        for _, term in self.terms:
            for name, info in term.infos.items():
                known = infos.setdefault(name, info)
                if known.shape != info.shape:
                    problems.add(
                        f"{name}: {list(info.shape)} in {term.label}, {list(known.shape)} in the terms before it"
                    )
                infos[name] = TensorInfo(info.shape, compute_dtype(known.dtype, info.dtype))
            self.aliases = {**self.aliases, **term.aliases}
        problems.raise_if_any(MismatchError)
        self.infos = infos

    # -- making ------------------------------------------------------------------------------------------------------

    @classmethod
    def between(cls, base: Model, tuned: Model) -> "TaskVector":
        """The task vector `tuned - base`.

        Args:
            base: a checkpoint or other source, or what `Checkpoint.open` takes: a path, a state dict, a module.
            tuned: likewise.

        Raises:
            MismatchError: tensors missing, unknown or of another shape; every one of them is listed.
        """
        source = as_source(base)
        return cls([(1.0, Difference(source, as_source(tuned)))], base=source)

    @classmethod
    def from_adapter(cls, base: Model, adapter: "str | os.PathLike[str]") -> "TaskVector":
        """The task vector of a PEFT adapter over its base, kept factored where it is low rank."""
        from taskvec.adapter import Adapter

        source = as_source(base)
        return cls([(1.0, Adapter.open(adapter, source))], base=source)

    @classmethod
    def from_deltas(cls, deltas: Mapping[str, Tensor], *, label: str = "deltas") -> "TaskVector":
        """A task vector from differences in memory."""
        return cls([(1.0, _Dense(in_memory(deltas, label=label)))])

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> "TaskVector":
        """A task vector that `save` wrote.

        Raises:
            NotAModelError: the file is a checkpoint, but not of differences.
        """
        stored = Checkpoint.open(path)
        facts = _facts(stored)
        if facts is None:
            raise NotAModelError(
                f"{os.fspath(path)}: not a task vector (its header does not say so). Make one with `taskvec diff`."
            )
        return cls([(1.0, _Dense(stored))], base_hash=facts.get("base_hash"))

    # -- algebra -----------------------------------------------------------------------------------------------------

    def __mul__(self, scale: float) -> "TaskVector":
        _assert_finite_scale(scale)
        return TaskVector([(scale * c, term) for c, term in self.terms], base_hash=self._base_hash, base=self._base)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "TaskVector":
        if divisor == 0:
            raise UsageError("a task vector cannot be divided by zero")
        return self * (1.0 / divisor)

    def __neg__(self) -> "TaskVector":
        return self * -1.0

    def __add__(self, other: "TaskVector") -> "TaskVector":
        if not isinstance(other, TaskVector):
            return NotImplemented
        if self._bases_differ(other):
            raise BaseMismatchError(
                f"{self.label} and {other.label} are differences to different bases; their sum means nothing."
            )
        known = self._base_hash or other._base_hash
        return TaskVector([*self.terms, *other.terms], base_hash=known, base=self._base or other._base)

    def _bases_differ(self, other: "TaskVector") -> bool:
        """Whether two task vectors are known to belong to different bases; models at one path are not hashed for it."""
        one, two = self._base, other._base
        if one is not None and two is not None:
            place = getattr(one, "path", None)
            if one is two or (place is not None and place == getattr(two, "path", None)):
                return False
        elif None in (one or self._base_hash, two or other._base_hash):
            return False  # differences alone, of a base that nobody named
        return self.base_hash != other.base_hash

    def __radd__(self, other: "TaskVector | int") -> "TaskVector":
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        return self + -other

    @staticmethod
    def sum(vectors: Iterable["TaskVector"]) -> "TaskVector":
        """The sum of several task vectors of one base."""
        found = list(vectors)
        if not found:
            raise MismatchError(["there are no task vectors to add"])
        total = found[0]
        for vector in found[1:]:
            total = total + vector
        return total

    @property
    def label(self) -> str:
        return " + ".join(term.label if c == 1 else f"{c:g}*{term.label}" for c, term in self.terms)

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, name: str) -> Tensor:
        """The delta of one tensor, in float32 (or float64)."""
        info = self._info(name)
        if len(self.terms) == 1 and self.terms[0][0] == 1:
            return self.terms[0][1].read(name)
        return self._sum(info, [(c, term.read(name)) for c, term in self.terms if name in term.infos]).view(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of one delta."""
        info = self._info(name)
        if len(self.terms) == 1 and self.terms[0][0] == 1:
            return self.terms[0][1].read_flat(name, start, stop)
        return self._sum(info, [(c, term.read_flat(name, start, stop)) for c, term in self.terms if name in term.infos])

    @staticmethod
    def _sum(info: TensorInfo, parts: Sequence[tuple[float, Tensor]]) -> Tensor:
        first, *rest = parts
        total = first[1].to(info.dtype) * first[0]
        for c, part in rest:
            total.add_(part.to(info.dtype), alpha=c)
        return total

    def low_rank(self, name: str) -> LowRank | None:
        """The delta as factors (concatenated over the terms), or None if any term is dense there."""
        found = [(c, term.low_rank(name)) for c, term in self.terms if name in term.infos]
        factors = [(c, low) for c, low in found if low is not None]
        if not factors or len(factors) < len(found):
            return None
        left = torch.cat([low.left * c for c, low in factors], 1)
        return LowRank(left, torch.cat([low.right for _, low in factors], 0), factors[0][1].shape)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.infos:
            raise MissingTensorError(f"{self.label} has no tensor {name!r}." + did_you_mean(name, self.infos))
        return self.infos[name]

    # -- geometry ----------------------------------------------------------------------------------------------------

    def dot(self, other: "TaskVector") -> float:
        """Inner product over all tensors (tied ones once), accumulated in float64."""
        return math.fsum(
            part
            for name in self.infos
            if name in other.infos and name not in self.aliases
            for part in _dots(self, other, name)
        )

    def norm(self) -> float:
        """Euclidean norm over all tensors, tied ones once.

        Raises:
            NonFiniteError: the differences hold NaN or infinity.
        """
        squares = {name: math.fsum(_dots(self, self, name)) for name in self.infos if name not in self.aliases}
        for name, square in squares.items():
            if not math.isfinite(square):
                raise NonFiniteError(name, self.label)
        return math.sqrt(max(0.0, math.fsum(squares.values())))

    def cosine(self, other: "TaskVector") -> float:
        """Cosine of the angle to another task vector; 0 if either is zero."""
        lengths = self.norm() * other.norm()
        return self.dot(other) / lengths if lengths else 0.0

    # -- using -------------------------------------------------------------------------------------------------------

    @property
    def base_hash(self) -> str | None:
        """Content hash of the base, computed on first use when the base is at hand."""
        if self._base_hash is None and self._base is not None:
            self._base_hash = content_hash(self._base)
        return self._base_hash

    def apply_to(self, base: Model, scale: float = 1.0, *, force: bool = False) -> "Applied":
        """`base + scale * vector` as a source, to be written or read tensor by tensor.

        Args:
            base: the model to change, as in `between`.
            scale: what the vector is multiplied by.
            force: take a base with other content than the one it was made from.

        Raises:
            BaseMismatchError: the vector was made from another base, and `force` is not set.
            MismatchError: names or shapes do not fit.
            UsageError: the scale is not finite.
        """
        base = as_source(base)
        if not force and base is not self._base and self.base_hash is not None and self.base_hash != content_hash(base):
            raise BaseMismatchError(
                f"{self.label} was made from another base than {base.label} (their content hashes differ). "
                "Use the base it was made from, or force it (force=True, --force) if you know that it fits."
            )
        return Applied(base, self * scale if scale != 1.0 else self)

    def save(
        self, path: "str | os.PathLike[str]", *, dtype: "torch.dtype | str" = torch.float32, overwrite: bool = False
    ) -> Path:
        """Stores the differences as safetensors with the base's content hash in the header.

        Args:
            path: a folder, or a path ending in `.safetensors`.
            dtype: float32 rebuilds a bf16 or float16 model bit for bit; half precision does not, and a warning says so.
            overwrite: replace what is there.
        """
        stored = dtype_named(dtype)
        if stored not in (torch.float32, torch.float64):
            warnings.warn(
                f"differences stored in {dtype_name(stored)} do not rebuild the fine-tuned model exactly (about 0.3 % of the "
                "entries of a bf16 model come back different); store float32 for exactness",
                stacklevel=2,
            )
        facts = {
            "format": FORMAT,
            "version": 1,
            "base_hash": self.base_hash,
            "base": self._base.label if self._base else None,
            "label": self.label,
        }
        return write(
            self, path, dtype=stored, metadata={"taskvec": json.dumps(facts)}, companions=(), overwrite=overwrite
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __repr__(self) -> str:
        return f"TaskVector({self.label!r}, {len(self.infos)} tensors)"


class Applied:
    """`base + vector` as a source, rounded to the base's dtypes when it is read."""

    def __init__(self, base: TensorSource, vector: TaskVector):
        self.base, self.vector = base, vector
        self.label = f"{base.label} + {vector.label}"
        unknown = [name for name in vector.infos if name not in base.infos]
        problems = [f"{name}: in {vector.label}, but not in {base.label}" for name in unknown] + [
            f"{name}: {list(info.shape)} in {vector.label}, {list(base.infos[name].shape)} in {base.label}"
            for name, info in vector.infos.items()
            if name in base.infos and info.shape != base.infos[name].shape
        ]
        if problems:
            raise MismatchError(problems)
        self.infos, self.aliases = base.infos, base.aliases
        self.companions: tuple[Path, ...] = getattr(base, "companions", ())
        self.path: Path | None = getattr(base, "path", None)

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        return self.read_flat(name, 0, info.numel).view(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return rounded(self.read_unrounded(name, start, stop), self.infos[name].dtype, where=name)[0]

    def read_unrounded(self, name: str, start: int, stop: int) -> Tensor:
        """The sum before its one rounding, for a writer that stores another dtype."""
        base = self.base.read_flat(name, start, stop)
        key = name if name in self.vector.infos else self.aliases.get(name, name)
        if key not in self.vector.infos:
            return base
        delta = self.vector.read_flat(key, start, stop)
        total = base.to(compute_dtype(base.dtype, delta.dtype)) + delta
        assert_finite(total, name, self.label)
        return total


@contextmanager
def applied(model: torch.nn.Module, vector: TaskVector, scale: float = 1.0) -> Iterator[torch.nn.Module]:
    """The model with `scale * vector` added to its parameters and buffers in place; undone bit for bit on leaving.

    Raises:
        MismatchError: the vector names tensors that the model lacks, or of another shape.
        NonFiniteError: the sum holds NaN or infinity.
        UsageError: the scale is not finite.
    """
    _assert_finite_scale(scale)
    state = model.state_dict(keep_vars=True)
    source = in_memory(state, label=type(model).__name__)
    sums = Applied(source, vector)
    touched = [name for name in vector.infos if name not in source.aliases]
    kept = {name: state[name].detach().clone() for name in touched}
    try:
        with torch.no_grad():
            for name in touched:
                value = state[name]
                delta = vector.read(name).to(value.device)
                result = kept[name].to(compute_dtype(value.dtype, delta.dtype)) + scale * delta
                assert_finite(result, name, sums.label)
                value.copy_(rounded(result, value.dtype, where=name)[0])
        del sums
        yield model
    finally:
        with torch.no_grad():
            for name, values in kept.items():
                state[name].copy_(values)


def assert_alike(base: TensorSource, others: Mapping[str, TensorSource]) -> None:
    """Checks that models have the base's tensors: every difference is reported, grouped, before anything is read.

    Raises:
        MismatchError: names the tensors that are missing, unknown, or of another shape or kind.
    """
    problems: list[str] = [] if base.infos else [f"{base.label}: there are no tensors in it"]
    for label, other in others.items() if base.infos else ():
        missing = [n for n in base.infos if n not in other.infos and base.aliases.get(n, n) not in other.infos]
        missing = [
            n for n in missing if not any(to == n and alias in other.infos for alias, to in base.aliases.items())
        ]
        extra = [n for n in other.infos if n not in base.infos and other.aliases.get(n, n) not in base.infos]
        shapes = [n for n, i in other.infos.items() if n in base.infos and i.shape != base.infos[n].shape]
        kinds = [
            n for n, i in other.infos.items() if n in base.infos and is_float(i.dtype) != is_float(base.infos[n].dtype)
        ]
        if len(missing) == len(base.infos):
            problems.append(
                f"{label}: has none of the {len(base.infos)} tensors of {base.label} ({shortened(list(base.infos), 2)}; here "
                f"{shortened(list(other.infos), 2)}). Another architecture, or another prefix?"
            )
            continue
        if missing:
            problems.append(f"{label}: {len(missing)} tensors of {base.label} are missing: {shortened(missing)}")
        if extra:
            problems.append(f"{label}: {len(extra)} tensors are not in {base.label}: {shortened(extra)}")
        problems += [
            f"{name}: {label} has {list(other.infos[name].shape)}, {base.label} has {list(base.infos[name].shape)}. "
            "Was it tuned from another base?"
            for name in shapes[:8]
        ]
        if len(shapes) > 8:
            problems.append(f"{label}: and {len(shapes) - 8} more shapes differ")
        problems += [
            f"{name}: {dtype_name(other.infos[name].dtype)} in {label}, {dtype_name(base.infos[name].dtype)} in {base.label}"
            for name in kinds[:8]
        ]
    if problems:
        raise MismatchError(problems)


def _assert_finite_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise UsageError(f"scale: {scale} is not a finite number")


def assert_finite(values: Tensor, name: str, source: str) -> None:
    """Refuses NaN and infinity.

    Raises:
        NonFiniteError: names the tensor and where it comes from.
    """
    if not all_finite(values):
        raise NonFiniteError(name, source, int((~torch.isfinite(values)).sum()))


def _dots(one: TaskVector, other: TaskVector, name: str) -> Iterator[float]:
    low, high = one.low_rank(name), other.low_rank(name)
    if low is not None and high is not None:
        left = low.left.double().T @ high.left.double()
        yield float((left * (low.right.double() @ high.right.double().T)).sum())
        return
    numel = one.infos[name].numel
    for start in range(0, numel, SEGMENT):
        stop = min(start + SEGMENT, numel)
        a = one.read_flat(name, start, stop).double()
        yield float(a.dot(a if other is one else other.read_flat(name, start, stop).double()))


def _facts(source: Any) -> dict[str, Any] | None:
    text = getattr(source, "metadata", {}).get("taskvec", "")
    try:
        facts = json.loads(text)
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and facts.get("format") == FORMAT else None


def is_task_vector(source: TensorSource) -> bool:
    """Whether a checkpoint is a stored task vector."""
    return _facts(source) is not None
