"""Memory: how much is free, who may take how much of it, and how the system gets back what was freed."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


def free_memory() -> int:
    """Bytes that can be allocated without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class Gate:
    """Lets work through while the bytes it needs fit; what is larger than everything goes through alone."""

    def __init__(self, size: int):
        self.size, self._used = size, 0
        self._changed = threading.Condition()

    @contextmanager
    def __call__(self, need: int) -> Iterator[bool]:
        fits = need <= self.size
        need = min(need, self.size)
        with self._changed:
            self._changed.wait_for(lambda: self._used + need <= self.size)
            self._used += need
        try:
            yield fits
        finally:
            with self._changed:
                self._used -= need
                self._changed.notify_all()


def give_back() -> None:
    """Returns freed memory to the system (glibc).

    glibc before 2.38 cannot give an aligned buffer's place to the next one of its size while the few bytes before it
    sit in a fast bin, so memory that is free grows with the model: measured 2.9 GB against 0.9 GB for a budget of
    0.6 GB at 0.3 B parameters. Without fast bins neighbours join again, and trimming returns what they leave.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library with fast bins switched off, or None where it is another one."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(1, 0)  # M_MXFAST
        # tiles' buffers come from the heap again and again; mapping each anew costs as much as computing with it
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)
    except (AttributeError, OSError):
        return None
    return libc


__all__ = ["Gate", "free_memory", "give_back"]
