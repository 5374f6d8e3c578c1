"""The compiled passes give the bits of their eager twins: for every method they know, dtype, length and instruction set."""

import json
import os
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from merging import Recipe, merge, merge_stacks
from taskvec import Checkpoint, native, sweep, write
from taskvec.deltas import ModelDeltas, Room, Task
from taskvec.errors import ChangedFileError

compiled = pytest.mark.skipif(not native.usable(), reason="no compiled passes here (no compiler, or no AVX2)")

SHAPES = {"layers.0.w": (37, 29), "layers.0.b": (7,), "layers.1.w": (300, 257), "one": (1,), "none": (0, 3)}
RECIPES = {
    "average": {"method": "average"},
    "linear, not normalised": {"method": "linear", "parameters": {"normalize": False}, "weights": [0.3, -0.2, 1.1]},
    "task arithmetic": {"method": "task_arithmetic", "scale": 0.7, "weights": [0.3, -0.2, 1.1]},
    "task arithmetic, normalised": {"method": "task_arithmetic", "parameters": {"normalize": True}},
    "ties": {"method": "ties", "parameters": {"density": 0.3}, "scale": 1.3},
    "ties by tensor, summed": {
        "method": "ties", "parameters": {"density": [0.2, 0.5, 1.0], "normalize": False}, "statistics": "tensor",
        "weights": [0.5, 1.0, 2.0],
    },
    "magnitude": {"method": "magnitude", "parameters": {"density": 0.3}},
    "dare": {"method": "dare", "parameters": {"density": [0.5, 0.9, 1.0]}, "scale": 0.5},
    "dare, then ties": {"method": "ties", "parameters": {"density": 1.0}, "preprocess": [{"method": "dare", "density": 0.4}]},
    "dare, then trimmed": {"method": "ties", "parameters": {"density": 0.5}, "preprocess": ["dare"]},
    "breadcrumbs": {"method": "breadcrumbs", "parameters": {"density": 0.8, "gamma": 0.05}},
    "breadcrumbs, rescaled": {"method": "breadcrumbs", "parameters": {"density": 0.8, "gamma": 0.05, "rescale": True}},
    "della": {"method": "della", "parameters": {"density": [0.5, 0.7, 1.0], "epsilon": 0.2}},
    "della, not rescaled": {"method": "della", "parameters": {"rescale": False}, "weights": [0.3, -0.2, 1.1]},
    "della, then ties": {"method": "ties", "parameters": {"density": 1.0}, "preprocess": ["della"], "statistics": "tensor"},
    "della, then trimmed": {"method": "ties", "parameters": {"density": 0.4}, "preprocess": ["della"]},
    "equalized": {"method": "task_arithmetic", "preprocess": ["equalize"]},
    "slerp": {"method": "slerp", "parameters": {"t": 0.3}, "weights": [1.0, 1.0]},
    "nuslerp": {"method": "nuslerp", "weights": [1.0, 3.0]},
    "nuslerp of task vectors": {"method": "nuslerp", "space": "delta", "weights": [1.0, 3.0]},
    "model stock": {"method": "model_stock"},
    "karcher": {"method": "karcher"},
    "multislerp": {"method": "multislerp", "weights": [0.3, 0.5, 1.1]},
    "sce": {"method": "sce", "parameters": {"density": 0.4}},
    "sce of everything": {"method": "sce", "weights": [0.3, 0.5, 1.1]},
}  # fmt: skip


@pytest.mark.skipif(
    shutil.which("cc") is None or platform.machine() != "x86_64", reason="no compiler, or another machine"
)
@pytest.mark.skipif("avx2" not in Path("/proc/cpuinfo").read_text(), reason="a processor without AVX2")
def test_an_installation_with_a_compiler_has_compiled_passes():
    assert native.usable()


LEVELS = [level for level in (2, 5) if native.usable() and level <= native._library()[1]]


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32", "mixed"])
def zoo(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    kinds = {"mixed": [torch.float32, torch.bfloat16, torch.float16, torch.float64]}
    kinds = kinds.get(request.param) or [getattr(torch, request.param)] * 4
    drawn = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=drawn) for name, shape in SHAPES.items()}
    for place, kind in enumerate(kinds):
        moved = {n: v + 0.02 * torch.randn(v.shape, generator=drawn) * (place > 0) for n, v in base.items()}
        write(Checkpoint.open({n: v.to(kind) for n, v in moved.items()}), folder / f"m{place}.safetensors")
    return folder


def merged(zoo: Path, given: dict, out: Path) -> dict[str, torch.Tensor]:
    given = dict(given)
    weights = given.pop("weights", [1.0, 1.0, 1.0])
    tasks = [{"path": str(zoo / f"m{i}.safetensors"), "weight": w} for i, w in zip((1, 2, 3), weights)]
    recipe = {"base": str(zoo / "m0.safetensors"), "tasks": tasks, "output": {"dtype": "float32"}, **given}
    merge(Recipe.from_data(recipe), out, overwrite=True)
    made = Checkpoint.open(out)
    return {name: made.read(name) for name in made.infos}


@compiled
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", list(RECIPES))
def test_a_merge_on_disk_has_the_bits_of_the_eager_form(name, level, zoo, tmp_path, monkeypatch):
    library = native._library()[0]
    monkeypatch.setattr(native, "_library", lambda: (library, level))
    monkeypatch.setattr(sweep, "PIECES", 1)  # several pieces in the largest tensor
    if level == LEVELS[-1]:  # read by the passes themselves; else by us, and hashed
        monkeypatch.setattr(ModelDeltas, "unhashed", lambda self, name: {})
    elif LEVELS[1:]:
        monkeypatch.setattr(sweep, "HELD", 0)  # read anew for each pass, not held for several
    ours = merged(zoo, RECIPES[name], tmp_path / "compiled")
    monkeypatch.setattr(native, "usable", lambda: False)
    eager = merged(zoo, RECIPES[name], tmp_path / "eager")
    assert ours.keys() == eager.keys() == SHAPES.keys()
    for tensor in ours:
        assert torch.equal(ours[tensor].view(torch.int32), eager[tensor].view(torch.int32)), tensor
    shutil.rmtree(tmp_path)


@compiled
@pytest.mark.parametrize("name", ["average", "ties by tensor, summed", "della, then ties", "model stock", "sce"])
def test_norms_and_statistics_do_not_depend_on_who_reads(name, zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "PIECES", 1)
    merged(zoo, RECIPES[name], tmp_path / "out")
    told = json.loads((tmp_path / "out" / "taskvec.json").read_text())
    monkeypatch.setattr(ModelDeltas, "unhashed", lambda self, name: {})
    monkeypatch.setattr(sweep, "HELD", 0)
    merged(zoo, RECIPES[name], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "taskvec.json").read_text()) == told


@compiled
def test_a_file_that_shrinks_while_a_pass_reads_it_is_named(tmp_path):
    write(Checkpoint.open({"w": torch.randn(200_000)}), tmp_path / "a.safetensors")
    source = Checkpoint.open(tmp_path / "a.safetensors")
    deltas = ModelDeltas(None, [Task("a", source)], ["w"], space="weight")
    stored = deltas.streamed("w", 0, 200_000, native.CHUNK, Room.of(1, native.CHUNK))
    os.truncate(tmp_path / "a.safetensors", 400_000)
    with pytest.raises(ChangedFileError, match=r"a\.safetensors: the file became shorter"):
        native.gram(stored)


@compiled
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("given", [{}, {"density": 0.4, "clip": 0.0}, {"density": 1.0}], ids=str)
def test_pcb_is_that_of_the_eager_form_to_rounding(given, level, zoo, tmp_path, monkeypatch):
    library = native._library()[0]
    monkeypatch.setattr(native, "_library", lambda: (library, level))
    ours = merged(zoo, {"method": "pcb", "parameters": given}, tmp_path / "compiled")
    monkeypatch.setattr(native, "usable", lambda: False)
    eager = merged(zoo, {"method": "pcb", "parameters": given}, tmp_path / "eager")
    base = Checkpoint.open(zoo / "m0.safetensors")
    for tensor in ours:
        size = (eager[tensor] - base.read(tensor).float()).abs().max() if eager[tensor].numel() else 0.0
        torch.testing.assert_close(ours[tensor], eager[tensor], rtol=2e-7, atol=1e-5 * float(size))


@compiled
def test_scores_are_those_of_double_precision():
    drawn = torch.Generator().manual_seed(9)
    for size in (1e-3, 0.3, 3.0):
        rows = torch.randn(4, 50_000, generator=drawn) * size
        stored = native.Stored("w", 0, 50_000, list(rows), [native.AS_IS] * 4, None)
        low, high = [0.01 * size] * 4, [2.5 * size] * 4
        ours = native.listed(stored, native.Values("pcb score", low, high)).double()
        wide = rows.double()
        total = rows[0] + rows[1] + rows[2] + rows[3]
        u = (wide.abs().clamp(low[0], high[0]) - low[0]) / (high[0] - low[0])
        truth = (4 * u * u).exp() * (rows * total).double().tanh()
        assert float(((ours - truth).abs() / truth.abs().clamp(min=1e-30)).max()) < 2e-6


def scored(kind: str, tasks: int, count: int, size: float, clip: float, seed: int):
    """Rows, the ends of PCB's clip, and the scores of every entry (each computed, none only bounded)."""
    drawn = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, count, generator=drawn)
    if kind == "alike":
        rows = 1 + 0.1 * rows
    elif kind == "heavy":
        rows = rows * (0.1 + rows.square()) * (torch.rand(tasks, count, generator=drawn) < 0.4)
    elif kind == "agreeing":
        rows = rows[:1] + 0.2 * rows
    elif kind == "few":
        rows = rows.mul(2).round()
    rows = rows * size
    sizes = rows.abs().sort(1).values
    low, high = sizes[:, int(clip * (count - 1))].tolist(), sizes[:, int((1 - clip) * (count - 1))].tolist()
    stored = native.Stored("w", 0, count, list(rows), [native.AS_IS] * tasks, None)
    values = native.Values("pcb score", low, high)
    return rows, stored, values, native.listed(stored, values).numpy()


def at_level(level: int):
    """The library, made to use one instruction set, until the context ends."""
    patch = pytest.MonkeyPatch()
    library = native._library()[0]
    patch.setattr(native, "_library", lambda: (library, level))
    return patch


KINDS = ["normal", "alike", "heavy", "agreeing", "few"]
INPUTS = (
    st.sampled_from(LEVELS or [0]), st.sampled_from(KINDS), st.integers(1, native.MOST_TASKS), st.integers(1, 2100),
    st.floats(-14, 1).map(lambda power: 10**power), st.sampled_from([0.0, 1e-3, 0.1, 0.4]), st.floats(0, 1),
    st.integers(0, 999),
)  # fmt: skip


@compiled
@settings(max_examples=120, deadline=None)
@example(5, "heavy", 4, 2048, 1e-3, 0.1, 0.9, 0)
@example(2, "agreeing", 64, 1024, 1.0, 0.0, 0.99, 1)
@example(2, "agreeing", 46, 25, 1e-14, 0.0, 0.0, 4)
@given(*INPUTS)
def test_scores_that_are_only_bounded_lie_below_the_brackets(level, kind, tasks, count, size, clip, share, seed):
    if level > native._library()[1]:
        return
    _, stored, values, truth = scored(kind, tasks, count, size, clip, seed)
    ordered = np.sort(truth, 1)
    first, last = int(share * (count - 1)), min(count - 1, int(share * (count - 1)) + 9)
    low = np.stack([ordered[:, first], ordered[:, last]], 1)
    high = np.stack([ordered[:, last], np.full(tasks, np.inf)], 1).astype(np.float32)
    patch = at_level(level)
    found = native.count(stored, values, low, high)
    patch.undo()
    for task in range(tasks):
        row = truth[task]
        for k in range(2):
            a, b = low[task, k], high[task, k]
            assert found.counts[task, k].tolist() == [(row < a).sum(), (row == a).sum(), (row == b).sum()]
            assert np.array_equal(found.inside[task][k], row[(row > a) & (row < b)])


@compiled
@settings(max_examples=120, deadline=None)
@example(5, "heavy", 4, 2048, 1e-3, 0.1, 0.9, 0)
@example(2, "normal", 3, 1024, 1e-2, 0.0, 0.5, 1)
@example(2, "agreeing", 46, 25, 1e-14, 0.0, 0.0, 4)
@given(*INPUTS)
def test_entries_that_are_only_bounded_have_no_share(level, kind, tasks, count, size, clip, share, seed):
    if level > native._library()[1]:
        return
    rows, stored, values, truth = scored(kind, tasks, count, size, clip, seed)
    cut, top = np.sort(truth, 1)[:, int(share * (count - 1))], truth.max(1)
    keeps, weights = top > cut, [2.0 ** (task % 3) for task in range(tasks)]  # whose products are exact
    total, below = np.zeros(count, np.float32), np.zeros(count, np.float32)
    for task in np.flatnonzero(keeps):
        part = (np.maximum(truth[task], cut[task]) - cut[task]) / (top[task] - cut[task])
        row = rows[task].numpy()
        clipped = np.clip(np.abs(row), np.float32(values.low[task]), np.float32(values.high[task])) * np.sign(row)
        total += clipped * part * np.float32(weights[task])
        below += part
    numbers = {
        "low": values.low,
        "high": values.high,
        "cut": cut.tolist(),
        "top": top.tolist(),
        "keeps": keeps.tolist(),
    }
    out = torch.empty(count)
    patch = at_level(level)
    native.merge(stored, native.Combination("pcb", weights, **numbers), out)
    patch.undo()
    expected = total / np.maximum(below, np.float32(1e-12))
    assert np.array_equal(out.numpy().view(np.int32), expected.view(np.int32))


@compiled
@pytest.mark.parametrize("kind", ["few", "many", "zeros", "spread", "huge", "near"])
@pytest.mark.parametrize("level", LEVELS)
def test_ranks_of_any_row_are_those_of_a_stable_sort(kind, level, monkeypatch):
    library = native._library()[0]
    monkeypatch.setattr(native, "_library", lambda: (library, level))
    drawn = torch.Generator().manual_seed(11)
    row = torch.randn(3, 3001, generator=drawn)
    row = {
        "few": row.mul(2).round(),
        "many": row,
        "zeros": row * (row.abs() > 1.5),
        "spread": row * 10 ** (row.roll(1) * 8).clamp(-30, 30),
        "huge": row * 1e37,
        "near": (row * 2.0**20).round().add_(2.0**30),  # many that differ, few powers of two
    }[kind]
    given = {"density": 0.5, "epsilon": 0.4}
    ours = merge_stacks("della", {"w": row[:2, None]}, **given)
    monkeypatch.setattr(native, "usable", lambda: False)
    assert torch.equal(ours["w"], merge_stacks("della", {"w": row[:2, None]}, **given)["w"])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("ties", {"density": 0.2}),
        ("magnitude", {"density": 0.4}),
        ("task_arithmetic", {}),
        ("dare", {"density": 0.5}),
        ("della", {}),
    ],
)
def test_a_merge_in_memory_has_the_bits_of_the_eager_form(method, given, dtype, monkeypatch):
    drawn = torch.Generator().manual_seed(5)
    stacks = {n: torch.randn(3, *shape, generator=drawn).to(dtype) for n, shape in SHAPES.items()}
    ours = merge_stacks(method, stacks, **given)
    monkeypatch.setattr(native, "usable", lambda: False)
    eager = merge_stacks(method, stacks, **given)
    for tensor in SHAPES:
        assert torch.equal(ours[tensor].view(torch.int32), eager[tensor].view(torch.int32)), tensor


@compiled
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_value_near_a_rounding_border_is_rounded_as_torch_does(dtype, tmp_path):
    kind = getattr(torch, dtype)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(kind)
    every = every[every.isfinite()].float()
    between = torch.cat([every, every * (1 + 2.0**-9), every * (1 + 2.0**-12), every * (1 - 2.0**-10)])
    between = between[between.abs() < torch.finfo(kind).max]
    out = torch.empty(len(between), dtype=kind)
    stored = native.Stored("w", 0, len(between), [between], [native.AS_IS], None)
    assert native.merge(stored, native.Combination("weighted sum", [1.0]), out) == (True, True)
    assert torch.equal(out.view(torch.int16), between.to(kind).view(torch.int16))


@compiled
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_norms_are_those_of_double_precision(dtype, tmp_path):
    drawn = torch.Generator().manual_seed(7)
    kind = getattr(torch, dtype)
    for size in (1.0, 1e-4, 3e4):
        rows = torch.randn(2, 100_003, generator=drawn).mul(size if kind != torch.float16 else 1.0).to(kind)
        stored = native.Stored("w", 0, rows.shape[1], list(rows), [native.AS_IS] * 2, None)
        squares = stored.squares()
        native.load(stored, torch.empty(rows.shape), None, squares)
        assert squares.sum(1) == pytest.approx(rows.double().square().sum(1).tolist(), rel=1e-6)


@compiled
def test_tiny_and_huge_vectors_have_norms():
    for size in (1e-30, 1e25):
        row = torch.full((4000,), size)
        stored = native.Stored("w", 0, 4000, [row], [native.AS_IS], None)
        squares = stored.squares()
        native.load(stored, torch.empty(1, 4000), None, squares)
        assert squares.sum() == pytest.approx(4000 * float(row[0].double()) ** 2, rel=1e-6)


@compiled
def test_every_other_pass_goes_backwards_to_find_its_inputs_in_the_page_cache(tmp_path, monkeypatch):
    shapes = {f"w{i}": (100_000,) for i in range(3)}
    for place in range(3):
        values = {name: torch.randn(shape) for name, shape in shapes.items()}
        write(Checkpoint.open(values), tmp_path / f"m{place}.safetensors")
    seen: dict[str, list[str]] = {"count": [], "merge": []}
    for name, order in seen.items():
        call = getattr(native, name)

        def recorded(stored, *given, call=call, order=order):
            order.append(stored.name)
            return call(stored, *given)

        monkeypatch.setattr(native, name, lambda *a, recorded=recorded, **k: recorded(*a, *k.values()))
    paths = [str(tmp_path / f"m{place}.safetensors") for place in range(3)]
    recipe = {"method": "ties", "base": paths[0], "tasks": paths[1:], "workers": 1}
    merge(Recipe.from_data(recipe), tmp_path / "out")
    count, last = (list(dict.fromkeys(order)) for order in seen.values())
    assert count == list(shapes)
    assert last == count[::-1]


@compiled
@pytest.mark.parametrize("level", LEVELS)
def test_a_bracket_that_holds_nearly_everything_keeps_all_of_it(level, monkeypatch):
    library = native._library()[0]
    monkeypatch.setattr(native, "_library", lambda: (library, level))
    row = torch.randn(100_000, generator=torch.Generator().manual_seed(2))
    stored = native.Stored("w", 0, len(row), [row], [native.AS_IS], None)
    squares = stored.squares()
    wide, narrow = (np.array([[low, end]], np.float32) for low, end in ((-9.0, 0.0), (9.0, 0.001)))
    found = native.count(stored, native.Values("value"), wide, narrow, squares)
    (everything, few) = found.inside[0]
    assert np.array_equal(everything, row.numpy())
    assert np.array_equal(few, row[(row > 0) & (row < np.float32(0.001))].numpy())
    assert found.counts[0, :, 0].tolist() == [0, int((row < 0).sum())]
    np.testing.assert_allclose(squares.sum(), float(row.double().square().sum()), rtol=1e-6)
