"""`taskvec methods`."""

import inspect

import click

from merging.commands.output import json_option, print_json, print_table


@click.command("methods")
@click.argument("names", nargs=-1, metavar="[NAME] | --advise BASE MODEL...")
@click.option("--advise", is_flag=True, help="Look at a base and its fine-tunes, and say which methods fit, and why.")
@json_option
def methods_command(names: tuple[str, ...], advise: bool, as_json: bool) -> None:
    """List the merge methods, or explain one, or (--advise) say which fit these models."""
    from merging.method import method, methods

    if advise:
        _print_advice(names, as_json=as_json)
        return
    if len(names) > 1:
        raise click.UsageError("name one method, or add --advise to give models")
    if names:
        chosen = method(names[0])
        rows = {
            parameter.name: {
                "default": None if parameter.required else parameter.default,
                "required": parameter.required,
                "meaning": parameter.doc,
            }
            for parameter in chosen.parameters.values()
        }
        if as_json:
            print_json(facts(chosen.name) | {"parameters": rows, "doc": inspect.getdoc(chosen.start)})
            return
        click.echo(f"{chosen.name} ({chosen.role}, works on {chosen.space}s; {chosen.paper})\n")
        click.echo(inspect.getdoc(chosen.start))
        return
    found = [facts(key) for key in methods()]
    if as_json:
        print_json(found)
        return
    print_table(
        ["method", "role", "paper", "data", "passes", "statistics", "what it does"],
        [[f["name"], f["role"], f["paper"], f["data"], f["passes"], f["statistics"], f["summary"]] for f in found],
    )


def _print_advice(models: tuple[str, ...], *, as_json: bool) -> None:
    from dataclasses import asdict

    from merging.advise import advise

    if len(models) < 2:
        raise click.UsageError("--advise needs a base and at least one model: taskvec methods --advise BASE MODEL...")
    found = advise(models[0], list(models[1:]))
    if as_json:
        print_json([asdict(finding) for finding in found])
        return
    for finding in found:
        place = "" if finding.rank is None else f"{finding.rank}. "
        click.echo(f"{finding.verdict:8} {place}{finding.text} [{finding.source}]")


def facts(name: str) -> dict[str, object]:
    """A line of the catalogue."""
    from merging.method import method

    chosen = method(name)
    return {
        "name": chosen.name,
        "role": chosen.role,
        "paper": chosen.paper,
        "space": chosen.space,
        "data": chosen.data,
        "passes": chosen.passes,
        "statistics": chosen.statistics,
        "cost": chosen.cost,
        "tasks": chosen.tasks,
        "summary": chosen.summary,
    }
