"""The fused GPU kernels give what the tensor-by-tensor path gives."""

import pytest
import torch
from torch import nn

from merging.learn.composition import Composition

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("granularity", ["block", "layer", "global"])
@pytest.mark.parametrize("bank_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernels_agree_with_tensor_by_tensor(dtype, bank_dtype, granularity):
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Linear(30, 500), nn.LayerNorm(500), nn.Linear(500, 333), nn.Linear(333, 7)).cuda().to(dtype)
    )
    vectors = {
        f"t{t}": {
            n: 1e-2 * torch.randn(p.shape, device="cuda")
            for n, p in model.named_parameters()
            if not (t == 1 and n == "0.weight")
        }
        for t in range(5)
    }
    x = torch.randn(9, 30, device="cuda", dtype=dtype)
    found = []
    for kernels in ("auto", "never"):
        composition = Composition(model, vectors, granularity, bank_dtype=bank_dtype, kernels=kernels, coefficients=0.3)
        assert (composition._fused is not None) == (kernels == "auto")
        with composition:
            for hold in (True, False):
                _, grad = composition.gradient(
                    lambda: [model(x).float().pow(2).mean() / 2 for _ in range(2)], hold=hold
                )
            weights = [p.detach().float().clone() for p in model.parameters()]
        found.append((grad, weights))
    (grad, weights), (slope, wanted) = found
    assert float((grad - slope).norm() / slope.norm()) < (1e-4 if dtype == torch.float32 else 2e-2)
    for one, other in zip(weights, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
