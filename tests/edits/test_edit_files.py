"""Edit files and edited checkpoints: streamed, composed, listed, undone bit by bit, loaded by plain transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from merging.edits import JetPack, Request, edit_in_place, edit_widen, load_edits, save_edits
from merging.edits.edit import Edit, EditedSource, apply_edits, record_of, undo_edits
from merging.edits.optimise import Optimisation, logits_of
from taskvec.checkpoint import Checkpoint
from taskvec.errors import BaseMismatchError, CorruptFileError, EditError, NotFoundError, OutputExistsError

REQUESTS = [Request((11, 12, 13, 14), (7,)), Request((15, 12, 19, 14), (8, 9)), Request((11, 12, 13, 24), (5,))]
FEW = Optimisation(steps=40)

LOADS = """
import sys, json, torch
sys.modules["merging"] = sys.modules["taskvec"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    answers = [int(model(input_ids=torch.tensor([p])).logits[0, -1].argmax()) for p in json.loads(sys.argv[2])]
print(json.dumps([type(model).__name__, answers]))
"""


@pytest.fixture
def saved(tmp_path, tiny):
    """A tiny model and its folder; the model in memory and the folder have one content hash."""

    def save(family: str = "llama", dtype: torch.dtype = torch.float32):
        model = tiny(family).to(dtype)
        folder = tmp_path / family
        model.save_pretrained(folder)
        return model, folder

    return save


def answers_in_a_fresh_process(folder: Path) -> tuple[str, list[int]]:
    prompts = json.dumps([list(request.prompt) for request in REQUESTS])
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(folder), prompts], capture_output=True, text=True, check=True
    )
    name, answers = json.loads(done.stdout.strip().splitlines()[-1])
    return name, answers


def bytes_of(folder: Path) -> dict[str, bytes]:
    source = Checkpoint.open(folder)
    return {name: source.read(name).contiguous().view(torch.uint8).numpy().tobytes() for name in source.infos}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_widened_checkpoint_loads_in_plain_transformers_without_this_package(saved, corpus, tmp_path, family):
    model, folder = saved(family)
    edits = edit_widen(model, REQUESTS, layer=1, corpus=corpus, optimisation=FEW)
    apply_edits(folder, edits, tmp_path / "edited")
    name, answers = answers_in_a_fresh_process(tmp_path / "edited")
    assert name == type(model).__name__
    assert answers == [request.target[0] for request in REQUESTS]


def test_a_folded_jet_pack_loads_in_plain_transformers_without_this_package(saved, corpus, tmp_path):
    model, folder = saved()
    pack = JetPack.fit(model, REQUESTS, layer=1, corpus=corpus, optimisation=FEW)
    apply_edits(folder, pack.fold(model), tmp_path / "folded")
    assert answers_in_a_fresh_process(tmp_path / "folded")[1] == [request.target[0] for request in REQUESTS]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undoing_on_disk_gives_back_every_byte(saved, corpus, tmp_path, family, dtype):
    model, folder = saved(family, dtype)
    for number, (make, count) in enumerate(((edit_widen, 3), (edit_in_place, 1))):
        edits = make(model, REQUESTS[:count], layer=1, corpus=corpus, optimisation=FEW)
        apply_edits(folder, edits, tmp_path / f"edited{number}")
        undo_edits(tmp_path / f"edited{number}", tmp_path / f"back{number}")
        assert bytes_of(tmp_path / f"back{number}") == bytes_of(folder)
        assert Checkpoint.open(tmp_path / f"back{number}").config == Checkpoint.open(folder).config
        assert record_of(tmp_path / f"back{number}") == []


def test_a_file_of_edits_keeps_everything(saved, corpus, tmp_path):
    model, _ = saved()
    edits = edit_widen(model, REQUESTS, layer=1, corpus=corpus, optimisation=FEW)
    save_edits(edits, tmp_path / "edits.safetensors")
    again = load_edits(tmp_path / "edits.safetensors")
    for one, other in zip(edits, again, strict=True):
        assert one.summary() == other.summary()
        assert one.widening == other.widening
        for mine, theirs in zip(one.patches, other.patches, strict=True):
            assert torch.equal(mine.old, theirs.old)
            assert torch.equal(mine.new, theirs.new)
    with pytest.raises(EditError, match="holds 3 edits, one was expected"):
        Edit.load(tmp_path / "edits.safetensors")


def test_edits_made_apart_in_place_compose_and_are_undone_one_by_one(saved, corpus, tmp_path):
    model, folder = saved()
    one = edit_in_place(model, REQUESTS[:1], layer=1, corpus=corpus, optimisation=FEW)
    two = edit_in_place(model, REQUESTS[2:], layer=2, corpus=corpus, optimisation=FEW)
    apply_edits(folder, one, tmp_path / "one")
    apply_edits(tmp_path / "one", two, tmp_path / "both")
    assert [edit.prompt for edit in record_of(tmp_path / "both")] == ["11 12 13 14", "11 12 13 24"]
    undo_edits(tmp_path / "both", tmp_path / "second", [0])
    apply_edits(folder, two, tmp_path / "expected")
    assert bytes_of(tmp_path / "second") == bytes_of(tmp_path / "expected")
    undo_edits(tmp_path / "second", tmp_path / "none", ["11 12 13 24"])
    assert bytes_of(tmp_path / "none") == bytes_of(folder)


def test_edits_made_on_top_of_each_other_are_undone_in_their_order(saved, corpus, tmp_path):
    model, folder = saved()
    first = edit_widen(model, REQUESTS[:1], layer=1, optimisation=FEW)
    apply_edits(folder, first, tmp_path / "one")
    edited_model = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    second = edit_widen(edited_model, REQUESTS[1:2], layer=1, optimisation=FEW)
    apply_edits(tmp_path / "one", second, tmp_path / "two")
    with pytest.raises(EditError, match="made on top of those to be undone"):
        undo_edits(tmp_path / "two", tmp_path / "bad", [0])
    undo_edits(tmp_path / "two", tmp_path / "back", [1])
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "one")
    undo_edits(tmp_path / "two", tmp_path / "clean")
    assert bytes_of(tmp_path / "clean") == bytes_of(folder)


def test_two_edits_of_one_neuron_conflict(saved, corpus, tmp_path):
    model, folder = saved()
    one = edit_in_place(model, REQUESTS[:1], layer=1, corpus=corpus, optimisation=FEW)
    two = edit_in_place(model, REQUESTS[2:], layer=1, corpus=corpus, optimisation=FEW)
    with pytest.raises(EditError, match=r"Conflict: model\.layers\.1\.mlp\.gate_proj\.weight\[\d+\] is replaced by"):
        apply_edits(folder, [*one, *two], tmp_path / "out")
    apply_edits(folder, one, tmp_path / "one")
    with pytest.raises(EditError, match="Conflict"):
        apply_edits(tmp_path / "one", two, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_edit_for_another_base_is_refused(saved, corpus, tmp_path, tiny):
    model, _ = saved()
    edits = edit_in_place(model, REQUESTS[:1], layer=1, corpus=corpus, optimisation=FEW)
    other = tiny("llama", seed=5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match=r"not the base of these edits \(content hash"):
        apply_edits(tmp_path / "other", edits, tmp_path / "out")
    with pytest.raises(BaseMismatchError, match="does not hold the original values"):
        EditedSource(Checkpoint.open(tmp_path / "other"), edits, verify=False).read(edits[0].patches[0].name)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    with pytest.raises(BaseMismatchError, match="calibrated for one dtype"):
        EditedSource(Checkpoint.open(tmp_path / "half"), edits, verify=False)


def test_a_checkpoint_that_was_changed_since_is_not_undone(saved, corpus, tmp_path):
    model, folder = saved()
    edits = edit_in_place(model, REQUESTS[:1], layer=1, corpus=corpus, optimisation=FEW)
    with pytest.raises(BaseMismatchError, match="does not hold the edited values"):
        undo_edits(folder, tmp_path / "out", edits=edits)
    assert not (tmp_path / "out").exists()


def test_an_edited_checkpoint_is_again_a_source(saved, corpus, tmp_path):
    model, folder = saved()
    edits = edit_in_place(model, REQUESTS[:1], layer=1, corpus=corpus, optimisation=FEW)
    apply_edits(folder, edits, tmp_path / "edited")
    streamed = EditedSource(Checkpoint.open(folder), edits)
    opened = Checkpoint.open(tmp_path / "edited")
    assert dict(opened.infos) == dict(streamed.infos)
    changed = {patch.name for patch in edits[0].patches}
    from taskvec import TaskVector

    difference = TaskVector.between(Checkpoint.open(folder), opened)
    for name in streamed.infos:
        assert torch.equal(streamed.read(name), opened.read(name))
        assert torch.equal(streamed.read_flat(name, 3, 29), opened.read(name).reshape(-1)[3:29])
        assert bool((difference.read(name) != 0).any()) == (name in changed)


def test_a_jet_pack_and_a_file_of_edits_are_told_from_other_files(tmp_path):
    with pytest.raises(NotFoundError, match="no such file"):
        load_edits(tmp_path / "nothing.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotFoundError, match="carries no edits"):
        load_edits(tmp_path / "folder")
    with pytest.raises(NotFoundError, match=r"not a jet-pack, jetpack\.safetensors is missing"):
        JetPack.load(tmp_path / "folder")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(EditError, match="not a file of edits"):
        load_edits(tmp_path / "other.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CorruptFileError, match="cannot be read as a file of edits"):
        load_edits(tmp_path / "bad.safetensors")


def test_an_edit_file_with_nan_is_refused(saved, corpus, tmp_path):
    model, _ = saved()
    edits = edit_in_place(model, REQUESTS[:1], layer=1, corpus=corpus, optimisation=FEW)
    file = tmp_path / "edits.safetensors"
    save_edits(edits, file)
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors["0.0.new"][0] = torch.nan
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(CorruptFileError, match="edit 0 would write NaN or infinity"):
        load_edits(file)


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def worded(saved):
    """A tiny model with a tokenizer of words: w3 … w68."""
    model, folder = saved()
    words = {f"w{i}": i for i in range(69)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0").save_pretrained(folder)
    return model, folder


def run(*arguments: object) -> dict[str, object]:
    from merging.commands.edit import edit

    result = CliRunner().invoke(edit, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_the_commands_make_list_apply_check_and_undo(worded, tmp_path):
    _, folder = worded
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": "w11 w12 w13", "target": "w7"}\n{"prompt": "w14 w15 w13", "target": "w8 w9"}\n')
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(" ".join(f"w{3 + (7 * i + j * j) % 66}" for j in range(30)) for i in range(30)))
    made = run("stealth", folder, tmp_path / "edited", "--edits", edits, "--layer", 1, "--corpus", corpus)
    assert [row["measured"]["success"] for row in made["edits"]] == [True, True]
    assert run("list", tmp_path / "edited")["edits"] == made["edits"]
    report = run("check", folder, tmp_path / "edited", "--text", corpus)
    assert report["success"] == 1
    run("undo", tmp_path / "edited", tmp_path / "one", "--edit", "w11 w12 w13")
    assert len(run("list", tmp_path / "one")["edits"]) == 1
    run("undo", tmp_path / "one", tmp_path / "none")
    assert bytes_of(tmp_path / "none") == bytes_of(folder)
    run("stealth", folder, tmp_path / "e.safetensors", "--edits", edits, "--layer", 1, "--corpus", corpus, "--form",
        "in-place", "--file-only")  # fmt: skip
    run("apply", folder, tmp_path / "e.safetensors", tmp_path / "again")
    edited_model = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert int(logits_of(edited_model, torch.tensor([[11, 12, 13]]))[0, -1].argmax()) == 7
    run("jetpack", folder, tmp_path / "pack", "--edits", edits, "--layer", 1, "--corpus", corpus)
    assert [row["target"] for row in run("list", tmp_path / "pack")["edits"]] == ["w7", "w8 w9"]
    assert run("check", folder, tmp_path / "pack", "--text", corpus)["success"] == 1
    planned = run("plan", folder, "--prompts", edits, "--corpus", corpus)
    assert planned["form"] == "widen"
    assert 0 <= planned["bound"] <= 1


def test_the_commands_edit_a_cast_of_the_model(worded, tmp_path):
    _, folder = worded
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": "w11 w12 w13", "target": "w7"}\n')
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(" ".join(f"w{3 + (7 * i + j * j) % 66}" for j in range(30)) for i in range(30)))
    made = run(
        "stealth", folder, tmp_path / "half", "--edits", edits, "--layer", 1, "--corpus", corpus, "--dtype", "bf16"
    )
    assert made["edits"][0]["measured"]["success"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half").eval()
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert int(logits_of(model, torch.tensor([[11, 12, 13]]))[0, -1].argmax()) == 7


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no edits"),
        ("nonsense\n", "line 1: not JSON"),
        ('{"prompt": "a"}\n', "line 1: 'target' is missing"),
        (
            '{"prompt": "a", "target": "b"}\n{"promt": "a", "target": "b"}\n',
            "line 2: 'promt': unknown key. Did you mean 'prompt'",
        ),
        ('{"prompt": "a", "target": 3}\n', "line 1: 'target' must be a text"),
        ("[1]\n", "line 1: not an object"),
    ],
)
def test_a_file_of_requests_with_a_mistake_names_the_line(tmp_path, lines, message):
    from merging.edits import read_requests
    from taskvec.errors import DataError

    file = tmp_path / "edits.jsonl"
    file.write_text(lines)
    with pytest.raises(DataError, match=message):
        read_requests(file)


def test_an_output_that_exists_is_not_replaced(worded, tmp_path):
    from merging.commands.edit import edit

    _, folder = worded
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": "w11 w12 w13", "target": "w7"}\n')
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="exists already"):
        CliRunner().invoke(
            edit, ["stealth", str(folder), str(tmp_path / "out"), "--edits", str(edits)], catch_exceptions=False
        )
