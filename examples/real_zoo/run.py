"""Builds the real zoos, merges them with `taskvec merge`, loads the results as any user would, and prints their scores.

    python -m examples.real_zoo.run                     everything
    python -m examples.real_zoo.run --only text,image
    python -m examples.real_zoo.run --quick             a reduced form: fewer tasks, steps and rows
    python -m examples.real_zoo.run --write FILE        also writes the tables as markdown

Each method runs with its default parameters. Its scale is the one of `SCALES` (or `LANGUAGE_SCALES`) with the best mean
on the validation split; the tables are on the test split. Methods that draw at random are run with three seeds, and
their mean is shown.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file, save_file

from examples.real_zoo import image, language, text
from examples.real_zoo.data import zoo_folder

CLI = Path(__file__).parents[2] / "cli.py"
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
LANGUAGE_SCALES = (0.4, 0.7, 1.0, 1.4, 2.0, 2.8)
SEEDS = (0, 1, 2)

# default parameters throughout; `average` has no scale
METHODS = ("average", "task_arithmetic", "ties", "dare", "dare + ties", "breadcrumbs", "magnitude", "pcb")
QUICK_METHODS = ("average", "task_arithmetic", "pcb")
QUICK_SCALES = (0.4, 0.7, 1.0)

Scores = dict[str, float]


@dataclass(frozen=True, slots=True)
class Zoo:
    """One kind of model: its checkpoints, and how a folder is scored on all tasks.

    Attributes:
        models: name -> folder or adapter, in task order, without the base.
        score: (folder, split, rows) -> a number for each task.
        loss: whether the score is a perplexity (lower is better; means are geometric).
    """

    name: str
    title: str
    base: Path
    models: Mapping[str, Path]
    score: Callable[[Path, str, int | None], Scores]
    tuned: Callable[[str, int | None], float]
    loss: bool = False

    def mean(self, scores: Scores) -> float:
        values = [scores[task] for task in self.models]
        return math.exp(fmean(map(math.log, values))) if self.loss else fmean(values)

    def better(self, scores: Scores) -> float:
        return -self.mean(scores) if self.loss else self.mean(scores)

    def shown(self, value: float) -> str:
        return f"{value:.2f}" if self.loss else f"{100 * value:.1f}"


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    scores: Scores
    scale: float | None = None
    seconds: float | None = None
    spread: float | None = None


def zoos(quick: bool, only: Sequence[str]) -> Iterator[Zoo]:
    """Builds what is missing and yields the zoos, one after the other."""
    if "text" in only:
        places = text.build(quick)
        tasks = [name for name in places if name != "base"]
        yield Zoo(
            "text",
            "Text: all-MiniLM-L6-v2, accuracy in percent",
            places["base"],
            {name: places[name] for name in tasks},
            lambda folder, split, rows: text.evaluate(folder, split, tasks, rows),
            lambda name, rows: text.evaluate(places[name], "test", [name], rows)[name],
        )
    if "image" in only:
        pictures = image.build(quick)
        names = [name for name in pictures if name != "base"]
        yield Zoo(
            "image",
            "Images: EfficientNet-Lite0, accuracy in percent",
            pictures["base"],
            {name: pictures[name] for name in names},
            lambda folder, split, rows: image.evaluate(folder, split, names, rows),
            lambda name, rows: image.evaluate(pictures[name], "test", [name], rows)[name],
        )
    if "language" in only:
        models = language.build(quick)
        domains = [name for name in models if name != "base" and not name.endswith("-lora")]

        def score(folder: Path, split: str, rows: int | None) -> Scores:
            return language.evaluate(folder, split, domains, rows)

        def tuned(name: str, rows: int | None) -> float:
            return language.evaluate(models[name], "test", [name], rows)[name]

        def adapted(name: str, rows: int | None) -> float:
            return language.evaluate(models["base"], "test", [name], rows, adapter=models[f"{name}-lora"])[name]

        kinds = (("language", "full fine-tunes", "", tuned), ("language-lora", "LoRA adapters", "-lora", adapted))
        for kind, what, ending, own in kinds:
            title = f"Language: SmolLM2-135M, {what}, perplexity (lower is better; the mean is geometric)"
            yield Zoo(
                kind, title, models["base"], {name: models[name + ending] for name in domains}, score, own, loss=True
            )


# -- merging through the command line ----------------------------------------------------------------------------------


def merge(
    zoo: Zoo, method: str, out: Path, *, scale: float | None = None, seed: int = 0, dtype: str | None = None,
    tasks: Sequence[str] | None = None,
) -> float:  # fmt: skip
    """Runs `taskvec merge RECIPE OUT`; returns its seconds, start-up included."""
    first, _, second = method.partition(" + ")
    recipe = {
        "base": str(zoo.base),
        "tasks": [{"name": name, "path": str(zoo.models[name])} for name in tasks or zoo.models],
        "method": second or first,
        "seed": seed,
        **({"preprocess": [first]} if second else {}),
        **({} if scale is None else {"scale": scale}),
        **({} if dtype is None else {"output": {"dtype": dtype}}),
    }
    # what TIES would trim DARE has thinned already: TIES keeps all that is left
    if second:
        recipe["parameters"] = {"density": 1.0}
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    command = [sys.executable, str(CLI), "merge", str(file), str(out), "--overwrite"]
    started = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{ended.stderr[-3000:]}")
    return time.perf_counter() - started


def merged_folder(zoo: Zoo) -> Path:
    """Where its merges go; the reduced form's apart."""
    return (
        zoo_folder()
        / "merged"
        / (f"{zoo.name}-quick" if zoo.base.parent.is_relative_to(zoo_folder(True)) else zoo.name)
    )


@contextmanager
def at_scale(zoo: Zoo, whole: Path, scale: float) -> Iterator[Path]:
    """A folder with base + scale · (whole − base), where `whole` was merged at scale 1."""

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        return {
            name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
        }

    base, merged = tensors(zoo.base), tensors(whole)
    mixed = {
        name: torch.lerp(base[name].float(), tensor.float(), scale) if tensor.is_floating_point() else tensor
        for name, tensor in merged.items()
    }
    with tempfile.TemporaryDirectory(dir=whole.parent) as scratch:
        for file in whole.iterdir():
            if file.suffix == ".json" and not file.name.endswith(".index.json"):
                shutil.copy(file, scratch)
        save_file(mixed, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
        yield Path(scratch)


def table(
    zoo: Zoo, methods: Sequence[str], scales: Sequence[float], *, rows: int | None, validation: int | None
) -> list[Row]:
    """Base, fine-tuned models and every merge, scored on the test split."""
    say(f"{zoo.name}: scoring base and fine-tuned models")
    found = [
        Row("base", zoo.score(zoo.base, "test", rows)),
        Row("fine-tuned, each on its own task", {name: zoo.tuned(name, rows) for name in zoo.models}),
    ]
    home = merged_folder(zoo)
    for method in methods:
        say(f"{zoo.name}: {method}")
        name, scale = method.replace(" + ", "-"), None
        if method != "average":
            whole = home / f"{name}-at-1"
            merge(zoo, method, whole, dtype="float32" if zoo.loss else None)
            tried = {}
            for candidate in scales:
                with at_scale(zoo, whole, candidate) as folder:
                    tried[candidate] = zoo.better(zoo.score(folder, "validation", validation))
            scale = max(tried, key=lambda candidate: tried[candidate])
            shutil.rmtree(whole)
        runs = []
        for seed in SEEDS if "dare" in method else SEEDS[:1]:
            seconds = merge(zoo, method, home / name, scale=scale, seed=seed)
            runs.append((zoo.score(home / name, "test", rows), seconds))
        scores = {task: fmean(run[0][task] for run in runs) for task in zoo.models}
        means = [zoo.mean(run[0]) for run in runs]
        spread = max(means) - min(means) if len(runs) > 1 else None
        found.append(Row(method, scores, scale, fmean(run[1] for run in runs), spread))
        say(markdown(zoo, found[-1:]).splitlines()[-1])  # a long run that is stopped has told what it knew
    return found


def pair(zoo: Zoo, *, rows: int | None) -> list[Row]:
    """SLERP goes between two models: the first two tasks, beside their average."""
    two = list(zoo.models)[:2]
    found = []
    for method in ("average", "slerp"):
        out = merged_folder(zoo) / f"{method}-of-two"
        seconds = merge(zoo, method, out, tasks=two)
        scores = zoo.score(out, "test", rows)
        found.append(Row(f"{method} of {' and '.join(two)}", {name: scores[name] for name in two}, None, seconds))
    return found


# -- words -------------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def markdown(zoo: Zoo, rows: Sequence[Row]) -> str:
    tasks = list(zoo.models)
    lines = [
        f"| {zoo.title} | scale | {' | '.join(tasks)} | mean | seconds |",
        "|---" * (len(tasks) + 4) + "|",
    ]
    for row in rows:
        whole = len(row.scores) == len(tasks)
        mean = zoo.shown(zoo.mean(row.scores)) if whole else ""
        if row.spread is not None:
            mean += f" (range {zoo.shown(row.spread)})"
        cells = [
            row.name,
            "" if row.scale is None else f"{row.scale:g}",
            *(zoo.shown(row.scores[task]) if task in row.scores else "" for task in tasks),
            mean,
            "" if row.seconds is None else f"{row.seconds:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(
    quick: bool = False,
    only: Sequence[str] = ("text", "image", "language"),
    methods: Sequence[str] | None = None,
    rows: int | None = None,
) -> tuple[str, dict[str, list[Row]]]:
    """Everything: the tables as markdown, and their rows by zoo."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    rows, validation = (100, 50) if quick else (rows, 100)
    parts, found = [], {}
    for zoo in zoos(quick, only):
        chosen = methods or (QUICK_METHODS if quick else METHODS)
        scales = QUICK_SCALES if quick else LANGUAGE_SCALES if zoo.loss else SCALES
        found[zoo.name] = table(zoo, chosen, scales, rows=rows, validation=8 if zoo.loss else validation)
        if zoo.name != "language-lora" and not quick:
            found[zoo.name] += pair(zoo, rows=rows)
        parts.append(markdown(zoo, found[zoo.name]))
        print(parts[-1] + "\n", flush=True)
    return "\n\n".join(parts) + "\n", found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tasks, steps and rows")
    parser.add_argument("--only", default="text,image,language", help="kinds of models, separated by commas")
    parser.add_argument("--methods", help="some of the methods, separated by commas; default: all")
    parser.add_argument("--rows", type=int, help="score only the first so many test rows of each task; default: all")
    parser.add_argument("--write", type=Path, help="a file for the tables")
    chosen = parser.parse_args()
    only = chosen.only.split(",")
    unknown = set(only) - {"text", "image", "language"}
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of text, image, language")
    tables, _ = run(chosen.quick, only, chosen.methods and chosen.methods.split(","), chosen.rows)
    if chosen.write:
        chosen.write.write_text(tables, encoding="utf-8")


if __name__ == "__main__":
    main()
