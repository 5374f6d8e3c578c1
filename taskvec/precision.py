"""Which dtype sums are made in, and the one rounding at the end.

Differences and sums are made in float32; float64 stays float64. A result is rounded once, to nearest even, where it
is written. Nothing in between is stored in half precision.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taskvec.errors import OutputError, UsageError, did_you_mean

FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOAT8)

# the names people write; torch's own come first so that `dtype_name` is stable
_NAMES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    **{str(kind).removeprefix("torch."): kind for kind in FLOAT8},
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "half": torch.float16,
}


def is_float(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype take part in arithmetic; integers and bools are copied, never averaged."""
    return dtype in FLOATS


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of these dtypes are subtracted, summed and scaled: float32, or float64 if any is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """`bf16`, `bfloat16` or `torch.bfloat16` as a dtype.

    Raises:
        UsageError: the name is not a floating dtype.
    """
    if isinstance(name, torch.dtype):
        return name
    found = _NAMES.get(name.removeprefix("torch."))
    if found is None:
        raise UsageError(f"dtype: {name!r} is not a floating dtype." + did_you_mean(name, _NAMES))
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def config_in(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A model's configuration that says this dtype wherever it says one: transformers loads a model in what is said.

    Float8 is said nowhere: there it means a quantised model with scales.
    """
    if dtype in FLOAT8:
        return dict(config)
    return {
        key: config_in(value, dtype)
        if isinstance(value, Mapping)
        else dtype_name(dtype)
        if key in ("dtype", "torch_dtype") and isinstance(value, str)
        else value
        for key, value in config.items()
    }


def all_finite(values: Tensor) -> bool:
    """Whether a floating tensor holds no NaN and no infinity."""
    if values.dtype == torch.float64 or values.dtype in FLOAT8:
        return bool(torch.isfinite(values if values.dtype == torch.float64 else values.float()).all())
    return math.isfinite(float(values.sum(dtype=torch.float64)))  # no sum of finite float32 overflows there


def rounded(values: Tensor, dtype: torch.dtype, *, where: str = "tensor") -> tuple[Tensor, int]:
    """`values` in `dtype`, rounded once to nearest even, and the number of entries that saturated.

    float8 saturates at its largest finite value (the count says how often). float16 never does: an overflow there
    would silently change a model, so it is an error.

    Raises:
        OutputError: a finite value overflows float16 or bfloat16.
    """
    if values.dtype == dtype:
        return values, 0
    if dtype in FLOAT8:
        largest = torch.finfo(dtype).max
        saturated = int((values.abs() > largest).sum())
        return values.clamp(-largest, largest).to(dtype), saturated
    result = values.to(dtype)
    overflows = dtype in (torch.float16, torch.bfloat16) or (dtype, values.dtype) == (torch.float32, torch.float64)
    if overflows and not bool(
        torch.isfinite(result.sum(dtype=torch.float64 if dtype != torch.float16 else torch.float32))
    ):
        bad = torch.isinf(result) & torch.isfinite(values)
        if bool(bad.any()):
            raise OutputError(
                f"{where}: {int(bad.sum())} values do not fit {dtype_name(dtype)} (largest "
                f"{torch.finfo(dtype).max:g}, found {float(values.abs().max()):g}). Choose a wider output dtype."
            )
    return result, 0


_CANCELS = 1e-6  # 0.1 + 0.2 - 0.3 is 1e-8 in float32; dividing by it would blow noise up


def cancelled(weights: Tensor) -> Tensor:
    """Whether weights [task, …] add up to zero, but for rounding."""
    wide = weights.double()
    return wide.sum(0).abs() <= _CANCELS * wide.abs().sum(0)
