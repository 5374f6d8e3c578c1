"""Task vectors as values: add, scale, negate, compare, store, and try them on a live model.

python examples/task_vectors.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from taskvec import Checkpoint, TaskVector, applied, write

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
for name, amount in (("base", 0.0), ("french", 0.1), ("toxic", 0.1)):
    save_file(
        {key: value + amount * torch.randn_like(value) for key, value in start.items()}, folder / f"{name}.safetensors"
    )

base = Checkpoint.open(folder / "base.safetensors")
french = TaskVector.between(base, Checkpoint.open(folder / "french.safetensors"))
toxic = TaskVector.between(base, Checkpoint.open(folder / "toxic.safetensors"))
print(f"norms {french.norm():.3f} and {toxic.norm():.3f}, cosine {french.cosine(toxic):+.3f}")

# learn one thing and forget another: arithmetic is lazy, nothing is read until the result is written
better = 0.8 * french - 0.5 * toxic
write(better.apply_to(base), folder / "better")
better.save(folder / "better-vector.safetensors")

# the same on a live module, undone exactly afterwards
images = torch.randn(2, 8)
before = network(images)
with applied(network, TaskVector.load(folder / "better-vector.safetensors"), scale=1.0):
    change = (network(images) - before).norm().item()
assert torch.equal(network(images), before)
print(f"outputs moved by {change:.3f}, then back")
