import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from merging.commands.audit import audit as command
from merging.edits.audit import AuditReport, audit, neuron_changes, neuron_statistics, tail_units
from merging.edits.edit import EditedSource, save_edits
from merging.edits.features import affine_detector, surrogate_detector
from merging.edits.layouts import mlp_layout
from merging.edits.optimise import Optimisation
from merging.edits.site import Site
from merging.edits.stealth import edit_in_place, edit_widen
from taskvec.errors import (
    DataError,
    MismatchError,
    NonFiniteError,
    NotAModelError,
    NotFoundError,
    TaskvecError,
    UsageError,
)
from taskvec.source import in_memory
from taskvec.vector import TaskVector

State = dict[str, Tensor]
TEXT = torch.randint(3, 89, (24, 48), generator=torch.Generator().manual_seed(9))


def state_of(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def trained_apart(state: State, seed: int, size: float = 0.02) -> State:
    """Every matrix moved by noise in proportion to its own scale, unevenly over its rows, as training does."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 2:
            noise = (
                noise
                * torch.rand(tensor.shape[0], 1, generator=generator).add(0.3)
                * torch.rand(1, tensor.shape[1], generator=generator).add(0.3)
            )
        moved[name] = tensor + size * noise * (tensor.std() if tensor.numel() > 1 else 0.0)
    return moved


def planted(model: Any, layer: int, theta: float, *, seed: int = 0) -> tuple[State, int]:
    """A planted row and column, from the formulas alone: no optimisation, an arbitrary answer."""
    site = Site.find(model, layer)
    assert site.inside is not None
    assert site.out is not None
    with site.reading() as seen, torch.no_grad():
        for start in range(0, len(TEXT), 8):
            model(input_ids=TEXT[start : start + 8])
    features = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in seen])
    trigger = features[47 * (seed + 1)]
    others = torch.cat([features[: 47 * (seed + 1)], features[47 * (seed + 1) + 1 :]])
    if site.inside.bias_name is not None:
        detector = affine_detector(trigger, site.sphere, theta=theta)
    else:
        detector = surrogate_detector(trigger, others, site.sphere, theta=theta)
    copied = copy.deepcopy(model)
    layout = mlp_layout(in_memory(copied))
    mlp = layout.mlps[layer]
    source = in_memory(copied)
    rows, columns = mlp.inside.rows(source, mlp.neurons), mlp.out.rows(source, mlp.neurons)
    neuron = int(rows.abs().sum(1).argmin())
    answer = torch.randn(mlp.width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        columns[neuron] = 2 * columns.norm(dim=1).median() * answer / answer.norm()
        rows[neuron] = detector.row.float()
        if detector.bias is not None:
            biases = mlp.inside.biases(source, mlp.neurons)
            assert biases is not None
            biases[neuron] = float(detector.bias)
    return state_of(copied), neuron


def alarmed(report: AuditReport) -> list[tuple[int | None, int]]:
    return [(suspect.layer, suspect.neuron) for suspect in report.alarms]


BIASED = ["gpt2", "gpt_neox", "opt", "phi", "bloom", "llama with biases"]
BARE = ["llama", "qwen2", "gemma2", "phi3", "falcon"]


@pytest.mark.parametrize("name", BIASED + BARE)
@pytest.mark.parametrize("theta", [0.005, 0.1])
def test_a_planted_neuron_is_the_one_alarm_with_and_without_the_base(
    name: str, theta: float, tiny_model: Callable[..., nn.Module]
) -> None:
    model = tiny_model(name)
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    clean = audit(model)
    assert clean.alarms == ()
    state, neuron = planted(model, 1, theta)
    edited = copy.deepcopy(model)
    edited.load_state_dict(state)
    assert alarmed(audit(edited)) == [(1, neuron)]
    against = audit(edited, base=model)
    assert alarmed(against) == [(1, neuron)]
    assert "1 of 96 neurons" in against.text() or "1 of 128 neurons" in against.text()
    assert config["model_type"] in name.replace(" with biases", "") or name == "phi"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_it_is_found_after_a_merge_with_fine_tunes_and_after_rounding(
    name: str, stored: torch.dtype, share: float, tiny_model: Callable[..., nn.Module]
) -> None:
    model = tiny_model(name)
    base = state_of(model)
    state, neuron = planted(model, 2, 0.05)
    tuned = [trained_apart(base, seed) for seed in range(3)]
    if share == 1.0:
        merged = {key: state[key] + sum(0.5 * (one[key] - base[key]) for one in tuned) for key in base}
    else:
        merged = {key: (state[key] + sum(one[key] for one in tuned)) / 4 for key in base}
    merged = {key: value.to(stored) for key, value in merged.items()}
    assert alarmed(audit(merged)) == [(2, neuron)]
    assert alarmed(audit(merged, base=base)) == [(2, neuron)]


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3"])
@pytest.mark.parametrize("kind", ["fine-tune", "far", "average", "sum", "bf16", "sparse", "one layer", "drop"])
def test_fine_tunes_and_merges_raise_no_alarm(name: str, kind: str, tiny_model: Callable[..., nn.Module]) -> None:
    base = state_of(tiny_model(name))
    tuned = [trained_apart(base, seed, size=1.0 if kind == "far" else 0.02) for seed in range(3)]
    state = tuned[0]
    if kind == "average":
        state = {key: sum(one[key] for one in tuned) / 3 for key in base}  # type: ignore[misc]
    if kind == "sum":
        state = {key: base[key] + sum(one[key] - base[key] for one in tuned) for key in base}
    if kind == "bf16":
        state = {key: value.bfloat16() for key, value in state.items()}
    if kind == "sparse":
        state = {key: torch.where(torch.rand(value.shape) < 0.01, state[key], value) for key, value in base.items()}
    if kind == "one layer":
        state = {key: state[key] if ".1." in key else value for key, value in base.items()}
    if kind == "drop":
        kept = {
            key: torch.rand(value.shape, generator=torch.Generator().manual_seed(1)) < 0.1
            for key, value in base.items()
        }
        state = {key: base[key] + 10 * kept[key] * (state[key] - base[key]) for key in base}
    assert audit(state).alarms == ()
    assert audit(state, base=base).alarms == ()


def test_a_checkpoint_only_stored_in_another_dtype_has_not_changed(tiny_model: Callable[..., nn.Module]) -> None:
    base = state_of(tiny_model("llama"))
    half = {key: value.bfloat16() for key, value in base.items()}
    for state, against in ((half, base), (base, half)):
        report = audit(state, base=against)
        assert report.suspects == ()
        for one in report.mlps:
            assert one.changes is not None
            assert not bool(one.changes.changed.any())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_a_widened_mlp_gives_itself_away(name: str, tiny_model: Callable[..., nn.Module]) -> None:
    model: Any = tiny_model(name)
    edit = edit_widen(
        model,
        [{"prompt": [5, 6, 7, 8], "target": [11]}],
        layer=1,
        theta=0.05,
        pad_to=16,
        corpus=TEXT.tolist(),
        optimisation=Optimisation(steps=3),
    )
    edits = edit if isinstance(edit, list) else [edit]
    source = EditedSource(in_memory(model), edits)
    alone = audit(source)
    assert {neuron for _, neuron in alarmed(alone)} == set(edits[0].neurons)
    assert "are all zero" in alone.text()
    assert any("most layers hold only zeros" in reason for reason in alone.alarms[0].reasons)
    against = audit(source, base=model)
    assert {neuron for _, neuron in alarmed(against)} == set(edits[0].neurons)
    assert any("beyond the base's" in reason for reason in against.alarms[0].reasons)


def test_a_declared_edit_is_listed_and_a_forged_one_is_not(
    tmp_path: Path, tiny_model: Callable[..., nn.Module]
) -> None:
    model: Any = tiny_model("gpt2")
    edits = edit_in_place(
        model, [{"prompt": [5, 6, 7, 8], "target": [11]}], layer=1, theta=0.05, optimisation=Optimisation(steps=3)
    )
    assert isinstance(edits, list)
    save_edits(edits, tmp_path / "edits.safetensors")
    source = EditedSource(in_memory(model), edits)
    assert alarmed(audit(source)) == [(1, edits[0].neurons[0])]
    report = audit(source, declared=[tmp_path / "edits.safetensors"])
    assert report.alarms == ()
    assert [suspect.verdict for suspect in report.suspects] == ["declared"]
    assert report.suspects[0].edit is not None
    assert "→" in report.suspects[0].edit
    assert "declared edit:" in report.text()

    state = {name: source.read(name).clone() for name in source.infos}
    forged = next(patch for patch in edits[0].patches if patch.new.ndim == 1 and "c_proj" in patch.name)
    state[forged.name].select(forged.dim, forged.index).mul_(-1)
    report = audit(state, declared=edits)
    assert alarmed(report) == [(1, edits[0].neurons[0])]
    assert "is not in the checkpoint as declared" in report.text()


def test_a_record_in_the_models_own_folder_is_read(tmp_path: Path, tiny_model: Callable[..., nn.Module]) -> None:
    model: Any = tiny_model("gpt2")
    edits = edit_in_place(
        model, [{"prompt": [5, 6, 7, 8], "target": [11]}], layer=0, theta=0.1, optimisation=Optimisation(steps=2)
    )
    assert isinstance(edits, list)
    source = EditedSource(in_memory(model), edits)
    save_file({name: source.read(name).contiguous().clone() for name in source.infos}, tmp_path / "model.safetensors")
    save_edits(edits, tmp_path / "edits.safetensors")
    assert [suspect.verdict for suspect in audit(tmp_path).suspects] == ["declared"]


@pytest.mark.parametrize("name", ["gpt2", "stablelm"])
def test_the_turn_on_cosine_says_when_a_neuron_can_fire(name: str, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model(name)
    source = in_memory(model)
    mlp = mlp_layout(source).mlps[0]
    statistics = neuron_statistics(source, mlp)
    points = torch.randn(4000, mlp.width, generator=torch.Generator().manual_seed(3))
    points = nn.functional.normalize(points - points.mean(1, keepdim=True), dim=1)
    assert mlp.norm_bias is not None
    shift = source.read(mlp.norm_bias)
    x = points * mlp.scale(source) * math.sqrt(mlp.width) + shift
    rows = mlp.inside.rows(source, mlp.neurons)
    bias = mlp.inside.biases(source, mlp.neurons)
    pre = x @ rows.T + (0 if bias is None else bias)
    directed = rows * mlp.scale(source)
    directed = nn.functional.normalize(directed - directed.mean(1, keepdim=True), dim=1)
    if bias is None:
        assert statistics.turn_on is None
    else:
        assert statistics.turn_on is not None
        margin = points @ directed.T - statistics.turn_on
        sure = margin.abs() > 1e-4
        assert torch.equal((pre > 0)[sure], (margin > 0)[sure])
    # no feature passes the reach
    assert bool((pre - (rows @ shift + (0 if bias is None else bias)) <= statistics.reach * 1.0001).all())


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(0.01, 100), width=st.integers(4, 12), seed=st.integers(0, 99))
def test_the_marks_do_not_depend_on_units(scale: float, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gain = torch.rand(width, generator=generator) + 0.5
    state = {
        "h.0.ln_2.weight": gain,
        "h.0.ln_2.bias": torch.randn(width, generator=generator),
        "h.0.mlp.fc1.weight": torch.randn(40, width, generator=generator),
        "h.0.mlp.fc1.bias": torch.randn(40, generator=generator),
        "h.0.mlp.fc2.weight": torch.randn(width, 40, generator=generator),
    }
    # rows and biases times, columns divided by a number; the norm's weight absorbed by the row
    other = dict(state)
    other["h.0.mlp.fc1.weight"] = state["h.0.mlp.fc1.weight"] * scale
    other["h.0.mlp.fc1.bias"] = state["h.0.mlp.fc1.bias"] * scale
    other["h.0.mlp.fc2.weight"] = state["h.0.mlp.fc2.weight"] / scale
    first, second = (neuron_statistics(in_memory(one), mlp_layout(in_memory(one)).mlps[0]) for one in (state, other))
    for name in ("turn_on", "spread", "path", "alignment"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=1e-3, atol=1e-5)


def test_tail_units_are_right_for_an_exponential_tail_and_hardly_moved_by_planted_values() -> None:
    values = -torch.rand(100_000, generator=torch.Generator().manual_seed(0)).log()
    units = tail_units(values)
    beyond = float((units > 5).double().mean())
    assert beyond == pytest.approx(0.1 * math.exp(-5), rel=0.25)
    planted_too = torch.cat([values, torch.full((1000,), 60.0)])
    assert float(tail_units(planted_too)[-1]) > 0.75 * float(tail_units(torch.tensor([60.0]), values))


def test_changes_are_lengths_of_row_and_column_differences(tiny_model: Callable[..., nn.Module]) -> None:
    base = state_of(tiny_model("gpt2"))
    state = {key: value.clone() for key, value in base.items()}
    state["transformer.h.1.mlp.c_fc.weight"][:, 7] += 3.0
    state["transformer.h.1.mlp.c_fc.bias"][7] += 4.0
    state["transformer.h.1.mlp.c_proj.weight"][7] -= 2.0
    sources = in_memory(state), in_memory(base)
    mlps = [mlp_layout(source).mlps[1] for source in sources]
    changes = neuron_changes(sources[0], mlps[0], sources[1], mlps[1])
    assert changes.changed.nonzero().flatten().tolist() == [7]
    assert float(changes.row[7]) == pytest.approx(math.sqrt(32 * 9 + 16), rel=1e-5)
    assert float(changes.column[7]) == pytest.approx(math.sqrt(32 * 4), rel=1e-5)
    typical = base["transformer.h.1.mlp.c_proj.weight"].norm(dim=1).median()
    assert float(changes.relative_column[7]) == pytest.approx(math.sqrt(32 * 4) / float(typical), rel=1e-5)


def test_fifty_edits_in_one_layer_do_not_hide_each_other(tiny_model: Callable[..., nn.Module]) -> None:
    model: Any = tiny_model("gpt2")
    base = state_of(model)
    state = trained_apart(base, 3)
    name = "transformer.h.2.mlp"
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(128, generator=generator)[:6].tolist()
    for neuron in chosen:
        row = torch.randn(32, generator=generator)
        state[f"{name}.c_fc.weight"][:, neuron] = 1000 * row / row.norm()
        state[f"{name}.c_fc.bias"][neuron] = -5000.0
        state[f"{name}.c_proj.weight"][neuron] = 0.5 * torch.randn(32, generator=generator)
    assert sorted(neuron for _, neuron in alarmed(audit(state))) == sorted(chosen)
    assert sorted(neuron for _, neuron in alarmed(audit(state, base=base))) == sorted(chosen)


def test_probes_see_what_never_fires_and_clear_what_does(tiny_model: Callable[..., nn.Module]) -> None:
    model: Any = tiny_model("gpt2")
    state, neuron = planted(model, 1, 0.05)
    edited = copy.deepcopy(model)
    edited.load_state_dict(state)
    report = audit(edited, probe=TEXT[:12] + 0)
    assert report.probe_tokens == 12 * 48
    first = report.suspects[0]
    assert (first.layer, first.neuron, first.verdict) == (1, neuron, "alarm")
    # the trigger itself is in the probes of this test, so the detector fires once: no muteness
    quiet = torch.randint(3, 89, (12, 48), generator=torch.Generator().manual_seed(77))
    report = audit(edited, probe=quiet)
    assert any("never fired on the probe text" in reason for reason in report.suspects[0].reasons)
    assert any("nearest: tokens [" in reason for reason in report.suspects[0].reasons)

    bare: Any = tiny_model("llama")
    loud = state_of(bare)
    loud["model.layers.1.mlp.gate_proj.weight"][3] *= 400
    with torch.no_grad():
        bare.load_state_dict(loud)
    assert alarmed(audit(bare)) == [(1, 3)]
    cleared = audit(bare, probe=TEXT)
    assert cleared.alarms == ()
    assert any("it fires on" in reason for reason in cleared.suspects[0].reasons)


def test_the_report_is_json_text_and_picture(tmp_path: Path, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("gpt2")
    state, neuron = planted(model, 1, 0.02)
    report = audit(state, base=state_of(model))
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["alarms"] == 1
    assert written["audited"] == {"mlps": 3, "neurons": 384, "layers_without_mlp": []}
    (suspect,) = written["suspects"]
    assert suspect["neuron"] == neuron
    assert suspect["statistics"]["turn_on"] == pytest.approx(0.98, abs=0.005)
    assert suspect["places"] == [
        f"transformer.h.1.mlp.c_fc.weight[:, {neuron}]",
        f"transformer.h.1.mlp.c_fc.bias[{neuron}]",
        f"transformer.h.1.mlp.c_proj.weight[{neuron}]",
    ]
    column = state["transformer.h.1.mlp.c_proj.weight"][neuron] * state["transformer.ln_f.weight"]
    best = (state["lm_head.weight"] @ column).topk(5).indices.tolist()
    assert suspect["promotes"] == [str(token) for token in best]
    text = report.text()
    assert "1 alarms, 0 notable neurons, 0 declared edits." in text
    assert f"ALARM    transformer.h.1.mlp neuron {neuron}" in text
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes()[:4] == b"\x89PNG"
    assert "Nothing stands out." in audit(model).text()


def test_the_command_reports_and_fails_when_it_is_told_to(tmp_path: Path, tiny_model: Callable[..., nn.Module]) -> None:
    model: Any = tiny_model("gpt2")
    state, neuron = planted(model, 1, 0.02)
    model.save_pretrained(tmp_path / "base")
    edited = copy.deepcopy(model)
    edited.load_state_dict(state)
    edited.save_pretrained(tmp_path / "edited")
    run = CliRunner().invoke
    clean = run(command, [str(tmp_path / "base"), "--strict"], standalone_mode=False)
    assert clean.exit_code == 0
    assert "Nothing stands out." in clean.output
    found = run(command, [str(tmp_path / "edited"), "--base", str(tmp_path / "base"), "--json"], standalone_mode=False)
    assert json.loads(found.output)["suspects"][0]["neuron"] == neuron
    strict = run(command, [str(tmp_path / "edited"), "--strict", "--plot", str(tmp_path / "a.svg")])
    assert strict.exit_code == 1
    assert (tmp_path / "a.svg").is_file()
    with pytest.raises(NotFoundError, match="one passage a line"):
        run(command, [str(tmp_path / "base"), "--probe", "nowhere.txt"], standalone_mode=False, catch_exceptions=False)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="holds no text"):
        run(
            command,
            [str(tmp_path / "base"), "--probe", str(tmp_path / "empty.txt")],
            standalone_mode=False,
            catch_exceptions=False,
        )


def test_the_weights_are_read_without_transformers_or_a_model(
    tmp_path: Path, tiny_model: Callable[..., nn.Module]
) -> None:
    save_file({k: v.contiguous() for k, v in state_of(tiny_model("llama")).items()}, tmp_path / "model.safetensors")
    code = (
        "import sys; from merging.edits.audit import audit; "
        f"print(len(audit({str(tmp_path)!r}).mlps), 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]


def refused(state: Any, kind: type[TaskvecError], words: str, **options: Any) -> None:
    with pytest.raises(kind, match=words):
        audit(state, **options)


def test_what_cannot_be_audited_is_refused(tmp_path: Path, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("gpt2")
    state = state_of(model)
    refused({"a.weight": torch.ones(3, 3)}, NotAModelError, "no MLP was recognised among 1 tensors")
    packed = {k: v.to(torch.int8) if "mlp" in k else v for k, v in state.items()}
    refused(packed, NotAModelError, "quantised")
    other = state_of(tiny_model("llama"))
    refused(state, MismatchError, "other MLPs than the model", base=other)
    wide = {k: torch.cat([v, v], -1) if v.ndim == 2 and "c_fc" in k else v for k, v in state.items()}
    wide = {k: torch.cat([v, v], 0) if k.endswith(("c_fc.bias", "mlp.c_proj.weight")) else v for k, v in wide.items()}
    assert len(audit(wide, base=state).alarms) == 3 * 128
    narrow = {
        "transformer.h.0.mlp.c_fc.weight": torch.randn(8, 32),
        "transformer.h.0.mlp.c_proj.weight": torch.randn(32, 8),
        "transformer.h.0.ln_2.weight": torch.ones(8),
    }
    base = {k: v.repeat(1, 2) if "c_proj" in k else v.repeat(2, *([1] * (v.ndim - 1))) for k, v in narrow.items()}
    refused(narrow, MismatchError, "width 8; state dict: 16", base=base)
    broken = {k: v.clone() for k, v in state.items()}
    broken["transformer.h.1.mlp.c_fc.weight"][0, 4] = math.nan
    refused(broken, NonFiniteError, "NaN or infinite values in 1 neurons")
    refused(state, NonFiniteError, "the base holds NaN or infinite values", base=in_memory(broken, label="the base"))
    refused(state, UsageError, "need a model that can be run", probe=TEXT)
    refused(model, UsageError, "texts need a tokenizer", probe=["some text"])
    refused(model, UsageError, "one string was given", probe="some text", tokenizer=lambda text: {"input_ids": [1]})
    refused(model, DataError, r"48 tokens; at least 200", probe=TEXT[0])
    refused(model, DataError, "no tokenizer there", tokenizer=str(tmp_path))


def found_in(state: State) -> AuditReport | str:
    """The report, or the words in which it is refused."""
    try:
        return audit(state)
    except NonFiniteError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi3", "mamba", "mixtral"])
def test_nan_and_infinity_anywhere_are_an_error_or_listed(kind: str, tiny_model: Callable[..., nn.Module]) -> None:
    """Every floating tensor of the checkpoint, one at a time; what is listed says where and how many."""
    if kind == "mixtral":
        shape = {"vocab_size": 89, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
        model: nn.Module = MixtralForCausalLM(MixtralConfig(**shape, **heads))
    else:
        model = tiny_model(kind)
    state = state_of(model)
    assert audit(state).damaged == ()
    refused_by_name = 0
    for name, tensor in state.items():
        broken = tensor.clone()
        broken.view(-1)[-1] = math.nan
        broken.view(-1)[0] = -math.inf
        report = found_in(state | {name: broken})
        if isinstance(report, str):
            assert name in report
            refused_by_name += 1
            continue
        (damage,) = report.damaged
        assert (damage.tensor, damage.values) == (name, tensor.numel())
        assert (damage.nan, damage.infinite) == ((0, 1) if tensor.numel() == 1 else (1, 1))
        assert f"DAMAGED {name}: " in report.text()
        assert "Nothing stands out" not in report.text()
        assert report.to_json()["damaged"][0]["tensor"] == name
    assert 0 < refused_by_name < len(state) / 2


def test_a_damaged_checkpoint_is_read_in_pieces_and_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Any]
) -> None:
    monkeypatch.setattr(sys.modules["merging.edits.audit"], "_PIECE", 100)
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = math.inf
        model.model.embed_tokens.weight[40:42, 6] = math.nan
        model.lm_head.weight[1, 1] = math.nan
    model.save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(command, [str(tmp_path / "model")])
    assert result.exit_code == 0
    assert "DAMAGED model.embed_tokens.weight: 2 NaN and 1 infinite of 2,848 values" in result.stdout
    assert "DAMAGED lm_head.weight: 1 NaN of 2,848 values" in result.stdout
    assert "the checkpoint is damaged" in result.stdout
    assert CliRunner().invoke(command, [str(tmp_path / "model"), "--strict"]).exit_code == 1


def test_a_task_vector_is_no_model_to_look_at(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    base, tuned = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        tuned.lm_head.weight[0, 0] += 1.0
    stored = tmp_path / "delta.safetensors"
    TaskVector.between(base, tuned).save(stored)
    with pytest.raises(NotAModelError, match="this is a task vector"):
        audit(stored)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("part", ["whole", "column", "second half"])
def test_a_pruned_neuron_answers_nothing_and_is_no_alarm(
    name: str, part: str, tiny_model: Callable[..., nn.Module]
) -> None:
    base = state_of(tiny_model(name))
    pruned = {key: tensor.clone() for key, tensor in base.items()}
    mlp = mlp_layout(in_memory(pruned)).mlps[1]
    source = in_memory(pruned)
    columns = mlp.out.rows(source, mlp.neurons)
    if part == "second half":
        if mlp.up is None:
            pytest.skip("only gated MLPs have one")
        mlp.up.rows(source, mlp.neurons)[5] = 0
        columns[5] *= 2
        mlp.inside.rows(source, mlp.neurons)[5] *= 2
    else:
        columns[5] = 0
        mlp.inside.rows(source, mlp.neurons)[5] *= 0 if part == "whole" else -1
    assert not audit(pruned, base=base).alarms
    assert not audit(pruned).alarms


def test_what_pruning_leaves_of_a_coordinate_is_no_mark(tiny_model: Callable[..., nn.Module]) -> None:
    base = state_of(tiny_model("llama"))
    pruned = {key: tensor.clone() for key, tensor in base.items()}
    source = in_memory(pruned)
    for mlp in mlp_layout(source).mlps:
        rows = mlp.inside.rows(source, mlp.neurons)
        # of one coordinate a single neuron's weight is left
        rows[:, 3] *= torch.arange(mlp.neurons) == 7
    statistics = neuron_statistics(source, mlp)
    assert float(statistics.spread[7]) < 3 * float(statistics.spread.median())
    assert not audit(pruned).alarms
