"""Outputs that are no predictions, devices that are not there, and rows without a text."""

import pytest
import torch
from torch import nn

from merging.learn.atlas import device_named
from merging.learn.composition import Composition
from merging.learn.data import texts
from merging.learn.objectives import Entropy, Supervised
from taskvec.errors import DataError, NonFiniteError, UsageError


class Tokens(nn.Module):
    """Logits for every token, as a language model gives."""

    def forward(self, inputs):
        return torch.zeros(*inputs.shape, 5)


@pytest.mark.parametrize("objective", [Supervised(), Entropy()])
def test_logits_of_every_token_are_no_prediction_of_an_example(objective):
    batch = (torch.zeros(2, 3), torch.tensor([1, 2]))
    with pytest.raises(UsageError, match=r"the model gives \[2, 3, 5\]; expected one row of logits for each example"):
        list(objective.terms(Tokens(), batch))


def test_devices_are_named_or_refused():
    assert device_named("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="device: 'gpu' is not a device"):
        device_named("gpu")
    with pytest.raises(UsageError, match="device: 'cuda:77' is not there"):
        device_named("cuda:77")


def test_a_text_that_is_null_is_told_from_a_column_that_is_missing():
    with pytest.raises(DataError, match=r"1 of 2 rows have no 'text' \(first: row 2\). It is null there."):
        texts(
            "a",
            [{"text": "x", "label": 1}, {"text": None, "label": 1}],
            None,
            text="text",
            label="label",
            classes=None,
            batch=2,
            max_length=8,
        )
    with pytest.raises(DataError, match="Did you mean 'texts'"):
        texts("a", [{"texts": "x", "label": 1}], None, text="text", label="label", classes=None, batch=2, max_length=8)


@pytest.mark.parametrize("partitions", [None, (3, 0)])
def test_a_coefficient_that_is_no_number_is_not_composed(partitions):
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    vectors = {task: {"weight": torch.ones(2, 3), "bias": torch.ones(2)} for task in ("one", "two")}
    composition = Composition(model, vectors, partitions=partitions)
    composition.coefficients[1, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="coefficient of task 'two' and block weight: the composition holds"):
        composition.compose_()
    assert torch.equal(model.weight, before)
