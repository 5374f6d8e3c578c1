"""Edits: small sets of replaced rows and columns, side blocks, their metric and their audit.

Names are loaded on first use.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Corpus": "stealth",
    "Edit": "edit",
    "EditedSource": "edit",
    "JetPack": "jetpack",
    "Optimisation": "optimise",
    "Report": "report",
    "Request": "requests",
    "Site": "site",
    "apply_edits": "edit",
    "calibrated": "features",
    "check": "report",
    "edit_auto": "choice",
    "edit_in_place": "stealth",
    "edit_widen": "stealth",
    "edited": "edit",
    "load_edits": "edit",
    "plan_edits": "report",
    "read_requests": "requests",
    "save_edits": "edit",
    "undo_edits": "edit",
    # metric; the audit's function has its module's name: `from merging.edits.audit import audit`
    "dimension_by_layer": "plan",
    "dimension_profile": "dimension",
    "intrinsic_dimension": "dimension",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"merging.edits.{_HOME[name]}"), name)
    raise AttributeError(f"module 'merging.edits' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
