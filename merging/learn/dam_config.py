"""How DAM and Concrete masks are learned: every setting, its default, its range, and what the paper calls it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from merging.learn.masks import Tensors
from taskvec.coefficients import Coefficients
from taskvec.errors import ParameterError, Problems, did_you_mean

_UNSET: Any = object()

_CORRECTED: dict[str, Any] = {
    "masks": "dual",
    "base_merge": "task_arithmetic",
    "mask_lr": 6e-3,
    "mask_steps": 150,
    "safety": "consistency",
    "safety_weight": 1.0,
    "safety_source": "inversion",
    "performance": "teacher",
    "refine_steps": 1,
    "final_mask": "mean",
    "adv_lr": 0.01,
    "coefficient_lr": 1e-3,
    "refit_steps": 0,
    "min_elements": 16,
}
# the released yaml, except that its trigger_norm is read nowhere
_PUBLISHED: dict[str, Any] = {
    "masks": "single",
    "base_merge": "adamerging_task",
    "mask_lr": 1e-3,
    "mask_steps": 1000,
    "safety": "entropy",
    "safety_weight": 0.1,
    "safety_source": "universal",
    "performance": "entropy",
    "refine_steps": 0,
    "final_mask": "sample",
    "adv_lr": 1e-4,
    "coefficient_lr": 1.0,
    "refit_steps": 1000,
    "min_elements": 1,
}


@dataclass(frozen=True, kw_only=True)
class DamConfig:
    """How masks are learned. Defaults are the corrected form; `compat="published"` brings the released code's own.

    Args:
        compat: None, or "published": the released task-wise loop with its three slips (the coefficient loss is taken
            at the last step's coefficients but applied to the initial ones; the coefficient gradient of the mask
            step leaks into the next; perturbed inputs are clamped to [0, 1] in the model's own input space).
        base_merge: "task_arithmetic" (λ = `lam0`, fixed), "adamerging_task" or "adamerging_layer" (λ learned by
            entropy, starting from `lam0`), or coefficients to keep fixed: [task], [task, tensor], task to number, or a
            coefficients file (its path, or the `Coefficients` read from it) with one number per task and tensor.
        lam0: λ of task arithmetic, and where learned coefficients start.
        masks: "dual" (M1 ⊙ M2, as the paper) or "single" (as the released code).
        safety: loss of the safety term: "consistency" (KL from the clean to the perturbed prediction), "entropy" of
            the perturbed prediction, or "none" (Concrete subspace merging).
        safety_weight: weight of the safety loss, ≥ 0 (α in the paper).
        safety_source: what perturbs: "inversion" (triggers found by inversion of each model, see `invert_triggers`),
            "universal" (one untargeted perturbation per task, trained along, as published), "both", or "known".
        known_triggers: task to functions that put a known trigger on a batch's input tensor; used as well as, or with
            safety_source "known" instead of, what is found.
        performance: loss on clean inputs: "entropy" (as published), or "teacher": cross-entropy to the predictions
            of each task's own model on the same unlabelled inputs.
        mask_steps: number of mask steps.
        mask_lr: Adam's step size for the logits.
        temperature: of the relaxation.
        init_logit: initial logits of M1 (0: probability one half).
        safety_logit: initial logits of M2.
        rescale_safety: divide M2 by its mean per tensor, as M1. Without it, M2 can shrink a task vector.
        budget: size of the universal perturbation in the input's own (normalised) units.
        norm: in which the budget is measured: "linf" or "l2".
        adv_lr: Adam's step size for the perturbation.
        adv_steps: perturbation steps per mask step.
        input_range: (low, high) of valid inputs after normalisation, numbers or one per channel; default: measured on
            the adaptation data.
        inversion_steps: optimisation steps of the trigger inversion.
        inversion_size: largest share of the input that an inverted patch may cover, in (0, 1).
        flag: a class is suspected when an inverted patch sends more than this share of inputs to it, in [0, 1].
        restarts: searches from other starting points, of each kind, for a suspected class.
        refine_steps: steps by which two of the inverted triggers, in turn, are adapted to the merged model before each
            mask step. Without it, masks close the holes that were found and leave those beside them.
        refine_lr: Adam's step size for that.
        share_triggers: put each inverted trigger on the inputs of every task, not only of its own.
        final_mask: "mean" (deterministic), "sample" (one relaxed sample) or "bernoulli" (one hard sample).
        coefficient_lr: Adam's step size for learned coefficients.
        clamp_coefficients: clamp λ to [0, 1] in the merge.
        refit_steps: steps that fit learned coefficients again under the final mask.
        refit_lr: Adam's step size for that.
        per_task_masks: one mask per task vector in place of a shared one (memory then grows with the tasks).
        include: shell-style patterns of parameter names to merge (default: all).
        exclude: patterns to leave at the base, for example heads that are not shared.
        min_elements: parameters with fewer elements are merged whole.
        batch_size: inputs of each task per step, where `data` gives tensors and not batches.
        collapse: stop and roll back when the entropy of a task's average prediction falls below this share of where it
            started, in [0, 1); 0 never stops.
        noise: recorded uniform numbers: for each mask step, and then for the final sample, one mapping of name to
            numbers in [0, 1] per mask (M1 and M2 when dual, the tasks' in their order when per task).
        trace: keep every gradient and state in the history (small models only).

    Raises:
        ParameterError: a value out of range; all of them are listed.
    """

    compat: Literal["published"] | None = None
    base_merge: Any = _UNSET
    lam0: float = 0.3
    masks: Literal["dual", "single"] = _UNSET
    safety: Literal["consistency", "entropy", "none"] | None = _UNSET
    safety_weight: float = _UNSET
    safety_source: Literal["universal", "inversion", "both", "known"] = _UNSET
    known_triggers: Mapping[str, Sequence[Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    performance: Literal["entropy", "teacher"] = _UNSET
    mask_steps: int = _UNSET
    mask_lr: float = _UNSET
    temperature: float = 0.5
    init_logit: float = 0.0
    safety_logit: float = 0.0
    rescale_safety: bool = True
    budget: float = 0.33
    norm: Literal["linf", "l2"] = "linf"
    adv_lr: float = _UNSET
    adv_steps: int = 1
    input_range: tuple[Any, Any] | None = None
    inversion_steps: int = 60
    inversion_size: float = 0.03
    flag: float = 0.5
    restarts: int = 4
    refine_steps: int = _UNSET
    refine_lr: float = 0.1
    share_triggers: bool = False
    final_mask: Literal["mean", "sample", "bernoulli"] = _UNSET
    coefficient_lr: float = _UNSET
    clamp_coefficients: bool = False
    refit_steps: int = _UNSET
    refit_lr: float = 1e-3
    per_task_masks: bool = False
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    min_elements: int = _UNSET
    batch_size: int = 16
    collapse: float = 0.5
    noise: Sequence[Tensors] | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        defaults = _PUBLISHED if self.compat == "published" else _CORRECTED
        for name, value in defaults.items():
            if getattr(self, name) is _UNSET:
                object.__setattr__(self, name, value)
        if self.safety is None:
            object.__setattr__(self, "safety", "none")
        self._check()

    def _check(self) -> None:
        problems = Problems()
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if name == "base_merge" and _is_coefficients(value):
                continue
            if not isinstance(value, str | None) or value not in choices:
                problems.add(
                    f"{name}: {value!r} is not one of {', '.join(map(repr, choices))}"
                    + (did_you_mean(value, map(str, choices)) if isinstance(value, str) else "")
                )
        problems.extend(
            f"{one.name}: {getattr(self, one.name)!r} is not true or false"
            for one in fields(self)
            if one.type is bool and not isinstance(getattr(self, one.name), bool)
        )
        problems.extend(self._wrong_collections())
        numbers = [
            (one.name, getattr(self, one.name), one.type is int) for one in fields(self) if one.type in (int, float)
        ]
        wrong = [(name, value, whole) for name, value, whole in numbers if not _is_number(value, whole=whole)]
        if wrong:  # what is no number has no range either
            problems.extend(
                f"{name}: {value!r} is not a {'whole' if whole else 'finite'} number" for name, value, whole in wrong
            ).raise_if_any(ParameterError)
        for name in ("mask_lr", "temperature", "adv_lr", "budget", "coefficient_lr", "refit_lr"):
            if not getattr(self, name) > 0:
                problems.add(f"{name}: {getattr(self, name)} is not positive")
        for name in ("mask_steps", "refit_steps", "inversion_steps", "refine_steps", "adv_steps"):
            if getattr(self, name) < 0:
                problems.add(f"{name}: {getattr(self, name)} is negative")
        for name in ("batch_size", "restarts", "min_elements"):
            if getattr(self, name) < 1:
                problems.add(f"{name}: {getattr(self, name)} is less than 1")
        if self.safety_weight < 0:
            problems.add(f"safety_weight: {self.safety_weight} is negative")
        if not 0 < self.inversion_size < 1:
            problems.add(f"inversion_size: {self.inversion_size} is not in (0, 1)")
        if not 0 <= self.flag <= 1:
            problems.add(f"flag: {self.flag} is not in [0, 1]")
        if not 0 <= self.collapse < 1:
            problems.add(f"collapse: {self.collapse} is not in [0, 1)")
        if self.compat == "published":
            for name, needed in (
                ("masks", "single"),
                ("base_merge", "adamerging_task"),
                ("performance", "entropy"),
                ("safety", "entropy"),
            ):
                if getattr(self, name) != needed:
                    problems.add(
                        f"{name}: the published loop has {needed!r} only; leave compat out for {getattr(self, name)!r}"
                    )
            if self.safety_source != "universal" or self.per_task_masks:
                problems.add("the published loop has one universal perturbation per task and one shared mask only")
        if self.safety_source == "known" and not self.known_triggers:
            problems.add("safety_source: 'known' needs known_triggers")
        if self.per_task_masks and self.masks == "dual":
            problems.add("per_task_masks: has one mask per task; set masks='single'")
        if self.per_task_masks and self.learns_coefficients and self.compat is None:
            problems.add("per_task_masks: with fixed coefficients only; choose another base_merge")
        problems.raise_if_any(ParameterError)

    def _wrong_collections(self) -> list[str]:
        """What is wrong with the settings that are neither a choice nor a number."""
        wrong = [
            f"{name}: {value!r} is not a list of patterns"
            for name, value in (("include", self.include), ("exclude", self.exclude))
            if isinstance(value, str)
            or not isinstance(value, Sequence)
            or not all(isinstance(one, str) for one in value)
        ]
        triggers: Any = self.known_triggers
        if not isinstance(triggers, Mapping) or not all(
            isinstance(several, Sequence) and all(map(callable, several)) for several in triggers.values()
        ):
            wrong.append("known_triggers: expected task to a list of functions from inputs to inputs")
        noise: Any = self.noise
        if noise is not None and not (isinstance(noise, Sequence) and all(isinstance(draw, Mapping) for draw in noise)):
            wrong.append("noise: expected a list of mappings from tensor name to uniform numbers")
        if self.input_range is not None:
            wrong += _wrong_range(self.input_range)
        return wrong

    @property
    def learns_coefficients(self) -> bool:
        """Whether λ is learned along with the masks."""
        return self.base_merge in ("adamerging_task", "adamerging_layer") if isinstance(self.base_merge, str) else False

    @property
    def is_dual(self) -> bool:
        """Whether there are M1 and M2; without a safety term there is nothing that M2 could be trained for."""
        return self.masks == "dual" and self.safety != "none"


def _is_coefficients(value: Any) -> bool:
    """Whether `base_merge` is coefficients, or looks like a file of them; what they say is checked with the tasks."""
    if isinstance(value, str):
        return value.endswith(".safetensors")
    return isinstance(value, Path | Tensor | Mapping | Sequence | Coefficients)


def _wrong_range(given: Any) -> list[str]:
    if not isinstance(given, tuple | list) or len(given) != 2:
        return [f"input_range: {given!r} is not a pair (low, high)"]
    try:
        low, high = (torch.as_tensor(bound, dtype=torch.float32) for bound in given)
    except (TypeError, ValueError, RuntimeError):
        return [f"input_range: {given!r} are not numbers, or lists of one number per channel"]
    fit = low.ndim == 0 or high.ndim == 0 or low.shape == high.shape
    if not fit or not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        return ["input_range: expected two finite numbers, or two lists of one number per channel"]
    return [] if bool((low < high).all()) else ["input_range: low is not below high"]


def _is_number(value: Any, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return whole or math.isfinite(value)


_CHOICES: dict[str, tuple[Any, ...]] = {
    "compat": (None, "published"),
    "base_merge": ("task_arithmetic", "adamerging_task", "adamerging_layer"),
    "masks": ("dual", "single"),
    "safety": ("consistency", "entropy", "none"),
    "safety_source": ("universal", "inversion", "both", "known"),
    "performance": ("entropy", "teacher"),
    "norm": ("linf", "l2"),
    "final_mask": ("mean", "sample", "bernoulli"),
}
