"""What config.json says of layers that were stacked anew: numbers, lists by layer, lists of layers, rules by number."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merging import Recipe, merge
from merging.layers import Origin, Placed, once_for_all, restacked_config
from taskvec.blocks import depth_of, layer_of, main_tower, with_layer
from taskvec.errors import Problems, RecipeError
from taskvec.source import in_memory


def restacked(config, layers, *, tower="model.layers", depth=4, others=None, patterned=False):
    problems = Problems()
    theirs = others or config
    made = restacked_config(
        config, tower, depth, [Origin(theirs, depth, layer) for layer in layers], problems, patterned=patterned
    )
    return made, problems.found


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 4}, {"num_hidden_layers": 3}),
        ({"n_layer": 4, "n_head": 4}, {"n_layer": 3, "n_head": 4}),
        ({"n_layers": 4, "vocab_size": 4}, {"n_layers": 3, "vocab_size": 4}),
        ({"num_hidden_layers": 4, "max_window_layers": 4}, {"num_hidden_layers": 3, "max_window_layers": 3}),
        ({"num_hidden_layers": 4, "layer_types": list("abcd")}, {"num_hidden_layers": 3, "layer_types": list("acc")}),
        ({"num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1]}, {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 0]}),
        ({"num_hidden_layers": 4, "mlp_only_layers": [2]}, {"num_hidden_layers": 3, "mlp_only_layers": [1, 2]}),
        ({"num_hidden_layers": 4, "hybrid_override_pattern": "M*-M"}, {"num_hidden_layers": 3, "hybrid_override_pattern": "M--"}),
        ({"num_hidden_layers": 4, "eos_token_id": [1, 2, 3, 0]}, {"num_hidden_layers": 3, "eos_token_id": [1, 2, 3, 0]}),
        ({"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 2}}, {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 2}}),
    ],
)  # fmt: skip
def test_numbers_and_lists_by_layer_follow_the_layers(config, expected):
    assert restacked(config, [0, 2, 2]) == (expected, [])


def test_a_tower_is_told_from_its_sister_of_equal_depth():
    config = {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4}
    assert restacked(config, [0, 1, 1], tower="model.decoder.layers")[0] == {**config, "decoder_layers": 3}
    made = restacked(config, [0, 1, 1], tower="model.encoder.layers")[0]
    assert made == {"encoder_layers": 3, "decoder_layers": 4, "num_hidden_layers": 3}
    both = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}}
    made = restacked(both, [0], tower="vision_model.encoder.layers")[0]
    assert made == {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 1}}


def test_lists_by_layer_are_those_of_the_model_that_a_layer_comes_from():
    ours = {"num_hidden_layers": 4, "layer_types": list("aaaa")}
    theirs = {"num_hidden_layers": 4, "layer_types": list("abab")}
    assert restacked(ours, [1, 2], others=theirs)[0]["layer_types"] == ["b", "a"]


def test_a_rule_by_layer_number_that_fits_no_more_is_refused_unless_let_through():
    config = {"num_hidden_layers": 4, "full_attention_interval": 2}
    assert restacked(config, [0, 1, 2, 3, 2, 3])[1] == []
    (problem,) = restacked(config, [0, 2, 3])[1]
    assert "full_attention_interval is 2, a rule by layer number; layer 1 of the result comes from layer 2" in problem
    assert restacked(config, [0, 2, 3], patterned=True)[1] == []
    assert restacked({**config, "layer_types": list("abab")}, [0, 2, 3])[1] == []
    dense = {"num_hidden_layers": 4, "first_k_dense_replace": 1}
    assert restacked(dense, [0, 2, 3])[1] == []
    assert "first_k_dense_replace" in restacked(dense, [0, 2, 0])[1][0]


def test_a_configuration_without_the_number_of_layers_is_refused():
    assert "names no number of layers that is 4" in restacked({"num_hidden_layers": 7}, [0])[1][0]


@given(st.integers(0, 5), st.integers(1, 6), st.integers(0, 40))
def test_layers_that_are_placed_keep_everything_but_their_number(start, count, first):
    names = [f"a.layers.{i}.experts.{j}.w" for i in range(12) for j in range(2)] + ["a.embed.weight", "b.layers.0.w"]
    source = in_memory({name: torch.zeros(1) for name in names})
    placed = Placed("x", "a.layers", first, count, frozenset({"a.embed.weight"})).names(source, (start, start + count))
    assert len(placed) == 2 * count + 1
    for new, old in placed.items():
        if layer_of(old) is not None:
            assert layer_of(new) - first == layer_of(old) - start
            assert with_layer(new, 0) == with_layer(old, 0)


def test_what_only_the_first_layer_has_beyond_the_others_stays_there():
    t5 = ["b.0.q", "b.0.bias", "b.1.q", "b.2.q"]
    assert once_for_all(t5, "b") == {"b.0.bias"}
    deepseek = ["b.0.mlp", "b.0.q", "b.1.q", "b.1.experts.0.w", "b.2.q", "b.2.experts.0.w"]
    assert once_for_all(deepseek, "b") == frozenset()


def test_the_tower_is_found_by_its_depth_or_named():
    names = [f"h.{i}.w" for i in range(3)] + [f"score.{i}.w" for i in range(2)]
    assert main_tower(names) is None
    assert main_tower(names, [3]) == "h"
    assert depth_of(names) == {"h": 3, "score": 2}


def test_two_towers_need_a_name(tmp_path):
    save_file({f"{t}.layers.{i}.w": torch.ones(2) for t in "ab" for i in range(2)}, tmp_path / "m.safetensors")
    slices = [{"tasks": [{"path": str(tmp_path / "m.safetensors"), "layers": [0, 2]}]}] * 2
    with pytest.raises(
        RecipeError, match=r"no single tower of numbered layers \(there are a.layers \(2 layers\), b.layers"
    ):
        merge(Recipe.from_data({"method": "passthrough", "slices": slices}), tmp_path / "out.safetensors")
    merge(
        Recipe.from_data({"method": "passthrough", "slices": slices, "tower": "a.layers"}), tmp_path / "out.safetensors"
    )
    assert depth_of(load_file(tmp_path / "out.safetensors")) == {"a.layers": 4, "b.layers": 2}


def llama(folder, *, tied=False, layers=2, seed=0, kinds=None):
    import transformers

    torch.manual_seed(seed)
    extra = {} if kinds is None else {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 2}
    kind = transformers.LlamaConfig if kinds is None else transformers.Qwen2Config
    config = kind(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=layers, intermediate_size=24,
        vocab_size=24, tie_word_embeddings=tied, **extra,
    )  # fmt: skip
    model = (transformers.LlamaForCausalLM if kinds is None else transformers.Qwen2ForCausalLM)(config)
    model.save_pretrained(folder)
    return str(folder)


def test_mixed_kinds_of_attention_go_with_their_layers(tmp_path):
    import transformers

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    one = llama(tmp_path / "one", layers=3, kinds=kinds)
    slices = [{"tasks": [{"path": one, "layers": span}]} for span in ([0, 2], [1, 3])]
    merge(Recipe.from_data({"method": "passthrough", "slices": slices}), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.layer_types == [kinds[0], kinds[1], kinds[1], kinds[2]]
    assert bool(torch.isfinite(model(torch.arange(6)[None]).logits).all())


def test_a_stack_says_whether_its_head_is_tied(tmp_path):
    import transformers

    tied, free = llama(tmp_path / "tied", tied=True), llama(tmp_path / "free", seed=1)

    def stacked(first, last):
        return Recipe.from_data({"method": "passthrough", "slices": [{"tasks": [first]}, {"tasks": [last]}]})

    merge(stacked(tied, free), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool((model.lm_head.weight == load_file(tmp_path / "free" / "model.safetensors")["lm_head.weight"]).all())
    with pytest.raises(
        RecipeError, match=r"lm_head.weight: .*free has a head of its own, but the models of the last slice tie"
    ):
        merge(stacked(free, tied), tmp_path / "other")
    merge(stacked(tied, tied), tmp_path / "both")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers for it
def test_an_adapter_over_a_model_of_its_own_counts_as_one_whole_model(tmp_path, monkeypatch):
    import peft
    import transformers

    from taskvec.adapter import Adapter
    from taskvec.checkpoint import Checkpoint

    one, two = llama(tmp_path / "one"), llama(tmp_path / "two", seed=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(two)
    live = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    live.save_pretrained(tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    text = "\n".join(
        ["merge_method: passthrough", "slices:", "- sources: [{model: one, layer_range: [0, 1]}]", "- sources: [{model: two+lora, layer_range: [0, 2]}]"]
    )  # fmt: skip
    merge(Recipe.from_text(text), tmp_path / "out")
    delta = Adapter.open(tmp_path / "lora", Checkpoint.open(two)).read("model.layers.1.self_attn.q_proj.weight")
    plain = load_file(f"{two}/model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.2.self_attn.q_proj.weight"]
    torch.testing.assert_close(found, plain + delta)
    assert float(delta.norm()) > 0
    assert one != two
