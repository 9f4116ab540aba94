"""What happened, in order: `events.jsonl` for programs, a line on the terminal for people."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from io import RawIOBase
import json
import os
from pathlib import Path
import sys
import threading
import time
from typing import Any

#: Longer than another process takes to append a line.
_LINE_SECONDS = 0.01


def time_of_day() -> str:
    """What a line begins with."""
    return f"[{datetime.now().strftime('%H:%M:%S')}] "


def print_line(line: str) -> None:
    """Print a line with the time of day."""
    sys.stdout.write(f"{time_of_day()}{line}\n")
    sys.stdout.flush()


class Journal:
    """Appends one JSON object a line to a file: `ts` (UTC, ISO 8601), `event`, `sentence` if there is one for
    people, and the event's facts.

    Args:
        path: the file.
        echo: shows a sentence to whoever watches.
    """

    def __init__(self, path: Path, echo: Callable[[str], None] = print_line) -> None:
        self._path = path
        self._echo = echo
        self._lock = threading.Lock()

    def event(self, name: str, sentence: str = "", /, **facts: Any) -> None:
        """Record an event and show its sentence. A disk that cannot take it stops nothing: the run matters more."""
        line = json.dumps({"ts": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "event": name,
                           **({"sentence": sentence} if sentence else {}), **facts})  # fmt: skip
        with self._lock:
            if sentence:
                self._echo(sentence)
            try:
                with open(self._path, "ab+", buffering=0) as file:  # A line is one call, and so never mixed with another's.
                    file.write((b"\n" if _torn(file) else b"") + line.encode() + b"\n")
            except OSError as error:
                self._echo(f"cannot write to {self._path}: {error.strerror}")


def _torn(file: RawIOBase) -> bool:
    """Whether a file ends in half a line which nobody goes on writing: who wrote it was killed, or the disk was full."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if file.read(1) in (b"", b"\n"):
        return False
    time.sleep(_LINE_SECONDS)
    return file.seek(0, os.SEEK_END) == end
