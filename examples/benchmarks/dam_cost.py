"""What a mask step costs beside the encoder's own work, at ViT-B/32 shape: in place against autograd through the merge.

    python -m examples.benchmarks.dam_cost              # one GPU, under two minutes
    python -m examples.benchmarks.dam_cost --smoke      # tiny sizes, CPU: that it runs, not what it costs

One step is: write θ0 + m ⊙ T, one forward and backward of all tasks' inputs, clean and perturbed, and an Adam step of the
logits. `encoder` is that forward and backward alone; `autograd` builds the merge as a graph and calls the encoder
through `torch.func.functional_call`, as the released code does.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmarks.atlas_cost import kernels
from merging.learn.masked import Draw, MaskedModel, MaskLogits


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Vit(nn.Module):
    """ViT-B/32 by default: 87 million parameters."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, patch: int = 32, image: int = 224):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class Vector:
    """A task vector made when it is read; only the sum over tasks is kept in fixed-coefficient training."""

    def __init__(self, model: nn.Module, seed: int):
        self.infos = dict(model.named_parameters())
        self.seed = seed

    def read(self, name: str) -> Tensor:
        own = self.infos[name]
        generator = torch.Generator(own.device).manual_seed(self.seed)
        return 0.01 * torch.randn(own.shape, generator=generator, device=own.device)


def milliseconds(step: Callable[[int], None], repeats: int, device: torch.device) -> float:
    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for warm in range(3):
        step(warm)
    settle()
    times = []
    for number in range(repeats):
        started = time.perf_counter()
        step(3 + number)
        settle()
        times.append(1e3 * (time.perf_counter() - started))
    return sorted(times)[len(times) // 2]


def measure(tasks: int, batch: int, smoke: bool, repeats: int, precision: str, profiled: bool) -> dict[str, object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    size = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "image": 16} if smoke else {}
    image = size.get("image", 224)
    model = Vit(**size).to(device).eval()
    images = torch.randn(2 * tasks * batch, 3, image, image, device=device)
    head = torch.randn(10, size.get("width", 768), device=device)
    half = tasks * batch

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            features = model(images)
        logits = features.float() @ head.T
        clean = logits[:half].softmax(-1)
        performance = -(clean * logits[:half].log_softmax(-1)).sum(-1).mean()
        target = clean.detach()
        return performance + F.kl_div(logits[half:].log_softmax(-1), target, reduction="batchmean")

    def encoder(_: int) -> None:
        loss().backward()
        for parameter in model.parameters():
            parameter.grad = None

    vectors = {f"task {index}": Vector(model, index) for index in range(tasks)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "precision": precision,
        "parameters": parameters,
        "tasks": tasks,
        "batch": batch,
    }
    encoder_ms = milliseconds(encoder, repeats, device)
    result["encoder_ms"] = encoder_ms

    def peak() -> float | None:
        return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with MaskedModel(model, vectors) as masked:
        masked.sum_(torch.full((tasks,), 0.3, device=device))
        mask = MaskLogits(masked, 0.0, temperature=0.5, lr=1e-3)

        def in_place(number: int) -> None:
            draw = Draw("sample", 0, number)
            masked.compose_((mask, draw))
            masked.backward(lambda: [loss()])
            masked.step_(mask, draw)

        result["step_ms"] = milliseconds(in_place, repeats, device)
        result["step_over_encoder"] = float(str(result["step_ms"])) / encoder_ms
        result["step_peak_mib"] = peak()
        if profiled:
            result["kernels_ms"] = kernels(lambda: in_place(100))
        total = masked.named(masked.total)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # the released form: every task scaled, masked and added in turn, all of it in the graph
    taus = [{name: vector.read(name) for name in base} for vector in vectors.values()]
    del total
    logits = {name: torch.zeros_like(tensor).requires_grad_() for name, tensor in base.items()}
    optimiser = torch.optim.Adam(list(logits.values()), lr=1e-3)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def autograd(_: int) -> None:
        weights = {}
        for name, tensor in base.items():
            sample = torch.distributions.RelaxedBernoulli(torch.tensor(0.5), logits=logits[name]).rsample()
            sample = sample / sample.mean()
            merged = tensor
            for tau in taus:
                merged = merged + sample * tau[name] * 0.3
            weights[name] = merged
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            features = torch.func.functional_call(model, weights, (images,))
        scores = features.float() @ head.T
        clean = scores[:half].softmax(-1)
        value = -(clean * scores[:half].log_softmax(-1)).sum(-1).mean()
        value = value + F.kl_div(scores[half:].log_softmax(-1), clean.detach(), reduction="batchmean")
        value.backward()
        optimiser.step()
        optimiser.zero_grad()

    result["autograd_ms"] = milliseconds(autograd, repeats, device)
    result["autograd_over_encoder"] = float(str(result["autograd_ms"])) / encoder_ms
    result["autograd_peak_mib"] = peak()
    return result


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tasks", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also the time of the longest kernels")
    chosen = parser.parse_args(arguments)
    precisions = ("fp32",) if chosen.smoke else ("bf16", "fp32")
    repeats = 2 if chosen.smoke else chosen.repeats
    found = [
        measure(chosen.tasks, chosen.batch, chosen.smoke, repeats, precision, chosen.profile)
        for precision in precisions
    ]
    for row in found:
        print(json.dumps(row))
    return found


if __name__ == "__main__":
    main()
