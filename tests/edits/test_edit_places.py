"""What an edit command is given and where it writes: files of requests, inputs that stay as they are, damaged records."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertLMHeadModel, BertModel, PreTrainedTokenizerFast

from merging.commands import main
from merging.edits import JetPack, Request, edit_in_place, edit_widen, load_edits, read_requests, save_edits
from merging.edits.edit import apply_edits, undo_edits
from merging.edits.optimise import Optimisation
from taskvec.errors import CorruptFileError, DataError, EditError, OutputError

LINE = '{"prompt": "w11 w12 w13 w14", "target": "w7"}\n'
FEW = Optimisation(steps=5)


@pytest.fixture
def folder(tmp_path, llama) -> Path:
    place = tmp_path / "model"
    llama.save_pretrained(place)
    add_tokenizer(place)
    words = " ".join(f"w{i}" for i in range(4, 69))
    (tmp_path / "corpus.txt").write_text("\n\n".join(words.split(" ", k)[-1] for k in range(1, 20)))
    (tmp_path / "edits.jsonl").write_text(LINE)
    return place


def add_tokenizer(place: Path) -> None:
    vocabulary = {"<unk>": 0} | {f"w{i}": i for i in range(1, 69)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(place)


@pytest.fixture
def say(capsys, tmp_path) -> Callable[..., tuple[int, str]]:
    def command(*words: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
            raise SystemExit(0)
        written = capsys.readouterr()
        return int(stop.value.code or 0), written.out + written.err

    return command


def options(tmp_path: Path) -> list[object]:
    return ["--edits", tmp_path / "edits.jsonl", "--corpus", tmp_path / "corpus.txt", "--layer", 1, "--steps", 5]


def content(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(place.iterdir())}


# -- files of requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xff", "target": "b"}', r"line 2 is no text in UTF-8"),
        (b'{"prompt": "a", "target": "b", "paraphrases": 5}', r"line 2: 'paraphrases' must be a list of texts"),
        (b'{"prompt": "a", "target": "b", "paraphrases": null}', r"line 2: 'paraphrases' must be a list of texts"),
        (b'{"prompt": "a", "target": "b", "paraphrases": {"c": 1}}', r"line 2: 'paraphrases' must be a list of texts"),
        (b'{"prompt": "a", "target": "b", "paraphrases": [5]}', r"line 2: each of 'paraphrases' must be a text"),
        (b'{"prompt": "a", "target": "b", "prompt": "c"}', r"line 2: 'prompt' is given twice"),
        (b'{"prompt": "a \\ud800", "target": "b"}', r"line 2: 'prompt' holds half of a character"),
        (b"[" * 100_000, r"line 2: nested too deeply"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path, line, message):
    file = tmp_path / "edits.jsonl"
    file.write_bytes(LINE.encode() + line + b"\n")
    with pytest.raises(DataError, match=message):
        read_requests(file)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e"])
def test_only_a_line_feed_ends_a_line(tmp_path, separator):
    file = tmp_path / "edits.jsonl"
    file.write_text(json.dumps({"prompt": f"a{separator}b", "target": "c"}, ensure_ascii=False) + "\r\n" + LINE)
    first, second = read_requests(file)
    assert first.prompt == f"a{separator}b"
    assert second.target == "w7"


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    file = tmp_path / "edits.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + LINE.encode())
    assert read_requests(file) == [Request("w11 w12 w13 w14", "w7")]


@pytest.mark.parametrize("option", ["--corpus", "--protect", "--edits"])
def test_a_file_that_is_no_text_is_refused_by_name_and_line(folder, say, tmp_path, option):
    (tmp_path / "bad.txt").write_bytes(b"w1 w2\n\xff\xfe\n")
    code, words = say("edit", "stealth", folder, tmp_path / "out", *options(tmp_path), option, tmp_path / "bad.txt")
    assert code == 1, words
    assert "bad.txt: line 2 is no text in UTF-8" in words
    assert not (tmp_path / "out").exists()


# -- where it writes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb", [["stealth"], ["stealth", "--file-only"], ["jetpack"], ["jetpack", "--fold"], ["auto"]]
)
@pytest.mark.parametrize("place", ["model", "model/inside", "model/model.safetensors", "edits.jsonl", ""])
def test_no_input_is_ever_written_to(folder, say, tmp_path, verb, place):
    before = content(folder)
    out = tmp_path / place if place else ""
    code, words = say("edit", verb[0], folder, out, *options(tmp_path), *verb[1:], "--overwrite")
    assert code in (1, 2), words
    assert "input" in words if place else "OUT: empty" in words
    assert content(folder) == before
    assert (tmp_path / "edits.jsonl").read_text() == LINE


@pytest.mark.parametrize("verb", [["stealth"], ["jetpack"], ["auto"]])
def test_a_folder_of_other_things_is_not_replaced(folder, say, tmp_path, verb):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    code, words = say("edit", *verb, folder, tmp_path / "precious", *options(tmp_path), "--overwrite")
    assert code == 1
    assert "holds other things than a model" in words
    assert list(content(tmp_path / "precious")) == ["thesis.tex"]


def test_a_file_of_edits_takes_the_place_of_nothing_but_one(folder, say, tmp_path):
    (tmp_path / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    before = (tmp_path / "other.safetensors").read_bytes()
    words = (
        "edit",
        "stealth",
        folder,
        tmp_path / "other.safetensors",
        *options(tmp_path),
        "--file-only",
        "--overwrite",
    )
    code, said = say(*words)
    assert code == 1
    assert "is no file of edits; refusing to replace it" in said
    assert (tmp_path / "other.safetensors").read_bytes() == before
    made = tmp_path / "new" / "edits.safetensors"
    for _ in range(2):
        assert say("edit", "stealth", folder, made, *options(tmp_path), "--file-only", "--overwrite")[0] == 0
    assert len(load_edits(made)) == 1


def test_the_file_of_edits_is_an_input_of_apply_and_undo(folder, say, tmp_path, llama, corpus):
    made = edit_in_place(llama, Request((11, 12, 13, 14), (7,)), layer=1, corpus=corpus, optimisation=FEW)
    file = tmp_path / "edits.safetensors"
    save_edits([made], file)
    before = file.read_bytes()
    with pytest.raises(OutputError, match="one of the inputs"):
        apply_edits(folder, file, file, overwrite=True)
    apply_edits(folder, file, tmp_path / "edited")
    (tmp_path / "edited" / "edits.safetensors").unlink()
    with pytest.raises(OutputError, match="one of the inputs"):
        undo_edits(tmp_path / "edited", file, edits=file, overwrite=True)
    assert file.read_bytes() == before


def test_a_jet_pack_appears_whole_in_a_folder_of_its_own(tmp_path, monkeypatch, llama, corpus):
    pack = JetPack.fit(llama, [((11, 12, 13, 14), (7,))], layer=1, corpus=corpus, optimisation=FEW)
    pack.save(tmp_path / "pack")
    pack.save(tmp_path / "pack")  # its own folder is replaced
    before = content(tmp_path / "pack")
    llama.save_pretrained(tmp_path / "model")
    with pytest.raises(OutputError, match="exists already"):
        pack.save(tmp_path / "model")

    def full(path: Path, _: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("taskvec.writer.write_durably", full)
    with pytest.raises(OutputError, match="cannot be written .No space left"):
        pack.save(tmp_path / "pack")
    assert content(tmp_path / "pack") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pack"]


# -- options that do not go together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [("--neuron", 5), ("--compat", "authors")])
def test_what_only_an_edit_in_place_knows_is_not_ignored(folder, say, tmp_path, option):
    code, words = say("edit", "stealth", folder, tmp_path / "out", *options(tmp_path), "--form", "widen", *option)
    assert code == 2
    assert f"{option[0]}: goes with --form in-place" in words
    code, words = say("edit", "stealth", folder, tmp_path / "out", *options(tmp_path), *option, "--json")
    assert code == 0, words
    assert json.loads(next(x for x in words.splitlines() if x.startswith("{")))["edits"][0]["form"] == "in-place"


def test_a_superscript_is_no_index(folder, say, tmp_path):
    code, words = say("edit", "stealth", folder, tmp_path / "out", *options(tmp_path), "--neuron", "²")
    assert code == 1
    assert "neuron: '²' is not known" in words


def test_a_device_without_values_is_refused(folder, say, tmp_path):
    code, words = say("edit", "stealth", folder, tmp_path / "out", *options(tmp_path), "--device", "meta")
    assert code == 2
    assert "--device meta: a model does not run there (it holds no values)" in words


# -- models that are none ----------------------------------------------------------------------------------------------


def bert(head: bool) -> Any:
    torch.manual_seed(0)
    kind = BertLMHeadModel if head else BertModel
    return kind(
        BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80, vocab_size=69)
    )


@pytest.mark.parametrize("verb", ["stealth", "jetpack", "auto"])
def test_a_head_that_would_be_random_is_refused(folder, say, tmp_path, llama, verb):
    shutil.rmtree(folder)
    llama.model.save_pretrained(folder)
    add_tokenizer(folder)
    code, words = say("edit", verb, folder, tmp_path / "out", *options(tmp_path))
    assert code == 1
    assert "no causal language model: lm_head.weight of LlamaForCausalLM" in words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [edit_widen, JetPack.fit])
def test_an_encoder_read_as_a_language_model_is_refused(make, corpus):
    with pytest.raises(EditError, match="depends on the tokens behind it, so it is no causal language model"):
        make(bert(head=True).eval(), [((11, 12, 13), (7,))], layer=1, corpus=corpus)


@pytest.mark.parametrize("damage", ["cut", "no tokenizer", "other shapes"])
def test_a_damaged_model_is_refused_in_one_line(folder, say, tmp_path, damage):
    if damage == "cut":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        message = "The file is truncated"
    elif damage == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
        message = "no tokenizer that transformers can load"
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
        message = "transformers cannot load it as a causal model"
    code, words = say("edit", "stealth", folder, tmp_path / "out", *options(tmp_path))
    assert code == 1, words
    assert message in words
    assert "Traceback" not in words


# -- records from strangers --------------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path, llama, corpus) -> Path:
    place = tmp_path / "edits.safetensors"
    save_edits([edit_widen(llama, Request((11, 12, 13, 14), (7,)), layer=1, corpus=corpus, optimisation=FEW)], place)
    return place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["patches"][0].update(index=-1), "patch 0 lies at"),
        (lambda e: e["patches"][0].update(dim="0"), "patch 0 lies at"),
        (lambda e: e["patches"][0].update(index=1.5), "patch 0 lies at"),
        (lambda e: e.update(layer="x"), "layer is 'x'"),
        (lambda e: e.update(prompt=None), "prompt is None"),
        (lambda e: e.update(measured="x"), "measured is 'x'"),
        (lambda e: e.update(neurons=["a"]), "neurons is"),
        (lambda e: e["widening"].update(after=10), "a widening from 80 to 10 neurons"),
        (lambda e: e["widening"].update(out="{foo}"), "no tensor name with {} for the layer"),
        (lambda e: e["widening"].update(inside=["{}{0.__class__}"]), "no tensor name with {} for the layer"),
        (lambda e: e["widening"].update(config=None), "config is no object"),
        (lambda e: e.clear(), "'patches'"),
    ],
)
def test_every_value_of_a_record_is_looked_at(record, change, message):
    with safe_open(record, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    described = json.loads(metadata["edits"])
    change(described[0])
    save_file(tensors, record, metadata={**metadata, "edits": json.dumps(described)})
    with pytest.raises(CorruptFileError, match=f"edit 0 is incomplete or damaged .*{message}"):
        load_edits(record)


def test_a_record_of_a_later_version_is_refused(record):
    tensors = load_file(record)
    with safe_open(record, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, record, metadata={**metadata, "version": "2"})
    with pytest.raises(CorruptFileError, match="version '2' of the format; this program reads '1'"):
        load_edits(record)


def test_one_edit_named_twice_is_undone_once(folder, tmp_path, llama, corpus):
    made = edit_in_place(llama, Request((11, 12, 13, 14), (7,)), layer=1, corpus=corpus, optimisation=FEW)
    apply_edits(folder, [made], tmp_path / "edited")
    undo_edits(tmp_path / "edited", tmp_path / "back", [0, "11 12 13 14"])
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
