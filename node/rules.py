"""When the node may work, as its owner decided beforehand: the hours, the battery, and whether the owner is at the machine."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
import re
from typing import Protocol

#: Seconds without a sign of the owner after which `--when idle` takes the machine for idle: BOINC's default.
IDLE_SECONDS = 180.0
_DAY = 24 * 60
_SPAN = re.compile(r"\s*(\d{1,2})(?::([0-5]\d))?\s*-\s*(\d{1,2})(?::([0-5]\d))?\s*")


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Why a node stands still, and when it goes on by itself: in words, and as local time where that is known."""

    reason: str
    goes_on: str
    until: datetime | None = None

    def __str__(self) -> str:
        return f"{self.reason}; goes on {self.goes_on}"


@dataclass(frozen=True)
class Hours:
    """Spans of the day in local time, such as `22-7` or `8:30-12,14-18`; minutes from midnight, the end not included."""

    text: str
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> Hours:
        """Read spans that commas separate.

        Raises:
            ValueError: what is wrong, as a sentence.
        """
        spans = []
        for part in text.split(","):
            match = _SPAN.fullmatch(part)
            start, end = ((int(match[1]) * 60 + int(match[2] or 0), int(match[3]) * 60 + int(match[4] or 0))
                          if match else (0, 0))  # fmt: skip
            if start == end or max(start, end) > _DAY:
                raise ValueError(f"{part.strip()!r} is not a span of hours: write for example 22-7 or 8:30-12,14-18")
            spans.append((start % _DAY, end))
        return cls(text, tuple(spans))

    def include(self, moment: datetime) -> bool:
        """Whether a local time lies in one of the spans."""
        minute = moment.hour * 60 + moment.minute
        return any(start <= minute < end if start < end else minute >= start or minute < end for start, end in self.spans)

    def opening(self, moment: datetime) -> datetime:
        """When the next span begins after a local time."""
        midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
        starts = [midnight + timedelta(minutes=start) for start, _ in self.spans]
        return min(start if start > moment else start + timedelta(days=1) for start in starts)


class Senses(Protocol):
    """What can be known of the owner; `node/senses.py` asks the operating system."""

    def on_battery(self) -> bool:
        """Whether the machine runs on its battery."""

    def quiet_seconds(self) -> float:
        """Seconds since the last sign that the owner uses the machine."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the owner decided; without a rule the node always works.

    Args:
        idle: work only while nobody uses the machine.
        hours: work only in these; None means at any hour.
        on_battery: work on the battery as well.
    """

    idle: bool = False
    hours: Hours | None = None
    on_battery: bool = False

    def hold(self, now: datetime, senses: Senses) -> Hold | None:
        """Why the node has to stand still at a local time; None when it may work."""
        if self.hours is not None and not self.hours.include(now):
            opens = self.hours.opening(now)
            return Hold(reason=f"outside the hours {self.hours.text}", goes_on=f"at {opens:%H:%M}", until=opens)
        if not self.on_battery and senses.on_battery():
            return Hold(reason="this machine runs on its battery", goes_on="when it is plugged in")
        if self.idle and senses.quiet_seconds() < IDLE_SECONDS:
            return Hold(reason="this machine is in use", goes_on=f"when nobody has used it for {IDLE_SECONDS / 60:.0f} min")
        return None
