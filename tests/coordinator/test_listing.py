"""What an operator reads of a run in a terminal is what the dashboard shows, and the journal is read across restarts."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
from pathlib import Path
import re
import subprocess
import sys
import threading

from click.testing import CliRunner
import pytest

from coordinator.cli import main
from coordinator.journal import Journal
from coordinator.listing import event_line, events, partitions
from tests.test_imports import _loaded

from .conftest import World
from .fakes import make_shard, until


def show(world: World, *command: str) -> str:
    shown = CliRunner().invoke(main, [*command, "--run-dir", str(world.root)])
    assert shown.exit_code == 0, shown.output
    return shown.output


def columns(text: str, key: str) -> dict[str, str]:
    """The row whose first cell is `key`, by the names in the head."""
    head, *rows = (re.split(r"  +", line) for line in text.splitlines())
    (row,) = [row for row in rows if row[0] == key]
    return dict(zip(head, row, strict=False))


def test_the_lists_say_what_the_snapshot_says(world: World) -> None:
    node = world.node("laptop")
    assignment, shard = node.lease(1), make_shard(world.run, 1)
    node.heartbeat(assignment.lease_id)
    assert columns(show(world, "experts"), "1")["node"] == "laptop"
    assert columns(show(world, "nodes"), "laptop")["partition"] == "1"
    node.hand_in(assignment, shard, world.run_id)
    node.verdict(assignment, shard, world.run_id)
    until(lambda: world.jobs.calls.count("evaluate") == 2)
    until(lambda: json.loads(show(world, "status", "--json"))["snapshot"]["quality"]["experts"] == 1)
    snapshot = json.loads(show(world, "status", "--json"))["snapshot"]
    assert json.loads(show(world, "experts", "--json")) == snapshot["experts"]
    nodes = json.loads(show(world, "nodes", "--json"))
    assert [row["name"] for row in nodes["shown"]] == ["laptop"] and nodes["total"] == snapshot["nodes"]["total"]
    rows = json.loads(show(world, "partitions", "--json"))
    assert [row["partition"] for row in rows] == [0, 1, 2] and rows[1]["tokens"] == snapshot["experts"][1]["tokens"]
    assert columns(show(world, "experts"), "1")["state"] == "accepted"
    assert columns(show(world, "nodes"), "laptop")["accepted"] == "1"
    assert "laptop" in show(world, "nodes", "list")


@pytest.mark.parametrize("insecure", [0, 1])
def test_the_snapshot_of_a_run_with_many_experts_is_read_whole(make_world: Callable[[], World], insecure: int,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    world = make_world()
    snapshots = world.start(insecure=insecure)._desk.snapshots
    large = snapshots.take() | {"evaluations": ["x" * 5_000_000]}
    monkeypatch.setattr(snapshots, "take", lambda: large)
    assert json.loads(show(world, "status", "--json"))["snapshot"]["evaluations"] == large["evaluations"]


def test_a_partition_has_its_text_and_its_perplexities_as_far_as_they_are_known() -> None:
    snapshot = {"experts": [{"partition": 0, "tokens": 7}, {"partition": 1, "tokens": 8}], "baseline": None,
                "topics": [{"partition": 1, "documents": 3, "words": ["sail"], "sample": "The sail."}],
                "quality": {"partitions": [9.5]}}  # fmt: skip
    assert partitions(snapshot) == [
        {"partition": 0, "tokens": 7, "documents": None, "words": [], "perplexity": 9.5, "shared_perplexity": None},
        {"partition": 1, "tokens": 8, "documents": 3, "words": ["sail"], "perplexity": None, "shared_perplexity": None}]


@pytest.mark.parametrize("command", ["nodes", "experts", "partitions"])
def test_without_a_coordinator_there_is_one_sentence(command: str, tmp_path: Path) -> None:
    ended = CliRunner().invoke(main, [command, "--run-dir", str(tmp_path)])
    assert ended.exit_code == 7 and ended.output.startswith("error: No coordinator runs in ")
    ended = CliRunner().invoke(main, ["events", "--run-dir", str(tmp_path)])
    assert ended.exit_code == 6 and "is not a coordinator's run directory" in ended.output


def test_events_are_read_without_a_coordinator_and_followed_across_its_restart(world: World) -> None:
    world.node("laptop")
    world.stop()
    kept = (world.root / "events.jsonl").read_text()
    assert show(world, "events", "--json") == kept
    process = subprocess.Popen([sys.executable, "-m", "coordinator.cli", "events", "--follow", "--json", "--run-dir",
                                str(world.root)], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONUNBUFFERED": "1"})  # fmt: skip
    seen: list[dict[str, object]] = []
    assert process.stdout is not None
    lines = process.stdout
    threading.Thread(target=lambda: seen.extend(json.loads(line) for line in lines), daemon=True).start()
    try:
        until(lambda: len(seen) == len(kept.splitlines()), 30)
        with open(world.root / "events.jsonl", "a") as journal:
            journal.write('{"ts": "2026-01-01T00:00:00.000+00:00", "ev')  # A coordinator that was killed as it wrote.
            journal.write('{"not": "an event"}\n')
        world.start()
        until(lambda: [event["event"] for event in seen].count("started") == 2, 30)
    finally:
        process.kill()
        process.wait()
        lines.close()


def test_what_needs_no_coordinator_finds_the_run_of_one_that_is_stopped(world: World, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "of-forge-run").mkdir(parents=True)
    Path("runs", "tiny").symlink_to(world.root)
    world.node("laptop")
    world.stop()
    for command, words in ((["events"], "started"), (["token", "list"], "used up"), (["nodes", "list"], "laptop")):
        shown = CliRunner().invoke(main, command)
        assert shown.exit_code == 0 and words in shown.output, shown.output
    assert CliRunner().invoke(main, ["status"]).exit_code == 7
    Path("runs", "copy").symlink_to(world.root)
    several = CliRunner().invoke(main, ["events"])
    assert several.exit_code == 3 and "runs/copy, runs/tiny are coordinators' run directories" in several.stderr


def test_an_event_for_people_is_its_sentence_or_its_facts() -> None:
    at = '"ts": "2026-01-01T12:00:00.000+00:00"'
    joined = event_line(f'{{{at}, "event": "joined", "node_id": "ab", "name": "ada"}}')
    assert joined.endswith("joined             node_id=ab  name=ada")
    assert event_line(f'{{{at}, "event": "experts", "sentence": "nodes can train", "total": 3}}').endswith("nodes can train")


def test_reading_events_imports_nothing_heavy(world: World) -> None:
    assert _loaded("coordinator.cli", "events", "--run-dir", str(world.root)) == set()


def test_a_line_that_a_kill_cut_swallows_no_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path, lambda _: None)
    journal.event("before")
    for torn in (b'{"ts": "2026-01-01T00:00:00.000+00:00", "ev', b"\xc3"):
        with open(path, "ab") as file:
            file.write(torn)  # A coordinator that was killed as it wrote.
        journal.event("after")
    assert [json.loads(line)["event"] for line in events(tmp_path)] == ["before", "after", "after"]
