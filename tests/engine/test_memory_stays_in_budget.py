"""Peak resident memory stays under the budget plus 400 MiB, whatever the model's size (real processes)."""

import subprocess
import sys

import pytest
import torch

from taskvec.checkpoint import SEGMENT
from taskvec.source import TensorInfo
from taskvec.writer import CheckpointWriter

CODE = """
import sys
from merging import Recipe, merge
# the process's own peak; ru_maxrss would also count what its parent held when it was started
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
base, out, method, *tasks = sys.argv[1:]
before = peak()
merge(Recipe.from_data({"base": base, "tasks": tasks, "method": method, "memory": "64MiB"}), out)
print(before, peak())
"""
LIBRARIES = 260 << 20  # what torch and the rest take when they are loaded; builds for a GPU take more


def model(folder, numel, seed, tuned):
    infos = {f"layers.{i}.weight": TensorInfo((numel // 8 // 1024, 1024), torch.bfloat16) for i in range(8)}
    with CheckpointWriter(folder, infos) as writer:
        for index, (name, info) in enumerate(infos.items()):
            for start in range(0, info.numel, SEGMENT):
                count = min(SEGMENT, info.numel - start)
                values = torch.randn(count, generator=torch.Generator().manual_seed(index * 1000 + start // SEGMENT))
                if tuned:
                    values += 0.05 * torch.randn(count, generator=torch.Generator().manual_seed(seed * 7 + index))
                writer.write(name, values, start)
        writer.finish()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pcb", "ties"])
def test_the_peak_is_flat_and_below_the_budget_plus_400_mib(tmp_path, method):
    peaks = []
    for size in (16 << 20, 48 << 20):
        paths = [model(tmp_path / f"{size}-{i}", size, i, i > 0) for i in range(4)]
        command = [sys.executable, "-c", CODE, *map(str, [paths[0], tmp_path / f"out-{size}", method, *paths[1:]])]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
        before, peak = map(int, told)
        peaks.append(peak - max(0, before - LIBRARIES))
    assert max(peaks) < (64 + 400) << 20
    assert peaks[1] < 1.25 * peaks[0]
