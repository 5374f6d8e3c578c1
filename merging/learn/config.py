"""The YAML file of `taskvec learn`, as types. Every problem is reported at once, with its line and the nearest name."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from merging.settings import Strict
from taskvec.errors import did_you_mean

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
GRANULARITIES = ("global", "layer", "block", "matrix", "row", "column", "qkv")


class DataSpec(Strict):
    """Where the examples of one task are.

    Attributes:
        path: a JSONL, CSV or Parquet file, or a folder that `datasets` saved.
        function: `module:function` instead: called with the epoch, gives batches ready for the model.
        text: column of the text, or two columns for pairs.
        label: column of the label (a number, or one of `classes`).
        classes: names of the labels in the head's order, where the column holds names.
        limit: use the first so many rows.
    """

    path: str | None = None
    function: str | None = None
    text: str | list[str] = "text"
    label: str = "label"
    classes: list[str] | None = None
    limit: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.function is None):
            raise ValueError("needs either `path` or `function`")
        return self


class OptimizerSpec(Strict):
    """AdamW of the coefficients; what is not given follows the use (see `LearnConfig.resolved`)."""

    lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class PartitionSpec(Strict):
    """Random partitions (aTLAS x K)."""

    parts: Annotated[int, Field(ge=1, le=65536)]
    seed: int = 0


class PenaltySpec(Strict):
    """gamma * mean over blocks of the p-norm of the block's coefficients."""

    gamma: Annotated[float, Field(ge=0)] = 0.5
    p: Literal[1, 2] = 1


class ConstraintSpec(Strict):
    """Where coefficients may lie."""

    low: float | None = None
    high: float | None = None
    sum_to_one: bool = False


class SelectSpec(Strict):
    """Which task vectors, or blocks of them, are kept; see `merging.learn.select`.

    Attributes:
        data: for `features`: some data of every task; those whose mean features in the base point the same way as the
            mean features of what is learned on are kept.
    """

    budget: Positive
    strategy: Literal["random", "features", "gradient", "gradient-block"] = "gradient-block"
    normalize: bool = False
    data: dict[str, DataSpec] = Field(default_factory=dict)


class UFMSpec(Strict):
    """Unsupervised FixMatch on texts; see `merging.learn.objectives.UFM`.

    Attributes:
        threshold: of the first and the last epoch.
        drop: fraction of the words that the strong view leaves out; the weak view is the text as it is.
        pool: `module:function` where the data come from one too: gives the inputs of all examples, in batches. The
            data's function then gives batches that map `index`, `weak` and `strong`.
    """

    threshold: tuple[Fraction, Fraction] = (0.9, 1.0)
    sharpen: Annotated[float, Field(gt=0)] = 0.5
    trusted_fraction: Fraction = 0.25
    limit: Positive = 100
    compat: Literal["paper", "released"] = "paper"
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.15
    pool: str | None = None


class NegationSpec(Strict):
    """Which data are unlearned, which are kept."""

    target: str
    control: str
    weight: float = 1.0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.95


class LearnConfig(Strict):
    """What `taskvec learn atlas` and `taskvec learn adamerging` read.

    Attributes:
        base: a checkpoint folder, file or hub id.
        tasks: name to fine-tuned checkpoint, adapter or saved task vector.
        model: a class of transformers (`AutoModel`, `AutoModelForSequenceClassification`, `AutoModelForCausalLM`, …),
            or `module:function`, called with the base's path.
        data: one entry per task to learn on.
        evaluation: held-out data with labels, for choosing the best round; disjoint from the test set.
        heads: a safetensors file with a tensor [class, width] per entry of `data` (and `<name>.bias`), or name to
            `module:function`; none where the model gives logits.
        pool, normalize, logit_scale: from the model's output to the head's input, and from its output to logits.
        objective: `supervised`, `entropy`, `ufm` (one entry of `data`, unlabelled), `causal_lm`, `negation`, or
            `module:function` that makes one.
        exclude: patterns of parameters that keep the base's value; their tensors need not fit.
        granularity: see `Composition`; or `module:function` from a parameter's name to that of its group, or None.
        frozen: patterns of blocks whose coefficients stay as they start.
        select: keep only so many task vectors' worth of blocks; the file has zeros for what was left out.
        initial: a number, or a coefficients file.
        batch: rows per task and step.
    """

    base: str
    tasks: Annotated[dict[str, str], Field(min_length=1)]
    model: str = "AutoModel"
    data: Annotated[dict[str, DataSpec], Field(min_length=1)]
    evaluation: dict[str, DataSpec] = Field(default_factory=dict)
    tokenizer: str | None = None
    max_length: Positive = 128
    heads: str | dict[str, str] | None = None
    pool: Literal["auto", "logits", "pooler", "first", "mean"] = "auto"
    normalize: bool = False
    logit_scale: float = 1.0
    objective: str = "supervised"
    negation: NegationSpec | None = None
    ufm: UFMSpec | None = None
    task_weights: dict[str, float] = Field(default_factory=dict)
    exclude: list[str] = Field(default_factory=list)
    granularity: str = "block"
    frozen: list[str] = Field(default_factory=list)
    partitions: PartitionSpec | None = None
    select: SelectSpec | None = None
    mode: Literal["nonlinear", "linear"] = "nonlinear"
    statistics: Literal["keep", "average"] = "keep"
    initial: float | str = 0.0
    optimizer: OptimizerSpec = OptimizerSpec()
    epochs: Positive | None = None
    steps: Positive | None = None
    batch: Positive = 16
    accumulate: Positive = 1
    schedule: Literal["cosine", "constant"] | None = None
    warmup: Annotated[int, Field(ge=0)] = 0
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    clip_mode: Literal["true", "normalized"] = "true"
    precision: Literal["full", "bf16", "fp16"] = "full"
    penalty: PenaltySpec | None = None
    constraint: ConstraintSpec | None = None
    keep: Literal["best", "last"] | None = None
    patience: Positive | None = None
    every: Positive | None = None
    seed: int = 0
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    bank: Literal["model", "cpu", "pinned", "disk"] = "model"
    bank_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = []
        known = ("supervised", "entropy", "ufm", "causal_lm", "negation")
        if self.objective not in known and ":" not in self.objective:
            problems.append(f"objective: {self.objective!r} is not known.{did_you_mean(self.objective, known)}")
        if (self.objective == "negation") != (self.negation is not None):
            problems.append("negation: give `objective: negation` and `negation:` with target and control, or neither")
        if self.ufm is not None and self.objective != "ufm":
            problems.append("ufm: goes with `objective: ufm`")
        if self.objective == "ufm":
            if len(self.data) != 1:
                problems.append(f"objective: ufm adapts to one set of data, found {len(self.data)}")
            pool = self.ufm.pool if self.ufm is not None else None
            for name, spec in self.data.items():
                if (spec.function is None) != (pool is None):
                    problems.append(f"data.{name}: `function` needs `ufm.pool`, and `path` makes its own")
        if ":" not in self.granularity and self.granularity not in GRANULARITIES:
            problems.append(
                f"granularity: {self.granularity!r} is not known.{did_you_mean(self.granularity, GRANULARITIES)}"
            )
        if self.negation is not None:
            for role, name in (("target", self.negation.target), ("control", self.negation.control)):
                if name not in self.data:
                    problems.append(f"negation.{role}: {name!r} is not in data.{did_you_mean(name, self.data)}")
        for part, names in (("evaluation", self.evaluation), ("task_weights", self.task_weights)):
            for name in names:
                if name not in self.data:
                    problems.append(f"{part}.{name}: is not in data.{did_you_mean(name, self.data)}")
        if isinstance(self.heads, dict):
            for name in self.heads:
                if name not in self.data:
                    problems.append(f"heads.{name}: is not in data.{did_you_mean(name, self.data)}")
        if self.keep == "best" and not self.evaluation:
            problems.append("keep: best needs `evaluation`")
        if self.patience and not self.evaluation:
            problems.append("patience: needs `evaluation`")
        if self.select is not None:
            if self.select.budget > len(self.tasks):
                problems.append(f"select.budget: {self.select.budget} of {len(self.tasks)} tasks")
            if self.select.strategy == "gradient-block" and self.granularity != "block":
                problems.append("select: gradient-block needs `granularity: block`")
            named = set(self.select.data)
            if self.select.strategy == "features" and named != set(self.tasks):
                problems.append(f"select.data: `features` needs data of every task, found {sorted(named)}")
            elif self.select.strategy != "features" and named:
                problems.append("select.data: goes with `strategy: features`")
            if isinstance(self.initial, str):
                problems.append("select, initial: a file of coefficients cannot start a selection")
        if self.epochs and self.steps:
            problems.append("epochs, steps: give one of them")
        if ":" not in self.model and not re.fullmatch(r"\w+", self.model):
            problems.append(f"model: {self.model!r} is neither a class of transformers nor `module:function`")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def resolved(self) -> "LearnConfig":
        """With the paper's settings where the file says nothing.

        One labelled task (few-shot): lr 0.1, cosine, 10 epochs. Several (addition): 1e-3, constant, 20 epochs. Entropy
        and negation: 1e-3 (negation 5e-3, the paper's most common factor), constant; causal LM as several tasks. UFM:
        1e-3, cosine, 10 epochs. Weight decay 0.1 throughout.
        """
        few_shot = self.objective == "supervised" and len(self.data) == 1
        short = few_shot or self.objective == "ufm"
        lr = 0.1 if few_shot else 5e-3 if self.objective == "negation" else 1e-3
        optimizer = self.optimizer.model_copy(
            update={
                "lr": self.optimizer.lr or lr,
                "weight_decay": 0.1 if self.optimizer.weight_decay is None else self.optimizer.weight_decay,
            }
        )
        epochs = self.epochs or (None if self.steps else 10 if short else 20)
        schedule = self.schedule or ("cosine" if short else "constant")
        return self.model_copy(update={"optimizer": optimizer, "epochs": epochs, "schedule": schedule})
