"""Where a checkpoint keeps its MLPs: input rows, second gated half, output columns and norm, from names and shapes.

Nothing is loaded and no architecture is listed: the words of the families in use are known, a pair of transposed
matrices under one module serves where they are not, and shapes decide whether a weight is stored in × out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from taskvec.blocks import layer_key, layer_of, tower_of
from taskvec.source import TensorInfo, TensorSource

Rows = Annotated[Tensor, "neuron d"]

# gate (or in), up, out, as the last words of a tensor's name; gated forms first, since `up_proj` alone is a plain in
_GATED = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("wi_0", "wi_1", "wo"),
    ("w2", "w1", "c_proj"),
    ("linear_1", "linear_v", "linear_2"),
)
_FUSED = (("gate_up_proj", "down_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("fc1", "fc2"))
_PLAIN = (
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("fc1", "fc2"),
    ("intermediate.dense", "output.dense"),
    ("wi", "wo"),
    ("lin1", "lin2"),
    ("linear1", "linear2"),
    ("up_proj", "down_proj"),
    ("w1", "w2"),
)
# the norm whose output the MLP reads, the surest name first; the last ones are for parallel blocks
_NORMS = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "ln_2",
    "ln2",
    "norm2",
    "norm_2",
    "layer_norm2",
    "layernorm_after",
    "ln_mlp",
    "ffn_norm",
    "mlp_norm",
    "final_layer_norm",
    "post_attention_layernorm",
    "post_layernorm",
    "attention.output.LayerNorm",
    "sa_layer_norm",
    "layer_norm",
    "ln_1",
    "input_layernorm",
    "norm",
)
# families that multiply with 1 + w
_OFFSET = ("gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma", "nemotron", "qwen3_next")
_ATTENTION = ("attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value")


@dataclass(frozen=True, slots=True)
class Part:
    """Some neurons' rows (or columns) of a stored tensor.

    Attributes:
        name: of the weight in the checkpoint.
        axis: along which neurons are counted, in the last two dimensions (0 or 1).
        start: index of the first neuron (fused weights hold two halves).
        expert: index in the first dimension of a three-dimensional weight, or None.
        bias: name of the bias that belongs to the neurons, or None.
    """

    name: str
    axis: int
    start: int = 0
    expert: int | None = None
    bias: str | None = None

    def rows(self, source: TensorSource, neurons: int) -> Rows:
        """[neuron, d] in the stored dtype, one row a neuron."""
        info = source.infos[self.name]
        if self.expert is None:
            tensor = source.read(self.name)
        else:
            size = info.shape[1] * info.shape[2]
            tensor = source.read_flat(self.name, self.expert * size, (self.expert + 1) * size).view(info.shape[1:])
        view = tensor if self.axis == 0 else tensor.T
        return view[self.start : self.start + neurons]

    def biases(self, source: TensorSource, neurons: int) -> Annotated[Tensor, "neuron"] | None:
        if self.bias is None:
            return None
        return source.read(self.bias).reshape(-1)[self.start : self.start + neurons]

    def place(self, neuron: int) -> str:
        """`name[:, 7]`: where one neuron lies in the checkpoint."""
        expert = "" if self.expert is None else f"{self.expert}, "
        return f"{self.name}[{expert}{':, ' * self.axis}{self.start + neuron}]"


@dataclass(frozen=True, slots=True)
class Mlp:
    """One MLP (or one expert) of a checkpoint.

    Attributes:
        key: the module that holds it (`model.layers.3.mlp`).
        layer: number of the layer, or None.
        neurons, width: m and d.
        inside: the input rows (the gate's, if gated).
        up: the second gated half, or None.
        out: the output columns.
        norm, norm_bias: names of the norm's weight and bias, or None where there is no norm (or one without weights).
        norm_offset: the norm multiplies with 1 + w.
    """

    key: str
    layer: int | None
    neurons: int
    width: int
    inside: Part
    up: Part | None
    out: Part
    norm: str | None = None
    norm_bias: str | None = None
    norm_offset: bool = False

    def scale(self, source: TensorSource) -> Annotated[Tensor, "d"]:
        """g: what the norm before the MLP multiplies with; ones where there is none."""
        if self.norm is None:
            return torch.ones(self.width)
        weight = source.read(self.norm).float()
        return weight + 1 if self.norm_offset else weight


@dataclass(frozen=True, slots=True)
class Layout:
    """The MLPs of a checkpoint, and the layers in which none was found."""

    mlps: tuple[Mlp, ...]
    without: tuple[str, ...]


def mlp_layout(source: TensorSource, config: Mapping[str, object] | None = None) -> Layout:
    """Finds the MLPs of a checkpoint from its header.

    Args:
        source: the checkpoint; no tensor is read.
        config: config.json, if there is one: says whether the norms multiply with 1 + w.
    """
    infos = source.infos
    modules: dict[str, dict[str, str]] = {}
    for name, info in infos.items():
        if len(info.shape) not in (2, 3) or layer_of(name) is None or min(info.shape) < 2:
            continue
        stem = name.removesuffix(".weight")
        parent, _, leaf = stem.rpartition(".")
        if leaf == "dense" and parent.rpartition(".")[2] in ("intermediate", "output"):
            parent, leaf = parent.rpartition(".")[0], f"{parent.rpartition('.')[2]}.dense"
        modules.setdefault(parent, {})[leaf] = name
    offset = multiplies_with_one_plus(config or {})
    mlps: list[Mlp] = []
    layers: dict[str, bool] = {}
    for parent, leaves in modules.items():
        layer = layer_key(next(iter(leaves.values())))
        layers.setdefault(layer, False)
        for mlp in _mlps_of(parent, leaves, infos, offset):
            mlps.append(mlp)
            layers[layer] = True
    with_mlp = {key.rpartition(".")[0] for key, found in layers.items() if found}
    without = tuple(key for key, found in layers.items() if not found and key.rpartition(".")[0] in with_mlp)
    # files are often sorted by name, which puts layer 10 before layer 2
    mlps.sort(key=lambda mlp: (tower_of(mlp.inside.name), mlp.layer if mlp.layer is not None else -1))
    return Layout(tuple(mlps), without)


def multiplies_with_one_plus(config: Mapping[str, object]) -> bool:
    """Whether this family's norms store w and multiply with 1 + w."""
    families = [config.get("model_type")]
    text = config.get("text_config")
    if isinstance(text, Mapping):
        families.append(text.get("model_type"))
    return any(family in _OFFSET for family in families)


def _mlps_of(parent: str, leaves: Mapping[str, str], infos: Mapping[str, TensorInfo], offset: bool) -> Iterator[Mlp]:
    if any(len(infos[name].shape) == 3 for name in leaves.values()):
        yield from _fused_experts(parent, leaves, infos, offset)
        return
    for gate, up, out in _GATED:
        if gate in leaves and up in leaves and out in leaves:
            found = _mlp(parent, (leaves[gate], leaves[up], leaves[out]), infos, offset)
            if found is not None:
                yield found
                return
    for both, out in _FUSED:
        if both in leaves and out in leaves:
            shape, back = infos[leaves[both]].shape, infos[leaves[out]].shape
            # [2m, d] with [d, m], whichever way round
            if 2 * back[1] == shape[0] and back[0] == shape[1]:
                yield _halves(parent, leaves[both], leaves[out], infos, offset, axis=0, gate_first=True)
                return
    mixer = "in_proj" in leaves and "out_proj" in leaves and parent.rpartition(".")[2] == "mixer"
    if mixer:
        shape, back = infos[leaves["in_proj"]].shape, infos[leaves["out_proj"]].shape
        if 2 * back[1] == shape[0] and back[0] == shape[1]:
            yield _halves(parent, leaves["in_proj"], leaves["out_proj"], infos, offset, axis=0, gate_first=False)
        return
    for inside, out in _PLAIN:
        if inside in leaves and out in leaves:
            found = _mlp(parent, (leaves[inside], None, leaves[out]), infos, offset)
            if found is not None:
                yield found
                return
    # words nobody has told us: two matrices of transposed shapes, alone under one module that is not attention
    names = list(leaves.values())
    if len(names) == 2 and not any(word in name for name in names for word in _ATTENTION):
        first, second = (infos[name].shape for name in names)
        if first == second[::-1] and first[0] != first[1]:
            names.sort(key=lambda name: infos[name].shape[0], reverse=True)
            found = _mlp(parent, (names[0], None, names[1]), infos, offset)
            if found is not None:
                yield found


def _mlp(parent: str, names: tuple[str, str | None, str], infos: Mapping[str, TensorInfo], offset: bool) -> Mlp | None:
    inside, up, out = names
    shape, back = infos[inside].shape, infos[out].shape
    if shape != back[::-1] or (up is not None and infos[up].shape != shape):
        return None
    axis = _neuron_axis(inside, out, infos)
    neurons, width = shape[axis], shape[1 - axis]
    return Mlp(
        key=parent,
        layer=layer_of(inside),
        neurons=neurons,
        width=width,
        inside=Part(inside, axis, bias=_bias(inside, neurons, infos)),
        up=None if up is None else Part(up, axis, bias=_bias(up, neurons, infos)),
        out=Part(out, 1 - axis),
        **_norm(parent, width, infos, offset),  # type: ignore[arg-type]
    )


def _halves(
    parent: str, both: str, out: str, infos: Mapping[str, TensorInfo], offset: bool, *, axis: int, gate_first: bool
) -> Mlp:
    width, neurons = infos[out].shape
    bias = _bias(both, 2 * neurons, infos)
    halves = (Part(both, axis, 0, bias=bias), Part(both, axis, neurons, bias=bias))
    gate, up = halves if gate_first else halves[::-1]
    return Mlp(
        key=parent,
        layer=layer_of(both),
        neurons=neurons,
        width=width,
        inside=gate,
        # the second factor of a Mamba channel is its state-space branch, not a row
        up=up if gate_first else None,
        out=Part(out, 1 - axis),
        **_norm(parent, width, infos, offset),  # type: ignore[arg-type]
    )


def _fused_experts(
    parent: str, leaves: Mapping[str, str], infos: Mapping[str, TensorInfo], offset: bool
) -> Iterator[Mlp]:
    """Experts stacked in three-dimensional weights: [expert, 2m, d] with [expert, d, m]."""
    both, out = leaves.get("gate_up_proj"), leaves.get("down_proj")
    if both is None or out is None or len(infos[both].shape) != 3 or len(infos[out].shape) != 3:
        return
    experts, rows, width = infos[both].shape
    neurons = rows // 2
    if infos[out].shape != (experts, width, neurons):
        return
    for expert in range(experts):
        yield Mlp(
            key=f"{parent}.{expert}",
            layer=layer_of(both),
            neurons=neurons,
            width=width,
            inside=Part(both, 0, 0, expert),
            up=Part(both, 0, neurons, expert),
            out=Part(out, 1, 0, expert),
            **_norm(parent, width, infos, offset),  # type: ignore[arg-type]
        )


def _neuron_axis(inside: str, out: str, infos: Mapping[str, TensorInfo]) -> int:
    """0 where the weight is stored out × in (Linear), 1 where in × out (Conv1D)."""
    rows, columns = infos[inside].shape
    bias, out_bias = _bias_length(inside, infos), _bias_length(out, infos)
    if rows != columns:
        if bias is not None:
            return 0 if bias == rows else 1
        if out_bias is not None:
            return 0 if out_bias == columns else 1
    # GPT-2's own attention weight is [d, 3d] under the same layer; a square MLP can be told by nothing else
    layer = layer_key(inside)
    attention = infos.get(f"{layer}.attn.c_attn.weight")
    if attention is not None and attention.shape[0] != attention.shape[1]:
        return 1 if attention.shape[1] > attention.shape[0] else 0
    if rows != columns:
        widths = {
            info.shape[0] for name, info in infos.items() if len(info.shape) == 1 and name.startswith(layer + ".")
        }
        if columns in widths and rows not in widths:
            return 0
        if rows in widths and columns not in widths:
            return 1
    return 0


def _bias_length(weight: str, infos: Mapping[str, TensorInfo]) -> int | None:
    info = infos.get(weight.removesuffix(".weight") + ".bias")
    return None if info is None else info.numel


def _bias(weight: str, length: int, infos: Mapping[str, TensorInfo]) -> str | None:
    name = weight.removesuffix(".weight") + ".bias"
    return name if name in infos and infos[name].numel == length else None


def _norm(parent: str, width: int, infos: Mapping[str, TensorInfo], offset: bool) -> dict[str, str | bool | None]:
    """Names of the norm before the MLP, looked for in the layer and, for nested blocks, beside the MLP."""
    layer = layer_key(parent + ".weight")
    # T5: layer.1.DenseReluDense stands beside layer.1.layer_norm, with the first number only the block
    beside = parent.rpartition(".")[0]
    places = [beside, layer] if beside.startswith(layer) and beside != layer else [layer]
    for place in places:
        after = f"{place}.post_feedforward_layernorm.weight" in infos
        before = f"{place}.pre_feedforward_layernorm.weight" in infos
        if after and not before:
            # OLMo-2: both norms stand behind their blocks, the MLP reads the residual stream itself
            return {"norm": None, "norm_bias": None, "norm_offset": False}
        for word in _NORMS:
            name = f"{place}.{word}.weight"
            if name in infos and infos[name].shape == (width,):
                bias = f"{place}.{word}.bias"
                return {"norm": name, "norm_bias": bias if bias in infos else None, "norm_offset": offset}
    return {"norm": None, "norm_bias": None, "norm_offset": False}
