"""The rows of the real zoos' table: every method of the catalogue, with a recipe that can be read; scales; tables."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from examples.real_zoo import catalogue
from merging import Recipe
from merging.method import methods

TASKS = ["one", "two", "three"]
RESULTS = Path(catalogue.__file__).parent / "results"


def test_every_method_of_the_catalogue_has_a_row():
    rows = {entry.name: entry for entry in catalogue.entries(TASKS)}
    assert set(methods()) <= set(rows)
    zoo = SimpleNamespace(base=Path("base"), models={task: Path(task) for task in TASKS})
    for entry in rows.values():
        files = {entry.statistics: ["a.safetensors"] * 3}
        value = entry.tried[1][0] if entry.tried is not None else None
        recipe = Recipe.from_data(catalogue.recipe_of(zoo, entry, value, 2, files))
        assert len(recipe.tasks) == len(entry.tasks)
        needed = {p.name for p in methods()[recipe.method].parameters.values() if p.required}
        assert needed <= set(recipe.parameters)
    assert [rows[name].tasks for name in ("passthrough", "slerp")] == [("one",), ("one", "two")]
    assert {name for name, entry in rows.items() if len(entry.seeds) == 3} == {
        "dare", "dare + ties", "della", "della + ties",
    }  # fmt: skip


@pytest.mark.parametrize(("best", "found"), [(0.5, 0.5), (1.0, 1.0), (7.0, 7.8), (0.01, 0.1)])
def test_the_scale_is_searched_beyond_the_grid_while_it_helps(best, found):
    class Bowl:
        loss = False

        def put(self, tensors, scale):
            self.scale = scale

        def score(self, tasks, split, rows):
            assert split == "validation"
            return {"one": -abs(self.scale - best)}

        def worth(self, scores):
            return scores["one"]

    assert catalogue.best_scale(Bowl(), {}, ["one"], None)[0] == found


@pytest.mark.parametrize("name", catalogue.ZOOS)
def test_stored_results_make_tables(name):
    import json

    result = json.loads((RESULTS / f"{name}.json").read_text())
    lines = catalogue.table(result).splitlines()
    assert len(lines) == 4 + len(result["rows"])
    assert {line.count("|") for line in lines} == {len(result["tasks"]) + 5}
    assert catalogue.summary(RESULTS).count("\n") > 40
