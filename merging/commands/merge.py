"""`taskvec merge`, `check` and `convert`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from merging.commands.output import json_option, print_json, print_table, progress_bar, say, uncollected
from taskvec import ahead

if TYPE_CHECKING:
    from merging.assembly import Assembly
    from merging.recipe import Recipe

_RECIPE_SUFFIXES = (".yaml", ".yml", ".json")


def _parameters(given: tuple[str, ...]) -> dict[str, Any]:
    """`density=0.1` and `density=[0.1,0.2]` as YAML values."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from merging.settings import plain

    found: dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise click.UsageError(f"-p {item!r}: write it as NAME=VALUE, for instance -p density=0.1")
        if key in found:
            raise click.UsageError(f"-p {key}: given twice")
        try:
            found[key] = plain(YAML(typ="safe").load(value))
        except YAMLError:
            raise click.UsageError(
                f"-p {item!r}: the value is not YAML; write a number, a word or a list, for instance -p density=[0.1,0.2]"
            ) from None
    return found


def _steps(given: tuple[str, ...]) -> list[Any]:
    """`dare:density=0.5,rescale=false` as an entry of `preprocess`."""
    steps: list[Any] = []
    for item in given:
        name, _, rest = item.partition(":")
        steps.append({"method": name, **_parameters(tuple(part for part in rest.split(",") if part))} if rest else name)
    return steps


def _recipe(
    paths: tuple[str, ...],
    *,
    base: str | None,
    method: str | None,
    parameters: tuple[str, ...],
    weights: tuple[float, ...],
    scale: float | None,
    statistics: str | None,
    preprocess: tuple[str, ...],
    postprocess: tuple[str, ...],
    dtype: str | None,
    shard_size: str | None,
    seed: int | None,
    device: str | None,
    memory: str | None,
    workers: int | None,
) -> "Recipe":
    """The recipe that a file and flags stand for; flags win over the file."""
    from merging.recipe import Recipe

    if len(paths) == 1 and paths[0].endswith(_RECIPE_SUFFIXES) and method is None:
        data = Recipe.load(paths[0]).data()
        if base or weights:
            raise click.UsageError(
                "--base and --weight are for the form without a recipe file; change the file instead"
            )
    else:
        if method is None:
            if len(paths) == 1:
                raise click.UsageError(
                    f"{paths[0]}: a recipe file ends in .yaml, .yml or .json; to merge models name a --method too"
                )
            raise click.UsageError("name a --method (see `taskvec methods`), or give one recipe file")
        if not paths:
            raise click.UsageError("name the models to merge")
        if weights and len(weights) != len(paths):
            raise click.UsageError(
                f"--weight: {len(weights)} weights for {len(paths)} models; give one for each, in their order"
            )
        tasks = [{"path": path} | ({"weight": weights[i]} if weights else {}) for i, path in enumerate(paths)]
        data = {"base": base, "tasks": tasks, "method": method}
    if parameters:
        data["parameters"] = {**data.get("parameters", {}), **_parameters(parameters)}
    for key, value in (("preprocess", _steps(preprocess)), ("postprocess", _steps(postprocess))):
        if value:
            data[key] = value
    output = {"dtype": dtype, "shard_size": shard_size}
    if any(output.values()):
        data["output"] = {**data.get("output", {}), **{key: value for key, value in output.items() if value}}
    flags = {
        "scale": scale,
        "statistics": statistics,
        "seed": seed,
        "device": device,
        "memory": memory,
        "workers": workers,
    }
    data |= {key: value for key, value in flags.items() if value is not None}
    return Recipe.from_data(data, where="the flags" if not paths or method else paths[0])


def _paths(data: Any) -> list[str]:
    """The models that a recipe names, as far as its words tell."""
    if isinstance(data, list):
        return [path for item in data for path in _paths(item)]
    if not isinstance(data, dict):
        return []
    own = [data[key] for key in ("base", "path") if isinstance(data.get(key), str)]
    return own + [path for item in data.values() for path in _paths(item)]


def recipe_options(command: Any) -> Any:
    """The flags that stand for a recipe."""
    for option in reversed(
        (
            click.option("--base", metavar="MODEL", help="The model that all others were tuned from."),
            click.option("-m", "--method", metavar="NAME", help="Merge method (see `taskvec methods`)."),
            click.option("-p", "parameters", multiple=True, metavar="NAME=VALUE", help="A parameter of the method."),
            click.option(
                "-w",
                "--weight",
                "weights",
                multiple=True,
                type=float,
                help="Task weight, one for each model, in order.",
            ),
            click.option("--scale", type=float, help="Factor for the whole merged task vector."),
            click.option("--statistics", type=click.Choice(["model", "tensor"]), help="Whose statistics count."),
            click.option(
                "--preprocess",
                multiple=True,
                metavar="METHOD[:NAME=VALUE,…]",
                help="Applied to the task vectors first.",
            ),
            click.option(
                "--postprocess",
                multiple=True,
                metavar="METHOD[:NAME=VALUE,…]",
                help="Applied to the merged delta last.",
            ),
            click.option("--dtype", help="Stored dtype (default: as the base stores each tensor)."),
            click.option("--shard-size", help="Largest size of one file (default 5GB)."),
            click.option("--seed", type=int, help="For randomised methods."),
            click.option("--device", help="cpu or cuda."),
            click.option(
                "--memory", metavar="SIZE", help="Memory budget, as 2GiB (default: a quarter of what is free)."
            ),
            click.option("--workers", type=int, help="Threads (default: one for each core)."),
        )
    ):
        command = option(command)
    return command


@click.command("merge")
@click.argument("paths", nargs=-1, required=True, metavar="RECIPE OUT | OUT MODEL...")
@recipe_options
@click.option(
    "--out-adapter", metavar="rank=N|energy=SHARE|exact", help="Write the merged task vector as a LoRA adapter instead."
)
@click.option(
    "--other",
    type=click.Choice(["refuse", "save", "drop"]),
    default="refuse",
    show_default=True,
    help="With --out-adapter: what to do with changed tensors that no LoRA can hold (norms, biases).",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier output (swapped in whole at the end).")
@click.option("--resume", is_flag=True, help="Go on from the finished shards of an interrupted run.")
@click.option("--dry-run", is_flag=True, help="Print the recipe that the flags stand for, and stop.")
@json_option
def merge_command(
    paths: tuple[str, ...],
    overwrite: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    out_adapter: str | None,
    other: Literal["refuse", "save", "drop"],
    **flags: Any,
) -> None:
    r"""Merge models by a recipe, or by flags.

    \b
    taskvec merge RECIPE.yaml OUT
    taskvec merge --base BASE --method pcb -p density=0.1 OUT MODEL MODEL...
    """
    if len(paths) < 2:
        raise click.UsageError(
            "give a recipe and an output (RECIPE.yaml OUT), or an output and the models (OUT MODEL...)"
        )
    by_file = flags["method"] is None and paths[0].endswith(_RECIPE_SUFFIXES)
    if by_file and len(paths) > 2:
        raise click.UsageError(f"a recipe names its models itself; {paths[2]!r} is one argument too many")
    out, sources = (paths[1], paths[:1]) if by_file else (paths[0], paths[1:])
    writes = not dry_run and out_adapter is None
    if writes and not by_file:
        ahead.begin(path for path in (flags["base"], *sources) if path)
    recipe = _recipe(sources, **flags)
    if writes and by_file:
        ahead.begin(_paths(recipe.data()))
    if dry_run:
        if as_json:
            print_json(recipe.data())
        else:
            click.echo(recipe.dump(), nl=False)
        return
    if out_adapter is not None:
        _write_adapter(recipe, out, out_adapter, other, overwrite=overwrite, as_json=as_json)
        return
    with uncollected():
        from merging.streamed import merge

    said: list[str] = []

    def notice(message: str) -> None:
        said.append(message)
        say(message)

    with progress_bar() as progress:
        merged = merge(recipe, out, overwrite=overwrite, resume=resume, progress=progress, notice=notice)
    for warning in merged.provenance["warnings"]:
        if f"warning: {warning}" not in said:
            say(f"warning: {warning}")
    if as_json:
        print_json({"path": str(merged.path), **merged.provenance})
    else:
        click.echo(f"{merged.path}: {merged.provenance['tensors']['merged']} tensors merged by {recipe.method}")


def _write_adapter(
    recipe: "Recipe", out: str, how: str, other: Literal["refuse", "save", "drop"], *, overwrite: bool, as_json: bool
) -> None:
    from merging.adapter_out import merge_to_adapter

    with progress_bar() as progress:
        report = merge_to_adapter(
            recipe, out, rank=how, other=other, overwrite=overwrite, progress=progress, notice=say
        )
    print_json(report.as_dict()) if as_json else click.echo(str(report))


def _check_rows(assembly: "Assembly") -> dict[str, Any]:
    from taskvec.sizes import bytes_text

    prepared, several = assembly.parts[0], len(assembly.parts) > 1
    found: dict[str, Any] = {
        "method": prepared.method.name,
        "parameters": prepared.parameters,
        "statistics": prepared.scope,
        "tasks": list(dict.fromkeys(task.name for part in assembly.parts for task in part.tasks)),
        "tensors merged": sum(len(part.merged) for part in assembly.parts),
        "tensors kept from the base": sum(len(part.kept) for part in assembly.parts),
        "elements merged": sum(part.deltas.numel for part in assembly.parts),
        "passes": assembly.passes(),
        "bytes to read": bytes_text(assembly.bytes_to_read()),
        "output": bytes_text(assembly.output_bytes()),
        "peak working memory": bytes_text(assembly.peak_memory()),
        "weights": {
            name: [round(float(w), 6) for w in prepared.weights(name, 0, 1).reshape(len(prepared.tasks), -1)[:, 0]]
            for name in prepared.merged[:1]
        },
        "warnings": assembly.warnings,
    }
    if several:
        found["parts"] = [
            f"{name}: {part.method.name} of {' and '.join(task.name for task in part.tasks)}, {len(part.infos)} tensors"
            for name, part in zip(assembly.names, assembly.parts)
        ]
    if assembly.files:
        found["written anew"] = list(assembly.files)
    return found


@click.command()
@click.argument("recipe_file", metavar="RECIPE")
@click.argument("out", required=False)
@json_option
def check(recipe_file: str, out: str | None, as_json: bool) -> None:
    """Report every problem of a recipe, and what it would cost. Reads headers only."""
    from merging.assembly import staged
    from merging.recipe import Recipe

    rows = {name: _check_rows(assembly) for name, assembly in staged(Recipe.load(recipe_file), out)}
    found = rows.pop("")
    if as_json:
        print_json({"ok": True, **found, **({"stages": rows} if rows else {})})
        return
    for name, stage in [*rows.items(), ("", found)]:
        if rows:
            click.echo(f"stage {name}" if name else "result")
        for key, value in stage.items():
            if key == "warnings":
                for warning in value:
                    say(f"warning: {warning}")
            else:
                click.echo(f"{key:28} {value if not isinstance(value, list) else ', '.join(map(str, value))}")


@click.command()
@click.argument("recipe_file", metavar="MERGEKIT_YAML")
@click.argument("out", required=False)
def convert(recipe_file: str, out: str | None) -> None:
    """Turn a mergekit recipe into ours; print it, or write it to OUT."""
    from merging.recipe import Recipe
    from taskvec.writer import write_atomically

    text = Recipe.load(recipe_file).dump()
    if out is None:
        click.echo(text, nl=False)
    else:
        write_atomically(Path(os.fspath(out)), text.encode())
        say(f"wrote {out}")


__all__ = ["check", "convert", "merge_command", "print_table"]
