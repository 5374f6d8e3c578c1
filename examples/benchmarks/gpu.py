"""Merging on a GPU: our methods beside the authors' forms and beside PyTorch one-liners, with the card's own limits.

    python examples/benchmarks/gpu.py [--json FILE] [--numel 88000000 300000000] [--tasks 8] [--repeats 7] [--shapes [only]]

One command: it draws the task vectors, checks that fast and plain ways agree, then times them, in turns, from call to
finished result (wall clock, device idle before and after). Medians, ratios, and the highest memory in use. The floor is
measured in the same run: the bandwidth of a large copy on the card.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging import merge_stacks
from merging.spectra import svd

CLIP, DENSITY = 1e-4, 0.1
PASSES = {"task_arithmetic": 1, "ties": 2, "pcb": 3}  # over the inputs, at the least


def reference_pcb(vectors: Tensor, density: float = DENSITY) -> Tensor:
    """PCB as its authors write it: whole matrices, two full sorts (written anew from the published steps)."""

    def clamped(values: Tensor, low: float, high: float) -> Tensor:
        width = values.shape[1]
        ordered, _ = values.sort(dim=1)
        least = ordered[:, int(width * low)].unsqueeze(1)
        most = ordered[:, int(width * (1 - high) - 1)].unsqueeze(1)
        return torch.clamp(values, least, most)

    def normalised(values: Tensor) -> Tensor:
        least, most = values.min(dim=1, keepdim=True).values, values.max(dim=1, keepdim=True).values
        return (values - least) / (most - least)

    stack = vectors.clone()
    sizes = clamped(stack.abs(), CLIP, CLIP)
    clipped = stack.sign() * sizes
    within = torch.exp(len(stack) * normalised(sizes) ** 2)
    among = torch.tanh(stack * stack.sum(dim=0))
    weights = normalised(clamped(within * among, 1 - density, 0))
    return (clipped * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=1e-12)


def plain_ties(vectors: Tensor, density: float = 0.2) -> Tensor:
    """Global TIES in a few lines of PyTorch."""
    width = vectors.shape[1]
    rank = width - max(1, int(density * width))
    trimmed = torch.stack([row * (row.abs() >= row.abs().sort().values[rank]) for row in vectors])
    sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed * sign > 0
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def task_vectors(tasks: int, numel: int, seed: int = 0) -> Tensor:
    """Heavy-tailed task vectors that share a little, drawn on the card."""
    draw = torch.Generator("cuda").manual_seed(seed)
    stack = torch.empty(tasks, numel, device="cuda")
    common = torch.randn(numel, device="cuda", generator=draw)
    for row in stack:
        scale = torch.randn(numel // 1000 + 1, device="cuda", generator=draw).mul_(0.7).exp_()
        row.normal_(generator=draw).add_(common, alpha=0.3).mul_(1e-3)
        row.mul_(scale.repeat_interleave(1000)[:numel])
    return stack


def timed(run: Callable[[], Any]) -> tuple[float, int]:
    """Milliseconds from call to finished result, and the bytes in use at the peak beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    spent = (time.perf_counter() - start) * 1000
    del result
    return spent, torch.cuda.max_memory_allocated() - before


_LONG = 1000.0  # milliseconds; what takes longer runs once


def medians(
    runs: dict[str, Callable[[], Any]], repeats: int, warm: dict[str, Callable[[], Any]] | None = None
) -> dict[str, dict[str, float]]:
    """All runs in turns, A B A B; before that each once, or what warms it up where it takes long."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = {}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            if times[name] and times[name][-1] > _LONG:
                continue
            try:
                if not turn:  # kernels are compiled now: how long a run takes is known afterwards
                    (warm or {}).get(name, run)()
                    continue
                spent, peaks[name] = timed(run)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            times[name].append(spent)
    return {
        name: {"ms": round(statistics.median(t), 3), "least": round(min(t), 3), "peak_bytes": peaks[name]}
        for name, t in times.items()
        if t
    }


def kernels(run: Callable[[], Any], repeats: int = 3) -> dict[str, float]:
    """Milliseconds on the card by kernel, for one run; "host" is what the wall clock has beyond their sum."""
    from torch.profiler import ProfilerActivity, profile

    run()
    wall = statistics.median(timed(run)[0] for _ in range(repeats))
    with profile(activities=[ProfilerActivity.CUDA]) as told:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    spent = {event.key: event.device_time_total / 1000 / repeats for event in told.key_averages()}
    found = {name[:40]: round(ms, 3) for name, ms in sorted(spent.items(), key=lambda item: -item[1]) if ms >= 0.005}
    return found | {"host": round(wall - sum(spent.values()), 3)}


def bandwidth(numel: int = 1 << 29) -> float:
    """Bytes read and written per second by a large copy."""
    source, target = torch.randn(numel, device="cuda"), torch.empty(numel, device="cuda")
    spent = medians({"copy": lambda: target.copy_(source)}, 9)["copy"]["ms"]
    return 2 * source.nbytes / spent * 1000


def agreement(fast: Tensor, plain: Tensor) -> dict[str, float]:
    """How two merges differ.

    A weight that is nearly zero at its task's threshold is a difference of nearly equal scores, so where few tasks keep
    an entry an ulp of a score shows; the share of such entries says how rare that is.
    """
    alone = int(((fast != 0) != (plain != 0)).sum())
    apart = (fast - plain).abs() > 1e-5 * plain.abs().max()
    return {"kept by one alone": alone, "share further apart than 1e-5 of the largest": float(apart.float().mean())}


def report(tasks: int, numel: int, repeats: int, reference: bool, profiled: bool) -> dict[str, Any]:
    vectors = task_vectors(tasks, numel)
    stacks = {"w": vectors}
    found: dict[str, Any] = {"tasks": tasks, "numel": numel, "input_bytes": vectors.nbytes}
    fast = merge_stacks("pcb", stacks, density=DENSITY)["w"]
    if reference:
        found["pcb against the authors' form"] = agreement(fast, reference_pcb(vectors))
        torch.cuda.empty_cache()
    ties = merge_stacks("ties", stacks, density=0.2)["w"]
    found["ties against plain"] = agreement(ties, plain_ties(vectors))
    found["sum against plain"] = float((merge_stacks("task_arithmetic", stacks)["w"] - vectors.sum(0)).abs().max())
    parts = merge_stacks("pcb", stacks, density=DENSITY, contributions=True)
    found["parts against whole"] = float((parts.merged()["w"] - fast).abs().max())
    del fast, ties
    torch.cuda.empty_cache()
    runs: dict[str, Callable[[], Any]] = {
        "task_arithmetic": lambda: merge_stacks("task_arithmetic", stacks),
        "task_arithmetic, torch sum": lambda: vectors.sum(0),
        "ties": lambda: merge_stacks("ties", stacks, density=0.2),
        "pcb": lambda: merge_stacks("pcb", stacks, density=DENSITY),
        "pcb, one more trial": lambda: parts.merged([1.1] * tasks),
        "pcb with contributions": lambda: merge_stacks("pcb", stacks, density=DENSITY, contributions=True),
    }
    if reference:
        runs["ties, torch"] = lambda: plain_ties(vectors)
        runs["pcb, authors' form"] = lambda: reference_pcb(vectors)
    found["runs"] = medians(runs, repeats)
    if profiled:
        found["kernels"] = {name: kernels(run) for name, run in runs.items() if name in PASSES or "trial" in name}
    for run in found["runs"].values():
        run["peak, times the input"] = round(1 + run["peak_bytes"] / vectors.nbytes, 3)
    return found


def vit_zoo(tasks: int, layers: int = 12) -> dict[str, Tensor]:
    """Task vectors with the shapes of ViT-B/32's encoder."""
    shapes: dict[str, tuple[int, ...]] = {"patches.weight": (768, 3, 32, 32), "positions": (50, 768)}
    for layer in range(layers):
        for name, shape in [*((name, (768, 768)) for name in "qkvo"), ("up", (3072, 768)), ("down", (768, 3072))]:
            shapes[f"layers.{layer}.{name}.weight"] = shape
            shapes[f"layers.{layer}.{name}.bias"] = shape[:1]
        for name in ("norm1", "norm2"):
            shapes |= {f"layers.{layer}.{name}.{part}": (768,) for part in ("weight", "bias")}
    draw = torch.Generator("cuda").manual_seed(0)
    return {
        name: torch.randn(tasks, *shape, device="cuda", generator=draw)
        + 0.3 * torch.randn(1, *shape, device="cuda", generator=draw)
        for name, shape in shapes.items()
    }


def plain_iso_c(stack: Tensor) -> Tensor:
    """Iso-C on one matrix as its authors write it."""
    left, values, right = torch.linalg.svd(stack.sum(0), full_matrices=False)
    return values.mean() * left @ right


def plain_tsv_m(stack: Tensor) -> Tensor:
    """TSV-M on one matrix as its authors write it."""
    keep = min(stack.shape[1:]) // len(stack)
    parts = [torch.linalg.svd(row, full_matrices=False) for row in stack]
    u, _, v = torch.linalg.svd(torch.cat([left[:, :keep] for left, _, _ in parts], 1), full_matrices=False)
    p, _, r = torch.linalg.svd(torch.cat([right[:keep] for _, _, right in parts], 0), full_matrices=False)
    middle = torch.diag(torch.cat([values[:keep] for _, values, _ in parts]))
    return u @ v @ middle @ p @ r


def grams_iso_c(stack: Tensor) -> Tensor:
    """Iso-C on one matrix by the eigenproblem of its Gram matrix."""
    found = svd(stack.sum(0))
    return found.values.mean() * found.left @ found.right.T


def grams_tsv_m(stack: Tensor) -> Tensor:
    """TSV-M on one matrix by eigenproblems of Gram matrices, one after the other."""
    keep = min(stack.shape[1:]) // len(stack)
    parts = [svd(row, most=keep) for row in stack]
    lefts, rights = torch.cat([part.left for part in parts], 1), torch.cat([part.right for part in parts], 1)
    outer = [svd(side, stack.dtype) for side in (lefts, rights)]
    left, right = (side.left @ side.right.T for side in outer)
    return left * torch.cat([part.values for part in parts]) @ right.T


def shapes_report(repeats: int) -> dict[str, Any]:
    """Methods that look at one tensor at a time, on ViT-B/32's shapes: ours given all tensors, and one by one."""
    zoo = vit_zoo(8)
    pairs = {name: stack[:2] for name, stack in zoo.items()}
    few = {name: stack for name, stack in zoo.items() if name.startswith(("layers.0.", "layers.1."))}
    runs: dict[str, Callable[[], Any]] = {}
    warm: dict[str, Callable[[], Any]] = {}
    for method, stacks in (("slerp", pairs), ("karcher", zoo), ("multislerp", zoo)):
        runs[method] = lambda method=method, stacks=stacks: merge_stacks(method, stacks)  # type: ignore[misc]
        runs[f"{method}, one by one"] = lambda method=method, stacks=stacks: [  # type: ignore[misc]
            merge_stacks(method, {name: stack}) for name, stack in stacks.items()
        ]
    for method in SPECTRAL:
        for layers, stacks in (("2 layers", few), ("12 layers", zoo)):
            runs[f"{method}, {layers}"] = lambda method=method, stacks=stacks: merge_stacks(method, stacks)  # type: ignore[misc]
            for name, plain in SPECTRAL[method].items():
                if (method, layers, name) == ("tsv_m", "12 layers", "authors' form"):
                    continue  # half a minute
                runs[f"{method}, {layers}, {name}"] = lambda plain=plain, stacks=stacks: [  # type: ignore[misc]
                    plain(stack) for stack in matrices(stacks).values()
                ]
                warm[f"{method}, {layers}, {name}"] = lambda plain=plain: [  # type: ignore[misc]
                    plain(few[f"layers.0.{shape}.weight"]) for shape in ("q", "up", "down")
                ]
    found: dict[str, Any] = medians(runs, repeats, warm)
    for name, run in found.items():
        ours = found[", ".join(name.split(", ")[: 2 if "layers" in name else 1])]
        if run is not ours:
            run["ratio"] = round(run["ms"] / ours["ms"], 2)
    two = {name: few[f"layers.0.{name}.weight"] for name in ("q", "up")}
    for method, others in SPECTRAL.items():
        told = found[f"{method}, 2 layers"]
        fast = merge_stacks(method, few)
        expected = merge_stacks(method, {name: stack.cpu() for name, stack in two.items()})
        told["apart from the CPU's"] = max(_apart(fast[f"layers.0.{n}.weight"].cpu(), expected[n]) for n in two)
        if others:
            plain = next(iter(others.values()))
            told["apart from eigenproblems'"] = max(_apart(fast[n], plain(m)) for n, m in matrices(few).items())
    return found


def matrices(stacks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weight matrices among the tensors."""
    return {name: stack for name, stack in stacks.items() if stack.ndim == 3}


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


SPECTRAL: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "iso_c": {"eigenproblems one by one": grams_iso_c, "authors' form": plain_iso_c},
    "tsv_m": {"eigenproblems one by one": grams_tsv_m, "authors' form": plain_tsv_m},
    "iso_cts": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--numel", type=int, nargs="+", default=[88_000_000, 300_000_000])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--shapes", nargs="?", const="also", choices=("also", "only"), help="methods that look at one tensor at a time"
    )
    parser.add_argument("--profile", action="store_true", help="also the time of each kernel")
    arguments = parser.parse_args()
    copy = bandwidth()
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_s": copy,
    }
    print(f"{result['card']}: a copy moves {copy / 1e12:.2f} TB/s, read and written")
    result["merges"] = []
    if arguments.shapes:
        result["shapes"] = shapes_report(3)
        print("\nViT-B/32's tensors, 8 tasks (slerp: 2)")
        for name, run in result["shapes"].items():
            more = "".join(f"  {key} {value:.3g}" for key, value in run.items() if key.startswith(("ratio", "apart")))
            print(f"  {name:44s} {run['ms']:9.3f} ms{more}")
    for numel in () if arguments.shapes == "only" else arguments.numel:
        found = report(
            arguments.tasks, numel, arguments.repeats, reference=numel <= 100_000_000, profiled=arguments.profile
        )
        result["merges"].append(found)
        print(
            f"\n{arguments.tasks} task vectors of {numel / 1e6:.0f} M float32, {found['input_bytes'] / 2**30:.2f} GiB"
        )
        for check in [key for key in found if "against" in key]:
            print(f"  {check}: {found[check]}")
        for name, run in found["runs"].items():
            floor = ""
            if name in PASSES:
                least = (PASSES[name] * found["input_bytes"] + numel * 4) / copy * 1000
                run["floor_ms"] = round(least, 3)
                floor = f"  {run['ms'] / least:5.2f}x the floor of {least:.2f} ms"
            print(f"  {name:28s} {run['ms']:9.3f} ms  peak {run['peak, times the input']:5.2f}x{floor}")
        for name, spent in found.get("kernels", {}).items():
            print(f"  {name}: " + ", ".join(f"{kernel} {ms}" for kernel, ms in spent.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
