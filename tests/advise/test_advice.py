"""What is advised for which inputs: the survey of real files, and each rule."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merging.advise import Survey, advise, findings, kind_of, survey
from merging.method import methods
from taskvec.checkpoint import Checkpoint
from taskvec.errors import MismatchError, UsageError
from taskvec.source import in_memory


def seen(**changes):
    facts = {
        "kind": "encoder",
        "inputs": "full",
        "tasks": ("a", "b", "c"),
        "norms": (1.0, 1.1, 0.9),
        "base_norm": 50.0,
        "cosines": tuple(tuple(float(i == j) for j in range(3)) for i in range(3)),
        "conflict": 0.5,
        "chance": 0.75,
        "sum_norm": 1.7,
        "zero": 0.0,
    }
    return Survey(**{**facts, **changes})


def advised(survey, verdict):
    return [finding.method for finding in findings(survey) if finding.verdict == verdict]


def tensors(seed=0, spread=0.0, base=None):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.layers.0.w": (40, 50),
        "model.layers.1.w": (40, 50),
        "lm_head.weight": (30, 40),
        "norm.weight": (40,),
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return made if base is None else {name: base[name] + spread * value for name, value in made.items()}


def folder(path, values, architecture):
    path.mkdir()
    save_file(values, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "x"}))
    return str(path)


# -- the survey ---------------------------------------------------------------------------------------------------------


def test_the_survey_measures_norms_cosines_and_conflict(tmp_path):
    base = tensors()
    models = [tensors(i + 1, 0.01 * (i + 1), base) for i in range(3)]
    paths = [folder(tmp_path / f"m{i}", values, "LlamaForCausalLM") for i, values in enumerate(models)]
    found = survey(folder(tmp_path / "base", base, "LlamaForCausalLM"), paths)
    assert (found.kind, found.inputs, found.tasks) == ("causal LM", "full", tuple(paths))
    vectors = [torch.cat([(values[name] - base[name]).double().flatten() for name in base]) for values in models]
    for i, vector in enumerate(vectors):
        assert found.norms[i] == pytest.approx(float(vector.norm()), rel=1e-3)
        for j, other in enumerate(vectors):
            cosine = float(vector @ other / vector.norm() / other.norm())
            assert found.cosines[i][j] == pytest.approx(cosine, abs=1e-3)
    assert found.sum_norm == pytest.approx(float(sum(vectors).norm()), rel=1e-3)
    assert found.base_norm == pytest.approx(
        float(torch.cat([v.double().flatten() for v in base.values()]).norm()), rel=1e-3
    )
    assert found.chance == pytest.approx(0.75)  # three tasks changed every entry
    signs = torch.stack([vector.sign() for vector in vectors])
    assert found.conflict == pytest.approx(float((signs.amax(0) != signs.amin(0)).double().mean()), abs=1e-3)


def test_norms_of_a_sample_are_close_to_the_whole_models():
    base = {f"layers.{i}.w": torch.zeros(1000, 900) for i in range(3)}
    generator = torch.Generator().manual_seed(0)
    tuned = {name: torch.randn(1000, 900, generator=generator) * (i + 1) for i, name in enumerate(base)}
    found = survey(in_memory(base), [in_memory(tuned)])
    whole = math.sqrt(sum(float(value.double().square().sum()) for value in tuned.values()))
    assert found.norms[0] == pytest.approx(whole, rel=0.01)


def test_adapters_are_seen_as_lora(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    paths = []
    for i in range(2):
        torch.manual_seed(i)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
            tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
            tuned.save_pretrained(tmp_path / f"adapter{i}")
        paths.append(str(tmp_path / f"adapter{i}"))
    found = survey(str(tmp_path / "base"), paths)
    assert (found.kind, found.inputs) == ("causal LM", "LoRA")
    assert min(found.norms) > 0
    assert 0 < found.zero < 1
    assert "knots" in [finding.method for finding in advise(str(tmp_path / "base"), paths) if finding.verdict == "use"]


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("LlamaForCausalLM", "causal LM"),
        ("GPT2LMHeadModel", "causal LM"),
        ("T5ForConditionalGeneration", "sequence to sequence"),
        ("BertForSequenceClassification", "encoder"),
        ("CLIPModel", "encoder"),
    ],
)
def test_the_kind_comes_from_the_config(tmp_path, architecture, kind):
    assert kind_of(Checkpoint.open(folder(tmp_path / "m", tensors(), architecture))) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lm_head.weight", "causal LM"),
        ("encoder.layer.0.attention.w", "encoder"),
        ("vit.embeddings.patch_embeddings.w", "encoder"),
        ("mystery.weight", "unknown"),
    ],
)
def test_without_a_config_the_kind_comes_from_the_names(name, kind):
    assert kind_of(in_memory({name: torch.ones(2, 2)})) == kind


def test_models_that_do_not_fit_are_refused():
    base = tensors()
    with pytest.raises(MismatchError, match=r"model\.layers\.0\.w"):
        advise(in_memory(base), [in_memory({**base, "model.layers.0.w": torch.ones(3, 3)})])
    with pytest.raises(UsageError, match="name at least one model"):
        advise(in_memory(base), [])


# -- the rules ----------------------------------------------------------------------------------------------------------


def tried(survey):
    """Methods to try, in the order of their ranks."""
    ranked = [finding for finding in findings(survey) if finding.rank is not None]
    assert [finding.rank for finding in ranked] == list(range(1, len(ranked) + 1))
    return [finding.method for finding in ranked]


def of(survey, method, verdict="use"):
    (found,) = [one for one in findings(survey) if one.method == method and one.verdict == verdict]
    return found


def many(count):
    square = tuple(tuple(float(i == j) for j in range(count)) for i in range(count))
    return {"tasks": tuple("abcdefghijkl"[:count]), "norms": (1.0,) * count, "cosines": square, "sum_norm": count**0.5}


def test_language_models_get_what_was_measured_and_the_study_with_where_they_differ():
    survey = seen(kind="causal LM")
    assert tried(survey)[:3] == ["tsv_m", "regmean", "task_arithmetic"]
    measured, study = of(survey, "tsv_m"), of(survey, "task_arithmetic")
    assert measured.source.startswith("measured: examples/real_zoo")
    assert "disagrees" in measured.text
    assert study.recipe["postprocess"] == ["norm_match"]
    assert "2511.21437" in study.source
    assert "measured: examples/real_zoo" in study.source
    assert "behind TSV-M" in study.text
    assert "iso_c" in advised(survey, "avoid")
    assert any(one.verdict == "avoid" and "a scale of 1 on many" in one.text for one in findings(survey))


def test_with_more_language_models_than_were_measured_the_study_goes_first():
    assert tried(seen(kind="causal LM", **many(6)))[0] == "tsv_m"
    assert tried(seen(kind="causal LM", **many(7)))[:2] == ["task_arithmetic", "tsv_m"]


def test_fully_tuned_encoders_get_the_spectral_family():
    assert tried(seen())[:2] == ["tsv_m", "iso_cts"]
    assert advised(seen(), "use") == ["tsv_m", "iso_cts"]
    assert "was not seen there" in of(seen(), "iso_cts").text
    assert "regmean_pp" in advised(seen(), "consider")
    assert "87.2 without any data" in of(seen(), "regmean_pp", "consider").text


def test_adapters_get_methods_for_a_common_basis_whatever_the_model():
    assert advised(seen(kind="encoder", inputs="LoRA"), "use") == ["knots", "iso_c", "tsv_m"]
    assert advised(seen(kind="causal LM", inputs="LoRA"), "use") == ["tsv_m", "regmean_pp", "knots", "iso_c"]


def test_networks_of_convolutions_get_methods_by_entry():
    assert tried(seen(kind="unknown", kernels=0.9)) == ["pcb", "magnitude"]
    assert advised(seen(kind="unknown", kernels=0.9), "avoid") == ["tsv_m"]
    assert tried(seen(kind="unknown", kernels=0.1))[:2] == ["task_arithmetic", "ties"]
    base = {"conv.weight": torch.randn(8, 4, 3, 3), "head.weight": torch.randn(6, 6)}
    found = survey(in_memory(base), [in_memory({name: value + 0.1 for name, value in base.items()})])
    assert found.kernels == pytest.approx(288 / 324)


@pytest.mark.parametrize("facts", [{}, {"inputs": "LoRA"}, {"kernels": 0.9}, many(1), many(2), many(9)])
@pytest.mark.parametrize("kind", ["encoder", "causal LM", "sequence to sequence", "unknown"])
def test_every_recipe_that_is_advised_is_a_recipe(kind, facts):
    from merging.recipe import Recipe

    for one in findings(seen(kind=kind, **facts)):
        if "method" in one.recipe:
            recipe = Recipe.model_validate({"base": "base", "tasks": ["a", "b"], **one.recipe})
            assert recipe.method == one.recipe["method"]
            assert {*map(str, recipe.preprocess), *map(str, recipe.postprocess)} <= set(methods())


def test_what_is_to_be_tried_is_ranked_with_use_before_consider():
    for kind in ("encoder", "causal LM", "sequence to sequence", "unknown"):
        ranked = [one for one in findings(seen(kind=kind, sum_norm=4.0)) if one.rank is not None]
        verdicts = [one.verdict for one in ranked]
        assert verdicts == sorted(verdicts, key=("use", "consider").index)
        assert all(one.method for one in ranked)
        assert not any(one.rank for one in findings(seen(kind=kind)) if one.verdict in ("fact", "warning", "avoid"))


def test_figures_said_to_be_measured_are_those_of_the_page_of_results():
    """Each number of a rule of ours stands in the table of its zoo."""
    import re

    page = (Path(__file__).parents[2] / "examples/real_zoo/RESULTS.md").read_text("utf-8")
    numbers = set(re.findall(r"\d+\.\d+", page))
    for kind in ("encoder", "causal LM", "unknown"):
        for extra in ({}, {"inputs": "LoRA"}, {"kernels": 0.9}):
            for one in findings(seen(kind=kind, **extra)):
                if one.source.startswith("measured: examples/real_zoo"):
                    own = set(re.findall(r"\b\d\d\.\d+", one.text))
                    assert own
                    assert own <= numbers, (one.text, own - numbers)


def test_unequal_norms_are_warned_of_above_a_ratio_of_three():
    assert advised(seen(norms=(1.0, 2.9, 1.0)), "warning") == []
    found = [finding for finding in findings(seen(norms=(1.0, 4.0, 2.0))) if finding.verdict == "warning"]
    assert [finding.method for finding in found] == ["equalize"]
    assert "b's task vector is 4.0 times as long as a's" in found[0].text
    assert "wudi" in advised(seen(norms=(1.0, 4.0, 2.0)), "avoid")


def test_a_task_equal_to_the_base_is_named():
    found = [finding.text for finding in findings(seen(norms=(1.0, 0.0, 1.0))) if finding.verdict == "warning"]
    assert found == ["b equals the base on the whole sample: it has nothing to merge"]


def test_a_model_far_from_the_base_is_asked_about():
    texts = [finding.text for finding in findings(seen(base_norm=1.5)) if finding.verdict == "warning"]
    assert texts == ["b is far from the base (73% of its norm). Was it tuned from another base?"]


def test_task_vectors_that_point_the_same_way_are_named():
    same = ((1.0, 0.95, 0.0), (0.95, 1.0, 0.0), (0.0, 0.0, 1.0))
    found = [finding for finding in findings(seen(cosines=same)) if finding.verdict == "warning"]
    assert [finding.method for finding in found] == ["svc"]
    assert found[0].text.startswith("a and b point the same way")


def test_the_same_model_twice_is_said_to_be_so():
    same = ((1.0, 1.0, 0.0), (1.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    found = [
        finding.text for finding in findings(seen(cosines=same, norms=(2.0, 2.0, 1.0))) if finding.verdict == "warning"
    ]
    assert found == ["a and b are one model on the whole sample: leave one out, or give it a larger weight"]
    found = [
        finding.text for finding in findings(seen(cosines=same, norms=(2.0, 1.9, 1.0))) if finding.verdict == "warning"
    ]
    assert found[0].startswith("a and b point the same way")


def test_where_nothing_was_tuned_no_method_is_named():
    found = findings(seen(tasks=("a",), norms=(0.0,), cosines=((1.0,),)))
    assert {finding.verdict for finding in found} == {"fact", "warning"}


def test_sign_conflicts_and_long_sums_are_answered():
    assert "pcb" in advised(seen(conflict=0.5), "consider")
    assert "pcb" not in advised(seen(conflict=0.1), "consider")
    assert "norm_match" in advised(seen(sum_norm=2.5), "consider")
    assert "norm_match" not in advised(seen(sum_norm=1.0), "consider")


def test_two_models_can_be_interpolated_and_one_is_scaled():
    two = {"tasks": ("a", "b"), "norms": (1.0, 1.0), "cosines": ((1.0, 0.0), (0.0, 1.0))}
    assert "nuslerp" in advised(seen(**two), "consider")
    assert advised(seen(tasks=("a",), norms=(1.0,), cosines=((1.0,),)), "use") == ["task_arithmetic"]


@pytest.mark.parametrize("kind", ["encoder", "causal LM", "sequence to sequence", "unknown"])
@pytest.mark.parametrize("inputs", ["full", "LoRA", "mixed"])
def test_every_finding_has_a_reason_a_source_and_a_method_that_exists(kind, inputs):
    found = findings(seen(kind=kind, inputs=inputs, norms=(1.0, 5.0, 2.0), sum_norm=4.0))
    assert [finding for finding in found if finding.verdict == "use"]
    for finding in found:
        assert finding.text
        assert finding.source
        assert finding.method is None or finding.method in methods()
        steps = [*finding.recipe.get("preprocess", []), *finding.recipe.get("postprocess", [])]
        assert all(step in methods() for step in [*steps, finding.recipe.get("method", "pcb")])
