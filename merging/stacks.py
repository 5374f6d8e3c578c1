"""Merging in memory: stacks of deltas in, merged deltas out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merging.method import MergeMethod, method, weighted_sum
from taskvec.deltas import StackDeltas, Tile, constant
from taskvec.errors import ParameterError, UsageError
from taskvec.sweep import Into, Options, Outcome, Scope, Stage, sweep

Step = "str | tuple[str, Mapping[str, Any]]"


def merge_stacks(
    name: str,
    stacks: "Mapping[str, Tensor | Sequence[Tensor]]",
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    statistics: Scope | None = None,
    scope: str | None = None,
    preprocess: "Sequence[str | Mapping[str, Any]]" = (),
    postprocess: "Sequence[str | Mapping[str, Any]]" = (),
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    base: "Mapping[str, Tensor] | None" = None,
    contributions: bool = False,
    options: Options | None = None,
    outcome: Outcome | None = None,
    **parameters: Any,
) -> Any:
    """Merges deltas that are in memory: name -> [task, *shape] in, name -> [*shape] merged delta out.

    Args:
        name: a method of the catalogue.
        stacks: for each tensor the deltas of all tasks, stacked (or a sequence of them), on any device; for methods in
            weight space (average, slerp, …) the weights themselves.
        weights: one number for each task; default 1.
        scale: one number for the whole merge (λ).
        statistics: "model" over all names together, or "tensor"; default: the method's own.
        scope: the same as `statistics`, "global" meaning "model".
        preprocess: methods applied to the stacks first, as names or mappings `{method: name, parameter: value}`.
        postprocess: methods applied to the merged delta, likewise.
        seed: for randomised methods.
        tasks: task names (they key the random draws).
        base: the base's tensors, name -> [*shape], for the methods that look at them (arcee_fusion).
        contributions: return `Contributions`, the part of each task, instead (methods that have them, as pcb).
        options: device, threads and memory.
        outcome: filled with norms, thresholds, kept fractions and warnings, when given.
        parameters: the method's own parameters.

    Raises:
        ParameterError: parameters unknown or out of range.
        NonFiniteError: a stack holds NaN or infinity.
    """
    chosen = method(name)
    found = {key: stack if isinstance(stack, Tensor) else torch.stack(list(stack)) for key, stack in stacks.items()}
    count = len(next(iter(found.values()))) if found else 0
    if not found:
        raise UsageError("merge_stacks: there are no stacks to merge")
    if weights is not None and len(weights) != count:
        raise ParameterError(f"weights: {len(weights)} weights for {count} tasks")
    wrong = chosen.check_tasks(count)
    if wrong:
        raise UsageError(wrong)
    if scope is not None and statistics is None:
        statistics = "model" if scope in ("global", "model") else "tensor"
    if contributions and not chosen.contributions:
        raise UsageError(f"{name} has no contributions by task; pcb does")
    deltas = StackDeltas(found, tasks, constant(weights if weights is not None else [1.0] * count), base)
    stages = build_stages(chosen, parameters, preprocess, postprocess, count, seed=seed, contributions=contributions)
    if contributions:
        parts = Contributions(found, scale)
        done = sweep(deltas, stages, parts, scope=statistics or chosen.statistics, options=options or Options())
        _fill(outcome, done)
        return parts
    merged = {
        key: torch.empty(info.shape, dtype=info.dtype, device=found[key].device) for key, info in deltas.infos.items()
    }
    done = sweep(
        deltas, stages, Into(merged, scale), scope=statistics or chosen.statistics, options=options or Options()
    )
    _fill(outcome, done)
    return merged


def _fill(outcome: Outcome | None, done: Outcome) -> None:
    if outcome is not None:
        outcome.norms, outcome.facts, outcome.warnings, outcome.passes = (
            done.norms,
            done.facts,
            done.warnings,
            done.passes,
        )


def build_stages(
    chosen: MergeMethod,
    parameters: Mapping[str, Any],
    preprocess: "Sequence[str | Mapping[str, Any]]",
    postprocess: "Sequence[str | Mapping[str, Any]]",
    tasks: int,
    *,
    seed: int = 0,
    contributions: bool = False,
) -> list[Stage]:
    """The stages of a merge: preprocess, combine, postprocess, their parameters bound and checked."""
    stages = [step_stage(step, "preprocess", tasks, seed) for step in preprocess]
    bound = seeded(chosen, chosen.bound(parameters, tasks), parameters, seed)
    if chosen.role == "postprocess":
        raise UsageError(
            f"{chosen.name} changes a merged delta; put it under `postprocess` and choose a method that merges"
        )
    if contributions:
        bound["contributions"] = True
    stages.append(chosen.stage(bound))
    if chosen.role == "preprocess":
        stages.append(Stage("task_arithmetic", "combine", lambda deltas: weighted_sum))
    return stages + [step_stage(step, "postprocess", tasks, seed) for step in postprocess]


def step_stage(step: "str | Mapping[str, Any]", role: str, tasks: int, seed: int) -> Stage:
    """One entry of `preprocess` or `postprocess` as a stage."""
    given = {"method": step} if isinstance(step, str) else dict(step)
    chosen = method(str(given.pop("method", "")))
    if chosen.role != role:
        raise UsageError(f"{chosen.name} cannot be used as {role}: it is a {chosen.role} method")
    return chosen.stage(seeded(chosen, chosen.bound(given, tasks), given, seed))


def seeded(chosen: MergeMethod, bound: dict[str, Any], given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The parameters with the recipe's seed where the method draws and was given none of its own."""
    if "seed" in chosen.parameters and "seed" not in given:
        bound["seed"] = seed
    return bound


class Contributions:
    """The parts of a merge, one for each task, sparse: the merge is linear in the task weights.

    A search over λ costs one weighted sum of sparse parts a trial, instead of a merge.
    """

    def __init__(self, stacks: Mapping[str, Tensor], scale: float):
        self.scale = scale
        self.tasks = len(next(iter(stacks.values())))
        self._like = {name: (tuple(stack.shape[1:]), stack.device) for name, stack in stacks.items()}
        self._parts: dict[str, list[tuple[int, list[tuple[Tensor, Tensor]]]]] = {name: [] for name in stacks}
        self._dtype: torch.dtype = torch.float32
        self._packed: Any = None

    def take_packed(self, packed: Any) -> None:
        """Keeps the parts as a fused pass packed them, on the GPU."""
        self._packed = packed

    def __call__(self, tile: Tile) -> None:
        """Keeps the non-zero entries of one tile."""
        assert tile.merged is not None
        rows = tile.merged.reshape(self.tasks, -1)
        pieces = []
        for row in rows:
            where = row.nonzero().view(-1)
            pieces.append((where + tile.start, row[where]))
        self._dtype = rows.dtype
        self._parts[tile.name].append((tile.start, pieces))

    def parts(self, name: str) -> list[Tensor]:
        """The parts of one tensor, a sparse COO tensor [numel] for each task."""
        shape, device = self._like[name]
        if self._packed is not None:
            alone = [[float(task == other) for other in range(self.tasks)] for task in range(self.tasks)]
            return [self.merged(weights, scale=1.0)[name].view(-1).to_sparse() for weights in alone]
        numel = 1
        for size in shape:
            numel *= size
        pieces = [piece for _, piece in sorted(self._parts[name], key=lambda item: item[0])]
        result = []
        for task in range(self.tasks):
            where = torch.cat([piece[task][0] for piece in pieces]) if pieces else torch.empty(0, dtype=torch.long)
            values = torch.cat([piece[task][1] for piece in pieces]) if pieces else torch.empty(0)
            result.append(
                torch.sparse_coo_tensor(
                    where[None], values, (numel,), device=device, is_coalesced=True, check_invariants=False
                )
            )
        return result

    def merged(self, weights: Sequence[float] | None = None, scale: float | None = None) -> dict[str, Tensor]:
        """The merged deltas for these task weights: Σ_i λ_i P_i, one weighted sum.

        Args:
            weights: λ_i, one for each task; default 1.
            scale: factor for the whole; default the one it was made with.
        """
        chosen = [1.0] * self.tasks if weights is None else [float(w) for w in weights]
        if len(chosen) != self.tasks:
            raise ParameterError(f"weights: {len(chosen)} weights for {self.tasks} tasks")
        factor = self.scale if scale is None else scale
        merged: dict[str, Tensor] = {}
        if self._packed is not None:
            merged = {name: torch.empty(shape, device=device) for name, (shape, device) in self._like.items()}
            self._packed.merged([weight * factor for weight in chosen], merged)
            return merged
        for name, (shape, device) in self._like.items():
            total = torch.zeros(shape, dtype=self._dtype, device=device)
            flat = total.view(-1)
            for _, pieces in self._parts[name]:
                for (where, values), weight in zip(pieces, chosen):
                    flat.index_add_(0, where, values, alpha=weight * factor)
            merged[name] = total
        return merged
