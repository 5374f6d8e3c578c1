"""Prompts that are nearly one to a layer: the cone becomes narrower, and what no cone separates is refused by name."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merging.edits import JetPack, Request, check, edit_auto, edit_widen, plan_edits
from merging.edits.features import Sphere
from merging.edits.optimise import Optimisation
from merging.edits.site import Site
from merging.edits.stealth import NARROWER, THETAS, Apart, Background, chosen_theta, features_of
from taskvec.errors import EditError

FEW = Optimisation(steps=40)
CLOSE = [Request((11, 12, 40), (7,)), Request((11, 12, 41), (8, 9)), Request((15, 22, 33), (5,))]


def alike(model, shift: float):
    """Token 41 becomes token 40, moved a little."""
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(3)
        table[41] = table[40] + shift * table[40].norm() * torch.nn.functional.normalize(
            torch.randn(table.shape[1], generator=generator), dim=0
        ).to(table)
    return model


def distance(model, layer: int, corpus) -> float:
    site = Site.find(model, layer)
    centroid = Background.of(site, corpus).centroid(site.sphere)
    found = features_of(site, [request.prompt for request in CLOSE[:2]])
    points = site.sphere.double().project(torch.stack([own[-1] for own in found]).double()) - centroid
    return float(1 - torch.nn.functional.cosine_similarity(points[0], points[1], dim=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_prompts_in_one_cone_get_a_narrower_one_and_both_their_answers(dtype, tiny, corpus, prompts):
    model = alike(tiny("llama"), 0.036).to(dtype)
    apart = distance(model, 1, corpus)
    assert 1e-3 < apart < 2.5e-3  # both on the plateau of the usual cone
    with pytest.raises(EditError, match=r"cannot be told apart at theta 0\.005 in layer 1: '11 12 40' and '11 12 41'"):
        JetPack.fit(model, CLOSE, layer=1, theta=0.005, corpus=corpus, optimisation=FEW)
    pack = JetPack.fit(model, CLOSE, layer=1, corpus=corpus, optimisation=FEW)
    assert pack.theta <= apart
    assert pack.cross_talk() == []
    assert any("would hold another trigger in a cone 1 times" in reason for reason in pack.why)
    made = edit_auto(model, CLOSE, layer=1, corpus=corpus, optimisation=FEW)
    # a neuron of bfloat16 needs a cone in which both prompts lie; one of float16 may be as narrow as the block's
    assert isinstance(made, JetPack) or dtype == torch.float16
    theta, why = (made.theta, made.why) if isinstance(made, JetPack) else (made[0].theta, made[0].measured["why"])
    assert theta <= apart
    assert any("would hold another trigger in a cone 1 times" in reason for reason in why)
    if dtype == torch.bfloat16:
        assert any("pairs of triggers in one cone: 1" in reason for reason in why)
    assert plan_edits(model, CLOSE, layer=1, corpus=corpus).theta == theta
    for edits in (pack, made):
        for batch in (16, 1):
            report = check(model, edits, prompts=prompts[:10], batch=batch)
            assert (report.success, report.changed) == (1.0, 0)


@pytest.mark.parametrize("form", ["widen", "jet-pack", "fold"])
def test_in_float32_too_no_cone_holds_another_trigger(form, tiny, corpus):
    model = alike(tiny("llama"), 0.036)
    if form == "widen":
        edits = edit_widen(model, CLOSE, layer=1, corpus=corpus, optimisation=FEW)
        theta = edits[0].theta
        assert any("would hold another trigger" in reason for reason in edits[0].measured["why"])
    else:
        pack = JetPack.fit(model, CLOSE, layer=1, corpus=corpus, optimisation=FEW, to_fold=form == "fold")
        theta = pack.theta
        edits = pack.fold(model) if form == "fold" else pack
    assert theta <= distance(model, 1, corpus)
    assert check(model, edits).success == 1


@pytest.mark.parametrize("make", [JetPack.fit, edit_widen, edit_auto])
def test_what_no_theta_separates_is_refused_by_name_and_nothing_else_is_named(make, tiny, corpus):
    model = alike(tiny("llama"), 0.0)
    with pytest.raises(EditError, match="cannot be told apart") as caught:
        make(model, CLOSE, layer=1, corpus=corpus, optimisation=FEW)
    words = str(caught.value)
    assert "'11 12 40' and '11 12 41'" in words
    assert "15 22 33" not in words
    assert "another layer" in words
    assert "leave one of each pair out" in words


def test_a_theta_that_is_given_is_taken(tiny, corpus):
    model = alike(tiny("llama"), 0.036)
    assert JetPack.fit(model, CLOSE, layer=1, theta=0.02, corpus=corpus, optimisation=FEW).theta == 0.02


@given(
    noise=st.floats(0, 1e-3),
    pairs=st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=6),
    others=st.lists(st.floats(1e-7, 1.0), max_size=300),
)
def test_theta_is_the_widest_that_separates_and_never_below_five_times_the_noise(noise, pairs, others):
    count = len(pairs) + 1
    triggers = torch.ones(count, count, dtype=torch.float64)
    triggers[0, 1:] = torch.tensor(pairs, dtype=torch.float64)
    siblings = torch.tensor(others, dtype=torch.float64)
    usual, theta = chosen_theta(noise), chosen_theta(noise, apart=Apart(triggers, siblings))
    assert theta in (*NARROWER, *THETAS)
    assert theta <= usual
    assert theta == usual or theta >= 5 * noise
    if theta < usual:
        above = [pair for pair in pairs if pair > 5 * noise]
        assert theta <= min(above, default=math.inf)
        assert int((siblings < theta).sum()) <= max(0.01 * len(others), int((siblings < 5 * noise).sum()))


def test_distances_are_those_of_the_cone():
    sphere = Sphere(torch.ones(2))
    features = 2**0.5 * torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    raw = Apart.of(sphere, features, features[:1], None)
    assert raw.pairs.tolist() == pytest.approx([0.4])
    assert raw.siblings.tolist() == pytest.approx([0.0], abs=1e-12)
    centred = Apart.of(sphere, features, features[:0], torch.tensor([0.6, 0.0], dtype=torch.float64))
    assert centred.pairs.tolist() == pytest.approx([1.0])
    assert centred.siblings.tolist() == []
