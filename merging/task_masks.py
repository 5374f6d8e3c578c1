"""One shared vector, and for each task a mask of one bit an entry: several models out of one merge.

EMR (arXiv:2405.17461) and TALL masks (arXiv:2405.07813) keep every task's model within reach: θ_t ≈ θ0 + λ_t M_t ⊙ τ,
for a task whose name is known when the model is used. A folder of them holds `shared.safetensors`, an ordinary task
vector, and `TASK.mask.safetensors` for each task: its bits, eight to a byte, and its scale.
"""

import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from merging.method import method, weighted
from taskvec.checkpoint import Checkpoint, content_hash
from taskvec.deltas import Deltas, ModelDeltas, Task, Tile
from taskvec.errors import MismatchError, NotAModelError, UsageError, did_you_mean
from taskvec.moments import CHUNK, exact, rounded_sum
from taskvec.plan import Kernel
from taskvec.precision import is_float
from taskvec.source import DeltaSource, LowRank, TensorInfo, TensorSource
from taskvec.sweep import Options, Stage, sweep
from taskvec.vector import FORMAT as VECTOR
from taskvec.vector import TaskVector, assert_alike
from taskvec.writer import CheckpointWriter, check_output

Rule = Literal["emr", "tall"]
FORMAT = "taskvec-task-mask"
_RESERVE = 512


def masks_of(tile: Tile, shared: Tensor, rule: Rule, mask_scale: Sequence[float]) -> Tensor:
    """The tasks' masks over a shared vector, bool [task, *n].

    Args:
        tile: the task vectors.
        shared: EMR's elected vector, or the sum of the task vectors.
        rule: "emr": 1[τ_t ⊙ τ > 0]; "tall": 1[|τ_t| ≥ λ_t |τ - τ_t|].
        mask_scale: λ_t of TALL masks, one for each task.
    """
    stack = weighted(tile)
    if rule == "emr":
        return torch.stack([row.sign() * shared.sign() > 0 for row in stack])
    return torch.stack([row.abs() >= (shared - row).abs_().mul_(scale) for row, scale in zip(stack, mask_scale)])


def write_task_masks(
    base: TensorSource,
    models: Mapping[str, TensorSource],
    out: "str | os.PathLike[str]",
    *,
    rule: Rule = "emr",
    mask_scale: "float | Sequence[float]" = 0.4,
    options: Options | None = None,
) -> Path:
    """Writes the shared vector and the tasks' masks and scales into a new folder, in one pass over the models.

    Args:
        base: the model that all were tuned from.
        models: the fine-tunes (or differences to the base) by task; a name becomes a file name.
        out: the folder to make.
        rule: "emr" or "tall". EMR's scales are Σ|τ_t| / Σ|M_t ⊙ τ| over the whole model (the paper; one version of the
            authors' code averages over tensors instead); TALL masks have none.
        mask_scale: λ_t of TALL masks, one number or one for each task (0.2 … 0.6 in the paper, by validation).
        options: memory and threads.

    Raises:
        UsageError: no models, or names that cannot be files.
        MismatchError: models that do not fit the base.
        OutputExistsError: the folder exists.
    """
    tasks = list(models)
    odd = [task for task in tasks if not task or "/" in task or task.startswith(".")]
    if not tasks or odd:
        raise UsageError(f"task names become file names; {odd[0]!r} cannot be one" if odd else "there are no models")
    scales = list(mask_scale) if isinstance(mask_scale, Sequence) else [float(mask_scale)] * len(tasks)
    if len(scales) != len(tasks):
        raise UsageError(f"mask_scale: {len(scales)} values for {len(tasks)} tasks")
    inputs = [Task(task, source, is_delta=isinstance(source, DeltaSource)) for task, source in models.items()]
    wholes = {task.name: task.source for task in inputs if not task.is_delta}
    if wholes:
        assert_alike(base, wholes)
    names = [name for name, info in base.infos.items() if is_float(info.dtype) and name not in base.aliases]
    deltas = ModelDeltas(base, inputs, names)
    folder = Path(out).expanduser().absolute()
    check_output(folder, [], overwrite=False)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _fill(deltas, base, partial, rule, scales, options or Options())
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _fill(
    deltas: ModelDeltas, base: TensorSource, folder: Path, rule: Rule, scales: Sequence[float], options: Options
) -> None:
    infos = dict(deltas.infos)
    bits = {name: TensorInfo((-(-info.numel // 8),), torch.uint8) for name, info in infos.items()}
    combine = method("emr" if rule == "emr" else "task_arithmetic").stage({})
    lock = threading.Lock()
    own, kept = [0] * len(deltas.tasks), [0] * len(deltas.tasks)
    with ExitStack() as stack:
        shared = stack.enter_context(
            CheckpointWriter(folder / "shared.safetensors", infos, reserve=_RESERVE + len(base.label))
        )
        writers = [
            stack.enter_context(CheckpointWriter(folder / f"{task}.mask.safetensors", bits, reserve=_RESERVE))
            for task in deltas.tasks
        ]

        def start(deltas: Deltas) -> Kernel:
            kernel = combine.start(deltas)
            assert callable(kernel)

            def masked(tile: Tile) -> Tensor:
                merged: Tensor = kernel(tile)
                masks = masks_of(tile, merged, rule, scales)
                for task, (writer, mask, row) in enumerate(zip(writers, masks, weighted(tile))):
                    packed = np.packbits(mask.reshape(-1).cpu().numpy(), bitorder="little")
                    writer.write(tile.name, torch.from_numpy(packed), tile.start // 8)
                    one, two = _l1(row), _l1(merged * mask)
                    with lock:
                        own[task] += one
                        kept[task] += two
                return merged

            return masked

        def sink(tile: Tile) -> None:
            assert tile.merged is not None
            shared.write(tile.name, tile.merged, tile.start)

        sweep(deltas, [Stage(rule, "combine", start)], sink, options=options)
        # the base's content was hashed on the way
        facts = {"format": VECTOR, "version": 1, "base_hash": content_hash(base), "base": base.label, "label": rule}
        shared.finish(metadata={"taskvec": json.dumps(facts)})
        for task, writer, one, two in zip(deltas.tasks, writers, own, kept):
            scale = rounded_sum(one) / rounded_sum(two) if rule == "emr" and two else 1.0
            about = {"format": FORMAT, "version": 1, "task": task, "rule": rule, "scale": scale}
            writer.finish(metadata={"taskvec": json.dumps(about)})


def _l1(values: Tensor) -> int:
    """The L1 norm, summed exactly over pieces that do not depend on the tile."""
    return sum(exact(float(piece.double().abs().sum())) for piece in values.reshape(-1).split(CHUNK))


class TaskMasks:
    """A folder of one shared vector and the tasks' masks.

    Attributes:
        tasks: the names, sorted.
        scales: λ_t by task.
        shared: the shared task vector.
    """

    def __init__(self, folder: "str | os.PathLike[str]"):
        path = Path(folder)
        if not (path / "shared.safetensors").is_file():
            raise NotAModelError(f"{path}: no shared.safetensors in it; write_task_masks makes such a folder")
        self.shared = TaskVector.load(path / "shared.safetensors")
        self._masks: dict[str, Checkpoint] = {}
        self.scales: dict[str, float] = {}
        for file in sorted(path.glob("*.mask.safetensors")):
            source = Checkpoint.open_file(file)
            facts: dict[str, Any] = json.loads(source.metadata.get("taskvec", "{}"))
            if facts.get("format") != FORMAT:
                raise NotAModelError(f"{file}: its header does not say that it holds a task's mask")
            wrong = [
                n for n, i in self.shared.infos.items() if n not in source.infos or source.infos[n].numel * 8 < i.numel
            ]
            if wrong:
                raise MismatchError([f"{name}: {file.name} has no mask for it" for name in wrong])
            self._masks[facts["task"]] = source
            self.scales[facts["task"]] = float(facts["scale"])
        self.tasks = tuple(self._masks)

    def vector(self, task: str) -> TaskVector:
        """A task's vector λ_t M_t ⊙ τ, read lazily; `.apply_to(base)` is its model.

        Raises:
            UsageError: there is no such task.
        """
        if task not in self._masks:
            raise UsageError(f"there is no mask for task {task!r}." + did_you_mean(task, self._masks))
        masked = _Masked(f"{task} ({self.shared.label})", self.shared, self._masks[task], self.scales[task])
        return TaskVector([(1.0, masked)], base_hash=self.shared.base_hash)


class _Masked:
    def __init__(self, label: str, shared: TaskVector, masks: Checkpoint, scale: float):
        self.label, self._shared, self._bits, self._scale = label, shared, masks, scale
        self.infos, self.aliases = shared.infos, shared.aliases

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        return self.read_flat(name, 0, info.numel).view(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        first = start // 8
        packed = self._bits.read_flat(name, first, -(-stop // 8)).numpy()
        bits = np.unpackbits(packed, bitorder="little")[start - 8 * first : stop - 8 * first]
        values = self._shared.read_flat(name, start, stop) * torch.from_numpy(bits)
        return values * self._scale

    def low_rank(self, name: str) -> LowRank | None:
        return None
