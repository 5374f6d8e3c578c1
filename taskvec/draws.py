"""Random draws that depend on what is drawn for, never on when: keyed by (seed, task, tensor name, element index).

Order, tiling, sharding, threads and devices therefore never change a randomised merge. Each element's 32 bits are a
keyed integer hash of its index (the `lowbias32` mixer of C. Wellons, bias 0.17 %, after a keyed affine map), made of
integer operations only, so CPU and GPU agree bit for bit.
"""

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

_M1, _M2 = 0x7FEB352D, 0x846CA68B
_BLOCK = 1 << 16  # values mixed at a time: two such arrays fit the second-level cache


def keys(seed: int, task: str, name: str, high: int) -> tuple[int, int]:
    """What is added to an element's index (its low 32 bits; `high` are the others) and what that is multiplied with."""
    digest = blake2b(f"{seed}\0{task}\0{name}\0{high}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little") | 1


def bits(seed: int, task: str, name: str, start: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """32 random bits for each element from `start` to `stop` of a tensor, as uint32 [stop - start]."""
    if start >> 32 != max(start, stop - 1) >> 32:
        edge = (start >> 32) + 1 << 32
        return np.concatenate([bits(seed, task, name, start, edge), bits(seed, task, name, edge, stop)])
    add, multiply = keys(seed, task, name, start >> 32)
    result = np.empty(stop - start, dtype=np.uint32)
    steps = np.arange(min(_BLOCK, stop - start), dtype=np.uint32)
    scratch = np.empty_like(steps)
    for first in range(0, stop - start, _BLOCK):
        x = result[first : first + _BLOCK]
        np.add(steps[: len(x)], np.uint32((start + first + add) & 0xFFFFFFFF), out=x)
        x *= np.uint32(multiply)
        shifted = scratch[: len(x)]
        for shift, factor in ((16, _M1), (15, _M2), (16, None)):
            np.right_shift(x, np.uint32(shift), out=shifted)
            x ^= shifted
            if factor is not None:
                x *= np.uint32(factor)
    return result


def uniform(seed: int, task: str, name: str, start: int, stop: int) -> Tensor:
    """Uniform draws in (0, 1), float32 [stop - start]: 23 bits and a half, so that neither 0 nor 1 is ever drawn."""
    top = (bits(seed, task, name, start, stop) >> np.uint32(9)).astype(np.float32)
    top += np.float32(0.5)
    top *= np.float32(2.0**-23)
    return torch.from_numpy(top)


def keep(seed: int, task: str, name: str, start: int, stop: int, density: float) -> Tensor:
    """True with probability `density`, bool [stop - start] (resolution 2^-32)."""
    if density >= 1:
        return torch.ones(stop - start, dtype=torch.bool)
    return torch.from_numpy(bits(seed, task, name, start, stop) < np.uint32(limit(density)))


def limit(density: float) -> int:
    """What an element's 32 bits must be below to be kept; 2^32 keeps all."""
    return min(int(density * 2**32), 1 << 32)
