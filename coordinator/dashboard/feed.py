"""Snapshots as server-sent events: what a page has not seen yet, and nothing twice.

Every section has the version in which it last changed, and an event's id is `BOOT.VERSION`. A reader that comes with the
id of its last event gets the sections that changed since; with another boot's id, or none, it gets all of them. There is
no queue: a slow reader skips versions instead of filling memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
import json
import secrets
from typing import Any

from coordinator.snapshot import Json


@dataclass
class Feed:
    """The newest snapshot, in sections that remember when they changed; used by one thread."""

    boot: str = field(default_factory=lambda: secrets.token_hex(6))
    """Tells the ids of this process from those of the one before."""
    _version: int = 0
    _now: float = 0.0
    _sections: dict[str, tuple[int, str]] = field(default_factory=dict)
    _objects: dict[str, Any] = field(default_factory=dict)

    def update(self, snapshot: Json) -> None:
        """Take a snapshot over. A curve is a section of its own: heartbeats change one at a time."""
        self._now = snapshot["now"]
        sections = {name: value for name, value in snapshot.items() if name not in ("now", "curves")}
        sections |= {f"curve {name}": points for name, points in snapshot["curves"].items()}
        for name, value in sections.items():
            if self._objects.get(name) is value is not None:
                continue  # The very same object: of a large run, evaluations alone would be a million numbers to write.
            self._objects[name], text = value, _compact(value)
            if name not in self._sections or self._sections[name][1] != text:
                self._version += 1
                self._sections[name] = (self._version, text)

    @property
    def newest(self) -> str:
        """The id of the newest version."""
        return f"{self.boot}.{self._version}"

    def event(self, after: str) -> bytes:
        """The event that takes a reader from the id `after` to the newest one: `now`, `full` (whether what it had is
        void) and the `sections` that changed, of which there may be none.
        """
        seen = self._seen(after)
        parts = [f"{json.dumps(name)}:{text}" for name, (version, text) in self._sections.items() if version > seen]
        data = f'{{"now":{self._now},"full":{_compact(seen < 0)},"sections":{{{",".join(parts)}}}}}'
        return f"id: {self.newest}\ndata: {data}\n\n".encode()

    def _seen(self, after: str) -> int:
        boot, _, version = after.partition(".")
        known = boot == self.boot and version.isascii() and version.isdecimal() and len(version) < 16
        return int(version) if known and int(version) <= self._version else -1


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
