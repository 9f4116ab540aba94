"""What a node keeps on its disk, and for how long.

    DATA_DIR/node.key                               the node's identity
    DATA_DIR/node.lock                              held by the one agent that uses the directory
    DATA_DIR/blobs/<sha256>[.part]                  downloads; a .part goes on where it stopped
    DATA_DIR/runs/<run id>/shared.json              hashes of the shared components, kept for the next lease
    DATA_DIR/runs/<run id>/partition-003/           assignment.json, checkpoint, shard, manifest, train.log
    DATA_DIR/runs/<run id>/partition-003/submission.json    a finished shard whose verdict is not known yet

A partition's directory goes when its verdict is known, and with it the blobs that nothing else needs. That of a lease which was
lost stays until `--disk` leaves no room for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
import json
import os
from pathlib import Path
import shutil
import time
from typing import Any

import psutil

from forge.errors import StorageError, storage_errors
from forge.files import BlobStore, exclusive, read_json, remove_temporaries, write_json
from forge.vocabulary import CHECKPOINT_FILE, kept_file
from node.client import FleetClient, OnBytes
from node.messages import Assignment, Blob

ASSIGNMENT_FILE = "assignment.json"
SUBMISSION_FILE = "submission.json"
INHERITED_FILE, METRICS_FILE = "inherited.json", "metrics.jsonl"
CHILD_FILE = "child.json"
SHARED_FILE = "shared.json"
#: Seconds after which the files of a run that this node never met again are deleted: two weeks.
FORGET_SECONDS = 14 * 24 * 3600.0
#: Bytes that a download leaves free on the disk, for the checkpoint and the shard.
DISK_RESERVE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A finished shard on its way to a verdict. `manifest` is the JSON text, exactly as signed."""

    lease_id: str
    partition: int
    sha256: str
    size: int
    shard: str
    manifest: str


@contextmanager
def claimed(data_dir: Path) -> Iterator[None]:
    """Hold the data directory for this process alone, without what a killed one left half-written in it.

    Raises:
        StorageError: another agent holds it, or it cannot be written.
    """
    with exclusive(data_dir / "node.lock", f"Another forge-node already uses {data_dir}: give this one a directory of its "
                                           "own with --data-dir."):  # fmt: skip
        remove_temporaries(data_dir)
        yield


class Cache:
    """The files of one node for one run.

    Args:
        data_dir: the node's data directory.
        run_id: the run; its directory is made when first needed.
        clock: seconds since the epoch.
    """

    def __init__(self, data_dir: Path, run_id: str, clock: Callable[[], float] = time.time) -> None:
        if not run_id or not all(c.isalnum() or c in "-_" for c in run_id):
            raise StorageError(f"The run id {run_id[:80]!r} cannot name a directory.")
        self._runs = data_dir / "runs"
        self._run = self._runs / run_id
        self._clock = clock
        self.blobs = BlobStore(data_dir / "blobs")

    def work_dir(self, partition: int) -> Path:
        """Where the expert of a partition is trained."""
        return self._run / f"partition-{partition:03d}"

    def checkpoints(self) -> list[int]:
        """Partitions of this run that have a checkpoint here."""
        return [_partition_of(path.parent) for path in sorted(self._run.glob(f"partition-*/{CHECKPOINT_FILE}"))]

    def fetch(self, client: FleetClient, blob: Blob, on_bytes: OnBytes | None = None) -> Path:
        """Path of a blob, downloaded if it is not here.

        Raises:
            StorageError: the disk is too full for it.
        """
        target = self.blobs.path(blob.sha256)
        if not self.blobs.has(blob.sha256):
            part = target.with_name(target.name + ".part")
            with storage_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                missing = blob.size - (part.stat().st_size if part.exists() else 0)
                free = shutil.disk_usage(target.parent).free
            if missing + DISK_RESERVE_BYTES > free:
                needed = -(-(missing + DISK_RESERVE_BYTES) >> 20)
                raise StorageError(f"The disk that holds {target.parent} is full: {needed} MB are needed for the download "
                                   f"and the training, {free >> 20} MB are free; free some space or use --data-dir.")  # fmt: skip
            client.fetch_blob(blob.sha256, blob.size, target, on_bytes)
        return target

    def begin(self, assignment: Assignment, facts: dict[str, Any]) -> Path:
        """Make the work directory of an assignment and write down what it is; `facts` go to the training process."""
        directory = self.work_dir(assignment.partition)
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        remove_temporaries(directory)
        write_json(self._run / SHARED_FILE, [assignment.shared.sha256, assignment.shared_ffn.sha256])
        write_json(directory / ASSIGNMENT_FILE, facts | {
            "blobs": [blob.sha256 for blob in (*assignment.blobs, assignment.checkpoint) if blob is not None]})
        end_orphan(directory)
        return directory

    def inherit(self, partition: int, downloaded: Path) -> None:
        """Go on from a checkpoint that another node left; it was downloaded and checked."""
        directory = self.work_dir(partition)
        write_json(directory / INHERITED_FILE, {"sha256": downloaded.name})
        with storage_errors(directory):
            os.replace(downloaded, directory / CHECKPOINT_FILE)

    def inherited(self, partition: int) -> bool:
        """Whether this partition was gone on with from another node's checkpoint."""
        return (self.work_dir(partition) / INHERITED_FILE).is_file()

    def disown(self, partition: int) -> None:
        """Begin a partition anew, without what another node left."""
        for name in (CHECKPOINT_FILE, METRICS_FILE, INHERITED_FILE):
            (self.work_dir(partition) / name).unlink(missing_ok=True)

    def submit(self, submission: Submission) -> None:
        """Write down that a shard is finished; from now on it is settled before new work is asked for."""
        write_json(self.work_dir(submission.partition) / SUBMISSION_FILE, asdict(submission))

    def submissions(self) -> list[Submission]:
        """Finished shards of this run whose verdict is not known yet."""
        found = []
        for path in sorted(self._run.glob(f"partition-*/{SUBMISSION_FILE}")):
            try:
                submission = Submission(**read_json(path))
            except (StorageError, TypeError):
                submission = None  # damaged: the checkpoint makes a new one
            if submission is None or not Path(submission.shard).is_file():
                path.unlink(missing_ok=True)
            else:
                found.append(submission)
        return found

    def kept(self, submission: Submission) -> dict[str, Path]:
        """The checkpoints that a submission's manifest names: sha256 -> where it lies."""
        checkpoints = json.loads(submission.manifest).get("checkpoints") or {}
        return {sha256: self.work_dir(submission.partition) / kept_file(int(step)) for step, sha256 in checkpoints.items()}

    def withdraw(self, partition: int) -> None:
        """Forget a submission but keep the checkpoint, so that the shard is made again."""
        (self.work_dir(partition) / SUBMISSION_FILE).unlink(missing_ok=True)

    def finish(self, partition: int) -> None:
        """Delete the files of a partition whose verdict is known."""
        directory = self.work_dir(partition)
        # The submission goes first: half-deleted files are never taken for a shard to hand in.
        self.withdraw(partition)
        shutil.rmtree(directory, ignore_errors=True)
        self.prune()

    def discard(self, wanted: int, say: Callable[[str], None]) -> bool:
        """Delete the unfinished partition that was worked on longest ago, but the wanted one; False when there is none.

        Who is given another partition has lost the leases of those: another node trains them, or has.
        """
        spared = [path for path in self._run.glob("partition-*")
                  if path != self.work_dir(wanted) and not (path / SUBMISSION_FILE).is_file()]  # fmt: skip
        if not spared:
            return False
        oldest = min(spared, key=_last_change)
        self.finish(_partition_of(oldest))
        say(f"What was trained of partition {_partition_of(oldest)} is deleted, since --disk has no room for it any more.")
        return not oldest.exists()

    def prune(self) -> None:
        """Delete runs long forgotten, what a killed agent left half-written, and blobs that no work of any run needs."""
        remove_temporaries(self._run)
        for run in self._runs.glob("*"):
            if run != self._run and self._clock() - _last_change(run) > FORGET_SECONDS:
                shutil.rmtree(run, ignore_errors=True)
        needed: set[str] = set()
        for path in (*self._runs.glob(f"*/partition-*/{ASSIGNMENT_FILE}"), *self._runs.glob(f"*/{SHARED_FILE}")):
            try:
                value = read_json(path)
            except StorageError:
                continue
            needed.update(value["blobs"] if isinstance(value, dict) else value)
        for path in self.blobs.directory.glob("*"):
            if path.name.removesuffix(".part") not in needed:
                path.unlink(missing_ok=True)


def note_child(work_dir: Path, pid: int) -> None:
    """Write down which process trains here, so that an orphan of a killed agent is not joined by a second one."""
    try:
        started = psutil.Process(pid).create_time()
    except psutil.Error:
        return
    write_json(work_dir / CHILD_FILE, {"pid": pid, "started": started})


def end_orphan(work_dir: Path) -> None:
    """End the training process of an agent that was killed, if it is still there. It is known by its start time."""
    path = work_dir / CHILD_FILE
    if not path.is_file():
        return
    try:
        noted = read_json(path)
        child = psutil.Process(int(noted["pid"]))
        if abs(child.create_time() - float(noted["started"])) < 1.0:
            child.kill()
            child.wait(timeout=10)
    except (StorageError, psutil.Error, KeyError, TypeError, ValueError):
        pass  # It is gone, or never was.
    path.unlink(missing_ok=True)


def _partition_of(directory: Path) -> int:
    return int(directory.name.removeprefix("partition-"))


def _last_change(directory: Path) -> float:
    return max((path.stat().st_mtime for path in (directory, *directory.rglob("*")) if path.exists()), default=0.0)
