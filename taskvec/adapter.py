"""PEFT adapters as task vectors: base + adapter, exactly as PEFT computes it, kept factored as long as possible.

Only headers are read when an adapter is opened. Every configuration field that changes the mathematics is either
computed here or refused by its name; a field nobody here knows is refused unless it has its default.
"""

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from taskvec.adapter_config import CONFIG, WEIGHTS, AdapterConfig, folder_of, is_adapter
from taskvec.blocks import is_embedding, is_head
from taskvec.errors import (
    CorruptFileError,
    MismatchError,
    MissingTensorError,
    NotAModelError,
    NotFoundError,
    SourceError,
    UnsafeFileError,
    did_you_mean,
    shortened,
)
from taskvec.live_names import Layouts, Names
from taskvec.lora import (
    Added,
    Change,
    Dora,
    Experts,
    Product,
    Ready,
    Replaced,
    ReplacedRows,
    Scaled,
    Together,
    blocks,
    finite,
    matrix_shape,
    summed,
)
from taskvec.precision import compute_dtype, is_float
from taskvec.source import LowRank, TensorInfo, TensorSource, matches

__all__ = ["Adapter", "is_adapter", "summed"]

Tied = Literal["refuse", "both"]

_LEAVES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "B.bias",
    "lora_embedding_A": "embedding A",
    "lora_embedding_B": "embedding B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "ia3_l": "ia3",
    "token_adapter.trainable_tokens_delta": "tokens",
}
_WRAPPERS = ("base_layer", "original_module", "modules_to_save", "token_adapter")
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared", "tok_embeddings", "embed_in", "word_embedding")

# a fused expert parameter and the per-expert matrices that a checkpoint stores for it, in the order of its rows
_FUSED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# -- the weights -------------------------------------------------------------------------------------------------------


class _Weights:
    """The adapter's tensors: headers at once, tensors when asked for."""

    def __init__(self, path: Path, label: str):
        self.path, self.label = path, label
        self._loaded: dict[str, Tensor] = {}
        self._handle: Any = None
        self._recent: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        if path.suffix == ".bin":
            self._loaded = self._unpickled()
            self.infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._loaded.items()}
        else:
            self.infos = self._headers()
        if not self.infos:
            raise NotAModelError(f"{path}: holds no tensors. Was the adapter saved before it was trained?")
        empty = [name for name, info in self.infos.items() if info.numel == 0]
        if empty:
            raise CorruptFileError(
                f"{path}: {len(empty)} of {len(self.infos)} tensors are empty ({shortened(empty, 2)}). DeepSpeed "
                "ZeRO-3 and FSDP do this to an adapter saved without gathering its shards; gather them and save again."
            )
        whole = [name for name, info in self.infos.items() if not is_float(info.dtype)]
        if whole:
            raise SourceError(
                f"{path}: {shortened(whole, 2)} {'is' if len(whole) == 1 else 'are'} not floating-point "
                f"({self.infos[whole[0]].dtype}). Adapters stored in integers are not supported; save it in float."
            )

    def _headers(self) -> dict[str, TensorInfo]:
        from safetensors import SafetensorError, safe_open

        try:
            self._handle = safe_open(self.path, framework="pt", device="cpu")
            infos = {}
            for name in self._handle.keys():  # noqa: SIM118 (not a mapping)
                piece = self._handle.get_slice(name)
                infos[name] = TensorInfo(tuple(piece.get_shape()), _DTYPES[piece.get_dtype()])
        except KeyError as error:
            raise SourceError(f"{self.path}: stored as {error}, which is not a dtype we read.") from None
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(f"{self.path}: not a whole safetensors file ({error}). Copy it again.") from None
        return infos

    def _unpickled(self) -> dict[str, Tensor]:
        import pickle

        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UnsafeFileError(
                f"{self.path}: refused, because reading it would run code ({str(error).splitlines()[0]}). Ask its "
                "author for adapter_model.safetensors."
            ) from None
        except (RuntimeError, ValueError, OSError, EOFError) as error:
            raise CorruptFileError(f"{self.path}: not a whole torch file ({str(error).splitlines()[0]}).") from None
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise NotAModelError(f"{self.path}: holds something other than a dictionary of tensors.")
        return {str(name): value.detach() for name, value in loaded.items()}

    def read(self, name: str) -> Tensor:
        with self._lock:
            if name not in self._recent:
                values = self._loaded[name] if self._loaded else self._handle.get_tensor(name)
                self._recent[name] = finite(values, name, self.label)
                # both factors of a stack of experts are read once for each expert
                while len(self._recent) > 2:
                    self._recent.popitem(last=False)
            return self._recent[name]


# -- opening -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Opening:
    """Goes through the adapter's keys once and says what each does to which tensor of the base."""

    config: AdapterConfig
    weights: _Weights
    base: TensorSource
    tied: Tied
    label: str
    skip: Sequence[str]
    changes: dict[str, list[tuple[str, Change]]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    started: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    doubled: set[str] = field(default_factory=set)
    whole: Mapping[str, str] = field(default_factory=dict)
    names: Names = field(init=False)
    layouts: Layouts = field(init=False)
    embedding: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.names, self.layouts = Names(self.base), Layouts(self.base)
        self.embedding = self._input_embedding()

    def run(self) -> dict[str, Change]:
        modules, others = self._sorted_keys()
        self.whole = others
        self.names.learn([*(module for module, _ in modules), *others])
        self._check_replication()
        if self.config["target_parameters"]:
            self._experts(modules)
        for (module, _), leaves in modules.items():
            if "ia3" in leaves:
                self._ia3(module, leaves)
            elif "tokens" in leaves:
                self._tokens(module, leaves)
            elif leaves.keys() & {"embedding A", "embedding B"}:
                self._lora(module, leaves, "embedding A", "embedding B")
            else:
                self._lora(module, leaves, "A", "B")
        for path, key in others.items():
            self._replaced(path, key)
        self._raise_problems()
        return self._one_per_tensor()

    # -- keys

    def _sorted_keys(self) -> tuple[dict[tuple[str, int], dict[str, str]], dict[str, str]]:
        """Keys by module (and depth of wrapping), and the keys of whole tensors by parameter path."""
        modules: dict[tuple[str, int], dict[str, str]] = {}
        others: dict[str, str] = {}
        for key in self.weights.infos:
            path = key.removeprefix("base_model.model.")
            leaf = next((leaf for leaf in _LEAVES if path.endswith(f".{leaf}")), None)
            inner = path.removesuffix(f".{leaf}").split(".") if leaf else path.split(".")
            clean = ".".join(part for part in inner if part not in _WRAPPERS)
            if matches(self.skip, clean, path):
                self.skipped.append(key)
            elif path.endswith(".lora_velora_embed") and self.config["velora_config"]:
                continue  # state of VeLoRA's backward pass
            elif leaf:
                if inner[-2:] == ["base_layer", "out_proj"]:
                    self.doubled.add(clean)
                depth = 0
                while inner[-1 - depth] == "base_layer":
                    depth += 1
                modules.setdefault((clean, depth), {})[_LEAVES[leaf]] = key
            elif "original_module" in inner and clean in others:
                continue
            else:
                others[clean] = key
        return modules, others

    def _problem(self, kind: str, line: str) -> None:
        self.problems.setdefault(kind, []).append(line)

    def _raise_problems(self) -> None:
        if not self.problems:
            return
        lines = []
        for kind, found in self.problems.items():
            head = f"{kind} ({len(found)}): "
            lines.append(head + "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else ""))
        named = self.config["base_model_name_or_path"]
        trained = f" (it says it was trained on {named!r})" if named else ""
        raise MismatchError(lines, title=f"{self.label} does not fit {self.base.label}{trained}")

    def _target(self, module: str, *parameters: str) -> str | None:
        """The base's tensor for one of a module's parameters, or None with the problem noted."""
        found = self.names.find(module)
        for parameter in parameters:
            if found is not None and f"{found}.{parameter}" in self.base.infos:
                return self._usable(f"{found}.{parameter}")
        head = self._tied_head(module) if parameters[0] == "weight" else None
        if head is not None:
            return head
        name = f"{module}.{parameters[0]}"
        if self.config.saves(module):
            self._problem(
                "saved whole with the adapter, but the base has no such tensor (open a base that has it, or leave it "
                "out with skip)",
                f"{name}{self.names.nearest(name)}",
            )
        else:
            self._problem("match no tensor of the base", f"{name}{self.names.nearest(name)}")
        return None

    def _usable(self, name: str) -> str | None:
        info = self.base.infos[name]
        scales = [f"{name}.absmax", f"{name}_scale_inv", f"{name}_scale", f"{name}.SCB"]
        if not is_float(info.dtype) or any(scale in self.base.infos for scale in scales):
            self._problem(
                "quantised in the base (give the base in floating point, as it was before quantisation)",
                f"{name} is {str(info.dtype).removeprefix('torch.')}",
            )
            return None
        return name

    # -- tied embeddings

    def _says_tied(self) -> bool | None:
        config: Mapping[str, Any] = getattr(self.base, "config", None) or {}
        text = config.get("text_config")
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
        return None if tied is None else bool(tied)

    def _input_embedding(self) -> str | None:
        named = [
            name
            for name, info in self.base.infos.items()
            if len(info.shape) == 2 and name.split(".")[-2:-1] and name.split(".")[-2] in _INPUT_EMBEDDINGS
        ]
        return named[0] if len(named) == 1 else None

    def _tied_head(self, module: str) -> str | None:
        """The input embedding, for a head that the base does not store because it is tied to it."""
        if not is_head(f"{module}.weight") or self._says_tied() is False:
            return None
        if self.embedding is None:
            return None
        rows = self.base.infos[self.embedding].shape[0]
        own = [self.weights.infos[key].shape for key in self.weights.infos if f".{module}." in f".{key}"]
        return self.embedding if any(rows in shape for shape in own) else None

    def _canonical(self, name: str) -> str:
        return self.base.aliases.get(name, name)

    def _has_language_head(self) -> bool | None:
        """Whether the live model predicts tokens, with a head that may be tied; None where nothing says so."""
        task = self.config["task_type"]
        if task is not None:
            return task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
        kinds = (getattr(self.base, "config", None) or {}).get("architectures")
        return (
            bool(re.search(r"LMHead|CausalLM|MaskedLM|ConditionalGeneration|PreTraining", kinds[0])) if kinds else None
        )

    def _is_tied(self, name: str) -> bool:
        """Whether another module of the live model uses this tensor too."""
        if self._has_language_head() is False:
            return False
        if name in self.base.aliases.values():
            return True
        if name != self.embedding or self._says_tied() is False or not self._has_language_head():
            return False
        shape = self.base.infos[name].shape
        return not any(is_head(other) and info.shape == shape for other, info in self.base.infos.items())

    def _one_per_tensor(self) -> dict[str, Change]:
        result: dict[str, Change] = {}
        for name, found in self.changes.items():
            tied = self._is_tied(name) or any(is_head(f"{site}.weight") and not is_head(name) for site, _ in found)
            sites = list(dict.fromkeys(site for site, _ in found))
            by_site = {site: [change for other, change in found if other == site] for site in sites}
            everywhere = all(isinstance(change, ReplacedRows) for _, change in found)
            nothing = [
                site
                for site in sites
                if tied and all(isinstance(c, Replaced) and c.is_copy and c.is_unchanged() for c in by_site[site])
            ]
            changed = [site for site in sites if site not in nothing] or sites[:1]
            if len(changed) > 1:
                self._check_same(name, changed, by_site)
            elif tied and not (nothing == sites or everywhere or self.tied == "both"):
                raise self.config.refuse(
                    "modules_to_save" if self.config.saves(changed[0]) else "target_modules",
                    f"it changes {changed[0]}, whose tensor ({name}) the base shares with "
                    f"{'its input embedding' if is_head(changed[0] + '.weight') else 'its output head'}. PEFT's live "
                    "model changes one of the two uses, a tied checkpoint only both. Pass tied='both' to change "
                    "both (what merge_and_unload makes of a LoRA), or use a base whose head is not tied.",
                )
            parts = self._without_copy(name, by_site[changed[0]])
            result[name] = parts[0] if len(parts) == 1 else Together(tuple(parts))
        order = {name: position for position, name in enumerate(self.base.infos)}
        return dict(sorted(result.items(), key=lambda entry: order[entry[0]]))

    def _without_copy(self, name: str, parts: list[Change]) -> list[Change]:
        """Drops a saved copy of the base beside a change that is computed from the base itself."""
        if not any(isinstance(part, Dora | Scaled | ReplacedRows) for part in parts):
            return parts
        changed = [part for part in parts if isinstance(part, Replaced) and not (part.is_copy and part.is_unchanged())]
        if changed:
            raise self.config.refuse(
                next(name for name in ("use_dora", "trainable_token_indices", "peft_type") if self.config[name]),
                f"the adapter changes {name} and also holds a {name} of its own that differs from the base's. Use the "
                "base it was trained on.",
            )
        return [part for part in parts if not isinstance(part, Replaced)]

    def _check_same(self, name: str, sites: list[str], by_site: dict[str, list[Change]]) -> None:
        """One tensor changed at two places of the live model: fine if the two are one change, kept once."""
        first, *others = [[part.ready() for part in by_site[site]] for site in sites]
        for start, stop in blocks(self.base.infos[name].shape):
            expected = sum(part.rows(start, stop) for part in first)
            for other in others:
                if not torch.allclose(expected, sum(part.rows(start, stop) for part in other), rtol=1e-5, atol=1e-7):  # type: ignore[arg-type]
                    raise self.config.refuse(
                        "modules_to_save" if any(self.config.saves(site) for site in sites) else "target_modules",
                        f"{' and '.join(sites)} are one tensor of the base ({name}), and the adapter changes them "
                        "differently. Use a base whose head is not tied to its embedding.",
                    )

    def _add(self, site: str, change: Change) -> None:
        self.changes.setdefault(self._canonical(change.name), []).append((site, change))

    # -- the kinds

    def _check_replication(self) -> None:
        ranges = self.config["layer_replication"]
        if not ranges:
            return
        stack = [layer for start, stop in ranges for layer in range(start, stop)]
        if stack != list(range(len(stack))):
            raise self.config.refuse(
                "layer_replication",
                f"the adapter was trained on a stack of {len(stack)} layers made from copies ({ranges}), so it is not "
                "a change of this base. Build that stack first (passthrough) and save the adapter without the field.",
            )

    def _dtype(self, *keys: str) -> torch.dtype:
        return compute_dtype(*(self.weights.infos[key].dtype for key in keys))

    def _reader(self, key: str) -> Callable[[], Tensor]:
        return lambda: self.weights.read(key)

    def _checked_rank(self, key: str, found: int, path: str) -> bool:
        rank = self.config.rank(path)
        if rank != found:
            self._problem("have another rank than adapter_config.json says", f"{key} has {found}, r is {rank}")
        return rank == found

    def _lora(self, module: str, leaves: Mapping[str, str], a: str, b: str) -> None:
        missing = [leaf for leaf in (a, b) if leaf not in leaves]
        if missing:
            found = ", ".join(leaves.values())
            self._problem("are incomplete in the adapter", f"{module} has {found} but no {' and '.join(missing)}")
            return
        name = self._target(module, "weight", "in_proj_weight")
        if name is None:
            return
        shape_a, shape_b = self.weights.infos[leaves[a]].shape, self.weights.infos[leaves[b]].shape
        shape = self.base.infos[name].shape
        if not self._checked_rank(leaves[a], shape_a[0], module):
            return
        embedding = a == "embedding A"
        layout = self._layout(name, module, shape, shape_a, shape_b, embedding)
        if layout is None:
            return
        dtype = self._dtype(leaves[a], leaves[b])
        scaling, transposed = self.config.scaling(module), layout == "transposed"
        if module in self.doubled:
            # PEFT's MultiheadAttention adds the change of its out_proj twice, in training as in merge_and_unload
            scaling *= 2
        read_a, read_b = self._reader(leaves[a]), self._reader(leaves[b])

        # a layer that was saved whole beside its factors lacks the part that was moved already
        moved = self.config.mutated_init is not None and f"{module}.weight" not in self.whole

        def factors() -> tuple[Tensor, Tensor]:
            down, up = read_a().to(dtype).flatten(1), read_b().to(dtype).flatten(1) * scaling
            left, right = (down.T * scaling, read_b().to(dtype).T) if transposed else (up, down)
            if not moved:
                return left, right
            left0, right0 = self._initial(name, left.shape[1], scaling)
            return torch.cat([left, -left0.to(dtype)], dim=1), torch.cat([right, right0.to(dtype)])

        if self.config.mutated_init and (embedding or len(shape) != 2):
            raise self.config.refuse(
                "init_lora_weights", f"{self.config.mutated_init} on {name}, which is not a linear layer."
            )
        product = Product(name, shape, dtype, factors)
        if not self.config["use_dora"]:
            if "magnitude" in leaves:
                self._problem(
                    "are DoRA magnitudes, but use_dora is not set in adapter_config.json", leaves["magnitude"]
                )
            self._add(module, product)
            self._lora_bias(module, leaves, scaling)
            return
        if "magnitude" not in leaves:
            self._problem(
                "are incomplete in the adapter", f"{module} has no lora_magnitude_vector, but use_dora is set"
            )
            return
        per_column = transposed
        outputs = matrix_shape(shape)[1] if per_column else shape[0]
        if self.weights.infos[leaves["magnitude"]].numel != outputs:
            self._shape_problem(leaves["magnitude"], name)
            return
        wide = compute_dtype(dtype, self.base.infos[name].dtype, self.weights.infos[leaves["magnitude"]].dtype)
        self._add(module, Dora(name, shape, wide, product, self._reader(leaves["magnitude"]), per_column, self.base))

    def _stored_in_out(self, name: str) -> bool:
        """Whether a square matrix is stored as [in, out], as PEFT finds from the live module's type."""
        votes = self.layouts.votes_on(name)
        if len(votes) == 1:
            return next(iter(votes))
        if votes:
            raise self.config.refuse(
                "fan_in_fan_out",
                f"{name} is square and its layer stores matrices both as [out, in] and as [in, out], so its "
                "orientation cannot be told. Merge it with PEFT (`merge_and_unload`) and use the result.",
            )
        return bool(self.config["fan_in_fan_out"])

    def _shape_problem(self, key: str, name: str, *, hint: str = "") -> None:
        have, base = list(self.weights.infos[key].shape), list(self.base.infos[name].shape)
        self._problem("do not fit the base's shapes", f"{key} is {have}, {name} is {base}{hint}")

    def _layout(
        self,
        name: str,
        module: str,
        shape: tuple[int, ...],
        shape_a: tuple[int, ...],
        shape_b: tuple[int, ...],
        embedding: bool,
    ) -> Literal["straight", "transposed"] | None:
        """How B A lies in the base's tensor, checked against all three shapes; None with the problem noted."""
        hint = ""
        if len(shape) > 2 and len(shape_a) == len(shape):
            if (shape_b[0], *shape_a[1:]) == shape and shape_a[0] == shape_b[1]:
                return "straight"
            if shape_a[1] > shape[1] and shape_a[1] % shape[1] == 0 and shape_b[0] == shape[0]:
                raise self.config.refuse(
                    "target_modules",
                    f"{module} is a convolution in {shape_a[1] // shape[1]} groups. LoRA mixes all its inputs, which a "
                    "grouped kernel cannot hold, so it is not a change of its weights.",
                )
        elif len(shape) == len(shape_a) == 2 and shape_a[0] == shape_b[1]:
            straight, transposed = (shape_b[0], shape_a[1]) == shape, (shape_a[1], shape_b[0]) == shape
            if embedding and transposed:
                return "transposed"
            if embedding and shape_b[0] == shape[1]:
                hint = f" (a vocabulary of {shape_a[1]} tokens against {shape[0]})"
            elif not embedding and straight and transposed:
                return "transposed" if self._stored_in_out(name) else "straight"
            elif not embedding and (straight or transposed):
                return "straight" if straight else "transposed"
        have = f"A {list(shape_a)} and B {list(shape_b)}"
        self._problem("do not fit the base's shapes", f"{module} has {have}, {name} is {list(shape)}{hint}")
        return None

    def _lora_bias(self, module: str, leaves: Mapping[str, str], scaling: float) -> None:
        if "B.bias" not in leaves:
            return
        found = self.names.find(module)
        name = f"{found}.bias"
        if name not in self.base.infos:
            raise self.config.refuse(
                "lora_bias",
                f"{module} has no bias in the base, so there is no tensor that could hold the one it learned.",
            )
        key = leaves["B.bias"]
        if self.weights.infos[key].shape != self.base.infos[name].shape:
            self._shape_problem(key, name)
            return
        dtype = self._dtype(key)
        self._add(
            module, Added(name, self.base.infos[name].shape, dtype, lambda: self.weights.read(key).to(dtype) * scaling)
        )

    def _initial(self, name: str, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """The part of the base that PiSSA (arXiv:2404.02948) or OLoRA (arXiv:2406.01775) moved into the adapter.

        Computed again from the base as PEFT computes it, in float32; signs of singular vectors cancel in the product.
        """
        if name not in self.started:
            weight = self.base.read(name).to(torch.float32)
            if self.config.mutated_init == "pissa":
                # the scaling cancels: PEFT divides the singular values by it and multiplies the product
                left, values, right = torch.linalg.svd(weight, full_matrices=False)
                left = left[:, :rank] * values[:rank]
            else:
                # PEFT takes the QR of the tensor as stored, also where that is [in, out]
                left, right = torch.linalg.qr(weight)
                left = left[:, :rank] * scaling
            self.started[name] = (left.contiguous(), right[:rank].contiguous())
        return self.started[name]

    def _ia3(self, module: str, leaves: Mapping[str, str]) -> None:
        name = self._target(module, "weight")
        if name is None:
            return
        key, shape = leaves["ia3"], self.base.infos[name].shape
        count = self.weights.infos[key].numel
        feedforward, groups = self.config.is_feedforward(module), 1
        if len(shape) == 2:
            # [out, in] or, for Conv1D, [in, out]: outputs are the rows of the first and the columns of the second
            fits_straight = count == shape[1 if feedforward else 0]
            fits_flipped = count == shape[0 if feedforward else 1]
            if fits_straight and fits_flipped:
                flipped = self._stored_in_out(name)
            elif fits_straight or fits_flipped:
                flipped = fits_flipped
            else:
                self._shape_problem(key, name)
                return
            per_column = feedforward != flipped
        else:
            per_column = feedforward
            if feedforward:
                groups = count // shape[1] if len(shape) > 1 and count % shape[1] == 0 else 0
                if not groups or shape[0] % groups:
                    self._shape_problem(key, name)
                    return
            elif count != shape[0]:
                self._shape_problem(key, name)
                return
        dtype = compute_dtype(self._dtype(key), self.base.infos[name].dtype)
        self._add(module, Scaled(name, shape, dtype, self._reader(key), per_column, self.base, groups))
        bias = f"{name.removesuffix('weight')}bias"
        if not feedforward and bias in self.base.infos:
            info = self.base.infos[bias]
            self._add(
                module,
                Scaled(bias, info.shape, compute_dtype(dtype, info.dtype), self._reader(key), False, self.base),
            )

    def _tokens(self, module: str, leaves: Mapping[str, str]) -> None:
        name = self._target(module, "weight")
        if name is None:
            return
        key, shape = leaves["tokens"], self.base.infos[name].shape
        indices = self.config.token_indices(module)
        if indices is None:
            raise self.config.refuse("trainable_token_indices", f"it does not say which tokens {key} stands for.")
        if self.weights.infos[key].shape != (len(indices), *shape[1:]):
            self._shape_problem(key, name, hint=f", and {len(indices)} tokens are listed")
            return
        outside = [index for index in indices if not 0 <= index < shape[0]]
        if outside:
            raise self.config.refuse(
                "trainable_token_indices",
                f"tokens {shortened([str(index) for index in outside])} are beyond the base's {shape[0]} tokens.",
            )
        dtype = compute_dtype(self._dtype(key), self.base.infos[name].dtype)
        self._add(module, ReplacedRows(name, shape, dtype, self._reader(key), indices, self.base))

    def _replaced(self, path: str, key: str) -> None:
        module, _, parameter = path.rpartition(".")
        name = self._target(module, parameter)
        if name is None:
            return
        info = self.base.infos[name]
        if self.weights.infos[key].shape != info.shape:
            saved = self.weights.infos[key].shape
            resized = is_embedding(name) or is_head(name)
            hint = (
                f" (a vocabulary of {saved[0]} tokens against {info.shape[0]})" if resized and len(saved) == 2 else ""
            )
            self._shape_problem(key, name, hint=hint)
            return
        copied = ".base_layer." in key or ".original_module." in key or is_embedding(name) or is_head(name)
        copy = copied and parameter == "weight" and not self.config.saves(module)
        dtype = compute_dtype(self._dtype(key), info.dtype)
        self._add(module, Replaced(name, info.shape, dtype, self._reader(key), self.base, copy))

    # -- experts

    def _experts(self, modules: dict[tuple[str, int], dict[str, str]]) -> None:
        """Takes the modules that `target_parameters` wraps out of `modules`.

        PEFT wraps one parameter in another: of n parameters of one module, the first one registered is innermost, so
        its keys have n - 1 times `base_layer`. Which is which is told by the shapes, else by the usual order.
        """
        patterns: list[str] = list(self.config["target_parameters"])
        holders: dict[str, list[str]] = {}
        for module, depth in modules:
            found = self.names.find(module)
            if found is None or not modules[module, depth].keys() & {"A", "B"}:
                continue
            wanted = {
                pattern.rpartition(".")[2]
                for pattern in patterns
                if f"{module}.{pattern.rpartition('.')[2]}" == pattern
                or f"{module}.{pattern.rpartition('.')[2]}".endswith(f".{pattern}")
            }
            present = [name for name in wanted if self._pieces(found, name)]
            if present:
                holders.setdefault(module, present)
        for module, parameters in holders.items():
            depths = sorted((depth for other, depth in modules if other == module), reverse=True)
            leaves = {depth: modules.pop((module, depth)) for depth in depths}
            self._expert_module(module, parameters, leaves)

    def _pieces(self, module: str, parameter: str) -> str | list[list[str]] | None:
        """The base's tensor for one fused parameter, or for each expert the tensors that make up its rows."""
        if f"{module}.{parameter}" in self.base.infos:
            return f"{module}.{parameter}"
        for spelling in _FUSED.get(parameter, ()):
            found: list[list[str]] = []
            while all(f"{module}.{len(found)}.{part}.weight" in self.base.infos for part in spelling):
                found.append([f"{module}.{len(found)}.{part}.weight" for part in spelling])
            if found:
                return found
        return None

    def _fused_shape(self, pieces: str | list[list[str]]) -> tuple[int, ...]:
        if isinstance(pieces, str):
            return self.base.infos[pieces].shape
        shapes = [self.base.infos[name].shape for name in pieces[0]]
        return (len(pieces), sum(shape[0] for shape in shapes), shapes[0][1])

    def _expert_module(self, module: str, parameters: list[str], leaves: dict[int, dict[str, str]]) -> None:
        from itertools import permutations

        found = self.names.find(module)
        assert found is not None
        broken = [entry for entry in leaves.values() if entry.keys() != {"A", "B"}]
        if broken or len(parameters) != len(leaves):
            self._problem(
                "do not fit target_parameters",
                f"{module} has {len(leaves)} pairs of factors for the parameters {', '.join(sorted(parameters))}",
            )
            return
        pieces = {parameter: self._pieces(found, parameter) or found for parameter in parameters}
        shapes = {parameter: self._fused_shape(pieces[parameter]) for parameter in parameters}
        depths = sorted(leaves, reverse=True)
        fitting = [
            order
            for order in permutations(sorted(parameters))
            if all(self._expert_layouts(shapes[p], leaves[d]) for p, d in zip(order, depths))
        ]
        if not fitting:
            for parameter in sorted(parameters):
                self._problem("do not fit the base's shapes", f"{module}.{parameter} is {list(shapes[parameter])}")
            return
        # parameters are registered input side first in every architecture of transformers
        usual = [p for p in ("gate_up_proj", "gate_proj", "up_proj", "down_proj") if p in parameters]
        order = fitting[0] if len(fitting) == 1 else next((o for o in fitting if list(o) == usual), None)
        if order is None:
            raise self.config.refuse(
                "target_parameters",
                f"which factors of {module} belong to which of {', '.join(sorted(parameters))} cannot be told: their "
                "shapes fit in more than one way.",
            )
        layouts = [self._expert_layouts(shapes[p], leaves[d]) for p, d in zip(order, depths)]
        told = {layout for options in layouts if len(options) == 1 for layout in options}
        for parameter, depth, options in zip(order, depths, layouts):
            if len(options) > 1 and len(told) != 1:
                told = self._layout_by_age(self._layout_by_shapes(found)) or told
            chosen = options if len(options) == 1 else options & told
            if len(chosen) != 1:
                raise self.config.refuse(
                    "target_parameters",
                    f"{module}.{parameter} is square, so it cannot be told whether it is stored as [expert, out, in] "
                    "or as [expert, in, out].",
                )
            self._expert_parameter(module, parameter, leaves[depth], pieces[parameter], shapes[parameter], *chosen)

    def _layout_by_age(self, stored: set[str]) -> set[str]:
        """How the PEFT that trained the adapter read a square expert parameter that is stored in this way."""
        version = self.config.version
        if version < (0, 19):
            return {"in out"}
        if version == (0, 19, 0):  # took the two ways for each other
            return {"in out" if layout == "out in" else "out in" for layout in stored}
        return stored

    def _layout_by_shapes(self, found: str) -> set[str]:
        """The layout of a module's experts by a sibling that is not square: gate_up_proj has twice as many outputs."""
        info = self.base.infos.get(f"{found}.gate_up_proj")
        if info is None or len(info.shape) != 3:
            return set()
        bias = self.base.infos.get(f"{found}.gate_up_proj_bias")
        down = self.base.infos.get(f"{found}.down_proj")
        _, first, second = info.shape
        if bias is not None and first != second:
            return {"out in" if bias.shape[-1] == first else "in out"}
        if down is not None and first != second:
            inner, outer = down.shape[1:]
            options = {"out in"} if first == 2 * outer and second == inner else set()
            return options | ({"in out"} if second == 2 * inner and first == outer else set())
        return set()

    def _expert_layouts(self, shape: tuple[int, ...], leaves: Mapping[str, str]) -> set[str]:
        a, b = self.weights.infos[leaves["A"]].shape, self.weights.infos[leaves["B"]].shape
        if len(shape) == 2:
            return {"out in"} if (b[0], a[1]) == shape and a[0] == b[1] else set()
        experts, first, second = shape
        if a[0] != b[1] or a[0] % experts:
            return set()
        return {
            layout
            for layout, out, inner in (("out in", first, second), ("in out", second, first))
            if (b[0], a[1]) == (out, inner)
        }

    def _expert_parameter(
        self,
        module: str,
        parameter: str,
        leaves: Mapping[str, str],
        pieces: str | list[list[str]],
        shape: tuple[int, ...],
        layout: str,
    ) -> None:
        path = f"{module}.{parameter}"
        key_a, key_b = leaves["A"], leaves["B"]
        experts = shape[0] if len(shape) == 3 else 1
        rank = self.weights.infos[key_a].shape[0] // experts
        if not self._checked_rank(key_a, rank, path):
            return
        dtype, scaling = self._dtype(key_a, key_b), self.config.scaling(path)

        def factors(expert: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
            # A is [expert * rank, in] with the expert slowest, B is [out, rank * expert] with the expert fastest
            down = self.weights.read(key_a).reshape(experts, rank, -1)[expert].to(dtype)
            up = self.weights.read(key_b).reshape(-1, rank, experts)[:, :, expert].to(dtype) * scaling
            if layout == "in out":
                return down.T, up.T
            return up[rows], down

        if isinstance(pieces, str):
            name = self._usable(pieces)
            if name is not None and len(shape) == 3:
                self._add(path, Experts(name, shape, dtype, factors))
            elif name is not None:
                self._add(path, Product(name, shape, dtype, lambda: factors(0)))
            return
        for expert, names in enumerate(pieces):
            start = 0
            for name in names:
                info = self.base.infos[name]
                rows = slice(start, start + info.shape[0])
                start += info.shape[0]
                if self._usable(name):
                    self._add(path, Product(name, info.shape, dtype, _bound(factors, expert, rows)))


def _bound(
    factors: Callable[[int, slice], tuple[Tensor, Tensor]], expert: int, rows: slice
) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: factors(expert, rows)


# -- the adapter -------------------------------------------------------------------------------------------------------


class Adapter:
    """A PEFT adapter over its base, as a source of deltas: base + delta is what PEFT's live model computes.

    Covered: LoRA with everything that LoraConfig can say about weights (rank-stabilised, patterns of rank and alpha,
    Conv1D, embeddings, convolutions, biases, whole saved modules, single tokens, expert parameters), DoRA, IA3, and the
    starts that move a part of the base into the adapter where that part can be computed again (PiSSA, OLoRA).
    Deltas are float32 (float64 if stored so), named and laid out as the base's tensors. A tensor that the live model
    uses twice (a tied head) has one delta, under the name that the base stores it by.

    Attributes:
        label: the path, for messages.
        path: the folder.
        config: adapter_config.json as it stands.
        base: the source it was opened over.
        infos: shape and dtype of each delta, in the base's order. Names that are absent don't change.
        aliases: empty, see above.
        skipped: keys of the file that `skip` left out.
    """

    def __init__(
        self,
        label: str,
        path: Path,
        config: AdapterConfig,
        weights: _Weights,
        base: TensorSource,
        changes: Mapping[str, Change],
        skipped: Sequence[str] = (),
    ):
        self.label, self.path, self.base = label, path, base
        self.config: Mapping[str, Any] = config.values
        self.kind = "DORA" if config["use_dora"] else config.kind
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(change.shape, change.dtype) for name, change in changes.items()
        }
        self.aliases: Mapping[str, str] = {}
        self.skipped = tuple(skipped)
        self._weights, self._changes = weights, dict(changes)
        self._ready: OrderedDict[str, Ready] = OrderedDict()
        self._block: tuple[str, int, Tensor] | None = None
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        base: TensorSource,
        *,
        skip: Sequence[str] = (),
        tied: Tied = "refuse",
        revision: str | None = None,
    ) -> "Adapter":
        """Opens an adapter over its base. Reads headers only, except to compare copies of tied tensors.

        Args:
            path: a folder with adapter_config.json and adapter_model.safetensors (or .bin, read without running code),
                one of these files, or a hub id.
            base: the model it was trained on: any source of its tensors, with or without a prefix to their names.
            skip: shell-style patterns of modules or parameters of the adapter to leave out (`classifier.*`).
            tied: what to do when the adapter changes one use of a tensor that the base ties to another. PEFT's live
                model changes the one use, which a tied checkpoint cannot hold: "refuse", or "both" to change both, as
                PEFT's merge_and_unload does with LoRA. An adapter that holds the same change for both uses
                (`ensure_weight_tying`), or single tokens, changes both by itself.
            revision: of a hub id.

        Raises:
            NotFoundError: no such adapter, or one of its two files is missing.
            UnsupportedAdapterError: it computes something that is not a change of weights; names the field.
            MismatchError: it does not fit the base; every tensor concerned, grouped.
            SourceError: a file that is broken, unsafe, empty or quantised.
        """
        if tied not in ("refuse", "both"):
            raise ValueError(f"tied: expected 'refuse' or 'both', got {tied!r}")
        folder = _located(path, revision)
        label = str(path)
        config = AdapterConfig.read(folder / CONFIG)
        weights = _Weights(next(folder / name for name in WEIGHTS if (folder / name).is_file()), label)
        opening = _Opening(config, weights, base, tied, label, tuple(skip))
        changes = opening.run()
        if not changes:
            raise NotAModelError(f"{label}: changes no tensor{' that skip leaves' if opening.skipped else ''}.")
        return cls(label, folder, config, weights, base, changes, opening.skipped)

    def _made_ready(self, name: str) -> Ready:
        change = self._changes.get(name)
        if change is None:
            raise MissingTensorError(f"{self.label} does not change {name!r}." + did_you_mean(name, self._changes))
        with self._lock:
            if name not in self._ready:
                self._ready[name] = change.ready()
                while len(self._ready) > 4:
                    self._ready.popitem(last=False)
            self._ready.move_to_end(name)
            return self._ready[name]

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = self._made_ready(name).rows(start, stop)
        # a zero norm or an overflow would spread from here; the factors themselves were checked
        return finite(rows, name, self.label)

    def read(self, name: str) -> Tensor:
        """The whole delta, shaped as the base's tensor.

        Raises:
            MissingTensorError: the adapter does not change this tensor.
            NonFiniteError: the adapter holds NaN or infinity, or makes them.
        """
        self._made_ready(name)
        info = self.infos[name]
        whole = torch.empty(matrix_shape(info.shape), dtype=info.dtype)
        for start, stop in blocks(info.shape):
            whole[start:stop] = self._rows(name, start, stop)
        return whole.reshape(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the delta in row-major order: the same bits as the slice of `read`."""
        self._made_ready(name)
        shape = self.infos[name].shape
        columns = matrix_shape(shape)[1]
        pieces = []
        for index, (first, last) in enumerate(blocks(shape)):
            low, high = max(start, first * columns), min(stop, last * columns)
            if low >= high:
                continue
            with self._lock:
                kept = self._block
            if kept is None or kept[:2] != (name, index):
                kept = (name, index, self._rows(name, first, last).reshape(-1))
                with self._lock:
                    self._block = kept
            pieces.append(kept[2][low - first * columns : high - first * columns])
        if not pieces:
            return torch.empty(0, dtype=self.infos[name].dtype)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def low_rank(self, name: str) -> LowRank | None:
        """The delta as a product with the scaling in `left`, or None where it is not one (DoRA, IA3, saved modules,
        expert parameters that the base stores fused).
        """
        change = self._changes.get(name)
        if change is not None and not change.factored:
            return None
        return self._made_ready(name).product

    def check(self) -> None:
        """Reads every tensor of the adapter (not of the base).

        Raises:
            NonFiniteError: one of them holds NaN or infinity.
        """
        for key in self._weights.infos:
            self._weights.read(key)

    def content_hash(self) -> str:
        """One hash of the adapter's tensors and of its configuration.

        Keys that only say where the base lies or which PEFT wrote the file don't count.
        """
        from blake3 import blake3

        told = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping", "task_type"}
        config = {name: value for name, value in sorted(self.config.items()) if name not in told}
        digest = blake3(json.dumps(config, sort_keys=True).encode())
        for key, info in sorted(self._weights.infos.items()):
            values = self._weights.read(key).contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"\0{key}\0{info.dtype}\0{info.shape}\0".encode())
            digest.update(values.numpy().tobytes())
        return str(digest.hexdigest())

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __repr__(self) -> str:
        return f"Adapter({self.label!r}, {self.kind}, {len(self.infos)} tensors)"


def _located(path: str | os.PathLike[str], revision: str | None) -> Path:
    folder = folder_of(Path(path))
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        folder = _from_hub(str(path), revision)
    if not folder.is_dir():
        raise NotFoundError(f"{path}: no such folder. An adapter is a folder with {CONFIG} and {WEIGHTS[0]}.")
    if not (folder / CONFIG).is_file():
        raise NotFoundError(f"{path}: has no {CONFIG}, so it is not a PEFT adapter.")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise NotFoundError(f"{path}: has {CONFIG} but neither {WEIGHTS[0]} nor {WEIGHTS[1]}. Copy the adapter again.")
    return folder


def _from_hub(name: str, revision: str | None) -> Path:
    """The adapter's files from the hub, or from huggingface_hub's cache where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG, *WEIGHTS], etag_timeout=10))
    except RepositoryNotFoundError:
        raise NotFoundError(f"{name}: no such folder, and no such repository on the hub.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        pass  # no network, or the hub refused: what is in the cache still serves
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise NotFoundError(
            f"{name}: no such folder; as a hub id it is not in the local cache and the hub cannot be reached."
        ) from None
