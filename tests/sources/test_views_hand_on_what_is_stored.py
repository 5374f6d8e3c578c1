"""Views of names and shapes: passes read and hash the files behind them as if the view were not there."""

import pytest
import torch

from merging import Recipe, merge
from merging.method import method
from merging.stacks import build_stages
from taskvec import Checkpoint, in_memory, native, write
from taskvec.checkpoint import content_hash, tensor_digest
from taskvec.deltas import ModelDeltas, Room, Task
from taskvec.source import origin_of
from taskvec.sweep import Into, sweep
from taskvec.views import Only, Renamed, Resized, Rows, Selected

SHAPES = {"old.a": (50, 40), "old.table": (30, 8), "old.b": (7,)}


@pytest.fixture
def models(tmp_path):
    drawn = torch.Generator().manual_seed(0)
    found = []
    for number in range(2):
        state = {name: torch.randn(shape, generator=drawn).bfloat16() for name, shape in SHAPES.items()}
        found.append(Checkpoint.open(write(in_memory(state), tmp_path / f"m{number}.safetensors")))
    return found


VIEWS = {
    "renamed": lambda source: Renamed(source, {"old.": "new."}),
    "selected": lambda source: Selected(source, {"x": "old.a", "y": "old.table", "again": "old.table", "no": "none"}),
    "rows": lambda source: Rows(source, {"old.table": [3, 2, (), ((source, 1), (source, 4))]}),
    "resized": lambda source: Resized(source, {"old.table": (40, 8), "old.b": (7,)}, in_memory({"old.table": torch.zeros(40, 8)})),
    "only": lambda source: Only(source, lambda name: name != "old.b"),
}  # fmt: skip
WHAT_IS_MADE = {"rows": {"old.table"}, "resized": {"old.table"}}


@pytest.mark.parametrize("kind", list(VIEWS))
def test_what_a_view_hands_on_lies_where_it_says(kind, models):
    view = VIEWS[kind](models[0])
    for name, info in view.infos.items():
        found = origin_of(view, name)
        assert (found is None) == (name in WHAT_IS_MADE.get(kind, ()))
        if found is not None:
            checkpoint, own = found
            assert checkpoint is models[0]
            assert torch.equal(checkpoint.read_flat(own, 0, info.numel), view.read_flat(name, 0, info.numel))


@pytest.mark.parametrize("kind", list(VIEWS))
def test_passes_over_views_hash_the_checkpoints_behind_them(kind, models):
    views = [VIEWS[kind](model) for model in models]
    deltas = ModelDeltas(None, [Task(str(i), view) for i, view in enumerate(views)], views[0].infos, space="weight")
    merged = {name: torch.empty(info.shape) for name, info in views[0].infos.items()}
    sweep(deltas, build_stages(method("average"), {}, (), (), 2), Into(merged))
    for name, value in merged.items():
        torch.testing.assert_close(value, sum(view.read(name).float() for view in views) / 2)
    for model, view in zip(models, views):
        handed = {found[1] for name in view.infos if (found := origin_of(view, name)) is not None}
        assert {name: tensor_digest(model, name) for name in handed} == model.known_digests()


@pytest.mark.skipif(not native.usable(), reason="no compiled passes here")
def test_compiled_passes_read_the_files_behind_views(models):
    views = [VIEWS["renamed"](model) for model in models]
    deltas = ModelDeltas(views[0], [Task("t", views[1])], views[0].infos)
    stored = deltas.streamed("new.a", 0, 2000, native.CHUNK, Room.of(1, native.CHUNK))
    products, _ = native.gram(stored)
    difference = (models[1].read("old.a").float() - models[0].read("old.a").float()).double()
    assert products.sum() == pytest.approx(float(difference.square().sum()), rel=1e-12)
    made = ModelDeltas(None, [Task("t", VIEWS["rows"](models[0]))], ["old.table"], space="weight")
    assert made.streamed("old.table", 0, 32, native.CHUNK, Room.of(1, native.CHUNK)) is None


def test_a_model_that_comes_twice_is_hashed_as_it_is(zoo, tmp_path):
    tasks = [{"path": str(zoo.base)}, {"path": str(zoo.tuned[0])}, {"path": str(zoo.tuned[0]), "name": "again"}]
    recipe = {
        "base": str(zoo.base),
        "tasks": tasks,
        "method": "task_arithmetic",
        "allow": ["zero_task", "duplicate_task"],
    }
    inputs = merge(Recipe.from_data(recipe), tmp_path / "out").provenance["inputs"]
    assert {entry["path"]: entry["content_hash"] for entry in inputs} == {
        str(path): content_hash(Checkpoint.open(path)) for path in (zoo.base, zoo.tuned[0])
    }
