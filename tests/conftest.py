"""Fixtures that several folders share: small real checkpoints on disk."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask a network
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, by whatever test comes first
GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS


def tiny_state(seed: int, *, layers: int = 2, width: int = 16, vocabulary: int = 24) -> dict[str, torch.Tensor]:
    """A Llama-shaped state dict of a few thousand values."""
    generator = torch.Generator().manual_seed(seed)
    state = {"model.embed_tokens.weight": torch.randn(vocabulary, width, generator=generator)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        state[prefix + "self_attn.q_proj.weight"] = torch.randn(width, width, generator=generator)
        state[prefix + "mlp.up_proj.weight"] = torch.randn(2 * width, width, generator=generator)
        state[prefix + "input_layernorm.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
    state["model.norm.weight"] = torch.ones(width)
    state["lm_head.weight"] = torch.randn(vocabulary, width, generator=generator)
    return state


def save_model(folder: Path, state: dict[str, torch.Tensor], config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config if config is not None else {"model_type": "llama"}))
    return folder


class Zoo:
    """A base and fine-tunes in a folder, with helpers to make more."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base_state = tiny_state(0)
        self.base = save_model(folder / "base", self.base_state)
        self.tuned = [self.tune(f"ft{i}", seed=i) for i in (1, 2, 3)]

    def tune(
        self, name: str, *, seed: int = 1, change: "Callable[[dict[str, torch.Tensor]], None] | None" = None
    ) -> Path:
        generator = torch.Generator().manual_seed(100 + seed)
        state = {
            key: value
            + 0.05
            * torch.randn(value.shape, generator=generator)
            * (torch.rand(value.shape, generator=generator) < 0.5)
            for key, value in self.base_state.items()
        }
        if change is not None:
            change(state)
        return save_model(self.folder / name, state)

    def recipe(self, **changes: object) -> dict[str, object]:
        return {
            "base": str(self.base),
            "tasks": [str(path) for path in self.tuned],
            "method": "task_arithmetic",
            **changes,
        }


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return Zoo(tmp_path / "zoo")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> "Callable[..., tuple[int, str, str]]":
    """Runs the command line in this process: exit code, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        from merging.commands import main

        capfd.readouterr()
        code = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call
