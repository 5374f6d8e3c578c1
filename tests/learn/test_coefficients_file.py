"""The coefficients' file: what it says of every element, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from taskvec.coefficients import Coefficients, Region, partition_index
from taskvec.errors import CorruptFileError, MismatchError, NonFiniteError, NotFoundError, OutputError, UsageError


def example(**changes):
    facts = {
        "values": torch.arange(10.0).view(2, 5) / 7,
        "tasks": ("a", "b"),
        "runs": (("whole", 1), ("rows", 4)),
        "regions": {"w": Region(0, 1, 1, 6), "r": Region(1, 1, 4, 3)},
        "kept": ("head",),
        "aliases": {"tied": "w"},
    }
    return Coefficients(**{**facts, **changes})


def test_a_file_comes_back_as_it_was(tmp_path):
    written = example(
        base_hash="b" * 64, task_hashes={"a": "1"}, history=({"step": 3, "loss": 0.5},), objective={"use": "atlas"}
    )
    written.save(tmp_path / "c.safetensors")
    read = Coefficients.load(tmp_path / "c.safetensors")
    assert torch.equal(read.values, written.values)
    assert replace(read, values=written.values) == written
    assert read.blocks == ("whole", "rows[0]", "rows[1]", "rows[2]", "rows[3]")
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_weights_and_expand_agree_and_name_what_is_unknown():
    file = example()
    assert torch.equal(file.weights("w"), file.values[:, 0])
    assert torch.equal(file.weights("tied"), file.values[:, 0])
    assert torch.equal(file.weights("head"), torch.zeros(2))
    assert torch.equal(file.expand("w", (2, 3), 1, 4), file.values[:, :1].expand(2, 3))
    assert torch.equal(file.expand("r", (4, 3), 2, 8), file.values[:, [1, 2, 2, 2, 3, 3]])
    assert torch.equal(file.expand("head", (7,), 2, 4), torch.zeros(2, 2))
    assert file.is_scalar("w")
    assert file.is_scalar("head")
    assert not file.is_scalar("r")
    with pytest.raises(UsageError, match="r: its elements have different weights"):
        file.weights("r")
    with pytest.raises(MismatchError, match=r"heads: no coefficient was learned for it.*Did you mean 'head'"):
        file.weights("heads")
    with pytest.raises(MismatchError, match=r"r: coefficients were learned for 12 elements, this tensor has \[5, 3\]"):
        file.expand("r", (5, 3), 0, 3)


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    outer=st.integers(1, 4),
    parts=st.integers(1, 4),
    inner=st.integers(1, 4),
    k=st.integers(1, 300),
    seed=st.integers(0, 1 << 40),
    data=st.data(),
)
def test_expansion_does_not_depend_on_how_the_elements_are_cut(outer, parts, inner, k, seed, data):
    numel = outer * parts * inner
    file = Coefficients(
        values=torch.randn(2, parts, k),
        tasks=("a", "b"),
        runs=(("w", parts),),
        regions={"w": Region(0, outer, parts, inner)},
        partitions=(k, seed),
    )
    whole = file.expand("w", (outer, parts, inner), 0, numel)
    cut = data.draw(st.integers(0, numel))
    pieces = [file.expand("w", (numel,), 0, cut), file.expand("w", (numel,), cut, numel)]
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    index = partition_index("w", seed, k, 0, numel).long()
    for e in range(numel):
        assert torch.equal(whole[:, e], file.values[:, e // inner % parts, int(index[e])])


def test_partitions_are_uniform_and_differ_by_name_and_seed():
    index = partition_index("layer.weight", 3, 5, 0, 100_000).long()
    counts = torch.bincount(index, minlength=5)
    # five standard deviations of a binomial count
    assert ((counts - 20_000).abs() < 5 * (100_000 * 0.2 * 0.8) ** 0.5).all()
    for other in (partition_index("layer.bias", 3, 5, 0, 100_000), partition_index("layer.weight", 4, 5, 0, 100_000)):
        assert float((other.long() == index).float().mean()) == pytest.approx(0.2, abs=0.01)
    # recorded once: files written today have to mean the same tomorrow
    assert partition_index("layer.weight", 3, 5, 0, 12).tolist() == [1, 2, 1, 4, 1, 3, 4, 2, 4, 4, 4, 0]
    assert partition_index("layer.weight", 3, 300, 0, 2).dtype == torch.int32


def test_check_lists_everything_that_does_not_belong():
    file = example()
    file.check(["w", "r", "head"], tasks=["a", "b"])
    file.check(["tied", "r", "head"], tasks=["a", "b"])
    with pytest.raises(MismatchError) as caught:
        file.check(["w", "x"], tasks=["a", "c"], source="c.safetensors")
    text = str(caught.value)
    assert "c.safetensors do not fit this merge" in text
    assert "learned for b, which this merge does not have" in text
    assert "nothing was learned for c" in text
    assert "no coefficient for x" in text
    assert "learned for r, which this merge lacks or leaves out" in text
    with pytest.raises(MismatchError, match="the tasks stand in another order"):
        file.check(tasks=["b", "a"])


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match="no such file"):
        Coefficients.load(tmp_path / "none")
    save_file({"w": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CorruptFileError, match="not learned coefficients"):
        Coefficients.load(tmp_path / "weights.safetensors")
    (tmp_path / "text").write_text("hello, this is not a file of tensors")
    with pytest.raises(CorruptFileError, match="not a readable coefficients file"):
        Coefficients.load(tmp_path / "text")
    save_file(
        {"coefficients": torch.zeros(1)}, tmp_path / "new", metadata={"format": "taskvec.coefficients", "version": "9"}
    )
    with pytest.raises(CorruptFileError, match="format version 9"):
        Coefficients.load(tmp_path / "new")
    example(values=torch.zeros(2, 4)).save(tmp_path / "short")
    with pytest.raises(CorruptFileError, match=r"shape \[2, 4\] for 2 tasks and 5 blocks"):
        Coefficients.load(tmp_path / "short")
    with pytest.raises(NonFiniteError, match="holds 1 NaN"):
        example(values=torch.full((2, 5), 0.0).index_fill_(1, torch.tensor([2]), float("nan"))[:1]).save(
            tmp_path / "nan"
        )
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        example().save(tmp_path / "folder")
