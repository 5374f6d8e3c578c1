"""Which task vectors, or which of their blocks, to keep under a memory budget (aTLAS, appendix C).

At c = 0 the weights are the base's whatever the vectors, so the gradients of all coefficients come from one pass over
the data and one reading of every vector: exact for any number of them, in the memory of one gradient. The authors' code
loads `budget` vectors at a time and passes over the data anew for each group; the numbers are the same.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from merging.learn.bank import GivenDeltas
from merging.learn.composition import Vector
from merging.learn.inplace import PullBack
from merging.learn.objectives import Batch, Objective, moved
from taskvec.coefficients import Coefficients
from taskvec.errors import DataError, MismatchError, Problems, UsageError, did_you_mean
from taskvec.precision import compute_dtype
from taskvec.source import LowRank, TensorInfo

Strategy = Literal["random", "features", "gradient", "gradient-block"]
STRATEGIES: tuple[str, ...] = ("random", "features", "gradient", "gradient-block")


class Stitched:
    """A task vector whose tensors come from different task vectors."""

    def __init__(self, label: str, parts: Mapping[str, Any]):
        self.label = label
        self._parts = dict(parts)
        self.aliases: Mapping[str, str] = {}
        self.infos: Mapping[str, TensorInfo] = {name: part.infos[name] for name, part in self._parts.items()}

    def read(self, name: str) -> Tensor:
        found: Tensor = self._parts[name].read(name)
        return found

    def low_rank(self, name: str) -> LowRank | None:
        found: LowRank | None = self._parts[name].low_rank(name)
        return found


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        vectors: name to task vector, ready for `Composition`: chosen ones, or with `gradient-block` `pick1`, `pick2`, …
            stitched from the winners of each block.
        scores: [task, block] for the gradient strategies (|g|, or |g| / ‖τ‖), [task, 1] for features; None for random.
        tasks: all candidates, in the order of the rows of `scores`.
        blocks: names of the columns of `scores`.
        winners: for `gradient-block`: block to the tasks that `pick1`, `pick2`, … took there.
    """

    vectors: Mapping[str, Vector]
    tasks: tuple[str, ...]
    scores: Tensor | None = None
    blocks: tuple[str, ...] = ()
    winners: Mapping[str, tuple[str, ...]] | None = None

    def unstitched(self, learned: Coefficients) -> Coefficients:
        """Coefficients learned on the selection, as coefficients of all the original task vectors, for baking.

        Raises:
            UsageError: stitched vectors were learned with another granularity than `block`.
        """
        if self.winners is not None and learned.granularity != "block":
            raise UsageError(f"unstitched: granularity `{learned.granularity}`; stitched vectors need `block`.")
        shape = (len(self.tasks), *learned.values.shape[1:])
        values = torch.zeros(shape, dtype=learned.values.dtype)
        if self.winners is None:
            for row, task in enumerate(learned.tasks):
                values[self.tasks.index(task)] = learned.values[row]
        else:
            for name, region in learned.regions.items():
                for pick, task in enumerate(self.winners.get(name, ())):
                    values[self.tasks.index(task), region.column] += learned.values[pick, region.column]
        return replace(learned, values=values, tasks=self.tasks, task_hashes={})


def select(
    vectors: Mapping[str, Vector],
    budget: int,
    strategy: Strategy = "gradient-block",
    *,
    model: nn.Module | None = None,
    objective: "Objective | Callable[[nn.Module, Batch], Tensor] | None" = None,
    batches: Iterable[Batch] | None = None,
    normalize: bool = False,
    target: Annotated[Tensor, "feature"] | None = None,
    features: Mapping[str, Annotated[Tensor, "feature"]] | None = None,
    seed: int = 0,
) -> Selection:
    """Choose task vectors, or blocks of them.

    Args:
        vectors: the candidates.
        budget: how many task vectors' worth of memory there is.
        strategy: `random`; `features`: largest cosine between the mean features of the target data and those of a
            candidate's; `gradient`: largest mean over blocks of |∂L/∂c| at c = 0; `gradient-block`: in each block the
            largest |∂L/∂c|, stitched into `budget` new vectors.
        model, objective, batches: for the gradient strategies; see `fit`.
        normalize: divide |∂L/∂c| by ‖τ‖, so that large task vectors have no advantage.
        target, features: for `features`: mean zero-shot features of the target, and of each candidate's data.
        seed: of `random`.

    Raises:
        UsageError: a budget or strategy that makes no sense, or inputs that the strategy needs are missing.
        DataError: there is no data.
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"strategy: {strategy!r} is not known." + did_you_mean(strategy, STRATEGIES))
    if not 1 <= budget <= len(vectors):
        raise UsageError(f"budget: {budget}; expected 1 to {len(vectors)}, the number of task vectors.")
    tasks = tuple(vectors)
    if strategy == "random":
        order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed))[:budget].tolist()
        return Selection({tasks[t]: vectors[tasks[t]] for t in sorted(order)}, tasks)
    if strategy == "features":
        if target is None or features is None or set(features) != set(vectors):
            raise UsageError("features: needs `target` and one vector of `features` for every task vector.")
        each = torch.stack([features[task].reshape(-1).double() for task in tasks])
        scores = torch.nn.functional.cosine_similarity(each, target.reshape(1, -1).double())[:, None]
        return Selection(_top(vectors, scores[:, 0], budget), tasks, scores, ("features",))
    if model is None or objective is None or batches is None:
        raise UsageError(f"{strategy}: needs `model`, `objective` and `batches`.")
    readable = {t: GivenDeltas(v, t) if isinstance(v, Mapping) else v for t, v in vectors.items()}
    scores, blocks = coefficient_gradients(model, readable, objective, batches, normalize=normalize)
    scores = scores.abs()
    if strategy == "gradient":
        return Selection(_top(vectors, scores.mean(1), budget), tasks, scores, blocks)
    best = scores.argsort(dim=0, descending=True, stable=True)[:budget]
    winners = {name: tuple(tasks[int(t)] for t in best[:, b]) for b, name in enumerate(blocks)}
    stitched = {
        f"pick{r + 1}": Stitched(
            f"pick{r + 1}",
            {name: readable[winners[name][r]] for name in blocks if name in readable[winners[name][r]].infos},
        )
        for r in range(budget)
    }
    return Selection(stitched, tasks, scores, blocks, winners)


def _top(vectors: Mapping[str, Vector], scores: Tensor, budget: int) -> dict[str, Vector]:
    """The best ones, in their own order."""
    chosen = set(scores.argsort(descending=True, stable=True)[:budget].tolist())
    return {task: vector for t, (task, vector) in enumerate(vectors.items()) if t in chosen}


def coefficient_gradients(
    model: nn.Module,
    vectors: Mapping[str, Any],
    objective: "Objective | Callable[[nn.Module, Batch], Tensor]",
    batches: Iterable[Batch],
    *,
    normalize: bool = False,
) -> tuple[Annotated[Tensor, "task block"], tuple[str, ...]]:
    """∂L/∂c at c = 0, for every task vector and named parameter, over all batches (the mean of their losses).

    Raises:
        DataError: there are no batches.
        MismatchError: a delta of another shape than its parameter.
    """
    from merging.learn.fit import terms_of

    parameters = {name: p for name, p in model.named_parameters() if p.dtype.is_floating_point}
    problems = Problems()
    for task, vector in vectors.items():
        for name, info in vector.infos.items():
            if name in parameters and tuple(info.shape) != tuple(parameters[name].shape):
                here = list(parameters[name].shape)
                problems.add(f"{name}: task vector {task!r} has {list(info.shape)}, the model has {here}.")
    problems.raise_if_any(MismatchError)
    total: dict[str, Tensor] = {}

    def add(name: str, grad: Tensor) -> None:
        wide = grad.to(compute_dtype(grad.dtype))
        if name in total:
            total[name] += wide
        else:
            total[name] = wide.clone()

    count = 0
    device = next(iter(parameters.values())).device
    changed = {name: p for name, p in parameters.items() if any(name in v.infos for v in vectors.values())}
    with PullBack(model, changed, add), torch.enable_grad():
        for batch in batches:
            count += 1
            for term in terms_of(objective, model, moved(batch, device)):
                number = torch.as_tensor(term.number, dtype=torch.float64)
                if bool(number > 0):
                    (term.weight * term.total / number.to(term.total)).backward()
    if not count:
        raise DataError("select: there are no batches.")
    blocks: Sequence[str] = tuple(parameters)
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32
    found = torch.zeros((len(vectors), len(blocks)), dtype=dtype)
    for b, name in enumerate(blocks):
        if name not in total:
            continue
        grad = total.pop(name) / count
        for t, vector in enumerate(vectors.values()):
            if name not in vector.infos:
                continue
            delta = vector.read(name).to(grad)
            product = (grad * delta).sum()
            if normalize:
                size = torch.linalg.vector_norm(delta)
                product = product / size if float(size) else product
            found[t, b] = product
    return found, tuple(blocks)
