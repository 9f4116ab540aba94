"""A coordinator process with --push, the unmodified Hub client in it, and a local Hub that fails it."""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
from pathlib import Path
import subprocess
import sys

import huggingface_hub
from huggingface_hub.utils import enable_progress_bars
from modularforge.v1 import fleet_pb2 as pb
import pytest

from coordinator.assembler import ATTEMPTS
from coordinator.push import pusher
from forge.checkpoint.assembly import arrived
from forge.errors import ForgeError, HubError
from forge.files import RunDirectory
from forge.vocabulary import INDEX_FILE, expert_file
from tests.fakes.hub import FakeHub, Fault, fake_hub

from .fakes import FakeNode, make_shard, until
from .test_assembler import Bench
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
    node = working(FakeNode(processes.address(process), "laptop", processes.root))
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
    tags = {f"experts-{experts}": commit.oid for commit, experts in zip(commits, experts_by_commit, strict=True)}
    assert hub.repos[REPO].tags.items() >= tags.items()
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
    until(lambda: hub.holding.is_set(), 60)
    process.kill()
    process.wait()
    assert len(hub.repos[REPO].commits) == visible
    hub.let_go.set()

    process = processes.start()
    hand_in(processes, process, 1, 2)
    assert process.wait(60) == 0
    assert_whole(hub, [1, 2, 3])
    model = RunDirectory(processes.root).model
    for partition in range(3):
        assert hub.repos[REPO].head.tree[expert_file(partition)][0] == (model / expert_file(partition)).read_bytes()


def test_a_model_that_the_hub_refused_is_told_by_the_exit_code_and_pushed_by_the_same_command(
        processes: Processes, hub: FakeHub) -> None:  # fmt: skip
    hub.tokens = {"hf_other"}
    process = processes.start()
    hand_in(processes, process, 0, 1, 2)
    assert process.wait(60) == HubError.exit_code
    assert sorted(arrived(RunDirectory(processes.root).model)) == [0, 1, 2]
    assert hub.repos == {}
    hub.tokens = {TOKEN}
    assert processes.start().wait(60) == 0
    commit = hub.repos[REPO].head
    assert commit.message == "3 of 3 experts, final evaluation" and INDEX_FILE in commit.tree


def test_without_a_token_nothing_begins(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if "TOKEN" not in key} | {"HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "coordinator.cli", "serve", "--run-dir", str(tmp_path / "run"), "--push", REPO,
               "--listen", "127.0.0.1:0"]  # fmt: skip
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == HubError.exit_code
    assert ended.stderr == ("error: Cannot push to ada/tiny: this machine is not logged in to the Hub; log in with "
                            "`hf auth login` or set HF_TOKEN.\n")  # fmt: skip
    assert not (tmp_path / "run").exists()


# The client gives its HTTP library an uploaded file in a way that the library has deprecated.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_card_never_shows_the_figures_of_another_model(tmp_path: Path, hub: FakeHub,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    bench = Bench(tmp_path / "run")
    push = pusher(bench.run, bench.state, REPO)
    bench.hand_in(0)
    bench.settle()
    push("evaluated")
    bench.jobs.failures["evaluate"] = [ForgeError("out of memory")] * ATTEMPTS
    bench.hand_in(1, make_shard(bench.run, 1))
    bench.settle()
    push("not evaluated")
    bench.state.close()
    huggingface_hub.close_session()
    enable_progress_bars()
    assert list(hub.repos[REPO].tags.values()) == [hub.repos[REPO].commits[1].oid]
    cards = [commit.tree["README.md"][0] for commit in hub.repos[REPO].commits[1:]]
    assert [b"model-index" in card for card in cards] == [True, False]


def test_a_push_that_failed_is_made_up_for_by_the_next_one(processes: Processes, hub: FakeHub) -> None:
    hub.faults += [Fault("POST .*/commit/", 403)]
    process = processes.start()
    hand_in(processes, process, 0, 1, 2)
    assert process.wait(60) == 0
    assert_whole(hub, [2, 3])
