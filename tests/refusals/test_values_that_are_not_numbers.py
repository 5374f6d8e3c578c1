"""NaN and infinity are refused by name wherever numbers are made of them, not only in merges."""

import pytest
import torch

from merging.advise import advise
from merging.compare import compare_models
from taskvec import Checkpoint, TaskVector, write
from taskvec.errors import NonFiniteError, UsageError
from taskvec.precision import all_finite

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(params=[float("nan"), float("inf"), float("-inf")])
def spoilt(zoo, request):
    return zoo.tune("spoilt", seed=9, change=lambda state: state[NAME].view(-1).__setitem__(7, request.param))


def test_a_task_vector_is_not_saved_nor_measured(zoo, spoilt, tmp_path):
    vector = TaskVector.between(Checkpoint.open(zoo.base), Checkpoint.open(spoilt))
    with pytest.raises(NonFiniteError, match=f"{NAME}: .* holds 1 NaN or infinite values"):
        vector.save(tmp_path / "vector.safetensors")
    with pytest.raises(NonFiniteError, match=NAME):
        vector.norm()
    assert not list(tmp_path.glob("vector*"))


def test_a_sum_is_not_written(zoo, spoilt, tmp_path):
    vector = TaskVector.between(Checkpoint.open(zoo.base), Checkpoint.open(zoo.tuned[0]))
    with pytest.raises(NonFiniteError, match=NAME):
        write(vector.apply_to(Checkpoint.open(spoilt), force=True), tmp_path / "sum")
    assert not list(tmp_path.glob("sum*"))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(zoo, scale):
    base = Checkpoint.open(zoo.base)
    vector = TaskVector.between(base, Checkpoint.open(zoo.tuned[0]))
    with pytest.raises(UsageError, match="scale: .* is not a finite number"):
        vector.apply_to(base, scale)


def test_comparisons_and_advice_name_the_model(zoo, spoilt):
    base, other = Checkpoint.open(zoo.base), Checkpoint.open(zoo.tuned[0])
    with pytest.raises(NonFiniteError, match=f"{NAME}: task 'b' holds 1"):
        compare_models(base, {"a": other, "b": Checkpoint.open(spoilt)})
    with pytest.raises(NonFiniteError, match=f"{NAME}: the base holds 1"):
        compare_models(Checkpoint.open(spoilt), {"a": other})
    with pytest.raises(NonFiniteError, match=f"{NAME}: task '.*spoilt' holds 1"):
        advise(zoo.base, [zoo.tuned[0], spoilt])


def test_what_is_stored_is_copied_as_it_is(spoilt, tmp_path):
    write(Checkpoint.open(spoilt), tmp_path / "copy")
    found = Checkpoint.open(tmp_path / "copy").read(NAME)
    torch.testing.assert_close(found, Checkpoint.open(spoilt).read(NAME), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_large_sums_are_no_infinity(dtype):
    values = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(values)
    values[5] = float("inf") if dtype != torch.float8_e5m2 else torch.tensor(float("inf")).to(dtype)
    assert not all_finite(values)
