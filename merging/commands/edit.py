"""`taskvec edit`: correct chosen answers of a language model; list, apply and undo edits."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

_LAYER = click.option("--layer", type=int, help="Layer to edit. Default: chosen by the metric on --corpus.")
_THETA = click.option(
    "--theta", type=float, help="Half-width of the cone in cosine. Default: the smallest above the rounding noise."
)
_CORPUS = click.option(
    "--corpus",
    type=click.Path(exists=True, dir_okay=False),
    help="Other text, UTF-8; paragraphs (blank lines between) are separate. Default: Python's own manual.",
)
_CHAT = click.option("--chat", is_flag=True, help="Prompts are a user's turns in the tokenizer's chat template.")
_DTYPE = click.option("--dtype", help="Edit the model cast to this dtype (default: as it is stored).")
_DEVICE = click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace OUT.")


@click.group()
def edit() -> None:
    """Correct chosen answers of a language model by single neurons; list, apply and undo such edits."""


def _making(command: Callable[..., None]) -> Callable[..., None]:
    """The options that both ways of making edits share."""
    for option in reversed(
        [
            click.option(
                "--edits", "edits", required=True, help="JSONL file, a line an edit: {prompt, target, paraphrases}."
            ),
            _LAYER,
            _THETA,
            click.option("--response", type=float, help="Pre-activation at the trigger. Default: 50, 16 on a plateau."),
            _CORPUS,
            click.option("--protect", type=click.Path(exists=True), help="Prompts, one a line, that must not change."),
            click.option("--steps", type=click.IntRange(1), default=60, show_default=True, help="Optimiser steps."),
            click.option("--lr", type=float, default=0.3, show_default=True, help="Optimiser step size."),
            click.option("--decay", type=float, default=0.02, show_default=True, help="Weight of the change's size."),
            click.option(
                "--clamp", type=float, default=4.0, show_default=True, help="Largest change, in stream norms."
            ),
            click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Edits at a time."),
            _CHAT,
            _DTYPE,
            _DEVICE,
            _OVERWRITE,
            _JSON,
        ]
    ):
        command = option(command)
    return command


@edit.command()
@click.argument("model")
@click.argument("out", type=click.Path())
@click.option(
    "--form",
    type=click.Choice(["auto", "widen", "in-place"]),
    default="auto",
    show_default=True,
    help="auto: widen where it is exact, else in place (`edit auto` chooses among all forms).",
)
@click.option("--detector", default="auto", show_default=True, help="auto, affine, tangent, surrogate or contrast.")
@click.option(
    "--neuron",
    default="auto",
    show_default=True,
    help="In place: auto, quietest, least-used, least-missed or an index.",
)
@click.option(
    "--file-only", is_flag=True, help="OUT is a file of edits, to be applied later; no checkpoint is written."
)
@click.option("--compat", type=click.Choice(["authors"]), help="Make the edit as the authors' code does (in place).")
@_making
def stealth(
    model: str,
    out: str,
    form: str,
    detector: str,
    neuron: str,
    file_only: bool,
    compat: str | None,
    edits: str,
    as_json: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Make stealth edits of MODEL and write the edited checkpoint (with its edits) to OUT."""
    from merging.edits import edit_in_place, edit_widen, save_edits
    from merging.edits.edit import check_replaceable
    from merging.edits.requests import read_requests
    from taskvec.errors import UsageError

    in_place_only = "--compat" if compat else "--neuron" if neuron != "auto" else None
    if form == "widen" and in_place_only:
        raise UsageError(f"{in_place_only}: goes with --form in-place; widening replaces no neuron.")
    requests = read_requests(edits)
    _check_place(out, [model, edits, options["corpus"], options["protect"]], overwrite)
    if file_only:
        check_replaceable(out)
    loaded, tokenizer, common = _prepared(model, options)
    if form == "auto":
        form = "in-place" if in_place_only else form_that_fits(loaded, common["layer"])
    if options["response"] is not None:
        common["response"] = options["response"]
    if form == "widen":
        made = edit_widen(loaded, requests, tokenizer, detector=detector, **common)
    else:
        chosen: Any = int(neuron) if neuron.isdecimal() else neuron
        authors: Any = compat
        made = edit_in_place(loaded, requests, tokenizer, detector=detector, neuron=chosen, compat=authors, **common)
    listed = made if isinstance(made, list) else [made]
    changing = [one for one in listed if not one.changes_nothing]
    if file_only:
        save_edits(listed, out)
    elif changing:
        _write_edited(model, listed, out, overwrite, options["dtype"])
    _print_edits([one.summary() for one in listed], as_json, _reasons(listed))
    if not file_only:
        _say_if_unchanged(changing)


@edit.command()
@click.argument("model")
@click.argument("out", type=click.Path())
@_making
def auto(model: str, out: str, edits: str, as_json: bool, overwrite: bool, **options: Any) -> None:
    """Make edits of MODEL in the form that fits its dtype, and say why.

    OUT is an edited checkpoint (plain neurons), or a jet-pack where neurons of that dtype would fire on other prompts.
    """
    from merging.edits import JetPack, edit_auto
    from merging.edits.requests import read_requests
    from taskvec.errors import UsageError

    requests = read_requests(edits)
    _check_place(out, [model, edits, options["corpus"], options["protect"]], overwrite)
    if options["response"] is not None:
        raise UsageError("--response: `auto` chooses it; take `stealth` or `jetpack` to set it.")
    loaded, tokenizer, common = _prepared(model, options)
    made = edit_auto(loaded, requests, tokenizer, **common)
    if isinstance(made, JetPack):
        if made.entries:
            made.save(out, overwrite=overwrite)
        _print_edits(_pack_rows(made), as_json, made.why)
        _say_if_unchanged(made.entries)
        return
    changing = [one for one in made if not one.changes_nothing]
    if changing:
        _write_edited(model, made, out, overwrite, options["dtype"])
    _print_edits([one.summary() for one in made], as_json, _reasons(made))
    _say_if_unchanged(changing)


@edit.command()
@click.argument("model")
@click.argument("out", type=click.Path())
@click.option("--fold", is_flag=True, help="Write a widened checkpoint with the block folded into it instead.")
@_making
def jetpack(model: str, out: str, fold: bool, edits: str, as_json: bool, overwrite: bool, **options: Any) -> None:
    """Make a jet-pack (side block) for MODEL with many edits and write it to the folder OUT."""
    from merging.edits import JetPack
    from merging.edits.edit import apply_edits
    from merging.edits.requests import read_requests
    from merging.edits.stealth import as_stored
    from taskvec.errors import UsageError

    requests = read_requests(edits)
    _check_place(out, [model, edits, options["corpus"], options["protect"]], overwrite)
    if fold and options["dtype"] is not None:
        raise UsageError("--fold with --dtype: convert the checkpoint first, then fold into it.")
    loaded, tokenizer, common = _prepared(model, options)
    loaded = as_stored(loaded, common.pop("dtype"))
    if options["response"] is not None:
        common["response"] = options["response"]
    pack = JetPack.fit(loaded, requests, tokenizer, to_fold=fold, **common)
    if fold and pack.entries:
        apply_edits(model, pack.fold(loaded), out, overwrite=overwrite)
    elif pack.entries:
        pack.save(out, overwrite=overwrite)
    _print_edits(_pack_rows(pack), as_json, pack.why)
    _say_if_unchanged(pack.entries)


@edit.command("list")
@click.argument("path")
@_JSON
def list_(path: str, as_json: bool) -> None:
    """List the edits of an edited checkpoint, a file of edits or a jet-pack."""
    from merging.edits import JetPack, load_edits
    from merging.edits.jetpack import DESCRIPTION

    if (Path(path) / DESCRIPTION).is_file():
        pack = JetPack.load(path)
        rows = _entry_rows(pack)
    else:
        rows = [one.summary() for one in load_edits(path)]
    _print_edits(rows, as_json)


@edit.command()
@click.argument("checkpoint")
@click.argument("edits")
@click.argument("out", type=click.Path())
@_OVERWRITE
@_JSON
def apply(checkpoint: str, edits: str, out: str, overwrite: bool, as_json: bool) -> None:
    """Apply a file of EDITS to CHECKPOINT, streamed, and write OUT."""
    from merging.edits.edit import apply_edits, record_of

    apply_edits(checkpoint, edits, out, overwrite=overwrite)
    _print_edits([one.summary() for one in record_of(out)], as_json)


@edit.command()
@click.argument("checkpoint")
@click.argument("out", type=click.Path())
@click.option("--edit", "which", multiple=True, help="Index or prompt of an edit; may be repeated. Default: all.")
@click.option("--edits", "file", help="The file of edits, if the checkpoint does not carry them.")
@_OVERWRITE
@_JSON
def undo(checkpoint: str, out: str, which: tuple[str, ...], file: str | None, overwrite: bool, as_json: bool) -> None:
    """Take edits out of CHECKPOINT, streamed and bit by bit, and write OUT."""
    from merging.edits.edit import record_of, undo_edits

    undo_edits(checkpoint, out, list(which) or None, edits=file, overwrite=overwrite)
    left = record_of(out)
    if as_json:
        click.echo(json.dumps({"left": [one.summary() for one in left]}, ensure_ascii=False))
    else:
        click.echo(f"{out}: {len(left)} edit{'s' * (len(left) != 1)} left")


@edit.command()
@click.argument("model")
@click.option("--prompts", "prompts", required=True, help="JSONL file as for edits; targets are not needed.")
@click.option("--others", type=click.Path(exists=True), help="Other prompts, one a line, to try the detectors on.")
@_LAYER
@_THETA
@_CORPUS
@_CHAT
@_DTYPE
@_DEVICE
@_JSON
def plan(
    model: str,
    prompts: str,
    others: str | None,
    as_json: bool,
    chat: bool,
    layer: int | None,
    theta: float | None,
    **options: Any,
) -> None:
    """Say before editing MODEL which layer, which kind, which theta, and what bound."""
    from merging.edits import plan_edits
    from merging.edits.requests import Request, read_requests

    requests = [Request(one.prompt, "x", one.paraphrases) for one in read_requests(prompts, need_target=False)]
    loaded, tokenizer = _load(model, options["dtype"], options["device"])
    found = plan_edits(
        loaded,
        requests,
        tokenizer,
        corpus=_corpus(options["corpus"]),
        layer=layer,
        theta=theta,
        prompts=_lines(others) if others else (),
        chat=chat,
    )
    click.echo(json.dumps(found.to_json(), ensure_ascii=False) if as_json else found.text())


@edit.command()
@click.argument("base")
@click.argument("edits")
@click.option("--prompts", "prompts", type=click.Path(exists=True), help="Other prompts, one a line.")
@click.option("--text", type=click.Path(exists=True), help="Held-out text. Default: the end of Python's own manual.")
@click.option("--neighbours", type=click.Path(exists=True), help="Prompts close to the edits', one a line.")
@click.option(
    "--paraphrases",
    type=click.Path(exists=True, dir_okay=False),
    help="JSONL file, {prompt, paraphrases}: other wordings hoped to work. Default: those that the edits were given.",
)
@click.option(
    "--tokens", type=click.IntRange(1), default=8, show_default=True, help="Length of compared continuations."
)
@_CHAT
@_DEVICE
@_JSON
def check(
    base: str,
    edits: str,
    prompts: str | None,
    text: str | None,
    neighbours: str | None,
    paraphrases: str | None,
    tokens: int,
    chat: bool,
    device: str,
    as_json: bool,
) -> None:
    """Measure EDITS (a file, an edited checkpoint or a jet-pack) on their BASE: success, side effects, bounds."""
    from merging.edits import JetPack, load_edits
    from merging.edits import check as checked
    from merging.edits.jetpack import DESCRIPTION
    from merging.edits.requests import read_requests

    wordings = None
    if paraphrases is not None:
        wordings = {str(one.prompt): one.paraphrases for one in read_requests(paraphrases, need_target=False)}
    held: Any = JetPack.load(edits) if (Path(edits) / DESCRIPTION).is_file() else load_edits(edits)
    dtype = held.dtype if isinstance(held, JetPack) else next((e.dtype for e in held), None)
    loaded, tokenizer = _load(base, dtype, device)
    report = checked(
        loaded,
        held,
        tokenizer,
        prompts=_lines(prompts) if prompts else (),
        text=_corpus(text) if text else _corpus(None)[-12:],
        neighbours=_lines(neighbours) if neighbours else (),
        paraphrases=wordings,
        tokens=tokens,
        chat=chat,
    )
    click.echo(json.dumps(report.to_json(), ensure_ascii=False) if as_json else report.text())


# -- pieces ------------------------------------------------------------------------------------------------------------


def _load(model: str, dtype: str | None, device: str) -> tuple[Any, Any]:
    """The model (in its stored dtype unless told otherwise) and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from merging.learn.atlas import device_named
    from taskvec.checkpoint import Checkpoint
    from taskvec.errors import NotAModelError, NotFoundError, UsageError, shortened
    from taskvec.precision import dtype_named

    place = device_named(device)
    if not Path(model).exists():
        # our own way to the hub says at once what is wrong; transformers tries five times for each of its files
        model = str(getattr(Checkpoint.open(model), "path", model))
    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise NotAModelError(f"{model}: no config.json; a folder that transformers can load is needed to edit a model.")
    # a file that is cut short, or a header that contradicts itself, is named here
    Checkpoint.open(model)
    # whatever goes wrong inside, for a caller it is one thing: these files are no such model
    try:
        loaded, seen = AutoModelForCausalLM.from_pretrained(
            model, dtype="auto" if dtype is None else dtype_named(dtype), output_loading_info=True
        )
    except Exception as error:
        raise NotFoundError(
            f"{model}: transformers cannot load it as a causal model ({_first_words(error)})."
        ) from error
    if seen["missing_keys"]:
        raise NotAModelError(
            f"{model}: no causal language model: {shortened(sorted(seen['missing_keys']))} of {type(loaded).__name__} "
            "are not in it and would be random numbers. A checkpoint with its language model head is needed."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise NotFoundError(
            f"{model}: no tokenizer that transformers can load, and prompts are texts ({_first_words(error)}). Put the model's "
            "tokenizer files beside its weights."
        ) from error
    try:
        if place.type == "meta":
            raise NotImplementedError("it holds no values")
        return loaded.to(place).eval(), tokenizer
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(f"--device {device}: a model does not run there ({_first_words(error)}).") from error


def _first_words(error: Exception, limit: int = 200) -> str:
    """The first line of somebody else's message; some go on to list everything that they know."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _prepared(model: str, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from merging.edits import Optimisation

    loaded, tokenizer = _load(model, None, options["device"])
    optimisation = Optimisation(
        steps=options["steps"],
        lr=options["lr"],
        decay=options["decay"],
        clamp=options["clamp"],
        batch=options["batch"],
    )
    common: dict[str, Any] = {
        "layer": options["layer"],
        "theta": options["theta"],
        "corpus": _corpus(options["corpus"]),
        "protect": _lines(options["protect"]) if options["protect"] else (),
        "optimisation": optimisation,
        "chat": options["chat"],
        "dtype": options["dtype"],
        "progress": lambda done, total: click.echo(f"{done} of {total} edits optimised", err=True),
    }
    return loaded, tokenizer, common


def _entry_rows(pack: Any) -> list[dict[str, Any]]:
    return [
        {
            "prompt": entry.prompt,
            "target": entry.target,
            "form": "jet-pack",
            "layer": pack.layer,
            "theta": pack.theta,
            "measured": dict(entry.measured),
        }
        for entry in pack.entries
    ]


def _pack_rows(pack: Any) -> list[dict[str, Any]]:
    return _entry_rows(pack) + [
        {"prompt": entry.prompt, "target": entry.target, "note": "The model gives this answer already.", "measured": {}}
        for entry in pack.skipped
    ]


def _say_if_unchanged(changing: Sequence[Any]) -> None:
    if not changing:
        click.echo("Every answer is right already; nothing was written.", err=True)


def _reasons(edits: Sequence[Any]) -> Sequence[str]:
    return next((one.measured["why"] for one in edits if one.measured.get("why")), ())


def _write_edited(model: str, edits: Sequence[Any], out: str, overwrite: bool, dtype: str | None) -> None:
    """Applies edits to the checkpoint they were made of: the stored one, or its cast."""
    import shutil

    from merging.edits.edit import apply_edits

    # edits of a cast model are applied to the cast model
    source = model if dtype is None else _cast_copy(model, dtype)
    try:
        apply_edits(source, edits, out, overwrite=overwrite)
    finally:
        if source != model:
            shutil.rmtree(Path(source).parent, ignore_errors=True)


def _cast_copy(model: str, dtype: str) -> str:
    """A copy of the checkpoint in another dtype, in a temporary folder."""
    from tempfile import mkdtemp

    from taskvec import Checkpoint, write
    from taskvec.precision import dtype_name, dtype_named

    source = Checkpoint.open(model)
    config = dict(getattr(source, "config", {}))
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype_name(dtype_named(dtype))
    folder = Path(mkdtemp()) / "cast"
    write(source, folder, dtype=dtype, files={"config.json": json.dumps(config, indent=2) + "\n"})
    return str(folder)


def _corpus(path: str | None) -> list[str]:
    """Paragraphs of a file, or Python's own manual, which every installation has."""
    if path is None:
        from pydoc_data.topics import topics

        return [text[:4000] for _, text in sorted(topics.items())]
    from merging.edits.requests import text_of
    from taskvec.errors import DataError

    # as a text file is read: a paragraph may end in \r\n\r\n as well
    found = [piece.strip() for piece in text_of(path).replace("\r\n", "\n").split("\n\n") if piece.strip()]
    if not found:
        raise DataError(f"{path}: holds no text.")
    return found


def _lines(path: str) -> list[str]:
    from merging.edits.requests import lines_of
    from taskvec.errors import DataError

    found = [line for _, line in lines_of(path)]
    if not found:
        raise DataError(f"{path}: holds no prompts; one a line is needed.")
    return found


def form_that_fits(model: Any, layer: int | None) -> str:
    """The form `widen` where it is exact and plain transformers loads the result, else `in-place`."""
    from merging.edits.site import Site
    from merging.edits.stealth import widening_of
    from taskvec.errors import EditError

    site = Site.find(model, 0 if layer is None else layer)
    if site.kind not in ("affine", "optional-bias"):
        return "in-place"
    try:
        widening_of(site, site.neurons + 1, site.kind == "optional-bias")
    except EditError:
        return "in-place"
    return "widen"


def _check_place(out: str, inputs: Sequence[str | None], overwrite: bool) -> None:
    """Refuses a place for the output before a model is loaded; no input is ever written to."""
    from taskvec.errors import UsageError
    from taskvec.writer import check_output

    if not out:
        raise UsageError("OUT: empty. Name the folder (or file) to be written.")
    check_output(Path(out), [Path(path) for path in inputs if path and Path(path).exists()], overwrite=overwrite)


def _print_edits(rows: Sequence[dict[str, Any]], as_json: bool, why: Sequence[str] = ()) -> None:
    for reason in why:
        click.echo(reason, err=True)
    if as_json:
        click.echo(json.dumps({"edits": list(rows)}, ensure_ascii=False))
        return
    for number, row in enumerate(rows):
        measured = row.get("measured", {})
        done = "" if "success" not in measured else "  done" if measured["success"] else "  NOT the greedy answer"
        click.echo(f"{number}  {row['prompt']!r} → {row['target']!r}{done}")
        details = [
            f"{key} {row[key]}" for key in ("form", "kind", "layer", "theta", "entries") if row.get(key) is not None
        ]
        if details:
            click.echo("   " + ", ".join(details))
        for place in row.get("places", ()):
            click.echo(f"   {place}")
        if row.get("note"):
            click.echo(f"   {row['note']}")
