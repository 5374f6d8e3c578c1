"""Merging in memory: stacks of deltas in, merged deltas out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merging.method import MergeMethod, method, weighted_sum
from taskvec.deltas import StackDeltas, Tile, constant
from taskvec.errors import MismatchError, ParameterError, Problems, UsageError
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
        ParameterError: parameters, weights or scale unknown or out of range.
        MismatchError: stacks that do not fit together.
        UsageError: no stacks, an unknown method, or too few or many tasks for it.
        NonFiniteError: a stack holds NaN or infinity.
    """
    chosen = method(name)
    found = _stacked(stacks)
    count = len(next(iter(found.values())))
    problems = Problems()
    if weights is not None:
        weights = _numbers("weights", weights, count, problems)
    if not _is_number(scale):
        problems.add(f"scale: {scale!r} is not a finite number")
    if not _is_seed(seed):
        problems.add(f"seed: {seed!r} is not a whole number from 0 on")
    if tasks is not None and len(set(tasks)) < len(tasks):
        problems.add("tasks: a name is there twice; random draws are told apart by the names")
    if scope is not None and statistics is None:
        statistics = "model" if scope == "global" else scope  # type: ignore[assignment]
    if statistics not in (None, "model", "tensor"):
        problems.add(f"statistics: {statistics!r} is neither 'model' nor 'tensor'")
    problems.raise_if_any(ParameterError)
    wrong = chosen.check_tasks(count)
    if wrong:
        raise UsageError(wrong)
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


def _stacked(stacks: "Mapping[str, Tensor | Sequence[Tensor]]") -> dict[str, Tensor]:
    """The stacks as tensors [task, *shape]; what else could be wrong with them `StackDeltas` says."""
    if not isinstance(stacks, Mapping):
        raise UsageError(f"merge_stacks: expected name -> stack [task, *shape], found a {type(stacks).__name__}")
    if not stacks:
        raise UsageError("merge_stacks: there are no stacks to merge")
    problems, found = Problems(), {}
    for name, stack in stacks.items():
        rows = stack if isinstance(stack, Tensor) else list(stack)
        if isinstance(rows, Tensor):
            found[name] = rows
        elif not rows or not all(isinstance(row, Tensor) for row in rows):
            problems.add(f"{name}: expected a tensor [task, *shape] or one tensor for each task")
        elif len({(row.shape, row.device) for row in rows}) > 1:
            kinds = ", ".join(f"{list(row.shape)} on {row.device}" for row in rows)
            problems.add(f"{name}: the tasks' tensors differ in shape or device ({kinds})")
        else:
            found[name] = torch.stack(rows)
        if name in found and not found[name].ndim:
            problems.add(f"{name}: a single number; expected a stack [task, *shape]")
    problems.raise_if_any(MismatchError)
    if not any(stack.numel() for stack in found.values()) and all(len(stack) for stack in found.values()):
        raise UsageError("merge_stacks: the stacks hold no numbers")
    return found


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except TypeError:
        return False


def _is_seed(value: Any) -> bool:
    return type(value) is not bool and hasattr(value, "__index__") and int(value) >= 0


def _numbers(what: str, values: Any, count: int, problems: Problems) -> list[float] | None:
    """One number for each task; what is wrong with them goes to the problems."""
    found = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(found, str | Mapping) or not isinstance(found, Sequence):
        problems.add(f"{what}: expected one number for each of {count} tasks, found {values!r}")
        return None
    if len(found) != count:
        problems.add(f"{what}: {len(found)} {what} for {count} tasks")
    wrong = [value for value in found if not _is_number(value)]
    problems.extend(f"{what}: {value!r} is not a finite number" for value in wrong)
    return None if problems else [float(value) for value in found]


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
    if isinstance(preprocess, str) or isinstance(postprocess, str):
        raise UsageError("preprocess, postprocess: expected a list of steps, found a text; write [name]")
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
    if "method" not in given:
        raise UsageError(
            f"{role}: a step is a name, or a mapping with the key `method` beside its parameters; found {sorted(given)}"
        )
    chosen = method(str(given.pop("method")))
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
            values = torch.cat([piece[task][1] for piece in pieces]) if pieces else torch.empty(0, dtype=torch.float32)
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
        problems = Problems()
        chosen = [1.0] * self.tasks if weights is None else _numbers("weights", weights, self.tasks, problems)
        factor = self.scale if scale is None else scale
        if not _is_number(factor):
            problems.add(f"scale: {factor!r} is not a finite number")
        problems.raise_if_any(ParameterError)
        assert chosen is not None
        merged: dict[str, Tensor] = {}
        if self._packed is not None:
            merged = {
                name: torch.empty(shape, dtype=torch.float32, device=device)
                for name, (shape, device) in self._like.items()
            }
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
