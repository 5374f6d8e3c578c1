"""Statistics by the command line: real little transformers models, files of texts, and the merges made with them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from merging.learn.statistics import fisher_diagonal, input_grams, input_grams_through_merged
from taskvec.errors import (
    DataError,
    MismatchError,
    NotFoundError,
    OutputError,
    OutputExistsError,
    RecipeError,
    UsageError,
)

WORDS = ["red", "blue", "cat", "dog", "sun", "rain", "up", "down"]
TASKS = ("colour", "animal")
TEXTS = {"colour": ["red sun", "blue rain up", "red up down sun"], "animal": ["cat down", "dog", "dog cat up rain sun"]}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A tiny BERT without a head, classifiers made from it, an adapter, and unlabelled texts."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("zoo")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    base = BertModel(config)
    base.save_pretrained(folder / "base")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder / "base")
    for i, task in enumerate(TASKS):
        config.num_labels = 2 + i
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            for own, theirs in zip(model.bert.parameters(), base.parameters()):
                own.copy_(theirs + 0.1 * torch.randn_like(theirs))
        model.save_pretrained(folder / task)
        model.bert.save_pretrained(folder / f"{task}-encoder")
        (folder / f"{task}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[task]))
    return folder


def settings(zoo, method, **more):
    return {
        "method": method,
        "base": str(zoo / "base"),
        "model": "AutoModelForSequenceClassification",
        "tasks": {task: str(zoo / task) for task in TASKS},
        "data": {task: str(zoo / f"{task}.jsonl") for task in TASKS},
        "batch": 2,
        **more,
    }


def written(path, data):
    path.write_text(json.dumps(data))  # JSON is YAML
    return path


def classifiers(zoo):
    from transformers import BertForSequenceClassification

    return {task: BertForSequenceClassification.from_pretrained(zoo / task) for task in TASKS}


def batches(zoo):
    from transformers import BertTokenizerFast

    tokenizer = BertTokenizerFast.from_pretrained(zoo / "base")
    return {
        task: [dict(tokenizer(texts[i : i + 2], padding=True, return_tensors="pt")) for i in (0, 2)]
        for task, texts in TEXTS.items()
    }


def by_python(zoo, method, folder):
    models, data = classifiers(zoo), batches(zoo)
    files = {task: folder / f"{task}.safetensors" for task in TASKS}
    if method == "regmean_pp":
        return input_grams_through_merged(models, data, files)
    collect = fisher_diagonal if method == "fisher" else input_grams
    return {task: collect(models[task], data[task], files[task]) for task in TASKS}


@pytest.mark.parametrize("method", ["fisher", "regmean", "regmean_pp"])
def test_the_command_collects_what_python_collects_and_a_recipe_merges_with_it(zoo, tmp_path, run, method):
    code, out, _ = run(
        "learn", "statistics", written(tmp_path / "c.yaml", settings(zoo, method)), tmp_path / "files", "--json"
    )
    assert code == 0
    facts = json.loads(out)
    expected = by_python(zoo, method, tmp_path)
    for task in TASKS:
        ours, theirs = load_file(facts["files"][task]), load_file(expected[task])
        # the base has the encoder alone, without the prefix
        theirs = {name.removeprefix("bert."): value for name, value in theirs.items() if name.startswith("bert.")}
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_close(ours[name], value, atol=1e-6, rtol=1e-5)
    recipe = {
        "method": method, "base": str(zoo / "base"), "tasks": [str(zoo / f"{task}-encoder") for task in TASKS],
        "parameters": {"statistics_files": list(facts["files"].values())},
    }  # fmt: skip
    assert run("merge", written(tmp_path / "r.yaml", recipe), tmp_path / "merged")[0] == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    models = [load_file(zoo / f"{task}-encoder" / "model.safetensors") for task in TASKS]
    name = "encoder.layer.1.output.dense.weight"
    statistics = [load_file(path)[name].double() for path in facts["files"].values()]
    if method == "fisher":
        norms = [sum(v.double().square().sum() for v in load_file(p).values()).sqrt() for p in facts["files"].values()]
        shares = [(value / norm).clamp(min=1e-6) for value, norm in zip(statistics, norms)]
        wanted = sum(m[name].double() * s for m, s in zip(models, shares)) / sum(shares)
        assert_close(merged[name], wanted.float(), atol=1e-6, rtol=1e-5)
    else:
        # nothing is nearer to both tasks' outputs
        def distance(weight):
            shrunk = [0.9 * gram + 0.1 * gram.diagonal().diag() for gram in statistics]
            return sum(
                ((weight - m[name].double()) @ g * (weight - m[name].double())).sum() for m, g in zip(models, shrunk)
            )

        least = float(distance(merged[name].double()))
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            step = 1e-3 * torch.randn(merged[name].shape, generator=generator).double()
            assert least <= float(distance(merged[name].double() + step))


def test_one_task_gives_one_file_and_the_table_says_how_to_use_it(zoo, tmp_path, run):
    one = settings(zoo, "regmean", tasks={"colour": str(zoo / "colour")}, data={"colour": str(zoo / "colour.jsonl")})
    code, out, messages = run("learn", "statistics", written(tmp_path / "c.yaml", one), tmp_path / "g.safetensors")
    assert code == 0
    assert "colour" in out
    assert f"method: regmean, parameters: {{statistics_files: [{tmp_path / 'g.safetensors'}]}}" in messages
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["c.yaml", "g.safetensors"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers for it
def test_adapters_and_task_vectors_stand_for_their_models(zoo, tmp_path, run):
    """An adapter or a stored vector over the base gives the statistics of the model they make together."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertModel

    torch.manual_seed(3)
    lora = get_peft_model(BertModel.from_pretrained(zoo / "base"), LoraConfig(r=2, target_modules=["query", "dense"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    lora.save_pretrained(tmp_path / "lora")
    lora.merge_and_unload().save_pretrained(tmp_path / "full")
    assert run("diff", zoo / "base", tmp_path / "full", tmp_path / "vector.safetensors")[0] == 0
    save_file(load_file(tmp_path / "full" / "model.safetensors"), tmp_path / "weights.safetensors")
    forms = ["full", "lora", "vector.safetensors", "weights.safetensors"]
    config = settings(zoo, "regmean", model="AutoModel", tasks={}, data={})
    for at, form in enumerate(forms):
        config["tasks"][f"task{at}"] = str(tmp_path / form)
        config["data"][f"task{at}"] = str(zoo / "animal.jsonl")
    assert run("learn", "statistics", written(tmp_path / "c.yaml", config), tmp_path / "out", "--quiet")[0] == 0
    first, *others = (load_file(tmp_path / "out" / f"task{at}.safetensors") for at in range(len(forms)))
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            assert_close(other[name], value, atol=1e-5, rtol=1e-4)


def test_heads_of_their_own_give_fisher_its_logits(zoo, tmp_path, run):
    save_file({task: torch.randn(3, 8) for task in TASKS}, tmp_path / "heads.safetensors")
    config = settings(
        zoo, "fisher", model="AutoModel", heads=str(tmp_path / "heads.safetensors"), pool="mean", labels="expected"
    )
    config["tasks"] = {task: str(zoo / f"{task}-encoder") for task in TASKS}
    assert run("learn", "statistics", written(tmp_path / "c.yaml", config), tmp_path / "out")[0] == 0
    found = load_file(tmp_path / "out" / "animal.safetensors")
    assert found["encoder.layer.0.attention.self.query.weight"].abs().sum() > 0
    assert "pooler.dense.weight" in found  # it took no part, so its information is zero
    assert not found["pooler.dense.weight"].any()


def test_patterns_choose_what_is_collected(zoo, tmp_path, run):
    config = settings(zoo, "regmean", include=["*.layer.*"], exclude=["*.query.*"])
    assert run("learn", "statistics", written(tmp_path / "c.yaml", config), tmp_path / "out")[0] == 0
    names = set(load_file(tmp_path / "out" / "colour.safetensors"))
    assert len(names) == 10
    assert "encoder.layer.0.attention.self.key.weight" in names


def test_padding_does_not_change_fisher_information(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    ))  # fmt: skip
    tokens = torch.tensor([[3, 4, 5]])
    padded = {"input_ids": torch.tensor([[3, 4, 5, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    plain = load_file(fisher_diagonal(model, [{"input_ids": tokens}], tmp_path / "a.safetensors"))
    found = load_file(fisher_diagonal(model, [padded], tmp_path / "b.safetensors"))
    for name, value in plain.items():
        assert_close(found[name], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "gram"}, "method: .*fisher.*regmean"),
        ({"method": "regmean", "labels": "expected"}, "labels: has no meaning for `method: regmean`"),
        ({"method": "fisher", "ridge": 0.1}, "ridge: has no meaning for `method: fisher`"),
        ({"method": "regmean", "evaluation": {}}, "evaluation: has no meaning for `learn statistics`"),
        ({"method": "regmean", "data": {"colour": "x.jsonl"}}, "data: nothing for task 'animal'"),
        ({"method": "regmean", "includ": ["*"]}, "includ.*Did you mean 'include'"),
        ({"method": "regmean", "tasks": {"a/b": "x"}, "data": {"a/b": "x.jsonl"}}, "tasks.a/b: names a file"),
    ],
)  # fmt: skip
def test_configurations_that_mean_something_else_are_refused(zoo, changes, words):
    from merging.learn.statistics_file import StatisticsFile

    with pytest.raises(RecipeError, match=words):
        StatisticsFile.from_data({**settings(zoo, "regmean"), **changes})


@pytest.mark.parametrize(
    ("changes", "out", "error", "words"),
    [
        ({}, "g.safetensors", UsageError, "2 tasks give a file each; name a folder"),
        ({}, "zoo", OutputExistsError, "exists already"),
        ({}, "nowhere/out", OutputError, "there is no folder"),
        ({"include": ["*.laier.*"]}, "out", DataError, "include: no parameter that the base has matches"),
        ({"data": dict.fromkeys(TASKS, "missing.jsonl")}, "out", NotFoundError, "missing.jsonl"),
        ({"method": "fisher", "model": "AutoModel"}, "out", UsageError, "gives no logits, and Fisher needs them"),
        ({"tasks": {"colour": "part.safetensors", "animal": "part.safetensors"}, "model": "AutoModel"}, "out", MismatchError, "part.safetensors has no embeddings.*tasks.colour: encoder.layer.0.output.dense.bias is .2. in part.safetensors and .8. in the model"),
        ({"tasks": {"colour": "other.safetensors", "animal": "other.safetensors"}}, "out", MismatchError, "none of the base's tensors"),
    ],
)  # fmt: skip
def test_what_cannot_be_collected_leaves_nothing_behind(zoo, tmp_path, monkeypatch, changes, out, error, words):
    from merging.learn.statistics_file import StatisticsFile, collect

    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo").mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file({"encoder.layer.0.output.dense.bias": torch.zeros(2)}, tmp_path / "part.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=f"(?s){words}"):
        collect(StatisticsFile.from_data({**settings(zoo, "regmean"), **changes}), out)
    assert sorted(tmp_path.iterdir()) == before
