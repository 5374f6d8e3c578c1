# mypy: disable-error-code="no-untyped-def"
"""The kernels of `taskvec.fused`, in Triton. Imported only where Triton is installed.

Every kernel gets tables of addresses, so one launch covers any number of tensors. All arithmetic that two launches
compare is one sequence of separately rounded operations: launch with `enable_fp_fusion=False`, which keeps the compiler
from contracting products and sums, so that a threshold found by one launch holds bit for bit in the next.
"""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # no libdevice and no assembly there

INTERIOR, LOW_TAIL, HIGH_TAIL = 0, 1, 2
MAGNITUDE, PCB_SCORE = 0, 1
WEIGHTED_SUM, TRIMMED_SUM, TIES, PCB = 0, 1, 2, 3

_LOW = tl.constexpr(LOW_TAIL)
_HIGH = tl.constexpr(HIGH_TAIL)
_SCORE = tl.constexpr(PCB_SCORE)
_TRIMMED = tl.constexpr(TRIMMED_SUM)
_TIES = tl.constexpr(TIES)
_PCB = tl.constexpr(PCB)


@triton.jit
def probe_kernel(values):
    """Writes a one: whether kernels can be compiled and run at all."""
    tl.store(values, 1.0)


# -- arithmetic --------------------------------------------------------------------------------------------------------


@triton.jit
def _exp2(x):
    """2^x for 0 <= x < 126, to two units in the last place."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _exp_of(x, rate, rest):
    """exp(c x) for c x in [0, 80], given c log2(e) and what float32 leaves of it; what rounding loses is multiplied back."""
    exponent = x * rate
    lost = tl.fma(x, rest, tl.fma(x, rate, -exponent))
    guess = _exp2(exponent)
    return tl.fma(guess, lost * 0.6931471805599453, guess)


@triton.jit
def _tanh(x, FAR: tl.constexpr):
    """Tanh; without FAR |x| is known to stay below 0.55, and a polynomial gives it within a unit in the last place."""
    square = x * x
    near = tl.fma(square, -0.006610227843734885, 0.021309388673364137)
    near = tl.fma(near, square, -0.05390942882964411)
    near = tl.fma(near, square, 0.13333113729042678)
    near = tl.fma(near, square, -0.3333333200797775)
    near = tl.fma(near * square, x, x)
    if FAR:
        if INTERPRETED:
            far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
            near = tl.where(tl.abs(x) < 0.55, near, tl.where(x < 0, -far, far))
        else:
            near = libdevice.tanh(x)
    return near


@triton.jit
def _quotient(x, divisor, inverse):
    """X / divisor, rounded once (two steps with the divisor's rounded inverse); 0 where the inverse is given as 0."""
    guess = x * inverse
    return tl.fma(tl.fma(-guess, divisor, x), inverse, guess)


@triton.jit
def _pcb_score(x, total, numbers, task, FAR: tl.constexpr):
    low = tl.load(numbers + task * 8)
    high = tl.load(numbers + task * 8 + 1)
    inverse = tl.load(numbers + task * 8 + 2)
    share = (tl.minimum(tl.maximum(tl.abs(x), low), high) - low) * inverse
    grown = _exp_of(share * share, tl.load(numbers + task * 8 + 3), tl.load(numbers + task * 8 + 7))
    return grown * _tanh(x * total, FAR)


# -- reading -----------------------------------------------------------------------------------------------------------


@triton.jit
def _row(address, element, inside, STORED: tl.constexpr, ALIGN: tl.constexpr):
    pointer = tl.multiple_of(tl.multiple_of(address, ALIGN).to(tl.pointer_type(STORED)), ALIGN)
    return tl.load(pointer + element, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _delta(
    rows,
    tensor,
    task,
    base,
    element,
    inside,
    TASKS: tl.constexpr,
    STORED: tl.constexpr,
    BASED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    value = _row(tl.load(rows + tensor * TASKS + task), element, inside, STORED, ALIGN)
    if BASED:
        value = value - base
    return value


@triton.jit(do_not_specialize=["tensors", "numel", "runs", "size", "first"])
def sample_kernel(
    rows,
    bases,
    prefix,
    tensors,
    numel,
    runs,
    sample,
    size,
    first,
    numbers,
    TASKS: tl.constexpr,
    KIND: tl.constexpr,
    FAR: tl.constexpr,
    STORED: tl.constexpr,
    BASED: tl.constexpr,
    BASE_STORED: tl.constexpr,
    STEPS: tl.constexpr,
    SAMPLES: tl.constexpr,
    RUN_: tl.constexpr,
):
    """Values of elements drawn from equal strata, one run of neighbours in each, side by side in `sample`.

    Its rows are `size` values and both infinities.
    """
    if (tl.program_id(0) == 0) & (first == 0):
        for task in tl.static_range(TASKS):
            tl.store(sample + task * (size + 2) + size, float("-inf"))
            tl.store(sample + task * (size + 2) + size + 1, float("inf"))
    column = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    there = column < runs * RUN_
    run = (column // RUN_).to(tl.int64)
    begin = run * numel // runs
    width = (run + 1) * numel // runs - begin
    mixed = run.to(tl.uint32)
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    mixed = mixed ^ (mixed >> 16)
    room = tl.maximum(width - RUN_ + 1, 1)
    position = tl.minimum(begin + mixed.to(tl.int64) % room + column % RUN_, numel - 1)
    lower = tl.zeros([SAMPLES], dtype=tl.int32)
    upper = tl.zeros([SAMPLES], dtype=tl.int32) + tensors
    for _ in tl.static_range(STEPS):
        middle = (lower + upper) // 2
        right = tl.load(prefix + middle) <= position
        lower = tl.where(right, middle, lower)
        upper = tl.where(right, upper, middle)
    element = position - tl.load(prefix + lower)
    base = tl.zeros([SAMPLES], dtype=tl.float32)
    if BASED:
        base = tl.load(tl.load(bases + lower).to(tl.pointer_type(BASE_STORED)) + element, mask=there, other=0.0).to(
            tl.float32
        )
    total = tl.zeros([SAMPLES], dtype=tl.float32)
    if KIND == _SCORE:
        for task in tl.static_range(TASKS):
            pointer = tl.load(rows + lower * TASKS + task).to(tl.pointer_type(STORED))
            x = tl.load(pointer + element, mask=there, other=0.0).to(tl.float32) - base
            total = x if task == 0 else total + x
    for task in tl.static_range(TASKS):
        pointer = tl.load(rows + lower * TASKS + task).to(tl.pointer_type(STORED))
        x = tl.load(pointer + element, mask=there, other=0.0).to(tl.float32) - base
        if KIND == _SCORE:
            value = _pcb_score(x, total, numbers, task, FAR)
        else:
            value = tl.abs(x)
        tl.store(sample + task * (size + 2) + first + column, value, mask=there)


# -- counting ----------------------------------------------------------------------------------------------------------

# a branch around the rare case; Triton itself would predicate every instruction of it for every element
_APPEND = tl.constexpr(
    """
    {
    .reg .pred hit, room;
    .reg .u32 place;
    .reg .u64 address;
    setp.ne.s32 hit, $1, 0;
    mov.u32 $0, 0;
    @!hit bra DONE;
    atom.global.add.u32 place, [$2], 1;
    setp.lt.u32 room, place, $4;
    mad.wide.u32 address, place, 4, $3;
    @room st.global.f32 [address], $5;
    DONE:
    }
    """
)


@triton.jit
def _append(value, hit, counter, shelf, capacity, BLOCK_: tl.constexpr):
    """Puts the values that hit onto a list, in any order; the counter goes on past its end."""
    if INTERPRETED:
        place = tl.atomic_add(counter + tl.zeros([BLOCK_], dtype=tl.int32), 1, mask=hit, sem="relaxed")
        tl.store(shelf + place, value, mask=hit & (place < capacity))
    else:
        tl.inline_asm_elementwise(
            _APPEND,
            "=r,r,l,l,r,f",
            [hit.to(tl.int32), counter.to(tl.int64), shelf.to(tl.int64), capacity, value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _counted(
    packed,
    claim,
    words,
    tiles,
    tile,
    task: tl.constexpr,
    bracket: tl.constexpr,
    which: tl.constexpr,
    TASKS: tl.constexpr,
    PER_TASK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Adds one field, 16 bits wide; a word is summed over the tile and stored once both of its fields are in."""
    number: tl.constexpr = task * PER_TASK + ((FIELDS >> (4 * bracket)) & 15) + which
    packed += tl.where(claim, 1 << (16 * (number % 2)), 0)
    if number % 2 == 1 or number == TASKS * PER_TASK - 1:
        tl.store(words + (number // 2) * tiles + tile, tl.sum(packed))
        packed = tl.zeros_like(packed)
    return packed


@triton.jit(do_not_specialize=["capacity", "first", "tiles"])
def count_kernel(
    rows,
    bases,
    sizes,
    tile_tensor,
    tile_start,
    ends,
    numbers,
    words,
    squares,
    held,
    lists,
    capacity,
    first,
    tiles,
    TASKS: tl.constexpr,
    KIND: tl.constexpr,
    FAR: tl.constexpr,
    STORED: tl.constexpr,
    BASED: tl.constexpr,
    BASE_STORED: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    BRACKETS: tl.constexpr,
    KINDS: tl.constexpr,
    FIELDS: tl.constexpr,
    PER_TASK: tl.constexpr,
    LEAN: tl.constexpr,
    EXAMINE: tl.constexpr,
    BLOCK_: tl.constexpr,
    BUCKETS_: tl.constexpr,
    PAD_: tl.constexpr,
):
    """Each row of one tile against its brackets: counts into `words`, values inside onto the row's lists.

    The ends of a bracket are counted apart, since many values may equal them; LEAN leaves them among those inside.
    """
    tile = tl.program_id(0)
    tensor = tl.load(tile_tensor + tile).to(tl.int64)
    start = tl.multiple_of(tl.load(tile_start + tile), BLOCK_)
    size = tl.multiple_of(tl.load(sizes + tensor), EVEN)
    element = start + tl.arange(0, BLOCK_)
    inside = element < size
    base = tl.zeros([BLOCK_], dtype=tl.float32)
    if BASED:
        base = _row(tl.load(bases + tensor), element, inside, BASE_STORED, ALIGN)
    total = tl.zeros([BLOCK_], dtype=tl.float32)
    if KIND == _SCORE:
        for task in tl.static_range(TASKS):
            x = _delta(rows, tensor, task, base, element, inside, TASKS, STORED, BASED, ALIGN)
            total = x if task == 0 else total + x
    packed = tl.zeros([BLOCK_], dtype=tl.int32)
    for task in tl.static_range(TASKS):
        x = _delta(rows, tensor, task, base, element, inside, TASKS, STORED, BASED, ALIGN)
        if EXAMINE:
            tl.store(squares + task * tiles + first + tile, tl.sum(x * x))
        if KIND == _SCORE:
            value = _pcb_score(x, total, numbers, task, FAR)
        else:
            value = tl.abs(x)
        value = tl.where(inside, value, float("nan"))  # compares false with everything
        hit = value != value
        for bracket in tl.static_range(BRACKETS):
            low = tl.load(ends + (task * BRACKETS + bracket) * 2)
            high = tl.load(ends + (task * BRACKETS + bracket) * 2 + 1)
            if LEAN:
                above, under = value >= low, value <= high
            else:
                above, under = value > low, value < high
            if (KINDS >> (2 * bracket)) & 3 == _LOW:
                inner = under
            elif (KINDS >> (2 * bracket)) & 3 == _HIGH:
                inner = above
            else:
                inner = above & under
            hit = inner if bracket == 0 else hit | inner
        shelf = task * BUCKETS_ + tile % BUCKETS_
        _append(value, hit, held + shelf * PAD_, lists + shelf.to(tl.int64) * capacity, capacity, BLOCK_)
        for bracket in tl.static_range(BRACKETS):
            low = tl.load(ends + (task * BRACKETS + bracket) * 2)
            high = tl.load(ends + (task * BRACKETS + bracket) * 2 + 1)
            if (KINDS >> (2 * bracket)) & 3 == _LOW:
                if not LEAN:
                    packed = _counted(
                        packed, value == high, words, tiles, first + tile, task, bracket, 0, TASKS, PER_TASK, FIELDS
                    )
            elif (KINDS >> (2 * bracket)) & 3 == _HIGH:
                if not LEAN:
                    packed = _counted(
                        packed, value == low, words, tiles, first + tile, task, bracket, 0, TASKS, PER_TASK, FIELDS
                    )
            else:
                packed = _counted(
                    packed, value < low, words, tiles, first + tile, task, bracket, 0, TASKS, PER_TASK, FIELDS
                )
                if not LEAN:
                    packed = _counted(
                        packed, value == low, words, tiles, first + tile, task, bracket, 1, TASKS, PER_TASK, FIELDS
                    )
                    packed = _counted(
                        packed, value == high, words, tiles, first + tile, task, bracket, 2, TASKS, PER_TASK, FIELDS
                    )


@triton.jit
def _key(value):
    """Whole numbers in the order of the floats; -0.0 counts as +0.0."""
    raw = (value + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(raw < 0, -1 - raw, raw + 0x80000000)


@triton.jit
def _summed(words, tiles, number, STEP: tl.constexpr):
    """One field of the counts, summed over all tiles."""
    total = tl.zeros([STEP], dtype=tl.int32)
    begin_of = words + (number // 2) * tiles
    for begin in range(0, tiles, STEP):
        tile = begin + tl.arange(0, STEP)
        word = tl.load(begin_of + tile, mask=tile < tiles, other=0)
        total += (word >> (16 * (number % 2))) & 0xFFFF
    return tl.sum(total.to(tl.int64))


@triton.jit(do_not_specialize=["tiles", "capacity", "numel"])
def resolve_kernel(
    words,
    tiles,
    held,
    capacity,
    ends,
    ranks,
    bracket_of,
    counts,
    state,
    numel,
    RANKS: tl.constexpr,
    BRACKETS: tl.constexpr,
    KINDS: tl.constexpr,
    FIELDS: tl.constexpr,
    PER_TASK: tl.constexpr,
    LEAN: tl.constexpr,
    BUCKETS_: tl.constexpr,
    PAD_: tl.constexpr,
    STEP: tl.constexpr,
):
    """One (task, rank): sums the counts of its bracket and sets up the selection among the values inside.

    `counts` gets below, at the low end, inside (later), at the high end, overflow; `state` origin, width in bits, rank
    inside, below, equal, and the keys of the bracket's ends.
    """
    place = tl.program_id(0)
    task = place // RANKS
    bracket = tl.load(bracket_of + place % RANKS)
    slot = task * BRACKETS + bracket
    kind = (KINDS >> (2 * bracket)) & 3
    number = task * PER_TASK + ((FIELDS >> (4 * bracket)) & 15)
    one = tl.zeros([], dtype=tl.int64)
    if (kind == 0) | (not LEAN):
        one = _summed(words, tiles, number, STEP)
    rank = tl.load(ranks + place)
    if kind == 0:
        two = one * 0
        three = one * 0
        if not LEAN:
            two = _summed(words, tiles, number + 1, STEP)
            three = _summed(words, tiles, number + 2, STEP)
        tl.store(counts + place * 5, one)
        tl.store(counts + place * 5 + 1, two)
        tl.store(counts + place * 5 + 3, three)
        tl.store(state + place * 7 + 2, rank - one - two)
    elif kind == 1:
        tl.store(counts + place * 5, one * 0)
        tl.store(counts + place * 5 + 1, one * 0)
        tl.store(counts + place * 5 + 3, one)
        tl.store(state + place * 7 + 2, rank)
    else:
        tl.store(counts + place * 5, numel - one)  # less what is inside, once that is known
        tl.store(counts + place * 5 + 1, one)
        tl.store(counts + place * 5 + 3, one * 0)
        tl.store(state + place * 7 + 2, rank - numel)
    kept = tl.load(held + (task * BUCKETS_ + tl.arange(0, BUCKETS_)) * PAD_)
    tl.store(counts + place * 5 + 2, one * 0)
    tl.store(counts + place * 5 + 4, tl.max(kept).to(tl.int64) - capacity)
    low = _key(tl.load(ends + slot * 2))
    high = _key(tl.load(ends + slot * 2 + 1))
    width = low * 0
    for _ in tl.static_range(33):
        width += tl.where((high - low) >> width > 0, 1, 0)
    tl.store(state + place * 7, low)
    tl.store(state + place * 7 + 1, width)
    tl.store(state + place * 7 + 3, low * 0)
    tl.store(state + place * 7 + 4, low * 0)
    tl.store(state + place * 7 + 5, low)
    tl.store(state + place * 7 + 6, high)


@triton.jit(do_not_specialize=["capacity"])
def digit_kernel(
    lists,
    held,
    capacity,
    state,
    bins,
    RANKS: tl.constexpr,
    BUCKETS_: tl.constexpr,
    PAD_: tl.constexpr,
    DIGIT_: tl.constexpr,
    BITS: tl.constexpr,
    LEAN: tl.constexpr,
    STEP: tl.constexpr,
):
    """Counts one digit of the keys that still may be the wanted one."""
    place = tl.program_id(0)
    shelf = place // RANKS * BUCKETS_ + tl.program_id(1)
    kept = tl.minimum(tl.load(held + shelf * PAD_), capacity)
    begin = tl.program_id(2) * STEP
    width = tl.load(state + place * 7 + 1)
    if (begin < kept) & (width > 0):
        origin = tl.load(state + place * 7)
        low = tl.load(state + place * 7 + 5)
        high = tl.load(state + place * 7 + 6)
        shift = tl.maximum(width - BITS, 0)
        item = begin + tl.arange(0, STEP)
        key = _key(tl.load(lists + shelf.to(tl.int64) * capacity + item, mask=item < kept, other=0.0))
        offset = key - origin
        between = (key >= low) & (key <= high)
        if not LEAN:
            between = (key > low) & (key < high)
        live = (item < kept) & between & (offset >= 0) & (offset >> width == 0)
        tl.atomic_add(bins + place * DIGIT_ + tl.where(live, offset >> shift, 0), 1, mask=live, sem="relaxed")


@triton.jit
def pick_kernel(
    counts,
    state,
    bins,
    bracket_of,
    RANKS: tl.constexpr,
    KINDS: tl.constexpr,
    FIRST: tl.constexpr,
    DIGIT_: tl.constexpr,
    BITS: tl.constexpr,
):
    """Finds the bin that holds the wanted rank, narrows the state to it and clears the bins."""
    place = tl.program_id(0)
    width = tl.load(state + place * 7 + 1)
    if width > 0:  # else it is one number already
        index = tl.arange(0, DIGIT_)
        number = tl.load(bins + place * DIGIT_ + index).to(tl.int64)
        tl.store(bins + place * DIGIT_ + index, tl.zeros([DIGIT_], dtype=tl.int32))
        rank = tl.load(state + place * 7 + 2)
        if FIRST:
            inside = tl.sum(number)
            high_tail = (KINDS >> (2 * tl.load(bracket_of + place % RANKS))) & 3 == _HIGH
            tl.store(counts + place * 5 + 2, inside)
            below = tl.load(counts + place * 5)
            tl.store(counts + place * 5, tl.where(high_tail, below - inside, below))
            rank += tl.where(high_tail, inside, 0)
        upto = tl.cumsum(number, 0)
        digit = tl.sum((upto <= rank).to(tl.int64))
        before = tl.sum(tl.where(index < digit, number, 0))
        equal = tl.sum(tl.where(index == digit, number, 0))
        shift = tl.maximum(width - BITS, 0)
        tl.store(state + place * 7, tl.load(state + place * 7) + (digit << shift))
        tl.store(state + place * 7 + 1, shift)
        tl.store(state + place * 7 + 2, rank - before)
        tl.store(state + place * 7 + 3, tl.load(state + place * 7 + 3) + before)
        tl.store(state + place * 7 + 4, equal)


# -- merging -----------------------------------------------------------------------------------------------------------


@triton.jit
def _pcb_weight(score, numbers, task):
    cut = tl.load(numbers + task * 8 + 4)
    reach = tl.load(numbers + task * 8 + 5)
    inverse = tl.load(numbers + task * 8 + 6)
    return _quotient(tl.maximum(score, cut) - cut, reach, inverse)


@triton.jit
def _pcb_clipped(x, numbers, task):
    low = tl.load(numbers + task * 8)
    high = tl.load(numbers + task * 8 + 1)
    size = tl.minimum(tl.maximum(tl.abs(x), low), high)
    return tl.where(x == 0, 0.0, tl.where(x < 0, -size, size))


@triton.jit(do_not_specialize=["first", "tiles"])
def merge_kernel(
    rows,
    bases,
    sizes,
    outs,
    weights,
    tile_tensor,
    tile_start,
    numbers,
    scale,
    squares,
    first,
    tiles,
    TASKS: tl.constexpr,
    KIND: tl.constexpr,
    FAR: tl.constexpr,
    STORED: tl.constexpr,
    BASED: tl.constexpr,
    BASE_STORED: tl.constexpr,
    OUT: tl.constexpr,
    ONTO_BASE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXAMINE: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_: tl.constexpr,
):
    """One tile of the merge, written to its place."""
    tile = tl.program_id(0)
    tensor = tl.load(tile_tensor + tile).to(tl.int64)
    start = tl.multiple_of(tl.load(tile_start + tile), BLOCK_)
    size = tl.multiple_of(tl.load(sizes + tensor), EVEN)
    element = start + tl.arange(0, BLOCK_)
    inside = element < size
    base = tl.zeros([BLOCK_], dtype=tl.float32)
    if BASED:
        base = _row(tl.load(bases + tensor), element, inside, BASE_STORED, ALIGN)
    total = tl.zeros([BLOCK_], dtype=tl.float32)
    for task in tl.static_range(TASKS):
        x = _delta(rows, tensor, task, base, element, inside, TASKS, STORED, BASED, ALIGN)
        if EXAMINE:
            tl.store(squares + task * tiles + first + tile, tl.sum(x * x))
        if KIND == _TRIMMED or KIND == _TIES:  # noqa: SIM109 - a tuple test is not Triton
            x = tl.where(tl.abs(x) >= tl.load(numbers + task * 8), x, 0.0)
        if KIND == _PCB:
            total = x if task == 0 else total + x
        else:  # rounded once, as adding with a factor is elsewhere
            weight = tl.load(weights + tensor * TASKS + task)
            total = x * weight if task == 0 else tl.fma(x, weight, total)
    if KIND == _TIES:
        positive = total >= 0
        merged = tl.zeros([BLOCK_], dtype=tl.float32)
        agreed = tl.zeros([BLOCK_], dtype=tl.float32)
        for task in tl.static_range(TASKS):
            x = _delta(rows, tensor, task, base, element, inside, TASKS, STORED, BASED, ALIGN)
            x = tl.where(tl.abs(x) >= tl.load(numbers + task * 8), x, 0.0)
            weight = tl.load(weights + tensor * TASKS + task)
            agrees = tl.where(positive == (weight >= 0), x > 0, x < 0)
            merged = tl.fma(tl.where(agrees, x, 0.0), weight, merged)
            agreed += tl.where(agrees, weight, 0.0)
        if NORMALIZE:
            merged = tl.div_rn(merged, tl.where(agreed == 0, 1.0, agreed))
    elif KIND == _PCB:
        merged = tl.zeros([BLOCK_], dtype=tl.float32)
        divisor = tl.zeros([BLOCK_], dtype=tl.float32)
        for task in tl.static_range(TASKS):
            x = _delta(rows, tensor, task, base, element, inside, TASKS, STORED, BASED, ALIGN)
            share = _pcb_weight(_pcb_score(x, total, numbers, task, FAR), numbers, task)
            part = _pcb_clipped(x, numbers, task) * share
            merged = tl.fma(part, tl.load(weights + tensor * TASKS + task), merged)
            divisor += share
        merged = tl.div_rn(merged, tl.maximum(divisor, 1e-12))
    else:
        merged = total
    merged = merged * scale
    if ONTO_BASE:
        merged = base + merged
    pointer = tl.multiple_of(tl.multiple_of(tl.load(outs + tensor), ALIGN).to(tl.pointer_type(OUT)), ALIGN)
    tl.store(pointer + element, merged.to(OUT), mask=inside)


@triton.jit(do_not_specialize=["first"])
def gram_kernel(
    rows,
    bases,
    sizes,
    tile_tensor,
    tile_start,
    products,
    first,
    TASKS: tl.constexpr,
    PADDED: tl.constexpr,
    STORED: tl.constexpr,
    BASED: tl.constexpr,
    BASE_STORED: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_: tl.constexpr,
    STEP: tl.constexpr,
):
    """Inner products between the rows of one tile, in float64."""
    tile = tl.program_id(0)
    tensor = tl.load(tile_tensor + tile).to(tl.int64)
    start = tl.multiple_of(tl.load(tile_start + tile), BLOCK_)
    size = tl.multiple_of(tl.load(sizes + tensor), EVEN)
    task = tl.arange(0, PADDED)
    places = tl.load(rows + tensor * TASKS + task, mask=task < TASKS, other=0).to(tl.pointer_type(STORED))
    total = tl.zeros([PADDED, PADDED, STEP], dtype=tl.float64)
    for step in range(BLOCK_ // STEP):
        element = start + step * STEP + tl.arange(0, STEP)
        inside = element < size
        there = (task < TASKS)[:, None] & inside[None, :]
        x = tl.load(places[:, None] + element[None, :], mask=there, other=0.0).to(tl.float32)
        if BASED:
            x = tl.where(there, x - _row(tl.load(bases + tensor), element, inside, BASE_STORED, ALIGN)[None, :], 0.0)
        wide = x.to(tl.float64)
        total += wide[:, None, :] * wide[None, :, :]
    found = tl.sum(total, axis=2)
    place = (first + tile) * (PADDED * PADDED) + task[:, None] * PADDED + task[None, :]
    tl.store(products + place, found)


# -- contributions -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first"])
def pack_kernel(
    rows,
    bases,
    sizes,
    tile_tensor,
    tile_start,
    numbers,
    cursor,
    masks,
    places,
    values,
    first,
    TASKS: tl.constexpr,
    FAR: tl.constexpr,
    STORED: tl.constexpr,
    BASED: tl.constexpr,
    BASE_STORED: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_: tl.constexpr,
):
    """PCB's parts P_i of one tile: a bit mask of the tasks that keep each element, and their values side by side."""
    tile = tl.program_id(0)
    tensor = tl.load(tile_tensor + tile).to(tl.int64)
    start = tl.multiple_of(tl.load(tile_start + tile), BLOCK_)
    size = tl.multiple_of(tl.load(sizes + tensor), EVEN)
    element = start + tl.arange(0, BLOCK_)
    inside = element < size
    base = tl.zeros([BLOCK_], dtype=tl.float32)
    if BASED:
        base = _row(tl.load(bases + tensor), element, inside, BASE_STORED, ALIGN)
    total = tl.zeros([BLOCK_], dtype=tl.float32)
    for task in tl.static_range(TASKS):
        x = _delta(rows, tensor, task, base, element, inside, TASKS, STORED, BASED, ALIGN)
        total = x if task == 0 else total + x
    divisor = tl.zeros([BLOCK_], dtype=tl.float32)
    mask = tl.zeros([BLOCK_], dtype=tl.int32)
    for task in tl.static_range(TASKS):
        x = _delta(rows, tensor, task, base, element, inside, TASKS, STORED, BASED, ALIGN)
        share = _pcb_weight(_pcb_score(x, total, numbers, task, FAR), numbers, task)
        divisor += share
        mask = mask | (((_pcb_clipped(x, numbers, task) * share != 0) & inside).to(tl.int32) << task)
    divisor = tl.maximum(divisor, 1e-12)
    count = tl.zeros([BLOCK_], dtype=tl.int32)
    for task in tl.static_range(TASKS):
        count += (mask >> task) & 1
    upto = tl.cumsum(count, 0)
    here = tl.atomic_add(cursor, tl.sum(count).to(tl.int64), sem="relaxed")
    tl.store(places + first + tile, here)
    slot = (first + tile).to(tl.int64) * BLOCK_ + tl.arange(0, BLOCK_)
    tl.store(masks + slot, mask.to(masks.dtype.element_ty))
    place = here + (upto - count)
    for task in tl.static_range(TASKS):
        x = _delta(rows, tensor, task, base, element, inside, TASKS, STORED, BASED, ALIGN)
        share = _pcb_weight(_pcb_score(x, total, numbers, task, FAR), numbers, task)
        there = (mask >> task) & 1
        tl.store(values + place, tl.div_rn(_pcb_clipped(x, numbers, task) * share, divisor), mask=there != 0)
        place += there


@triton.jit(do_not_specialize=["first"])
def unpack_kernel(
    sizes,
    outs,
    weights,
    tile_tensor,
    tile_start,
    masks,
    places,
    values,
    first,
    TASKS: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_: tl.constexpr,
):
    """Σ_i λ_i P_i of one tile, from the packed parts."""
    tile = tl.program_id(0)
    tensor = tl.load(tile_tensor + tile).to(tl.int64)
    start = tl.multiple_of(tl.load(tile_start + tile), BLOCK_)
    size = tl.multiple_of(tl.load(sizes + tensor), EVEN)
    lane = tl.arange(0, BLOCK_)
    element = start + lane
    mask = tl.load(masks + (first + tile).to(tl.int64) * BLOCK_ + lane).to(tl.int32)
    count = tl.zeros([BLOCK_], dtype=tl.int32)
    for task in tl.static_range(TASKS):
        count += (mask >> task) & 1
    place = tl.load(places + first + tile) + (tl.cumsum(count, 0) - count)
    merged = tl.zeros([BLOCK_], dtype=tl.float32)
    for task in tl.static_range(TASKS):
        there = (mask >> task) & 1
        part = tl.load(values + place, mask=there != 0, other=0.0)
        merged += part * tl.load(weights + task)
        place += there
    pointer = tl.multiple_of(tl.multiple_of(tl.load(outs + tensor), ALIGN).to(tl.pointer_type(tl.float32)), ALIGN)
    tl.store(pointer + element, merged, mask=element < size)
