"""Fused passes over deltas that lie on a GPU. Imported only when the device is one.

The engine asks here first. Plans say what their functions of tiles compute (`taskvec.plan.formula`); where the name is
known, one launch reads every tensor of the model once, whatever their number, and nothing is written but what is
asked for. Where it is not, or Triton is missing, the engine runs the functions themselves.

Order statistics are exact: a stratified sample brackets each rank, one launch counts below and at the bracket's ends
and keeps the few values inside; a radix selection among those gives the statistic with its counts, verified by rank.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from subprocess import CalledProcessError
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from taskvec import fused_kernels as kernels
from taskvec.fused_kernels import HIGH_TAIL, INTERIOR, LOW_TAIL
from taskvec.order import OrderStatistic
from taskvec.plan import Formula

COUNT_BLOCK, COUNT_WARPS = 2048, 8  # elements and warps of one program: sums over a block cost barriers
MERGE_BLOCK, MERGE_WARPS = 512, 4  # four elements a thread: more would leave too few warps for the registers
BUCKETS = 64  # lists per task, so that programs do not queue for one counter
PAD = 32  # one counter per 128 bytes
RUN = 4  # neighbouring elements of a sample: half a sector, and almost independent draws
SAMPLE = 1 << 18
LEAST = 1 << 17  # elements below which a merge is not worth fusing; there statistics come from a sort
GRAM_BLOCK = 8192  # so many elements share one sum over threads
MOST_PRODUCTS = 16  # tasks whose products with each other fit the registers
MOST_TASKS = 32  # kernels are unrolled over tasks
_NEAR = 0.5  # the short form of tanh holds up to 0.55
DIGIT = 2048  # bins of one radix digit

_STATISTICS = {"magnitude": kernels.MAGNITUDE, "pcb score": kernels.PCB_SCORE}
MERGES = {
    "weighted sum": kernels.WEIGHTED_SUM,
    "trimmed sum": kernels.TRIMMED_SUM,
    "ties": kernels.TIES,
    "pcb": kernels.PCB,
}


# -- the tables --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Entry:
    """One tensor on the device.

    Attributes:
        name: its name.
        rows: for each task the stored values, flat (or all as one [task, n], rows contiguous); weights where there is a
            base, else deltas.
        base: the base's stored values, flat, where rows are to be taken as differences to it.
        weights: the task weights.
    """

    name: str
    rows: "Sequence[Tensor] | Tensor"
    base: Tensor | None
    weights: Sequence[float]

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype if isinstance(self.rows, Tensor) else self.rows[0].dtype

    @property
    def numel(self) -> int:
        return self.rows.shape[1] if isinstance(self.rows, Tensor) else self.rows[0].numel()

    @property
    def places(self) -> list[int]:
        """Where each task's values begin."""
        if isinstance(self.rows, Tensor):
            first, step = self.rows.data_ptr(), self.rows.stride(0) * self.rows.element_size()
            return [first + step * task for task in range(self.rows.shape[0])]
        return [row.data_ptr() for row in self.rows]


@dataclass(slots=True)
class _Group:
    """Tensors of one dtype and alignment: what one launch covers."""

    entries: list[Entry]
    stored: torch.dtype
    based: torch.dtype | None
    even: int
    numel: int
    tables: dict[str, Tensor]

    @property
    def align(self) -> int:
        return 16 if self.even > 1 else 1


@dataclass(slots=True)
class _Tiling:
    """The programs of one launch: which tensor each works on, and where it begins."""

    tensor: Tensor
    start: Tensor
    tiles: int
    first: int  # tiles of the groups before


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Resident:
    """Deltas on one device, ready for fused passes.

    Attributes:
        squares: after the first pass the sum of squares of each task vector; not finite where an input is not.
    """

    def __init__(self, entries: Sequence[Entry]):
        rows = entries[0].rows
        # the length of a tensor costs as much as a launch
        self.tasks = rows.shape[0] if isinstance(rows, Tensor) else len(rows)
        self.device = rows.device if isinstance(rows, Tensor) else rows[0].device
        self.numel = sum(entry.numel for entry in entries)
        self._examined = False
        self._partial: Tensor | None = None
        self._squares: list[float] | None = None
        self._groups = self._grouped(entries)

    @property
    def squares(self) -> list[float] | None:
        if self._squares is None and self._partial is not None:
            self._squares = self._partial.tolist()
        return self._squares

    def _grouped(self, entries: Sequence[Entry]) -> list[_Group]:
        kinds: dict[tuple[Any, ...], list[tuple[Entry, list[int], int]]] = {}
        for entry in entries:
            places = entry.places
            base = 0 if entry.base is None else entry.base.data_ptr()
            even = entry.numel % 8 == 0 and base % 16 == 0 and not any(place % 16 for place in places)
            based = None if entry.base is None else entry.base.dtype
            kinds.setdefault((entry.dtype, based, 8 if even else 1), []).append((entry, places, base))
        groups = []
        for (stored, based, even), members in kinds.items():
            sizes = [entry.numel for entry, _, _ in members]
            parts = {
                "rows": [place for _, places, _ in members for place in places],
                "bases": [base for _, _, base in members],
                "sizes": sizes,
                "prefix": [0, *accumulate(sizes)],
            }
            tables = dict(zip(parts, self._there(*(np.array(part, np.int64) for part in parts.values()))))
            weights = np.array([list(entry.weights) for entry, _, _ in members], np.float32)
            tables["weights"] = self._there(weights)[0]
            groups.append(_Group([entry for entry, _, _ in members], stored, based, even, sum(sizes), tables))
        return groups

    def _there(self, *parts: "np.ndarray[Any, Any]") -> Sequence[Tensor]:
        """Small tables on the device; a search that asks for the same again copies nothing."""
        return _tables(tuple((part.tobytes(), part.dtype.char) for part in parts), self.device, _stream(self.device))

    def _tilings(self, block: int) -> tuple[list[tuple[_Group, _Tiling]], int]:
        """Each group with its programs for this block size, and the number of all programs."""
        first, found = 0, []
        for group in self._groups:
            sizes = tuple(entry.numel for entry in group.entries)
            tiling = _Tiling(*_programs(sizes, block, self.device, _stream(self.device)), first)
            found.append((group, tiling))
            first += tiling.tiles
        return found, first

    # -- order statistics ----------------------------------------------------------------------------------------------

    def _here(self) -> AbstractContextManager[Any]:
        return _on(self.device)

    def order_statistics(self, of: Formula, ranks: Sequence[Sequence[int]]) -> list[list[OrderStatistic]] | None:
        """The statistics of each row's ranks; None where this formula is not known here or a bracket missed twice."""
        if of.name not in _STATISTICS:
            return None
        kind, far = _STATISTICS[of.name], _reaches_far(of)
        numbers = self._pcb_numbers(of.numbers) if kind == kernels.PCB_SCORE else self._no_numbers()
        # standard errors of independent draws, which neighbours in a run nearly are; scores are seldom equal
        attempts = ((8.4, kind == kernels.PCB_SCORE), (8.4, False), (40.0, False))
        with self._here():
            for margin, lean in dict.fromkeys(attempts):
                found = self._selected(kind, far, numbers, ranks, margin, lean)
                if found is not None:
                    return found
        return None

    def _selected(
        self, kind: int, far: bool, numbers: Tensor, ranks: Sequence[Sequence[int]], margin: float, lean: bool
    ) -> list[list[OrderStatistic]] | None:
        tasks, wanted = self.tasks, len(ranks[0])
        sample, size = self._sample(kind, far, numbers)
        ordered = sample.sort(1).values  # what follows is prepared while the device draws and sorts
        brackets, bracket_of, kinds, share = _bracket_plan(tuple(map(tuple, ranks)), self.numel, size, margin)
        count = len(kinds)
        code = sum(kind_ << (2 * i) for i, kind_ in enumerate(kinds))
        fields, last = 0, 0
        for i, shape in enumerate(kinds):
            fields |= last << (4 * i)
            last += (1 if lean else 3) if shape == INTERIOR else 0 if lean else 1
        if last > 14:
            return None
        asked, which, places = self._there(np.array(ranks, np.int64), np.array(bracket_of, np.int32), brackets)
        ends = ordered.gather(1, places.view(tasks, -1))
        total, shelves = tasks * wanted, tasks * BUCKETS * PAD
        zeros = torch.zeros(shelves + total * DIGIT, dtype=torch.int32, device=self.device)
        held, bins = zeros[:shelves], zeros[shelves:]
        width = -(-tasks * last // 2)
        tilings, tiles = self._tilings(COUNT_BLOCK)
        capacity = int(min(1.6 * share * self.numel / BUCKETS + 2 * COUNT_BLOCK, self.numel))
        words = torch.empty(width * tiles, dtype=torch.int32, device=self.device)
        lists = torch.empty(tasks * BUCKETS * capacity, dtype=torch.float32, device=self.device)
        examine = not self._examined
        squares = torch.empty(tasks, tiles if examine else 0, dtype=torch.float32, device=self.device)
        for group, tiling in tilings:
            t = group.tables
            kernels.count_kernel[(tiling.tiles,)](
                t["rows"], t["bases"], t["sizes"], tiling.tensor, tiling.start, ends, numbers, words, squares, held,
                lists, capacity, tiling.first, tiles,
                TASKS=tasks, KIND=kind, FAR=far, **self._types(group), BRACKETS=count, KINDS=code, FIELDS=fields,
                PER_TASK=last, LEAN=lean, EXAMINE=examine, BLOCK_=COUNT_BLOCK, BUCKETS_=BUCKETS, PAD_=PAD,
                num_warps=COUNT_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        size_of = [total * 5, total * 7, tasks, ends.numel()]
        results = torch.empty(sum(size_of), dtype=torch.int64, device=self.device)
        counts, state, sums, edges = results.split(size_of)
        kernels.resolve_kernel[(total,)](
            words, tiles, held, capacity, ends, asked, which, counts, state, self.numel,
            RANKS=wanted, BRACKETS=count, KINDS=code, FIELDS=fields, PER_TASK=last, LEAN=lean, BUCKETS_=BUCKETS, PAD_=PAD,
            STEP=4096, num_warps=8,
        )  # fmt: skip
        for level in range(3):
            kernels.digit_kernel[(total, BUCKETS, -(-capacity // 4096))](
                lists, held, capacity, state, bins,
                RANKS=wanted, BUCKETS_=BUCKETS, PAD_=PAD, DIGIT_=DIGIT, BITS=11, LEAN=lean, STEP=4096,
                num_warps=8,
            )  # fmt: skip
            kernels.pick_kernel[(total,)](
                counts, state, bins, which, RANKS=wanted, KINDS=code, FIRST=level == 0, DIGIT_=DIGIT, BITS=11
            )
        edges.view(torch.float64).copy_(ends.view(-1))
        if examine:
            sums.view(torch.float64).copy_(squares.sum(1, dtype=torch.float64))
        told = [part.clone() for part in results.cpu().split(size_of)]  # the one wait of this pass
        if examine:
            self._examined, self._squares = True, told[2].view(torch.float64).tolist()
        tallies, states = told[0].view(tasks, wanted, 5).tolist(), told[1].view(tasks, wanted, 7).tolist()
        bounds = told[3].view(torch.float64).view(tasks, count, 2).tolist()
        found: list[list[OrderStatistic]] = []
        for task in range(tasks):
            row = []
            for j, rank in enumerate(ranks[task]):
                value = _resolved(rank, tallies[task][j], states[task][j], bounds[task][bracket_of[j]])
                if value is None:
                    return None
                row.append(value)
            found.append(row)
        return found

    def _sample(self, kind: int, far: bool, numbers: Tensor) -> tuple[Tensor, int]:
        """A stratified sample [task, size + 2], with both infinities at the end, and its size."""
        runs = [max(1, min(SAMPLE, self.numel // 4) * group.numel // self.numel // RUN) for group in self._groups]
        size = sum(runs) * RUN
        sample = torch.empty(self.tasks, size + 2, dtype=torch.float32, device=self.device)
        first = 0
        for group, count in zip(self._groups, runs):
            t = group.tables
            types = self._types(group)
            del types["ALIGN"], types["EVEN"]
            kernels.sample_kernel[(-(-count * RUN // 512),)](
                t["rows"], t["bases"], t["prefix"], len(group.entries), group.numel, count, sample, size, first, numbers,

                TASKS=self.tasks, KIND=kind, FAR=far, **types, STEPS=len(group.entries).bit_length(), SAMPLES=512, RUN_=RUN,
                enable_fp_fusion=False,
            )  # fmt: skip
            first += count * RUN
        return sample, size

    def _types(self, group: _Group) -> dict[str, Any]:
        return {
            "STORED": _TYPES[group.stored],
            "BASED": group.based is not None,
            "BASE_STORED": _TYPES[group.based or group.stored],
            "ALIGN": group.align,
            "EVEN": group.even,
        }

    def _no_numbers(self) -> Tensor:
        return self._groups[0].tables["weights"]  # any table: it is not read

    def _pcb_numbers(self, numbers: Mapping[str, Any]) -> Tensor:
        """Columns: low, high, 1 / (high - low), T log2(e), threshold, reach, 1 / reach, what float32 leaves of T log2(e)."""
        table = np.zeros((self.tasks, 8), np.float32)
        rate = self.tasks * math.log2(math.e)
        rest = rate - float(np.float32(rate))
        for task, (low, high) in enumerate(zip(numbers["low"], numbers["high"])):
            table[task, :4] = low, high, _inverse(high - low), rate
            table[task, 7] = rest
            if "cut" in numbers:
                cut, top = numbers["cut"][task], numbers["top"][task]
                keeps = numbers["keeps"][task]
                table[task, 4:7] = cut, top - cut, _inverse(top - cut) if keeps else 0.0
        return self._there(table)[0]

    # -- inner products ---------------------------------------------------------------------------------------------------

    def gram(self) -> dict[str, Tensor]:
        """For each tensor the inner products between its rows, float64 [task, task] on the host: one pass over all."""
        padded = max(2, 1 << (self.tasks - 1).bit_length())
        tilings, tiles = self._tilings(GRAM_BLOCK)
        products = torch.empty(tiles, padded, padded, dtype=torch.float64, device=self.device)
        sums, names = [], []
        for group, tiling in tilings:
            t = group.tables
            with self._here():
                kernels.gram_kernel[(tiling.tiles,)](
                    t["rows"], t["bases"], t["sizes"], tiling.tensor, tiling.start, products, tiling.first,
                    TASKS=self.tasks, PADDED=padded, **self._types(group), BLOCK_=GRAM_BLOCK,
                    STEP=max(8, 4096 // padded**2), num_warps=4,
                )  # fmt: skip
            counts = [-(-entry.numel // GRAM_BLOCK) for entry in group.entries]
            (lengths,) = self._there(np.array(counts, np.int64))
            part = products[tiling.first : tiling.first + tiling.tiles]
            sums.append(torch.segment_reduce(part, "sum", lengths=lengths, axis=0, unsafe=True))
            names += [entry.name for entry in group.entries]
        told = torch.cat(sums)[:, : self.tasks, : self.tasks].cpu()
        return dict(zip(names, told))

    # -- the merge -----------------------------------------------------------------------------------------------------

    def merge(self, formula: Formula, outs: Mapping[str, Tensor], scale: float = 1.0, onto_base: bool = False) -> bool:
        """Writes the merged tensors; False where this formula is not known here.

        Args:
            formula: what the kernels compute.
            outs: a contiguous tensor for each name, float32 (or the output's dtype).
            scale: factor for the merged delta.
            onto_base: add the base, rounding once to the output's dtype.
        """
        if formula.name not in MERGES:
            return False
        kind = MERGES[formula.name]
        if kind == kernels.PCB:
            numbers = self._pcb_numbers(formula.numbers)
        elif kind == kernels.WEIGHTED_SUM:
            numbers = self._no_numbers()
        else:
            table = np.zeros((self.tasks, 8), np.float32)
            table[:, 0] = formula.numbers["thresholds"]
            numbers = self._there(table)[0]
        examine = not self._examined
        tilings, tiles = self._tilings(MERGE_BLOCK)
        squares = torch.empty(self.tasks, tiles if examine else 0, dtype=torch.float32, device=self.device)
        for group, tiling in tilings:
            t = group.tables
            places = [outs[entry.name].data_ptr() for entry in group.entries]
            out = outs[group.entries[0].name].dtype
            types = self._types(group)
            if any(place % 16 for place in places):
                types["ALIGN"] = 1
            (targets,) = self._there(np.array(places, np.int64))
            with self._here():
                kernels.merge_kernel[(tiling.tiles,)](
                    t["rows"], t["bases"], t["sizes"], targets, t["weights"], tiling.tensor, tiling.start,
                    numbers, float(scale), squares, tiling.first, tiles,
                    TASKS=self.tasks, KIND=kind, FAR=_reaches_far(formula), **types, OUT=_TYPES[out], ONTO_BASE=onto_base,
                    NORMALIZE=bool(formula.numbers.get("normalize", False)), EXAMINE=examine, BLOCK_=MERGE_BLOCK,
                    num_warps=MERGE_WARPS, enable_fp_fusion=False,
                )  # fmt: skip
        if examine:
            self._examined, self._partial = True, squares.sum(1, dtype=torch.float64)
        return True

    def packed(self, formula: Formula) -> "Packed | None":
        """PCB's parts for searches over the task weights; None where the formula is not that."""
        if formula.name != "pcb parts" or self.tasks > 31:
            return None
        numbers = self._pcb_numbers(formula.numbers)
        kind = torch.uint8 if self.tasks <= 8 else torch.int16 if self.tasks <= 15 else torch.int32
        tilings, tiles = self._tilings(MERGE_BLOCK)
        masks = torch.empty(tiles * MERGE_BLOCK, dtype=kind, device=self.device)
        places = torch.empty(tiles, dtype=torch.int64, device=self.device)
        values = torch.empty(formula.numbers["kept"], dtype=torch.float32, device=self.device)
        cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        for group, tiling in tilings:
            t = group.tables
            with self._here():
                kernels.pack_kernel[(tiling.tiles,)](
                    t["rows"], t["bases"], t["sizes"], tiling.tensor, tiling.start, numbers, cursor, masks, places,
                    values, tiling.first,
                    TASKS=self.tasks, FAR=_reaches_far(formula), **self._types(group), BLOCK_=MERGE_BLOCK, num_warps=MERGE_WARPS,
                    enable_fp_fusion=False,
                )  # fmt: skip
        return Packed(self, masks, places, values)


class Packed:
    """The parts of a merge, one for each task: a bit mask for each element, and the values that are not zero."""

    def __init__(self, resident: Resident, masks: Tensor, places: Tensor, values: Tensor):
        self.tasks, self._masks, self._places, self._values = resident.tasks, masks, places, values
        self._there = resident._there
        self._layout = [
            ([entry.name for entry in group.entries], group.tables["sizes"], tiling, group.even)
            for group, tiling in resident._tilings(MERGE_BLOCK)[0]
        ]

    def merged(self, weights: Sequence[float], outs: Mapping[str, Tensor]) -> None:
        """Writes Σ_i λ_i P_i to `outs`."""
        (factors,) = self._there(np.array(list(weights), np.float32))
        for names, sizes, tiling, even in self._layout:
            places = [outs[name].data_ptr() for name in names]
            (targets,) = self._there(np.array(places, np.int64))
            with _on(self._masks.device):
                kernels.unpack_kernel[(tiling.tiles,)](
                    sizes, targets, factors, tiling.tensor, tiling.start, self._masks, self._places, self._values,
                    tiling.first,
                    TASKS=self.tasks, ALIGN=16 if all(place % 16 == 0 for place in places) else 1, EVEN=even,
                    BLOCK_=MERGE_BLOCK, num_warps=MERGE_WARPS, enable_fp_fusion=False,
                )  # fmt: skip


@lru_cache
def usable(device: torch.device) -> bool:
    """Whether kernels can be compiled and run on this device: Triton is there, but needs a C compiler too."""
    value = torch.zeros(1, dtype=torch.float32, device=device)
    try:
        with _on(device):
            kernels.probe_kernel[(1,)](value)
        return float(value) == 1.0
    except (RuntimeError, OSError, CalledProcessError, TritonError):
        return False


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the deltas' own device."""
    elsewhere = device.type == "cuda" and torch.cuda.current_device() != device.index
    return torch.cuda.device(device) if elsewhere else nullcontext()


_KINDS = {"q": torch.int64, "l": torch.int64, "i": torch.int32, "f": torch.float32}


# What is made once is used on the stream that its memory belongs to, so that it may be let go at any time.


def _stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch._C._cuda_getCurrentRawStream(device.index or 0))  # the Stream object costs as much as a launch


@lru_cache(maxsize=256)
def _tables(parts: tuple[tuple[bytes, str], ...], device: torch.device, stream: int) -> Sequence[Tensor]:
    contents = [part.ljust(-(-len(part) // 16) * 16, b"\0") for part, _ in parts]
    here = torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
    # from pinned memory, since a copy from any other waits for all work before it
    there = here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here
    found, start = [], 0
    for content, (part, kind) in zip(contents, parts):
        # each at 16 bytes: kernels are compiled anew for each pattern of alignments
        found.append(there[start : start + len(part)].view(_KINDS[kind]))
        start += len(content)
    return found


@lru_cache(maxsize=64)  # a search merges the same tensors again and again
def _programs(sizes: tuple[int, ...], block: int, device: torch.device, stream: int) -> tuple[Tensor, Tensor, int]:
    """For each program of a launch the number of its tensor and its first element; and how many programs there are."""
    tiles = -(-np.array(sizes, np.int64) // block)
    total = int(tiles.sum())
    tensor = np.repeat(np.arange(len(tiles), dtype=np.int32), tiles)
    start = (np.arange(total, dtype=np.int64) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * block
    return torch.from_numpy(tensor).to(device), torch.from_numpy(start).to(device), total


def _reaches_far(formula: Formula) -> bool:
    """Whether the product of an entry with the sum of all tasks' may leave the range of the short form of tanh."""
    largest = formula.numbers.get("largest")
    return largest is None or not max(largest) * sum(largest) < _NEAR


def _inverse(value: float) -> float:
    wide = float(np.float32(value))
    return 1.0 / wide if wide else 0.0


@lru_cache
def _bracket_plan(
    ranks: tuple[tuple[int, ...], ...], numel: int, size: int, margin: float
) -> tuple[Any, list[int], list[int], float]:
    """Places in the sorted sample (its infinities included) of each row's brackets.

    Returns:
        places [task, bracket, 2]; the bracket of each rank; each bracket's kind; the largest share inside one.
    """
    wanted = np.asarray(ranks, np.float64)  # [task, rank]
    share = wanted / max(1, numel - 1)
    middle = share * (size - 1)
    spread = np.sqrt(size * np.maximum(share * (1 - share), 1 / size))
    first = np.floor(middle - margin * spread - 8).astype(np.int64)
    last = np.ceil(middle + margin * spread + 8).astype(np.int64)
    kinds: list[int] = []
    bracket_of: list[int] = []
    columns: list[tuple[Any, Any]] = []
    for j in range(wanted.shape[1]):
        kind = LOW_TAIL if (first[:, j] < 0).all() else HIGH_TAIL if (last[:, j] >= size).all() else INTERIOR
        if kind != INTERIOR and kind in kinds:
            at = kinds.index(kind)
            low, high = columns[at]
            columns[at] = (np.minimum(low, first[:, j]), np.maximum(high, last[:, j]))
            bracket_of.append(at)
            continue
        bracket_of.append(len(kinds))
        kinds.append(kind)
        columns.append((first[:, j], last[:, j]))
    places = np.stack([np.stack(pair, -1) for pair in columns], 1)  # [task, bracket, 2]
    places = np.clip(places + 1, 0, size + 1)  # -inf sorts first
    inside = max(float((places[..., 1] - places[..., 0]).max()) / size, 1 / size)
    return np.ascontiguousarray(places), bracket_of, kinds, inside


def _resolved(rank: int, counts: list[int], state: list[int], ends: list[float]) -> OrderStatistic | None:
    """The statistic, if its bracket holds the rank and all that lies inside was kept."""
    below, at_low, inside, at_high, over = counts
    key, width, _, before, equal, *_ = state
    if over > 0 or rank < below:
        return None
    if rank < below + at_low:
        return OrderStatistic(ends[0] + 0.0, below, at_low)
    if rank < below + at_low + inside:
        if width != 0 or equal == 0:
            return None
        raw = key ^ 0x80000000 if key >> 31 else ~key & 0xFFFFFFFF
        value = float(np.array(raw, np.uint32).view(np.float32))
        return OrderStatistic(value + 0.0, below + at_low + before, equal)
    if rank < below + at_low + inside + at_high:
        return OrderStatistic(ends[1] + 0.0, below + at_low + inside, at_high)
    return None


__all__ = ["LEAST", "MOST_TASKS", "Entry", "Packed", "Resident", "usable"]
