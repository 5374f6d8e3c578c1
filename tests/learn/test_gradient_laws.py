"""The pulled-back gradient is that of autograd through an explicit composition, whatever is composed and how."""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from merging.learn.composition import GRANULARITIES, Composition
from taskvec.source import LowRank

CLASSES = 7


class Small(nn.Module):
    """Token ids to logits, with every kind of parameter: table, fused attention, norm, matrices, 0-d, unused, tied."""

    def __init__(self, tied=False, checkpointed=False):
        super().__init__()
        self.checkpointed = checkpointed
        self.embed = nn.Embedding(CLASSES, 6, padding_idx=0)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 6)
        self.unused = nn.Parameter(torch.ones(3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(6, CLASSES, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def middle(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = x + (checkpoint(self.middle, x, use_reentrant=False) if self.checkpointed else self.middle(x))
        return self.head(x.mean(1)) * self.scale


def model_of(seed, dtype, tied=False, checkpointed=False):
    torch.manual_seed(seed)
    return Small(tied, checkpointed).to(dtype)


def vectors_of(model, seed, tasks, kinds, dtype):
    """Task vectors whose tensors are dense, low-rank, zero or missing, drawn from `kinds`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return 0.3 * torch.randn(shape, generator=generator, dtype=dtype)

    vectors = {}
    for t in range(tasks):
        deltas = {}
        for i, (name, parameter) in enumerate(model.named_parameters()):
            kind = kinds[(i + t * 5) % len(kinds)]
            shape = tuple(parameter.shape)
            if kind == "low" and len(shape) == 2:
                deltas[name] = LowRank(normal(shape[0], 2), normal(2, shape[1]), shape)
            elif kind in ("dense", "low"):
                deltas[name] = normal(*shape)
            elif kind == "zero":
                deltas[name] = torch.zeros(shape, dtype=dtype)
        vectors[f"t{t}"] = deltas
    return vectors


def explicit(composition, model, base, vectors, values):
    """The merged weights with a graph to `values`, built from what the coefficients' file would say."""
    file = replace(composition.learned(), values=values)
    merged = {}
    for name, parameter in base.items():
        weights = file.expand(name, parameter.shape, 0, parameter.numel())
        total = parameter
        for t, deltas in enumerate(vectors.values()):
            if name in deltas:
                delta = deltas[name].dense() if isinstance(deltas[name], LowRank) else deltas[name]
                total = total + weights[t].view(parameter.shape) * delta
        merged[name] = total
    return merged


def batches_of(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(CLASSES, (5, 4), generator=generator), torch.randint(CLASSES, (5,), generator=generator))
        for _ in range(count)
    ]


def by_first_letter(name):
    return None if name.startswith("norm") else name[0]


# no shrinking: each example builds a model, and the drawn words say enough
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    granularity=st.sampled_from([*GRANULARITIES, by_first_letter]),
    partitions=st.sampled_from([None, None, (3, 11), "explicit"]),
    kinds=st.lists(st.sampled_from(["dense", "low", "zero", "missing"]), min_size=1, max_size=5),
    tasks=st.integers(1, 3),
    tied=st.booleans(),
    checkpointed=st.booleans(),
    passes=st.integers(1, 3),
    hold=st.booleans(),
    factored=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pull_back_equals_autograd(
    granularity, partitions, kinds, tasks, tied, checkpointed, passes, hold, factored, seed
):
    if not {"dense", "low"} & set(kinds):
        kinds = [*kinds, "dense", "low"]
    if granularity in ("row", "column", "qkv"):
        partitions = None
    model = model_of(seed, torch.float64, tied, checkpointed)
    vectors = vectors_of(model, seed + 1, tasks, kinds, torch.float64)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    shapes = {n: p.shape for n, p in model.named_parameters() if p.dim() == 2}
    changed = {
        n for deltas in vectors.values() for n, d in deltas.items() if not isinstance(d, torch.Tensor) or d.any()
    }
    if partitions == "explicit":
        generator = torch.Generator().manual_seed(seed)
        partitions = {n: torch.randint(4, s, generator=generator) for n, s in shapes.items()}
    matrices_only = isinstance(partitions, dict) or granularity in ("matrix", "row", "column", "qkv")
    if matrices_only and not changed & set(shapes):
        return  # nothing that would be composed changes, which is refused
    if granularity is by_first_letter and not changed - {"norm.weight", "norm.bias"}:
        return
    composition = Composition(model, vectors, granularity, partitions, factored=factored)
    generator = torch.Generator().manual_seed(seed + 2)
    data = batches_of(seed + 3, passes)
    for _ in range(2):  # the second call goes through factors and rows where the first agreed
        values = torch.randn(composition.coefficients.shape, generator=generator, dtype=torch.float64)
        composition.coefficients = values
        values = values.requires_grad_(True)
        merged = explicit(composition, model, base, vectors, values)
        # the recomputation of checkpointing would see the module's own weights, not those of functional_call
        model.checkpointed = False
        wanted = sum(cross_entropy(functional_call(model, merged, (x,)), y) for x, y in data)
        model.checkpointed = checkpointed
        (slope,) = torch.autograd.grad(wanted, values, allow_unused=True)
        slope = torch.zeros_like(values) if slope is None else slope
        with composition:
            loss, grad = composition.gradient(lambda: (cross_entropy(model(x), y) for x, y in data), hold=hold)
            torch.testing.assert_close(loss, wanted.detach(), rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(grad, slope, rtol=1e-8, atol=1e-10)
            composition.compose_()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.detach(), merged[name].detach(), rtol=1e-9, atol=1e-11)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, base[name])
            assert parameter.grad is None
            assert parameter.requires_grad


@pytest.mark.parametrize("bank_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_models_are_composed_and_pulled_back_in_float32(dtype, bank_dtype):
    model = model_of(0, dtype)
    exact = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[bank_dtype]
    vectors = {
        task: {name: delta.to(exact).float() for name, delta in deltas.items()}
        for task, deltas in vectors_of(model, 1, 3, ["dense"], torch.float32).items()
    }
    composition = Composition(model, vectors, bank_dtype=bank_dtype, factored=False)
    values = torch.randn(composition.coefficients.shape, generator=torch.Generator().manual_seed(2))
    composition.coefficients = values
    assert composition.coefficients.dtype == torch.float32
    seen = {}
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    (x, y), *_ = batches_of(3, 1)
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: seen.__setitem__(name, grad.clone()))
    with composition:
        _, grad = composition.gradient(lambda: cross_entropy(model(x).float(), y))
        for b, name in enumerate(composition.blocks):
            total = base[name].double() + sum(
                values[t, b].double() * v[name].double() for t, v in enumerate(vectors.values())
            )
            wanted = total.float().to(dtype)
            found = dict(model.named_parameters())[name]
            # the sum is in float32, so it may fall on the other side of a rounding boundary: one step of the dtype
            assert torch.allclose(found.float(), wanted.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            for t, vector in enumerate(vectors.values()):
                exact_product = (seen[name].double() * vector[name].double()).sum() if name in seen else torch.zeros(())
                bound = 1e-5 * float((seen[name].double() * vector[name].double()).abs().sum()) if name in seen else 0
                assert abs(float(grad[t, b]) - float(exact_product)) <= bound + 1e-9
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base[name])


def test_scaled_float16_keeps_eleven_bits_of_small_deltas():
    model = model_of(0, torch.float32)
    vectors = {
        t: {n: d * 1e-6 for n, d in deltas.items()}
        for t, deltas in vectors_of(model, 1, 2, ["dense"], torch.float32).items()
    }
    scaled = Composition(model, vectors, bank_dtype="float16")
    for name in scaled.composed:
        block = scaled.bank.blocks[name]
        for row, scale, deltas in zip(block.values, block.scales, vectors.values(), strict=True):
            wanted = deltas[name].reshape(-1)
            found = row.float() * scale
            assert float((found - wanted).norm() / wanted.norm()) < 2**-11


@pytest.mark.parametrize("bank", ["cpu", "pinned", "disk"])
def test_gradient_does_not_depend_on_where_the_task_vectors_lie(bank, tmp_path):
    (x, y), *_ = batches_of(3, 1)

    def run(**options):
        model = model_of(0, torch.float32)
        vectors = vectors_of(model, 1, 3, ["dense", "low", "missing"], torch.float32)
        composition = Composition(model, vectors, coefficients=0.3, **options)
        results = []
        with composition:
            for _ in range(2):
                results.append(composition.gradient(lambda: cross_entropy(model(x), y)))
        return results

    for (loss, grad), (wanted, slope) in zip(run(bank=bank, bank_folder=tmp_path), run(), strict=True):
        assert torch.equal(loss, wanted)
        assert torch.equal(grad, slope)
    assert not list(tmp_path.iterdir())


def test_autocast_changes_only_the_rounding():
    (x, y), *_ = batches_of(3, 1)
    model = model_of(0, torch.float32)
    vectors = vectors_of(model, 1, 3, ["dense", "low"], torch.float32)
    composition = Composition(model, vectors, coefficients=0.3)

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cross_entropy(model(x).float(), y)

    with composition:
        _, exact = composition.gradient(lambda: cross_entropy(model(x), y))
        for _ in range(2):
            _, grad = composition.gradient(closure)
            assert float((grad - exact).norm() / exact.norm()) < 0.05


def test_gradient_agrees_with_a_finite_difference_of_the_loss():
    (x, y), *_ = batches_of(3, 1)
    x = x.clamp(min=1)  # torch gives the padding row no gradient, though the loss depends on it
    model = model_of(0, torch.float64)
    composition = Composition(model, vectors_of(model, 1, 2, ["dense", "low"], torch.float64), coefficients=0.2)
    direction = torch.randn(
        composition.coefficients.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    with composition:
        _, grad = composition.gradient(lambda: cross_entropy(model(x), y))
        losses = []
        for step in (1e-5, -1e-5):
            composition.coefficients += step * direction
            losses.append(cross_entropy(composition.compose_().model(x), y).detach())
            composition.coefficients -= step * direction
    assert float((losses[0] - losses[1]) / 2e-5) == pytest.approx(float((grad * direction).sum()), rel=1e-7)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, in the reference's jvp
def test_linear_mode_gradient_is_that_of_the_first_order_model():
    (x, y), *_ = batches_of(3, 1)
    model = model_of(0, torch.float64)
    vectors = vectors_of(model, 1, 2, ["dense", "low", "missing"], torch.float64)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    composition = Composition(model, vectors, mode="linear", coefficients=0.2)
    values = composition.coefficients.clone().requires_grad_(True)
    merged = explicit(composition, model, base, vectors, values)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        zeroth, first = torch.func.jvp(
            lambda weights: functional_call(model, weights, (x,)),
            (base,),
            ({name: merged[name] - base[name] for name in base},),
        )
    wanted = cross_entropy(zeroth + first, y)
    (slope,) = torch.autograd.grad(wanted, values)
    with composition:
        loss, grad = composition.gradient(lambda: cross_entropy(model(x), y))
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-11)
    assert "forward" not in vars(model)
