"""Mask steps as four Triton kernels. Imported only where Triton is installed and the parameters are on a GPU.

Noise, sample, rescaling, gradient and Adam are recomputed in registers, so a step moves 16 numbers a parameter: two passes
to compose (each tensor's mean, then the weights), two to step (the inner product that the rescaling's gradient needs,
then Adam). Partial sums are added in a fixed order: results do not change from run to run.
"""

# Triton reads the source of these functions; annotations other than constexpr mean something else to it
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _mixed(bits):
    bits = bits ^ (bits >> 16)
    bits = bits * 0x7FEB352D
    bits = bits ^ (bits >> 15)
    bits = bits * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _sampled(logit, local, keys, segment, temperature):
    """The relaxed sample of `merging.learn.masks.relaxed`, with the noise of `uniform_noise`."""
    bits = local.to(tl.uint32) * 2654435769
    bits = bits + tl.load(keys + 2 * segment).to(tl.uint32)
    bits = _mixed(bits)
    bits = bits ^ tl.load(keys + 2 * segment + 1).to(tl.uint32)
    bits = _mixed(bits)
    uniform = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    uniform = tl.minimum(tl.maximum(uniform, 1.1920928955078125e-07), 0.9999998807907104)
    probability = 1.0 / (1.0 + tl.exp(-logit))
    moves = (probability >= 1.1920928955078125e-07) & (probability <= 0.9999998807907104)
    probability = tl.minimum(tl.maximum(probability, 1.1920928955078125e-07), 0.9999998807907104)
    total = tl.log(uniform) - tl.log(1.0 - uniform) + tl.log(probability) - tl.log(1.0 - probability)
    sample = 1.0 / (1.0 + tl.exp(-total / temperature))
    return tl.minimum(tl.maximum(sample, 1.17549435e-38), 0.9999998807907104), moves


@triton.jit
def sums_kernel(logits, keys, tiles, starts, partial, temperature, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    segment = tl.load(tiles + 2 * tile)
    local = tl.load(tiles + 2 * tile + 1) + tl.arange(0, BLOCK)
    first = tl.load(starts + segment)
    inside = local < tl.load(starts + segment + 1) - first
    sample, _ = _sampled(tl.load(logits + first + local, mask=inside, other=0.0), local, keys, segment, temperature)
    tl.store(partial + tile, tl.sum(tl.where(inside, sample, 0.0)))


@triton.jit
def write_kernel(logits, keys, tiles, starts, means, total, base, theta, temperature, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    segment = tl.load(tiles + 2 * tile)
    local = tl.load(tiles + 2 * tile + 1) + tl.arange(0, BLOCK)
    first = tl.load(starts + segment)
    inside = local < tl.load(starts + segment + 1) - first
    place = first + local
    sample, _ = _sampled(tl.load(logits + place, mask=inside, other=0.0), local, keys, segment, temperature)
    own = tl.load(base + segment).to(tl.pointer_type(tl.float32))
    value = tl.load(own + local, mask=inside, other=0.0)
    value += sample / tl.load(means + segment) * tl.load(total + place, mask=inside, other=0.0)
    tl.store(theta + place, value, mask=inside)


@triton.jit
def products_kernel(logits, keys, tiles, starts, total, gradient, partial, temperature, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    segment = tl.load(tiles + 2 * tile)
    local = tl.load(tiles + 2 * tile + 1) + tl.arange(0, BLOCK)
    first = tl.load(starts + segment)
    inside = local < tl.load(starts + segment + 1) - first
    place = first + local
    sample, _ = _sampled(tl.load(logits + place, mask=inside, other=0.0), local, keys, segment, temperature)
    product = tl.load(gradient + place, mask=inside, other=0.0) * tl.load(total + place, mask=inside, other=0.0)
    tl.store(partial + tile, tl.sum(tl.where(inside, product * sample, 0.0)))


@triton.jit
def adam_kernel(
    logits,
    first_moment,
    second_moment,
    keys,
    tiles,
    starts,
    means,
    products,
    total,
    gradient,
    temperature,
    step_size,
    root,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    segment = tl.load(tiles + 2 * tile)
    local = tl.load(tiles + 2 * tile + 1) + tl.arange(0, BLOCK)
    first = tl.load(starts + segment)
    inside = local < tl.load(starts + segment + 1) - first
    place = first + local
    logit = tl.load(logits + place, mask=inside, other=0.0)
    sample, moves = _sampled(logit, local, keys, segment, temperature)
    mean = tl.load(means + segment)
    upstream = tl.load(gradient + place, mask=inside, other=0.0) * tl.load(total + place, mask=inside, other=0.0)
    upstream = (upstream - tl.load(products + segment) / mean) / mean
    slope = tl.where(moves, sample * (1.0 - sample) / temperature, 0.0) * upstream
    moment = tl.load(first_moment + place, mask=inside, other=0.0)
    moment = moment + 0.1 * (slope - moment)
    square = tl.load(second_moment + place, mask=inside, other=0.0) * 0.999 + 0.001 * slope * slope
    tl.store(first_moment + place, moment, mask=inside)
    tl.store(second_moment + place, square, mask=inside)
    tl.store(logits + place, logit - step_size * moment / (tl.sqrt(square) / root + 1e-8), mask=inside)


class MaskKernels:
    """The kernels with their tables, for one set of float32 segments that are all masked.

    Args:
        sizes: elements of each segment, in flat order.
        originals: θ0 of each segment, contiguous.
        device: where everything lies.
    """

    def __init__(self, sizes: list[int], originals: list[Tensor], device: torch.device):
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        tiles = [(index, start) for index, size in enumerate(sizes) for start in range(0, size, BLOCK)]
        self.count = len(tiles)
        self.originals = originals  # kept alive, since only their addresses are passed
        self.starts = torch.tensor(starts, dtype=torch.int64, device=device)
        self.sizes = torch.tensor(sizes, dtype=torch.float32, device=device)
        self.tiles = torch.tensor(tiles, dtype=torch.int64, device=device)
        self.lengths = torch.tensor([-(-size // BLOCK) for size in sizes], device=device)
        self.base = torch.tensor([tensor.data_ptr() for tensor in originals], dtype=torch.int64, device=device)
        self.partial = torch.empty(self.count, device=device)

    def _per_segment(self) -> Tensor:
        return torch.segment_reduce(self.partial, "sum", lengths=self.lengths, unsafe=True) / self.sizes

    def compose_(self, logits: Tensor, keys: Tensor, total: Tensor, theta: Tensor, temperature: float) -> Tensor:
        """Write θ0 + m ⊙ T into `theta`; returns each segment's mean of the sample."""
        common: tuple[Any, ...] = (logits, keys, self.tiles, self.starts)
        sums_kernel[(self.count,)](*common, self.partial, temperature, BLOCK=BLOCK)
        means = self._per_segment()
        write_kernel[(self.count,)](*common, means, total, self.base, theta, temperature, BLOCK=BLOCK)
        return means

    def step_(
        self,
        logits: Tensor,
        first: Tensor,
        second: Tensor,
        keys: Tensor,
        means: Tensor,
        total: Tensor,
        gradient: Tensor,
        temperature: float,
        lr: float,
        steps: int,
    ) -> None:
        """One Adam step of the logits from ∂L/∂θ; `means` is what `compose_` returned for the same draw."""
        common: tuple[Any, ...] = (self.tiles, self.starts)
        products_kernel[(self.count,)](logits, keys, *common, total, gradient, self.partial, temperature, BLOCK=BLOCK)
        adam_kernel[(self.count,)](
            logits,
            first,
            second,
            keys,
            *common,
            means,
            self._per_segment(),
            total,
            gradient,
            temperature,
            lr / (1 - 0.9**steps),
            (1 - 0.999**steps) ** 0.5,
            BLOCK=BLOCK,
        )
