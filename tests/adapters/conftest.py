import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from taskvec.adapter import Adapter
from taskvec.source import in_memory

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def _quiet(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


@pytest.fixture(scope="session")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return _quiet(lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)).eval())


@pytest.fixture(scope="session")
def tied_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    return _quiet(lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)).eval())


@pytest.fixture(scope="session")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=53, n_positions=32, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False, initializer_range=0.2
    )
    return _quiet(lambda: GPT2LMHeadModel(config).eval())


@pytest.fixture(scope="session")
def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=67,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=3,
        initializer_range=0.2,
    )
    return _quiet(lambda: BertForSequenceClassification(config).eval())


@pytest.fixture(scope="session")
def vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(4)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=5,
        initializer_range=0.2,
    )
    return _quiet(lambda: ViTForImageClassification(config).eval())


@pytest.fixture(scope="session")
def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(5)
    config = MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False)
    return _quiet(lambda: MixtralForCausalLM(config).eval())


class ConvNet(nn.Module):
    """One convolution each of 1, 2 and 3 dimensions, with a stride, a padding and a 1x1 kernel among them."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 4, 3, stride=2)
        self.point = nn.Conv2d(4, 4, 1)
        self.conv3 = nn.Conv3d(2, 5, (1, 2, 3), bias=False)
        self.linear = nn.Linear(6, 7)

    def forward(self, sound, picture, volume):
        features = self.conv1(sound).mean(-1)
        features = features + self.point(self.conv2(picture)).mean((2, 3)).repeat(1, 2)[:, :6]
        return self.linear(features + self.conv3(volume).mean((2, 3, 4)).repeat(1, 2)[:, :6])


class AttentionNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


@pytest.fixture(scope="session")
def convnet():
    torch.manual_seed(6)
    return ConvNet().eval()


@pytest.fixture(scope="session")
def attention_net():
    torch.manual_seed(7)
    return AttentionNet().eval()


@pytest.fixture(scope="session")
def tokens():
    return {"input_ids": torch.arange(20).reshape(2, 10) * 2 + 1}


@pytest.fixture(scope="session")
def pixels():
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(8))}


@pytest.fixture(scope="session")
def senses():
    generator = torch.Generator().manual_seed(9)
    shapes = {"sound": (2, 4, 9), "picture": (2, 3, 9, 9), "volume": (2, 2, 3, 4, 5)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _logits(model, inputs):
    with torch.no_grad():
        result = model.eval()(**inputs)
    return result.logits if hasattr(result, "logits") else result


def _perturbed(model):
    """Moves everything that the adapter trains away from where it starts."""
    generator = torch.Generator().manual_seed(10)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def _saved_adapter(model, config, folder, **kwargs):
    """An adapter made, trained (pretended) and saved by PEFT."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of resized embeddings, tied modules and fan_in_fan_out
        _perturbed(get_peft_model(copy.deepcopy(model), copy.deepcopy(config))).save_pretrained(folder, **kwargs)
    return folder


def _live_logits(model, folder, inputs):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _logits(PeftModel.from_pretrained(copy.deepcopy(model), folder), inputs)


def _with_deltas(model, source):
    """A copy of the model with the deltas added to its parameters by name."""
    result = copy.deepcopy(model)
    parameters = dict(result.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in source.infos:
            parameters[name] += source.read(name)
    return result


@dataclass
class Proof:
    adapter: Adapter
    folder: object


@pytest.fixture
def proven(tmp_path):
    """Saves an adapter by PEFT and shows that base + our deltas computes what PEFT's live model computes."""

    def prove(model, config, inputs, *, tied="refuse", **kwargs):
        folder = _saved_adapter(model, config, tmp_path / "adapter", **kwargs)
        live = _live_logits(model, folder, inputs)
        adapter = Adapter.open(folder, in_memory(model), tied=tied)
        ours = _logits(_with_deltas(model, adapter), inputs)
        assert (live - _logits(model, inputs)).abs().max() > 0.02, "the adapter does nothing: a proof of nothing"
        torch.testing.assert_close(ours, live, atol=1e-5 * max(1.0, float(live.abs().max())), rtol=0)
        _check_reads(adapter)
        return Proof(adapter, folder)

    return prove


def _check_reads(adapter):
    """Pieces have the bits of the whole, and a product is the delta."""
    for name, info in adapter.infos.items():
        whole = adapter.read(name)
        assert whole.shape == info.shape
        assert whole.dtype == info.dtype
        flat, third = whole.reshape(-1), max(1, info.numel // 3)
        for start in range(0, info.numel, third):
            assert torch.equal(
                adapter.read_flat(name, start, min(start + third, info.numel)), flat[start : start + third]
            )
        product = adapter.low_rank(name)
        if product is not None:
            torch.testing.assert_close(product.dense(), whole, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="session")
def saved_adapter():
    return _saved_adapter


@pytest.fixture(scope="session")
def live_logits():
    return _live_logits


@pytest.fixture(scope="session")
def with_deltas():
    return _with_deltas


@pytest.fixture(scope="session")
def check_reads():
    return _check_reads


@pytest.fixture(scope="session")
def perturbed():
    return _perturbed


@pytest.fixture(scope="session")
def logits():
    return _logits


@pytest.fixture(scope="session")
def sizes():
    """The configuration of the tiny language models."""
    return LLAMA
