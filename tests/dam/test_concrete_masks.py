"""Concrete masks and masked merges: the recorded numbers, and the laws of their closed-form gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.learn.masks import (
    ConcreteMask,
    density,
    masked_merge,
    masked_merge_gradient,
    noise_key,
    rescale,
    uniform_noise,
)
from taskvec.errors import MismatchError, NonFiniteError, ParameterError, UsageError

close = torch.testing.assert_close


def test_samples_means_and_gradients_equal_the_recorded_ones(golden):
    record = golden("mask_sample")
    mask = ConcreteMask(record.tensors("logits."), temperature=0.5)
    sample = mask.sample(record.tensors("uniform."))
    close(sample, record.tensors("mask."), rtol=1e-5, atol=1e-6)
    close(rescale(sample), record.tensors("mask_rescaled."), rtol=1e-5, atol=1e-6)
    close(density(sample), record["mask_mean"], rtol=1e-6, atol=0)
    recorded = record.tensors("grad_logits.")
    for name, gradient in mask.gradient(record.tensors("cotangent.")).items():
        close(gradient, recorded[name], rtol=1e-5, atol=1e-5 * max(1e-1, float(recorded[name].abs().max())))


def test_autograd_through_a_sample_gives_the_recorded_gradient(golden):
    record = golden("mask_sample")
    logits = {name: tensor.requires_grad_() for name, tensor in record.tensors("logits.").items()}
    mask = rescale(ConcreteMask(logits).sample(record.tensors("uniform.")))
    loss = sum((record["cotangent." + name] * mask[name]).sum() for name in mask)
    gradients = torch.autograd.grad(loss, list(logits.values()))
    for name, gradient in zip(logits, gradients, strict=True):
        recorded = record["grad_logits." + name]
        close(gradient, recorded, rtol=1e-5, atol=1e-5 * max(1e-1, float(recorded.abs().max())))


@pytest.mark.parametrize("clamp", [False, True], ids=["free", "clamp"])
@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_merges_and_their_gradients_equal_the_recorded_ones(golden, granularity, clamp):
    record = golden("masked_merge")
    base, mask, cotangent = record.tensors("base."), record.tensors("mask."), record.tensors("cotangent.")
    vectors = [{n: t - base[n] for n, t in record.tensors(f"finetuned.{i}.").items()} for i in range(3)]
    coefficients = record[f"lambda_{granularity}"]
    kind = f"{granularity}.{'clamp' if clamp else 'free'}"
    close(
        masked_merge(base, vectors, coefficients, mask, clamp=clamp),
        record.tensors(f"merged.{kind}."),
        rtol=1e-5,
        atol=1e-6,
    )
    masks, gradient = masked_merge_gradient(cotangent, vectors, coefficients, mask, clamp=clamp)
    close(gradient, record[f"grad_lambda.{kind}"], rtol=1e-5, atol=1e-5)
    close(masks, record.tensors(f"grad_mask.{kind}."), rtol=1e-5, atol=1e-6)
    if not clamp:
        close(
            masked_merge(base, vectors, coefficients, None),
            record.tensors(f"merged_nomask.{granularity}."),
            rtol=1e-5,
            atol=1e-6,
        )


shapes = st.dictionaries(
    st.sampled_from(["a", "b.weight", "c.0.bias", "d"]),
    st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple),
    min_size=1,
)


@settings(max_examples=40, deadline=None)
@given(
    shapes=shapes, seed=st.integers(0, 2**16), spread=st.sampled_from([0.5, 4.0, 30.0]), temperature=st.floats(0.2, 3)
)
def test_the_closed_form_gradient_is_that_of_autograd(shapes, seed, spread, temperature):
    generator = torch.Generator().manual_seed(seed)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logits = {name: (spread * draw(shape)).requires_grad_() for name, shape in shapes.items()}
    cotangent = {name: draw(shape) for name, shape in shapes.items()}
    mask = ConcreteMask(logits, temperature)
    sample = rescale(mask.sample(seed=seed))
    loss = sum((cotangent[name] * sample[name]).sum() for name in sample)
    expected = torch.autograd.grad(loss, list(logits.values()))
    for (name, closed), exact in zip(mask.gradient(cotangent).items(), expected, strict=True):
        # sigmoid's own saturation in float64 is the only difference
        close(closed, exact, rtol=1e-7, atol=1e-9, msg=name)


@settings(max_examples=40, deadline=None)
@given(
    shapes=shapes,
    tasks=st.integers(1, 4),
    layerwise=st.booleans(),
    masked=st.booleans(),
    clamp=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_merge_gradient_is_that_of_autograd(shapes, tasks, layerwise, masked, clamp, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = {name: draw(shape) for name, shape in shapes.items()}
    vectors = {f"task {t}": {name: draw(shape) for name, shape in shapes.items()} for t in range(tasks)}
    coefficients = draw(tasks, len(shapes)).requires_grad_() if layerwise else draw(tasks).requires_grad_()
    mask = {name: draw(shape).requires_grad_() for name, shape in shapes.items()} if masked else None
    cotangent = {name: draw(shape) for name, shape in shapes.items()}
    merged = masked_merge(base, vectors, coefficients, mask, clamp=clamp)
    loss = sum((cotangent[name] * merged[name]).sum() for name in merged)
    leaves = [coefficients, *(mask or {}).values()]
    expected, *expected_masks = torch.autograd.grad(loss, leaves)
    masks, gradient = masked_merge_gradient(cotangent, vectors, coefficients, mask, clamp=clamp)
    close(gradient, expected, rtol=1e-9, atol=1e-11)
    for name, exact in zip(mask or {}, expected_masks, strict=True):
        close(masks[name], exact, rtol=1e-9, atol=1e-11)


@given(seed=st.integers(0, 2**31), cut=st.integers(0, 1000), step=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_noise_does_not_depend_on_where_a_tensor_is_cut(seed, cut, step):
    key = noise_key(seed, step, "w")
    whole = uniform_noise(key, 0, 1000)
    assert torch.equal(whole, torch.cat([uniform_noise(key, 0, cut), uniform_noise(key, cut, 1000)]))
    assert bool((whole > 0).all())
    assert bool((whole < 1).all())


def test_noise_is_uniform_and_independent_across_steps_names_and_neighbours():
    draws = {
        (step, name): uniform_noise(noise_key(5, step, name), 0, 200_000).double()
        for step in range(3)
        for name in ("a.weight", "a.bias")
    }
    for draw in draws.values():
        counts = torch.histc(draw, 64, 0, 1)
        statistic = float(((counts - 200_000 / 64) ** 2 / (200_000 / 64)).sum())
        assert statistic < 63 + 5 * math.sqrt(2 * 63)
        assert abs(float(torch.corrcoef(torch.stack([draw[:-1], draw[1:]]))[0, 1])) < 5 / math.sqrt(200_000)
    table = torch.corrcoef(torch.stack(list(draws.values())))
    assert float((table - torch.eye(len(draws))).abs().max()) < 5 / math.sqrt(200_000)


def test_a_rescaled_mask_has_mean_one_in_every_tensor_and_zeros_stay_zeros():
    mask = rescale({"a": torch.rand(4, 5), "one": torch.rand(1), "off": torch.zeros(3)})
    close(mask["a"].mean(), torch.tensor(1.0))
    assert torch.equal(mask["one"], torch.ones(1))
    assert torch.equal(mask["off"], torch.zeros(3))


def test_bernoulli_masks_hold_ones_as_often_as_the_probability_says():
    mask = ConcreteMask.constant({"w": (100_000,)}, logit=1.0)
    hard = mask.bernoulli(seed=1)["w"]
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert abs(float(hard.mean()) - float(mask.mean()["w"][0])) < 5 * math.sqrt(0.2 / 100_000)


def test_masks_per_task_weigh_each_task_vector_by_its_own():
    base = {"w": torch.zeros(3)}
    vectors = [{"w": torch.ones(3)}, {"w": 10 * torch.ones(3)}]
    masks = [{"w": torch.tensor([1.0, 0.0, 2.0])}, {"w": torch.tensor([0.0, 1.0, 0.5])}]
    assert torch.equal(masked_merge(base, vectors, [1.0, 0.5], masks)["w"], torch.tensor([1.0, 5.0, 4.5]))


def test_tensors_without_a_task_vector_are_returned_as_they_are():
    base = {"w": torch.zeros(2, dtype=torch.bfloat16), "steps": torch.tensor(7), "norm": torch.ones(2)}
    merged = masked_merge(base, [{"w": torch.ones(2)}], [0.5])
    assert torch.equal(merged["steps"], base["steps"])
    assert torch.equal(merged["norm"], base["norm"])
    assert torch.equal(merged["w"], torch.full((2,), 0.5, dtype=torch.bfloat16))


def test_columns_follow_the_order_that_is_asked_for():
    base = {"a": torch.zeros(1), "b": torch.zeros(1)}
    vectors = [{"a": torch.ones(1), "b": torch.ones(1)}]
    merged = masked_merge(base, vectors, torch.tensor([[1.0, 2.0]]), order=["b", "a"])
    assert merged["a"].item() == 2.0
    assert merged["b"].item() == 1.0


def test_a_merge_that_does_not_fit_lists_every_problem():
    base = {"w": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(MismatchError) as caught:
        masked_merge(
            base, [{"w": torch.zeros(3), "x": torch.zeros(1)}], [0.5, 0.5], {"b": torch.ones(2), "y": torch.ones(1)}
        )
    text = str(caught.value)
    assert "w: task vector 0 has [3], the base has [2]" in text
    assert "x: in task vector 0, not in the base" in text
    assert "coefficients have shape [2], expected [1] or [1, 1]" in text
    assert "w: the mask has no such tensor" in text
    assert "y: in the mask, not in the base" in text


def test_wrong_noise_and_wrong_temperatures_are_refused():
    mask = ConcreteMask({"w": torch.zeros(2)})
    with pytest.raises(MismatchError, match=r"w: noise has \[3\], the logits have \[2\]"):
        mask.sample({"w": torch.rand(3)})
    with pytest.raises(MismatchError, match="w: no noise given"):
        mask.sample({"v": torch.rand(2)})
    with pytest.raises(UsageError, match="either `uniform`"):
        mask.sample()
    with pytest.raises(UsageError, match="no sample has been drawn"):
        mask.gradient({"w": torch.ones(2)})
    with pytest.raises(ParameterError, match=r"temperature: 0 is not positive"):
        ConcreteMask({"w": torch.zeros(2)}, temperature=0)
    with pytest.raises(ParameterError, match=r"logits are torch\.int64"):
        ConcreteMask({"w": torch.zeros(2, dtype=torch.int64)})


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_noise_outside_zero_to_one_is_refused(value):
    mask = ConcreteMask({"w": torch.zeros(2)})
    for draw in (mask.sample, mask.bernoulli):
        with pytest.raises(ParameterError, match=r"w: noise must lie in \[0, 1\]"):
            draw({"w": torch.tensor([0.5, value])})


def test_a_single_tensor_is_no_mapping_of_them():
    with pytest.raises(UsageError, match="noise: expected name to tensor, found a Tensor"):
        ConcreteMask({"w": torch.zeros(2, 3)}).sample(torch.rand(2, 3))
    with pytest.raises(UsageError, match="logits: expected name to tensor, found a Tensor"):
        ConcreteMask(torch.zeros(2))


def test_masks_of_true_and_false_are_rescaled_as_ones_and_zeros():
    close(rescale({"w": torch.tensor([True, False, False, True])}), {"w": torch.tensor([2.0, 0.0, 0.0, 2.0])})


def test_coefficients_and_masks_by_task_name_need_no_order():
    base = {"w": torch.zeros(2)}
    vectors = {"a": {"w": torch.ones(2)}, "b": {"w": torch.tensor([1.0, 3.0])}}
    masks = {"b": {"w": torch.tensor([2.0, 0.0])}, "a": {"w": torch.tensor([1.0, 5.0])}}
    merged = masked_merge(base, vectors, {"b": 0.5, "a": 0.1}, masks)
    close(merged["w"], torch.tensor([0.1 + 0.5 * 2.0, 0.1 * 5.0]))
    with pytest.raises(MismatchError, match="coefficients: none for task 'b'(.|\n)*there is no task 'c'. Known: a, b"):
        masked_merge(base, vectors, {"a": 0.5, "c": 0.1}, masks)
    with pytest.raises(UsageError, match="the task vectors have no names"):
        masked_merge(base, list(vectors.values()), {"a": 0.5, "b": 0.1})


def test_numbers_keep_their_digits_in_double_precision():
    base, vector = ({"w": torch.tensor([v], dtype=torch.float64)} for v in (0.0, 1.0))
    assert masked_merge(base, [vector], [0.1])["w"].item() == 0.1


def test_a_merge_that_is_no_number_is_refused():
    base, vector = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, math.inf, math.nan])}
    with pytest.raises(NonFiniteError, match="w: the merge holds 2 NaN or infinite values"):
        masked_merge(base, [vector], [1.0])
    with pytest.raises(NonFiniteError, match="w: the merge holds 3"):
        masked_merge(base, [{"w": torch.ones(3)}], [math.nan])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masks_of_half_precision_logits_are_those_of_the_same_numbers_in_double(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = {"w": torch.randn(6, 5, generator=generator).to(dtype), "s": torch.tensor(0.3, dtype=dtype)}
    uniform = {name: torch.rand(tensor.shape, generator=generator) for name, tensor in logits.items()}
    cotangent = {name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in logits.items()}

    def everything(*given):
        wide, noise, upstream = given
        mask = ConcreteMask(wide)
        sample = mask.sample(noise)
        return [sample, rescale(sample), mask.mean(), mask.gradient(upstream), mask.bernoulli(noise)]

    exact = everything(
        *({name: tensor.double() for name, tensor in own.items()} for own in (logits, uniform, cotangent))
    )
    for found, expected in zip(everything(logits, uniform, cotangent), exact, strict=True):
        close({name: tensor.double() for name, tensor in found.items()}, expected, rtol=2e-6, atol=2e-6)
