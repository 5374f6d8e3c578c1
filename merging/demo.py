"""The whole story on a small zoo built on the spot: pretrain, fine-tune, merge, score. Needs no download.

The data are drawn, not loaded: 36 glyphs of a 5 × 7 font, moved, turned, sheared and made noisy. A small network is
pretrained on all of them; each task is one part of the alphabet under its own kind of damage. The classifier is the
pretrained one for all tasks, never tuned and never in a checkpoint, as in CLIP's setting: so the base has an accuracy
on every task before any tuning, and one merged network can be scored on all of them.
"""

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from taskvec.errors import OutputError, OutputExistsError, UsageError

Images = Annotated[Tensor, "row height width"]
Labels = Annotated[Tensor, "row"]

# seven rows of five dots, two hexadecimal digits a row
FONT = """
0:0E11131519110E 1:040C040404040E 2:0E11010204081F 3:1F02040201110E 4:02060A121F0202 5:1F101E0101110E 6:0608101E11110E
7:1F010204080808 8:0E11110E11110E 9:0E11110F01020C A:0E1111111F1111 B:1E11111E11111E C:0E11101010110E D:1C12111111121C
E:1F10101E10101F F:1F10101E101010 G:0E11101713110F H:1111111F111111 I:0E04040404040E J:0702020202120C K:11121418141211
L:1010101010101F M:111B1515111111 N:11111915131111 O:0E11111111110E P:1E11111E101010 Q:0E11111115120D R:1E11111E141211
S:0F10100E01011E T:1F040404040404 U:1111111111110E V:11111111110A04 W:11111115151B11 X:11110A040A1111 Y:1111110A040404
Z:1F01020408101F
"""
SIZE = 16
WIDTH, FEATURES = 256, 64
BATCH = 128
PRETRAINING = (400, 3e-3)  # steps, highest rate
TUNING = (200, 5e-4)
VALIDATION_ROWS, TEST_ROWS = 500, 1000

RESULTS = "results.json"

METHODS: dict[str, dict[str, Any]] = {
    "average": {},
    "task_arithmetic": {},
    "ties": {"density": 0.2},
    "dare": {"density": 0.5},
    "breadcrumbs": {},
    "magnitude": {"density": 0.3},
    "pcb": {"density": 0.2},
}
SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0)


# -- data --------------------------------------------------------------------------------------------------------------


def _sheet() -> Tensor:
    """Every glyph, drawn once at twice the final size: [class, 1, 32, 32]."""
    codes = [entry.partition(":")[2] for entry in FONT.split()]
    dots = [
        [[int(code[2 * row : 2 * row + 2], 16) >> (4 - dot) & 1 for dot in range(5)] for row in range(7)]
        for code in codes
    ]
    glyphs = functional.interpolate(torch.tensor(dots, dtype=torch.float32)[:, None], scale_factor=2)
    return functional.interpolate(
        functional.pad(glyphs, (3, 3, 1, 1)), scale_factor=2, mode="bilinear", align_corners=False
    )


def _noise(images: Images, generator: torch.Generator, amount: float = 0.15) -> Images:
    return images + amount * torch.randn(images.shape, generator=generator)


def _snow(images: Images, generator: torch.Generator) -> Images:
    hit = torch.rand(images.shape, generator=generator) < 0.3
    return _noise(torch.where(hit, torch.rand(images.shape, generator=generator), images), generator)


def _faint(images: Images, generator: torch.Generator) -> Images:
    return _noise(0.4 * images, generator, 0.2)


def _barred(images: Images, generator: torch.Generator) -> Images:
    bars = 0.7 * (torch.arange(SIZE) % 4 == 0)
    return _noise(torch.maximum(images, bars[:, None].expand_as(images)), generator)


def _shaded(images: Images, generator: torch.Generator) -> Images:
    light = torch.where(torch.arange(SIZE) < 9, 1.0, 0.3)
    return _noise(images * light, generator)


@dataclass(frozen=True, slots=True)
class Task:
    """A part of the alphabet, and what is done to its pictures."""

    classes: range
    damage: Callable[[Images, torch.Generator], Images]


TASKS = {
    "snowy digits": Task(range(10), _snow),
    "faint A-H": Task(range(10, 18), _faint),
    "barred I-Q": Task(range(18, 27), _barred),
    "shaded R-Z": Task(range(27, 36), _shaded),
}


def draw(task: Task, rows: int, generator: torch.Generator, sheet: Tensor) -> tuple[Images, Labels]:
    """Fresh pictures of a task and their labels, counted from the task's first class."""
    labels = torch.randint(len(task.classes), (rows,), generator=generator)

    def between(bound: float) -> Tensor:
        return (torch.rand(rows, generator=generator) * 2 - 1) * bound

    angle, size = between(0.25), 1 + between(0.2)
    cos, sin = size * angle.cos(), size * angle.sin()
    across = torch.stack([cos, between(0.2) - sin, between(0.2)], 1)
    down = torch.stack([sin, cos, between(0.2)], 1)
    grid = functional.affine_grid(torch.stack([across, down], 1), [rows, 1, SIZE, SIZE], align_corners=False)
    images = functional.grid_sample(sheet[labels + task.classes.start], grid, align_corners=False)[:, 0]
    return task.damage(images, generator), labels


# -- network -----------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Pictures to features: what is tuned and merged."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(SIZE * SIZE, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, FEATURES)

    def forward(self, images: Images) -> Tensor:
        hidden = functional.relu(self.first(images.flatten(1)))
        result: Tensor = self.last(functional.relu(self.second(hidden)))
        return result


def _scores(network: nn.Module, head: nn.Linear, task: Task, images: Images) -> Tensor:
    classes = slice(task.classes.start, task.classes.stop)
    return functional.linear(network(images), head.weight[classes], head.bias[classes])


def _train(
    network: nn.Module,
    head: nn.Linear,
    task: Task,
    parameters: Sequence[nn.Parameter],
    plan: tuple[int, float],
    generator: torch.Generator,
) -> None:
    steps, rate = plan
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    sheet = _sheet()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20, (steps - step) / (0.7 * steps))
        images, labels = draw(task, BATCH, generator, sheet)
        loss = functional.cross_entropy(_scores(network, head, task, images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _accuracy(network: nn.Module, head: nn.Linear, rows: Mapping[str, tuple[Images, Labels]]) -> dict[str, float]:
    return {
        name: float((_scores(network, head, TASKS[name], images).argmax(1) == labels).float().mean())
        for name, (images, labels) in rows.items()
    }


# -- the story ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a model and its test accuracy on every task."""

    name: str
    scale: float | None
    accuracy: dict[str, float]
    path: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The model's name with its method's parameters."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.parameters.items())])

    @property
    def mean(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)


@dataclass(frozen=True, slots=True)
class Story:
    """What `tell` built, scored and wrote."""

    folder: Path
    seed: int
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """The table as plain numbers and strings."""
        return {
            "folder": str(self.folder),
            "seed": self.seed,
            "tasks": list(TASKS),
            "rows": [
                {
                    "name": row.name,
                    "parameters": dict(row.parameters),
                    "scale": row.scale,
                    "accuracy": row.accuracy,
                    "mean": row.mean,
                    "path": str(row.path),
                }
                for row in self.rows
            ],
        }


def tell(
    out: "str | Path",
    *,
    seed: int = 0,
    steps: float = 1.0,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Story:
    """Builds the zoo, merges it by several methods through recipes, scores every model and writes all of them.

    The scale of each method is the one of `SCALES` with the best mean accuracy on validation pictures; the table is on
    test pictures. Both are drawn afresh, so neither was trained on.

    Args:
        out: folder to make, with base/, tuned/<task>/, merged/<method>/, recipes/<method>.yaml, head.safetensors and
            results.json in it.
        seed: of everything that is drawn.
        steps: factor on the number of training steps, in (0, 1]; less is quicker and worse.
        overwrite: replace an earlier demo.
        say: called with a line for people before each stage.

    Raises:
        OutputExistsError: `out` is taken, and is not an earlier demo that may be replaced.
    """
    if not 0 < steps <= 1:
        raise UsageError(f"steps: {steps} is not in (0, 1]")
    folder = Path(out).absolute()
    _make_room(folder, overwrite)
    threads = torch.get_num_threads()
    # so small a network that threads only wait for each other: on a busy machine two took eight times as long as one
    torch.set_num_threads(1)
    try:
        networks, head = _build_zoo(seed, steps, say)
        for name, network in networks.items():
            place = folder / _place(name)
            place.mkdir(parents=True)
            save_file(network.state_dict(), place / "model.safetensors", metadata={"format": "pt"})
        # beside the models, not in them: the head is shared and no merge may touch it
        save_file(head.state_dict(), folder / "head.safetensors")
        story = _merge_and_score(folder, seed, networks, head, say)
        (folder / RESULTS).write_text(json.dumps(story.as_json(), indent=2) + "\n", encoding="utf-8")
    except BaseException:
        # also when interrupted: no half demo is left that looks like a whole one
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        torch.set_num_threads(threads)
    return story


def _make_room(folder: Path, overwrite: bool) -> None:
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        if not overwrite:
            raise OutputExistsError(f"{folder} exists. Give another folder, or --overwrite to replace an earlier demo.")
        if not (folder / RESULTS).is_file():
            raise OutputExistsError(f"{folder} is not an earlier demo, so it is not replaced. Give another folder.")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror or error}.") from error


def _place(name: str) -> Path:
    return Path("base") if name == "base" else Path("tuned") / name.replace(" ", "-")


def _build_zoo(seed: int, steps: float, say: Callable[[str], None]) -> tuple[dict[str, Network], nn.Linear]:
    """Base and one fine-tune a task, by name, and the head they share."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base, head = Network(), nn.Linear(FEATURES, sum(len(task.classes) for task in TASKS.values()))
    generator = torch.Generator().manual_seed(seed)

    def scaled(plan: tuple[int, float]) -> tuple[int, float]:
        return max(1, round(plan[0] * steps)), plan[1]

    say("pretraining on the whole alphabet")
    everything = Task(range(head.out_features), _noise)
    _train(base, head, everything, [*base.parameters(), *head.parameters()], scaled(PRETRAINING), generator)
    networks = {"base": base}
    for name, task in TASKS.items():
        say(f"fine-tuning on {name}")
        networks[name] = copy.deepcopy(base)
        _train(networks[name], head, task, list(networks[name].parameters()), scaled(TUNING), generator)
    return networks, head


def _merge_and_score(
    folder: Path, seed: int, networks: Mapping[str, Network], head: nn.Linear, say: Callable[[str], None]
) -> Story:
    from merging import Recipe, merge, merge_stacks

    sheet = _sheet()
    rows: list[dict[str, tuple[Images, Labels]]] = []
    for split, size in enumerate((VALIDATION_ROWS, TEST_ROWS), start=1):
        generator = torch.Generator().manual_seed(1_000_003 * split + seed)
        rows.append({name: draw(task, size, generator, sheet) for name, task in TASKS.items()})
    validation, test = rows
    base = networks["base"]
    table = [Row("base", None, _accuracy(base, head, test), folder / _place("base"))]
    own = {name: _accuracy(networks[name], head, {name: test[name]})[name] for name in TASKS}
    table.append(Row("fine-tuned, each on its own task", None, own, folder / "tuned"))

    start = base.state_dict()
    stacks = {
        name: torch.stack([networks[task].state_dict()[name] - tensor for task in TASKS])
        for name, tensor in start.items()
    }
    trial = copy.deepcopy(base)
    (folder / "recipes").mkdir()
    for method, parameters in METHODS.items():
        say(f"merging by {method}")
        scale = None
        if method != "average":
            delta = merge_stacks(method, stacks, tasks=list(TASKS), seed=seed, **parameters)
            means = []
            for candidate in SCALES:
                trial.load_state_dict({name: tensor + candidate * delta[name] for name, tensor in start.items()})
                means.append(sum(_accuracy(trial, head, validation).values()))
            scale = SCALES[means.index(max(means))]
        recipe = Recipe.from_data(
            {
                "base": str(folder / _place("base")),
                "tasks": [{"path": str(folder / _place(name)), "name": name} for name in TASKS],
                "method": method,
                "parameters": parameters,
                "seed": seed,
                **({} if scale is None else {"scale": scale}),
            }
        )
        (folder / "recipes" / f"{method}.yaml").write_text(recipe.dump(), encoding="utf-8")
        merged = folder / "merged" / method
        merge(recipe, merged)
        trial.load_state_dict(load_file(merged / "model.safetensors"))
        table.append(Row(method, scale, _accuracy(trial, head, test), merged, parameters))
    return Story(folder, seed, tuple(table))
