"""The first-order model f(x; θ0) + J(x; θ0) δ as an ordinary forward, with the gradient at θ0 behind it."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from taskvec.errors import LearningError


class _Original(nn.Module):
    """The model's own forward, so that `functional_call` does not meet the replaced one (nor run its hooks twice)."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        self.model = model
        self._run = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


class _WithGradientAtBase(torch.autograd.Function):
    """Passes the outputs on; their gradient v goes into one vector-Jacobian product at θ0."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, again: Callable[[tuple[Tensor, ...]], None], *leaves: Tensor) -> Any:
        ctx.again = again
        ctx.set_materialize_grads(True)
        return tuple(leaf.clone() for leaf in leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.again(grads)
        return (None, None, *(None for _ in grads))


def first_order(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], tangents: Mapping[str, Tensor]
) -> Callable[..., Any]:
    """A forward that returns f(x; θ0) + J(x; θ0) δ for δ = `tangents`.

    Its backward re-runs the model at θ0 and leaves, in each parameter, the gradient of the loss with respect to δ: what
    pulling it back onto the coefficients needs. Attention runs on the kernel that has a forward-mode derivative.
    """
    original = _Original(model, model.forward)

    def exact(stack: ExitStack) -> None:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))

    def pushed_forward(args: Any, kwargs: Any) -> Any:
        with ExitStack() as stack, torch.no_grad():
            exact(stack)
            # torch's own formulas for some operators are scripted on first use, with a warning meant for torch
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=DeprecationWarning)
            stack.enter_context(forward_ad.dual_level())
            duals = {f"model.{n}": forward_ad.make_dual(p.detach(), tangents[n]) for n, p in parameters.items()}
            output = torch.func.functional_call(original, duals, args, kwargs)

            def leaf(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                primal, tangent = forward_ad.unpack_dual(value)
                return primal if tangent is None else primal + tangent

            return pytree.tree_map(leaf, output)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is not None:
            raise LearningError(
                "linear: the model was given `labels`, so it would return the first-order expansion of its loss. "
                "Take the loss of its logits instead."
            )
        devices = sorted({p.device.index or 0 for p in parameters.values() if p.device.type == "cuda"})
        kind = next(iter(parameters.values())).device.type
        random = (torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices])
        autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        output = pushed_forward(args, kwargs)
        if not torch.is_grad_enabled():
            return output
        leaves, spec = pytree.tree_flatten(output)
        floating = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

        def again(grads: tuple[Tensor, ...]) -> None:
            with ExitStack() as stack, torch.enable_grad():
                exact(stack)
                stack.enter_context(torch.random.fork_rng(devices=devices))
                torch.set_rng_state(random[0])
                for device, state in zip(devices, random[1], strict=True):
                    torch.cuda.set_rng_state(state, device)
                with torch.autocast(kind, dtype=autocast[1], enabled=autocast[0]):
                    primal, _ = pytree.tree_flatten(original(*args, **kwargs))
                pairs = [(primal[i], grad) for i, grad in zip(floating, grads, strict=True) if primal[i].requires_grad]
                if pairs:
                    torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])

        anchor = torch.zeros((), device=leaves[floating[0]].device, requires_grad=True)
        passed = _WithGradientAtBase.apply(anchor, again, *(leaves[i] for i in floating))
        for i, value in zip(floating, passed, strict=True):
            leaves[i] = value
        return pytree.tree_unflatten(leaves, spec)

    return forward
