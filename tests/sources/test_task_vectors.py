"""Task vectors: algebra, storage, application and exact undo."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from taskvec import Checkpoint, TaskVector, applied, in_memory, write
from taskvec.errors import BaseMismatchError, MismatchError, NonFiniteError, NotAModelError, UsageError
from taskvec.source import LowRank


def vector(zoo, index=0):
    return TaskVector.between(Checkpoint.open(zoo.base), Checkpoint.open(zoo.tuned[index]))


def test_base_plus_difference_is_the_fine_tune(zoo, tmp_path):
    write(vector(zoo).apply_to(Checkpoint.open(zoo.base)), tmp_path / "again")
    tuned, again = Checkpoint.open(zoo.tuned[0]), Checkpoint.open(tmp_path / "again")
    for name in tuned.infos:
        torch.testing.assert_close(again.read(name), tuned.read(name), rtol=0, atol=2e-7)


def test_bf16_models_come_back_bit_for_bit_from_float32_differences(tmp_path):
    generator = torch.Generator().manual_seed(1)
    base = {"w": torch.randn(4096, generator=generator).mul(0.02).bfloat16()}
    tuned = {"w": (base["w"].float() + 1e-3 * torch.randn(4096, generator=generator)).bfloat16()}
    TaskVector.between(in_memory(base), in_memory(tuned)).save(tmp_path / "v.safetensors")
    again = TaskVector.load(tmp_path / "v.safetensors").apply_to(in_memory(base))
    assert torch.equal(again.read("w"), tuned["w"])


def test_half_precision_storage_warns_that_it_is_not_exact(zoo, tmp_path):
    with pytest.warns(UserWarning, match="do not rebuild the fine-tuned model exactly"):
        vector(zoo).save(tmp_path / "v", dtype="bfloat16")


@settings(max_examples=20, deadline=None)
@given(a=st.floats(-2, 2, width=32), b=st.floats(-2, 2, width=32))
def test_the_algebra_is_that_of_vectors(a, b):
    generator = torch.Generator().manual_seed(3)
    one, two = ({"w": torch.randn(6, 5, generator=generator)} for _ in range(2))
    left, right = TaskVector.from_deltas(one), TaskVector.from_deltas(two)
    torch.testing.assert_close((a * left + b * right).read("w"), a * one["w"] + b * two["w"])
    torch.testing.assert_close((left - right).read("w"), one["w"] - two["w"])
    torch.testing.assert_close((-left / 2).read("w"), -one["w"] / 2)
    torch.testing.assert_close(sum([left, right]).read_flat("w", 3, 11), (one["w"] + two["w"]).view(-1)[3:11])
    assert (a * left).norm() == pytest.approx(abs(a) * float(one["w"].double().norm()), rel=1e-6)
    assert left.dot(right) == pytest.approx(float((one["w"].double() * two["w"].double()).sum()), rel=1e-9)


def test_analogy_is_c_plus_b_minus_a():
    a, b, c = (TaskVector.from_deltas({"w": torch.full((3,), value)}) for value in (1.0, 5.0, 10.0))
    assert (c + (b - a)).read("w").tolist() == [14.0] * 3


def test_cosines_and_zero_vectors():
    one = TaskVector.from_deltas({"w": torch.tensor([3.0, 0.0])})
    assert one.cosine(TaskVector.from_deltas({"w": torch.tensor([0.0, 2.0])})) == 0
    assert one.cosine(-2 * one) == pytest.approx(-1)
    assert one.cosine(0 * one) == 0


def test_low_rank_terms_stay_factored_in_sums_and_dots():
    generator = torch.Generator().manual_seed(0)

    class Factored:
        label, aliases = "factored", {}

        def __init__(self):
            self.low = LowRank(torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator), (6, 5))
            from taskvec.source import TensorInfo

            self.infos = {"w": TensorInfo((6, 5), torch.float32)}

        def read(self, name):
            return self.low.dense()

        def read_flat(self, name, start, stop):
            return self.low.dense().view(-1)[start:stop]

        def low_rank(self, name):
            return self.low

    one, two = TaskVector([(1.0, Factored())]), TaskVector([(1.0, Factored())])
    total = one - 0.5 * two
    assert total.low_rank("w").rank == 4
    torch.testing.assert_close(total.low_rank("w").dense(), total.read("w"))
    assert one.dot(two) == pytest.approx(float((one.read("w").double() * two.read("w").double()).sum()), rel=1e-6)
    dense = TaskVector.from_deltas({"w": torch.ones(6, 5)})
    assert (one + dense).low_rank("w") is None


def test_applied_changes_a_live_model_and_undoes_it_bit_for_bit():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change = TaskVector.from_deltas({"0.weight": torch.full((3, 4), 0.3)})
    with pytest.raises(RuntimeError, match="midway"), applied(model, change, scale=2.0) as live:
        torch.testing.assert_close(live[0].weight.float(), before["0.weight"].float() + 0.6, rtol=0.01, atol=0.01)
        raise RuntimeError("midway")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(MismatchError, match="ghost"), applied(model, TaskVector.from_deltas({"ghost": torch.zeros(1)})):
        pass


def test_tied_parameters_are_changed_once():
    embed, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    model = torch.nn.ModuleDict({"embed": embed, "head": head})
    before = embed.weight.detach().clone()
    with applied(model, TaskVector.from_deltas({"embed.weight": torch.ones(5, 3)})):
        torch.testing.assert_close(head.weight, before + 1)
    assert torch.equal(head.weight, before)


def test_a_vector_for_another_base_is_refused_unless_forced(zoo, tmp_path):
    vector(zoo).save(tmp_path / "v")
    stored = TaskVector.load(tmp_path / "v")
    with pytest.raises(BaseMismatchError, match="made from another base"):
        stored.apply_to(Checkpoint.open(zoo.tuned[1]))
    forced = stored.apply_to(Checkpoint.open(zoo.tuned[1]), force=True)
    assert forced.read("lm_head.weight").shape == (24, 16)
    with pytest.raises(BaseMismatchError, match="different bases"):
        stored + TaskVector.between(Checkpoint.open(zoo.tuned[1]), Checkpoint.open(zoo.tuned[2])).apply_to(
            Checkpoint.open(zoo.tuned[1])
        ).vector.__class__([(1.0, vector(zoo).terms[0][1])], base_hash="0")
    with pytest.raises(NotAModelError, match="not a task vector"):
        TaskVector.load(zoo.base)


def test_models_that_do_not_fit_are_reported_all_at_once(zoo):
    def change(state):
        state["extra.weight"] = torch.zeros(2)
        del state["model.norm.weight"]
        state["lm_head.weight"] = torch.zeros(20, 16)

    odd = zoo.tune("odd", change=change)
    with pytest.raises(MismatchError) as error:
        TaskVector.between(Checkpoint.open(zoo.base), Checkpoint.open(odd))
    text = str(error.value)
    assert "1 tensors of" in text and "model.norm.weight" in text
    assert "extra.weight" in text
    assert "[20, 16]" in text and "[24, 16]" in text and "Was it tuned from another base?" in text


def test_another_architecture_is_said_to_be_one(zoo):
    other = in_memory({"encoder.w": torch.zeros(2)}, label="other")
    with pytest.raises(MismatchError, match="has none of the 9 tensors of .*Another architecture, or another prefix"):
        TaskVector.between(Checkpoint.open(zoo.base), other)


def test_integer_tensors_have_no_difference():
    base = in_memory({"w": torch.zeros(2), "steps": torch.tensor(3)})
    assert set(TaskVector.between(base, in_memory({"w": torch.ones(2), "steps": torch.tensor(9)})).infos) == {"w"}
    kinds = in_memory({"w": torch.zeros(2, dtype=torch.int32), "steps": torch.tensor(3)}, label="odd")
    with pytest.raises(MismatchError, match="w: int32 in odd, float32"):
        TaskVector.between(base, kinds)


def test_stored_vectors_hold_the_hash_of_their_base(zoo, tmp_path):
    path = vector(zoo).save(tmp_path / "v.safetensors")
    assert TaskVector.load(path).base_hash == Checkpoint.open(zoo.base).content_hash()
    assert set(load_file(path)) == set(zoo.base_state)


def test_paths_state_dicts_and_modules_are_taken_where_models_are(zoo, tmp_path):
    made = TaskVector.between(str(zoo.base), zoo.tuned[0])
    assert made.norm() == vector(zoo).norm()
    assert torch.equal(
        made.apply_to(zoo.base).read("lm_head.weight"),
        load_file(write(made.apply_to(zoo.base), tmp_path / "o.safetensors"))["lm_head.weight"],
    )
    module = torch.nn.Linear(2, 2)
    assert TaskVector.between(module, {"weight": module.weight + 1, "bias": module.bias}).norm() == pytest.approx(2)
    write(module, tmp_path / "m.safetensors")
    assert torch.equal(load_file(tmp_path / "m.safetensors")["bias"], module.bias)


@pytest.mark.parametrize("wrong", [None, 5, b"base", ""])
def test_what_is_no_model_is_said_to_be_none(wrong):
    with pytest.raises(UsageError, match="is no checkpoint: expected a path, a hub id, a state dict or a torch module"):
        Checkpoint.open(wrong)


def test_vectors_of_different_bases_are_not_added(zoo):
    other = zoo.tune("other", seed=9)
    with pytest.raises(BaseMismatchError, match="are differences to different bases"):
        vector(zoo) + TaskVector.between(Checkpoint.open(other), Checkpoint.open(zoo.tuned[1]))
    copy = {name: tensor.clone() for name, tensor in zoo.base_state.items()}
    assert (vector(zoo) + TaskVector.between(copy, zoo.tuned[1])).norm() > 0  # the same content elsewhere


def test_wrong_numbers_are_refused_before_a_model_is_touched():
    module, one = torch.nn.Linear(2, 2), TaskVector.from_deltas({"bias": torch.ones(2)})
    before = module.bias.detach().clone()
    for scale in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match="is not a finite number"), applied(module, one, scale):
            pass
    broken = TaskVector.from_deltas({"bias": torch.tensor([1.0, float("nan")])})
    with pytest.raises(NonFiniteError, match="bias: .* holds 1 NaN or infinite values"), applied(module, broken):
        pass
    assert torch.equal(module.bias, before)
    with pytest.raises(UsageError, match="cannot be divided by zero"):
        one / 0
    with pytest.raises(TypeError):
        one + 1


def test_models_without_tensors_are_refused(tmp_path):
    with pytest.raises(MismatchError, match="there are no tensors in it"):
        TaskVector.between({}, {})
    with pytest.raises(UsageError, match="there are no tensors to write"):
        write({}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
