"""How every MLP neuron of a model responds to probe text: one forward pass, moments kept, nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from merging.edits.layouts import Layout, Part
from taskvec.errors import DataError, UsageError

LEAST_TOKENS = 200
MARGIN = 3.5
"""Standard deviations below its threshold from which a mute neuron is strange: SmolLM2's natural extreme is 2.7, a
planted detector had 5.8."""


@dataclass(eq=False)
class Responses:
    """Pre-activations of one MLP's neurons over the probe tokens: moments, and where each came closest to firing."""

    tokens: int
    total: Annotated[Tensor, "neuron"]
    squares: Annotated[Tensor, "neuron"]
    fired: Annotated[Tensor, "neuron"]
    largest: Annotated[Tensor, "neuron"]
    where: Annotated[Tensor, "neuron"]
    context: Any

    def rate(self, neuron: int) -> float:
        """Share of the probe tokens on which the pre-activation was positive."""
        return float(self.fired[neuron]) / self.tokens

    def margins(self) -> Annotated[Tensor, "neuron"]:
        """Mean of the pre-activation below zero, in its standard deviations."""
        mean = self.total / self.tokens
        spread = (self.squares / self.tokens - mean.square()).clamp_min(0).sqrt()
        return torch.where(spread > 0, -mean / spread, torch.zeros_like(mean))

    def margin(self, neuron: int) -> float:
        return float(self.margins()[neuron])

    def mute(self) -> Annotated[Tensor, "neuron"]:
        """Never fired, and far from it."""
        return (self.fired == 0) & (self.margins() > MARGIN)

    def nearest(self, neuron: int) -> str:
        """The probe text up to the token at which the neuron came closest to firing."""
        return str(self.context(int(self.where[neuron])))


def probe_responses(
    model: Any, layout: Layout, probe: "Sequence[str] | Tensor", tokenizer: Any, *, batch: int = 8, length: int = 256
) -> tuple[dict[str, Responses], int]:
    """Runs a model on probe text and collects the pre-activations of all MLPs that are plain modules.

    Args:
        model: a module, or the path it is loaded from with `AutoModelForCausalLM` (or `AutoModel`).
        layout: of its checkpoint.
        probe: texts, or token ids [batch, token].
        tokenizer: for texts.
        batch, length: sequences run at once, and tokens of each at most.

    Raises:
        UsageError: texts without a tokenizer, or a source that no model can be made of.
        DataError: fewer than 200 tokens.
    """
    network = loaded_model(model)
    sequences = _sequences(probe, tokenizer, length)
    count = sum(len(sequence) for sequence in sequences)
    if count < LEAST_TOKENS:
        raise DataError(f"probe: {count} tokens; at least {LEAST_TOKENS}, better a few thousand, say something.")
    starts = torch.tensor([0, *[len(sequence) for sequence in sequences]]).cumsum(0)

    def context(place: int) -> str:
        row = int(torch.searchsorted(starts, place, right=True)) - 1
        ids = sequences[row][: place - int(starts[row]) + 1][-12:]
        return repr(tokenizer.decode(ids)) if tokenizer is not None else f"tokens {ids.tolist()}"

    modules = dict(network.named_modules())
    prefix = _prefix(layout, modules)
    collected: dict[str, Responses] = {}
    handles = []
    valid: dict[str, Any] = {}
    for mlp in layout.mlps:
        module = modules.get(prefix + mlp.inside.name.removesuffix(".weight"))
        if module is None or mlp.inside.expert is not None:
            continue
        zeros = torch.zeros(mlp.neurons, dtype=torch.float64)
        state = Responses(
            0, zeros.clone(), zeros.clone(), zeros.clone(), torch.full_like(zeros, -torch.inf), zeros.long(), context
        )
        collected[mlp.key] = state
        handles.append(module.register_forward_hook(_collector(state, mlp.inside, mlp.neurons, valid)))
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(sequences), batch):
                group = sequences[start : start + batch]
                width = max(len(sequence) for sequence in group)
                ids = torch.zeros(len(group), width, dtype=torch.int64)
                mask = torch.zeros(len(group), width, dtype=torch.int64)
                for row, sequence in enumerate(group):
                    ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
                device = next(network.parameters()).device
                valid["mask"], valid["offset"] = mask.bool(), int(starts[start])
                network(input_ids=ids.to(device), attention_mask=mask.to(device))
    finally:
        for handle in handles:
            handle.remove()
        network.train(training)
    return {key: state for key, state in collected.items() if state.tokens}, count


def _collector(state: Responses, part: Part, neurons: int, valid: Mapping[str, Any]) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        mask: Tensor = valid["mask"].to(output.device)
        # experts see flattened, routed tokens: no place to speak of
        if output.ndim == 3 and output.shape[:2] == mask.shape:
            values = output[mask]
        elif output.ndim == 2 and output.shape[0] == mask.numel():
            values = output[mask.flatten()]
        else:
            return
        values = values[:, part.start : part.start + neurons].double().cpu()
        state.tokens += len(values)
        state.total += values.sum(0)
        state.squares += values.square().sum(0)
        state.fired += (values > 0).sum(0)
        largest, where = values.max(0)
        better = largest > state.largest
        state.largest = torch.where(better, largest, state.largest)
        state.where = torch.where(better, where + valid["offset"], state.where)

    return hook


def _prefix(layout: Layout, modules: Mapping[str, nn.Module]) -> str:
    """What the model puts before the checkpoint's names: a head's model holds the body under a name of its own."""
    stem = layout.mlps[0].inside.name.removesuffix(".weight")
    for name in modules:
        if name == stem or name.endswith("." + stem):
            return name.removesuffix(stem)
    return ""


def _sequences(probe: "Sequence[str] | Tensor", tokenizer: Any, length: int) -> list[Tensor]:
    if isinstance(probe, Tensor):
        rows = probe if probe.ndim == 2 else probe[None]
        return [row[:length] for row in rows.cpu()]
    if tokenizer is None:
        raise UsageError("probe: texts need a tokenizer. Give --tokenizer, or token ids.")
    if isinstance(probe, str):
        raise UsageError("probe: one string was given, a list of texts was expected.")
    sequences = []
    for text in probe:
        ids = tokenizer(text)["input_ids"]
        sequences += [torch.tensor(ids[start : start + length]) for start in range(0, len(ids), length)]
    return sequences


def loaded_model(model: Any) -> nn.Module:
    """The module itself, or the one that transformers loads from a folder or hub id.

    Raises:
        UsageError: neither, or transformers cannot load it.
    """
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, str | PathLike):
        raise UsageError("Responses need a model that can be run: give its folder, its hub id or the module.")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(model))
        causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
        loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        return loader.from_pretrained(str(model), config=config)
    except (OSError, ValueError) as error:
        raise UsageError(f"{model}: transformers cannot load it ({str(error).splitlines()[0]}).") from error
