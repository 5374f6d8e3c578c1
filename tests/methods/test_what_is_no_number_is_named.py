"""NaN and infinity in a task vector are refused with the tensor's name, whatever pass of a method meets them first."""

import pytest
import torch

from merging import merge_stacks
from merging.method import method, methods
from taskvec.errors import NonFiniteError

NEEDED = {"nearswap": {"distance": 0.1}, "slerp": {"t": 0.3}, "lines": {"slope": 0.5}}
COMBINING = [name for name in methods() if method(name).data == "nothing" and method(name).role != "postprocess"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", COMBINING)
def test_a_tensor_with_what_is_no_number_is_named(name, value):
    tasks = {"nearswap": 1, "arcee_fusion": 1, "passthrough": 1, "slerp": 2, "nuslerp": 2}.get(name, 3)
    generator = torch.Generator().manual_seed(1)
    stacks = {key: torch.randn(tasks, 3, 4, generator=generator) for key in ("model.layers.0.a.weight", "odd.weight")}
    base = {key: torch.randn(3, 4, generator=generator) for key in stacks} if name == "arcee_fusion" else None
    merge_stacks(name, stacks, base=base, **NEEDED.get(name, {}))
    stacks["odd.weight"][0, 1, 1] = value
    with pytest.raises(NonFiniteError, match=r"odd\.weight"):
        merge_stacks(name, stacks, base=base, **NEEDED.get(name, {}))
