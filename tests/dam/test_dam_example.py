"""The miniature runs from end to end; what it shows takes minutes and is in its README."""

import json
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_miniature_measures_every_row_and_draws_the_curve(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "dam"))
    import miniature

    arguments = ["--out", str(tmp_path), "--seeds", "0", "--steps", "2", "--tune-steps", "5", "--processes", "1"]
    text = miniature.main([*arguments, "--triggers", "1", "--several", "0", "--wide", "0"])
    assert "DAM + trigger inversion" in text
    assert "plain merge, λ = 0.5" in text
    record = json.loads((tmp_path / "seed-0-0.json").read_text())["one model: corner patch"]
    assert record["rows"]["Concrete"]["success"]["digits"]["total"] > 200
    assert (tmp_path / "dam.png").stat().st_size > 10_000
    sys.modules.pop("world", None)
