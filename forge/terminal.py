"""What the commands print about a run: progress as lines, and the evaluation at its end."""

from __future__ import annotations

import json
from pathlib import Path
import time
from typing import Any

import click


class Printer:
    """Progress of jobs as plain lines: one a stage, then one every few seconds."""

    #: Seconds between two lines of one stage.
    INTERVAL = 3.0

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        """Print one event, or leave it out when the last line is young."""
        if event["event"] == "stage":
            self._last = 0.0
            click.echo(f"== {event['stage']}")
            return
        if not event["steps"] and not event.get("message"):
            return
        if time.monotonic() - self._last < self.INTERVAL and event["step"] != event["steps"]:
            return
        self._last = time.monotonic()
        click.echo(progress_line(event))


def progress_line(event: dict[str, Any]) -> str:
    """One progress event for people: stage, steps, loss, speed, memory and the time left."""
    from forge.train.memory import format_size

    if not event["steps"]:
        return f"  {event['message']}"
    parts = [f"{event['stage']}: {event['step']:,} of {event['steps']:,}"]
    if event.get("message"):
        parts.append(str(event["message"]))
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event.get("tokens_per_second"):
        parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"memory {format_size(event['resident_bytes'])}")
    return "  " + ", ".join(parts)


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
