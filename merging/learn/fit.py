"""The training loop of everything that learns coefficients: one composition, any number of passes, one small update."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from merging.learn.composition import Composition
from merging.learn.objectives import Batch, Objective, Penalty, Term, Verdict, default_judge, moved, rows_of
from taskvec.errors import CorruptFileError, DataError, LearningError, MismatchError, UsageError, did_you_mean

# the GradScaler factor that the authors' clipping sees (torch's initial scale)
SCALER = 65536.0
Progress = Callable[[Mapping[str, Any]], None]
Batches = Iterable[Batch] | Callable[[int], Iterable[Batch]]


@dataclass(frozen=True)
class AdamWSpec:
    """AdamW for the coefficients. Defaults are the paper's few-shot settings.

    Args:
        lr: learning rate at the peak of the schedule (0.1 few-shot, 1e-3 addition and test-time adaptation).
        weight_decay: decoupled, relative to the learning rate.
        betas, eps: as torch.
    """

    lr: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class Constraint:
    """Where coefficients may lie; enforced by projection after each step.

    Args:
        low, high: bounds of every coefficient, None for none.
        sum_to_one: the coefficients of a block sum to one over the tasks; with `low=0` this is the simplex.
    """

    low: float | None = None
    high: float | None = None
    sum_to_one: bool = False

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise UsageError(f"constraint: low {self.low} is above high {self.high}.")
        if self.sum_to_one and (self.high is not None or self.low not in (None, 0.0)):
            raise UsageError("constraint: sum_to_one goes alone or with low=0, not with other bounds.")

    @torch.no_grad()
    def project_(self, values: Annotated[Tensor, "task block"]) -> None:
        """Move to the nearest point that is allowed."""
        if self.sum_to_one and self.low == 0.0:
            # Duchi et al. 2008: subtract the one shift that makes the positive parts sum to one
            ordered = values.sort(dim=0, descending=True).values
            shape = (-1, *(1 for _ in values.shape[1:]))
            rank = torch.arange(1, values.shape[0] + 1, device=values.device, dtype=values.dtype).view(shape)
            shifts = (ordered.cumsum(0) - 1) / rank
            last = (ordered > shifts).sum(0, keepdim=True) - 1
            values.sub_(shifts.gather(0, last)).clamp_(min=0)
        elif self.sum_to_one:
            values.add_((1 - values.sum(0, keepdim=True)) / values.shape[0])
        elif self.low is not None or self.high is not None:
            values.clamp_(min=self.low, max=self.high)


def scheduled(schedule: str, step: int, total: int, warmup: int = 0) -> float:
    """Fraction of the peak learning rate at a step (from 0): linear warm-up, then `constant`, or `cosine` to 0."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


@dataclass
class Fit:
    """What a run found.

    Attributes:
        coefficients: the kept ones, as they are in the composition.
        history: one record per optimiser step and per evaluation, in order.
        best: the record of the evaluation that was kept, or None.
        steps: optimiser steps taken.
        stopped: why the run ended early, or None.
    """

    coefficients: Tensor
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    steps: int = 0
    stopped: str | None = None

    @property
    def losses(self) -> list[float]:
        """Loss of every optimiser step."""
        return [record["loss"] for record in self.history if "loss" in record]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The records that hold metrics."""
        return [record for record in self.history if "metrics" in record]


class _NothingToLearn(Exception):
    """No row of the step's batches counts (UFM: none is sure enough); the step is skipped."""


def fit(
    composition: Composition,
    objective: Objective | Callable[[nn.Module, Batch], Tensor],
    batches: Batches,
    *,
    optimizer: AdamWSpec | None = None,
    epochs: int = 1,
    steps: int | None = None,
    schedule: Literal["cosine", "constant"] = "cosine",
    warmup: int = 0,
    clip: float | None = 1.0,
    clip_mode: Literal["true", "normalized"] = "true",
    accumulate: int = 1,
    precision: Literal["full", "bf16", "fp16"] = "full",
    penalty: Penalty | None = None,
    constraint: Constraint | None = None,
    frozen: Tensor | None = None,
    evaluate: Callable[..., Mapping[str, float] | float] | None = None,
    every: int | None = None,
    keep: Literal["best", "last"] | None = None,
    patience: int | None = None,
    hold: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    seed: int = 0,
    identity: str = "",
    progress: Progress | None = None,
) -> Fit:
    """Learn the coefficients of a composition.

    Under an initialised `torch.distributed` group each rank takes its share of every batch, and only the coefficients'
    gradients (and the counts of the terms) are exchanged: the result is that of one process with the same batches.

    Args:
        composition: starts from its present coefficients and holds the learned ones afterwards; the model has its base
            weights again.
        objective: yields `Term`s (see `merging.learn.objectives`), or takes (model, batch) and returns the mean loss.
        batches: read once per epoch: a list, a DataLoader, or a function from the epoch (from 0) to an iterable.
        optimizer: AdamW's settings.
        epochs, steps: length of the run; `steps` optimiser steps win, and go through the batches as often as it takes.
        schedule, warmup: see `scheduled`.
        clip: largest global norm of the gradient, None for no clipping.
        clip_mode: `true` clips the gradient. `normalized` clips it while multiplied by 65536, as the released code does
            by clipping under a gradient scaler: nearly every step has the same length, whatever the loss's scale.
        accumulate: batches per optimiser step; each is averaged over its own rows, then over the batches.
        precision: autocast of the passes; `fp16` scales the loss, and skips a step that overflows.
        penalty: added to the loss.
        constraint: enforced after each step (and once before the first).
        frozen: bool, shaped like the coefficients: True stays as it is.
        evaluate: called with the model composed, in eval mode and without gradients; returns metrics by name, or one
            number; larger is better, unless the objective judges otherwise (`Negation`). Runs before the first step
                too.
        every: steps between evaluations; once per epoch by default.
        keep: `best` evaluation (default where there is one), or `last`.
        patience: stop after this many evaluations without improvement.
        hold: see `Composition.gradient`.
        checkpoint: a file for the state of the run, written beside and renamed, so that a killed run goes on from the
            last
            one: call `fit` again with the same arguments. Deleted by the caller, not here.
        checkpoint_every: steps between checkpoints; at each evaluation or epoch by default.
        seed: of everything random in the passes; each step has its own, so that a resumed run equals an uninterrupted
            one.
        identity: what else makes a run the same run (a hash of its data, say); a checkpoint of another one is refused.
        progress: called with a record after each step and evaluation.

    Raises:
        LearningError: the loss or a gradient is NaN or infinite, or a head is one of the composed weights.
        DataError: there are no batches, or too few rows for the ranks.
        MismatchError: the checkpoint belongs to another run.
    """
    options = optimizer or AdamWSpec()
    _refuse_composed_heads(composition, objective)
    _check_choices(schedule, clip_mode, precision, keep, evaluate, accumulate, epochs, steps)
    run = _Run(
        composition=composition,
        objective=objective,
        batches=batches,
        options=options,
        epochs=epochs,
        total=steps if steps is not None else _total(batches, epochs, accumulate, schedule),
        open_ended=steps is not None,
        schedule=schedule,
        warmup=warmup,
        clip=clip,
        clip_mode=clip_mode,
        accumulate=accumulate,
        precision=precision,
        penalty=penalty,
        constraint=constraint,
        frozen=frozen,
        evaluate=evaluate,
        every=every,
        keep=keep or ("best" if evaluate is not None else "last"),
        patience=patience,
        hold=hold,
        checkpoint=Path(checkpoint) if checkpoint is not None else None,
        checkpoint_every=checkpoint_every,
        seed=seed,
        identity=identity,
        progress=progress,
    )
    devices = [composition.coefficients.device] if composition.coefficients.is_cuda else []
    with torch.random.fork_rng(devices=devices), composition:
        composition.freeze(frozen)
        try:
            return run.go()
        finally:
            composition.freeze(None)


@dataclass
class _Run:
    """The state of one call of `fit`."""

    composition: Composition
    objective: Any
    batches: Batches
    options: AdamWSpec
    epochs: int
    total: int | None
    open_ended: bool
    schedule: str
    warmup: int
    clip: float | None
    clip_mode: str
    accumulate: int
    precision: str
    penalty: Penalty | None
    constraint: Constraint | None
    frozen: Tensor | None
    evaluate: Callable[..., Mapping[str, float] | float] | None
    every: int | None
    keep: str
    patience: int | None
    hold: bool
    checkpoint: Path | None
    checkpoint_every: int | None
    seed: int
    identity: str
    progress: Progress | None
    step: int = 0
    epoch: int = 0
    taken: int = 0
    scale: float = SCALER
    finite_steps: int = 0

    def __post_init__(self) -> None:
        self.values = self.composition.coefficients
        self.device = self.values.device
        self.optimizer = torch.optim.AdamW(
            [self.values],
            lr=self.options.lr,
            weight_decay=self.options.weight_decay,
            betas=self.options.betas,
            eps=self.options.eps,
        )
        self.result = Fit(self.values)
        self.first: Mapping[str, float] | None = None
        self.best: Tensor | None = None
        self.best_score: float | None = None
        self.waited = 0
        self.unread: list[tuple[dict[str, Any], Tensor, Tensor]] = []
        group = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if group else 0
        self.ranks = torch.distributed.get_world_size() if group else 1

    # -- the loop ----------------------------------------------------------------------------------------------------

    def go(self) -> Fit:
        if self.constraint is not None:
            self.constraint.project_(self.values)
        skip = self._resume()
        if self.step == 0 and not skip and self.evaluate is not None:
            self._measure()
        while not self._finished():
            self._seeded(self.epoch, 1)
            # within an epoch, what it chose at its beginning came with the checkpoint
            if hasattr(self.objective, "begin_epoch") and not (skip and hasattr(self.objective, "resume_epoch")):
                self.composition.compose_()
                with _as_eval(self.composition.model):
                    self.objective.begin_epoch(self.composition.model, self.epoch, self.epochs)
            used = self._epoch(skip)
            if used == 0 and not skip:
                raise DataError(
                    "batches: there are none"
                    + (" any more; give a list, a DataLoader or a function of the epoch." if self.epoch else ".")
                )
            skip = 0
            if self.result.stopped is None and not self._finished_inside():
                self.epoch += 1
                self.taken = 0
                self._epoch_over()
        self._read()
        if self.keep == "best" and self.best is not None:
            self.values.copy_(self.best)
        self.result.steps = self.step
        return self.result

    def _finished(self) -> bool:
        if self.result.stopped is not None:
            return True
        if self.open_ended:
            return self.step >= (self.total or 0)
        return self.epoch >= self.epochs

    def _finished_inside(self) -> bool:
        """Whether the run ended before its epoch did."""
        return self.open_ended and self.step >= (self.total or 0)

    def _epoch(self, skip: int) -> int:
        """Go through the batches once, from batch `skip` on; the number of batches seen."""
        source = self.batches(self.epoch) if callable(self.batches) else self.batches
        micro: list[Batch] = []
        count = 0
        for batch in source:
            count += 1
            if count <= skip:
                continue
            micro.append(batch)
            if len(micro) == self.accumulate:
                self._update(micro, count)
                micro = []
                if self.result.stopped is not None or self._finished_inside():
                    return count
        if micro:
            self._update(micro, count)
        return count

    def _epoch_over(self) -> None:
        if self.evaluate is not None and self.every is None:
            self._measure()
        if self.checkpoint is not None and self.checkpoint_every is None:
            self._save()

    def _update(self, micro: Sequence[Batch], count: int) -> None:
        self._seeded(self.step, 2)
        fraction = scheduled(self.schedule, self.step, self.total or 1, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * fraction
        names: list[str] = []
        totals: list[Tensor] = []
        try:
            loss, grad = self.composition.gradient(lambda: self._losses(micro, names, totals), hold=self.hold)
        except _NothingToLearn:
            self._after(count, {"step": self.step, "epoch": self.epoch, "skipped": "no row counts"}, None)
            return
        scale = self.scale if self.precision == "fp16" else 1.0
        grad, loss = grad / scale, loss.to(grad) / scale
        if self.ranks > 1:
            packed = torch.cat([grad.reshape(-1), loss.reshape(1), *[t.reshape(1).to(grad) for t in totals]])
            torch.distributed.all_reduce(packed)
            grad = packed[: grad.numel()].view_as(grad)
            loss = packed[grad.numel()]
            totals = list(packed[grad.numel() + 1 :])
        if self.penalty is not None:
            value, slope = self.penalty.value_and_gradient(self.values)
            loss, grad = loss + value, grad + slope
            if self.frozen is not None:
                grad = grad.masked_fill(self.frozen.to(grad.device), 0)
        norm = torch.linalg.vector_norm(grad)
        if self.precision == "fp16" and not bool(torch.isfinite(norm)):
            self.scale /= 2
            self.finite_steps = 0
            if self.scale < 1:
                raise LearningError(
                    f"Step {self.step + 1}: the gradient overflows even unscaled. Use bf16 or full precision."
                )
            self._after(count, {"step": self.step, "epoch": self.epoch, "skipped": "overflow"}, None)
            return
        self.finite_steps += 1
        if self.precision == "fp16" and self.finite_steps % 2000 == 0:
            self.scale *= 2
        if self.clip is not None:
            seen = norm * SCALER if self.clip_mode == "normalized" else norm
            grad = grad * (self.clip / (seen + 1e-6)).clamp(max=1.0)
        before = self.values.clone() if self.frozen is not None else None
        self.values.grad = grad
        self.optimizer.step()
        self.values.grad = None
        if self.constraint is not None:
            self.constraint.project_(self.values)
        if before is not None and self.frozen is not None:
            self.values.copy_(torch.where(self.frozen.to(self.device), before, self.values))
        record: dict[str, Any] = {"step": self.step + 1, "epoch": self.epoch, "lr": self.options.lr * fraction}
        parts = torch.stack([loss.reshape(()), norm.to(loss), *(t.to(loss).reshape(()) for t in totals)]).detach()
        self._after(count, record, (parts, names))

    def _after(self, count: int, record: dict[str, Any], numbers: tuple[Tensor, list[str]] | None) -> None:
        self.step += 1
        self.taken = count
        if numbers is None:
            self._tell(record)
        else:
            record["terms"] = numbers[1]
            self.unread.append((record, numbers[0], numbers[0]))
            # reading a number waits for the GPU; ten steps at a time keep it busy
            if self.device.type == "cpu" or len(self.unread) >= 10:
                self._read()
        if self.every is not None and self.step % self.every == 0 and self.evaluate is not None:
            self._measure()
            if self.checkpoint is not None and self.checkpoint_every is None:
                self._save()
        if self.checkpoint is not None and self.checkpoint_every and self.step % self.checkpoint_every == 0:
            self._save()

    def _read(self) -> None:
        """Fetch the numbers of the last steps; NaN or infinity ends the run."""
        for record, numbers, _ in self.unread:
            loss, norm, *terms = numbers.tolist()
            names = record.pop("terms")
            each: dict[str, float] = {}
            for name, value in zip(names, terms, strict=True):
                each[name] = each.get(name, 0.0) + value
            if not math.isfinite(loss) or not math.isfinite(norm):
                bad = [name for name, value in each.items() if not math.isfinite(value)]
                raise LearningError(
                    f"Step {record['step']}: the loss is {loss:g} and the gradient's norm {norm:g}"
                    + (f" (not finite: {', '.join(bad)})" if bad else "")
                    + ". A smaller learning rate, full precision, or checking the data for NaN may help."
                )
            record.update(loss=loss, norm=norm)
            if len(each) > 1:
                record["terms"] = each
            self._tell(record)
        self.unread = []

    def _tell(self, record: dict[str, Any]) -> None:
        self.result.history.append(record)
        if self.progress is not None and self.rank == 0:
            self.progress({**record, "steps": self.total})

    # -- one step's passes -------------------------------------------------------------------------------------------

    def _losses(self, micro: Sequence[Batch], names: list[str], totals: list[Tensor]) -> Iterator[Tensor]:
        scale = self.scale if self.precision == "fp16" else 1.0
        kept = False
        for batch in micro:
            terms = terms_of(self.objective, self.composition.model, moved(self._share(batch), self.device))
            while True:
                # backward runs outside autocast, so the context closes before each term goes out
                with self._autocast():
                    term = next(terms, None)
                if term is None:
                    break
                count = torch.as_tensor(term.number, dtype=torch.float64, device=self.device).clone()
                if self.ranks > 1:
                    torch.distributed.all_reduce(count)
                if not bool(count > 0):
                    continue
                kept = True
                value = term.weight * term.total / count.to(term.total.dtype) / len(micro)
                names.append(term.name)
                totals.append(value.detach() / term.weight if term.weight else value.detach())
                yield value * scale if scale != 1.0 else value
        if not kept:
            raise _NothingToLearn

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "full":
            return nullcontext()
        kind = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=kind)

    def _share(self, batch: Batch) -> Batch:
        return shard(batch, self.rank, self.ranks) if self.ranks > 1 else batch

    def _seeded(self, counter: int, purpose: int) -> None:
        digest = hashlib.blake2b(f"{self.seed}:{purpose}:{counter}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        assert self.evaluate is not None  # callers checked
        self._read()
        self.composition.compose_()
        with _as_eval(self.composition.model), torch.no_grad(), self._autocast():
            found = self.evaluate(self.composition.model)
        metrics = (
            {"score": float(found)} if isinstance(found, (int, float)) else {k: float(v) for k, v in found.items()}
        )
        if not metrics or not all(math.isfinite(value) for value in metrics.values()):
            raise LearningError(f"After step {self.step}: evaluate returned {metrics}; expected finite numbers.")
        if self.first is None:
            self.first = metrics
        judge: Callable[..., Verdict] = getattr(self.objective, "judge", default_judge)
        verdict = judge(metrics, self.first)
        better = verdict.score is not None and (self.best_score is None or verdict.score > self.best_score)
        record: dict[str, Any] = {"step": self.step, "epoch": self.epoch, "metrics": metrics, "best": better}
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best, self.best_score = self.values.clone(), verdict.score
            self.result.best = record
        self._tell(record)
        if verdict.stop:
            self.result.stopped = "a metric fell below its floor"
        elif self.patience is not None and self.waited >= self.patience:
            self.result.stopped = f"no improvement in {self.waited} evaluations"

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _signature(self) -> str:
        facts = {
            "tasks": self.composition.tasks,
            "blocks": hashlib.blake2b("\n".join(self.composition.blocks).encode()).hexdigest(),
            "shape": list(self.values.shape),
            "optimizer": [self.options.lr, self.options.weight_decay, *self.options.betas, self.options.eps],
            "length": [self.epochs, self.total, self.accumulate],
            "schedule": [self.schedule, self.warmup, self.clip, self.clip_mode, self.precision],
            "seed": self.seed,
            "inputs": self.identity,
        }
        return json.dumps(facts)

    def _save(self) -> None:
        self._read()
        if self.checkpoint is None or self.rank != 0:
            return
        state = {
            "format": "taskvec.learning",
            "signature": self._signature(),
            "values": self.values.cpu(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "taken": self.taken,
            "scale": self.scale,
            "finite_steps": self.finite_steps,
            "best": None if self.best is None else self.best.cpu(),
            "best_score": self.best_score,
            "first": dict(self.first) if self.first is not None else None,
            "waited": self.waited,
            "history": json.dumps(self.result.history),
            "stopped": self.result.stopped,
            "verified": sorted(self.composition.verified),
            "objective": self.objective.epoch_state() if hasattr(self.objective, "epoch_state") else None,
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_name(f".{self.checkpoint.name}.partial-{os.getpid()}")
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.checkpoint)

    def _resume(self) -> int:
        """Take up the run of the checkpoint, if there is one; the batches of its epoch that are done."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return 0
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            if state["format"] != "taskvec.learning":
                raise KeyError("format")
        except Exception as error:
            raise CorruptFileError(
                f"{self.checkpoint}: not the state of a learning run ({type(error).__name__}). Delete it to start anew."
            ) from error
        if state["signature"] != self._signature():
            there, here = json.loads(state["signature"]), json.loads(self._signature())
            problems = [f"{key}: {there[key]} there, {here[key]} here." for key in here if there.get(key) != here[key]]
            raise MismatchError(problems, title=f"{self.checkpoint}: belongs to another run; delete it to start anew")
        if state["objective"] is not None:
            self.objective.resume_epoch(state["objective"])
        self.composition.trust(state["verified"])
        self.values.copy_(state["values"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.epoch, self.taken = state["step"], state["epoch"], state["taken"]
        self.scale, self.finite_steps = state["scale"], state["finite_steps"]
        self.best, self.best_score = state["best"], state["best_score"]
        self.first, self.waited = state["first"], state["waited"]
        self.result.history = json.loads(state["history"])
        self.result.stopped = state["stopped"]
        kept = [record for record in self.result.history if record.get("best")]
        self.result.best = kept[-1] if kept else None
        return self.taken


def shard(batch: Batch, rank: int, ranks: int) -> Batch:
    """This rank's rows of a batch; tasks of a mapping are shared out one by one.

    Raises:
        DataError: a tensor has fewer rows than there are ranks.
    """
    if isinstance(batch, Tensor):
        if batch.dim() == 0:
            return batch
        if batch.shape[0] < ranks:
            raise DataError(
                f"A batch of {batch.shape[0]} rows cannot be shared by {ranks} processes; use larger batches."
            )
        return batch.tensor_split(ranks)[rank]
    if isinstance(batch, Mapping):
        return {key: shard(value, rank, ranks) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(shard(value, rank, ranks) for value in batch)
    raise DataError(f"A batch holds a {type(batch).__name__}; expected tensors, mappings and tuples of them.")


def terms_of(objective: Any, model: nn.Module, batch: Batch) -> Iterator[Term]:
    """The terms of an objective, or of a function of (model, batch) that returns the mean loss."""
    if hasattr(objective, "terms"):
        yield from objective.terms(model, batch)
        return
    loss = objective(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UsageError("objective: expected a function of (model, batch) that returns the mean loss, one number.")
    rows = float(max(rows_of(batch), 1))
    yield Term("loss", loss.reshape(()) * rows, rows)


class _as_eval:
    """The model in eval mode; every module's own mode comes back."""

    def __init__(self, model: nn.Module):
        self._modes = [(module, module.training) for module in model.modules()]
        self._model = model

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self._modes:
            module.training = training


def _refuse_composed_heads(composition: Composition, objective: Any) -> None:
    composed = {id(p): name for name, p in composition.model.named_parameters() if name in composition.composed}
    for label, head in heads_of(objective):
        for parameter in head.parameters():
            if id(parameter) in composed:
                raise LearningError(
                    f"{label}: its head is {composed[id(parameter)]}, which the task vectors change. A head stays "
                    "fixed: leave it out with `exclude`, or give a copy."
                )


def heads_of(objective: Any) -> Iterator[tuple[str, nn.Module]]:
    """The heads that are modules, with the names of their terms."""
    head = getattr(objective, "head", None)
    if isinstance(head, nn.Module):
        yield str(getattr(objective, "name", "objective")), head
    for name, inner in getattr(objective, "objectives", {}).items():
        for _, found in heads_of(inner):
            yield name, found


def _total(batches: Batches, epochs: int, accumulate: int, schedule: str) -> int | None:
    try:
        return epochs * math.ceil(len(batches) / accumulate)  # type: ignore[arg-type]
    except TypeError:
        pass
    if schedule == "cosine":
        raise UsageError("schedule: cosine needs the number of steps, and these batches have no length; give `steps`.")
    return None


def _check_choices(
    schedule: str,
    clip_mode: str,
    precision: str,
    keep: str | None,
    evaluate: object,
    accumulate: int,
    epochs: int,
    steps: int | None,
) -> None:
    for name, word, known in (
        ("schedule", schedule, ("cosine", "constant")),
        ("clip_mode", clip_mode, ("true", "normalized")),
        ("precision", precision, ("full", "bf16", "fp16")),
        ("keep", keep or "best", ("best", "last")),
    ):
        if word not in known:
            raise UsageError(f"{name}: {word!r} is not known." + did_you_mean(word, known))
    if keep == "best" and evaluate is None:
        raise UsageError("keep: 'best' needs `evaluate`, which says how good coefficients are.")
    for name, number in (("accumulate", accumulate), ("epochs", epochs), ("steps", steps)):
        if number is not None and number < 1:
            raise UsageError(f"{name}: {number}; expected at least 1.")
