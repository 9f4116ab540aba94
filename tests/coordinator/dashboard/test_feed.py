from __future__ import annotations

import json
from typing import Any

import pytest

from coordinator.dashboard.feed import Feed


def snapshot(**sections: Any) -> dict[str, Any]:
    return {"now": 5.0, "curves": {}, **sections}


def read(event: bytes) -> tuple[str, dict[str, Any]]:
    head, data = event.decode().removesuffix("\n\n").split("\n")
    return head.removeprefix("id: "), json.loads(data.removeprefix("data: "))


def test_a_new_reader_gets_everything_and_then_what_changed() -> None:
    feed = Feed()
    feed.update(snapshot(phase="shared", experts=[1, 2]))
    seen, told = read(feed.event(""))
    assert told == {"now": 5.0, "full": True, "sections": {"phase": "shared", "experts": [1, 2]}}
    feed.update(snapshot(phase="router", experts=[1, 2]))
    seen, told = read(feed.event(seen))
    assert told == {"now": 5.0, "full": False, "sections": {"phase": "router"}}
    feed.update(snapshot(phase="router", experts=[1, 2]))
    assert feed.newest == seen
    assert read(feed.event(seen)) == (seen, {"now": 5.0, "full": False, "sections": {}})


def test_a_reader_that_was_away_skips_what_was_in_between() -> None:
    feed = Feed()
    feed.update(snapshot(phase=0, experts=0))
    seen, _ = read(feed.event(""))
    for number in range(1, 100):
        feed.update(snapshot(phase=number, experts=0))
    _, told = read(feed.event(seen))
    assert told["sections"] == {"phase": 99}


def test_a_curve_is_a_section_of_its_own() -> None:
    feed = Feed()
    feed.update(snapshot(curves={"0": [(1, 3.0)], "1": [(1, 3.5)]}))
    seen, told = read(feed.event(""))
    assert told["sections"] == {"curve 0": [[1, 3.0]], "curve 1": [[1, 3.5]]}
    feed.update(snapshot(curves={"0": [(1, 3.0)], "1": [(1, 3.5), (2, 3.4)]}))
    assert read(feed.event(seen))[1]["sections"] == {"curve 1": [[1, 3.5], [2, 3.4]]}


@pytest.mark.parametrize("after", ["", "x", "other.3", "{boot}.", "{boot}.x", "{boot}.99", "{boot}.-1", "{boot}.²",
                                   "{boot}." + "9" * 5000])  # fmt: skip
def test_an_id_of_another_process_or_of_nobody_gets_everything(after: str) -> None:
    feed = Feed()
    feed.update(snapshot(phase="shared"))
    assert read(feed.event(after.format(boot=feed.boot)))[1]["full"] is True


def test_a_line_feed_in_a_name_does_not_end_the_event() -> None:
    feed = Feed()
    feed.update(snapshot(nodes="a\n\ndata: {}\r\u2028"))
    assert read(feed.event(""))[1]["sections"] == {"nodes": "a\n\ndata: {}\r\u2028"}
