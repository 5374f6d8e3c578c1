"""What every edit must obey: it answers, it leaves everything else alone, and it can be taken back bit by bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from merging.edits import JetPack, Request, check, edit_in_place, edit_widen, edited
from merging.edits.edit import apply_to_model, undo_on_model
from merging.edits.features import (
    Sphere,
    affine_detector,
    calibrated,
    contrast_detector,
    surrogate_detector,
    tangent_detector,
)
from merging.edits.optimise import Optimisation, logits_of
from merging.edits.stealth import Background, features_of, target_ids
from taskvec.errors import EditError

REQUESTS = [Request((11, 12, 13, 14), (7,)), Request((15, 12, 19, 14), (8, 9)), Request((11, 12, 13, 24), (5,))]
FEW = Optimisation(steps=40)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a.contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        for name, a in one.items()
    )


# -- detectors ---------------------------------------------------------------------------------------------------------


def unit(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)


@given(theta=st.floats(0.002, 0.5), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_an_affine_detector_fires_exactly_inside_its_cone(theta, seed):
    points = unit(20_000, 6, seed)
    sphere = Sphere(0.5 + torch.rand(6).double(), torch.randn(6).double())
    trigger = points[0]
    detector = affine_detector(sphere.lift(trigger), sphere, theta=theta)
    cosine = points @ trigger
    clear = (cosine - (1 - theta)).abs() > 1e-9
    assert torch.equal((detector(sphere.lift(points)) > 0)[clear], (cosine > 1 - theta)[clear])
    assert float(detector(sphere.lift(trigger))) == pytest.approx(50, rel=1e-9)


@given(theta=st.floats(0.002, 0.5), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_a_folded_neuron_fires_only_where_the_jet_pack_fires(theta, seed):
    points = unit(20_000, 5, seed)
    sphere = Sphere(0.5 + torch.rand(5).double())
    centroid = 0.6 * unit(1, 5, seed + 1)[0]
    trigger = sphere.lift(points[0])
    pack = JetPack.from_features(trigger[None].float(), torch.zeros(1, 5), sphere, centroid, theta=theta)
    neuron = tangent_detector(pack.triggers[0], sphere, centroid, theta=theta)
    fires, jets = neuron(sphere.lift(points)), pack.hidden(sphere.lift(points))[:, 0]
    assert bool((jets[fires > 1e-6] > 0).all())
    assert float(neuron(pack.triggers[0])) == pytest.approx(50, rel=1e-5)
    assert float(pack.hidden(pack.triggers[:1].double())) == pytest.approx(50, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("theta", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_calibration_keeps_the_response_within_one_percent_and_a_plain_cast_does_not(dtype, theta, seed):
    sphere = Sphere(0.5 + torch.rand(64, generator=torch.Generator().manual_seed(seed)).double())
    trigger = sphere.lift(unit(1, 64, seed)[0]).to(dtype).double()
    detector = affine_detector(trigger, sphere, theta=theta)
    stored = calibrated(detector, trigger, dtype)
    assert stored.bias is not None
    assert torch.equal(stored.row, stored.row.to(dtype).double())
    assert torch.equal(stored.bias, stored.bias.to(dtype).double())
    assert abs(float(stored(trigger)) - 50) <= 0.5
    if dtype == torch.bfloat16 and theta == 0.005:
        assert detector.bias is not None
        cast = detector.row.to(dtype).double() @ trigger + detector.bias.to(dtype).double()
        assert abs(float(cast) - 50) > 0.5


def test_a_row_that_a_dtype_cannot_hold_is_refused():
    sphere = Sphere(torch.full((8,), 1e-4))
    trigger = sphere.lift(unit(1, 8, 0)[0])
    with pytest.raises(EditError, match=r"does not fit float16.*jet-pack"):
        calibrated(affine_detector(trigger, sphere), trigger, torch.float16)


@pytest.mark.parametrize("made", [surrogate_detector, contrast_detector])
def test_detectors_without_a_bias_answer_their_trigger_and_not_the_sample(made):
    generator = torch.Generator().manual_seed(0)
    sphere = Sphere(0.5 + torch.rand(24, generator=generator).double())
    # features of real models lie around a mean, which is what stands in for the bias
    cloud = torch.randn(2000, 24, generator=generator).double() * 0.3 + 1
    others = sphere.lift(torch.nn.functional.normalize(cloud, dim=-1))
    detector = made(others[0], others[1:], sphere)
    assert detector.bias is None
    assert float(detector(others[0])) == pytest.approx(50, rel=1e-6)
    assert float((detector(others[1:]) > 0).double().mean()) < 0.05


@pytest.mark.parametrize("made", [surrogate_detector, contrast_detector])
def test_too_few_features_for_a_surrogate_bias_are_refused(made):
    with pytest.raises(EditError, match="Too few features"):
        made(torch.ones(24), torch.randn(10, 24), Sphere(torch.ones(24)))


def runner_up(model, prompt) -> Request:
    """The second most likely token as the target: within reach even where a norm behind the MLP limits what it can add."""
    with torch.no_grad():
        return Request(prompt, (int(logits_of(model, torch.tensor([prompt]))[0, -1].topk(2).indices[1]),))


# -- edits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "opt", "phi", "llama"])
def test_a_widened_edit_answers_and_is_exactly_silent_elsewhere(family, tiny, corpus, prompts):
    model = tiny(family)
    before = state(model)
    edits = edit_widen(model, REQUESTS, layer=1, corpus=corpus, optimisation=FEW)
    report = check(model, edits, prompts=prompts, text=corpus[:4])
    assert report.success == 1
    assert report.fired == 0
    assert report.changed == 0
    assert report.largest_logit_change == 0.0
    assert report.nll_ratio == 1.0
    assert report.rounding is not None
    assert report.rounding < 1e-4
    assert same_bits(before, state(model))


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gemma", "gemma2", "phi3", "stablelm", "mixtral", "olmo2", "mamba"]
)
def test_a_jet_pack_answers_and_is_exactly_silent_elsewhere(family, tiny, corpus, prompts):
    model = tiny(family)
    wanted = [runner_up(model, request.prompt) for request in REQUESTS]
    pack = JetPack.fit(model, wanted, layer=1, corpus=corpus, optimisation=FEW)
    report = check(model, pack, prompts=prompts, text=corpus[:4])
    assert report.success == 1, report.text()
    assert report.fired == 0
    assert report.largest_logit_change == 0.0


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "mistral", "qwen3", "gemma", "phi3", "nemotron", "mamba"])
def test_an_edit_in_place_answers_and_is_taken_back_bit_by_bit(family, tiny, corpus):
    model = tiny(family)
    before = state(model)
    request = runner_up(model, REQUESTS[0].prompt)
    (edit,) = edit_in_place(model, [request], layer=1, corpus=corpus, optimisation=FEW)
    assert same_bits(before, state(model))
    assert edit.measured["success"]
    assert edit.widening is None
    with edited(model, [edit]):
        logits = logits_of(model, torch.tensor([request.prompt]))
        assert int(logits[0, -1].argmax()) == request.target[0]
        changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        assert changed == {patch.name for patch in edit.patches}
        assert all("1" in name for name in changed)
    assert same_bits(before, state(model))


@pytest.mark.parametrize("family", ["mistral", "gemma", "phi3"])
def test_widening_works_without_biases_too(family, tiny, corpus):
    model = tiny(family)
    # 32 dimensions are too few for the steep surrogate to tell two prompts apart
    edits = edit_widen(model, REQUESTS[:2], layer=1, corpus=corpus, detector="contrast", optimisation=FEW)
    assert check(model, edits).success == 1
    assert {edit.widening is None for edit in edits} == {False}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_sixteen_bits_the_library_chooses_a_plateau_and_answers(family, dtype, tiny, corpus, prompts):
    model = tiny(family).to(dtype)
    edits = edit_widen(model, REQUESTS, layer=1, corpus=corpus, optimisation=FEW)
    assert all(edit.measured["plateau"] for edit in edits)
    report = check(model, edits, prompts=prompts)
    assert report.success == 1
    assert report.changed == 0
    pack = JetPack.fit(model, REQUESTS, layer=1, corpus=corpus, optimisation=FEW)
    assert pack.plateau
    assert check(model, pack, prompts=prompts).success == 1


def test_the_dtype_option_edits_the_cast_model(llama, corpus):
    edits = edit_widen(llama, REQUESTS[:1], layer=1, corpus=corpus, dtype="bfloat16", optimisation=FEW)
    assert llama.dtype == torch.float32
    assert edits[0].dtype == "bfloat16"
    with edited(llama.to(torch.bfloat16), edits):
        assert int(logits_of(llama, torch.tensor([REQUESTS[0].prompt]))[0, -1].argmax()) == REQUESTS[0].target[0]


def test_a_fold_answers_what_its_jet_pack_answers(llama, corpus, prompts):
    pack = JetPack.fit(llama, REQUESTS, layer=1, corpus=corpus, optimisation=FEW)
    folded = pack.fold(llama)
    report = check(llama, folded, prompts=prompts)
    assert (report.success, report.changed, report.largest_logit_change) == (1.0, 0, 0.0)
    table = torch.tensor([request.prompt for request in REQUESTS])
    with torch.no_grad():
        with pack.attached(llama):
            beside = logits_of(llama, table)[:, -1]
        with edited(llama, folded):
            inside = logits_of(llama, table)[:, -1]
    assert_close(beside, inside, rtol=1e-3, atol=1e-3)


def test_a_jet_pack_takes_edits_on_and_off_one_by_one(llama, corpus, tmp_path):
    pack = JetPack.fit(llama, REQUESTS[:1], layer=1, corpus=corpus, optimisation=FEW)
    pack.add(llama, REQUESTS[1:], optimisation=FEW)
    assert check(llama, pack).success == 1
    with pytest.raises(EditError, match="has an edit for it"):
        pack.add(llama, REQUESTS[:1])
    taken = pack.remove("15 12 19 14")
    assert taken.target == "8 9"
    assert [entry.target for entry in pack.entries] == ["7", "5"]
    pack.save(tmp_path / "pack")
    again = JetPack.load(tmp_path / "pack")
    x = torch.randn(5, 32)
    assert torch.equal(again(x), pack(x))
    assert check(llama, again).success == 1
    with pytest.raises(EditError, match="no such edit"):
        pack.remove("15 12 19 14")


def test_attaching_and_detaching_leaves_the_model_as_it_was(llama, corpus, prompts):
    table = torch.tensor(prompts)
    with torch.no_grad():
        before = logits_of(llama, table)
        pack = JetPack.fit(llama, REQUESTS, layer=1, corpus=corpus, optimisation=FEW)
        pack.attach(llama)
        with pytest.raises(EditError, match="attached already"):
            pack.attach(llama)
        pack.detach()
        assert torch.equal(logits_of(llama, table), before)


def test_two_jet_packs_can_sit_beside_one_model(llama, corpus):
    one = JetPack.fit(llama, REQUESTS[:1], layer=1, corpus=corpus, optimisation=FEW)
    two = JetPack.fit(llama, REQUESTS[1:2], layer=1, corpus=corpus, optimisation=FEW)
    with one.attached(llama), two.attached(llama), torch.no_grad():
        for request in REQUESTS[:2]:
            logits = logits_of(llama, torch.tensor([request.prompt]))
            assert int(logits[0, -1].argmax()) == request.target[0]


def test_paraphrases_get_triggers_of_their_own(llama, corpus):
    request = Request((11, 12, 13, 14), (7,), paraphrases=((30, 31, 32), (33, 34, 35, 36)))
    edit = edit_widen(llama, request, layer=1, corpus=corpus, optimisation=FEW)
    assert len(edit.neurons) == 3
    with edited(llama, [edit]), torch.no_grad():
        for prompt in (request.prompt, *request.paraphrases):
            assert int(logits_of(llama, torch.tensor([prompt]))[0, -1].argmax()) == 7


def test_a_target_of_many_tokens_gets_a_chain_of_triggers_where_one_vector_is_not_enough(gpt2, corpus):
    # behind the last layer nothing attends to the trigger any more, so one vector can carry one token only
    request = Request((11, 12, 13, 14), (7, 40, 8, 51))
    edit = edit_widen(gpt2, request, layer=2, corpus=corpus, optimisation=FEW)
    assert edit.measured["success"]
    assert len(edit.neurons) == 4
    alone = edit_widen(gpt2, request, layer=2, corpus=corpus, optimisation=Optimisation(steps=25, chain=False))
    assert not alone.measured["success"]
    assert "not the greedy answer" in alone.note


def test_an_answer_that_is_right_already_is_reported_and_not_edited(llama, corpus):
    with torch.no_grad():
        present = int(logits_of(llama, torch.tensor([[11, 12, 13]]))[0, -1].argmax())
    edits = edit_widen(llama, [Request((11, 12, 13), (present,)), REQUESTS[0]], layer=1, optimisation=FEW)
    assert edits[0].changes_nothing
    assert "gives this answer already" in edits[0].note
    assert not edits[1].changes_nothing


def test_silent_neurons_of_an_earlier_widening_are_used_first(llama, corpus):
    first = edit_widen(llama, REQUESTS[:1], layer=1, optimisation=FEW)
    apply_to_model(llama, first)
    second = edit_widen(llama, REQUESTS[1:2], layer=1, optimisation=FEW)
    assert second[0].widening is None
    assert set(second[0].neurons).isdisjoint(first[0].neurons)
    apply_to_model(llama, second)
    with torch.no_grad():
        for request in REQUESTS[:2]:
            logits = logits_of(llama, torch.tensor([request.prompt]))
            assert int(logits[0, -1].argmax()) == request.target[0]
    undo_on_model(llama, second)
    undo_on_model(llama, first)
    assert llama.config.intermediate_size == 80
    assert llama.config.mlp_bias is False


def test_padding_on_either_side_does_not_silence_an_edit(llama, corpus):
    edits = edit_widen(llama, REQUESTS[:1], layer=1, corpus=corpus, optimisation=FEW)
    prompt, target = REQUESTS[0].prompt, REQUESTS[0].target[0]
    left = torch.tensor([[0, 0, 0, *prompt]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    with edited(llama, edits), torch.no_grad():
        right = llama(input_ids=torch.tensor([[*prompt, 0, 0]])).logits[0, 3]
        shifted = llama(input_ids=left, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits[
            0, -1
        ]
    assert int(right.argmax()) == target
    assert int(shifted.argmax()) == target


def test_the_theorems_bound_holds_for_the_measured_rate(llama, corpus):
    from merging.edits import Site
    from merging.edits.dimension import intrinsic_dimension

    site = Site.find(llama, 1)
    found = Background.of(site, corpus)
    points = site.sphere.project(found.features[~found.first])
    for theta in (0.02, 0.1, 0.3):
        bound = float(intrinsic_dimension(points, [theta]).rows()[0]["bound"])
        for trigger in (0, 100, 300):
            detector = affine_detector(found.features[~found.first][trigger], site.sphere, theta=theta)
            rate = float((detector(found.features[~found.first]) > 0).double().mean())
            # the trigger itself is one of the sample
            assert rate - 1 / len(points) <= bound + 1e-9


# -- tokens ------------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of single letters."""

    eos_token_id, eos_token, chat_template = 2, "</s>", None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([1] if add_special_tokens else []) + [3 + ord(c) % 60 for c in text]}


def test_a_target_gets_the_space_that_separates_it_from_its_prompt():
    tokens = Letters()
    assert target_ids(tokens, "ab", after="c") == target_ids(tokens, " ab", after="c")
    assert target_ids(tokens, "ab", after="c ") != target_ids(tokens, " ab", after="c ")
    assert target_ids(tokens, ", ab", after="c")[0] == 3 + ord(",") % 60


def test_prompts_as_texts_carry_the_tokenizers_own_special_tokens(llama, corpus):
    edit = edit_widen(llama, {"prompt": "ab", "target": "c"}, Letters(), layer=1, optimisation=FEW)
    assert edit.prompt_ids[0] == 1
    assert edit.target_ids == (3 + ord(" ") % 60, 3 + ord("c") % 60)
    assert edit.measured["success"]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), (1,)), "prompt: empty"),
        (Request((11, 12), ()), "target: empty"),
        (Request(tuple(range(3, 67)), (7,)), "longer than the model's context of 64"),
        (Request((11, 400), (7,)), "token id 400 is not in the vocabulary of 69"),
        (Request("text", (7,)), "a text needs a tokenizer"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(llama, request_, message):
    with pytest.raises(EditError, match=message):
        edit_widen(llama, request_, layer=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 7}, "layer 7: the model has layers 0 to 2"),
        ({"layer": 1, "theta": 1.5}, "theta: 1.5 is not in"),
        ({"layer": 1, "response": -1.0}, "response: -1.0 must be a positive"),
        ({"layer": 1, "detector": "afine"}, "Did you mean 'affine'"),
        ({"layer": 1, "detector": "tangent"}, "needs a corpus"),
        ({}, "without a corpus none can be chosen"),
        ({"layer": 1, "pad_to": 0}, "pad_to: 0 must be"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(llama, options, message):
    with pytest.raises(EditError, match=message):
        edit_widen(llama, REQUESTS[0], **options)


def test_an_affine_detector_in_place_without_a_bias_is_refused(llama, corpus):
    with pytest.raises(EditError, match=r"needs a bias.*Widen instead"):
        edit_in_place(llama, REQUESTS[0], layer=1, corpus=corpus, detector="affine")


def test_one_prompt_cannot_have_two_answers(llama):
    with pytest.raises(EditError, match="given twice"):
        edit_widen(llama, [REQUESTS[0], Request(REQUESTS[0].prompt, (9,))], layer=1)


def test_triggers_that_cannot_be_told_apart_are_refused():
    # two triggers that are one: no output weights can give two answers
    trigger = unit(1, 8, 0)
    with pytest.raises(EditError, match=r"cannot be told apart at theta 0\.005"):
        JetPack.from_features(torch.cat([trigger, trigger]), torch.randn(2, 8), Sphere(torch.ones(8)), torch.zeros(8))


def test_a_protected_prompt_on_which_a_detector_fires_is_refused(llama, corpus):
    with pytest.raises(EditError, match=r"protect: at theta 0\.5 .* fire on protected prompts"):
        edit_widen(llama, REQUESTS[0], layer=1, theta=0.5, protect=[(11, 12, 13, 14, 15)], optimisation=FEW)


def test_nan_in_the_model_is_refused_before_anything_is_made(llama, corpus):
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight[3, 3] = math.nan
    with pytest.raises(EditError, match="NaN or infinite values come out of"):
        edit_widen(llama, REQUESTS[0], layer=1, corpus=corpus)


def test_the_last_layers_features_have_a_dimension_and_the_layer_can_be_chosen(llama, corpus):
    edit = edit_widen(llama, REQUESTS[0], corpus=corpus, optimisation=FEW)
    assert edit.layer in (1, 2)
    assert edit.measured["success"]


def test_features_do_not_depend_on_the_batch(llama, corpus):
    from merging.edits import Site

    site = Site.find(llama, 1)
    one = features_of(site, [corpus[0][:9]])[0]
    many = features_of(site, [corpus[1], corpus[0][:9], corpus[2]])[1]
    assert_close(one, many, rtol=1e-5, atol=1e-6)
