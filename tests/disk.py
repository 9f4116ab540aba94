"""A disk of a few kilobytes that is really full or read-only: a tmpfs in a mount namespace of its own.

No rights are needed where the system lets users have namespaces; elsewhere `why_not` says what it answered. The disk has
the same path for the commands run on it; nobody else sees it, and it is gone with its process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import functools
import os
from pathlib import Path
import subprocess

_ENTER = ["unshare", "--user", "--map-root-user", "--mount"]


@functools.cache
def why_not() -> str:
    """Why this system gives no such disk; empty where it does."""
    try:
        tried = subprocess.run([*_ENTER, "mount", "-t", "tmpfs", "none", "/tmp"], capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"no mount namespaces: {error}"
    return "" if tried.returncode == 0 else f"no mount namespaces: {tried.stderr.strip()}"


class Disk:
    """A mounted disk: see `disk`."""

    def __init__(self, path: Path, holder: int) -> None:
        self.path = path
        self._enter = ["nsenter", f"--target={holder}", "--user", "--mount", "--preserve-credentials", "--"]
        #: Where this process, outside the namespace, sees the files.
        self.seen = Path(f"/proc/{holder}/root{path}")

    def command(self, *command: str, cwd: Path) -> list[str]:
        """The command line that runs `command` with the disk mounted."""
        return [*self._enter, "env", f"--chdir={cwd}", *command]

    def remount(self, options: str) -> None:
        """Change its size (`size=4m`), or make it read-only (`ro`)."""
        subprocess.run([*self._enter, "mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def fill(self, leave: int = 0) -> Path:
        """Fill it but for `leave` bytes; the file that does, to be deleted."""
        ballast = self.seen / "ballast"
        room = os.statvfs(self.seen)
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_bsize - leave)
        return ballast


@contextmanager
def disk(path: Path, size: str) -> Iterator[Disk]:
    """A disk of `size` (as mount takes it) at `path`."""
    path.mkdir(parents=True)
    script = 'mount -t tmpfs -o "size=$1" none "$2" && echo ready && exec sleep 600'
    holder = subprocess.Popen([*_ENTER, "sh", "-c", script, "sh", size, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        yield Disk(path, holder.pid)
    finally:
        holder.kill()
        holder.communicate()
