"""Edges on which mergekit 0.1.5 was run beside this library: contradicting shares, negative and zero weights, one task."""

import math

import pytest
import torch

from merging import Recipe, merge, merge_stacks
from taskvec import Checkpoint
from taskvec.errors import ParameterError, RecipeError
from taskvec.sweep import Outcome


def crumbs(row, density, gamma):
    """The entries of rank max(0, n - ⌊density n⌋ - ⌊gamma n⌋) and the ⌊density n⌋ - 1 after it, by magnitude."""
    flat = row.double().reshape(-1)
    count, kept = len(flat), int(density * len(flat))
    first = max(0, count - kept - int(gamma * count))
    chosen = flat.abs().argsort()[first : first + kept]
    found = torch.zeros_like(flat)
    found[chosen] = flat[chosen]
    return found.view(row.shape).to(row)


@pytest.mark.parametrize("density", [1.0, 0.95, 0.9, 0.5, 0.2, 0.01])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.06, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(3,), (40,), (13, 21)])
def test_breadcrumbs_keeps_a_share_and_drops_fewer_outliers_where_both_exceed_one(density, gamma, shape):
    row = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found = merge_stacks("breadcrumbs", {"w": row[None]}, density=density, gamma=gamma)["w"]
    torch.testing.assert_close(found, crumbs(row, density, gamma))


def elected(stack, weights, *, normalize):
    merged = []
    for values in stack.double().reshape(len(stack), -1).T.tolist():
        weighted = [v * w for v, w in zip(values, weights)]
        sign = 1.0 if sum(weighted) >= 0 else -1.0
        agree = [k for k, value in enumerate(weighted) if math.copysign(1.0, value) == sign and value != 0]
        divisor = sum(weights[k] for k in agree) if normalize else 1.0
        merged.append(sum(weighted[k] for k in agree) / (divisor or 1.0))
    return torch.tensor(merged, dtype=torch.float64).view(stack.shape[1:])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[0.5, -0.3, 0.8], [-1.0, -0.25, -2.0], [0.0, -0.5, 1.0], [1.0, -0.5, 0.75]])
def test_in_ties_a_task_of_negative_weight_agrees_by_its_weighted_value(weights, normalize):
    stack = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(5))
    wanted = elected(stack, weights, normalize=normalize)
    found = merge_stacks("ties", {"w": stack}, weights=weights, density=1.0, normalize=normalize)["w"]
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=1e-6)


def test_negative_weights_of_ties_are_the_same_from_disk(zoo, tmp_path):
    weights = [0.5, -0.3, 0.8]
    tasks = [{"path": str(path), "weight": weight} for path, weight in zip(zoo.tuned, weights)]
    recipe = zoo.recipe(method="ties", parameters={"density": 1.0, "normalize": False}, tasks=tasks)
    merge(Recipe.from_data(recipe), tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    tuned = [Checkpoint.open(path) for path in zoo.tuned]
    for name, base in zoo.base_state.items():
        stack = torch.stack([source.read(name) - base for source in tuned])
        wanted = base + elected(stack, weights, normalize=False)
        torch.testing.assert_close(found.read(name).double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.9, 0.1])
def test_sce_of_one_task_selects_nothing_below_a_density_of_one_and_says_so(density):
    stack, outcome = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(1)), Outcome()
    found = merge_stacks("sce", {"w": stack}, density=density, outcome=outcome)["w"]
    torch.testing.assert_close(found, torch.zeros(5, 4))
    assert any("one task varies nowhere" in warning for warning in outcome.warnings)
    torch.testing.assert_close(merge_stacks("sce", {"w": stack})["w"], stack[0])


def test_a_gradient_of_weights_that_starts_at_zero_leaves_those_layers_at_the_base(zoo, tmp_path):
    task = {"path": str(zoo.tuned[0]), "weight": {"gradient": [0.0, 1.0]}}
    merge(Recipe.from_data(zoo.recipe(tasks=[task])), tmp_path / "out")
    found, tuned = Checkpoint.open(tmp_path / "out"), Checkpoint.open(zoo.tuned[0])
    for name, base in zoo.base_state.items():
        wanted = tuned.read(name) if name.startswith("model.layers.1") else base
        torch.testing.assert_close(found.read(name), wanted)


@pytest.mark.parametrize("method", ["average", "linear", "karcher", "multislerp"])
def test_weights_that_cancel_but_for_rounding_are_refused(method):
    stack = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ParameterError, match="add up to zero"):
        merge_stacks(method, {"w": stack}, weights=[0.1, 0.2, -0.3])


@pytest.mark.parametrize("method", ["karcher", "multislerp", "nuslerp"])
def test_weights_that_cancel_are_refused_before_anything_is_read(zoo, tmp_path, method):
    tasks = [{"path": str(path), "weight": weight} for path, weight in zip(zoo.tuned, [1.0, -1.0])]
    with pytest.raises(RecipeError, match=f"add up to zero for .*; {method} needs their proportions"):
        merge(Recipe.from_data(zoo.recipe(method=method, base=None, tasks=tasks)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_cancel_cannot_be_normalised_in_task_arithmetic(zoo, tmp_path):
    tasks = [{"path": str(path), "weight": weight} for path, weight in zip(zoo.tuned, [0.1, 0.2, -0.3])]
    with pytest.raises(RecipeError, match=r"cannot be normalised \(normalize: false\)"):
        merge(Recipe.from_data(zoo.recipe(parameters={"normalize": True}, tasks=tasks)), tmp_path / "out")


def test_a_margin_of_multislerp_that_would_change_numbers_is_refused():
    text = "merge_method: multislerp\nmodels:\n- {model: a, parameters: {weight: 1}}\nparameters: {eps: %s}\n"
    Recipe.from_text(text % "1e-8")
    with pytest.raises(RecipeError, match=r"parameters.eps: 0.01 is not supported"):
        Recipe.from_text(text % "0.01")


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
@pytest.mark.parametrize("zero", [0, 1])
def test_a_vector_of_zeros_counts_as_at_a_right_angle(method, zero):
    stack, t = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(2)), 0.3
    stack[zero] = 0
    told = {"t": t} if method == "slerp" else {"weights": [1 - t, t]}
    found = merge_stacks(method, {"w": stack}, **told)["w"]
    share = t if zero == 0 else 1 - t
    torch.testing.assert_close(found, math.sin(share * math.pi / 2) * stack[1 - zero])


@pytest.mark.parametrize("by", ["row", "column"])
def test_rows_of_zeros_count_as_at_a_right_angle_in_nuslerp(by):
    stack = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(2))
    (stack[0, 2] if by == "row" else stack[0, :, 2]).zero_()
    found = merge_stacks("nuslerp", {"w": stack}, weights=[0.3, 0.9], by=by)["w"]
    wanted = math.sin(0.75 * math.pi / 2) * stack[1]
    picked = (slice(2, 3), slice(None)) if by == "row" else (slice(None), slice(2, 3))
    torch.testing.assert_close(found[picked], wanted[picked])


def test_a_vector_of_zeros_does_not_slow_karcher_down():
    """The mean direction after any number of steps is that of the other vectors alone."""
    stack = torch.randn(4, 30, generator=torch.Generator().manual_seed(4))
    stack[2] = 0
    others = stack[[0, 1, 3]]
    for steps in (1, 2, 10):
        alone = merge_stacks("karcher", {"w": others}, steps=steps)["w"]
        found = merge_stacks("karcher", {"w": stack}, steps=steps)["w"]
        torch.testing.assert_close(found, alone * 0.75)
