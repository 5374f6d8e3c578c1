"""Counting against brackets where the values are gives what numpy counts."""

import numpy as np
import torch

from taskvec.order import _Bracket, _count, _count_there


def test_counts_made_by_torch_are_those_made_by_numpy():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5000, generator=draw).mul(8).round().div(8)  # many ties
    brackets = [[_Bracket(-0.5, 0.25), _Bracket(-np.inf, -1.0), _Bracket(1.0, np.inf)] for _ in range(3)]
    for rows, others in zip(_count(values, brackets), _count_there(values, brackets)):
        for one, other in zip(rows, others):
            assert (one.below, one.at_low, one.at_high, one.held) == (
                other.below,
                other.at_low,
                other.at_high,
                other.held,
            )
            for inside, again in zip(one.inside, other.inside):
                np.testing.assert_array_equal(inside, again)
