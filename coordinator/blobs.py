"""Uploads: `blobs/incoming/<sha256>.part` grows from wherever it was, and becomes a blob when its hash is right.

Chunks go from the wire to the disk: memory is one chunk an upload. What is on disk decides where an upload goes on,
so a killed coordinator loses nothing that it had written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import contextlib
from dataclasses import dataclass, field
import hashlib
from io import FileIO
import math
import os
from pathlib import Path
import shutil
import threading
from typing import Any

from coordinator.records import LeaseRecord
from forge.config import ModelConfig
from forge.errors import NetworkError, ProtocolError, ShardError, StorageError, storage_errors
from forge.files import BlobStore, hash_file
from forge.model.names import expert_tensors
from forge.system import sync_directory

#: Bytes that the header of a shard's safetensors file may take: about 150 a tensor, plus metadata.
HEADER_BYTES = 1 << 20
PART_SUFFIX = ".part"
#: Uploads, finished or not, that a node may have beside what the run needs: the one that it sends, and one of a lease before it.
MAX_UPLOADS = 2
#: Seconds for which a finished upload waits to be committed: a laptop that was closed in between may come back the next day.
UNCOMMITTED_SECONDS = 36 * 3600.0
SHA256_DIGITS = 64
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


class UploadInterruptedError(NetworkError):
    """The stream ended early for a reason that a new attempt may not meet: ask for the offset and go on."""


def largest_shard(model: ModelConfig) -> int:
    """Bytes that a shard of this architecture may have."""
    elements = sum(math.prod(shape) for shape in expert_tensors(model, 0).values())
    return elements * _ELEMENT_BYTES[model.dtype] + HEADER_BYTES


@dataclass
class _Upload:
    """One upload that was opened since this process started."""

    size: int
    writer: object | None = None
    cancel: Callable[[], object] | None = None
    damaged: int = 0
    digest: Any = None
    hashed: int = -1
    lock: threading.Lock = field(default_factory=threading.Lock)

    def hash(self, offset: int, chunk: bytes) -> None:
        """Hash what was written, as it comes, as long as every chunk follows the one before."""
        if offset == 0:
            self.digest, self.hashed = hashlib.sha256(), 0
        if offset == self.hashed:
            self.digest.update(chunk)
            self.hashed += len(chunk)
        else:
            self.hashed = -1

    def sha256_of(self, path: Path) -> str:
        """Of the part: read again only when it did not come in one go."""
        return str(self.digest.hexdigest()) if self.hashed == self.size else hash_file(path)


class Uploads:
    """Incoming shards of one run.

    Args:
        store: where finished uploads go.
        largest: bytes that one shard may have.
        largest_checkpoint: bytes that one checkpoint may have.
        needed: whether the run needs a blob, which then stays.
    """

    def __init__(self, store: BlobStore, largest: int, largest_checkpoint: int = 0,
                 needed: Callable[[str], bool] = lambda sha256: False) -> None:  # fmt: skip
        self.store, self._needed = store, needed
        self._largest = {False: largest, True: largest_checkpoint}
        self._directory = store.directory / "incoming"
        self._lock = threading.Lock()
        self._open: dict[str, _Upload] = {}
        self._of_lease: dict[str, tuple[str, str]] = {}  # lease -> its node, and what it uploaded last

    def open(self, lease: LeaseRecord, sha256: str, size: int, checkpoint: bool = False) -> int:
        """Announce an upload; the offset to go on from, equal to `size` when nothing is missing.

        A lease has one upload and a node `MAX_UPLOADS`: announcing another one drops the oldest, finished or not, so that a
        node cannot fill the disk. What the run needs stays.

        Raises:
            ProtocolError: the size is not one that a shard of this run can have.
            StorageError: the disk has no room for the rest.
        """
        if not 0 < size <= self._largest[checkpoint]:
            raise ProtocolError(f"A {'checkpoint' if checkpoint else 'shard'} of this run has at most "
                                f"{self._largest[checkpoint]:,} bytes, and this one {size:,}.")  # fmt: skip
        with self._lock:
            self._make_way(lease, sha256)
            if self.store.has(sha256):
                with contextlib.suppress(OSError):
                    os.utime(self.store.path(sha256))  # Wanted again: see `forget_unused`.
                return size
            upload = self._open.setdefault(sha256, _Upload(size))
        with upload.lock:
            if upload.size != size:
                upload.size, upload.writer = size, None
            held = self._held(sha256)
            if held > size:
                self._drop(sha256)
                held = 0
            self._require_room(size - held)
            if held == size:
                held = self._finish(sha256, upload)
        return held

    def write(self, sha256: str, offset: int, chunks: Iterable[bytes],
              cancel: Callable[[], object] | None = None) -> int:  # fmt: skip
        """Append chunks from `offset` on, and finish the upload when it is complete; the bytes held after.

        Args:
            sha256: an upload that was opened.
            offset: where the first chunk belongs: at most what is held.
            chunks: the bytes, read as they come.
            cancel: ends this stream; called when a newer stream for the same upload takes over.

        Raises:
            ProtocolError: the upload is not open, the offset leaves a hole, or there are more bytes than announced.
            UploadInterruptedError: a newer stream took over, or the bytes arrived damaged.
            ShardError: the bytes arrived damaged twice, so they are damaged where they come from.
            StorageError: the disk is full.
        """
        if self.store.has(sha256):
            return self.store.path(sha256).stat().st_size
        with self._lock:
            upload = self._open.get(sha256)
        if upload is None:
            raise UploadInterruptedError("The coordinator was restarted: ask for the offset and go on from there.")
        writer = object()
        with upload.lock:
            upload.writer, stalled, upload.cancel = writer, upload.cancel, cancel
            if offset > self._held(sha256):
                raise ProtocolError(f"The upload of {sha256[:12]} has {self._held(sha256):,} bytes so far: go on from "
                                    "there.")  # fmt: skip
            path = self._part(sha256)
            with storage_errors(self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)
                file = FileIO(path, "r+" if path.exists() else "w+")
        if stalled is not None:
            stalled()
        with file:
            for chunk in chunks:
                with upload.lock:
                    if upload.writer is not writer:
                        raise UploadInterruptedError("A newer stream of this shard took over.")
                    if offset + len(chunk) > upload.size:
                        raise ProtocolError(f"The upload was announced with {upload.size:,} bytes and brings more.")
                    with storage_errors(self._directory):
                        _write_all(file, offset, chunk)
                    upload.hash(offset, chunk)
                    offset += len(chunk)
        with upload.lock:
            if upload.writer is writer:
                upload.writer = upload.cancel = None
            if self.store.has(sha256):
                return upload.size
            return self._finish(sha256, upload) if self._held(sha256) == upload.size else self._held(sha256)

    def missing(self, sha256: str, offset: int) -> int:
        """Bytes that an announced upload still brings from `offset` on."""
        with self._lock:
            upload = self._open.get(sha256)
        return max(0, upload.size - offset) if upload is not None else 0

    def discard(self, lease_id: str, sha256: str) -> None:
        """Delete what a lease uploaded last, if it is this and nothing else."""
        with self._lock:
            if self._of_lease.get(lease_id, ("", ""))[1] == sha256:
                del self._of_lease[lease_id]
                self._let_go(sha256)

    def forget_all(self) -> None:
        """Delete every unfinished upload: the run needs no more shards."""
        with self._lock:
            self._open.clear()
            self._of_lease.clear()
            shutil.rmtree(self._directory, ignore_errors=True)

    def forget_unused(self, now: float) -> list[str]:
        """Delete finished uploads that nobody committed in `UNCOMMITTED_SECONDS`; their sha256.

        A node commits seconds after it has sent, and asks where its upload goes on when it comes back: it finds what is younger,
        and sends again what is not.

        Args:
            now: seconds since the epoch.
        """
        forgotten = []
        with storage_errors(self.store.directory):
            for path in sorted(self.store.directory.iterdir()) if self.store.directory.is_dir() else ():
                old = path.is_file() and now - path.stat().st_mtime > UNCOMMITTED_SECONDS
                if old and len(path.name) == SHA256_DIGITS and not self._needed(path.name):
                    path.unlink(missing_ok=True)
                    forgotten.append(path.name)
        return forgotten

    def _make_way(self, lease: LeaseRecord, sha256: str) -> None:
        """Note what a lease uploads, and drop what its node may not have beside that."""
        dropped = [self._of_lease.pop(lease.id, ("", ""))[1]]
        self._of_lease[lease.id] = (lease.node_id, sha256)
        mine = [held for held, (node_id, _) in self._of_lease.items() if node_id == lease.node_id]
        dropped += [self._of_lease.pop(held)[1] for held in mine[:-MAX_UPLOADS]]
        for old in filter(None, dropped):
            self._let_go(old)

    def _let_go(self, sha256: str) -> None:
        """Delete an upload, unless another lease brings the same or the run needs it."""
        if any(held == sha256 for _, held in self._of_lease.values()):
            return
        self._open.pop(sha256, None)
        self._drop(sha256)
        if self.store.has(sha256) and not self._needed(sha256):
            self.store.path(sha256).unlink(missing_ok=True)

    def _finish(self, sha256: str, upload: _Upload) -> int:
        """Check the hash and make the part a blob."""
        path = self._part(sha256)
        if upload.sha256_of(path) != sha256:
            self._drop(sha256)
            upload.damaged += 1
            if upload.damaged > 1:
                raise ShardError("The shard arrived twice with other bytes than its sha256 stands for: its file is "
                                 "damaged.")  # fmt: skip
            raise UploadInterruptedError("The shard arrived damaged: send it again.")
        with storage_errors(path):
            with open(path, "r+b") as file:  # Windows syncs what may be written.
                os.fsync(file.fileno())
            with self._lock:
                if self._open.get(sha256) is not upload:  # Another one took its place, and so may the part be another one's.
                    raise UploadInterruptedError("The upload was dropped for another one: ask for the offset.")
                os.replace(path, self.store.path(sha256))
                del self._open[sha256]
            sync_directory(self.store.directory)
        return upload.size

    def _held(self, sha256: str) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self._part(sha256).stat().st_size
        return 0

    def _drop(self, sha256: str) -> None:
        self._part(sha256).unlink(missing_ok=True)

    def _part(self, sha256: str) -> Path:
        self.store.path(sha256)  # Refuses what is not a hash, and so every path outside the directory.
        return self._directory / f"{sha256}{PART_SUFFIX}"

    def _require_room(self, missing: int) -> None:
        with storage_errors(self.store.directory):
            free = shutil.disk_usage(self.store.directory).free
        if free < missing:
            raise StorageError(f"The disk that holds {self.store.directory} is full: a shard of {missing:,} more bytes "
                               f"does not fit into the {free:,} left; free some space.")  # fmt: skip


def _write_all(file: FileIO, offset: int, data: bytes) -> None:
    file.seek(offset)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
