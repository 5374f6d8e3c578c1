"""Spectral methods against independent float64 readings of the papers, written with plain dense SVDs."""

import pytest
import torch

from merging import merge_stacks
from taskvec.sweep import Outcome


def stacks(tasks=3, shape=(12, 20), seed=0, dtype=torch.float32):
    return torch.randn(tasks, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low_rank_stacks(tasks=3, shape=(24, 40), rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(tasks, shape[0], rank, generator=generator, dtype=torch.float64)
    right = torch.randn(tasks, rank, shape[1], generator=generator, dtype=torch.float64)
    return left @ right


def polar(matrix):
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def close(found, wanted, tolerance=1e-5):
    error = (found.double() - wanted).norm() / wanted.norm()
    assert float(error) < tolerance, f"relative error {float(error):.2e}"


SHAPES = [(12, 20), (20, 12), (15, 15)]


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_m_is_the_papers_formula(shape):
    stack = stacks(shape=shape)
    k = min(shape) // 3
    parts = [torch.linalg.svd(delta.double(), full_matrices=False) for delta in stack]
    u = torch.cat([p[0][:, :k] for p in parts], 1)
    s = torch.cat([p[1][:k] for p in parts])
    v = torch.cat([p[2][:k].T for p in parts], 1)
    close(merge_stacks("tsv_m", {"w": stack})["w"], polar(u) @ torch.diag(s) @ polar(v).T)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0]])
def test_iso_c_gives_every_direction_the_mean_singular_value(shape, weights):
    stack = stacks(shape=shape)
    total = sum((weights or [1.0] * 3)[i] * stack[i].double() for i in range(3))
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    merged = merge_stacks("iso_c", {"w": stack}, weights=weights)["w"]
    close(merged, s.mean() * u @ vh)
    values = torch.linalg.svdvals(merged.double())
    torch.testing.assert_close(values, torch.full_like(values, float(s.mean())), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("common", [0.5, 0.8])
def test_iso_cts_is_the_papers_formula(shape, common):
    stack = stacks(tasks=2, shape=shape)
    r, count = min(shape), 2
    s = round((r - int(common * r)) / count)
    k = r - s * count
    u, values, vh = torch.linalg.svd(stack.double().sum(0), full_matrices=False)
    lefts, rights, kept = [], [], []
    for delta in stack.double():
        rest = delta - u[:, :k] @ u[:, :k].T @ delta
        a, b, c = torch.linalg.svd(rest, full_matrices=False)
        lefts.append(a[:, :s])
        kept.append(b[:s])
        rights.append(c[:s].T)
    lefts.append(u[:, :k])
    kept.append(values[:k])
    rights.append(vh[:k].T)
    wanted = torch.cat(kept).mean() * polar(torch.cat(lefts, 1)) @ polar(torch.cat(rights, 1)).T
    close(merge_stacks("iso_cts", {"w": stack}, common=common)["w"], wanted)


def test_iso_cts_with_many_tasks_is_iso_c_and_says_so():
    stack = stacks(tasks=8, shape=(10, 12))
    outcome = Outcome()
    merged = merge_stacks("iso_cts", {"w": stack}, outcome=outcome)["w"]
    close(merged, merge_stacks("iso_c", {"w": stack})["w"].double())
    assert any("Iso-C is what remains" in warning for warning in outcome.warnings)


def test_cart_adds_low_rank_rests_to_the_average():
    stack = stacks(shape=(12, 20))
    mean = stack.double().mean(0)
    wanted = mean.clone()
    for delta in stack.double():
        u, s, vh = torch.linalg.svd(delta - mean, full_matrices=False)
        wanted += 0.7 * u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
    close(merge_stacks("cart", {"w": stack}, share=0.25, gain=0.7)["w"], wanted)


def test_knots_merges_coordinates_by_ties():
    stack = stacks(shape=(8, 10))
    wide = torch.cat(list(stack.double()), 1)
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    parts = torch.stack(vh.split(10, dim=1))
    trimmed = torch.zeros_like(parts)
    for i, part in enumerate(parts):
        least = part.abs().flatten().sort().values[-int(0.3 * part.numel())]
        trimmed[i] = torch.where(part.abs() >= least, part, 0.0)
    sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = (torch.sign(trimmed) == sign).double()
    wanted = u @ torch.diag(s) @ ((trimmed * agree).sum(0) / agree.sum(0).clamp(min=1))
    close(merge_stacks("knots", {"w": stack}, density=0.3)["w"], wanted)


def test_knots_by_the_mean_is_the_mean():
    stack = stacks()
    close(merge_stacks("knots", {"w": stack}, rule="mean")["w"], stack.double().mean(0))


def wudi_loss(point, stack):
    return sum(((point - d) @ d.T).square().sum() / d.square().sum() for d in stack)


def test_wudi_adam_follows_torchs_adam_on_the_papers_loss():
    stack = stacks(shape=(6, 9)) * 0.01
    wide = stack.double()
    point = wide.sum(0).clone().requires_grad_()
    optimiser = torch.optim.Adam([point], lr=1e-5)
    for _ in range(40):
        optimiser.zero_grad()
        wudi_loss(point, wide).backward()
        optimiser.step()
    close(merge_stacks("wudi", {"w": stack}, steps=40)["w"], point.detach(), 1e-6)


def test_wudi_ridge_solves_the_normal_equations_and_lowers_the_loss():
    stack = stacks(tasks=4, shape=(10, 16))
    wide = stack.double()
    curvature = sum(d.T @ d / d.square().sum() for d in wide)
    target = sum(d @ (d.T @ d) / d.square().sum() for d in wide)
    mu = 1e-3 * curvature.diagonal().mean()
    wanted = (target + mu * wide.sum(0)) @ torch.linalg.inv(curvature + mu * torch.eye(16, dtype=torch.float64))
    merged = merge_stacks("wudi", {"w": stack}, solver="ridge")["w"]
    close(merged, wanted)
    assert float(wudi_loss(merged.double(), wide)) < 0.5 * float(wudi_loss(wide.sum(0), wide))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "h.0.mlp.up.bias"])
def test_wudi_leaves_what_is_no_weight_matrix_at_the_base(name):
    stack = stacks(shape=(9,) if name.endswith("bias") else (6, 9))
    assert not merge_stacks("wudi", {name: stack})[name].any()
    averaged = merge_stacks("wudi", {name: stack}, others="mean")[name]
    torch.testing.assert_close(averaged, stack.mean(0))


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "cart", "knots"])
def test_tensors_that_are_no_matrices_are_averaged(method):
    found = merge_stacks(method, {"norm.weight": stacks(shape=(7,)), "conv.weight": stacks(shape=(3, 2, 3, 3))})
    torch.testing.assert_close(found["norm.weight"], stacks(shape=(7,)).mean(0))
    torch.testing.assert_close(found["conv.weight"], stacks(shape=(3, 2, 3, 3)).mean(0))


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_text_projection_is_averaged_as_the_authors_do_unless_told(method):
    stack = stacks()
    named = merge_stacks(method, {"text_projection.weight": stack})["text_projection.weight"]
    torch.testing.assert_close(named, stack.mean(0))
    asked = merge_stacks(method, {"text_projection.weight": stack}, averaged=[])["text_projection.weight"]
    assert torch.equal(asked, merge_stacks(method, {"w": stack})["w"])


RANK_AWARE = [("tsv_m", {}), ("iso_c", {}), ("iso_cts", {}), ("knots", {}), ("cart", {})]


@pytest.mark.parametrize(("method", "options"), RANK_AWARE)
def test_low_rank_input_gives_the_same_in_both_precisions_and_stays_in_its_span(method, options):
    stack = low_rank_stacks()
    wide = merge_stacks(method, {"w": stack}, **options)["w"]
    narrow = merge_stacks(method, {"w": stack.float()}, **options)["w"]
    close(narrow, wide, 1e-4)
    # every merged column lies in the span of the inputs' columns
    u, s, _ = torch.linalg.svd(torch.cat(list(stack), 1), full_matrices=False)
    span = u[:, s > 1e-10 * s[0]]
    outside = wide - span @ span.T @ wide
    assert float(outside.norm() / wide.norm()) < 1e-9


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "knots"])
def test_low_rank_input_is_warned_of_once_by_name(method):
    outcome = Outcome()
    stack = low_rank_stacks()
    merge_stacks(method, {"a": stack, "b": stack, "norm": torch.ones(3, 5)}, outcome=outcome)
    found = [warning for warning in outcome.warnings if "low numerical rank" in warning]
    assert len(found) == 1
    assert found[0].startswith(f"{method}: 2 of 2 matrices have a low numerical rank (a: ")


def test_full_rank_input_is_not_warned_of():
    outcome = Outcome()
    merge_stacks("tsv_m", {"a": stacks()}, outcome=outcome)
    assert outcome.warnings == []


def test_iso_c_can_take_the_mean_over_all_directions_as_the_paper_writes_it():
    stack = low_rank_stacks(tasks=2, rank=3)
    by_rank = merge_stacks("iso_c", {"w": stack})["w"]
    by_full = merge_stacks("iso_c", {"w": stack}, mean_over="full")["w"]
    torch.testing.assert_close(by_full, by_rank * 6 / 24)


def test_identical_tasks_do_not_break_the_whitening():
    stack = stacks(tasks=1).expand(3, -1, -1)
    u, s, vh = torch.linalg.svd(stack[0].double(), full_matrices=False)
    close(merge_stacks("tsv_m", {"w": stack})["w"], u[:, :4] @ torch.diag(s[:4]) @ vh[:4])


# -- preprocess and postprocess -----------------------------------------------------------------------------------------


def test_low_rank_keeps_the_best_approximation():
    stack = stacks()
    wanted = torch.zeros(12, 20, dtype=torch.float64)
    for delta in stack.double():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        wanted += u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
    close(merge_stacks("low_rank", {"w": stack}, rank=3)["w"], wanted)
    close(merge_stacks("low_rank", {"w": stack}, share=0.25)["w"], wanted)


def test_low_rank_by_energy_keeps_just_enough():
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]
    kept = merge_stacks("low_rank", {"w": delta}, energy=13 / 14)["w"]
    torch.testing.assert_close(kept, torch.diag(torch.tensor([3.0, 2.0, 0.0])))


def test_svc_is_the_papers_formula():
    stack = stacks(tasks=4)
    stack = stack + 2 * stacks(tasks=1, seed=7)  # a shared part, so that something is over-counted
    merged = stack.double().sum(0)
    u, s, vh = torch.linalg.svd(merged, full_matrices=False)
    gamma = []
    for j in range(len(s)):
        a = u[:, j] @ merged
        total = 0.0
        for delta in stack.double():
            own = u[:, j] @ delta
            total += max(1.0, float(a @ own / own.square().sum()))
        gamma.append(4 / total)
    wanted = u @ torch.diag(s * torch.tensor(gamma, dtype=torch.float64)) @ vh
    assert min(gamma) < 0.5
    close(merge_stacks("task_arithmetic", {"w": stack}, postprocess=["svc"])["w"], wanted)


@pytest.mark.parametrize(("method", "warned"), [("iso_c", True), ("task_arithmetic", False)])
def test_svc_warns_where_no_direction_is_larger_than_another(method, warned):
    outcome = Outcome()
    stack = torch.randn(3, 12, 9, generator=torch.Generator().manual_seed(2))
    merge_stacks(method, {"w": stack}, postprocess=["svc"], outcome=outcome)
    assert any("one singular value for all directions (w)" in warning for warning in outcome.warnings) is warned


def test_svc_never_lengthens_with_a_floor_of_one():
    stack = stacks(tasks=4)
    before = merge_stacks("task_arithmetic", {"w": stack})["w"]
    after = merge_stacks("task_arithmetic", {"w": stack}, postprocess=["svc"])["w"]
    assert float(after.norm()) <= float(before.norm()) * (1 + 1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_subspace_boosting_lifts_small_singular_values_to_the_cut(share):
    stack = stacks()
    total = stack.double().sum(0)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    cumulative = s.cumsum(0) / s.sum()
    j = next((i for i in range(len(s)) if cumulative[i] >= share - 1e-12), len(s) - 1)
    lifted = torch.cat([s[: j + 1], s[j].expand(len(s) - j - 1)])
    boosted = merge_stacks(
        "task_arithmetic", {"w": stack}, postprocess=[{"method": "subspace_boosting", "share": share}]
    )["w"]
    close(boosted, u @ torch.diag(lifted) @ vh)


def test_subspace_boosting_does_not_lift_directions_that_are_zero():
    stack = low_rank_stacks()
    steps = [{"method": "subspace_boosting", "share": 0.5}]
    outcome = Outcome()
    boosted = merge_stacks("task_arithmetic", {"w": stack.float()}, postprocess=steps, outcome=outcome)["w"]
    assert int(torch.linalg.matrix_rank(boosted, rtol=1e-4)) == 6
    close(boosted, merge_stacks("task_arithmetic", {"w": stack}, postprocess=steps)["w"], 1e-4)
    assert any("only the directions within it are lifted" in warning for warning in outcome.warnings)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("wudi", {"steps": 100, "rate": 1e-3}),
        ("wudi", {"solver": "ridge"}),
        ("low_rank", {"rank": 4}),
        ("low_rank", {"energy": 0.999999}),
        ("task_arithmetic", {"postprocess": ["svc"]}),
    ],
)
def test_low_rank_input_gives_the_same_in_both_precisions(method, options):
    stack = low_rank_stacks()
    close(
        merge_stacks(method, {"w": stack.float()}, **options)["w"],
        merge_stacks(method, {"w": stack}, **options)["w"],
        1e-4,
    )


def test_adapters_of_a_higher_rank_than_their_share_are_merged_alike_too():
    stack = low_rank_stacks(tasks=4, rank=12)  # 12 of 24, a share of 6 for each task
    close(merge_stacks("tsv_m", {"w": stack.float()})["w"], merge_stacks("tsv_m", {"w": stack})["w"], 1e-4)


def test_the_reference_form_of_iso_c_would_not_agree_with_itself_here():
    # what the restriction is for: flattening all of a rank-6 sum fills 18 arbitrary directions of 24
    stack = low_rank_stacks()
    ours = merge_stacks("iso_c", {"w": stack})["w"]
    total = stack.sum(0)
    values = torch.linalg.svdvals(total)
    reference = values.mean() * polar(total)
    inside = torch.linalg.svd(total, full_matrices=False)[0][:, :6]
    outside = reference - inside @ inside.T @ reference
    assert float(outside.square().sum() / reference.square().sum()) == pytest.approx(18 / 24)
    assert float((ours - inside @ inside.T @ ours).norm() / ours.norm()) < 1e-9


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "knots", "tsv_m", "wudi"])
def test_a_model_without_matrices_is_warned_of(method, tmp_path):
    from safetensors.torch import save_file

    from merging import Recipe, merge

    generator = torch.Generator().manual_seed(0)
    for name in ("base", "one", "two"):
        tensors = {"conv.weight": torch.randn(4, 3, 1, 1, generator=generator), "bn.weight": torch.randn(4)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("one", "two")]
    recipe = Recipe.from_data({"base": str(tmp_path / "base.safetensors"), "tasks": paths, "method": method})
    outcome = merge(recipe, tmp_path / "out")
    what = "stay the base's" if method == "wudi" else "are averaged"
    said = f"{method}: none of the 2 tensors is a matrix (kernels of convolutions are not), so all {what}"
    assert said in outcome.warnings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_in_knots_a_task_that_changed_nothing_has_no_vote(dtype, density):
    stack = torch.randn(3, 9, 14, generator=torch.Generator().manual_seed(8)).to(dtype)
    stack[1] = 0
    found = merge_stacks("knots", {"w": stack}, density=density)["w"]
    torch.testing.assert_close(found, merge_stacks("knots", {"w": stack[[0, 2]]}, density=density)["w"])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("iso_c", {}),
        ("iso_cts", {}),
        ("tsv_m", {}),
        ("knots", {}),
        ("knots", {"rule": "mean"}),
        ("cart", {"share": 0.3}),
        ("wudi", {"solver": "ridge"}),
        ("task_arithmetic", {"preprocess": [{"method": "low_rank", "share": 0.3}]}),
        ("task_arithmetic", {"postprocess": ["svc"]}),
        ("task_arithmetic", {"postprocess": [{"method": "subspace_boosting", "share": 0.5}]}),
    ],
)
def test_float32_numbers_give_the_same_when_they_come_in_float64(name, parameters):
    # made in float32, so that in float64 they have the rank of their rounding errors
    stack = low_rank_stacks().float()
    single = merge_stacks(name, {"w": stack}, **parameters)["w"]
    double = merge_stacks(name, {"w": stack.double()}, **parameters)["w"]
    assert double.dtype == torch.float64
    close(single, double, 1e-6)
