"""Sizes as people write them."""

import re

from taskvec.errors import UsageError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def byte_count(text: "str | int") -> int:
    """`5GB`, `2GiB`, `400 MB` or a number as bytes.

    Raises:
        UsageError: the text is not a size.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)\s*", text) if isinstance(text, str) else None
    if not found or found.group(2).lower() not in _UNITS:
        raise UsageError(f"{text!r} is not a size. Write it like 5GB, 2GiB or 400MB.")
    return int(float(found.group(1)) * _UNITS[found.group(2).lower()])


def bytes_text(count: float) -> str:
    """`748.0 MB` for 748000000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


__all__ = ["byte_count", "bytes_text"]
