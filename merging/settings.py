"""YAML files as types: recipes and configurations. Every mistake in one is reported at once, with its line."""

import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from taskvec.errors import NotFoundError, RecipeError, did_you_mean


class Strict(BaseModel):
    """A mapping of keys in a file: unknown keys are errors. Several mistakes of one validator stand on lines of their own.

    `other_words` maps keys that other tools have to what they are called here, for messages.
    """

    other_words: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> Self:
        """Reads a YAML file (or JSON, which is YAML); relative paths in it are relative to the working directory.

        Raises:
            NotFoundError: no such file.
            RecipeError: every mistake in it, with line numbers.
        """
        return cls.from_text(text_of(path), where=str(path))

    @classmethod
    def from_text(cls, text: str, *, where: str = "configuration") -> Self:
        """From YAML text of one document."""
        documents = parsed_documents(text, where)
        if len(documents) > 1:
            raise RecipeError(f"{len(documents)} documents; one is expected", title=f"{where} cannot be used")
        return cls.from_data(documents[0], where=where)

    @classmethod
    def from_data(cls, data: Any, *, where: str = "configuration") -> Self:
        """From plain mappings and lists.

        Raises:
            RecipeError: everything that is wrong with them.
        """
        title = f"{where} cannot be used"
        if not isinstance(data, Mapping):
            raise RecipeError(f"expected a mapping of keys to values, found {_kind(data)}", title=title)
        try:
            return cls.model_validate(plain(data))
        except ValidationError as error:
            raise RecipeError(located(error, data, cls), title=title) from None


def _kind(data: Any) -> str:
    if data is None:
        return "nothing: the file is empty"
    return "a list" if isinstance(data, Sequence) and not isinstance(data, str) else f"{plain(data)!r}"


def text_of(path: "str | os.PathLike[str]") -> str:
    """The text of a YAML file.

    Raises:
        NotFoundError: no such file.
        RecipeError: it cannot be read, or is no text.
    """
    file = Path(path)
    if file.is_dir():
        raise NotFoundError(f"{file}: is a folder; a YAML file is expected.")
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"{file}: no such file.") from None
    except OSError as error:
        raise RecipeError(f"cannot be read ({error.strerror})", title=f"{file} cannot be used") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"is not text in UTF-8 (byte {error.start}); a YAML file is expected", title=f"{file} cannot be used"
        ) from None


def parsed_documents(text: str, where: str) -> list[Any]:
    """The documents of a YAML text as ruamel's commented mappings, which know their lines; empty ones left out.

    Raises:
        RecipeError: a syntax error or a duplicate key, with its line.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    title = f"{where} is not valid YAML"
    try:
        return [found for found in YAML(typ="rt").load_all(text) if found is not None] or [None]
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{line}{problem}", title=title) from None
    except RecursionError:
        raise RecipeError("it is nested too deeply", title=title) from None


def plain(value: Any) -> Any:
    """Commented mappings and scalars as plain dictionaries, lists, numbers and texts."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    return value


def located(error: ValidationError, data: Any, model: type[BaseModel]) -> list[str]:
    """Pydantic's errors as sentences with lines and nearest known names."""
    problems: list[str] = []
    seen: set[tuple[Any, ...]] = set()
    for item in error.errors(include_url=False):
        about_key = item["type"] in ("extra_forbidden", "missing")
        path, line = _place(item["loc"], data, keep_last=about_key)
        if path in seen and not about_key:
            continue  # another alternative of a union, about the same value
        seen.add(path)
        at = f"line {line}: " if line else ""
        name = ".".join(map(str, path))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            key, words = str(path[-1]), getattr(model, "other_words", {}) if len(path) == 1 else {}
            hint = f" Here that is `{words[key]}`." if key in words else did_you_mean(key, _keys(model, path[:-1]))
            found = [f"{name}: there is no such key.{hint}"]
        elif item["type"] == "missing":
            found = [f"{name}: is missing"]
        elif item["type"] in ("model_type", "dict_type"):
            known = _keys(model, path) if item["type"] == "model_type" else []
            wanted = f"a mapping with the keys {', '.join(known)}" if known else "a mapping of keys to values"
            found = [f"{name}: should be {wanted}, found {item['input']!r}"]
        elif item["type"] == "value_error":
            found = [f"{name}: {message}" if name else part for part in message.split("\n")]
        else:
            value = item["input"]
            shown = repr(value)
            shown = shown if len(shown) <= 200 else shown[:200] + "…"
            found = [f"{name}: {message[:1].lower()}{message[1:]}, found {shown}"]
        problems += [at + text for text in found if at + text not in problems]
    return problems


def _place(loc: Sequence[Any], data: Any, *, keep_last: bool) -> tuple[tuple[Any, ...], int | None]:
    """What of pydantic's location is in the file (names of alternatives of a union are not), and its line."""
    path: list[Any] = []
    line: int | None = None
    for at, place in enumerate(loc):
        key = place
        if isinstance(data, Mapping) and isinstance(place, int) and place not in data and place < len(data):
            key = list(data)[place]  # a list that was given as a mapping from names
        in_mapping = isinstance(data, Mapping) and key in data
        in_list = isinstance(data, Sequence) and not isinstance(data, str) and isinstance(key, int) and key < len(data)
        if in_mapping or in_list:
            marks = getattr(data, "lc", None)
            if marks is not None:
                line = (marks.key(key) if in_mapping else marks.item(key))[0] + 1
            data = data[key]
            path.append(place)
        elif at == len(loc) - 1 and keep_last:
            path.append(place)
    return tuple(path), line


def _keys(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Known keys at a place of the file."""
    found: Any = model
    inside_container = False
    for place in path:
        if inside_container:  # a name of the user's, or a position
            inside_container = False
            continue
        field = found.model_fields.get(str(place)) if _is_model(found) else None
        found = _model_in(field.annotation) if field is not None else None
        inside_container = field is not None and typing.get_origin(field.annotation) in (dict, list)
    return list(found.model_fields) if _is_model(found) else []


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _model_in(annotation: Any) -> Any:
    if _is_model(annotation):
        return annotation
    for inner in typing.get_args(annotation):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
