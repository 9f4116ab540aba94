"""Files that survive a kill at any instant: atomic writes, blobs named by their hash, and the run directory.

A writer writes a temporary file beside the target, syncs it and renames it; whatever makes the file visible (a stage
marker, an index) is written after it in the same way. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
import hashlib
import json
import os
from pathlib import Path
import shutil
import time
from typing import IO, Any
import uuid

from forge.config import FREE_SECTIONS, RunConfig, parse_config
from forge.errors import ForgeError, RunMismatchError, StorageError, storage_errors
from forge.plain_yaml import read_yaml
from forge.system import lock, sync_directory
from forge.vocabulary import CHUNK_BYTES, DATABASE_FILE, LOCK_FILE

TEMPORARY_SUFFIX = ".tmp"
#: How often, and how many seconds apart, a lock is asked for that another process has.
_LOOKS, _LOOK_SECONDS = 3, 0.05


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes `path`, whole and synced, when the block ends without an error.

    Raises:
        StorageError: the disk is full or the directory cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_file(path) as file:
        file.write(data)


def create_private(path: Path, data: bytes) -> None:
    """Make a file that nobody but its owner ever could read, whole or not at all. One that is there already stays.

    Raises:
        StorageError: the disk is full or the directory cannot be written.
    """
    with storage_errors(path), _private_temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return  # Another process was faster: its file is the one.
        except OSError:  # A file system without hard links.
            if not path.exists():
                os.replace(temporary, path)
        sync_directory(path.parent)


def replace_private(path: Path, data: bytes) -> None:
    """Like `create_private`, but what was there before is replaced."""
    with storage_errors(path), _private_temporary(path, data) as temporary:
        os.replace(temporary, path)
        sync_directory(path.parent)


@contextmanager
def _private_temporary(path: Path, data: bytes) -> Iterator[Path]:
    """A synced file beside `path`, mode 0600; gone when the block ends."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file of ours.

    Raises:
        StorageError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"Cannot read {path}: it is missing or damaged.", detail=str(error)) from error


def hash_file(path: Path) -> str:
    """sha256 (hex) of a file, read in chunks.

    Raises:
        StorageError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with storage_errors(path), open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Put the content of `source` at `target` atomically: a hard link where the file system has them, else a copy.

    Raises:
        StorageError: the disk is full or the directory cannot be written.
    """
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    with storage_errors(target):
        try:
            os.link(source, temporary)
            os.replace(temporary, target)
        except OSError:
            with atomic_file(target) as out, open(source, "rb") as file:
                shutil.copyfileobj(file, out, CHUNK_BYTES)
        finally:
            # rename(2) does nothing when both names are links to one file already, and leaves the temporary name.
            temporary.unlink(missing_ok=True)


def remove_temporaries(directory: Path) -> None:
    """Delete what an earlier, killed process left half-written in `directory` (not in its sub-directories)."""
    if directory.is_dir():
        for path in directory.glob(f"*{TEMPORARY_SUFFIX}"):
            path.unlink(missing_ok=True)


class BlobStore:
    """Content-addressed files: `DIRECTORY/<sha256>`.

    Args:
        directory: where the blobs lie; made when first needed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, sha256: str) -> Path:
        """Where the blob is or would be.

        Raises:
            StorageError: `sha256` is not 64 hexadecimal digits, so it could name a file outside the store.
        """
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise StorageError(f"{sha256[:80]!r} is not the sha256 of a blob.")
        return self.directory / sha256

    def has(self, sha256: str) -> bool:
        """Whether the blob is here."""
        return self.path(sha256).is_file()

    def adopt(self, file: Path) -> str:
        """Move a finished file of this file system into the store and return its sha256."""
        sha256 = hash_file(file)
        with storage_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            with open(file, "r+b") as handle:  # Windows syncs what may be written.
                os.fsync(handle.fileno())
            os.replace(file, self.path(sha256))
            sync_directory(self.directory)
        return sha256


class RunDirectory:
    """The files of one run.

    run.yaml (resolved config) · run.json (run id) · stages/ (markers) · data/ · work/ (checkpoints) · blobs/ · model/ ·
    reports/ · events.jsonl · forge.db (coordinator only)
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = BlobStore(root / "blobs")
        self.data = root / "data"
        self.work = root / "work"
        self.model = root / "model"
        self.reports = root / "reports"
        self.database = root / DATABASE_FILE

    @classmethod
    def open(cls, root: Path, config: RunConfig) -> RunDirectory:
        """Create a run directory for `config`, or go on with one that holds the same config.

        Raises:
            RunMismatchError: the directory holds a run with another config.
            StorageError: the directory cannot be written.
        """
        run = cls(root)
        resolved = root / "run.yaml"
        if resolved.is_file():
            held = run.config
            if held.fingerprint != config.fingerprint:
                raise RunMismatchError(f"{root} holds the run {held.name!r} with another config ({_differences(held, config)}): "
                                       "choose another run directory or another `name=`.")  # fmt: skip
        with storage_errors(root):
            for directory in (run.blobs.directory, run.data, run.work, run.reports, root / "stages"):
                directory.mkdir(parents=True, exist_ok=True)
                remove_temporaries(directory)
            for directory in (root, root / "provenance"):
                remove_temporaries(directory)
        if not (root / "run.json").is_file():
            write_json(root / "run.json", {"run_id": uuid.uuid4().hex})
        write_bytes(resolved, config.to_yaml().encode())
        return run

    @property
    def config(self) -> RunConfig:
        """The resolved config of the run."""
        path = self.root / "run.yaml"
        try:
            return parse_config(read_yaml(path.read_text(encoding="utf-8"), str(path)), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"{self.root} is not a run directory: it has no readable run.yaml; give one that `forge "
                               "run` or `forge-coordinator serve` made.") from error  # fmt: skip

    @property
    def run_id(self) -> str:
        """The run's id: 32 hexadecimal digits, made when the directory was."""
        return str(read_json(self.root / "run.json")["run_id"])

    def marker(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left: its facts and outputs, or None while it is not finished."""
        path = self.root / "stages" / f"{stage}.json"
        return dict(read_json(path)) if path.is_file() else None

    def finish(self, stage: str, facts: dict[str, Any]) -> dict[str, Any]:
        """Mark a stage finished. Everything it made must be synced before."""
        write_json(self.root / "stages" / f"{stage}.json", facts)
        return facts


def _differences(held: RunConfig, asked: RunConfig, shown: int = 3) -> str:
    """The first settings that are not the same, as `seed: 0 there, 3 here`."""
    there, here = (_flat(config.model_dump(mode="json", exclude=set(FREE_SECTIONS))) for config in (held, asked))
    different = [f"{key}: {there[key]} there, {here[key]} here" for key in there if there[key] != here[key]]
    return "; ".join(different[:shown]) + (f"; {len(different) - shown} more" if len(different) > shown else "")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@contextmanager
def exclusive(path: Path, sentence: str) -> Iterator[None]:
    """Hold the lock file at `path`, made where it is missing, for this process alone; it ends with the process.

    Raises:
        StorageError: another process holds it (`sentence` says so), or the directory cannot be written.
    """
    with storage_errors(path.parent):
        if not path.parent.exists():  # A file in its place is not a directory: opening says so.
            path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 - closed below, whatever the block raises
    with file:
        with storage_errors(path):
            held = _take(file.fileno())
        if not held:
            raise StorageError(sentence)
        yield


def _take(descriptor: int) -> bool:
    """Take a lock, or ask a few times for it: who only looks whether it is held (`is_locked`) holds it for an instant."""
    for look in range(_LOOKS):
        if look:
            time.sleep(_LOOK_SECONDS)
        if lock(descriptor):
            return True
    return False


@contextmanager
def claimed(root: Path) -> Iterator[None]:
    """Hold a run directory for this process alone; a run that cannot begin leaves nothing behind.

    Cannot begin: its corpus is unusable, say, or the disk is full. Otherwise the half-made run would refuse the mended
    command, as a run with another config. What was in the directory before (invitations, or somebody's notes) stays, and
    so does every run whose corpus is prepared.

    Raises:
        StorageError: another process works in the directory, or it cannot be written.
    """
    root = root.absolute()
    missing = [path for path in (root, *root.parents) if not path.exists()]
    before = {path.name for path in root.iterdir()} if root.is_dir() else set()
    with exclusive(root / LOCK_FILE, f"Another forge or forge-coordinator works in {root}: wait for it or stop it, or "
                                     "choose another run directory."):  # fmt: skip
        try:
            yield
        except BaseException as error:
            # The plain class is about a process that died: the logs say more about it than the error does.
            users = isinstance(error, ForgeError) and type(error) is not ForgeError
            begun = "run.yaml" in before or RunDirectory(root).marker("prepare") is not None
            if not begun and (users or not (root / "run.yaml").exists()):
                _undo(root, before, missing)
            raise


def _undo(root: Path, before: set[str], missing: list[Path]) -> None:
    for path in [path for path in root.iterdir() if path.name not in before]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(PermissionError):  # Windows keeps the lock file while it is held.
                path.unlink(missing_ok=True)
    for directory in missing:
        with suppress(OSError):  # Somebody else put something into it.
            directory.rmdir()
