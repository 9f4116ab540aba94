"""What happened, in order: `events.jsonl` for programs, a line on the terminal for people."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
import json
import os
from pathlib import Path
import sys
import threading
from typing import IO, Any


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
                with open(self._path, "ab+") as file:
                    begun = b"" if _ends_with_a_line(file) else b"\n"  # Who wrote before was killed in the middle of a line.
                    file.write(begun + line.encode() + b"\n")
            except OSError as error:
                self._echo(f"cannot write to {self._path}: {error.strerror}")


def _ends_with_a_line(file: IO[bytes]) -> bool:
    """Whether a file is empty or its last byte is the end of a line."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    return file.read() in (b"", b"\n")
