"""`taskvec learn statistics`."""

import click

from merging.commands.output import json_option, print_json, print_table, say


@click.command("statistics")
@click.argument("config", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@json_option
def learn_statistics(config: str, out: str, quiet: bool, as_json: bool) -> None:
    """Collect what `fisher`, `regmean` and `regmean_pp` need of the tasks' data by CONFIG, and save it in OUT.

    CONFIG has `method`, `base`, `tasks`, `model` and `data`, as the other learners have; no labels are needed. OUT is a
    folder that gets a file for each task, or TASK.safetensors where there is one task.
    """
    from merging.learn.statistics_file import StatisticsFile, collect
    from merging.statistics import Statistics

    read = StatisticsFile.load(config)
    files = collect(read, out, progress=None if quiet else say)
    found = {task: Statistics(path) for task, path in files.items()}
    if as_json:
        print_json(
            {
                "out": out,
                "method": read.method,
                "files": {task: str(path) for task, path in files.items()},
                "examples": {task: each.examples for task, each in found.items()},
                "tensors": {task: len(each.source.infos) for task, each in found.items()},
            }
        )
        return
    what = "examples" if read.method == "fisher" else "inputs"
    rows = [[task, found[task].examples, len(found[task].source.infos), str(path)] for task, path in files.items()]
    print_table(["task", what, "tensors", "file"], rows)
    say(
        f"Merge with a recipe: method: {read.method}, parameters: {{statistics_files: [{', '.join(map(str, files.values()))}]}}"
    )
