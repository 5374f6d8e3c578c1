"""AdaMerging (arXiv:2310.02575): coefficients by minimising the entropy of predictions; no labels."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from merging.learn.composition import Composition, Vector
from merging.learn.config import LearnConfig
from merging.learn.fit import AdamWSpec, Batches, Constraint, Fit, fit
from merging.learn.objectives import Entropy, MultiTask
from taskvec.coefficients import Coefficients
from taskvec.errors import RecipeError

# the authors' published settings: Adam without decay, start 0.3, coefficients clamped to [0, 1], 500 steps of 16 a task
LR = 1e-3
INITIAL = 0.3
STEPS = 500
UNIT = Constraint(low=0.0, high=1.0)


def adamerging(
    model: nn.Module,
    vectors: Mapping[str, Vector],
    batches: Batches,
    heads: Mapping[str, Callable[[Tensor], Tensor] | None],
    *,
    wise: Literal["layer", "task"] = "layer",
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    lr: float = LR,
    initial: float = INITIAL,
    steps: int = STEPS,
    constraint: Constraint | None = UNIT,
    **options: Any,
) -> tuple[Composition, Fit]:
    """Learn one coefficient per task vector (`task`) or per task vector and parameter tensor (`layer`), without labels.

    Args:
        model: the base.
        vectors: task name to task vector.
        batches: each maps the tasks of `heads` to unlabelled inputs; see `fit`.
        heads: data task to its frozen head, None where the model gives logits.
        wise: `layer` is the paper's layer-wise form: every parameter tensor has its own coefficients.
        forward: see `Forward`.
        lr: of Adam, without weight decay and without clipping.
        initial: every coefficient at the start.
        steps: optimiser steps.
        constraint: the authors clamp to [0, 1]; None does not.
        options: passed on to `fit` (evaluate, patience, seed, …).

    Returns:
        The composition, at the learned coefficients (the model has its base weights), and the run.
    """
    composition = Composition(model, vectors, "block" if wise == "layer" else "global", coefficients=initial)
    objective = MultiTask({task: Entropy(head, forward) for task, head in heads.items()})
    settings: dict[str, Any] = {
        "optimizer": AdamWSpec(lr=lr, weight_decay=0.0),
        "steps": steps,
        "schedule": "constant",
        "clip": None,
        "constraint": constraint,
    }
    return composition, fit(composition, objective, batches, **{**settings, **options})


def learn(
    config: LearnConfig, out: "str | Path", *, progress: Callable[[Mapping[str, Any]], None] | None = None
) -> tuple[Coefficients, Fit]:
    """AdaMerging by a configuration: as `atlas.learn`, with AdaMerging's settings where the file says nothing."""
    from merging.learn import atlas

    given = config.model_fields_set
    if "objective" in given and config.objective != "entropy":
        raise RecipeError(f"objective: {config.objective!r}; AdaMerging minimises entropy. Leave it out, or use atlas.")
    optimizer = config.optimizer.model_copy(
        update={
            "lr": config.optimizer.lr or LR,
            "weight_decay": 0.0 if config.optimizer.weight_decay is None else config.optimizer.weight_decay,
        }
    )
    preset: dict[str, Any] = {"objective": "entropy", "optimizer": optimizer}
    preset |= {} if "initial" in given else {"initial": INITIAL}
    preset |= {} if "schedule" in given else {"schedule": "constant"}
    preset |= {} if "clip" in given else {"clip": None}
    preset |= {} if {"epochs", "steps"} & given else {"steps": STEPS}
    return atlas.learn(config.model_copy(update=preset), out, progress=progress, use="adamerging", constraint=UNIT)
