"""Every method of the catalogue on the real zoos: default parameters, and its scale chosen on validation rows.

    python -m examples.real_zoo.catalogue --write DIR                      scores; DIR gets one JSON file a zoo
    python -m examples.real_zoo.catalogue --zoos text --methods pcb,ties
    python -m examples.real_zoo.catalogue --zoos text --cost --write DIR   time and peak memory of `taskvec merge`
    python -m examples.real_zoo.catalogue --tables DIR                     markdown of what is in DIR

Zoos: text, image, language (full fine-tunes), language-lora. Each method merges once with scale 1, in float32; scales
are then tried on base + scale * (merged - base), which is what `scale:` in a recipe does, and the chosen one is rounded
to the dtype in which the zoo stores its models. Merged tensors are loaded into the pretrained model in memory; `run.py`
beside this file does the same for fewer methods with folders that transformers reads. A parameter without a default is
chosen on validation rows, too. Methods that draw at random have three seeds.

Statistics (fisher, regmean, regmean_pp) are collected by `merging.learn.statistics`, as `taskvec learn statistics` does,
on training rows, without labels.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

CLI = Path(__file__).parents[2] / "cli.py"
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
GROWTH = 1.4  # further scales where the largest of these is the best
SEEDS = (0, 1, 2)
ZOOS = ("text", "image", "language", "language-lora")

# beside the catalogue's own names: combinations that people use by name
COMBINED: dict[str, dict[str, Any]] = {
    "dare + ties": {"method": "ties", "parameters": {"density": 1.0}, "preprocess": ["dare"]},
    "breadcrumbs + ties": {"method": "ties", "parameters": {"density": 1.0}, "preprocess": ["breadcrumbs"]},
    "della + ties": {"method": "ties", "parameters": {"density": 1.0}, "preprocess": ["della"]},
    "karcher of task vectors": {"method": "karcher", "space": "delta"},
    "multislerp of task vectors": {"method": "multislerp", "space": "delta"},
    "wudi, ridge solver": {"method": "wudi", "parameters": {"solver": "ridge"}},
}
# parameters without a default: what is tried
TRIED: dict[str, tuple[str, tuple[float, ...]]] = {
    "lines": ("slope", (0.2, 0.5, 1.0)),
    "subspace_boosting": ("share", (0.3, 0.6, 0.9)),
    "nearswap": ("distance", (1e-4, 1e-3, 1e-2)),
}
# decompositions and long solvers: where there is a GPU, they use it
HEAVY = ("cart", "iso_c", "iso_cts", "knots", "low_rank", "subspace_boosting", "svc", "tsv_m", "wudi")


@dataclass(frozen=True, slots=True)
class Entry:
    """A row: a recipe but for paths.

    Attributes:
        tasks: which models take part.
        scaled: whether the merge has a scale.
    """

    name: str
    recipe: Mapping[str, Any]
    tasks: tuple[str, ...]
    scaled: bool = True
    seeds: tuple[int, ...] = (0,)
    statistics: str | None = None
    tried: tuple[str, tuple[float, ...]] | None = None

    @property
    def heavy(self) -> bool:
        """Whether a GPU should merge it."""
        return bool({self.recipe["method"], self.name} & set(HEAVY))


@dataclass(frozen=True, slots=True)
class Job:
    """One merge of a row: a seed, and a value of the parameter that is tried."""

    entry: Entry
    value: float | None
    seed: int
    out: Path


@dataclass
class Found:
    """What a row scored, by task.

    Attributes:
        plain: test scores with scale 1, one mapping a seed.
        scales: the chosen scale of each seed.
        tuned: test scores with it.
        means: mean of `tuned` of each seed.
        chosen: the value chosen for a parameter without default, and `values` those that were tried.
        refused: why there is no merge.
    """

    name: str
    tasks: list[str]
    plain: list[dict[str, float]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    tuned: list[dict[str, float]] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    chosen: str = ""
    values: list[float] = field(default_factory=list)
    device: str = "cpu"
    refused: str | None = None


def entries(tasks: Sequence[str], chosen: Sequence[str] | None = None) -> list[Entry]:
    """The rows for a zoo, in the catalogue's order; two-model and one-model methods get the first models."""
    from merging.method import methods

    found = []
    for name, method in methods().items():
        most = method.tasks[1] or len(tasks)
        recipe: dict[str, Any] = {"method": name}
        if method.role == "postprocess":
            recipe = {"method": "task_arithmetic", "postprocess": [name]}
        found.append(
            Entry(
                name,
                recipe,
                tuple(tasks[:most]),
                method.space == "delta",
                SEEDS if "seed" in method.parameters else SEEDS[:1],
                name if method.data == "statistics" else None,
                TRIED.get(name),
            )
        )
        if name == "average" and len(tasks) > 2:
            found.append(Entry("average of two", recipe, tuple(tasks[:2]), scaled=False))
    for name, recipe in COMBINED.items():
        drawn = name.startswith(("dare", "della"))
        found.append(Entry(name, recipe, tuple(tasks), seeds=SEEDS if drawn else SEEDS[:1]))
    return [entry for entry in found if chosen is None or entry.name in chosen]


# -- zoos in memory ----------------------------------------------------------------------------------------------------


class Zoo:
    """A built zoo and its base in memory, into which merged tensors are loaded.

    Attributes:
        models: task to folder, the base not among them.
        loss: whether scores are perplexities (lower is better, means are geometric).
        kind: dtype in which the zoo stores its models.
    """

    loss = False

    def __init__(self, name: str, places: Mapping[str, Path], folders: Mapping[str, Path]):
        import torch

        self.name, self.base, self.models = name, places["base"], dict(folders)
        self.tasks = list(self.models)
        self.model = self.load(self.base)
        self.own = dict(self.model.state_dict(keep_vars=True))
        base = self.tensors(self.base)
        self.kind = next(t.dtype for t in base.values() if t.is_floating_point())
        self.start = {n: t.to(self.device, torch.float32) for n, t in base.items() if t.is_floating_point()}

    @property
    def device(self) -> Any:
        return next(iter(self.own.values())).device

    @staticmethod
    def tensors(folder: Path) -> dict[str, Any]:
        from safetensors.torch import load_file

        return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}

    def put(self, merged: Mapping[str, Any], scale: float, kind: Any = None) -> None:
        """Base + scale * (merged - base) into the model, through a rounding to `kind` if given."""
        import torch

        with torch.no_grad():
            for name, value in merged.items():
                if name in self.start:
                    mixed = value if scale == 1 else torch.lerp(self.start[name], value, scale)
                    self.own[name].copy_(mixed if kind is None else mixed.to(kind).float())

    def mean(self, scores: Mapping[str, float]) -> float:
        values = list(scores.values())
        return math.exp(fmean(map(math.log, values))) if self.loss else fmean(values)

    def worth(self, scores: Mapping[str, float]) -> float:
        return -self.mean(scores) if self.loss else self.mean(scores)

    def load(self, folder: Path) -> Any:
        raise NotImplementedError

    def tuned(self, task: str) -> Any:
        """The fine-tuned model of a task, plain: an adapter is folded in."""
        return self.load(self.models[task])

    def score(self, tasks: Sequence[str], split: str, rows: int | None = None, model: Any = None) -> dict[str, float]:
        raise NotImplementedError

    def inputs(self, task: str, rows: int) -> list[Any]:
        """Training rows without labels, in batches on the model's device."""
        raise NotImplementedError

    def predictions(self, task: str) -> Callable[[Any, Any], Any]:
        """How (model, batch) gives logits."""
        raise NotImplementedError

    rows = 256


class TextZoo(Zoo):
    def load(self, folder: Path) -> Any:
        from examples.real_zoo import text

        return text._load(folder)

    def score(self, tasks: Sequence[str], split: str, rows: int | None = None, model: Any = None) -> dict[str, float]:
        from examples.real_zoo import text

        return {task: text.accuracy(model or self.model, task, split, rows) for task in tasks}

    def inputs(self, task: str, rows: int) -> list[Any]:
        from examples.real_zoo import text

        batches = text.tokens(text.load_task(task).train[:rows], size=64)
        return [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch, _ in batches]

    def predictions(self, task: str) -> Callable[[Any, Any], Any]:
        from examples.real_zoo import text

        return lambda model, batch: text.logits(model, batch, text.heads(task))


class ImageZoo(Zoo):
    def load(self, folder: Path) -> Any:
        from examples.real_zoo import image

        return image.load(folder)

    def score(self, tasks: Sequence[str], split: str, rows: int | None = None, model: Any = None) -> dict[str, float]:
        from examples.real_zoo import image

        return {task: image.accuracy(model or self.model, task, split, rows) for task in tasks}

    def inputs(self, task: str, rows: int) -> list[Any]:
        from examples.real_zoo import image

        return list(image.load_task(task).train.images[:rows].split(64))

    def predictions(self, task: str) -> Callable[[Any, Any], Any]:
        from examples.real_zoo import image

        return lambda model, batch: image.logits(model, batch, image.heads(task))


class LanguageZoo(Zoo):
    loss = True
    rows = 64

    def load(self, folder: Path) -> Any:
        from examples.real_zoo import language

        return language._load(folder)

    def tuned(self, task: str) -> Any:
        from examples.real_zoo import language

        folder = self.models[task]
        if not (folder / "adapter_config.json").exists():
            return self.load(folder)
        return language._load(self.base, folder).merge_and_unload()

    def score(self, tasks: Sequence[str], split: str, rows: int | None = None, model: Any = None) -> dict[str, float]:
        from examples.real_zoo import language

        return {task: language.perplexity(model or self.model, task, split, rows) for task in tasks}

    def inputs(self, task: str, rows: int) -> list[Any]:
        from examples.real_zoo import language

        blocks = language.load_domain(task).train[:rows].to(self.device)
        return [{"input_ids": part} for part in blocks.split(8)]

    def predictions(self, task: str) -> Callable[[Any, Any], Any]:
        return lambda model, batch: model(**batch).logits


def opened(name: str, quick: bool) -> Zoo:
    """Builds what is missing of a zoo and loads its base."""
    from examples.real_zoo import image, language, text

    if name == "text":
        places = text.build(quick)
        return TextZoo(name, places, {task: place for task, place in places.items() if task != "base"})
    if name == "image":
        places = image.build(quick)
        return ImageZoo(name, places, {task: place for task, place in places.items() if task != "base"})
    places = language.build(quick)
    ending = "-lora" if name == "language-lora" else ""
    domains = [task for task in places if task != "base" and not task.endswith("-lora")]
    return LanguageZoo(name, places, {task: places[task + ending] for task in domains})


# -- merging -----------------------------------------------------------------------------------------------------------


def recipe_of(
    zoo: Zoo, entry: Entry, value: float | None, seed: int, files: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The whole recipe of a row."""
    recipe = json.loads(json.dumps(entry.recipe))
    recipe |= {
        "base": str(zoo.base),
        "tasks": [{"name": task, "path": str(zoo.models[task])} for task in entry.tasks],
        "seed": seed,
    }
    if entry.tried is not None:
        given = {entry.tried[0]: value}
        if "postprocess" in recipe:
            recipe["postprocess"] = [{"method": recipe["postprocess"][0], **given}]
        else:
            recipe["parameters"] = {**recipe.get("parameters", {}), **given}
    if entry.statistics is not None:
        recipe["parameters"] = {**recipe.get("parameters", {}), "statistics_files": list(files[entry.statistics])}
    return recipe


def merged(recipe: Mapping[str, Any], out: str) -> float:
    """Merge in this process; the seconds it took."""
    from merging import Recipe, merge

    begun = time.perf_counter()
    merge(Recipe.model_validate(recipe), out, overwrite=True)
    return time.perf_counter() - begun


def _ready(threads: int) -> None:
    """A worker of the pool: one thread each, and the library imported."""
    import torch

    torch.set_num_threads(threads)
    from merging.method import methods

    methods()


# what a process that merges tells of itself when it ends; its own pages and mapped ones, as the kernel counted them
MEASURED = """
import os, runpy, sys
sys.argv = sys.argv[1:]
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    code = ended.code or 0
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
spent = os.times()
print("peak KiB", peak.split()[1], spent.user + spent.system, file=sys.stderr, flush=True)
os._exit(code if isinstance(code, int) else 1)
"""


def cost(recipe: Mapping[str, Any], out: Path) -> dict[str, float]:
    """Seconds from start to exit, of the processor, and peak resident bytes of `taskvec merge RECIPE OUT`."""
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    command = [sys.executable, "-c", MEASURED, str(CLI), "merge", str(file), str(out), "--overwrite"]
    begun = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if ended.returncode:
        raise SystemExit(f"{file}: merge failed:\n{ended.stderr[-3000:]}")
    peak = next(line for line in reversed(ended.stderr.splitlines()) if line.startswith("peak KiB"))
    _, _, kibibytes, spent = peak.split()
    return {"seconds": seconds, "cpu": float(spent), "peak": float(kibibytes) * 1024}


def statistics_of(zoo: Zoo, home: Path, wanted: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Files of statistics by method, and why there are none."""
    from merging.learn.statistics import fisher_diagonal, input_grams, input_grams_through_merged
    from taskvec.errors import TaskvecError

    files: dict[str, list[str]] = {}
    refused: dict[str, str] = {}
    if not wanted:
        return files, refused
    home.mkdir(parents=True, exist_ok=True)
    batches = {task: zoo.inputs(task, zoo.rows) for task in zoo.tasks}
    models = {task: zoo.tuned(task) for task in zoo.tasks}
    places = {name: {task: home / f"{name}-{task}.safetensors" for task in zoo.tasks} for name in wanted}
    for name in wanted:
        begun = time.perf_counter()
        try:
            if name == "regmean_pp":
                forward = zoo.predictions(zoo.tasks[0])  # the head of one task: what comes before it counts
                input_grams_through_merged(models, batches, places[name], forward=forward, overwrite=True)
            for task in zoo.tasks if name != "regmean_pp" else ():
                out = places[name][task]
                if name == "fisher":
                    some = batches[task][: max(1, len(batches[task]) // 4)]
                    fisher_diagonal(models[task], some, out, forward=zoo.predictions(task), overwrite=True)
                else:
                    input_grams(models[task], batches[task], out, forward=zoo.predictions(task), overwrite=True)
            files[name] = [str(place) for place in places[name].values()]
            say(f"{zoo.name}: statistics for {name} in {time.perf_counter() - begun:.1f} s")
        except TaskvecError as error:
            refused[name] = str(error)
            say(f"{zoo.name}: no statistics for {name}: {error}")
    return files, refused


def best_scale(zoo: Zoo, tensors: Mapping[str, Any], tasks: Sequence[str], rows: int | None) -> tuple[float, float]:
    """The scale with the best mean on validation rows, and that mean as `Zoo.worth` counts."""
    found: dict[float, float] = {}

    def at(scale: float) -> float:
        zoo.put(tensors, scale)
        worth = zoo.worth(zoo.score(tasks, "validation", rows))
        found[scale] = worth if math.isfinite(worth) else -math.inf
        return found[scale]

    for scale in SCALES:
        at(scale)
    best = max(found, key=lambda scale: found[scale])
    while best == max(found) and best < 40:
        at(round(best * GROWTH, 1))
        best = max(found, key=lambda scale: found[scale])
    return best, found[best]


def _is_whole(row: Mapping[str, Any], entry: Entry, seeds: int) -> bool:
    """Whether an earlier run finished this row."""
    wanted = len(entry.tried[1]) if entry.tried is not None else 0
    return len(row.get("tuned", ())) >= len(entry.seeds[:seeds]) and len(row.get("values", ())) >= wanted


def catalogue(
    zoo: Zoo,
    chosen: Sequence[str] | None,
    *,
    workers: int,
    validation: int | None,
    test: int | None,
    write: Path | None,
    seeds: int = 3,
) -> dict[str, Any]:
    """Scores of base, fine-tuned models and every row."""
    import torch

    rows = entries(zoo.tasks, chosen)
    home = zoo.base.parent.parent / "merged" / f"catalogue-{zoo.name}"
    home.mkdir(parents=True, exist_ok=True)
    place = None if write is None else write / f"{zoo.name}.json"
    before = json.loads(place.read_text()) if place is not None and place.exists() else {"rows": {}}
    done = {entry.name for entry in rows if _is_whole(before["rows"].get(entry.name, {}), entry, seeds)}
    rows = [entry for entry in rows if entry.name not in done]
    again = {entry.name for entry in rows}
    result: dict[str, Any] = {
        "zoo": zoo.name,
        "tasks": zoo.tasks,
        "loss": zoo.loss,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "rows": {name: row for name, row in before["rows"].items() if name not in again},
    }

    def keep() -> None:
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(result, indent=1) + "\n")

    begun = time.perf_counter()
    result["base"] = zoo.score(zoo.tasks, "test", test)
    result["tuned"] = {}
    for task in zoo.tasks:
        result["tuned"] |= zoo.score([task], "test", test, zoo.tuned(task))
    keep()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "merging", "merging.streamed"])
    with ProcessPoolExecutor(max(workers, 1), context, _ready, (1,)) as pool:
        waiting: dict[Future[float], Job] = {}
        # the longest first; those that need statistics last
        jobs = [
            Job(entry, value, seed, home / f"{entry.name.replace(' ', '-').replace(',', '')}-{value}-{seed}")
            for entry in sorted(rows, key=lambda e: (e.statistics is not None, not e.heavy))
            for value in (entry.tried[1] if entry.tried is not None else (None,))
            for seed in entry.seeds[:seeds]
        ]
        jobs.reverse()
        files: dict[str, list[str]] = {}

        def send() -> None:
            # no more merged models than there are workers wait on the disk
            while jobs and len(waiting) < 2 * workers:
                entry = jobs[-1].entry
                if entry.statistics is not None and entry.statistics not in files:
                    break
                job = jobs.pop()
                recipe = recipe_of(zoo, entry, job.value, job.seed, files)
                recipe["device"] = "cuda" if entry.heavy and torch.cuda.is_available() else "cpu"
                recipe |= {"output": {"dtype": "float32"}, "workers": 1, "memory": "3GiB"}
                waiting[pool.submit(merged, recipe, str(job.out))] = job

        send()
        found_files, refused = statistics_of(zoo, home / "statistics", [e.statistics for e in rows if e.statistics])
        files |= found_files
        for entry in rows:
            if entry.statistics in refused:
                said = refused[str(entry.statistics)]
                result["rows"][entry.name] = asdict(Found(entry.name, list(entry.tasks), refused=said))
        jobs = [job for job in jobs if job.entry.statistics not in refused]
        best_value: dict[tuple[str, int], float] = {}
        send()
        while waiting:
            future = next(as_completed(waiting))
            job = waiting.pop(future)
            send()
            entry, value, seed, out = job.entry, job.value, job.seed, job.out
            device = "cuda" if entry.heavy and torch.cuda.is_available() else "cpu"
            found = result["rows"].setdefault(entry.name, asdict(Found(entry.name, list(entry.tasks), device=device)))
            try:
                seconds = future.result()
            except Exception as error:
                found["refused"] = f"{type(error).__name__}: {error}"
                say(f"{zoo.name}: {entry.name}: {found['refused']}")
                keep()
                continue
            tensors = {n: t.to(zoo.device).float() for n, t in zoo.tensors(out).items() if t.is_floating_point()}
            shutil.rmtree(out)
            if entry.scaled:
                scale, worth = best_scale(zoo, tensors, entry.tasks, validation)
            else:
                zoo.put(tensors, 1.0)
                scale, worth = 1.0, zoo.worth(zoo.score(entry.tasks, "validation", validation))
            if value is not None:
                found["values"].append(value)
            if entry.tried is not None:
                if worth <= best_value.get((entry.name, seed), -math.inf):
                    continue
                best_value[entry.name, seed] = worth
                found |= {key: [] for key in ("plain", "scales", "tuned", "means", "seconds")}
                found["chosen"] = f"{entry.tried[0]} {value:g}"
            zoo.put(tensors, 1.0, zoo.kind)
            found["plain"].append(zoo.score(entry.tasks, "test", test))
            if scale != 1:
                zoo.put(tensors, scale, zoo.kind)
            found["tuned"].append(zoo.score(entry.tasks, "test", test) if scale != 1 else found["plain"][-1])
            found["scales"].append(scale)
            found["means"].append(zoo.mean(found["tuned"][-1]))
            found["seconds"].append(seconds)
            say(
                f"{zoo.name} {time.perf_counter() - begun:5.0f} s: {entry.name} {found['chosen']} "
                f"plain {zoo.mean(found['plain'][-1]):.4f}, scale {scale:g}: {found['means'][-1]:.4f} ({seconds:.1f} s)"
            )
            keep()
    result["seconds"] = time.perf_counter() - begun
    keep()
    return result


def costs(zoo: Zoo, chosen: Sequence[str] | None, write: Path | None) -> dict[str, Any]:
    """Seconds and peak memory of one `taskvec merge` for each row, one after the other."""
    rows = entries(zoo.tasks, chosen)
    home = zoo.base.parent.parent / "merged" / f"cost-{zoo.name}"
    home.mkdir(parents=True, exist_ok=True)
    statistics = zoo.base.parent.parent / "merged" / f"catalogue-{zoo.name}" / "statistics"
    files = {
        entry.statistics: [str(statistics / f"{entry.statistics}-{task}.safetensors") for task in zoo.tasks]
        for entry in rows
        if entry.statistics
    }
    place = None if write is None else write / f"{zoo.name}-cost.json"
    result: dict[str, Any] = json.loads(place.read_text()) if place is not None and place.exists() else {}
    for entry in rows:
        if entry.statistics and not Path(files[entry.statistics][0]).exists():
            say(f"{zoo.name}: {entry.name}: no statistics; score the zoo first")
            continue
        value = entry.tried[1][0] if entry.tried is not None else None
        out = home / "merged"
        result[entry.name] = cost(recipe_of(zoo, entry, value, 0, files), out)
        shutil.rmtree(out)
        say(
            f"{zoo.name}: {entry.name}: {result[entry.name]['seconds']:.1f} s, {result[entry.name]['peak'] / 2**20:.0f} MiB"
        )
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(result, indent=1) + "\n")
    return result


# -- words -------------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def shown(value: float, loss: bool) -> str:
    return f"{value:.2f}" if loss else f"{100 * value:.1f}"


def _mean(scores: Mapping[str, float], loss: bool) -> float:
    values = list(scores.values())
    return math.exp(fmean(map(math.log, values))) if loss else fmean(values)


def table(result: Mapping[str, Any]) -> str:
    """One zoo, every row: mean with scale 1, chosen scale, scores with it."""
    tasks, loss = result["tasks"], result["loss"]
    lines = [
        f"| method | mean, scale 1 | scale | {' | '.join(tasks)} | mean |",
        "|---" * (len(tasks) + 4) + "|",
    ]
    for name, scores in (("base", result["base"]), ("fine-tuned, each on its own task", result["tuned"])):
        cells = [shown(scores[task], loss) for task in tasks]
        lines.append(f"| {name} |  |  | {' | '.join(cells)} | {shown(_mean(scores, loss), loss)} |")
    for found in sorted(result["rows"].values(), key=lambda found: found["name"]):
        name = found["name"] + (f" ({found['chosen']})" if found["chosen"] else "")
        if not found["tuned"]:
            lines.append(f"| {name} | none: {found['refused'].splitlines()[0][:90]} |  |{'  |' * (len(tasks) + 1)}")
            continue
        whole = len(found["tasks"]) == len(tasks)
        cells = [
            shown(fmean(scores[task] for scores in found["tuned"]), loss) if task in found["tasks"] else ""
            for task in tasks
        ]
        mean = shown(fmean(found["means"]), loss)
        if len(found["means"]) > 1:
            mean += f" (range {shown(max(found['means']) - min(found['means']), loss)})"
        scales = "/".join(f"{scale:g}" for scale in sorted(set(found["scales"])))
        plain = fmean(_mean(scores, loss) for scores in found["plain"])
        mine = len(found["tasks"])
        where = mean if whole else f"{mean} (of {mine})"
        lines.append(f"| {name} | {shown(plain, loss)} | {scales} | {' | '.join(cells)} | {where} |")
    return "\n".join(lines)


def summary(folder: Path) -> str:
    """All zoos side by side: mean with scale 1 and with the chosen scale, seconds and peak memory."""
    found = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ZOOS if (folder / f"{name}.json").exists()
    }
    spent = {
        name: json.loads((folder / f"{name}-cost.json").read_text())
        for name in ZOOS
        if (folder / f"{name}-cost.json").exists()
    }
    names = sorted({name for result in found.values() for name in result["rows"]})
    head = [f"{name} (scale 1 → chosen scale)" for name in found] + [
        f"{name}: processor seconds, peak MiB" for name in spent
    ]
    lines = [f"| method | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, which in (("base", "base"), ("fine-tuned", "tuned")):
        cells = [shown(_mean(result[which], result["loss"]), result["loss"]) for result in found.values()]
        lines.append(f"| {name} | {' | '.join([*cells, *('' for _ in spent)])} |")
    for name in names:
        cells = []
        for result in found.values():
            row, loss = result["rows"].get(name), result["loss"]
            if row is None or not row["tuned"]:
                cells.append("–")
                continue
            plain = shown(fmean(_mean(scores, loss) for scores in row["plain"]), loss)
            scales = "/".join(f"{scale:g}" for scale in sorted(set(row["scales"])))
            tuned = shown(fmean(row["means"]), loss)
            few = "" if len(row["tasks"]) == len(result["tasks"]) else f"; {len(row['tasks'])} of the models"
            cells.append((plain if scales == "1" else f"{plain} → {tuned} ({scales})") + few)
        for costs_here in spent.values():
            one = costs_here.get(name)
            cells.append("" if one is None else f"{one['cpu']:.1f}, {one['peak'] / 2**20:.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoos", default=",".join(ZOOS))
    parser.add_argument("--methods", help="names of rows, separated by `;` or commas; default: all")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="merges at once")
    parser.add_argument("--rows", type=int, help="test rows a task; default: all")
    parser.add_argument("--validation", type=int, help="validation rows a task; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the reduced zoos")
    parser.add_argument("--cost", action="store_true", help="seconds and peak memory of the command instead of scores")
    parser.add_argument("--write", type=Path, help="a folder for the results")
    parser.add_argument("--tables", type=Path, help="print what is in this folder, and do nothing else")
    chosen = parser.parse_args()
    if chosen.tables is not None:
        for name in ZOOS:
            if (chosen.tables / f"{name}.json").exists():
                print(f"{name}\n\n{table(json.loads((chosen.tables / f'{name}.json').read_text()))}\n")
        print(summary(chosen.tables))
        return
    names = None
    if chosen.methods:
        names = chosen.methods.split(";" if ";" in chosen.methods else ",")
    for name in chosen.zoos.split(","):
        if name not in ZOOS:
            parser.error(f"--zoos: {name} is none of {', '.join(ZOOS)}")
        zoo = opened(name, chosen.quick)
        if chosen.cost:
            costs(zoo, names, chosen.write)
        else:
            result = catalogue(
                zoo, names, workers=chosen.workers, validation=chosen.validation, test=chosen.rows,
                write=chosen.write, seeds=chosen.seeds,
            )  # fmt: skip
            print(f"{name}\n\n{table(result)}\n", flush=True)


if __name__ == "__main__":
    main()
