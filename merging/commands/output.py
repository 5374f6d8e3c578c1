"""How commands speak: tables and JSON on stdout, progress and messages on stderr."""

import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from taskvec.sweep import Progress


def say(message: str) -> None:
    """A message for people, on stderr."""
    click.echo(message, err=True)


def print_json(value: Any) -> None:
    """A result for programs, on stdout. Infinities and NaN become null, which JSON can carry."""
    click.echo(json.dumps(_finite(value), indent=2, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """A table on stdout; numbers stand on the right."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False)
    table = Table(title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
    for index, header in enumerate(headers):
        numeric = all(isinstance(row[index], int | float) for row in rows) and bool(rows)
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell_text(cell) for cell in row))
    console.print(table)


def cell_text(cell: Any) -> str:
    """A number with the digits that matter."""
    if isinstance(cell, bool) or cell is None:
        return {True: "yes", False: "no", None: "-"}[cell]
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)


@contextmanager
def progress_bar(unit_bytes: int = 4) -> "Iterator[Callable[[Progress], None]]":
    """Progress on stderr: a bar in a terminal, a plain line every ten seconds elsewhere.

    Args:
        unit_bytes: bytes that one element stands for in the figures shown.
    """
    if not sys.stderr.isatty():
        yield _plain_lines(unit_bytes)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bars: dict[int, Any] = {}
    lock = threading.Lock()
    with Bars(*columns, console=Console(stderr=True), transient=True) as shown:

        def update(event: "Progress") -> None:
            with lock:
                if event.step not in bars:
                    bars[event.step] = shown.add_task(
                        f"pass {event.step}: {event.label}", total=event.total * unit_bytes
                    )
                shown.update(bars[event.step], completed=event.done * unit_bytes)

        yield update


def _plain_lines(unit_bytes: int) -> "Callable[[Progress], None]":
    began: dict[int, float] = {}
    last = seen = time.monotonic()
    lock = threading.Lock()

    def update(event: "Progress") -> None:
        nonlocal last, seen
        with lock:
            now = time.monotonic()
            start = began.setdefault(event.step, seen)  # a pass begins when the one before it was last heard of
            seen = now
            if now - last < 10:
                return
            last = now
        speed = event.done * unit_bytes / max(now - start, 1e-3)
        left = (event.total - event.done) * unit_bytes / max(speed, 1e-9)
        share = event.done / max(event.total, 1)
        say(f"pass {event.step}, {event.label}: {share:.0%}, {speed / 1e6:.0f} MB/s, {left:.0f} s left")

    return update


@contextmanager
def uncollected() -> Iterator[None]:
    """Imports without a search for garbage, of which they make none: 0.1 s less of a start with torch.

    What was imported is not looked at again either; it stays to the end.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
