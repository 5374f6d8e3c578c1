"""What learning minimises. An objective yields terms, each a sum over a number of things: shards add up exactly."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from taskvec.errors import DataError, UsageError, did_you_mean, shortened

Batch = Any
Logits = Annotated[Tensor, "example class"]
Pool = Literal["auto", "logits", "pooler", "first", "mean"]
POOLS: tuple[str, ...] = ("auto", "logits", "pooler", "first", "mean")


class Term(NamedTuple):
    """One part of a loss: `weight * total / number`. Totals and numbers add up over shards of a batch."""

    name: str
    total: Tensor
    number: Tensor | float
    weight: float = 1.0


@runtime_checkable
class Objective(Protocol):
    """Yields the terms of the loss on one batch, one forward pass after another, so that one graph lives at a time."""

    def terms(self, model: nn.Module, batch: Batch) -> Iterator[Term]: ...


class Verdict(NamedTuple):
    """What a round of metrics means: larger scores are better; None cannot be chosen; `stop` ends the run."""

    score: float | None
    stop: bool = False


def default_judge(metrics: Mapping[str, float], first: Mapping[str, float]) -> Verdict:
    """The metric called `score`, or the mean of all."""
    if "score" in metrics:
        return Verdict(metrics["score"])
    return Verdict(sum(metrics.values()) / len(metrics))


# -- from a batch to logits --------------------------------------------------------------------------------------------


def split(batch: Batch, labels: str = "labels") -> tuple[Any, Tensor | None]:
    """Inputs and labels of a batch: (inputs, labels), or a mapping with a key `labels`; else inputs without labels."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != labels}, batch.get(labels)
    return batch, None


@dataclass(frozen=True)
class Forward:
    """Runs a model on inputs and takes one vector per example from its output.

    Args:
        pool: `logits` or `pooler` as the model gives them, `first` token, `mean` over the tokens that the attention
            mask keeps, or `auto`: a tensor as it is, else logits, else the pooler's output, else the first token.
        normalize: divide each vector by its length (as CLIP does before a zero-shot head).
    """

    pool: Pool = "auto"
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise UsageError(f"pool: {self.pool!r} is not known." + did_you_mean(self.pool, POOLS))

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        vector = self._vector(output, inputs)
        return functional.normalize(vector, dim=-1) if self.normalize else vector

    def _vector(self, output: Any, inputs: Any) -> Tensor:
        if isinstance(output, Tensor):
            return output
        logits, pooled = getattr(output, "logits", None), getattr(output, "pooler_output", None)
        tokens = getattr(output, "last_hidden_state", None)
        if self.pool == "auto":
            found = logits if logits is not None else pooled
            if found is None and tokens is not None:
                found = tokens[:, 0]
        elif self.pool == "logits":
            found = logits
        elif self.pool == "pooler":
            found = pooled
        elif tokens is None:
            found = None
        elif self.pool == "first":
            found = tokens[:, 0]
        else:
            mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
            if mask is None:
                found = tokens.mean(dim=1)
            else:
                weight = mask.to(tokens.dtype)[..., None]
                found = (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        if found is None:
            raise UsageError(f"pool: the model's output ({type(output).__name__}) has nothing for pool {self.pool!r}.")
        return found


def check_labels(labels: Tensor, classes: int, where: str = "") -> None:
    """Raise DataError where a label is outside 0..classes-1 (-100 is ignored, as in torch)."""
    wrong = (labels < 0) & (labels != -100) | (labels >= classes)
    if bool(wrong.any()):
        values = sorted({int(v) for v in labels[wrong].reshape(-1)[:1000]})
        raise DataError(
            f"{where + ': ' if where else ''}labels {shortened([str(v) for v in values])} are outside the head, "
            f"which has {classes} classes (0 to {classes - 1})."
        )


def _class_numbers(labels: Tensor, logits: Tensor, name: str) -> Tensor:
    """The labels on the logits' device, refused where they are not one class number of the head for each prediction."""
    shape = logits.shape[:-1]
    if labels.is_floating_point() or labels.shape != shape:
        raise DataError(
            f"{name}: labels of shape {list(labels.shape)} and {labels.dtype} for {list(shape)} predictions; expected one "
            "whole class number each."
        )
    labels = labels.to(logits.device, torch.long)
    check_labels(labels, logits.shape[-1], name)
    return labels


def _labels_of(batch: Batch, name: str) -> tuple[Any, Tensor]:
    inputs, labels = split(batch)
    if labels is None:
        keys = f" with {shortened([str(k) for k in batch])}" if isinstance(batch, Mapping) else ""
        raise DataError(
            f"{name}: the batch (a {type(batch).__name__}{keys}) has no labels; "
            "expected (inputs, labels), or a mapping with `labels`."
        )
    return inputs, labels


def rows_of(batch: Any) -> int:
    """Examples in a batch: the first dimension of its first tensor."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.dim() else 1
    values: Iterable[Any] = (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    )
    for value in values:
        found = rows_of(value)
        if found:
            return found
    return 0


def _one_prediction_each(logits: Tensor, name: str) -> None:
    """Refuses outputs that are not one row of logits for each example: a mean over tokens would count padding."""
    if logits.dim() != 2:
        raise UsageError(
            f"{name}: the model gives {list(logits.shape)}; expected one row of logits for each example, [example, class]. "
            "Load a classifier, or give a pool (first, mean) and heads; for language models there is objective causal_lm."
        )


# -- objectives --------------------------------------------------------------------------------------------------------


class _Headed:
    """A model whose features go through a frozen head (or none)."""

    head: Callable[[Tensor], Tensor] | None
    forward: Callable[[nn.Module, Any], Tensor]

    def logits(self, model: nn.Module, inputs: Any) -> Tensor:
        """What the head says of these inputs."""
        features = self.forward(model, inputs)
        return features if self.head is None else self.head(features)


class Supervised(_Headed):
    """A loss against labels: cross-entropy by default.

    Args:
        head: features to logits, frozen; None where the model gives logits itself.
        forward: model and inputs to features; see `Forward`.
        loss: (output, labels) to the mean loss, or to one loss per example.
        name: of its term.
    """

    def __init__(
        self,
        head: Callable[[Tensor], Tensor] | None = None,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        name: str = "loss",
    ):
        self.head, self.forward, self.loss, self.name = head, forward or Forward(), loss, name

    def terms(self, model: nn.Module, batch: Batch) -> Iterator[Term]:
        inputs, labels = _labels_of(batch, self.name)
        output = self.logits(model, inputs)
        if self.loss is not None:
            found = self.loss(output, labels)
            if found.dim() == 0:
                yield Term(self.name, found * labels.shape[0], float(labels.shape[0]))
            else:
                yield Term(self.name, found.sum(), float(found.numel()))
            return
        _one_prediction_each(output, self.name)
        if not labels.is_floating_point() or labels.shape != output.shape:  # else probabilities of the classes
            labels = _class_numbers(labels, output, self.name)
            count: Tensor | float = (labels != -100).sum() if bool((labels == -100).any()) else float(labels.numel())
        else:
            labels, count = labels.to(output.device), float(labels.shape[0])
        yield Term(self.name, functional.cross_entropy(_wide(output), labels, reduction="sum"), count)


class Entropy(_Headed):
    """Mean entropy of the predictions; no labels (AdaMerging, arXiv:2310.02575; Tent).

    Args: as `Supervised`.
    """

    def __init__(
        self,
        head: Callable[[Tensor], Tensor] | None = None,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        name: str = "entropy",
    ):
        self.head, self.forward, self.name = head, forward or Forward(), name

    def terms(self, model: nn.Module, batch: Batch) -> Iterator[Term]:
        inputs, _ = split(batch)
        logits = self.logits(model, inputs)
        _one_prediction_each(logits, self.name)
        entropy = softmax_entropy(logits)
        yield Term(self.name, entropy.sum(), float(entropy.numel()))


class CausalLM:
    """Mean cross-entropy of the next token, over all tokens that have a label.

    A batch is a mapping with `input_ids`, `attention_mask` (optional) and `labels` (optional: the inputs themselves,
    padding ignored). Labels of -100 are ignored.
    """

    def __init__(self, name: str = "lm"):
        self.name = name

    def terms(self, model: nn.Module, batch: Batch) -> Iterator[Term]:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise DataError(f"{self.name}: expected a mapping with `input_ids`, got a {type(batch).__name__}.")
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch.get("labels")
        if labels is None:
            labels = batch["input_ids"]
            if "attention_mask" in batch:
                labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        logits = Forward("logits")(model, inputs)
        targets = labels[:, 1:].reshape(-1).to(logits.device)
        check_labels(targets, logits.shape[-1], self.name)
        flat = _wide(logits[:, :-1]).reshape(-1, logits.shape[-1])
        yield Term(self.name, functional.cross_entropy(flat, targets, reduction="sum"), (targets != -100).sum())


class MultiTask:
    """A weighted sum of one objective per task; a batch maps tasks to their batches.

    Args:
        objectives: task to objective, each with its own head.
        weights: task to weight, 1 where not given.
    """

    def __init__(self, objectives: Mapping[str, Objective], weights: Mapping[str, float] | None = None):
        self.objectives = dict(objectives)
        self.weights = dict(weights or {})
        for task in self.weights:
            if task not in self.objectives:
                raise UsageError(f"weights: {task!r} is not a task." + did_you_mean(task, self.objectives))

    def terms(self, model: nn.Module, batch: Batch) -> Iterator[Term]:
        if not isinstance(batch, Mapping) or set(batch) - set(self.objectives):
            found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise DataError(f"A batch of several tasks maps each of {list(self.objectives)} to its batch; got {found}.")
        for task, objective in self.objectives.items():
            if task in batch:
                for term in objective.terms(model, batch[task]):
                    weight = term.weight * self.weights.get(task, 1.0)
                    yield Term(
                        task if term.name in ("loss", "entropy", "lm") else f"{task}.{term.name}", *term[1:3], weight
                    )


class Negation:
    """Unlearn a target, keep a control: -loss(target) + weight * loss(control) (aTLAS, section 4.1).

    A batch maps `target` and `control` to their batches. Metrics need the same two names: the best round is the one
    with the lowest target metric among those whose control metric is at least `floor` times the base's; the run stops
    when control falls below.

    Args:
        target, control: objectives of the two sets.
        weight: of the control loss.
        floor: fraction of the base's control metric to keep (0.95 in the paper).
    """

    def __init__(self, target: Objective, control: Objective, weight: float = 1.0, floor: float = 0.95):
        self.objectives = {"target": target, "control": control}
        self._both = MultiTask(self.objectives, {"target": -1.0, "control": weight})
        self.floor = floor

    def terms(self, model: nn.Module, batch: Batch) -> Iterator[Term]:
        if not isinstance(batch, Mapping) or set(batch) != {"target", "control"}:
            raise DataError("negation: a batch maps `target` and `control` to their batches.")
        yield from self._both.terms(model, batch)

    def judge(self, metrics: Mapping[str, float], first: Mapping[str, float]) -> Verdict:
        missing = {"target", "control"} - set(metrics)
        if missing:
            raise UsageError(f"negation: the metrics lack {', '.join(sorted(missing))}.")
        if metrics["control"] < self.floor * first["control"]:
            return Verdict(None, stop=True)
        return Verdict(-metrics["target"])


# -- pseudo-labels -----------------------------------------------------------------------------------------------------


def softmax_entropy(logits: Logits) -> Annotated[Tensor, "example"]:
    """Entropy of softmax(logits) of each example, in nats."""
    wide = _wide(logits)
    return -(wide.softmax(-1) * wide.log_softmax(-1)).sum(-1)


def ufm_loss(
    weak: Logits,
    strong: Logits,
    labels: Annotated[Tensor, "example class"],
    trusted: Annotated[Tensor, "example"],
    *,
    threshold: float,
    sharpen: float = 0.5,
    compat: Literal["paper", "released"] = "paper",
) -> tuple[Tensor, Tensor]:
    """UFM's pseudo-label loss: its sum over the rows that count, and their number (0 where none is sure enough).

    Args:
        weak: logits of the weak view; no gradient flows into them.
        strong: logits of the strong view.
        labels: one-hot labels of the trusted examples.
        trusted: whether an example is trusted: its target is its label.
        threshold: a row counts where its largest target is above this.
        sharpen: targets are p^sharpen, renormalised (0.5 flattens them; appendix E).
        compat: `released` multiplies p by 0.5 and renormalises, which changes nothing, as the authors' main branch
            does.
    """
    target = _wide(weak).detach().softmax(-1)
    if compat == "paper":
        target = target**sharpen
        target = target / target.sum(-1, keepdim=True)
    target = torch.where(trusted.bool()[:, None], labels.to(target), target)
    kept = target.max(-1).values > threshold
    each = -(target * _wide(strong).log_softmax(-1)).sum(-1)
    return torch.where(kept, each, 0.0).sum(), kept.sum()


def trusted_examples(
    probabilities: Annotated[Tensor, "example class"],
    *,
    limit: int = 100,
    compat: Literal["paper", "released"] = "paper",
) -> Annotated[Tensor, "example"]:
    """Which examples UFM trusts: of each class the k most confident.

    Paper: k = min(N / C, limit), chosen among the examples predicted as the class. `released`: k = min(N / C / 10,
    limit) highest in the class's column, whatever is predicted; and since the authors' flags are set with the last
    class's full order, every example ends up trusted. k is at least 1, so that few examples never mean none.
    """
    examples, classes = probabilities.shape
    if compat == "released":
        return torch.ones(examples, dtype=torch.bool, device=probabilities.device)
    count = max(1, min(examples // classes, limit))
    confidence, predicted = probabilities.max(-1)
    trusted = torch.zeros(examples, dtype=torch.bool, device=probabilities.device)
    for label in range(classes):
        members = (predicted == label).nonzero()[:, 0]
        best = confidence[members].argsort(descending=True, stable=True)[:count]
        trusted[members[best]] = True
    return trusted


class UFM(_Headed):
    """Unsupervised FixMatch with trusted examples, for test-time adaptation (aTLAS, section 4.3 and appendix E).

    A batch is a mapping: `index` (which examples, into the pool), `weak` and `strong` (two views of the inputs).

    Args:
        pool: the inputs of all examples in order, in batches; read at the beginning of each epoch to choose the trusted
            ones and their pseudo-labels with the model as it then is.
        head, forward: as `Supervised`.
        threshold: of the first and the last epoch (0.9 to 1 in the paper; 0.99 throughout as released).
        sharpen: see `ufm_loss`.
        trusted_fraction: of each batch of `index_batches`.
        compat: `released` reproduces the authors' main branch: labels and trust (everything) are fixed before the first
            step, threshold 0.99, no sharpening.
    """

    def __init__(
        self,
        pool: Iterable[Any],
        head: Callable[[Tensor], Tensor] | None = None,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
        *,
        threshold: tuple[float, float] = (0.9, 1.0),
        sharpen: float = 0.5,
        trusted_fraction: float = 0.25,
        limit: int = 100,
        compat: Literal["paper", "released"] = "paper",
        name: str = "ufm",
    ):
        if compat not in ("paper", "released"):
            raise UsageError(f"compat: {compat!r} is not known." + did_you_mean(compat, ("paper", "released")))
        if not 0 <= trusted_fraction <= 1:
            raise UsageError(f"trusted_fraction: {trusted_fraction} is not in [0, 1].")
        self.pool, self.head, self.forward = pool, head, forward or Forward()
        self.sharpen, self.trusted_fraction, self.limit, self.compat = sharpen, trusted_fraction, limit, compat
        self.thresholds = (0.99, 0.99) if compat == "released" else threshold
        self.name = name
        self.threshold = self.thresholds[0]
        self.trusted: Tensor | None = None
        self.labels: Tensor | None = None

    @torch.no_grad()
    def begin_epoch(self, model: nn.Module, epoch: int, epochs: int) -> None:
        """Choose the trusted examples with the model as it is; `epoch` counts from 0."""
        first, last = self.thresholds
        self.threshold = first + (last - first) * epoch / max(epochs, 1)
        if self.compat == "released" and self.labels is not None:
            return
        device = next(model.parameters()).device
        outputs = [_wide(self.logits(model, moved(batch, device))) for batch in self.pool]
        if not outputs:
            raise DataError("ufm: the pool of examples is empty.")
        probabilities = torch.cat(outputs).softmax(-1)
        self.trusted = trusted_examples(probabilities, limit=self.limit, compat=self.compat)
        self.labels = functional.one_hot(probabilities.argmax(-1), probabilities.shape[-1])

    def epoch_state(self) -> dict[str, Any]:
        """What an epoch chose, for a run that is resumed within it."""
        return {"threshold": self.threshold, "trusted": self.trusted, "labels": self.labels}

    def resume_epoch(self, state: Mapping[str, Any]) -> None:
        """Take up what `epoch_state` gave."""
        self.threshold, self.trusted, self.labels = state["threshold"], state["trusted"], state["labels"]

    def index_batches(self, size: int, *, seed: int = 0, epoch: int = 0) -> Iterator[Tensor]:
        """Indices of the batches of one epoch: a part of trusted examples, the rest others, both shuffled.

        Without others (all trusted) or without trusted ones, the batches are filled from what there is.
        """
        if self.trusted is None:
            raise UsageError("ufm: index_batches before begin_epoch; nothing is trusted yet.")
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
        sure = self.trusted.cpu().nonzero()[:, 0]
        rest = (~self.trusted.cpu()).nonzero()[:, 0]
        sure = sure[torch.randperm(sure.numel(), generator=generator)]
        rest = rest[torch.randperm(rest.numel(), generator=generator)]
        few = round(size * self.trusted_fraction) if rest.numel() else size
        if not sure.numel():
            few = 0
        many = size - few
        count = max(-(-rest.numel() // many) if many else 0, -(-sure.numel() // size) if few == size else 1)
        for i in range(count):
            picked = [rest[i * many : (i + 1) * many]]
            if few:
                picked.append(sure[torch.arange(i * few, (i + 1) * few) % sure.numel()])
            yield torch.cat(picked)

    def terms(self, model: nn.Module, batch: Batch) -> Iterator[Term]:
        if not isinstance(batch, Mapping) or not {"index", "weak", "strong"} <= set(batch):
            raise DataError("ufm: a batch maps `index`, `weak` and `strong` to example numbers and two views of them.")
        if self.labels is None or self.trusted is None:
            raise UsageError("ufm: begin_epoch has to run before the first batch; `fit` does that.")
        with torch.no_grad():
            weak = self.logits(model, batch["weak"])
        strong = self.logits(model, batch["strong"])
        index = batch["index"].to(self.labels.device)
        total, count = ufm_loss(
            weak,
            strong,
            self.labels[index].to(strong.device),
            self.trusted[index].to(strong.device),
            threshold=self.threshold,
            sharpen=self.sharpen,
            compat=self.compat,
        )
        yield Term(self.name, total, count)


# -- penalties, schedules, metrics -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Penalty:
    """gamma * mean over blocks of the p-norm, over tasks, of the block's coefficients (aTLAS: gamma 0.5, p 1 or 2).

    Args:
        gamma: weight in the loss, at least 0.
        p: 1 or 2.
    """

    gamma: float = 0.5
    p: int = 1

    def __post_init__(self) -> None:
        if self.p not in (1, 2) or self.gamma < 0:
            raise UsageError(f"penalty: gamma {self.gamma}, p {self.p}; expected gamma >= 0 and p 1 or 2.")

    def value_and_gradient(self, coefficients: Annotated[Tensor, "task block"]) -> tuple[Tensor, Tensor]:
        """The penalty and its gradient (0 where a norm is 0)."""
        norms = coefficients.norm(p=self.p, dim=0, keepdim=True)
        scale = self.gamma / norms.numel()
        if self.p == 1:
            slope = coefficients.sign()
        else:
            slope = torch.where(norms > 0, coefficients / norms.where(norms > 0, 1.0), 0.0)
        return scale * norms.sum(), scale * slope


def accuracy(
    model: nn.Module,
    batches: Iterable[Batch],
    head: Callable[[Tensor], Tensor] | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
) -> float:
    """Fraction of examples whose largest logit is their label.

    Raises:
        DataError: no example, no labels, or labels outside the head.
    """
    scorer = Supervised(head, forward, name="accuracy")
    device = next(model.parameters()).device
    right, count = 0, 0
    with torch.no_grad():
        for batch in batches:
            inputs, labels = _labels_of(moved(batch, device), "accuracy")
            logits = scorer.logits(model, inputs)
            labels = _class_numbers(labels, logits, "accuracy")
            kept = labels != -100
            right += int(((logits.argmax(-1) == labels) & kept).sum())
            count += int(kept.sum())
    if not count:
        raise DataError("accuracy: there is no labelled example to measure on.")
    return right / count


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
