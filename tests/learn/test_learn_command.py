"""From a configuration to a baked checkpoint: real files, a real transformers model, the command line."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from merging.commands.learn import coefficients, learn
from merging.learn.config import LearnConfig
from taskvec.coefficients import Coefficients
from taskvec.errors import DataError, MismatchError, OutputExistsError, RecipeError

WORDS = ["red", "blue", "cat", "dog", "sun", "rain", "up", "down"]
TASKS = ("colour", "animal")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A tiny BERT with its tokenizer, two fine-tunes of it, frozen heads and labelled texts."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("zoo")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    base = BertModel(config)
    heads = {task: torch.randn(2, 16, generator=torch.Generator().manual_seed(i)) for i, task in enumerate(TASKS)}
    heads = {task: head / head.norm(dim=-1, keepdim=True) for task, head in heads.items()}
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})
    assert tokenizer("red up")["input_ids"] == [2, 5, 11, 3]
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    save_file(heads, folder / "heads.safetensors")
    generator = torch.Generator().manual_seed(7)
    for i, task in enumerate(TASKS):
        pair = WORDS[2 * i : 2 * i + 2]
        for split, count in (("train", 24), ("validation", 16)):
            rows = []
            for _ in range(count):
                label = int(torch.randint(2, (1,), generator=generator))
                others = 4 + torch.randint(4, (2,), generator=generator)
                rows.append({"text": " ".join([WORDS[o] for o in others] + [pair[label]]), "label": label})
            (folder / f"{task}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tuned = BertModel.from_pretrained(folder / "base")
        tuned.train()
        optimizer = torch.optim.Adam(tuned.parameters(), lr=3e-3)
        rows = [json.loads(line) for line in (folder / f"{task}-train.jsonl").read_text().splitlines()]
        tokens = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        labels = torch.tensor([row["label"] for row in rows])
        for _ in range(40):
            optimizer.zero_grad()
            features = torch.nn.functional.normalize(tuned(**tokens).last_hidden_state.mean(1), dim=-1)
            torch.nn.functional.cross_entropy(10 * features @ heads[task].T, labels).backward()
            optimizer.step()
        tuned.save_pretrained(folder / task)
    return folder


def settings(zoo, **more):
    return {
        "base": str(zoo / "base"),
        "tasks": {task: str(zoo / task) for task in TASKS},
        "data": {task: str(zoo / f"{task}-train.jsonl") for task in TASKS},
        "evaluation": {task: str(zoo / f"{task}-validation.jsonl") for task in TASKS},
        "heads": str(zoo / "heads.safetensors"),
        "pool": "mean",
        "normalize": True,
        "logit_scale": 10.0,
        "epochs": 3,
        "batch": 8,
        "optimizer": {"lr": 0.05},
        **more,
    }


def write(path, data):
    from ruamel.yaml import YAML

    with open(path, "w") as file:
        YAML().dump(data, file)
    return str(path)


def invoke(command, *args):
    return CliRunner().invoke(command, [str(arg) for arg in args], catch_exceptions=False)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"granularity": "row"},
        {"granularity": "layer", "partitions": {"parts": 3, "seed": 5}, "bank_dtype": "float16"},
        {"exclude": ["pooler.*", "embeddings.*"], "bank": "disk"},
        {"select": {"budget": 1}},
        {"select": {"budget": 1, "strategy": "gradient"}, "granularity": "layer"},
    ],
)
def test_learned_coefficients_bake_into_the_composed_weights(zoo, tmp_path, more):
    from merging import Recipe, merge
    from merging.learn import atlas

    config = LearnConfig.from_data(settings(zoo, **more))
    learned, run = atlas.learn(config, tmp_path / "atlas.safetensors")
    assert run.steps == 9
    assert math.isfinite(run.losses[-1])
    assert Coefficients.load(tmp_path / "atlas.safetensors").values.equal(learned.values)
    if "select" in more:
        assert (learned.values == 0).any(dim=0).all()  # what was left out
        more = {key: value for key, value in more.items() if key != "select"}
    made = atlas.setup(LearnConfig.from_data(settings(zoo, **more)))
    made.composition.coefficients = learned.values
    recipe = {
        "method": "task_arithmetic",
        "base": str(zoo / "base"),
        "tasks": {task: str(zoo / task) for task in TASKS},
        "coefficients": str(tmp_path / "atlas.safetensors"),
    }
    if "exclude" in more:
        recipe["keep_base"] = more["exclude"]
    merge(Recipe.from_data(recipe), tmp_path / "merged")
    baked = load_file(tmp_path / "merged" / "model.safetensors")
    with made.composition:
        made.composition.compose_()
        for name, parameter in made.model.named_parameters():
            # a float16 bank rounds the task vectors; baking reads them as they are
            rough = {"rtol": 1e-3, "atol": 1e-4} if "bank_dtype" in more else {"rtol": 2e-5, "atol": 2e-6}
            torch.testing.assert_close(baked[made.names[name]], parameter.detach(), **rough)


def test_learning_lowers_the_loss_and_is_deterministic(zoo, tmp_path):
    from merging.learn import atlas

    config = LearnConfig.from_data(settings(zoo))
    first, run = atlas.learn(config, tmp_path / "one.safetensors")
    second, _ = atlas.learn(config, tmp_path / "two.safetensors")
    assert torch.equal(first.values, second.values)
    assert sum(run.losses[-3:]) < sum(run.losses[:3]) - 1.0


def test_the_atlas_command_writes_a_file_and_reports(zoo, tmp_path):
    config = write(tmp_path / "atlas.yaml", settings(zoo))
    out = tmp_path / "atlas.safetensors"
    result = invoke(learn, "atlas", config, out, "--json", "--quiet")
    facts = json.loads(result.stdout)
    assert facts["tasks"] == list(TASKS)
    assert facts["steps"] == 9
    found = Coefficients.load(out)
    assert found.base_hash
    assert set(found.task_hashes) == set(TASKS)
    assert found.objective["use"] == "atlas"
    assert out.stat().st_size < 60_000
    assert not out.with_name("atlas.safetensors.run").exists()
    with pytest.raises(OutputExistsError, match="exists already"):
        invoke(learn, "atlas", config, out)


def test_an_interrupted_command_goes_on_and_another_configuration_does_not(zoo, tmp_path):
    from merging.learn import atlas

    config = LearnConfig.from_data(settings(zoo))
    whole, _ = atlas.learn(config, tmp_path / "whole.safetensors")

    def interrupt(record):
        if record["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atlas.learn(config, tmp_path / "half.safetensors", progress=interrupt)
    assert not (tmp_path / "half.safetensors").exists()
    with pytest.raises(MismatchError, match="belongs to another run"):
        atlas.learn(LearnConfig.from_data(settings(zoo, logit_scale=5.0)), tmp_path / "half.safetensors")
    resumed, _ = atlas.learn(config, tmp_path / "half.safetensors")
    assert torch.equal(resumed.values, whole.values)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half.safetensors", "whole.safetensors"]


def test_the_adamerging_command_needs_no_labels(zoo, tmp_path):
    unlabelled = {}
    for task in TASKS:
        rows = [json.loads(line) for line in (zoo / f"{task}-train.jsonl").read_text().splitlines()]
        unlabelled[task] = str(tmp_path / f"{task}.csv")
        (tmp_path / f"{task}.csv").write_text("text\n" + "".join(row["text"] + "\n" for row in rows))
    data = {**settings(zoo), "data": unlabelled, "steps": 5, "granularity": "global"}
    del data["epochs"], data["optimizer"], data["evaluation"]
    out = tmp_path / "adamerging.safetensors"
    result = invoke(learn, "adamerging", write(tmp_path / "c.yaml", data), out)
    assert "2 coefficients of 2 task vectors" in result.stderr
    found = Coefficients.load(out)
    assert found.values.shape == (2, 1)
    assert torch.all((found.values - 0.3).abs() <= 6e-3)
    assert not torch.equal(found.values, torch.full((2, 1), 0.3))


def test_show_prints_every_block_and_draws_the_heat_map(zoo, tmp_path):
    out = tmp_path / "c.safetensors"
    invoke(learn, "atlas", write(tmp_path / "c.yaml", settings(zoo, epochs=1)), out, "--quiet")
    result = invoke(coefficients, "show", out, "--plot", tmp_path / "map.png")
    found = Coefficients.load(out)
    for block in found.blocks:
        assert block in result.stdout
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads(invoke(coefficients, "show", out, "--json").stdout)
    assert facts["blocks"] == list(found.blocks)
    torch.testing.assert_close(torch.tensor(facts["coefficients"]), found.values)


def test_every_problem_of_a_configuration_is_reported_at_once(tmp_path, zoo):
    data = settings(
        zoo, granularty="block", optimizer={"lr": -1, "weight_decy": 0.1}, keep="best", objective="supervisd"
    )
    data["data"]["colour"] = {"txt": "t"}
    data["evaluation"]["animals"] = data["evaluation"].pop("animal")
    with pytest.raises(RecipeError) as caught:
        LearnConfig.load(write(tmp_path / "c.yaml", data))
    text = str(caught.value)
    for part in (
        "granularty: there is no such key. Did you mean 'granularity'?",
        "optimizer.lr: input should be greater than 0, found -1",
        "optimizer.weight_decy: there is no such key. Did you mean 'weight_decay'?",
        "data.colour.txt: there is no such key. Did you mean 'text'?",
    ):
        assert part in text
    assert "line " in text


def test_contradictions_are_reported_together(zoo):
    data = settings(zoo, objective="supervisd", steps=4)
    data["evaluation"]["animals"] = data["evaluation"].pop("animal")
    with pytest.raises(RecipeError) as caught:
        LearnConfig.from_data(data)
    text = str(caught.value)
    assert "objective: 'supervisd' is not known. Did you mean 'supervised'?" in text
    assert "evaluation.animals: is not in data. Did you mean 'animal'?" in text
    assert "epochs, steps: give one of them" in text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": {"colour": "EMPTY"}}, DataError, "holds no rows"),
        ({"data": {"colour": "WRONG"}}, DataError, "labels 5 are outside the head, which has 2 classes"),
        ({"heads": "BASE"}, DataError, "has no head for colour, animal"),
        ({"tasks": {"colour": "OTHER"}}, MismatchError, "colour"),
    ],
)
def test_wrong_inputs_are_refused_by_name(zoo, tmp_path, change, error, message):
    from transformers import BertConfig, BertModel

    from merging.learn import atlas

    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text('{"text": "red cat", "label": 5}\n' * 8)
    other = BertConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(other).save_pretrained(tmp_path / "other")
    known = {
        "EMPTY": str(tmp_path / "empty.jsonl"),
        "WRONG": str(tmp_path / "wrong.jsonl"),
        "BASE": str(zoo / "base" / "model.safetensors"),
        "OTHER": str(tmp_path / "other"),
    }
    data = settings(zoo)
    for key, value in change.items():
        named = {k: known.get(v, v) for k, v in value.items()} if isinstance(value, dict) else known.get(value, value)
        data[key] = named
    if "data" in change:
        data["evaluation"] = {}
    with pytest.raises(error, match=message):
        atlas.learn(LearnConfig.from_data(data), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_merge_refuses_coefficients_of_another_base(zoo, tmp_path):
    from merging import Recipe, merge
    from merging.learn import atlas
    from taskvec.errors import BaseMismatchError

    learned, _ = atlas.learn(LearnConfig.from_data(settings(zoo, epochs=1)), tmp_path / "c.safetensors")
    with pytest.raises(BaseMismatchError, match="learned on a base with hash"):
        learned.check(base_hash="0" * 64)
    with pytest.raises(BaseMismatchError, match="learned with other files for animal"):
        learned.check(task_hashes={"animal": "0" * 64})
    recipe = {
        "method": "task_arithmetic",
        "base": str(zoo / "base"),
        "tasks": {"colour": str(zoo / "colour"), "creature": str(zoo / "animal")},
        "coefficients": str(tmp_path / "c.safetensors"),
    }
    with pytest.raises(RecipeError, match="nothing was learned for creature"):
        merge(Recipe.from_data(recipe), tmp_path / "merged")


def unlabelled(zoo, tmp_path, **more):
    rows = [json.loads(line) for line in (zoo / "colour-train.jsonl").read_text().splitlines()]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    given = settings(zoo, objective="ufm", data={"colour": str(tmp_path / "texts.jsonl")}, epochs=2, **more)
    return {**given, "evaluation": {"colour": str(zoo / "colour-validation.jsonl")}}


def test_ufm_adapts_by_name_without_labels_and_goes_on_within_an_epoch(zoo, tmp_path):
    from merging.learn import atlas

    config = LearnConfig.from_data(unlabelled(zoo, tmp_path, ufm={"threshold": [0.5, 0.6]}, every=1, keep="last"))
    assert config.resolved().optimizer.lr == 0.05
    learned, run = atlas.learn(config, tmp_path / "whole.safetensors")
    assert run.steps == 6  # 24 texts in batches of 8, twice
    assert learned.values.abs().max() > 0

    class Stop(Exception):
        pass

    def stop(record):
        if record.get("step") == 4 and "metrics" in record:
            raise Stop

    with pytest.raises(Stop):
        atlas.learn(config, tmp_path / "again.safetensors", progress=stop)
    assert (tmp_path / "again.safetensors.run").exists()
    again, _ = atlas.learn(config, tmp_path / "again.safetensors")
    assert torch.equal(again.values, learned.values)


def test_the_strong_view_leaves_words_out_and_never_all(zoo):
    from transformers import AutoTokenizer

    from merging.learn.data import Texts, Views
    from merging.learn.objectives import UFM

    texts = Texts("t", AutoTokenizer.from_pretrained(zoo / "base"), [" ".join(WORDS)] * 8, None, 4, 16)
    objective = UFM([torch.zeros(1)])
    objective.trusted = torch.arange(8) < 2
    views = Views(texts, objective, 0.5, seed=1)
    batches = list(views(0))
    assert len(batches) == len(views) == 2
    weak = torch.cat([batch["weak"]["attention_mask"].sum(1) for batch in batches])
    strong = torch.cat([batch["strong"]["attention_mask"].sum(1) for batch in batches])
    assert (weak == len(WORDS) + 2).all()
    assert ((strong > 2) & (strong <= weak)).all()
    assert strong.float().mean() < weak.float().mean() - 2
    again = [batch["strong"]["input_ids"].tolist() for batch in views(0)]
    assert again == [batch["strong"]["input_ids"].tolist() for batch in batches]
    assert again != [batch["strong"]["input_ids"].tolist() for batch in views(1)]
    assert Views(texts, objective, 0.999)._words("one two", "key") in ("one two", "one", "two")


def test_what_ufm_cannot_use_is_reported(zoo, tmp_path):
    both = unlabelled(zoo, tmp_path)
    both["data"]["animal"] = {"function": "m:f"}
    with pytest.raises(RecipeError) as caught:
        LearnConfig.from_data({**both, "granularity": "blok"})
    text = str(caught.value)
    assert "objective: ufm adapts to one set of data, found 2" in text
    assert "data.animal: `function` needs `ufm.pool`, and `path` makes its own" in text
    assert "granularity: 'blok' is not known. Did you mean 'block'?" in text
    with pytest.raises(RecipeError, match="ufm: goes with `objective: ufm`"):
        LearnConfig.from_data(settings(zoo, ufm={"drop": 0.2}))


def test_selection_by_features_keeps_the_task_whose_data_look_alike(zoo, tmp_path):
    from merging.learn import atlas

    own = {task: str(zoo / f"{task}-train.jsonl") for task in TASKS}
    select = {"budget": 1, "strategy": "features", "data": own}
    for task in TASKS:
        data = {task: str(zoo / f"{task}-train.jsonl")}
        made = atlas.setup(LearnConfig.from_data(settings(zoo, data=data, evaluation={}, select=select)))
        assert list(made.selection.vectors) == [task]
    learned, _ = atlas.learn(made.config, tmp_path / "c.safetensors")
    assert learned.tasks == TASKS
    assert (learned.values[0] == 0).all()
    with pytest.raises(RecipeError, match=r"select.data: `features` needs data of every task, found \['colour'\]"):
        LearnConfig.from_data(settings(zoo, select={**select, "data": {"colour": own["colour"]}}))
    with pytest.raises(RecipeError, match="select.data: goes with `strategy: features`"):
        LearnConfig.from_data(settings(zoo, select={"budget": 1, "data": own}))


def test_frozen_blocks_keep_their_start_and_groups_come_from_a_function(zoo, tmp_path, monkeypatch):
    from merging.learn import atlas

    frozen = settings(zoo, frozen=["embeddings.*"], initial=0.25, keep="last")
    learned, _ = atlas.learn(LearnConfig.from_data(frozen), tmp_path / "frozen.safetensors")
    held = torch.tensor([block.startswith("embeddings.") for block in learned.blocks])
    assert held.any()
    assert (learned.values[:, held] == 0.25).all()
    assert (learned.values[:, ~held] != 0.25).any()
    with pytest.raises(MismatchError, match=r"frozen: 'embedings\.\*' matches no block"):
        atlas.setup(LearnConfig.from_data(settings(zoo, frozen=["embedings.*"])))
    (tmp_path / "groups_of_mine.py").write_text("def half(name):\n    return 'low' if '.0.' in name else 'rest'\n")
    monkeypatch.syspath_prepend(tmp_path)
    made = atlas.setup(LearnConfig.from_data(settings(zoo, granularity="groups_of_mine:half")))
    assert set(made.composition.blocks) == {"low", "rest"}
