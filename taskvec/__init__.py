"""Task vectors and checkpoints: what they are, and how to go through them without loading a model.

Names are loaded on first use, so importing the package (or asking the command for its help) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Checkpoint": "checkpoint",
    "Coefficients": "coefficients",
    "TaskVector": "vector",
    "TaskvecError": "errors",
    "TensorInfo": "source",
    "TensorSource": "source",
    "applied": "vector",
    "in_memory": "source",
    "write": "writer",
}

__all__ = [
    "Checkpoint",
    "Coefficients",
    "TaskVector",
    "TaskvecError",
    "TensorInfo",
    "TensorSource",
    "applied",
    "in_memory",
    "write",
]

if TYPE_CHECKING:
    from taskvec.checkpoint import Checkpoint
    from taskvec.coefficients import Coefficients
    from taskvec.errors import TaskvecError
    from taskvec.source import TensorInfo, TensorSource, in_memory
    from taskvec.vector import TaskVector, applied
    from taskvec.writer import write


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"taskvec.{_HOME[name]}"), name)
    raise AttributeError(f"module 'taskvec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
