"""The toy model of the goldens, small models for the laws, and the goldens themselves."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

GOLDENS = Path(__file__).parent.parent / "goldens" / "atlas"


class TinyViT(nn.Module):
    """The CLIP-like image encoder described in the goldens' README."""

    def __init__(self, d, heads, ff, layers, img, patch, out, vocab, tdim):
        super().__init__()
        count = (img // patch) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(d))
        self.positional_embedding = nn.Parameter(torch.zeros(count, d))
        self.proj = nn.Parameter(torch.zeros(d, out))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.conv1 = nn.Conv2d(3, d, patch, stride=patch, bias=False)
        self.ln_pre = nn.LayerNorm(d)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(d, heads, ff, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.ln_post = nn.LayerNorm(d)
        self.token_embedding = nn.Embedding(vocab, tdim)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(x.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([cls, x], dim=1) + self.positional_embedding)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class Golden:
    """One golden file: its model, its task vectors and its numbers."""

    def __init__(self, name):
        with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
            self.metadata = file.metadata()
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, key):
        return self.tensors[key]

    @property
    def blocks(self):
        return json.loads(self.metadata["block_names"])

    def under(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def model(self, dtype):
        model = TinyViT(**json.loads(self.metadata["model_config"]))
        base = self.under("base/")
        assert [name for name, _ in model.named_parameters()] == self.blocks
        model.load_state_dict(base)
        return model.to(dtype)

    def vectors(self, count=None):
        tasks = int(self.metadata["T"]) if count is None else count
        return {f"task{t}": self.under(f"tv/{t}/") for t in range(tasks)}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny tensors: more threads only get into each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden():
    cache = {}

    def load(name):
        if name not in cache:
            cache[name] = Golden(name)
        return cache[name]

    return load


def logits_of(features, weight, bias):
    return (features / features.norm(dim=-1, keepdim=True)) @ weight.T + bias


@pytest.fixture(scope="session")
def head():
    return logits_of
