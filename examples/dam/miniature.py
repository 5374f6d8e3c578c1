"""Does a merge keep a backdoor? Four small tasks, one or more poisoned models, merged with and without a defence.

    python examples/dam/miniature.py --out out/dam                       # 5 seeds, a few minutes on two idle cores
    python examples/dam/miniature.py --out out/dam --seeds 0 --steps 20  # a quick look

Every hyper-parameter below was chosen on other seeds (100, 101), other triggers and the validation splits (`--part
validation --seeds 100,101`); the test splits, the test triggers and seeds 0 to 4 were run once, with these.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # so that spawned workers find it too

from world import HIGH, LOW, TASKS, TRIGGERS, Trigger, World, world

from merging import merge_stacks
from merging.learn.adamerging import adamerging
from merging.learn.dam import DamConfig, dam_merge
from merging.learn.masks import ConcreteMask, masked_merge, rescale
from merging.learn.security import SecurityReport, draw_panels, security_report
from merging.learn.security import Trigger as Planted

LAMBDA = 0.5
LAMBDAS = (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.8)
COMMON: dict[str, Any] = {"lam0": LAMBDA, "mask_lr": 6e-3, "input_range": (LOW, HIGH)}
CONCRETE: dict[str, Any] = {"masks": "single", "safety": "none"}
OURS: dict[str, Any] = {"safety_weight": 1.0, "performance": "teacher"}
INVERSION: dict[str, Any] = {**OURS, "safety_source": "inversion", "refine_steps": 1}
# each is one call of dam_merge
MASKED: dict[str, dict[str, Any]] = {
    "Concrete": {**CONCRETE, "performance": "entropy", "final_mask": "sample"},
    "Concrete + teacher (control)": {**CONCRETE, "performance": "teacher"},
    # the released loss: entropy of inputs clipped to [0, 1] after normalisation, weight 0.1, perturbation 1e-4 a step
    "DAM as published": {
        "masks": "single",
        "performance": "entropy",
        "safety_source": "universal",
        "safety": "entropy",
        "safety_weight": 0.1,
        "adv_lr": 1e-4,
        "input_range": (0.0, 1.0),
        "final_mask": "sample",
    },
    "DAM dual": {"performance": "entropy", "safety_source": "universal", "safety_weight": 0.3},
    "DAM + trigger inversion": {**INVERSION, "masks": "single"},
    "DAM dual + trigger inversion": INVERSION,
    "oracle (true trigger)": {**OURS, "masks": "single", "safety_source": "known"},
}
# the rows that every seed has; the others are made for the first seeds only
ALWAYS = ("Concrete", "DAM as published", "DAM + trigger inversion", "oracle (true trigger)")


def deltas(place: World, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    base = dict(place.base.named_parameters())
    return {name: (own - base[name]).detach() for name, own in model.named_parameters()}


def run(
    place: World,
    bad: Mapping[str, tuple[Any, torch.nn.Module]],
    part: str,
    steps: int,
    methods: tuple[str, ...],
) -> tuple[SecurityReport, dict[str, Any]]:
    """Merge one set of models in every way, and measure all of them.

    Args:
        place: tasks, base and clean models.
        bad: attacked task to (trigger, poisoned model).
        part: the split to measure on.
        steps: mask steps.
        methods: which of the masked ones; the merges without masks are always made.
    """
    models: dict[str, Any] = {**place.clean, **{task: model for task, (_, model) in bad.items()}}
    vectors = {task: deltas(place, model) for task, model in models.items()}
    base = {name: tensor.detach() for name, tensor in place.base.named_parameters()}
    inputs = {task: place.data[task]["adapt"].images for task in TASKS}
    tests = {task: (place.data[task][part].images, place.data[task][part].labels) for task in TASKS}
    triggers = {task: Planted(own.apply, own.target, own.name) for task, (own, _) in bad.items()}
    merged: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    stacks = {name: torch.stack([vectors[task][name] for task in models]) for name in base}
    for label, method, density in (("TIES", "ties", 0.2), ("PCB", "pcb", 0.1)):
        found = merge_stacks(method, stacks, density=density)
        merged[label] = {name: base[name] + found[name] for name in base}
    for wise in ("task", "layer"):
        generator = torch.Generator().manual_seed(place.seed)
        batches = [
            {task: own[torch.randint(len(own), (16,), generator=generator)] for task, own in inputs.items()}
            for _ in range(steps)
        ]
        composition, _ = adamerging(
            place.base, vectors, batches, place.heads, wise=wise, lr=3e-3, steps=steps, seed=place.seed
        )
        with composition:
            composition.compose_()
            merged[f"AdaMerging {wise}-wise"] = {
                name: tensor.detach().clone() for name, tensor in place.base.state_dict().items()
            }
    noise = torch.Generator().manual_seed(place.seed)
    mask = ConcreteMask.constant({name: tensor.shape for name, tensor in base.items()})
    uniform = {name: torch.rand(tensor.shape, generator=noise) for name, tensor in base.items()}
    merged["random mask (control)"] = masked_merge(
        base, vectors, [LAMBDA] * len(vectors), rescale(mask.sample(uniform))
    )
    for name in methods:
        options = {**COMMON, "mask_steps": steps, **MASKED[name]}
        if options.get("safety_source") == "known":
            options["known_triggers"] = {task: [trigger.apply] for task, trigger in triggers.items()}
        started = time.process_time()
        result = dam_merge(
            place.base, models, data=inputs, heads=place.heads, config=DamConfig(**options), seed=place.seed
        )
        merged[name] = result.state_dict
        facts[name] = {"seconds": time.process_time() - started, "warnings": result.warnings}
        if options.get("safety_source") == "inversion":
            facts[name]["suspected"] = sorted({(found.task, found.target) for found in result.triggers})
            facts[name]["scan"] = result.scan
    report = security_report(
        {f"plain merge, λ = {LAMBDA}": masked_merge(base, vectors, [LAMBDA] * len(vectors))},
        merged,
        heads=place.heads,
        tests=tests,
        triggers=triggers,
        base=place.base,
        models=vectors_of(models),
        lambdas=LAMBDAS,
    )
    own: dict[str, Any] = {}
    for task, model in models.items():
        alone = security_report(
            {task: model.state_dict()},
            {},
            heads=place.heads,
            tests={task: tests[task]} if task in triggers else {task: tests[task], **{t: tests[t] for t in triggers}},
            triggers=triggers if task not in triggers else {task: triggers[task]},
            base=place.base,
            models=vectors_of(models),
            lambdas=(LAMBDA,),
        ).rows[task]
        own[task] = {"accuracy": alone.accuracy[task].value, "success": alone.success.get(task)}
    facts["individual"] = {
        "accuracy": sum(row["accuracy"] for row in own.values()) / len(own),
        "success": sum(own[task]["success"].value for task in triggers) / len(triggers),
    }
    return report, facts


def vectors_of(models: Mapping[str, torch.nn.Module]) -> dict[str, Any]:
    return {task: model.state_dict() for task, model in models.items()}


@dataclass(frozen=True)
class Job:
    """One world with one set of poisoned models: what one process does in a minute or two."""

    seed: int
    scenario: int  # first the kinds of trigger in one model, then two models, then all
    part: str
    steps: int
    tune_steps: int
    wide: bool
    out: str

    @property
    def file(self) -> Path:
        return Path(self.out) / f"seed-{self.seed}-{self.scenario}.json"


def work(job: Job) -> None:
    """Does a job, unless an earlier run has done it."""
    if job.file.is_file():
        return
    torch.set_num_threads(1)
    place = world(job.seed, steps=job.tune_steps, base_steps=job.tune_steps // 2)
    kinds = TRIGGERS[job.part]
    attacked = {len(kinds): TASKS[:2], len(kinds) + 1: TASKS}.get(job.scenario, TASKS[:1])
    trigger = kinds[job.scenario % len(kinds)] if job.scenario < len(kinds) else kinds[0]
    bad = {}
    for number, task in enumerate(attacked):
        own = Trigger(trigger.name, trigger.apply, (trigger.target + 2 * number) % 8)
        bad[task] = (own, place.poisoned(task, own))
    report, facts = run(place, bad, job.part, job.steps, tuple(MASKED) if job.wide else ALWAYS)
    label = {1: "one model", 2: "two models"}.get(len(attacked), "all models")
    save(job.file, {f"{label}: {trigger.name}": {**report.as_dict(), "facts": facts}})


def save(path: Path, results: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(clean(results), indent=1))


def clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# -- summary -----------------------------------------------------------------------------------------------------------


def summary(out: Path) -> str:
    """Means over seeds of every scenario as text; also the picture."""
    # by scenario, then by seed
    files = sorted(out.glob("seed-*.json"), key=lambda path: [int(number) for number in path.stem.split("-")[:0:-1]])
    results: dict[str, list[dict[str, Any]]] = {}
    for path in files:
        for scenario, one in json.loads(path.read_text()).items():
            results.setdefault(scenario, []).append(one)
    lines, panels = [], []
    for scenario, found in results.items():
        lines += [f"{scenario} ({len(found)} seeds)", f"  {'':32} accuracy  success (range)      flips"]
        points: dict[str, tuple[float, float]] = {}
        curve: dict[float, tuple[float, float]] = {}

        def add(name: str, rows: list[dict[str, Any]], note: str = "", lines: list[str] = lines) -> tuple[float, float]:
            accuracy, success, flips = (
                mean([row[key] for row in rows]) for key in ("mean_accuracy", "mean_success", "mean_flips")
            )
            low, high = (100 * pick(row["mean_success"] for row in rows) for pick in (min, max))
            flipped = "" if flips is None else f"{100 * flips:6.1f}"
            lines.append(
                f"  {name:32} {100 * accuracy:8.1f}  {100 * success:6.1f} ({low:.0f}-{high:.0f}) {flipped:>10}{note}"
            )
            return accuracy, success

        individual = [own["facts"]["individual"] for own in found]
        lines.append(
            f"  {'individual models':32} {100 * mean([own['accuracy'] for own in individual]):8.1f}  "
            f"{100 * mean([own['success'] for own in individual]):6.1f}"
        )
        for lam in found[0]["plain_merge_curve"]:
            curve[float(lam)] = add(f"plain merge, λ = {lam}", [own["plain_merge_curve"][lam] for own in found])
        for name in dict.fromkeys(name for own in found for name in own["rows"]):
            rows = [own["rows"][name] for own in found if name in own["rows"]]
            point = add(name, rows, "" if len(rows) == len(found) else f"   ({len(rows)} seeds)")
            if not name.startswith("plain merge"):
                points[name] = point
        panels.append((f"{scenario}, {len(found)} seeds", points, curve))
        lines.append("")
    draw_panels(out / "dam.png", panels)
    return "\n".join(lines)


def mean(values: list[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="out/dam")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--part", choices=("test", "validation"), default="test")
    parser.add_argument("--tune-steps", type=int, default=300, help="fine-tuning steps of each model")
    parser.add_argument("--triggers", type=int, default=3, help="how many kinds of trigger in one model")
    parser.add_argument("--several", type=int, default=5, help="seeds that also have two and all models poisoned")
    parser.add_argument("--wide", type=int, default=1, help="seeds that have every row")
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args(arguments)
    Path(chosen.out).mkdir(parents=True, exist_ok=True)
    kinds = len(TRIGGERS[chosen.part])
    jobs = [
        Job(seed, scenario, chosen.part, chosen.steps, chosen.tune_steps, number < chosen.wide, chosen.out)
        for number, seed in enumerate(map(int, chosen.seeds.split(",")))
        for scenario in [*range(chosen.triggers), *([kinds, kinds + 1] if number < chosen.several else [])]
    ]
    if chosen.processes > 1 and len(jobs) > 1:
        with multiprocessing.get_context("spawn").Pool(chosen.processes) as pool:
            pool.map(work, jobs, chunksize=1)
    else:
        for job in jobs:
            work(job)
    text = summary(Path(chosen.out))
    (Path(chosen.out) / "dam.txt").write_text(text + "\n")
    print(text)
    return text


if __name__ == "__main__":
    main()
