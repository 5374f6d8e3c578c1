"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def block(language: str, containing: str) -> str:
    return next(text for text in re.findall(rf"```{language}\n(.*?)```", README, re.S) if containing in text)


@pytest.fixture
def place(zoo, tmp_path, monkeypatch):
    for source, name in (
        (zoo.base, "llama"),
        (zoo.tuned[0], "llama-math"),
        (zoo.tuned[1], "llama-code"),
        (zoo.tuned[2], "llama-chat-lora"),
    ):
        source.rename(tmp_path / name)
    (tmp_path / "recipe.yaml").write_text(block("yaml", "base: llama"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_example_runs(place):
    code = block("python", "merge_stacks")
    exec(compile(code, "README.md", "exec"), {"stack": torch.randn(3, 8, 4)})
    assert (place / "merged" / "taskvec.json").is_file()
    assert (place / "half-math" / "model.safetensors").is_file()


def test_the_commands_run(place, run):
    lines = re.search(r"## Merge\n\n(.*?)```yaml", README, re.S).group(1)
    commands = [line.split("#")[0].split()[1:] for line in lines.splitlines() if line.strip().startswith("taskvec")]
    assert len(commands) == 4
    for command in commands:
        if command[0] == "merge" and (place / "merged").exists():
            command = [*command, "--overwrite"]
        if command[0] == "check":
            command = command[:2]
        code, _, err = run(*command)
        assert code == 0, err


def test_the_table_of_methods_is_that_of_the_catalogue():
    subprocess.run([sys.executable, ROOT / "examples" / "readme_tables.py", "--check"], check=True)


def test_the_set_up_lines_use_the_constraints():
    lines = [line for line in README.splitlines() if line.strip().startswith("python3 -m venv")]
    assert len(lines) == 2 and all("-c constraints.txt torch" in line for line in lines)
    assert "torch==" in (ROOT / "constraints.txt").read_text()
