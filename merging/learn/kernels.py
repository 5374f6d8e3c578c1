"""Composing and pulling back many tensors with a few launches, on a GPU with Triton.

For the tensors with one coefficient per task vector and dense deltas on the GPU. Everything else, and every machine
without Triton, goes tensor by tensor; the numbers are the same to rounding.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from merging.learn.bank import Bank

COMPOSE_BLOCK = 1024
PRODUCT_TILE = 8192
# gradients wait until they hold this much, then one launch takes them all: few launches, bounded memory
PENDING_BYTES = 128 << 20
_REDUCE_ROWS = 32
_BYTES = 16  # alignment that a tensor needs, and that the kernels build on: one vector load


@cache
def available() -> bool:
    """Whether Triton can be imported (and compile for a GPU here)."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.is_available()


class FusedBlocks:
    """Addresses of the tensors that go through the fused kernels, and the launches.

    Args:
        bank: the task vectors, on the parameters' device, rows padded to 64 elements.
        parameters: tensor name to parameter; one dtype, contiguous.
        base: their base values.
        columns: tensor name to its column of the flat coefficients.
    """

    def __init__(
        self,
        bank: Bank,
        parameters: Mapping[str, nn.Parameter],
        base: Mapping[str, Tensor],
        columns: Mapping[str, int],
        *,
        compose_block: int = COMPOSE_BLOCK,
        product_width: int | None = None,
        product_tile: int = PRODUCT_TILE,
        pending_bytes: int = PENDING_BYTES,
    ):
        first = next(iter(parameters.values()))
        kinds = {name: (p.dtype, bank.values(name).dtype) for name, p in parameters.items()}
        kind = max(set(kinds.values()), key=list(kinds.values()).count)
        self.parameters = {name: p for name, p in parameters.items() if kinds[name] == kind and _fits(p, bank, name)}
        self.names = frozenset(self.parameters)
        self._segment = {name: i for i, name in enumerate(self.parameters)}
        self._device = first.device
        self._kind, self._stored = kind
        self._tasks = len(bank.tasks)
        self._padded = 1 << max(self._tasks - 1, 0).bit_length()
        # each of 256 threads has one vector of 8 elements of a row: few rows need wider tiles to keep loads in flight
        self._width = product_width or (512 if self._padded <= 8 else 256)
        self._steps, self._block = max(product_tile // self._width, 1), compose_block
        self._pending_bytes = pending_bytes
        # keeps the base and the bank alive: the kernels only have their addresses
        self._alive = ([base[name] for name in self.parameters], [bank.values(name) for name in self.parameters])
        self._sizes = self._table([p.numel() for p in self.parameters.values()])
        self._strides = self._table([bank.values(name).stride(0) for name in self.parameters])
        self._counts = self._table([len(bank.blocks[name].tasks) for name in self.parameters], torch.int32)
        self._anchor = torch.zeros(64, dtype=self._kind, device=self._device)
        self._stack_anchor = torch.zeros(64, dtype=self._stored, device=self._device)
        self._bases = self._places([base[name] for name in self.parameters], self._anchor)
        self._stacks = self._places([bank.values(name) for name in self.parameters], self._stack_anchor)
        self._addresses: tuple[int, ...] = ()
        self._pointers = self._table([0])
        shape = (len(self.parameters), self._tasks)
        index = torch.zeros(shape, dtype=torch.int64)
        scale = torch.zeros(shape, dtype=torch.float32)
        self._columns_shared = len({columns[name] for name in self.parameters}) < len(self.parameters)
        for i, name in enumerate(self.parameters):
            block = bank.blocks[name]
            for j, task in enumerate(block.tasks):
                index[i, j] = task
                scale[i, j] = 1.0 if block.scales is None else float(block.scales[j])
        column = torch.tensor([columns[name] for name in self.parameters])
        self._task_index = index.to(self._device)
        self._column = column.to(self._device)
        self._scale = scale.to(self._device)
        self._tiles = self._tiles_of(range(len(self.parameters)), self._block)
        self._groups: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
        self._gradient_tables: dict[tuple[int, ...], Tensor] = {}
        self._waiting: list[tuple[int, Tensor]] = []
        self._waiting_segments: set[int] = set()
        self._waiting_bytes = 0

    def _table(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        # pinned, so that the copy does not make the host wait for the GPU in the middle of backward
        host = torch.tensor(list(values), dtype=dtype, pin_memory=self._device.type == "cuda")
        return host.to(self._device, non_blocking=True)

    def _places(self, tensors: Sequence[Tensor], anchor: Tensor) -> Tensor:
        """Distance of each tensor from the anchor, in elements."""
        first, size = anchor.data_ptr(), anchor.element_size()
        return self._table([(tensor.data_ptr() - first) // size for tensor in tensors])

    def _tiles_of(self, segments: Sequence[int] | range, size: int) -> tuple[Tensor, ...]:
        """Segment, first element and slot of every tile; then, slot by slot, first tile, number of tiles, segment."""
        sizes = [p.numel() for p in self.parameters.values()]
        segment: list[int] = []
        start: list[int] = []
        slot: list[int] = []
        first: list[int] = []
        count: list[int] = []
        for i, s in enumerate(segments):
            tiles = math.ceil(sizes[s] / size)
            first.append(len(segment))
            count.append(tiles)
            segment += [s] * tiles
            start += range(0, tiles * size, size)
            slot += [i] * tiles
        small = torch.int32
        return (
            self._table(segment, small),
            self._table(start),
            self._table(slot, small),
            self._table(first),
            self._table(count),
            self._table(list(segments), small),
        )

    # -- composing ---------------------------------------------------------------------------------------------------

    def compose_(self, coefficients: Tensor) -> None:
        """Write base + Σ c τ into every parameter; `coefficients` is [task, column]."""
        from merging.learn.triton_kernels import compose_kernel

        addresses = tuple(p.data_ptr() for p in self.parameters.values())
        if addresses != self._addresses:
            self._addresses = addresses
            self._pointers = self._places(list(self.parameters.values()), self._anchor)
        weights = (coefficients[self._task_index, self._column[:, None]].to(torch.float32) * self._scale).contiguous()
        with _on(self._device):
            compose_kernel[(self._tiles[0].numel(),)](
                self._anchor,
                self._stack_anchor,
                self._pointers,
                self._bases,
                self._stacks,
                self._strides,
                self._counts,
                self._sizes,
                weights,
                self._tiles[0],
                self._tiles[1],
                TASKS=self._tasks,
                ALIGNED=_BYTES // self._kind.itemsize,
                STACK_ALIGNED=_BYTES // self._stored.itemsize,
                BLOCK=self._block,
                num_warps=4,
            )
        increment_version(list(self.parameters.values()))

    # -- gradients ---------------------------------------------------------------------------------------------------

    @contextmanager
    def collecting(self, grad: Tensor) -> Iterator[None]:
        """Products of the gradients that are consumed inside are in `grad` ([task, column]) afterwards."""
        self._results = torch.zeros((len(self.parameters), self._padded), dtype=torch.float32, device=self._device)
        try:
            yield
            self.flush()
            found = self._results[:, : self._tasks] * self._scale
            # a padded entry adds zero to task 0, so the order of the additions does not matter
            by_task = torch.zeros((len(self.parameters), self._tasks), dtype=grad.dtype, device=grad.device)
            by_task.scatter_add_(1, self._task_index, found.to(grad.dtype))
            if self._columns_shared:
                shared = torch.zeros((len(self.parameters), grad.shape[1]), dtype=torch.float64, device=grad.device)
                shared[torch.arange(len(self.parameters), device=grad.device), self._column] = 1.0
                grad += (by_task.T.to(torch.float64) @ shared).to(grad.dtype)
            else:
                grad[:, self._column] += by_task.T
        finally:
            self._dismiss()
            del self._results

    def consume(self, name: str, grad: Tensor) -> None:
        """Take one gradient; it may wait for others so that one launch takes them together."""
        segment = self._segment[name]
        if segment in self._waiting_segments:  # a second pass: one tile table holds a tensor once
            self.flush()
        self._waiting_segments.add(segment)
        grad = grad.detach()
        if grad.dtype != self._kind or not grad.is_contiguous() or grad.data_ptr() % _BYTES:
            grad = grad.to(self._kind).clone(memory_format=torch.contiguous_format)
        self._waiting.append((segment, grad))
        self._waiting_bytes += grad.numel() * grad.element_size()
        if self._waiting_bytes >= self._pending_bytes:
            self.flush()

    def flush(self) -> None:
        """Launch for all gradients that wait."""
        if not self._waiting:
            return
        from merging.learn.triton_kernels import products_kernel, reduce_kernel

        segments = tuple(segment for segment, _ in self._waiting)
        if segments not in self._groups:
            self._groups[segments] = self._tiles_of(segments, self._width * self._steps)
        tile_segment, tile_start, tile_slot, first, count, slot_segment = self._groups[segments]
        addresses = tuple(grad.data_ptr() for _, grad in self._waiting)
        if addresses not in self._gradient_tables:
            if len(self._gradient_tables) > 256:
                self._gradient_tables.clear()
            self._gradient_tables[addresses] = self._places([grad for _, grad in self._waiting], self._anchor)
        tiles = tile_segment.numel()
        partials = torch.empty((tiles, self._padded), dtype=torch.float32, device=self._device)
        with _on(self._device):
            products_kernel[(tiles,)](
                self._anchor,
                self._stack_anchor,
                self._gradient_tables[addresses],
                self._stacks,
                self._strides,
                self._counts,
                self._sizes,
                partials,
                tile_segment,
                tile_start,
                tile_slot,
                PADDED=self._padded,
                ALIGNED=_BYTES // self._kind.itemsize,
                STACK_ALIGNED=_BYTES // self._stored.itemsize,
                WIDTH=self._width,
                STEPS=self._steps,
                num_warps=8,
            )
            reduce_kernel[(len(segments),)](
                partials, first, count, slot_segment, self._results, PADDED=self._padded, ROWS=_REDUCE_ROWS
            )
        self._dismiss()

    def _dismiss(self) -> None:
        self._waiting, self._waiting_bytes = [], 0
        self._waiting_segments = set()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    # Triton's interpreter, on which the tests run without a GPU, takes tensors in host memory
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _fits(parameter: nn.Parameter, bank: Bank, name: str) -> bool:
    values = bank.values(name)
    aligned = parameter.data_ptr() % _BYTES == 0 and values.data_ptr() % _BYTES == 0
    return aligned and values.stride(0) % 64 == 0 and values.stride(1) == 1
