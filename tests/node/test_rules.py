from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from node.guest import Guest
from node.rules import Hours, Rules

from .fakes import SignsInFiles


def _at(text: str) -> datetime:
    return datetime.fromisoformat(f"2026-03-10T{text}")


@pytest.mark.parametrize(("hours", "moment", "inside", "opens"), [
    ("22-7", "23:00", True, "22:00"),
    ("22-7", "06:59:59", True, "22:00"),
    ("22-7", "07:00", False, "22:00"),
    ("22-7", "21:59:59", False, "22:00"),
    ("8:30-12,14-18", "08:29", False, "08:30"),
    ("8:30-12,14-18", "12:00", False, "14:00"),
    ("8:30-12, 14-18", "17:59", True, "08:30"),
    ("0-24", "00:00", True, "00:00"),
    ("22-24", "23:59", True, "22:00"),
    ("24-2", "01:00", True, "00:00"),
])  # fmt: skip
def test_hours(hours: str, moment: str, inside: bool, opens: str) -> None:
    spans = Hours.parse(hours)
    assert spans.include(_at(moment)) is inside
    opening = spans.opening(_at(moment))
    assert f"{opening:%H:%M}" == opens and opening > _at(moment)
    assert spans.include(opening)


@pytest.mark.parametrize("text", ["", "22", "22-25", "7-7", "22-7-9", "22-7;", "a-b", "22-7,", "7:60-8"])
def test_wrong_hours(text: str) -> None:
    with pytest.raises(ValueError, match="is not a span of hours: write for example 22-7"):
        Hours.parse(text)


def test_the_first_rule_that_forbids_is_named(tmp_path: Path) -> None:
    senses, rules = SignsInFiles(tmp_path), Rules(idle=True, hours=Hours.parse("22-7"))
    assert rules.hold(_at("23:00"), senses) is None
    (tmp_path / "owner").touch()
    assert "in use" in str(rules.hold(_at("23:00"), senses))
    (tmp_path / "battery").touch()
    assert "battery" in str(rules.hold(_at("23:00"), senses))
    assert str(rules.hold(_at("12:00"), senses)) == "outside the hours 22-7; goes on at 22:00"
    assert Rules(on_battery=True).hold(_at("12:00"), senses) is None


def test_a_pause_goes_before_the_rules_and_ends_at_its_time(tmp_path: Path) -> None:
    now = [_at("21:00")]
    guest = Guest(Rules(hours=Hours.parse("0-24")), SignsInFiles(tmp_path), lambda: now[0])
    guest.pause(5400)
    assert str(guest.hold()) == "paused by its owner; goes on at 22:30, or with `forge-node resume`"
    now[0] = _at("22:30")
    assert guest.hold() is None
    guest.pause(86400)
    assert "goes on at 22:30 on 2026-03-11, or with" in str(guest.hold())
    guest.finish()
    assert guest.hold() is None and guest.leaving


def test_a_wait_ends_when_the_owner_says_something(tmp_path: Path) -> None:
    guest = Guest(Rules(), SignsInFiles(tmp_path))
    guest.resume()
    guest.wait(3600)
