"""What the three zoos share: one training loop, and folders that remember what they were built from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STAMP = "built-from.json"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(model: nn.Module, loss: Callable[[int], Tensor], *, steps: int, rate: float, warm_up: float = 0.1) -> float:
    """AdamW on what requires a gradient, warm-up then linear decay, norm clipped at 1. Returns the last loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, fused=True)
    rising = max(1, round(warm_up * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (steps - step) / max(1, steps - rising))
    )
    value = torch.tensor(float("nan"))
    for step in range(steps):
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return float(value.detach())


def built(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder is whole and was built with these settings; an older or half-written one is removed."""
    stamp = folder / STAMP
    if stamp.exists() and json.loads(stamp.read_text()) == settings:
        return True
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    return False


def finish(folder: Path, settings: dict[str, Any]) -> None:
    """Written last: a folder without it was interrupted."""
    (folder / STAMP).write_text(json.dumps(settings))


def link_base(base: Path, link: Path) -> None:
    """The reduced zoo uses the full one's base."""
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(base, target_is_directory=True)
