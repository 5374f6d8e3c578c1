"""Learns coefficients on the real zoos, one command each, bakes them, and scores the result on the test splits.

    python -m examples.real_zoo.learned                            everything, three seeds
    python -m examples.real_zoo.learned --seeds 0 --steps 30 --limit 300 --only atlas,adamerging

Text: isotropic (one coefficient a task), AdaMerging layer-wise (no labels), aTLAS (one coefficient a task and tensor,
with labels), and task negation: the task vector of one task, composed so that the model unlearns that task and keeps
another. Language: isotropic and aTLAS over three LoRA adapters.

Learning sees `--rows` rows of each task's validation split, never a test row. Every learner but negation takes the last
step: with so few rows there is none left to choose by. The zoos are built first if they are not there.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.real_zoo import language, text
from examples.real_zoo.data import zoo_folder

CLI = Path(__file__).parents[2] / "cli.py"
# what is unlearned, and what is kept: all three are well above chance in the base
NEGATED = {"negation-r8": ("r8", "movie"), "negation-news": ("news", "r8")}
TEXT_USES = ("isotropic", "adamerging", "atlas", *NEGATED)
LANGUAGE_USES = ("lora-isotropic", "lora-atlas")
USES = (*TEXT_USES, *LANGUAGE_USES)
FLOOR = 0.95
NEGATIVE_SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)


def command(*words: str) -> None:
    ended = subprocess.run([sys.executable, str(CLI), *words], check=False, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{ended.stderr[-3000:]}")


def _about_text(options: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    data = text.root() / "data"
    return {
        "base": str(text.folders()["base"]),
        "model": "AutoModel",
        "exclude": ["pooler.*"],
        "data": {name: {"path": str(data / name / "validation.jsonl"), "limit": options.rows} for name in names},
        "heads": str(text.root() / "heads.safetensors"),
        "pool": "mean",
        "normalize": True,
        "logit_scale": text.LOGIT_SCALE,
        "max_length": text.LENGTH,
        "batch": options.batch,
        "steps": options.steps,
        "keep": "last",
    }


def configuration(use: str, options: argparse.Namespace) -> dict[str, Any]:
    """The file that `taskvec learn` reads, but for the seed."""
    if use in NEGATED:
        target, control = NEGATED[use]
        both = _about_text(options, [target, control])
        return {
            **both,
            "tasks": {target: str(text.folders()[target])},
            "evaluation": both["data"],
            "objective": "negation",
            "negation": {"target": target, "control": control, "floor": FLOOR},
            "keep": "best",
            "every": 10,
        }
    if use in LANGUAGE_USES:
        places = language.folders()
        return {
            "base": str(places["base"]),
            "model": "AutoModelForCausalLM",
            "tasks": {name: str(places[f"{name}-lora"]) for name in language.DOMAINS},
            "data": {name: {"path": str(sentences(name))} for name in language.DOMAINS},
            "objective": "causal_lm",
            "max_length": language.LENGTH,
            "batch": min(options.batch, 4),
            "steps": options.steps,
            "schedule": "cosine",
            "initial": 0.3,
            "optimizer": {"lr": 0.02 if use == "lora-isotropic" else 0.01, "weight_decay": 0.0},
            "granularity": "global" if use == "lora-isotropic" else "block",
        }
    names = list(text.TASKS)
    learners: dict[str, dict[str, Any]] = {
        "isotropic": {"granularity": "global", "optimizer": {"lr": 0.02, "weight_decay": 0.0}, "initial": 0.3},
        # five times the authors' rate for a fifth of their steps
        "adamerging": {"granularity": "block", "optimizer": {"lr": 5e-3}},
        "atlas": {"granularity": "block", "optimizer": {"lr": 0.01, "weight_decay": 0.0}, "initial": 0.3},
    }
    tasks = {name: str(text.folders()[name]) for name in names}
    return {**_about_text(options, names), "tasks": tasks, "schedule": "cosine", **learners[use]}


def sentences(domain: str) -> Path:
    """The validation blocks of a domain as JSONL of text."""
    file = language.root() / "data" / f"{domain}-validation.jsonl"
    if not file.exists():
        tokenizer = language._tokenizer()
        rows = [tokenizer.decode(block) for block in language.load_domain(domain).validation]
        file.write_text("\n".join(json.dumps({"text": row}) for row in rows) + "\n", encoding="utf-8")
    return file


def learned_and_baked(use: str, seed: int, config: Mapping[str, Any]) -> tuple[Path, float]:
    """Run `taskvec learn` and `taskvec merge`; the merged folder, and the seconds that learning took."""
    from ruamel.yaml import YAML

    folder = zoo_folder() / "learned" / f"{use}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yaml = YAML()
    with open(folder / "learn.yaml", "w", encoding="utf-8") as file:
        yaml.dump({**config, "seed": seed}, file)
    begun = time.perf_counter()
    module = "adamerging" if use == "adamerging" else "atlas"
    command("learn", module, str(folder / "learn.yaml"), str(folder / "coefficients.safetensors"))
    seconds = time.perf_counter() - begun
    recipe = {
        "method": "task_arithmetic",
        "base": config["base"],
        "tasks": config["tasks"],
        "coefficients": str(folder / "coefficients.safetensors"),
        "keep_base": config.get("exclude", []),
    }
    with open(folder / "recipe.yaml", "w", encoding="utf-8") as file:
        yaml.dump(recipe, file)
    command("merge", str(folder / "recipe.yaml"), str(folder / "merged"))
    return folder / "merged", seconds


def scored(use: str, folder: Path, limit: int | None, split: str = "test") -> dict[str, float]:
    if use in LANGUAGE_USES:
        return language.evaluate(folder, split, limit=limit)
    return text.evaluate(folder, split, limit=limit)


def searched(use: str, limit: int | None) -> dict[str, Any]:
    """Negation by one number: minus the task vector, as far as the control keeps its floor on validation rows."""
    from safetensors.torch import load_file

    target, control = NEGATED[use]
    places = text.folders()
    base, tuned = (load_file(places[name] / "model.safetensors") for name in ("base", target))
    model = text._load(places["base"])
    own = model.state_dict()

    def put(scale: float) -> None:
        for name, value in base.items():
            if value.is_floating_point() and not name.startswith("pooler."):
                own[name].copy_(value - scale * (tuned[name] - value))

    kept = text.accuracy(model, control, "validation")
    found: dict[float, float] = {0.0: text.accuracy(model, target, "validation")}
    for scale in NEGATIVE_SCALES:
        put(scale)
        if text.accuracy(model, control, "validation") >= FLOOR * kept:
            found[scale] = text.accuracy(model, target, "validation")
    best = min(found, key=lambda scale: found[scale])
    put(best)
    return {"scale": -best, "scores": {name: text.accuracy(model, name, "test", limit) for name in text.TASKS}}


def report(name: str, scores: list[dict[str, float]], seconds: float | None = None) -> None:
    """One line: means over the seeds, and the mean of each seed."""
    loss = name in LANGUAGE_USES

    def mean(values: list[float]) -> float:
        return math.exp(fmean(map(math.log, values))) if loss else 100 * fmean(values)

    row: dict[str, Any] = {"name": name, "mean": round(fmean(mean(list(score.values())) for score in scores), 2)}
    row |= {task: round((1 if loss else 100) * fmean(score[task] for score in scores), 2) for task in scores[0]}
    row |= {"means": [round(mean(list(score.values())), 2) for score in scores]} if len(scores) > 1 else {}
    row |= {"seconds": round(seconds, 1)} if seconds is not None else {}
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, help="test rows per task; default: all")
    parser.add_argument("--only", default=",".join(USES))
    parser.add_argument("--together", type=int, default=1, help="runs at once")
    parser.add_argument("--write", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    uses, seeds = options.only.split(","), [int(seed) for seed in options.seeds.split(",")]
    for use in uses:
        if use not in USES:
            parser.error(f"--only: {use} is none of {', '.join(USES)}")
    if set(uses) & set(TEXT_USES):
        text.build()
    if set(uses) & set(LANGUAGE_USES):
        language.build()
        for domain in language.DOMAINS:
            sentences(domain)
    found: dict[str, dict[str, Any]] = {}

    def keep() -> None:
        if options.write is not None:
            options.write.parent.mkdir(parents=True, exist_ok=True)
            options.write.write_text(json.dumps(found))

    with ThreadPoolExecutor(options.together) as pool:
        waiting = {
            pool.submit(learned_and_baked, use, seed, configuration(use, options)): (use, seed)
            for use in uses
            for seed in seeds
        }
        for use in uses:
            if use in NEGATED:
                found[f"{use}, searched"] = searched(use, options.limit)
                print(json.dumps({"name": f"{use}, searched", **found[f"{use}, searched"]}), flush=True)
        for future in as_completed(waiting):
            use, seed = waiting[future]
            folder, seconds = future.result()
            one = {"scores": scored(use, folder, options.limit), "seconds": seconds}
            shutil.rmtree(folder)
            found.setdefault(use, {})[str(seed)] = one
            keep()
            print(json.dumps({"name": use, "seed": seed, **one}), file=sys.stderr, flush=True)
    for use in uses:
        runs = [found[use][str(seed)] for seed in seeds]
        report(use, [run["scores"] for run in runs], fmean(run["seconds"] for run in runs))


if __name__ == "__main__":
    main()
