"""Element-wise methods and steps against independent float64 readings of their papers, entry by entry."""

import math

import numpy as np
import pytest
import torch

from merging import merge_stacks
from taskvec.errors import ParameterError, UsageError
from taskvec.sweep import Outcome


def stack_of(tasks=3, shape=(7, 11), seed=0, scale=1.0):
    return scale * torch.randn(tasks, *shape, generator=torch.Generator().manual_seed(seed))


def merged(method, stack, **options):
    return merge_stacks(method, {"w": stack}, **options)["w"]


def close(found, wanted, **tolerance):
    torch.testing.assert_close(found, torch.as_tensor(np.asarray(wanted)).to(found), **tolerance)


def by_entry(stack, rule):
    """Applies a rule on one entry's values over the tasks, in float64."""
    flat = stack.double().reshape(len(stack), -1).T.tolist()
    return np.array([rule(values) for values in flat]).reshape(stack.shape[1:])


# -- combine ------------------------------------------------------------------------------------------------------------


def test_magmax_takes_the_entry_of_largest_magnitude():
    stack = stack_of()
    close(merged("magmax", stack), by_entry(stack, lambda v: max(v, key=abs)))
    weights = [0.2, 1.0, 3.0]
    scaled = stack * torch.tensor(weights).view(-1, 1, 1)
    close(merged("magmax", stack, weights=weights), by_entry(scaled, lambda v: max(v, key=abs)))


def test_emr_elects_a_sign_and_the_largest_magnitude_that_has_it():
    def rule(values):
        sign = 1.0 if sum(values) > 0 else -1.0
        return sign * max([abs(v) for v in values if v * sign > 0], default=0.0)

    close(merged("emr", stack_of()), by_entry(stack_of(), rule))


def test_emr_counts_a_sum_of_zero_as_minus():
    close(merged("emr", torch.tensor([[2.0, 0.0], [-2.0, 0.0]])), [-2.0, 0.0])


@pytest.mark.parametrize("agreement", [1, 2, 3])
@pytest.mark.parametrize("scales", [0.4, [0.2, 0.4, 0.6]])
def test_consensus_keeps_what_enough_tasks_claim(agreement, scales):
    per_task = scales if isinstance(scales, list) else [scales] * 3

    def rule(values):
        total = sum(values)
        claims = sum(abs(v) >= scale * abs(total - v) for v, scale in zip(values, per_task))
        return total if claims >= agreement else 0.0

    found = merged("consensus", stack_of(), mask_scale=scales, agreement=agreement)
    close(found, by_entry(stack_of(), rule))


def test_consensus_refuses_more_agreement_than_tasks():
    with pytest.raises(ParameterError, match="agreement: 4 of 3 tasks can never agree"):
        merged("consensus", stack_of(), agreement=4)


def test_ram_averages_over_the_tasks_that_changed_an_entry():
    stack = stack_of() * (torch.rand(3, 7, 11, generator=torch.Generator().manual_seed(1)) < 0.5)

    def rule(values):
        changed = [v for v in values if abs(v) > 1e-5]
        return sum(changed) / len(changed) if changed else 0.0

    close(merged("ram", stack), by_entry(stack, rule))


def test_sce_weighs_tasks_by_the_energy_of_what_it_selects():
    stack = stack_of(shape=(60,))
    values = stack.double().numpy()
    variance = values.var(0)
    keep = int(0.5 * np.count_nonzero(variance))
    chosen = variance >= np.sort(variance)[-keep]
    energy = (values**2 * chosen).sum(1)
    share = energy / energy.sum()
    sign = np.where((values * chosen).sum(0) >= 0, 1, -1)
    agree = (np.sign(values * chosen) == sign) * share[:, None]
    wanted = (agree * values * chosen).sum(0) / np.where(agree.sum(0) == 0, 1, agree.sum(0))
    close(merged("sce", stack, density=0.5), wanted)


def test_nearswap_clips_the_change():
    close(merged("nearswap", stack_of(tasks=1), distance=0.3), stack_of(tasks=1)[0].clamp(-0.3, 0.3))


def test_passthrough_is_the_model_bit_for_bit():
    stack = stack_of(tasks=1)
    assert torch.equal(merged("passthrough", stack), stack[0])
    assert torch.equal(merged("passthrough", stack, weights=[2.0]), 2 * stack[0])


def test_model_stock_by_row_takes_each_rows_own_angle():
    stack = stack_of(shape=(4, 9)) + 2 * stack_of(tasks=1, shape=(4, 9), seed=3)
    whole = merged("model_stock", stack, by="row")
    for row in range(4):
        alone = merged("model_stock", stack[:, row])
        torch.testing.assert_close(whole[row], alone)


def test_nuslerp_by_row_and_by_column_are_slerps_of_the_rows_and_columns():
    stack = stack_of(tasks=2, shape=(4, 9))
    by_row, by_column = (merged("nuslerp", stack, weights=[1.0, 2.0], by=by) for by in ("row", "column"))
    for i in range(4):
        torch.testing.assert_close(by_row[i], merged("nuslerp", stack[:, i], weights=[1.0, 2.0]))
    for j in range(9):
        torch.testing.assert_close(by_column[:, j], merged("nuslerp", stack[:, :, j].contiguous(), weights=[1.0, 2.0]))


def test_nuslerp_is_shoemakes_formula():
    a, b = stack_of(tasks=2).double().flatten(1)
    angle = math.acos(float(a @ b / a.norm() / b.norm()))
    wanted = (math.sin(0.75 * angle) * a + math.sin(0.25 * angle) * b) / math.sin(angle)
    close(merged("nuslerp", stack_of(tasks=2), weights=[3.0, 1.0]), wanted.view(7, 11))


def test_karcher_mean_is_where_the_logarithms_cancel():
    stack = stack_of(tasks=4, shape=(50,)) + 1.0
    found = merged("karcher", stack, steps=100, tolerance=1e-12).double()
    units = torch.nn.functional.normalize(stack.double(), dim=1)
    point = found / found.norm()
    tangent = torch.zeros(50, dtype=torch.float64)
    for unit in units:
        angle = torch.acos(unit @ point)
        tangent += angle / torch.sin(angle) * (unit - (unit @ point) * point)
    assert float(tangent.norm()) < 1e-6
    torch.testing.assert_close(found.norm(), stack.double().norm(dim=1).mean(), rtol=1e-6, atol=0)


def test_multislerp_is_one_step_from_the_mean_direction():
    stack, weights = stack_of(tasks=4, shape=(50,)) + 1.0, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    units = torch.nn.functional.normalize(stack.double(), dim=1)
    point = torch.nn.functional.normalize(weights @ units, dim=0)
    tangent = weights @ (units - (units @ point)[:, None] * point)
    length = tangent.norm()
    wanted = (length.cos() * point + length.sin() * tangent / length) * (weights @ stack.double().norm(dim=1))
    close(merged("multislerp", stack, weights=weights.tolist()), wanted)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_directions_that_cancel_fall_back_to_the_mean_with_a_warning(method):
    row = torch.arange(1.0, 6.0)
    outcome = Outcome()
    found = merge_stacks(method, {"w": torch.stack([row, -row])}, outcome=outcome)["w"]
    torch.testing.assert_close(found, torch.zeros(5))
    assert any("directions cancel each other" in warning for warning in outcome.warnings)


@pytest.mark.parametrize("method", ["multislerp", "karcher", "nuslerp", "average", "linear"])
def test_weights_that_add_up_to_zero_are_refused(method):
    with pytest.raises(ParameterError, match="add up to zero"):
        merged(method, stack_of(tasks=2), weights=[1.0, -1.0])


def test_arcee_fusion_needs_the_base():
    with pytest.raises(UsageError, match="arcee_fusion looks at the base's values"):
        merged("arcee_fusion", stack_of(tasks=1))


# -- preprocess ---------------------------------------------------------------------------------------------------------


def test_della_keeps_large_entries_more_often_and_the_expectation_stays():
    row = torch.linspace(1.0, 2.0, 200).expand(100, -1).contiguous()
    kept = merged("della", row[None], density=0.5, epsilon=0.3, rescale=False, seed=5) != 0
    # 100 draws for each rank: kept fraction along the row rises from 0.2 to 0.8
    fraction = kept.double().mean(0)
    assert abs(float(fraction[:40].mean()) - 0.26) < 0.03
    assert abs(float(fraction[-40:].mean()) - 0.74) < 0.03
    assert abs(float(fraction.mean()) - 0.5) < 0.015
    mean = torch.stack([merged("della", row[None], epsilon=0.3, seed=seed) for seed in range(40)]).mean(0)
    assert abs(float((mean / row).mean()) - 1) < 0.02
    # every kept entry is divided by its own probability
    values = merged("della", row[None], epsilon=0.3, seed=5)
    probability = 0.2 + 0.6 * torch.arange(200) / 199
    torch.testing.assert_close(values, torch.where(values != 0, row / probability, 0.0))


def test_della_ranks_within_each_row_and_takes_vectors_as_one_row():
    probabilities = [0.3, 0.7, 0.5]
    stack = torch.tensor([1.0, 3.0, -2.0])
    many = stack.expand(4000, 3).contiguous()
    kept = (merged("della", many[None], density=0.5, epsilon=0.2, rescale=False) != 0).double().mean(0)
    np.testing.assert_allclose(kept.numpy(), probabilities, atol=0.04)
    vector = [merged("della", stack[None], epsilon=0.2, rescale=False, seed=seed) for seed in range(1000)]
    np.testing.assert_allclose((torch.stack(vector) != 0).double().mean(0).numpy(), probabilities, atol=0.06)


def test_della_does_not_fail_on_entries_alone_in_their_row():
    kept = (merged("della", torch.ones(1, 2000, 1), density=0.5, rescale=False) != 0).double().mean()
    assert abs(float(kept) - 0.5) < 0.05


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.2), (0.5, 0.5)])
def test_della_refuses_probabilities_outside_their_range(density, epsilon):
    with pytest.raises(ParameterError, match=r"density .* ± epsilon .* must stay in \(0, 1\]"):
        merged("della", stack_of(), density=density, epsilon=epsilon)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dare", {"density": 0.3}),
        ("della", {"density": 0.3, "epsilon": 0.1}),
    ],
)
def test_l1_rescaling_keeps_the_l1_norm_of_each_task(method, options):
    stack = stack_of(shape=(40, 50))
    for task in range(3):
        alone = merged(method, stack[task : task + 1], rescale="l1", **options)
        torch.testing.assert_close(alone.abs().sum(), stack[task].abs().sum(), rtol=1e-4, atol=0)
        plain = merged(method, stack[task : task + 1], rescale=False, **options)
        assert torch.equal(alone != 0, plain != 0)


@pytest.mark.parametrize(("method", "options"), [("magnitude", {"density": 0.3}), ("breadcrumbs", {"density": 0.5})])
def test_trimming_can_keep_the_l1_norm_of_each_task(method, options):
    stack = stack_of(shape=(40, 50))
    alone = merged(method, stack[:1], rescale=True, **options)
    torch.testing.assert_close(alone.abs().sum(), stack[0].abs().sum(), rtol=1e-4, atol=0)
    assert torch.equal(alone != 0, merged(method, stack[:1], **options) != 0)


def test_equalize_gives_all_task_vectors_the_harmonic_mean_of_their_norms():
    stacks = {"a": stack_of(), "b": stack_of(seed=1)}
    stacks = {name: stack * torch.tensor([1.0, 10.0, 0.1]).view(-1, 1, 1) for name, stack in stacks.items()}
    norms = [math.sqrt(sum(float(stack[t].double().square().sum()) for stack in stacks.values())) for t in range(3)]
    harmonic = 3 / sum(1 / norm for norm in norms)
    for task in range(3):
        weights = [float(i == task) for i in range(3)]
        found = merge_stacks("equalize", stacks, weights=weights)
        length = math.sqrt(sum(float(value.double().square().sum()) for value in found.values()))
        assert length == pytest.approx(harmonic, rel=1e-6)


@pytest.mark.parametrize("power", [-1.0, -0.5, 1.0, 2.0])
def test_equalize_weighs_by_a_power_of_the_norm(power):
    stack = stack_of() * torch.tensor([1.0, 3.0, 0.5]).view(-1, 1, 1)
    norms = stack.double().flatten(1).norm(dim=1) ** power
    factors = norms / norms.mean()
    close(merged("equalize", stack, norm_power=power), (stack.double() * factors.view(-1, 1, 1)).sum(0))


def test_equalize_with_power_zero_changes_nothing_and_zero_vectors_stay():
    stack = stack_of()
    assert torch.equal(merged("equalize", stack, norm_power=0), merged("task_arithmetic", stack))
    zero = torch.cat([stack, torch.zeros(1, 7, 11)])
    torch.testing.assert_close(merged("equalize", zero), merged("equalize", stack))


# -- postprocess --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1.0, 0.5])
def test_norm_match_gives_the_merge_the_mean_norm_of_the_tasks(multiple):
    stacks = {"a": stack_of(), "b": stack_of(seed=1, shape=(5,))}
    wanted = sum(math.sqrt(sum(float(stack[t].double().square().sum()) for stack in stacks.values())) for t in range(3))
    found = merge_stacks(
        "task_arithmetic", stacks, postprocess=[{"method": "norm_match", "multiple": multiple}], weights=[0.3, 0.3, 0.3]
    )
    length = math.sqrt(sum(float(value.double().square().sum()) for value in found.values()))
    assert length == pytest.approx(multiple * wanted / 3, rel=1e-6)


def test_norm_match_leaves_a_merge_of_zero_alone():
    stack = torch.cat([stack_of(tasks=1), -stack_of(tasks=1)])
    assert not merged("task_arithmetic", stack, postprocess=["norm_match"]).any()


NAMES = ["embed.weight", *[f"layers.{i}.w" for i in range(4)], "head.weight"]


@pytest.mark.parametrize("statistics", ["model", "tensor"])
def test_lines_scales_linearly_with_depth(statistics):
    stacks = {name: stack_of(seed=i) for i, name in enumerate(NAMES)}
    step = {"method": "lines", "slope": 0.9, "first": 0.2}
    found = merge_stacks("task_arithmetic", stacks, postprocess=[step], statistics=statistics)
    for name, factor in zip(NAMES, [0.2, 0.2, 0.5, 0.8, 1.1, 0.2]):
        torch.testing.assert_close(found[name], factor * stacks[name].sum(0))


def test_lines_takes_its_start_from_the_l1_norms():
    stacks = {name: stack_of(seed=i) for i, name in enumerate(NAMES)}
    plain = merge_stacks("ties", stacks)
    summed = sum(float(stack.double().sum(0).abs().sum()) for stack in stacks.values())
    start = summed / 3 / sum(float(value.double().abs().sum()) for value in plain.values())
    found = merge_stacks("ties", stacks, postprocess=[{"method": "lines", "slope": 0.0}])
    for name in NAMES:
        torch.testing.assert_close(found[name], start * plain[name])


def test_lines_counts_each_tower_by_itself():
    names = ["text.layers.0.w", "text.layers.1.w", "vision.layers.0.w", "vision.layers.1.w", "vision.layers.2.w"]
    stacks = {name: stack_of(tasks=1) for name in names}
    found = merge_stacks("task_arithmetic", stacks, postprocess=[{"method": "lines", "slope": 1.0, "first": 0.0}])
    for name, factor in zip(names, [0.0, 1.0, 0.0, 0.5, 1.0]):
        torch.testing.assert_close(found[name], factor * stacks[name][0])


def test_della_gives_equal_magnitudes_the_same_chance():
    row = torch.tensor([1.0, -1.0, 2.0, 2.0, -2.0, 3.0, 0.5])
    stack = row.expand(1, 3000, 7).contiguous()
    kept = (merged("della", stack, density=0.5, epsilon=0.3, rescale=False) != 0).double().mean(0)
    ranks = np.array([1.5, 1.5, 4.0, 4.0, 4.0, 6.0, 0.0])
    np.testing.assert_allclose(kept.numpy(), 0.2 + 0.6 * ranks / 6, atol=0.03)


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_dare_keeps_each_entry_with_its_probability_and_the_expectation_stays(density):
    stack = stack_of(tasks=1, shape=(100, 200))
    found = merged("dare", stack, density=density, seed=2)
    kept = found != 0
    assert abs(float(kept.double().mean()) - density) < 0.015
    torch.testing.assert_close(found[kept], stack[0][kept] / density)
    mean = torch.stack([merged("dare", stack, density=density, seed=seed) for seed in range(60)]).mean(0)
    error = float((mean - stack[0]).norm() / stack[0].norm())
    assert error < 1.3 * math.sqrt((1 - density) / density / 60)


def test_magnitude_keeps_the_largest_of_each_task():
    stack = stack_of(tasks=2, shape=(40, 50))
    found = merged("magnitude", stack, density=0.3)
    wanted = torch.zeros(40, 50)
    for delta in stack:
        least = delta.abs().flatten().sort(descending=True).values[int(0.3 * 2000) - 1]
        wanted += torch.where(delta.abs() >= least, delta, 0.0)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("method", ["slerp", "model_stock"])
@pytest.mark.parametrize("statistics", ["model", "tensor"])
def test_weights_that_have_no_meaning_are_warned_of(method, statistics):
    outcome = Outcome()
    merge_stacks(method, {"w": stack_of(tasks=2)}, weights=[0.5, 1.0], statistics=statistics, outcome=outcome)
    assert len(outcome.warnings) == 1
    assert outcome.warnings[0].startswith(f"{method}: task weights have no meaning here")
    outcome = Outcome()
    merge_stacks(method, {"w": stack_of(tasks=2)}, statistics=statistics, outcome=outcome)
    assert outcome.warnings == []
