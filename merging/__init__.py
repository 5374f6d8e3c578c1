"""What is done with task vectors: merging, learning where to merge, editing. Names are loaded on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Recipe": "recipe",
    "merge": "merge",
    "merge_stacks": "stacks",
    "method": "method",
    "methods": "method",
}

__all__ = ["Recipe", "merge", "merge_stacks", "method", "methods"]

if TYPE_CHECKING:
    from merging.merge import merge
    from merging.method import method, methods
    from merging.recipe import Recipe
    from merging.stacks import merge_stacks


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"merging.{_HOME[name]}"), name)
    raise AttributeError(f"module 'merging' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
