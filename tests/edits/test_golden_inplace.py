"""Whole in-place edits against the authors' own runs (see goldens/stealth/README.md)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import merging.edits.stealth as stealth
from merging.edits.edit import Edit, edited
from merging.edits.features import Sphere, answers_cleanly
from merging.edits.optimise import logits_of
from merging.edits.stealth import Background, Request, edit_in_place

GOLDEN = Path(__file__).parents[1] / "goldens" / "stealth"


def golden_model(name: str) -> tuple[Any, dict[str, Tensor]]:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    if name == "inplace_gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=48, vocab_size=69, bos_token_id=0, eos_token_id=0)
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=80,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=69,
                tie_word_embeddings=False,
                rms_norm_eps=1e-6,
            )
        )
    weights = {k.removeprefix("model."): v for k, v in golden.items() if k.startswith("model.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected:
        weights = {k[len("model.") :]: v for k, v in golden.items() if k.startswith("model.model.")}
    assert not [m for m in missing if m != "lm_head.weight"], missing
    return model.eval(), golden


@pytest.mark.parametrize("name", ["inplace_gpt2", "inplace_llama"])
def test_a_whole_edit_is_the_authors_when_asked_for(name, monkeypatch):
    model, golden = golden_model(name)
    # their "other" features are given as features; here they come from a corpus, so that door is fed directly
    others = golden["other_features"]
    monkeypatch.setattr(
        Background, "of", classmethod(lambda cls, site, chunks: cls(others, torch.zeros(len(others), dtype=torch.bool)))
    )
    prompt, target = golden["prompt_ids"].tolist(), golden["target_ids"].tolist()
    with torch.no_grad():
        before = logits_of(model, golden["prompt_ids"][None])[0]
    assert_close(before, golden["out.logits_before"], rtol=1e-5, atol=1e-5)
    edit = edit_in_place(
        model,
        Request(prompt, target),
        layer=int(golden["layer"]),
        theta=float(golden["theta"]),
        response=float(golden["Delta"]),
        corpus=[prompt],
        compat="authors",
    )
    assert isinstance(edit, Edit)
    assert edit.neurons == (int(golden["out.target_neuron"]),)
    patches = {patch.name.split(".")[-2] + "." + patch.name.split(".")[-1]: patch for patch in edit.patches}
    row = patches["c_fc.weight" if name == "inplace_gpt2" else "gate_proj.weight"].new
    assert_close(row, golden["out.w"], rtol=1e-4, atol=1e-5 * float(golden["out.w"].abs().max()))
    if "out.b" in golden:
        assert_close(patches["c_fc.bias"].new, golden["out.b"][0], rtol=1e-5, atol=0)
    column = patches["c_proj.weight" if name == "inplace_gpt2" else "down_proj.weight"].new
    assert_close(column, golden["out.v"], rtol=1e-4, atol=1e-4 * float(golden["out.v"].abs().max()))
    trace = edit.measured["trace"]
    for key in ("nll_loss", "weight_decay", "avg_prob"):
        wanted = golden[f"out.{key}"]
        assert_close(torch.tensor(trace[key], dtype=torch.float64), wanted[: len(trace[key])], rtol=1e-4, atol=1e-5)
    with torch.no_grad(), edited(model, [edit]):
        after = logits_of(model, golden["prompt_ids"][None])[0]
    # the bias is about -1e4: one step of float32 moves the response at the trigger by 1e-3
    assert_close(after, golden["out.logits_after"], rtol=1e-4, atol=5e-5 * float(after.abs().max()))
    assert int(after[-1].argmax()) == int(golden["out.first_token"])


def test_the_authors_sphere_is_recovered_from_the_model():
    model, golden = golden_model("inplace_llama")
    site = stealth.Site.find(model, 1)
    assert_close(site.sphere.scale, golden["model.model.layers.1.post_attention_layernorm.weight"], rtol=0, atol=0)
    points = Sphere(site.sphere.scale).project(golden["other_features"])
    assert_close(points.norm(dim=1), torch.ones(len(points)), rtol=1e-3, atol=1e-3)
    detector = stealth.surrogate_detector(golden["out.feature"], golden["other_features"], site.sphere)
    clean = answers_cleanly(detector, golden["out.feature"], golden["other_features"], activation="silu")
    assert clean == bool(golden["out.good_gate"])
