"""The authors' numbers, through the public names."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from merging.learn.composition import Composition

EXACT = {torch.float64: 1e-12, torch.float32: 5e-6}


def close(found, wanted, tolerance):
    scale = float(wanted.double().abs().max()) or 1.0
    error = float((found.detach().double().cpu() - wanted.double()).abs().max()) / scale
    assert error <= tolerance, error


def composition_of(file, section, dtype, **options):
    model = file.model(dtype)
    return model, Composition(model, file.vectors(), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("section", ["plain", "iso", "kpart", "linear"])
def test_forward_loss_and_gradient_are_the_authors(golden, head, section, dtype):
    file = golden("plain" if section == "iso" else section)
    options = {
        "plain": {},
        "iso": {"granularity": "global"},
        "kpart": {"partitions": file.under("kpart/mask/")},
        "linear": {"mode": "linear"},
    }[section]
    model, composition = composition_of(file, section, dtype, **options)
    wanted = file[f"{section}/coef"]
    composition.coefficients = wanted.view(composition.coefficients.shape)
    x, y = file["x"][0].to(dtype), file["y"][0]
    weight, bias = file["head/weight"].to(dtype), file["head/bias"].to(dtype)
    tolerance = EXACT[dtype]
    with composition:
        composition.compose_()
        features = model(x)
        close(features, file[f"{section}/features"], tolerance)
        close(head(features, weight, bias), file[f"{section}/logits"], tolerance)
        loss, grad = composition.gradient(lambda: cross_entropy(head(model(x), weight, bias), y))
    close(loss, file[f"{section}/loss"][0], tolerance)
    close(grad, file[f"{section}/grad"].view(grad.shape), tolerance)


@pytest.mark.parametrize("section", ["plain", "kpart"])
def test_composed_weights_are_the_authors(golden, section):
    file = golden(section)
    options = {"partitions": file.under("kpart/mask/")} if section == "kpart" else {}
    model, composition = composition_of(file, section, torch.float64, **options)
    composition.coefficients = file[f"{section}/coef"]
    with composition:
        composition.compose_()
        for name, parameter in model.named_parameters():
            close(parameter, file[f"{section}/composed/{name}"], 1e-13)
    for name, value in file.under("base/").items():
        assert torch.equal(dict(model.named_parameters())[name], value.double())


def test_blocks_are_the_named_parameters_in_order(golden):
    file = golden("plain")
    _, composition = composition_of(file, "plain", torch.float32)
    assert list(composition.blocks) == file.blocks
    assert composition.tasks == ("task0", "task1", "task2", "task3")
    assert composition.coefficients.dtype == torch.float32
    dead = [i for i, name in enumerate(file.blocks) if name in ("logit_scale", "token_embedding.weight")]
    assert not composition.live[:, dead].any()


@pytest.mark.parametrize("section", ["addition", "negation"])
def test_several_heads_give_the_authors_gradient(golden, head, section):
    file = golden("addition_negation")
    tasks = 3 if section == "addition" else 1
    model = file.model(torch.float64)
    composition = Composition(model, file.vectors(tasks))
    composition.coefficients = file[f"{section}/coef"]

    def closure():
        used = [0, 1, 2] if section == "addition" else [0, 3]
        for t in used:
            x, y = file["multi/x"][0, t].double(), file["multi/y"][0, t]
            weight, bias = file["multi/head_weight"][t].double(), file["multi/head_bias"][t].double()
            loss = cross_entropy(head(model(x), weight, bias), y)
            yield -loss if section == "negation" and t == 0 else loss

    with composition:
        loss, grad = composition.gradient(closure)
    close(loss, file[f"{section}/loss"][0], 1e-12)
    close(grad, file[f"{section}/grad"], 1e-12)
