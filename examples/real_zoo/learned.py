"""Learns coefficients on the real text zoo, one command each, bakes them, and scores the result on the test splits.

    python -m examples.real_zoo.learned                            isotropic, AdaMerging, aTLAS and a negation; three
    seeds python -m examples.real_zoo.learned --seeds 0 --steps 30 --limit 300 --only atlas,adamerging

Learning sees `--rows` rows of each task's validation split (AdaMerging without their labels), never a test row. Every
learner takes the last step: with so few rows there is none left to choose by. The zoo is built first if it is not
there.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

from examples.real_zoo import text
from examples.real_zoo.data import zoo_folder

CLI = Path(__file__).parents[2] / "cli.py"
USES = ("isotropic", "adamerging", "atlas")


def command(*words: str) -> None:
    subprocess.run([sys.executable, str(CLI), *words], check=True, stdout=subprocess.DEVNULL)


def configuration(
    use: str, seed: int, options: argparse.Namespace, models: dict[str, Path], data: Path
) -> dict[str, object]:
    tasks = {name: str(folder) for name, folder in models.items() if name != "base"}
    learner = {
        "isotropic": {"granularity": "global", "optimizer": {"lr": 0.02, "weight_decay": 0.0}, "initial": 0.3},
        "adamerging": {"granularity": "block", "optimizer": {"lr": 5e-3}},
        "atlas": {"granularity": "block", "optimizer": {"lr": 0.01, "weight_decay": 0.0}, "initial": 0.3},
    }[use]
    return {
        "base": str(models["base"]),
        "tasks": tasks,
        "model": "AutoModel",
        "exclude": ["pooler.*"],
        "data": {name: {"path": str(data / name / "validation.jsonl"), "limit": options.rows} for name in tasks},
        "heads": str(data.parent / "heads.safetensors"),
        "pool": "mean",
        "normalize": True,
        "logit_scale": text.LOGIT_SCALE,
        "max_length": text.LENGTH,
        "batch": options.batch,
        "steps": options.steps,
        "schedule": "cosine",
        "keep": "last",
        "seed": seed,
        **learner,
    }


def negation(seed: int, options: argparse.Namespace, models: dict[str, Path], data: Path) -> dict[str, object]:
    """Unlearn `r8` (whose zero-shot accuracy is above chance), keep `movie`; one task vector."""
    whole = configuration("atlas", seed, options, models, data)
    both = {name: {"path": str(data / name / "validation.jsonl"), "limit": options.rows} for name in ("r8", "movie")}
    held = {name: {"path": str(data / name / "validation.jsonl")} for name in ("r8", "movie")}
    return {
        **whole,
        "tasks": {"r8": str(models["r8"])},
        "data": both,
        "evaluation": held,
        "objective": "negation",
        "negation": {"target": "r8", "control": "movie"},
        "initial": 0.0,
        "keep": "best",
        "every": 5,
        "schedule": "constant",
        "optimizer": {"lr": 5e-3},
    }


def learned_and_baked(
    use: str, module: str, config: dict[str, object], work: Path, merged: dict[str, str]
) -> tuple[Path, float]:
    """Run `taskvec learn` and `taskvec merge`; the merged folder, and the seconds that learning took."""
    from ruamel.yaml import YAML

    folder = work / use
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yaml = YAML()
    with open(folder / "learn.yaml", "w") as file:
        yaml.dump(config, file)
    start = time.perf_counter()
    command("learn", module, str(folder / "learn.yaml"), str(folder / "coefficients.safetensors"))
    seconds = time.perf_counter() - start
    recipe = {
        "method": "task_arithmetic",
        "base": config["base"],
        "tasks": merged,
        "coefficients": str(folder / "coefficients.safetensors"),
        "keep_base": ["pooler.*"],
    }
    with open(folder / "recipe.yaml", "w") as file:
        yaml.dump(recipe, file)
    command("merge", str(folder / "recipe.yaml"), str(folder / "merged"))
    return folder / "merged", seconds


def report(name: str, scores: list[dict[str, float]], seconds: float | None = None) -> None:
    mean = {task: fmean(score[task] for score in scores) for task in scores[0]}
    row = {"name": name, "mean": round(100 * fmean(mean.values()), 1)}
    row |= {task: round(100 * value, 1) for task, value in mean.items()}
    row |= {"means": [round(100 * fmean(score.values()), 1) for score in scores]} if len(scores) > 1 else {}
    row |= {"seconds": round(seconds)} if seconds is not None else {}
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, help="test rows per task")
    parser.add_argument("--only", default=",".join((*USES, "negation")))
    parser.add_argument("--plain", action="store_true", help="also the base and task arithmetic")
    options = parser.parse_args()
    models = text.build()
    data = zoo_folder() / "text" / "data"
    work = zoo_folder() / "learned"
    tasks = {name: str(folder) for name, folder in models.items() if name != "base"}
    if options.plain:
        report("base", [text.evaluate(models["base"], tasks=tasks, limit=options.limit)])
        for scale in ("0.2", "0.3", "0.4"):
            words = ["--base", str(models["base"]), "--method", "task_arithmetic", "--scale", scale]
            shutil.rmtree(work / "plain", ignore_errors=True)
            command("merge", *words, str(work / "plain"), *tasks.values())
            scores = text.evaluate(work / "plain", tasks=tasks, limit=options.limit)
            report(f"task arithmetic {scale}", [scores])
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for use in options.only.split(","):
        found, spent = [], 0.0
        for seed in seeds:
            if use == "negation":
                config, merged = negation(seed, options, models, data), {"r8": str(models["r8"])}
            else:
                config, merged = configuration(use, seed, options, models, data), tasks
            module = "adamerging" if use == "adamerging" else "atlas"
            folder, seconds = learned_and_baked(use, module, config, work, merged)
            spent += seconds
            found.append(text.evaluate(folder, tasks=tasks, limit=options.limit))
        report(use, found, spent / len(seeds))


if __name__ == "__main__":
    main()
