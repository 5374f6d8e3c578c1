"""Merging on the CPU, side by side: ours, mergekit (from its own environment), plain loops, and the floor.

    python examples/benchmarks/cpu.py --zoo DIR [--mergekit VENV] [--layers 24] [--runs 2] [--json]
    python examples/benchmarks/cpu.py --memory --zoo DIR          peak memory and time against model size
    python examples/benchmarks/cpu.py --charts DIR --zoo DIR       time and memory against model size and number of tasks
    python examples/benchmarks/cpu.py --in-memory                  PCB against the reference form, n = 8, d = 20 M
    python examples/benchmarks/cpu.py --passes --zoo DIR           each pass of PCB against bare loops (needs cc)

Every command is timed from process start to exit, in turn (A B A B), with the page cache warm; peak memory is that of
the whole process tree (resident pages, mapped files included), sampled every 20 ms. The floor reads all inputs once and
writes one model.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
from zoo import build, parameters

if TYPE_CHECKING:
    from torch import Tensor

METHODS = {
    # ours: method, flags; mergekit: method, parameters, with a base, models used
    "linear": (["-m", "average"], "linear", {}, False, 4),
    "task_arithmetic": (["-m", "task_arithmetic"], "task_arithmetic", {"weight": 1.0}, True, 4),
    "ties": (["-m", "ties", "-p", "density=0.2", "--statistics", "tensor"], "ties", {"weight": 1.0, "density": 0.2}, True, 4),
    "dare_ties": (
        ["-m", "ties", "-p", "density=1.0", "--preprocess", "dare:density=0.5", "--statistics", "tensor"],
        "dare_ties", {"weight": 1.0, "density": 0.5}, True, 4,
    ),
    "breadcrumbs": (
        ["-m", "breadcrumbs", "-p", "density=0.9", "-p", "gamma=0.01"],
        "breadcrumbs", {"weight": 1.0, "density": 0.9, "gamma": 0.01}, True, 4,
    ),
    "della": (["-m", "ties", "-p", "density=1.0", "--preprocess", "della:density=0.5,epsilon=0.1", "--statistics", "tensor"],
              "della", {"weight": 1.0, "density": 0.5, "epsilon": 0.1}, True, 4),
    "sce": (["-m", "sce", "-p", "density=0.5"], "sce", {"select_topk": 0.5}, True, 4),
    "model_stock": (["-m", "model_stock"], "model_stock", {}, True, 4),
    "karcher": (["-m", "karcher"], "karcher", {}, False, 4),
    "slerp": (["-m", "slerp", "-p", "t=0.4"], "slerp", {"t": 0.4}, None, 2),
    "nuslerp": (["-m", "nuslerp"], "nuslerp", {"weight": 1.0}, False, 2),
    "ties_global": (["-m", "ties", "-p", "density=0.2"], None, {}, True, 4),
    "pcb": (["-m", "pcb", "-p", "density=0.1"], None, {}, True, 4),
}  # fmt: skip


def tree_memory(pid: int) -> int:
    """Resident bytes of a process and its children."""
    total, todo = 0, [pid]
    while todo:
        current = todo.pop()
        try:
            with open(f"/proc/{current}/statm", encoding="ascii") as file:
                total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            with open(f"/proc/{current}/task/{current}/children", encoding="ascii") as file:
                todo += [int(child) for child in file.read().split()]
        except OSError:
            continue
    return total


def timed(command: list[str]) -> dict[str, float]:
    """Wall-clock and CPU seconds, and peak memory, of one command."""
    # packages that are installed come with compiled modules; those of a checkout are compiled by the first run
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    before = os.times()
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, tree_memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, err = process.communicate()
    wall = time.perf_counter() - began
    stop.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{err.decode()[-2000:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": wall, "cpu": cpu, "peak": peak}


def ours(flags: list[str], zoo: list[Path], base: bool | None, count: int, out: Path) -> list[str]:
    head = [sys.executable, "-m", "merging", "merge", *flags, "--overwrite"]
    tasks = zoo[1 : 1 + count] if base is not None else zoo[1:3]
    return [*head, *(["--base", str(zoo[0])] if base else []), str(out), *map(str, tasks)]


def theirs(
    method: str, given: dict[str, float], zoo: list[Path], base: bool | None, count: int, out: Path, venv: Path
) -> list[str]:
    per_model = {k: v for k, v in given.items() if k in ("weight", "density", "gamma", "epsilon")}
    top = {k: v for k, v in given.items() if k not in per_model}
    tasks = zoo[1 : 1 + count] if base is not None else zoo[1:3]
    config: dict[str, object] = {
        "merge_method": method, "dtype": "bfloat16", "parameters": top,
        "models": [{"model": str(path), "parameters": per_model or {"weight": 1.0}} for path in tasks],
    }  # fmt: skip
    if method in ("model_stock", "karcher", "sce", "slerp"):
        config["models"] = [{"model": str(path)} for path in tasks]
    if base:
        config["base_model"] = str(zoo[0])
    if base is None:
        config["base_model"] = str(tasks[0])
    recipe = out.with_suffix(".yml")
    recipe.write_text(json.dumps(config))
    return [
        str(venv / "bin" / "mergekit-yaml"),
        "--no-write-model-card",
        "--out-shard-size",
        "400M",
        str(recipe),
        str(out),
    ]


def floor(zoo: list[Path], out: Path) -> list[str]:
    reads = " ".join(f"{path}/*.safetensors" for path in zoo)
    return ["bash", "-c", f"cat {reads} > /dev/null; rm -rf {out}; cp -r {zoo[0]} {out}"]


def warm(zoo: list[Path]) -> None:
    for path in zoo:
        for file in path.glob("*.safetensors"):
            with file.open("rb") as handle:
                while handle.read(1 << 24):
                    pass


def paired(commands: dict[str, list[str]], runs: int, outs: list[Path]) -> dict[str, dict[str, float]]:
    """Runs the commands in turn; medians of time, largest peak."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            for out in outs:
                shutil.rmtree(out, ignore_errors=True)
            found[name].append(timed(command))
    return {
        name: {
            "wall": statistics.median(r["wall"] for r in results),
            "cpu": statistics.median(r["cpu"] for r in results),
            "peak": max(r["peak"] for r in results),
        }
        for name, results in found.items()
    }


def against_mergekit(arguments: argparse.Namespace) -> dict[str, object]:
    zoo = build(
        arguments.zoo / f"h{arguments.hidden}-l{arguments.layers}", hidden=arguments.hidden, layers=arguments.layers
    )
    outs = [arguments.zoo / "out-ours", arguments.zoo / "out-theirs", arguments.zoo / "out-floor"]
    warm(zoo)
    chosen = arguments.methods or list(METHODS)
    table: dict[str, object] = {"parameters": parameters(arguments.hidden, arguments.layers)}
    tiny = build(arguments.zoo / "tiny", hidden=64, layers=2, vocabulary=512)
    starts: dict[str, list[str]] = {
        "import torch": [sys.executable, "-c", "import torch"],
        "help": [sys.executable, "-m", "merging", "--help"],
        "tiny": ours(["-m", "average"], tiny, False, 4, outs[0]),
    }
    if arguments.mergekit:
        starts["tiny, mergekit"] = theirs("linear", {"weight": 1.0}, tiny, False, 4, outs[1], arguments.mergekit)
    table["start-up"] = paired(starts, arguments.runs, outs)
    for name in chosen:
        flags, method, given, base, count = METHODS[name]
        commands = {
            "floor": floor(zoo[: count + 1], outs[2]),
            "ours": ours([*flags, "--shard-size", "400MB"], zoo, base, count, outs[0]),
        }
        if method is not None and arguments.mergekit:
            commands["mergekit"] = theirs(method, given, zoo, base, count, outs[1], arguments.mergekit)
        result = paired(commands, arguments.runs, outs)
        table[name] = result
        print(line(name, result), flush=True, file=sys.stderr)
    return table


def line(name: str, result: dict[str, dict[str, float]]) -> str:
    mine = result["ours"]
    text = f"| {name} | {mine['wall']:.1f} s | {mine['cpu']:.1f} s | {mine['peak'] / 1e6:.0f} MB | {mine['wall'] / result['floor']['wall']:.1f} |"
    if "mergekit" in result:
        peer = result["mergekit"]
        text += f" {peer['wall']:.1f} s | {peer['peak'] / 1e6:.0f} MB | **{peer['wall'] / mine['wall']:.1f}x** | {mine['peak'] / peer['peak']:.2f} |"
    else:
        text += " - | - | - | - |"
    return text


def memory(arguments: argparse.Namespace) -> dict[str, object]:
    """Peak memory and time of whole-model TIES and PCB against model size, under one budget."""
    table: dict[str, object] = {}
    out = arguments.zoo / "out-ours"
    for hidden, layers in arguments.sizes:
        zoo = build(arguments.zoo / f"h{hidden}-l{layers}", hidden=hidden, layers=layers, shard="2GB")
        warm(zoo)
        commands = {
            name: ours([*METHODS[name][0], "--memory", arguments.budget], zoo, METHODS[name][3], 4, out)
            for name in ("linear", "ties_global", "pcb")
        }
        result = paired(commands, 1, [out])
        table[f"{parameters(hidden, layers) / 1e9:.2f} B"] = result
        for name, row in result.items():
            print(
                f"{parameters(hidden, layers) / 1e9:.2f} B {name}: {row['wall']:.1f} s, {row['peak'] / 1e6:.0f} MB",
                file=sys.stderr,
                flush=True,
            )
    return table


def charts(arguments: argparse.Namespace) -> dict[str, object]:
    """Time and peak memory against parameters (4 tasks) and against tasks (0.1 B), page cache warm; two pictures.

    Slopes leave start-up out: seconds for each further billion parameters, of ours, the floor and (linear) mergekit.
    """
    out = [arguments.zoo / name for name in ("out-ours", "out-theirs", "out-floor")]
    names = ("linear", "ties_global", "pcb")
    table: dict[str, dict[str, dict[str, dict[str, float]]]] = {"size": {}, "tasks": {}}

    def measure(axis: str, key: str, zoo: list[Path], tasks: int, peer: bool) -> None:
        warm(zoo)
        commands = {"floor": floor(zoo, out[2])}
        for name in names:
            commands[name] = ours(
                [*METHODS[name][0], "--memory", arguments.budget], zoo, METHODS[name][3], tasks, out[0]
            )
        if peer and arguments.mergekit:
            commands["mergekit linear"] = theirs(
                "linear", {"weight": 1.0}, zoo, False, tasks, out[1], arguments.mergekit
            )
        table[axis][key] = paired(commands, arguments.runs, out)
        print(
            axis,
            key,
            {n: (round(r["wall"], 1), round(r["peak"] / 1e6)) for n, r in table[axis][key].items()},
            file=sys.stderr,
            flush=True,
        )

    for hidden, layers in arguments.sizes:
        place = arguments.zoo / f"h{hidden}-l{layers}"
        kept = place.exists()
        measure("size", f"{parameters(hidden, layers) / 1e9:.3f}", build(place, hidden=hidden, layers=layers), 4, True)
        if not kept:
            shutil.rmtree(place)
    place = arguments.zoo / "many"
    many = build(place, hidden=640, layers=12, tasks=32)
    for tasks in (2, 4, 8, 16, 32):
        measure("tasks", str(tasks), many[: tasks + 1], tasks, False)
    shutil.rmtree(place)
    first, *_, last = table["size"]
    span = float(last) - float(first)
    slopes = {
        name: (table["size"][last][name]["wall"] - row["wall"]) / span for name, row in table["size"][first].items()
    }
    print("seconds for each further billion parameters:", {n: round(s, 2) for n, s in slopes.items()}, file=sys.stderr)
    draw(table, arguments.charts)
    return {**table, "slopes": slopes}


def draw(table: dict[str, dict[str, dict[str, dict[str, float]]]], folder: Path) -> None:
    """Two pictures: against model size, and against the number of tasks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for axis, label in (("size", "parameters (billions), 4 tasks"), ("tasks", "tasks, 0.1 B parameters")):
        rows = table[axis]
        x = [float(key) for key in rows]
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        for place, name in enumerate(dict.fromkeys(n for row in rows.values() for n in row)):
            style = {
                "marker": "o",
                "ms": 4,
                "color": f"C{place}",
                "ls": "--" if name in ("floor", "mergekit linear") else "-",
            }
            there = [(a, row[name]) for a, row in zip(x, rows.values()) if name in row]
            left.plot([a for a, _ in there], [r["wall"] for _, r in there], label=name.replace("_global", ""), **style)
            if name != "floor":
                right.plot(
                    [a for a, _ in there],
                    [r["peak"] / 1e9 for _, r in there],
                    label=name.replace("_global", ""),
                    **style,
                )
        for part, what in ((left, "seconds, process start to exit"), (right, "peak memory, GB")):
            part.set(xlabel=label, ylabel=what, ylim=(0, None), xlim=(0, None))
            part.grid(alpha=0.3)
            part.legend(frameon=False, fontsize=8)
        figure.savefig(folder / f"cpu_{axis}.svg")
        plt.close(figure)


def reference_pcb(vectors: "Tensor", ratio: float) -> "Tensor":
    """The authors' function as the specification describes it: clones, full sorts, whole-matrix temporaries."""
    import torch

    cloned = vectors.clone()
    count, numel = cloned.shape
    size = cloned.abs()
    ordered = torch.sort(size, 1).values
    low = ordered[:, int(numel * 1e-4), None]
    high = ordered[:, int(numel * (1 - 1e-4) - 1), None]
    clipped = torch.clamp(size, low, high)
    signed = torch.sign(cloned) * clipped
    lowest, highest = clipped.min(1, keepdim=True).values, clipped.max(1, keepdim=True).values
    intra = torch.exp(count * ((clipped - lowest) / (highest - lowest)) ** 2)
    inter = torch.tanh(cloned * cloned.sum(0))
    score = intra * inter
    ordered = torch.sort(score, 1).values
    score = torch.clamp(score, ordered[:, int(numel * (1 - ratio)), None], ordered[:, -1:])
    lowest, highest = score.min(1, keepdim=True).values, score.max(1, keepdim=True).values
    scale = (score - lowest) / (highest - lowest)
    return (signed * scale).sum(0) / torch.clamp(scale.sum(0), min=1e-12)


_IN_MEMORY = """
import sys, time, resource, torch
sys.path.insert(0, {here!r})
torch.manual_seed(0)
stack = torch.randn({tasks}, {numel}).mul_(1e-3)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if {which!r} == "ours":
    from merging import merge_stacks
    run = lambda: merge_stacks("pcb", {{"w": stack}}, density=0.1)["w"]
else:
    from cpu import reference_pcb
    run = lambda: reference_pcb(stack, 0.1)
began = time.perf_counter()
merged = run()
print(time.perf_counter() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024, float(merged.double().sum()))
"""


def in_memory(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """PCB in memory against the reference form: time, and peak memory beyond the input."""
    found: dict[str, list[list[float]]] = {"reference": [], "ours": []}
    for _ in range(arguments.runs):
        for which in found:
            code = _IN_MEMORY.format(here=str(Path(__file__).parent), tasks=8, numel=arguments.numel, which=which)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            found[which].append([float(value) for value in done.stdout.split()])
    result = {
        w: {"wall": statistics.median(r[0] for r in rows), "peak": max(r[1] for r in rows), "sum": rows[0][2]}
        for w, rows in found.items()
    }
    print(
        f"n = 8, d = {arguments.numel / 1e6:.0f} M: reference {result['reference']['wall']:.1f} s, {result['reference']['peak'] / 1e9:.2f} GB; "
        f"ours {result['ours']['wall']:.1f} s, {result['ours']['peak'] / 1e9:.2f} GB: {result['reference']['wall'] / result['ours']['wall']:.1f}x faster, "
        f"{result['ours']['peak'] / result['reference']['peak']:.3f} of the memory beyond the input", file=sys.stderr,
    )  # fmt: skip
    return result


_PASSES = """
import json, sys, time
from taskvec import ahead
ahead.begin({zoo!r})  # as the command does: inputs are hashed while torch loads
from merging import Recipe, merge
from taskvec import sweep
found, run = [], sweep._Sweep._parallel
def timed(self, items, work, label):
    began = time.perf_counter()
    run(self, items, work, label)
    found.append(time.perf_counter() - began)
sweep._Sweep._parallel = timed
recipe = {{"method": "pcb", "parameters": {{"density": 0.1}}, "base": {zoo!r}[0], "tasks": {zoo!r}[1:]}}
merged = merge(Recipe.from_data(recipe), {out!r}, overwrite=True)
print(json.dumps({{"passes": found, "facts": merged.provenance["statistics"]}}))
"""

_KERNELS = """
import json, sys, threading, time
import numpy as np, torch
from taskvec import Checkpoint, native
from taskvec.checkpoint import SEGMENT
from taskvec.deltas import ModelDeltas, Room, Task
from taskvec.native import CHUNK, Combination, Values
base, *tuned = [Checkpoint.open(path) for path in {zoo!r}]
numbers, tasks = json.loads({numbers!r}), len(tuned)
deltas = ModelDeltas(base, [Task(str(i), source) for i, source in enumerate(tuned)], list(base.infos))
low, high, cut, top = ([row[k] for row in numbers] for k in range(4))
ends = lambda *pairs: tuple(np.array([[pair[k] for pair in row] for row in zip(*pairs)], np.float32) for k in (0, 1))
around = lambda values: [(0.99 * value, 1.01 * value) for value in values]
sizes = ends([(value, value) for value in low], around(high), [(2 * value, np.inf) for value in high])
scores = ends(around(cut), [(0.9 * value, np.inf) for value in top])
size = max(1, (5 << 18) // (2 * (tasks + 1) * CHUNK)) * CHUNK
def one(kind, stored, room):
    if kind == 1: native.count(stored, Values("magnitude"), *sizes)
    elif kind == 2: native.count(stored, Values("pcb score", low, high), *scores)
    else:
        how = Combination("pcb", [1.0] * tasks, onto_base=True, keeps=[True] * tasks, low=low, high=high, cut=cut, top=top)
        native.merge(stored, how, room[: stored.count])
for kind in (1, 2, 3):
    items = iter([(n, s, min(s + SEGMENT, i.numel)) for n, i in base.infos.items() for s in range(0, i.numel, SEGMENT)])
    lock = threading.Lock()
    def work():
        room, out = Room.of(tasks, size), torch.empty(SEGMENT, dtype=torch.bfloat16)
        while True:
            with lock: item = next(items, None)
            if item is None: return
            one(kind, deltas.streamed(*item, size, room), out)
    threads = [threading.Thread(target=work) for _ in range({threads})]
    began = time.perf_counter()
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(time.perf_counter() - began)
"""


def passes(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Wall-clock time of PCB's three passes (the fastest run), in the engine and in two bare loops over the same files.

    `loop` is bare.c: a plain C loop that reads the tiles and computes the same of each entry, every score in full. `kernels`
    calls the engine's own compiled passes, and nothing else of it: no digests, norms, brackets that are kept, checks. Only
    the engine's third pass writes a model; `loop` writes as many bytes into one file, `kernels` none.
    """
    from taskvec import Checkpoint

    zoo = build(
        arguments.zoo / f"h{arguments.hidden}-l{arguments.layers}", hidden=arguments.hidden, layers=arguments.layers
    )
    warm(zoo)
    threads = len(os.sched_getaffinity(0))
    out, program, listing = (arguments.zoo / name for name in ("out-ours", "bare", "bare.txt"))
    source = Path(__file__).with_name("bare.c")
    flags = ["-Ofast", "-march=native", "-mprefer-vector-width=512"]
    subprocess.run(["cc", *flags, str(source), "-o", str(program), "-lm", "-lpthread"], check=True)

    def run(code: str) -> str:
        return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout

    def engine() -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)
        return json.loads(run(_PASSES.format(zoo=[str(path) for path in zoo], out=str(out))))

    facts = engine()["facts"]["pcb"]
    numbers = [
        [*facts["clip"][task], facts["threshold"][task], facts["largest score"][task]] for task in facts["clip"]
    ]  # fmt: skip
    models = [Checkpoint.open(path) for path in zoo]
    files = sorted({str(file) for path in zoo for file in path.glob("*.safetensors")})
    opened = {os.open(file, os.O_RDONLY): place for place, file in enumerate(files)}
    inodes = {os.fstat(fd).st_ino: place for fd, place in opened.items()}
    lines = [f"{len(zoo)} {len(files)} {len(models[0].infos)}", *files]
    for name, info in models[0].infos.items():
        extents = [extent for model in models if (extent := model.extent(name, 0, info.numel)) is not None]
        lines += [str(info.numel), *(f"{inodes[os.fstat(fd).st_ino]} {offset}" for fd, offset, _ in extents)]
    listing.write_text("\n".join([*lines, *(" ".join(map(repr, row)) for row in numbers)]) + "\n")
    rows: dict[str, list[list[float]]] = {"engine": [], "loop": [], "kernels": []}
    for _ in range(arguments.runs):
        rows["engine"].append(engine()["passes"])
        kernels = _KERNELS.format(zoo=[str(path) for path in zoo], numbers=json.dumps(numbers), threads=threads)
        rows["kernels"].append([float(line) for line in run(kernels).split()])
        command = [str(program), str(listing)]
        parts = [
            subprocess.run(
                [*command, str(k), str(threads), str(out) + ".bare"], capture_output=True, text=True, check=True
            )
            for k in (1, 2, 3)
        ]
        rows["loop"].append([float(part.stdout.split()[0]) for part in parts])
    table: dict[str, dict[str, float]] = {}
    for place, name in enumerate(("magnitudes", "scores", "merge")):
        # the fastest of each: where the machine's speed drifts from second to second, medians compare its moods
        row = {which: min(run[place] for run in found) for which, found in rows.items()}
        table[name] = {
            **row,
            "over the loop": row["engine"] / row["loop"],
            "over kernels": row["engine"] / row["kernels"],
        }
        print(f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in table[name].items()), file=sys.stderr, flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, default=Path("out/benchmark-zoo"))
    parser.add_argument("--mergekit", type=Path, help="virtual environment that holds mergekit")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--sizes", nargs="*", default=["1024x24", "2048x34"], help="WIDTHxLAYERS for --memory")
    parser.add_argument("--budget", default="1GiB")
    parser.add_argument("--charts", type=Path, metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--passes", action="store_true", help="PCB's passes against bare loops")
    parser.add_argument("--numel", type=int, default=20_000_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.sizes = [tuple(int(part) for part in size.split("x")) for size in arguments.sizes]
    table: Mapping[str, object] = (
        charts(arguments)
        if arguments.charts
        else in_memory(arguments)
        if arguments.in_memory
        else passes(arguments)
        if arguments.passes
        else memory(arguments)
        if arguments.memory
        else against_mergekit(arguments)
    )
    if arguments.json:
        print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
