"""A corpus that is read once, the layer in which neurons are missed least, and edits measured one at a time."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from merging.edits import Corpus, JetPack, Request, Site, check, edit_in_place, edit_widen
from merging.edits.edit import Edit
from merging.edits.optimise import Optimisation, removal_effects, removal_effects_at
from merging.edits.report import _continued
from merging.edits.stealth import Background, least_missed_layer, middle_layers

REQUESTS = [Request((11, 12, 13, 14), (7,)), Request((15, 12, 19, 14), (8, 9)), Request((11, 12, 13, 24), (5,))]
FEW = Optimisation(steps=40)


@pytest.fixture
def deep():
    """Nine layers, so that several are candidates."""
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=9,
        num_attention_heads=4,
        vocab_size=69,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


@pytest.mark.parametrize("make", [edit_in_place, edit_widen])
def test_edits_do_not_depend_on_whether_the_corpus_was_read_before(make, llama, corpus):
    shared = Corpus.of(None, corpus)
    once = make(llama, REQUESTS, layer=1, corpus=corpus, optimisation=FEW)
    for given in (shared, shared):
        again = make(llama, REQUESTS, layer=1, corpus=given, optimisation=FEW)
        for one, other in zip(once, again, strict=True):
            assert [p.place() for p in one.patches] == [p.place() for p in other.patches]
            assert all(torch.equal(p.new, q.new) for p, q in zip(one.patches, other.patches, strict=True))
    pack = JetPack.fit(llama, REQUESTS, layer=1, corpus=shared, optimisation=FEW)
    assert torch.equal(pack.centroid, JetPack.fit(llama, REQUESTS, layer=1, corpus=corpus, optimisation=FEW).centroid)


def test_what_a_corpus_remembers_is_of_one_layer_of_one_set_of_weights(llama, corpus):
    shared = Corpus.of(None, corpus)
    site = Site.find(llama, 1)
    first = Background.of(site, shared)
    (effects,) = shared.removal_effects([site])
    assert Background.of(site, shared) is first
    assert shared.removal_effects([site])[0] is effects
    assert torch.equal(first.features, Background.of(site, corpus).features)
    assert not torch.equal(Background.of(Site.find(llama, 2), shared).features, first.features)
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[3] += 1
    assert not torch.equal(Background.of(site, shared).features, first.features)
    assert not torch.equal(shared.removal_effects([site])[0], effects)


def test_the_effects_of_several_layers_are_those_of_each(deep, corpus):
    sites = [Site.find(deep, layer) for layer in (6, 3, 4)]
    for site, together in zip(sites, removal_effects_at(sites, corpus[:6]), strict=True):
        torch.testing.assert_close(together, removal_effects(site, corpus[:6]), rtol=1e-4, atol=0)


def test_effects_are_found_where_a_layer_adds_to_its_mlps_output_in_place(tiny, corpus):
    model = tiny("falcon")
    edit = edit_in_place(model, REQUESTS[0], layer=1, corpus=corpus, optimisation=FEW)
    assert isinstance(edit, Edit)
    assert check(model, [edit]).success == 1


def test_in_place_takes_the_middle_layer_whose_neurons_are_missed_least(deep, corpus):
    assert middle_layers(9) == [3, 4, 5, 6, 7]
    assert (middle_layers(1), middle_layers(2), middle_layers(3), middle_layers(30)) == (
        [0],
        [1],
        [1],
        [*range(10, 27)],
    )
    with torch.no_grad():
        deep.model.layers[6].mlp.down_proj.weight[:, 17] = 0
        # too early: not a candidate, whatever is missed there
        deep.model.layers[1].mlp.down_proj.weight[:, :40] = 0
    assert least_missed_layer(deep, corpus, 1)[0] == 6
    edit = edit_in_place(deep, REQUESTS[0], corpus=corpus, optimisation=FEW)
    assert isinstance(edit, Edit)
    assert (edit.layer, edit.neurons) == (6, (17,))
    assert any("least missed neurons are worth the least" in reason for reason in edit.measured["why"])
    # whoever says how neurons are chosen gets the layer of the metric
    named = edit_in_place(deep, REQUESTS[0], corpus=corpus, neuron="quietest", optimisation=FEW)
    assert isinstance(named, Edit)
    assert not any("least missed" in reason for reason in named.measured["why"])


def test_edits_measured_one_at_a_time_change_what_check_says_they_change(llama, corpus, prompts):
    from examples.edits.single import one_by_one

    facts = [(request.prompt, request.target) for request in REQUESTS]
    continuations = _continued(llama, [tuple(p) for p in prompts], 4, 16)
    row = one_by_one(llama, None, facts, 1, corpus, prompts, continuations, corpus[:4], 8)
    shared = Corpus.of(None, corpus)
    assert row["success"] == 1
    for fact, each in zip(facts, row["each"], strict=True):
        edit = edit_in_place(llama, Request(*fact), layer=1, corpus=shared, optimisation=Optimisation(batch=8))
        report = check(llama, [edit], prompts=prompts, text=corpus[:4], continuations=continuations)
        assert (each["changed"], each["neurons"]) == (report.changed, list(edit.neurons))
        assert each["nll_ratio"] == pytest.approx(report.nll_ratio, abs=1e-5)
        assert each["changed_next"] <= each["changed"]
