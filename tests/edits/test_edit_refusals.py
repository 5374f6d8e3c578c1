"""What cannot be edited, applied or checked is refused in words before anything is written: through the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from merging.commands import main
from merging.edits import JetPack, Request, apply_edits, check, edit_in_place, edit_widen
from merging.edits.optimise import Optimisation
from taskvec.errors import BaseMismatchError, DataError, EditError

FEW = Optimisation(steps=40)
GOOD = {"prompt": "w11 w12 w13", "target": "w7"}
WORDS = "\n\n".join(" ".join(f"w{3 + (7 * i + j * j) % 66}" for j in range(30)) for i in range(30))


@pytest.fixture
def folder(tmp_path, tiny) -> Callable[..., Path]:
    """A tiny model of a family with a tokenizer of words: w0 … w68."""

    def save(family: str = "llama", change: Callable[[Any], None] | None = None) -> Path:
        model = tiny(family)
        if change is not None:
            with torch.no_grad():
                change(model)
        where = tmp_path / f"{family}{'-changed' if change else ''}"
        model.save_pretrained(where)
        tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(69)}, unk_token="w0"))
        tokenizer.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0").save_pretrained(where)
        return where

    return save


@pytest.fixture
def say(tmp_path, capsys) -> Callable[..., tuple[int, str]]:
    """Runs a command as a shell would; the exit code and what it said. Requests are written to a file, text too."""

    def run(*words: Any, rows: Any = (GOOD,), text: str = WORDS) -> tuple[int, str]:
        (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "text.txt").write_text(text)
        names = {"EDITS": str(tmp_path / "edits.jsonl"), "TEXT": str(tmp_path / "text.txt")}
        capsys.readouterr()
        code = 0
        try:
            main([names.get(str(word), str(word)) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out + output.err

    return run


def making(verb: str, model: Path, out: Path) -> tuple[Any, ...]:
    return ("edit", verb, model, out, "--edits", "EDITS", "--layer", 1, "--corpus", "TEXT")


@pytest.mark.parametrize("verb", ["stealth", "jetpack", "auto"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "w5 " * 80, "target": "w7"},
            "80 tokens and 1 of the target are longer than the model's context of 64",
        ),
        ({"prompt": "w5", "target": ""}, "target: empty"),
        ({"prompt": "w5", "target": "  "}, "target: empty"),
        ({"prompt": "", "target": "w5"}, "prompt: empty"),
    ],
)
def test_a_prompt_or_target_that_does_not_fit_is_refused(folder, say, tmp_path, verb, row, message):
    code, words = say(*making(verb, folder(), tmp_path / "out"), rows=(row,))
    assert code == 1
    assert message in words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["stealth", "jetpack", "auto"])
def test_a_layer_that_is_not_there_is_refused(folder, say, tmp_path, verb):
    code, words = say(*making(verb, folder(), tmp_path / "out"), "--layer", 9)
    assert (code, "layer 9: the model has layers 0 to 2." in words) == (1, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("verb", "extra"),
    [("stealth", ()), ("stealth", ("--form", "in-place")), ("jetpack", ()), ("jetpack", ("--fold",)), ("auto", ())],
)
def test_an_answer_that_is_right_already_is_reported_and_nothing_is_written(folder, say, tmp_path, tiny, verb, extra):
    with torch.no_grad():
        present = int(tiny("llama")(input_ids=torch.tensor([[11, 12, 13]])).logits[0, -1].argmax())
    row = {"prompt": "w11 w12 w13", "target": f"w{present}"}
    code, words = say(*making(verb, folder(), tmp_path / "out"), *extra, rows=(row,))
    assert code == 0
    assert "gives this answer already" in words
    assert "Every answer is right already; nothing was written." in words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["olmo2", "mixtral"])
def test_a_model_without_a_neuron_that_can_be_a_detector_is_sent_to_the_jet_pack(folder, say, tmp_path, family):
    model = folder(family)
    code, words = say(*making("stealth", model, tmp_path / "out"))
    assert code == 1
    assert "Use a jet-pack." in words
    code, words = say(*making("jetpack", model, tmp_path / "pack"))
    assert code == 0, words


@pytest.mark.parametrize("neuron", ["quietest", "least-missed"])
@pytest.mark.parametrize("detector", ["auto", "surrogate", "contrast"])
def test_a_corpus_shorter_than_the_model_is_wide_cannot_stand_for_a_bias(folder, say, tmp_path, detector, neuron):
    # siblings of the prompt are more than enough to invert a matrix, and say nothing about text
    few = " ".join(f"w{i}" for i in range(3, 30))
    code, words = say(
        *making("stealth", folder(), tmp_path / "out"),
        "--form",
        "in-place",
        "--detector",
        detector,
        "--neuron",
        neuron,
        text=few,
    )
    assert code == 1
    assert "Too few features for a" in words
    assert "Give a longer corpus" in words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("verb", "extra"), [("stealth", ()), ("jetpack", ()), ("auto", ())])
def test_a_corpus_of_one_token_has_no_centre(folder, say, tmp_path, verb, extra):
    code, words = say(*making(verb, folder(), tmp_path / "out"), *extra, text="w3")
    assert code == 1
    assert "too few to find the centre of the features" in words


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(
    ("verb", "extra"), [("stealth", ()), ("stealth", ("--form", "in-place")), ("jetpack", ()), ("auto", ())]
)
def test_nan_below_or_above_the_edited_layer_is_named_and_not_blamed_on_the_optimiser(
    folder, say, tmp_path, verb, extra, layer
):
    def damage(model: Any) -> None:
        model.model.layers[layer].mlp.up_proj.weight[3, 3] = torch.nan

    code, words = say(*making(verb, folder(change=damage), tmp_path / "out"), *extra)
    assert code == 1
    assert "NaN" in words
    assert "damaged" in words
    assert "lower lr" not in words
    assert not (tmp_path / "out").exists()


def test_edits_of_another_base_are_neither_applied_nor_checked(folder, say, tmp_path):
    model = folder()
    other = folder(change=lambda m: m.model.layers[0].mlp.up_proj.weight[3, 3].add_(1))
    family = folder("gpt2")
    say(*making("stealth", model, tmp_path / "e.safetensors"), "--form", "in-place", "--file-only")
    say(*making("stealth", model, tmp_path / "wide"))
    say(*making("jetpack", model, tmp_path / "pack"))
    for base in (other, family):
        code, words = say("edit", "apply", base, tmp_path / "e.safetensors", tmp_path / "out")
        assert (code, "not the base of these edits" in words) == (1, True)
        for made in ("e.safetensors", "wide", "pack"):
            code, words = say("edit", "check", base, tmp_path / made, "--text", "TEXT")
            assert (code, "the edits were made from another base" in words) == (1, True)
    assert not (tmp_path / "out").exists()
    code, words = say("edit", "check", model, tmp_path / "wide", "--text", "TEXT")
    assert (code, "1 of 1" in words) == (0, True)


def test_a_jet_pack_is_told_from_edits_of_weights(folder, say, tmp_path):
    model = folder()
    say(*making("jetpack", model, tmp_path / "pack"))
    for words in (("apply", model, tmp_path / "pack", tmp_path / "out"), ("undo", tmp_path / "pack", tmp_path / "out")):
        code, said = say("edit", *words)
        assert (code, "a jet-pack, which changes no weights" in said) == (1, True)
    code, said = say("edit", "undo", model, tmp_path / "out")
    assert (code, "carries no edits" in said) == (1, True)


def test_an_edit_that_is_in_there_already_is_said_to_be(folder, say, tmp_path):
    say(*making("stealth", folder(), tmp_path / "edited"))
    code, words = say("edit", "apply", tmp_path / "edited", tmp_path / "edited", tmp_path / "twice")
    assert (code, "carries the edit for 'w11 w12 w13' already" in words) == (1, True)


def test_an_unknown_neuron_is_named_with_those_that_are_known(folder, say, tmp_path):
    code, words = say(*making("stealth", folder(), tmp_path / "out"), "--form", "in-place", "--neuron", "-3")
    assert code == 1
    assert "'-3' is not known. Known: auto" in words
    assert "An index is fine too." in words


def test_a_cast_model_is_another_base_unless_the_caller_knows_better(llama, corpus):
    edits = edit_widen(llama, [Request((11, 12, 13), (7,))], layer=1, corpus=corpus, optimisation=FEW)
    assert isinstance(edits, list)
    assert check(llama, edits).success == 1
    with torch.no_grad():
        llama.lm_head.weight[60] *= 1.0001
    with pytest.raises(BaseMismatchError, match="Give the model that was edited"):
        check(llama, edits)
    assert check(llama, edits, verify=False).success == 1


def test_apply_twice_from_python_is_refused_too(tmp_path, tiny, corpus):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    edit = edit_in_place(model, Request((11, 12, 13), (7,)), layer=1, corpus=corpus, optimisation=FEW)
    apply_edits(tmp_path / "base", [edit], tmp_path / "one")
    with pytest.raises(EditError, match="already"):
        apply_edits(tmp_path / "one", [edit], tmp_path / "two")
    with pytest.raises(EditError, match="holds no edits"):
        JetPack.fit(model, [Request((11, 12, 13), (greedy(model, (11, 12, 13)),))], layer=1, corpus=corpus).fold(model)


def greedy(model: Any, prompt: tuple[int, ...]) -> int:
    with torch.no_grad():
        return int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())


@pytest.mark.parametrize("verb", ["stealth", "jetpack", "auto"])
def test_a_dtype_that_no_model_runs_in_is_refused(folder, say, tmp_path, verb):
    code, words = say(*making(verb, folder(), tmp_path / "out"), "--dtype", "float8_e4m3fn")
    assert (code, "a model does not run in float8_e4m3fn" in words) == (1, True)


def test_a_fold_into_neurons_that_can_have_no_bias_says_to_keep_the_jet_pack(folder, say, tmp_path):
    code, words = say(*making("jetpack", folder("qwen3"), tmp_path / "out"), "--fold")
    assert (code, "keep the jet-pack beside the model" in words) == (1, True)
    assert not (tmp_path / "out").exists()


def test_edits_in_several_layers_are_checked_together(folder, say, tmp_path):
    model = folder()
    rows = [GOOD, {"prompt": "w21 w22 w23", "target": "w9"}]
    for layer, row in zip((1, 2), rows):
        code, words = say(
            *("edit", "stealth", model, tmp_path / f"{layer}.safetensors", "--edits", "EDITS", "--layer", layer),
            *("--corpus", "TEXT", "--form", "widen", "--file-only"),
            rows=(row,),
        )
        assert code == 0, words
    say("edit", "apply", model, tmp_path / "1.safetensors", tmp_path / "one")
    say("edit", "apply", tmp_path / "one", tmp_path / "2.safetensors", tmp_path / "both")
    (tmp_path / "others.txt").write_text("w30 w31\nw21 w22 w23\n")
    code, words = say(
        "edit", "check", model, tmp_path / "both", "--text", "TEXT", "--prompts", tmp_path / "others.txt", "--json"
    )
    assert code == 0, words
    report = json.loads(next(line for line in words.splitlines() if line.startswith("{")))
    assert len(report["edits"]) == 2
    assert report["success"] == 1
    # the detector of either layer is seen, and its own prompt continues differently
    assert report["fired"] >= 1
    assert "w21 w22 w23" in report["changed_prompts"]


def test_among_several_edits_the_one_that_does_not_fit_is_named(llama, corpus):

    with pytest.raises(EditError, match=r"edit 2 of 2, '3 4 5': target: empty"):
        edit_widen(llama, [((11, 12, 13), (7,)), ((3, 4, 5), ())], layer=1, corpus=corpus)


def test_a_line_that_is_no_json_is_named_and_says_what_a_line_is(tmp_path):
    from merging.edits import read_requests

    file = tmp_path / "edits.jsonl"
    file.write_text('{"prompt": "a", "target": "b"}\nw1 w2\n[1]\n')
    with pytest.raises(DataError, match=r"line 2: not JSON .*\n.*line 3: not an object. A line is"):
        read_requests(file)


def test_neurons_that_overflow_float16_on_other_text_are_refused_and_taken_out(tiny, corpus):
    model = tiny("llama").half()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(EditError, match="with more than float16 holds"):
        edit_in_place(
            model,
            [((11, 12, 13, 14), (7,)), ((25, 32, 19, 44), (8,))],
            layer=1,
            corpus=corpus,
            detector="surrogate",
            response=180,
            optimisation=FEW,
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
