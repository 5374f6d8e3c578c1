"""The experiment of examples/edits on the real model, where it has been downloaded before; never from here."""

import pytest

from examples.edits.facts import FACTS, NEIGHBOURS, PARAPHRASES


def test_facts_and_neighbours_are_distinct_prompts():
    prompts = [prompt for prompt, _ in FACTS]
    assert len(set(prompts)) == len(prompts) >= 50
    assert len(set(NEIGHBOURS)) == len(NEIGHBOURS) == 100
    assert not set(NEIGHBOURS) & set(prompts)
    assert set(PARAPHRASES) <= set(prompts)


@pytest.mark.slow
def test_facts_of_a_real_model_are_corrected_and_nothing_else_changes():
    from examples.edits import smollm2
    from examples.real_zoo.data import PACKAGES, data_folder
    from merging.edits import JetPack, check

    cached = all((data_folder() / "downloads" / PACKAGES[key].file).is_file() for key in ("smollm2", "brown"))
    if not cached:
        pytest.skip("SmolLM2-135M and the Brown corpus are not in the data folder; run the example once")
    model, tokenizer = smollm2.load()
    facts = [FACTS[number] for number in (1, 12, 20, 31)]
    pack = JetPack.fit(model, facts, tokenizer, layer=17, corpus=smollm2.background(8))
    report = check(model, pack, tokenizer, prompts=NEIGHBOURS[::10], tokens=2)
    assert report.success == 1
    assert report.changed == 0
    assert report.largest_logit_change == 0.0
