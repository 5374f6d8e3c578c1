"""Base plus learned combinations of task vectors, written into an ordinary module; gradients pulled back from it.

W_b(c) = θ0_b + Σ_t c_tb τ_tb, hence ∂L/∂c_tb = ⟨∂L/∂W_b, τ_tb⟩ (aTLAS, arXiv:2407.02880). Any coarser or finer
coefficient is a sum over other elements of the same product, so every granularity has the same two passes over the task
vectors: one to compose, one for the gradient. The authors' code runs autograd through the composition instead; the
numbers are the same.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from merging.learn.bank import CHUNK, Bank, BankDtype, GivenDeltas, Place
from merging.learn.factored import Probes
from merging.learn.inplace import InPlace, PullBack
from taskvec.blocks import layer_key
from taskvec.coefficients import MOST_PARTS, Coefficients, Region, column_names, partition_index
from taskvec.errors import LearningError, MismatchError, NonFiniteError, Problems, UsageError, did_you_mean, shortened
from taskvec.precision import compute_dtype
from taskvec.source import matches, names_matching

Granularity = Literal["global", "layer", "block", "matrix", "row", "column", "qkv"]
GRANULARITIES: tuple[str, ...] = ("global", "layer", "block", "matrix", "row", "column", "qkv")
Mode = Literal["nonlinear", "linear"]
Vector = Any
"""A `TaskVector`, or a mapping of tensor names to deltas (tensors, or `LowRank` factors)."""

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Layout:
    """Columns, and which tensor follows which of them."""

    runs: tuple[tuple[str, int], ...]
    regions: Mapping[str, Region]


def layout(
    shapes: Mapping[str, tuple[int, ...]],
    granularity: Granularity | Callable[[str], str | None],
    fused: Mapping[str, Region] | None = None,
) -> Layout:
    """Columns for these tensors.

    Args:
        shapes: tensor name to shape, in the order of the columns.
        granularity: see `Composition`.
        fused: for `qkv`, how each fused projection is cut (column 0).
    """
    runs: list[tuple[str, int]] = []
    regions: dict[str, Region] = {}
    columns: dict[str, int] = {}
    count = 0
    for name, shape in shapes.items():
        numel = 1
        for size in shape:
            numel *= size
        outer, parts, inner = 1, 1, numel
        if callable(granularity):
            label = granularity(name)
            if label is not None and not isinstance(label, str):
                raise UsageError(f"granularity: gave {label!r} for {name}; expected the name of a group, or None.")
        elif granularity == "global":
            label = "all"
        elif granularity == "layer":
            label = layer_key(name)
        else:
            label = name
            if granularity == "matrix" and len(shape) != 2:
                label = None
            elif granularity == "row" and len(shape) >= 2:
                parts, inner = shape[0], numel // max(shape[0], 1)
            elif granularity == "column" and len(shape) >= 2:
                outer, parts, inner = shape[0], shape[1], numel // max(shape[0] * shape[1], 1)
            elif granularity == "qkv" and fused and name in fused:
                outer, parts, inner = fused[name].outer, fused[name].parts, fused[name].inner
        if label is None:
            continue
        if label not in columns:
            columns[label] = count
            runs.append((label, parts))
            count += parts
        regions[name] = Region(columns[label], outer, parts, inner)
    return Layout(tuple(runs), regions)


def fused_projections(model: nn.Module) -> dict[str, Region]:
    """How each fused query-key-value tensor of the model is cut, by the conventions of torch and transformers.

    `in_proj_weight` (torch), `qkv` (timm) and the like stack q, k, v along the rows; GPT-2's `c_attn` stores its input
    first and stacks them along the columns; `query_key_value` (GPT-NeoX, BLOOM, Falcon) interleaves them head by head,
    and is cut only where the number of heads divides it (grouped or multi-query attention is left whole).
    """
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    found: dict[str, Region] = {}
    for name, parameter in model.named_parameters():
        shape, numel = tuple(parameter.shape), parameter.numel()
        module, _, own = name.rpartition(".")
        owner = module.rpartition(".")[2] if own in ("weight", "bias") else own
        if not shape or numel == 0:
            continue
        if owner in ("in_proj_weight", "in_proj_bias", "qkv", "qkv_proj", "Wqkv", "in_proj") and shape[0] % 3 == 0:
            square = len(shape) < 2 or shape[0] == 3 * shape[1]
            if square:
                found[name] = Region(0, 1, 3, numel // 3)
        elif owner == "c_attn" and shape[-1] % 3 == 0 and (len(shape) < 2 or shape[1] == 3 * shape[0]):
            found[name] = Region(0, numel // shape[-1], 3, shape[-1] // 3)
        elif owner == "query_key_value" and heads and shape[0] % (3 * heads) == 0:
            square = len(shape) < 2 or shape[0] == 3 * shape[1]
            if square:
                found[name] = Region(0, int(heads), 3, numel // (3 * int(heads)))
    return found


class Composition:
    """A module whose weights are its own plus learned combinations of task vectors.

    >>> composition = Composition(model, {"math": math, "code": code})          # doctest: +SKIP
    >>> with composition:                                                       # the base comes back afterwards
    ...     loss, grad = composition.gradient(lambda: loss_of(model(batch)))
    ...     composition.coefficients -= 0.1 * grad

    Args:
        model: any module. Its own parameters are written; it stays an ordinary module for everything else (several
            passes, gradient checkpointing, autocast, hooks).
        vectors: task name to task vector. Matched by name; a tensor missing in a vector has a delta of zero there.
        granularity: what one coefficient scales: `global` a whole task vector, `layer` one layer of it, `block` one
            named parameter (aTLAS; AdaMerging's layer-wise), `matrix` as block but only two-dimensional tensors, the
            others keep the base, `row` or `column` one row or column of a tensor (tensors of fewer than two dimensions
            have one coefficient), `qkv` as block with q, k, v of fused projections apart, or a function from a
            parameter's name to the name of its group (None: keep the base).
        partitions: aTLAS x K. `(k, seed)`: every element of a block follows one of k coefficients, by a counter-based
            hash of (seed, tensor name, element). A mapping of names to integer tensors gives the parts explicitly, and
            then only the tensors it names are composed (as the authors' code, which composes two-dimensional ones).
        mode: `linear` makes `model(x)` return f(x; θ0) + J(x; θ0) δ(c), the first-order model, while composed.
        exclude: shell-style patterns of parameters that keep their base value.
        coefficients: initial value: one number, a tensor, or a `Coefficients` file of the same tasks and blocks.
        bank: where the task vectors lie: beside the `model`, in `cpu` memory, `pinned` memory, or on `disk`.
        bank_dtype: how dense task vectors are stored: `float32` (float64 for a float64 model), `bfloat16`, or `float16`
            with a power-of-two scale per tensor. Sums are made in float32 (float64).
        bank_folder: where the file of `disk` goes.
        statistics: BatchNorm running statistics: `keep` the base's, or `average` those of the tuned models.
            `recompute_statistics_` measures them anew on data.
        factored: pull gradients of low-rank task vectors back through their factors, and those of embedding tables
            through the rows in the batch, so that no full weight gradient is made for them. The first call of
            `gradient` makes both and compares; a tensor that is also used in another way than by its own module stays
            dense.
        kernels: use the fused GPU kernels where they apply (`auto`), or never.
        names: parameter to its name in the checkpoint, where that is another one: random partitions are keyed by it, so
            that the saved file says the same of the checkpoint.

    Attributes:
        tasks: names of the task vectors, in row order.
        blocks: names of the columns, in order. A block in which every task vector is zero keeps its column, with a
            gradient of zero, and costs nothing.
        coefficients: [task, block] or [task, block, part], float32 (float64 for a float64 model). Change it in place,
            or assign a tensor of the same shape.

    Raises:
        MismatchError: a task vector does not fit the model: unknown names, other shapes; all of them at once.
        LearningError: nothing is left to compose.
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: Mapping[str, Vector],
        granularity: Granularity | Callable[[str], str | None] = "block",
        partitions: tuple[int, int] | Mapping[str, Tensor] | None = None,
        mode: Mode = "nonlinear",
        *,
        exclude: Sequence[str] = (),
        coefficients: "float | Tensor | Coefficients | None" = None,
        bank: Place = "model",
        bank_dtype: BankDtype = "float32",
        bank_folder: Path | None = None,
        statistics: Literal["keep", "average"] = "keep",
        factored: bool = True,
        kernels: Literal["auto", "never"] = "auto",
        names: Mapping[str, str] | None = None,
    ):
        _check_words(granularity, mode, statistics, vectors)
        self.model = model
        self.mode: Mode = mode
        self.granularity = granularity if isinstance(granularity, str) else "custom"
        self.tasks = tuple(vectors)
        self.statistics = statistics
        self._stored_names = dict(names or {})
        sources = {task: _readable(vector, task) for task, vector in vectors.items()}
        own = dict(model.named_parameters())
        self.aliases = _aliases(model, own)
        excluded = set(names_matching(list(own), exclude))
        shapes = {name: tuple(p.shape) for name, p in own.items() if p.dtype.is_floating_point and name not in excluded}
        fused = fused_projections(model) if granularity == "qkv" else None
        self._layout = layout(shapes, granularity, fused)
        self._partitions: tuple[int, int] | None = None
        self._indices: dict[str, Tensor] = {}
        self.parts = 0
        composed = list(self._layout.regions)
        if partitions is not None:
            composed = self._partitioned(partitions, shapes, composed)
        self._composable = frozenset(composed)
        self._check_names(sources, own, exclude)
        kinds = {name: compute_dtype(own[name].dtype) for name in composed}
        wanted = {name: (shapes[name], own[name].device, kinds[name]) for name in composed}
        self.bank = Bank(
            cast(Mapping[str, GivenDeltas], sources),
            wanted,
            place=bank,
            dtype=bank_dtype,
            renamed=self.aliases,
            folder=bank_folder,
        )
        if not self.bank.blocks:
            raise LearningError(
                "Every task vector is zero on every tensor that would be composed; nothing can be learned."
            )
        self._weights = InPlace(model, self.bank.blocks)
        self._sums = kinds
        any_name = next(iter(self.bank.blocks))
        self._device = own[any_name].device
        dtype = torch.float64 if torch.float64 in kinds.values() else torch.float32
        columns = sum(count for _, count in self._layout.runs)
        shape = (len(self.tasks), columns, self.parts) if self.parts else (len(self.tasks), columns)
        self._coefficients = torch.zeros(shape, dtype=dtype, device=self._device)
        self._frozen_columns: Tensor | None = None
        self._needed: frozenset[str] | None = None
        self._forward_before: Any = None
        self._forward_replaced = False
        self._is_composed = False
        self._depth = 0
        self._averaged = self._averaged_statistics(sources) if statistics == "average" else {}
        self._statistics_before: dict[str, Tensor] = {}
        self._probes = Probes(self) if factored and mode == "nonlinear" else None
        self._fused: Any = None
        if kernels == "auto" and mode == "nonlinear" and self._device.type == "cuda":
            self._fused = self._fused_kernels()
        if coefficients is not None:
            self.set_coefficients(coefficients)

    # -- what there is -----------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return column_names(self._layout.runs)

    @property
    def composed(self) -> tuple[str, ...]:
        """Parameters that at least one task vector changes; only these are written."""
        return tuple(self.bank.blocks)

    @property
    def coefficients(self) -> Annotated[Tensor, "task block"]:
        """The learned numbers, [task, block] or [task, block, part]; `compose_` and `gradient` read them anew."""
        return self._coefficients

    @coefficients.setter
    def coefficients(self, values: Tensor) -> None:
        self.set_coefficients(values)

    @torch.no_grad()
    def set_coefficients(self, values: "float | Tensor | Coefficients") -> None:
        """Write one number everywhere, a tensor of the same shape, or the numbers of a file.

        Raises:
            UsageError: another shape.
            MismatchError: a file of other tasks, blocks or partitions.
        """
        if isinstance(values, Coefficients):
            problems = Problems()
            if values.tasks != self.tasks:
                problems.add(f"the file's tasks are {list(values.tasks)}, here they are {list(self.tasks)}.")
            if values.runs != self._layout.runs:
                problems.add(f"the file's blocks are other ones ({len(values.blocks)}; here {len(self.blocks)}).")
            if values.partitions != self._partitions or values.parts != max(self.parts, 1):
                problems.add(f"the file's partitions are {values.partitions}, here they are {self._partitions}.")
            problems.raise_if_any(MismatchError)
            values = values.values
        if isinstance(values, Tensor):
            if values.dim() == 1 and self._coefficients.shape == (*values.shape, 1):
                values = values[:, None]  # one block: a number for each task says the same
            if values.shape != self._coefficients.shape:
                raise UsageError(
                    f"coefficients: shape {list(values.shape)}; expected {list(self._coefficients.shape)} "
                    f"([task, block{', part' if self.parts else ''}])."
                )
            self._coefficients.copy_(values)
        else:
            self._coefficients.fill_(values)

    @property
    def live(self) -> Annotated[Tensor, "task block"]:
        """Whether a coefficient changes anything: False where its task vector is zero on all of its block."""
        found = torch.zeros(self._flat().shape, dtype=torch.bool)
        for name, block in self.bank.blocks.items():
            columns = slice(*self._columns(name))
            for task in (*block.tasks, *block.factors):
                found[task, columns] = True
        return found.view(self._coefficients.shape).to(self._device)

    @property
    def verified(self) -> frozenset[str]:
        """Tensors whose gradient is known to be had without a weight gradient; see `factored`."""
        return self._probes.verified if self._probes is not None else frozenset()

    def trust(self, names: Iterable[str]) -> None:
        """Take up `verified` of an interrupted run: rounding then is that of an uninterrupted one."""
        if self._probes is not None:
            self._probes.trust(names)

    def learned(self, **facts: Any) -> Coefficients:
        """The coefficients as a file, ready to be saved. `facts` fill further fields of `Coefficients`."""
        buffers = [n for n, b in self.model.named_buffers() if b.is_floating_point()]
        own = [name for name, _ in self.model.named_parameters()]
        regions = {name: self._layout.regions[name] for name in own if name in self._composable}
        kept = tuple(name for name in (*own, *buffers) if name not in regions)
        known: dict[str, Any] = {
            "values": self._coefficients.detach().cpu().clone(),
            "tasks": self.tasks,
            "runs": self._layout.runs,
            "regions": regions,
            "kept": kept,
            "aliases": self.aliases,
            "granularity": self.granularity,
            "partitions": self._partitions,
            "indices": {name: index.cpu() for name, index in self._indices.items()},
            "mode": self.mode,
            "statistics": self.statistics,
        }
        return Coefficients(**{**known, **facts})

    # -- composing ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compose_(self) -> Self:
        """Write θ0 + Σ c ⊙ τ into the module's own parameters (`linear`: make its forward the first-order model).

        Raises:
            NonFiniteError: a coefficient is NaN or infinite.
        """
        bad = (~torch.isfinite(self._flat())).nonzero().tolist()
        if bad:
            task, column = bad[0]
            block = self.blocks[column // max(self.parts, 1)]
            raise NonFiniteError(
                f"coefficient of task {self.tasks[task]!r} and block {block}", "the composition", len(bad)
            )
        self._compose(rows=False)
        return self

    @torch.no_grad()
    def _compose(self, *, rows: bool) -> None:
        """Compose; with `rows`, embedding tables that go by rows are composed where and when they are looked up."""
        if self.mode == "linear":
            self._linearise()
        else:
            left: frozenset[str] = frozenset()
            if self._probes is not None:
                self._probes.end_rows()
                if rows:
                    left = self._probes.rows
                    self._probes.begin_rows()
            if self._fused is not None:
                self._fused.compose_(self._flat())
                left |= self._fused.names
            for name in self.bank.blocks:
                if name not in left:
                    self._weights.write_(name, self.merged(name))
        self._write_statistics()
        self._is_composed = True

    @torch.no_grad()
    def restore_(self) -> Self:
        """Write the base back, bit for bit."""
        self._own_forward()
        if self._probes is not None:
            self._probes.end_rows()
        if self.mode == "nonlinear":
            self._weights.restore_()
        buffers = dict(self.model.named_buffers())
        for name, before in self._statistics_before.items():
            buffers[name].copy_(before)
        self._statistics_before = {}
        self._is_composed = False
        return self

    def __enter__(self) -> Self:
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.restore_()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output at the current coefficients; composes if nothing is composed."""
        if not self._is_composed:
            self.compose_()
        return self.model(*args, **kwargs)

    def merged(self, name: str) -> Tensor:
        """The merged value of one parameter at the current coefficients, in the dtype of the sums; writes nothing."""
        base = self._weights.base[name]
        values = base.to(self._sums[name], copy=True).reshape(-1)
        self._add_deltas(name, values)
        return values.view(base.shape)

    def tangent(self, name: str) -> Tensor:
        """Σ_t c_t ⊙ τ_t of one parameter, in the dtype of the sums."""
        base = self._weights.base[name]
        values = torch.zeros(base.numel(), dtype=self._sums[name], device=base.device)
        self._add_deltas(name, values)
        return values.view(base.shape)

    def _add_deltas(self, name: str, values: Tensor) -> None:
        """Values += Σ_t c_t ⊙ τ_t; the dense ones in task order, then the factors."""
        block = self.bank.blocks[name]
        region = self._layout.regions[name]
        weights = self._block_weights(name).to(values)
        if block.tasks:
            stored = self.bank.values(name)
            dense = weights[list(block.tasks)]
            if block.scales is not None:
                dense = dense * block.scales[:, None]
            if self._is_one_number(name):
                _add_combination(values, dense[:, 0], stored)
            elif self._indexed(name):
                index = self._index(name, values.device)
                for task in range(len(block.tasks)):
                    values.addcmul_(dense[task][index], stored[task].to(values.dtype))
            else:
                view = values.view(region.outer, region.parts, region.inner)
                for task in range(len(block.tasks)):
                    view.addcmul_(dense[task][None, :, None], stored[task].to(values.dtype).view(view.shape))
        if block.factors:
            self._add_factors(name, values, weights)

    def _add_factors(self, name: str, values: Tensor, weights: Tensor) -> None:
        factors = self.bank.factors(name)
        if self._is_one_number(name):
            left = torch.cat([weights[task, 0] * f.left for task, f in factors.items()], dim=1)
            right = torch.cat([f.right for f in factors.values()], dim=0)
            values.view(left.shape[0], right.shape[1]).addmm_(left, right)
            return
        for task, f in factors.items():
            values.addcmul_(self._expanded(name, weights[task]), f.dense().reshape(-1))

    def _expanded(self, name: str, weights: Tensor) -> Tensor:
        """[numel]: the weight of each element, from the weights of this tensor's columns."""
        region = self._layout.regions[name]
        if self._indexed(name):
            return weights[self._index(name, weights.device)]
        return weights[None, :, None].expand(region.outer, region.parts, region.inner).reshape(-1)

    # -- gradients ---------------------------------------------------------------------------------------------------

    def gradient(self, closure: Callable[..., Any], *, hold: bool = False) -> tuple[Tensor, Tensor]:
        """The loss and its gradient with respect to the coefficients, at the current coefficients.

        Composes first, so no `compose_` is needed before. Afterwards the module stays composed; in a `with` block, or
        after `restore_`, the base comes back.

        Args:
            closure: runs any number of forward and backward passes. What it returns decides who calls backward: a
                tensor that requires a gradient, or several (a list, or a generator that yields one at a time so that
                only one graph lives), are summed and backward is called here; a number or a detached tensor says that
                the closure has called backward itself. It may take the model as its argument.
            hold: collect the parameters' gradients over all passes and read the task vectors once at the end, for the
                memory of all gradients; otherwise each gradient is consumed and freed as backward produces it.

        Returns:
            The loss (detached), and a tensor shaped like `coefficients`.

        Raises:
            LearningError: no gradient reached any composed parameter.
        """
        try:
            return self._gradient(closure, hold)
        except BaseException:
            if self._depth == 0:
                self.restore_()
            raise

    def _gradient(self, closure: Callable[..., Any], hold: bool) -> tuple[Tensor, Tensor]:
        self._compose(rows=True)
        self._grad = torch.zeros_like(self._flat())
        consumed: Callable[[str, Tensor], None] = self._consume
        parameters = {n: p for n, p in self._weights.parameters.items() if self._needs_gradient(n)}
        with ExitStack() as stack:
            if self._probes is not None:
                parameters, consumed = self._probes.listening(stack, parameters, self._consume)
            if self._fused is not None:
                stack.enter_context(self._fused.collecting(self._grad))
            pull = stack.enter_context(PullBack(self.model, parameters, consumed, hold=hold))
            loss = _run(closure, self.model, self._device)
        if not pull.count and not (self._probes is not None and self._probes.count):
            raise LearningError(
                "gradient: no gradient reached any composed parameter. The closure has to run the model that was given "
                "to Composition, with gradients enabled, and either return the loss or call backward on it."
            )
        grad = self._grad.view(self._coefficients.shape)
        del self._grad
        if self._frozen_columns is not None:
            grad = grad.masked_fill(self._frozen_columns, 0)
        return loss, grad

    def freeze(self, mask: Annotated[Tensor, "task block"] | None) -> None:
        """Keep some coefficients as they are: True where frozen. Blocks frozen for every task make no gradient.

        Raises:
            UsageError: the mask has another shape, or freezes everything.
        """
        if mask is not None:
            if mask.shape != self._coefficients.shape or mask.dtype != torch.bool:
                raise UsageError(
                    f"frozen: {mask.dtype} of shape {list(mask.shape)}; "
                    f"expected bool of {list(self._coefficients.shape)}."
                )
            if bool(mask.all()):
                raise UsageError("frozen: every coefficient is frozen; nothing is left to learn.")
            mask = mask.to(self._device).clone()
        self._frozen_columns = mask
        self._needed = None
        if mask is not None:
            flat = mask.reshape(len(self.tasks), -1).cpu()
            self._needed = frozenset(
                name for name in self.bank.blocks if not bool(flat[:, slice(*self._columns(name))].all())
            )

    def _needs_gradient(self, name: str) -> bool:
        return self._needed is None or name in self._needed

    def _consume(self, name: str, grad: Tensor) -> None:
        if self._fused is not None and name in self._fused.names:
            self._fused.consume(name, grad)
            return
        start, stop = self._columns(name)
        self._grad[:, start:stop] += self._pulled(name, grad).to(self._grad)

    def _pulled(self, name: str, grad: Tensor) -> Annotated[Tensor, "task part"]:
        """Σ over the elements of each of the tensor's columns of grad ⊙ τ_t."""
        block = self.bank.blocks[name]
        region = self._layout.regions[name]
        start, stop = self._columns(name)
        kind = self._sums[name]
        flat = grad.detach().to(kind).reshape(-1)
        pulled = torch.zeros((len(self.tasks), stop - start), dtype=kind, device=flat.device)
        if block.tasks:
            stored = self.bank.values(name)
            if self._is_one_number(name):
                found = _products(stored, flat)[:, None]
            elif self._indexed(name):
                index = self._index(name, flat.device)
                found = torch.zeros((len(block.tasks), stop - start), dtype=kind, device=flat.device)
                for task in range(len(block.tasks)):
                    found[task].index_add_(0, index, flat * stored[task].to(kind))
            else:
                shape = (region.outer, region.parts, region.inner)
                found = torch.stack(
                    [(flat * stored[t].to(kind)).view(shape).sum((0, 2)) for t in range(len(block.tasks))]
                )
            if block.scales is not None:
                found = found * block.scales[:, None]
            pulled[list(block.tasks)] = found
        for task, f in self.bank.factors(name).items() if block.factors else ():
            if self._is_one_number(name):
                # ⟨G, B A⟩ = ⟨G Aᵀ, B⟩: 2 m n r operations, and no dense delta
                pulled[task, 0] = ((flat.view(f.left.shape[0], -1) @ f.right.T) * f.left).sum()
            else:
                product = flat * f.dense().reshape(-1)
                if self._indexed(name):
                    pulled[task].index_add_(0, self._index(name, flat.device), product)
                else:
                    pulled[task] = product.view(region.outer, region.parts, region.inner).sum((0, 2))
        return pulled

    # -- columns -----------------------------------------------------------------------------------------------------

    def _flat(self) -> Tensor:
        return self._coefficients.reshape(len(self.tasks), -1)

    def _columns(self, name: str) -> tuple[int, int]:
        """First and last + 1 of this tensor's columns in the flat [task, column] coefficients."""
        region, parts = self._layout.regions[name], max(self.parts, 1)
        return region.column * parts, (region.column + region.parts) * parts

    def _block_weights(self, name: str) -> Tensor:
        return self._flat()[:, slice(*self._columns(name))]

    def _indexed(self, name: str) -> bool:
        return bool(self.parts)

    def _is_one_number(self, name: str) -> bool:
        return not self.parts and self._layout.regions[name].parts == 1

    def _index(self, name: str, device: torch.device) -> Tensor:
        """[numel]: the part of each element."""
        if name in self._indices:
            return self._indices[name].reshape(-1).to(device, torch.int64)
        assert self._partitions is not None  # either kind of partition was set, or `_indexed` is False
        parts, seed = self._partitions
        numel = self._layout.regions[name].numel
        stored = self._stored_names.get(name, name)
        return partition_index(stored, seed, parts, 0, numel, device=device).to(torch.int64)

    def _partitioned(
        self,
        partitions: tuple[int, int] | Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        composed: list[str],
    ) -> list[str]:
        several = [name for name, region in self._layout.regions.items() if region.parts > 1]
        if several:
            raise UsageError(
                f"partitions: cannot cut {several[0]} further, granularity `{self.granularity}` cuts it already."
            )
        if isinstance(partitions, Mapping):
            problems = Problems()
            for name, index in partitions.items():
                if name not in shapes:
                    problems.add(f"{name}: not a floating parameter of the model." + did_you_mean(name, shapes))
                elif tuple(index.shape) != shapes[name]:
                    problems.add(f"{name}: partition of shape {list(index.shape)}, the model has {list(shapes[name])}.")
                elif index.is_floating_point():
                    problems.add(f"{name}: a partition holds whole numbers from 0; got {index.dtype}.")
                elif index.numel() and not 0 <= int(index.min()) <= int(index.max()) < MOST_PARTS:
                    found = f"{int(index.min())} to {int(index.max())}"
                    problems.add(f"{name}: a partition holds whole numbers from 0 to {MOST_PARTS - 1}; got {found}.")
            problems.raise_if_any(MismatchError)
            if not partitions:
                raise UsageError("partitions: the mapping is empty; expected tensor names with their parts.")
            self.parts = 1 + max(int(index.max()) for index in partitions.values() if index.numel())
            small = torch.uint8 if self.parts <= 256 else torch.int32
            self._indices = {name: index.detach().to("cpu", small) for name, index in partitions.items()}
            return [name for name in composed if name in partitions]
        try:
            parts, seed = partitions
            self.parts, self._partitions = int(parts), (int(parts), int(seed))
        except (TypeError, ValueError) as error:
            raise UsageError(f"partitions: {partitions!r}; expected (k, seed) or names with index tensors.") from error
        partition_index("", seed, self.parts, 0, 0)
        return composed

    # -- names -------------------------------------------------------------------------------------------------------

    def _check_names(
        self, sources: Mapping[str, "GivenDeltas"], own: Mapping[str, nn.Parameter], exclude: Sequence[str]
    ) -> None:
        known = {*own, *self.aliases, *(name for name, _ in self.model.named_buffers())}

        def excluded(name: str) -> bool:
            return matches(exclude, name)

        problems = Problems()
        for task, source in sources.items():
            unknown = [
                name
                for name, info in source.infos.items()
                if name not in known and info.dtype.is_floating_point and not excluded(name)
            ]
            if unknown:
                problems.add(
                    f"task vector {task!r} changes {shortened(unknown)}, not in {type(self.model).__name__}."
                    + did_you_mean(unknown[0], own)
                    + " Load the model class that was tuned, or leave them out with `exclude`."
                )
            quantised = [n for n in source.infos if n in own and not own[n].dtype.is_floating_point and not excluded(n)]
            if quantised:
                problems.add(
                    f"task vector {task!r} changes {shortened(quantised)}, stored as "
                    f"{own[quantised[0]].dtype} in the model. Load the model unquantised."
                )
        problems.raise_if_any(MismatchError)

    # -- BatchNorm ---------------------------------------------------------------------------------------------------

    def _averaged_statistics(self, sources: Mapping[str, "GivenDeltas"]) -> dict[str, Tensor]:
        averaged: dict[str, Tensor] = {}
        for name, buffer in self.model.named_buffers():
            if name.rpartition(".")[2] not in _STATISTICS:
                continue
            total = torch.zeros_like(buffer, dtype=compute_dtype(buffer.dtype))
            for source in sources.values():
                if name in source.infos:
                    total += source.read(name).to(total)
            averaged[name] = total / len(sources)
        return averaged

    def _write_statistics(self) -> None:
        if not self._averaged or self._statistics_before:
            return
        for name, buffer in self.model.named_buffers():
            if name in self._averaged:
                self._statistics_before[name] = buffer.clone()
                buffer.copy_(buffer.to(self._averaged[name]) + self._averaged[name])

    @torch.no_grad()
    def recompute_statistics_(self, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> None:
        """Measure BatchNorm's running statistics anew at the current coefficients; `restore_` brings the base's back.

        Args:
            batches: inputs; every one counts equally.
            forward: runs the model on one of them.
        """
        norms = [
            m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
        ]
        if not norms:
            raise UsageError(f"statistics: {type(self.model).__name__} has no BatchNorm with running statistics.")
        if not self._is_composed:
            self.compose_()
        for name, buffer in self.model.named_buffers():
            if name.rpartition(".")[2] in (*_STATISTICS, "num_batches_tracked"):
                self._statistics_before.setdefault(name, buffer.clone())
        modes = [(m, m.training, m.momentum) for m in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None  # torch: a cumulative average
            for batch in batches:
                forward(self.model, batch)
        finally:
            for norm, training, momentum in modes:
                norm.train(training)
                norm.momentum = momentum

    # -- the first-order model ---------------------------------------------------------------------------------------

    def _linearise(self) -> None:
        from merging.learn.linear import first_order

        tangents = {name: self.tangent(name).to(p.dtype) for name, p in self._weights.parameters.items()}
        self._own_forward()
        self._forward_before = self.model.__dict__.get("forward")
        object.__setattr__(self.model, "forward", first_order(self.model, self._weights.parameters, tangents))
        self._forward_replaced = True

    def _own_forward(self) -> None:
        """Give the model its forward back (which may itself be a replaced one, as accelerate's)."""
        if self._forward_replaced:
            self.model.__dict__.pop("forward", None)
            if self._forward_before is not None:
                object.__setattr__(self.model, "forward", self._forward_before)
        self._forward_replaced = False

    def _fused_kernels(self) -> Any:
        from merging.learn.kernels import FusedBlocks, available

        names = [
            name
            for name, block in self.bank.blocks.items()
            if block.values is not None
            and not block.factors
            and not (self._probes is not None and name in self._probes.names)
            and self._is_one_number(name)
            and block.values.is_cuda
            and self._weights.parameters[name].device == self._device
            and self._sums[name] == torch.float32
            and self._weights.parameters[name].is_contiguous()
        ]
        if not names or not available():
            return None
        return FusedBlocks(
            self.bank,
            {name: self._weights.parameters[name] for name in names},
            self._weights.base,
            {name: self._columns(name)[0] for name in names},
        )


def _check_words(granularity: Any, mode: str, statistics: str, vectors: Mapping[str, Vector]) -> None:
    if not callable(granularity) and granularity not in GRANULARITIES:
        raise UsageError(f"granularity: {granularity!r} is not known." + did_you_mean(str(granularity), GRANULARITIES))
    if mode not in ("nonlinear", "linear"):
        raise UsageError(f"mode: {mode!r} is not known." + did_you_mean(mode, ("nonlinear", "linear")))
    if statistics not in ("keep", "average"):
        raise UsageError(f"statistics: {statistics!r} is not known." + did_you_mean(statistics, ("keep", "average")))
    if not isinstance(vectors, Mapping) or not vectors:
        raise UsageError("vectors: expected at least one, as {task name: task vector}.")


def _readable(vector: Vector, task: str) -> Any:
    if isinstance(vector, Mapping):
        return GivenDeltas(vector, task)
    if hasattr(vector, "infos") and hasattr(vector, "read") and hasattr(vector, "low_rank"):
        return vector
    raise UsageError(f"vectors: {task!r} is a {type(vector).__name__}; expected a TaskVector or a mapping of tensors.")


def _aliases(model: nn.Module, own: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Name of a tied parameter to the name under which it is composed."""
    first = {id(parameter): name for name, parameter in own.items()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if name not in own}


def _add_combination(
    values: Tensor, weights: Annotated[Tensor, "task"], stored: Annotated[Tensor, "task element"]
) -> None:
    """Add weights @ stored to `values`, in its dtype; a half-precision `stored` is widened chunk by chunk."""
    if stored.dtype == values.dtype:
        values.addmv_(stored.T, weights)
        return
    for start in range(0, values.numel(), CHUNK):
        piece = values[start : start + CHUNK]
        piece.addmv_(stored[:, start : start + CHUNK].to(values.dtype).T, weights)


def _products(
    stored: Annotated[Tensor, "task element"], flat: Annotated[Tensor, "element"]
) -> Annotated[Tensor, "task"]:
    """The products stored @ flat, in the dtype of `flat`."""
    if stored.dtype == flat.dtype:
        return stored @ flat
    total = torch.zeros(stored.shape[0], dtype=flat.dtype, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):
        total += stored[:, start : start + CHUNK].to(flat.dtype) @ flat[start : start + CHUNK]
    return total


def _run(closure: Callable[..., Any], model: nn.Module, device: torch.device) -> Tensor:
    """Call the closure, and backward where it left that to us."""
    with torch.enable_grad():
        result = closure(model) if _wants_model(closure) else closure()
        if isinstance(result, (int, float)):
            return torch.tensor(float(result), device=device)
        terms = [result] if isinstance(result, Tensor) else result
        if not isinstance(terms, (list, tuple, Iterator)):
            raise UsageError(f"closure: returned a {type(result).__name__}; expected the loss, or several terms of it.")
        total: Tensor | None = None
        for term in terms:
            if not isinstance(term, Tensor) or term.numel() != 1:
                raise UsageError("closure: each term of the loss has to be a tensor with one element.")
            if term.requires_grad:
                term.backward()
            value = term.detach().reshape(())
            total = value if total is None else total + value
    if total is None:
        raise UsageError("closure: returned no term of the loss.")
    return total


def _wants_model(closure: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(closure).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) == 1
