import pytest

from examples.edits.audit_roc import PLANTS, Row, area, detection, summary


def rows(planted: list[float], clean: list[float]) -> list[Row]:
    return [
        Row(
            f"{kind} {number}", kind == "planted", score, score, int(score > 1), int(score > 1), kind == "planted", None
        )
        for kind, scores in (("planted", planted), ("clean", clean))
        for number, score in enumerate(scores)
    ]


def test_detection_counts_planted_copies_above_what_clean_ones_allow() -> None:
    found = rows([0.5, 2.0, 3.0, 4.0], [1.0] + [0.1] * 19)
    assert detection(found, "alone", 0.0) == 0.75
    # one of twenty clean copies may pass
    assert detection(found, "alone", 0.05) == 1.0
    assert detection(found, "alone", 1.0) == 1.0


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    assert area(rows([3.0, 2.0], [1.0, 0.0]), "alone") == 1.0
    assert area(rows([0.0], [1.0]), "against") == 0.0
    assert area(rows([1.0, 1.0], [1.0]), "alone") == 0.5
    assert area(rows([2.0, 0.5], [1.0, 0.0]), "alone") == pytest.approx(0.75)


def test_the_summary_has_a_line_for_each_way_and_the_plan_covers_what_it_should() -> None:
    lines = summary(rows([2.0, 3.0], [0.1, 0.2])).splitlines()
    assert lines[2] == "| with the base | 2 of 2 | 0 of 2 | 0 of 2 | 100% | 100% | 1.000 |"
    assert lines[3] == "| weights alone | 2 of 2 | 2 of 2 | 0 of 2 | 100% | 100% | 1.000 |"
    assert len(PLANTS) == 20
    assert {plant.form for plant in PLANTS} == {"authors", "in-place", "widen"}
    assert {plant.mix for plant in PLANTS} == {"alone", "sum", "average", "average4", "onto"}
    assert {plant.stored for plant in PLANTS} == {"float32", "bfloat16"}
    assert len({plant.layer for plant in PLANTS}) >= 19
