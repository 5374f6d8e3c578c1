"""Adapters folded into models of half precision: most of what then differs from the base is rounding."""

import pytest
import torch

from merging.method import method
from taskvec.deltas import ModelDeltas, Task, constant
from taskvec.source import in_memory
from taskvec.sweep import sweep


@pytest.fixture(scope="module")
def folded():
    """A base, four models with an adapter of rank 4 folded in, and a basis of what the adapters span."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = (0.05 * draw(96, 128)).bfloat16().double()  # exact in every precision: only the models are rounded
    updates = [0.0025 * draw(96, 4) @ draw(4, 128) for _ in range(4)]
    return base, [base + update for update in updates], torch.linalg.svd(torch.cat(updates, 1))[0][:, :16]


def merged(name, folded, dtype, weights=(1.0, 1.0, 1.0, 1.0), statistics="model", **options):
    base, models, span = folded
    chosen = method(name)
    deltas = ModelDeltas(
        in_memory({"w": base.to(dtype)}),
        [Task(f"t{i}", in_memory({"w": model.to(dtype)})) for i, model in enumerate(models)],
        ["w"],
        weights=constant(weights),
    )
    found = {}
    outcome = sweep(
        deltas,
        [chosen.stage(chosen.bound(options))],
        lambda tile: found.update({tile.name: tile.merged.double().clone()}),
        scope=statistics,
    )
    inside = span @ span.T @ found["w"]
    return float((found["w"] - inside).square().sum() / found["w"].square().sum()), outcome.warnings


METHODS = ["iso_c", "iso_cts", "tsv_m"]


@pytest.mark.parametrize("statistics", ["model", "tensor"])
@pytest.mark.parametrize("name", METHODS)
def test_rounding_that_would_be_amplified_is_warned_of(folded, name, statistics):
    outside, warnings = merged(name, folded, torch.bfloat16, statistics=statistics)
    assert outside > 0.2
    assert len(warnings) == 1
    assert "most directions are no larger than the rounding of the stored weights" in warnings[0]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (0.3, 0.3, 0.3, 0.3)])
@pytest.mark.parametrize("name", METHODS)
def test_directions_of_rounding_can_be_left_out(folded, name, weights):
    outside, warnings = merged(name, folded, torch.bfloat16, weights, rounding="drop")
    assert outside < 0.03
    assert warnings == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_wide_storage_needs_neither(folded, name, dtype):
    outside, warnings = merged(name, folded, dtype)
    assert outside < 1e-6
    assert not any("rounding" in warning and "stored" in warning for warning in warnings)


def test_full_fine_tunes_of_half_precision_are_not_warned_of():
    generator = torch.Generator().manual_seed(1)
    base = 0.05 * torch.randn(96, 128, generator=generator, dtype=torch.float64)
    models = [base + 0.003 * torch.randn(96, 128, generator=generator, dtype=torch.float64) for _ in range(4)]
    _, warnings = merged("iso_c", (base, models, torch.eye(96, dtype=torch.float64)), torch.bfloat16)
    assert warnings == []
