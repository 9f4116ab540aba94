"""The one seam through which the coordinator has heavy work done: a child process, or whatever a test puts there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import threading
from typing import Any, Protocol

from forge.errors import ForgeError
from forge.jobs import Job
from forge.system import set_priority

#: Seconds that shared training gets to write its last checkpoint when the coordinator is stopped.
GRACE_SECONDS = 20.0
#: Priority of the children for processors, as of nice(1): nodes wait for answers, and nobody waits for a verdict that long.
NICE = 10

OnProgress = Callable[[dict[str, Any]], None]


class Stopped(Exception):  # noqa: N818 - not an error: it ends a thread
    """The coordinator is being stopped."""


class RunJob(Protocol):
    """Run a job to its end; safe from any thread. Whatever `on_progress` raises ends the job and comes through.

    Raises:
        ForgeError: the job failed.
        Stopped: the coordinator is being stopped.
    """

    def __call__(self, name: str, arguments: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
        """Return the job's result."""
        ...


class JobRunner:
    """Runs jobs as child processes and ends them when it is stopped.

    Args:
        log: file that takes the children's stderr.
        on_end: told the name, the arguments and the result (with `peak_bytes`) of a job that ended well.
        ram_bytes: memory that each job may have; None is all there is.
    """

    def __init__(self, log: Path, on_end: Callable[[str, dict[str, Any], dict[str, Any]], None],
                 ram_bytes: int | None = None) -> None:  # fmt: skip
        self._log, self._on_end, self._ram_bytes = log, on_end, ram_bytes
        self._lock = threading.Lock()
        self._running: dict[Job, bool] = {}
        self._stopped = False

    def __call__(self, name: str, arguments: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
        """Run one job to its end (see `RunJob`)."""
        with self._lock:
            if self._stopped:
                raise Stopped
            job = Job(name, arguments | {"ram_bytes": self._ram_bytes}, log=self._log, ram_bytes=self._ram_bytes)
            self._running[job] = arguments.get("stage") == "shared"
        set_priority(job.pid, NICE)
        try:
            for event in job.events():
                on_progress(event)
            result = job.result()
        except ForgeError as error:
            if self._stopped:
                raise Stopped from error
            raise
        finally:
            job.kill()  # It has ended, unless whoever listens raised: nobody wants the rest then.
            for _ in job.events():
                pass
            with self._lock:
                del self._running[job]
        with self._lock:
            self._on_end(name, arguments, {"peak_bytes": job.peak_rss, **result})
        if self._stopped and result.get("finished") is False:
            raise Stopped
        return result

    def stop(self) -> None:
        """End every child: shared training writes a last checkpoint (`GRACE_SECONDS`), the rest has nothing to save."""
        with self._lock:
            self._stopped = True
            running = dict(self._running)
        for job, has_checkpoint in running.items():
            if not has_checkpoint:
                job.kill()
                continue
            job.finish()
            timer = threading.Timer(GRACE_SECONDS, job.kill)
            timer.daemon = True
            timer.start()
