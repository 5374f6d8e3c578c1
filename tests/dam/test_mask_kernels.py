"""The fused mask step against the plain one: on a GPU, or on Triton's interpreter where Triton is installed without one."""

import pytest
import torch
from torch import nn

from merging.learn.masked import Draw, MaskedModel, MaskLogits


def steps(kernels, device):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 20)).to(device)
    vectors = {
        f"task {t}": {name: 0.1 * torch.randn(p.shape).to(device) for name, p in base.named_parameters()}
        for t in range(2)
    }
    inputs = torch.randn(7, 40).to(device)
    seen = []
    with MaskedModel(base, vectors, kernels=kernels) as model:
        assert (model.kernels is None) == (kernels == "never")
        mask = MaskLogits(model, 0.0, temperature=0.5, lr=0.05)
        # wide enough to saturate some logits
        mask.logits.copy_(8 * torch.randn(model.numel, generator=torch.Generator().manual_seed(1)))
        model.sum_(torch.tensor([0.5, 0.3], device=device))
        for step in range(2):
            draw = Draw("sample", 3, step)
            model.compose_((mask, draw))
            seen.append(torch.cat([segment.theta for segment in model.segments]))
            model.backward(lambda: [base(inputs).square().sum()])
            model.step_(mask, draw)
        seen += [mask.first, mask.second]
    return [tensor.cpu() for tensor in seen]


def test_the_fused_step_is_the_plain_step():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fused = steps("auto" if device == "cuda" else "always", device)
    for one, other in zip(fused, steps("never", device), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
