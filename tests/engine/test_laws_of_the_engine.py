"""The engine's promise: budget, tiles, threads, shards and order of files never change a bit of the result."""

import pytest
import torch
from safetensors.torch import load_file

from merging import Recipe, merge
from merging.prepare import prepare
from taskvec import Checkpoint, write
from taskvec.deltas import StackDeltas, Tile
from taskvec.draws import bits, keep, uniform
from taskvec.errors import NonFiniteError
from taskvec.moments import exact, gram, rounded_sum, sums
from taskvec.plan import Report
from taskvec.sweep import Options, Stage, sample_blocks, sweep

METHODS = {
    "pcb": {}, "ties": {}, "dare": {}, "magnitude": {}, "task_arithmetic": {}, "average": {}, "breadcrumbs": {},
}  # fmt: skip


def big_zoo(folder):
    """Tensors larger than a tile and a segment, so that cutting them means something."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (3000, 1500), "b.weight": (70, 90), "c.bias": (7,), "layers.0.w": (500, 400)}
    base = {name: torch.randn(shape, generator=generator).mul(0.02).bfloat16() for name, shape in shapes.items()}
    paths = []
    for _ in range(3):
        tuned = {
            name: (value.float() + 1e-3 * torch.randn(value.shape, generator=generator)).bfloat16()
            for name, value in base.items()
        }
        paths.append(tuned)
    from taskvec import in_memory

    write(in_memory(base), folder / "base")
    for index, tuned in enumerate(paths):
        write(in_memory(tuned), folder / f"ft{index}", shard_size=(4_000_000, 10**9, 200_000)[index])
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return big_zoo(tmp_path_factory.mktemp("large"))


def merged(folder, method, options=None, *, statistics=None, preprocess=(), seed=0):
    recipe = Recipe.from_data(
        {
            "base": str(folder / "base"), "tasks": [str(folder / f"ft{i}") for i in range(3)], "method": method,
            "statistics": statistics, "preprocess": list(preprocess), "seed": seed,
        }
    )  # fmt: skip
    ready = prepare(recipe)
    result = {name: torch.full((ready.deltas.infos[name].numel,), torch.nan) for name in ready.merged}

    def sink(tile: Tile) -> None:
        assert tile.merged is not None
        result[tile.name][tile.start : tile.stop] = tile.merged.reshape(-1)

    outcome = sweep(ready.deltas, ready.stages(), sink, scope=ready.scope, options=options or Options(workers=1))
    return result, outcome


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("statistics", ["model", "tensor"])
def test_every_budget_tile_and_thread_count_gives_the_same_bits(large, method, statistics):
    preprocess = [{"method": "dare", "density": 0.7}] if method == "ties" else []
    expected, outcome = merged(large, method, statistics=statistics, preprocess=preprocess)
    assert all(bool(torch.isfinite(values).all()) for values in expected.values())
    for options in (
        Options(workers=2, tile=1 << 15),
        Options(workers=3, tile=1 << 19, memory=1 << 22),
        Options(workers=2, memory=1 << 34),
    ):
        again, other = merged(large, method, options, statistics=statistics, preprocess=preprocess)
        assert all(torch.equal(expected[name], again[name]) for name in expected), options
        assert other.norms == outcome.norms
        assert other.facts == outcome.facts


def test_the_seed_and_nothing_else_changes_random_merges(large):
    first, _ = merged(large, "dare", seed=1)
    second, _ = merged(large, "dare", seed=2)
    assert not torch.equal(first["a.weight"], second["a.weight"])


def test_the_shards_of_the_inputs_change_nothing(large, tmp_path):
    for name in ("base", "ft0", "ft1", "ft2"):
        write(Checkpoint.open(large / name), tmp_path / name, shard_size=300_000)
    for method in ("pcb", "dare"):
        one, _ = merged(large, method)
        other, _ = merged(tmp_path, method)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_digests_made_on_the_way_are_those_of_a_reading_of_their_own(large):
    recipe = Recipe.from_data({"base": str(large / "base"), "tasks": [str(large / "ft0")], "method": "pcb"})
    ready = prepare(recipe)
    sweep(ready.deltas, ready.stages(), lambda tile: None)
    known = {name: ready.base.known_digests() for name in ("base",)}["base"]
    assert set(known) == set(ready.merged)
    assert known == Checkpoint.open(large / "base").digests()


def test_nan_is_named_by_tensor_and_task():
    stack = torch.zeros(3, 200_000)
    stack[1, 150_000] = torch.nan
    with pytest.raises(NonFiniteError, match="w: task 'b' holds 1 NaN or infinite values"):
        sweep(
            StackDeltas({"w": stack}, ["a", "b", "c"]),
            [Stage("sum", "combine", lambda d: lambda t: t.total())],
            lambda t: None,
        )


def test_an_error_in_a_kernel_stops_all_threads():
    def kernel(tile):
        if tile.start:
            raise ValueError("boom")
        return tile.total()

    with pytest.raises(ValueError, match="boom"):
        sweep(
            StackDeltas({"w": torch.zeros(2, 9_000_000)}), [Stage("x", "combine", lambda d: kernel)], lambda t: None,
            options=Options(workers=2),
        )  # fmt: skip


def test_sums_are_exact_and_gram_matrices_those_of_float64():
    stack = torch.randn(3, 100_001, generator=torch.Generator().manual_seed(0))
    found = []

    def plan(deltas):
        found.append((yield from gram(len(deltas.tasks))))
        found.append((yield from sums(lambda tile: tile.stack.double().abs().sum(1))))
        yield Report({})
        return lambda tile: tile.total()

    sweep(StackDeltas({"w": stack}), [Stage("probe", "combine", plan)], lambda t: None)
    torch.testing.assert_close(found[0], stack.double() @ stack.double().T, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(found[1], stack.double().abs().sum(1), rtol=1e-12, atol=0)


def test_exact_sums_do_not_depend_on_the_order():
    values = [1e300, 1.0, -1e300, 2.0**-1074, 3.5]
    forward, backward = (rounded_sum(sum(exact(v) for v in order)) for order in (values, values[::-1]))
    assert forward == 4.5
    assert backward == 4.5


def test_draws_depend_on_seed_task_name_and_element_only():
    whole = bits(1, "math", "w", 0, 1000)
    assert (whole[300:700] == bits(1, "math", "w", 300, 700)).all()
    for other in (bits(2, "math", "w", 0, 1000), bits(1, "code", "w", 0, 1000), bits(1, "math", "v", 0, 1000)):
        assert (whole != other).mean() > 0.99
    edge = (1 << 32) - 5
    joined = bits(1, "t", "w", edge, edge + 10)
    assert (joined[5:] == bits(1, "t", "w", edge + 5, edge + 10)).all()


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.93])
def test_draws_keep_the_share_they_promise(density):
    count = 1_000_000
    kept = keep(3, "task", "tensor", 0, count, density).float()
    deviation = (density * (1 - density) / count) ** 0.5
    assert abs(float(kept.mean()) - density) < 5 * deviation
    neighbours = float((kept[1:] * kept[:-1]).mean())
    assert abs(neighbours - density**2) < 6 * deviation
    drawn = uniform(3, "task", "tensor", 0, count)
    assert float(drawn.min()) > 0
    assert float(drawn.max()) < 1
    assert abs(float(drawn.mean()) - 0.5) < 5 * (1 / 12 / count) ** 0.5


def test_samples_are_spread_over_all_tensors():
    deltas = StackDeltas({f"w{i}": torch.zeros(1, 10_000 * (i + 1)) for i in range(5)})
    blocks = sample_blocks(deltas, 1 << 15)
    share = {name: sum(stop - start for n, start, stop in blocks if n == name) / 2**15 for name in deltas.infos}
    assert share == pytest.approx({f"w{i}": (i + 1) / 15 for i in range(5)}, abs=0.02)


def test_written_files_do_not_depend_on_the_budget_either(large, tmp_path):
    for name, changes in (
        ("one", {"memory": "1GiB", "workers": 1}),
        ("two", {"memory": "20MiB", "workers": 2, "output": {"shard_size": "1MB"}}),
    ):
        recipe = {
            "base": str(large / "base"),
            "tasks": [str(large / f"ft{i}") for i in range(3)],
            "method": "pcb",
            **changes,
        }
        merge(Recipe.from_data(recipe), tmp_path / name)
    one = load_file(tmp_path / "one" / "model.safetensors")
    two = Checkpoint.open(tmp_path / "two")
    assert all(torch.equal(value, two.read(name)) for name, value in one.items())
