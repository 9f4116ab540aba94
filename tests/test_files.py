from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
import threading
import time

import pytest

from forge.config import load_config
from forge.errors import RunMismatchError, StorageError, report_errors, storage_errors
from forge.files import BlobStore, RunDirectory, atomic_file, exclusive, hash_file, link_or_copy, read_json, write_json
from forge.system import is_locked


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyError), atomic_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is full: free some space"), storage_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_this_user_may_not_enter_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)  # Nothing is closed to root.
        with pytest.raises(SystemExit) as caught, report_errors():
            os.stat(tmp_path / "closed" / "run.yaml")
    finally:
        if root:
            os.seteuid(0)
    assert caught.value.code == StorageError.exit_code
    assert capsys.readouterr().err == (f"error: Cannot use {tmp_path / 'closed' / 'run.yaml'}: this user may not; choose another "
                                       "directory, or have its permissions changed.\n")  # fmt: skip


def test_a_device_that_is_really_full() -> None:
    with pytest.raises(StorageError, match="is full"), storage_errors("/dev/full"), open("/dev/full", "wb") as file:
        file.write(b"x" * 100_000)


def test_linking_replaces_and_repeats(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    link_or_copy(source, target)
    link_or_copy(source, target)
    assert target.read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


def test_blobs_are_named_by_their_hash(tmp_path: Path) -> None:
    file = tmp_path / "made"
    file.write_bytes(b"content")
    store = BlobStore(tmp_path / "blobs")
    sha256 = store.adopt(file)
    assert sha256 == hashlib.sha256(b"content").hexdigest() == hash_file(store.path(sha256))
    assert store.has(sha256) and not file.exists()
    for name in ("../run.yaml", "a" * 63, "A" * 64):
        with pytest.raises(StorageError, match="is not the sha256 of a blob"):
            store.path(name)


def test_a_run_directory_goes_on_with_its_own_config_only(tmp_path: Path) -> None:
    config = load_config("smoke")
    run = RunDirectory.open(tmp_path / "run", config)
    run_id = run.run_id
    run.finish("prepare", {"documents": 3})
    (run.root / "provenance").mkdir()
    for directory in (run.work, run.root / "provenance"):
        (directory / "half.tmp").write_bytes(b"left by a kill")
    again = RunDirectory.open(tmp_path / "run", config)
    assert again.run_id == run_id and again.marker("prepare") == {"documents": 3}
    assert not list(run.root.rglob("*.tmp"))
    with pytest.raises(RunMismatchError, match=r"holds the run 'smoke' with another config \(seed: 0 there, 9 here\)"):
        RunDirectory.open(tmp_path / "run", load_config("smoke", ["seed=9"]))


def test_a_directory_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Cannot use"):
        RunDirectory.open(tmp_path / "file" / "run", load_config("smoke"))


def test_who_only_looks_at_a_lock_refuses_nobody(tmp_path: Path) -> None:
    """Commands that look for a running coordinator hold its lock for an instant, in which another one may start."""
    path, over = tmp_path / "run.lock", threading.Event()
    path.touch()

    def look() -> None:
        while not over.is_set():
            is_locked(path)
            time.sleep(0.001)

    onlooker = threading.Thread(target=look)
    onlooker.start()
    try:
        for _ in range(300):
            with exclusive(path, "somebody else works here"):
                pass
    finally:
        over.set()
        onlooker.join()
    with exclusive(path, ""), pytest.raises(StorageError, match="somebody else"), exclusive(path, "somebody else works here"):
        pass
