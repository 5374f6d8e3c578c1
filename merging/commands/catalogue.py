"""`taskvec methods`."""

import inspect

import click

from merging.commands.output import json_option, print_json, print_table


@click.command("methods")
@click.argument("name", required=False)
@click.option("--advise", nargs=2, multiple=True, hidden=True, expose_value=False)
@json_option
def methods_command(name: str | None, as_json: bool) -> None:
    """List the merge methods, or explain one."""
    from merging.method import method, methods

    if name is not None:
        chosen = method(name)
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
