"""`taskvec learn` and `taskvec coefficients`."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, ClassVar

import click

from merging.commands.output import json_option, print_json, print_table, say


class _Learners(click.Group):
    """What can be learned; `dam` and `statistics` have files of their own, imported when they are asked for."""

    elsewhere: ClassVar[Mapping[str, str]] = {"dam": "learn_dam", "statistics": "learn_statistics"}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *self.elsewhere]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.elsewhere:
            command = getattr(import_module(f"merging.commands.{cmd_name}"), self.elsewhere[cmd_name])
            return command if isinstance(command, click.Command) else None
        return super().get_command(ctx, cmd_name)


@click.group("learn", cls=_Learners)
def learn() -> None:
    """Learn coefficients or masks with data, or collect the statistics that some methods need."""


def _run(module: str, config: str, out: str, as_json: bool, quiet: bool) -> None:
    from merging.learn.config import LearnConfig

    read = LearnConfig.load(config)
    learned, found = import_module(f"merging.learn.{module}").learn(read, out, progress=None if quiet else _tell())
    facts: dict[str, Any] = {
        "out": out,
        "tasks": list(learned.tasks),
        "blocks": len(learned.blocks),
        "coefficients": learned.values.numel(),
        "steps": found.steps,
        "stopped": found.stopped,
        "loss": found.losses[-1] if found.losses else None,
        "best": found.best,
    }
    if as_json:
        print_json(facts)
        return
    say(f"{learned.values.numel()} coefficients of {len(learned.tasks)} task vectors in {out}, {found.steps} steps")
    if found.best is not None:
        first = found.evaluations[0]["metrics"]
        rows = [[name, first[name], value] for name, value in found.best["metrics"].items()]
        print_table(["metric", "start", f"step {found.best['step']}"], rows)
    say(f"Bake them with a recipe: method: task_arithmetic, coefficients: {out}")


def _tell() -> Callable[[Mapping[str, Any]], None]:
    import time

    last = [0.0]

    def tell(record: Mapping[str, Any]) -> None:
        if "metrics" in record:
            metrics = "  ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items())
            say(f"step {record['step']}: {metrics}{'  (best)' if record['best'] else ''}")
        elif time.monotonic() - last[0] > 2 and "loss" in record:
            last[0] = time.monotonic()
            terms = "  ".join(f"{name} {value:.4f}" for name, value in record.get("terms", {}).items())
            of = f"/{record['steps']}" if record.get("steps") else ""
            say(f"step {record['step']}{of}: loss {record['loss']:.4f}  {terms}".rstrip())

    return tell


_quiet = click.option("--quiet", is_flag=True, help="No progress on stderr.")


@learn.command("atlas")
@click.argument("config", type=click.Path())
@click.argument("out", type=click.Path())
@_quiet
@json_option
def atlas_command(config: str, out: str, quiet: bool, as_json: bool) -> None:
    """Learn one coefficient per task vector and block (aTLAS) by CONFIG, and save them as OUT.

    Started again after it was killed, it goes on. Under torchrun, processes share the batches.
    """
    _run("atlas", config, out, as_json, quiet)


@learn.command("adamerging")
@click.argument("config", type=click.Path())
@click.argument("out", type=click.Path())
@_quiet
@json_option
def adamerging_command(config: str, out: str, quiet: bool, as_json: bool) -> None:
    """Learn coefficients without labels (AdaMerging) by CONFIG, and save them as OUT.

    `granularity: block` is the paper's layer-wise form, `global` its task-wise one.
    """
    _run("adamerging", config, out, as_json, quiet)


@click.group("coefficients")
def coefficients() -> None:
    """Look at learned coefficients."""


@coefficients.command("show")
@click.argument("file", type=click.Path())
@click.option("--plot", type=click.Path(), help="Write the block × task heat map to this picture (needs matplotlib).")
@json_option
def show(file: str, plot: str | None, as_json: bool) -> None:
    """Show the coefficients in FILE: a table, blocks down and tasks across."""
    from taskvec.coefficients import Coefficients

    found = Coefficients.load(file)
    values = found.values if found.values.dim() == 2 else found.values.mean(-1)
    if plot is not None:
        _plot(found, values, plot)
        say(f"heat map written to {plot}")
    if as_json:
        print_json(
            {
                "tasks": list(found.tasks),
                "blocks": list(found.blocks),
                "granularity": found.granularity,
                "partitions": found.partitions,
                "mode": found.mode,
                "base_hash": found.base_hash,
                "task_hashes": dict(found.task_hashes),
                "objective": dict(found.objective),
                "history": [dict(record) for record in found.history],
                "coefficients": found.values.tolist(),
            }
        )
        return
    how = f"{found.granularity}, {found.objective.get('use', 'learned')}, {found.objective.get('steps', '?')} steps"
    if found.partitions:
        how += f", {found.partitions[0]} random parts (means are shown)"
    rows = [[name, *(round(float(v), 4) for v in values[:, b])] for b, name in enumerate(found.blocks)]
    rows.append(["mean", *(round(float(v), 4) for v in values.mean(1))])
    print_table(["block", *found.tasks], rows, title=f"{file}: {how}")


def _plot(found: Any, values: Any, path: str) -> None:
    try:
        import matplotlib
    except ImportError:
        from taskvec.errors import UsageError

        raise UsageError("--plot: needs matplotlib (`pip install taskvec[plot]`).") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    blocks = found.blocks
    figure, axes = pyplot.subplots(figsize=(2 + 0.6 * len(found.tasks), max(3.0, min(0.16 * len(blocks), 40.0))))
    limit = float(values.abs().max()) or 1.0
    image = axes.imshow(
        values.T.numpy(), aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
    )
    axes.set_xticks(range(len(found.tasks)), found.tasks, rotation=60, ha="right")
    step = max(1, len(blocks) // 240)
    axes.set_yticks(range(0, len(blocks), step), blocks[::step], fontsize=5)
    figure.colorbar(image, ax=axes, label="coefficient")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        from taskvec.errors import OutputError

        raise OutputError(f"{path}: the picture cannot be written ({error}).") from None
    finally:
        pyplot.close(figure)
