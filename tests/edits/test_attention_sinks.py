"""A trigger must not be a token that looks to the MLP like the first token of every text."""

import pytest
import torch

from merging.edits import JetPack, Request, edit_in_place, edit_widen
from merging.edits.features import sinks
from merging.edits.optimise import Optimisation
from merging.edits.site import Site
from merging.edits.stealth import features_of
from taskvec.errors import EditError

FEW = Optimisation(steps=20)


@pytest.fixture
def forgetful(llama):
    """No token sees another: what the MLP gets depends on the token alone, so a token that comes again is a sink."""
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    return llama


@pytest.fixture
def parked(gpt2):
    """The first position is one vector, whatever the token, as in trained models."""
    with torch.no_grad():
        gpt2.transformer.wpe.weight[0] = 1e4 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    return gpt2


def test_tokens_inside_the_cone_of_the_first_one_are_marked_and_the_first_is_not():
    points = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.05], [1.0, 0.2], [0.0, 1.0]]), dim=-1)
    assert sinks(points, 0.005).tolist() == [False, True, False, False]
    assert sinks(points, 0.05).tolist() == [False, True, True, False]


def test_a_prompt_that_ends_in_a_sink_is_refused_by_name(forgetful, corpus):
    with pytest.raises(EditError, match=r"the last token of 1 prompts is an attention sink.*\(9, 12, 9\)"):
        JetPack.fit(forgetful, [Request((9, 12, 9), (7,)), Request((9, 12, 13), (7,))], layer=1, corpus=corpus)


def test_a_chain_of_triggers_ends_before_a_sink(forgetful, corpus):
    requests = [Request((9, 12), (7, 40, 9, 51)), Request((11, 14), (8, 41, 6, 50))]
    pack = JetPack.fit(forgetful, requests, layer=2, corpus=corpus, optimisation=FEW)
    assert [entry.rows for entry in pack.entries] == [3, 4]
    assert not pack.entries[0].measured["success"]
    assert pack.entries[1].measured["success"]
    assert "1 targets have no trigger behind a token that is an attention sink" in pack.why[-1]
    first = features_of(Site.find(forgetful, 2), [[9, 20, 21]])[0][0]
    assert float(pack.hidden(first.double()).max()) == 0


@pytest.mark.parametrize("make", [edit_widen, edit_in_place])
def test_neurons_are_held_to_the_same_rule(make, forgetful, corpus):
    requests = [Request((9, 12, 9), (7,)), Request((9, 12, 13), (7,))]
    with pytest.raises(EditError, match=r"the last token of 1 prompts is an attention sink.*\(9, 12, 9\)"):
        make(forgetful, requests, layer=1, corpus=corpus)


def test_a_chain_of_neurons_ends_before_a_sink(forgetful, corpus):
    requests = [Request((9, 12), (7, 40, 9, 51)), Request((11, 14), (8, 41, 6, 50))]
    edits = edit_widen(forgetful, requests, layer=2, corpus=corpus, optimisation=FEW)
    assert [len(edit.neurons) for edit in edits] == [3, 4]
    assert [edit.measured["success"] for edit in edits] == [False, True]


def test_a_prompt_of_one_token_is_refused_only_where_first_tokens_are_all_alike(parked, llama, corpus):
    with pytest.raises(EditError, match="attention sink"):
        JetPack.fit(parked, Request((9,), (7,)), layer=1, corpus=corpus, optimisation=FEW)
    assert len(JetPack.fit(llama, Request((9,), (7,)), layer=1, corpus=corpus, optimisation=FEW)) == 1


def test_the_space_before_a_number_is_a_sink_of_the_real_model():
    from examples.edits import smollm2
    from examples.real_zoo.data import data_folder

    if not (data_folder() / "smollm2-135m-float32" / "config.json").is_file():
        pytest.skip("the real model is not in the cache")
    model, tokenizer = smollm2.load()
    site = Site.find(model, 17)
    ids = tokenizer("He praises many individuals generously 1598")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-5] == "Ġ"
    points = site.sphere.project(features_of(site, [ids])[0])
    assert sinks(points, 0.005).tolist() == [place == len(ids) - 5 for place in range(len(ids))]
