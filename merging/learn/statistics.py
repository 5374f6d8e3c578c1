"""Statistics of a task's data, collected once with its model and a few batches, saved for merging.

Every function runs an ordinary `torch` model, writes one safetensors file for each task and leaves the model as it was.
`batches` are what the model is called with: mappings (called with keywords), tuples (with positions) or tensors; or
give `forward(model, batch)`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from merging.statistics import Kind, metadata
from taskvec.blocks import layer_key
from taskvec.errors import DataError, LearningError, OutputExistsError, UsageError
from taskvec.source import names_matching
from taskvec.writer import write_atomically

Forward = Callable[[nn.Module, Any], Any]


def called(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: mappings as keywords, tuples and lists as positions."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: its `logits`, or its first tensor."""
    found = getattr(output, "logits", output)
    return found if isinstance(found, Tensor) else found[0]


# -- Fisher ------------------------------------------------------------------------------------------------------------


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    out: "str | Path",
    *,
    labels: Literal["sampled", "expected"] = "sampled",
    forward: Forward = called,
    include: Sequence[str] = ("*",),
    seed: int = 0,
    names: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """The diagonal of the Fisher information: the mean square of ∂ log p(y|x) / ∂θ, y from the model's own predictions.

    Args:
        model: the task's fine-tuned model; put into eval mode for the time.
        batches: inputs; labels are not needed. Each batch is split into its examples along the first dimension. Where
            they hold an `attention_mask`, predictions at padded positions do not count.
        out: the file to write.
        labels: one label drawn for each prediction, or the exact expectation over all classes (a backward pass
            each, so for few classes).
        forward: how the model is called; its output's logits, [..., class], are read.
        include: patterns of the parameters wanted.
        seed: of the draws.
        names: parameters to what the file calls them, such as their names in the checkpoint, where those differ.
        overwrite: whether `out` may exist.

    Raises:
        DataError: there are no examples.
        LearningError: gradients that are not finite.
    """
    _check(out, overwrite)
    wanted = _chosen(model, include)
    totals = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in wanted.items()}
    generator = torch.Generator().manual_seed(seed)
    count = 0
    with _evaluated(model), torch.enable_grad():
        for example in _examples(batches):
            scores = logits_of(forward(model, example)).float().log_softmax(-1)
            mask = example.get("attention_mask") if isinstance(example, Mapping) else None
            if mask is not None and mask.shape == scores.shape[:-1]:
                scores = scores[mask.to(scores.device).bool()]
            scores = scores.reshape(-1, scores.shape[-1])
            chances = scores.detach().exp()
            if labels == "sampled":
                drawn = _drawn(chances, generator)
                objectives = [(scores.gather(1, drawn).sum(), 1.0)]
            else:
                if len(scores) > 1:
                    raise DataError('labels="expected" needs one prediction for each example; use "sampled"')
                objectives = [(score, float(chance)) for score, chance in zip(scores[0], chances[0])]
            for i, (objective, chance) in enumerate(objectives):
                gradients = torch.autograd.grad(
                    objective, list(wanted.values()), retain_graph=i + 1 < len(objectives), allow_unused=True
                )
                for total, gradient in zip(totals.values(), gradients):
                    if gradient is not None:
                        total.add_(gradient.double().square_(), alpha=chance)
            count += 1
    if count == 0:
        raise DataError("batches: there are no examples to take the Fisher information of")
    found = {name: total.div_(count).float().cpu() for name, total in totals.items()}
    square = sum(float(value.double().square().sum()) for value in found.values())
    return _saved(found, out, "fisher", count, overwrite, names, norm=square**0.5)


def _drawn(chances: Tensor, generator: torch.Generator) -> Tensor:
    """One class for each row, [row, 1]: inverse transform, since multinomial would take a vocabulary to the CPU."""
    steps = chances.double().cumsum(-1)
    uniform = torch.rand(len(chances), 1, generator=generator, dtype=torch.float64).to(steps.device)
    return (steps <= uniform * steps[:, -1:]).sum(-1, keepdim=True).clamp_(max=chances.shape[-1] - 1)


# -- Gram matrices of inputs -------------------------------------------------------------------------------------------


def input_grams(
    model: nn.Module,
    batches: Iterable[Any],
    out: "str | Path",
    *,
    forward: Forward = called,
    include: Sequence[str] = ("*",),
    names: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """The mean of x xᵀ over the inputs x of every linear layer (RegMean).

    Args:
        model: the task's fine-tuned model; put into eval mode for the time.
        batches: inputs. Where they hold an `attention_mask`, padded positions do not count.
        out: the file to write.
        forward: how the model is called.
        include: patterns of the weights wanted; a Gram matrix has in × in entries.
        names: weights to what the file calls them, such as their names in the checkpoint, where those differ.
        overwrite: whether `out` may exist.

    Raises:
        DataError: no linear layer saw an input.
        LearningError: inputs that are not finite.
    """
    _check(out, overwrite)
    layers = _linears(model, include)
    grams = _collected(model, layers, batches, forward)
    return _saved_grams(grams, layers, out, "gram", overwrite, names)


def input_grams_through_merged(
    models: Mapping[str, nn.Module],
    batches: Mapping[str, Iterable[Any]],
    outs: Mapping[str, "str | Path"],
    *,
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
    forward: Forward = called,
    include: Sequence[str] = ("*",),
    names: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> dict[str, Path]:
    """The mean of x xᵀ over the inputs of every linear layer, given by the merged layers below it (RegMean++).

    Goes through the layers in the order in which they run: collects the inputs of one layer's linear modules for every
    task, merges that layer by RegMean, puts the merged layer into every model, goes on. Parameters outside any layer
    with a linear module are averaged first. The models are put back as they were.

    Args:
        models: the tasks' fine-tuned models, by task, all of one architecture (heads may differ).
        batches: inputs by task; gone through once for each layer, so not a generator.
        outs: the files to write, by task.
        off_diagonal, ridge: as `regmean_pp` will be given.
        forward: how the models are called.
        include: patterns of the weights wanted.
        names: weights to what the files call them, where that differs.
        overwrite: whether the files may exist.

    Raises:
        DataError: tasks that differ between the arguments, batches that can be read only once, or no inputs.
    """
    tasks = list(models)
    if set(batches) != set(tasks) or set(outs) != set(tasks):
        raise DataError(
            f"models, batches and outs must name the same tasks, found {tasks}, {list(batches)}, {list(outs)}"
        )
    once = [task for task in tasks if isinstance(batches[task], Iterator)]
    if once:
        raise DataError(f"batches: {once[0]!r} is a generator, but every layer reads the batches again; give a list")
    for out in outs.values():
        _check(out, overwrite)
    parameters = {task: dict(models[task].named_parameters()) for task in tasks}
    shared = [
        name
        for name, value in parameters[tasks[0]].items()
        if all(name in own and own[name].shape == value.shape for own in parameters.values())
    ]
    layers = {task: {n: m for n, m in _linears(models[task], include).items() if n in shared} for task in tasks}
    first = models[tasks[0]]
    groups: dict[str, list[str]] = defaultdict(list)
    for name in _order(first, layers[tasks[0]], batches[tasks[0]], forward):
        groups[layer_key(name)].append(name)
    members = {name: layer_key(name) for name in shared}
    originals = {task: {name: own[name].detach().clone() for name in shared} for task, own in parameters.items()}
    found: dict[str, dict[str, tuple[Tensor, int]]] = {task: {} for task in tasks}
    try:
        _replace(parameters, {n: _average(originals, n) for n in shared if members[n] not in groups})
        for group, weights in groups.items():
            for task in tasks:
                chosen = {name: layers[task][name] for name in weights}
                found[task].update(_collected(models[task], chosen, batches[task], forward))
            merged = {name: _average(originals, name) for name in shared if members[name] == group}
            for name in weights:
                turned = _is_turned(layers[tasks[0]][name])
                merged[name] = _regressed(
                    [originals[task][name] for task in tasks],
                    [found[task][name][0] for task in tasks],
                    turned,
                    off_diagonal,
                    ridge,
                )
            _replace(parameters, merged)
    finally:
        for task, own in parameters.items():
            _replace({task: own}, originals[task])
    return {task: _saved_grams(found[task], layers[task], outs[task], "gram++", overwrite, names) for task in tasks}


def _regressed(
    weights: Sequence[Tensor], grams: Sequence[Tensor], turned: bool, off_diagonal: float, ridge: float
) -> Tensor:
    wide = [(weight.T if turned else weight).double() for weight in weights]
    mean = torch.stack(wide).mean(0)
    shrunk = [off_diagonal * gram + (1 - off_diagonal) * gram.diagonal().diag() for gram in grams]
    total = torch.stack(shrunk).sum(0)
    held = ridge * total.diagonal().mean()
    target = sum((w @ g for w, g in zip(wide, shrunk)), held * mean)
    solved = torch.linalg.solve(total + held * torch.eye(len(total), dtype=total.dtype, device=total.device), target.T)
    return solved if turned else solved.T


def _average(originals: Mapping[str, Mapping[str, Tensor]], name: str) -> Tensor:
    return torch.stack([own[name].double() for own in originals.values()]).mean(0)


@torch.no_grad()
def _replace(parameters: Mapping[str, Mapping[str, nn.Parameter]], values: Mapping[str, Tensor]) -> None:
    for own in parameters.values():
        for name, value in values.items():
            own[name].copy_(value)


def _is_turned(module: nn.Module) -> bool:
    """Whether a module stores its weight [in, out], as transformers' Conv1D of GPT-2."""
    return type(module).__name__ == "Conv1D"


def _linears(model: nn.Module, include: Sequence[str]) -> dict[str, nn.Module]:
    """Weight name to module, for the linear layers."""
    found = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or _is_turned(module)
    }
    own = dict(model.named_parameters())
    wanted = set(names_matching([name for name in found if name in own], list(include)))
    return {name: module for name, module in found.items() if name in wanted}


def _collected(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], forward: Forward
) -> dict[str, tuple[Tensor, int]]:
    """Mean of x xᵀ (float64) and number of x, by weight name."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)
    mask: list[Tensor | None] = [None]

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def seen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            values = inputs[0].detach()
            rows = values.reshape(-1, values.shape[-1]).double()
            if mask[0] is not None and values.ndim > 2 and values.shape[:-1] == mask[0].shape:
                rows = rows[mask[0].reshape(-1).bool().to(rows.device)]
            total = rows.T @ rows
            totals[name] = totals[name] + total if name in totals else total
            counts[name] += len(rows)

        return seen

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        with _evaluated(model), torch.no_grad():
            for batch in batches:
                mask[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not totals:
        raise DataError(
            "batches: no linear layer saw an input; are there batches, and does `include` match any weight?"
        )
    broken = [name for name, total in totals.items() if not bool(torch.isfinite(total).all())]
    if broken:
        raise LearningError(f"{broken[0]}: its inputs hold NaN or infinity, so it has no Gram matrix")
    return {name: (total / max(1, counts[name]), counts[name]) for name, total in totals.items()}


def _order(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], forward: Forward) -> list[str]:
    """The weights in the order in which their modules first run."""
    order: dict[str, None] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: order.setdefault(name))
        for name, module in layers.items()
    ]
    try:
        with _evaluated(model), torch.no_grad():
            for batch in batches:
                forward(model, batch)
                break
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise DataError(
            "batches: no linear layer saw an input; are there batches, and does `include` match any weight?"
        )
    return list(order)


# -- what all share ----------------------------------------------------------------------------------------------------


def _check(out: "str | Path", overwrite: bool) -> None:
    """Says before any work what would make the file useless or unwritable."""
    if Path(out).suffix != ".safetensors":
        raise UsageError(f"{out}: statistics are written as safetensors; name the file so")
    if not overwrite and Path(out).exists():
        raise OutputExistsError(f"{out}: exists already. Choose another name, or pass overwrite.")


def _chosen(model: nn.Module, include: Sequence[str]) -> dict[str, nn.Parameter]:
    own = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    wanted = names_matching(list(own), list(include))
    if not wanted:
        raise DataError(f"include: {list(include)} matches no parameter of the model")
    return {name: own[name] for name in wanted}


def _examples(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches in single examples, each with a leading dimension of one."""
    for batch in batches:
        tensors = (
            batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
        )
        size = next((len(value) for value in tensors if isinstance(value, Tensor) and value.ndim), 0)
        for i in range(size):

            def one(value: Any, i: int = i) -> Any:
                return value[i : i + 1] if isinstance(value, Tensor) and value.ndim else value

            if isinstance(batch, Mapping):
                yield {key: one(value) for key, value in batch.items()}
            elif isinstance(batch, tuple | list):
                yield tuple(one(value) for value in batch)
            else:
                yield one(batch)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time, and parameters that can be differentiated."""
    training = {module: module.training for module in model.modules()}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    model.eval()
    for parameter in frozen:
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
        for parameter in frozen:
            parameter.requires_grad_(False)


def _saved_grams(
    grams: Mapping[str, tuple[Tensor, int]],
    layers: Mapping[str, nn.Module],
    out: "str | Path",
    kind: Kind,
    overwrite: bool,
    names: Mapping[str, str] | None,
) -> Path:
    found = {name: gram.float().cpu() for name, (gram, _) in grams.items()}
    turned = [(names or {}).get(name, name) for name in found if _is_turned(layers[name])]
    return _saved(found, out, kind, max(count for _, count in grams.values()), overwrite, names, transposed=turned)


def _saved(
    tensors: Mapping[str, Tensor],
    out: "str | Path",
    kind: Kind,
    examples: int,
    overwrite: bool,
    names: Mapping[str, str] | None,
    **facts: Any,
) -> Path:
    from safetensors.torch import save

    broken = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise LearningError(f"{broken[0]}: its statistics hold NaN or infinity; is the model or the data broken?")
    contiguous = {(names or {}).get(name, name): value.contiguous() for name, value in tensors.items()}
    return write_atomically(
        out, save(contiguous, metadata=metadata(kind, examples=examples, **facts)), overwrite=overwrite
    )
