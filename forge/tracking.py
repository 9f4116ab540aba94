"""`--track`: the curves of a run where people look at curves, beside what the commands print.

A tracker is optional: its package is imported when somebody asks for it, and a run is the same with and without. What it writes
stays in the run directory; nothing leaves the machine unless the tracker's own environment variables say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import copy_context
import io
import os
from pathlib import Path
import time
from typing import Any, Protocol

import click

from forge.errors import ConfigError

#: Seconds, at most, until TensorBoard's values are in its file; a kill loses no more than that.
FLUSH_SECONDS = 10
#: What trackio and wandb call all runs of this software together.
PROJECT = "modularforge"


class Sink(Protocol):
    """Where a tracker's values go."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add values at a step."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def _tensorboard(run_dir: Path) -> Callable[[], Sink]:
    """Event files in `run_dir/tensorboard`."""
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    class Files:
        def __init__(self) -> None:
            self._file = EventFileWriter(str(run_dir / "tensorboard"), flush_secs=FLUSH_SECONDS)

        def write(self, step: int, values: Mapping[str, float]) -> None:
            summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, simple_value=value)
                                                 for tag, value in values.items()])  # fmt: skip
            self._file.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

        def close(self) -> None:
            self._file.close()

    return Files


def _trackio(run_dir: Path) -> Callable[[], Sink]:
    """A database in `run_dir/trackio`, unless `TRACKIO_DIR` names another place, which is read at the import."""
    os.environ.setdefault("TRACKIO_DIR", str(run_dir.absolute() / "trackio"))
    import trackio

    class Database:
        def __init__(self) -> None:
            with redirect_stdout(io.StringIO()):  # It speaks to people in notebooks.
                # In a context of its own, or it would finish the run once more at the exit, and say so.
                self._run = copy_context().run(trackio.init, PROJECT, name=run_dir.resolve().name, resume="allow", embed=False,
                                               auto_log_cpu=False, auto_log_gpu=False)  # fmt: skip

        def write(self, step: int, values: Mapping[str, float]) -> None:
            self._run.log(dict(values), step=step)

        def close(self) -> None:
            with redirect_stdout(io.StringIO()):
                self._run.finish()

    return Database


def _wandb(run_dir: Path) -> Callable[[], Sink]:
    """A directory `run_dir/wandb/offline-run-*`, which `wandb sync` sends; `WANDB_MODE=online` sends at once."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    class Service:
        def __init__(self) -> None:
            mode: Any = os.environ.get("WANDB_MODE", "offline")
            quiet = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True,
                                   x_disable_meta=True, x_save_requirements=False)  # fmt: skip
            self._run = wandb.init(project=PROJECT, name=run_dir.resolve().name, dir=str(run_dir), settings=quiet,
                                   mode=mode)  # fmt: skip
            # Its own count must grow by one with every call; ours is a value of its own, that curves are drawn against.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")

        def write(self, step: int, values: Mapping[str, float]) -> None:
            self._run.log({**values, "step": step})

        def close(self) -> None:
            self._run.finish()

    return Service


#: Name of a tracker, which is an extra of pyproject.toml too -> what imports it and says how it is opened.
_TRACKERS = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}
TRACKERS = tuple(_TRACKERS)


def track_option(command: Callable[..., None]) -> Callable[..., None]:
    """The option of the commands that train."""
    return click.option("--track", default=None, type=click.Choice(TRACKERS),
                        help="Also write losses, pace and perplexities for it, into the run directory.")(command)  # fmt: skip


class Tracker:
    """Takes values from one thread at a time. The sink is opened by the first: a run that cannot begin leaves nothing."""

    def __init__(self, open_sink: Callable[[], Sink]) -> None:
        self._open = open_sink
        self._sink: Sink | None = None
        self._newest = dict[str, int]()

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add the values that are not None at a step; a step that a name already has, or an earlier one, is left out."""
        fresh = {tag: value for tag, value in values.items() if value is not None and step > self._newest.get(tag, -1)}
        if fresh:
            self._newest |= dict.fromkeys(fresh, step)
            self._sink = self._sink or self._open()
            self._sink.write(step, fresh)

    def close(self) -> None:
        """Write what is left."""
        if self._sink is not None:
            self._sink.close()


@contextmanager
def tracking(name: str, run_dir: Path) -> Iterator[Tracker]:
    """A tracker for as long as the block runs.

    Args:
        name: one of `TRACKERS`.
        run_dir: the run directory, which gets what the tracker writes.

    Raises:
        ConfigError: its package is not installed; raised before anything is written.
    """
    try:
        tracker = Tracker(_TRACKERS[name](run_dir))
    except ModuleNotFoundError as error:
        raise ConfigError(f"--track {name} needs a package that is not installed: pip install 'modularforge[{name}]'.",
                          detail=str(error)) from error  # fmt: skip
    try:
        yield tracker
    finally:
        tracker.close()


def track_progress(tracker: Tracker, event: Mapping[str, Any]) -> None:
    """Log the loss (nats a token) and the pace (tokens a second) that a job's progress event reports."""
    if event.get("loss") is not None:
        name = str(event["stage"]).replace(" ", "_")
        tracker.log(int(event["step"]), {f"loss/{name}": event["loss"], f"tokens_per_second/{name}": event["tokens_per_second"]})


def track_evaluations(tracker: Tracker, rows: list[dict[str, Any]]) -> None:
    """Log the mean held-out perplexity after every shard; the step is the number of experts in the model."""
    for row in rows:
        tracker.log(int(row["experts"]), {"perplexity/mean": row.get("mean_perplexity")})
