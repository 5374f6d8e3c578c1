"""What is done with task vectors: merging, learning where to merge, editing. Names are loaded on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Contributions": "stacks",
    "Recipe": "recipe",
    "merge": "streamed",
    "merge_method": "method",
    "merge_stacks": "stacks",
    "verify": "streamed",
}

__all__ = ["Contributions", "Recipe", "merge", "merge_method", "merge_stacks", "verify"]

if TYPE_CHECKING:
    from merging.method import merge_method
    from merging.recipe import Recipe
    from merging.stacks import Contributions, merge_stacks
    from merging.streamed import merge, verify


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"merging.{_HOME[name]}"), name)
    raise AttributeError(f"module 'merging' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
