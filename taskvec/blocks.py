"""From tensor names to layers, blocks and roles, without a list of architectures.

A layer index is the first whole number between dots whose parent holds several numbered children; everything here
works on names alone, so a checkpoint nobody has seen before is treated like any other.
"""

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_EMBEDDING = re.compile(
    r"(^|[._])(embed|embeddings?|wte|wpe|tok_embeddings|shared|embed_tokens|embed_in)([._]|$)", re.I
)
_NORM = re.compile(r"(norm|ln_|layernorm|(^|\.)ln\d*(\.|$)|(^|\.)bn\d*(\.|$))", re.I)
_FIRST = re.compile(r"(embed|patch|(^|\.)(wte|wpe|shared|stem|conv[12]|cls_token|pre_?la?y[er]*norm)(\.|$))", re.I)
_HEAD = re.compile(r"(^|\.)(lm_head|classifier|score|qa_outputs|cls|heads?|embed_out|fc_out)(\.|$)")


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to: the first number in its name, or None outside the layers.

    >>> layer_of("model.layers.12.mlp.up_proj.weight"), layer_of("lm_head.weight")
    (12, None)
    """
    found = _NUMBER.search(name)
    return int(found.group(1)) if found else None


def layer_key(name: str) -> str:
    """The layer as a key that tells towers apart (`vision_model.encoder.layers.3`), or the module outside the layers.

    >>> layer_key("text_model.encoder.layers.3.mlp.fc1.bias"), layer_key("lm_head.weight")
    ('text_model.encoder.layers.3', 'lm_head')
    """
    found = _NUMBER.search(name)
    if found:
        return name[: found.end(1)]
    return name.rpartition(".")[0] or name


def tower_of(name: str) -> str:
    """What stands before the layer number (`text_model.encoder.layers`), or "" outside the layers."""
    found = _NUMBER.search(name)
    return name[: found.start(1)].rstrip(".") if found else ""


def depth_of(names: Iterable[str]) -> dict[str, int]:
    """Tower to number of layers, over these names."""
    depth: dict[str, int] = {}
    for name in names:
        layer = layer_of(name)
        if layer is not None:
            tower = tower_of(name)
            depth[tower] = max(depth.get(tower, 0), layer + 1)
    return depth


def with_layer(name: str, layer: int) -> str:
    """The name with another layer number.

    >>> with_layer("model.layers.12.mlp.experts.3.w1.weight", 7)
    'model.layers.7.mlp.experts.3.w1.weight'
    """
    found = _NUMBER.search(name)
    return name if found is None else f"{name[: found.start(1)]}{layer}{name[found.end(1) :]}"


def main_tower(names: Iterable[str], counts: Iterable[int] = ()) -> str | None:
    """The tower that holds the model's numbered layers, or None where several could be meant.

    Args:
        names: the tensor names.
        counts: numbers of layers that the configuration speaks of.

    >>> main_tower(["h.0.attn.weight", "h.1.attn.weight", "score.0.weight"], [2])
    'h'
    """
    depth = depth_of(names)
    wanted = set(counts)
    found = [tower for tower, layers in depth.items() if layers in wanted] or list(depth)
    return found[0] if len(found) == 1 else None


def comes_first(name: str) -> bool:
    """Whether a tensor outside the layers is used before them (embeddings, patches, stems) rather than after."""
    return bool(_FIRST.search(name)) and not is_head(name)


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether the tensor is a matrix: two dimensions, both larger than one."""
    return len(shape) == 2 and min(shape) > 1


def is_embedding(name: str) -> bool:
    """Whether the name is that of a token or position table (heads are not)."""
    return bool(_EMBEDDING.search(name)) and not is_norm(name)


def is_norm(name: str) -> bool:
    """Whether the name is that of a normalisation layer's weight, bias or running statistic."""
    return bool(_NORM.search(name.rpartition(".")[0]))


def is_head(name: str) -> bool:
    """Whether the name is that of an output head."""
    return bool(_HEAD.search(name)) and layer_of(name) is None
