"""What the operating system tells of a machine's owner.

A sign of the owner is input, where it can be seen (Linux: terminals, and the counters of keyboards, mice and touchpads that
every user may read), or that other processes keep a processor busy. Work of low priority counts for nobody: it stands
back for the owner as ours does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
import time

import psutil

#: Cores that other processes may keep busy, averaged over `LOAD_SECONDS`, while the machine still counts as unused. A desktop
#: that nobody uses takes a tenth or two; a compiler, a game or a video call one and more.
BUSY_CORES = 0.5
LOAD_SECONDS = 60.0
#: The nice value of training: it gets the processor time that nobody else wants.
LOWEST = 19
#: bInterfaceProtocol of a USB keyboard and a USB mouse (USB HID 1.11, 4.3). Other such devices, a UPS for example, report
#: all the time.
_KEYBOARD_OR_MOUSE = ("01", "02")


class Senses:
    """The signs of the owner, noticed whenever it is asked.

    Args:
        root: where `dev`, `proc` and `sys` are looked for.
        clock: seconds.
        others: CPU seconds that processes not of ours have used since the machine started.
    """

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic,
                 others: Callable[[], float] | None = None) -> None:  # fmt: skip
        self._root, self._clock, self._others = root, clock, others or others_cpu_seconds
        self._marks: dict[str, float] = {}
        self._samples: deque[tuple[float, float]] = deque()
        # Somebody has just started this node.
        self._last_sign = clock()

    def on_battery(self) -> bool:
        """Whether the machine runs on its battery; False where there is none."""
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        return battery is not None and battery.power_plugged is False

    def quiet_seconds(self) -> float:
        """Seconds since the last sign of the owner; a sign between two questions counts as of now."""
        now, marks = self._clock(), dict(_input_marks(self._root))
        busy = self._busy_cores(now) > BUSY_CORES
        if busy or marks != self._marks:
            self._marks, self._last_sign = marks, now
        return now - self._last_sign

    def seen(self) -> str:
        """What the owner is known by on this machine, for people."""
        marks = [name for name, _ in _input_marks(self._root)]
        inputs = len([name for name in marks if not name.startswith(str(self._root / "dev"))])
        terminals = f"{len(marks) - inputs} terminals, " if len(marks) > inputs else ""
        return f"{inputs} keyboards and pointers, {terminals}and the load of other programs"

    def _busy_cores(self, now: float) -> float:
        """Cores that others kept busy in the last minute; 0 while less than that is known."""
        self._samples.append((now, self._others()))
        while len(self._samples) > 2 and now - self._samples[1][0] >= LOAD_SECONDS:
            self._samples.popleft()
        (then, before), (_, after) = self._samples[0], self._samples[-1]
        return (after - before) / (now - then) if now - then >= LOAD_SECONDS else 0.0


def others_cpu_seconds() -> float:
    """CPU seconds that processes at normal priority, other than this one and its children, have used."""
    times, here = psutil.cpu_times(), psutil.Process()
    busy = times.user + times.system
    # Where the system counts low priority apart, what our children computed is not in `user`.
    apart = hasattr(times, "nice")
    ours = here.cpu_times()
    own = ours.user + ours.system + ours.children_system + (0.0 if apart else ours.children_user)
    for child in here.children():
        with suppress(psutil.Error):
            theirs = child.cpu_times()
            own += theirs.system + (0.0 if apart else theirs.user)
    return float(busy - own)


def _input_marks(root: Path) -> Iterator[tuple[str, float]]:
    """Numbers of this machine that change when somebody types, clicks or points, and at hardly any other time."""
    for path in (*root.glob("dev/pts/[0-9]*"), *root.glob("dev/tty[0-9]*")):
        with suppress(OSError):
            yield str(path), path.stat().st_atime  # Of the last input: what is printed sets another time.
    for path in root.glob("sys/bus/usb/devices/*/bInterfaceProtocol"):
        if _text(path).strip() in _KEYBOARD_OR_MOUSE and _text(path.with_name("bInterfaceClass")).strip() == "03":
            # One more for every report; the interface 1-2:1.0 belongs to the device 1-2.
            counter = path.parent.parent / path.parent.name.split(":")[0] / "urbnum"
            with suppress(ValueError):
                yield str(counter), float(_text(counter))
    names = {line.split('"')[1].split()[0] for line in _text(root / "proc/bus/input/devices").splitlines()
             if line.startswith('N: Name="') and ":" in line.split('"')[1].split(" ")[0]}  # fmt: skip
    for line in _text(root / "proc/interrupts").splitlines():
        number, *words = line.split()
        # A built-in keyboard is an i8042; a touchpad too, or it has a line with its own name, such as ELAN1200:00.
        if "i8042" in words or names.intersection(words):
            yield f"irq {number}", float(sum(int(word) for word in words if word.isdigit()))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
