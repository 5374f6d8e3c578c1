"""Every kind of adapter that PEFT saves: base + our deltas has the logits of PEFT's own live model."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig

from taskvec.adapter import Adapter
from taskvec.source import in_memory

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
def test_lora_and_dora_on_linear_layers(proven, llama, tokens, use_dora, use_rslora):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, use_dora=use_dora, use_rslora=use_rslora)
    adapter = proven(llama, config, tokens).adapter
    assert len(adapter.infos) == 2 * len(LINEAR)
    assert (adapter.low_rank("model.layers.0.self_attn.q_proj.weight") is None) == use_dora


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_lora_and_dora_on_conv1d_layers_of_gpt2(proven, gpt2, tokens, use_dora):
    proven(gpt2, LoraConfig(r=4, target_modules=CONV1D, fan_in_fan_out=True, use_dora=use_dora), tokens)


def test_a_square_conv1d_is_transposed_though_the_configuration_denies_it(proven, gpt2, tokens):
    # PEFT goes by the live module's type, with a warning; attn.c_proj is square, so its shape does not tell
    proof = proven(gpt2, LoraConfig(r=4, target_modules=["attn.c_proj"]), tokens)
    path = proof.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": False}))
    name = "transformer.h.0.attn.c_proj.weight"
    assert torch.equal(Adapter.open(proof.folder, in_memory(gpt2)).read(name), proof.adapter.read(name))


def test_conv1d_beside_linear_layers(proven, gpt2, tokens):
    proven(gpt2, LoraConfig(r=4, target_modules=[*CONV1D, "lm_head"], fan_in_fan_out=True), tokens)


def test_rank_and_alpha_patterns(proven, llama, tokens):
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=LINEAR,
        rank_pattern={"q_proj": 2, r"^model\.layers\.1\.mlp\.up_proj": 7},
        alpha_pattern={"layers.0.self_attn.v_proj": 9, "mlp.*": 5},
        use_rslora=True,
    )
    adapter = proven(llama, config, tokens).adapter
    assert adapter.low_rank("model.layers.0.self_attn.q_proj.weight").rank == 2
    assert adapter.low_rank("model.layers.1.mlp.up_proj.weight").rank == 7


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_embeddings_and_their_saved_copy(proven, llama, tokens, use_dora):
    proof = proven(llama, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], use_dora=use_dora), tokens)
    if not use_dora:
        assert proof.adapter.low_rank("model.embed_tokens.weight").rank == 4


def test_every_embedding_of_gpt2(proven, gpt2, tokens):
    proven(gpt2, LoraConfig(r=4, target_modules=["wte", "wpe", "c_attn"], fan_in_fan_out=True), tokens)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_convolutions_of_one_two_and_three_dimensions(proven, convnet, senses, use_dora):
    targets = ["conv1", "conv2", "point", "conv3", "linear"]
    proven(convnet, LoraConfig(r=3, target_modules=targets, use_dora=use_dora), senses)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_the_patch_embedding_of_an_image_encoder(proven, vit, pixels, use_dora):
    config = LoraConfig(r=4, target_modules=["projection", "query", "q_proj", "dense", "fc1"], use_dora=use_dora)
    assert any(len(info.shape) == 4 for info in proven(vit, config, pixels).adapter.infos.values())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(proven, bert, tokens, bias):
    adapter = proven(bert, LoraConfig(r=4, target_modules=["query", "value"], bias=bias), tokens).adapter
    biases = [name for name in adapter.infos if name.endswith("bias")]
    assert len(biases) == (4 if bias == "lora_only" else sum(n.endswith("bias") for n in bert.state_dict()))


def test_lora_bias(proven, bert, tokens):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["query", "dense"], lora_bias=True, use_rslora=True)
    proven(bert, config, tokens)


def test_saved_modules(proven, bert, tokens):
    config = LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier", "LayerNorm"])
    adapter = proven(bert, config, tokens).adapter
    assert {"classifier.weight", "classifier.bias"} < set(adapter.infos)


def test_a_classifier_adapter_saves_its_head_by_itself(proven, bert, tokens):
    assert (
        "classifier.weight"
        in proven(bert, LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"), tokens).adapter.infos
    )


def test_a_saved_embedding_and_head(proven, llama, tokens):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    proven(llama, config, tokens)


@pytest.mark.parametrize("indices", [[1, 3, 60], {"embed_tokens": [5, 7]}], ids=["list", "mapping"])
def test_single_trained_tokens(proven, llama, tokens, indices):
    adapter = proven(llama, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices), tokens).adapter
    changed = adapter.read("model.embed_tokens.weight").abs().sum(1).nonzero().flatten().tolist()
    assert changed == ([1, 3, 60] if isinstance(indices, list) else [5, 7])


@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian", "orthogonal", "mica", False])
def test_starts_that_move_the_base_and_starts_that_do_not(proven, llama, tokens, start):
    adapter = proven(
        llama, LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, init_lora_weights=start), tokens
    ).adapter
    rank = adapter.low_rank("model.layers.0.mlp.up_proj.weight").rank
    assert rank == (8 if start in ("pissa", "olora") else 4)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_moved_head_that_is_saved_beside_its_factors_is_moved_once(proven, llama, tokens, start):
    proven(llama, LoraConfig(r=4, lora_alpha=6, target_modules=["v_proj", "lm_head"], init_lora_weights=start), tokens)


def test_pissa_on_conv1d_layers(proven, gpt2, tokens):
    proven(gpt2, LoraConfig(r=4, target_modules=CONV1D, fan_in_fan_out=True, init_lora_weights="pissa"), tokens)


def test_olora_on_a_square_conv1d(proven, gpt2, tokens):
    proven(
        gpt2, LoraConfig(r=4, target_modules=["attn.c_proj"], fan_in_fan_out=True, init_lora_weights="olora"), tokens
    )


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_dora_over_a_moved_base(proven, llama, tokens, start):
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=start, use_dora=True)
    proven(llama, config, tokens)


def test_velora_is_plain_lora_when_it_is_run(proven, llama, tokens):
    from peft import VeloraConfig

    proven(llama, LoraConfig(r=4, target_modules=["q_proj"], velora_config=VeloraConfig(num_groups=4)), tokens)


def test_multihead_attention_of_torch(proven, attention_net):
    inputs = {"x": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))}
    adapter = proven(attention_net, LoraConfig(r=4, target_modules=["attention", "head"]), inputs).adapter
    assert set(adapter.infos) == {"attention.in_proj_weight", "attention.out_proj.weight", "head.weight"}


@pytest.mark.parametrize("feedforward", [["down_proj"], [], r".*\.down_proj"], ids=["list", "none", "pattern"])
def test_ia3_on_linear_layers(proven, llama, tokens, feedforward):
    targets = ["k_proj", "v_proj", "down_proj"]
    if isinstance(feedforward, str):
        targets = r".*\.(k_proj|v_proj|down_proj)"
    proven(llama, IA3Config(target_modules=targets, feedforward_modules=feedforward), tokens)


def test_ia3_scales_biases_of_outputs_only(proven, bert, tokens):
    config = IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])
    adapter = proven(bert, config, tokens).adapter
    assert "bert.encoder.layer.0.attention.self.key.bias" in adapter.infos
    assert "bert.encoder.layer.0.output.dense.bias" not in adapter.infos


def test_ia3_on_conv1d_layers(proven, gpt2, tokens):
    config = IA3Config(
        target_modules=["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
        feedforward_modules=["attn.c_proj", "c_fc"],
        fan_in_fan_out=True,
    )
    proven(gpt2, config, tokens)


@pytest.mark.parametrize("feedforward", [["conv2"], []], ids=["inputs", "outputs"])
def test_ia3_on_convolutions(proven, convnet, senses, feedforward):
    proven(convnet, IA3Config(target_modules=["conv2", "conv3", "linear"], feedforward_modules=feedforward), senses)


def test_ia3_with_a_saved_head(proven, bert, tokens):
    config = IA3Config(target_modules=["key"], feedforward_modules=[], modules_to_save=["classifier"])
    assert "classifier.weight" in proven(bert, config, tokens).adapter.infos


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["mlp.experts.down_proj"]], ids=["both", "one"])
def test_fused_experts(proven, mixtral, tokens, parameters):
    config = LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=parameters,
        rank_pattern={"experts.down_proj": 3},
    )
    adapter = proven(mixtral, config, tokens).adapter
    assert adapter.infos["model.layers.0.mlp.experts.down_proj"].shape == (3, 32, 48)


def test_a_router_that_is_a_bare_matrix(proven, mixtral, tokens):
    config = LoraConfig(r=2, lora_alpha=16, target_modules=[], target_parameters=["mlp.gate.weight"])
    adapter = proven(mixtral, config, tokens).adapter
    assert adapter.low_rank("model.layers.0.mlp.gate.weight").rank == 2


def test_both_towers_of_clip(proven, pixels):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 61, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 60}
    vision = sizes | {"image_size": 16, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()

    class Scores(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = model

        def forward(self, **inputs):
            return self.clip(**inputs).logits_per_text

    inputs = pixels | {"input_ids": torch.arange(20).reshape(2, 10)}
    targets = ["q_proj", "fc2", "patch_embedding", "token_embedding", "text_projection"]
    adapter = proven(Scores(), LoraConfig(r=4, target_modules=targets), inputs).adapter
    assert {name.split(".")[1] for name in adapter.infos} == {"text_model", "vision_model", "text_projection"}


def test_tokens_of_tied_embeddings_are_changed_once(proven, tied_llama, tokens):
    adapter = proven(
        tied_llama, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2, 3]), tokens
    ).adapter
    assert [name for name in adapter.infos if "proj" not in name] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("kind", ["target_modules", "modules_to_save"])
def test_tied_embeddings_that_peft_keeps_tied_are_changed_once(proven, tied_llama, tokens, kind):
    arguments = {"target_modules": ["q_proj"], "modules_to_save": None}
    arguments[kind] = ["embed_tokens", "q_proj"] if kind == "target_modules" else ["embed_tokens"]
    adapter = proven(tied_llama, LoraConfig(r=4, ensure_weight_tying=True, **arguments), tokens).adapter
    assert [name for name in adapter.infos if "proj" not in name] == ["model.embed_tokens.weight"]
