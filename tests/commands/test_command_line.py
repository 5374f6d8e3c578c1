"""The command line: results on stdout, messages on stderr, exit codes 0, 1, 2."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


def test_help_imports_nothing_heavy():
    code = "import sys\nfrom merging.commands import main\ntry:\n main(['--help'])\nexcept SystemExit: pass\nprint([m for m in ('torch', 'pydantic', 'numpy', 'rich', 'transformers') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "merge" in done.stdout and "verify" in done.stdout


def test_the_package_itself_imports_without_torch():
    code = "import sys, taskvec, merging\nprint([m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_merge_by_flags_is_the_merge_by_the_recipe_they_print(zoo, tmp_path, run):
    flags = [
        "--base",
        zoo.base,
        "--method",
        "pcb",
        "-p",
        "density=0.2",
        "-w",
        "1",
        "-w",
        "0.5",
        "--seed",
        "4",
        tmp_path / "a",
        *zoo.tuned[:2],
    ]
    code, recipe, _ = run("merge", "--dry-run", *flags)
    assert code == 0 and not (tmp_path / "a").exists()
    (tmp_path / "r.yaml").write_text(recipe)
    assert run("merge", *flags)[0] == 0
    code, out, _ = run("merge", tmp_path / "r.yaml", tmp_path / "b", "--json")
    assert code == 0 and json.loads(out)["method"]["parameters"]["density"] == 0.2
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all((one[name] == two[name]).all() for name in one)


def test_check_reads_headers_and_tells_the_cost(zoo, tmp_path, run):
    (tmp_path / "r.yaml").write_text(json.dumps(zoo.recipe(method="pcb")))
    code, out, _ = run("check", tmp_path / "r.yaml", tmp_path / "out", "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"] and found["passes"] == 3 and found["tensors merged"] == 9
    assert not (tmp_path / "out").exists()
    code, out, _ = run("check", tmp_path / "r.yaml")
    assert code == 0 and "bytes to read" in out and "peak working memory" in out


def test_refusals_exit_with_1_and_say_so_in_json_too(zoo, tmp_path, run):
    (tmp_path / "r.yaml").write_text(json.dumps(zoo.recipe(method="tie", parameters={"densty": 1})))
    code, out, err = run("merge", tmp_path / "r.yaml", tmp_path / "out", "--json")
    assert code == 1 and "Did you mean 'ties'" in err
    assert any("'tie'" in problem for problem in json.loads(out)["problems"])
    code, out, err = run("check", tmp_path / "nothing.yaml")
    assert code == 1 and "no such file" in err and out == ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["merg"], "Did you mean 'merge'"),
        (["merge", "x"], "give a recipe and an output"),
        (["merge", "out", "model"], "name a --method"),
        (["merge", "-m", "pcb", "-w", "1", "out", "a", "b"], "1 weights for 2 models"),
        (["merge", "-m", "pcb", "-p", "density", "out", "a"], "write it as NAME=VALUE"),
        (["merge", "-m", "pcb", "-p", "density=1", "-p", "density=2", "out", "a"], "given twice"),
        (["merge", "r.yaml", "out", "extra"], "one argument too many"),
        (["merge", "--no-such-flag"], "No such option"),
        (["methods", "pbc"], "Did you mean 'pcb'"),
        (["verify"], "Missing argument"),
    ],
)
def test_wrong_usage_exits_with_2(run, args, words):
    code, _, err = run(*args)
    assert code == 2 and words in err


def test_a_value_that_is_not_yaml_is_named(zoo, tmp_path, run):
    code, _, err = run(
        "merge", "--base", zoo.base, "--method", "ties", "-p", "density=[0.1", tmp_path / "out", zoo.base
    )
    assert code == 2 and "-p 'density=[0.1': the value is not YAML" in err and "Trace" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_what_the_system_refuses_is_one_line_and_leaves_nothing(zoo, tmp_path):
    line = f"ulimit -f 8; exec {sys.executable} -m merging merge --base {zoo.base} --method ties {tmp_path}/out {zoo.tuned[0]}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "writing model.safetensors failed (File too large)" in done.stderr
    assert "Trace" not in done.stderr and not list(tmp_path.glob("out*"))


def test_a_warning_is_said_once(zoo, tmp_path, run):
    for model in (zoo.base, zoo.tuned[0]):
        state = load_file(model / "model.safetensors") | {"steps": torch.tensor([len(model.name)])}
        save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("merge", "--base", zoo.base, "-m", "task_arithmetic", tmp_path / "out", zoo.tuned[0])
    assert code == 0 and err.count("integers are never averaged") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_merge_does_without_streams_that_are_closed(zoo, tmp_path, closed):
    line = f"exec {sys.executable} -m merging merge --base {zoo.base} -m ties {tmp_path}/out {zoo.tuned[0]} {closed}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == zoo.base_state.keys()


def test_an_output_that_is_there_is_not_said_to_be_missing(zoo, tmp_path):
    line = f"exec {sys.executable} -m merging merge --base {zoo.base} -m ties {tmp_path}/out {zoo.tuned[0]} > /dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: no space left on device.\n")
    assert (tmp_path / "out").is_dir()


def test_paths_whose_bytes_are_no_text_are_merged_verified_and_printed(zoo, tmp_path):
    odd, out = (os.fsdecode(os.fsencode(tmp_path) + name) for name in (b"/tuned\xe9", b"/out\xe9"))
    os.rename(zoo.tuned[0], odd)
    for command in (["merge", "--base", zoo.base, "-m", "ties", out, odd], ["verify", "--deep", out], ["inspect", odd]):
        done = subprocess.run([sys.executable, "-m", "merging", *command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "") and r"\udce9" in done.stdout
    assert r"tuned\udce9" in (Path(out) / "README.md").read_text("utf-8")


def test_methods_lists_and_explains(run):
    code, out, _ = run("methods", "--json")
    assert code == 0 and {"pcb", "ties", "slerp", "dare"} <= {entry["name"] for entry in json.loads(out)}
    code, out, _ = run("methods", "pcb")
    assert "fraction of each task vector kept" in out


def test_methods_advises_on_models(zoo, run):
    code, out, _ = run("methods", "--advise", zoo.base, *zoo.tuned, "--json")
    found = json.loads(out)
    assert code == 0 and all(finding["text"] and finding["source"] for finding in found)
    assert any(finding["method"] == "task_arithmetic" for finding in found)
    code, out, _ = run("methods", "--advise", zoo.base, *zoo.tuned)
    assert code == 0 and len(out.splitlines()) >= len(found)
    assert run("methods", "--advise", zoo.base)[0] == 2


def test_diff_apply_and_inspect(zoo, tmp_path, run):
    assert run("diff", zoo.base, zoo.tuned[0], tmp_path / "v")[0] == 0
    assert run("apply", zoo.base, tmp_path / "v", tmp_path / "again", "--scale", "0.5")[0] == 0
    code, out, _ = run("inspect", tmp_path / "v", "--json", "--tensors", "--hash")
    found = json.loads(out)
    assert code == 0 and found["kind"] == "task vector" and found["tensors"] == 9 and len(found["tensor_list"]) == 9
    code, _, err = run("apply", zoo.tuned[1], tmp_path / "v", tmp_path / "wrong")
    assert code == 1 and "made from another base" in err and not (tmp_path / "wrong").exists()
    assert run("apply", zoo.tuned[1], tmp_path / "v", tmp_path / "forced", "--force")[0] == 0
    code, out, _ = run("inspect", zoo.base)
    assert code == 0 and "llama" in out


def test_compare_in_numbers_and_pictures(zoo, tmp_path, run):
    code, out, _ = run("compare", "--base", zoo.base, *zoo.tuned, "--json", "--plot", tmp_path / "c.png")
    layers = json.loads(out)["layers"]
    assert code == 0 and layers[-1]["name"] == "whole model"
    assert layers[-1]["cosines"][0][0] == pytest.approx(1)
    assert sum(layer["norms"][0] ** 2 for layer in layers[:-1]) == pytest.approx(layers[-1]["norms"][0] ** 2)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert run("compare", "--base", zoo.base, *zoo.tuned, "--plot", tmp_path / "c.svg")[0] == 0
    code, _, err = run("compare", "--base", zoo.base, *zoo.tuned, "--plot", tmp_path / "c.txt")
    assert code == 2 and "end the name in .png" in err


def test_verify_from_the_command_line(zoo, tmp_path, run):
    assert run("merge", "--base", zoo.base, "-m", "ties", tmp_path / "out", *zoo.tuned)[0] == 0
    code, out, _ = run("verify", tmp_path / "out", "--deep")
    assert code == 0 and "come out the same again" in out
    (tmp_path / "out" / "config.json").unlink()
    code, _, err = run("verify", tmp_path / "out")
    assert code == 1 and "config.json changed or missing" in err


def test_progress_is_a_plain_line_where_there_is_no_terminal(capfd, monkeypatch):
    from merging.commands.output import progress_bar
    from taskvec.sweep import Progress

    moments = iter([5.0, 6.0, 20.0, 21.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    with progress_bar() as update:
        update(Progress("merging", 1, 10, 100))
        update(Progress("merging", 1, 50, 100))
        update(Progress("merging", 1, 60, 100))
    assert capfd.readouterr().err == "pass 1, merging: 50%, 0 MB/s, 15 s left\n"  # 50 of 100 after 15 s


# -- killed and interrupted -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow_zoo(tmp_path_factory):
    """Large enough that a merge takes a moment."""
    import torch

    from taskvec import in_memory, write

    folder = tmp_path_factory.mktemp("slow")
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(700, 900, generator=generator) for i in range(6)}
    write(in_memory(base), folder / "base")
    for index in range(3):
        write(
            in_memory({k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in base.items()}),
            folder / f"ft{index}",
        )
    return folder


def start(folder, out):
    command = [
        sys.executable, "-m", "merging", "merge", "--base", folder / "base", "-m", "pcb", "--shard-size", "3MB", out,
        *(folder / f"ft{i}" for i in range(3)),
    ]  # fmt: skip
    return subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_at_twenty_moments_the_output_is_absent_or_whole(slow_zoo, tmp_path):
    from merging import verify

    began = time.monotonic()
    whole = start(slow_zoo, tmp_path / "whole")
    whole.communicate()
    took = min(time.monotonic() - began, 10)  # a machine that was busy then need not be slept for twenty times
    assert whole.returncode == 0
    seen = set()
    for moment in range(20):
        out = tmp_path / "out"
        process = start(slow_zoo, out)
        time.sleep(took * (0.35 + 0.7 * moment / 19))
        process.kill()
        process.communicate()
        if out.exists():
            verify(out)
            seen.add("whole")
            for path in sorted(out.iterdir()):
                path.unlink()
            out.rmdir()
        else:
            seen.add("absent")
    assert "absent" in seen
    process = start(slow_zoo, tmp_path / "out")
    _, err = process.communicate()
    assert process.returncode == 0, err
    verify(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_merge_soon_and_leaves_neither_output_nor_lock(slow_zoo, tmp_path, number):
    process = start(slow_zoo, tmp_path / "out")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the merge was done before the signal came")
    assert process.returncode == 128 + number and "interrupted" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*lock"))


# what a shell starts in the background ignores SIGINT, and so does what that starts
_HEEDING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_load_ends_the_program_at_once(tmp_path, number):
    """An exception would be lost in the import system, or abort the process in the midst of torch's C++."""
    (tmp_path / "torch.py").write_text(
        f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\n    import this\nexcept BaseException:\n    os._exit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", _HEEDING + "from merging.commands import run; run()", "merge", "-m", "ties", "out", "a", "b"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr == "interrupted before anything was begun\n"


def test_two_runs_for_one_output_do_not_mix(slow_zoo, tmp_path):
    from merging import verify

    first, second = start(slow_zoo, tmp_path / "out"), start(slow_zoo, tmp_path / "out")
    results = [(process.communicate()[1], process.returncode) for process in (first, second)]
    assert sorted(code for _, code in results) == [0, 1], results
    assert any("another run is writing this output" in err or "exists already" in err for err, _ in results)
    verify(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
