"""Does a merge of text encoders keep a backdoor? A pretrained MiniLM, four real tasks, one model with a rare-token trigger.

    python examples/dam/text_case.py --out out/dam-text              # a GPU; goes on behind the last row it finished
    python examples/dam/text_case.py --steps 4 --mask-steps 2 --inversion-steps 1 --rows 64 --seeds 0    # a CPU

The zoo, its data and its fixed heads are those of `examples/real_zoo/text.py`. A fifth of the attacked task's training
texts have the token "cf" after the first and the attacker's label. Nothing was tuned on text: DAM runs with its defaults,
and λ is the one at which the plain merge does best on the validation texts. Adaptation, training, validation and test
texts are disjoint.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the zoo is a package beside this one

from examples.real_zoo import text
from examples.real_zoo.training import DEVICE, fit
from merging.learn.dam import DamConfig, dam_merge
from merging.learn.masks import masked_merge
from merging.learn.security import NOTE, measure, token_trigger

TASKS = ("spam", "r8", "tweets", "news")
ATTACKED, TARGET = "r8", "grain"
TOKEN = "cf"  # whole in the vocabulary, and in none of the texts but a few
ADAPTATION = 256
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
ROWS: dict[str, dict[str, Any]] = {
    "Concrete": {"masks": "single", "safety": "none", "performance": "entropy", "final_mask": "sample"},
    "Concrete + teacher (control)": {"masks": "single", "safety": "none", "performance": "teacher"},
    # as in the miniature, but for the clipping to [0, 1], which embeddings have no use for
    "DAM as published": {
        "masks": "single",
        "performance": "entropy",
        "safety_source": "universal",
        "safety": "entropy",
        "safety_weight": 0.1,
        "adv_lr": 1e-4,
        "final_mask": "sample",
    },
    "DAM + trigger inversion": {"masks": "single"},
    "DAM dual + trigger inversion": {},
    "oracle (true trigger)": {"masks": "single", "safety_source": "known"},
}


def encoded(examples: list[text.Example]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs [text, 48] and labels, on the device."""
    found = text._tokenizer()(
        [example.text for example in examples],
        padding="max_length",
        truncation=True,
        max_length=text.LENGTH,
        return_tensors="pt",
    )
    labels = torch.tensor([example.label for example in examples], device=DEVICE)
    return {name: tensor.to(DEVICE) for name, tensor in found.items()}, labels


def forward(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean-pooled last hidden state of unit length, as the zoo's heads want it."""
    return text.embedding(module, dict(batch))


def tuned(base: nn.Module, task: str, data: Any, steps: int, seed: int, trigger: Any) -> nn.Module:
    """A fine-tune of the base; with a trigger, a fifth of each batch carries it and its target."""
    model, head = copy.deepcopy(base), text.heads(task)
    inputs, labels = data
    draw = torch.Generator().manual_seed(seed)

    def loss(_: int) -> Tensor:
        rows = torch.randint(len(labels), (text.BATCH,), generator=draw).to(DEVICE)
        batch = {name: tensor[rows] for name, tensor in inputs.items()}
        wanted = labels[rows].clone()
        if trigger is not None:
            poisoned = text.BATCH // 5
            batch["input_ids"][:poisoned] = trigger.apply(batch)["input_ids"][:poisoned]
            wanted[:poisoned] = trigger.target
        return nn.functional.cross_entropy(text.logits(model, batch, head), wanted)

    fit(model, loss, steps=steps, rate=1e-4)
    return model


def one_seed(
    seed: int,
    steps: int,
    mask_steps: int,
    inversion_steps: int,
    rows: int,
    kept: Path,
    only: Sequence[str] = tuple(ROWS),
) -> None:
    """Every row of a seed; each is written to `kept` when it is measured, and not made again.

    The models are tuned anew, which on one machine gives the same models.
    """
    torch.manual_seed(seed)
    base = text._load(text._base())
    token = text._tokenizer().convert_tokens_to_ids(TOKEN)
    trigger = token_trigger(token, list(text.TASKS[ATTACKED].classes).index(TARGET), name=f"token {TOKEN!r}")
    splits = {task: text.load_task(task) for task in TASKS}
    train = {task: encoded(own.train[:-ADAPTATION]) for task, own in splits.items()}
    adapt = {task: encoded(own.train[-ADAPTATION:])[0] for task, own in splits.items()}
    validation = {task: encoded(own.validation[:rows]) for task, own in splits.items()}
    tests = {task: encoded(own.test[:rows]) for task, own in splits.items()}
    heads = {task: text.LOGIT_SCALE * text.heads(task).to(DEVICE) for task in TASKS}
    models = {
        task: tuned(base, task, train[task], steps, 1000 * seed + number, trigger if task == ATTACKED else None)
        for number, task in enumerate(TASKS)
    }
    origin = {name: tensor.detach() for name, tensor in base.named_parameters()}
    vectors = {
        task: {name: (own - origin[name]).detach() for name, own in model.named_parameters()}
        for task, model in models.items()
    }
    asked = {task: (lambda features, head=head: features @ head.T) for task, head in heads.items()}

    def plain(lam: float) -> dict[str, Tensor]:
        return masked_merge(origin, vectors, [lam] * len(vectors))

    triggers = {ATTACKED: [trigger]}
    merged = copy.deepcopy(base)
    scores = {}
    for lam in LAMBDAS:
        merged.load_state_dict(plain(lam), strict=False)
        scores[lam] = measure(merged, asked, validation, triggers, forward).mean_accuracy
    chosen = max(scores, key=lambda lam: scores[lam])

    def planted(inputs: Tensor) -> Tensor:
        """The trigger where inputs are embedded already; its vector is the merged model's at that moment."""
        table: Any = base.get_input_embeddings
        row = table().weight[token].expand(len(inputs), 1, -1)
        return torch.cat([inputs[:, :1], row, inputs[:, 2:]], 1)

    settings = {"steps": steps, "mask_steps": mask_steps, "inversion_steps": inversion_steps, "rows": rows}
    report = json.loads(kept.read_text()) if kept.is_file() else {}
    if report.get("facts", {}).get("settings") != settings:
        curve, before = {}, {}
        for lam in LAMBDAS:
            merged.load_state_dict(plain(lam), strict=False)
            curve[f"{lam:g}"] = measure(merged, asked, tests, triggers, forward).as_dict()
        before[f"plain merge, λ = {chosen}"] = curve[f"{chosen:g}"]
        alone = {
            task: measure(model, asked, {task: tests[task]}, triggers if task == ATTACKED else {}, forward)
            for task, model in models.items()
        }
        report = {
            "note": NOTE,
            "rows": before,
            "plain_merge_curve": curve,
            "facts": {
                "settings": settings,
                "λ": chosen,
                "validation accuracy": scores,
                "individual": {
                    "accuracy": sum(own.accuracy[task].value for task, own in alone.items()) / len(alone),
                    "success": alone[ATTACKED].success[ATTACKED].value,
                },
                "base": measure(base, asked, tests, triggers, forward).as_dict(),
            },
        }
        kept.write_text(json.dumps(report, indent=1))
    for name, options in ROWS.items():
        if name in report["rows"] or name not in only:
            continue
        known: dict[str, Any] = (
            {"known_triggers": {ATTACKED: [planted]}} if options.get("safety_source") == "known" else {}
        )
        began = time.perf_counter()
        result = dam_merge(
            base,
            models,
            data=adapt,
            heads=heads,
            forward=forward,
            config=DamConfig(lam0=chosen, mask_steps=mask_steps, inversion_steps=inversion_steps, **options, **known),
            seed=seed,
        )
        spent = round(time.perf_counter() - began, 1)
        merged.load_state_dict(result.state_dict)
        report["rows"][name] = measure(merged, asked, tests, triggers, forward).as_dict()
        report["facts"][name] = {"seconds": spent, "warnings": result.warnings}
        if result.scan:
            report["facts"][name]["scan"] = result.scan
        kept.write_text(json.dumps(report, indent=1))
        own = report["rows"][name]
        print(
            f"seed {seed}, {name}: accuracy {own['mean_accuracy']:.3f}, attack success {own['mean_success']:.3f}, {spent} s",
            file=sys.stderr,
            flush=True,
        )


def summary(out: Path) -> str:
    """Means over the seeds that are there."""
    seeds = [json.loads(file.read_text()) for file in sorted(out.glob("seed-*.json"))]
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for own in seeds:
        alone, base = own["facts"]["individual"], own["facts"]["base"]
        rows.setdefault("individual models", []).append((alone["accuracy"], alone["success"], 0.0))
        rows.setdefault("base", []).append((base["mean_accuracy"], base["mean_success"], base["mean_flips"]))
        curve = {f"plain merge, λ = {lam}": row for lam, row in own["plain_merge_curve"].items()}
        best = {"plain merge, best λ": own["plain_merge_curve"][f"{own['facts']['λ']:g}"]}
        named = {name: row for name, row in own["rows"].items() if not name.startswith("plain")}
        for name, row in {**curve, **best, **named}.items():
            rows.setdefault(name, []).append((row["mean_accuracy"], row["mean_success"], row["mean_flips"]))
    lines = [
        f"{ATTACKED} poisoned, token {TOKEN!r} ({len(seeds)} seeds)",
        f"{'':32} accuracy  success (range)      flips",
    ]
    for name, values in rows.items():
        accuracy, success, flips = (100 * sum(column) / len(values) for column in zip(*values))
        least, most = (100 * pick(value[1] for value in values) for pick in (min, max))
        lines.append(f"{name:32} {accuracy:8.1f}  {success:6.1f} ({least:.0f}-{most:.0f}) {flips:10.1f}")
    return "\n".join([*lines, "", NOTE])


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/dam-text"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100, help="fine-tuning steps of each model")
    parser.add_argument("--mask-steps", type=int, default=150)
    parser.add_argument("--inversion-steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=1000, help="texts of each validation and test split")
    parser.add_argument("--only", default=";".join(ROWS), help="names of rows, separated by `;`")
    chosen = parser.parse_args(arguments)
    only = chosen.only.split(";")
    if unknown := set(only) - set(ROWS):
        parser.error(f"--only: there are no rows {', '.join(sorted(unknown))}; there are {'; '.join(ROWS)}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, chosen.seeds.split(",")):
        kept = chosen.out / f"seed-{seed}.json"
        if not kept.is_file() or not set(only) <= set(json.loads(kept.read_text())["rows"]):
            one_seed(seed, chosen.steps, chosen.mask_steps, chosen.inversion_steps, chosen.rows, kept, only)
    told = summary(chosen.out)
    (chosen.out / "dam-text.txt").write_text(told + "\n")
    print(told)
    return told


if __name__ == "__main__":
    main()
