"""What a step of learned composition costs over an ordinary forward and backward pass.

    python examples/benchmarks/atlas_cost.py                       # one GPU: ViT-B/32 and ViT-L/14 shapes, T = 8 and 21
    python examples/benchmarks/atlas_cost.py --shapes tiny --device cpu --tasks 3

Random weights and random task vectors: the cost depends on shapes only. Three steps of the same model and batch, side
by side: `plain` is forward and backward; `composed` is a whole optimisation step of this library (compose, forward,
backward, pull back, clip, AdamW), `held` the same with one pull-back after backward; `functional` composes with autograd through functional_call, as the authors' code
does. Needs torch and transformers; Triton where there is a GPU.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from merging.learn.composition import Composition
from taskvec.source import TensorInfo

SHAPES = {
    # hidden, layers, heads, intermediate, image, patch, batch
    "b32": (768, 12, 12, 3072, 224, 32, 128),
    "l14": (1024, 24, 16, 4096, 224, 14, 64),
    "tiny": (64, 2, 2, 128, 32, 8, 4),
}
CLASSES = 100


class Random:
    """A dense task vector made up tensor by tensor, so that no float32 copy of all of it ever exists."""

    def __init__(self, model: nn.Module, seed: int):
        self.infos = {n: TensorInfo(tuple(p.shape), torch.float32) for n, p in model.named_parameters()}
        self._device = next(model.parameters()).device
        self._seed = seed

    def read(self, name: str) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(hash((self._seed, *map(ord, name))) % (1 << 31))
        return 1e-3 * torch.randn(self.infos[name].shape, generator=generator, device=self._device)

    def low_rank(self, name: str) -> None:
        return None


def vit(shape: str, device: torch.device) -> tuple[nn.Module, int, int]:
    from transformers import ViTConfig, ViTModel

    hidden, layers, heads, intermediate, image, patch, batch = SHAPES[shape]
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        image_size=image,
        patch_size=patch,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return ViTModel(config, add_pooling_layer=False).to(device).train(), image, batch


def milliseconds(step: Callable[[], object], count: int, device: torch.device, warm: int) -> float:
    """Median time of a step, each measured alone after a warm-up."""
    return in_turns({"": step}, count, device, warm)[""]


def in_turns(steps: dict[str, Callable[[], object]], count: int, device: torch.device, warm: int) -> dict[str, float]:
    """Median time of each step, A B A B, each measured alone after a warm-up of all."""
    for step in steps.values():
        for _ in range(warm):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(count):
        for name, step in steps.items():
            if device.type == "cuda":
                before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                before.record()
                step()
                after.record()
                torch.cuda.synchronize()
                times[name].append(before.elapsed_time(after))
            else:
                start = time.perf_counter()
                step()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def peak(step: Callable[[], object], device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def kernels(step: Callable[[], object], longest: int = 12) -> dict[str, float]:
    """Milliseconds of one step by kernel, the longest ones, and of all together."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as told:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    spent = {event.key: event.device_time_total / 3000 for event in told.key_averages()}
    found = dict(sorted(spent.items(), key=lambda item: -item[1])[:longest])
    return {name[:60]: round(ms, 3) for name, ms in found.items()} | {"all": round(sum(spent.values()), 3)}


def measure(shape: str, tasks: int, device: torch.device, options: argparse.Namespace) -> dict[str, object]:
    model, image, batch = vit(shape, device)
    model.requires_grad_(True)
    head = nn.Linear(SHAPES[shape][0], CLASSES, device=device).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, image, image, generator=generator).to(device)
    y = torch.randint(CLASSES, (batch,), generator=generator).to(device)
    kind = torch.bfloat16

    def loss_of(weights: dict[str, Tensor] | None = None) -> Tensor:
        with torch.autocast(device.type, dtype=kind):
            if weights is None:
                output = model(pixel_values=x)
            else:
                output = torch.func.functional_call(model, weights, (), {"pixel_values": x})
            return cross_entropy(head(output.last_hidden_state[:, 0]).float(), y)

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        loss_of().backward()

    steps, warm = options.steps, options.warm
    result: dict[str, object] = {"shape": shape, "tasks": tasks, "batch": batch}
    result["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result["torch"] = torch.__version__
    result["parameters"] = sum(p.numel() for p in model.parameters())
    for _ in range(warm):
        plain()
    plain_peak = peak(plain, device)
    model.zero_grad(set_to_none=True)

    vectors = {f"task{t}": Random(model, t) for t in range(tasks)}
    composition = Composition(model, vectors, bank_dtype=options.bank)
    optimizer = torch.optim.AdamW([composition.coefficients], lr=1e-4, weight_decay=0.1, fused=device.type == "cuda")

    def composed(hold: bool = False) -> None:
        _, grad = composition.gradient(loss_of, hold=hold)
        norm = torch.linalg.vector_norm(grad)
        composition.coefficients.grad = grad * (1.0 / (norm + 1e-6)).clamp(max=1.0)
        optimizer.step()

    kinds: dict[str, Callable[[], object]] = {
        "plain": plain,
        "composed": composed,
        "held": lambda: composed(True),
    }
    spent = in_turns(kinds, steps, device, warm)
    plain_ms, composed_ms, held_ms = spent.values()
    model.zero_grad(set_to_none=True)
    composed_peak, held_peak = peak(composed, device), peak(kinds["held"], device)
    if options.profile:
        result["kernels_ms"] = {"plain": kernels(plain), "composed": kernels(composed)}
    result["fused"] = composition._fused is not None
    bank = composition.bank.nbytes
    working = sum(p.numel() * p.element_size() for p in model.parameters())

    # the same thing with autograd through the composition
    names = [name for name, _ in model.named_parameters()]
    values = {name: composition.bank.values(name) for name in names}
    scales = {name: composition.bank.blocks[name].scales for name in names}
    with torch.no_grad():
        composition.coefficients.normal_(std=0.1)
    _, grad = composition.gradient(loss_of)
    composition.restore_()
    learned = composition.coefficients.clone().requires_grad_(True)
    base = {name: p.detach() for name, p in model.named_parameters()}

    def functional() -> None:
        learned.grad = None
        weights = {}
        for b, name in enumerate(names):
            scale = scales[name]
            terms = (
                (learned[t, b] if scale is None else learned[t, b] * scale[t]) * values[name][t].view(base[name].shape)
                for t in range(tasks)
            )
            weights[name] = base[name] + sum(terms)
        loss_of(weights).backward()

    model.requires_grad_(False)
    functional_ms = milliseconds(functional, options.baseline_steps, device, 1)
    functional_peak = peak(functional, device)
    assert learned.grad is not None
    difference = float((learned.grad - grad).norm() / grad.norm())
    allowed = plain_peak + bank + 2 * working
    gib = 1 << 30
    result.update(
        plain_ms=round(plain_ms, 3),
        composed_ms=round(composed_ms, 3),
        functional_ms=round(functional_ms, 3),
        held_ms=round(held_ms, 3),
        composed_over_plain=round(composed_ms / plain_ms, 3),
        held_over_plain=round(held_ms / plain_ms, 3),
        functional_over_plain=round(functional_ms / plain_ms, 2),
        gradient_difference=difference,
        bank_gib=round(bank / gib, 3),
        plain_peak_gib=round(plain_peak / gib, 3),
        composed_peak_gib=round(composed_peak / gib, 3),
        held_peak_gib=round(held_peak / gib, 3),
        functional_peak_gib=round(functional_peak / gib, 3),
        allowed_peak_gib=round(1.1 * allowed / gib, 3),
    )
    return result


def tune(shape: str, tasks: int, device: torch.device, options: argparse.Namespace) -> None:
    """Bandwidth of the two passes over the bank alone, for several tile sizes."""
    from merging.learn import kernels

    model, _, _ = vit(shape, device)
    composition = Composition(model, {f"task{t}": Random(model, t) for t in range(tasks)}, bank_dtype=options.bank)
    grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    numel = sum(p.numel() for p in model.parameters())
    moved = numel * (2 * tasks + 8)
    for block in (512, 1024, 2048, 4096):
        for width, tile in ((128, 8192), (256, 4096), (256, 8192), (256, 16384), (512, 8192), (1024, 8192)):
            if block != 1024 and (width, tile) != (256, 8192):
                continue
            fused = kernels.FusedBlocks(
                composition.bank,
                composition._weights.parameters,
                composition._weights.base,
                {name: composition._columns(name)[0] for name in composition.composed},
                compose_block=block,
                product_width=width,
                product_tile=tile,
            )

            def products(fused: kernels.FusedBlocks = fused) -> None:
                with fused.collecting(torch.zeros_like(composition.coefficients)):
                    for name, grad in grads.items():
                        fused.consume(name, grad)

            def compose(fused: kernels.FusedBlocks = fused) -> None:
                fused.compose_(composition.coefficients)

            compose_ms = milliseconds(compose, 10, device, 3)
            product_ms = milliseconds(products, 10, device, 3)
            row = {"shape": shape, "tasks": tasks, "block": block, "width": width, "tile": tile}
            row.update(compose_ms=round(compose_ms, 3), compose_gbs=round(moved / compose_ms / 1e6))
            row.update(products_ms=round(product_ms, 3), products_gbs=round((moved - 4 * numel) / product_ms / 1e6))
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="b32,l14")
    parser.add_argument("--tasks", default="8,21")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bank", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--baseline-steps", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="also the time of the longest kernels")
    parser.add_argument("--tune", action="store_true", help="bandwidth of the two passes for several tile sizes")
    options = parser.parse_args()
    device = torch.device(options.device)
    for shape in options.shapes.split(","):
        for tasks in map(int, options.tasks.split(",")):
            if options.tune:
                tune(shape, tasks, device, options)
            else:
                print(json.dumps(measure(shape, tasks, device, options)), flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
