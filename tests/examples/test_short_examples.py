"""Every short script in examples/ runs as a user would run it, and prints what it promises."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMISED = {
    "merge_checkpoints": r"merged 3 fine-tunes into 28832 parameters; logits moved by up to 0\.\d+",
    "merge_in_memory": r"loss (?P<before>1\.\d+) at the base, (?P<after>0\.\d+) merged at scale [\d.]+",
    "merge_lora": r"merged 2 adapters into 28832 parameters; logits differ from math alone by up to 0\.\d+",
    "task_vectors": r"norms 1\.\d+ and 1\.\d+, cosine [+-]0\.\d+\noutputs moved by \d\.\d+, then back",
}
# tests/readme runs it against README.md
ELSEWHERE = {"readme_tables"}
# peft 0.21 reads a property that transformers 5.23 calls deprecated
PEFT = r"ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"


@pytest.mark.filterwarnings(PEFT)
@pytest.mark.parametrize("name", sorted(PROMISED))
def test_script_prints_what_it_promises(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(PROMISED[name], capsys.readouterr().out)


def test_no_short_script_is_left_untested():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"__init__"}
    assert scripts == set(PROMISED) | ELSEWHERE
