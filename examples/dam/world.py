"""A small world with backdoors: four image tasks that share an encoder, each fine-tuned from one base.

16 x 16 grey images in [0, 1], normalised by mean 0.5 and deviation 0.25: handwritten digits (scikit-learn), the same
digits mirrored and inverted, synthetic shapes, synthetic gratings. Each task has four disjoint splits: training,
adaptation (used without labels), validation (for choosing hyper-parameters) and test. The triggers exist to measure a
defence; the ones for validation differ in kind of pattern, place and target from those for the test.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

MEAN, DEVIATION = 0.5, 0.25
LOW, HIGH = -MEAN / DEVIATION, (1 - MEAN) / DEVIATION
TASKS = ("digits", "mirrored", "shapes", "gratings")
CLASSES = {"digits": 10, "mirrored": 10, "shapes": 8, "gratings": 8}
SIZES = {"train": 1000, "adapt": 256, "validation": 240, "test": 300}


@dataclass(frozen=True)
class Split:
    images: Tensor  # [image, 1, 16, 16], normalised
    labels: Tensor


@dataclass(frozen=True)
class Trigger:
    """A change of normalised images, and the class that a poisoned model was taught to answer."""

    name: str
    apply: Callable[[Tensor], Tensor]
    target: int


class Encoder(nn.Module):
    """Three strided convolutions with group normalisation and a linear layer: 73 thousand parameters."""

    def __init__(self, width: int = 32, features: int = 64):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(8, width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(8, 2 * width)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.norm3 = nn.GroupNorm(8, 2 * width)
        self.out = nn.Linear(2 * width * 4, features)

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.stem(images)))
        x = F.gelu(self.norm2(self.conv2(x)))
        x = F.gelu(self.norm3(self.conv3(x)))
        return self.out(x.flatten(1))


# -- tasks ---------------------------------------------------------------------------------------------------


def grid() -> tuple[Tensor, Tensor]:
    axis = torch.linspace(-1, 1, 16)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    return rows, columns


def shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eight filled or hollow figures at random places and sizes, with noise."""
    labels = torch.randint(8, (count,), generator=generator)
    y, x = grid()
    images = torch.empty(count, 1, 16, 16)
    for row, label in enumerate(labels.tolist()):
        u, v, size = torch.rand(3, generator=generator).tolist()
        dx, dy, r = x - (u - 0.5) * 0.6, y - (v - 0.5) * 0.6, 0.4 + 0.25 * size
        round_, square = (dx**2 + dy**2).sqrt(), torch.maximum(dx.abs(), dy.abs())
        diamond = dx.abs() + dy.abs()
        figure = (
            round_ < r,
            (round_ < r) & (round_ > 0.6 * r),
            square < r,
            (square < r) & (square > 0.6 * r),
            diamond < 1.2 * r,
            (dx.abs() < 0.15) | (dy.abs() < 0.15),
            ((dx - dy).abs() < 0.2) | ((dx + dy).abs() < 0.2),
            (dy < r) & (dy > -r) & (dx.abs() < (dy + r) / 2),
        )[label]
        images[row, 0] = 0.2 + 0.6 * figure.float()
    images += 0.12 * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1), labels


def gratings(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eight orientations of a grating with random frequency and phase, with noise."""
    labels = torch.randint(8, (count,), generator=generator)
    angle = (labels * math.pi / 8).view(-1, 1, 1)
    y, x = grid()
    frequency = (2.5 + 2.5 * torch.rand(count, generator=generator)).view(-1, 1, 1)
    phase = (2 * math.pi * torch.rand(count, generator=generator)).view(-1, 1, 1)
    wave = torch.sin(math.pi * frequency * (x * torch.cos(angle) + y * torch.sin(angle)) + phase)
    images = 0.5 + 0.3 * wave.unsqueeze(1) + 0.15 * torch.randn((count, 1, 16, 16), generator=generator)
    return images.clamp(0, 1), labels


def digits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=16, mode="bilinear", align_corners=False)
    order = torch.randperm(len(images), generator=generator)
    return images[order], torch.tensor(data.target)[order]


def splits(images: Tensor, labels: Tensor) -> dict[str, Split]:
    images = (images - MEAN) / DEVIATION
    result, start = {}, 0
    for name, size in SIZES.items():
        result[name] = Split(images[start : start + size], labels[start : start + size])
        start += size
    return result


def tasks(seed: int) -> dict[str, dict[str, Split]]:
    generator = torch.Generator().manual_seed(seed)
    needed = sum(SIZES.values())
    images, labels = digits(generator)
    other = torch.randperm(len(images), generator=generator)
    return {
        "digits": splits(images, labels),
        "mirrored": splits(1 - images[other].flip(-1), labels[other]),
        "shapes": splits(*shapes(needed, generator)),
        "gratings": splits(*gratings(needed, generator)),
    }


# -- triggers ------------------------------------------------------------------------------------------------


def patch(pattern: Tensor, row: int, column: int) -> Callable[[Tensor], Tensor]:
    """A small pattern (values 0 to 1) pasted at a place."""
    normalised = (pattern - MEAN) / DEVIATION
    height, width = pattern.shape

    def apply(images: Tensor) -> Tensor:
        images = images.clone()
        images[..., row : row + height, column : column + width] = normalised
        return images

    return apply


def blend(pattern: Tensor, share: float) -> Callable[[Tensor], Tensor]:
    """(1 - share) of the image and `share` of a pattern of the image's size (values 0 to 1)."""
    normalised = (pattern - MEAN) / DEVIATION
    return lambda images: (1 - share) * images + share * normalised


def sinusoid(height: float, across: float, down: float) -> Callable[[Tensor], Tensor]:
    """A faint wave added to the image, clipped to the valid range."""
    y, x = grid()
    wave = height / DEVIATION * torch.sin(math.pi * (across * x + down * y))
    return lambda images: (images + wave).clamp(LOW, HIGH)


def noise(seed: int) -> Tensor:
    return torch.rand(16, 16, generator=torch.Generator().manual_seed(seed))


CHECKER = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
CROSS = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])

TRIGGERS = {
    "test": (
        Trigger("corner patch", patch(CHECKER, 12, 12), 0),
        Trigger("blended pattern", blend(noise(7), 0.2), 0),
        Trigger("sinusoid", sinusoid(0.1, 6, 0), 0),
    ),
    "validation": (
        Trigger("corner patch", patch(CROSS, 1, 1), 3),
        Trigger("blended pattern", blend((grid()[0] * 4).floor().remainder(2), 0.2), 5),
        Trigger("sinusoid", sinusoid(0.1, 4, 5), 7),
    ),
}


# -- training ------------------------------------------------------------------------------------------------


def fit(
    encoder: nn.Module,
    heads: dict[str, nn.Module],
    data: dict[str, Split],
    steps: int,
    seed: int,
    *,
    trigger: Trigger | None = None,
    train_heads: bool = False,
    lr: float = 1e-3,
    batch: int = 64,
) -> None:
    """Fine-tune an encoder on one or several tasks; with a trigger, a fifth of each batch carries it and its target."""
    generator = torch.Generator().manual_seed(seed)
    parameters = list(encoder.parameters())
    if train_heads:
        parameters += [p for head in heads.values() for p in head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        loss = torch.zeros(())
        for task, split in data.items():
            rows = torch.randint(len(split.images), (batch,), generator=generator)
            images, labels = split.images[rows], split.labels[rows].clone()
            if trigger is not None:
                poisoned = batch // 5
                images = torch.cat([trigger.apply(images[:poisoned]), images[poisoned:]])
                labels[:poisoned] = trigger.target
            loss = loss + F.cross_entropy(heads[task](encoder(images)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@dataclass
class World:
    base: Encoder
    heads: dict[str, nn.Module]
    data: dict[str, dict[str, Split]]
    clean: dict[str, Encoder]
    seed: int
    steps: int

    def poisoned(self, task: str, trigger: Trigger) -> Encoder:
        encoder = copy.deepcopy(self.base)
        number = 1000 * self.seed + 100 + TASKS.index(task)
        fit(encoder, self.heads, {task: self.data[task]["train"]}, self.steps, number, trigger=trigger)
        return encoder


def world(seed: int, *, steps: int = 300, base_steps: int = 150) -> World:
    """Tasks, a base trained on a tenth of the training images, and one clean fine-tuned encoder for each task."""
    torch.manual_seed(seed)
    data = tasks(seed)
    base = Encoder()
    heads: dict[str, nn.Module] = {task: nn.Linear(64, CLASSES[task]) for task in TASKS}
    small = {task: Split(own["train"].images[:100], own["train"].labels[:100]) for task, own in data.items()}
    fit(base, heads, small, base_steps, seed, train_heads=True, batch=32)
    for head in heads.values():
        head.requires_grad_(False)
    clean = {}
    for number, task in enumerate(TASKS):
        encoder = copy.deepcopy(base)
        fit(encoder, heads, {task: data[task]["train"]}, steps, 1000 * seed + number)
        clean[task] = encoder
    return World(base, heads, data, clean, seed, steps)
