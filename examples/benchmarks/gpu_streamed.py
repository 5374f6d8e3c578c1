"""Merging checkpoints from disk on a GPU, beside what the disk (or page cache), the bus and the writing cost alone.

    python examples/benchmarks/gpu_streamed.py FOLDER [--hidden 1024 --layers 24] [--tasks 8] [--json FILE]

Builds a Llama-shaped bf16 zoo in FOLDER (0.37 B parameters by default) or finds it there, reads it once, and times whole merges, from a
recipe to the finished folder, in turns. Floors of the same run: reading all inputs into pinned memory with as many
threads, copying as many bytes to the card, writing as many bytes as the result has and making them durable.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from merging import Recipe, merge
from taskvec.sweep import Progress

PIECE = 8 << 20


def shapes(hidden: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    inner = hidden * 11 // 4
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        found |= {f"{prefix}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        found |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    found["model.norm.weight"] = (hidden,)
    found["lm_head.weight"] = (vocabulary, hidden)
    return found


def build(folder: Path, hidden: int, layers: int, tasks: int, vocabulary: int = 32000) -> list[Path]:
    draw = torch.Generator("cuda").manual_seed(0)
    tensors = shapes(hidden, layers, vocabulary)
    paths = [folder / "base", *(folder / f"tuned-{task}" for task in range(tasks))]
    if all((path / "config.json").is_file() for path in paths):
        return paths
    base = {n: (torch.randn(s, device="cuda", generator=draw) * 0.02).bfloat16() for n, s in tensors.items()}
    for path in paths:
        if (path / "config.json").is_file():
            continue
        path.mkdir(parents=True, exist_ok=True)
        model = base
        if path.name != "base":
            model = {
                n: (w + 5e-4 * torch.randn(w.shape, device="cuda", generator=draw)).bfloat16() for n, w in base.items()
            }
        save_file({n: w.cpu() for n, w in model.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return paths


def reading(paths: list[Path], threads: int) -> float:
    """Seconds to read all weights into pinned memory."""
    files = [path / "model.safetensors" for path in paths]
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, PIECE)]
    opened = {file: os.open(file, os.O_RDONLY) for file in files}
    buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True).numpy().data for _ in range(threads)]

    def read(thread: int) -> None:
        for file, start in pieces[thread::threads]:
            os.preadv(opened[file], [buffers[thread]], start)

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    spent = time.perf_counter() - start
    for descriptor in opened.values():
        os.close(descriptor)
    return spent


def copying(size: int) -> float:
    """Seconds to bring that many bytes to the card from pinned memory."""
    here = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    there.copy_(here)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(4):
        there.copy_(here, non_blocking=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * size / (4 << 28)


def writing(folder: Path, size: int, threads: int) -> float:
    """Seconds to write that many bytes with as many threads, and to make them durable."""
    content = memoryview(torch.randint(0, 255, (PIECE,), dtype=torch.uint8).numpy().data)
    path = folder / "floor"
    start = time.perf_counter()
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def write(thread: int) -> None:
        for at in range(thread * PIECE, size, threads * PIECE):
            os.pwrite(descriptor, content[: min(PIECE, size - at)], at)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(threads)))
    os.fsync(descriptor)
    os.close(descriptor)
    spent = time.perf_counter() - start
    path.unlink()
    return spent


def medians(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The median of each run's own seconds, in turns; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            spent = run()
            if turn or "cpu" in name:
                times[name].append(spent)
            if "cpu" in name and turn:
                times[name] = times[name][:1]
    return {name: round(statistics.median(spent), 4) for name, spent in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties", "pcb"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpu", action="store_true", help="also on the CPU, once")
    arguments = parser.parse_args()
    paths = build(arguments.folder, arguments.hidden, arguments.layers, arguments.tasks)
    threads = len(os.sched_getaffinity(0))
    size = (paths[0] / "model.safetensors").stat().st_size
    reading(paths, threads)
    os.sync()
    floors = {
        "read": min(reading(paths, threads) for _ in range(2)),
        "copy": copying(size * len(paths)),
        "write": min(writing(arguments.folder, size, threads) for _ in range(2)),
    }
    slowest = max(floors.values())

    parts: dict[str, dict[str, float]] = {}

    def run(method: str, device: str) -> float:
        """Seconds of one merge; when each of its passes had begun and ended, in seconds from its start, goes to `parts`."""
        shutil.rmtree(arguments.folder / "out", ignore_errors=True)  # another's clean-up is no part of a merge
        os.sync()
        began = time.perf_counter()
        seen: dict[str, list[float]] = {}

        def progress(told: Progress) -> None:
            now = time.perf_counter() - began
            seen.setdefault(f"{told.label} {told.step}", [now, now])[1] = now

        recipe = Recipe.from_data(
            {
                "base": str(paths[0]),
                "method": method,
                "tasks": [{"path": str(path)} for path in paths[1:]],
                "device": device,
            },
            where="benchmark",
        )
        merge(recipe, arguments.folder / "out", progress=progress)
        whole = time.perf_counter() - began
        parts[f"{method}, {device}"] = {
            **{
                f"{label}, {end}": round(at, 3) for label, ends in seen.items() for end, at in zip(("from", "to"), ends)
            },
            "end": round(whole, 3),
        }
        return whole

    devices = ["cuda", "cpu"] if arguments.cpu else ["cuda"]
    spent = medians(
        {
            f"{method}, {device}": lambda method=method, device=device: run(method, device)  # type: ignore[misc]
            for device in devices
            for method in arguments.methods
        },
        arguments.repeats,
    )
    result = {
        "card": torch.cuda.get_device_name(),
        "parameters": size // 2,
        "threads": threads,
        "floors_s": floors,
        "merges_s": spent,
        "last_run_s": parts,
        "times_the_slowest_floor": {name: round(s / slowest, 2) for name, s in spent.items()},
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
