"""`taskvec inspect`, `compare` and `verify`."""

from dataclasses import asdict
from typing import Any

import click

from merging.commands.output import json_option, print_json, print_table, progress_bar


@click.command("inspect")
@click.argument("path")
@click.option("--base", help="The base, for an adapter.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--hash", "hashes", is_flag=True, help="Also the content hash (reads everything).")
@json_option
def inspect_command(path: str, base: str | None, tensors: bool, hashes: bool, as_json: bool) -> None:
    """Show what a checkpoint, an adapter or a task vector holds. Reads headers only."""
    from taskvec import Checkpoint, TaskVector
    from taskvec.adapter import is_adapter
    from taskvec.checkpoint import content_hash
    from taskvec.errors import NotAModelError
    from taskvec.precision import dtype_name
    from taskvec.sizes import bytes_text
    from taskvec.vector import is_task_vector

    if is_adapter(path):
        if base is None:
            raise NotAModelError(
                f"{path}: a PEFT adapter; name the base it was trained on (--base) to see what it changes"
            )
        source: Any = TaskVector.from_adapter(Checkpoint.open(base), path)
        kind = "adapter"
    else:
        source = Checkpoint.open(path)
        kind = "task vector" if is_task_vector(source) else "checkpoint"
    dtypes: dict[str, int] = {}
    for info in source.infos.values():
        dtypes[dtype_name(info.dtype)] = dtypes.get(dtype_name(info.dtype), 0) + info.numel
    facts: dict[str, Any] = {
        "path": path,
        "kind": kind,
        "model_type": getattr(source, "config", {}).get("model_type"),
        "tensors": len(source.infos),
        "parameters": sum(info.numel for name, info in source.infos.items() if name not in source.aliases),
        "bytes": sum(info.nbytes for info in source.infos.values()),
        "dtypes": dtypes,
        "tied": dict(source.aliases),
        "files": [file.name for file in getattr(source, "files", ())],
        "companions": [file.name for file in getattr(source, "companions", ())],
        "metadata": {
            key: value if len(value) < 200 else f"({len(value)} characters)"
            for key, value in getattr(source, "metadata", {}).items()
        },
    }
    if hashes:
        facts["content_hash"] = content_hash(source)
    listed = [
        {"name": name, "shape": list(info.shape), "dtype": dtype_name(info.dtype), "bytes": info.nbytes}
        for name, info in source.infos.items()
    ]
    if as_json:
        print_json(facts | ({"tensor_list": listed} if tensors else {}))
        return
    for key, value in facts.items():
        if value not in (None, {}, []):
            click.echo(
                f"{key:14} {bytes_text(value) if key == 'bytes' else ', '.join(map(str, value)) if isinstance(value, list) else value}"
            )
    if tensors:
        print_table(["tensor", "shape", "dtype", "bytes"], [list(item.values()) for item in listed])


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--base", required=True, help="The model that all were tuned from.")
@click.option("--plot", metavar="FILE.png|.svg", help="Draw a picture of it.")
@click.option("--no-subspaces", is_flag=True, help="Leave out the singular subspaces (faster).")
@json_option
def compare(models: tuple[str, ...], base: str, plot: str | None, no_subspaces: bool, as_json: bool) -> None:
    """Compare fine-tunes of one base, layer by layer: norms, cosines, sign conflicts, sparsity, shared subspaces."""
    from merging.compare import compare_models, plot_comparison
    from merging.recipe import Recipe
    from taskvec import Checkpoint
    from taskvec.adapter import Adapter, is_adapter

    labels = [spec.label for spec in Recipe(tasks=list(models), method="average", base=base).tasks]  # type: ignore[arg-type]
    origin = Checkpoint.open(base)
    sources: dict[str, Any] = {}
    for label, path in zip(labels, models):
        sources[label] = Adapter.open(path, origin) if is_adapter(path) else Checkpoint.open(path)
    deltas = [label for label, path in zip(labels, models) if is_adapter(path)]
    rows = compare_models(origin, sources, deltas=deltas, subspaces=not no_subspaces)
    if plot is not None:
        plot_comparison(rows, labels, plot)
    if as_json:
        print_json({"tasks": labels, "layers": [asdict(row) for row in rows]})
        return
    count = len(labels)
    table = []
    for row in rows:
        cosines = [row.cosines[i][j] for i in range(count) for j in range(i + 1, count)]
        table.append(
            [
                row.name,
                *row.norms,
                sum(row.relative) / count,
                *([min(cosines), max(cosines)] if cosines else [None, None]),
                row.conflict,
                sum(row.sparsity) / count,
                row.overlap,
            ]
        )
    print_table(
        [
            "layer",
            *(f"norm {label}" for label in labels),
            "norm/base",
            "min cos",
            "max cos",
            "sign conflict",
            "zeros",
            "overlap",
        ],
        table,
    )


@click.command("verify")
@click.argument("path")
@click.option("--deep", is_flag=True, help="Also make it again from its recipe and compare bit for bit.")
@json_option
def verify_command(path: str, deep: bool, as_json: bool) -> None:
    """Check a merged model or adapter against its provenance: re-hash it, or (--deep) make it again and compare bit for bit."""
    from taskvec.adapter import is_adapter

    if is_adapter(path):
        from merging.adapter_out import verify_adapter

        result = verify_adapter(path, deep=deep)
    else:
        from merging.streamed import verify

        with progress_bar() as progress:
            result = verify(path, deep=deep, progress=progress)
    if as_json:
        print_json({"ok": True, **result})
    else:
        click.echo(
            f"{path}: {result['tensors']} tensors in {result['files']} files are as recorded"
            + (", and come out the same again" if deep else "")
        )
