"""`taskvec learn dam` and `taskvec evaluate security`."""

from typing import Any

import click

from merging.commands.output import json_option, print_json, print_table, say


@click.command("dam")
@click.argument("config", type=click.Path())
@click.argument("out", type=click.Path())
@json_option
def learn_dam(config: str, out: str, as_json: bool) -> None:
    """Learn masks that merge models with less of a backdoor (DAM) by CONFIG, and save them as OUT.

    Needs unlabelled inputs of every task. It lowers risk and certifies nothing.
    """
    from merging.learn.dam_file import DamFile, coefficients_beside
    from merging.learn.dam_file import learn_dam as run

    result = run(DamFile.load(config), out)
    coefficients = result.coefficients.tolist()
    file = str(coefficients_beside(out)) if result.coefficients.ndim == 2 else None
    facts: dict[str, Any] = {
        "out": out,
        "tasks": list(result.tasks),
        "coefficients": coefficients,
        "coefficients_file": file,
        "steps": len(result.history),
        "suspected": [{"task": task, "class": target} for task, target in suspected(result.triggers)],
        "scan": result.scan,
        "warnings": result.warnings,
    }
    for warning in result.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json(facts)
        return
    if result.scan:
        rows = []
        for task, shares in result.scan.items():
            top = max(shares, key=lambda target: shares[target])
            flagged = ", ".join(str(target) for own, target in suspected(result.triggers) if own == task)
            rows.append([task, top, f"{100 * shares[top]:.0f} %", flagged or "none"])
        print_table(["task", "easiest class", "inputs a small trigger sends there", "suspected classes"], rows)
    weights = f"coefficients: {file}"
    if file is None:
        pairs = ", ".join(f"{task}: {value:g}" for task, value in zip(result.tasks, coefficients, strict=True))
        weights = f"weights of the tasks {pairs}"
    say(f"Masks in {out}. Apply them with a recipe: method: task_arithmetic, masks: {out}, {weights}")


def suspected(triggers: Any) -> list[tuple[str, int]]:
    """Task and class of every inverted trigger, once each."""
    return sorted({(trigger.task, trigger.target) for trigger in triggers})


@click.group("evaluate")
def evaluate() -> None:
    """Evaluate merged models."""


@evaluate.command("security")
@click.argument("config", type=click.Path())
@click.option("--plot", type=click.Path(), help="Write a picture: accuracy against attack success.")
@json_option
def security(config: str, plot: str | None, as_json: bool) -> None:
    """Accuracy, attack success and flips of merged models by CONFIG, beside the plain merge at every λ."""
    from merging.learn.dam_file import SecurityFile, evaluate_security
    from merging.learn.security import check_picture

    if plot is not None:
        check_picture(plot)
    report = evaluate_security(SecurityFile.load(config))
    if plot is not None:
        report.plot(plot)
    if as_json:
        print_json(report.as_dict())
        return
    click.echo(report.table())
