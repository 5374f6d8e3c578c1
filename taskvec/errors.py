"""Every way the library can fail, drawn as one tree.

Each message says what is wrong, where, what was expected and what to do. Facts travel as attributes as well as in the
text, so that a program can act on them.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Self


class TaskvecError(Exception):
    """Base of every error that the library raises on purpose. The command line turns it into exit code 1."""


class UsageError(TaskvecError):
    """The call itself is wrong (a flag, an argument, a name); the command line turns it into exit code 2."""


# -- sources ---------------------------------------------------------------------------------------------------------


class SourceError(TaskvecError):
    """A checkpoint, adapter or file cannot be used."""


class NotFoundError(SourceError):
    """No such file, folder or hub id."""


class NotAModelError(SourceError):
    """The path exists, but holds no tensors we can read."""


class CorruptFileError(SourceError):
    """A file whose header or length contradicts itself."""


class UnsafeFileError(SourceError):
    """A file that would have to execute code, or that points outside its own folder."""


class MissingTensorError(SourceError):
    """A tensor that was asked for is not in the source."""


class ChangedFileError(SourceError):
    """An input changed or shrank while it was being read."""


class NonFiniteError(SourceError):
    """NaN or infinity where numbers were expected."""

    def __init__(self, tensor: str, source: str, count: int | None = None, *, what: str = "NaN or infinite values"):
        self.tensor, self.source, self.count = tensor, source, count
        number = "" if count is None else f"{count} "
        super().__init__(f"{tensor}: {source} holds {number}{what}. Merging would spread them; repair or replace it.")


class UnsupportedAdapterError(SourceError):
    """An adapter whose effect is not (or not provably) a change of weights; names the configuration field."""

    def __init__(self, path: str, field: str, reason: str):
        self.path, self.field, self.reason = path, field, reason
        super().__init__(f"{path}: `{field}` in adapter_config.json is not supported: {reason}")


class MismatchError(SourceError):
    """Models that do not fit together; `problems` lists every difference, grouped."""

    def __init__(self, problems: Sequence[str], *, title: str = "The models do not fit together"):
        self.problems = tuple(problems)
        super().__init__(f"{title}:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


class BaseMismatchError(SourceError):
    """A task vector, coefficients file or edit that was made from another base."""


# -- recipes and methods -----------------------------------------------------------------------------------------------


class RecipeError(TaskvecError):
    """A recipe that cannot be carried out; `problems` lists all that is wrong with it."""

    def __init__(self, problems: str | Sequence[str], *, title: str = "The recipe cannot be used"):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        body = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{title}:\n{body}")


class ParameterError(RecipeError):
    """A method parameter out of range or unknown."""


class DataError(TaskvecError):
    """Data for learning or evaluation that is missing, empty, mislabelled or of another kind."""


class LearningError(TaskvecError):
    """Learning that went wrong: NaN loss, collapse, a model that cannot be composed."""


class EditError(TaskvecError):
    """An edit that cannot be made, applied or undone."""


# -- outputs -----------------------------------------------------------------------------------------------------------


class OutputError(TaskvecError):
    """The output cannot be written."""


class OutputExistsError(OutputError):
    """The output path is taken."""


class DiskFullError(OutputError):
    """Not enough free space for the output."""


class VerificationError(OutputError):
    """An output whose content does not match what was recorded for it."""


class Problems:
    """Collects problems so that all of them are reported at once.

    >>> problems = Problems()
    >>> problems.add("density: 20 is not in (0, 1]")
    >>> problems.raise_if_any(RecipeError)
    Traceback (most recent call last):
    ...
    taskvec.errors.RecipeError: The recipe cannot be used:
      - density: 20 is not in (0, 1]
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, problem: str) -> Self:
        if problem not in self.found:
            self.found.append(problem)
        return self

    def extend(self, problems: Iterable[str]) -> Self:
        for problem in problems:
            self.add(problem)
        return self

    def __bool__(self) -> bool:
        return bool(self.found)

    def raise_if_any(self, kind: type[RecipeError] | type[MismatchError] = RecipeError) -> None:
        if self.found:
            raise kind(self.found)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'density'?"`, or the list of what is known when nothing is close.

    Args:
        word: what was written.
        known: what could have been written.
    """
    names = sorted(known)
    close = [name for name in names if name.lower() == word.lower()] or get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(names)}." if names else ""


def shortened(names: Sequence[str], limit: int = 4) -> str:
    """`a, b, c, d and 12 more`."""
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more"
