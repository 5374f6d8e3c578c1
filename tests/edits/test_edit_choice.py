"""What the library chooses by itself: the form, the detector, the theta and the neuron, each with its reason."""

import json

import pytest
import torch
from click.testing import CliRunner

from merging.edits import JetPack, Request, check, edit_auto, edit_in_place, edit_widen, plan_edits
from merging.edits.edit import Edit
from merging.edits.features import Negatives, Sphere, affine_detector, contrast_detector
from merging.edits.optimise import Optimisation, removal_effects
from merging.edits.report import _continued
from merging.edits.site import Site
from merging.edits.stealth import feature_noise, rounding_noise, siblings

REQUESTS = [Request((11, 12, 13, 14), (7,)), Request((15, 12, 19, 14), (8, 9)), Request((11, 12, 13, 24), (5,))]
FEW = Optimisation(steps=40)


# -- siblings ----------------------------------------------------------------------------------------------------------


def test_siblings_have_the_shape_of_their_prompt_and_are_no_prompt_themselves(llama, corpus):
    prompts = [request.prompt for request in REQUESTS]
    made = siblings(llama, prompts, corpus[0], count=20)
    assert [len(own) for own in made] == [20, 20, 20]
    everyone = [sibling for own in made for sibling in own]
    assert len(set(everyone)) == 60
    assert not set(everyone) & set(prompts)
    for prompt, own in zip(prompts, made):
        for sibling in own:
            assert len(sibling) == len(prompt)
            assert sibling[0] == prompt[0]
            assert 1 <= sum(a != b for a, b in zip(sibling, prompt)) <= 2
    assert made == siblings(llama, prompts, corpus[0], count=20)


def test_replacements_come_from_close_embeddings_and_from_the_text(llama):
    with torch.no_grad():
        table = llama.get_input_embeddings().weight
        table[40] = 1.01 * table[12]
    (own,) = siblings(llama, [(11, 12)], [55], count=12)
    assert {sibling[1] for sibling in own} >= {40, 55} or (11, 55) in own


def test_a_prompt_of_one_token_has_siblings_too(llama):
    (own,) = siblings(llama, [(11,)], [], count=5)
    assert len(own) == 5
    assert all(len(sibling) == 1 and sibling != (11,) for sibling in own)


# -- detectors ---------------------------------------------------------------------------------------------------------


def shaped(seed: int = 0):
    """Other text around a mean, and prompts of one shape: a common part three times as long as what tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    width = 24
    sphere = Sphere(0.5 + torch.rand(width, generator=generator).double())
    text = torch.nn.functional.normalize(torch.randn(2000, width, generator=generator).double() * 0.3 + 1, dim=-1)
    shape = 3 * torch.nn.functional.normalize(torch.randn(width, generator=generator).double(), dim=-1)
    own = torch.randn(300, width, generator=generator).double()
    close = torch.nn.functional.normalize(shape + own / own.norm(dim=-1, keepdim=True), dim=-1)
    return sphere, sphere.lift(text), sphere.lift(close)


@pytest.mark.parametrize("biased", [True, False])
def test_a_contrast_detector_tells_its_prompt_from_others_of_the_same_shape_where_a_cone_does_not(biased):
    sphere, text, close = shaped()
    learned, unseen = close[1:201], close[201:]
    theta = 0.2
    cone = affine_detector(close[0], sphere, theta=theta)
    made = contrast_detector(close[0], text, sphere, theta=theta, siblings=learned, biased=biased)
    assert (made.bias is None) == (not biased)
    assert float(made(close[0])) == pytest.approx(50, rel=1e-6)
    assert float((cone(unseen) > 0).double().mean()) > 0.5
    assert float((made(unseen) > 0).double().mean()) < 0.05
    assert float((made(text) > 0).double().mean()) < 0.01


def test_a_contrast_detector_reaches_zero_theta_below_its_value_at_the_trigger():
    sphere, text, close = shaped(1)
    made = contrast_detector(close[0], text, sphere, theta=0.3, siblings=close[1:], biased=True)
    tau, point = sphere.project(close[0]), sphere.project(close[5])
    share = float((made(close[5]) / 50 - 1) * 0.3 + 1)
    # its value is affine along the segment between two points of the sphere
    middle = sphere.lift(0.5 * (tau + point))
    assert float((made(middle) / 50 - 1) * 0.3 + 1) == pytest.approx((1 + share) / 2, rel=1e-6)


def test_the_trigger_among_its_own_negatives_does_not_hold_its_response_down():
    sphere, text, close = shaped(2)
    with_it = Negatives(text, close, sphere).directions(close[0], close[10:60])
    without = Negatives(text, close[1:], sphere).directions(close[0], close[10:60])
    torch.testing.assert_close(with_it[0], without[0], rtol=0.02, atol=0.02)


def test_too_few_features_for_negatives_are_refused():
    from taskvec.errors import EditError

    with pytest.raises(EditError, match="Too few features"):
        Negatives(torch.randn(10, 24), torch.randn(5, 24), Sphere(torch.ones(24)))


def test_noise_is_never_taken_for_less_than_what_rounding_does(llama):
    for dtype, least in ((torch.float32, 0.5 * 2 * 2.0**-48), (torch.bfloat16, 0.5 * 2 * 2.0**-16)):
        site = Site.find(llama.to(dtype), 1)
        assert rounding_noise(site) == pytest.approx(least)
        assert feature_noise(site, [(11, 12, 13)]) >= least


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contrast_neurons_in_sixteen_bits_answer_in_a_padded_batch_too(dtype, tiny, corpus):
    model = tiny("llama").to(dtype)
    edits = edit_widen(model, REQUESTS, layer=1, corpus=corpus, detector="contrast", optimisation=FEW)
    assert {edit.kind for edit in edits} == {"contrast"}
    assert all(edit.measured["plateau"] for edit in edits)
    assert any("Theta" in reason and "rounds before it adds the bias" in reason for reason in edits[0].measured["why"])
    assert check(model, edits).success == 1


# -- neurons -----------------------------------------------------------------------------------------------------------


def test_the_least_missed_neuron_is_the_one_without_which_nothing_changes(gpt2, corpus, prompts):
    site = Site.find(gpt2, 1)
    with torch.no_grad():
        # neuron 17 says what no later layer can hear: nothing
        gpt2.transformer.h[1].mlp.c_proj.weight[17] = 0
    effects = removal_effects(site, corpus[:8])
    assert effects.shape == (site.neurons,)
    assert float(effects[17]) == 0.0
    assert float(effects.median()) > 0
    edit = edit_in_place(gpt2, REQUESTS[0], layer=1, corpus=corpus, optimisation=FEW)
    assert isinstance(edit, Edit)
    assert edit.neurons == (17,)
    report = check(gpt2, [edit], prompts=prompts, text=corpus[:4])
    assert report.success == 1
    assert report.largest_outside == 0.0
    assert report.changed == 0


def test_a_neuron_that_speaks_seldom_but_loudly_is_not_taken_for_unused(gpt2, corpus):
    site = Site.find(gpt2, 1)
    mlp = gpt2.transformer.h[1].mlp
    first = corpus[0][0]
    with site.reading() as seen, torch.no_grad():
        gpt2(torch.tensor([corpus[0]]))
    feature = seen[0].reshape(-1, 32)[0]
    made = affine_detector(feature, site.sphere, theta=0.005, response=1e4)
    with torch.no_grad():
        mlp.c_fc.weight[:, 23], mlp.c_fc.bias[23] = made.row.float(), float(made.bias)
        # the layers above hear nothing of it in their gradients: a constant shift, which LayerNorm takes out
        mlp.c_proj.weight[23] = 1.0
    effects = removal_effects(site, [ids for ids in corpus[:8] if ids[0] == first])
    assert float(effects[23]) == float("inf")


def test_the_effect_of_a_removal_grows_with_the_change_of_the_predictions(llama, corpus):
    """The estimate orders neurons as the measured divergence does."""
    site = Site.find(llama, 1)
    effects = removal_effects(site, corpus)
    table = torch.tensor(corpus)
    order = effects.argsort()
    column = llama.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        before = llama(table).logits.log_softmax(-1)
        measured = []
        for neuron in (int(order[0]), int(order[30]), int(order[60])):
            old = column[:, neuron].clone()
            column[:, neuron] = 0
            after = llama(table).logits.log_softmax(-1)
            column[:, neuron] = old
            measured.append(float((before.exp() * (before - after)).sum(-1).mean()))
    assert measured[0] < measured[1] < measured[2]


def test_an_edit_in_place_says_that_it_changes_others(llama, corpus, prompts):
    edit = edit_in_place(llama, REQUESTS[0], layer=1, corpus=corpus, optimisation=FEW)
    assert isinstance(edit, Edit)
    assert "did something" in edit.note
    report = check(llama, [edit], prompts=prompts)
    assert any("replaced" in note for note in report.notes)
    assert "replaced" in report.text()
    widened = edit_widen(llama, REQUESTS[:1], layer=1, corpus=corpus, optimisation=FEW)
    assert check(llama, widened, prompts=prompts).notes == ()


@pytest.mark.parametrize("neuron", ["quietest", "least-used", "least-missed", 5])
def test_each_way_to_name_a_neuron_works(neuron, llama, corpus):
    edit = edit_in_place(llama, REQUESTS[0], layer=1, corpus=corpus, neuron=neuron, optimisation=FEW)
    assert isinstance(edit, Edit)
    assert len(edit.neurons) == 1


def test_a_neuron_that_is_not_known_is_refused(llama, corpus):
    from taskvec.errors import EditError

    with pytest.raises(EditError, match=r"'least-mised' is not known\. Did you mean 'least-missed'"):
        edit_in_place(llama, REQUESTS[0], layer=1, corpus=corpus, neuron="least-mised", optimisation=FEW)


# -- the form ----------------------------------------------------------------------------------------------------------


def test_in_float32_neurons_are_chosen_and_the_record_says_why(llama, corpus, prompts):
    edits = edit_auto(llama, REQUESTS, corpus=corpus, layer=1, optimisation=FEW)
    assert isinstance(edits, list)
    assert {edit.form for edit in edits} == {"widen"}
    why = edits[0].measured["why"]
    assert why[0].startswith("Form 'widen'")
    assert any(reason.startswith("Theta 0.005") for reason in why)
    report = check(llama, edits, prompts=prompts)
    assert (report.success, report.changed, report.largest_logit_change) == (1.0, 0, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_sixteen_bits_the_form_is_chosen_by_trial_and_answers_batched_or_not(family, dtype, tiny, corpus, prompts):
    model = tiny(family).to(dtype)
    made = edit_auto(model, REQUESTS, corpus=corpus, layer=1, optimisation=FEW)
    why = made.why if isinstance(made, JetPack) else made[0].measured["why"]
    assert any("unseen siblings" in reason for reason in why)
    assert any(reason.startswith("Theta") for reason in why)
    # 16 sequences at a time are padded, one at a time are not
    for batch in (16, 1):
        report = check(model, made, prompts=prompts[:10], batch=batch)
        assert report.success == 1
        assert report.changed == 0


def test_without_any_bias_a_jet_pack_is_chosen_and_its_file_keeps_the_reasons(tiny, corpus, tmp_path):
    model = tiny("mistral")
    pack = edit_auto(model, REQUESTS[:1], corpus=corpus, layer=1, optimisation=FEW)
    assert isinstance(pack, JetPack)
    assert pack.why[0].startswith("Form 'jet-pack': these neurons have no bias")
    pack.save(tmp_path / "pack")
    assert JetPack.load(tmp_path / "pack").why == pack.why


def test_the_choice_of_a_layer_is_explained(llama, corpus):
    edits = edit_auto(llama, REQUESTS[:1], corpus=corpus, optimisation=FEW)
    assert isinstance(edits, list)
    assert edits[0].measured["why"][0].startswith(f"Layer {edits[0].layer} of 3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_names_what_the_edit_then_is(dtype, tiny, corpus):
    model = tiny("llama").to(dtype)
    plan = plan_edits(model, REQUESTS, corpus=corpus, layer=1, prompts=[(30, 31, 32)])
    made = edit_auto(model, REQUESTS, corpus=corpus, layer=1, optimisation=FEW)
    form, theta = ("jet-pack", made.theta) if isinstance(made, JetPack) else (made[0].form, made[0].theta)
    assert (plan.form, plan.theta) == (form, theta)
    assert plan.why[-1].startswith("In place would change other answers")
    assert plan.missed_in_place is not None
    assert plan.missed_in_place > 0
    assert "In place would change" in plan.text()
    assert plan.to_json()["theta"] == theta


def test_a_plan_needs_no_target_and_no_tokenizer_for_ids(tiny, corpus):
    plan = plan_edits(tiny("mixtral"), [((11, 12, 13), (1,))], corpus=corpus, layer=1)
    assert plan.form == "jet-pack"
    assert plan.missed_in_place is None


# -- checks ------------------------------------------------------------------------------------------------------------


def test_continuations_found_before_give_the_same_report(llama, corpus, prompts):
    edits = edit_in_place(llama, REQUESTS[:1], layer=1, corpus=corpus, optimisation=FEW)
    with torch.no_grad():
        known = _continued(llama, prompts, 8, 16)
    one = check(llama, edits, prompts=prompts).to_json()
    two = check(llama, edits, prompts=prompts, continuations=known).to_json()
    assert one | {"seconds": 0} == two | {"seconds": 0}


def test_wordings_that_an_edit_was_given_are_checked_with_it(llama, corpus):
    class Numbers:
        """A tokenizer of numbers."""

        eos_token_id, eos_token = 2, "2"

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [int(word) for word in text.split()]}

    request = Request("11 12 13 14", "7", paraphrases=("30 31 32", "33 34 35 36"))
    edits = edit_widen(llama, [request], Numbers(), layer=1, corpus=corpus, optimisation=FEW)
    report = check(llama, edits, Numbers())
    assert (report.paraphrases, report.paraphrase_success) == (2, 1.0)
    pack = JetPack.fit(llama, [request], Numbers(), layer=1, corpus=corpus, optimisation=FEW)
    report = check(llama, pack, Numbers())
    assert (report.paraphrases, report.paraphrase_success) == (2, 1.0)


def test_the_logit_change_outside_leaves_out_what_follows_a_firing(llama, corpus):
    edits = edit_widen(llama, REQUESTS[:1], layer=1, corpus=corpus, optimisation=FEW)
    # the prompt itself is among the others: its detector fires at the last token
    report = check(llama, edits, prompts=[REQUESTS[0].prompt, (30, 31, 32)])
    assert report.fired == 1
    assert report.largest_logit_change is not None
    assert report.largest_logit_change > 0
    assert report.largest_outside == 0.0


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_auto_command_writes_what_it_chose_and_says_why(dtype, tiny, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from merging.commands.edit import edit

    folder = tmp_path / "model"
    tiny("llama").to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(69)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0").save_pretrained(folder)
    (tmp_path / "edits.jsonl").write_text('{"prompt": "w11 w12 w13", "target": "w7"}\n')
    lines = [" ".join(f"w{3 + (7 * i + j * j) % 66}" for j in range(30)) for i in range(30)]
    (tmp_path / "corpus.txt").write_text("\n\n".join(lines))
    arguments = ["--edits", tmp_path / "edits.jsonl", "--layer", 1, "--corpus", tmp_path / "corpus.txt", "--json"]
    result = CliRunner().invoke(
        edit, [*map(str, ["auto", folder, tmp_path / "out", *arguments])], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "Form '" in result.stderr
    row = json.loads(result.stdout.strip().splitlines()[-1])["edits"][0]
    assert row["measured"]["success"]
    (tmp_path / "other.jsonl").write_text('{"prompt": "w11 w12 w13", "paraphrases": ["w30 w31", "w11 w12 w13"]}\n')
    arguments = ["check", folder, tmp_path / "out", "--paraphrases", tmp_path / "other.jsonl", "--json"]
    checked = CliRunner().invoke(edit, [*map(str, arguments)], catch_exceptions=False)
    report = json.loads(checked.stdout.strip().splitlines()[-1])
    assert report["success"] == 1
    assert (report["paraphrases"], report["paraphrase_success"]) == (2, 0.5)
