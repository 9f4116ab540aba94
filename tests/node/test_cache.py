from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys

import psutil
import pytest

from forge.errors import StorageError
from node.cache import CHILD_FILE, FORGET_SECONDS, Cache, Submission, claimed, end_orphan, note_child
from node.messages import Assignment, Blob


def _assignment(partition: int, tokens: str) -> Assignment:
    blobs = [Blob(sha256=name * 64, size=1) for name in ("a", "b", tokens)]
    return Assignment(lease_id="lease", partition=partition, partition_tokens=1, shared=blobs[0], shared_ffn=blobs[1],
                      train_tokens=blobs[2], heartbeat_seconds=1.0)  # fmt: skip


def _blobs(data_dir: Path) -> set[str]:
    return {path.name[0] + path.suffix for path in (data_dir / "blobs").iterdir()}


def test_blobs_go_when_nothing_needs_them(tmp_path: Path) -> None:
    cache = Cache(tmp_path, "run")
    (tmp_path / "blobs").mkdir()
    for name in "abcde":
        (tmp_path / "blobs" / (name * 64)).write_bytes(b"x")
    (tmp_path / "blobs" / ("d" * 64 + ".part")).write_bytes(b"x")
    cache.begin(_assignment(0, "c"), {})
    cache.begin(_assignment(1, "d"), {})
    cache.prune()
    assert _blobs(tmp_path) == {"a", "b", "c", "d", "d.part"}
    cache.finish(0)
    assert _blobs(tmp_path) == {"a", "b", "d", "d.part"}


def test_what_a_killed_agent_left_half_written_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, "run")
    cache.begin(_assignment(0, "c"), {})
    half = tmp_path / "runs" / "run" / "shared.json.0123abcd.tmp"
    half.write_bytes(b"[")
    cache.prune()
    assert not half.exists() and (tmp_path / "runs" / "run" / "shared.json").is_file()


def test_a_run_that_was_never_met_again_is_forgotten(tmp_path: Path) -> None:
    old = Cache(tmp_path, "old")
    old.begin(_assignment(0, "c"), {})
    changed = (tmp_path / "runs" / "old" / "shared.json").stat().st_mtime
    Cache(tmp_path, "new", clock=lambda: changed + FORGET_SECONDS - 60).prune()
    assert (tmp_path / "runs" / "old").exists()
    Cache(tmp_path, "new", clock=lambda: changed + FORGET_SECONDS + 60).prune()
    assert not (tmp_path / "runs" / "old").exists()


def test_who_needs_room_discards_the_oldest_unfinished_partition_first(tmp_path: Path) -> None:
    cache, said = Cache(tmp_path, "run"), list[str]()
    (tmp_path / "blobs").mkdir()
    for partition, tokens in enumerate("cdef"):
        directory = cache.begin(_assignment(partition, tokens), {})
        (tmp_path / "blobs" / (tokens * 64)).write_bytes(b"x")
        shard = directory / "shard.safetensors"
        shard.write_bytes(b"x")
        if partition == 0:
            cache.submit(Submission(lease_id="lease", partition=0, sha256="0" * 64, size=1, shard=str(shard), manifest="{}"))
        for path in (*directory.iterdir(), directory):
            os.utime(path, (1000 - partition, 1000 - partition))
    assert [cache.discard(3, said.append) for _ in range(3)] == [True, True, False]
    assert [sentence.split(" is deleted")[0] for sentence in said] == [
        "What was trained of partition 2", "What was trained of partition 1"]
    assert {path.name for path in (tmp_path / "runs" / "run").glob("partition-*")} == {"partition-000", "partition-003"}
    assert _blobs(tmp_path) == {"c", "f"}, "a finished shard stays, and what the next one is trained from"


def test_submissions_survive_and_need_their_shard(tmp_path: Path) -> None:
    cache = Cache(tmp_path, "run")
    shard = cache.begin(_assignment(7, "c"), {}) / "shard.safetensors"
    submission = Submission(lease_id="lease", partition=7, sha256="0" * 64, size=1, shard=str(shard), manifest="{}")
    cache.submit(submission)
    assert cache.submissions() == []
    shard.write_bytes(b"x")
    cache.submit(submission)
    assert Cache(tmp_path, "run").submissions() == [submission]
    (shard.parent / "submission.json").write_text("damaged")
    assert cache.submissions() == []


def test_an_orphan_of_a_killed_agent_is_ended(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    note_child(tmp_path, child.pid)
    end_orphan(tmp_path)
    gone = not psutil.pid_exists(child.pid)
    child.communicate()
    assert gone and not (tmp_path / CHILD_FILE).exists()


def test_a_stranger_with_the_same_process_id_is_left_alone(tmp_path: Path) -> None:
    started = psutil.Process().create_time() - 1000
    (tmp_path / CHILD_FILE).write_text(f'{{"pid": {os.getpid()}, "started": {started}}}')
    end_orphan(tmp_path)  # would end this very test


@pytest.mark.parametrize("run_id", ["", "../up", "a/b", "."])
def test_a_run_id_cannot_leave_the_directory(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(StorageError):
        Cache(tmp_path, run_id)


def test_a_full_disk_is_found_before_the_download(tmp_path: Path, connect: object) -> None:
    client = connect("127.0.0.1:1")  # type: ignore[operator]
    with pytest.raises(StorageError, match="full"):
        Cache(tmp_path, "run").fetch(client, Blob(sha256="a" * 64, size=1 << 60))


def test_the_lock_ends_with_its_holder(tmp_path: Path) -> None:
    with claimed(tmp_path), pytest.raises(StorageError, match="Another forge-node"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass
