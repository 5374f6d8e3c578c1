"""No list of architectures: each of these merges by the command, with a gradient over depth, and loads in transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from merging import Recipe, merge
from taskvec.blocks import depth_of, layer_of, tower_of

NAMES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox", "mixtral", "mamba", "bert", "roberta", "vit", "clip",
    "whisper", "t5",
]  # fmt: skip
METHODS = {
    "task_arithmetic": {"method": "task_arithmetic"},
    "ties": {"method": "ties", "parameters": {"density": {"gradient": [0.3, 0.9]}}, "statistics": "tensor"},
    "pcb": {"method": "pcb", "parameters": {"density": 0.5}},
    "tsv_m": {"method": "tsv_m"},
}


def recipe_of(family, method):
    state = load_file(family.base / "model.safetensors")
    kept = next(name for name in state if layer_of(name) == 0 and state[name].ndim == 2)
    tasks = [
        {"path": str(family.tuned[0]), "weight": {"gradient": [0.2, 1.0]}},
        {"path": str(family.tuned[1]), "weight": {"*bias": 0.5, "default": 0.3}} if any(n.endswith("bias") for n in state)
        else {"path": str(family.tuned[1]), "weight": 0.3},
    ]  # fmt: skip
    return {"base": str(family.base), "tasks": tasks, "keep_base": [kept], **METHODS[method]}, kept


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", NAMES, indirect=True)
def test_a_merge_by_the_command_loads_and_runs(family, method, tmp_path, run):
    recipe, kept = recipe_of(family, method)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    code, _, told = run("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert code == 0, told
    base, merged = (load_file(folder / "model.safetensors") for folder in (family.base, tmp_path / "out"))
    assert merged.keys() == base.keys()
    assert bool((merged[kept] == base[kept]).all())
    changed = [name for name in base if base[name].is_floating_point() and not bool((merged[name] == base[name]).all())]
    assert len(changed) > len(base) * 0.8
    logits = family.logits(family.loaded(tmp_path / "out"))
    assert bool(torch.isfinite(logits).all())
    assert not torch.allclose(logits, family.logits(family.loaded(family.base)))


@pytest.mark.parametrize("family", NAMES, indirect=True)
def test_a_gradient_over_depth_follows_the_layers_of_each_tower(family, tmp_path):
    recipe, _ = recipe_of(family, "task_arithmetic")
    recipe |= {"keep_base": [], "tasks": [{"path": str(family.tuned[0]), "weight": {"gradient": [0.0, 0.5, 1.0]}}]}
    recipe["tasks"][0]["weight"] = {"*": {"gradient": [0.25, 1.0]}}
    merge(Recipe.from_data(recipe), tmp_path / "out")
    base, tuned, merged = (
        load_file(folder / "model.safetensors") for folder in (family.base, family.tuned[0], tmp_path / "out")
    )
    depth = depth_of(base)
    for name, value in base.items():
        if not value.is_floating_point():
            continue
        layer, layers = layer_of(name), depth.get(tower_of(name), 1)
        position = 0.0 if layer is None or layers < 2 else layer / (layers - 1)
        assert_close(merged[name], value + (0.25 + 0.75 * position) * (tuned[name] - value), atol=1e-6, rtol=1e-6)


STACKED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "mamba",
    "bert",
    "roberta",
    "vit",
]


@pytest.mark.parametrize("family", STACKED, indirect=True)
def test_layers_stack_and_the_taller_model_loads(family, tmp_path):
    one, two = map(str, family.tuned)
    slices = [
        {"tasks": [{"path": one, "layers": [0, 2]}]},
        {"tasks": [{"path": two, "layers": [1, 3]}]},
        {"tasks": [{"path": one, "layers": [2, 3]}, {"path": two, "layers": [2, 3]}], "method": "average"},
    ]
    merge(Recipe.from_data({"method": "passthrough", "slices": slices}), tmp_path / "out")
    model = family.loaded(tmp_path / "out")
    assert model.config.num_hidden_layers == 5
    kinds = getattr(model.config, "layer_types", None)
    assert kinds is None or (len(kinds) == 5 and len(set(kinds)) == 1)
    assert bool(torch.isfinite(family.logits(model)).all())


@pytest.mark.parametrize(("family", "tower"), [("clip", "vision_model"), ("whisper", "decoder"), ("t5", "decoder"), ("whisper", "encoder")], indirect=["family"])  # fmt: skip
def test_the_layers_of_one_tower_stack(family, tower, tmp_path):
    one, two = map(str, family.tuned)
    slices = [{"tasks": [{"path": one, "layers": [0, 2]}]}, {"tasks": [{"path": two, "layers": [0, 2]}]}]
    recipe = {"method": "passthrough", "modules": {tower: {"slices": slices}}}
    merge(Recipe.from_data(recipe), tmp_path / "out")
    model = family.loaded(tmp_path / "out")
    found = [n for t, n in depth_of(load_file(tmp_path / "out" / "model.safetensors")).items() if tower in t]
    assert found == [4]
    assert bool(torch.isfinite(family.logits(model)).all())


@pytest.mark.parametrize("family", ["clip"], indirect=True)
def test_the_towers_of_a_model_merge_in_their_own_ways(family, tmp_path):
    one, two = map(str, family.tuned)
    modules = {
        "text_model": {"tasks": [one, two], "method": "average"},
        "vision_model": {
            "tasks": [one, {"path": two, "weight": 2}],
            "method": "task_arithmetic",
            "base": str(family.base),
        },
    }
    merge(Recipe.from_data({"method": "average", "modules": modules, "base": str(family.base)}), tmp_path / "out")
    base, first, second, merged = (
        load_file(folder / "model.safetensors") for folder in (family.base, *family.tuned, tmp_path / "out")
    )
    for name, value in merged.items():
        if name.startswith("text_model."):
            assert_close(value, (first[name] + second[name]) / 2 if value.is_floating_point() else first[name])
        elif name.startswith("vision_model.") and value.is_floating_point():
            assert_close(value, base[name] + first[name] - base[name] + 2 * (second[name] - base[name]))
        else:
            assert bool((value == base[name]).all())
    family.loaded(tmp_path / "out")


def unet(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv_in.weight": (4, 3, 3, 3), "time_embedding.linear_1.weight": (8, 4), "conv_out.weight": (3, 4, 3, 3)}
    for block, count in (("down_blocks", 2), ("up_blocks", 2)):
        for i in range(count):
            shapes |= {
                f"{block}.{i}.resnets.{j}.{part}": shape
                for j in range(2)
                for part, shape in (
                    ("conv1.weight", (4, 4, 3, 3)),
                    ("norm1.weight", (4,)),
                    ("time_emb_proj.weight", (4, 8)),
                )
            }
            shapes[f"{block}.{i}.attentions.0.transformer_blocks.0.attn1.to_q.weight"] = (4, 4)
    shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"] = (4, 6)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_unet_merges_as_a_state_dict(method, tmp_path, run):
    base = unet(0)
    save_file(base, tmp_path / "base.safetensors")
    for seed in (1, 2):
        save_file({k: v + 0.1 * unet(seed)[k] for k, v in base.items()}, tmp_path / f"ft{seed}.safetensors")
    recipe = {
        "base": str(tmp_path / "base.safetensors"), "keep_base": ["conv_in.*"],
        "tasks": [{"path": str(tmp_path / "ft1.safetensors"), "weight": {"gradient": [0.1, 0.9]}}, str(tmp_path / "ft2.safetensors")],
        **METHODS[method],
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    code, _, told = run("merge", tmp_path / "r.yaml", tmp_path / "out.safetensors")
    assert code == 0, told
    merged = load_file(tmp_path / "out.safetensors")
    assert merged.keys() == base.keys()
    assert all(bool(torch.isfinite(value).all()) for value in merged.values())
    assert bool((merged["conv_in.weight"] == base["conv_in.weight"]).all())
