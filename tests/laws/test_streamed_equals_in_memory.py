"""Every method gives the same from files, tile by tile, as on stacks in memory."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging import Recipe, merge, merge_stacks
from merging.method import methods

CATALOGUE = methods()
REQUIRED = {
    "nearswap": {"distance": 0.05},
    "wudi": {"steps": 5},
    "lines": {"slope": 0.5},
    "subspace_boosting": {"share": 0.5},
}
SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.mlp.up.weight": (24, 16),
    "model.layers.1.mlp.up.weight": (24, 16),
    "model.norm.weight": (16,),
}
COMBINE = [n for n, m in CATALOGUE.items() if m.role != "postprocess" and m.data == "nothing"]
POSTPROCESS = [n for n, m in CATALOGUE.items() if m.role == "postprocess"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    models = [
        {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for _ in range(3)
    ]
    save_file(base, folder / "base.safetensors")
    for i, model in enumerate(models):
        save_file(model, folder / f"m{i}.safetensors")
    return folder, base, models


def both(zoo, name, tmp_path, *, statistics=None, postprocess=(), parameters=None):
    folder, base, models = zoo
    method = CATALOGUE[name]
    count = max(method.tasks[0], min(3, method.tasks[1] or 3))
    given = {**REQUIRED.get(name, {}), **(parameters or {})}
    recipe = Recipe(
        base=str(folder / "base.safetensors"),
        tasks=[{"path": str(folder / f"m{i}.safetensors"), "name": f"t{i}"} for i in range(count)],
        method=name,
        parameters=given,
        statistics=statistics,
        postprocess=list(postprocess),
        memory="64MiB",
    )
    merge(recipe, tmp_path / "out.safetensors")
    delta = method.space == "delta"
    stacks = {
        key: torch.stack([model[key] - base[key] if delta else model[key] for model in models[:count]]) for key in base
    }
    found = merge_stacks(
        name,
        stacks,
        statistics=statistics,
        postprocess=postprocess,
        tasks=[f"t{i}" for i in range(count)],
        base=base,
        **given,
    )
    return load_file(tmp_path / "out.safetensors"), {
        key: base[key] + found[key] if delta else found[key] for key in base
    }


def assert_same(streamed, wanted):
    assert set(streamed) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(streamed[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("statistics", ["model", "tensor"])
@pytest.mark.parametrize("name", COMBINE)
def test_a_merge_of_files_equals_the_merge_of_stacks(zoo, tmp_path, name, statistics):
    assert_same(*both(zoo, name, tmp_path, statistics=statistics))


@pytest.mark.parametrize("statistics", ["model", "tensor"])
@pytest.mark.parametrize("name", POSTPROCESS)
def test_so_do_the_steps_after_it(zoo, tmp_path, name, statistics):
    step = {"method": name, **REQUIRED.get(name, {})}
    assert_same(*both(zoo, "task_arithmetic", tmp_path, statistics=statistics, postprocess=[step]))


def test_patterns_are_given_as_lists(zoo, tmp_path):
    for statistics in ("model", "tensor"):
        (tmp_path / statistics).mkdir()
        parameters = {"averaged": ["*embed*", "*layers.1*"]}
        streamed, wanted = both(zoo, "iso_c", tmp_path / statistics, statistics=statistics, parameters=parameters)
        assert_same(streamed, wanted)


def test_statistics_files_are_given_as_a_list(zoo, tmp_path):
    from merging.statistics import metadata

    folder, base, models = zoo
    files = []
    for i in range(2):
        values = {
            name: torch.rand(value.shape, generator=torch.Generator().manual_seed(i)) for name, value in base.items()
        }
        save_file(values, tmp_path / f"f{i}.safetensors", metadata=metadata("fisher", examples=1))
        files.append(str(tmp_path / f"f{i}.safetensors"))
    recipe = Recipe(
        base=str(folder / "base.safetensors"),
        tasks=[str(folder / f"m{i}.safetensors") for i in range(2)],
        method="fisher",
        parameters={"statistics_files": files},
    )
    merge(recipe, tmp_path / "out.safetensors")
    stacks = {key: torch.stack([model[key] - base[key] for model in models[:2]]) for key in base}
    found = merge_stacks("fisher", stacks, statistics_files=files)
    assert_same(load_file(tmp_path / "out.safetensors"), {key: base[key] + found[key] for key in base})
