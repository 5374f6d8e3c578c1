"""Which methods fit these models, ranked, each piece of advice with its reason and its source.

`survey` looks at the inputs: kind of model, adapters or full fine-tunes, lengths and directions of the task vectors, on
a fixed sample of about a million elements spread evenly over the model, so that it takes seconds on any size. `advise`
turns that into findings. Figures in the reasons are those of the named sources; where they were measured on vision
models or on untuned coefficients the text says so. Papers and our own tables (`examples/real_zoo`) do not always agree:
what was measured here on a model of the same kind and on no more tasks goes first, and the text says that they differ.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from taskvec.adapter import Adapter
from taskvec.checkpoint import Checkpoint
from taskvec.deltas import ModelDeltas, Task
from taskvec.errors import MismatchError, UsageError
from taskvec.moments import assert_finite
from taskvec.precision import is_float
from taskvec.source import DeltaSource, TensorSource
from taskvec.sweep import sample_blocks
from taskvec.vector import TaskVector, assert_alike, is_task_vector

SAMPLE = 1 << 20
MEASURED_TASKS = 6  # the most that a zoo of ours has
_SAME = 1e-6  # of a cosine or a norm: below it, two samples differ by the rounding of their sums alone
APART = 3.0  # ratio of norms above which methods were seen to break (DisTaC)

Kind = Literal["causal LM", "sequence to sequence", "encoder", "unknown"]
Inputs = Literal["full", "LoRA", "mixed"]
Verdict = Literal["use", "consider", "avoid", "warning", "fact"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece of advice.

    Attributes:
        verdict: what to do with it; a "fact" only says what was seen.
        text: the advice and its reason.
        source: where the rule comes from.
        method: the method it speaks of, if any.
        recipe: the words of a recipe that follow the advice.
        rank: place among the methods to try, 1 first; None for what is no method to try.
    """

    verdict: Verdict
    text: str
    source: str
    method: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """What the inputs are like. Numbers are estimates from a sample, the same one every time.

    Attributes:
        kind: of the base, from its config or the names of its tensors.
        inputs: adapters or full fine-tunes.
        tasks: their names.
        norms: of the task vectors.
        base_norm: of the base's merged tensors.
        cosines: between the task vectors, [task, task].
        conflict: among the entries that several tasks changed, the share on which their signs differ.
        chance: that share if all signs were independent.
        sum_norm: norm of the sum of the task vectors.
        zero: share of entries that no task changed.
        kernels: share of the entries that lie in kernels of convolutions, which methods for matrices leave alone.
    """

    kind: Kind
    inputs: Inputs
    tasks: tuple[str, ...]
    norms: tuple[float, ...]
    base_norm: float
    cosines: tuple[tuple[float, ...], ...]
    conflict: float
    chance: float
    sum_norm: float
    zero: float
    kernels: float = 0.0

    @property
    def ratio(self) -> float:
        """Longest task vector over shortest; infinite where one is zero."""
        return max(self.norms) / min(self.norms) if min(self.norms) > 0 else math.inf

    @property
    def stretch(self) -> float:
        """Norm of the plain sum over the mean norm of the task vectors."""
        mean = sum(self.norms) / len(self.norms)
        return self.sum_norm / mean if mean > 0 else 0.0


Model = "str | os.PathLike[str] | TensorSource"


def advise(base: Any, models: Sequence[Any]) -> list[Finding]:
    """What to merge these models with, and what to beware of.

    Args:
        base: path, hub id or source of the model that all were tuned from.
        models: paths, hub ids or sources of the fine-tunes; adapters and stored task vectors count as themselves.

    Raises:
        UsageError: there are no models.
        MismatchError: models that do not fit the base; every difference.
    """
    return findings(survey(base, models))


def survey(base: Any, models: Sequence[Any]) -> Survey:
    """Looks at the inputs; reads headers and about a million elements of each.

    Raises:
        UsageError: there are no models.
        MismatchError: models that do not fit the base; every difference.
        NonFiniteError: NaN or infinity in the sample.
    """
    if not models:
        raise UsageError("advise: name at least one model that was tuned from the base")
    source = Checkpoint.open(base) if isinstance(base, str | os.PathLike) else base
    tasks = [_task(model, source, i) for i, model in enumerate(models)]
    wholes = {task.name: task.source for task in tasks if not task.is_delta}
    if wholes:
        assert_alike(source, wholes)
    aliases = source.aliases
    names = [
        name
        for name, info in source.infos.items()
        if is_float(info.dtype)
        and info.numel
        and name not in aliases
        and all(task.is_delta or name in task.source.infos for task in tasks)
    ]
    if not names:
        raise MismatchError(["the base and the models have no floating-point tensor in common"])
    deltas = ModelDeltas(source, tasks, names)
    count = len(tasks)
    gram = torch.zeros(count, count, dtype=torch.float64)
    squares, size = 0.0, 0
    shared, conflicts, chance, untouched = 0, 0, 0.0, 0
    small = deltas.numel <= SAMPLE
    blocks = [(n, 0, i.numel) for n, i in deltas.infos.items()] if small else sample_blocks(deltas, SAMPLE)
    for block in blocks:
        tile = deltas.tile(*block)
        assert_finite(tile)
        stack = tile.stack.double()
        gram += stack @ stack.T
        assert tile.base is not None
        squares += float(tile.base.double().square().sum())
        positive, negative = (stack > 0).sum(0), (stack < 0).sum(0)
        changed = positive + negative
        several = changed > 1
        shared += int(several.sum())
        conflicts += int((several & (positive > 0) & (negative > 0)).sum())
        chance += float((1 - 2.0 ** (1 - changed[several].double())).sum())
        untouched += int((changed == 0).sum())
        size += stack.shape[1]
    whole = deltas.numel / size
    lengths = gram.diagonal().sqrt()
    safe = lengths.where(lengths > 0, 1.0)
    cosines = gram / safe[:, None] / safe[None, :]
    return Survey(
        kind=kind_of(source),
        inputs=_inputs(tasks),
        tasks=tuple(task.name for task in tasks),
        norms=tuple((lengths * whole**0.5).tolist()),
        base_norm=(squares * whole) ** 0.5,
        cosines=tuple(tuple(row) for row in cosines.tolist()),
        conflict=conflicts / shared if shared else 0.0,
        chance=chance / shared if shared else 0.0,
        sum_norm=float(gram.sum().clamp(min=0) * whole) ** 0.5,
        zero=untouched / size,
        kernels=sum(i.numel for i in deltas.infos.values() if len(i.shape) == 4) / deltas.numel,
    )


def _task(model: Any, base: TensorSource, index: int) -> Task:
    if not isinstance(model, str | os.PathLike):
        return Task(f"model {index + 1}", model, is_delta=isinstance(model, DeltaSource))
    path = Path(model).expanduser()
    if (path / "adapter_config.json").is_file():
        return Task(str(model), Adapter.open(path, base), is_delta=True)
    source = Checkpoint.open(model)
    if is_task_vector(source):
        vector = TaskVector.load(model)
        vector.apply_to(base)  # refuses another base
        return Task(str(model), vector, is_delta=True)
    return Task(str(model), source)


def _inputs(tasks: Sequence[Task]) -> Inputs:
    factored = [
        isinstance(task.source, DeltaSource)
        and any(task.source.low_rank(name) is not None for name in list(task.source.infos)[:8])
        for task in tasks
    ]
    return "LoRA" if all(factored) else "mixed" if any(factored) else "full"


def kind_of(source: TensorSource) -> Kind:
    """The kind of model, from the `architectures` of its config, or else from the names of its tensors."""
    config = getattr(source, "config", {})
    for architecture in config.get("architectures") or ():
        if architecture.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal LM"
        if architecture.endswith("ForConditionalGeneration"):
            return "sequence to sequence"
        return "encoder"
    names = list(source.infos)
    if any(name.startswith(("decoder.", "model.decoder.")) for name in names) and any(
        name.startswith(("encoder.", "model.encoder.")) for name in names
    ):
        return "sequence to sequence"
    if any(name.startswith(("lm_head.", "output.weight")) for name in names):
        return "causal LM"
    if any(part in name for name in names for part in ("pooler.", "patch_embed", "classifier.", "encoder.layer")):
        return "encoder"
    return "unknown"


# -- the rules ---------------------------------------------------------------------------------------------------------

_LLM_STUDY = "arXiv:2511.21437 (four base LLMs, 12 checkpoints each, 16 benchmarks; coefficients of 1, untuned)"
_ISO = "arXiv:2502.04959, Table 1 (CLIP, scale tuned on validation data)"
_DISTAC = "DisTaC, ICLR 2026 (CLIP ViT-B/32, norms made unequal; figures second-hand)"
_OURS = "measured: examples/real_zoo"
_OUR_LANGUAGE = f"{_OURS} (SmolLM2-135M, 3 domains, perplexity, lower is better)"
_OUR_ADAPTERS = f"{_OURS} (SmolLM2-135M, LoRA of rank 8, 3 domains, perplexity, lower is better)"
_OUR_TEXT = f"{_OURS} (MiniLM-L6, 6 tasks, accuracy)"
_OUR_IMAGE = f"{_OURS} (EfficientNet-Lite0, 3 tasks, accuracy)"


def findings(seen: Survey) -> list[Finding]:
    """The advice for what a survey saw: facts first, then warnings, then methods in the order in which to try them."""
    tries: list[Finding] = []
    others: list[Finding] = []
    for finding in _methods(seen):
        (tries if finding.verdict in ("use", "consider") else others).append(finding)
    order = sorted(tries, key=lambda finding: finding.verdict != "use")
    ranked = [replace(finding, rank=place) for place, finding in enumerate(order, 1)]
    return [*_facts(seen), *_warnings(seen), *others, *ranked]


def _facts(seen: Survey) -> list[Finding]:
    norms = ", ".join(f"{name} {norm:.3g}" for name, norm in zip(seen.tasks, seen.norms))
    base = seen.base_norm or 1.0
    found = [
        Finding("fact", f"{seen.kind}, {len(seen.tasks)} × {seen.inputs}", "config and headers"),
        Finding(
            "fact",
            f"norms of the task vectors: about {norms}; at most {max(seen.norms) / base:.2%} of the base's",
            f"a sample of {SAMPLE:,} elements",
        ),
    ]
    if len(seen.tasks) > 1:
        pairs = [seen.cosines[i][j] for i in range(len(seen.tasks)) for j in range(i)]
        found.append(
            Finding(
                "fact",
                f"cosines between task vectors from {min(pairs):.2f} to {max(pairs):.2f}; signs differ on "
                f"{seen.conflict:.0%} of the entries that several tasks changed ({seen.chance:.0%} by chance); "
                f"the plain sum is {seen.stretch:.1f} times as long as a task vector",
                f"a sample of {SAMPLE:,} elements",
            )
        )
    return found


def _warnings(seen: Survey) -> list[Finding]:
    found = []
    zero = [name for name, norm in zip(seen.tasks, seen.norms) if norm == 0]
    if zero:
        found.append(
            Finding("warning", f"{zero[0]} equals the base on the whole sample: it has nothing to merge", "the sample")
        )
    elif seen.ratio > APART:
        long = seen.tasks[seen.norms.index(max(seen.norms))]
        short = seen.tasks[seen.norms.index(min(seen.norms))]
        found.append(
            Finding(
                "warning",
                f"{long}'s task vector is {seen.ratio:.1f} times as long as {short}'s and will drown it. Equalise the "
                "norms first. With unequal norms task arithmetic fell from 70.4 to 63.6, TIES from 74.0 to 59.1, TSV-M "
                "from 83.3 to 72.2 and WUDI from 85.5 to 49.2",
                _DISTAC,
                "equalize",
                {"preprocess": ["equalize"]},
            )
        )
        found.append(Finding("avoid", "WUDI suffers most from norms this unequal", _DISTAC, "wudi"))
    if seen.base_norm and max(seen.norms) > 0.5 * seen.base_norm:
        found.append(
            Finding(
                "warning",
                f"{seen.tasks[seen.norms.index(max(seen.norms))]} is far from the base "
                f"({max(seen.norms) / seen.base_norm:.0%} of its norm). Was it tuned from another base?",
                "fine-tuning moves weights by a few percent",
            )
        )
    alike = [
        (j, i)
        for i in range(len(seen.tasks))
        for j in range(i)
        if seen.cosines[i][j] > 0.9 and min(seen.norms[i], seen.norms[j]) > 0
    ]
    same = [(j, i) for j, i in alike if seen.cosines[i][j] > 1 - _SAME and _close(seen.norms[i], seen.norms[j])]
    if same:
        one, other = (seen.tasks[at] for at in same[0])
        found.append(
            Finding(
                "warning",
                f"{one} and {other} are one model on the whole sample: leave one out, or give it a larger weight",
                "the sample",
            )
        )
    elif alike:
        one, other = (seen.tasks[at] for at in alike[0])
        found.append(
            Finding(
                "warning",
                f"{one} and {other} point the same way; a sum counts what they share twice. Average "
                "them, or calibrate the merge with svc",
                "arXiv:2602.05536 (directions that tasks share are over-counted by a sum)",
                "svc",
                {"postprocess": ["svc"]},
            )
        )
    return found


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _SAME * max(one, other)


def _methods(seen: Survey) -> list[Finding]:
    count = len(seen.tasks)
    if not any(seen.norms):
        return []  # nothing was tuned, so nothing fits
    if count == 1:
        return [
            Finding(
                "use",
                "one model: scale its task vector (task_arithmetic with a scale), by depth with lines to forget less",
                "arXiv:2212.04089, arXiv:2410.17146",
                "task_arithmetic",
                {"method": "task_arithmetic", "scale": 0.5},
            )
        ]
    if seen.kernels > 0.5:
        return _for_convolutions(seen)
    if seen.inputs == "LoRA":
        found = _for_adapters(seen.kind)
    elif seen.kind == "causal LM":
        found = _for_language_models(count)
    elif seen.kind == "encoder":
        found = _for_encoders(count)
    else:
        found = _for_others(seen.kind)
    if seen.stretch > 1.5 and not (seen.kind == "causal LM" and seen.inputs != "LoRA"):
        found.append(
            Finding(
                "consider",
                f"the plain sum moves the base {seen.stretch:.1f} times as far as a task; norm_match takes it back",
                _LLM_STUDY,
                "norm_match",
                {"postprocess": ["norm_match"]},
            )
        )
    if seen.conflict > 0.3 and not (seen.kind == "causal LM" and seen.inputs == "full"):
        found.append(
            Finding(
                "consider",
                f"signs differ on {seen.conflict:.0%} of the shared entries, which an average cancels: among methods "
                "that work entry by entry pcb resolves that best (76.3; TIES 72.4, task arithmetic 69.1). Ours agrees on text "
                "(83.8; TIES 83.4, task arithmetic 68.8, or 83.7 at its best scale), not on LoRA adapters of a language "
                "model (perplexity 35.27; TIES 34.23)",
                f"WUDI's README (CLIP ViT-B/32, 8 tasks); {_OURS}",
                "pcb",
                {"method": "pcb"},
            )
        )
    if count == 2:
        found.append(
            Finding(
                "consider",
                "two models can be interpolated on the sphere, which keeps the length of the weights; on our zoos it is no "
                "better than the average of the two (text 90.0 and 90.0, language 28.22 and 28.25)",
                f"doi:10.1145/325334.325242; {_OURS}",
                "nuslerp",
                {"method": "nuslerp"},
            )
        )
    if seen.inputs == "full" and seen.kind != "causal LM":
        found.append(
            Finding(
                "consider",
                "with a few unlabelled batches for each task, regression on activations needs no tuning: RegMean++ "
                "84.4, RegMean 82.4, Fisher 70.6, task arithmetic 68.0. On our text encoder 84.9, 84.5, 77.1 and 68.8, but "
                "tsv_m has 87.2 without any data",
                f"FusionBench's own table (its CLIP ViT-B/32 checkpoints, 8 tasks); {_OUR_TEXT}",
                "regmean_pp",
                {"method": "regmean_pp"},
            )
        )
    return found


def _for_language_models(count: int) -> list[Finding]:
    measured = [
        Finding(
            "use",
            "TSV-M as it is: the best without data on full fine-tunes (29.77; TIES 31.44, task arithmetic with norm match 31.86, alone "
            "33.15, or 31.70 at its best scale). The study of large models below disagrees (there it lost 2.36 points against the base): "
            "ours is one small model and three domains, so evaluate",
            _OUR_LANGUAGE,
            "tsv_m",
            {"method": "tsv_m"},
        ),
        Finding(
            "use",
            "RegMean where there is some text of each task (64 blocks of 128 tokens, no labels): 29.45, and 28.96 at a scale of 1.4, the "
            "best of all (RegMean++ 29.32 and 29.00); it needs statistics of each task (`taskvec learn statistics` collects them)",
            f"{_OUR_LANGUAGE}; arXiv:2212.09849",
            "regmean",
            {"method": "regmean"},
        ),
    ]
    study = Finding(
        "use",
        "task arithmetic with norm match: on large language models it alone reliably beat the base (+1.02 on average at "
        "12 models), and failures went with the distance from the base, which norm_match sets. On our zoo (3 domains) it is behind "
        "TSV-M (31.86 and 29.77); with more models than that we have measured nothing, and the study goes first",
        f"{_LLM_STUDY}; {_OUR_LANGUAGE}",
        "task_arithmetic",
        {"method": "task_arithmetic", "postprocess": ["norm_match"]},
    )
    return [
        *([study, *measured] if count > MEASURED_TASKS else [*measured, study]),
        Finding(
            "avoid",
            "Iso-C at its default scale: behind even the plain average here (41.04 and 37.94; 30.75 at a scale of 4), "
            "and 5.36 points below the base in the study",
            f"{_OUR_LANGUAGE}; {_LLM_STUDY}",
            "iso_c",
        ),
        Finding(
            "avoid",
            "a scale of 1 on many large language models, whatever the method: TIES fell below the base by 4.32, TSV-M by 2.36 and TIES "
            "with Subspace Boosting by 8.67. Choose the scale on some validation text",
            _LLM_STUDY,
            "ties",
        ),
        Finding(
            "consider",
            "for agents tuned by reinforcement learning the order was another: WUDI 41.1, TSV-M 39.7, task arithmetic "
            "35.9. Try them with norm_match and evaluate",
            "Qwen2.5-7B agents; figures second-hand",
            "wudi",
            {"method": "wudi", "postprocess": ["norm_match"]},
        ),
    ]


def _for_encoders(count: int) -> list[Finding]:
    table = {
        8: "8 tasks on ViT-B/16: Iso-CTS 91.1, Iso-C 90.6, TSV-M 89.0, Consensus 79.4, TIES 79.7, task arithmetic 75.4",
        20: "20 tasks on ViT-B/16: Iso-CTS 82.4, TSV-M 80.6, Iso-C 79.6, TIES 68.2, task arithmetic 65.8",
    }[8 if count < 14 else 20]
    return [
        Finding(
            "use",
            "TSV-M as it is where no scale can be tuned: a scale of 1 is the authors' choice for all their models, and 87.2 on our "
            "text encoder, where Iso-CTS untuned has 79.9 (TIES 83.4, task arithmetic 68.8)",
            f"arXiv:2412.00081; {_OUR_TEXT}",
            "tsv_m",
            {"method": "tsv_m"},
        ),
        Finding(
            "use",
            f"Iso-CTS with its scale tuned on a little validation data ({table}). On our text encoder the two are level then (87.7 at "
            "a scale of 2.8, TSV-M 87.8 at 1.4), so the papers' lead of Iso-CTS was not seen there",
            f"{_ISO}; {_OUR_TEXT}",
            "iso_cts",
            {"method": "iso_cts"},
        ),
    ]


def _for_adapters(kind: Kind) -> list[Finding]:
    measured = Finding(
        "use",
        "TSV-M, with its scale chosen if there is some validation text: 32.48 at 0.7, 33.62 at 1, the best on adapters of a "
        "language model (TIES 34.23, KnOTS 35.00, WUDI 35.02, task arithmetic 40.06). The paper's table of adapters has no TSV-M",
        _OUR_ADAPTERS,
        "tsv_m",
        {"method": "tsv_m"},
    )
    with_text = Finding(
        "use",
        "RegMean++ where there is some text of each task (64 blocks of 128 tokens, no labels): 31.35 untuned, the best of all (RegMean "
        "31.63); it needs statistics of each task (`taskvec learn statistics` collects them)",
        f"{_OUR_ADAPTERS}; arXiv:2508.03121",
        "regmean_pp",
        {"method": "regmean_pp"},
    )
    papers = [
        Finding(
            "use",
            "LoRA updates share no basis, so methods that work entry by entry see noise: KnOTS puts them into one "
            "first (rank 16, 8 tasks, ViT-B/32, in percent of fine-tuned: KnOTS-TIES 68.0, task arithmetic 63.7). On our language model "
            "plain TIES was ahead of KnOTS (34.23 and 35.00)",
            f"arXiv:2502.04959, LoRA table; {_OUR_ADAPTERS}",
            "knots",
            {"method": "knots"},
        ),
        Finding(
            "use",
            "Iso-C within the numerical rank, its scale tuned (73.6 in the same table, by a form that also fills null directions; ours "
            "leaves them empty, which makes devices agree). On our language model 34.15 at a scale of 2.8, but 39.42 untuned",
            f"arXiv:2502.04959, LoRA table; {_OUR_ADAPTERS}",
            "iso_c",
            {"method": "iso_c"},
        ),
    ]
    return [
        *([measured, with_text, *papers] if kind == "causal LM" else [*papers, measured]),
        Finding(
            "consider",
            "a weighted sum of adapters is exact as an adapter of the summed rank; adding their factors instead, as "
            "PEFT's `linear` does, was off by 100 % of the norm on two adapters",
            "measured on peft 0.21.2",
            "task_arithmetic",
            {"method": "task_arithmetic"},
        ),
    ]


def _for_convolutions(seen: Survey) -> list[Finding]:
    return [
        Finding(
            "use",
            "PCB at a scale of 2: 88.4 (85.8 at 1; TIES 87.1, task arithmetic at its best scale 85.3, average 83.2)",
            _OUR_IMAGE,
            "pcb",
            {"method": "pcb", "scale": 2.0},
        ),
        Finding(
            "use",
            "trimming by magnitude at a scale of 1: 88.1, level with PCB and nothing to choose",
            _OUR_IMAGE,
            "magnitude",
            {"method": "task_arithmetic", "preprocess": ["magnitude"]},
        ),
        Finding(
            "avoid",
            f"methods for matrices: {seen.kernels:.0%} of the entries lie in kernels of convolutions, which are no matrices. TSV-M, "
            "Iso-C, Iso-CTS and KnOTS are the plain average there (83.2), WUDI is the base (65.8)",
            _OUR_IMAGE,
            "tsv_m",
        ),
    ]


def _for_others(kind: Kind) -> list[Finding]:
    spectral = Finding(
        "use" if kind == "sequence to sequence" else "consider",
        "TSV-M, which gained most over task arithmetic on fully tuned encoders, and on small language models too (87.2 against 68.8 on "
        "text; perplexity 29.77 against 33.15); it needs matrices, and this kind of model was not measured",
        f"arXiv:2412.00081; {_OURS}",
        "tsv_m",
        {"method": "tsv_m"},
    )
    safe = [
        Finding(
            "use",
            "task arithmetic with norm match: the safe start where no study covers the kind of model (text 84.1, images 85.8, language "
            "31.86, LoRA 35.96; alone, at a scale of 1, 68.8, 76.3, 33.15, 40.06)",
            f"arXiv:2212.04089; {_OURS}",
            "task_arithmetic",
            {"method": "task_arithmetic", "postprocess": ["norm_match"]},
        ),
        Finding(
            "use",
            "TIES at a scale of 1: never the best and never far from it on four zoos (83.4, 86.6, 31.44, 34.23)",
            f"arXiv:2306.01708; {_OURS}",
            "ties",
            {"method": "ties"},
        ),
    ]
    return [spectral, *safe] if kind == "sequence to sequence" else [*safe, spectral]
