"""Direct writes: the same bytes as ordinary ones, whatever the order and the edges."""

import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from taskvec import Checkpoint, direct
from taskvec.direct import BLOCK, DirectFile, DirectWrites
from taskvec.errors import OutputError
from taskvec.source import TensorInfo
from taskvec.writer import CheckpointWriter


def made(path: Path, size: int) -> tuple[int, int]:
    """A file of that size, open for ordinary writes and for direct ones where the file system has them."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.truncate(path, size)
    try:
        return fd, os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return fd, os.open(path, os.O_WRONLY)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=12), st.integers(0, 2), st.randoms())
def test_pieces_of_any_length_in_any_order_make_the_file(tmp_path_factory, lengths, first, random):
    path = tmp_path_factory.mktemp("direct") / "file"
    start = first * BLOCK
    content = os.urandom(sum(lengths))
    fd, other = made(path, start + len(content))
    os.pwrite(fd, b"h" * start, 0)
    writes = DirectWrites()
    file = DirectFile(writes, fd, other, start + len(content))
    writes.start()
    pieces, at = [], 0
    for length in lengths:
        pieces.append((start + at, content[at : at + length]))
        at += length
    random.shuffle(pieces)
    for offset, piece in pieces:
        file.write(offset, memoryview(piece))
    file.drain()
    file.close()
    writes.close()
    os.close(fd)
    assert path.read_bytes() == b"h" * start + content


def test_threads_share_blocks_at_their_edges(tmp_path):
    content = os.urandom(8 * 333_333)
    fd, other = made(tmp_path / "file", len(content))
    writes = DirectWrites()
    file = DirectFile(writes, fd, other, len(content))
    writes.start()

    def part(number: int) -> None:
        for at in range(number * 333_333, (number + 1) * 333_333, 1111):
            file.write(at, memoryview(content)[at : min(at + 1111, (number + 1) * 333_333)])

    threads = [threading.Thread(target=part, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.drain()
    file.close()
    writes.close()
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == content


def test_a_device_that_refuses_blocks_gets_them_the_ordinary_way(tmp_path):
    fd, other = made(tmp_path / "file", 4 * BLOCK)
    content = os.urandom(4 * BLOCK)
    writes = DirectWrites()
    file = DirectFile(writes, fd, other, len(content))
    misaligned = bytearray(len(content) + 1)
    misaligned[1:] = content
    file.put(0, memoryview(misaligned)[1:])  # refused with EINVAL where the file system has direct writes
    file.close()
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == content


def test_a_write_that_fails_is_told_to_whoever_waits(tmp_path):
    fd, other = made(tmp_path / "file", 2 * BLOCK)
    read_only = os.open(tmp_path / "file", os.O_RDONLY)
    os.close(other)
    writes = DirectWrites()
    file = DirectFile(writes, fd, read_only, 2 * BLOCK)
    writes.start()
    file.write(0, memoryview(bytes(BLOCK)))
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.drain()
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.write(BLOCK, memoryview(bytes(BLOCK)))
    file.close()
    writes.close()
    os.close(fd)


@pytest.mark.parametrize("cached", [False, True])
def test_outputs_are_the_same_bytes_past_the_page_cache_and_through_it(tmp_path, monkeypatch, cached):
    monkeypatch.setattr(direct, "LEAST", 0)
    values = {"a": torch.randn(70_001), "norm": torch.randn(7), "b": torch.randn(33, 1000).bfloat16()}
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in values.items()}
    with CheckpointWriter(tmp_path / "out", infos, shard_size=280_000, cached=cached, fingerprint="f" * 32) as writer:
        for start, stop in ((50_000, 70_001), (0, 20_000), (20_000, 50_000)):
            writer.write("a", values["a"][start:stop], start)
        writer.write("b", values["b"])
        writer.write("norm", values["norm"])
        writer.settle()
        digests = writer.digests()
        writer.finish()
    found = {k: v for path in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(path).items()}
    assert all(torch.equal(found[name], value) for name, value in values.items())
    assert Checkpoint.open(tmp_path / "out").digests() == digests


def test_an_output_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(direct, "LEAST", 0)
    infos = {"a": TensorInfo((100_000,), torch.float32)}
    with (
        pytest.raises(OutputError, match=r"writing model\.safetensors failed"),
        CheckpointWriter(tmp_path / "out", infos) as writer,
    ):
        (shard,) = writer._shards
        if shard.direct is None:
            pytest.skip("the file system has no direct writes")
        broken = os.open(tmp_path / "unwritable", os.O_RDONLY | os.O_CREAT)
        os.dup2(broken, shard.direct._direct)
        os.close(broken)
        writer.write("a", torch.zeros(100_000))
        writer.settle()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unwritable"]
