"""Laws that every method of the catalogue keeps. A new method is in them by being registered."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import merge_stacks
from merging.method import methods
from taskvec.sweep import Options

CATALOGUE = methods()
NEEDS_FILES = {name for name, method in CATALOGUE.items() if method.data == "statistics"}
REQUIRED = {
    "nearswap": {"distance": 0.4},
    "lines": {"slope": 0.5},
    "subspace_boosting": {"share": 0.5},
    "wudi": {"steps": 5},
}
LAYERS = {"layers.0.w": (6, 9), "layers.1.w": (9, 6), "layers.0.norm.weight": (7,), "head.conv": (3, 2, 2)}


def of_role(*roles):
    return [name for name, method in CATALOGUE.items() if method.role in roles and name not in NEEDS_FILES]


COMBINE = of_role("combine", "preprocess")
PREPROCESS, POSTPROCESS = of_role("preprocess"), of_role("postprocess")


def step(name, **more):
    return {"method": name, **REQUIRED.get(name, {}), **more}


def tasks_of(name, wanted=3):
    least, most = CATALOGUE[name].tasks
    return max(least, min(wanted, most or wanted))


def stacks_of(tasks, seed=0, layout=None, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(tasks, *shape, generator=generator) for name, shape in (layout or LAYERS).items()}


def base_of(stacks):
    generator = torch.Generator().manual_seed(99)
    return {name: torch.randn(stack.shape[1:], generator=generator).to(stack) for name, stack in stacks.items()}


def merged(name, stacks, **options):
    return merge_stacks(name, stacks, **{"base": base_of(stacks), **REQUIRED.get(name, {}), **options})


def same_bits(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def assert_near(one, other, **tolerance):
    for name, value in one.items():
        torch.testing.assert_close(
            other[name].double(),
            value.double(),
            **{"atol": 1e-4, "rtol": 1e-4, **tolerance},
            msg=lambda m, name=name: f"{name}: {m}",
        )


seeds = st.integers(0, 2**20)
few = settings(max_examples=5, deadline=None, derandomize=True)
once = settings(max_examples=2, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_it_says_what_it_does_and_where_it_comes_from(name):
    method = CATALOGUE[name]
    assert method.summary.endswith(".")
    assert method.paper
    assert all(parameter.doc for parameter in method.parameters.values()), name


# -- order --------------------------------------------------------------------------------------------------------------

ORDERED = {"slerp": "the first model is t = 0"}
TASKWISE = [name for name in COMBINE if CATALOGUE[name].tasks[1] != 1 and name not in ORDERED]


@pytest.mark.parametrize("name", TASKWISE)
@given(seed=seeds)
@once
def test_task_order_does_not_matter(name, seed):
    stacks = stacks_of(tasks_of(name), seed)
    count = tasks_of(name)
    weights, labels = [0.5, 1.0, 2.0][:count], ["a", "b", "c"][:count]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1)).tolist()
    forth = merged(name, stacks, weights=weights, tasks=labels)
    back = merged(
        name,
        {key: stack[order] for key, stack in stacks.items()},
        weights=[weights[i] for i in order],
        tasks=[labels[i] for i in order],
    )
    assert_near(forth, back)


# -- scale --------------------------------------------------------------------------------------------------------------

# scores of PCB, absolute thresholds and steps, and softmax do not scale with their input
NOT_HOMOGENEOUS = {"pcb", "ram", "ramplus_tl", "nearswap", "arcee_fusion", "wudi"}
HOMOGENEOUS = [name for name in COMBINE if name not in NOT_HOMOGENEOUS]


@pytest.mark.parametrize("name", HOMOGENEOUS)
@given(seed=seeds, power=st.integers(-6, 6))
@once
def test_scaling_the_inputs_scales_the_merge(name, seed, power):
    stacks = stacks_of(tasks_of(name), seed)
    factor = 2.0**power
    scaled = merged(name, {key: stack * factor for key, stack in stacks.items()})
    assert_near({key: value * factor for key, value in merged(name, stacks).items()}, scaled, atol=1e-4 * factor)


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_the_scale_multiplies_the_merge(name):
    stacks = stacks_of(tasks_of(name))
    plain = merged(name, stacks)
    assert same_bits({key: value * 0.5 for key, value in plain.items()}, merged(name, stacks, scale=0.5))


# the weight of a task is a scaling of its task vector, except where it enters a mean or a position
WEIGHT_SCALES_THE_TASK = [
    *("task_arithmetic", "magmax", "emr", "consensus", "tsv_m", "iso_c", "iso_cts", "cart", "knots", "magnitude"),
    *("breadcrumbs", "dare", "della", "low_rank", "nearswap"),
]


@pytest.mark.parametrize("name", WEIGHT_SCALES_THE_TASK)
@given(seed=seeds)
@once
def test_a_task_weight_scales_its_task_vector(name, seed):
    count = tasks_of(name)
    stacks, weights = stacks_of(count, seed), [0.5, 2.0, 0.25][:count]
    scaled = {key: stack * torch.tensor(weights).view(-1, *[1] * (stack.ndim - 1)) for key, stack in stacks.items()}
    assert_near(merged(name, scaled), merged(name, stacks, weights=weights))


# -- the engine changes nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["model", "tensor"])
@pytest.mark.parametrize("name", COMBINE)
def test_tiles_and_workers_do_not_change_a_bit(name, statistics):
    layout = {"layers.0.norm": (5,), "layers.1.table": (70_001,), "layers.1.w": (8, 5)}
    stacks = stacks_of(tasks_of(name), 3, layout)
    one = merged(name, stacks, statistics=statistics, options=Options(workers=1, tile=1 << 20))
    other = merged(name, stacks, statistics=statistics, options=Options(workers=2, tile=1 << 15))
    assert same_bits(one, other)


@pytest.mark.parametrize("name", POSTPROCESS)
@pytest.mark.parametrize("statistics", ["model", "tensor"])
def test_tiles_and_workers_do_not_change_a_bit_of_a_postprocess(name, statistics):
    layout = {"layers.0.norm": (5,), "layers.1.table": (70_001,), "layers.1.w": (8, 5)}
    stacks = stacks_of(3, 3, layout)
    one, other = (
        merged("ties", stacks, statistics=statistics, postprocess=[step(name)], options=options)
        for options in (Options(workers=1, tile=1 << 20), Options(workers=2, tile=1 << 15))
    )
    assert same_bits(one, other)


@pytest.mark.parametrize("name", COMBINE)
def test_the_stack_is_not_written_into(name):
    stacks = stacks_of(tasks_of(name))
    before = {key: stack.clone() for key, stack in stacks.items()}
    merged(name, stacks, postprocess=[step(post) for post in POSTPROCESS])
    assert same_bits(before, stacks)


CHOOSES_BY_ROUNDING = {"arcee_fusion"}  # as its docstring says


@pytest.mark.parametrize("name", [name for name in COMBINE if name not in CHOOSES_BY_ROUNDING])
def test_float64_agrees_with_float32(name):
    stacks = stacks_of(tasks_of(name), 5)
    wide = merged(name, {key: stack.double() for key, stack in stacks.items()})
    assert all(value.dtype == torch.float64 for value in wide.values())
    assert_near(wide, merged(name, stacks), atol=1e-4)


# -- special inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMBINE)
def test_zero_task_vectors_merge_to_zero(name):
    zeros = {key: torch.zeros_like(stack) for key, stack in stacks_of(tasks_of(name)).items()}
    assert all(
        not value.any() for value in merged(name, zeros, postprocess=[step(post) for post in POSTPROCESS]).values()
    )


@pytest.mark.parametrize("statistics", ["model", "tensor"])
@pytest.mark.parametrize("name", COMBINE)
def test_scalars_single_rows_and_empty_tensors_are_merged_too(name, statistics):
    layout = {"layers.0.w": (6, 5), "scalar": (), "empty": (0, 4), "row": (1, 5), "column": (5, 1), "one": (1,)}
    stacks = stacks_of(tasks_of(name), 2, layout)
    found = merged(name, stacks, statistics=statistics, postprocess=[step(post) for post in POSTPROCESS])
    for key, value in found.items():
        assert value.shape == stacks[key].shape[1:]
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("name", TASKWISE)
def test_one_zero_task_leaves_the_merge_finite(name):
    stacks = stacks_of(tasks_of(name))
    for stack in stacks.values():
        stack[-1] = 0
    assert all(torch.isfinite(value).all() for value in merged(name, stacks).values())


IDEMPOTENT = [
    "average",
    "linear",
    "karcher",
    "multislerp",
    "nuslerp",
    "slerp",
    "emr",
    "magmax",
    "ram",
    "sce",
    "model_stock",
]


@pytest.mark.parametrize("name", IDEMPOTENT)
@given(seed=seeds)
@once
def test_identical_tasks_merge_to_themselves(name, seed):
    one = stacks_of(1, seed)
    many = {key: stack.expand(tasks_of(name), *stack.shape[1:]).contiguous() for key, stack in one.items()}
    assert_near({key: stack[0] for key, stack in one.items()}, merged(name, many), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["ties", "magnitude", "breadcrumbs", "low_rank"])
def test_keeping_everything_changes_nothing(name):
    stacks = stacks_of(1)
    everything = (
        {"share": 1.0} if name == "low_rank" else {"density": 1.0, **({"gamma": 0.0} if name == "breadcrumbs" else {})}
    )
    assert_near({key: stack[0] for key, stack in stacks.items()}, merged(name, stacks, **everything), atol=1e-6)


# -- roles compose --------------------------------------------------------------------------------------------------------

CHAINS = [
    (before, method, after)
    for before, method, after in itertools.product([None, *PREPROCESS], COMBINE, [None, *POSTPROCESS])
    if CATALOGUE[method].space == "delta" or (before is None and after is None)
]


@pytest.mark.parametrize(("before", "method"), sorted({(b or "", m) for b, m, _ in CHAINS}))
def test_every_chain_of_steps_runs_and_keeps_shapes(before, method):
    stacks = stacks_of(tasks_of(method), 1)
    for after in [a for b, m, a in CHAINS if (b or "") == before and m == method]:
        found = merged(
            method, stacks, preprocess=[step(before)] if before else [], postprocess=[step(after)] if after else []
        )
        for name, value in found.items():
            assert value.shape == stacks[name].shape[1:], (before, method, after)
            assert torch.isfinite(value).all(), (before, method, after)


# -- random draws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in COMBINE if "seed" in CATALOGUE[name].parameters])
def test_draws_depend_on_seed_task_and_name_alone(name):
    stacks = stacks_of(2, 0, {"a": (40, 50), "b": (40, 50)})
    stacks["b"] = stacks["a"].clone()
    first = merged(name, stacks, seed=1)
    assert same_bits(first, merged(name, {"b": stacks["b"], "a": stacks["a"]}, seed=1))
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], merged(name, stacks, seed=2)["a"])
    assert not torch.equal(first["a"], merged(name, stacks, seed=1, tasks=["x", "y"])["a"])


# -- whole-model statistics around methods that see tensors whole ------------------------------------------------------

BIG = {
    "layers.0.w": (300, 400),
    "layers.1.w": (200, 500),
    "layers.2.bias": (70_000,),
    "scale": (),
    "empty": (0, 3),
}  # more than is sorted at once


def test_thresholds_before_a_method_for_whole_tensors_are_the_whole_models():
    stacks = stacks_of(2, 4, BIG)
    flat = torch.cat([stack.reshape(2, -1) for stack in stacks.values()], 1).abs()
    least = flat.sort(dim=1, descending=True).values[:, int(0.3 * flat.shape[1]) - 1]
    trimmed = {name: stack * (stack.abs() >= least.view(-1, *[1] * (stack.ndim - 1))) for name, stack in stacks.items()}
    found = merged("iso_c", stacks, preprocess=[{"method": "magnitude", "density": 0.3}])
    assert same_bits(found, merged("iso_c", trimmed))


def test_thresholds_after_a_method_for_whole_tensors_are_those_of_what_it_made():
    stacks = stacks_of(2, 4, BIG)
    found = merged("ties", stacks, preprocess=[{"method": "della", "density": 0.5, "seed": 3}], density=0.2)
    # the draws do not depend on the other task, so each task's part can be had alone
    parts = [
        merged("della", stacks, density=0.5, seed=3, weights=[float(i == task) for i in range(2)]) for task in range(2)
    ]
    dropped = {name: torch.stack([part[name] for part in parts]) for name in stacks}
    assert same_bits(found, merged("ties", dropped, density=0.2))


def test_heavily_tied_values_are_counted_exactly_where_tensors_are_whole():
    stacks = {name: (stack * 2).round() for name, stack in stacks_of(2, 4, BIG).items()}
    found = merged("iso_c", stacks, preprocess=[{"method": "magnitude", "density": 0.1}])
    flat = torch.cat([stack.reshape(2, -1) for stack in stacks.values()], 1).abs()
    least = flat.sort(dim=1, descending=True).values[:, int(0.1 * flat.shape[1]) - 1]
    trimmed = {name: stack * (stack.abs() >= least.view(-1, *[1] * (stack.ndim - 1))) for name, stack in stacks.items()}
    assert same_bits(found, merged("iso_c", trimmed))


def test_the_radix_count_takes_tensors_in_their_shapes():
    from taskvec.order import radix_statistics

    found = {}

    def plan(deltas):
        rows = yield from radix_statistics(lambda tile: tile.stack.abs(), [[5, 1000], [7]])
        found["rows"] = rows
        return lambda tile: tile.total()

    from taskvec.deltas import StackDeltas
    from taskvec.sweep import Stage, sweep

    stacks = stacks_of(2, 1, BIG)
    sweep(StackDeltas(stacks), [Stage("radix", "combine", plan, "tensor")], lambda tile: None)
    flat = torch.cat([stack.reshape(2, -1) for stack in stacks.values()], 1).abs().sort(dim=1).values
    assert found["rows"][0][5].value == float(flat[0, 5])
    assert found["rows"][0][1000].value == float(flat[0, 1000])
    assert found["rows"][1][7].value == float(flat[1, 7])
