from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

SHAPE = {
    "vocab_size": 89,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GPT = {
    "vocab_size": 89,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(**GPT),
    "gptj": lambda: transformers.GPTJConfig(**GPT, rotary_dim=4),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SHAPE),
    "opt": lambda: transformers.OPTConfig(**SHAPE, ffn_dim=96, word_embed_proj_dim=32),
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama with biases": lambda: transformers.LlamaConfig(**SHAPE, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SHAPE),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SHAPE, head_dim=8),
    "phi3": lambda: transformers.Phi3Config(**SHAPE),
    "phi": lambda: transformers.PhiConfig(**SHAPE),
    "glm4": lambda: transformers.Glm4Config(**SHAPE, head_dim=8),
    "stablelm": lambda: transformers.StableLmConfig(**SHAPE),
    "cohere": lambda: transformers.CohereConfig(**SHAPE),
    "nemotron": lambda: transformers.NemotronConfig(**SHAPE),
    "starcoder2": lambda: transformers.Starcoder2Config(**SHAPE),
    "bloom": lambda: transformers.BloomConfig(**SHAPE, n_layer=3, n_head=4),
    "falcon": lambda: transformers.FalconConfig(**SHAPE),
    "mamba": lambda: transformers.MambaConfig(vocab_size=89, hidden_size=32, num_hidden_layers=3, state_size=4),
}


def tiny(family: str, *, seed: int = 0) -> nn.Module:
    """A tiny model whose norms and biases are not the ones and zeros of initialisation."""
    torch.manual_seed(seed)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "A_log" not in name and "dt" not in name:
                parameter.add_((0.1 if name.endswith("weight") else 0.01) * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def tiny_model() -> Callable[..., nn.Module]:
    return tiny


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(FAMILIES))
