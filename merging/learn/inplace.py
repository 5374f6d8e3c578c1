"""Two pieces that everything that learns merged weights stands on: writing them in place, and pulling gradients back.

No autograd graph runs through the task vectors. The merged weights are written into the ordinary module, ordinary
passes follow, and each parameter's gradient is handed over as backward produces it, then freed.
"""

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from taskvec.errors import LearningError, UsageError, did_you_mean


class InPlace:
    """A module's parameters under other values for a while; the base comes back bit for bit.

    Args:
        model: any module.
        names: parameters to overwrite, as `model.named_parameters()` names them (tied ones once).

    As a context manager it restores the base on the way out, also after an exception.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]):
        own = dict(model.named_parameters())
        unknown = [name for name in names if name not in own]
        if unknown:
            raise UsageError(
                f"{unknown[0]}: not a parameter of {type(model).__name__}." + did_you_mean(unknown[0], own)
            )
        self.model = model
        self.parameters: dict[str, nn.Parameter] = {name: own[name] for name in names}
        for name, parameter in self.parameters.items():
            if parameter.device.type == "meta":
                raise LearningError(f"{name}: is on the meta device; load the model's weights before composing it.")
        self.base: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def write_(self, name: str, values: Tensor) -> None:
        """Write one parameter, rounded once to its dtype."""
        parameter = self.parameters[name]
        parameter.copy_(values.view(parameter.shape))

    @torch.no_grad()
    def restore_(self, names: Iterable[str] | None = None) -> None:
        """Write the base back."""
        for name in self.parameters if names is None else names:
            self.parameters[name].copy_(self.base[name])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore_()


class PullBack:
    """Hands over each parameter's gradient as backward produces it, and frees it.

    Inside the context every other parameter of `model` needs no gradient, so no time is spent on one; flags and
    gradients that were there before come back on the way out.

    Args:
        model: the module whose passes follow.
        parameters: name to parameter.
        consume: called with (name, gradient) after each backward pass that reaches the parameter. The gradient has the
            parameter's shape and dtype, and is gone afterwards: clone it to keep it.
        hold: collect gradients over all passes and hand each over once, on the way out. One reading of the task
            vectors for any number of passes, for the memory of all gradients at once.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        consume: Callable[[str, Tensor], None],
        *,
        hold: bool = False,
    ):
        self._model = model
        self._parameters = dict(parameters)
        self._consume = consume
        self._hold = hold
        self.count = 0
        """Gradients handed over since the context was entered."""

    def __enter__(self) -> Self:
        self.count = 0
        self._before = [(p, p.requires_grad, p.grad) for p in self._model.parameters()]
        wanted = {id(p) for p in self._parameters.values()}
        self._hooks = []
        for parameter, _, _ in self._before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted and parameter.dtype.is_floating_point)
        if not self._hold:
            for name, parameter in self._parameters.items():
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._handed_over(name)))
        return self

    def _handed_over(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            grad = parameter.grad
            parameter.grad = None
            if grad is None:
                return
            self.count += 1
            if torch.is_grad_enabled():  # only while a graph of the backward pass is made
                with torch.no_grad():
                    self._consume(name, grad)
            else:
                self._consume(name, grad)

        return hook

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._hold and kind is None:
                for name, parameter in self._parameters.items():
                    grad, parameter.grad = parameter.grad, None
                    if grad is not None:
                        self.count += 1
                        with torch.no_grad():
                            self._consume(name, grad)
        finally:
            for hook in self._hooks:
                hook.remove()
            for parameter, required, grad in self._before:
                parameter.requires_grad_(required)
                parameter.grad = grad
            self._before = []
