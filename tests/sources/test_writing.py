"""Writing: whole under the final name, or not at all."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from merging import Recipe, merge
from taskvec import Checkpoint, in_memory, write
from taskvec.errors import DiskFullError, OutputError, OutputExistsError, UsageError, VerificationError
from taskvec.precision import dtype_named
from taskvec.sizes import byte_count
from taskvec.source import TensorInfo
from taskvec.writer import CheckpointWriter, assert_digests, check_output, write_atomically


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "partial" in path.name or "lock" in path.name)


def test_what_is_written_is_what_was_read_bit_for_bit(zoo, tmp_path):
    out = write(Checkpoint.open(zoo.base), tmp_path / "out")
    assert all(torch.equal(value, load_file(out / "model.safetensors")[name]) for name, value in zoo.base_state.items())
    assert (out / "config.json").read_bytes() == (zoo.base / "config.json").read_bytes()
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    assert leftovers(tmp_path) == []


def test_shards_are_planned_as_the_hub_library_plans_them(zoo, tmp_path):
    from huggingface_hub import split_torch_state_dict_into_shards

    expected = split_torch_state_dict_into_shards(zoo.base_state, max_shard_size=5000)
    source = in_memory(zoo.base_state)
    out = write(source, tmp_path / "out", shard_size=5000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict(sorted(expected.tensor_to_filename.items()))
    assert index["metadata"]["total_size"] == expected.metadata["total_size"]


def test_transformers_loads_a_sharded_output(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "in")
    out = write(Checkpoint.open(tmp_path / "in"), tmp_path / "out", shard_size=4000)
    again = LlamaForCausalLM.from_pretrained(out)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_pieces_in_any_order_give_the_same_digests(tmp_path):
    values = torch.randn(10)
    infos = {
        "w": TensorInfo((10,), torch.float32),
        "empty": TensorInfo((0, 3), torch.float32),
        "x": TensorInfo((), torch.int64),
    }
    for name, order in (("a", (0, 5)), ("b", (5, 0))):
        with CheckpointWriter(tmp_path / name, infos) as writer:
            for start in order:
                writer.write("w", values[start : start + 5], start)
            writer.write("empty", torch.empty(0, 3))
            writer.write("x", torch.tensor(7))
            writer.settle()
            digests = writer.digests()
            writer.finish()
        assert digests == Checkpoint.open(tmp_path / name).digests()


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn"])
def test_one_rounding_to_nearest_even(tmp_path, kind):
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -0.3, 1e-3], dtype=torch.float64)
    out = write(in_memory({"w": values}), tmp_path / "m.safetensors", dtype=kind)
    stored = load_file(out)["w"]
    assert stored.dtype == dtype_named(kind)
    assert torch.equal(stored.view(torch.uint8), values.to(dtype_named(kind)).view(torch.uint8))


def test_float8_saturates_and_says_so(tmp_path):
    infos = {"w": TensorInfo((3,), torch.float8_e4m3fn)}
    with CheckpointWriter(tmp_path / "m", infos) as writer:
        writer.write("w", torch.tensor([1.0, 1000.0, -1e9]))
        assert writer.saturated == {"w": 2}
        writer.finish()
    assert load_file(tmp_path / "m" / "model.safetensors")["w"].float().tolist() == [1.0, 448.0, -448.0]


def test_float16_overflow_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match=r"w: 1 values do not fit float16 .*found 1e\+06"):
        write(in_memory({"w": torch.tensor([1.0, 1e6])}), tmp_path / "m", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_was_never_written_is_an_error(tmp_path):
    with (
        pytest.raises(OutputError, match="1 tensors were never written: b"),
        CheckpointWriter(
            tmp_path / "m", {"a": TensorInfo((1,), torch.float32), "b": TensorInfo((1,), torch.float32)}
        ) as writer,
    ):
        writer.write("a", torch.zeros(1))
        writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_and_replaced_only_on_request(zoo, tmp_path):
    source = Checkpoint.open(zoo.base)
    write(source, tmp_path / "out")
    with pytest.raises(OutputExistsError, match="exists already"):
        write(source, tmp_path / "out")
    write(Checkpoint.open(zoo.tuned[0]), tmp_path / "out", overwrite=True, shard_size=4000)
    assert Checkpoint.open(tmp_path / "out").content_hash() == Checkpoint.open(zoo.tuned[0]).content_hash()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "other", ["checkpoint-500/optimizer.pt", "optimizer.pt", "notes.md", ".git/HEAD", "plots/a.png"]
)
def test_a_model_with_other_things_beside_it_is_not_replaced(zoo, tmp_path, other):
    write(Checkpoint.open(zoo.base), tmp_path / "out")
    (tmp_path / "out" / other).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / other).write_text("x")
    with pytest.raises(OutputError, match=f"holds more than a model .{other.split('/')[0]}.*would destroy"):
        write(Checkpoint.open(zoo.tuned[0]), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / other).read_text() == "x"


def test_a_file_that_is_no_model_is_not_replaced(zoo, tmp_path):
    (tmp_path / "thesis").write_text("x")
    with pytest.raises(OutputError, match="is a file, and no model"):
        write(Checkpoint.open(zoo.base), tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis").read_text() == "x"
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe.safetensors", "link"):
        with pytest.raises(OutputError, match="is a file, and no model"):
            write(Checkpoint.open(zoo.base), tmp_path / name, overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "pipe.safetensors").is_fifo()


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_a_name_that_no_file_can_have_is_no_output(zoo, name):
    with pytest.raises(UsageError, match="no name for an output"):
        write(Checkpoint.open(zoo.base), name)
    with pytest.raises(UsageError, match="no name for an output"):
        merge(Recipe.from_data(zoo.recipe()), name, overwrite=True)


def test_partial_outputs_of_other_names_are_left_alone(zoo, tmp_path):
    (tmp_path / "out1.partial-7").mkdir()
    write(Checkpoint.open(zoo.base), tmp_path / "out?")
    assert (tmp_path / "out1.partial-7").is_dir()


def test_a_folder_with_other_things_is_not_replaced(zoo, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="holds other things than a model"):
        write(Checkpoint.open(zoo.base), tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize("place", ["base", "base/merged", "."])
def test_an_output_in_or_around_an_input_is_refused(zoo, place):
    with pytest.raises(OutputError, match="inputs are never written to"):
        write(Checkpoint.open(zoo.base), zoo.folder / place, overwrite=True)
    assert Checkpoint.open(zoo.base).content_hash()


def test_a_place_that_cannot_be_written_is_refused_beforehand(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is not a folder"):
        check_output(tmp_path / "file" / "out", [], overwrite=False)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OutputError, match="no permission to write"):
        check_output(tmp_path / "out", [], overwrite=False)


def test_a_disk_that_is_too_small_is_noticed_before_the_first_byte(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DiskFullError, match="only 1.0 kB are free"):
        write(Checkpoint.open(zoo.base), tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


def test_a_second_run_for_the_same_output_is_refused_while_the_first_writes(tmp_path):
    infos = {"w": TensorInfo((2,), torch.float32)}
    with CheckpointWriter(tmp_path / "out", infos) as first:
        with pytest.raises(OutputExistsError, match="another run is writing this output"):
            CheckpointWriter(tmp_path / "out", infos)
        first.write("w", torch.zeros(2))
        first.finish()
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [0, 0]


def test_changed_content_is_named(zoo, tmp_path):
    out = write(Checkpoint.open(zoo.base), tmp_path / "out")
    recorded = Checkpoint.open(out).digests()
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(VerificationError, match="1 tensors changed"):
        assert_digests(Checkpoint.open(out), recorded, out)


def test_small_files_appear_whole(tmp_path):
    path = write_atomically(tmp_path / "note.txt", b"one")
    with pytest.raises(OutputExistsError, match="exists already"):
        write_atomically(path, b"two")
    write_atomically(path, b"two", overwrite=True)
    assert path.read_bytes() == b"two"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5 * 10**9),
        ("2GiB", 2**31),
        ("400 mb", 4 * 10**8),
        (7, 7),
        ("1.5kB", 1500),
        (".5MB", 5 * 10**5),
        ("5.", 5),
    ],
)
def test_sizes_are_read_with_their_units(text, count):
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["lots", "5 parsecs", "1.2.3GB", "", ". GB", "-5GB", "٣GB", -1, True, None, 1.5])
def test_other_texts_are_not_sizes(text):
    with pytest.raises(UsageError, match="is not a size"):
        byte_count(text)


@pytest.mark.parametrize("size", [0, "0GB", -5])
def test_a_shard_size_that_holds_nothing_is_refused_before_anything_is_made(tmp_path, size):
    with pytest.raises(UsageError, match="shard_size"):
        write(in_memory({"w": torch.ones(2)}), tmp_path / "out", shard_size=size)
    assert list(tmp_path.iterdir()) == []
