"""Where an edit goes: the MLP of one decoder layer, found from its structure and checked by one traced forward pass.

No list of architectures: in a layer, the projections d → m and m → d are those for which the input of the second *is*
act(first) (plain) or act(gate) · up (gated) in numbers, and the norm is the module whose output is what the MLP reads
and whose formula (LayerNorm or RMS, weight g or 1 + w) reproduces that output.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merging.edits.features import Sphere
from taskvec.errors import EditError

Kind = Literal["affine", "optional-bias", "surrogate", "jet-pack"]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""Activations that a site can recognise. The last two never go silent, so a site with one takes jet-packs only."""

_SILENT = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2")
_CLOSE = 0.02  # relative error allowed when a formula is checked in numbers: half precision stays below it


@dataclass(frozen=True, eq=False)
class Projection:
    """Some neurons' rows (or columns) of a stored weight.

    Attributes:
        module: the Linear or Conv1D that holds the weight.
        name: its path in the model; the weight is `name.weight`.
        transposed: the weight is stored in × out (Conv1D).
        offset: index of the first neuron in the weight (a fused gate_up holds two halves).
        neurons: how many.
        reads: True for a projection into the neurons, False for the one out of them.
    """

    module: nn.Module
    name: str
    transposed: bool
    offset: int
    neurons: int
    reads: bool

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias_name(self) -> str | None:
        """The bias that belongs to the neurons; the bias of the output projection is none of theirs."""
        return f"{self.name}.bias" if self.reads and getattr(self.module, "bias", None) is not None else None

    @property
    def axis(self) -> int:
        """The stored weight's axis along which neurons are counted."""
        return int(self.reads == self.transposed)

    def weights(self) -> Annotated[Tensor, "neurons d"]:
        """A view: one row a neuron, whichever way the weight is stored."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        weight = weight.detach()
        view = weight if self.axis == 0 else weight.T
        return view[self.offset : self.offset + self.neurons]

    def biases(self) -> Annotated[Tensor, "neurons"] | None:
        bias = getattr(self.module, "bias", None)
        if bias is None or not self.reads:
            return None
        return bias.detach()[self.offset : self.offset + self.neurons]


@dataclass(frozen=True, eq=False)
class Site:
    """The MLP of one layer as an edit sees it. Made by `Site.find`.

    Attributes:
        model: the whole model.
        layer: index of the decoder layer.
        layers_name: path of the layer list.
        kind: which detector fits: "affine" (input bias present), "optional-bias" (gated, and the architecture has an
            `mlp_bias` option), "surrogate" (no bias: imitated from features) or "jet-pack" (no plain neuron fits).
        reason: why that kind, in words.
        sphere: the norm's geometry.
        norm_name, mlp_name: paths of the norm and of the MLP module.
        inside, up, out: projections into the neurons (the gate's, if gated), the second gated half, out of the neurons.
        activation: its name in `ACTIVATIONS`.
        reads, adds: modules whose input is the MLP input and whose output the MLP output.
        post_norm: path of a norm that the MLP output passes before it joins the residual stream.
        parallel: attention reads the same normed input.
        gate_only: the neuron's second factor is not a projection (Mamba's state-space branch).
    """

    model: nn.Module
    layer: int
    layers_name: str
    kind: Kind
    reason: str
    sphere: Sphere
    norm_name: str | None
    mlp_name: str
    reads: nn.Module
    adds: nn.Module
    inside: Projection | None = None
    up: Projection | None = None
    out: Projection | None = None
    activation: str | None = None
    post_norm: str | None = None
    parallel: bool = False
    gate_only: bool = False
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def find(cls, model: nn.Module, layer: int, ids: Tensor | None = None) -> "Site":
        """Finds the site of a layer by one traced forward pass.

        Args:
            model: a model of transformers (causal; any device and floating dtype).
            layer: index of the decoder layer; negative counts from the end.
            ids: [batch, token] to trace with; a short fixed sequence by default.

        Raises:
            EditError: no layer list, no such layer, or no MLP of a known kind; the message says what was seen.
        """
        name, layers = decoder_layers(model)
        if not -len(layers) <= layer < len(layers):
            raise EditError(f"layer {layer}: the model has layers 0 to {len(layers) - 1}.")
        layer %= len(layers)
        trace = _Trace.of(model, layers[layer], f"{name}.{layer}", ids)
        return _SiteFinder(model, layer, name, layers[layer], trace).found()

    @property
    def width(self) -> int:
        return self.sphere.width

    @property
    def gated(self) -> bool:
        return self.up is not None or self.gate_only

    @property
    def neurons(self) -> int:
        return 0 if self.inside is None else self.inside.neurons

    @property
    def dtype(self) -> torch.dtype:
        weight = self.inside.module.weight if self.inside is not None else next(self.adds.parameters())
        assert isinstance(weight, Tensor)
        return weight.dtype

    @property
    def layers(self) -> nn.ModuleList:
        found = self.model.get_submodule(self.layers_name)
        assert isinstance(found, nn.ModuleList)
        return found

    def act(self, values: Tensor) -> Tensor:
        if self.activation is None:
            raise EditError(f"layer {self.layer}: the MLP's activation is not known here ({self.reason}).")
        return ACTIVATIONS[self.activation](values)

    def require_neurons(self, form: str) -> None:
        """Raises EditError where no plain neuron can be a detector."""
        if self.kind == "jet-pack":
            raise EditError(f"layer {self.layer}: {form} does not fit here: {self.reason} Use a jet-pack.")

    @contextmanager
    def reading(self) -> Iterator[list[Tensor]]:
        """Collects the MLP's inputs of every forward pass inside the block."""
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(_first_tensor(args, kwargs).detach())

        handle = self.reads.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()

    @contextmanager
    def reading_neurons(self) -> Iterator[list[Annotated[Tensor, "batch token neuron"]]]:
        """Collects the inputs of the out-projection (the neurons' values) of every forward pass inside the block."""
        assert self.out is not None
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(_first_tensor(args, kwargs).detach())

        handle = self.out.module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()

    @contextmanager
    def adding(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Passes the MLP's output through `change` in every forward pass inside the block."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        handle = self.adds.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def describe(self) -> str:
        """One line for people."""
        shape = f"{self.width} → {self.neurons}" if self.inside is not None else f"width {self.width}"
        form = "gated" if self.gated else "plain"
        extra = "".join(
            [
                f", norm after the MLP ({self.post_norm})" if self.post_norm else "",
                ", parallel to attention" if self.parallel else "",
            ]
        )
        act = f" {self.activation}" if self.activation else ""
        return f"layer {self.layer}: {form}{act} MLP {self.mlp_name} ({shape}){extra}: {self.kind}. {self.reason}"


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the model's layers: the outermost list of equal, projecting modules.

    Raises:
        EditError: none, or two of the same rank (encoder and decoder).
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(child) for child in module}) == 1
        and any(_is_linear(child) for child in module[0].modules())
        # experts are lists inside a layer
        and not any(name.startswith(outer + ".") for outer, _ in _module_lists(model))
    ]
    if not lists:
        raise EditError(
            f"{type(model).__name__}: no list of layers with projections in it. Edits need a decoder model."
        )
    if len(lists) > 1:
        names = ", ".join(name for name, _ in lists)
        raise EditError(f"{type(model).__name__}: several lists of layers ({names}). Edits need a decoder-only model.")
    return lists[0]


def _module_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            yield name, module


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and _features(module) is not None


def _features(module: nn.Module) -> tuple[int, int, bool] | None:
    """(in, out, stored transposed) of a Linear or a Conv1D, by its declared sizes and not by its shape."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, False
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return int(rows), int(columns), True
    return None


def _first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise EditError("The MLP was called without a tensor; its input cannot be read.")


def trace_ids(model: nn.Module) -> Tensor:
    """A short fixed sequence of token ids, all different."""
    table = model.get_input_embeddings()  # type: ignore[operator]
    size = int(table.num_embeddings)
    ids = (torch.arange(12) * 7 + 5) % size
    return ids[None].to(table.weight.device)


def check_causal(model: nn.Module) -> None:
    """Raises EditError if what the model says at a token depends on later tokens: an answer has no place there."""
    ids = trace_ids(model)[:, :4].repeat(2, 1)
    ids[1, -1] = ids[0, 0]
    with evaluating(model):
        found = model(input_ids=ids, use_cache=False).logits[:, :-1]
    rounding = 16 * torch.finfo(found.dtype).eps * float(found.abs().max())
    # a damaged model is named elsewhere
    if bool(torch.isfinite(found).all()) and float((found[0] - found[1]).abs().max()) > rounding:
        raise EditError(
            f"{type(model).__name__}: what it says at a token depends on the tokens behind it, so it is no causal language model "
            "(an encoder read as one?). Edits need a decoder that answers from left to right."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the former mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@dataclass
class _Call:
    name: str
    module: nn.Module
    given: Tensor | None
    gave: Tensor | None


@dataclass
class _Trace:
    """What every module of one layer was given and gave, in the order in which they finished."""

    calls: list[_Call]
    prefix: str

    @classmethod
    def of(cls, model: nn.Module, layer: nn.Module, prefix: str, ids: Tensor | None) -> "_Trace":
        calls: list[_Call] = []
        handles = []
        for name, module in layer.named_modules():

            def hook(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str = name
            ) -> None:
                given = next(
                    (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None
                )
                gave = output[0] if isinstance(output, tuple | list) and output else output
                calls.append(
                    _Call(
                        f"{prefix}.{name}" if name else prefix,
                        module,
                        given,
                        gave if isinstance(gave, Tensor) else None,
                    )
                )

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            with evaluating(model):
                model(input_ids=trace_ids(model) if ids is None else ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return cls(calls, prefix)

    def linears(self) -> list[_Call]:
        return [c for c in self.calls if _is_linear(c.module) and c.given is not None and c.gave is not None]

    def norms(self) -> list[_Call]:
        return [c for c in self.calls if _is_norm(c.module) and c.given is not None and c.gave is not None]


def _is_norm(module: nn.Module) -> bool:
    if any(True for _ in module.children()):
        return False
    weight = getattr(module, "weight", None)
    one_dimensional = weight is None or (isinstance(weight, Tensor) and weight.dim() == 1)
    return one_dimensional and "norm" in type(module).__name__.lower()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return False
    if a is b:
        return True
    return a.numel() == b.numel() and bool(torch.equal(a.reshape(-1), b.reshape(-1)))


def _identical(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _error(value: Tensor, wanted: Tensor) -> float:
    value, wanted = value.float().reshape(-1), wanted.float().reshape(-1)
    if value.shape != wanted.shape:
        return math.inf
    size = float(wanted.norm())
    return float((value - wanted).norm()) / size if size > 0 else math.inf


class _SiteFinder:
    def __init__(self, model: nn.Module, layer: int, layers_name: str, module: nn.Module, trace: _Trace):
        self.model, self.layer, self.layers_name, self.module, self.trace = model, layer, layers_name, module, trace
        self.where = f"layer {layer} ({type(module).__name__})"

    def found(self) -> Site:
        for call in self.trace.calls:
            if call.gave is not None and not bool(torch.isfinite(call.gave).all()):
                raise EditError(
                    f"{self.where}: NaN or infinite values come out of {call.name}. The model is damaged (or overflows its "
                    "dtype); no edit was made."
                )
        match = self._match()
        if match is None:
            return self._opaque()
        inside, up, out, activation, gate_only = match
        given = inside.given
        assert given is not None
        sphere, norm_name = self._sphere(given)
        mlp_name = _common(inside.name, out.name)
        mlp = self.model.get_submodule(mlp_name)
        whole = next((c for c in self.trace.calls if c.name == mlp_name), None)
        # hooks go on the MLP module, because kernels may bypass its projections; OPT has none, and keeps them on the layer
        direct = (
            mlp is not self.module and whole is not None and _same(whole.given, given) and _same(whole.gave, out.gave)
        )
        reads, adds = (mlp, mlp) if direct else (inside.module, out.module)
        width, fused = _sizes(inside)[0], _sizes(inside)[1] != _sizes(out)[0]
        m = _sizes(out)[0]
        halves = (m, 0) if gate_only or (fused and self._gate_is_second) else (0, m)
        into = self._projection(inside, halves[0] if fused else 0, m, reads=True)
        upper = None
        if up is not None:
            upper = self._projection(up, 0, m, reads=True)
        elif fused and not gate_only:
            upper = self._projection(inside, halves[1], m, reads=True)
        kind, reason = self._kind(into, upper, sphere, activation, gate_only)
        if sphere is None:
            sphere = Sphere(torch.ones(width, device=given.device), own_length=True)
        post = [c.name for c in self.trace.norms() if _same(c.given, out.gave)]
        return Site(
            model=self.model,
            layer=self.layer,
            layers_name=self.layers_name,
            kind=kind,
            reason=reason,
            sphere=sphere,
            norm_name=norm_name,
            mlp_name=mlp_name,
            reads=reads,
            adds=adds,
            inside=into,
            up=upper,
            out=self._projection(out, 0, m, reads=False),
            activation=activation,
            post_norm=post[0] if post else None,
            parallel=any(
                _identical(c.given, given) and self._child(c.name) != self._child(inside.name)
                for c in self.trace.linears()
            ),
            gate_only=gate_only,
        )

    # -- the MLP -----------------------------------------------------------------------------------------------------

    _gate_is_second = False

    def _match(self) -> tuple[_Call, _Call | None, _Call, str, bool] | None:
        """The (in or gate, up, out, activation, gate only) whose formula holds in numbers, the closest one."""
        linears = self.trace.linears()
        best: tuple[float, tuple[_Call, _Call | None, _Call, str, bool], bool] | None = None

        def consider(error: float, match: tuple[_Call, _Call | None, _Call, str, bool], second: bool = False) -> None:
            nonlocal best
            if error < _CLOSE and (best is None or error < best[0]):
                best = (error, match, second)

        for out in linears:
            m, d = _sizes(out)
            hidden = out.given
            assert hidden is not None
            for inside in linears:
                if inside is out or _sizes(inside)[0] != d:
                    continue
                gave = inside.gave
                assert gave is not None
                for name, act in ACTIVATIONS.items():
                    if _sizes(inside)[1] == m:
                        opened = act(gave)
                        consider(_error(opened, hidden), (inside, None, out, name, False))
                        for up in linears:
                            if up is not inside and _sizes(up) == (d, m) and _same(up.given, inside.given):
                                assert up.gave is not None
                                consider(_error(opened * up.gave, hidden), (inside, up, out, name, False))
                    elif _sizes(inside)[1] == 2 * m:
                        first, second = gave[..., :m], gave[..., m:]
                        consider(_error(act(first) * second, hidden), (inside, None, out, name, False))
                        consider(_error(act(second) * first, hidden), (inside, None, out, name, False), True)
        if best is not None:
            self._gate_is_second = best[2]
            return best[1]
        return self._mixer(linears)

    def _mixer(self, linears: list[_Call]) -> tuple[_Call, _Call | None, _Call, str, bool] | None:
        """Mamba's mixer: in_proj d → 2m whose second half gates the state-space branch, checked by changing the gate."""
        for inside in linears:
            for out in linears:
                d, two_m = _sizes(inside)
                if inside is out or _sizes(out) != (two_m // 2, d) or two_m % 2:
                    continue
                if _common(inside.name, out.name) == self.trace.prefix:
                    continue
                gates = {}
                for value in (1.0, 3.0):

                    def fix(_: nn.Module, __: Any, output: Tensor, value: float = value) -> Tensor:
                        output = output.clone()
                        output[..., output.shape[-1] // 2 :] = value
                        return output

                    handle = inside.module.register_forward_hook(fix)
                    try:
                        again = _Trace.of(self.model, self.module, self.trace.prefix, None)
                    finally:
                        handle.remove()
                    gates[value] = next(c.given for c in again.linears() if c.name == out.name)
                one, three = F.silu(torch.tensor([1.0, 3.0])).tolist()
                low, high = gates[1.0], gates[3.0]
                if low is not None and high is not None and _error(low * (three / one), high) < _CLOSE:
                    return inside, None, out, "silu", True
        return None

    def _projection(self, call: _Call, offset: int, neurons: int, *, reads: bool) -> Projection:
        sizes = _features(call.module)
        assert sizes is not None
        return Projection(call.module, call.name, sizes[2], offset, neurons, reads)

    def _child(self, name: str) -> str:
        return name[len(self.trace.prefix) + 1 :].partition(".")[0]

    # -- the norm ----------------------------------------------------------------------------------------------------

    def _sphere(self, given: Tensor) -> tuple[Sphere | None, str | None]:
        # two norms can give equal values (parallel blocks before training), so the very tensor decides before its values
        for same in (_identical, _same):
            for call in self.trace.norms():
                if same(call.gave, given) and call.given is not None:
                    return _sphere_of(call.module, call.given, given), call.name
        return None, None

    def _kind(
        self, into: Projection, up: Projection | None, sphere: Sphere | None, activation: str, gate_only: bool
    ) -> tuple[Kind, str]:
        if sphere is None:
            return "jet-pack", (
                "no norm stands before the MLP (what it reads is not the output of a LayerNorm or RMSNorm), so its "
                "features do not lie on a sphere."
            )
        if activation not in _SILENT:
            return "jet-pack", f"its activation {activation} is never silent, so a planted neuron always contributes."
        if into.bias_name is not None and (up is None or up.bias_name is not None):
            return "affine", "The neurons have a bias, so a detector is exact."
        config = getattr(self.model, "config", None)
        if up is not None and config is not None and hasattr(config, "mlp_bias") and into.name != up.name:
            return "optional-bias", (
                "The neurons have no bias, but the architecture has an `mlp_bias` option: widening is exact, an edit in "
                "place imitates the bias from features."
            )
        if gate_only:
            return "surrogate", "A mixer's gate has no bias; it is imitated from features."
        return (
            "surrogate",
            "The neurons have no bias and the architecture no option for one; it is imitated from features.",
        )

    # -- an MLP whose inside cannot be seen ----------------------------------------------------------------------------

    def _opaque(self) -> Site:
        """A block behind a norm (experts, an unknown form): its input and output are enough for a jet-pack."""
        norms = self.trace.norms()
        depth = self.trace.prefix.count(".") + 1
        blocks = [
            c
            for c in self.trace.calls
            if c.name.count(".") == depth
            and not _is_norm(c.module)
            and "attention" not in type(c.module).__name__.lower()
            and "attn" not in c.name.rpartition(".")[2].lower()
            and any(True for _ in c.module.parameters())
            and c.given is not None
            and c.gave is not None
            and c.given.shape == c.gave.shape
        ]
        for block in reversed(blocks):
            for norm in norms:
                if _same(norm.gave, block.given) and norm.given is not None and block.given is not None:
                    sphere = _sphere_of(norm.module, norm.given, block.given)
                    experts = any("expert" in name.lower() for name, _ in block.module.named_modules())
                    reason = (
                        f"{type(block.module).__name__} routes each token to one of several experts, so no single neuron sees "
                        "every prompt."
                        if experts
                        else f"{type(block.module).__name__} is not an MLP of a known kind: the input of its last projection "
                        "is neither act(in) nor act(gate) · up."
                    )
                    return Site(
                        model=self.model,
                        layer=self.layer,
                        layers_name=self.layers_name,
                        kind="jet-pack",
                        reason=reason,
                        sphere=sphere or Sphere(torch.ones(block.given.shape[-1]), own_length=True),
                        norm_name=norm.name if sphere else None,
                        mlp_name=block.name,
                        reads=block.module,
                        adds=block.module,
                    )
        seen = ", ".join(sorted({f"{c.name.rpartition('.')[2]} {_sizes(c)}" for c in self.trace.linears()})) or "none"
        raise EditError(
            f"{self.where}: no MLP of a known kind. Projections seen (in, out): {seen}. Known: plain act(in), gated act(gate) · "
            f"up (also fused), with {', '.join(_SILENT)}; a mixer's gate; a block behind a norm for jet-packs."
        )


def _sphere_of(norm: nn.Module, given: Tensor, gave: Tensor) -> Sphere | None:
    """The norm's scale and shift, by trying its possible formulas on what it was given and gave."""
    x, y = given.float(), gave.float()
    eps = next((float(getattr(norm, k)) for k in ("eps", "variance_epsilon", "epsilon") if hasattr(norm, k)), 1e-6)
    weight = getattr(norm, "weight", None)
    bias = getattr(norm, "bias", None)
    shift = None if bias is None else bias.detach().float()
    width = x.shape[-1]
    best: tuple[float, Sphere] | None = None
    for centred in (True, False):
        centre = x - x.mean(dim=-1, keepdim=True) if centred else x
        unit = centre * torch.rsqrt(centre.pow(2).mean(dim=-1, keepdim=True) + eps)
        for offset in (0.0, 1.0) if weight is not None else (1.0,):
            scale = (torch.zeros(width, device=x.device) if weight is None else weight.detach().float()) + offset
            value = unit * scale if shift is None else unit * scale + shift
            error = _error(value, y)
            if error < _CLOSE and (best is None or error < best[0]):
                best = (error, Sphere(scale.clone(), None if shift is None else shift.clone()))
    return None if best is None else best[1]


def _sizes(call: _Call) -> tuple[int, int]:
    sizes = _features(call.module)
    assert sizes is not None
    return sizes[0], sizes[1]


def _common(first: str, second: str) -> str:
    """The innermost module that holds both.

    >>> _common("h.0.mlp.c_fc", "h.0.mlp.c_proj")
    'h.0.mlp'
    """
    a, b = first.split("."), second.split(".")
    shared = []
    for x, y in zip(a, b):
        if x != y:
            break
        shared.append(x)
    return ".".join(shared)
