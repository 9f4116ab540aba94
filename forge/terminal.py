"""What the commands print about a run: its progress, and the evaluation at its end."""

from __future__ import annotations

import json
from pathlib import Path
import time
from typing import Any, TextIO

import click

from forge.live import LogFormat, Output, Pace, View, duration


class Printer:
    """Progress of jobs: a live view on a terminal, else one line a stage and then one every few seconds, or JSON lines.

    As a context manager it says at the beginning how the limit is kept, and takes the view away at the end, however that comes.

    Args:
        log_format: lines of text or of JSON.
        stream: where to print; standard output when None.
        live: whether `stream` is a terminal that can redraw; found out when None.
        ram_bytes: the limit to show beside the memory; None shows none.
    """

    #: Seconds between two lines of one stage.
    INTERVAL = 3.0

    def __init__(self, log_format: LogFormat = "text", stream: TextIO | None = None, live: bool | None = None,
                 ram_bytes: int | None = None) -> None:  # fmt: skip
        self.out = Output(stream, live=live, log_format=log_format)
        self._pace = Pace(time.monotonic)
        self._last, self._ram_bytes = 0.0, ram_bytes

    def __enter__(self) -> Printer:
        if self._ram_bytes is not None:
            from forge.jobs import enforcement

            self.out.line(enforcement(self._ram_bytes), "memory")
        return self

    def __exit__(self, *raised: object) -> None:
        self.out.calm()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event, or leave it out when the last line is young."""
        if event["event"] == "stage":
            self._last = 0.0
            self.out.line(f"== {event['stage']}", "stage")
            self.out.show(View(title=str(event["stage"])))
            return
        if not event["steps"] and not event.get("message"):
            return
        left = self._pace.left(str(event["stage"]), event["step"], event["steps"])
        done = event["step"] / event["steps"] if event["steps"] else 0.0
        why = "" if left is None else f"{duration(left)} left: {event['steps'] - event['step']:,} steps to go at this pace"
        self.out.show(View(title=str(event["stage"]), done=done, facts=tuple(_facts(event, self._ram_bytes)), left=why))
        if self.out.live or (time.monotonic() - self._last < self.INTERVAL and event["step"] != event["steps"]):
            return
        self._last = time.monotonic()
        if self.out.json:
            self.out.record("progress", **{key: value for key, value in event.items() if key != "event"},
                            remaining_seconds=left)  # fmt: skip
        else:
            self.out.line(progress_line(event))


def progress_line(event: dict[str, Any]) -> str:
    """One progress event for people: stage, steps, loss, speed, memory and the time left."""
    if not event["steps"]:
        return f"  {event['message']}"
    first, *rest = _facts(event)
    return "  " + ", ".join([f"{event['stage']}: {first}", *rest])


def _facts(event: dict[str, Any], ram_bytes: int | None = None) -> list[str]:
    from forge.train.memory import format_size

    parts = [f"{event['step']:,} of {event['steps']:,}"] if event["steps"] else []
    if event.get("message"):
        parts.append(str(event["message"]))
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event.get("tokens_per_second"):
        parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    if event["resident_bytes"]:
        limit = "" if ram_bytes is None else f" of {format_size(ram_bytes)} allowed"
        parts.append(f"memory {format_size(event['resident_bytes'])}{limit}")
    return parts


def print_evaluation(root: Path) -> None:
    """What `reports/` tells of a run: perplexities and their meaning, samples, and the memory of every process."""
    from forge.evaluate.table import evaluation_lines

    for line in evaluation_lines(json.loads((root / "reports" / "evaluation.json").read_text())):
        click.echo(line)
    memory = root / "reports" / "memory.json"
    if memory.is_file():
        from forge.train.memory import format_size

        click.echo(f"\n{'peak memory':28}{'measured':>9}{'predicted':>11}")
        for process, row in json.loads(memory.read_text()).items():
            predicted = format_size(row["predicted_bytes"]) if row["predicted_bytes"] else "-"
            click.echo(f"{process:28}{format_size(row['peak_bytes']):>9}{predicted:>11}")
