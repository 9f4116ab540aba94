"""Training in a child process, under the owner's memory limit, while orders, the owner's rules and Ctrl-C are obeyed.

The agent never imports torch: it starts the job `train-expert` and relays its progress. The job itself keeps to the limit,
if need be by going on in another process with a smaller plan. When the owner wants the machine, the child stops at a
checkpoint and ends: that frees its memory as well as its cores, and costs no step, only the start of another child later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
import queue
import signal
import threading
from typing import Any, Protocol

from forge.system import stand_back
from node.cache import CHILD_FILE, note_child
from node.console import Budget, Console
from node.heartbeat import Heartbeats
from node.messages import Order, Progress
from node.rules import Hold
from node.senses import LOWEST

#: Seconds between two looks at the coordinator's orders.
LOOK_SECONDS = 0.5
LOG_FILE = "train.log"


class StopNow(KeyboardInterrupt):  # noqa: N818 - not an error, as the one that it comes from
    """The owner pressed Ctrl-C again: nothing is waited for."""


class RunningJob(Protocol):
    """A child process, as `forge.jobs.Job` is one."""

    peak_rss: int

    @property
    def pid(self) -> int:
        """Process id; another one after the job went on in a new process."""

    def events(self) -> Iterator[dict[str, Any]]:
        """Progress events until it ends."""

    def result(self) -> dict[str, Any]:
        """What it returned; raises its error."""

    def finish(self) -> None:
        """Ask it to stop at the next checkpoint."""

    def kill(self) -> None:
        """Stop it now."""


#: Starts the job from its arguments, threads, log and the resident bytes that it may have.
RunJob = Callable[[dict[str, Any], int, Path, int], RunningJob]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a training process ended.

    `shard` and `manifest` are set when the expert is finished; `held` when it stopped because the owner wants the machine.
    Sizes in bytes.
    """

    order: Order
    held: bool = False
    shard: Path | None = None
    manifest: Path | None = None
    sha256: str = ""
    peak_bytes: int = 0
    predicted_bytes: int = 0


def run_train_expert(arguments: dict[str, Any], threads: int, log: Path, ram_bytes: int) -> RunningJob:
    """Start the real job."""
    from forge.jobs import Job

    return Job("train-expert", arguments, threads=threads, log=log, ram_bytes=ram_bytes)


class Worker:
    """Trains experts, one child process at a time.

    Args:
        console: where progress is shown.
        ram_bytes: resident memory that the child may have.
        threads: threads that the child may use.
        device: cpu, cuda or mps.
        run_job: starts the child; tests put another one here.
        hold: why the child has to stop for a while, or None.
        nice: the child's priority.
    """

    def __init__(self, console: Console, *, ram_bytes: int, threads: int, device: str, run_job: RunJob = run_train_expert,
                 hold: Callable[[], Hold | None] = lambda: None, nice: int = LOWEST) -> None:  # fmt: skip
        self._console = console
        self._ram_bytes = ram_bytes
        self._threads = threads
        self._device = device
        self._run_job = run_job
        self._hold = hold
        self._nice = nice

    def train(self, assignment: dict[str, Any], work_dir: Path, beats: Heartbeats, predicted: int) -> Trained:
        """Train the expert of an assignment, from its checkpoint if there is one.

        Args:
            assignment: what the job `train-expert` takes.
            work_dir: where its checkpoint, shard and manifest lie.
            beats: told the progress, asked for orders.
            predicted: peak resident memory of the plan to begin with, in bytes.

        Raises:
            MemoryBudgetError: the child used more than was allowed, with the smallest plan.
            ForgeError: what the child raised.
            KeyboardInterrupt: the owner pressed Ctrl-C; the child has stopped at a checkpoint.
            StopNow: pressed it twice; it has stopped where it was.
        """
        arguments = {"assignment": assignment, "work_dir": str(work_dir), "ram_bytes": predicted,
                     "threads": self._threads, "device": self._device}  # fmt: skip
        job = self._run_job(arguments, self._threads, work_dir / LOG_FILE, self._ram_bytes)
        watch = _Watch(job, int(assignment["partition"]), predicted)
        beats.on_order = watch.wake
        try:
            interrupted = self._follow(job, watch, beats, work_dir)
        except BaseException:
            job.kill()
            raise
        finally:
            watch.join()
            (work_dir / CHILD_FILE).unlink(missing_ok=True)
        if interrupted:
            raise StopNow if interrupted > 1 else KeyboardInterrupt
        if watch.killed_for is Order.ABANDON:
            return Trained(order=Order.ABANDON, peak_bytes=job.peak_rss, predicted_bytes=watch.predicted)
        result = job.result()
        done = bool(result.get("finished")) and bool(result.get("shard"))
        return Trained(
            order=Order.CONTINUE if done else Order.FINISH,
            held=watch.held and beats.order is Order.CONTINUE and not done,
            shard=Path(result["shard"]) if done else None,
            manifest=Path(result["manifest"]) if done else None,
            sha256=str(result["sha256"]) if done else "",
            peak_bytes=max(job.peak_rss, int(result.get("peak_bytes") or 0)),
            predicted_bytes=int(result.get("predicted_bytes") or watch.predicted))  # fmt: skip

    def _follow(self, job: RunningJob, watch: _Watch, beats: Heartbeats, work_dir: Path) -> int:
        """Relay events and orders until the child ends; how often the owner pressed Ctrl-C."""
        stopping = asked = False
        noted = 0
        with _Presses() as presses:
            while not watch.ended:
                if job.pid != noted:
                    noted = job.pid
                    stand_back(noted, self._nice)
                    note_child(work_dir, noted)
                event = watch.next_event()
                if event is not None:
                    self._show(event, watch, beats)
                if beats.order is Order.ABANDON and watch.killed_for is None:
                    watch.killed_for = Order.ABANDON
                    job.kill()
                elif beats.order is Order.FINISH and not asked:
                    asked = True
                    self._console.line(f"The coordinator asks to stop at the next checkpoint: {beats.reason}")
                    job.finish()
                if not watch.held and self._hold() is not None:
                    watch.held = True
                    job.finish()
                if presses.count > 1:
                    job.kill()
                elif presses.count and not stopping:
                    stopping = True
                    self._console.line("Stopping at the next checkpoint; press Ctrl-C again to stop at once.")
                    job.finish()
        return presses.count

    def _show(self, event: dict[str, Any], watch: _Watch, beats: Heartbeats) -> None:
        if event.get("message"):
            self._console.line(str(event["message"]))
        if event.get("plan"):
            watch.predicted = int(event["plan"]["peak_bytes"])
        if not event.get("steps"):
            return
        progress = Progress(
            activity="training", step=int(event["step"]), steps=int(event["steps"]),
            loss=float(event.get("loss") or 0.0),
            tokens_per_second=float(event.get("tokens_per_second") or 0.0),
            resident_bytes=int(event.get("resident_bytes") or 0))  # fmt: skip
        beats.update(progress)
        self._console.progress(f"partition {watch.partition}", progress,
                               Budget(predicted=watch.predicted, allowed=self._ram_bytes))  # fmt: skip


class _Presses:
    """Counts Ctrl-C instead of raising it: an exception may be raised, and lost, inside a callback of a library.

    A service manager's SIGTERM is counted with it.
    """

    def __init__(self) -> None:
        self.count = 0
        # Only the main thread may say what a signal does, and only it is ever interrupted.
        main = threading.current_thread() is threading.main_thread()
        self._signals = (signal.SIGINT, signal.SIGTERM) if main else ()

    def __enter__(self) -> _Presses:
        self._before = [signal.signal(number, self._press) for number in self._signals]
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in zip(self._signals, self._before, strict=True):
            signal.signal(number, before)

    def _press(self, number: int, frame: object) -> None:
        self.count += 1


class _Watch:
    """Reads a child's events in a thread, so that the main thread can look at other things between them."""

    def __init__(self, job: RunningJob, partition: int, predicted: int) -> None:
        self.partition, self.predicted = partition, predicted
        self.killed_for: Order | None = None
        self.ended = self.held = False
        self._job = job
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, name="training-events", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for event in self._job.events():
                self._events.put(event)
        finally:
            self._events.put(None)

    def next_event(self) -> dict[str, Any] | None:
        """The next event, or None when there was none for `LOOK_SECONDS` or the child ended."""
        try:
            event = self._events.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            return None
        self.ended = event is None
        return event

    def wake(self) -> None:
        """Have whoever waits for the next event look at other things at once."""
        self._events.put({})

    def join(self) -> None:
        """Wait for the child's end, once it was told."""
        self._thread.join(timeout=30)
