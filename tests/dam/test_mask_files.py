"""Mask files: what is written is what a streamed merge reads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from taskvec.errors import CorruptFileError, MissingTensorError, NonFiniteError, NotFoundError, OutputError
from taskvec.masks import Masks, save_masks


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 7), max_size=3).map(tuple), hard=st.booleans(), data=st.data())
def test_any_slice_is_what_was_written(tmp_path_factory, shape, hard, data):
    path = tmp_path_factory.mktemp("masks") / "dam.safetensors"
    mask = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    if hard:
        mask = (mask > 1) * 1.7
    save_masks(path, {"w": mask, "b": torch.ones(3)})
    masks = Masks.load(path)
    start = data.draw(st.integers(0, mask.numel()))
    stop = data.draw(st.integers(start, mask.numel()))
    part = masks.read_flat("w", start, stop)
    assert part.dtype == torch.float32
    exact = mask if "w" in masks.packed else mask.half().float()
    torch.testing.assert_close(part, exact.reshape(-1)[start:stop], rtol=0, atol=0)
    assert masks.infos["w"].shape == tuple(shape)
    torch.testing.assert_close(masks.read("w"), exact, rtol=0, atol=0)


def test_a_hard_mask_costs_one_bit_an_element(tmp_path):
    hard = (torch.rand(64, 1000) < 0.5).float() / 0.5
    save_masks(tmp_path / "hard.safetensors", {"w": hard})
    save_masks(tmp_path / "soft.safetensors", {"w": torch.rand(64, 1000)})
    assert (tmp_path / "hard.safetensors").stat().st_size < 64 * 1000 / 8 + 600
    assert (tmp_path / "soft.safetensors").stat().st_size < 64 * 1000 * 2 + 600


def test_what_was_recorded_comes_back(tmp_path):
    path = tmp_path / "dam.safetensors"
    save_masks(
        path, {"w": torch.rand(2)}, tasks=("a", "b"), base_hash="x", task_hashes={"a": "y"}, details={"steps": 3}
    )
    masks = Masks.load(path)
    assert (masks.tasks, masks.base_hash, masks.task_hashes, masks.details) == (
        ("a", "b"),
        "x",
        {"a": "y"},
        {"steps": 3},
    )


def test_files_that_are_no_mask_files_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match="no such mask file"):
        Masks.load(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not a file")
    with pytest.raises(CorruptFileError, match="not a readable safetensors file"):
        Masks.load(tmp_path / "broken.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CorruptFileError, match="Is it a checkpoint"):
        Masks.load(tmp_path / "model.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "odd.safetensors", metadata={"format": "taskvec.masks", "masks": "{}"})
    with pytest.raises(CorruptFileError, match="its header is damaged"):
        Masks.load(tmp_path / "odd.safetensors")


def test_missing_and_broken_masks_are_named(tmp_path):
    save_masks(tmp_path / "m.safetensors", {"layer.weight": torch.rand(2)})
    with pytest.raises(MissingTensorError, match=r"no mask for 'layer\.wieght'.*Did you mean 'layer\.weight'"):
        Masks.load(tmp_path / "m.safetensors").read_flat("layer.wieght", 0, 1)
    with pytest.raises(NonFiniteError, match="w: the mask holds"):
        save_masks(tmp_path / "n.safetensors", {"w": torch.tensor([float("nan")])})


def test_a_weight_beyond_float16_is_not_stored_as_infinity(tmp_path):
    mask = {"w": torch.tensor([1.0, 1e5])}
    with pytest.raises(OutputError, match="w: 1 values do not fit float16"):
        save_masks(tmp_path / "m.safetensors", mask)
    assert not list(tmp_path.iterdir())
    save_masks(tmp_path / "m.safetensors", mask, dtype="float32")
    assert Masks.load(tmp_path / "m.safetensors").read("w")[1] == 1e5
