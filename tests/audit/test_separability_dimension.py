import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from merging.edits.dimension import (
    DimensionProfile,
    dimension_profile,
    edits_bound,
    intrinsic_dimension,
    rate_bound,
)
from taskvec.errors import DataError, UsageError

GOLDEN = Path(__file__).parents[1] / "goldens" / "stealth" / "intrinsic_dim.safetensors"
SETS = ("sphere4", "sphere12", "sphere40", "cone24", "clusters10", "raw16")


def on_sphere(
    count: int, width: int, *, seed: int = 0, shift: float = 0.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    points = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    points[:, 0] += shift
    return torch.nn.functional.normalize(points, dim=1).to(dtype)


def counted(points: Tensor, delta: float, owner: Tensor | None = None) -> tuple[int, int]:
    """Hits and pairs by the definition, one pair at a time in matrix form."""
    inner = points.double() @ points.double().T - points.double().square().sum(1)
    allowed = ~torch.eye(len(points), dtype=torch.bool)
    if owner is not None:
        allowed &= owner[:, None] != owner[None]
    return int(((inner >= delta) & allowed).sum()), int(allowed.sum())


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("centre", [False, True])
def test_the_authors_numbers_are_reproduced(name: str, centre: bool) -> None:
    golden = load_file(GOLDEN)
    found = intrinsic_dimension(golden[f"{name}.features"], golden["theta"], centre=centre)
    prefix = f"{name}.centre{int(centre)}"
    torch.testing.assert_close(found.deltas, golden["delta"], rtol=0, atol=1e-15)
    torch.testing.assert_close(found.p, golden[f"{prefix}.p"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.bound, golden[f"{prefix}.bound"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.dimension, golden[f"{prefix}.dim"], rtol=1e-5, atol=1e-5)
    zero = intrinsic_dimension(golden[f"{name}.features"], [0.0], centre=centre)
    torch.testing.assert_close(zero.p, golden[f"{prefix}.p_delta0"], rtol=0, atol=1e-6)
    torch.testing.assert_close(zero.dimension, golden[f"{prefix}.dim_delta0"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["wide", "sharp"])
def test_a_jet_packs_bound_is_that_of_centred_renormalised_features(case: str) -> None:
    golden = load_file(GOLDEN.with_name("jetpack.safetensors"))
    gain = golden[f"{case}.norm_weight"]
    edited = set(golden[f"{case}.trigger_index"].tolist())
    others = [row for row in range(len(golden[f"{case}.features_bad"])) if row not in edited]
    for features, name in (
        (golden[f"{case}.features_wiki"][500:], "probs_wiki"),
        (golden[f"{case}.features_bad"][others], "probs_other"),
    ):
        points = features / (math.sqrt(len(gain)) * gain)
        found = intrinsic_dimension(
            points, golden[f"{case}.theta"], centre=golden[f"{case}.centroid"], renormalise=True
        )
        torch.testing.assert_close(found.bound, golden[f"{case}.stat.{name}"], rtol=1e-4, atol=0)
        assert found.bound_applies


@settings(deadline=None, max_examples=25)
@given(count=st.integers(2, 40), width=st.integers(2, 9), rows=st.integers(1, 50), seed=st.integers(0, 999))
def test_blocks_do_not_change_the_count_and_it_is_the_definition(count: int, width: int, rows: int, seed: int) -> None:
    points = on_sphere(count, width, seed=seed)
    thetas = [0.05, 0.3, 1.0]
    found = intrinsic_dimension(points, thetas, block_bytes=8 * count * rows)
    for level, theta in enumerate(thetas):
        hits, pairs = counted(points, 2 * theta * (theta - 2))
        assert (int(found.hits[level]), found.pairs) == (hits, pairs)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=8),
    skip=st.integers(0, 2),
    rows=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_pairs_within_a_sequence_and_first_positions_do_not_count(
    lengths: list[int], skip: int, rows: int, seed: int
) -> None:
    owner = torch.cat([torch.full((n,), 7 - i) for i, n in enumerate(lengths)])
    position = torch.cat([torch.arange(n) for n in lengths])
    keep = position >= skip
    points = on_sphere(len(owner), 3, seed=seed)
    if len(set(owner[keep].tolist())) < 2:
        with pytest.raises(DataError, match="fewer than two sequences are left"):
            intrinsic_dimension(points, [0.3], sequences=owner, skip_first=skip)
        return
    found = intrinsic_dimension(points, [0.3], sequences=owner, skip_first=skip, block_bytes=8 * rows * len(owner))
    hits, pairs = counted(points[keep], 2 * 0.3 * (0.3 - 2), owner[keep])
    assert (int(found.hits[0]), found.pairs) == (hits, pairs)
    assert found.first_excluded == int((~keep).sum())
    assert found.independent == len(set(owner[keep].tolist()))


def test_padding_on_either_side_and_the_flat_form_agree() -> None:
    points = on_sphere(12, 4).view(3, 4, 4)
    left = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    found = intrinsic_dimension(points, [0.2, 0.5], mask=left)
    owner = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    flat = intrinsic_dimension(points[left], [0.2, 0.5], sequences=owner)
    assert torch.equal(found.hits, flat.hits)
    assert (found.used, found.first_excluded, found.pairs) == (flat.used, flat.first_excluded, flat.pairs) == (6, 3, 22)


def test_a_repeated_first_position_caps_the_dimension_unless_it_is_left_out() -> None:
    points = on_sphere(600, 30).view(60, 10, 30).clone()
    points[:, 0] = points[0, 0]
    with_first = intrinsic_dimension(points, [0.005], skip_first=0)
    without = intrinsic_dimension(points, [0.005])
    # a tenth of all positions is one vector: the cap is -1 - 2 log2(0.1)
    assert float(with_first.dimension[0]) == pytest.approx(-1 - 2 * math.log2(0.1), abs=0.1)
    assert math.isinf(float(without.dimension[0]))
    assert without.first_excluded == 60


@pytest.mark.parametrize("law", ["uniform", "cone", "clusters", "low", "mixture"])
def test_no_trigger_fires_more_often_than_the_bound(law: str) -> None:
    width = {"uniform": 6, "cone": 8, "clusters": 6, "low": 3, "mixture": 5}[law]

    def draw(count: int, seed: int) -> Tensor:
        points = on_sphere(count, width, seed=seed, shift=2.0 if law == "cone" else 0.0)
        if law == "clusters":
            centres = on_sphere(9, width, seed=77)
            points = torch.nn.functional.normalize(centres[torch.arange(count) % 9] + 0.2 * points, dim=1)
        if law == "mixture":
            points[::10] = on_sphere(1, width, seed=5)
        return points

    sample, fresh = draw(2000, 1), draw(2000, 2)
    thetas = [0.005, 0.02, 0.05, 0.1, 0.3]
    found = intrinsic_dimension(sample, thetas)
    triggers = torch.cat([draw(3, 3), sample.mean(0, keepdim=True) / sample.mean(0).norm()])
    for level, theta in enumerate(thetas):
        rates = (triggers @ fresh.T > 1 - theta).double().mean(1)
        assert float(rates.max()) <= float(found.bound_upper[level])
        assert float(found.bound[level]) <= float(found.bound_upper[level])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # on the circle, P[cos angle >= 1 + delta] is known
    theta = 0.1
    truth = math.acos(1 + 2 * theta * (theta - 2)) / math.pi
    inside = 0
    for seed in range(200):
        found = intrinsic_dimension(on_sphere(60, 2, seed=seed), [theta], confidence=0.9)
        inside += bool(found.p_interval[0, 0] <= truth <= found.p_interval[0, 1])
    assert inside >= 180


def test_the_interval_covers_with_sequences_of_unequal_length() -> None:
    theta, inside = 0.1, 0
    truth = math.acos(1 + 2 * theta * (theta - 2)) / math.pi
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 9, (40,), generator=generator)
        owner = torch.repeat_interleave(torch.arange(40), lengths)
        # the worst dependence: all positions of a sequence are one vector
        points = on_sphere(40, 2, seed=seed)[owner]
        found = intrinsic_dimension(points, [theta], sequences=owner, skip_first=0, confidence=0.9)
        assert found.independent == 40
        inside += bool(found.p_interval[0, 0] <= truth <= found.p_interval[0, 1])
    assert inside >= 90


def test_no_pair_seen_does_not_mean_probability_zero() -> None:
    found = intrinsic_dimension(on_sphere(200, 60), [0.005])
    assert int(found.hits[0]) == 0
    assert math.isinf(float(found.dimension[0]))
    assert float(found.bound[0]) == 0
    # log(2 / 0.05) / 100 to first order
    assert float(found.p_interval[0, 1]) == pytest.approx(1 - math.exp(-math.log(40) / 100), rel=1e-6)
    assert found.to_json()["thetas"][0]["dimension"] is None


def test_the_standard_error_is_the_spread_over_repeated_samples() -> None:
    runs = [intrinsic_dimension(on_sphere(150, 4, seed=seed, shift=1.0), [0.2]) for seed in range(80)]
    spread = float(torch.stack([run.p[0] for run in runs]).std())
    stated = float(torch.stack([run.standard_error[0] for run in runs]).mean())
    assert stated == pytest.approx(spread, rel=0.35)


def test_centring_spreads_a_narrow_cone() -> None:
    points = on_sphere(500, 12, shift=6.0)
    raw = intrinsic_dimension(points, [0.05])
    centred = intrinsic_dimension(points, [0.05], centre=True, renormalise=True)
    assert float(centred.bound[0]) < float(raw.bound[0]) / 2
    assert raw.centroid_norm > 0.7
    assert raw.bound_applies
    assert centred.bound_applies
    assert not intrinsic_dimension(points, [0.05], centre=True).bound_applies
    by_hand = intrinsic_dimension(points, [0.05], centre=points.mean(0), renormalise=True)
    assert torch.equal(by_hand.hits, centred.hits)


def test_half_precision_features_are_compared_in_float32() -> None:
    points = on_sphere(100, 8)
    half = intrinsic_dimension(points.bfloat16(), [0.2])
    single = intrinsic_dimension(points.bfloat16().float(), [0.2])
    assert torch.equal(half.hits, single.hits)
    assert half.bound_applies


def test_the_rate_bound_is_the_rule_of_three() -> None:
    assert rate_bound(0, 20_000) == pytest.approx(3 / 20_000, rel=0.01)
    assert rate_bound(5, 5) == 1.0
    # Clopper-Pearson: at the limit, 3 or fewer hits have probability 0.05
    limit = rate_bound(3, 50)
    tail = sum(math.comb(50, k) * limit**k * (1 - limit) ** (50 - k) for k in range(4))
    assert tail == pytest.approx(0.05, rel=1e-6)
    assert edits_bound(0.02, 5) == pytest.approx(0.1)
    assert edits_bound(0.5, 5) == 1.0


def test_positions_of_several_windows_of_one_text_may_be_given() -> None:
    points = on_sphere(8, 3)
    owner, position = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 0, 1, 2, 3])
    found = intrinsic_dimension(points, [0.4], sequences=owner, positions=position)
    keep = position > 0
    assert found.first_excluded == 3
    assert (int(found.hits[0]), found.pairs) == counted(points[keep], 2 * 0.4 * (0.4 - 2), owner[keep])


def profile() -> DimensionProfile:
    features = {layer: on_sphere(90, 6, seed=layer, shift=2.0 - layer).view(15, 6, 6) for layer in (0, 2, 1)}
    return dimension_profile(features, [0.05, 0.2])


def test_a_profile_names_layers_in_order_and_the_best_of_them(tmp_path: Path) -> None:
    found = profile()
    assert [one.layer for one in found.layers] == [0, 1, 2]
    table = found.table()
    assert "15 first positions left out" in table
    assert len(table.splitlines()) == 2 + 3 * 2
    bounds = {one.layer: float(one.centred.bound_upper[1]) for one in found.layers}
    assert bounds[found.best_layer(0.2)] == min(bounds.values())
    written = found.to_json()["layers"][1]
    assert written["layer"] == 1
    assert written["raw"]["first_positions_excluded"] == 15
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"thetas": [0.1, 1.2]}, UsageError, r"thetas: \[0\.1, 1\.2\] must be one or more numbers in \[0, 1\]"),
        ({"thetas": []}, UsageError, "one or more numbers"),
        ({"confidence": 1.0}, UsageError, r"confidence: 1\.0 is not in \(0, 1\)"),
        ({"skip_first": -1}, UsageError, "skip_first: -1 is negative"),
        ({"positions": torch.zeros(10)}, UsageError, "positions: need `sequences`"),
        (
            {"positions": torch.zeros(3), "sequences": torch.arange(10)},
            UsageError,
            r"positions: \[3\] positions for 10",
        ),
        ({"sequences": torch.zeros(3)}, UsageError, r"sequences: \[3\] names for 10 vectors"),
        ({"sequences": torch.zeros(10)}, DataError, "fewer than two sequences"),
        ({"centre": torch.zeros(3)}, UsageError, r"centre: has shape \[3\], the features need \[4\]"),
        ({"mask": torch.ones(2, 5)}, UsageError, r"mask: needs features of shape \[sequence, position, d\]"),
        ({"features": on_sphere(1, 4)}, DataError, "1 vectors; the dimension needs at least two"),
        ({"features": torch.zeros(4)}, UsageError, r"features: have shape \[4\]"),
        ({"features": torch.full((4, 4), math.nan)}, DataError, "NaN or infinite values"),
        ({"features": torch.ones(4, 4), "centre": True, "renormalise": True}, DataError, "equals the centroid"),
        ({"features": on_sphere(8, 3).view(2, 4, 3), "sequences": torch.zeros(8)}, UsageError, "already say it"),
        (
            {"features": on_sphere(8, 3).view(2, 4, 3), "mask": torch.ones(2, 3)},
            UsageError,
            r"mask: has shape \[2, 3\]",
        ),
    ],
)
def test_wrong_input_is_refused_with_what_was_expected(
    arguments: dict[str, object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        intrinsic_dimension(**{"features": on_sphere(10, 4), "thetas": [0.1], **arguments})  # type: ignore[arg-type]


def test_other_wrong_input_is_refused() -> None:
    with pytest.raises(UsageError, match="3 hits in 2 trials"):
        rate_bound(3, 2)
    with pytest.raises(UsageError, match="confidence"):
        rate_bound(0, 2, 0.0)
    with pytest.raises(DataError, match="no layer"):
        dimension_profile({})
    with pytest.raises(UsageError, match=r"theta: 0\.3 is not among \[0\.05, 0\.2\]"):
        profile().best_layer(0.3)
    with pytest.raises(DataError, match="at least two") as caught:
        dimension_profile({4: on_sphere(1, 3)})
    assert "in layer 4" in caught.value.__notes__
