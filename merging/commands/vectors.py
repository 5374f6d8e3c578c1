"""`taskvec diff`, `apply` and `extract-lora`."""

from pathlib import Path
from typing import Literal

import click

from merging.commands.output import json_option, print_json, say


@click.command()
@click.argument("base")
@click.argument("tuned")
@click.argument("out")
@click.option(
    "--dtype", default="float32", show_default=True, help="float32 rebuilds the model exactly; half precision does not."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@json_option
def diff(base: str, tuned: str, out: str, dtype: str, overwrite: bool, as_json: bool) -> None:
    """Make the task vector TUNED - BASE and store it, with the base's content hash, as OUT."""
    import warnings

    from taskvec import Checkpoint, TaskVector
    from taskvec.adapter import is_adapter

    origin = Checkpoint.open(base)
    if is_adapter(tuned):
        vector = TaskVector.from_adapter(origin, tuned)
    else:
        vector = TaskVector.between(origin, Checkpoint.open(tuned))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = vector.save(out, dtype=dtype, overwrite=overwrite)
    for warning in caught:
        say(f"warning: {warning.message}")
    result = {"path": str(path), "tensors": len(vector.infos), "norm": vector.norm(), "base_hash": vector.base_hash}
    if as_json:
        print_json(result)
    else:
        click.echo(f"{path}: {result['tensors']} tensors, norm {result['norm']:.6g}")


@click.command()
@click.argument("base")
@click.argument("vector")
@click.argument("out")
@click.option("--scale", default=1.0, show_default=True, help="Factor for the task vector; negative removes it.")
@click.option("--dtype", help="Stored dtype (default: as the base stores each tensor).")
@click.option("--shard-size", default="5GB", show_default=True, help="Largest size of one file.")
@click.option("--force", is_flag=True, help="Also apply a vector that was made from another base.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@json_option
def apply(
    base: str,
    vector: str,
    out: str,
    scale: float,
    dtype: str | None,
    shard_size: str,
    force: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write BASE + scale * VECTOR as OUT. VECTOR is a stored task vector or a PEFT adapter."""
    from taskvec import Checkpoint, TaskVector, write
    from taskvec.adapter import is_adapter

    origin = Checkpoint.open(base)
    found = TaskVector.from_adapter(origin, vector) if is_adapter(vector) else TaskVector.load(vector)
    path = write(
        found.apply_to(origin, scale, force=force), Path(out), dtype=dtype, shard_size=shard_size, overwrite=overwrite
    )
    if as_json:
        print_json({"path": str(path), "scale": scale, "tensors": len(found.infos)})
    else:
        click.echo(f"{path}: {origin.label} + {scale:g} * {found.label}")


@click.command("extract-lora")
@click.argument("base")
@click.argument("tuned")
@click.argument("out")
@click.option("--rank", type=int, help="Rank of every factor.")
@click.option("--energy", type=float, help="Share of each tensor's squared norm to keep, in (0, 1].")
@click.option("--exact", is_flag=True, help="Keep the whole numerical rank of each tensor.")
@click.option(
    "--other",
    type=click.Choice(["refuse", "save", "drop"]),
    default="refuse",
    show_default=True,
    help="What to do with changed tensors that no LoRA can hold (norms, biases): save them whole, or drop them.",
)
@click.option("--skip", multiple=True, metavar="PATTERN", help="Tensors to leave out; may be repeated.")
@click.option("--dtype", default="float32", show_default=True, help="What the factors are stored in.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@json_option
def extract_lora_command(
    base: str,
    tuned: str,
    out: str,
    rank: int | None,
    energy: float | None,
    exact: bool,
    other: Literal["refuse", "save", "drop"],
    skip: tuple[str, ...],
    dtype: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn the fine-tuned model TUNED into a LoRA adapter OUT of its BASE."""
    from merging.adapter_out import extract_lora
    from taskvec import Checkpoint

    asked = [
        *([f"rank={rank}"] if rank is not None else []),
        *([f"energy={energy}"] if energy is not None else []),
        *(["exact"] if exact else []),
    ]
    if len(asked) != 1:
        raise click.UsageError("give one of --rank, --energy and --exact")
    report = extract_lora(
        Checkpoint.open(base),
        Checkpoint.open(tuned),
        out,
        rank=asked[0],
        other=other,
        skip=skip,
        dtype=dtype,
        overwrite=overwrite,
    )
    print_json(report.as_dict()) if as_json else click.echo(str(report))
