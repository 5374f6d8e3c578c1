"""Merged deltas as a PEFT adapter: exact where they are sums of LoRA, else the best low rank, with its error reported.

Deltas come one at a time and only their factors are kept, so neither a full model nor a full task vector is ever in
memory. The scaling is folded into the factors (`lora_alpha = r`), so plain PEFT loads what is written.
"""

import json
import math
import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from merging.prepare import Prepared, prepare, resolved
from merging.recipe import Recipe, value_at
from merging.spectra import is_weight_matrix
from merging.stacks import merge_stacks
from taskvec.adapter import Adapter
from taskvec.blocks import is_embedding
from taskvec.checkpoint import Checkpoint, raw_bytes
from taskvec.deltas import Tile
from taskvec.errors import (
    BaseMismatchError,
    MismatchError,
    NotAModelError,
    OutputError,
    OutputExistsError,
    RecipeError,
    UsageError,
    VerificationError,
    did_you_mean,
    shortened,
)
from taskvec.live_names import Layouts, Names
from taskvec.lora import blocks, finite, matrix_shape, summed
from taskvec.precision import compute_dtype, dtype_name, dtype_named, rounded
from taskvec.source import DeltaSource, LowRank, TensorInfo, TensorSource, in_memory, paths_of
from taskvec.sweep import Options, Progress, sweep
from taskvec.vector import TaskVector
from taskvec.writer import check_output, write_durably

FORMAT = "taskvec.adapter"
Other = Literal["refuse", "save", "drop"]
Solver = Literal["auto", "exact", "randomised"]

# up to this side a full decomposition costs no more than drawing directions. At 1024 x 2816 and rank 16 drawing takes
# 0.2 s against 1.3 s; it misses 0.336877 of a decaying spectrum (the best: 0.336876), of noise 0.9820 (0.9807)
_FULL_SVD = 512
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4


@dataclass(frozen=True, slots=True)
class Rank:
    """How many directions of each delta to keep.

    Attributes:
        kind: "rank" (at most `value`), "energy" (the least rank that holds this share of the squared norm), or "exact"
            (all: the factors side by side where the delta is a product, else the numerical rank).
        value: a whole number >= 1 for "rank", a share in (0, 1] for "energy", unused for "exact".
    """

    kind: Literal["rank", "energy", "exact"]
    value: float = 0.0

    @classmethod
    def parse(cls, text: "str | int | Rank") -> "Rank":
        """`rank=16` (or just 16), `energy=0.95` or `exact`.

        Raises:
            UsageError: anything else, or a number out of its range.
        """
        if isinstance(text, Rank):
            return text
        kind, _, number = str(text).replace(" ", "").rpartition("=")
        if (kind, number) == ("", "exact"):
            return cls("exact")
        try:
            value = float(number)
        except ValueError:
            raise UsageError(
                f"rank: {text!r} is not rank=NUMBER, energy=SHARE or exact." + did_you_mean(str(text), ["exact"])
            ) from None
        if kind in ("", "rank"):
            if value < 1 or value != int(value):
                raise UsageError(f"rank: {number} is not a whole number of at least 1.")
            return cls("rank", value)
        if kind == "energy":
            if not 0 < value <= 1:
                raise UsageError(f"energy: {number} is not in (0, 1].")
            return cls("energy", value)
        raise UsageError(f"rank: {text!r} is not rank=NUMBER, energy=SHARE or exact.")


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of one tensor.

    Attributes:
        name: the tensor in the base.
        rank: directions kept.
        of: the most there could be, min(rows, columns).
        norm: Frobenius norm of the delta.
        error: relative Frobenius error of what is stored, 0 for exact.
    """

    name: str
    rank: int
    of: int
    norm: float
    error: float


@dataclass(slots=True)
class AdapterReport:
    """What an adapter holds of the deltas it was made from.

    Attributes:
        path: the folder.
        kept: one entry for each factored tensor.
        saved: tensors stored whole (norms, biases).
        dropped: changed tensors that were left out on request.
        error: relative Frobenius error over all changed tensors, dropped ones included.
        parameters: numbers stored.
    """

    path: Path
    kept: list[Kept] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    error: float = 0.0
    parameters: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.kept)} tensors as LoRA factors, {self.parameters} numbers"]
        if self.kept:
            ranks = sorted({kept.rank for kept in self.kept})
            worst = max(self.kept, key=lambda kept: kept.error)
            lines.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}")
            lines.append(f"relative error {self.error:.3g} (largest {worst.error:.3g}, {worst.name})")
        lines += [f"saved whole: {shortened(self.saved)}"] if self.saved else []
        lines += [f"dropped: {shortened(self.dropped)}"] if self.dropped else []
        return "\n  ".join(lines)


# -- low rank ----------------------------------------------------------------------------------------------------------


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A thin SVD; float64 once more if LAPACK does not converge in float32."""
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except RuntimeError:  # LinAlgError is one
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        return left.to(matrix.dtype), values.to(matrix.dtype), right.to(matrix.dtype)


def _full_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A thin SVD; of a float32 matrix by its Gram matrix in float64, as accurate as LAPACK in float32 and cheaper."""
    if matrix.dtype == torch.float64:
        return _svd(matrix)
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = _full_svd(matrix.T)
        return right.T, values, left.T
    wide = matrix.double()
    squares, left = torch.linalg.eigh(wide @ wide.T)
    left, values = left.flip(1), squares.flip(0).clamp(min=0).sqrt()
    right = left.T @ wide / values.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return left, values, right


def _product_svd(product: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of a product from its factors alone: two thin QRs and a square of the rank's size, in float64."""
    outer, upper = torch.linalg.qr(product.left.double())
    inner, lower = torch.linalg.qr(product.right.double().T)
    left, values, right = _svd(upper @ lower.T)
    return outer @ left, values, right @ inner.T


def _product_norm(left: Tensor, right: Tensor) -> float:
    upper = torch.linalg.qr(left.double(), mode="r")[1]
    lower = torch.linalg.qr(right.double().T, mode="r")[1]
    return float(torch.linalg.matrix_norm(upper @ lower.T))


def _randomised_svd(matrix: Tensor, rank: int, seed: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The leading directions by subspace iteration (arXiv:0909.4061, algorithm 4.4), drawn by name and seed."""
    from zlib import crc32

    generator = torch.Generator().manual_seed(crc32(name.encode()) ^ (seed << 32))
    width = min(rank + _OVERSAMPLING, min(matrix.shape))
    basis = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64).to(matrix.dtype)
    span = torch.linalg.qr(matrix @ basis)[0]
    for _ in range(_POWER_ITERATIONS):
        span = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ span)[0])[0]
    left, values, right = _svd(span.T @ matrix)
    return span @ left, values, right


def _enough(values: Tensor, total: float, rank: Rank, eps: float) -> int:
    """How many singular values (descending) are kept."""
    alive = int((values > values[0] * eps).sum()) if values.numel() else 0
    if rank.kind == "rank":
        return min(int(rank.value), alive)
    if rank.kind == "energy":
        share = values.double().square().cumsum(0) / total
        reached = (share >= rank.value * (1 - 1e-12)).nonzero()
        return min(int(reached[0]) + 1 if len(reached) else alive, alive)
    return alive


def low_rank_of(
    delta: Tensor | LowRank, rank: "Rank | str | int", *, name: str = "delta", solver: Solver = "auto", seed: int = 0
) -> LowRank:
    """The best product of a rank for one delta (Eckart-Young), from its factors alone where it has them.

    Args:
        delta: a tensor (seen as its first dimension against the others) or a product.
        rank: see `Rank`.
        name: keys the random start of the randomised solver and stands in messages.
        solver: for a dense delta: "exact" (full SVD), "randomised" (subspace iteration), or "auto" (exact up to a
            smaller side of 512).
        seed: of the randomised solver.

    Raises:
        NonFiniteError: the delta holds NaN or infinity.
    """
    rank = Rank.parse(rank)
    if isinstance(delta, LowRank):
        finite(delta.left, name, "the delta")
        finite(delta.right, name, "the delta")
        rows, columns = delta.left.shape[0], delta.right.shape[1]
        most = min(rows, columns) if rank.kind != "rank" else int(rank.value)
        if rank.kind != "energy" and delta.rank <= most:
            return delta
        left, values, right = _product_svd(delta)
        kept = _enough(values, float(values.double().square().sum()), rank, 1e-13)
        return _balanced(left, values, right, kept, delta.left.dtype, delta.shape)
    dtype = compute_dtype(delta.dtype)
    matrix = finite(delta, name, "the delta").to(dtype).reshape(matrix_shape(tuple(delta.shape)))
    total = float(matrix.double().square().sum())
    small, eps = min(matrix.shape), 8 * torch.finfo(dtype).eps
    # beyond half of all directions there is nothing to gain from drawing a few of them
    many = rank.kind == "rank" and 2 * (rank.value + _OVERSAMPLING) > small
    if solver == "exact" or rank.kind == "exact" or many or (solver == "auto" and small <= _FULL_SVD):
        left, values, right = _full_svd(matrix)
    else:
        guess = int(rank.value) if rank.kind == "rank" else 32
        while True:
            left, values, right = _randomised_svd(matrix, guess, seed, name)
            # the values found are lower bounds, so a share that they reach is reached
            reached = float(values[:guess].double().square().sum()) >= rank.value * total
            if rank.kind == "rank" or reached:
                break
            guess *= 2
            if guess > small // 2:
                left, values, right = _full_svd(matrix)
                break
    kept = _enough(values, total, rank, eps)
    return _balanced(left, values, right, kept, dtype, tuple(delta.shape))


def _balanced(
    left: Tensor, values: Tensor, right: Tensor, rank: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> LowRank:
    """Factors of equal size, so that neither overflows a narrow dtype."""
    root = values[:rank].sqrt()
    return LowRank((left[:, :rank] * root).to(dtype), (root[:, None] * right[:rank]).to(dtype), shape)


def _relative_error(delta: Tensor | LowRank, stored: LowRank) -> tuple[float, float]:
    """Norm of the delta, and of what the stored product misses of it, relative."""
    if isinstance(delta, LowRank):
        if delta.left is stored.left and delta.right is stored.right:
            return _product_norm(delta.left, delta.right), 0.0
        norm = _product_norm(delta.left, delta.right)
        missed = _product_norm(
            torch.cat([delta.left.double(), -stored.left.double()], 1),
            torch.cat([delta.right.double(), stored.right.double()]),
        )
        return norm, missed / norm if norm else 0.0
    matrix = delta.reshape(matrix_shape(tuple(delta.shape)))
    total = missed = 0.0
    for start, stop in blocks(tuple(delta.shape)):
        piece = matrix[start:stop].double()
        total += float(piece.square().sum())
        missed += float((piece - stored.left[start:stop].double() @ stored.right.double()).square().sum())
    return math.sqrt(total), math.sqrt(missed / total) if total else 0.0


# -- names and kinds of modules in the live model ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Site:
    """One module of the live model that a tensor of the base is the weight of."""

    module: str
    kind: Literal["linear", "in out", "embedding", "convolution", "expert", "other"]


# per-expert matrices on disk that transformers fuses into one parameter; PEFT fuses an adapter's in the same way
_EXPERT = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_SPELLINGS = ({"gate_proj", "up_proj", "down_proj"}, {"w1", "w3", "w2"})


class _Live:
    """What the base is called and consists of once transformers has built it.

    PEFT's keys are paths of the live model. Where the base has a config.json that transformers knows, an empty model
    is built from it (no weights, no code from the folder); else the names of the base are taken for those paths.
    """

    def __init__(self, base: TensorSource):
        self.base = base
        self.layouts = Layouts(base)
        self.model = self._empty_model()
        self.modules: dict[str, torch.nn.Module] = {}
        self.weights: dict[str, torch.nn.Parameter] = {}
        self.users: dict[int, list[str]] = {}
        self.paths: dict[str, str | None] = {}
        self.names: Names | None = None
        if self.model is not None:
            self.modules = dict(self.model.named_modules())
            for path, module in self.modules.items():
                for parameter, weight in module.named_parameters(recurse=False):
                    self.users.setdefault(id(weight), []).append(path)
                    self.weights[f"{path}.{parameter}"] = weight
            self.names = Names(in_memory(dict(self.model.state_dict()), label="the live model"))
            self.names.learn(list(base.infos))

    def _empty_model(self) -> torch.nn.Module | None:
        config: Mapping[str, Any] = getattr(self.base, "config", None) or {}
        path: Path | None = getattr(self.base, "path", None)
        kinds = config.get("architectures") or []
        if path is None or not Path(path).is_dir() or not kinds:
            return None
        import transformers

        kind = getattr(transformers, str(kinds[0]), None)
        if kind is None:
            return None
        try:
            with torch.device("meta"):
                return kind(transformers.AutoConfig.from_pretrained(path, trust_remote_code=False))
        except (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError):
            return None  # a configuration of another version, or of code that is not run here: names have to do

    def fused_by_peft(self) -> set[str]:
        """Last parts of names that PEFT takes for per-expert matrices of this model and fuses, if it does."""
        if self.model is None:
            return set()
        try:
            from peft.utils import transformers_weight_conversion as conversion
        except ImportError:
            return set()
        kind = getattr(getattr(self.model, "config", None), "model_type", None)
        family = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind)
        return set(getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(family, ()))

    def path(self, name: str) -> str | None:
        """The live path of a tensor, or None where the live model has no such tensor (fused experts)."""
        if self.names is None:
            return name
        if name not in self.paths:
            self.paths[name] = self.names.find(name)
        return self.paths[name]

    def sites(self, name: str) -> list[_Site]:
        """The modules that use this tensor: one, or two where a head is tied to its embedding."""
        path = self.path(name)
        if path is None:
            found = _EXPERT.search(name)
            fused = found is not None and found.group(1) in self.fused_by_peft()
            return [_Site(name.rpartition(".")[0], "expert" if fused else "other")]
        module, _, parameter = path.rpartition(".")
        if self.model is None:
            tied = [alias.rpartition(".")[0] for alias, to in self.base.aliases.items() if to == name]
            return [_Site(module, self._kind(name, parameter)), *(_Site(other, "linear") for other in tied)]
        if path not in self.weights:
            return [_Site(module, "other")]  # a buffer
        users = self.users[id(self.weights[path])]
        return [_Site(user, self._kind_of(self.modules[user], parameter)) for user in users]

    def _kind_of(
        self, module: torch.nn.Module, parameter: str
    ) -> Literal["linear", "in out", "embedding", "convolution", "other"]:
        from transformers.pytorch_utils import Conv1D

        if parameter != "weight":
            return "other"
        if isinstance(module, Conv1D):
            return "in out"
        if isinstance(module, torch.nn.Linear):
            return "linear"
        if isinstance(module, torch.nn.Embedding):
            return "embedding"
        if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d) and module.groups == 1:
            return "convolution"
        return "other"

    def _kind(self, name: str, parameter: str) -> Literal["linear", "in out", "embedding", "convolution", "other"]:
        shape = self.base.infos[name].shape
        if parameter != "weight" or len(shape) < 2 or len(shape) > 5:
            return "other"
        if len(shape) > 2:
            return "convolution"
        if is_embedding(name):
            return "embedding"
        return "in out" if self.layouts.stored_in_out(name) else "linear"

    def alike(self, leaf: str) -> set[str]:
        """All modules whose path ends with this name."""
        paths = self.modules if self.model is not None else {name.rpartition(".")[0] for name in self.base.infos}
        return {path for path in paths if path == leaf or path.endswith(f".{leaf}")}

    def tensors_of(self, module: str) -> dict[str, str] | None:
        """Tensors of a module without submodules, live path to name in the base; None if it has submodules."""
        found: dict[str, str] = {}
        for name in self.base.infos:
            path = self.path(name)
            if path is not None and path.startswith(f"{module}."):
                if path.rpartition(".")[0] != module:
                    return None
                found[path] = name
        return found


# -- writing -----------------------------------------------------------------------------------------------------------


class AdapterWriter:
    """Takes deltas one at a time and writes them as one LoRA adapter, whole or not at all.

    Args:
        out: the adapter's folder, made when `finish` is called.
        base: the model that the deltas are differences to.
        rank: see `Rank`.
        other: what to do with a changed tensor that no LoRA can hold (a norm, a bias): "refuse" with an error that
            names all of them, "save" whole in the adapter (modules_to_save, bias), or "drop" and report.
        dtype: what the factors are stored in; the reported errors include its rounding.
        solver: see `low_rank_of`.
        seed: of the randomised solver.
        base_name: what `base_model_name_or_path` shall say; the base's path if left out.
        task_type: PEFT's, such as CAUSAL_LM; told by the base's configuration if left out.
        overwrite: replace what is at `out`.

    Attributes:
        report: what became of each tensor, complete when `finish` returns.
        written: digests of what is written, known when `finish` asks for its files.

    Raises:
        OutputExistsError: `out` is taken.
    """

    def __init__(
        self,
        out: "str | os.PathLike[str]",
        base: TensorSource,
        *,
        rank: "Rank | str | int",
        other: Other = "refuse",
        dtype: "torch.dtype | str" = torch.float32,
        solver: Solver = "auto",
        seed: int = 0,
        base_name: str | None = None,
        task_type: str | None = None,
        overwrite: bool = False,
    ):
        if other not in ("refuse", "save", "drop"):
            raise UsageError(f"other: {other!r} is not refuse, save or drop.")
        if solver not in ("auto", "exact", "randomised"):
            raise UsageError(f"solver: {solver!r} is not auto, exact or randomised.")
        self.out, self.base = Path(out), base
        self.rank, self.other, self.solver, self.seed = Rank.parse(rank), other, solver, seed
        self.dtype, self.overwrite = dtype_named(dtype), overwrite
        path: Path | None = getattr(base, "path", None)
        check_output(self.out, paths_of(base), overwrite=overwrite)
        self.base_name = base_name if base_name is not None else (str(path) if path is not None else None)
        self.task_type = task_type if task_type is not None else self._told_task_type()
        self.live = _Live(base)
        self.report = AdapterReport(self.out)
        self._tensors: dict[str, Tensor] = {}
        self._ranks: dict[str, int] = {}
        self._experts: dict[str, LowRank] = {}
        self._in_out = False
        self._whole: dict[str, Tensor] = {}
        self._refused: list[str] = []
        self._norms: dict[str, tuple[float, float]] = {}  # of each delta, and of what is missed of it
        self._pieces: dict[str, tuple[Tensor, int]] = {}
        self._lock = threading.Lock()
        self.written: dict[str, Any] = {}

    def _told_task_type(self) -> str | None:
        config: Mapping[str, Any] = getattr(self.base, "config", None) or {}
        kind = str((config.get("architectures") or [""])[0])
        if kind.endswith(("ForCausalLM", "LMHeadModel")):
            return "CAUSAL_LM"
        return (
            "SEQ_2_SEQ_LM" if kind.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder") else None
        )

    def add(self, name: str, delta: Tensor | LowRank) -> None:
        """Takes the delta of one tensor of the base; a delta of zero is left out.

        Raises:
            MismatchError: the base has no such tensor, or one of another shape.
            NonFiniteError: it holds NaN or infinity.
        """
        if name not in self.base.infos:
            raise MismatchError([f"{name}: not in {self.base.label}." + did_you_mean(name, self.base.infos)])
        shape = self.base.infos[name].shape
        if tuple(delta.shape) != shape:
            raise MismatchError([f"{name}: the delta is {list(delta.shape)}, {self.base.label} has {list(shape)}"])
        sites = self.live.sites(name)
        if len(shape) < 2 or any(site.kind == "other" for site in sites):
            self._add_other(name, delta.dense() if isinstance(delta, LowRank) else delta)
            return
        best = low_rank_of(delta, self.rank, name=name, solver=self.solver, seed=self.seed)
        if best.rank == 0:
            return
        stored = LowRank(
            rounded(best.left, self.dtype, where=name)[0], rounded(best.right, self.dtype, where=name)[0], best.shape
        )
        norm, error = _relative_error(delta, stored)
        if norm == 0:
            return
        self._norms[name] = (norm, norm * error)
        self.report.kept.append(Kept(name, stored.rank, min(matrix_shape(shape)), norm, error))
        for site in sites:
            self._add_factors(site, stored)

    def _add_factors(self, site: _Site, product: LowRank) -> None:
        """PEFT computes B A for the output by input matrix; each kind of module lies its own way in that."""
        if site.kind == "expert":
            self._experts[f"{site.module}.weight"] = product
            return
        key, left, right = f"base_model.model.{site.module}", product.left, product.right
        self._ranks[site.module] = product.rank
        if site.kind == "embedding":
            self._tensors[f"{key}.lora_embedding_A"] = left.T.contiguous()
            self._tensors[f"{key}.lora_embedding_B"] = right.T.contiguous()
            return
        if site.kind == "in out":
            self._in_out = True
            left, right = right.T, left.T
        if site.kind == "convolution":
            out, inner, *kernel = product.shape
            left = left.reshape(out, product.rank, *(1 for _ in kernel))
            right = right.reshape(product.rank, inner, *kernel)
        self._tensors[f"{key}.lora_A.weight"] = right.contiguous()
        self._tensors[f"{key}.lora_B.weight"] = left.contiguous()

    def _add_other(self, name: str, delta: Tensor) -> None:
        norm = float(torch.linalg.vector_norm(finite(delta, name, "the delta").double()))
        if norm == 0:
            return
        self._norms[name] = (norm, norm if self.other == "drop" else 0.0)
        if self.other == "refuse":
            self._refused.append(name)
        elif self.other == "drop":
            self.report.dropped.append(name)
        else:
            self._whole[name] = delta
            self.report.saved.append(name)

    def _save_whole(self) -> tuple[list[str], str]:
        """Stores changed norms with their modules, changed biases by themselves; what modules_to_save and bias say."""
        modules: dict[str, None] = {}
        bias, impossible = "none", []
        for name in self._in_order(self._whole):
            path = self.live.path(name)
            module, _, parameter = (path or "").rpartition(".")
            others = self.live.tensors_of(module) if path is not None else None
            if path is None or (parameter != "bias" and (not module or others is None or module in self._ranks)):
                impossible.append(name)
            elif parameter == "bias" and (
                module in self._ranks or any(self._is_matrix(n) for n in (others or {}).values())
            ):
                lora = module in self._ranks
                key = f"base_model.model.{module}.base_layer.bias" if lora else f"base_model.model.{path}"
                self._tensors[key] = self._changed(name)
                bias = "all" if bias == "all" or not lora else "lora_only"
            else:
                modules[module] = None
                for tensor, held in (others or {path: name}).items():
                    self._tensors[f"base_model.model.{tensor}"] = self._changed(held)
        if impossible:
            raise MismatchError(
                impossible,
                title="These changed tensors belong to no module that PEFT could save whole (leave them out with "
                "other='drop' (--other drop), or write a checkpoint instead)",
            )
        return list(modules), bias

    def _add_experts(self) -> list[str]:
        """Stores the experts' factors, all of one rank and zeros where nothing changed, as PEFT fuses them."""
        taken = self.live.fused_by_peft()
        alike = [module for module in self._ranks if module.rpartition(".")[2] in taken]
        if alike:
            raise MismatchError(
                sorted(alike),
                title="PEFT would take these modules for experts, by their names. Leave them out with skip, or write a "
                "checkpoint instead",
            )
        if not self._experts:
            return []
        changed = {leaf for name in self._experts for leaf in _EXPERT.findall(name)}
        # PEFT 0.21 loads the experts' last matrix alone, but not their first two without the last
        alone = changed <= {"w2"} or changed <= {"down_proj"}
        leaves = sorted(changed if alone else set().union(*(names for names in _SPELLINGS if names & changed)))
        rank = max(product.rank for product in self._experts.values())
        for name, info in self.base.infos.items():
            found = _EXPERT.search(name)
            if found is None or found.group(1) not in leaves:
                continue
            rows, columns = info.shape
            left, right = torch.zeros(rows, rank, dtype=self.dtype), torch.zeros(rank, columns, dtype=self.dtype)
            product = self._experts.get(name)
            if product is not None:
                left[:, : product.rank], right[: product.rank] = product.left, product.right
            key = f"base_model.model.{name.removesuffix('.weight')}"
            self._tensors[f"{key}.lora_A.weight"], self._tensors[f"{key}.lora_B.weight"] = right, left
        return leaves

    def _add_nothing(self) -> None:
        """A LoRA of zero on one module: PEFT loads no adapter without any, not even for its saved modules."""
        for name, info in self.base.infos.items():
            sites = self.live.sites(name) if len(info.shape) == 2 else []
            if len(sites) == 1 and sites[0].kind in ("linear", "in out"):
                rows, columns = info.shape
                self._add_factors(sites[0], LowRank(torch.zeros(rows, 1), torch.zeros(1, columns), info.shape))
                return
        raise OutputError(f"{self.out}: {self.base.label} has no matrix that PEFT could put a LoRA on.")

    def _is_matrix(self, name: str) -> bool:
        return len(self.base.infos[name].shape) > 1

    def _changed(self, name: str) -> Tensor:
        before = self.base.read(name)
        if name not in self._whole:
            return before.contiguous()
        delta = self._whole[name]
        return rounded(before.to(compute_dtype(before.dtype, delta.dtype)) + delta, before.dtype, where=name)[
            0
        ].contiguous()

    def _targets(self) -> list[str]:
        """`q_proj` where every module of that name is a target, else full paths."""
        targets: dict[str, None] = {}
        for module in sorted(self._ranks):
            leaf = module.rpartition(".")[2]
            targets[leaf if not leaf.isdigit() and self.live.alike(leaf) <= self._ranks.keys() else module] = None
        return list(targets)

    def take(self, name: str, start: int, piece: Tensor) -> None:
        """Takes a piece of a delta, in any order and from any thread; a delta is factored when it is whole.

        Args:
            name: the tensor of the base.
            start: first element of the piece in row-major order.
            piece: the elements.
        """
        numel = self.base.infos[name].numel
        with self._lock:
            if name not in self._pieces:
                self._pieces[name] = (torch.empty(numel, dtype=compute_dtype(piece.dtype)), 0)
            whole, filled = self._pieces[name]
            whole[start : start + piece.numel()] = piece.reshape(-1)
            self._pieces[name] = (whole, filled + piece.numel())
            if filled + piece.numel() < numel:
                return
            del self._pieces[name]
        self.add(name, whole.reshape(self.base.infos[name].shape))

    def finish(self, files: Callable[[AdapterReport], Mapping[str, str]] = lambda _: {}) -> AdapterReport:
        """Writes the adapter and moves it to `out`.

        Args:
            files: makes further text files to put beside it from the report, name to content.

        Raises:
            MismatchError: tensors changed that no LoRA can hold; all of them are named.
            OutputError: nothing changed, or the output cannot be written.
        """
        if self._refused:
            raise MismatchError(
                self._in_order(self._refused),
                title=f"{len(self._refused)} tensors changed that LoRA cannot hold (norms, biases and the like). Save "
                "them whole with other='save' (--other save), leave them out with other='drop', or write a checkpoint instead",
            )
        if self._pieces:
            raise OutputError(f"{self.out}: the deltas of {shortened(sorted(self._pieces))} are not whole.")
        from blake3 import blake3

        saved, bias = self._save_whole()
        if not self._tensors and not self._experts:
            raise OutputError(f"{self.out}: nothing changed, so there is no adapter to write.")
        experts = self._add_experts()
        if not self._ranks and not experts:
            self._add_nothing()
        counts = Counter(self._ranks.values())
        common = max(counts, key=lambda rank: (counts[rank], rank), default=1)
        # PEFT fuses experts with the configuration's own rank
        common = max((product.rank for product in self._experts.values()), default=common)
        patterns = {f"^{re.escape(module)}": rank for module, rank in sorted(self._ranks.items()) if rank != common}
        config = {
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_name,
            "inference_mode": True,
            "r": common,
            "lora_alpha": common,
            "use_rslora": False,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": [*self._targets(), *experts],
            "modules_to_save": saved or None,
            "bias": bias,
            "fan_in_fan_out": self._in_out,
            "lora_dropout": 0.0,
            "init_lora_weights": True,
        }
        total, missed = (math.fsum(norms[part] ** 2 for norms in self._norms.values()) for part in (0, 1))
        self.report.error = math.sqrt(missed / total) if total else 0.0
        self.report.parameters = sum(tensor.numel() for tensor in self._tensors.values())
        # the order in which deltas came is that of threads; what is written does not depend on it
        kept = {entry.name: entry for entry in self.report.kept}
        self.report.kept = [kept[name] for name in self._in_order(kept)]
        self.report.saved, self.report.dropped = self._in_order(self.report.saved), self._in_order(self.report.dropped)
        told = (json.dumps(config, indent=2) + "\n").encode()
        self.written = {
            "config": blake3(told).hexdigest(),
            "digests": {name: blake3(raw_bytes(tensor)).hexdigest() for name, tensor in sorted(self._tensors.items())},
        }
        self._publish(told, files(self.report))
        return self.report

    def _in_order(self, names: Iterable[str]) -> list[str]:
        found = set(names)
        return [name for name in self.base.infos if name in found]

    def _publish(self, config: bytes, files: Mapping[str, str]) -> None:
        from safetensors.torch import save_file

        partial = self.out.with_name(f"{self.out.name}.partial-{os.getpid()}")
        old = self.out.with_name(f"{self.out.name}.replaced-{os.getpid()}")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            save_file(_apart(self._tensors), partial / "adapter_model.safetensors", {"format": "pt"})
            with open(partial / "adapter_model.safetensors", "rb") as file:
                os.fsync(file.fileno())
            write_durably(partial / "adapter_config.json", config)
            for name, content in files.items():
                write_durably(partial / name, content.encode())
            if os.path.lexists(self.out):
                if not self.overwrite:
                    raise OutputExistsError(f"{self.out}: appeared while this run was writing. Refusing to replace it.")
                self.out.rename(old)
            partial.rename(self.out)
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be written ({error.strerror}).") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors.clear()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by name, each in memory of its own: modules that share an embedding share its factors until here."""
    seen: set[int] = set()
    found = {}
    for name, tensor in sorted(tensors.items()):
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def write_adapter(
    deltas: DeltaSource | TaskVector,
    base: TensorSource,
    out: "str | os.PathLike[str]",
    *,
    rank: "Rank | str | int" = "exact",
    only: Sequence[str] = ("*",),
    skip: Sequence[str] = (),
    other: Other = "refuse",
    dtype: "torch.dtype | str" = torch.float32,
    solver: Solver = "auto",
    seed: int = 0,
    base_name: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
) -> AdapterReport:
    """Writes differences to a base as a PEFT adapter, reading one tensor at a time.

    A sum of LoRA adapters (`TaskVector` keeps it factored) is never made dense: `exact` puts the factors side by side,
    a rank or an energy decomposes the factors alone.

    Args:
        deltas: the differences: a task vector, an adapter, any source of deltas.
        base: the model they are differences to.
        out: the adapter's folder.
        rank: `rank=16`, `energy=0.95` or `exact`, see `Rank`.
        only: shell-style patterns of the tensors to write.
        skip: shell-style patterns of tensors to leave out.
        other: see `AdapterWriter`, as all that follow.

    Raises:
        MismatchError: tensors changed that LoRA cannot hold and `other` is "refuse"; all of them are named.
        OutputExistsError: `out` is taken.
    """
    return _written(
        deltas, base, out, only, skip, {}, overwrite=overwrite, rank=rank, other=other, dtype=dtype, solver=solver, seed=seed,
        base_name=base_name, task_type=task_type,
    )  # fmt: skip


def _written(
    deltas: DeltaSource | TaskVector,
    base: TensorSource,
    out: "str | os.PathLike[str]",
    only: Sequence[str],
    skip: Sequence[str],
    facts: Mapping[str, Any],
    *,
    overwrite: bool,
    **options: Any,
) -> AdapterReport:
    """Writes the adapter; with facts also its provenance."""
    with AdapterWriter(out, base, overwrite=overwrite, **options) as writer:
        _add_all(writer, deltas, only, skip)
        return writer.finish(lambda report: _provenance(facts, options, writer, report) if facts else {})


def _provenance(
    facts: Mapping[str, Any], options: Mapping[str, Any], writer: AdapterWriter, report: AdapterReport
) -> dict[str, str]:
    """taskvec.json: how the adapter was made, what was found, and the digests of what is written."""
    told = {"format": FORMAT, "version": 1, **facts, "options": _plain(options), **report.as_dict(), **writer.written}
    return {"taskvec.json": json.dumps(told, indent=2) + "\n"}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they can be written and given again."""
    given = {key: dtype_name(value) if isinstance(value, torch.dtype) else value for key, value in options.items()}
    rank = Rank.parse(given["rank"])
    return given | {"rank": "exact" if rank.kind == "exact" else f"{rank.kind}={rank.value}"}


def _add_all(
    writer: AdapterWriter, deltas: DeltaSource | TaskVector, only: Sequence[str] = ("*",), skip: Sequence[str] = ()
) -> None:
    names = [name for name in deltas.infos if name not in deltas.aliases]
    # the small ones first, so that what LoRA cannot hold is found before the long work
    for name in sorted(names, key=lambda name: len(deltas.infos[name].shape) > 1):
        wanted = any(fnmatchcase(name, pattern) for pattern in only)
        if wanted and not any(fnmatchcase(name, pattern) for pattern in skip):
            product = deltas.low_rank(name)
            writer.add(name, deltas.read(name) if product is None else product)


def extract_lora(
    base: TensorSource,
    tuned: TensorSource,
    out: "str | os.PathLike[str]",
    *,
    rank: "Rank | str | int",
    only: Sequence[str] = ("*",),
    skip: Sequence[str] = (),
    other: Other = "refuse",
    dtype: "torch.dtype | str" = torch.float32,
    solver: Solver = "auto",
    seed: int = 0,
    base_name: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
) -> AdapterReport:
    """The difference of two models as a LoRA adapter on the first. See `write_adapter`.

    Raises:
        MismatchError: the models do not fit together, or tensors changed that LoRA cannot hold.
        OutputExistsError: `out` is taken.
    """
    check_output(Path(out), paths_of(tuned), overwrite=overwrite)
    where = [getattr(source, "path", None) for source in (base, tuned)]
    facts: dict[str, Any] = {}
    if all(where):  # in memory, nothing could be made again
        patterns = {"only": list(only), "skip": list(skip)}
        inputs = [_input(name, source) for name, source in (("base", base), ("tuned", tuned))]
        facts = {"extracted": {"base": str(where[0]), "tuned": str(where[1]), **patterns}, "inputs": inputs}
    return _written(
        TaskVector.between(base, tuned), base, out, only, skip, facts, overwrite=overwrite, rank=rank, other=other, dtype=dtype,
        solver=solver, seed=seed, base_name=base_name, task_type=task_type,
    )  # fmt: skip


def _input(name: str, source: TensorSource) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "path": source.label}
    if isinstance(source, Adapter | Checkpoint):
        entry["content_hash"] = source.content_hash()
    return entry


# -- a recipe's result as an adapter -----------------------------------------------------------------------------------


class _WeightedSum:
    """The merged delta of a linear method over adapters, kept factored: sum of weight * scale * left @ right."""

    def __init__(self, prepared: Prepared):
        self.prepared = prepared
        self.label = " + ".join(task.name for task in prepared.tasks)
        self.aliases: Mapping[str, str] = {}
        self.infos: Mapping[str, TensorInfo] = {
            name: prepared.deltas.infos[name]
            for name in prepared.merged
            if any(name in task.source.infos for task in prepared.tasks)
        }

    def _parts(self, name: str) -> list[tuple[Tensor, DeltaSource]]:
        """The number (or one for each element) that multiplies each task's delta."""
        prepared = self.prepared
        weights = prepared.weights(name, 0, self.infos[name].numel).double()
        if prepared.space == "weight" or prepared.parameters.get("normalize"):
            weights = weights / weights.sum(0)
        else:
            weights = weights * float(value_at(prepared.recipe.scale, name, prepared.depth))
        pairs = zip(weights, prepared.tasks)
        return [(w, task.source) for w, task in pairs if name in task.source.infos]  # type: ignore[misc]

    def low_rank(self, name: str) -> LowRank | None:
        parts = self._parts(name)
        if any(weight.numel() > 1 for weight, _ in parts):
            return None
        products = [source.low_rank(name) for _, source in parts]
        whole = [product for product in products if product is not None]
        return summed(whole, [float(weight) for weight, _ in parts]) if len(whole) == len(parts) else None

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        total = torch.zeros(info.shape, dtype=info.dtype)
        for weight, source in self._parts(name):
            total += source.read(name).to(info.dtype) * weight.to(info.dtype).reshape(info.shape if weight.ndim else ())
        return total

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name).reshape(-1)[start:stop]


class _Aligned:
    """KnOTS of adapters, kept factored: it commutes with an orthonormal basis of the columns, which the factors give.

    With Δ_t = L_t R_t and [L_1 … L_T] = Q U (a thin QR), Δ_t = Q (U_t R_t); the method runs on the few rows of U_t R_t.
    """

    def __init__(self, prepared: Prepared):
        self.prepared = prepared
        self.label = f"knots of {' and '.join(task.name for task in prepared.tasks)}"
        self.aliases: Mapping[str, str] = {}
        self.infos: Mapping[str, TensorInfo] = {
            name: prepared.deltas.infos[name]
            for name in prepared.merged
            if any(name in task.source.infos for task in prepared.tasks)
        }

    def _merged(self, name: str, stack: Sequence[Tensor]) -> Tensor:
        prepared = self.prepared
        given = {key: resolved(value, name, prepared.depth) for key, value in prepared.parameters.items()}
        weights = prepared.weights(name, 0, 1).tolist()
        found = merge_stacks(
            "knots", {name: stack}, weights=weights, tasks=[task.name for task in prepared.tasks], **given
        )
        merged: Tensor = found[name]
        return merged * float(value_at(prepared.recipe.scale, name, prepared.depth))

    def low_rank(self, name: str) -> LowRank | None:
        sources = [task.source if name in task.source.infos else None for task in self.prepared.tasks]
        products = [None if source is None else source.low_rank(name) for source in sources]  # type: ignore[attr-defined]
        if any(product is None and source is not None for source, product in zip(sources, products)):
            return None
        ranks = [0 if product is None else product.rank for product in products]
        shape = self.infos[name].shape
        averaged = tuple(resolved(self.prepared.parameters.get("averaged", ()), name, self.prepared.depth))
        rows, columns = matrix_shape(shape)
        if sum(ranks) < 2 or sum(ranks) >= rows or len(shape) != 2 or not is_weight_matrix(name, shape, averaged):
            return None
        basis, upper = torch.linalg.qr(torch.cat([p.left for p in products if p is not None], 1))
        parts = iter(upper.split([rank for rank in ranks if rank], 1))
        stack = [
            torch.zeros(len(upper), columns, dtype=basis.dtype) if p is None else next(parts) @ p.right
            for p in products
        ]
        return LowRank(basis, self._merged(name, stack), shape)

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        tile = self.prepared.deltas.tile(name, 0, info.numel)
        return self._merged(name, list(tile.stack.reshape(-1, *info.shape)))

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name).reshape(-1)[start:stop]


def _aligned_in_adapters(prepared: Prepared) -> bool:
    """Whether the merge is KnOTS of adapters and nothing else, with one weight for each task and tensor."""
    recipe = prepared.recipe
    plain = not recipe.preprocess and not recipe.postprocess and prepared.masks is None and recipe.coefficients is None
    deltas = all(task.is_delta and hasattr(task.source, "low_rank") for task in prepared.tasks)
    return plain and deltas and prepared.method.name == "knots"


def _linear_in_adapters(prepared: Prepared) -> bool:
    """Whether the merged delta is a weighted sum of the tasks' deltas, and these may be products."""
    recipe, kind = prepared.recipe, prepared.method
    plain = not recipe.preprocess and not recipe.postprocess and prepared.masks is None
    if not plain or not all(task.is_delta and hasattr(task.source, "low_rank") for task in prepared.tasks):
        return False
    if kind.name == "task_arithmetic":
        return not prepared.parameters.get("normalize") or recipe.scale == 1.0
    return kind.name in ("average", "linear") and bool(prepared.parameters.get("normalize", True))


def merge_to_adapter(
    recipe: Recipe,
    out: "str | os.PathLike[str]",
    *,
    rank: "Rank | str | int" = "exact",
    other: Other = "refuse",
    dtype: "torch.dtype | str" = torch.float32,
    solver: Solver = "auto",
    base_name: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> AdapterReport:
    """Carries out a recipe and writes the merged delta as a PEFT adapter on its base.

    A weighted sum of adapters (task arithmetic, average, linear) stays factored from end to end. Any other method, or
    any whole model among the tasks, is merged tensor by tensor, and each merged delta is decomposed when it is whole.

    Args:
        recipe: what to merge, and how; it must name a base.
        out: the adapter's folder. It appears whole or not at all.
        rank, other, dtype, solver, base_name, task_type, overwrite: see `AdapterWriter`.
        progress: called now and then, from several threads.
        notice: called with messages for people.

    Raises:
        RecipeError: everything that headers can tell is wrong, at once.
        MismatchError: tensors changed that LoRA cannot hold and `other` is "refuse"; all of them are named.
        OutputError: the output cannot be written.
    """
    kept = Rank.parse(rank)
    if recipe.base is None:
        raise RecipeError("base: an adapter is a change to a base; name it")
    keys = ("slices", "modules", "stages", "tokenizer", "chat_template")
    given = [key for key in keys if getattr(recipe, key)]
    if given:
        raise RecipeError(
            f"{', '.join(given)}: an adapter changes the tensors of its base as they are, and with {' and '.join(given)} the "
            "result may have other layers, rows or parts than the base. Write a checkpoint (without --out-adapter); where it has "
            "the base's shapes after all, `taskvec extract-lora BASE CHECKPOINT OUT` makes the adapter."
        )
    if recipe.resize or recipe.exclude:
        raise RecipeError("resize, exclude: they change the base, and an adapter leaves its base as it is")
    prepared = prepare(recipe, out, overwrite=overwrite)
    for warning in prepared.warnings:
        notice(f"warning: {warning}")
    options: dict[str, Any] = {
        "rank": kept,
        "other": other,
        "dtype": dtype,
        "solver": solver,
        "seed": recipe.seed,
        "base_name": base_name if base_name is not None else recipe.base,
        "task_type": task_type,
    }
    with AdapterWriter(out, prepared.base, overwrite=overwrite, **options) as writer:
        if _linear_in_adapters(prepared):
            _add_all(writer, _WeightedSum(prepared))
        elif _aligned_in_adapters(prepared):
            _add_all(writer, _Aligned(prepared))
        else:
            how = prepared.options()
            sweep(
                prepared.deltas,
                prepared.stages(),
                lambda tile: _take(prepared, writer, tile),
                scope=prepared.scope,
                options=Options(how.memory, how.workers, how.device, how.tile, progress),
            )
        facts = {
            "recipe": recipe.data(),
            "method": {"name": prepared.method.name, "parameters": prepared.parameters, "statistics": prepared.scope},
            "rank": str(rank),
            "inputs": [_input(name, source) for name, source in prepared.originals.items()],
        }
        return writer.finish(lambda report: _provenance(facts, {**options, "rank": rank}, writer, report))


def verify_adapter(path: "str | os.PathLike[str]", *, deep: bool = False) -> dict[str, Any]:
    """Checks an adapter that this library wrote against what was recorded for it.

    Args:
        path: the adapter's folder.
        deep: also make it again, in a temporary place, and compare bit for bit.

    Returns:
        What was checked.

    Raises:
        NotAModelError: the folder has no provenance of ours.
        BaseMismatchError: it cannot be made again, because inputs have changed since.
        VerificationError: content differs; names tensors or files.
    """
    from blake3 import blake3

    where = Path(path)
    found = adapter_provenance(where)
    held = Checkpoint.open_file(where / "adapter_model.safetensors")
    digests = {name: blake3(raw_bytes(held.read(name))).hexdigest() for name in held.infos}
    wrong = [name for name in {**found["digests"], **digests} if digests.get(name) != found["digests"].get(name)]
    if wrong:
        raise VerificationError(f"{where}: {shortened(sorted(wrong))} differ from what was recorded.")
    if blake3((where / "adapter_config.json").read_bytes()).hexdigest() != found["config"]:
        raise VerificationError(f"{where}: adapter_config.json changed since the adapter was written.")
    if deep:
        with tempfile.TemporaryDirectory(prefix=f".{where.name}.verify-", dir=where.parent) as place:
            again = Path(place) / "again"
            options = dict(found["options"])
            if "recipe" in found:
                options.pop("seed")  # the recipe's
                merge_to_adapter(Recipe.from_data(found["recipe"], where="taskvec.json"), again, **options)
            else:
                made = found["extracted"]
                base, tuned = (Checkpoint.open(made[key]) for key in ("base", "tuned"))
                extract_lora(base, tuned, again, only=made["only"], skip=made["skip"], **options)
            now = adapter_provenance(again)
            pairs = zip(found["inputs"], now["inputs"])
            changed = [old["name"] for old, new in pairs if old.get("content_hash") != new.get("content_hash")]
            if changed:
                raise BaseMismatchError(
                    f"{where}: cannot be made again; these inputs have changed since: {shortened(changed)}"
                )
            if now["digests"] != digests:
                other = [name for name in digests if now["digests"].get(name) != digests[name]]
                raise VerificationError(
                    f"{where}: {shortened(other)} come out otherwise when the adapter is made again."
                )
    return {"path": str(where), "tensors": len(digests), "files": 1, "deep": deep}


def adapter_provenance(path: Path) -> dict[str, Any]:
    """What taskvec.json says of an adapter that this library wrote.

    Raises:
        NotAModelError: there is none.
    """
    try:
        found = json.loads((path / "taskvec.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise NotAModelError(
            f"{path}: an adapter without provenance (taskvec.json); it was not written here."
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or "digests" not in found:
        raise NotAModelError(f"{path}: taskvec.json holds no digests of an adapter that taskvec wrote.")
    return found


def _take(prepared: Prepared, writer: AdapterWriter, tile: Tile) -> None:
    values = tile.merged
    assert values is not None
    if prepared.space == "weight":
        assert tile.base is not None
        values = values.reshape(-1) - tile.base.reshape(-1)
    if tile.name not in prepared.base.aliases:
        writer.take(tile.name, tile.start, values)
