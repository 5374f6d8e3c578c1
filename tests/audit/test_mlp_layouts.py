import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from merging.edits.layouts import mlp_layout
from taskvec.source import in_memory


def seen_by(model: nn.Module, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of modules in one forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name in names:

        def hook(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            # Falcon adds attention into the very tensor
            seen[name] = (args[0].detach().clone(), output.detach().clone())

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 19)[None])
    for handle in handles:
        handle.remove()
    return seen


def test_rows_and_norm_are_those_the_model_computes_with(family: str, tiny_model: Callable[..., nn.Module]) -> None:
    model: Any = tiny_model(family)
    source = in_memory(model)
    layout = mlp_layout(source, model.config.to_dict())
    assert [mlp.layer for mlp in layout.mlps] == [0, 1, 2]
    assert layout.without == ()
    for mlp in layout.mlps:
        inside, out = mlp.inside.name.removesuffix(".weight"), mlp.out.name.removesuffix(".weight")
        seen = seen_by(model, [inside, out])
        x, pre = seen[inside]
        rows, bias = mlp.inside.rows(source, mlp.neurons), mlp.inside.biases(source, mlp.neurons)
        expected = x @ rows.T + (0 if bias is None else bias)
        torch.testing.assert_close(pre[..., mlp.inside.start :][..., : mlp.neurons], expected, rtol=1e-4, atol=1e-5)
        if mlp.up is not None:
            up = x @ mlp.up.rows(source, mlp.neurons).T
            name = mlp.up.name.removesuffix(".weight")
            given = seen_by(model, [name])[name][1][..., mlp.up.start :][..., : mlp.neurons]
            bias = mlp.up.biases(source, mlp.neurons)
            torch.testing.assert_close(given, up + (0 if bias is None else bias), rtol=1e-4, atol=1e-5)
        h, y = seen[out]
        columns = mlp.out.rows(source, mlp.neurons)
        assert columns.shape == (mlp.neurons, mlp.width)
        added = model.get_submodule(out).bias
        torch.testing.assert_close(y, h @ columns + (0 if added is None else added), rtol=1e-4, atol=1e-5)
        # features lie on the unit sphere of the norm that was found
        shift = 0 if mlp.norm_bias is None else source.read(mlp.norm_bias)
        radius = ((x - shift) / (math.sqrt(mlp.width) * mlp.scale(source))).norm(dim=-1)
        # eps of the norm against features of size 0.02, at initialisation
        torch.testing.assert_close(radius, torch.ones_like(radius), rtol=0, atol=0.05)


def test_experts_are_mlps_of_their_own_in_either_form(tmp_path: Any) -> None:
    config = transformers.MixtralConfig(
        vocab_size=89, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    in_ram = in_memory(model)
    fused = mlp_layout(in_ram)
    assert [(mlp.layer, mlp.neurons, mlp.inside.expert) for mlp in fused.mlps] == [
        (layer, 48, expert) for layer in range(2) for expert in range(3)
    ]
    weight = in_ram.read("model.layers.1.mlp.experts.gate_up_proj")
    mlp = fused.mlps[5]
    assert torch.equal(mlp.inside.rows(in_ram, 48), weight[2, :48])
    assert mlp.up is not None
    assert torch.equal(mlp.up.rows(in_ram, 48), weight[2, 48:])
    assert mlp.out.place(4) == "model.layers.1.mlp.experts.down_proj[2, :, 4]"
    apart = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{word}.weight": torch.randn(shape)
        for expert in range(2)
        for word, shape in (("w1", (48, 32)), ("w2", (32, 48)), ("w3", (48, 32)))
    }
    named = mlp_layout(in_memory({**apart, "model.layers.0.post_attention_layernorm.weight": torch.ones(32)}))
    assert [mlp.key.rpartition(".")[2] for mlp in named.mlps] == ["0", "1"]
    assert named.mlps[1].norm == "model.layers.0.post_attention_layernorm.weight"


def test_a_model_without_a_norm_before_the_mlp_is_known_as_such() -> None:
    config = transformers.Olmo2Config(
        vocab_size=89, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    layout = mlp_layout(in_memory(transformers.AutoModelForCausalLM.from_config(config)))
    assert [mlp.norm for mlp in layout.mlps] == [None, None]


def test_unknown_words_are_told_by_their_shapes_and_attention_is_not_an_mlp() -> None:
    state = {
        "net.blocks.0.mixing.expand.weight": torch.randn(40, 12),
        "net.blocks.0.mixing.shrink.weight": torch.randn(12, 40),
        "net.blocks.0.attn.down.weight": torch.randn(6, 12),
        "net.blocks.0.attn.back.weight": torch.randn(12, 6),
        "net.blocks.1.attn.down.weight": torch.randn(6, 12),
        "net.blocks.1.attn.back.weight": torch.randn(12, 6),
    }
    layout = mlp_layout(in_memory(state))
    assert [(mlp.neurons, mlp.width, mlp.inside.axis) for mlp in layout.mlps] == [(40, 12, 0)]
    assert layout.without == ("net.blocks.1",)


@pytest.mark.parametrize("kind", ["bert", "vit", "t5"])
def test_encoders_are_read_as_well(kind: str) -> None:
    config: Any = {
        "bert": transformers.BertConfig(
            vocab_size=89, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
        ),
        "vit": transformers.ViTConfig(
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        "t5": transformers.T5Config(vocab_size=89, d_model=32, d_kv=8, d_ff=96, num_layers=2, num_heads=4),
    }[kind]
    layout = mlp_layout(in_memory(transformers.AutoModel.from_config(config)))
    assert {(mlp.neurons, mlp.width) for mlp in layout.mlps} == {(96, 32)}
    norm = {"bert": "attention.output.LayerNorm", "vit": "layernorm_after", "t5": "decoder.block.0.layer.2.layer_norm"}[
        kind
    ]
    assert layout.mlps[0].norm is not None
    assert norm in layout.mlps[0].norm


def test_layer_ten_comes_after_layer_two() -> None:
    state = {}
    for layer in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9):
        state[f"h.{layer}.mlp.fc1.weight"] = torch.randn(12, 4)
        state[f"h.{layer}.mlp.fc2.weight"] = torch.randn(4, 12)
    assert [mlp.layer for mlp in mlp_layout(in_memory(state)).mlps] == list(range(12))
