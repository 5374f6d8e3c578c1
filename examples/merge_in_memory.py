"""Merge modules in memory, and search the scale of a PCB merge at the price of one sparse sum a trial.

python examples/merge_in_memory.py
"""

import copy

import torch

from merging import merge_stacks

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 20))
images = torch.randn(256, 20)
targets = [images.roll(1, 1), images.flip(1)]

tuned = []
for target in targets:
    model = copy.deepcopy(base)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(images), target).backward()
        optimizer.step()
    tuned.append(model)

start = base.state_dict()
stacks = {name: torch.stack([model.state_dict()[name] - tensor for model in tuned]) for name, tensor in start.items()}
parts = merge_stacks("pcb", stacks, density=0.3, contributions=True)


def loss(delta: dict[str, torch.Tensor]) -> float:
    weights = {name: tensor + delta[name] for name, tensor in start.items()}
    with torch.no_grad():
        output = torch.func.functional_call(base, weights, (images,))
    return sum(torch.nn.functional.mse_loss(output, target).item() for target in targets) / len(targets)


losses = {scale: loss(parts.merged(scale=scale)) for scale in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)}
best = min(losses, key=lambda scale: losses[scale])
print(f"loss {losses[0.0]:.3f} at the base, {losses[best]:.3f} merged at scale {best}")
