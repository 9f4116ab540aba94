"""A coordinator process with --push, the unmodified Hub client in it, and a local Hub that fails it."""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
from pathlib import Path
import subprocess

from modularforge.v1 import fleet_pb2 as pb
import pytest

from forge.checkpoint.assembly import arrived
from forge.errors import HubError
from forge.files import RunDirectory
from forge.vocabulary import INDEX_FILE, expert_file
from tests.fakes.hub import FakeHub, Fault, fake_hub

from .fakes import FakeNode, make_shard, until
from .test_kill import Processes, working

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="SIGKILL")]
REPO, TOKEN = "ada/tiny", "hf_good"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        hub.tokens = {TOKEN}
        yield hub


@pytest.fixture
def processes(tmp_path: Path, hub: FakeHub) -> Iterator[Processes]:
    processes = Processes(tmp_path / "run", REPO, HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1",
                          HF_HOME=str(tmp_path / "hf"))  # fmt: skip
    yield processes
    processes.close()


def hand_in(processes: Processes, process: subprocess.Popen[bytes], *partitions: int) -> None:
    """A node comes, and hands in the experts of these partitions; all are accepted."""
    node = working(FakeNode(processes.address(process), "laptop"))
    run = RunDirectory(processes.root)
    for partition in partitions:
        assignment, shard = node.lease(partition), make_shard(run, partition)
        node.hand_in(assignment, shard, run.run_id)
        assert node.verdict(assignment, shard, run.run_id).verdict == pb.Receipt.VERDICT_ACCEPTED
    if 2 in partitions:
        assert node.ask().WhichOneof("answer") == "done"
    node.channel.close()


def assert_whole(hub: FakeHub, experts_by_commit: list[int]) -> None:
    """Every commit has the files that its index names, with the bytes that its manifest names, and a card."""
    commits = hub.repos[REPO].commits[1:]
    assert [commit.message for commit in commits] == [f"{experts} of 3 experts" for experts in experts_by_commit]
    for commit, experts in zip(commits, experts_by_commit, strict=True):
        index = json.loads(commit.tree[INDEX_FILE][0])
        assert set(index["weight_map"].values()) <= set(commit.tree)
        assert len(index["metadata"]["experts_arrived"]) == experts
        assert b"library_name: transformers" in commit.tree["README.md"][0]


@pytest.mark.parametrize("request_held, visible", [("PUT /storage/", 1), ("POST .*/commit/", 2)])
def test_killed_in_a_push_it_makes_every_commit_once(processes: Processes, hub: FakeHub, request_held: str,
                                                     visible: int) -> None:  # fmt: skip
    hub.faults.append(Fault(request_held, "answer-held"))
    process = processes.start()
    hand_in(processes, process, 0)
    until(lambda: hub.holding.is_set(), 20)
    process.kill()
    process.wait()
    assert len(hub.repos[REPO].commits) == visible
    hub.let_go.set()

    process = processes.start()
    hand_in(processes, process, 1, 2)
    assert process.wait(30) == 0
    assert_whole(hub, [1, 2, 3])
    model = RunDirectory(processes.root).model
    for partition in range(3):
        assert hub.repos[REPO].head.tree[expert_file(partition)][0] == (model / expert_file(partition)).read_bytes()


def test_a_model_that_the_hub_refused_is_told_by_the_exit_code_and_pushed_by_the_same_command(
        processes: Processes, hub: FakeHub) -> None:  # fmt: skip
    hub.tokens = {"hf_other"}
    process = processes.start()
    hand_in(processes, process, 0, 1, 2)
    assert process.wait(30) == HubError.exit_code
    assert sorted(arrived(RunDirectory(processes.root).model)) == [0, 1, 2]
    assert hub.repos == {}
    hub.tokens = {TOKEN}
    assert processes.start().wait(30) == 0
    commit = hub.repos[REPO].head
    assert commit.message == "3 of 3 experts, final evaluation" and INDEX_FILE in commit.tree


def test_a_push_that_failed_is_made_up_for_by_the_next_one(processes: Processes, hub: FakeHub) -> None:
    hub.faults += [Fault("POST .*/commit/", 403)]
    process = processes.start()
    hand_in(processes, process, 0, 1, 2)
    assert process.wait(30) == 0
    assert_whole(hub, [2, 3])
