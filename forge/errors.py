"""Every error that a user can cause, in one tree.

    ForgeError                 1   anything below, when nothing more specific fits
    ├── ConfigError            3   unknown key, wrong type, bad YAML, impossible combination
    ├── DataError              4   missing file, empty corpus, corpus too small for n_experts
    ├── MemoryBudgetError      5   what was asked for cannot fit in --ram
    ├── StorageError           6   read-only directory, disk full, corrupt file of ours
    ├── NetworkError           7   coordinator unreachable, port in use, connection lost for good
    ├── ProtocolError          8   the peer speaks another version, or refuses the request
    │   └── AccessError       13   not invited, revoked, or the coordinator is not the one that was joined
    ├── ShardError             9   a shard is truncated, foreign, misshapen, or not finite
    ├── RunMismatchError      10   the run directory holds another run
    ├── HubError              11   the Hugging Face Hub refused or could not be reached
    ├── TrainingError         12   the loss is not finite, so training stopped before the step
    └── ProvenanceError       15   a model is not what its provenance says

The number is the process's exit code (`docs/exit-codes.md`). `str(error)` is one sentence meant for the user: what was
wrong, where, and what to do. `detail` is for the log of whoever operates the process and never crosses the wire.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import errno
import io
import os
import sys

#: Exit status after Ctrl-C, as shells report it: 128 + SIGINT.
INTERRUPTED = 130


class ForgeError(Exception):
    """Base of every error that is shown to a user as one sentence.

    Args:
        message: what was wrong, where, and what to do next, in one sentence.
        detail: more for the operator's log (a library's own words); never sent to a peer.
    """

    exit_code = 1
    code = "error"

    def __init__(self, message: str, *, detail: str | None = None) -> None:
        super().__init__(message)
        self.detail = detail


class ConfigError(ForgeError):
    """A configuration file or override is wrong."""

    exit_code = 3
    code = "config"


class DataError(ForgeError):
    """A data source is missing, empty, or too small."""

    exit_code = 4
    code = "data"


class MemoryBudgetError(ForgeError):
    """A stage cannot fit in the memory the user allowed."""

    exit_code = 5
    code = "memory"


class StorageError(ForgeError):
    """A file could not be written or read back."""

    exit_code = 6
    code = "storage"


class NetworkError(ForgeError):
    """A peer could not be reached, or an address could not be listened on."""

    exit_code = 7
    code = "network"


class ProtocolError(ForgeError):
    """A peer speaks another version or refused the request."""

    exit_code = 8
    code = "protocol"


class AccessError(ProtocolError):
    """Who is there may not be: a node without a valid invitation, or a coordinator that is not the one of it."""

    exit_code = 13
    code = "access"


class ShardError(ForgeError):
    """A shard is not what it claims to be."""

    exit_code = 9
    code = "shard"


class RunMismatchError(ForgeError):
    """A run directory belongs to another run than the one asked for."""

    exit_code = 10
    code = "run-mismatch"


class HubError(ForgeError):
    """The Hugging Face Hub refused a request or could not be reached."""

    exit_code = 11
    code = "hub"


class TrainingError(ForgeError):
    """Training met a value that is not finite."""

    exit_code = 12
    code = "training"


class ProvenanceError(ForgeError):
    """A file, a signature or the index of a model is not what its provenance says."""

    exit_code = 15
    code = "provenance"


#: Wire and job code -> class, so that an error raised in a child process or a peer keeps its exit code.
BY_CODE: dict[str, type[ForgeError]] = {
    cls.code: cls
    for cls in (
        ForgeError, ConfigError, DataError, MemoryBudgetError, StorageError, NetworkError, ProtocolError, AccessError,
        ShardError, RunMismatchError, HubError, TrainingError, ProvenanceError,
    )
}  # fmt: skip


@contextmanager
def report_errors() -> Iterator[None]:
    """Decorate a command: a user's error becomes one sentence on stderr and its documented exit code.

    What the encoding of standard output lacks is printed as `?` instead of failing, since anybody may name a node anything: on
    Windows that is cp1252 or the like as soon as the output goes to a file.

    Raises:
        SystemExit: with that code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        with file_errors():
            yield
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("Interrupted: what trains goes on from its last checkpoint when the same command is run again.", file=sys.stderr)
        sys.exit(INTERRUPTED)


@contextmanager
def file_errors() -> Iterator[None]:
    """Turn the operating system's errors about any file into a `StorageError` of one sentence; others pass.

    Raises:
        StorageError: as in `storage_errors`.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str | bytes | os.PathLike):
            raise
        raise storage_error(os.fsdecode(error.filename), error) from error


@contextmanager
def storage_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the operating system's errors about `path` into a `StorageError` of one sentence.

    Raises:
        StorageError: the disk is full, the directory is read-only or not permitted, or another I/O error happened.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


def storage_error(path: str | os.PathLike[str], error: OSError) -> StorageError:
    """The sentence for an error of the operating system about `path`."""
    where = os.fspath(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        sentence = f"The disk that holds {where} is full: free some space and run the same command again."
    elif error.errno == errno.EROFS:
        sentence = f"Cannot write to {where}: its file system is read-only; choose another directory."
    elif error.errno in (errno.EACCES, errno.EPERM):
        sentence = f"Cannot use {where}: this user may not; choose another directory, or have its permissions changed."
    else:
        sentence = (f"Cannot use {where}: the system says {error.strerror or error}; check the path, or choose another "
                    "one.")  # fmt: skip
    return StorageError(sentence, detail=str(error))
