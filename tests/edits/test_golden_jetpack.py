"""The jet-pack against the authors' block and block-building routine (see goldens/stealth/README.md)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from merging.edits.features import Sphere
from merging.edits.jetpack import JetPack

GOLDEN = Path(__file__).parents[1] / "goldens" / "stealth"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "jetpack.safetensors")


def case(golden: dict[str, Tensor], name: str, compat: str | None = None) -> tuple[JetPack, dict[str, Tensor]]:
    own = {key.removeprefix(f"{name}."): value for key, value in golden.items() if key.startswith(f"{name}.")}
    sphere = Sphere(own["norm_weight"])
    centroid = sphere.project(own["features_wiki"][:500]).mean(dim=0)
    pack = JetPack.from_features(
        own["features_bad"][own["trigger_index"]],
        own["residual"],
        sphere,
        centroid,
        theta=float(own["theta"]),
        response=float(own["Delta"]),
        compat=compat,
    )
    return pack, own


def relative(value: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert_close(value.float(), wanted.float(), rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["sharp", "wide"])
def test_detectors_of_the_block_are_the_authors(golden, name):
    pack, own = case(golden, name)
    relative(pack.centroid, own["centroid"])
    relative(pack.W1, own["W1"])
    relative(pack.b1, own["b1"])
    relative(pack.hidden(own["forward.x"]), own["forward.hidden"])


def test_output_weights_are_the_authors_where_triggers_do_not_cross_talk(golden):
    pack, own = case(golden, "sharp")
    relative(pack.W2, own["W2"])
    relative(pack(own["forward.x"]), own["forward.y"])


def test_with_cross_talk_the_authors_weights_come_from_the_compatible_form(golden):
    pack, own = case(golden, "wide", compat="authors")
    relative(pack.W2, own["W2"])
    relative(pack(own["forward.x"]), own["forward.y"])


def test_with_cross_talk_the_solved_weights_are_exact_and_the_authors_are_not(golden):
    solved, own = case(golden, "wide")
    theirs, _ = case(golden, "wide", compat="authors")
    triggers, wanted = own["features_bad"][own["trigger_index"]].double(), own["residual"].double()
    assert_close(solved(triggers), wanted, rtol=1e-6, atol=1e-6)
    wrong = float((theirs(triggers) - wanted).norm(dim=1).max() / wanted.norm(dim=1).max())
    assert wrong > 1


@pytest.mark.parametrize("name", ["sharp", "wide"])
def test_firing_rates_and_cross_talk_are_the_authors(golden, name):
    pack, own = case(golden, name)
    others = torch.ones(len(own["features_bad"]), dtype=torch.bool)
    others[own["trigger_index"]] = False
    groups = {"wiki": own["features_wiki"][500:], "other": own["features_bad"][others]}
    groups["all_other"] = torch.cat([groups["other"], own["features_good"]])
    for group, features in groups.items():
        each, either = pack.rates(features)
        relative(each, own[f"stat.editwise_fpr_{group}"])
        assert either == pytest.approx(float(own[f"stat.fpr_{group}"]), abs=1e-6)
    assert len({i for pair in pack.cross_talk() for i in pair}) == int(own["stat.crosstalk_count"])


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_bare_block_is_the_authors(golden, renormalise, bias):
    own = {key.removeprefix("block."): value for key, value in golden.items() if key.startswith("block.")}
    pack = JetPack.from_features(
        torch.zeros(0, 16),
        torch.zeros(0, 16),
        Sphere(own["norm_weight"], own["norm_bias"] if bias else None),
        own["centroid"],
        renormalise=renormalise,
    )
    pack.W1, pack.b1, pack.W2 = own["W1"].double(), torch.zeros(5).double(), own["W2_rows"].T.double()
    if "b1" in own:
        pack.b1 = own["b1"].double()
    pack._copies.clear()
    wanted = own[f"y.renorm{int(renormalise)}.bias{int(bias)}"]
    relative(pack(own["x"]), wanted)
    relative(own["x"] + pack(own["x"]), own[f"identity_plus.renorm{int(renormalise)}.bias{int(bias)}"])
