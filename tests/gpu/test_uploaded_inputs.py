"""Inputs kept on a device as they are stored: the same tiles, the same digests, and merges from disk on a GPU."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merging import Recipe, merge
from taskvec import Checkpoint
from taskvec.checkpoint import SEGMENT
from taskvec.deltas import ModelDeltas, Task
from taskvec.upload import SLOT, Passing, Uploaded

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    draw = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("zoo")
    base = {
        "embed": torch.randn(1200, 512, generator=draw) * 0.02,
        "bias": torch.randn(77, generator=draw),
        "up": torch.randn(SLOT // 2 // 1024 + 3, 1024, generator=draw) * 0.02,  # more than one buffer in bfloat16
    }
    paths = []
    for number in range(4):
        tuned = {n: w + (number > 0) * 5e-3 * torch.randn(w.shape, generator=draw) for n, w in base.items()}
        path = folder / f"model-{number}"
        path.mkdir()
        save_file({n: w.bfloat16() for n, w in tuned.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
        paths.append(path)
    return paths


def deltas(paths) -> ModelDeltas:
    base, *tuned = (Checkpoint.open(path) for path in paths)
    return ModelDeltas(base, [Task(f"task {i}", source) for i, source in enumerate(tuned)], list(base.infos))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_uploaded_deltas_give_the_tiles_that_the_files_give(models, device):
    plain = deltas(models)
    there = Uploaded(plain, torch.device(device))
    seen: dict[tuple[int, str], list[Tensor]] = {}

    def watch(source, name, raw):
        seen.setdefault((id(source), name), []).append(bytes(raw))

    for name, info in plain.infos.items():
        there.load(name, 0, info.numel, watch)
    there.settle()
    for name, info in plain.infos.items():
        for start, stop in ((0, info.numel), (5, info.numel - 3)):
            expected, found = plain.tile(name, start, stop), there.tile(name, start, stop)
            assert torch.equal(found.stack.cpu(), expected.stack)
            assert torch.equal(found.base.cpu(), expected.base)
        with there.ring() as ring:
            assert torch.equal(torch.cat([part.clone() for _, part in there.pieces(ring, found.base)]), expected.base)
        stored = plain.base.read_flat(name, 0, info.numel).view(torch.uint8).numpy().tobytes()
        assert b"".join(seen[id(plain.base), name]) == stored  # what is hashed is what is stored
    rows = there.rows()
    assert rows is not None
    assert [name for name, *_ in rows] == list(plain.infos)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_passing_inputs_are_the_rows_that_the_files_give(models, device):
    plain = deltas(models)
    assert Passing.fits(plain, torch.device(device))
    there = Passing(plain, torch.device(device), 2)
    for name, start, stop in (
        (name, start, min(start + SEGMENT, info.numel))
        for name, info in plain.infos.items()
        for start in range(3, info.numel, SEGMENT)
    ):
        with there.ring() as ring:
            tuned, base, weights = there.rows(ring, name, start, stop, None)
            assert weights == [1.0] * 3
            expected = plain.tile(name, start, stop)
            assert torch.equal(base.float().cpu(), expected.base)
            assert torch.equal(torch.stack([row.float() - base.float() for row in tuned]).cpu(), expected.stack)


def test_two_threads_never_share_buffers(models):
    there = Passing(deltas(models), torch.device("cpu"), 2)
    with there.ring() as one, there.ring() as other:
        assert one is not other


def test_reading_into_given_memory_is_reading(models):
    source = Checkpoint.open(models[0])
    into = torch.empty(1000, dtype=torch.bfloat16)
    source.read_into("embed", 17, 1017, into)
    assert torch.equal(into, source.read_flat("embed", 17, 1017))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "magnitude", "pcb", "breadcrumbs"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_merge_from_disk_on_a_gpu_is_that_of_the_cpu(models, tmp_path, method):
    made = {}
    for device in ("cpu", "cuda"):
        recipe = Recipe.from_data(
            {
                "base": str(models[0]),
                "method": method,
                "scale": 0.7,
                "tasks": [{"path": str(path), "weight": weight} for path, weight in zip(models[1:], (1, 0.3, 2))],
                "device": device,
            }
        )
        made[device] = merge(recipe, tmp_path / device)
    here, there = (Checkpoint.open(made[device].path) for device in ("cpu", "cuda"))
    for name in here.infos:
        one, other = here.read(name), there.read(name)
        if method in ("task_arithmetic", "ties", "magnitude"):
            assert torch.equal(one, other), name  # the same operations, each rounded once
        assert float((one != other).float().mean()) < 1e-3, (
            name
        )  # an ulp of the output where exp or tanh rounds otherwise
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)
    assert made["cuda"].provenance["inputs"] == made["cpu"].provenance["inputs"]
    assert made["cuda"].provenance["passes"] == made["cpu"].provenance["passes"]
    for one, other in zip(made["cpu"].provenance["norms"].values(), made["cuda"].provenance["norms"].values()):
        assert one == pytest.approx(other, rel=1e-5)
