"""Checkpoints: every kind opens, every broken one is refused by name, before anything else happens."""

import copy
import gc
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from taskvec import Checkpoint, TaskVector, in_memory
from taskvec.checkpoint import content_hash, tensor_digest
from taskvec.errors import (
    ChangedFileError,
    CorruptFileError,
    MissingTensorError,
    NotAModelError,
    NotFoundError,
    SourceError,
    UnsafeFileError,
)
from taskvec.writer import write

KINDS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(first: int, last: int, shape: list[int], kind: str = "F32") -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_dtype_reads_as_the_safetensors_library_reads_it(tmp_path, kind):
    values = (torch.arange(24) % 7).to(torch.float32).to(kind).view(4, 6)
    save_file({"w": values}, tmp_path / "m.safetensors")
    opened = Checkpoint.open(tmp_path / "m.safetensors")
    expected = load_file(tmp_path / "m.safetensors")["w"]
    assert opened.infos["w"].dtype == kind
    assert torch.equal(opened.read("w").view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(opened.read_flat("w", 5, 17).view(torch.uint8), expected.reshape(-1)[5:17].view(torch.uint8))


def test_a_sharded_folder_reads_like_the_single_file(zoo, tmp_path):
    whole = Checkpoint.open(zoo.base)
    write(whole, tmp_path / "shards", shard_size=4000)
    shards = Checkpoint.open(tmp_path / "shards")
    assert len(shards.files) > 2
    assert set(shards.infos) == set(whole.infos)
    assert all(torch.equal(shards.read(name), whole.read(name)) for name in whole.infos)
    assert shards.content_hash() == whole.content_hash()


def test_the_hash_is_that_of_the_state_dict_and_changes_with_any_bit(zoo):
    opened = Checkpoint.open(zoo.base)
    state = load_file(zoo.base / "model.safetensors")
    assert opened.content_hash() == content_hash(in_memory(state))
    state["model.norm.weight"][3] += 1e-7
    assert opened.content_hash() != content_hash(in_memory(state))


def test_a_digest_is_made_of_segments_in_order(monkeypatch):
    values = torch.arange(40, dtype=torch.float32)
    whole = tensor_digest(in_memory({"w": values}), "w")
    swapped = torch.cat([values[20:], values[:20]])
    assert whole != tensor_digest(in_memory({"w": swapped}), "w")


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_state_dicts_open_with_weights_only(tmp_path, zoo, sharded):
    state = zoo.base_state
    if sharded:
        names = list(state)
        parts = {"pytorch_model-00001-of-00002.bin": names[:4], "pytorch_model-00002-of-00002.bin": names[4:]}
        for file, part in parts.items():
            torch.save({name: state[name] for name in part}, tmp_path / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    opened = Checkpoint.open(tmp_path)
    assert all(torch.equal(opened.read(name), state[name]) for name in state)
    assert opened.content_hash() == Checkpoint.open(zoo.base).content_hash()


def test_tied_storage_in_a_pickle_is_one_tensor(tmp_path):
    table = torch.randn(5, 3)
    torch.save({"embed.weight": table, "head.weight": table, "other": torch.zeros(2)}, tmp_path / "m.bin")
    assert Checkpoint.open(tmp_path / "m.bin").aliases == {"head.weight": "embed.weight"}


def test_a_head_stored_beside_its_table_is_tied_when_the_config_says_so(tmp_path):
    state = {"model.embed_tokens.weight": torch.randn(5, 3), "lm_head.weight": torch.zeros(5, 3)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    assert Checkpoint.open(tmp_path).aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    assert Checkpoint.open(tmp_path).aliases == {}


def test_a_pickle_that_would_run_code_is_refused_as_such(tmp_path):
    class Payload:
        def __reduce__(self):
            return (eval, ("open('/tmp/taskvec-was-here', 'w')",))

    torch.save({"w": torch.zeros(2), "evil": Payload()}, tmp_path / "m.bin", pickle_module=pickle)
    with pytest.raises(UnsafeFileError, match="would execute code that the file names"):
        Checkpoint.open(tmp_path / "m.bin")
    assert not Path("/tmp/taskvec-was-here").exists()


def test_a_module_and_a_state_dict_open_too():
    module = torch.nn.Linear(3, 2)
    assert set(Checkpoint.open(module).infos) == {"weight", "bias"}
    assert set(Checkpoint.open(module.state_dict()).infos) == {"weight", "bias"}


def test_companions_are_what_stands_beside_the_weights(zoo):
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "merges.txt"):
        (zoo.base / name).write_text("{}")
    for name in ("modeling_evil.py", ".hidden.json", "taskvec.json", "optimizer.pt", "README.md"):
        (zoo.base / name).write_text("{}")
    found = {path.name for path in Checkpoint.open(zoo.base).companions}
    assert found == {"config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja", "merges.txt"}


def test_a_hub_id_opens_from_the_cache_without_a_network(tmp_path, zoo, monkeypatch):
    import huggingface_hub.constants

    snapshot = tmp_path / "hub" / "models--team--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for file in zoo.base.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    refs = tmp_path / "hub" / "models--team--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert Checkpoint.open("team/model").content_hash() == Checkpoint.open(zoo.base).content_hash()
    with pytest.raises(NotFoundError, match="not in the local cache"):
        Checkpoint.open("team/other")


# -- what is refused ------------------------------------------------------------------------------------------------------


def test_a_wrong_path_says_that_there_is_no_such_file():
    with pytest.raises(NotFoundError, match="/no/such/model: no such file or folder"):
        Checkpoint.open("/no/such/model")


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(NotAModelError, match="the folder is empty"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_weights_names_what_it_holds(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(NotAModelError, match=r"model\.gguf, a format that is not read here"):
        Checkpoint.open(tmp_path)


def test_a_text_file_is_not_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(NotAModelError, match=r"not a \.safetensors file"):
        Checkpoint.open(tmp_path / "notes.txt")


def test_an_adapter_folder_is_not_a_whole_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(NotAModelError, match="PEFT adapter, not a whole model"):
        Checkpoint.open(tmp_path)


def test_several_weight_files_without_an_index_are_not_guessed(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(NotAModelError, match="no index that says which belong together"):
        Checkpoint.open(tmp_path)


def test_a_stale_single_file_beside_an_index_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(SourceError, match="from two different saves"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"\xff\xfe", b"", "not JSON"),
        (b"[1, 2]", b"", "not a JSON object"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"\0" * 12, "'a' and 'b' overlap"),
        ({"a": entry(0, 8, [2])}, b"\0" * 4, "lie outside the file's 4 bytes"),
        ({"a": entry(0, 8, [3])}, b"\0" * 8, "expected 12"),
        ({"a": entry(0, 8, [2])}, b"\0" * 12, "4 bytes after the last tensor"),
        ({"a": entry(4, 12, [2])}, b"\0" * 12, "4 bytes before tensor 'a'"),
        ({"a": entry(8, 0, [2])}, b"\0" * 8, "lie outside"),
        ({"a": entry(0, 8, [-2])}, b"\0" * 8, "none negative"),
        ({"a": entry(0, 8, [2], "F3")}, b"\0" * 8, "dtype 'F3'"),
        ({"a": {"dtype": "F32"}}, b"", "without dtype, shape and two data_offsets"),
        ({"__metadata__": {"a": 1}}, b"", "must map texts to texts"),
        (b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
         b"", "names a more than once"),
        ({}, b"", "holds no tensors"),
        ({"a": entry(0, 8, [2], ["F32"])}, b"\0" * 8, "dtype \\['F32'\\]"),
        ({"a": entry(0, 0, [0, 1 << 63])}, b"", "no tensor has the shape"),
        (b'{"a": {"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', b"", "not JSON"),
        (b"[" * 200_000, b"", "not JSON"),
        (b'{"\\ud800": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b"", "the name is no text"),
    ],
)  # fmt: skip
def test_a_broken_header_is_named_with_its_file(tmp_path, header, data, words):
    path = raw_file(tmp_path / "m.safetensors", header, data)
    with pytest.raises(SourceError, match=words) as error:
        Checkpoint.open(path)
    assert "m.safetensors" in str(error.value)


def test_a_header_longer_than_the_file_is_a_truncated_file(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(CorruptFileError, match=r"m\.safetensors: the header says it is 1099511627776 bytes long"):
        Checkpoint.open(tmp_path / "m.safetensors")


def test_a_truncated_file_is_named(zoo):
    file = zoo.base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match=r"base/model\.safetensors.*truncated"):
        Checkpoint.open(zoo.base)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UnsafeFileError, match="lies outside the model's folder"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_and_an_index_that_disagrees_are_named(tmp_path, zoo):
    write(Checkpoint.open(zoo.base), tmp_path / "m", shard_size=4000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["model.norm.weight"], kept = (
        sorted(set(found["weight_map"].values()))[0],
        found["weight_map"]["model.norm.weight"],
    )
    found["weight_map"]["ghost"] = kept
    index.write_text(json.dumps(found))
    with pytest.raises(CorruptFileError, match="disagree on 2 tensors: ghost"):
        Checkpoint.open(tmp_path / "m")
    (tmp_path / "m" / kept).unlink()
    with pytest.raises(CorruptFileError, match="not there"):
        Checkpoint.open(tmp_path / "m")


def test_an_index_that_is_not_one_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weights": {}}')
    with pytest.raises(CorruptFileError, match="not an index with a `weight_map`"):
        Checkpoint.open(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(zoo):
    opened = Checkpoint.open(zoo.base)
    file = zoo.base / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size // 2)
    with pytest.raises(ChangedFileError, match="became shorter"):
        [opened.read(name) for name in opened.infos]
    with pytest.raises(ChangedFileError, match="was written to"):
        opened.check_unchanged()


def test_copies_and_pickles_read_on_after_the_others_are_gone(zoo):
    vector = TaskVector.between(Checkpoint.open(zoo.base), Checkpoint.open(zoo.tuned[0]))
    expected = vector.read("lm_head.weight")
    copies = [copy.deepcopy(vector), pickle.loads(pickle.dumps(vector)), copy.copy(vector)]
    while copies:
        assert torch.equal(copies.pop().read("lm_head.weight"), expected)
        gc.collect()
    assert torch.equal(vector.read("lm_head.weight"), expected)


def test_an_unknown_tensor_names_the_nearest(zoo):
    with pytest.raises(MissingTensorError, match=r"Did you mean 'model\.norm\.weight'"):
        Checkpoint.open(zoo.base).read("model.norn.weight")


def test_a_revision_of_a_local_path_is_refused(zoo):
    with pytest.raises(SourceError, match="`revision` is for hub ids"):
        Checkpoint.open(zoo.base, revision="main")


def test_an_old_or_broken_pickle_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFileError, match="before torch"):
        Checkpoint.open(tmp_path / "old.pt")
    torch.save({"w": torch.zeros(1), "epoch": 3}, tmp_path / "mixed.pt")
    with pytest.raises(NotAModelError, match="epoch are not tensors"):
        Checkpoint.open(tmp_path / "mixed.pt")
