"""A merge's inputs kept on a GPU, as they are stored, while it lasts: read once, whatever the number of passes.

Each worker reads into pinned memory of its own and copies from there while it reads on, so the disk (or the page
cache), the hashing and the bus work at the same time. Differences are formed on the GPU, in float32, in every pass.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from taskvec.deltas import ModelDeltas, Tile, Watch
from taskvec.source import TensorSource

SLOT = 8 << 20  # bytes of one pinned buffer; a worker has two
_PAD = 256  # bytes to which each tensor is aligned on the device
_STORED = (torch.float32, torch.bfloat16, torch.float16)


class Uploaded:
    """Deltas of whole models over a base, stored on a device as the files store them.

    Attributes:
        piece: the most elements that `download` brings back at once.
    """

    piece = SLOT // 4

    def __init__(self, deltas: ModelDeltas, device: torch.device):
        self.tasks, self.infos, self.device = deltas.tasks, deltas.infos, device
        self._deltas = deltas
        sources = _sources(deltas)
        self._stored: list[dict[str, Tensor]] = [self._allocated(source) for source in sources]
        self._local = threading.local()
        self.settle()  # what used this memory before may not be done

    @classmethod
    def fits(cls, deltas: Any, device: torch.device, results: int = 4) -> bool:
        """Whether these deltas can be kept on the device, with `results` bytes for each merged element."""
        if not isinstance(deltas, ModelDeltas) or not deltas.plain():
            return False
        for source in _sources(deltas):
            if any(name not in source.infos or source.infos[name].dtype not in _STORED for name in deltas.infos):
                return False
        free, _ = torch.cuda.mem_get_info(device)
        size = deltas.bytes_per_pass() + _PAD * (len(deltas.tasks) + 1) * len(deltas.infos) + results * deltas.numel
        return size + (4 << 30) < free

    def _allocated(self, source: TensorSource) -> dict[str, Tensor]:
        """Room for one source's tensors, in one piece."""
        places, size = {}, 0
        for name in self.infos:
            places[name] = size
            size += -(-source.infos[name].nbytes // _PAD) * _PAD
        room = torch.empty(size, dtype=torch.uint8, device=self.device)
        return {
            name: room[start : start + source.infos[name].nbytes].view(source.infos[name].dtype)
            for name, start in places.items()
        }

    @property
    def numel(self) -> int:
        return sum(info.numel for info in self.infos.values())

    def read_ahead(self, name: str, start: int, stop: int) -> None:
        self._deltas.read_ahead(name, start, stop)

    def load(self, name: str, start: int, stop: int, watch: Watch | None) -> None:
        """Reads these elements of every input and sends them to the device; returns while copies may be under way."""
        ring = self._ring()
        for source, stored in zip(_sources(self._deltas), self._stored):
            step = SLOT // source.infos[name].dtype.itemsize
            for begin in range(start, stop, step):
                end = min(begin + step, stop)
                raw = ring.slot()[: (end - begin) * source.infos[name].dtype.itemsize].view(source.infos[name].dtype)
                into: Callable[..., None] | None = getattr(source, "read_into", None)
                if into is None:
                    raw.copy_(source.read_flat(name, begin, end))
                else:
                    into(name, begin, end, raw)
                if watch is not None:
                    watch(source, name, raw)
                ring.copy(raw, stored[name][begin:end])

    def settle(self) -> None:
        """Waits until all copies are done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def download(self, values: Tensor) -> Tensor:
        """Values of the device in a pinned buffer that is this worker's until its next call but one."""
        ring = self._ring()
        here = ring.slot()[: values.numel() * values.element_size()].view(values.dtype)
        ring.copy(values, here)
        ring.wait()
        return here

    def _ring(self) -> "_Ring":
        ring: _Ring | None = getattr(self._local, "ring", None)
        if ring is None:
            ring = self._local.ring = _Ring(self.device)
        return ring

    def tile(self, name: str, start: int, stop: int, watch: Watch | None = None) -> Tile:
        """The same tile as the files give, on the device."""
        info = self.infos[name]
        base, *tuned = (stored[name][start:stop] for stored in self._stored)
        wide = base.to(info.dtype)
        stack = torch.empty(len(tuned), stop - start, dtype=info.dtype, device=self.device)
        for row, raw in zip(stack, tuned):
            torch.sub(raw.to(info.dtype), wide, out=row)
        weights = self._deltas.weights_of(name, start, stop)
        weights = weights.to(self.device) if weights.ndim > 1 else weights
        return Tile(name, info.shape, start, stop, self.tasks, stack, wide, weights)

    def rows(self) -> list[tuple[str, list[Tensor], Tensor, list[float]]] | None:
        """Name, stored weights of each task, base and task weights of every tensor; None where weights vary inside."""
        found = []
        for name, info in self.infos.items():
            weights = self._deltas.weights_of(name, 0, info.numel)
            if weights.ndim != 1:
                return None
            base, *tuned = (stored[name] for stored in self._stored)
            if len({raw.dtype for raw in tuned}) != 1:
                return None
            if info.numel:
                found.append((name, tuned, base, weights.tolist()))
        return found


class _Ring:
    """Two buffers and a stream of one worker: while one is copied from, the other is filled."""

    def __init__(self, device: torch.device):
        there = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if there else None
        self._slots = [torch.empty(SLOT, dtype=torch.uint8, pin_memory=there) for _ in range(2)]
        self._ready: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def slot(self) -> Tensor:
        """The buffer whose turn it is, once the copy that it was last used for is done."""
        self._turn ^= 1
        self.wait()
        return self._slots[self._turn]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copies from or into the buffer whose turn it is; on a GPU the copy goes on while this returns."""
        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._ready[self._turn] = event

    def wait(self) -> None:
        """Until the last copy with the buffer whose turn it is is done."""
        event = self._ready[self._turn]
        if event is not None:
            event.synchronize()


def _sources(deltas: ModelDeltas) -> Sequence[TensorSource]:
    assert deltas.base is not None
    return [deltas.base, *deltas.inputs()]


__all__ = ["SLOT", "Uploaded"]
