"""Names of a model's tensors in its checkpoint, where they are not those of the model in memory.

transformers adds a prefix where a checkpoint holds the bare decoder (`h.0.mlp…` of the published GPT-2 is
`transformer.h.0.mlp…`), renames heads (`embed_out` of GPT-NeoX is `lm_head`) and leaves old buffers out. Edits are made on the
model in memory and applied to the file.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from taskvec.checkpoint import content_hash
from taskvec.source import TensorInfo, TensorSource

if TYPE_CHECKING:
    from merging.edits.edit import Edit, Widening


def stored_name(name: str, names: Iterable[str]) -> str:
    """The one of `names` that is `name` with words before it added or left out; `name` itself if there is not just one.

    >>> stored_name("transformer.h.0.mlp", ["h.0.mlp", "h.1.mlp"])
    'h.0.mlp'
    """
    known = set(names)
    if name in known:
        return name
    found = [other for other in known if name.endswith(f".{other}") or other.endswith(f".{name}")]
    return found[0] if len(found) == 1 else name


def as_stored_names(edits: "Sequence[Edit]", infos: Mapping[str, TensorInfo]) -> "list[Edit]":
    """The edits with the names that the checkpoint uses; new biases follow the weights they belong to."""
    modules: dict[str, str] = {}

    def module(name: str) -> str:
        if name not in modules:
            modules[name] = stored_name(f"{name}.weight", infos).removesuffix(".weight")
        return modules[name]

    def patched(name: str) -> str:
        path, _, leaf = name.rpartition(".")
        return f"{module(path)}.{leaf}"

    def widening(made: "Widening | None") -> "Widening | None":
        if made is None:
            return None
        return replace(made, inside=tuple(prefix(p) for p in made.inside), out=prefix(made.out))

    def prefix(template: str) -> str:
        first = template.format(0)
        there = module(first)
        if len(there) >= len(first):
            return there.removesuffix(first) + template
        return template[len(first) - len(there) :]

    return [
        edit
        if all(patched(p.name) == p.name for p in edit.patches)
        else replace(
            edit,
            patches=tuple(replace(p, name=patched(p.name)) for p in edit.patches),
            widening=widening(edit.widening),
        )
        for edit in edits
    ]


class _AsLoaded:
    """A checkpoint's tensors under the names of the model that transformers makes of it."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]):
        self._source, self._names, self.label = source, names, source.label
        self.infos = {name: source.infos[there] for name, there in names.items()}
        self.aliases: Mapping[str, str] = {}

    def read(self, name: str) -> Tensor:
        return self._source.read(self._names[name])

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.read_flat(self._names[name], start, stop)


def hash_as_loaded(source: TensorSource) -> str | None:
    """The content hash that the model in memory has, or None where transformers cannot tell its tensors from config.json."""
    config: Any = getattr(source, "config", None)
    if not config or "model_type" not in config:
        return None
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    except Exception:
        # custom code, or a model that is no language model: its names cannot be known
        return None
    state = model.state_dict(keep_vars=True)
    own = {id(tensor): name for name, tensor in reversed(state.items())}
    names, missing = {}, []
    for name in (name for name, tensor in state.items() if own[id(tensor)] == name):
        there = stored_name(name, source.infos)
        if there in source.infos:
            names[name] = there
        else:
            missing.append(name)
    left = [name for name in source.infos if name not in names.values()]
    for name in missing:
        # renamed altogether: the only one of its shape. A wrong guess gives another hash, no wrong edit.
        alike = [there for there in left if source.infos[there].shape == tuple(state[name].shape)]
        if len(alike) != 1:
            return None
        names[name] = alike[0]
    return content_hash(_AsLoaded(source, names))
