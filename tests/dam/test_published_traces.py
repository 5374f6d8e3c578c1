"""The released loop, replayed from recorded batches and noise."""

import pytest
import torch
from torch import nn

from merging.learn.dam import DamConfig, dam_merge

close = torch.testing.assert_close


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(27)
        self.fc = nn.Linear(27, 6)

    def forward(self, images):
        return self.fc(self.norm(nn.functional.gelu(self.conv(images)).flatten(1)))


def replay(record, **changes):
    settings = record.metadata
    tasks, steps = int(settings["tasks"]), int(settings["steps"])
    base = Encoder()
    base.load_state_dict(record.tensors("base."))
    names = [f"task {i}" for i in range(tasks)]
    recorded = record["batches.mask"].flatten(0, 1), record["batches.final"]
    config = DamConfig(
        compat="published",
        lam0=float(settings["scaling_factor"]),
        mask_steps=steps,
        mask_lr=float(settings["lr"]),
        coefficient_lr=float(settings["base_lr"]),
        adv_lr=float(settings["adv_lr"]),
        safety_weight=float(settings["adv_weight"]),
        temperature=float(settings["temperature"]),
        init_logit=float(settings["initial_logits"]),
        clamp_coefficients=settings["clamp_weights"] == "True",
        refit_steps=int(settings["final_steps"]),
        refit_lr=float(settings["adamerging_lr"]),
        noise=[record.tensors(f"uniform.{s}.") for s in range(steps + 1)],
        trace=True,
        **changes,
    )
    result = dam_merge(
        base,
        {name: record.tensors(f"finetuned.{i}.") for i, name in enumerate(names)},
        data={name: [step[i] for part in recorded for step in part] for i, name in enumerate(names)},
        heads={name: record[f"head.{i}"] for i, name in enumerate(names)},
        config=config,
    )
    return base, names, result


def near(actual, recorded, tolerance=1e-3):
    close(actual, recorded, rtol=0, atol=tolerance * float(recorded.abs().max()))


@pytest.mark.parametrize("name", ["dam_trace_default", "dam_trace_strong"])
def test_every_recorded_number_of_the_released_loop_is_met(golden, name):
    record = golden(name)
    base, names, result = replay(record)
    steps = int(record.metadata["steps"])
    for step, entry in enumerate(result.history[:steps]):
        close(torch.tensor(entry["losses"], dtype=torch.float64), record["loss.mask"][step], rtol=1e-5, atol=1e-6)
        near(entry["coefficient_gradient"], record[f"lambda_grad.{step}"])
        near(entry["coefficients"], record[f"lambda_after_inner.{step}"])
        near(torch.stack([entry["perturbation_gradient"][n] for n in names]), record[f"delta_grad.{step}"])
        near(torch.stack([entry["perturbation"][n] for n in names]), record[f"delta_after.{step}"])
        for tensor, gradient in entry["mask_gradient"].items():
            near(gradient, record[f"logits_grad.{step}.{tensor}"])
            near(entry["mask_logits"][tensor], record[f"logits_after.{step}.{tensor}"])
    final = result.history[steps:]
    close(
        torch.tensor([entry["losses"][0] for entry in final], dtype=torch.float64),
        record["loss.final"],
        rtol=1e-5,
        atol=1e-6,
    )
    near(torch.stack([entry["coefficients"] for entry in final]), record["lambda_final_trace"])
    for tensor, value in record.tensors("merged_final.").items():
        near(result.state_dict[tensor], value, 1e-5)
    assert all(torch.equal(base.state_dict()[n], t) for n, t in record.tensors("base.").items())
