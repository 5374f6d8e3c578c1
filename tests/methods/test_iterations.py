"""Spectral answers by products and Cholesky factors: what a GPU runs, here on the CPU, against singular value decompositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import iterations
from merging.spectra import isometry, isometry_by_products, polar, polar_by_products, svds

SINGLE = torch.finfo(torch.float32).eps


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
