"""Hashing the inputs while the program still starts.

Importing torch takes one core a second or more. In that time a process of its own reads the inputs, which brings them
into the page cache, and hashes them, so that the merge itself need not. What it found counts only for files that are
still the same to the nanosecond when they are opened (device, inode, size, times of content and of status); anything
else is hashed again, as everything is where this never ran.
"""

import json
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SEGMENT = 1 << 22
"""Elements per hashed segment. Digests are made segment by segment, so they can be made in parallel and streamed."""

Identity = tuple[int, int, int, int, int]
"""Device, inode, bytes, and the times of last change of content and of status: what tells one state of a file."""

Extent = tuple[int, int]
"""Where in a file, and how many bytes."""

_SIZES = {
    name: size
    for size, names in {
        1: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ F8_E8M0",
        2: "F16 BF16 I16 U16",
        4: "F32 I32 U32",
        8: "F64 I64 U64 C64",
    }.items()
    for name in names.split()
}
_RECENT = 2.0  # seconds; clocks of file systems tick, and a file written within one tick may change unnoticed
_HEADER = 16 << 20  # bytes; longer headers are left to those who check them
_READ = 1 << 20
_MOST = 4  # threads that hash; more read no faster
_RECORD = struct.Struct("<IQQ32s")


@dataclass(frozen=True, slots=True)
class _Running:
    """The process that hashes, where it writes what it finds, and what it was given."""

    process: int
    results: int
    files: dict[int, Identity]


_running: _Running | None = None


def identity(status: os.stat_result) -> Identity:
    """What tells one state of a file from another."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def begin(models: "Iterable[str | os.PathLike[str]]") -> None:
    """Starts to hash the safetensors files of these models, until `found` is called.

    Does nothing where it could not help: on one core, and where torch is loaded or threads run already. Paths that are
    no models, and files that are not as they should be, are passed over: whoever opens them says so.
    """
    global _running
    spare = len(os.sched_getaffinity(0)) - 1
    if _running is not None or not spare or "torch" in sys.modules or threading.active_count() > 1:
        return
    with suppress(OSError):
        opened: dict[int, Identity] = {}
        for path in dict.fromkeys(file for model in models for file in _files(Path(model).expanduser())):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            state = os.fstat(fd)
            opened[fd] = identity(state)
            if time.time() - max(state.st_mtime, state.st_ctime) < _RECENT:
                os.close(fd)
                del opened[fd]
        if not opened:
            return
        results = os.memfd_create("taskvec-ahead", os.MFD_CLOEXEC)
        parent = os.getpid()
        process = os.fork()
        if not process:
            _hash(opened, results, parent, min(spare, _MOST))
        _running = _Running(process, results, opened)
        for fd in opened:
            os.close(fd)


def found() -> "Mapping[Identity, Mapping[Extent, bytes]]":
    """Ends what `begin` started: for each file, and each extent of it that was hashed whole, its digest (blake3)."""
    global _running
    running, _running = _running, None
    if running is None:
        return {}
    with suppress(OSError):
        os.kill(running.process, signal.SIGKILL)
        os.waitpid(running.process, 0)
    result: dict[Identity, dict[Extent, bytes]] = {}
    size = os.fstat(running.results).st_size // _RECORD.size * _RECORD.size
    for file, offset, count, digest in _RECORD.iter_unpack(os.pread(running.results, size, 0)):
        result.setdefault(running.files[file], {})[offset, count] = digest
    os.close(running.results)
    return result


def _files(model: Path) -> list[Path]:
    """The safetensors files of a model, as far as names tell."""
    if model.is_dir():
        return sorted(path for path in model.iterdir() if path.suffix == ".safetensors" and path.is_file())
    return [model] if model.suffix == ".safetensors" and model.is_file() else []


def _hash(files: Iterable[int], results: int, parent: int, threads: int) -> None:
    """What the process does. It never returns, and shares nothing with its parent but the file for the results."""
    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):  # whoever waits for the end of our output is not to wait for this process
            os.dup2(null, fd)
        from blake3 import blake3

        lock, pieces = threading.Lock(), _extents(files)

        def work() -> None:
            room = bytearray(_READ)
            view = memoryview(room)
            while os.getppid() == parent:
                with lock:
                    piece = next(pieces, None)
                if piece is None:
                    return
                fd, offset, count = piece
                hasher, done = blake3(), 0
                while done < count:
                    got = os.preadv(fd, [view[: min(_READ, count - done)]], offset + done)
                    if not got:
                        return
                    hasher.update(view[:got])
                    done += got
                os.write(results, _RECORD.pack(fd, offset, count, hasher.digest()))

        others = [threading.Thread(target=work) for _ in range(threads - 1)]
        for thread in others:
            thread.start()
        work()
        for thread in others:
            thread.join()
    finally:
        os._exit(0)


def _extents(files: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """File, offset and bytes of each segment of each tensor."""
    for fd in files:
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            length = int.from_bytes(os.pread(fd, 8, 0), "little")
            if length > _HEADER:
                continue
            header = json.loads(os.pread(fd, length, 8))
            header.pop("__metadata__", None)
            places = sorted((*entry["data_offsets"], _SIZES[entry["dtype"]]) for entry in header.values())
            for first, last, size in places:
                for start in range(first, last, SEGMENT * size):
                    yield fd, 8 + length + start, min(SEGMENT * size, last - start)


__all__ = ["SEGMENT", "Extent", "Identity", "begin", "found", "identity"]
