"""`--track`: the curves of a run where people look at curves, beside what the commands print.

A tracker is optional: its package is imported when somebody asks for it, and a run is the same with and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
import time
from typing import Any, Protocol

import click

from forge.errors import ConfigError

#: Names that `--track` takes; each is an extra of pyproject.toml, too.
TRACKERS = ("tensorboard",)
#: Seconds, at most, until a value is in its file; a kill loses no more than that.
FLUSH_SECONDS = 10


def track_option(command: Callable[..., None]) -> Callable[..., None]:
    """The option of the commands that train."""
    return click.option("--track", default=None, type=click.Choice(TRACKERS),
                        help="Also write losses, pace and perplexities for it, into the run directory.")(command)  # fmt: skip


class Tracker(Protocol):
    """Where values go."""

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add the values that are not None at a step; a step that a name already has, or an earlier one, is left out."""
        ...


@contextmanager
def tracking(name: str, run_dir: Path) -> Iterator[Tracker]:
    """A tracker for as long as the block runs. TensorBoard's files are in `run_dir/tensorboard`.

    Args:
        name: one of `TRACKERS`.
        run_dir: the run directory.

    Raises:
        ConfigError: its package is not installed; raised before anything is written.
    """
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ModuleNotFoundError as error:
        raise ConfigError(f"--track {name} needs a package that is not installed: pip install 'modularforge[{name}]'.",
                          detail=str(error)) from error  # fmt: skip

    class Writer:
        def __init__(self) -> None:
            self._file: EventFileWriter | None = None  # Made with the first value: a run that cannot begin leaves nothing.
            self._newest = dict[str, int]()

        def log(self, step: int, values: Mapping[str, float | None]) -> None:
            fresh = {tag: value for tag, value in values.items() if value is not None and step > self._newest.get(tag, -1)}
            if not fresh:
                return
            self._newest |= dict.fromkeys(fresh, step)
            self._file = self._file or EventFileWriter(str(run_dir / "tensorboard"), flush_secs=FLUSH_SECONDS)
            summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, simple_value=value)
                                                 for tag, value in fresh.items()])  # fmt: skip
            self._file.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

        def close(self) -> None:
            if self._file is not None:
                self._file.close()

    writer = Writer()
    try:
        yield writer
    finally:
        writer.close()


def track_progress(tracker: Tracker, event: Mapping[str, Any]) -> None:
    """Log the loss (nats a token) and the pace (tokens a second) that a job's progress event reports."""
    if event.get("loss") is not None:
        name = str(event["stage"]).replace(" ", "_")
        tracker.log(int(event["step"]), {f"loss/{name}": event["loss"], f"tokens_per_second/{name}": event["tokens_per_second"]})


def track_evaluations(tracker: Tracker, rows: list[dict[str, Any]]) -> None:
    """Log the mean held-out perplexity after every shard; the step is the number of experts in the model."""
    for row in rows:
        tracker.log(int(row["experts"]), {"perplexity/mean": row.get("mean_perplexity")})
