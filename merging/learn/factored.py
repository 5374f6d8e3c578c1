"""Gradients of coefficients without full weight gradients: through low-rank factors, and through embedding rows.

With layer input x and output gradient d, ⟨Σ d xᵀ, B A⟩ = Σ (d B) · (x Aᵀ); for a table, ⟨G, τ⟩ = Σ over tokens of
⟨d, τ[id]⟩. Both need only what passes through the module, so they hold only where the weight is used by its own module
and nowhere else. That is not taken on trust: the first gradient makes the dense one too, and compares.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taskvec.errors import LearningError

if TYPE_CHECKING:
    from merging.learn.composition import Composition

# rounding of x, d and the dense gradient to bfloat16 under autocast, with room; in float32 they agree to 1e-6
_TOLERANCE_HALF = 5e-2
_TOLERANCE = 1e-3


class _Probe(torch.autograd.Function):
    """Passes a module's output on; shows the module's input and the output's gradient to `take` in backward."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, output: Tensor, seen: Tensor, take: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(seen)
        ctx.take = take
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (seen,) = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            ctx.take(seen, grad)
        return None, grad, None, None


class Probes:
    """The modules of a composition whose coefficients' gradients can be had without a weight gradient."""

    def __init__(self, composition: "Composition"):
        self._composition = composition
        self._modules: dict[str, nn.Module] = {}
        self._verified: set[str] = set()
        self._row_hooks: list[Any] = []
        self.count = 0
        own = composition._weights.parameters
        name_of = {id(parameter): name for name, parameter in own.items()}
        tied = set(composition.aliases.values())
        users: dict[str, int] = {}
        for module in composition.model.modules():
            name = name_of.get(id(module._parameters.get("weight")))
            if name is None:
                continue
            users[name] = users.get(name, 0) + 1
            if name not in tied and composition._is_one_number(name) and self._fits(module, name):
                self._modules[name] = module
        self._modules = {name: module for name, module in self._modules.items() if users[name] == 1}

    def _fits(self, module: nn.Module, name: str) -> bool:
        block = self._composition.bank.blocks[name]
        if type(module) is nn.Embedding:
            plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
            return plain
        return not block.tasks and (type(module) is nn.Linear or _is_conv1d(module))

    @property
    def names(self) -> frozenset[str]:
        """Tensors that may go this way."""
        return frozenset(self._modules)

    @property
    def verified(self) -> frozenset[str]:
        """Tensors whose two gradients agreed, so that only the short way is taken from then on."""
        return frozenset(self._verified)

    def trust(self, names: Iterable[str]) -> None:
        """Take the short way for tensors that were verified earlier in the same run."""
        self._verified |= set(names) & set(self._modules)

    @property
    def rows(self) -> frozenset[str]:
        """Verified embedding tables: only the rows that are looked up are composed while a gradient is taken."""
        if compiles():
            return frozenset()
        return frozenset(name for name in self._verified if isinstance(self._modules[name], nn.Embedding))

    # -- composing rows ----------------------------------------------------------------------------------------------

    def begin_rows(self) -> None:
        """From now on, each lookup composes the rows it looks up, before it happens."""
        for name in sorted(self.rows):
            module = self._modules[name]
            self._row_hooks.append(module.register_forward_pre_hook(self._composer(name), with_kwargs=True))

    def end_rows(self) -> None:
        """Lookups compose nothing any more."""
        for hook in self._row_hooks:
            hook.remove()
        self._row_hooks = []

    def _composer(self, name: str) -> Callable[..., None]:
        composition = self._composition

        @torch.no_grad()
        def compose_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            parameter = composition._weights.parameters[name]
            rows = _input(args, kwargs).reshape(-1).unique().to(parameter.device)
            kind = composition._sums[name]
            values = composition._weights.base[name][rows].to(kind)
            weights = composition._block_weights(name)[:, 0].to(values)
            for task, delta in self._rows_of(name, rows, kind):
                values.addcmul_(weights[task], delta)
            parameter.index_copy_(0, rows, values.to(parameter.dtype))

        return compose_rows

    def _rows_of(self, name: str, rows: Tensor, kind: torch.dtype) -> Any:
        """(task, [row, width]) of the deltas of these rows, one task at a time."""
        block = self._composition.bank.blocks[name]
        if block.values is not None:
            table = block.values.view(len(block.tasks), *block.shape)
            where = rows.to(table.device)
            for i, task in enumerate(block.tasks):
                delta = table[i][where].to(rows.device).to(kind)
                yield task, delta if block.scales is None else delta * block.scales[i]
        for task, f in self._composition.bank.factors(name).items() if block.factors else ():
            yield task, f.left[rows] @ f.right

    # -- gradients ---------------------------------------------------------------------------------------------------

    def listening(
        self, stack: ExitStack, parameters: Mapping[str, nn.Parameter], consume: Callable[[str, Tensor], None]
    ) -> tuple[dict[str, nn.Parameter], Callable[[str, Tensor], None]]:
        """Hook the modules for the passes that follow.

        Returns:
            The parameters that still need a dense gradient, and what to do with one. On the way out, modules seen for
            the first time are compared both ways, and from then on go the short way, or never.
        """
        self.count = 0
        if compiles():
            return dict(parameters), consume
        composition = self._composition
        watched = {name: module for name, module in self._modules.items() if name in parameters}
        short: dict[str, Tensor] = {}
        dense: dict[str, Tensor] = {}
        half: set[str] = set()
        for name, module in watched.items():
            take = self._taker(name, module, short, half)
            anchor = torch.zeros((), device=parameters[name].device, requires_grad=True)
            stack.callback(module.register_forward_hook(_watcher(take, anchor), with_kwargs=True).remove)

        def both(name: str, grad: Tensor) -> None:
            if name not in watched:
                consume(name, grad)
                return
            if grad.dtype != torch.float32 and grad.dtype != torch.float64:
                half.add(name)
            dense[name] = composition._pulled(name, grad)[:, 0] + dense.get(name, 0.0)

        def settle(kind: Any, error: Any, trace: Any) -> None:
            if kind is not None:
                return
            if compiles() and self._verified:
                raise LearningError(
                    "gradient: the model was compiled inside the closure, past the hooks on its modules. Compile it "
                    "before the first gradient, or make the Composition with factored=False."
                )
            for name in watched:
                column = composition._columns(name)[0]
                if name in self._verified:
                    if name in short:
                        composition._grad[:, column] += short[name].to(composition._grad)
                    continue
                if name in dense:
                    composition._grad[:, column] += dense[name].to(composition._grad)
                    found = short.get(name)
                    tolerance = _TOLERANCE_HALF if name in half else _TOLERANCE
                    bound = tolerance * float(dense[name].abs().max())
                    if found is not None and float((found - dense[name]).abs().max()) <= bound:
                        self._verified.add(name)
                    else:
                        self._modules.pop(name)
                elif name in short:
                    self._modules.pop(name)

        stack.push(settle)
        return {n: p for n, p in parameters.items() if n not in self._verified}, both

    def _taker(
        self, name: str, module: nn.Module, short: dict[str, Tensor], half: set[str]
    ) -> Callable[[Tensor, Tensor], None]:
        composition = self._composition
        kind = composition._sums[name]
        tasks = len(composition.tasks)

        def add(found: Tensor, grad: Tensor) -> None:
            self.count += 1
            if grad.dtype not in (torch.float32, torch.float64):
                half.add(name)
            short[name] = found + short.get(name, 0.0)

        def through_factors(x: Tensor, grad: Tensor) -> None:
            found = torch.zeros(tasks, dtype=kind, device=grad.device)
            x, grad_wide = x.reshape(-1, x.shape[-1]).to(kind), grad.reshape(-1, grad.shape[-1]).to(kind)
            # GPT-2's Conv1D stores [in, out], so what meets the left factor there is the input
            rows, columns = (x, grad_wide) if _is_conv1d(module) else (grad_wide, x)
            for task, f in composition.bank.factors(name).items():
                found[task] = ((rows @ f.left) * (columns @ f.right.T)).sum()
            add(found, grad)

        def through_rows(ids: Tensor, grad: Tensor) -> None:
            found = torch.zeros(tasks, dtype=kind, device=grad.device)
            flat, wide = ids.reshape(-1), grad.reshape(-1, grad.shape[-1]).to(kind)
            padding = getattr(module, "padding_idx", None)
            if padding is not None:  # as torch: the padding row gets no gradient
                wide = wide * (flat != padding)[:, None]
            rows, places = flat.unique(return_inverse=True)
            total = torch.zeros((rows.numel(), wide.shape[1]), dtype=kind, device=grad.device)
            total.index_add_(0, places, wide)
            for task, delta in self._rows_of(name, rows, kind):
                found[task] = (total * delta).sum()
            add(found, grad)

        return through_rows if isinstance(module, nn.Embedding) else through_factors


def compiles() -> bool:
    """Whether torch.compile has compiled anything in this process: such code does not see hooks that come later.

    Then every gradient is dense. (The module of dynamo being loaded says nothing: checkpointing loads it, too.)
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["frames"].get("total"))


def _watcher(take: Callable[[Tensor, Tensor], None], anchor: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return None
        return _Probe.apply(anchor, output, _input(args, kwargs), take)

    return hook


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
