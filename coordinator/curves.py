"""Training losses against steps, as heartbeats report them: bounded in memory, kept on disk across restarts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
import json
import logging
import math
from pathlib import Path
import threading
import time
from typing import Any

from forge.errors import StorageError
from forge.files import read_json, write_bytes

#: Points a curve keeps at most; a full curve is thinned to half as many, evenly. A chart has some 400 pixels.
MAX_POINTS = 128
#: Curves that are kept: one an expert, and the shared components'.
MAX_CURVES = 1024
#: Seconds between two writes to the disk; a killed coordinator forgets at most so much.
SAVE_SECONDS = 10.0

#: The curve of the shared components; an expert's has its number.
SHARED = "shared"

_log = logging.getLogger(__name__)


@dataclass
class _Curve:
    points: list[tuple[int, float]] = field(default_factory=list)
    stride: float = 0.0
    """Steps between two points, at least; the newest point moves on until it is so far from the one before."""

    def add(self, step: int, loss: float) -> None:
        points = self.points
        while points and points[-1][0] >= step:
            points.pop()
        if len(points) > 1 and points[-1][0] - points[-2][0] < self.stride:
            points.pop()
        points.append((step, loss))
        if len(points) > MAX_POINTS:
            self.stride = 2 * (step - points[0][0]) / MAX_POINTS
            self.points = points[:1]
            for point in points[1:-1]:
                if point[0] - self.points[-1][0] >= self.stride:
                    self.points.append(point)
            self.points.append(points[-1])


class Curves:
    """Loss curves by name; safe from any thread.

    Args:
        path: where they are kept; None keeps them in memory only.
        clock: monotonic seconds.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self._curves = _load(path)
        self._saved_at, self._changed = clock(), False

    def add(self, name: str, step: int, loss: float) -> None:
        """Add a point. A step that the curve is beyond begins again from there: another node, or an older checkpoint."""
        if not math.isfinite(loss):
            return
        with self._lock:
            if name not in self._curves and len(self._curves) >= MAX_CURVES:
                return
            self._curves.setdefault(name, _Curve()).add(step, round(loss, 4))
            self._changed = True
            due = self._clock() - self._saved_at >= SAVE_SECONDS
        if due:
            self.save()

    def points(self) -> dict[str, list[tuple[int, float]]]:
        """Name -> points (step, nats a token), by step."""
        with self._lock:
            return {name: list(curve.points) for name, curve in self._curves.items()}

    def save(self) -> None:
        """Write them to the disk if they changed. A disk that cannot take a picture's data stops nothing."""
        with self._lock:
            self._saved_at = self._clock()
            if self._path is None or not self._changed:
                return
            self._changed = False
        try:
            # In one line: with indents, a thousand full curves would keep every other thread waiting for seconds.
            write_bytes(self._path, json.dumps(self.points()).encode())
        except StorageError as error:
            _log.warning("the loss curves are not kept: %s", error)


def _load(path: Path | None) -> dict[str, _Curve]:
    if path is None or not path.is_file():
        return {}
    try:
        held: dict[str, Any] = read_json(path)
        return {name: _Curve([(int(step), float(loss)) for step, loss in points]) for name, points in held.items()}
    except (StorageError, AttributeError, TypeError, ValueError) as error:
        _log.warning("the loss curves begin anew: %s", error)
        return {}
