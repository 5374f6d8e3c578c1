import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from merging.commands.demo import demo, table
from merging.demo import METHODS, TASKS, Story, tell
from taskvec.errors import OutputExistsError, UsageError


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return tell(tmp_path_factory.mktemp("demo") / "out", steps=0.4)


def row(story: Story, name: str):
    return next(row for row in story.rows if row.name.startswith(name))


def test_fine_tuning_gains_on_every_task(story):
    base, tuned = row(story, "base").accuracy, row(story, "fine-tuned").accuracy
    assert all(tuned[task] > base[task] for task in TASKS)


@pytest.mark.parametrize("method", METHODS)
def test_one_merged_network_beats_the_base_and_not_the_fine_tuned_ones(story, method):
    assert row(story, "base").mean < row(story, method).mean < row(story, "fine-tuned").mean


def test_written_task_arithmetic_is_the_sum_of_the_written_differences(story):
    def read(place: str) -> dict[str, torch.Tensor]:
        return load_file(story.folder / place / "model.safetensors")

    merged, base = read("merged/task_arithmetic"), read("base")
    tuned = [read(f"tuned/{task.replace(' ', '-')}") for task in TASKS]
    scale = row(story, "task_arithmetic").scale
    for name, tensor in base.items():
        expected = tensor.double() + scale * sum(other[name].double() - tensor.double() for other in tuned)
        torch.testing.assert_close(merged[name], expected.float())


def test_every_merge_leaves_its_recipe_and_its_provenance(story):
    for method in METHODS:
        assert (story.folder / "recipes" / f"{method}.yaml").is_file()
        recorded = json.loads((story.folder / "merged" / method / "taskvec.json").read_text())
        assert method in json.dumps(recorded)


def test_table_has_a_line_for_every_model_and_a_column_for_every_task(story):
    lines = table(story).splitlines()
    assert all(task in lines[0] for task in TASKS)
    for method, parameters in METHODS.items():
        line = next(line for line in lines if line.startswith(method))
        assert all(f"{key}={value}" in line for key, value in parameters.items())
        assert line.endswith(f"{100 * row(story, method).mean:.1f}")


def test_results_file_says_what_the_table_says(story):
    assert json.loads((story.folder / "results.json").read_text()) == json.loads(json.dumps(story.as_json()))


def test_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path):
    first, again, other = (tell(tmp_path / str(n), steps=0.02, seed=seed) for n, seed in enumerate((3, 3, 4)))
    assert [row.accuracy for row in first.rows] == [row.accuracy for row in again.rows]
    assert [row.accuracy for row in first.rows] != [row.accuracy for row in other.rows]


def test_a_taken_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"exists\. Give another folder, or --overwrite"):
        tell(tmp_path)
    with pytest.raises(OutputExistsError, match="is not an earlier demo, so it is not replaced"):
        tell(tmp_path, overwrite=True)
    assert (tmp_path / "mine").read_text() == "precious"


def test_steps_out_of_range_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(UsageError, match=r"steps: 2 is not in \(0, 1\]"):
        tell(tmp_path / "out", steps=2)
    assert not (tmp_path / "out").exists()


def test_interrupted_demo_leaves_no_folder(tmp_path):
    def stop(line: str) -> None:
        if line.startswith("merging"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tell(tmp_path / "out", steps=0.01, say=stop)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_command_prints_the_table_as_json_and_replaces_an_earlier_demo(tmp_path: Path):
    out = tmp_path / "out"
    done = CliRunner().invoke(demo, [str(out), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    shown = json.loads(done.stdout)
    assert shown == json.loads((out / "results.json").read_text())
    assert "pretraining" in done.stderr
    again = CliRunner().invoke(demo, [str(out), "--overwrite"], catch_exceptions=False)
    assert again.exit_code == 0
    assert "fine-tuned" in again.stdout
