"""The journal of a coordinator, to which commands append, too; test_listing.py has how it is read."""

from __future__ import annotations

import json
from multiprocessing import get_context
from pathlib import Path

from coordinator.journal import Journal

EVENTS = 2_000


def _write(path: Path, writer: int) -> None:
    journal = Journal(path, lambda _: None)
    for number in range(EVENTS):
        journal.event("written", writer=writer, number=number)


def test_two_processes_append_line_after_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writers = [get_context("spawn").Process(target=_write, args=(path, writer)) for writer in range(2)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    found = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    for writer in range(2):
        assert [event["number"] for event in found if event["writer"] == writer] == list(range(EVENTS))
