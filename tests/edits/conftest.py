"""Tiny random models of real architectures, and a corpus of token ids. Nothing here is trained or downloaded."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 69
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_KV = {**_COMMON, "num_key_value_heads": 2}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neox": _COMMON,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        **_IDS,
    },
    "llama": _KV,
    "mistral": _KV,
    "qwen2": _KV,
    "qwen3": {**_KV, "head_dim": 8},
    "gemma": {**_KV, "head_dim": 8},
    "gemma2": {**_KV, "head_dim": 8},
    "gemma3_text": {**_KV, "head_dim": 8},
    "phi": _COMMON,
    "phi3": _KV,
    "stablelm": _KV,
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY, **_IDS},
    "nemotron": _KV,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": VOCABULARY, "state_size": 4, **_IDS},
    "mixtral": {**_KV, "num_local_experts": 4},
    "olmo2": _KV,
}


@cache
def _weights(family: str, seed: int) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**CONFIGS[family])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # norms and biases away from their initial ones and zeros, so that a wrong formula shows
            if parameter.dim() == 1 and "mixer" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            # and every part of the stream of one size, so that tokens mix and logits differ as in a trained model
            elif not any(word in name for word in ("A_log", "conv1d", "dt_proj", "x_proj", "wpe", "embed_positions")):
                parameter.mul_(8)
    return config, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def tiny_model(family: str, seed: int = 0) -> Any:
    """A fresh tiny model of this family in evaluation mode."""
    config, weights = _weights(family, seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**config.to_diff_dict()))
    model.load_state_dict(weights)
    return model.eval()


def token_ids(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random token sequences."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    return tiny_model


@pytest.fixture(scope="session")
def ids() -> Callable[..., list[list[int]]]:
    return token_ids


@pytest.fixture(scope="session")
def corpus() -> list[list[int]]:
    return token_ids(30, 32, seed=1)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return token_ids(40, 7, seed=2)


@pytest.fixture
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture
def gpt2() -> Any:
    return tiny_model("gpt2")
