"""Layers stacked anew: which tensor of which model becomes which of the result, and what the configuration then says.

Everything goes by tensor names and by the numbers in config.json: there is no list of architectures.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from taskvec.blocks import comes_first, depth_of, is_head, layer_of, main_tower, tower_of, with_layer
from taskvec.errors import Problems, shortened
from taskvec.source import TensorSource, names_matching

_COUNT = re.compile(r"(^|_)(n_)?(layers?|blocks?|depth)$")
_PER_LAYER = re.compile(r"layer|block|attn|attention|moe|mlp|ffn|window|head|rope|expert|pattern", re.I)
_INDICES = re.compile(r"(layers?|idxs?|indices|layer_ids)$")
# rules by layer number; a list by layer of the same configuration overrules those of attention
_RULE = re.compile(
    r"(layer|attn|attention|moe|sparse|sliding|dense|expert).*(period|step|interval|pattern|offset|every|freq)"
    r"|^first_k_dense_replace$"
)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the tensors of one slice or module go.

    Attributes:
        name: how messages call the part.
        tower: where the numbered layers are; None where no layers are chosen.
        first: the first of them in the result.
        count: how many there are.
        outside: names of the tensors outside the layers that come from here.
    """

    name: str
    tower: str | None
    first: int
    count: int
    outside: frozenset[str]

    def names(self, source: TensorSource, layers: tuple[int, int] | None) -> dict[str, str]:
        """Name in the result to the source's own, for what the part takes of this source."""
        found: dict[str, str] = {}
        once = once_for_all(source.infos, self.tower) if self.tower is not None else frozenset[str]()
        for old in source.infos:
            if old in once:
                if self.first == 0:
                    found[old] = old
                continue
            if self.tower is None or tower_of(old) != self.tower:
                if old in self.outside:
                    found[old] = old
                continue
            layer = layer_of(old)
            assert layer is not None
            if layers is not None and layers[0] <= layer < layers[1]:
                found[with_layer(old, self.first + layer - layers[0])] = old
        return found


def once_for_all(names: Iterable[str], tower: str) -> frozenset[str]:
    """Tensors that stand in the first layer, but serve all of them (the position biases of T5).

    These are what the first layer has beyond all that the others have; a first layer that lacks something of the others
    is simply of another kind.
    """
    parts: dict[int, dict[str, str]] = {}
    for name in names:
        if tower_of(name) == tower:
            layer = layer_of(name)
            assert layer is not None
            parts.setdefault(layer, {})[with_layer(name, 0)] = name
    others = [set(own) for layer, own in parts.items() if layer != 0]
    first = parts.get(0, {})
    if not others or not all(own <= set(first) for own in others):
        return frozenset()
    return frozenset(name for part, name in first.items() if not any(part in own for own in others))


def chosen_tower(source: TensorSource, names: Iterable[str], given: str | None, problems: Problems) -> str | None:
    """The tower whose layers are stacked; what is wrong otherwise goes to the problems."""
    found = list(names)
    towers = depth_of(found)
    if given is not None:
        if given not in towers:
            problems.add(f"tower: {source.label} has no layers {given}.<number>; it has {shortened(list(towers))}")
            return None
        return given
    config = getattr(source, "config", {})
    tower = main_tower(found, (value for _, _, value in _counts(config)))
    if tower is None:
        what = f"there are {shortened([f'{t} ({n} layers)' for t, n in towers.items()])}" if towers else "there is none"
        problems.add(
            f"slices: {source.label} has no single tower of numbered layers ({what}). Name the one that is meant (`tower:`), "
            "or merge the towers apart (`modules:`)."
        )
    return tower


def shares_outside(
    names: Sequence[str], tower: str, claims: Sequence[Sequence[str]], aliases: Mapping[str, str], problems: Problems
) -> list[frozenset[str]]:
    """Which tensors outside the layers each slice brings.

    Args:
        names: the names of all tensors of all models of the slices.
        tower: the tower whose layers are stacked.
        claims: the patterns of each slice.
        aliases: tied names and what they are tied to; both come from one slice.
        problems: takes patterns that match nothing, and names that two slices claim.
    """
    outside = [name for name in dict.fromkeys(names) if tower_of(name) != tower]
    shares: list[set[str]] = [set() for _ in claims]
    for name in outside:
        followed = aliases.get(name, name)
        claimed = [at for at, patterns in enumerate(claims) if patterns and names_matching([followed], patterns)]
        if len(claimed) > 1:
            problems.add(f"slices: {name} is claimed by slices {' and '.join(str(at + 1) for at in claimed)}")
        shares[claimed[0] if claimed else 0 if comes_first(followed) else -1].add(name)
    for at, patterns in enumerate(claims):
        problems.extend(
            f"slices.{at}.tensors: the pattern {pattern!r} matches no tensor outside the layers"
            for pattern in patterns
            if not names_matching(outside, [pattern])
        )
    return [frozenset(share) for share in shares]


def module_tensors(name: str, names: Sequence[str]) -> list[str]:
    """The tensors below a module of that name, wherever in the hierarchy it first appears."""
    at: dict[str, list[str]] = {}
    for tensor in names:
        parts = tensor.split(".")[:-1]
        if name in parts:
            at.setdefault(".".join(parts[: parts.index(name) + 1]), []).append(tensor)
    return at[min(at, key=lambda prefix: (prefix.count("."), prefix))] if at else []


# a module's name in mergekit's definitions of architectures to what checkpoints call such a part
ROLES: Mapping[str, tuple[str, ...]] = {
    "text_decoder": ("language_model", "text_model", "decoder"),
    "vision_tower": ("vision_tower", "vision_model", "visual", "vision_encoder"),
    "vision_model": ("vision_model", "vision_tower", "visual"),
    "audio_tower": ("audio_tower", "audio_model", "audio_encoder"),
}


def module_of_role(name: str, names: Sequence[str]) -> list[str]:
    """The tensors of a module by its name, or by the names that such a part usually has."""
    return next((found for called in (name, *ROLES.get(name, ())) if (found := module_tensors(called, names))), [])


# -- config.json -----------------------------------------------------------------------------------------------------------


def _dicts(config: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """The configuration and those of its parts, each with its name."""
    yield "", dict(config)
    for key, value in config.items():
        if isinstance(value, dict) and (key.endswith("_config") or key in ("encoder", "decoder", "text", "vision")):
            yield key, value


def _counts(config: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Part, key and value of each number of layers that the configuration states."""
    return [
        (part, key, value)
        for part, inner in _dicts(config)
        for key, value in inner.items()
        if type(value) is int and value > 0 and _COUNT.search(key)
    ]


def _about(tower: str, found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of parts and keys, those that speak of this tower rather than of its sister."""
    for word, other in (("decoder", "encoder"), ("encoder", "decoder"), ("vision", "text"), ("text", "vision")):
        if word not in tower:
            continue
        named = [(part, key) for part, key in found if word in part or word in key]
        apart = [(part, key) for part, key in found if other not in part and other not in key]
        if word == "decoder" and named:
            return named
        if named and word in ("vision", "text"):
            return [(part, key) for part, key in named if part == named[0][0]] if named[0][0] else named
        found = apart or found
    return list(found)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one layer of the result comes from: a model's configuration, and which of its layers."""

    config: Mapping[str, Any]
    layers: int
    layer: int


def restacked_config(
    config: Mapping[str, Any], tower: str, depth: int, origins: Sequence[Origin], problems: Problems, *, patterned: bool
) -> dict[str, Any]:
    """config.json for layers that were stacked anew.

    Args:
        config: the configuration of the model that lends it.
        tower: the tower whose layers were stacked.
        depth: how many layers that model has there.
        origins: for each layer of the result where it comes from.
        problems: takes what would make the result another model than its tensors say.
        patterned: whether rules by layer number that fit no more are let through.
    """
    if not config:
        return {}
    made = deepcopy(dict(config))
    found = _about(tower, [(part, key) for part, key, value in _counts(config) if value == depth])
    if not found and len(origins) != depth:
        problems.add(
            f"slices: config.json names no number of layers that is {depth}, so it cannot be told of {len(origins)}. Is it "
            "the configuration of this model?"
        )
        return made
    for part, key in found:
        _inside(made, part)[key] = len(origins)
    for part in dict.fromkeys(part for part, _ in found):
        inner = _inside(made, part)
        for key in list(inner):
            _restack_key(inner, key, part, depth, origins)
        if not patterned:
            _check_rules(inner, origins, problems)
    return made


def _inside(config: dict[str, Any], part: str) -> dict[str, Any]:
    inner: dict[str, Any] = config[part] if part else config
    return inner


def _restack_key(inner: dict[str, Any], key: str, part: str, depth: int, origins: Sequence[Origin]) -> None:
    value = inner[key]
    if not isinstance(value, list | str) or not _PER_LAYER.search(key) or key.endswith(("_token_id", "_token_ids")):
        return
    if len(value) == depth and not _is_indices(key, value, depth):
        taken = []
        for origin in origins:
            theirs = (origin.config.get(part, {}) if part else origin.config).get(key)
            fits = isinstance(theirs, type(value)) and len(theirs) == origin.layers
            taken.append(theirs[origin.layer] if fits and theirs is not None else value[min(origin.layer, depth - 1)])
        inner[key] = "".join(taken) if isinstance(value, str) else taken
    elif isinstance(value, list) and _is_indices(key, value, depth):
        inner[key] = [
            at
            for at, origin in enumerate(origins)
            if origin.layer in ((origin.config.get(part, {}) if part else origin.config).get(key) or ())
        ]


def _is_indices(key: str, value: Any, depth: int) -> bool:
    """Whether a list says which layers are special, rather than what each layer is."""
    whole = isinstance(value, list) and all(type(item) is int and 0 <= item < depth for item in value)
    flags = whole and len(value) == depth and set(value) <= {0, 1}
    return bool(_INDICES.search(key)) and whole and bool(value) and len(set(value)) == len(value) and not flags


def _check_rules(inner: Mapping[str, Any], origins: Sequence[Origin], problems: Problems) -> None:
    by_layer = isinstance(inner.get("layer_types"), list)
    for key, value in inner.items():
        if type(value) is not int or not _RULE.search(key):
            continue
        if by_layer and any(word in key for word in ("attn", "attention", "sliding")):
            continue  # the list by layer counts
        if key == "first_k_dense_replace":
            wrong = [at for at, origin in enumerate(origins) if (at < value) != (origin.layer < value)]
        else:
            wrong = [at for at, o in enumerate(origins) if value > 1 and (at - o.layer) % value]
        if wrong:
            problems.add(
                f"slices: the configuration's {key} is {value}, a rule by layer number; layer {wrong[0]} of the result comes from "
                f"layer {origins[wrong[0]].layer}, which this rule treats otherwise. Choose ranges that fit it, or let it "
                "through (`allow: [layer_pattern]`)."
            )


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose head is a tensor of its own."""
    made = deepcopy(config)
    for part, inner in list(_dicts(config)):
        if inner.get("tie_word_embeddings"):
            _inside(made, part)["tie_word_embeddings"] = False
    return {**made, "tie_word_embeddings": False}


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the configuration says that head and embeddings are one tensor."""
    return any(inner.get("tie_word_embeddings") is True for _, inner in _dicts(config))


def heads(names: Iterable[str]) -> list[str]:
    """The output heads among the names."""
    return [name for name in names if is_head(name) and name.endswith(".weight")]
