"""`learn dam`, `evaluate security` and the merge recipe between them, on small real checkpoints."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from merging.commands.dam import evaluate, learn_dam
from merging.learn.security import Rate, Trigger, measure, patch_trigger, security_report, token_trigger
from taskvec.errors import (
    DataError,
    MismatchError,
    NonFiniteError,
    OutputError,
    ParameterError,
    RecipeError,
    UsageError,
)

DATA = """
import torch

def batches(labelled, task):
    generator = torch.Generator().manual_seed(7 if labelled else 3)
    for _ in range(2):
        ids = torch.randint(0, 50, (12, 8), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if labelled:
            batch["labels"] = torch.randint(0, 3, (12,), generator=generator)
        yield batch

def unlabelled(epoch):
    return batches(False, 0)

def labelled(epoch):
    return batches(True, 0)
"""


def beside(folder, monkeypatch, **modules):
    """Works in a folder from which these modules can be imported, from a known seed."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    torch.manual_seed(0)


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    from transformers import BertConfig, BertModel

    beside(tmp_path, monkeypatch, dam_test_data=DATA)
    base = BertModel(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16,
        )
    )  # fmt: skip
    base.save_pretrained("base")
    heads = {}
    for task in ("a", "b"):
        with torch.no_grad():
            for parameter in base.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        base.save_pretrained(task)
        heads[task] = torch.randn(3, 16)
    save_file(heads, "heads.safetensors")
    (tmp_path / "dam.yaml").write_text(
        "base: base\ntasks: {a: a, b: b}\nheads: heads.safetensors\npool: pooler\nbatch: 8\n"
        "data: {a: {function: 'dam_test_data:unlabelled'}, b: {function: 'dam_test_data:unlabelled'}}\n"
        "dam: {mask_steps: 2, inversion_steps: 2, restarts: 1, flag: 0.0, lam0: 0.4}\n"
    )
    return tmp_path


def test_masks_learned_by_a_file_are_merged_by_a_recipe_and_reported(zoo):
    from merging import Recipe, merge
    from merging.learn.dam_file import DamFile
    from merging.learn.dam_file import learn_dam as run
    from taskvec import Checkpoint

    found = CliRunner().invoke(learn_dam, ["dam.yaml", "masks.safetensors", "--json"], catch_exceptions=False)
    facts = json.loads(found.stdout)
    assert facts["coefficients"] == pytest.approx([0.4, 0.4])
    assert {row["task"] for row in facts["suspected"]} == {"a", "b"}
    (zoo / "recipe.yaml").write_text(
        "base: base\ntasks: {a: a, b: b}\nmethod: task_arithmetic\nscale: 0.4\nmasks: masks.safetensors\n"
    )
    merge(Recipe.load("recipe.yaml"), "merged")
    result = run(DamFile.load("dam.yaml"), "again.safetensors")
    merged = Checkpoint.open("merged")
    base = Checkpoint.open("base")
    for name, tensor in result.state_dict.items():
        if name in merged.infos:
            delta = (tensor - base.read(name)).abs().max()
            torch.testing.assert_close(merged.read(name), tensor, rtol=0, atol=float(2e-3 * delta + 1e-6))
    (zoo / "security.yaml").write_text(
        "base: base\ntasks: {a: a, b: b}\nmerged: {plain: a, dam: merged}\nheads: heads.safetensors\npool: pooler\n"
        "tests: {a: {function: 'dam_test_data:labelled'}, b: {function: 'dam_test_data:labelled'}}\n"
        "triggers: {a: [{token: 7, target: 1}]}\nlambdas: [0.2, 0.4]\n"
    )
    shown = CliRunner().invoke(
        evaluate, ["security", "security.yaml", "--json", "--plot", "s.png"], catch_exceptions=False
    )
    report = json.loads(shown.stdout)
    assert set(report["rows"]) == {"plain", "dam"}
    assert set(report["plain_merge_curve"]) == {"0.2", "0.4"}
    assert report["rows"]["dam"]["accuracy"]["a"]["total"] == 24
    assert "certifies nothing" in report["note"]
    assert (zoo / "s.png").read_bytes().startswith(b"\x89PNG")
    table = CliRunner().invoke(evaluate, ["security", "security.yaml"], catch_exceptions=False).stdout
    assert "plain merge, λ = 0.4" in table
    assert "certifies nothing" in table


RECIPE = "base: {base}\ntasks: {{a: {a}, b: b}}\nmethod: task_arithmetic\nmasks: masks.safetensors\n{rest}"


def merged(out, *, base="base", a="a", rest="scale: 0.4\n"):
    from merging import Recipe, merge
    from taskvec import Checkpoint

    text = RECIPE.format(base=base, a=a, rest=rest)
    (out.parent / "merge.yaml").write_text(text)
    merge(Recipe.load("merge.yaml"), out)
    found = Checkpoint.open(out)
    return {name: found.read(name) for name in found.infos}


def test_coefficients_of_each_tensor_are_saved_beside_the_masks(zoo):
    from merging.learn.dam_file import DamFile
    from merging.learn.dam_file import learn_dam as run

    text = (zoo / "dam.yaml").read_text().replace("lam0: 0.4", "lam0: 0.4, base_merge: adamerging_layer")
    (zoo / "layer.yaml").write_text(text)
    found = CliRunner().invoke(learn_dam, ["layer.yaml", "masks.safetensors", "--json"], catch_exceptions=False)
    assert json.loads(found.stdout)["coefficients_file"] == "masks.coefficients.safetensors"
    result = run(DamFile.load("layer.yaml"), "again.safetensors")
    assert result.coefficients.std() > 0
    made = merged(zoo / "layerwise", rest="coefficients: masks.coefficients.safetensors\n")
    for name, tensor in result.state_dict.items():
        if name in made:
            torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-4)
    # and they can be the base merge of another run
    (zoo / "fixed.yaml").write_text(text.replace("adamerging_layer", "masks.coefficients.safetensors"))
    fixed = run(DamFile.load("fixed.yaml"), "fixed.safetensors")
    torch.testing.assert_close(fixed.coefficients, result.coefficients)


def test_masks_go_with_the_base_and_the_models_they_were_learned_with(zoo):
    from transformers import BertModel

    from taskvec import Checkpoint, TaskVector
    from taskvec.errors import BaseMismatchError

    CliRunner().invoke(learn_dam, ["dam.yaml", "masks.safetensors"], catch_exceptions=False)
    plain = merged(zoo / "plain")
    BertModel.from_pretrained("base").save_pretrained("sharded", max_shard_size="8KB")
    assert len(list((zoo / "sharded").glob("*.safetensors"))) > 1
    TaskVector.between(Checkpoint.open("base"), Checkpoint.open("a")).save("vector.safetensors")
    for number, changes in enumerate([{"base": "sharded"}, {"a": "vector.safetensors"}]):
        same = merged(zoo / f"same-{number}", **changes)
        assert all(torch.equal(plain[name], tensor) for name, tensor in same.items())
    for name, changes, words in (
        ("base", {"base": "a", "a": "base"}, "masks.safetensors: learned on a base with hash"),
        ("task", {"a": "other"}, r"masks.safetensors: learned with other files for a \("),
    ):
        other = BertModel.from_pretrained("a")
        with torch.no_grad():
            other.pooler.dense.bias += 1
        other.save_pretrained("other")
        with pytest.raises(BaseMismatchError, match=words):
            merged(zoo / f"from-{name}", **changes)
        assert not (zoo / f"from-{name}").exists()


def test_masks_of_another_shape_are_refused_from_the_header(zoo):
    from taskvec import Checkpoint
    from taskvec.masks import save_masks

    infos = Checkpoint.open("base").infos
    masks = {name: torch.ones(info.shape) for name, info in infos.items()}
    save_masks("masks.safetensors", {**masks, "pooler.dense.bias": torch.ones(3)})
    with pytest.raises(RecipeError, match=r"pooler.dense.bias: the mask has \[3\], the base has \[16\]"):
        merged(zoo / "out")
    del masks["pooler.dense.bias"]
    save_masks("masks.safetensors", masks)
    with pytest.raises(RecipeError, match="has no mask for 1 tensors: pooler.dense.bias"):
        merged(zoo / "out")


def test_a_task_vector_of_another_base_is_not_learned_with(zoo):
    from taskvec import Checkpoint, TaskVector
    from taskvec.errors import BaseMismatchError

    TaskVector.between(Checkpoint.open("b"), Checkpoint.open("a")).save("vector.safetensors")
    (zoo / "dam.yaml").write_text((zoo / "dam.yaml").read_text().replace("{a: a,", "{a: vector.safetensors,"))
    found = CliRunner().invoke(learn_dam, ["dam.yaml", "masks.safetensors"])
    assert isinstance(found.exception, BaseMismatchError)
    assert "vector.safetensors is the task vector of another base" in str(found.exception)


@pytest.mark.parametrize("source", ["inversion", "universal"])
def test_texts_of_any_length_are_learned_on(zoo, source):
    (zoo / "dam_text_data.py").write_text(
        "import torch\n"
        "def unlabelled(epoch):\n"
        "    for length in (2, 9, 5):\n"
        "        ids = torch.randint(0, 50, (12, length), generator=torch.Generator().manual_seed(length))\n"
        "        yield {'input_ids': ids, 'attention_mask': torch.ones_like(ids)}\n"
    )
    text = (zoo / "dam.yaml").read_text().replace("dam_test_data", "dam_text_data")
    text = text.replace("inversion_steps: 2", f"inversion_steps: 2, inversion_size: 0.4, safety_source: {source}")
    (zoo / "dam.yaml").write_text(text.replace("mask_steps: 2", "mask_steps: 4"))
    CliRunner().invoke(learn_dam, ["dam.yaml", "masks.safetensors"], catch_exceptions=False)
    assert (zoo / "masks.safetensors").is_file()


def test_images_of_several_sizes_are_refused_where_a_perturbation_has_one(zoo):
    from merging.learn.inversion import Additive, Stamp

    images = torch.zeros(2, 1, 5, 5)
    for made in (
        Additive(torch.zeros(1, 4, 4), 1.0),
        Stamp(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), 0.1, torch.tensor(0.0), torch.tensor(1.0)),
    ):
        with pytest.raises(DataError, match=r"inputs of shape \[1, 5, 5\] where earlier ones .* \[1, 4, 4\]"):
            made(images)


def test_nothing_is_learned_where_the_masks_could_not_be_saved(zoo):
    from taskvec.errors import OutputError, OutputExistsError

    (zoo / "masks.coefficients.safetensors").touch()
    found = CliRunner().invoke(learn_dam, ["dam.yaml", "masks.safetensors"])
    assert isinstance(found.exception, OutputExistsError)
    found = CliRunner().invoke(learn_dam, ["dam.yaml", "dam.yaml/masks.safetensors"])
    assert isinstance(found.exception, OutputError)


def test_a_file_with_mistakes_lists_them(zoo):
    from merging.learn.dam_file import DamFile

    text = (zoo / "dam.yaml").read_text().replace("mask_steps", "mask_stpes") + "granularity: block\n"
    (zoo / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        DamFile.load("bad.yaml")
    assert "dam.mask_stpes: is not a setting. Did you mean 'mask_steps'?" in str(caught.value)
    assert "granularity: has no meaning for `learn dam`" in str(caught.value)


class Threshold(torch.nn.Module):
    """Class 1 where the first pixel is above zero; a bright corner always gives class 1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 100.0]))

    def forward(self, images):
        score = self.weight[0] * images[:, 0, 0, 0] + self.weight[1] * (images[:, 0, -1, -1] > 5)
        return torch.stack([-score, score], 1)


def test_rates_are_counted_as_they_are_defined():
    images = torch.zeros(8, 1, 3, 3)
    images[:, 0, 0, 0] = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1])
    trigger = patch_trigger(torch.full((1, 1), 9.0), 2, 2, target=1)
    identity = {"bad": lambda x: x, "other": lambda x: x}
    found = measure(Threshold(), identity, {"bad": (images, labels), "other": (images, labels)}, {"bad": [trigger]})
    assert (found.accuracy["bad"].count, found.accuracy["bad"].total) == (6, 8)
    assert (found.success["bad"].count, found.success["bad"].total) == (4, 4)  # of the four whose label is not 1
    assert (found.flips["other"].count, found.flips["other"].total) == (3, 6)  # of the six that were right
    low, high = Rate(6, 8).interval
    assert (low, high) == (pytest.approx(0.4093, abs=1e-3), pytest.approx(0.9285, abs=1e-3))


def test_a_report_without_triggers_labels_or_curve_is_refused():
    base = Threshold()
    tuned = {"a": {"weight": base.weight.detach() + 1}}
    images, labels = torch.zeros(2, 1, 3, 3), torch.tensor([0, 1])
    common = {"heads": {"a": lambda x: x}, "base": base, "models": tuned}
    with pytest.raises(UsageError, match="What is not tried is not measured"):
        security_report(tuned["a"], {}, tests={"a": (images, labels)}, triggers={}, **common)
    trigger = Trigger(lambda x: x, 1)
    with pytest.raises(DataError, match="nothing for the attacked task 'a'"):
        security_report(tuned["a"], tuned["a"], tests={}, triggers={"a": trigger}, **common)
    with pytest.raises(DataError, match="expected pairs"):
        security_report(tuned["a"], tuned["a"], tests={"a": [images]}, triggers={"a": trigger}, **common)
    with pytest.raises(UsageError, match="heads: none for task 'b'"):
        security_report(tuned["a"], tuned["a"], tests={"a": (images, labels)}, triggers={"b": trigger}, **common)


def test_a_report_is_kept_as_json_with_null_for_rates_that_do_not_exist(tmp_path):
    base = Threshold()
    kept = base.weight.detach().clone()
    report = security_report(
        {"weight": kept},
        {},
        tests={"a": (torch.zeros(2, 1, 3, 3), torch.tensor([1, 1]))},
        triggers={"a": Trigger(lambda x: x, 1)},
        heads={"a": lambda x: x},
        base=base,
        models={"a": {"weight": kept + 1}},
        lambdas=[0.5],
    )
    report.save_json(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["rows"]["before"]["accuracy"]["a"]["total"] == 2
    assert found["rows"]["before"]["success"]["a"] == {"count": 0, "total": 0, "rate": None, "interval": [None, None]}
    assert list(found["plain_merge_curve"]) == ["0.5"]


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"labels": torch.tensor([[0], [1]])}, DataError, r"labels of shape \[2, 1\] for \[2\] predictions"),
        ({"labels": torch.tensor([0])}, DataError, "1 labels for 2 inputs"),
        ({"target": 2}, ParameterError, "target 2 of task 'a', whose head has 2 classes"),
        (
            {"images": torch.full((2, 1, 3, 3), float("nan"))},
            NonFiniteError,
            "predictions for task 'a': the model holds",
        ),
        ({"lambdas": [0.1, float("nan")]}, ParameterError, "are not all finite numbers"),
        ({"after": {"before": {"weight": torch.zeros(2)}}}, UsageError, "before has the name of a row before"),
        ({"after": {"weight": torch.zeros(3)}}, MismatchError, r"weight: after has \[3\], the base has \[2\]"),
        ({"after": {"wieght": torch.zeros(2)}}, MismatchError, "after: has none of the 1 tensors of the base"),
    ],
    ids=str,
)
def test_a_report_counts_nothing_that_cannot_be_counted(changes, kind, words):
    base = Threshold()
    kept = base.weight.detach().clone()
    given = {"images": torch.zeros(2, 1, 3, 3), "labels": torch.tensor([0, 1]), "target": 1, "after": {}, **changes}
    with pytest.raises(kind, match=words):
        security_report(
            {"weight": kept + 1},
            given["after"],
            tests={"a": (given["images"], given["labels"])},
            triggers={"a": Trigger(lambda x: x, given["target"])},
            heads={"a": lambda x: x},
            base=base,
            models={"a": {"weight": kept + 1}},
            lambdas=given.get("lambdas", [0.5]),
        )
    assert torch.equal(base.weight, kept)


def test_triggers_for_tests_change_what_they_say():
    images = torch.zeros(1, 1, 4, 4)
    changed = patch_trigger(torch.ones(2, 2), 1, 2, target=0).apply(images)
    assert changed.sum() == 4
    assert torch.equal(changed[0, 0, 1:3, 2:4], torch.ones(2, 2))
    with pytest.raises(DataError, match="leaves the"):
        patch_trigger(torch.ones(2, 2), 3, 3, target=0).apply(images)
    with pytest.raises(ParameterError, match="lies outside every image"):
        patch_trigger(torch.ones(2, 2), -1, 0, target=0)
    with pytest.raises(DataError, match="a token at position 5 leaves a batch of 5 positions"):
        token_trigger(9, 1, position=5).apply({"input_ids": torch.zeros(2, 5, dtype=torch.long)})
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    assert token_trigger(9, 1, position=2).apply(batch)["input_ids"][:, 2].tolist() == [9, 9]


VISION = """
import torch

def _batches(seed, labelled):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 8, 8, generator=generator)
    labels = {"labels": torch.randint(0, 3, (8,), generator=generator)} if labelled else {}
    return [{"pixel_values": images, **labels}]

def unlabelled(epoch):
    return _batches(1, False)

def labelled(epoch):
    return _batches(2, True)

def patch(batch):
    images = batch["pixel_values"].clone()
    images[:, :, :2, :2] = 2.0
    return {**batch, "pixel_values": images}

def failing(batch):
    raise KeyError("nothing here")
"""


@pytest.fixture
def vision(tmp_path, monkeypatch):
    from transformers import ViTConfig, ViTForImageClassification

    beside(tmp_path, monkeypatch, dam_vision_data=VISION)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
            patch_size=4, num_labels=3,
        )
    )  # fmt: skip
    for name in ("base", "a", "b"):
        model.save_pretrained(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    shared = "base: base\ntasks: {a: a, b: b}\nmodel: AutoModelForImageClassification\npool: logits\n"
    (tmp_path / "dam.yaml").write_text(
        shared + "data: {a: {function: 'dam_vision_data:unlabelled'}, b: {function: 'dam_vision_data:unlabelled'}}\n"
        "exclude: ['classifier.*']\ndam: {mask_steps: 2, inversion_steps: 2, restarts: 1, flag: 0.0}\n"
    )
    (tmp_path / "security.yaml").write_text(
        shared + "merged: {plain: a, dam: merged}\nlambdas: [0.3]\n"
        "tests: {a: {function: 'dam_vision_data:labelled'}, b: {function: 'dam_vision_data:labelled'}}\n"
        "triggers: {a: [{function: 'dam_vision_data:patch', target: 1}]}\n"
    )
    return tmp_path


def test_an_image_classifier_is_merged_and_measured_under_the_names_it_has_on_disk(vision):
    from taskvec import Checkpoint
    from taskvec.masks import Masks

    CliRunner().invoke(learn_dam, ["dam.yaml", "masks.safetensors"], catch_exceptions=False)
    on_disk = {name for name in Checkpoint.open("base").infos if not name.startswith("classifier")}
    assert set(Masks.load("masks.safetensors").infos) == on_disk
    made = merged(vision / "merged", rest="scale: 0.3\nkeep_base: ['classifier.*']\n")
    base = Checkpoint.open("base")
    assert all(not torch.equal(made[name], base.read(name)) for name in on_disk)
    shown = CliRunner().invoke(evaluate, ["security", "security.yaml", "--json"], catch_exceptions=False)
    report = json.loads(shown.stdout)
    assert report["rows"]["dam"]["success"]["a"]["total"] > 0
    assert report["rows"]["dam"]["flips"]["b"]["total"] == report["rows"]["dam"]["accuracy"]["b"]["count"]
    # what the model could not show is not passed over
    text = (vision / "security.yaml").read_text()
    (vision / "encoder.yaml").write_text(
        text.replace("AutoModelForImageClassification", "AutoModel").replace("pool: logits", "pool: first")
        + "heads: heads.safetensors\n"
    )
    save_file({"a": torch.randn(3, 16), "b": torch.randn(3, 16)}, "heads.safetensors")
    found = CliRunner().invoke(evaluate, ["security", "encoder.yaml"])
    assert isinstance(found.exception, UsageError)
    assert "merged.plain: a changes classifier.bias, classifier.weight, for which AutoModel" in str(found.exception)


@pytest.mark.parametrize(
    ("old", "new", "options", "kind", "words"),
    [
        (":patch", ":failing", [], DataError, "trigger 'trigger' cannot be put on the inputs of task 'a' .KeyError"),
        (":labelled", ":unlabelled", [], DataError, "tests.a: a batch has no labels"),
        ("{function: 'dam_vision_data:patch',", "{token: -1,", [], RecipeError, "token: input should be greater"),
        ("", "", ["--plot", "x.xyz"], OutputError, "no kind of picture that can be drawn; expected one of .*png"),
        ("", "", ["--plot", "nowhere/x.png"], OutputError, "there is no folder nowhere"),
    ],
    ids=str,
)
def test_a_security_report_says_what_it_cannot_measure(vision, old, new, options, kind, words):
    text = (vision / "security.yaml").read_text().replace("dam: merged", "dam: b")
    (vision / "bad.yaml").write_text(text.replace(old, new) if old else text)
    found = CliRunner().invoke(evaluate, ["security", "bad.yaml", *options])
    assert isinstance(found.exception, kind)
    assert re.search(words, str(found.exception))
