"""Spherical means of many tensors at once are those of each alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.method import method
from merging.sphere import settle
from taskvec.deltas import StackDeltas, constant
from taskvec.errors import ParameterError
from taskvec.moments import exact
from taskvec.plan import Report, formula_of


def kernel_of(name, gram, **parameters):
    """The method's kernel for one tensor with these inner products."""
    tasks = len(gram)
    chosen = method(name)
    plan = chosen.stage(chosen.bound(parameters, tasks)).start(
        StackDeltas({"w": torch.zeros(tasks, 1)}, None, constant([1.0] * tasks))
    )
    plan.send(None)
    answer = [exact(value) for value in gram.flatten().tolist()]
    while True:
        try:
            request = plan.send(answer)
        except StopIteration as done:
            return done.value
        assert isinstance(request, Report)
        answer = None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("karcher", {}), ("karcher", {"steps": 1}), ("multislerp", {}), ("multislerp", {"normalize": False})],
)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), tasks=st.integers(2, 6), alike=st.floats(0, 30), zero=st.booleans())
def test_coefficients_of_many_tensors_at_once_are_those_of_each(name, parameters, seed, tasks, alike, zero):
    draw = torch.Generator().manual_seed(seed)
    weights = (torch.rand(tasks, generator=draw) + 0.1).tolist()
    grams = []
    for size in (1.0, 1e-6, 1e6):
        rows = size * (torch.randn(tasks, 40, generator=draw) + alike * torch.randn(40, generator=draw)).double()
        rows[0] *= not zero
        grams.append(rows @ rows.T)
    opposite = torch.ones(tasks, 40, dtype=torch.float64)
    opposite[1:] *= -weights[0] / sum(weights[1:])
    grams += [opposite @ opposite.T, torch.zeros(tasks, tasks, dtype=torch.float64)]
    alone = [formula_of(kernel_of(name, gram, **parameters)) for gram in grams]
    together = [formula_of(kernel_of(name, gram, **parameters)) for gram in grams]
    settle([(told.numbers["of"], weights) for told in together])
    for one, other in zip(alone, together):
        expected, found = (told.numbers["coefficients"](weights) for told in (one, other))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-12, atol=1e-14)
        assert one.numbers["of"].facts() == other.numbers["of"].facts()


def test_each_tensor_stops_where_it_would_alone():
    # three that need many steps beside one that is there at once
    draw = torch.Generator().manual_seed(1)
    apart = torch.randn(3, 4, 9, generator=draw).double()
    grams = [*(rows @ rows.T for rows in apart), torch.ones(4, 4, dtype=torch.float64)]
    told = [formula_of(kernel_of("karcher", gram, steps=50, tolerance=1e-9)) for gram in grams]
    settle([(one.numbers["of"], [1.0, 2.0, 1.0, 1.0]) for one in told])
    for gram, one in zip(grams, told):
        expected = formula_of(kernel_of("karcher", gram, steps=50, tolerance=1e-9)).numbers["coefficients"]
        found = one.numbers["coefficients"]([1.0, 2.0, 1.0, 1.0])
        torch.testing.assert_close(
            torch.tensor(found), torch.tensor(expected([1.0, 2.0, 1.0, 1.0])), rtol=1e-12, atol=0
        )


def test_weights_that_cancel_are_refused_for_many_as_for_one():
    told = formula_of(kernel_of("karcher", torch.eye(2, dtype=torch.float64)))
    with pytest.raises(ParameterError, match="karcher needs their proportions"):
        settle([(told.numbers["of"], [1.0, -1.0])])
