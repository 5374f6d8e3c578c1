"""`taskvec audit`."""

from pathlib import Path

import click

from merging.commands.output import json_option, print_json


@click.command()
@click.argument("model")
@click.option("--base", help="The model it claims to come from: changes that stand out are then seen exactly.")
@click.option("--declared", multiple=True, metavar="FILE", help="An edit file; what it says is listed as declared.")
@click.option("--tokenizer", help="Tokenizer folder or hub id (default: the model's own, where it has one).")
@click.option(
    "--probe",
    metavar="FILE",
    help="Text, one passage a line; the model is loaded and its neurons' responses are measured.",
)
@click.option(
    "--exposure",
    metavar="FILE",
    help="Text, one passage a line: also measure how selective an edit could be in every layer (loads the model).",
)
@click.option("--plot", metavar="FILE.png|.svg", help="Draw all neurons and the suspects; exposure goes beside it.")
@click.option("--limit", default=20, show_default=True, help="Suspects shown; --json has all.")
@click.option("--strict", is_flag=True, help="Exit with 1 if there is an alarm, or NaN or infinity anywhere.")
@json_option
def audit(
    model: str,
    base: str | None,
    declared: tuple[str, ...],
    tokenizer: str | None,
    probe: str | None,
    exposure: str | None,
    plot: str | None,
    limit: int,
    strict: bool,
    as_json: bool,
) -> None:
    """Look for planted edits in the checkpoint MODEL.

    Reads the weights one MLP at a time and loads no model, unless --probe is given. Alarms are neurons that answer one
    narrow input direction and nothing else, or that changed out of proportion to their layer; edits declared in the
    model's own folder or by --declared are listed as such where the checkpoint holds exactly what they say.
    """
    from merging.edits.audit import audit as run

    texts = _passages(probe, "--probe") if probe is not None else None
    passages = _passages(exposure, "--exposure") if exposure is not None else None
    # text needs a tokenizer; naming a suspect's tokens is left to what the audit finds in the model's folder
    speller = tokenizer or (model if texts is not None or passages is not None else None)
    report = run(
        model,
        base=base,
        declared=declared,
        tokenizer=speller,
        probe=texts,
        progress=None if as_json else lambda key: click.echo(f"\rreading {key:<60.60}", nl=False, err=True),
    )
    if not as_json:
        click.echo("\r" + " " * 70 + "\r", nl=False, err=True)
    profile = None
    if passages is not None:
        from merging.edits.audit import loaded_tokenizer
        from merging.edits.plan import dimension_by_layer
        from merging.edits.responses import loaded_model

        profile = dimension_by_layer(loaded_model(model), passages, loaded_tokenizer(speller))
    if plot is not None:
        report.plot(plot)
        if profile is not None:
            profile.plot(Path(plot).with_stem(Path(plot).stem + "-exposure"))
    if as_json:
        print_json(report.to_json() | ({} if profile is None else {"exposure": profile.to_json()}))
    else:
        click.echo(report.text(limit))
        if profile is not None:
            click.echo("\n" + profile.table())
    if strict and (report.alarms or report.damaged):
        raise click.exceptions.Exit(1)


def _passages(path: str, option: str) -> list[str]:
    from merging.edits.requests import lines_of
    from taskvec.errors import DataError, NotFoundError

    if not Path(path).is_file():
        raise NotFoundError(f"{path}: no such file. {option} takes a text file, one passage a line.")
    passages = [line for _, line in lines_of(path)]
    if not passages:
        raise DataError(f"{path}: holds no text. {option} takes a text file, one passage a line.")
    return passages
