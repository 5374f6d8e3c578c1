"""A merge's inputs on a GPU, as they are stored: kept there while the merge lasts, or passing through piece by piece.

Each worker reads into pinned memory of its own and copies from there while it reads on, so the disk (or the page
cache), the hashing and the bus work at the same time. Differences are formed on the GPU, in float32, in every pass.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from taskvec.checkpoint import SEGMENT
from taskvec.deltas import ModelDeltas, Tile, Watch
from taskvec.source import TensorSource

SLOT = 8 << 20  # bytes of one pinned buffer; a worker has two. Pinning is slow: 0.5 GB/s measured
READERS = 8  # workers; more wait longer for the interpreter than they gain
_PAD = 256  # bytes to which each tensor is aligned on the device
_STORED = (torch.float32, torch.bfloat16, torch.float16)


class _Bus:
    """Between the files of whole models over a base and a device.

    Args:
        deltas: the models and their base.
        device: where the values go.
        workers: how many threads will use this.
    """

    def __init__(self, deltas: ModelDeltas, device: torch.device, workers: int):
        assert deltas.base is not None
        self.tasks, self.infos, self.device = deltas.tasks, deltas.infos, device
        self.sources: list[TensorSource] = [deltas.base, *deltas.inputs()]
        self._deltas = deltas
        there = device.type == "cuda"
        # one piece, since pinning costs by the call too
        memory = torch.empty(2 * workers, SLOT, dtype=torch.uint8, pin_memory=there)
        self._rings = [_Ring(device, memory[2 * worker : 2 * worker + 2]) for worker in range(workers)]

    @staticmethod
    def takes(deltas: Any) -> bool:
        """Whether these are deltas of whole models over a base, in dtypes that kernels read."""
        if not isinstance(deltas, ModelDeltas) or not deltas.plain():
            return False
        assert deltas.base is not None
        return all(
            name in source.infos and source.infos[name].dtype in _STORED
            for source in (deltas.base, *deltas.inputs())
            for name in deltas.infos
        )

    def weights_of(self, name: str, start: int, stop: int) -> Tensor:
        return self._deltas.weights_of(name, start, stop)

    @property
    def numel(self) -> int:
        return sum(info.numel for info in self.infos.values())

    def read_ahead(self, name: str, start: int, stop: int) -> None:
        self._deltas.read_ahead(name, start, stop)

    @contextmanager
    def ring(self) -> Iterator["_Ring"]:
        """Buffers and a stream that are the caller's alone; the stream is the current one meanwhile."""
        ring = self._rings.pop()
        try:
            with ring.current():
                yield ring
        finally:
            self._rings.append(ring)

    def _bring(
        self, ring: "_Ring", source: TensorSource, name: str, start: int, stop: int, room: Tensor, watch: Watch | None
    ) -> None:
        """Reads these elements and sends them to `room` (bytes on the device); copies may be under way afterwards."""
        size = source.infos[name].dtype.itemsize
        step = SLOT // size
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            slot, view = ring.slot((end - begin) * size)
            _read(source, name, begin, end, slot, view)
            if watch is not None:
                watch(source, name, view)
            ring.send(slot, room[(begin - start) * size : (end - start) * size])

    def pieces(self, ring: "_Ring", values: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Where each piece of flat values on the device begins, and the piece in host memory until the next is asked for.

        Pieces come in order; while one is used, the next is on its way.
        """
        step = SLOT // values.element_size()
        starts = range(0, values.numel(), step)
        coming: list[tuple[int, Tensor, int]] = []
        for start in [*starts, None]:
            if start is not None:
                part = values[start : start + step]
                slot, _ = ring.slot(part.numel() * part.element_size())
                here = slot.view(values.dtype)
                ring.send(part, here)
                coming.append((start, here, ring.turn))
            if len(coming) == 2 or (start is None and coming):
                at, done, turn = coming.pop(0)
                ring.wait(turn)
                yield at, done


class Uploaded(_Bus):
    """Deltas of whole models over a base, stored on a device as the files store them."""

    def __init__(self, deltas: ModelDeltas, device: torch.device, workers: int = READERS):
        super().__init__(deltas, device, workers)
        self._rooms = [self._allocated(source) for source in self.sources]
        self.settle()  # what used this memory before may not be done

    @classmethod
    def fits(cls, deltas: Any, device: torch.device, results: int = 4) -> bool:
        """Whether these deltas can be kept on the device, with `results` bytes for each merged element."""
        if not cls.takes(deltas):
            return False
        free, _ = torch.cuda.mem_get_info(device)
        size = deltas.bytes_per_pass() + _PAD * (len(deltas.tasks) + 1) * len(deltas.infos) + results * deltas.numel
        return bool(size + (4 << 30) < free)

    def _allocated(self, source: TensorSource) -> dict[str, Tensor]:
        """Room for one source's tensors (their bytes), in one piece."""
        places, size = {}, 0
        for name in self.infos:
            places[name] = size
            size += -(-source.infos[name].nbytes // _PAD) * _PAD
        room = torch.empty(size, dtype=torch.uint8, device=self.device)
        return {name: room[start : start + source.infos[name].nbytes] for name, start in places.items()}

    def _stored(self, name: str) -> list[Tensor]:
        """The base's values and those of each task."""
        return [room[name].view(source.infos[name].dtype) for room, source in zip(self._rooms, self.sources)]

    def load(self, name: str, start: int, stop: int, watch: Watch | None) -> None:
        """Reads these elements of every input and sends them to the device; returns while copies may be under way."""
        with self.ring() as ring:
            for source, rooms in zip(self.sources, self._rooms):
                size = source.infos[name].dtype.itemsize
                self._bring(ring, source, name, start, stop, rooms[name][start * size : stop * size], watch)

    def settle(self) -> None:
        """Waits until all copies are done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def tile(self, name: str, start: int, stop: int, watch: Watch | None = None) -> Tile:
        """The same tile as the files give, on the device."""
        info = self.infos[name]
        base, *tuned = (stored[start:stop] for stored in self._stored(name))
        wide = base.to(info.dtype)
        stack = torch.empty(len(tuned), stop - start, dtype=info.dtype, device=self.device)
        for row, raw in zip(stack, tuned):
            torch.sub(raw.to(info.dtype), wide, out=row)
        weights = self.weights_of(name, start, stop)
        weights = weights.to(self.device) if weights.ndim > 1 else weights
        return Tile(name, info.shape, start, stop, self.tasks, stack, wide, weights)

    def rows(self) -> list[tuple[str, list[Tensor], Tensor, list[float]]] | None:
        """Name, stored weights of each task, base and task weights of every tensor; None where weights vary inside."""
        found = []
        for name, info in self.infos.items():
            weights = self.weights_of(name, 0, info.numel)
            base, *tuned = self._stored(name)
            if weights.ndim != 1 or len({raw.dtype for raw in tuned}) != 1:
                return None
            if info.numel:
                found.append((name, tuned, base, weights.tolist()))
        return found


class Passing(_Bus):
    """The same models a segment at a time, for merges that look at each element once: nothing is kept."""

    def __init__(self, deltas: ModelDeltas, device: torch.device, workers: int = READERS):
        super().__init__(deltas, device, workers)
        widest = max(source.infos[name].dtype.itemsize for source in self.sources for name in self.infos)
        for ring in self._rings:
            ring.room = torch.empty(len(self.sources), SEGMENT * widest, dtype=torch.uint8, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what used this memory before may not be done

    @classmethod
    def fits(cls, deltas: Any, device: torch.device) -> bool:
        """Whether these deltas can pass, one set of weights for each tensor."""
        if not cls.takes(deltas):
            return False
        sources = deltas.inputs()
        return all(
            deltas.weights_of(name, 0, info.numel).ndim == 1 and len({s.infos[name].dtype for s in sources}) == 1
            for name, info in deltas.infos.items()
        )

    def rows(
        self, ring: "_Ring", name: str, start: int, stop: int, watch: Watch | None
    ) -> tuple[list[Tensor], Tensor, list[float]]:
        """Stored weights of each task, base and task weights of these elements, at most a segment; on the ring's stream."""
        assert ring.room is not None
        found = []
        for source, room in zip(self.sources, ring.room):
            kind = source.infos[name].dtype
            part = room[: (stop - start) * kind.itemsize]
            self._bring(ring, source, name, start, stop, part, watch)
            found.append(part.view(kind))
        base, *tuned = found
        return tuned, base, self.weights_of(name, start, stop).tolist()


class _Ring:
    """Two pinned buffers and a stream of one worker: while one is copied from, the other is filled."""

    def __init__(self, device: torch.device, memory: Tensor):
        there = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if there else None
        self._slots = [(slot, slot.numpy().data) for slot in memory]
        self._events = [torch.cuda.Event() if there else None for _ in memory]
        self._busy = [False, False]
        self.turn = 0
        self.room: Tensor | None = None

    @contextmanager
    def current(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def slot(self, size: int) -> tuple[Tensor, memoryview]:
        """So many bytes of the buffer whose turn it is, once the copy that it was last used for is done."""
        self.turn ^= 1
        self.wait(self.turn)
        slot, view = self._slots[self.turn]
        return (slot, view) if size == SLOT else (slot[:size], view[:size])

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copies from or into the buffer whose turn it is; on a GPU the copy goes on while this returns."""
        event = self._events[self.turn]
        target.copy_(source, non_blocking=event is not None)
        if event is not None:
            event.record(self._stream)
            self._busy[self.turn] = True

    def wait(self, turn: int) -> None:
        """Until the last copy with that buffer is done."""
        event = self._events[turn]
        if event is not None and self._busy[turn]:
            if not event.query():  # waiting hands the interpreter on
                event.synchronize()
            self._busy[turn] = False


def _read(source: TensorSource, name: str, start: int, stop: int, into: Tensor, view: memoryview) -> None:
    """These elements as they are stored. Tensor operations each hand the interpreter on: with many threads, too often."""
    extent = getattr(source, "extent", None)
    where = None if extent is None else extent(name, start, stop)
    if where is None:
        into.view(source.infos[name].dtype).copy_(_flat(source, name, start, stop))
        return
    descriptor, offset, size = where
    done = 0
    while done < size:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:  # the file became shorter: this says so
            _flat(source, name, start, stop)
            raise EOFError(name)
        done += count


def _flat(source: TensorSource, name: str, start: int, stop: int) -> Tensor:
    return source.read_flat(name, start, stop)


def readers(workers: int) -> int:
    """How many of these workers are worth having."""
    return min(workers, READERS)


__all__: Sequence[str] = ["READERS", "SLOT", "Passing", "Uploaded", "readers"]
