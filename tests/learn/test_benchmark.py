"""The cost benchmark runs in a small form, and its two forms of the gradient agree."""

import json

from examples.benchmarks import atlas_cost


def test_the_benchmark_measures_all_three_forms(monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv",
        ["atlas_cost", "--shapes", "tiny", "--device", "cpu", "--tasks", "3", "--steps", "2", "--warm", "1",
         "--baseline-steps", "1", "--bank", "float32"],
    )  # fmt: skip
    atlas_cost.main()
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"] == 3
    assert min(found["plain_ms"], found["composed_ms"], found["functional_ms"]) > 0
    assert found["bank_gib"] == round(3 * 4 * found["parameters"] / 2**30, 3)
    # bfloat16 autocast on both sides; the composed weights differ in the last bits of float32
    assert found["gradient_difference"] < 0.02
