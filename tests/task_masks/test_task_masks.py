"""A shared vector with a mask for each task: files that give every task's model back."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging import merge_stacks
from merging.task_masks import TaskMasks, write_task_masks
from taskvec.checkpoint import Checkpoint
from taskvec.errors import BaseMismatchError, MismatchError, NotAModelError, OutputExistsError, UsageError
from taskvec.source import in_memory
from taskvec.sweep import Options
from taskvec.vector import TaskVector

SHAPES = {"layers.0.w": (30, 17), "layers.1.w": (400, 211), "norm": (5,)}


def tensors(seed, base=None):
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return made if base is None else {name: base[name] + 0.1 * value for name, value in made.items()}


@pytest.fixture
def zoo(tmp_path):
    base = tensors(0)
    save_file(base, tmp_path / "base.safetensors")
    tuned = {task: tensors(i + 1, base) for i, task in enumerate(["math", "code", "law"])}
    for task, values in tuned.items():
        save_file(values, tmp_path / f"{task}.safetensors")
    models = {task: Checkpoint.open(tmp_path / f"{task}.safetensors") for task in tuned}
    return base, tuned, Checkpoint.open(tmp_path / "base.safetensors"), models


def deltas(base, tuned):
    return {name: torch.stack([values[name] - base[name] for values in tuned.values()]) for name in base}


def test_emr_files_give_each_task_its_masked_and_scaled_vector(zoo, tmp_path):
    base, tuned, source, models = zoo
    folder = write_task_masks(source, models, tmp_path / "emr")
    stored = TaskMasks(folder)
    assert set(stored.tasks) == {"math", "code", "law"}
    stacks = deltas(base, tuned)
    elected = merge_stacks("emr", stacks)
    for i, task in enumerate(tuned):
        masks = {name: (stacks[name][i].double() * elected[name].double()) > 0 for name in base}
        scale = sum(float(stacks[name][i].double().abs().sum()) for name in base) / sum(
            float((elected[name].double() * masks[name]).abs().sum()) for name in base
        )
        assert stored.scales[task] == pytest.approx(scale, rel=1e-9)
        vector = stored.vector(task)
        for name in base:
            torch.testing.assert_close(vector.read(name), (scale * elected[name] * masks[name]).float())
            assert torch.equal(vector.read_flat(name, 3, 5), vector.read(name).reshape(-1)[3:5])
        model = vector.apply_to(source)
        assert set(model.infos) == set(base)


def test_emr_models_are_nearer_to_the_fine_tunes_than_their_average(zoo, tmp_path):
    base, tuned, source, models = zoo
    stored = TaskMasks(write_task_masks(source, models, tmp_path / "emr"))
    stacks = deltas(base, tuned)
    for i, task in enumerate(tuned):
        own = stacks["layers.1.w"][i]
        ours = (stored.vector(task).read("layers.1.w") - own).norm()
        assert float(ours) < 0.8 * float((stacks["layers.1.w"].mean(0) - own).norm())


def test_tall_masks_are_the_papers(zoo, tmp_path):
    base, tuned, source, models = zoo
    stored = TaskMasks(write_task_masks(source, models, tmp_path / "tall", rule="tall", mask_scale=[0.2, 0.4, 0.6]))
    for (i, task), scale in zip(enumerate(tuned), (0.2, 0.4, 0.6)):
        assert stored.scales[task] == 1.0
        for name, stack in deltas(base, tuned).items():
            total = stack.sum(0)
            mask = stack[i].abs() >= scale * (total - stack[i]).abs()
            torch.testing.assert_close(stored.vector(task).read(name), total * mask)


def test_a_mask_takes_one_bit_an_entry(zoo, tmp_path):
    _, _, source, models = zoo
    folder = write_task_masks(source, models, tmp_path / "emr")
    bits = load_file(folder / "math.mask.safetensors")
    assert {name: value.numel() for name, value in bits.items()} == {"layers.0.w": 64, "layers.1.w": 10550, "norm": 1}


def test_the_shared_file_is_an_ordinary_task_vector_of_its_base(zoo, tmp_path):
    base, tuned, source, models = zoo
    folder = write_task_masks(source, models, tmp_path / "emr")
    shared = TaskVector.load(folder / "shared.safetensors")
    for name, value in merge_stacks("emr", deltas(base, tuned)).items():
        assert torch.equal(shared.read(name), value)
    with pytest.raises(BaseMismatchError):
        TaskMasks(folder).vector("math").apply_to(in_memory(tensors(9)))


def test_tiles_and_workers_do_not_change_the_files(zoo, tmp_path):
    _, _, source, models = zoo
    one = write_task_masks(source, models, tmp_path / "one", options=Options(workers=1))
    two = write_task_masks(source, models, tmp_path / "two", options=Options(workers=2, tile=1 << 15))
    for file in sorted(one.iterdir()):
        assert file.read_bytes() == (two / file.name).read_bytes()


def test_what_cannot_be_written_or_read_is_refused(zoo, tmp_path):
    base, _, source, models = zoo
    with pytest.raises(UsageError, match="'a/b' cannot be one"):
        write_task_masks(source, {"a/b": models["math"]}, tmp_path / "out")
    with pytest.raises(UsageError, match="there are no models"):
        write_task_masks(source, {}, tmp_path / "out")
    with pytest.raises(UsageError, match="mask_scale: 2 values for 3 tasks"):
        write_task_masks(source, models, tmp_path / "out", rule="tall", mask_scale=[0.1, 0.2])
    with pytest.raises(MismatchError):
        write_task_masks(source, {"odd": in_memory({**base, "norm": torch.ones(6)})}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = write_task_masks(source, models, tmp_path / "out")
    with pytest.raises(OutputExistsError):
        write_task_masks(source, models, tmp_path / "out")
    with pytest.raises(UsageError, match=r"there is no mask for task 'maths'\. Did you mean 'math'"):
        TaskMasks(folder).vector("maths")
    with pytest.raises(NotAModelError, match=r"no shared\.safetensors"):
        TaskMasks(tmp_path)
    save_file({"norm": torch.ones(5)}, folder / "law.mask.safetensors")
    with pytest.raises(NotAModelError, match="does not say that it holds a task's mask"):
        TaskMasks(folder)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
