"""Fused merges on a GPU: exact selection, the same numbers as on the CPU within rounding, the same refusals."""

import pytest
import torch
from torch import Tensor

from merging import merge_stacks
from taskvec.errors import NonFiniteError
from taskvec.plan import Formula
from taskvec.sweep import Outcome

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = {"embed": (1000, 777), "bias": (1003,), "up": (2048, 1024), "scale": (1,)}
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 0.25]


def zoo(seed: int = 0, tasks: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    stacks = {name: torch.randn(tasks, *shape, generator=draw) * 1e-3 for name, shape in SHAPES.items()}
    return {name: stack.to(dtype) for name, stack in stacks.items()}


def there(stacks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: stack.cuda() for name, stack in stacks.items()}


def flat(merged: dict[str, Tensor]) -> Tensor:
    return torch.cat([merged[name].cpu().reshape(-1) for name in SHAPES])


def resident(stacks: dict[str, Tensor]):
    from taskvec import fused

    return fused.Resident(
        [
            fused.Entry(name, list(stack.reshape(len(stack), -1)), None, [1.0] * len(stack))
            for name, stack in stacks.items()
        ]
    )


def tied(stacks: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fifth zeros and few distinct values, as differences of bfloat16 checkpoints have."""
    return {name: (stack / 1e-3).mul(4).round().div(4) * (stack > -8e-4) for name, stack in stacks.items()}


@pytest.mark.parametrize("change", [lambda s: s, tied], ids=["distinct", "tied"])
def test_order_statistics_are_those_of_a_sort(change):
    stacks = there(change(zoo()))
    rows = torch.cat([stack.reshape(len(stack), -1) for stack in stacks.values()], 1).abs().sort(1).values
    width = rows.shape[1]
    ranks = [[int(width * 1e-4), int(width * 0.8), int(width * (1 - 1e-4) - 1), width - 1]] * len(rows)
    found = resident(stacks).order_statistics(Formula("magnitude", {}), ranks)
    assert found is not None
    for row, wanted, told in zip(rows, ranks, found):
        for rank, statistic in zip(wanted, told):
            value = row[rank]
            assert statistic.value == value.item()
            assert statistic.below == int((row < value).sum())
            assert statistic.equal == int((row == value).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "magnitude"])
def test_merges_are_those_of_the_cpu(method, dtype):
    stacks = zoo(1, dtype=dtype)
    here, fast = Outcome(), Outcome()
    expected = merge_stacks(method, stacks, weights=WEIGHTS, scale=0.7, outcome=here)
    found = merge_stacks(method, there(stacks), weights=WEIGHTS, scale=0.7, outcome=fast)
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-6, atol=1e-9)
    assert fast.facts == here.facts
    torch.testing.assert_close(torch.tensor(fast.norms), torch.tensor(here.norms), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["linear tanh", "saturated tanh"])
def test_pcb_is_that_of_the_cpu_within_rounding(scale):
    stacks = {name: stack * scale for name, stack in zoo(2).items()}
    expected, found = flat(merge_stacks("pcb", stacks)), flat(merge_stacks("pcb", there(stacks)))
    apart = (expected != 0) != (found != 0)
    assert int(apart.sum()) <= 2 * len(WEIGHTS)  # the entries next to each threshold may round to the other side
    same = (expected != 0) & (found != 0)
    close = torch.isclose(found[same], expected[same], rtol=1e-3, atol=1e-6 * float(expected.abs().max()))
    assert float(close.float().mean()) > 0.9999


def test_pcb_merges_zero_and_opposite_task_vectors_as_the_cpu_does():
    stacks = zoo(3)
    for stack in stacks.values():
        stack[1] = 0
    here, fast = Outcome(), Outcome()
    expected, found = (
        merge_stacks("pcb", stacks, outcome=here),
        merge_stacks("pcb", there(stacks), outcome=fast),
    )
    assert fast.warnings == here.warnings
    assert int(((flat(expected) != 0) != (flat(found) != 0)).sum()) <= 10


def test_contributions_add_up_to_the_merge_for_any_weights():
    stacks = there(zoo(4))
    parts = merge_stacks("pcb", stacks, contributions=True)
    torch.testing.assert_close(
        flat(parts.merged(WEIGHTS)), flat(merge_stacks("pcb", stacks, weights=WEIGHTS)), rtol=1e-5, atol=1e-9
    )
    alone = sum(weight * part.to_dense() for weight, part in zip(WEIGHTS, parts.parts("up")))
    torch.testing.assert_close(alone, parts.merged(WEIGHTS)["up"].view(-1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "pcb"])
def test_a_value_that_is_not_a_number_is_refused_by_name(method):
    stacks = there(zoo(5))
    stacks["up"][3, 5, 7] = float("nan")
    with pytest.raises(NonFiniteError, match="up"):
        merge_stacks(method, stacks)


def test_the_same_merge_twice_is_the_same_bits():
    stacks = there(zoo(6))
    assert torch.equal(flat(merge_stacks("pcb", stacks)), flat(merge_stacks("pcb", stacks)))
    assert torch.equal(flat(merge_stacks("ties", stacks)), flat(merge_stacks("ties", stacks)))


def test_methods_without_a_fused_form_run_on_the_gpu_too():
    stacks = zoo(7)
    for method, more in (
        ("breadcrumbs", {}),
        ("pcb", {"inter": "pairwise"}),
        ("ties", {"postprocess": [{"method": "norm_match"}]}),
    ):
        expected, found = merge_stacks(method, stacks, **more), merge_stacks(method, there(stacks), **more)
        assert float(((flat(expected) - flat(found)).abs() > 1e-6).float().mean()) < 1e-5, method


@pytest.mark.parametrize(
    ("method", "tasks", "more"),
    [
        ("slerp", 2, {"t": 0.3}),
        ("nuslerp", 2, {"weights": [1.0, 2.0]}),
        ("karcher", 5, {}),
        ("multislerp", 3, {"weights": [1.0, 0.5, 2.0]}),
    ],
)
def test_spherical_merges_of_all_tensors_at_once_are_those_of_the_cpu(method, tasks, more):
    stacks = zoo(8, tasks=tasks)
    here, fast = Outcome(), Outcome()
    expected = merge_stacks(method, stacks, outcome=here, **more)
    found = merge_stacks(method, there(stacks), outcome=fast, **more)
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-5, atol=1e-9)
    assert (fast.passes, fast.warnings, fast.facts) == (here.passes, here.warnings, here.facts)
    torch.testing.assert_close(torch.tensor(fast.norms), torch.tensor(here.norms), rtol=1e-5, atol=0)


def test_a_value_that_is_not_a_number_is_refused_by_spherical_merges_too():
    stacks = there(zoo(9, tasks=2))
    stacks["up"][1, 5, 7] = float("inf")
    with pytest.raises(NonFiniteError, match="up"):
        merge_stacks("slerp", stacks)
