"""The authors' training traces and objectives, through `fit` and the public objectives."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from merging.learn.composition import Composition
from merging.learn.fit import AdamWSpec, fit, scheduled
from merging.learn.objectives import (
    Entropy,
    MultiTask,
    Negation,
    Penalty,
    Supervised,
    Verdict,
    softmax_entropy,
    ufm_loss,
)


def close(found, wanted, tolerance):
    scale = float(wanted.double().abs().max()) or 1.0
    error = float((torch.as_tensor(found).detach().double() - wanted.double()).abs().max()) / scale
    assert error <= tolerance, error


def steps_of(composition, objective, batches, **options):
    """Coefficients after each step, and the run."""
    seen = []
    run = fit(
        composition,
        objective,
        batches,
        every=1,
        evaluate=lambda model: seen.append(composition.coefficients.clone()) or 0.0,
        keep="last",
        **options,
    )
    return torch.stack(seen[1:]), run


@pytest.mark.parametrize("clip_mode", ["true", "normalized"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize("section", ["plain", "kpart", "linear"])
def test_few_shot_traces_are_the_authors(golden, head, section, dtype, tolerance, clip_mode):
    file = golden(section)
    options = {"plain": {}, "kpart": {"partitions": file.under("kpart/mask/")}, "linear": {"mode": "linear"}}[section]
    composition = Composition(file.model(dtype), file.vectors(), **options)
    weight, bias = file["head/weight"].to(dtype), file["head/bias"].to(dtype)
    batches = [(file["x"][s].to(dtype), file["y"][s]) for s in range(5)]
    objective = Supervised(head=lambda features: head(features, weight, bias))
    coefficients, run = steps_of(composition, objective, batches, optimizer=AdamWSpec(lr=0.1), clip_mode=clip_mode)
    trace = f"{section}/trace" if clip_mode == "true" else f"{section}/trace_scaler"
    close(torch.tensor(run.losses, dtype=torch.float64), file[f"{trace}/loss"], tolerance)
    close(torch.tensor([r["lr"] for r in run.history if "lr" in r], dtype=torch.float64), file[f"{trace}/lr"], 1e-12)
    close(
        torch.tensor([r["norm"] for r in run.history if "lr" in r], dtype=torch.float64),
        file[f"{trace}/grad_norm"],
        tolerance,
    )
    close(coefficients, file[f"{trace}/coef"], tolerance)


@pytest.mark.parametrize("clip_mode", ["true", "normalized"])
@pytest.mark.parametrize("section", ["addition", "addition_l1", "negation"])
def test_addition_and_negation_traces_are_the_authors(golden, head, section, clip_mode):
    file = golden("addition_negation")
    tasks = 1 if section == "negation" else 3
    composition = Composition(file.model(torch.float64), file.vectors(tasks))

    def supervised(t):
        weight, bias = file["multi/head_weight"][t].double(), file["multi/head_bias"][t].double()
        return Supervised(head=lambda features: head(features, weight, bias))

    def batch(s, t):
        return file["multi/x"][s, t].double(), file["multi/y"][s, t]

    if section == "negation":
        objective = Negation(supervised(0), supervised(3))
        batches = [{"target": batch(s, 0), "control": batch(s, 3)} for s in range(5)]
    else:
        objective = MultiTask({f"task{t}": supervised(t) for t in range(3)})
        batches = [{f"task{t}": batch(s, t) for t in range(3)} for s in range(5)]
    trace = f"{section}/trace" if clip_mode == "true" else f"{section}/trace_scaler"
    if section == "negation":
        objective.judge = lambda metrics, first: Verdict(0.0)
    coefficients, run = steps_of(
        composition,
        objective,
        batches,
        optimizer=AdamWSpec(lr=5e-3 if section == "negation" else 1e-3),
        schedule="constant",
        clip_mode=clip_mode,
        penalty=Penalty(0.5, 1) if section == "addition_l1" else None,
    )
    close(torch.tensor(run.losses, dtype=torch.float64), file[f"{trace}/loss"], 1e-11)
    close(
        torch.tensor([r["norm"] for r in run.history if "lr" in r], dtype=torch.float64),
        file[f"{trace}/grad_norm"],
        1e-11,
    )
    close(coefficients, file[f"{trace}/coef"], 1e-11)


@pytest.mark.parametrize("p", [1, 2])
def test_penalties_are_the_authors(golden, p):
    file = golden("objectives")
    value, grad = Penalty(0.5, p).value_and_gradient(file["reg/coef"])
    close(value, file[f"reg/l{p}/value"][0], 1e-12)
    close(grad, file[f"reg/l{p}/grad"], 1e-12)


@pytest.mark.parametrize(("section", "p"), [("addition_l1", 1), ("addition_l2", 2)])
def test_penalised_loss_and_gradient_are_the_authors(golden, head, section, p):
    file = golden("addition_negation")
    composition = Composition(file.model(torch.float64), file.vectors(3))
    composition.coefficients = file[f"{section}/coef"]
    model = composition.model

    def closure():
        for t in range(3):
            weight, bias = file["multi/head_weight"][t].double(), file["multi/head_bias"][t].double()
            yield cross_entropy(head(model(file["multi/x"][0, t].double()), weight, bias), file["multi/y"][0, t])

    with composition:
        loss, grad = composition.gradient(closure)
    value, slope = Penalty(0.5, p).value_and_gradient(composition.coefficients)
    close(value, file[f"{section}/reg"][0], 1e-12)
    close(loss + value, file[f"{section}/loss"][0], 1e-12)
    close(grad + slope, file[f"{section}/grad"], 1e-12)


def test_entropy_is_the_authors(golden):
    file = golden("objectives")
    logits = file["logits_strong"].clone().requires_grad_(True)
    close(softmax_entropy(logits), file["entropy/per_sample"], 1e-12)
    (term,) = Entropy(forward=lambda model, x: x).terms(None, logits)
    loss = term.total / term.number
    close(loss, file["entropy/loss"][0], 1e-12)
    close(torch.autograd.grad(loss, logits)[0], file["entropy/grad_logits"], 1e-12)


@pytest.mark.parametrize("threshold", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize(("section", "compat"), [("ufm_main", "released"), ("ufm_ssl_branch", "paper")])
def test_pseudo_label_loss_is_the_authors(golden, section, compat, everyone, threshold):
    file = golden("objectives")
    strong = file["logits_strong"].clone().requires_grad_(True)
    trusted = torch.ones_like(file["trusted"]) if everyone else file["trusted"]
    total, count = ufm_loss(
        file["logits_weak"], strong, file["targets_onehot"], trusted, threshold=threshold, compat=compat
    )
    loss = total / count
    where = f"{section}/thresh_{threshold}" + ("/all_trusted" if everyone else "")
    close(loss, file[f"{where}/loss"][0], 1e-12)
    close(torch.autograd.grad(loss, strong)[0], file[f"{where}/grad_logits"], 1e-12)


@pytest.mark.parametrize(("warmup", "total"), [(0, 5), (0, 50), (3, 20)])
def test_cosine_schedule_is_the_authors(golden, warmup, total):
    file = golden("objectives")
    found = [0.1 * scheduled("cosine", step, total, warmup) for step in range(total)]
    close(torch.tensor(found, dtype=torch.float64), file[f"cosine/base0.1_warmup{warmup}_total{total}"], 1e-12)
