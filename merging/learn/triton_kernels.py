"""The two passes over the task vectors as Triton kernels. Imported only where Triton is installed and a GPU is there.

Parameters, bases, gradients and stacks of deltas stay where they are: every kernel gets a table of addresses, so one
launch covers any number of tensors. Sums are in float32 and in a fixed order: results do not change from run to run.
"""

# Triton reads the source of these functions; annotations other than constexpr mean something else to it
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _composed(
    parameter,
    base,
    stack,
    stride,
    count,
    size,
    weights,
    start,
    TASKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    element = start + tl.arange(0, BLOCK)
    total = tl.load(base + element, mask=element < size, other=0.0) if TAIL else tl.load(base + element)
    total = total.to(tl.float32)
    for task in tl.static_range(TASKS):
        weight = tl.load(weights + task)
        row = stack + task * stride
        held = tl.where(task < count, size, 0)
        if TAIL:
            delta = tl.load(row + element, mask=element < held, other=0.0)
        else:
            # the same for the whole tile, so the loads stay vectors
            delta = tl.load(row + element, mask=tl.zeros([BLOCK], dtype=tl.int64) < held, other=0.0)
        total += weight * delta.to(tl.float32)
    total = total.to(parameter.dtype.element_ty)
    if TAIL:
        tl.store(parameter + element, total, mask=element < size)
    else:
        tl.store(parameter + element, total)


@triton.jit
def compose_kernel(
    anchor,
    stack_anchor,
    parameters,
    bases,
    stacks,
    strides,
    counts,
    sizes,
    weights,
    tile_segment,
    tile_start,
    TASKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    STACK_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of one tensor: base + Σ_t weight_t delta_t, rounded once."""
    tile = tl.program_id(0)
    segment = tl.load(tile_segment + tile)
    start = tl.multiple_of(tl.load(tile_start + tile), BLOCK)
    size = tl.load(sizes + segment)
    count = tl.load(counts + segment)
    stride = tl.multiple_of(tl.load(strides + segment), 64)
    parameter = anchor + tl.multiple_of(tl.load(parameters + segment), ALIGNED)
    base = anchor + tl.multiple_of(tl.load(bases + segment), ALIGNED)
    stack = stack_anchor + tl.multiple_of(tl.load(stacks + segment), STACK_ALIGNED)
    weight = weights + segment * TASKS
    # a mask that may end anywhere breaks vectors into single elements, so only the last tile has one
    if start + BLOCK <= size:
        _composed(parameter, base, stack, stride, count, size, weight, start, TASKS, BLOCK, False)
    else:
        _composed(parameter, base, stack, stride, count, size, weight, start, TASKS, BLOCK, True)


@triton.jit
def _products(
    gradient,
    stack,
    stride,
    count,
    size,
    start,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    TAIL: tl.constexpr,
):
    task = tl.arange(0, PADDED)
    rows = stack + task[:, None] * stride
    there = (task < count)[:, None]
    total = tl.zeros([PADDED, WIDTH], dtype=tl.float32)
    for step in range(STEPS):
        element = start + step * WIDTH + tl.arange(0, WIDTH)
        if TAIL:
            inside = element < size
            slope = tl.load(gradient + element, mask=inside, other=0.0)
            delta = tl.load(rows + element[None, :], mask=there & inside[None, :], other=0.0)
        else:
            slope = tl.load(gradient + element)
            delta = tl.load(rows + element[None, :], mask=there, other=0.0)
        total += slope.to(tl.float32)[None, :] * delta.to(tl.float32)
    return tl.sum(total, axis=1)


@triton.jit
def products_kernel(
    anchor,
    stack_anchor,
    gradients,
    stacks,
    strides,
    counts,
    sizes,
    partials,
    tile_segment,
    tile_start,
    tile_slot,
    PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    STACK_ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One tile of one tensor: Σ gradient ⊙ delta_t for every task t, into the tile's row of `partials`."""
    tile = tl.program_id(0)
    segment = tl.load(tile_segment + tile)
    start = tl.multiple_of(tl.load(tile_start + tile), WIDTH)
    size = tl.load(sizes + segment)
    count = tl.load(counts + segment)
    stride = tl.multiple_of(tl.load(strides + segment), 64)
    gradient = anchor + tl.multiple_of(tl.load(gradients + tl.load(tile_slot + tile)), ALIGNED)
    stack = stack_anchor + tl.multiple_of(tl.load(stacks + segment), STACK_ALIGNED)
    place = partials + tile * PADDED + tl.arange(0, PADDED)
    if start + WIDTH * STEPS <= size:
        tl.store(place, _products(gradient, stack, stride, count, size, start, PADDED, WIDTH, STEPS, False))
    else:
        tl.store(place, _products(gradient, stack, stride, count, size, start, PADDED, WIDTH, STEPS, True))


@triton.jit
def reduce_kernel(
    partials,
    first_tile,
    tile_count,
    slot_segment,
    results,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add one tensor's tiles, in order, to its row of `results`."""
    slot = tl.program_id(0)
    first = tl.load(first_tile + slot)
    count = tl.load(tile_count + slot)
    segment = tl.load(slot_segment + slot)
    task = tl.arange(0, PADDED)
    total = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        piece = tl.load(
            partials + (first + row)[:, None] * PADDED + task[None, :], mask=(row < count)[:, None], other=0.0
        )
        total += piece
    place = results + segment * PADDED + task
    tl.store(place, tl.load(place) + tl.sum(total, axis=0))
