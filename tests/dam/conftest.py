from pathlib import Path

import pytest
import torch
from safetensors import safe_open

GOLDENS = Path(__file__).parents[1] / "goldens" / "dam"


class Golden:
    """One golden file: metadata, and tensors by prefix (`tensors("mask.")` gives name to tensor in recorded order)."""

    def __init__(self, name: str):
        with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
            self.metadata = file.metadata()
            self.values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.order = self.metadata["order"].split(",")

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.values[key]

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name: self.values[prefix + name] for name in self.order}


@pytest.fixture
def golden():
    return Golden
