"""PCB-Merging against the authors' numbers, an independent float64 reading, and its table of edge cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from merging import merge_stacks
from taskvec.errors import NonFiniteError, ParameterError
from taskvec.sweep import Options, Outcome

CASES = [
    "a_n1_gauss_small",
    "b_n2_gauss",
    "c_n3_student3",
    "d_n4_blocks_bf16",
    "e_n8_student2_wide",
    "f_n5_gauss_keepall",
]


def pcb(stack, *, outcome=None, **parameters):
    return merge_stacks("pcb", {"w": stack}, outcome=outcome, **parameters)["w"]


def oracle(stack, density, *, clip=1e-4, inter="sum", weights=None):
    """The reference's steps, restated from its description in float64 with full sorts."""
    wide = stack.double()
    count, numel = wide.shape
    size = wide.abs()
    ordered = size.sort(1).values
    low, high = ordered[:, int(numel * clip), None], ordered[:, int(numel * (1 - clip) - 1), None]
    clipped = size.clamp(low, high) * wide.sign()
    u = (size.clamp(low, high) - low) / (high - low)
    if inter == "sum":
        agreement = torch.tanh(wide * wide.sum(0))
    else:
        signed = wide.sign() * u
        if inter == "sum_normalized":
            agreement = torch.tanh(wide * signed.sum(0))
        else:
            agreement = sum(torch.tanh(signed * signed[j]) for j in range(count))
    score = torch.exp(count * u**2) * agreement
    ordered = score.sort(1).values
    cut, top = ordered[:, int(numel * (1 - density)), None], ordered[:, -1:]
    weight = (score.clamp(min=cut) - cut) / (top - cut)
    scale = torch.ones(count, 1, dtype=torch.float64) if weights is None else torch.tensor(weights).double()[:, None]
    return (clipped * weight * scale).sum(0) / weight.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pieces", [1, 5])
def test_the_authors_numbers_come_out(goldens, case, pieces):
    golden = load_file(goldens / "pcb" / f"case_{case}.safetensors")
    vectors, density = golden["task_vectors"], float(golden["pcb_ratio"])
    cut = {f"w{i:02}": part for i, part in enumerate(vectors.split(-(-vectors.shape[1] // pieces), 1))}
    outcome = Outcome()
    found = merge_stacks("pcb", cut, density=density, outcome=outcome)
    merged, expected = torch.cat([found[name] for name in cut]), golden["merged"]
    assert bool(((merged - expected).abs() <= 1e-5 * expected.abs() + 1e-6 * expected.abs().max()).all())
    kept = {name: share * vectors.shape[1] for name, share in outcome.facts["pcb"]["kept"].items()}
    assert list(kept.values()) == pytest.approx((golden["scale"] > 0).sum(1).tolist())


@pytest.mark.parametrize("inter", ["sum", "sum_normalized", "pairwise"])
@pytest.mark.parametrize("clip", [1e-4, 0.01, 0.0])
def test_options_follow_an_independent_reading(inter, clip):
    stack = torch.randn(4, 20_011, generator=torch.Generator().manual_seed(1)) * 1e-3
    expected = oracle(stack, 0.15, clip=clip, inter=inter, weights=[1.0, 0.5, 2.0, -1.0])
    found = pcb(stack, density=0.15, clip=clip, inter=inter, weights=[1.0, 0.5, 2.0, -1.0])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_papers_variant_follows_its_equations():
    stack = torch.randn(3, 4001, generator=torch.Generator().manual_seed(1)) * 1e-2
    wide, count, density = stack.double(), 3, 0.2

    def norm(values):
        return (values - values.min()) / (values.max() - values.min())

    intra = torch.stack([torch.softmax(count * norm(row * row), 0) for row in wide])
    inter = torch.stack([sum(torch.softmax(norm(row * other), 0) for other in wide) for row in wide])
    beta = intra * inter
    cut = beta.sort(1).values[:, int(4001 * (1 - density)), None]
    kept = beta * (beta >= cut)
    total = kept.sum(0)
    expected = torch.where(total > 0, (kept * wide).sum(0) / total.clamp(min=1e-300), 0.0)
    torch.testing.assert_close(pcb(stack, density=density, variant="paper").double(), expected, rtol=1e-5, atol=1e-9)


def test_statistics_by_tensor_are_those_of_each_tensor_alone():
    generator = torch.Generator().manual_seed(0)
    stacks = {"a": torch.randn(2, 500, generator=generator), "b": 0.01 * torch.randn(2, 700, generator=generator)}
    both = merge_stacks("pcb", stacks, scope="tensor")
    assert torch.equal(both["b"], merge_stacks("pcb", {"b": stacks["b"]})["b"])
    assert not torch.equal(both["b"], merge_stacks("pcb", stacks, scope="global")["b"])


def test_contributions_make_a_search_over_weights_one_weighted_sum():
    stacks = {"a": torch.randn(3, 40, 30, generator=torch.Generator().manual_seed(0)), "b": torch.randn(3, 5)}
    parts = merge_stacks("pcb", stacks, density=0.1, contributions=True)
    for weights in ([1.0, 1.0, 1.0], [0.3, -2.0, 1.7]):
        expected = merge_stacks("pcb", stacks, density=0.1, weights=weights)
        for name, value in parts.merged(weights).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert parts.parts("a")[0].values().numel() <= 0.1 * 1205 + 1


# -- the table of edge cases ----------------------------------------------------------------------------------------------


def gaussian(count, numel, seed=0, scale=1e-3):
    return torch.randn(count, numel, generator=torch.Generator().manual_seed(seed)) * scale


def test_a_task_vector_of_zeros_gets_no_weight_and_a_warning():
    stack = torch.cat([gaussian(2, 3000), torch.zeros(1, 3000)])
    outcome = Outcome()
    merged = pcb(stack, outcome=outcome)
    assert bool(torch.isfinite(merged).all()) and int((merged != 0).sum()) > 0
    assert any("task 2' equals the base everywhere" in warning for warning in outcome.warnings)
    assert outcome.facts["pcb"]["kept"]["task 2"] == 0


def test_all_zero_gives_zero():
    assert int(pcb(torch.zeros(3, 100)).count_nonzero()) == 0


def test_opposite_vectors_keep_nothing():
    one = gaussian(1, 2000)
    assert int(pcb(torch.cat([one, -one])).count_nonzero()) == 0


def test_constant_magnitudes_are_scored_by_agreement():
    signs = torch.tensor([[1.0, 1, -1, 1], [1.0, -1, -1, 1], [1.0, 1, 1, 1]]).repeat(1, 50)
    merged = pcb(signs * 0.01, density=1.0)
    assert bool(torch.isfinite(merged).all())
    assert float(merged[0]) == pytest.approx(0.01)


def test_one_non_zero_entry_is_not_clipped_away():
    stack = torch.zeros(1, 5000)
    stack[0, 17] = 0.5
    outcome = Outcome()
    merged = pcb(stack, outcome=outcome)
    assert float(merged[17]) == 0.5 and int(merged.count_nonzero()) == 1
    assert any("too few non-zero entries" in warning for warning in outcome.warnings)


def test_faint_task_vectors_do_not_underflow():
    stack = gaussian(3, 5000, scale=1.0)
    expected = pcb(stack * 2.0**-12) * 2.0**12
    found = pcb(stack * 2.0**-80) * 2.0**80
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [80, 81, 100])
def test_many_tasks_do_not_overflow(count):
    stack = gaussian(count, 2000)
    merged = pcb(stack, density=0.2)
    torch.testing.assert_close(merged.double(), oracle(stack, 0.2), rtol=1e-3, atol=1e-8)


def test_saturated_scores_keep_the_tied_maximum_with_full_weight():
    stack = torch.full((2, 3000), 0.01)
    stack[:, :2] = 50.0
    merged = pcb(stack, density=0.0003, clip=0.0)
    assert merged[:2].tolist() == [50.0, 50.0] and int(merged.count_nonzero()) == 2


@pytest.mark.parametrize("numel", [1, 2, 3])
def test_tiny_tensors_are_finite(numel):
    assert bool(torch.isfinite(pcb(gaussian(2, numel), density=1.0)).all())


def test_one_task_is_magnitude_pruning_with_the_clip():
    stack = gaussian(1, 4000)
    merged = pcb(stack, density=0.1)
    kept = merged != 0
    assert int(kept.sum()) == 399
    top = stack[0].abs().topk(399).indices
    assert bool(kept[top].all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_numbers_are_named(value):
    stack = gaussian(2, 300)
    stack[1, 7] = value
    with pytest.raises(NonFiniteError, match="w: task 'task 1' holds 1 NaN or infinite values"):
        pcb(stack)


@pytest.mark.parametrize("density", [0, -0.1, 1.5, 20, math.nan])
def test_densities_out_of_range_are_refused(density):
    with pytest.raises(ParameterError, match="density: input should be"):
        pcb(gaussian(2, 100), density=density)


def test_half_precision_stacks_are_summed_in_float32():
    stack = gaussian(4, 5000).bfloat16()
    assert torch.equal(pcb(stack), pcb(stack.float()))
    assert pcb(stack).dtype == torch.float32


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(10, 400), st.integers(0, 10**6), st.sampled_from([0.05, 0.2, 1.0]))
def test_symmetries(count, numel, seed, density):
    stack = gaussian(count, numel, seed)
    merged = pcb(stack, density=density)
    assert torch.equal(pcb(-stack, density=density), -merged)
    torch.testing.assert_close(pcb(stack.flip(0), density=density), merged, rtol=1e-4, atol=1e-7)
    assert torch.equal(pcb(stack * 0.5, density=density) != 0, merged != 0)
    options = Options(workers=2)
    assert torch.equal(pcb(stack, density=density, options=options), merged)


def test_copies_of_one_vector_are_that_vector():
    one = gaussian(1, 3000)
    torch.testing.assert_close(pcb(one.repeat(4, 1)), pcb(one), rtol=1e-6, atol=1e-12)
