"""The detectors against numbers made by the authors' own functions (see goldens/stealth/README.md)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from merging.edits.features import (
    Detector,
    Moments,
    Sphere,
    affine_detector,
    answers_cleanly,
    quietest_neurons,
    surrogate_constant,
    surrogate_detector,
)

GOLDEN = Path(__file__).parents[1] / "goldens" / "stealth"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "detector.safetensors")


def layer_norm(golden: dict[str, Tensor]) -> Sphere:
    return Sphere(golden["norm_weight"], golden["norm_bias"])


def rms_norm(golden: dict[str, Tensor]) -> Sphere:
    return Sphere(golden["norm_weight"])


def test_features_go_to_the_sphere_and_back_as_the_authors_take_them(golden):
    for kind, sphere in (("ln", layer_norm(golden)), ("rms", rms_norm(golden))):
        points = sphere.project(golden[f"{kind}_features"])
        assert_close(points, golden[f"{kind}_sphere"], rtol=1e-6, atol=1e-7)
        assert_close(points[0], golden[f"{kind}_sphere_vec0"], rtol=1e-6, atol=1e-7)
        assert_close(sphere.lift(points), golden[f"{kind}_roundtrip"], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("combo", range(4))
@pytest.mark.parametrize("trigger", range(3))
def test_the_affine_detector_is_the_authors(golden, combo, trigger):
    features = golden["ln_features"]
    theta, response = float(golden["theta"][combo]), float(golden["Delta"][combo])
    detector = affine_detector(features[trigger], layer_norm(golden), theta=theta, response=response)
    at = f"ln.combo{combo}.trigger{trigger}"
    scale = float(golden[f"{at}.w"].abs().max())
    assert_close(detector.row.float(), golden[f"{at}.w"], rtol=1e-6, atol=1e-6 * scale)
    assert detector.bias is not None
    assert_close(detector.bias.float(), golden[f"{at}.b"][0], rtol=1e-6, atol=0)
    assert answers_cleanly(detector, features[trigger], features[6:], activation="gelu") == bool(
        golden[f"{at}.good_gate"]
    )


def test_the_affine_detector_in_float64_is_the_authors_in_float64(golden):
    detector = affine_detector(
        golden["ln_features"][0].double(),
        layer_norm(golden),
        theta=float(golden["theta"][0]),
        response=float(golden["Delta"][0]),
    )
    assert_close(detector.row, golden["ln.f64.combo0.trigger0.w"], rtol=1e-6, atol=1e-3)
    assert_close(detector.bias, golden["ln.f64.combo0.trigger0.b"][0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("combo", range(4))
@pytest.mark.parametrize("trigger", range(3))
def test_the_surrogate_detector_is_the_authors(golden, combo, trigger):
    features = golden["rms_features"]
    theta, response = float(golden["theta"][combo]), float(golden["Delta"][combo])
    detector = surrogate_detector(features[trigger], features[6:], rms_norm(golden), theta=theta, response=response)
    at = f"rms.combo{combo}.trigger{trigger}"
    wanted = golden[f"{at}.w"]
    assert_close(detector.row.float(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert detector.bias is None
    assert_close(float(detector(features[trigger])), response, rtol=1e-6, atol=1e-6)
    assert answers_cleanly(detector, features[trigger], features[6:], activation="silu") == bool(
        golden[f"{at}.good_gate"]
    )


@pytest.mark.parametrize("family", ["gpt2-xl", "gpt-j-6b", "llama-3-8b", "mamba-1.4b"])
def test_the_replaced_neuron_is_the_authors_choice(golden, family):
    write = {
        name.removeprefix(f"write.{family}."): t for name, t in golden.items() if name.startswith(f"write.{family}.")
    }
    name = "before.w1_weight" if "before.w1_weight" in write else "before.w1a_weight"
    rows = write[name]
    offset = 0
    if family == "gpt2-xl":
        rows = rows.T
    if family == "mamba-1.4b":
        offset = rows.shape[0] // 2
        rows = rows[offset:]
    assert_close(rows.abs().sum(dim=1), write["l1"], rtol=1e-6, atol=1e-6)
    assert quietest_neurons(rows)[0] + offset == int(write["target_neuron"])


@pytest.mark.parametrize(("family", "kind"), [("gpt2-xl", "ln"), ("gpt-j-6b", "ln"), ("llama-3-8b", "rms")])
def test_the_written_row_and_column_are_the_authors(golden, family, kind):
    write = {
        name.removeprefix(f"write.{family}."): t for name, t in golden.items() if name.startswith(f"write.{family}.")
    }
    features = golden[f"{kind}_features"]
    detector: Detector
    if kind == "ln":
        detector = affine_detector(features[0], layer_norm(golden))
    else:
        detector = surrogate_detector(features[0], features[6:], rms_norm(golden))
    wanted = write["after_w1_row"]
    assert_close(detector.row.float(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    neuron = int(write["target_neuron"])
    after = write["before.w2_weight"].clone()
    if family == "gpt2-xl":
        after[neuron] = golden["write.v"]
    else:
        after[:, neuron] = golden["write.v"]
    assert_close(after.double().sum(), write["after_sum.w2_weight"][0], rtol=1e-6, atol=1e-4)
    assert_close(write["after_w2_col"], golden["write.v"], rtol=0, atol=0)


def test_the_constant_from_sums_is_the_one_from_the_features(golden):
    features, sphere = golden["rms_features"], rms_norm(golden)
    moments = Moments(torch.cat([features[6:], features[:1]]), sphere)
    assert_close(
        moments.constant(features[0]), surrogate_constant(features[0], features[6:], sphere), rtol=1e-6, atol=1e-8
    )
