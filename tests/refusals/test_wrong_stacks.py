"""Merging in memory: what is wrong with stacks, weights and settings is said before anything is merged."""

import pytest
import torch

from merging import merge_stacks
from taskvec.errors import MismatchError, ParameterError, UsageError

STACKS = {"w": torch.arange(24.0).view(3, 8) - 11}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1, 1]}, "weights: 2 weights for 3 tasks"),
        ({"weights": 1.0}, "weights: expected one number for each of 3 tasks, found 1.0"),
        ({"weights": {"a": 1}}, "weights: expected one number for each of 3 tasks"),
        ({"weights": [1, 1, float("nan")]}, "weights: nan is not a finite number"),
        ({"weights": ["a", 1, 1]}, "weights: 'a' is not a finite number"),
        ({"scale": float("inf")}, "scale: inf is not a finite number"),
        ({"scale": "1"}, "scale: '1' is not a finite number"),
        ({"scope": "globa"}, "statistics: 'globa' is neither 'model' nor 'tensor'"),
        ({"statistics": "global"}, "statistics: 'global' is neither 'model' nor 'tensor'"),
        ({"seed": -1}, "seed: -1 is not a whole number from 0 on"),
        ({"seed": "x"}, "seed: 'x' is not a whole number"),
        ({"tasks": ["a", "b", "a"]}, "tasks: a name is there twice"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ParameterError, match=message):
        merge_stacks("ties", STACKS, **settings)


@pytest.mark.parametrize(
    ("stacks", "message"),
    [
        ({"w": torch.tensor(1.0)}, "w: a single number; expected a stack"),
        ({"w": []}, r"w: expected a tensor \[task, \*shape\] or one tensor for each task"),
        ({"w": [1.0, 2.0]}, "w: expected a tensor"),
        (
            {"w": [torch.ones(3), torch.ones(4)]},
            r"w: the tasks' tensors differ in shape or device \(\[3\] on cpu, \[4\]",
        ),
        ({"w": torch.ones(2, 3, dtype=torch.int64)}, "w: stacks must be floating point"),
        ({"w": torch.ones(2, 3), "v": torch.ones(3, 3)}, r"one number of tasks, found \[2, 3\]"),
    ],
)
def test_wrong_stacks_are_refused(stacks, message):
    with pytest.raises(MismatchError, match=message):
        merge_stacks("ties", stacks)


@pytest.mark.parametrize(
    ("stacks", "message"),
    [
        ({}, "there are no stacks to merge"),
        (STACKS["w"], "expected name -> stack .* found a Tensor"),
        ({"w": torch.ones(2, 0)}, "the stacks hold no numbers"),
    ],
)
def test_nothing_to_merge_is_said(stacks, message):
    with pytest.raises(UsageError, match=message):
        merge_stacks("ties", stacks)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"preprocess": "dare"}, "expected a list of steps, found a text"),
        ({"preprocess": [{"density": 0.5}]}, r"a mapping with the key `method` .* found \['density'\]"),
        ({"postprocess": ["dare"]}, "dare cannot be used as postprocess"),
    ],
)
def test_steps_that_are_none_are_refused(steps, message):
    with pytest.raises(UsageError, match=message):
        merge_stacks("ties", STACKS, **steps)


def test_contributions_are_weighed_by_numbers():
    parts = merge_stacks("pcb", STACKS, contributions=True)
    with pytest.raises(ParameterError, match="weights: 2 weights for 3 tasks"):
        parts.merged([1, 2])
    with pytest.raises(ParameterError, match="weights: nan is not a finite number"):
        parts.merged([1, 2, float("nan")])
    with pytest.raises(ParameterError, match="scale: inf is not a finite number"):
        parts.merged(scale=float("inf"))


def test_weights_may_be_any_row_of_numbers():
    expected = merge_stacks("ties", STACKS, weights=[0.5, 1.0, 2.0])["w"]
    for weights in (torch.tensor([0.5, 1.0, 2.0]), (0.5, 1, 2)):
        assert torch.equal(merge_stacks("ties", STACKS, weights=weights)["w"], expected)
