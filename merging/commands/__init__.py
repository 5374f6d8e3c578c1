"""The command line: each command parses, calls one function, prints.

Commands are imported when they are called, and heavy libraries inside them, so that `taskvec --help` answers at once.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from types import FrameType
from typing import Any

import click

# command -> module, attribute, help line (kept here so that the listing imports nothing)
_COMMANDS: dict[str, tuple[str, str, str]] = {
    "merge": ("merge", "merge_command", "Merge models by a recipe or by flags."),
    "check": ("merge", "check", "Report every problem of a recipe, and what it would cost; read headers only."),
    "convert": ("merge", "convert", "Turn a mergekit recipe into ours."),
    "methods": ("catalogue", "methods_command", "List the merge methods, or explain one."),
    "diff": ("vectors", "diff", "Make the task vector of a fine-tuned model."),
    "apply": ("vectors", "apply", "Add a task vector or an adapter to a base."),
    "extract-lora": ("vectors", "extract_lora_command", "Turn a fine-tuned model into a LoRA adapter of its base."),
    "inspect": ("look", "inspect_command", "Show what a checkpoint, adapter or task vector holds."),
    "compare": ("look", "compare", "Compare fine-tunes of one base, layer by layer."),
    "verify": ("look", "verify_command", "Check a merged model against its provenance."),
    "learn": ("learn", "learn", "Learn coefficients or masks with data; collect statistics."),
    "coefficients": ("learn", "coefficients", "Show learned coefficients."),
    "evaluate": ("dam", "evaluate", "Evaluate merged models; security reports."),
    "edit": ("edit", "edit", "Correct chosen answers of a language model; list and undo edits."),
    "audit": ("audit", "audit", "Look for planted edits in a checkpoint."),
    "demo": ("demo", "demo", "The whole story on a small zoo that it builds itself, offline."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (module, _, _) in _COMMANDS.items() if _is_there(module)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS or not _is_there(_COMMANDS[cmd_name][0]):
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command = getattr(import_module(f"merging.commands.{module}"), attribute)
        return command if isinstance(command, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][2]) for name in self.list_commands(ctx)])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        from taskvec.errors import did_you_mean

        if args and args[0] not in self.list_commands(ctx):
            raise click.UsageError(
                f"no such command {args[0]!r}." + did_you_mean(args[0], self.list_commands(ctx)), ctx
            )
        return super().resolve_command(ctx, args)


def _is_there(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(f"merging.commands.{module}") is not None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="taskvec")
def cli() -> None:
    """Merge fine-tuned models and work with task vectors: exact, in bounded memory, with an audit trail.

    Results go to stdout (--json for programs), progress and messages to stderr. Exit codes: 0 done, 1 refused with a
    report, 2 wrong usage.
    """


class Ended(KeyboardInterrupt):
    """A signal asked for the end.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def _heed(number: int, frame: FrameType | None) -> None:
    """Ends in good order: locks go, finished shards stay for `--resume`.

    While modules load at the start there is nothing to tidy, and an exception would be lost in a callback of the
    import system, or abort the process in the midst of torch's C++.
    """
    while frame is not None and "importlib._bootstrap" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is not None and threading.active_count() == 1:  # whoever writes has a thread
        with suppress(OSError):
            os.write(2, b"interrupted before anything was begun\n")
        os._exit(128 + number)
    raise Ended(number)


def _standard_streams() -> None:
    """Makes streams of those that were closed, lest a weight file be opened in their place and written into by whoever
    writes messages; and lets a path that is no text, or that the terminal cannot show, be printed with escapes.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run() -> None:
    """The console script: `main`, then out at once; taking torch apart at exit would cost another 0.3 s."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _heed)
    _standard_streams()
    code: str | int | None = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    if isinstance(code, str):
        sys.exit(code)
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    # what trains may have processes and communicators of its own to end in good order
    if sys.argv[1:2] and sys.argv[1] in ("learn", "evaluate", "demo", "edit"):
        sys.exit(code)
    os._exit(code or 0)


def main(args: list[str] | None = None) -> None:
    """Runs the command line; turns our errors into messages and exit codes."""
    from taskvec.errors import TaskvecError, UsageError

    given = sys.argv[1:] if args is None else args
    as_json = "--json" in given
    try:
        cli.main(args=given, prog_name="taskvec", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show(sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as stop:
        click.echo("interrupted; no output was left under its final name", err=True)
        sys.exit(128 + getattr(stop.__cause__ or stop, "number", signal.SIGINT))
    except TaskvecError as error:
        if as_json:
            import json

            problems = list(getattr(error, "problems", ())) or [str(error)]
            click.echo(json.dumps({"error": type(error).__name__, "message": str(error), "problems": problems}))
        click.echo(f"error: {error}", err=True)
        for note in getattr(error, "__notes__", ()):
            click.echo(note, err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:
        sys.exit(0)
    except (OSError, MemoryError, RecursionError) as error:
        text = _of_the_machine(error)
        if as_json:
            import json

            click.echo(json.dumps({"error": type(error).__name__, "message": text, "problems": [text]}))
        click.echo(f"error: {text}", err=True)
        sys.exit(1)


def _of_the_machine(error: OSError | MemoryError | RecursionError) -> str:
    """What the system refused, as a sentence: no traceback tells a user more."""
    if isinstance(error, MemoryError):
        return "the memory of this machine is used up. Give a smaller budget (--memory), or fewer workers."
    if isinstance(error, RecursionError):
        return "the input is nested too deeply to be read."
    reason = error.strerror or str(error) or type(error).__name__
    reason = f"{reason[:1].lower()}{reason[1:]}."
    if error.filename is None:  # standard output, for instance, which is full when the merge is done
        return reason
    return f"{error.filename}: {reason} Nothing was left under the output's final name."
