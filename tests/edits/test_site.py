"""Sites are found from structure and numbers, in every family, or refused with a reason."""

import pytest
import torch
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from merging.edits.site import Site, evaluating
from taskvec.errors import EditError

KIND = {
    "gpt2": "affine",
    "gptj": "affine",
    "gpt_neox": "affine",
    "opt": "affine",
    "phi": "affine",
    "llama": "optional-bias",
    "mistral": "surrogate",
    "qwen2": "surrogate",
    "qwen3": "surrogate",
    "gemma": "surrogate",
    "gemma2": "surrogate",
    "gemma3_text": "surrogate",
    "phi3": "surrogate",
    "stablelm": "surrogate",
    "falcon": "surrogate",
    "nemotron": "surrogate",
    "mamba": "surrogate",
    "mixtral": "jet-pack",
    "olmo2": "jet-pack",
}
PLAIN = {"gpt2", "gptj", "gpt_neox", "opt", "phi", "falcon", "nemotron"}
PARALLEL = {"gptj", "phi", "falcon"}
POST_NORM = {"gemma2", "gemma3_text", "olmo2"}


@pytest.mark.parametrize("family", sorted(KIND))
def test_a_family_gets_the_detector_that_fits(family, tiny):
    site = Site.find(tiny(family), 1)
    assert site.kind == KIND[family], site.describe()
    assert site.width == 32
    assert site.parallel == (family in PARALLEL)
    assert (site.post_norm is not None) == (family in POST_NORM)
    if family != "mixtral":
        assert site.gated == (family not in PLAIN)
    assert f"layer 1: {'plain' if family in PLAIN or family == 'mixtral' else 'gated'}" in site.describe()


@pytest.mark.parametrize("family", sorted(set(KIND) - {"olmo2"}))
def test_features_lie_on_the_unit_sphere(family, tiny, ids):
    model = tiny(family)
    site = Site.find(model, 1)
    with evaluating(model), site.reading() as seen:
        model(input_ids=torch.tensor(ids(2, 9)), use_cache=False)
    points = site.sphere.double().project(seen[0].reshape(-1, 32).double())
    assert points.shape == (18, 32)
    # an untrained stream is short, so the norm's eps shows
    assert_close(points.norm(dim=-1), torch.ones(18).double(), rtol=0, atol=0.05)
    assert_close(site.sphere.double().lift(points), seen[0].reshape(-1, 32).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", sorted(set(KIND) - {"mixtral", "mamba"}))
def test_the_neurons_of_a_site_compute_what_the_model_computes(family, tiny, ids):
    model = tiny(family)
    site = Site.find(model, 1)
    assert site.inside is not None
    with evaluating(model), site.reading() as inputs, site.reading_neurons() as hidden:
        model(input_ids=torch.tensor(ids(2, 9)), use_cache=False)
    x = inputs[0].reshape(-1, 32)
    pre = x @ site.inside.weights().T
    if site.inside.biases() is not None:
        pre = pre + site.inside.biases()
    values = site.act(pre)
    if site.up is not None:
        second = x @ site.up.weights().T
        values = values * (second if site.up.biases() is None else second + site.up.biases())
    assert_close(values, hidden[0].reshape(values.shape), rtol=1e-4, atol=1e-6)


def test_gemma_multiplies_with_one_plus_its_weight(tiny):
    model = tiny("gemma")
    site = Site.find(model, 1)
    stored = model.model.layers[1].post_attention_layernorm.weight.detach()
    assert_close(site.sphere.scale, 1 + stored, rtol=0, atol=0)


def test_a_fused_projection_is_seen_as_two_halves(tiny):
    site = Site.find(tiny("phi3"), 1)
    assert site.inside is not None
    assert site.up is not None
    assert (site.inside.name, site.inside.offset) == ("model.layers.1.mlp.gate_up_proj", 0)
    assert (site.up.name, site.up.offset) == ("model.layers.1.mlp.gate_up_proj", 80)


def test_conv1d_is_read_in_its_own_orientation(tiny):
    model = tiny("gpt2")
    site = Site.find(model, -1)
    assert site.layer == 2
    assert site.inside is not None
    assert site.out is not None
    assert (site.inside.axis, site.out.axis) == (1, 0)
    assert site.inside.weights().shape == (128, 32)
    assert_close(site.out.weights(), model.transformer.h[2].mlp.c_proj.weight.detach(), rtol=0, atol=0)


def test_a_mixer_is_edited_in_its_gate(tiny):
    site = Site.find(tiny("mamba"), 1)
    assert site.gate_only
    assert site.inside is not None
    assert site.inside.offset == site.neurons == 64


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_recognised_too(family, dtype, tiny):
    assert Site.find(tiny(family).to(dtype), 1).kind == KIND[family]


def test_a_site_that_takes_no_neuron_says_why(tiny):
    with pytest.raises(
        EditError, match=r"layer 1: widening does not fit here: no norm stands before the MLP.*jet-pack"
    ):
        Site.find(tiny("olmo2"), 1).require_neurons("widening")
    with pytest.raises(EditError, match="routes each token to one of several experts"):
        Site.find(tiny("mixtral"), 1).require_neurons("an edit in place")


def test_a_layer_out_of_range_is_refused(tiny):
    with pytest.raises(EditError, match=r"layer 3: the model has layers 0 to 2"):
        Site.find(tiny("llama"), 3)


def test_an_encoder_with_a_decoder_is_refused():
    model = T5ForConditionalGeneration(
        T5Config(d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, vocab_size=VOCABULARY_T5)
    )
    with pytest.raises(EditError, match="several lists of layers"):
        Site.find(model, 0)


VOCABULARY_T5 = 40


def test_a_model_without_layers_is_refused():
    with pytest.raises(EditError, match="no list of layers"):
        Site.find(torch.nn.Sequential(torch.nn.Linear(4, 4)), 0)


def test_an_mlp_of_an_unknown_form_is_refused_with_what_was_seen(llama):
    class Odd(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, x):
            return self.down_proj(torch.sin(self.gate_proj(x)) + self.up_proj(x))

    llama.model.layers[1].mlp = Odd(llama.model.layers[1].mlp)
    site = Site.find(llama, 1)
    assert site.kind == "jet-pack"
    assert "neither act(in) nor act(gate) · up" in site.reason
