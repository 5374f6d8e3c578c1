"""Vision encoders whose modules transformers calls otherwise in memory than on disk."""

import copy

import pytest
import torch
from peft import LoraConfig

from taskvec import Checkpoint, TaskVector, write

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def encoder(kind):
    import transformers as t

    torch.manual_seed(0)
    if kind == "vit":
        return t.ViTForImageClassification(t.ViTConfig(**SIZES, intermediate_size=24))
    if kind == "beit":
        return t.BeitForImageClassification(
            t.BeitConfig(**SIZES, intermediate_size=24, use_relative_position_bias=True)
        )
    if kind == "dinov2":
        return t.Dinov2ForImageClassification(t.Dinov2Config(**SIZES, mlp_ratio=2))
    config = t.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], image_size=16, patch_size=2, window_size=4)
    return t.SwinForImageClassification(config)


@pytest.mark.parametrize("kind", ["vit", "beit", "dinov2", "swin"])
def test_an_adapter_by_names_in_memory_changes_the_checkpoint_by_names_on_disk(
    kind, tmp_path, saved_adapter, live_logits
):
    model = encoder(kind).eval()
    model.save_pretrained(tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    on_disk = [name for name in base.infos if name in model.state_dict()]
    assert len(on_disk) < len(base.infos), "nothing is renamed: a proof of nothing"
    images = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    linear = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
    config = LoraConfig(r=2, target_modules=linear, bias="all")
    folder = saved_adapter(model, config, tmp_path / "adapter")
    write(TaskVector.from_adapter(base, folder).apply_to(base), tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        ours, before = merged(images).logits, model(images).logits
    live = live_logits(copy.deepcopy(model), folder, {"pixel_values": images})
    assert (live - before).abs().max() > 1e-3
    torch.testing.assert_close(ours, live, atol=1e-5, rtol=0)
