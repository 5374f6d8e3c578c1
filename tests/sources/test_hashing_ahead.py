"""Hashing while the program starts: the same digests, or none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from taskvec import Checkpoint, ahead
from taskvec.checkpoint import tensor_digest

_HASHES = """
import json, os, sys, time
from taskvec import ahead
ahead._RECENT = float(sys.argv[1])
ahead.begin(sys.argv[3:])
process = ahead._running and ahead._running.process
if process:
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)  # until it has hashed everything
exec(sys.argv[2])
from taskvec import Checkpoint
found = ahead.found()
told = {}
for path in sys.argv[3:]:
    if os.path.exists(path) and path.endswith(("model", ".safetensors")):
        checkpoint = Checkpoint.open(path)
        checkpoint.take_digests(found)
        told[path] = checkpoint.known_digests()
print(json.dumps(told))
"""

needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="nothing is hashed ahead on one core")


def hashed(*paths: Path, recent: float = 0.0, meanwhile: str = "") -> dict[str, dict[str, str]]:
    """What a fresh process knows of these paths when it opens them."""
    done = subprocess.run(
        [sys.executable, "-c", _HASHES, str(recent), meanwhile, *map(str, paths)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


@pytest.fixture
def model(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "long": torch.randint(0, 256, ((1 << 22) + 5,), generator=generator, dtype=torch.uint8),
        "matrix": torch.randn(30, 20, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "none": torch.empty(0, 4),
    }
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model"


@needs_two_cores
def test_what_is_hashed_ahead_is_what_a_pass_would_hash(model, tmp_path):
    save_file({"w": torch.arange(12.0)}, tmp_path / "one.safetensors")
    found = hashed(model, tmp_path / "one.safetensors", tmp_path / "no such", Path("not-a/model"))
    for path in (model, tmp_path / "one.safetensors"):
        source = Checkpoint.open(path)
        expected = {name: tensor_digest(source, name) for name, info in source.infos.items() if info.numel}
        assert found[str(path)] == expected


@needs_two_cores
def test_a_file_that_changes_before_it_is_opened_is_hashed_anew(model):
    same_size = f"f = open({str(model / 'model.safetensors')!r}, 'r+b'); f.seek(-1, 2); f.write(b'x'); f.close()"
    assert hashed(model, meanwhile=same_size) == {str(model): {}}


@needs_two_cores
def test_a_file_put_in_the_place_of_another_is_hashed_anew(model, tmp_path):
    file = str(model / "model.safetensors")
    replaced = f"import shutil; shutil.copy2({file!r}, {str(tmp_path / 'copy')!r}); os.replace({str(tmp_path / 'copy')!r}, {file!r})"
    assert hashed(model, meanwhile=replaced) == {str(model): {}}


@needs_two_cores
def test_files_written_a_moment_ago_are_left_to_the_merge(model):
    assert hashed(model, recent=3600.0) == {str(model): {}}


@needs_two_cores
def test_files_that_are_no_checkpoints_are_passed_over(model, tmp_path):
    contents = [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]", b"\x09\0\0\0\0\0\0\0" + b'{"a": {}}']
    for number, content in enumerate(contents):
        (tmp_path / f"odd{number}").mkdir()
        (tmp_path / f"odd{number}" / "broken.safetensors").write_bytes(content)
    odd = [tmp_path / f"odd{number}" for number in range(len(contents))]
    assert len(hashed(*odd, model)[str(model)]) == 4


def test_nothing_is_hashed_ahead_once_torch_is_there(model):
    ahead.begin([model])
    assert ahead._running is None
    assert ahead.found() == {}


@needs_two_cores
def test_a_merge_records_the_same_hashes_however_they_were_made(zoo, tmp_path):
    recorded = []
    for recent in ("0", "3600"):  # hashed ahead, and not
        out = tmp_path / f"out{recent}"
        code = (
            f"import sys, time; from taskvec import ahead; ahead._RECENT = {recent}\n"
            "begin = ahead.begin\n"
            "ahead.begin = lambda models: (begin(models), time.sleep(0.5))\n"
            "from merging.commands import main; main(sys.argv[1:])"
        )
        flags = ["merge", "-m", "task_arithmetic", "--base", str(zoo.base), str(out), *map(str, zoo.tuned)]
        done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        recorded.append(json.loads((out / "taskvec.json").read_text()))
    assert recorded[0] == recorded[1]
