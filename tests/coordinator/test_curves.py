from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.curves import MAX_CURVES, MAX_POINTS, SAVE_SECONDS, Curves

from .fakes import Clock


def test_a_long_curve_keeps_its_beginning_its_end_and_even_points() -> None:
    curves = Curves()
    for step in range(1, 100_001):
        curves.add("0", step, 1 / step)
    points = curves.points()["0"]
    assert MAX_POINTS / 3 < len(points) <= MAX_POINTS
    assert points[0] == (1, 1.0) and points[-1][0] == 100_000
    gaps = [after[0] - before[0] for before, after in zip(points, points[1:-1], strict=False)]
    assert max(gaps) <= 4 * min(gaps)


def test_a_step_that_the_curve_is_beyond_begins_again_from_there() -> None:
    curves = Curves()
    for step in (10, 20, 30, 40):
        curves.add("0", step, 3.0)
    curves.add("0", 25, 2.5)
    assert curves.points()["0"] == [(10, 3.0), (20, 3.0), (25, 2.5)]


def test_there_are_not_more_curves_than_a_run_has_and_no_point_that_json_cannot_say() -> None:
    curves = Curves()
    for number in range(MAX_CURVES + 5):
        curves.add(str(number), 1, 3.0)
    curves.add("0", 2, float("nan"))
    assert len(curves.points()) == MAX_CURVES and curves.points()["0"] == [(1, 3.0)]


def test_curves_outlive_the_process(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "curves.json"
    curves = Curves(path, clock)
    curves.add("0", 1, 3.0)
    assert not path.exists()
    clock.now += SAVE_SECONDS
    curves.add("0", 2, 2.0)
    curves.add("0", 3, 1.0)
    assert Curves(path).points() == {"0": [(1, 3.0), (2, 2.0)]}
    curves.save()
    assert Curves(path).points() == curves.points()


@pytest.mark.parametrize("held", ["", "[]", '{"0": 3}', '{"0": [["a", 1]]}', "null"])
def test_a_damaged_file_begins_anew(held: str, tmp_path: Path) -> None:
    (tmp_path / "curves.json").write_text(held)
    assert Curves(tmp_path / "curves.json").points() == {}


def test_a_disk_that_takes_nothing_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    curves = Curves(tmp_path / "file" / "curves.json")
    curves.add("0", 1, 3.0)
    curves.save()
    assert curves.points() == {"0": [(1, 3.0)]}
