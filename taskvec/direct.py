"""Writes that go from our memory to the disk by the file's own device, past the page cache.

A large output that passes through the page cache takes memory from the inputs, which later passes read again, and its
pages have to be found, filled and written back by cores that have merging to do: 0.75 GB cost 0.2 to 2.4 s of them on
a virtual machine, depending on whether its memory had been in use before, and 0.04 s this way. Pieces are copied once,
into buffers that few threads write from while others compute; what does not fill a block waits for its neighbours.
"""

import errno
import mmap
import os
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

BLOCK = 4096
"""Offsets, lengths and addresses of such writes are multiples of this."""

LEAST = 16 << 20  # bytes; smaller files are written through the page cache
_PIECE = 1 << 20  # bytes of one write; with two threads 1.4 GB/s here, as much as larger ones and more threads
_THREADS = 2
_BUFFERS = 8
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)


class DirectWrites:
    """Threads and buffers that the files of one output share."""

    def __init__(self) -> None:
        self._free: SimpleQueue[Any] = SimpleQueue()
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def open(self, path: Path, fd: int, size: int) -> "DirectFile | None":
        """The file, for direct writes; None where it is small or its file system is not known to gain from them.

        Args:
            path: the file, which exists and is `size` bytes long.
            fd: a descriptor of it for ordinary writes, open as long as the result is used.
        """
        # device numbers without a major are those of file systems without one disk of their own: memory, networks,
        # overlays, and those that keep checksums, for which writes past the page cache are slow or a fiction
        if size < LEAST or not os.major(os.fstat(fd).st_dev):
            return None
        try:
            direct = os.open(path, os.O_WRONLY | os.O_DIRECT | getattr(os, "O_CLOEXEC", 0))
        except (OSError, AttributeError):
            return None
        self.start()
        return DirectFile(self, fd, direct, size)

    def start(self) -> None:
        """Starts the threads, once."""
        if self._threads:
            return
        for _ in range(_BUFFERS):
            self._free.put(np.frombuffer(mmap.mmap(-1, _PIECE), np.uint8))  # aligned to pages
        for _ in range(_THREADS):
            self._threads.append(threading.Thread(target=self._work, name="taskvec-write", daemon=True))
            self._threads[-1].start()

    def submit(self, file: "DirectFile", offset: int, data: Any) -> None:
        """Copies whole blocks, uint8 [bytes], and writes them soon."""
        buffer = self._free.get()
        np.copyto(buffer[: len(data)], data)
        self._queue.put((file, offset, buffer, len(data)))

    def close(self) -> None:
        """Ends the threads; what was submitted is written first."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            file, offset, buffer, count = item
            error: OSError | None = None
            try:
                file.put(offset, buffer[:count].data)
            except OSError as found:
                error = found
            self._free.put(buffer)
            file.written(error)


class DirectFile:
    """One file. Every byte of what is given to it must be given once; bytes it never gets belong to others."""

    def __init__(self, writes: DirectWrites, fd: int, direct: int, size: int):
        self._writes, self._fd, self._direct, self._size = writes, fd, direct, size
        self._changed = threading.Condition()
        self._waiting = 0
        self._error: OSError | None = None
        self._edges: dict[int, tuple[bytearray, int]] = {}  # block -> its bytes so far, and how many there are

    def write(self, offset: int, data: memoryview) -> None:
        """Takes bytes for a place in the file; they are copied. From several threads, in any order.

        Raises:
            OSError: an earlier write failed.
        """
        end = offset + len(data)
        first, last = -(-offset // BLOCK) * BLOCK, end // BLOCK * BLOCK
        if first < last:
            values = np.frombuffer(data, np.uint8)
            for at in range(first, last, _PIECE):
                self._submit(at, values[at - offset : min(at + _PIECE, last) - offset])
        at = offset
        for edge in (min(first, end), end):
            if at < edge:
                self._keep(at, data[at - offset : edge - offset])
            at = max(edge, last)

    def drain(self) -> None:
        """Waits until all is written that was given, but for blocks of which bytes are missing.

        Raises:
            OSError: a write failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        """Waits for what is under way and closes the descriptor for direct writes."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def put(self, offset: int, data: memoryview) -> None:
        """Writes whole blocks now; the ordinary way where the device refuses these."""
        done = 0
        while done < len(data) and not done % BLOCK:
            try:
                done += os.pwrite(self._direct, data[done:], offset + done)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                break
        self._put_plainly(offset + done, data[done:])

    def written(self, error: OSError | None) -> None:
        """Tells that one submitted piece is done."""
        with self._changed:
            self._waiting -= 1
            self._error = self._error or error
            self._changed.notify_all()

    def _submit(self, offset: int, data: Any) -> None:
        with self._changed:
            if self._error is not None:
                raise self._error
            self._waiting += 1
        self._writes.submit(self, offset, data)

    def _keep(self, offset: int, data: memoryview) -> None:
        """Bytes of one block that others share."""
        block = offset // BLOCK * BLOCK
        room = min(BLOCK, self._size - block)
        with self._changed:
            held, count = self._edges.pop(block) if block in self._edges else (bytearray(room), 0)
            held[offset - block : offset - block + len(data)] = data
            count += len(data)
            if count < room:
                self._edges[block] = held, count
                return
        if room == BLOCK:
            self._submit(block, np.frombuffer(held, np.uint8))
        else:  # the end of the file is no whole block
            self._put_plainly(block, memoryview(held))

    def _put_plainly(self, offset: int, data: memoryview) -> None:
        """Writes bytes the ordinary way."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], offset + done)


__all__ = ["BLOCK", "LEAST", "DirectFile", "DirectWrites"]
