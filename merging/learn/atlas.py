"""aTLAS (arXiv:2407.02880): one learned coefficient per task vector and block, from a configuration or from Python."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor, nn

from merging.learn.composition import Composition, Vector
from merging.learn.config import DataSpec, LearnConfig, UFMSpec
from merging.learn.data import Texts, Together, Views, named, rows, texts
from merging.learn.fit import AdamWSpec, Constraint, Fit, fit
from merging.learn.objectives import (
    UFM,
    CausalLM,
    Entropy,
    Forward,
    MultiTask,
    Negation,
    Objective,
    Penalty,
    Supervised,
    accuracy,
    moved,
    split,
)
from merging.learn.select import Selection, select
from taskvec.coefficients import Coefficients, Region
from taskvec.errors import (
    BaseMismatchError,
    DataError,
    MismatchError,
    NotFoundError,
    Problems,
    UsageError,
    did_you_mean,
)
from taskvec.live_names import Names
from taskvec.source import TensorInfo, TensorSource, matches, names_matching


class Head(nn.Module):
    """A frozen linear head: scale * x Wᵀ + b."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        weight = cast(Tensor, self.weight).to(features)
        if features.shape[-1] != weight.shape[-1]:
            raise DataError(
                f"The head takes {weight.shape[-1]} features, the model gives {features.shape[-1]}. "
                "Is `pool` right, and was the head made for this model?"
            )
        logits = self.scale * (features @ weight.T)
        return logits if self.bias is None else logits + cast(Tensor, self.bias).to(logits)


class _NamedAsModel:
    """A task vector under the model's names."""

    def __init__(self, vector: Vector, to_model: Mapping[str, str]):
        self._vector = vector
        self._old = {to_model[name]: name for name in vector.infos if name in to_model}
        self.label = vector.label
        self.aliases: Mapping[str, str] = {}
        self.infos: Mapping[str, TensorInfo] = {new: vector.infos[old] for new, old in self._old.items()}

    def read(self, name: str) -> Tensor:
        found: Tensor = self._vector.read(self._old[name])
        return found

    def low_rank(self, name: str) -> Any:
        return self._vector.low_rank(self._old[name])


@dataclass
class Setup:
    """Everything of a run, made from its configuration; nothing is learned yet.

    Attributes:
        names: parameter or buffer of the model to its name in the checkpoint.
        batches: the training batches, and `evaluate` the metrics on held-out data (None without).
    """

    config: LearnConfig
    model: nn.Module
    composition: Composition
    objective: Objective
    batches: Any
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None
    names: Mapping[str, str]
    base: TensorSource
    hashes: Mapping[str, str] = field(default_factory=dict)
    selection: Selection | None = None
    frozen: Tensor | None = None


def learn(
    config: LearnConfig,
    out: "str | Path",
    *,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
    use: Literal["atlas", "adamerging"] = "atlas",
    constraint: Constraint | None = None,
) -> tuple[Coefficients, Fit]:
    """Learn coefficients by a configuration and save them as `out`.

    A run that was killed goes on from its last evaluation (or epoch) when it is started again with the same `out`: its
    state is beside it, and deleted once the file is written. Under torchrun the ranks share each batch.

    Raises:
        MismatchError: models, heads and task vectors that do not fit together.
        DataError: data that are missing, empty or mislabelled.
        LearningError: NaN losses, or a head inside the composed weights.
    """
    config = config.resolved()
    target = Path(out)
    if target.exists():
        from taskvec.errors import OutputExistsError

        raise OutputExistsError(f"{target}: exists already. Choose another name, or delete it to learn anew.")
    with _process_group():
        made = setup(config)
        optimizer = config.optimizer
        state = target.with_name(f"{target.name}.run")
        found = fit(
            made.composition,
            made.objective,
            made.batches,
            optimizer=AdamWSpec(optimizer.lr or 0.1, optimizer.weight_decay or 0.0, optimizer.betas, optimizer.eps),
            epochs=config.epochs or 1,
            steps=config.steps,
            schedule=config.schedule or "cosine",
            warmup=config.warmup,
            clip=config.clip,
            clip_mode=config.clip_mode,
            accumulate=config.accumulate,
            precision=config.precision,
            penalty=Penalty(config.penalty.gamma, config.penalty.p) if config.penalty else None,
            constraint=Constraint(**config.constraint.model_dump()) if config.constraint else constraint,
            frozen=made.frozen,
            evaluate=made.evaluate,
            every=config.every,
            keep=config.keep,
            patience=config.patience,
            checkpoint=state,
            seed=config.seed,
            identity=_identity(config, made.hashes),
            progress=progress,
        )
        learned = as_file(made, found, use)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            learned.save(target)
            state.unlink(missing_ok=True)
    return learned, found


def _identity(config: LearnConfig, hashes: Mapping[str, str]) -> str:
    """What makes two runs the same run, beside what `fit` knows."""
    facts = json.dumps([config.model_dump(mode="json"), dict(hashes)], sort_keys=True)
    return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()


def as_file(made: Setup, found: Fit, use: str) -> Coefficients:
    """The run's coefficients under the checkpoint's names, with what they were learned from."""
    names = made.names
    learned = made.composition.learned()
    if made.selection is not None:
        learned = made.selection.unstitched(learned)
    own = {names.get(name, name) for name in (*learned.regions, *learned.kept, *learned.aliases)}
    kept = [names[name] for name in learned.kept if name in names]
    kept += [name for name in made.base.infos if name not in own and name not in made.base.aliases]
    regions = {names[name]: region for name, region in learned.regions.items() if name in names}
    aliases = {names.get(a, a): names.get(b, b) for a, b in learned.aliases.items()}
    for alias, name in made.base.aliases.items():
        first, other = (name, alias) if name in regions else (alias, name)
        if first in regions and other not in regions:
            aliases[other] = first
    config = made.config.model_dump(mode="json", exclude_defaults=True)
    return replace(
        learned,
        regions=cast(Mapping[str, Region], regions),
        kept=tuple(dict.fromkeys(name for name in kept if name not in aliases)),
        aliases={a: b for a, b in aliases.items() if a != b},
        indices={},
        runs=tuple((names.get(name, name), count) for name, count in learned.runs),
        base_hash=made.hashes.get(""),
        task_hashes={task: digest for task, digest in made.hashes.items() if task},
        history=tuple(found.evaluations) or tuple(found.history[-1:]),
        objective={"use": use, "config": config, "steps": found.steps, "stopped": found.stopped},
    )


def setup(config: LearnConfig) -> Setup:
    """Load everything that a configuration names, and check that it fits together."""
    from taskvec.checkpoint import Checkpoint, content_hash

    config = config.resolved()
    device = device_named(config.device)
    base = Checkpoint.open(config.base)
    model = _model(config).to(device=device, dtype=getattr(torch, config.dtype))
    names = names_in_checkpoint(model, base)
    excluded = [name for name, _ in model.named_parameters() if name not in names]
    vectors, hashes = _vectors(config, base, names)
    initial: Any = config.initial
    if isinstance(initial, str):
        before = Coefficients.load(initial)
        if before.tasks != tuple(config.tasks):
            raise MismatchError(
                [f"{initial}: has coefficients of {list(before.tasks)}, the tasks here are {list(config.tasks)}."]
            )
        initial = before.values
    tokenizer = _tokenizer(config) if any(spec.path for spec in config.data.values()) else None
    heads = _heads(config, device)
    data = {name: _data(config, name, spec, tokenizer) for name, spec in config.data.items()}
    objective = _objective(config, heads, data)
    held = {name: _data(config, name, spec, tokenizer, held_out=True) for name, spec in config.evaluation.items()}
    batches = _batches(config, data, objective)
    selection = None
    if config.select is not None:
        selection = _selected(config, model, vectors, objective, batches, data, tokenizer)
    composition = Composition(
        model,
        vectors if selection is None else selection.vectors,
        _granularity(config),
        (config.partitions.parts, config.partitions.seed) if config.partitions else None,
        config.mode,
        exclude=[*config.exclude, *excluded],
        coefficients=initial,
        bank=config.bank,
        bank_dtype=config.bank_dtype,
        statistics=config.statistics,
        names=names,
    )
    hashes[""] = content_hash(base)
    return Setup(
        config,
        model,
        composition,
        objective,
        batches,
        _evaluation(config, held, heads, device) if held else None,
        names,
        base,
        hashes,
        selection,
        _frozen(config, composition),
    )


def _granularity(config: LearnConfig) -> Any:
    return named(config.granularity, "granularity") if ":" in config.granularity else config.granularity


def _frozen(config: LearnConfig, composition: Composition) -> Tensor | None:
    """Which coefficients stay as they start: those of the blocks that match a pattern."""
    if not config.frozen:
        return None
    blocks = composition.blocks
    unused = [p for p in config.frozen if not names_matching(blocks, [p])]
    if unused:
        raise MismatchError([f"frozen: {p!r} matches no block." + did_you_mean(p, blocks) for p in unused])
    found = torch.tensor([matches(config.frozen, block) for block in blocks])
    shape = composition.coefficients.shape
    return found.view(1, -1, *(1 for _ in shape[2:])).expand(shape).clone()


def _selected(
    config: LearnConfig,
    model: nn.Module,
    vectors: Mapping[str, Vector],
    objective: Objective,
    batches: Any,
    data: Mapping[str, Any],
    tokenizer: Any,
) -> Selection:
    assert config.select is not None  # the caller checked
    wanted = config.select
    if wanted.strategy == "random":
        return select(vectors, wanted.budget, "random", seed=config.seed)
    if wanted.strategy == "features":
        if tokenizer is None and any(spec.path for spec in wanted.data.values()):
            tokenizer = _tokenizer(config)
        own = {name: _data(config, name, spec, tokenizer, held_out=True) for name, spec in wanted.data.items()}
        forward = Forward(config.pool, config.normalize)
        target = torch.stack([mean_features(model, source, forward) for source in data.values()]).mean(0)
        features = {name: mean_features(model, source, forward) for name, source in own.items()}
        return select(vectors, wanted.budget, "features", target=target, features=features)
    return select(
        vectors,
        wanted.budget,
        wanted.strategy,
        model=model,
        objective=objective,
        batches=batches(0),
        normalize=wanted.normalize,
    )


# -- models and task vectors -------------------------------------------------------------------------------------------


def _model(config: LearnConfig) -> nn.Module:
    if ":" in config.model:
        model = named(config.model, "model")(config.base)
        if not isinstance(model, nn.Module):
            raise UsageError(f"model: {config.model} returned a {type(model).__name__}; expected a torch module.")
        return model.eval()
    import transformers

    kind = getattr(transformers, config.model, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        known = [name for name in dir(transformers) if name.startswith("AutoModel")]
        raise UsageError(f"model: transformers has no model class {config.model!r}.{did_you_mean(config.model, known)}")
    loaded: nn.Module = kind.from_pretrained(config.base, dtype=getattr(torch, config.dtype))
    return loaded.eval()


def names_in_checkpoint(model: nn.Module, base: TensorSource) -> dict[str, str]:
    """Parameter or buffer of the model to its tensor in the checkpoint, under the name that transformers gives it there.

    Raises:
        MismatchError: no parameter is found.
    """
    prefix = getattr(model, "base_model_prefix", "")
    found: dict[str, str] = {}
    on_disk = Names(base)
    every = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, tensor in every.items():
        spellings = [name]
        if prefix:
            spellings += [f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
        for spelling in spellings:
            if spelling in base.infos:
                found[name] = spelling
                break
        else:
            renamed = [there for there in map(on_disk.find, spellings) if there is not None and there in base.infos]
            if renamed and tuple(base.infos[renamed[0]].shape) == tuple(tensor.shape):
                found[name] = renamed[0]
    if not found:
        raise MismatchError(
            [f"no parameter of {type(model).__name__} has a tensor in {base.label}. Is `model` the right class?"]
        )
    return found


def _vectors(
    config: LearnConfig, base: TensorSource, names: Mapping[str, str]
) -> tuple[dict[str, _NamedAsModel], dict[str, str]]:
    from taskvec.adapter import is_adapter
    from taskvec.checkpoint import Checkpoint, content_hash
    from taskvec.vector import TaskVector, is_task_vector
    from taskvec.views import Only

    to_model = {there: here for here, there in names.items()}
    wanted = {there for here, there in names.items() if not matches(config.exclude, here, there)}
    problems = Problems()
    vectors: dict[str, _NamedAsModel] = {}
    hashes: dict[str, str] = {}
    for task, path in config.tasks.items():
        try:
            if is_adapter(path):
                vector = TaskVector.from_adapter(base, path)
                source: Any = vector.terms[0][1]
                hashes[task] = source.content_hash()
            else:
                tuned = Checkpoint.open(path)
                hashes[task] = content_hash(tuned)
                if is_task_vector(tuned):
                    vector = TaskVector.load(path)
                    if vector.base_hash is not None and vector.base_hash != content_hash(base):
                        raise BaseMismatchError(
                            f"tasks.{task}: {path} is the task vector of another base (hash {vector.base_hash[:12]}, this base "
                            f"has {content_hash(base)[:12]})."
                        )
                else:
                    both = wanted & set(tuned.infos)
                    missing = wanted - both - {a for a in base.aliases if base.aliases[a] in both}
                    if missing == wanted:
                        problems.add(f"tasks.{task}: {path} has none of the base's tensors.")
                        continue
                    for name in sorted(missing):
                        problems.add(f"tasks.{task}: {path} has no {name}; leave it out with `exclude` if so meant.")
                    vector = TaskVector.between(Only(base, both.__contains__), Only(tuned, both.__contains__))
        except MismatchError as error:
            problems.extend(f"tasks.{task}: {problem}" for problem in error.problems)
            continue
        vectors[task] = _NamedAsModel(vector, {name: to_model[name] for name in vector.infos if name in wanted})
    problems.raise_if_any(MismatchError)
    return vectors, hashes


# -- heads and objectives ----------------------------------------------------------------------------------------------


def device_named(name: "str | torch.device | None") -> torch.device:
    """The device of that name; by default the GPU, where there is one.

    Raises:
        UsageError: it is none, or not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UsageError(f"device: {name!r} is not a device; write cpu, cuda or cuda:1.") from None
    there = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= there:
        raise UsageError(f"device: {name!r} is not there (CUDA devices found: {there}); use cpu.")
    return device


def _heads(config: LearnConfig, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    if config.heads is None:
        return {}
    if isinstance(config.heads, dict):
        made = {}
        for name, spec in config.heads.items():
            head = named(spec, f"heads.{name}")()
            made[name] = head.to(device) if isinstance(head, nn.Module) else head
        return made
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(config.heads).is_file():
        raise NotFoundError(f"heads: {config.heads}: no such file.")
    try:
        tensors = load_file(config.heads)
    except SafetensorError as error:
        raise DataError(f"heads: {config.heads}: not a safetensors file ({error}).") from None
    lacking = [name for name in config.data if name not in tensors]
    if lacking:
        raise DataError(
            f"heads: {config.heads} has no head for {', '.join(lacking)}.{did_you_mean(lacking[0], tensors)} "
            "Expected a tensor [class, width] named as the entry of `data`."
        )
    return {
        name: Head(tensors[name], tensors.get(f"{name}.bias"), config.logit_scale).to(device) for name in config.data
    }


def _objective(
    config: LearnConfig, heads: Mapping[str, Callable[[Tensor], Tensor]], data: Mapping[str, Any]
) -> Objective:
    if ":" in config.objective:
        return cast(Objective, named(config.objective, "objective")())
    forward = Forward(config.pool, config.normalize)
    if config.objective == "ufm":
        ((name, source),) = data.items()
        ufm = config.ufm or UFMSpec()
        pool = source.in_order() if isinstance(source, Texts) else named(str(ufm.pool), "ufm.pool")()
        options = ufm.model_dump(include={"threshold", "sharpen", "trusted_fraction", "limit", "compat"})
        return UFM(pool, heads.get(name), forward, **options)

    def one(name: str) -> Objective:
        if config.objective == "entropy":
            return Entropy(heads.get(name), forward)
        if config.objective == "causal_lm":
            return CausalLM()
        return Supervised(heads.get(name), forward)

    if config.negation is not None:
        negation = config.negation
        return Negation(one(negation.target), one(negation.control), negation.weight, negation.floor)
    return MultiTask({name: one(name) for name in config.data}, config.task_weights)


# -- data --------------------------------------------------------------------------------------------------------------


def _tokenizer(config: LearnConfig) -> Any:
    from transformers import AutoTokenizer

    place = config.tokenizer or config.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"tokenizer: none at {place} ({first}). Name a folder that has one with `tokenizer`.") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _data(config: LearnConfig, name: str, spec: DataSpec, tokenizer: Any, *, held_out: bool = False) -> Any:
    if spec.function is not None:
        function = named(spec.function, f"data.{name}")
        return lambda epoch: function(epoch)
    assert spec.path is not None  # DataSpec has one of the two
    labelled = config.objective in ("supervised", "negation") or (held_out and config.objective != "causal_lm")
    return texts(
        name,
        rows(spec.path, spec.limit),
        tokenizer,
        text=spec.text,
        label=spec.label if labelled else None,
        classes=spec.classes,
        batch=config.batch,
        max_length=config.max_length,
        seed=config.seed,
        shuffle=not held_out,
    )


def _batches(config: LearnConfig, data: Mapping[str, Any], objective: Objective) -> Any:
    if config.negation is not None:
        return Together({"target": data[config.negation.target], "control": data[config.negation.control]})
    if isinstance(objective, UFM):
        (source,) = data.values()
        drop = (config.ufm or UFMSpec()).drop
        return Views(source, objective, drop, config.seed) if isinstance(source, Texts) else source
    return Together(data)


def _evaluation(
    config: LearnConfig, held: Mapping[str, Any], heads: Mapping[str, Callable[[Tensor], Tensor]], device: torch.device
) -> Callable[[nn.Module], dict[str, float]]:
    forward = Forward(config.pool, config.normalize)
    roles = {}
    if config.negation is not None:
        roles = {config.negation.target: "target", config.negation.control: "control"}

    def evaluate(model: nn.Module) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, data in held.items():
            batches = data(0) if callable(data) else data
            if config.objective == "causal_lm":
                found[roles.get(name, name)] = -mean_loss(CausalLM(), model, batches, device)
            else:
                found[roles.get(name, name)] = accuracy(model, batches, heads.get(name), forward)
        return found

    return evaluate


@torch.no_grad()
def mean_loss(objective: Objective, model: nn.Module, batches: Iterable[Any], device: torch.device) -> float:
    """An objective's mean over all batches.

    Raises:
        DataError: there is nothing to average.
    """
    total, number = 0.0, 0.0
    for batch in batches:
        for term in objective.terms(model, moved(batch, device)):
            total += term.weight * float(term.total)
            number += float(term.number)
    if not number:
        raise DataError("evaluation: there is nothing to measure on.")
    return total / number


@torch.no_grad()
def mean_features(model: nn.Module, batches: Any, forward: Forward) -> Annotated[Tensor, "feature"]:
    """The mean over all examples of what the model as it is makes of them.

    Raises:
        DataError: there are none.
    """
    device = next(model.parameters()).device
    total, count = torch.zeros(()), 0
    for batch in batches(0) if callable(batches) else batches:
        inputs, _ = split(moved(batch, device))
        found = forward(model, inputs).double().cpu()
        total, count = total + found.sum(0), count + len(found)
    if not count:
        raise DataError("select.data: there is nothing to take features of.")
    return total / count


# -- several processes -------------------------------------------------------------------------------------------------


class _process_group:
    """A gloo or nccl group for as long as it is needed, where torchrun started several processes."""

    def __enter__(self) -> None:
        import os

        self._ours = False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            self._ours = True

    def __exit__(self, *_: object) -> None:
        if self._ours:
            torch.distributed.destroy_process_group()
