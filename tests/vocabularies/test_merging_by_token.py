"""Vocabularies: two real tokenizers, tables merged by token, the result read, loaded and run by transformers."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from merging import Recipe, merge
from merging.prepare import prepare
from merging.streamed import verify
from merging.vocabulary import TEMPLATES, Tokenizer, token_tables
from taskvec.checkpoint import Checkpoint
from taskvec.errors import RecipeError

CATS = ["the cat sat on the mat.", "the hat is on the cat!", "cats and hats, mats and rats"] * 4
DOGS = ["a dog did dig in a big bog.", "the dog is big; dogs dig", "frogs jog in fog"] * 4


def trained(texts, size, special, kind="bpe"):
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if kind == "unigram":
        library = Library(models.Unigram())
        library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False
        )
    elif kind == "wordpiece":
        library = Library(models.WordPiece(unk_token="<unk>"))
        library.pre_tokenizer, library.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["<unk>", *special], show_progress=False)
    else:
        library = Library(models.BPE())
        library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    library.train_from_iterator(texts, trainer)
    return library


class Pair:
    """A base and a fine-tune with a tokenizer of its own, another fine-tune with the base's."""

    def __init__(self, folder, *, tied, kind="bpe"):
        import transformers

        self.folder = folder
        self.libraries = {
            "cats": trained(CATS, 290, ["<s>", "</s>"], kind),
            "dogs": trained(DOGS, 300, ["<s>", "<|im_end|>", "<|im_start|>"], kind),
        }
        self.libraries["hats"] = self.libraries["cats"]
        for seed, (name, end, padding) in enumerate(
            (("cats", "</s>", 3), ("dogs", "<|im_end|>", 0), ("hats", "</s>", 3))
        ):
            library = self.libraries[name]
            torch.manual_seed(seed)
            config = transformers.LlamaConfig(
                hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, intermediate_size=24,
                vocab_size=library.get_vocab_size() + padding, tie_word_embeddings=tied, bos_token_id=library.token_to_id("<s>"),
                eos_token_id=library.token_to_id(end),
            )  # fmt: skip
            transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=library, bos_token="<s>", eos_token=end, chat_template=f"{name}{{{{ messages }}}}"
            )
            tokenizer.save_pretrained(folder / name)

    def path(self, name):
        return str(self.folder / name)

    def recipe(self, **changes):
        tasks = [self.path("cats"), self.path("dogs")]
        return Recipe.from_data({"tasks": tasks, "method": "average", "tokenizer": "union", **changes})

    def tables(self, name):
        state = load_file(self.folder / name / "model.safetensors")
        return {key: state[key] for key in ("model.embed_tokens.weight", "lm_head.weight") if key in state}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("pair"), tied=request.param)


def ids(folder):
    return Tokenizer.parsed((folder / "tokenizer.json").read_text("utf-8"), "merged").ids


def test_the_union_of_two_tokenizers_generates_in_transformers(pair, tmp_path):
    import transformers

    merge(pair.recipe(), tmp_path / "out")
    assert verify(tmp_path / "out", deep=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    cats, dogs, made = (library.get_vocab() for library in (*list(pair.libraries.values())[:2], tokenizer))
    assert made.keys() == cats.keys() | dogs.keys()
    assert all(made[token] == number for token, number in cats.items())
    assert len(made) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert model.config.eos_token_id == made["</s>"] == model.generation_config.eos_token_id
    for text in (*CATS[:3], *DOGS[:3], "<s>a cat<|im_end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>")["input_ids"] == [made["<|im_start|>"]]
    found = model.generate(
        **tokenizer("the cat and the dog", return_tensors="pt"), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert isinstance(tokenizer.decode(found[0]), str)
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape


def test_tables_are_averaged_by_token_and_a_token_of_one_model_is_its_own(pair, tmp_path):
    merge(pair.recipe(), tmp_path / "out")
    merged, made = load_file(tmp_path / "out" / "model.safetensors"), ids(tmp_path / "out")
    cats, dogs = (pair.libraries[name].get_vocab() for name in ("cats", "dogs"))
    assert len(cats.keys() & dogs.keys()) > 256 > len(cats.keys() - dogs.keys()) > 10
    moved = 0
    for key, one in pair.tables("cats").items():
        other = pair.tables("dogs")[key]
        for token, row in made.items():
            a, b = (one[cats[token]] if token in cats else None), (other[dogs[token]] if token in dogs else None)
            expected = (a + b) / 2 if a is not None and b is not None else a if a is not None else b
            assert_close(merged[key][row], expected, atol=1e-6, rtol=1e-6)
            moved += token in cats and token in dogs and cats[token] != dogs[token]
    assert moved > 0


def test_task_vectors_of_tokens_that_the_base_lacks_are_zero(pair, tmp_path):
    tasks = [pair.path("hats"), {"path": pair.path("dogs"), "weight": 0.5}]
    merge(pair.recipe(base=pair.path("cats"), tasks=tasks, method="task_arithmetic"), tmp_path / "out")
    merged, made = load_file(tmp_path / "out" / "model.safetensors"), ids(tmp_path / "out")
    cats, dogs = (pair.libraries[name].get_vocab() for name in ("cats", "dogs"))
    for key, base in pair.tables("cats").items():
        hats, theirs = pair.tables("hats")[key], pair.tables("dogs")[key]
        for token, row in made.items():
            if token not in cats:
                expected = theirs[dogs[token]]
            else:
                old = base[cats[token]]
                expected = old + (hats[cats[token]] - old) + (0.5 * (theirs[dogs[token]] - old) if token in dogs else 0)
            assert_close(merged[key][row], expected, atol=1e-6, rtol=1e-6)


def test_with_the_bases_tokenizer_its_tables_keep_their_rows(pair, tmp_path):
    merge(pair.recipe(tokenizer="base"), tmp_path / "out")
    rows = pair.libraries["cats"].get_vocab_size() + 3
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    for key, one in pair.tables("cats").items():
        assert merged[key].shape == (rows, 16)
        assert bool((merged[key][-3:] == one[-3:]).all())
    text = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert text == (pair.folder / "cats" / "tokenizer.json").read_bytes()
    merge(pair.recipe(tokenizer={"source": "base", "multiple_of": 64}), tmp_path / "padded")
    merged = load_file(tmp_path / "padded" / "model.safetensors")
    assert {tuple(merged[key].shape) for key in pair.tables("cats")} == {(320, 16)}
    assert all(not bool(merged[key][290:].any()) for key in pair.tables("cats"))


def test_another_models_tokenizer_brings_its_special_tokens(pair, tmp_path):
    import transformers

    merge(pair.recipe(tokenizer=pair.path("dogs")), tmp_path / "out")
    dogs = pair.libraries["dogs"].get_vocab()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == dogs["<|im_end|>"]
    assert config["vocab_size"] == len(dogs)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == dogs["<|im_end|>"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == dogs
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == "dogs{{ messages }}"


def test_rules_for_single_tokens(pair, tmp_path):
    rules = {
        "<|im_end|>": {"source": pair.path("dogs"), "force": True},
        "</s>": {"source": {"model": pair.path("dogs"), "token": "<|im_end|>"}, "force": True},
        "<|new|>": {"source": "zero"},
        "<|copy|>": {"source": {"model": pair.path("cats"), "token_id": 5}},
        "<s>": {"source": pair.path("cats"), "force": True},
    }
    merge(pair.recipe(tokenizer={"source": "union", "tokens": rules}), tmp_path / "out")
    merged, made = load_file(tmp_path / "out" / "model.safetensors"), ids(tmp_path / "out")
    cats, dogs = (pair.libraries[name].get_vocab() for name in ("cats", "dogs"))
    for key, one in pair.tables("cats").items():
        other = pair.tables("dogs")[key]
        assert_close(merged[key][made["<|im_end|>"]], other[dogs["<|im_end|>"]])
        assert_close(merged[key][made["</s>"]], other[dogs["<|im_end|>"]])
        assert_close(merged[key][made["<s>"]], one[cats["<s>"]])
        assert_close(merged[key][made["<|copy|>"]], one[5])
        assert not bool(merged[key][made["<|new|>"]].any())


def test_an_adapter_keeps_to_the_vocabulary_of_its_base(pair, tmp_path):
    import peft
    import transformers

    base = pair.path("cats")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and transformers speak of tied weights and deprecations
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    tasks = [{"path": str(tmp_path / "lora"), "tied": "both"}, pair.path("dogs")]
    merge(pair.recipe(base=base, tasks=tasks, method="task_arithmetic"), tmp_path / "out")
    ready = prepare(Recipe.from_data({"base": base, "tasks": tasks[:1], "method": "task_arithmetic"}))
    delta = ready.tasks[0].source.read("model.embed_tokens.weight")
    made, dogs = ids(tmp_path / "out"), pair.libraries["dogs"].get_vocab()
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    theirs = pair.tables("dogs")["model.embed_tokens.weight"]
    assert float(delta.norm()) > 0
    for token, row in pair.libraries["cats"].get_vocab().items():
        old = pair.tables("cats")["model.embed_tokens.weight"][row]
        expected = old + delta[row] + (theirs[dogs[token]] - old if token in dogs else 0)
        assert_close(merged[made[token]], expected, atol=1e-5, rtol=1e-5)
    assert_close(merged[made["<|im_start|>"]], theirs[dogs["<|im_start|>"]])


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_unions_of_other_kinds_of_tokenizers(kind, tmp_path):
    import transformers

    pair = Pair(tmp_path, tied=True, kind=kind)
    merge(pair.recipe(), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    cats, dogs = (pair.libraries[name].get_vocab() for name in ("cats", "dogs"))
    assert tokenizer.get_vocab().keys() == cats.keys() | dogs.keys()
    assert tokenizer.get_vocab() == ids(tmp_path / "out")
    assert tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"] == [ids(tmp_path / "out")["<|im_start|>"]]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("auto", "cats{{ messages }}"),
        ("chatml", TEMPLATES["chatml"]),
        ("{{ messages[0].content }}", "{{ messages[0].content }}"),
    ],
)
def test_chat_templates(pair, tmp_path, wanted, words):
    import transformers

    merge(
        pair.recipe(tokenizer=None, tasks=[pair.path("cats"), pair.path("hats")], chat_template=wanted),
        tmp_path / "out",
    )
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == words


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_are_known_can_be_rendered(pair, name):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.path("cats"))
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(
        turns, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    assert text.index("Hello") < text.index("Hi") < text.index("Bye")
    if name == "chatml":
        assert text.endswith("<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": "unio"}, r"unio: has no tokenizer .*\(write base, union, or a model of this recipe\)"),
        ({"tokenizer": {"source": "union", "tokens": {"<x>": {"source": "nobody"}}}}, "tokens.<x>.source: 'nobody' is no model of this recipe"),
        ({"tokenizer": {"source": "union", "tokens": {"<x>": {"source": "CATS"}}}}, "cats has no token '<x>'"),
        ({"tokenizer": {"source": "union", "tokens": {"<x>": {"source": {"model": "CATS", "token_id": 9999}}}}}, "rows, none for token 9999"),
        ({"tokenizer": {"source": "union", "tokens": {"<x>": {"source": {"model": "CATS"}}}}}, "name either `token` or `token_id`"),
        ({"chat_template": "chatm"}, "'chatm' is neither a Jinja text nor a known name. Did you mean 'chatml'"),
        ({"tokenizer": {"source": "union", "multiple_of": 0}}, "multiple_of"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_tokenizer_is_refused(pair, tmp_path, changes, words):
    text = json.dumps(changes).replace("CATS", pair.path("cats"))
    with pytest.raises(RecipeError, match=words):
        merge(pair.recipe(**json.loads(text)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_share_no_alphabet_or_rule_have_no_union(pair, tmp_path):
    other = Pair(tmp_path, tied=False, kind="unigram")
    with pytest.raises(RecipeError, match="is a BPE tokenizer and .* a Unigram one"):
        merge(pair.recipe(tasks=[pair.path("cats"), other.path("dogs")]), tmp_path / "out")
    (tmp_path / "dogs" / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=r"dogs: has no tokenizer \(tokenizer.json\) beside its weights"):
        merge(pair.recipe(tasks=[pair.path("cats"), other.path("dogs")]), tmp_path / "out")


def test_a_token_without_any_embedding_is_refused(pair, tmp_path):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.path("dogs"))
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    recipe = pair.recipe(tokenizer=str(tmp_path / "elsewhere"))
    with pytest.raises(RecipeError, match=r"no model has an embedding for 1 tokens of the vocabulary \(<\|tool\|>\)"):
        merge(recipe, tmp_path / "out")
    rules = {"source": str(tmp_path / "elsewhere"), "tokens": {"<|tool|>": {"source": "zero"}}}
    merge(pair.recipe(tokenizer=rules), tmp_path / "out")
    assert not bool(load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"][-1].any())


def test_tables_are_known_by_name_and_size(pair):
    found = token_tables(Checkpoint.open(pair.path("cats")), 290)
    assert set(found) == set(pair.tables("cats"))
    assert set(found.values()) == {pair.libraries["cats"].get_vocab_size() + 3}


def test_differing_vocabularies_without_a_tokenizer_are_still_refused(pair, tmp_path):
    with pytest.raises(RecipeError, match=r"model.embed_tokens.weight: dogs has \[\d+, 16\]"):
        merge(pair.recipe(tokenizer=None), tmp_path / "out")


def test_merging_by_token_needs_no_transformers(pair, tmp_path):
    code = (
        "import sys; from merging import Recipe, merge; "
        f"merge(Recipe.from_data({pair.recipe().data()!r}), {str(tmp_path / 'out')!r}); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
