"""adapter_config.json: every field that changes the mathematics is one that we compute, or is refused by its name."""

import json
import math
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from taskvec.errors import CorruptFileError, NotAModelError, UnsupportedAdapterError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# fields that say where the adapter sits or how it was trained, but not what it computes
_SILENT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("peft_version", "peft_type"),
    *("lora_dropout", "layers_to_transform", "layers_pattern", "target_modules", "exclude_modules", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
    # VeLoRA changes the backward pass only; unsloth writes a note of its own
    *("init_ia3_weights", "velora_config", "unsloth_fixed"),
}
# fields that this module computes with
_COMPUTED = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save", "bias"),
    *("lora_bias", "use_dora", "trainable_token_indices", "target_parameters", "ensure_weight_tying"),
    *("init_lora_weights", "layer_replication", "feedforward_modules"),
}
_REFUSED = {
    "alora_invocation_tokens": "aLoRA acts only from its invocation tokens on, so it is not a change of weights.",
    "arrow_config": "Arrow routes between adapters for each token, so it is not a change of weights.",
    "use_qalora": "QALoRA pools the inputs by groups of a quantised layer, so it is not a change of these weights.",
    "use_bdlora": "BD-LoRA stores its factors block-diagonally; convert it to plain LoRA with PEFT first.",
    "monteclora_config": "Monte-CLoRA samples its factors at random, so it is not one change of weights.",
    "kasa_config": "KaSA truncates the base's own weights when it is loaded, and no plain LoRA stands for that.",
    "megatron_config": "The factors are laid out for Megatron's parallel layers; export it to plain PEFT first.",
}
# initialisations that leave the base as it is; MiCA freezes B, and its B is in the file
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
_LOST_INITS = {
    "corda": "CorDA moved a part of the base into the adapter that only the covariance data of its training tells.",
    "lora_ga": "LoRA-GA moved a part of the base into the adapter that only the gradients of its training tell.",
    "loftq": "LoftQ replaced the base by a quantised one; the change is against that base, not against this.",
    "pissa_niter": "this PiSSA start was found by a randomised SVD, which cannot be drawn again.",
}
_SAVE_PLAIN = (
    "Save it as plain LoRA with PEFT: `model.save_pretrained(out, path_initial_model_for_weight_conversion=...)`."
)


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether the path is a PEFT adapter: a folder with its configuration and weights, or one of these two files.

    Looks at names only; nothing is read.
    """
    folder = folder_of(Path(path))
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


def folder_of(path: Path) -> Path:
    return path.parent if path.name in (CONFIG, *WEIGHTS) else path


@dataclass(slots=True)
class AdapterConfig:
    """adapter_config.json, checked: after this, every field that matters is one that we compute."""

    path: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "AdapterConfig":
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CorruptFileError(f"{path}: not valid JSON ({error}).") from None
        if not isinstance(values, dict) or "peft_type" not in values:
            raise NotAModelError(f"{path}: has no `peft_type`, so it is not the configuration of a PEFT adapter.")
        config = cls(path, values)
        config.check()
        return config

    def __getitem__(self, name: str) -> Any:
        return self.values.get(name)

    @property
    def kind(self) -> str:
        return str(self.values["peft_type"]).upper()

    def refuse(self, name: str, reason: str) -> UnsupportedAdapterError:
        return UnsupportedAdapterError(str(self.path.parent), name, reason)

    def check(self) -> None:
        if self.kind not in ("LORA", "IA3"):
            raise self.refuse(
                "peft_type",
                f"{self.kind} is not LORA or IA3. If PEFT can merge it, do so (`merge_and_unload`) and use the result.",
            )
        for name, reason in _REFUSED.items():
            if self[name] not in (None, False, [], {}):
                raise self.refuse(name, reason)
        self._check_init()
        unknown = [name for name in self.values if name not in _SILENT | _COMPUTED | _REFUSED.keys()]
        for name in unknown:
            if self.values[name] not in (None, False, [], {}, "") and self.values[name] != self._default_of(name):
                raise self.refuse(
                    name,
                    f"it is {self.values[name]!r}, and what it changes is not known here. If it changes nothing, "
                    "remove it from adapter_config.json.",
                )
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(self[name] or {}, dict):
                raise self.refuse(name, f"expected a mapping from module pattern to number, found {self[name]!r}.")
        if self.kind == "LORA":
            for name in ("r", "lora_alpha"):
                number = self[name]
                if isinstance(number, bool) or not isinstance(number, (int, float)) or (name == "r" and number < 1):
                    raise self.refuse(name, f"expected a number, found {number!r}.")
            if (self["bias"] or "none") not in ("none", "all", "lora_only"):
                raise self.refuse("bias", f"expected none, all or lora_only, found {self['bias']!r}.")

    def _check_init(self) -> None:
        init = str(self["init_lora_weights"]).lower()
        for name, reason in _LOST_INITS.items():
            if init.startswith(name):
                raise self.refuse("init_lora_weights", f"{init}: {reason} {_SAVE_PLAIN}")
        if init not in ("none", "pissa", "olora", *_PLAIN_INITS):
            raise self.refuse(
                "init_lora_weights", f"{init!r} is not known here; it may have changed the base. {_SAVE_PLAIN}"
            )

    def _default_of(self, name: str) -> Any:
        """The default of a field that only the installed PEFT knows."""
        from peft import IA3Config, LoraConfig

        for known in fields(LoraConfig if self.kind == "LORA" else IA3Config):
            if known.name == name:
                return known.default
        return None

    @property
    def version(self) -> tuple[int, ...]:
        """The PEFT that wrote it, (0,) for those before 0.18, which did not say."""
        return tuple(int(part) for part in re.findall(r"\d+", str(self["peft_version"] or "0"))[:3])

    @property
    def mutated_init(self) -> str | None:
        """`pissa` or `olora`: the base was changed when the adapter was made, by a part that can be computed again."""
        init = str(self["init_lora_weights"]).lower()
        return init if init in ("pissa", "olora") else None

    def _by_pattern(self, patterns: str, default: str, key: str) -> float:
        table: dict[str, float] = self[patterns] or {}
        if not table:
            return float(self[default])
        from peft.utils.other import get_pattern_key

        return float(table.get(get_pattern_key(tuple(table), key), self[default]))

    def rank(self, key: str) -> int:
        return int(self._by_pattern("rank_pattern", "r", key))

    def scaling(self, key: str) -> float:
        """Scaling: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (arXiv:2312.03732)."""
        alpha, rank = self._by_pattern("alpha_pattern", "lora_alpha", key), self.rank(key)
        return alpha / math.sqrt(rank) if self["use_rslora"] else alpha / rank

    def is_feedforward(self, module: str) -> bool:
        patterns = self["feedforward_modules"] or []
        if isinstance(patterns, str):
            return bool(re.fullmatch(patterns, module))
        return any(module.endswith(pattern) for pattern in patterns)

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names this module or one that holds it."""
        return any(f".{name}." in f".{module}." for name in self["modules_to_save"] or [])

    def token_indices(self, module: str) -> tuple[int, ...] | None:
        indices = self["trainable_token_indices"]
        if isinstance(indices, dict):
            found = [rows for name, rows in indices.items() if module == name or module.endswith(f".{name}")]
            if not found and len(indices) == 1:
                found = list(indices.values())
            return tuple(found[0]) if len(found) == 1 else None
        return tuple(indices) if indices is not None else None
