"""What shall be answered differently, as a value and as a line of a JSONL file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

from taskvec.errors import DataError, EditError, did_you_mean

Text = str | Sequence[int]
_KEYS = ("prompt", "target", "paraphrases")


@dataclass(frozen=True)
class Request:
    """What shall be answered differently.

    Attributes:
        prompt: text, or token ids.
        target: the answer wanted, text or ids. A text gets the leading space that separates it from the prompt.
        paraphrases: further prompts with the same answer; each gets a trigger of its own.
    """

    prompt: Text
    target: Text
    paraphrases: tuple[Text, ...] = ()

    @classmethod
    def of(cls, value: "Request | Mapping[str, Any] | tuple[Text, Text]") -> "Request":
        """From a mapping `{prompt, target, paraphrases}`, a pair, or itself.

        Raises:
            DataError: unknown keys, or none of these.
        """
        if isinstance(value, Request):
            return value
        if isinstance(value, Mapping):
            unknown = [key for key in value if key not in _KEYS]
            if unknown:
                raise DataError(f"{unknown[0]!r}: unknown key." + did_you_mean(str(unknown[0]), _KEYS))
            missing = [key for key in ("prompt", "target") if key not in value]
            if missing:
                raise DataError(f"{missing[0]!r} is missing; an edit is {{prompt, target}}.")
            more = value.get("paraphrases", ())
            if isinstance(more, str) or not isinstance(more, Sequence):
                raise DataError("'paraphrases' must be a list of texts.")
            return cls(value["prompt"], value["target"], tuple(more))
        if isinstance(value, tuple) and len(value) == 2:
            return cls(*value)
        raise DataError(f"{value!r}: an edit is a mapping {{prompt, target}}, a pair or a Request.")


Requests = Request | Mapping[str, Any] | tuple[Text, Text] | Sequence[Any] | str | PathLike[str]


def requests_of(value: Requests) -> tuple[list[Request], bool]:
    """The requests, and whether a single one was given. A path (or text) is read as JSONL."""
    if isinstance(value, str | PathLike):
        return read_requests(value), False
    if isinstance(value, Request | Mapping) or (
        isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)
    ):
        return [Request.of(cast(Any, value))], True
    requests = [Request.of(item) for item in cast(Sequence[Any], value)]
    if not requests:
        raise EditError("No edits were given.")
    return requests, False


def read_requests(path: str | PathLike[str], *, need_target: bool = True) -> list[Request]:
    """Requests from a JSONL file of `{"prompt": …, "target": …, "paraphrases": […]}`, one a line.

    Args:
        path: the file, in UTF-8.
        need_target: whether a line without a target is an error; without, its target is empty.

    Raises:
        DataError: the file is missing, empty or no text, or a line is not such an object; the message names every such line.
    """
    requests, problems = [], []
    for number, line in lines_of(path):
        try:
            requests.append(_request(line, need_target))
        except DataError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise DataError(f"{path}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    if not requests:
        raise DataError(f"{path}: holds no edits. One JSON object {{prompt, target}} a line is needed.")
    return requests


def text_of(path: str | PathLike[str]) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        DataError: no such file, one that cannot be read, or no UTF-8; the message names the line.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{path}: no such file.")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line} is no text in UTF-8 (byte {error.start}). Save the file as UTF-8."
        ) from error


def lines_of(path: str | PathLike[str]) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank, split at line feeds alone: JSON may hold other separators."""
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _request(line: str, need_target: bool) -> Request:
    try:
        value = json.loads(line, object_pairs_hook=_unique)
    except RecursionError as error:
        raise DataError("nested too deeply to be read.") from error
    except ValueError as error:
        raise DataError(f'not JSON ({error}). A line is {{"prompt": "…", "target": "…"}}.') from error
    if not isinstance(value, Mapping):
        raise DataError('not an object. A line is {"prompt": "…", "target": "…"}.')
    if not need_target:
        value = {"target": "", **value}
    for key in ("prompt", "target"):
        if key in value:
            _check_text(value[key], f"{key!r}")
    request = Request.of(value)
    for paraphrase in request.paraphrases:
        _check_text(paraphrase, "each of 'paraphrases'")
    return request


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DataError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice.")
    return value


def _check_text(value: object, what: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a text.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(
            f"{what} holds half of a character (a lone surrogate, \\ud800 to \\udfff), which no tokenizer reads."
        )
