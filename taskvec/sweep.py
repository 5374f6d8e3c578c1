"""The engine: runs plans over deltas. It alone knows tiles, threads, memory, devices and read-ahead.

Work is cut into segments of 2^22 elements (the unit in which contents are hashed) and segments into tiles that stay in
the cache while all stages of a merge are applied to them. Each worker thread reads, computes and hands on its own
tiles with one torch thread, so reads, arithmetic and writes of different workers overlap, and results are the same
bits for every number of workers, every tile size and every budget.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from taskvec import native
from taskvec.checkpoint import SEGMENT
from taskvec.compiled import Chain, values_of
from taskvec.deltas import Deltas, ModelDeltas, OneTensor, Room, StackDeltas, Tile
from taskvec.errors import NonFiniteError
from taskvec.memory import Gate, free_memory, give_back
from taskvec.moments import CHUNK, exact, exact_sums, rounded_sum
from taskvec.native import Stored
from taskvec.order import counted
from taskvec.plan import Fold, Formula, Kernel, Plan, Report, Sample, Selection, formula_of
from taskvec.watch import Digests, Watch

TILE = 1 << 19  # elements a task: with smaller ones threads wait for each other between calls, larger ones gain nothing
TILE_RESIDENT = 1 << 24  # on a GPU launches cost more than cache misses
PIECES = 5 << 18  # bytes of all inputs that a compiled pass takes at a time: they stay in the second-level cache
HASHED = 4  # times as many are read at a time where they are hashed too, since each time returns to Python
SPAN = 1 << 24  # elements of all tasks in a partial result, for an eighth of which room is made and little of it used
HELD = 64 << 20  # bytes of all inputs of a tensor that is read once for several passes, for each worker
SAMPLE_BLOCK = 256
MOST_ABREAST = 16  # tensors that a GPU works on at once: with more, launches are no smaller share of the time

Role = Literal["preprocess", "combine", "postprocess"]
Unit = Literal["element", "tensor"]
Scope = Literal["model", "tensor"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a merge: its plan, and the role that says what its kernel returns.

    "preprocess" kernels return a stack, "combine" kernels a merged delta, "postprocess" kernels a merged delta again.
    `copies` is how many float32 copies of a tensor its kernel makes beside the stack, where it sees tensors whole.
    """

    name: str
    role: Role
    start: Callable[[Deltas], "Plan | Kernel"]
    unit: Unit = "element"
    copies: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a sweep is; bytes are those of the tiles' float32 stacks in proportion to the inputs'."""

    label: str
    step: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Options:
    """How to run a sweep; nothing here changes a result.

    Attributes:
        memory: bytes for tiles, kept deltas and whole tensors; None: a quarter of what is free.
        workers: threads; None: one for each core.
        device: "cpu", or a CUDA device on which the kernels run.
        tile: elements a task in a tile, rounded up to a multiple of 2^15.
        progress: called now and then, from several threads.
    """

    memory: int | None = None
    workers: int | None = None
    device: str = "cpu"
    tile: int | None = None
    progress: Callable[[Progress], None] | None = None


@dataclass(slots=True)
class Outcome:
    """What a sweep found out on the way.

    Attributes:
        norms: Euclidean norm of each task vector (before any preprocessing).
        facts: what the stages reported, by stage name; for statistics by tensor, by stage and tensor.
        warnings: what the stages warned of.
        passes: passes over the inputs that were made.
        digests: whether the inputs' contents were hashed on the way.
    """

    norms: list[float] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    passes: int = 0


Sink = Callable[[Tile], None]
"""Takes finished tiles (`merged` is set), from several threads; tiles of one segment come in order."""


@dataclass(slots=True)
class Into:
    """A sink that puts merged deltas into tensors in memory, where fused passes write them directly.

    Attributes:
        places: name -> [*shape], contiguous.
        scale: factor for each delta.
    """

    places: Mapping[str, Tensor]
    scale: float = 1.0

    def __call__(self, tile: Tile) -> None:
        values = tile.merged
        assert values is not None
        if self.scale != 1.0:
            values = values * self.scale
        self.places[tile.name].view(-1)[tile.start : tile.stop] = values.reshape(-1)


def sweep(
    deltas: Deltas,
    stages: Sequence[Stage],
    sink: Sink,
    *,
    scope: Scope = "model",
    options: Options = Options(),
    skip: frozenset[str] = frozenset(),
    allow_zero: bool = True,
) -> Outcome:
    """Runs the stages' plans and hands every merged tile to the sink.

    Args:
        deltas: the task vectors.
        stages: preprocess stages, one combine stage, postprocess stages, in this order.
        sink: where merged tiles go.
        scope: whether statistics are those of the whole model or of each tensor.
        options: memory, threads, device.
        skip: tensors that need not be handed to the sink (they still count in the statistics).
        allow_zero: whether a task vector of zero is let through.

    Raises:
        NonFiniteError: an input holds NaN or infinity; names tensor and task.
    """
    if not _on_gpu(deltas):
        give_back()  # what was freed before counts against no budget of ours
    with _single_threaded():
        return _Sweep(deltas, list(stages), sink, scope, options, skip).run()


class _Sweep:
    def __init__(
        self, deltas: Deltas, stages: list[Stage], sink: Sink, scope: Scope, options: Options, skip: frozenset[str]
    ):
        self.deltas, self.stages, self.sink, self.scope, self.options, self.skip = (
            deltas,
            stages,
            sink,
            scope,
            options,
            skip,
        )
        self.whole = any(stage.unit == "tensor" for stage in stages)
        self.resident = isinstance(deltas, StackDeltas)
        there = options.device != "cpu" or _on_gpu(deltas)
        self.tile = -(-(options.tile or (TILE_RESIDENT if there else TILE)) // CHUNK) * CHUNK
        self.workers = max(1, options.workers or len(os.sched_getaffinity(0)))
        if there:
            self.workers = 1 if self.resident else max(2, self.workers)
        memory = options.memory
        if memory is None and _on_gpu(deltas):  # which take no host memory
            memory = torch.cuda.mem_get_info(deltas.device)[0] * 3 // 4 if self.whole else 1 << 62  # type: ignore[attr-defined]
        memory = free_memory() // 4 if memory is None else memory
        if not there and options.tile is None:
            least = CHUNK * 4 * (4 * len(deltas.tasks) + 4) * self.workers
            while self.tile > CHUNK and self.tile // CHUNK * least > memory // 3:
                self.tile //= 2  # many tasks or a small budget
        self.outcome = Outcome()
        self._chain: list[tuple[Stage, Kernel]] = []
        self._kept: dict[tuple[str, int], Tile] = {}
        tile_bytes = self.tile * 4 * (4 * len(deltas.tasks) + 4) * self.workers
        self._keep_budget = 0 if self.resident else max(0, memory - tile_bytes) // 2
        if not there and self._cached():
            self._keep_budget = 0
        if options.device != "cpu" and not self.resident:  # kept tiles lie on the GPU
            self._keep_budget = min(self._keep_budget, torch.cuda.mem_get_info(torch.device(options.device))[0] // 2)
        self._gate = Gate(max(memory - self._keep_budget, 1))
        self._lock = threading.Lock()
        self._read_once = False
        self._squares = [0] * len(deltas.tasks)
        self._digests = Digests()
        self._stop = threading.Event()
        self._local = threading.local()
        self._late: list[tuple[Stage, Report]] = []
        self._uploaded: Any = None
        self._held: Stored | None = None
        self._most_held = min(HELD, memory // (8 * self.workers))
        self.readers = self.workers
        self._fused = _resident_on_gpu(deltas) if self.resident and scope == "model" and not self.whole else None

    def _cached(self) -> bool:
        """Whether the system keeps the inputs' pages anyway, and reading them again costs less than keeping deltas."""
        size = getattr(self.deltas, "bytes_per_pass", None)
        return size is not None and native.usable() and size() <= free_memory() // 2

    # -- the two scopes ------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        if self.scope == "model":
            plans = [stage.start(self.deltas) for stage in self.stages]
            if self._passed(plans):
                return self._finished()
            self._upload()
            for stage, plan in zip(self.stages, plans):
                self._chain.append((stage, self._plan(stage, plan)))
            if not self._merged_fused() and not self._merged_abreast() and not self._merged_compiled():
                self._pass(self._finish_tile, "merging")
            self._late_reports()
        elif not self._in_step():
            self.outcome.passes = 1
            self._parallel(
                [(name, 0, self.deltas.infos[name].numel) for name in self._largest_first()],
                self._one_tensor,
                "merging",
            )
        return self._finished()

    def _finished(self) -> Outcome:
        self.outcome.norms = [rounded_sum(total) ** 0.5 for total in self._squares]
        return self.outcome

    def _plan(self, stage: Stage, plan: Plan | Kernel) -> Kernel:
        if not isinstance(plan, Iterator):
            return plan
        answer: Any = None
        while True:
            try:
                request = plan.send(answer)
            except StopIteration as done:
                return done.value
            if isinstance(request, Report):
                self._report(stage, request)
                answer = None
            elif isinstance(request, Sample):
                answer = self._sample(request)
            elif isinstance(request, Selection):
                answer = self._selected_fused(request)
            else:
                answer = self._fold(request, f"{stage.name}, statistics")

    def _late_reports(self) -> None:
        """What kernels found on the way."""
        for stage, report in self._late:
            assert callable(report.facts)
            self._report(stage, Report(report.facts()))

    def _report(self, stage: Stage, report: Report, name: str | None = None) -> None:
        if callable(report.facts):
            self._late.append((stage, report))
            return
        facts = dict(report.facts)
        with self._lock:
            for warning in facts.pop("warnings", ()):
                text = f"{stage.name}: {warning}" + (f" ({name})" if name else "")
                if text not in self.outcome.warnings:
                    self.outcome.warnings.append(text)
            if facts and name is None:
                self.outcome.facts.setdefault(stage.name, {}).update(facts)

    def _whole_bytes(self, elements: int) -> int:
        """Memory of one tensor that is worked on whole."""
        return elements * 4 * (2 * len(self.deltas.tasks) + 4 + max(stage.copies for stage in self.stages))

    def _one_tensor(self, name: str, start: int, stop: int) -> None:
        """All stages on one tensor, its statistics its own; its tiles are kept between passes where they fit."""
        if start == stop:  # nothing to take statistics of
            self._finish_tile(self.deltas.tile(name, start, stop))
            return
        need = (stop - start) * 4 * (len(self.deltas.tasks) + 2)
        if self.whole or self._keep_budget == 0:
            need = 0  # passes over whole tensors ask for their memory themselves
        with self._gate(need) as fits:
            small = _TensorSweep(self, name, keep=fits and need > 0)
            small.run()

    # -- on a GPU ------------------------------------------------------------------------------------------------------

    def _upload(self) -> None:
        """Keeps the inputs on the GPU while the merge lasts, where they fit; else tiles go there one by one."""
        if self.options.device == "cpu" or self.resident or self.whole:
            return
        from taskvec.upload import Uploaded, readers

        device = torch.device(self.options.device)
        if not Uploaded.fits(self.deltas, device):
            return
        assert isinstance(self.deltas, ModelDeltas)
        self.workers = readers(self.workers)
        there = Uploaded(self.deltas, device, self.workers)

        def item(name: str, start: int, stop: int) -> None:
            watch = self._watch(name, start // SEGMENT)
            there.load(name, start, stop, watch)
            watch.close()

        self._parallel(self._segments(), item, "reading")
        there.settle()
        self.deltas, self.resident, self._uploaded = there, True, there
        self._fused, self._keep_budget = _uploaded_on_gpu(there), 0
        self.readers, self.workers = self.workers, 1

    def _selected_fused(self, request: Selection) -> Any:
        """Order statistics of the deltas themselves by one fused pass; None where that is not known."""
        if self._fused is None or self._chain:
            return None
        found = self._fused.order_statistics(request.of, request.ranks)
        if found is not None:
            self._after_fused()
        return found

    def _merged_fused(self) -> bool:
        """The last pass, fused into the sink's tensors; False where that is not known."""
        told = _chain_formula([kernel for _, kernel in self._chain])
        if self._fused is None or told is None or self.skip:
            return False
        if isinstance(self.sink, Into):
            done = self._fused.merge(told, self.sink.places, self.sink.scale * told.numbers.get("scale", 1.0))
        elif self._uploaded is not None:
            return self._merged_onto_base(told)
        else:
            take = getattr(self.sink, "take_packed", None)
            parts = None if take is None else self._fused.packed(told)
            done = take is not None and parts is not None
            if take is not None and parts is not None:
                take(parts)
        if done:
            self._after_fused()
        return done

    def _merged_onto_base(self, told: Formula) -> bool:
        """Finished weights in their stored dtype, made on the GPU and handed to a sink that takes such."""
        kinds: Mapping[str, torch.dtype] | None = getattr(self.sink, "kinds", None)
        if kinds is None or self._fused is None or self._uploaded is None:
            return False
        there = self._uploaded
        outs = {
            name: torch.empty(info.numel, dtype=kinds[name], device=there.device)
            for name, info in there.infos.items()
            if info.numel
        }
        if not self._fused.merge(told, outs, scale=float(told.numbers.get("scale", 1.0)), onto_base=True):
            return False
        self._after_fused()
        finite = torch.stack([out.sum(dtype=torch.float32) for out in outs.values()]).isfinite().tolist()
        for (name, out), fine in zip(outs.items(), finite):
            bad = 0 if fine else int((~torch.isfinite(out)).sum())
            if bad:
                raise NonFiniteError(name, f"the result of {self.stages[-1].name}", bad)
        torch.cuda.synchronize(there.device)

        def item(name: str, start: int, stop: int) -> None:
            if start == stop:
                self.sink.take_weights(name, start, torch.empty(0, dtype=kinds[name]))  # type: ignore[attr-defined]
                return
            with there.ring() as ring:
                for begin, values in there.pieces(ring, outs[name][start:stop]):
                    self.sink.take_weights(name, start + begin, values)  # type: ignore[attr-defined]

        self.workers = self.readers
        self._parallel(self._segments(), item, "merging")
        return True

    def _passed(self, plans: Sequence[Plan | Kernel]) -> bool:
        """A merge without statistics on a GPU: segments are read, merged and written all at once; nothing is kept there."""
        kinds: Mapping[str, torch.dtype] | None = getattr(self.sink, "kinds", None)
        if self.options.device == "cpu" or self.resident or self.whole or self.skip or kinds is None:
            return False
        told = None if any(isinstance(plan, Iterator) for plan in plans) else _chain_formula(plans)  # type: ignore[arg-type]
        from taskvec.upload import Passing, readers

        device = torch.device(self.options.device)
        if told is None or not _fusible(len(self.deltas.tasks), self.deltas.numel, device):
            return False
        from taskvec import fused

        if told.name not in fused.MERGES or not Passing.fits(self.deltas, device):
            return False
        assert isinstance(self.deltas, ModelDeltas)
        self.workers = readers(self.workers)
        there, launching = Passing(self.deltas, device, self.workers), threading.Lock()
        scale = float(told.numbers.get("scale", 1.0))
        method = self.stages[-1].name

        def item(name: str, start: int, stop: int) -> None:
            watch = self._watch(name, start // SEGMENT)
            if start == stop:
                self.deltas.tile(name, start, stop, watch)
                watch.close()
                self.sink.take_weights(name, start, torch.empty(0, dtype=kinds[name]))  # type: ignore[attr-defined]
                return
            with there.ring() as ring:
                tuned, base, weights = there.rows(ring, name, start, stop, watch)
                watch.close()
                out = torch.empty(stop - start, dtype=kinds[name], device=device)
                with launching:  # the compiler is not made for several threads
                    merge = fused.Resident([fused.Entry(name, tuned, base, weights)])
                    merge.merge(told, {name: out}, scale=scale, onto_base=True)
                squares = merge.squares
                assert squares is not None
                if all(value < math.inf for value in squares):
                    with self._lock:
                        for task, value in enumerate(squares):
                            self._squares[task] += exact(value)
                else:
                    self._examine(self.deltas.tile(name, start, stop))
                if not _is_finite(out):
                    raise NonFiniteError(name, f"the result of {method}", int((~torch.isfinite(out)).sum()))
                for begin, values in there.pieces(ring, out):
                    self.sink.take_weights(name, start + begin, values)  # type: ignore[attr-defined]

        self._parallel(self._segments(), item, "merging")
        self.outcome.passes += 1
        return True

    def _in_step(self) -> bool:
        """Tensors on a GPU whose own inner products say how to combine them: their plans in step, one launch for all."""
        if self.whole or self.skip or len(self.stages) > 1 or not isinstance(self.sink, Into) or not self.resident:
            return False
        assert isinstance(self.deltas, StackDeltas)
        stacks, there = self.deltas.on_gpu(), _resident_on_gpu(self.deltas)
        if stacks is None or there is None:
            return False
        from taskvec import fused

        (stage,) = self.stages
        reports: list[tuple[Report, str]] = []

        def next_of(plan: Any, answer: Any, name: str) -> Any:
            try:
                while isinstance(request := plan.send(answer), Report):
                    reports.append((request, name))
                    answer = None
            except StopIteration as done:
                return done.value
            return request

        plans = {name: stage.start(self.deltas.only(name)) for name, _, _ in stacks}
        if len(self.deltas.tasks) > fused.MOST_PRODUCTS or not all(isinstance(p, Iterator) for p in plans.values()):
            return False
        for name, plan in plans.items():
            asked = next_of(plan, None, name)
            wanted = formula_of(asked.of) if isinstance(asked, Fold) else None
            if wanted is None or wanted.name != "gram":
                return False
        products = there.gram()
        if not bool(torch.stack(list(products.values())).isfinite().all()):
            return False  # what is wrong is found tensor by tensor
        told: list[tuple[str, Tensor, list[float], Mapping[str, Any]]] = []
        for name, rows, weights in stacks:
            kernel = next_of(plans[name], products[name], name)
            known = formula_of(kernel) if callable(kernel) else None
            if known is None or known.name != "combination":
                return False
            told.append((name, rows, weights, known.numbers))
        together = told[0][3].get("together")
        if together is not None:  # what follows then only looks up what was found for all
            together([(numbers["of"], weights) for _, _, weights, numbers in told])
        chosen = [
            fused.Entry(name, rows, None, numbers["coefficients"](weights)) for name, rows, weights, numbers in told
        ]
        self._fused = fused.Resident(chosen)
        self._fused.merge(Formula("weighted sum", {}), self.sink.places, self.sink.scale)
        self._after_fused()
        self.outcome.passes = 1
        for report, name in reports:
            facts = report.facts() if callable(report.facts) else report.facts
            self._report(stage, Report(facts), name)
        return True

    def _merged_abreast(self) -> bool:
        """The last pass over whole tensors on a GPU, those of one shape (or transposed) together where a kernel can."""
        if not self.whole or not _on_gpu(self.deltas) or not any(_several(kernel) for _, kernel in self._chain):
            return False
        self._pass_abreast()
        return True

    def _pass_abreast(self) -> None:
        self.outcome.passes += 1
        first, done = not self._read_once, 0
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, _, _ in self._items():
            shapes.setdefault(tuple(sorted(self.deltas.infos[name].shape)), []).append(name)
        for shape, names in shapes.items():
            numel = math.prod(shape)
            need = self._whole_bytes(numel)
            each = max(1, min(MOST_ABREAST, self._gate.size // (2 * max(1, need))))
            for at in range(0, len(names), each):
                some = names[at : at + each]
                with self._gate(need * len(some)):
                    self._finish_tiles([tile for name in some for tile in self._tiles(name, 0, numel, first)])
                done += numel * len(some)
                if self.options.progress is not None:
                    self.options.progress(Progress("merging", self.outcome.passes, done, self.deltas.numel))
        self._read_once = True

    def _finish_tiles(self, tiles: list[Tile]) -> None:
        """The same as `_finish_tile` for tiles of one shape."""
        if self._stop.is_set() or not tiles[0].stack.numel() or any(tile.name in self.skip for tile in tiles):
            for tile in tiles:
                self._finish_tile(tile)
            return
        for tile in self._all_through(tiles):
            self.sink(tile)

    def _segments(self) -> list[tuple[str, int, int]]:
        """What one worker brings to the GPU or back at once; in these units contents are hashed."""
        return [
            (name, start, min(start + SEGMENT, info.numel))
            for name, info in self.deltas.infos.items()
            for start in range(0, max(info.numel, 1), SEGMENT)
        ]

    def _after_fused(self) -> None:
        """Counts the pass; the first one also found the norms, and any value that is not a number."""
        assert self._fused is not None
        self.outcome.passes += 1
        if self._read_once or self._fused.squares is None:
            return
        self._read_once = True
        if all(value < float("inf") for value in self._fused.squares):
            self._squares = [exact(value) for value in self._fused.squares]
            return
        for item in self._items():  # a value that is not finite, or one whose square is not
            for tile in self._tiles(*item, first=True):
                del tile

    # -- passes --------------------------------------------------------------------------------------------------------

    def _items(self) -> list[tuple[str, int, int]]:
        if self.whole:
            return [(name, 0, self.deltas.infos[name].numel) for name in self._largest_first()]
        size = max(self.tile, SEGMENT)
        items = [
            (name, start, min(start + size, info.numel))
            for name, info in self.deltas.infos.items()
            for start in range(0, max(info.numel, 1), size)
        ]
        # every other pass goes backwards: what the one before it read last is still in the page cache
        return items if self.outcome.passes % 2 else items[::-1]

    def _largest_first(self) -> list[str]:
        """File order, except that tensors big enough to be a worker's last straw come first."""
        total = max(1, self.deltas.numel)
        big = {n for n, i in self.deltas.infos.items() if i.numel * 8 * self.workers > total}
        return sorted(big, key=lambda n: -self.deltas.infos[n].numel) + [n for n in self.deltas.infos if n not in big]

    def _fold(self, fold: Fold, label: str) -> Any:
        joined, part_of = _Joined(fold), self._compiled_fold(fold)

        def eager(tile: Tile) -> None:
            if tile.start < tile.stop:
                joined.add(fold.of(self._through(tile)))

        if part_of is None:
            self._pass(eager, label)
            return joined.result

        def work(stored: Stored, squares: Any) -> None:
            try:
                part, base_finite = part_of(stored, squares)
            except (ValueError, OverflowError):  # NaN and infinity are no multiples of anything
                self._blame(self.deltas.tile(stored.name, stored.start, stored.stop))
                raise
            if squares is not None:
                self._take_squares(stored, squares, base_finite)
            joined.add(part)

        self._stored_pass(lambda name, start, stop: work, eager, label)
        return joined.result

    # -- compiled passes over tiles as they are stored -----------------------------------------------------------------

    def _merged_compiled(self) -> bool:
        """The last pass by compiled code, from what is stored to what is written; False where that is not known."""
        chain = Chain.of([formula_of(kernel) for _, kernel in self._chain])
        kinds: Mapping[str, torch.dtype] | None = getattr(self.sink, "kinds", None)
        into = self.sink if isinstance(self.sink, Into) else None
        if chain is None or (kinds is None and into is None) or (self.whole and chain.ranked is None):
            return False
        if not self._compiles():
            return False
        within: Any = self._within()
        onto_base = kinds is not None and getattr(within, "space", "") == "delta"

        def width(name: str) -> int:
            return chain.width(self.deltas.infos[name].shape)

        def begin(name: str, start: int, stop: int) -> Callable[[Stored, Any], None] | None:
            weights = within.weights_of(name, start, stop)
            how = chain.at(
                name, start, self.deltas.tasks, weights,
                onto_base=onto_base, scale=into.scale if into else 1.0, width=width(name),
            )  # fmt: skip
            if how is None or (onto_base and not within.has_base):
                return None
            room = 0 if into else min(stop - start, SEGMENT + self._piece(width(name)))
            out = into.places[name].view(-1)[start:stop] if into else self._out(room, kinds[name])  # type: ignore[index]
            first = start

            def work(stored: Stored, squares: Any) -> None:
                nonlocal first
                size = stored.count if stored.files is None else stored.files.piece
                stack = self._room(size).stack if how.ranked else None
                base_finite, finite = native.merge(stored, how, out[stored.start - first :], squares, stack)
                if squares is not None:
                    self._take_squares(stored, squares, base_finite)
                if into is not None:
                    return
                if not finite:
                    self._say_what_is_wrong(name, stored)
                if stored.stop == stop or stored.stop - first >= SEGMENT:
                    self.sink.take_weights(name, first, out[: stored.stop - first])  # type: ignore[attr-defined]
                    first = stored.stop

            return work

        if into is not None and not all(self._fits_into(place) for place in into.places.values()):
            return False
        self._stored_pass(begin, self._finish_tile, "merging", width, SEGMENT)
        return True

    def _say_what_is_wrong(self, name: str, stored: Stored) -> None:
        """Raises what the eager form says of results that are not finite in the output's dtype."""
        start, stop = (0, self.deltas.infos[name].numel) if self.whole else (stored.start, stored.stop)
        tile = self.deltas.tile(name, start, stop)
        self._finish_tile(self._shaped(tile) if self.whole else tile)
        raise NonFiniteError(name, f"the result of {self.stages[-1].name}", 1)

    def _piece(self, width: int = 1) -> int:
        """Elements that a compiled pass takes at a time: whole rows of this width, as many as stay in the cache."""
        size = max(1, PIECES // (2 * (len(self.deltas.tasks) + 1) * CHUNK)) * CHUNK
        return size if width == 1 else max(1, size // width) * width

    def _out(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory for finished weights that this thread uses again and again."""
        size = count * dtype.itemsize
        room: Tensor | None = getattr(self._local, "out", None)
        if room is None or room.numel() < size:
            room = self._local.out = torch.empty(size, dtype=torch.uint8)
        return room[:size].view(dtype)

    @staticmethod
    def _fits_into(place: Tensor) -> bool:
        return place.dtype == torch.float32 and place.device.type == "cpu" and place.is_contiguous()

    def _within(self) -> Deltas:
        """The deltas, or those of the whole model where they are one tensor of it."""
        return self.deltas.whole if isinstance(self.deltas, OneTensor) else self.deltas

    def _compiles(self) -> bool:
        """Whether these deltas come as stored tiles that compiled passes can take."""
        within = self._within()
        plain = isinstance(within, ModelDeltas | StackDeltas) and not within.masked
        on_cpu = self.options.device == "cpu" and not (isinstance(within, StackDeltas) and within.device.type != "cpu")
        return plain and on_cpu and native.usable()

    def _stored_pass(
        self,
        begin: Callable[[str, int, int], "Callable[[Stored, Any], None] | None"],
        eager: Callable[[Tile], None],
        label: str,
        width: Callable[[str], int] = lambda name: 1,
        span: int = 0,
    ) -> None:
        """One pass that hands out tiles as they are stored, with room for their squares where these are not known yet.

        Args:
            begin: gives the work to be done on the pieces of an item; None where it must be done on tiles.
            eager: the work on tiles, for that and for what compiled code cannot read (float64, float8).
            label: what to call it.
            width: elements of a tensor that must stay together.
            span: about how many elements one call of the work is for, where compiled code reads them itself; default: as
                many as a partial result is for.
        """
        self.outcome.passes += 1
        first = not self._read_once
        source: Any = self._within()
        span = span or max(1, SPAN // len(self.deltas.tasks))

        def item(name: str, start: int, stop: int) -> None:
            info = self.deltas.infos[name]
            work = None
            if start < stop and info.dtype == torch.float32 and name not in self.skip and source.compiles(name):
                work = begin(name, start, stop)
            if work is None:
                for tile in self._tiles(name, start, stop, first):
                    eager(tile)
                return
            hashes = first and not self.resident and self._held is None and bool(source.unhashed(name))
            watch = self._watch(name, start // SEGMENT) if hashes else None
            for stored in self._stored(name, start, stop, self._piece(width(name)), span, watch):
                if self._stop.is_set():
                    return
                work(stored, stored.squares() if first else None)
            if watch is not None:
                watch.close()

        self._parallel(self._items(), item, label)
        self._read_once = True

    def _stored(
        self, name: str, start: int, stop: int, size: int, span: int, watch: "Watch | None"
    ) -> Iterator[Stored]:
        """Tiles as they are stored: large ones that are read meanwhile, or what was read, `size` elements at a time."""
        source: Any = self._within()
        if self._held is not None:
            step = -(-span // size) * size
            for begin in range(start, stop, step):
                yield self._held.part(begin, min(begin + step, stop))
            return
        room = None if self.resident else self._room(size)
        if room is not None and watch is None:
            step = -(-span // size) * size
            for begin in range(start, stop, step):
                stored = source.streamed(name, begin, min(begin + step, stop), size, room)
                if stored is None:
                    break
                yield stored
            else:
                return
        if watch is not None and size % CHUNK == 0:  # not in rows, by which sums of squares are made
            size *= HASHED
            room = self._room(size)
        yield from source.pieces(name, start, stop, size, watch, room)

    def _compiled_fold(self, fold: Fold) -> "Callable[[Stored, Any], tuple[Any, bool]] | None":
        """A fold's partial result from a tile as it is stored, and whether its base is finite; None: not known here."""
        told = formula_of(fold.of)
        if told is None or self._chain or self.whole or not self._compiles():
            return None
        if told.name == "counts":
            values, brackets = values_of(told.numbers["of"]), told.numbers["brackets"]
            return None if values is None else lambda stored, squares: counted(stored, values, brackets, squares)
        if told.name == "gram":
            return lambda stored, squares: exact_sums(*native.gram(stored, squares))
        if told.name == "energies":
            return lambda stored, squares: exact_sums(*native.energies(stored, told.numbers["least"], squares))
        if told.name == "varied":
            return _varied
        return None

    def _take_squares(self, stored: Stored, squares: Any, base_finite: bool) -> None:
        """Adds to the norms; refuses what is not a number."""
        rows = squares.tolist()
        if not base_finite or not all(math.isfinite(sum(row)) for row in rows):
            self._blame(self.deltas.tile(stored.name, stored.start, stored.stop))
        self._add_squares(rows)

    def _add_squares(self, rows: Sequence[Sequence[float]]) -> None:
        sums = [sum(map(exact, row)) for row in rows]
        with self._lock:
            for task, total in enumerate(sums):
                self._squares[task] += total

    def _room(self, size: int) -> Room:
        """Memory that this thread uses again and again."""
        room: Room | None = getattr(self._local, "room", None)
        if room is None or room.each < 8 * size:
            room = self._local.room = Room.of(len(self.deltas.tasks), size)
        return room

    # -- passes over tiles ---------------------------------------------------------------------------------------------

    def _pass(self, work: Callable[[Tile], None], label: str) -> None:
        self.outcome.passes += 1
        first = not self._read_once

        def item(name: str, start: int, stop: int) -> None:
            need = self._whole_bytes(stop - start) if self.whole else 0
            with self._gate(need):
                for tile in self._tiles(name, start, stop, first):
                    work(tile)

        self._parallel(self._items(), item, label)
        self._read_once = True

    def _tiles(self, name: str, start: int, stop: int, first: bool) -> Iterator[Tile]:
        watch = self._watch(name, start // SEGMENT) if first and not self.resident else None
        size = max(1, stop - start) if self.whole else self.tile
        for begin in range(start, max(stop, start + 1), size):
            if self._stop.is_set():
                return
            end = min(begin + size, stop)
            tile = self._kept.get((name, begin))
            if tile is None:
                tile = self._read(name, begin, end, watch)
                if first:
                    self._examine(tile)
                if self.options.device != "cpu" and tile.stack.device.type == "cpu":
                    tile = _moved(tile, self.options.device)
                self._keep(tile)
            yield self._shaped(tile) if self.whole else tile
        if watch is not None:
            watch.close()

    def _read(self, name: str, start: int, stop: int, watch: "Watch | None") -> Tile:
        """A tile; one that will not be kept lies in memory that this thread uses again for the next."""
        within = self._within()
        if isinstance(within, ModelDeltas) and not self.whole and self.options.device == "cpu":
            size = len(self.deltas.tasks) * (stop - start) * 4
            if not self._more_passes or self._keep_budget < 2 * size:
                return within.tile(name, start, stop, watch, self._room(self.tile))
        return self.deltas.tile(name, start, stop, watch)

    def _keep(self, tile: Tile) -> None:
        if self._keep_budget <= 0 or not self._more_passes:
            return
        size = tile.stack.numel() * tile.stack.element_size() + (0 if tile.base is None else tile.base.numel() * 4)
        room = getattr(self._local, "room", None)
        if room is not None and tile.stack.data_ptr() == room.stack.data_ptr():
            return
        with self._lock:
            if size <= self._keep_budget:
                self._keep_budget -= size
                self._kept[tile.name, tile.start] = tile

    @property
    def _more_passes(self) -> bool:
        return len(self._chain) < len(self.stages)

    @staticmethod
    def _shaped(tile: Tile) -> Tile:
        shape = tile.shape
        base = None if tile.base is None else tile.base.view(shape)
        return Tile(
            tile.name,
            shape,
            tile.start,
            tile.stop,
            tile.tasks,
            tile.stack.view(len(tile.tasks), *shape),
            base,
            tile.weights,
        )

    def _examine(self, tile: Tile) -> None:
        """Norms for the report, and the check that every number is one."""
        if tile.stack.device.type != "cpu":
            self._examine_there(tile)
            return
        if tile.squares is not None:
            rows = tile.squares.tolist()
            if not all(math.isfinite(sum(row)) for row in rows):
                self._blame(tile)
            self._add_squares(rows)
            return
        parts = chunk_squares(tile.stack)
        if not all(map(math.isfinite, map(sum, parts))) or (tile.base is not None and not _is_finite(tile.base)):
            self._blame(tile)
            parts = chunk_squares(tile.stack.double())  # finite, but their squares are not in float32
        self._add_squares(parts)

    def _examine_there(self, tile: Tile) -> None:
        """The same on a GPU, with one wait for each tile."""
        wide = torch.linalg.vector_norm(tile.stack.flatten(1), dim=1, dtype=torch.float64).square().tolist()
        if not all(value < float("inf") for value in wide) or (tile.base is not None and not _is_finite(tile.base)):
            self._blame(tile)
        with self._lock:
            for task, value in enumerate(wide):
                self._squares[task] += exact(value)

    def _blame(self, tile: Tile) -> None:
        if tile.base is not None and not _is_finite(tile.base):
            bad = int((~torch.isfinite(tile.base)).sum())
            raise NonFiniteError(tile.name, "the base", bad)
        for task, row in zip(tile.tasks, tile.stack):
            bad = int((~torch.isfinite(row)).sum())
            if bad:
                raise NonFiniteError(tile.name, f"task {task!r}", bad)

    def _through(self, tile: Tile) -> Tile:
        return self._all_through([tile])[0]

    def _all_through(self, tiles: list[Tile]) -> list[Tile]:
        """All stages on tiles of one shape, together where a kernel can."""
        for stage, kernel in self._chain:
            several = _several(kernel) if len(tiles) > 1 else None
            results = [kernel(tile) for tile in tiles] if several is None else several(tiles)
            as_stack = stage.role == "preprocess"
            tiles = [t.with_stack(r) if as_stack else t.with_merged(r) for t, r in zip(tiles, results)]
        return tiles

    def _watch(self, name: str, segment: int) -> Watch:
        within: Any = self._within()
        return Watch(self._digests, within.unhashed(name) if hasattr(within, "unhashed") else {}, segment)

    def _finish_tile(self, tile: Tile) -> None:
        if tile.name not in self.skip:
            self.sink(self._through(tile) if tile.start < tile.stop else tile.with_merged(tile.stack[0]))

    def _sample(self, sample: Sample) -> tuple[Tensor, bool]:
        total = self.deltas.numel
        stages = self.stages[: len(self._chain) + 1]
        if self.whole and total > sample.size and any(stage.unit == "tensor" for stage in stages):
            return self._sample_of_wholes(sample), False
        if total <= sample.size:
            parts = []
            for name, info in self.deltas.infos.items():
                for tile in self._tiles(name, 0, info.numel, not self._read_once) if info.numel else ():
                    # a copy, since the tile's memory may be used again for the next one
                    parts.append(sample.of(self._through(tile)).reshape(-1, tile.stop - tile.start).clone())
            self._read_once = True
            return torch.cat(parts, -1), True
        blocks = sample_blocks(self.deltas, sample.size)
        told = formula_of(sample.of)
        compiles = not self._chain and not self.whole and self._compiles()
        values = values_of(told) if told is not None and compiles else None
        if values is not None:
            return self._gathered(blocks, values, sample), False
        parts = [sample.of(self._through(self._on_device(self.deltas.tile(*block)))) for block in blocks]
        return torch.cat(parts, -1), False

    def _gathered(self, blocks: Sequence[tuple[str, int, int]], values: native.Values, sample: Sample) -> Tensor:
        """What is wanted of the sampled blocks, with few calls: there are thousands of them."""
        wanted: dict[str, list[tuple[int, int]]] = {}
        for name, start, stop in blocks:
            wanted.setdefault(name, []).append((start, stop))
        source: Any = self._within()

        def listed(name: str, places: list[tuple[int, int]]) -> Tensor:
            if self._held is not None:
                return native.listed(self._held.gathered(places), values)
            if self.deltas.infos[name].dtype == torch.float32 and source.compiles(name):
                return native.listed(source.gathered(name, places), values)
            with _single_threaded():
                return torch.cat([sample.of(self.deltas.tile(name, *place)).float() for place in places], -1)

        if self.workers == 1 or len(wanted) == 1:
            return torch.cat([listed(*one) for one in wanted.items()], -1)
        with ThreadPoolExecutor(min(self.workers, len(wanted)), "taskvec-sample") as pool:
            return torch.cat(list(pool.map(listed, wanted, wanted.values())), -1)

    def _sample_of_wholes(self, sample: Sample) -> Tensor:
        """The same blocks, where stages must see tensors whole: one tensor at a time, of which only the blocks stay."""
        wanted: dict[str, list[tuple[int, int]]] = {}
        for name, start, stop in sample_blocks(self.deltas, sample.size):
            wanted.setdefault(name, []).append((start, stop))
        parts = []
        for name, blocks in wanted.items():
            # read afresh: what a sample reads is neither kept nor examined
            tile = self._shaped(self._on_device(self.deltas.tile(name, 0, self.deltas.infos[name].numel)))
            values = sample.of(self._through(tile)).reshape(-1, tile.stop - tile.start)
            parts.append(torch.cat([values[:, start:stop] for start, stop in blocks], -1))
        return torch.cat(parts, -1)

    def _on_device(self, tile: Tile) -> Tile:
        return (
            tile
            if self.options.device == "cpu" or tile.stack.device.type != "cpu"
            else _moved(tile, self.options.device)
        )

    # -- threads -------------------------------------------------------------------------------------------------------

    def _parallel(self, items: list[tuple[str, int, int]], work: Callable[[str, int, int], None], label: str) -> None:
        total = sum(stop - start for _, start, stop in items)
        done = 0
        ahead = getattr(self.deltas, "read_ahead", None)
        queue = iter(range(len(items)))
        step = self.outcome.passes

        def worker() -> None:
            nonlocal done
            with _single_threaded():
                while not self._stop.is_set():
                    with self._lock:
                        index = next(queue, None)
                    if index is None:
                        return
                    if ahead is not None and index + self.workers < len(items):
                        ahead(*items[index + self.workers])
                    work(*items[index])
                    if index % 8 == 7:
                        give_back()
                    with self._lock:
                        done += items[index][2] - items[index][1]
                    if self.options.progress is not None:
                        self.options.progress(Progress(label, step, done, total))

        if self.workers == 1 or len(items) == 1:
            worker()
            return
        pool = ThreadPoolExecutor(min(self.workers, len(items)), "taskvec-sweep")
        try:
            futures = [pool.submit(worker) for _ in range(min(self.workers, len(items)))]
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(wait=True)


class _TensorSweep(_Sweep):
    """All stages on a single tensor, inside one worker."""

    def __init__(self, outer: _Sweep, name: str, *, keep: bool):
        options = Options(memory=1 << 62 if keep else 0, workers=1, device=outer.options.device, tile=outer.tile)
        on_gpu = isinstance(outer.deltas, StackDeltas) and outer.deltas.device.type == "cuda"
        deltas = outer.deltas.only(name) if on_gpu else OneTensor(outer.deltas, name)  # type: ignore[attr-defined]
        super().__init__(deltas, outer.stages, outer.sink, "model", options, outer.skip)
        self.outer, self.name, self.resident = outer, name, outer.resident
        self._keep_budget = 0 if outer.resident or not keep else 1 << 62
        self._stop, self._digests, self._local, self._gate = outer._stop, outer._digests, outer._local, outer._gate
        self._most_held = outer._most_held

    def _hold(self) -> Stored | None:
        """The tensor as it is stored, for all passes over it, in memory that this thread uses again; None: too large."""
        within, info = self._within(), self.deltas.infos[self.name]
        if self.resident or self.whole or not self._compiles() or not isinstance(within, ModelDeltas):
            return None
        if info.dtype != torch.float32 or self.name in self.skip or not within.compiles(self.name):
            return None
        if within.bytes_per_pass([self.name]) > self._most_held:
            return None
        sources, each = len(self.deltas.tasks) + 1, 4 * info.numel
        raw: Tensor | None = getattr(self._local, "held", None)
        if raw is None or raw.numel() < sources * each:
            raw = self._local.held = torch.empty(sources * each, dtype=torch.uint8)
        watch = self._watch(self.name, 0)
        (stored,) = within.pieces(self.name, 0, info.numel, info.numel, watch, Room(torch.empty(0), raw, each))
        watch.close()
        return stored

    def run(self) -> Outcome:
        plans = [stage.start(self.deltas) for stage in self.stages]
        if any(isinstance(plan, Iterator) for plan in plans):
            self._held = self._hold()
        for stage, plan in zip(self.stages, plans):
            self._chain.append((stage, self._plan(stage, plan)))
        if not self._merged_fused() and not self._merged_compiled():
            self._pass(self._finish_tile, "merging")
        self._late_reports()
        with self.outer._lock:
            for task, total in enumerate(self._squares):
                self.outer._squares[task] += total
        return self.outcome

    def _report(self, stage: Stage, report: Report, name: str | None = None) -> None:
        if callable(report.facts):
            self._late.append((stage, report))
        else:
            self.outer._report(stage, report, self.name)

    def _parallel(self, items: list[tuple[str, int, int]], work: Callable[[str, int, int], None], label: str) -> None:
        for item in items:
            if self._stop.is_set():
                return
            work(*item)


class _Joined:
    """The partial results of a fold, joined at once, so that they never pile up."""

    def __init__(self, fold: Fold):
        self._fold, self._lock = fold, threading.Lock()
        self._parts: list[Any] = []

    def add(self, part: Any) -> None:
        with self._lock:
            self._parts[:] = [self._fold.join(self._parts[0], part)] if self._parts else [part]

    @property
    def result(self) -> Any:
        return self._parts[0]


def _varied(stored: Stored, squares: Any) -> tuple[int, bool]:
    """How many entries differ between tasks."""
    none = np.zeros((1, 1), np.float32)
    found = native.count(stored, native.Values("variance"), none, none, squares)
    return stored.count - int(found.counts[0, 0, 1]), found.base_finite


def _on_gpu(deltas: Deltas) -> bool:
    return isinstance(deltas, StackDeltas) and deltas.device.type != "cpu"


def _fusible(tasks: int, numel: int, device: torch.device) -> bool:
    """Whether fused passes run there, and are worth it."""
    try:
        from taskvec import fused
    except ImportError:
        return False
    return numel >= fused.LEAST and tasks <= fused.MOST_TASKS and fused.usable(device)


def _resident_on_gpu(deltas: Deltas) -> Any:
    """Stacks that lie on one GPU, ready for fused passes; None where they do not, or where Triton is missing."""
    assert isinstance(deltas, StackDeltas)
    stacks = deltas.on_gpu()
    if stacks is None:
        return None
    if not _fusible(len(deltas.tasks), deltas.numel, deltas.device):
        return None
    from taskvec import fused

    return fused.Resident([fused.Entry(name, rows, None, weights) for name, rows, weights in stacks])


def _uploaded_on_gpu(there: Any) -> Any:
    """The same for inputs that were uploaded."""
    if not _fusible(len(there.tasks), there.numel, there.device):
        return None
    from taskvec import fused

    rows = there.rows()
    if rows is None:
        return None
    return fused.Resident([fused.Entry(name, tuned, base, weights) for name, tuned, base, weights in rows])


def _several(kernel: Kernel) -> Callable[[Sequence[Tile]], Sequence[Tensor]] | None:
    """The form of a kernel that takes several tiles of one shape at once, if it has one."""
    told = formula_of(kernel)
    return told.numbers["of"] if told is not None and told.name == "abreast" else None


def _chain_formula(kernels: Sequence[Kernel]) -> Formula | None:
    """What a chain of kernels computes together."""
    told = [formula_of(kernel) for kernel in kernels]
    last = told[-1]
    if last is not None and last.name == "scale" and len(told) > 1:
        scaled = _chain_formula(kernels[:-1])
        return None if scaled is None else Formula(scaled.name, {**scaled.numbers, "scale": last.numbers["scale"]})
    if len(told) == 1:
        return told[0]
    if len(told) == 2:
        first, second = told
        if first is not None and second is not None and (first.name, second.name) == ("trim", "weighted sum"):
            return Formula("trimmed sum", first.numbers)
    return None


@contextmanager
def _single_threaded() -> Iterator[None]:
    """One torch thread and no gradients in this thread: sums inside kernels then never depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _is_finite(values: Tensor) -> bool:
    total = values.sum()
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())


def chunk_squares(stack: Tensor) -> list[list[float]]:
    """Sum of squares of each piece of 2^15 of each row: one call for all, as small calls are what threads wait for."""
    flat = stack.reshape(len(stack), -1)
    whole = flat.shape[1] // CHUNK * CHUNK
    norms = torch.linalg.vector_norm(flat[:, :whole].view(len(flat), -1, CHUNK), dim=2)
    rest = torch.linalg.vector_norm(flat[:, whole:], dim=1, keepdim=True)
    return [[value * value for value in row] for row in torch.cat([norms, rest], 1).double().tolist()]


def _moved(tile: Tile, device: str) -> Tile:
    return Tile(
        tile.name,
        tile.shape,
        tile.start,
        tile.stop,
        tile.tasks,
        tile.stack.to(device, non_blocking=True),
        None if tile.base is None else tile.base.to(device, non_blocking=True),
        tile.weights.to(device) if tile.weights.ndim > 1 else tile.weights,
    )


def sample_blocks(deltas: Deltas, size: int) -> list[tuple[str, int, int]]:
    """Blocks of 256 elements evenly spread over all tensors, about `size` elements together: always the same ones."""
    total = deltas.numel
    count = max(1, size // SAMPLE_BLOCK)
    blocks, at = [], 0
    wanted = ((2 * i + 1) * total // (2 * count) for i in range(count))
    position = next(wanted, None)
    for name, info in deltas.infos.items():
        while position is not None and position < at + info.numel:
            start = min(position - at, max(0, info.numel - SAMPLE_BLOCK))
            blocks.append((name, start, min(start + SAMPLE_BLOCK, info.numel)))
            position = next(wanted, None)
        at += info.numel
    return blocks


__all__ = [
    "Into",
    "Options",
    "Outcome",
    "Progress",
    "Stage",
    "sample_blocks",
    "sweep",
]
