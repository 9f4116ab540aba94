"""The live view, on a real terminal of the system; what is no terminal gets lines, of text or of JSON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import io
import json
import os
from pathlib import Path
import subprocess
import sys
import threading

import pytest

from coordinator.console import view, watching
from forge.live import Output, Pace, View
from forge.terminal import Printer
from node.console import Budget, Console
from node.messages import Progress
from tests.coordinator.conftest import World
from tests.coordinator.fakes import Clock, until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
VIEW = View(title="smoke: training", done=0.5, facts=("step 5 of 10", "loss 3.2"), left="40 s left", waits_for="")
LINE = "a line [bold] from [2001:db8:a:b::1]"  # No markup, and no emoji.
SHOW = ("import sys, time; from tests.test_live import LINE, VIEW; from forge.live import Output\n"
        "out = Output()\nout.show(VIEW)\nout.line(LINE)\nout.show(VIEW)\n"
        "if sys.argv[1:]: time.sleep(600)\nout.calm()\nprint('after')")  # fmt: skip


@contextmanager
def terminal(*arguments: str, columns: int = 80, rows: int = 24,
             **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], list[bytes]]]:  # fmt: skip
    """A program on a terminal of that size, and what it writes there."""
    import fcntl
    import struct
    import termios

    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen([sys.executable, "-c", SHOW, *arguments], stdin=slave, stdout=slave, stderr=slave,
                               env={**clean, "TERM": "xterm", **environment})  # fmt: skip
    os.close(slave)
    written: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(master, 65536):
                written.append(data)
        except OSError:
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield process, written
        process.wait(30)
        reader.join(10)
    finally:
        process.kill()
        process.wait()
        reader.join(10)
        os.close(master)


def shown(**settings: object) -> bytes:
    with terminal(**settings) as (_, written):  # type: ignore[arg-type]
        pass
    return b"".join(written)


def test_a_terminal_gets_a_view_below_the_lines_and_has_its_cursor_at_the_end() -> None:
    text = shown()
    for part in ("smoke: training", "━" * 30 + "\x1b", "step 5 of 10 · loss 3.2", "40 s left", LINE, "\x1b[32m"):
        assert part in text.decode()
    assert text.rfind(b"\x1b[?25h") >= text.rfind(b"\x1b[?25l")
    assert text.endswith(b"after\r\n") and b"\x1b[?1049h" not in text


def test_no_color_means_none_and_a_small_window_gets_one_line() -> None:
    assert b"[32m" not in shown(NO_COLOR="1")
    for columns, rows in ((30, 24), (80, 6)):
        text = shown(columns=columns, rows=rows).decode()
        assert "smoke: training 50%" in text and "40 s left" not in text


def test_a_terminal_that_cannot_redraw_gets_lines() -> None:
    assert shown(TERM="dumb").decode().splitlines() == [LINE, "after"]


def test_a_kill_leaves_the_cursor_visible() -> None:
    with terminal("wait") as (process, written):
        until(lambda: b"".join(written).count(b"40 s left") >= 2, 30)
        process.kill()
    text = b"".join(written)
    assert text.rfind(b"\x1b[?25h") >= text.rfind(b"\x1b[?25l")


def test_pace() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.left("training", 10, 100) is None
    clock.now += 5.0
    assert pace.left("training", 20, 100) == 40.0
    assert pace.left("uploading", 20, 100) is None


def test_a_job_and_a_node_as_json_lines() -> None:
    out = io.StringIO()
    with Printer("json", out, ram_bytes=1 << 30) as printer:
        printer({"event": "stage", "stage": "shared"})
        printer({"event": "progress", "stage": "shared", "step": 4, "steps": 8, "loss": 3.5, "tokens_per_second": 100.0,
                 "message": None, "resident_bytes": 1 << 20})  # fmt: skip
    memory, stage, progress = map(json.loads, out.getvalue().splitlines())
    assert memory["event"] == "memory" and memory["text"].startswith("Work in child processes is held to 1.0G by ")
    assert stage | {"ts": ""} == {"ts": "", "event": "stage", "text": "== shared"}
    assert (progress["event"], progress["step"], progress["loss"], progress["remaining_seconds"]) == ("progress", 4, 3.5, None)
    out = io.StringIO()
    console = Console(out, log_format="json")
    console.wait("waiting for work")
    console.progress("partition 3", Progress(activity="training", step=1, steps=9), Budget(predicted=5, allowed=7))
    wait, progress = map(json.loads, out.getvalue().splitlines())
    assert (wait["event"], wait["text"]) == ("wait", "waiting for work")
    assert {"title": "partition 3", "activity": "training", "step": 1, "steps": 9, "predicted_bytes": 5,
            "allowed_bytes": 7}.items() <= progress.items()  # fmt: skip


def test_the_view_of_a_coordinator_is_its_snapshot(tmp_path: Path) -> None:
    world = World(tmp_path / "run", Clock())
    try:
        coordinator = world.start()
        until(lambda: coordinator.snapshot()["phase"]["phase"] == "experts")
        seen, out = view(coordinator.snapshot(), 2 << 30), io.StringIO()
        assert seen.title == "tiny: taking experts" and seen.waits_for == "waiting for a node that trains"
        assert "0 of 3 experts accepted" in seen.facts and "so the time cannot be told" in seen.left
        busy = coordinator.snapshot()
        busy["phase"] |= {"resident_bytes": 300 << 20, "predicted_bytes": 310 << 20}
        assert "memory 300M (predicted 310M, allowed 2.0G)" in view(busy, 2 << 30).facts
        assert "memory 300M (predicted 310M)" in view(busy, None).facts
        with watching(Output(out, log_format="json"), coordinator.snapshot, None):
            until(out.getvalue)
        state = json.loads(out.getvalue().splitlines()[0])
        assert state["event"] == "state" and state["phase"]["phase"] == "experts" and state["estimate"]["because"]
    finally:
        world.stop()
