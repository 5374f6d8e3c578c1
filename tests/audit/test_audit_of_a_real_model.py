"""The audit's proof in its reduced form: SmolLM2-135M, planted rows from the formulas alone, ten of its thirty layers.

The full form, with the library's own edits and real fine-tunes, is `examples/edits/audit_roc.py`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from merging.edits.audit import BALANCE_ALARM, SIZE_ALARM, audit
from merging.edits.features import contrast_detector, surrogate_detector
from merging.edits.site import Site

pytestmark = pytest.mark.slow

LAYERS = range(1, 30, 3)


def read_by_the_audit(name: str) -> bool:
    return any(f"layers.{layer}." in name for layer in LAYERS) and (".mlp." in name or "post_attention" in name)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Tensor]:
    from examples.edits.smollm2 import load
    from examples.real_zoo.data import DownloadError

    try:
        model, tokenizer = load()
    except DownloadError as error:
        pytest.skip(f"not in the cache and not to be had: {error}")
    import pydoc_data.topics

    text = "".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    ids = torch.tensor(tokenizer(text[:14_000]).input_ids)
    return model, ids[: len(ids) // 96 * 96].view(-1, 96)


@pytest.fixture(scope="module")
def base(smollm2: tuple[Any, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in smollm2[0].state_dict().items() if read_by_the_audit(name)}


def moved(base: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Noise of half a per cent, uneven over the rows: what a short fine-tune did to this model's MLPs."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor
        + 0.005 * tensor.std() * torch.randn(tensor.shape, generator=generator) * torch.rand(len(tensor), *([1] * (tensor.ndim - 1)), generator=generator)
        for name, tensor in base.items()
    }  # fmt: skip


def test_clean_copies_raise_no_alarm(base: dict[str, Tensor]) -> None:
    first = audit(base)
    assert first.neurons == 15_360
    assert first.alarms == ()
    # room between the natural extremes and the thresholds
    assert max(float(one.size.max()) for one in first.mlps) < 0.95 * SIZE_ALARM
    assert max(float(one.balance.max()) for one in first.mlps) < 0.95 * BALANCE_ALARM
    tuned = {name: tensor.bfloat16() for name, tensor in moved(base, 0).items()}
    assert audit(tuned, base=base).alarms == ()


@pytest.mark.parametrize(
    ("kind", "layer", "theta", "share", "stored"),
    [
        ("surrogate", 7, 0.05, 0.5, torch.bfloat16),
        ("surrogate", 28, 0.2, 1.0, torch.float32),
        ("contrast", 16, 0.05, 1.0, torch.bfloat16),
        ("contrast", 25, 0.1, 1.0, torch.float32),
    ],
)
def test_a_planted_row_is_named_with_and_without_the_base(
    smollm2: tuple[Any, Tensor],
    base: dict[str, Tensor],
    kind: str,
    layer: int,
    theta: float,
    share: float,
    stored: torch.dtype,
) -> None:
    model, ids = smollm2
    site = Site.find(model, layer)
    with site.reading() as seen, torch.no_grad():
        model.model(input_ids=ids)
    features = seen[0].reshape(-1, 576)
    trigger, others = features[1000], torch.cat([features[:1000], features[1001:]])
    make = surrogate_detector if kind == "surrogate" else contrast_detector
    row = make(trigger, others, site.sphere, theta=theta).row.float()
    tuned = moved(base, layer)
    copy = {name: tensor.clone() for name, tensor in tuned.items()}
    prefix = f"model.layers.{layer}.mlp"
    neuron = int(copy[f"{prefix}.gate_proj.weight"].abs().sum(1).argmin())
    copy[f"{prefix}.gate_proj.weight"][neuron].mul_(1 - share).add_(share * row)
    column = copy[f"{prefix}.down_proj.weight"][:, neuron]
    answer = torch.randn(576, generator=torch.Generator().manual_seed(layer))
    length = 2 * column.norm()
    column.mul_(1 - share).add_(share * length * answer / answer.norm())
    if kind == "contrast":
        up = copy[f"{prefix}.up_proj.weight"][neuron]
        # a second row that answers 1 at the trigger
        up.copy_(trigger / trigger.square().sum())
    copy = {name: tensor.to(stored) for name, tensor in copy.items()}
    for report in (audit(copy), audit(copy, base=base)):
        assert [(suspect.layer, suspect.neuron) for suspect in report.alarms] == [(layer, neuron)]
