"""`taskvec demo`: the whole story on a small zoo that the command builds itself."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from merging.demo import Story


@click.command("demo", short_help="Build a small zoo, merge it by several methods, score everything. Offline.")
@click.argument("out", type=click.Path(path_type=Path), default="taskvec-demo", required=False)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything that is drawn.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def demo(out: Path, seed: int, overwrite: bool, as_json: bool) -> None:
    """Pretrain a small network, fine-tune it on four tasks, merge by several methods, score every model on every task.

    Needs no download and less than a minute. Writes checkpoints, recipes and results to OUT (default: taskvec-demo).
    """
    from merging.demo import tell

    story = tell(out, seed=seed, overwrite=overwrite, say=lambda line: click.echo(f"{line} ...", err=True))
    if as_json:
        click.echo(json.dumps(story.as_json(), indent=2))
    else:
        click.echo(table(story))


def table(story: "Story") -> str:
    """Test accuracy in percent, one line a model, one column a task."""
    tasks = list(story.rows[0].accuracy)
    lines = [["", "scale", *tasks, "mean"]]
    for row in story.rows:
        scores = [f"{100 * row.accuracy[task]:.1f}" for task in tasks]
        lines.append([row.title, "" if row.scale is None else f"{row.scale:g}", *scores, f"{100 * row.mean:.1f}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = []
    for line in lines:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        rows.append("  ".join([first, *rest]).rstrip())
    chosen = "scale: the best of a few on validation data; accuracies in percent, on test data"
    again = f"taskvec merge {story.folder / 'recipes' / 'pcb.yaml'} pcb-again"
    return "\n".join([*rows, "", chosen, f"models, recipes and numbers: {story.folder}", f"do one again: {again}"])
