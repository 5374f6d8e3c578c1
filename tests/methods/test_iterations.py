"""Spectral answers by products and Cholesky factors: what a GPU runs, here on the CPU, against singular value decompositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import iterations
from merging.method import method
from merging.spectra import (
    Decompositions,
    Polars,
    abreast,
    isometries_by_products,
    isometry,
    polar,
    polars_by_products,
    svd,
    svds,
    svds_by_products,
)
from taskvec.deltas import StackDeltas, constant
from taskvec.plan import formula_of
from taskvec.sweep import Into, Options, _Sweep

SINGLE = torch.finfo(torch.float32).eps


def isometry_by_products(one, *, floor=0.0, drop=False):
    (found,) = isometries_by_products([one], one.dtype, [floor], drop=drop)
    return found


def polar_factors_by_products(talls, dtype):
    return polars_by_products(
        talls, torch.stack([one.double().T @ one.double() for one in talls]), torch.finfo(dtype).eps
    )


def polar_by_products(one, dtype):
    (found,) = polar_factors_by_products([one], dtype)
    return found


def matrix(rows, columns, values, seed=0, size=1.0):
    """A matrix with these singular values."""
    draw = torch.Generator().manual_seed(seed)
    full = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(n, full, generator=draw, dtype=torch.float64))[0] for n in (rows, columns)
    )
    return (left * (size * torch.as_tensor(values, dtype=torch.float64))) @ right.T


def spectrum(count, smallest):
    """From 1 down to the smallest, evenly in the logarithm."""
    return torch.logspace(0, torch.tensor(smallest).log10().item(), count, dtype=torch.float64)


def dense_polar(wide):
    left, _, right = torch.linalg.svd(wide, full_matrices=False)
    return left @ right


def apart(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


SHAPES = [(48, 48), (96, 40), (40, 96), (2, 2), (5, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("over_the_cut", [1.2, 3.0, 100.0, 1e9])
@pytest.mark.parametrize("size", [1e-18, 1e-3, 1e18])
def test_polar_factors_by_products_are_those_of_the_svd(shape, over_the_cut, size):
    least = min(0.9, over_the_cut * max(shape) * SINGLE)
    given_ = matrix(*shape, spectrum(min(shape), least), size=size).float()
    found = isometry_by_products(given_)
    assert found is not None
    left, values, right = torch.linalg.svd(given_.double(), full_matrices=False)
    assert apart(found.factor, left @ right) < 1e-9
    assert float(found.total) == pytest.approx(float(values.sum()), rel=1e-11)
    assert (found.rank, found.kept, found.full) == (min(shape),) * 3
    gram = found.factor @ found.factor.T if shape[0] < shape[1] else found.factor.T @ found.factor
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_where_the_rank_is_low_or_nearly_so_products_leave_it_to_the_eigenproblem(shape):
    cut = max(shape) * SINGLE
    for smallest in (0.0, 1e-12, 0.5 * cut, 0.99 * cut):
        values = torch.ones(min(shape), dtype=torch.float64)
        values[-1] = smallest
        given_ = matrix(*shape, values)
        assert isometry_by_products(given_.float()) is None or smallest > 0.3 * cut  # rounding to float32 may lift it
        if shape[0] >= shape[1]:
            assert polar_by_products(given_, torch.float32) is None


def test_a_matrix_of_zeros_has_no_polar_factor_by_products():
    assert isometry_by_products(torch.zeros(6, 4)) is None
    assert isometry(torch.zeros(6, 4)).kept == 0


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    decades=st.floats(0, 7),
    seed=st.integers(0, 1000),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_products_answer_as_the_eigenproblem_does_or_not_at_all(rows, columns, decades, seed, kind):
    given_ = matrix(rows, columns, spectrum(min(rows, columns), 10.0**-decades), seed).to(kind).float()
    expected = isometry(given_)
    found = isometry_by_products(given_)
    if found is None:
        # only near the cut, or below it
        values = torch.linalg.svdvals(given_.double())
        assert float(values[-1]) < 1.7 * max(rows, columns) * SINGLE * float(values[0])
        return
    assert (found.rank, found.kept) == (expected.rank, expected.kept)
    condition = max(rows, columns) * SINGLE
    assert apart(found.factor, expected.factor) < 1e-9 + 1e-15 / condition**2  # the eigenproblem's own error
    assert float(found.total) == pytest.approx(float(expected.total), rel=1e-9)


def test_polar_factors_of_a_batch_are_those_one_by_one():
    stack = torch.stack([matrix(30, 20, spectrum(20, least), seed) for seed, least in enumerate((0.5, 0.01, 0.001))])
    most = torch.tensor([1.0, 1.1, 2.0], dtype=torch.float64)
    together = iterations.polar(stack, most, 4e-4)
    for one, top, found in zip(stack, most, together):
        assert apart(found, dense_polar(one)) < 1e-11
        assert apart(iterations.polar(one[None], top[None], 4e-4)[0], found) < 1e-13


@pytest.mark.parametrize("least", [0.9, 0.2, 1e-2, 3e-4])
def test_a_wrong_guess_of_the_least_singular_value_costs_steps_only(least):
    values = torch.ones(20, dtype=torch.float64)
    values[-1] = least
    stack = torch.stack([matrix(50, 20, values, seed) for seed in range(2)])
    most = torch.full((2,), 1.01, dtype=torch.float64)
    for likely in (0.0, 0.1, 0.8):
        for one, found in zip(stack, iterations.polar(stack, most, 1e-4, likely)):
            assert apart(found, dense_polar(one)) < 1e-11


def test_pivots_bound_the_least_eigenvalue_from_above():
    draw = torch.Generator().manual_seed(0)
    for size, rows in ((30, 120), (30, 45), (1, 4)):
        tall = torch.randn(rows, size, generator=draw, dtype=torch.float64)
        gram = tall.T @ tall
        least = float(torch.linalg.eigvalsh(gram)[0])
        found = float(iterations.clearance(gram[None], gram.new_zeros(1)))
        assert least * (1 - 1e-12) <= found < 16 * least
        assert float(iterations.clearance(gram[None], gram.new_tensor([least]))) == 0


def test_side_by_side_whitening_is_that_of_the_eigenproblem():
    sides = torch.cat([torch.linalg.qr(matrix(60, 12, spectrum(12, 0.1), seed))[0] for seed in range(4)], 1)
    found = polar_by_products(sides, torch.float32)
    assert found is not None
    assert apart(found, polar(sides, torch.float32)) < 1e-9
    # tasks that share directions leave fewer than there are columns
    assert polar_by_products(torch.cat([sides[:, :12]] * 2, 1), torch.float32) is None


@pytest.mark.parametrize(("smallest", "shift"), [(1.0, 0), (1e-2, 1), (1e-3, -1)])
def test_the_bound_is_above_the_largest_eigenvalue_and_near_it(smallest, shift):
    tall = matrix(60, 50, spectrum(50, smallest), seed=3, size=10.0 ** (20 * shift))
    gram = tall.T @ tall
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    assert largest <= float(iterations.bound(gram[None])) < 1.7 * largest


def test_a_floor_is_exceeded_only_where_every_eigenvalue_is_above_it():
    gram = torch.diag(torch.tensor([1.0, 0.5, 1e-4], dtype=torch.float64))
    both = torch.stack([gram, gram])
    assert iterations.exceeds(both, torch.tensor([5e-5, 2e-4], dtype=torch.float64)).tolist() == [True, False]
    assert not iterations.exceeds(gram[None] * float("nan"), torch.zeros(1, dtype=torch.float64)).any()


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 24), place=st.floats(0, 1), seed=st.integers(0, 1000), equal=st.booleans())
def test_most_are_below_a_floor_just_when_an_eigenproblem_says_so(size, place, seed, equal):
    tall = matrix(30, size, spectrum(size, 1e-3), seed)
    gram = tall.T @ tall
    values = torch.linalg.eigvalsh(gram)
    floor = float(values[int(place * (size - 1))]) * (1.0 if equal else 1.01)
    counted = 2 * int((values < floor).sum())
    close = 2 * int((values < floor * (1 - 1e-9)).sum()) != 2 * int((values < floor * (1 + 1e-9)).sum())
    found = iterations.mostly_below(gram, floor, iterations.bound(gram[None]))
    assert found == (counted > size) or close


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_most_directions_are_rounding_where_the_floor_is_above_them(shape):
    given_ = matrix(*shape, spectrum(30, 1e-3)).float()
    for floor in (1e-4, 0.02, 0.05, 2.0):
        found = isometry_by_products(given_, floor=floor)
        assert found is not None
        assert found.mostly_rounding == isometry(given_, floor=floor).mostly_rounding == (floor > 0.032)
    assert isometry_by_products(given_, floor=0.02, drop=True) is None
    clear = isometry_by_products(given_, floor=1e-4, drop=True)
    assert clear is not None
    assert clear.kept == 30


def test_several_decompositions_are_those_of_each():
    draw = torch.Generator().manual_seed(4)
    matrices = torch.randn(11, 14, 9, generator=draw)
    for one, found in zip(matrices, svds(matrices, torch.float32, most=4), strict=True):
        values = torch.linalg.svdvals(one.double())[:4]
        torch.testing.assert_close(found.values, values, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.left.T @ one.double() @ found.right, values.diag(), rtol=0, atol=1e-9)


def test_polar_factors_of_several_shapes_and_ranks_are_those_one_by_one():
    talls = [matrix(40, 24, spectrum(24, least), seed) for seed, least in enumerate((0.5, 1e-2, 1e-9, 0.1))]
    talls[3] *= 1e6
    found = polar_factors_by_products(talls, torch.float32)
    assert [one is None for one in found] == [False, False, True, False]
    for tall, one in zip(talls, found):
        alone = polar_by_products(tall, torch.float32)
        assert (one is None) == (alone is None)
        if one is not None:
            assert apart(one, alone) < 1e-13
    wide = [tall.float().T for tall in talls]
    for one, several in zip(wide, isometries_by_products(wide, wide[0].dtype, [0.0] * 4)):
        alone = isometry_by_products(one)
        assert (several is None) == (alone is None)
        if several is not None:
            assert apart(several.factor, alone.factor) < 1e-13
            assert several.mostly_rounding == alone.mostly_rounding


SPECTRA = {
    "flat": lambda n, draw: torch.linalg.svdvals(torch.randn(n, n, generator=draw, dtype=torch.float64)),
    "tall": lambda n, draw: torch.linalg.svdvals(torch.randn(4 * n, n, generator=draw, dtype=torch.float64)),
    "slow decay": lambda n, draw: torch.arange(1, n + 1, dtype=torch.float64) ** -0.5,
    "decay": lambda n, draw: 1 / torch.arange(1, n + 1, dtype=torch.float64),
    "steep": lambda n, draw: spectrum(n, 1e-6),
    "spikes": lambda n, draw: torch.cat([torch.tensor([40.0, 30.0, 25.0]), torch.linspace(2, 0.1, n - 3)]).double(),
    "steps": lambda n, draw: torch.tensor([float(1 + (n - at) // 4) for at in range(n)]),
    "low rank": lambda n, draw: torch.cat([torch.linspace(2, 1, n // 3), torch.zeros(n - n // 3)]).double(),
}


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(9, 90),
    share=st.floats(0.01, 0.4),
    kind=st.sampled_from(sorted(SPECTRA)),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-18, 1.0, 1e15]),
)
def test_what_is_proven_of_the_largest_directions_is_so(size, share, kind, seed, scale):
    count = max(1, int(share * size))
    values = SPECTRA[kind](size, torch.Generator().manual_seed(seed))
    tall = matrix(size + 7, size, values, seed, scale)
    gram = tall.T @ tall
    squares, vectors, (proven,) = iterations.leading(gram[None], count)
    if not proven:
        return
    true, basis = torch.linalg.eigh(gram)
    wanted, rest = basis[:, size - count :], basis[:, : size - count]
    gap = float(true[size - count] - true[size - count - 1]) / float(true[-1])
    torch.testing.assert_close(squares[0], true.flip(0)[:count], rtol=1e-12, atol=1e-14 * float(true[-1]))
    assert float(torch.linalg.matrix_norm(rest.T @ vectors[0], 2)) < 1e-9 + 1e-14 / gap  # the eigenproblem's own error
    assert float(torch.linalg.matrix_norm(wanted.T @ vectors[0], -2)) > 1 - 1e-9


@pytest.mark.parametrize("kind", ["flat", "tall", "slow decay", "decay", "spikes"])
@pytest.mark.parametrize("size", [64, 160])
def test_spectra_of_task_vectors_are_proven(kind, size):
    grams = []
    for seed in range(3):
        tall = matrix(size, size, SPECTRA[kind](size, torch.Generator().manual_seed(seed)), seed)
        grams.append(tall.T @ tall)
    together = iterations.leading(torch.stack(grams), size // 8)
    assert together[2] == [True] * 3
    for at, gram in enumerate(grams):
        alone = iterations.leading(gram[None], size // 8)
        torch.testing.assert_close(alone[0][0], together[0][at], rtol=1e-12, atol=0)
        one, other = (found[1][place] for found, place in ((alone, 0), (together, at)))
        assert float((one @ one.T - other @ other.T).norm()) < 1e-9


@pytest.mark.parametrize(
    "values",
    [
        torch.ones(60),
        torch.zeros(60),
        torch.cat(
            [torch.linspace(3, 2, 6), torch.full((10,), 1.5), torch.linspace(1, 0.1, 44)]
        ),  # the cut is within equal ones
        torch.cat([torch.linspace(3, 2, 5), torch.zeros(55)]),
        torch.full((60,), float("nan")),
    ],
    ids=["all equal", "zero", "equal at the cut", "rank below the count", "not numbers"],
)
def test_without_a_gap_nothing_is_proven(values):
    basis = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    gram = (basis * values.double() ** 2) @ basis.T
    clear = (basis * torch.linspace(2, 0.1, 60).double() ** 2) @ basis.T
    assert iterations.leading(torch.stack([gram, clear]), 8)[2] == [False, True]


def test_an_eigenvector_that_was_missed_is_noticed():
    size, count = 50, 6
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    values = torch.linspace(3, 0.1, size, dtype=torch.float64)
    gram = ((basis * values) @ basis.T)[None]
    assert iterations._shown(gram, values[None, :10], basis[None, :, :10], count) == [True]
    for missed in range(count):
        some = [at for at in range(11) if at != missed]
        assert iterations._shown(gram, values[None, some], basis[None, :, some], count) == [False]
    askew = basis[:, :10].clone()
    askew[:, 0] += 1e-8 * basis[:, 20]
    assert iterations._shown(gram, values[None, :10], askew[None], count) == [False]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(32, 90),
    columns=st.integers(32, 90),
    kind=st.sampled_from(sorted(SPECTRA)),
    part=st.integers(4, 20),
    seed=st.integers(0, 1000),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([None, 1.0, 1e7]),
)
def test_largest_directions_by_products_are_those_of_the_svd(rows, columns, kind, part, seed, stored, size):
    full = min(rows, columns)
    most = max(1, full // part)
    values = SPECTRA[kind](full, torch.Generator().manual_seed(seed))
    given_ = [matrix(rows, columns, values, seed + at).to(stored).float() for at in range(3)]
    for one, found in zip(given_, svds_by_products(given_, torch.float32, [size] * 3, most), strict=True):
        expected = svd(one, torch.float32, size=size, most=most)
        assert (min(found.rank, most), len(found.values)) == (min(expected.rank, most), len(expected.values))
        torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-13)
        assert found.cut == pytest.approx(expected.cut, rel=1e-9)
        exact = torch.linalg.svdvals(one.double())
        if len(found.values) == most and float(exact[most - 1] - exact[most]) > 1e-5 * float(exact[0]):
            assert apart(found.dense(), expected.dense()) < 1e-8


def test_where_the_rank_is_asked_for_it_is_the_whole_matrix_s():
    given_ = [matrix(60, 48, torch.cat([torch.linspace(2, 1, 30), torch.zeros(18)])).float()]
    (told,) = svds_by_products(given_, torch.float64, [1e-3], 6, ranked=True)
    (short,) = svds_by_products(given_, torch.float32, [None], 6)
    assert (short.rank >= 6, len(short.values), len(told.values)) == (True, 6, 6)
    (ranked,) = svds_by_products(given_, torch.float32, [None], 6, ranked=True)
    assert ranked.rank == svd(given_[0]).rank > 6


def test_kernels_that_ask_get_the_answers_to_their_own_questions():
    draw = torch.Generator().manual_seed(3)
    stacks = {
        name: torch.randn(2, *shape, generator=draw) for name, shape in {"a": (9, 5), "b": (6, 7), "c": (9, 5)}.items()
    }

    @abreast
    def kernel(tile):
        if tile.name == "b":
            return tile.stack[1]
        parts = yield Decompositions(iter(tile.stack), torch.float32, most=2)
        sides = yield Polars([tile.stack[0], tile.stack[1].T], torch.float32)
        return parts[1].dense() + sides[0] + sides[1].T

    deltas = StackDeltas(stacks, None, constant([1.0, 1.0]))
    tiles = [_Sweep._shaped(deltas.tile(name, 0, stacks[name][0].numel())) for name in stacks]
    together = formula_of(kernel).numbers["of"](tiles)
    for tile, found in zip(tiles, together):
        assert torch.equal(found, kernel(tile))
    one = stacks["c"]
    expected = svd(one[1], most=2).dense() + polar(one[0], torch.float32) + polar(one[1].T, torch.float32).T
    assert torch.equal(together[2], expected)


class Together(_Sweep):
    """A sweep that works as on a GPU."""

    def _merged_abreast(self):
        self._pass_abreast()
        return True


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv_m"])
def test_tensors_worked_on_together_are_those_one_by_one(name):
    draw = torch.Generator().manual_seed(5)
    shapes = {"a": (24, 20), "b": (20,), "c": (24, 20), "d": (20, 24), "e": (24, 20), "f": (0, 4), "g": (20,)}
    stacks = {key: torch.randn(3, *shape, generator=draw) for key, shape in shapes.items()}
    stacks["e"][:, :, 4:] = 0
    found = []
    for together in (False, True):
        deltas = StackDeltas(stacks, None, constant([1.0, 0.5, 2.0]))
        merged = {key: torch.empty(shape) for key, shape in shapes.items()}
        stage = method(name).stage(method(name).bound({}))
        kind = Together if together else _Sweep
        outcome = kind(deltas, [stage], Into(merged, 0.5), "model", Options(workers=1), frozenset()).run()
        found.append((merged, outcome.norms, outcome.warnings, outcome.facts, outcome.passes))
    for key in shapes:
        assert torch.equal(found[0][0][key], found[1][0][key])
    assert found[0][1:] == found[1][1:]
