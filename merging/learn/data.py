"""From files of examples to batches: JSONL, CSV, Parquet, folders of `datasets`, or a function of yours."""

import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from taskvec.errors import DataError, NotFoundError, UsageError, did_you_mean, shortened

Row = Mapping[str, Any]


def rows(path: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a file, as mappings of column to value.

    Raises:
        NotFoundError: no such file or folder.
        DataError: not a kind of file we read, a row that is none, or no row at all.
    """
    place = Path(path)
    if not place.exists():
        raise NotFoundError(f"{path}: no such data file or folder.")
    if place.is_dir():
        found: Iterable[Any] = _saved_dataset(place)
    elif place.suffix in (".jsonl", ".json", ".ndjson"):
        found = _json_lines(place)
    elif place.suffix in (".csv", ".tsv"):
        found = _table(place)
    elif place.suffix in (".parquet", ".pq"):
        found = _parquet(place)
    else:
        raise DataError(f"{path}: not a kind of data we read; expected .jsonl, .csv, .parquet or a `datasets` folder.")
    taken: list[dict[str, Any]] = []
    for row in found:
        if limit is not None and len(taken) >= limit:
            break
        taken.append(dict(row))
    if not taken:
        raise DataError(f"{path}: holds no rows.")
    return taken


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error.msg}). Expected one object a line.") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: a {type(row).__name__}; expected an object with columns.")
            yield row


def _table(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","), 2):
            if None in row or None in row.values():
                raise DataError(f"{path}, line {number}: has another number of columns than the header.")
            yield row


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow (`pip install pyarrow`).") from None
    table: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return table


def _saved_dataset(path: Path) -> Iterable[Any]:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError:
        raise DataError(f"{path}: a folder of `datasets` needs that package (`pip install datasets`).") from None
    try:
        found = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path}: not a folder that `datasets` saved ({error}).") from None
    if not isinstance(found, Dataset):
        raise DataError(f"{path}: holds several splits ({', '.join(found)}); give the folder of one.")
    return found


def named(spec: str, what: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        UsageError: no such module or function.
    """
    module, _, attribute = spec.partition(":")
    if not module or not attribute:
        raise UsageError(f"{what}: {spec!r}; expected `module:function`.")
    try:
        found = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise UsageError(f"{what}: {spec!r}: {error}. Is it importable from here (PYTHONPATH)?") from None
    except AttributeError:
        raise UsageError(f"{what}: module {module!r} has no {attribute!r}.") from None
    if not callable(found):
        raise UsageError(f"{what}: {spec!r} is a {type(found).__name__}; expected a function.")
    return found


@dataclass
class Texts:
    """Tokenised texts with labels, in batches; the order changes with the epoch and depends on nothing else.

    Args:
        name: for messages.
        tokenizer: of transformers.
        texts: one text or pair a row.
        labels: whole numbers, or None for unlabelled (and causal language) data.
        batch: rows per batch.
        max_length: tokens kept of each row.
        seed: of the order.
        shuffle: False keeps the file's order.
    """

    name: str
    tokenizer: Any
    texts: Sequence[str | tuple[str, str]]
    labels: Sequence[int] | None
    batch: int
    max_length: int
    seed: int = 0
    shuffle: bool = True

    def __len__(self) -> int:
        return -(-len(self.texts) // self.batch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self(0)

    def __call__(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        order = list(range(len(self.texts)))
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
            order = torch.randperm(len(order), generator=generator).tolist()
        for start in range(0, len(order), self.batch):
            picked = order[start : start + self.batch]
            batch = self.tokens([self.texts[i] for i in picked])
            if self.labels is not None:
                batch["labels"] = torch.tensor([self.labels[i] for i in picked])
            yield batch

    def in_order(self) -> "Texts":
        """The same texts, unshuffled and without labels."""
        return replace(self, labels=None, shuffle=False)

    def tokens(self, chosen: Sequence[str | tuple[str, str]]) -> dict[str, Tensor]:
        """These texts, or pairs of them, as a batch without labels."""
        pairs = None if isinstance(chosen[0], str) else [text[1] for text in chosen]
        firsts = chosen if pairs is None else [text[0] for text in chosen]
        tokens = self.tokenizer(
            firsts, pairs, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {key: value for key, value in tokens.items() if isinstance(value, Tensor)}


class Chooser(Protocol):
    """What says which examples make a batch (`UFM`)."""

    def index_batches(self, size: int, *, seed: int = 0, epoch: int = 0) -> Iterator[Tensor]: ...


@dataclass
class Views:
    """Two views of texts: as they are (`weak`), and with some of their words left out (`strong`).

    Args:
        texts: all examples; each epoch has as many batches as they have.
        chooser: chooses the examples of each batch.
        drop: fraction of words left out; at least one stays.
        seed: of the choice and of the words.
    """

    texts: Texts
    chooser: Chooser
    drop: float
    seed: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def __call__(self, epoch: int) -> Iterator[dict[str, Any]]:
        left, turn = len(self), 0
        while left:
            # one turn through the examples that are not trusted may be shorter than an epoch: the next is shuffled anew
            for index in self.chooser.index_batches(self.texts.batch, seed=self.seed, epoch=epoch * 4099 + turn):
                rows = [self.texts.texts[i] for i in index.tolist()]
                strong = [
                    self._thinned(text, f"{self.seed}:{epoch}:{turn}:{i}") for text, i in zip(rows, index.tolist())
                ]
                yield {"index": index, "weak": self.texts.tokens(rows), "strong": self.texts.tokens(strong)}
                left -= 1
                if not left:
                    return
            turn += 1

    def _thinned(self, text: str | tuple[str, str], key: str) -> str | tuple[str, str]:
        if isinstance(text, tuple):
            return self._words(text[0], f"{key}:0"), self._words(text[1], f"{key}:1")
        return self._words(text, key)

    def _words(self, text: str, key: str) -> str:
        generator = random.Random(key)
        words = text.split()
        kept = [word for word in words if generator.random() >= self.drop]
        return " ".join(kept) if kept else text


def texts(
    name: str,
    found: Sequence[Row],
    tokenizer: Any,
    *,
    text: str | Sequence[str],
    label: str | None,
    classes: Sequence[str] | None,
    batch: int,
    max_length: int,
    seed: int = 0,
    shuffle: bool = True,
) -> Texts:
    """Texts from rows.

    Args:
        label: column of the label, or None where none is needed.
        classes: names of the labels, where the column holds names.

    Raises:
        DataError: a column is missing, empty, or a label is neither a number nor one of `classes`.
    """
    columns = [text] if isinstance(text, str) else list(text)
    if len(columns) not in (1, 2):
        raise DataError(f"{name}: text is {len(columns)} columns; expected one, or two for pairs.")
    for column in [*columns, *([label] if label else [])]:
        missing = [i for i, row in enumerate(found) if row.get(column) is None]
        if missing:
            first = found[missing[0]]
            hint = " It is null there." if column in first else did_you_mean(column, first)
            raise DataError(
                f"{name}: {len(missing)} of {len(found)} rows have no {column!r} (first: row {missing[0] + 1}).{hint}"
            )
    contents: list[str | tuple[str, str]] = [
        str(row[columns[0]]) if len(columns) == 1 else (str(row[columns[0]]), str(row[columns[1]])) for row in found
    ]
    labels = [_label(name, row[label], i, classes) for i, row in enumerate(found)] if label else None
    return Texts(name, tokenizer, contents, labels, batch, max_length, seed, shuffle)


def _label(name: str, value: Any, row: int, classes: Sequence[str] | None) -> int:
    if isinstance(value, str) and classes is not None:
        if value not in classes:
            raise DataError(f"{name}, row {row + 1}: label {value!r} is not a class.{did_you_mean(value, classes)}")
        return list(classes).index(value)
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise DataError(
            f"{name}, row {row + 1}: label {value!r} is not a whole number; give `classes` where labels are names."
        ) from None
    if number != (float(value) if not isinstance(value, str) else number):
        raise DataError(f"{name}, row {row + 1}: label {value!r} is not a whole number.")
    return number


class Together:
    """Batches of several tasks side by side: each step has one batch of every task; the shortest ends the epoch."""

    def __init__(self, tasks: Mapping[str, Any]):
        self.tasks = dict(tasks)
        lengths = {name: len(data) for name, data in self.tasks.items() if hasattr(data, "__len__")}
        empty = [name for name, length in lengths.items() if length == 0]
        if empty:
            raise DataError(f"data: no batches for {shortened(empty)}.")
        self._length = min(lengths.values()) if len(lengths) == len(self.tasks) else None

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("one of the tasks has no length")
        return self._length

    def __call__(self, epoch: int) -> Iterator[dict[str, Any]]:
        sources = [source(epoch) if callable(source) else source for source in self.tasks.values()]
        for batches in zip(*sources, strict=False):
            yield dict(zip(self.tasks, batches, strict=True))
