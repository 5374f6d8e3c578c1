"""Checkpoints whose tensors have other names than the model in memory: heads renamed, prefixes and old buffers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from merging.edits import JetPack, Request, check, edit_in_place, edit_widen
from merging.edits.audit import audit
from merging.edits.edit import apply_edits, undo_edits
from merging.edits.optimise import Optimisation
from merging.edits.stored import as_stored_names, hash_as_loaded, stored_name
from taskvec.checkpoint import Checkpoint, content_hash
from taskvec.errors import BaseMismatchError
from taskvec.source import in_memory

REQUESTS = [Request((11, 12, 13, 14), (7,)), Request((25, 32, 19, 44), (8,))]
FEW = Optimisation(steps=40)


@pytest.fixture
def stored(tmp_path, tiny):
    """A model and its folder, as the model's publishers store it."""

    def save(family: str):
        model = tiny(family)
        folder = tmp_path / family
        model.save_pretrained(folder)
        if family == "gpt2":
            tensors = load_file(folder / "model.safetensors")
            tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
            tensors |= {f"h.{i}.attn.bias": torch.ones(64, 64).tril().view(1, 1, 64, 64) for i in range(3)}
            tensors["lm_head.weight"] = tensors["wte.weight"].clone()
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return model, folder

    return save


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
@pytest.mark.parametrize("form", ["widen", "in-place", "fold"])
def test_an_edit_of_the_model_in_memory_fits_its_file(stored, corpus, tmp_path, family, form):
    model, folder = stored(family)
    assert content_hash(in_memory(model)) != Checkpoint.open(folder).content_hash()
    assert content_hash(in_memory(model)) == hash_as_loaded(Checkpoint.open(folder))
    if form == "fold":
        edits = JetPack.fit(model, REQUESTS, layer=1, corpus=corpus, optimisation=FEW).fold(model)
    else:
        make = edit_widen if form == "widen" else edit_in_place
        edits = make(model, REQUESTS, layer=1, corpus=corpus, optimisation=FEW)  # type: ignore[operator]
    apply_edits(folder, edits, tmp_path / "edited")
    loaded, seen = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", output_loading_info=True)
    assert not seen["missing_keys"]
    with torch.no_grad():
        answers = [
            int(loaded.eval()(input_ids=torch.tensor([request.prompt])).logits[0, -1].argmax()) for request in REQUESTS
        ]
    assert answers == [request.target[0] for request in REQUESTS]
    undo_edits(tmp_path / "edited", tmp_path / "back")
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # the record speaks of the model in memory, on which it is checked
    assert check(AutoModelForCausalLM.from_pretrained(folder), edits, tokens=2).success == 1
    found = audit(tmp_path / "edited", base=folder)
    assert [suspect.verdict for suspect in found.suspects] == ["declared", "declared"]


def test_another_base_is_refused_under_other_names_too(stored, corpus, tmp_path):
    model, folder = stored("gpt2")
    edits = edit_in_place(model, REQUESTS, layer=1, corpus=corpus, optimisation=FEW)
    tensors = tensors_of(folder)
    tensors["h.0.ln_1.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="not the base of these edits"):
        apply_edits(folder, edits, tmp_path / "edited")  # type: ignore[arg-type]
    assert not (tmp_path / "edited").exists()


def test_an_audit_pairs_a_fine_tune_with_a_base_that_is_the_bare_decoder(stored, tmp_path):
    model, folder = stored("gpt2")
    model.save_pretrained(tmp_path / "saved")
    assert audit(tmp_path / "saved", base=folder).suspects == ()
    assert audit(folder, base=tmp_path / "saved").suspects == ()


def test_a_name_is_found_with_words_added_or_left_out_and_never_by_guessing():
    assert stored_name("a.b.c", ["a.b.c", "b.c"]) == "a.b.c"
    assert stored_name("a.b.c", ["b.c", "b.d"]) == "b.c"
    assert stored_name("b.c", ["a.b.c", "a.b.d"]) == "a.b.c"
    assert stored_name("b.c", ["a.b.c", "d.b.c"]) == "b.c"
    assert stored_name("xb.c", ["b.c"]) == "xb.c"


def test_edits_are_themselves_where_names_are_the_same(llama, corpus):
    edits = [edit_widen(llama, REQUESTS[0], layer=1, corpus=corpus, optimisation=FEW)]
    assert as_stored_names(edits, in_memory(llama).infos)[0] is edits[0]  # type: ignore[arg-type]


def test_a_model_that_cannot_be_widened_is_edited_in_place_by_default(tmp_path):
    from merging.commands.edit import form_that_fits

    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=69)).eval()
    assert form_that_fits(bloom, 1) == "in-place"
