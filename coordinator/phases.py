"""The coordinator's working thread: the stages one after another, then the experts as they arrive."""

from __future__ import annotations

from collections.abc import Callable
import threading
import time
from typing import Any

from coordinator.activity import SENTENCES, Activity
from coordinator.adoption import adopt
from coordinator.assembler import ATTEMPTS, RETRY_SECONDS, Assembler, progress_facts
from coordinator.blobs import Uploads
from coordinator.curves import SHARED, Curves
from coordinator.database import DatabaseUnavailableError
from coordinator.jobs import RunJob, Stopped
from coordinator.journal import Journal
from coordinator.state import State
from forge.checkpoint import assembly
from forge.errors import ForgeError
from forge.files import RunDirectory
from forge.train.memory import process_bytes
from forge.vocabulary import STAGES

#: Seconds after the start, and between two times, until uploads that nobody committed are looked for: nodes that waited for
#: this coordinator have come back by then.
TIDY_SECONDS = 3600.0
#: Seconds between two lines of progress.
LINE_SECONDS = 5.0


class Work:
    """Everything that happens without being asked for by a node.

    Args:
        run: the run directory.
        state: the coordinator's memory.
        assembler: takes over when the run is published.
        uploads: what is left of them is deleted when the run is done.
        run_job: does the heavy work.
        activity: told what happens now.
        journal: told what happened.
        echo: shows a line of progress.
        curves: told the losses of the shared components.
    """

    def __init__(self, *, run: RunDirectory, state: State, assembler: Assembler, uploads: Uploads, run_job: RunJob,
                 activity: Activity, journal: Journal, echo: Callable[[str], None], curves: Curves) -> None:  # fmt: skip
        self._run, self._state, self._assembler, self._run_job = run, state, assembler, run_job
        self._uploads, self._activity, self._journal, self._echo = uploads, activity, journal, echo
        self._curves, self._last_line = curves, 0.0
        self._tidy_at = time.monotonic() + TIDY_SECONDS
        self.stopping = threading.Event()
        #: Set while the thread has nothing more to do: the run is done, it failed, or it was stopped.
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="work", daemon=True)

    def start(self) -> None:
        """Begin, or go on where the run directory says."""
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait for the thread's end."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _main(self) -> None:
        try:
            self.prepare()
            while not self.stopping.is_set():
                pause = self._patiently(self._step)
                if self._assembler.done and not self.ended.is_set():
                    self._uploads.forget_all()
                    self.ended.set()
                elif self.ended.is_set() and not self._assembler.done:  # A shard was dropped: the run goes on.
                    self.ended.clear()
                self.stopping.wait(pause)
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            self.error = error
            self._journal.event("failed", error=type(error).__name__, sentence=str(error))
        finally:
            self.ended.set()

    def _patiently(self, step: Callable[[], float]) -> float:
        """Seconds to pause after a step; a database that cannot be used for a while ends nothing."""
        try:
            return step()
        except DatabaseUnavailableError as error:
            self._journal.event("database-unavailable", f"{error} Trying again in {RETRY_SECONDS:.0f} s.", error=str(error))
            return RETRY_SECONDS

    def _step(self) -> float:
        if time.monotonic() > self._tidy_at:
            self._tidy_at = time.monotonic() + TIDY_SECONDS
            self.tidy()
        return self._assembler.step()

    def tidy(self) -> None:
        """Forget what was uploaded and never committed."""
        forgotten = self._uploads.forget_unused(time.time())
        if forgotten:
            self._journal.event("forgotten", sha256=forgotten)

    def prepare(self) -> None:
        """Run the stages that are not finished, make the model without experts, and open the partitions.

        Raises:
            ForgeError: what stopped a stage.
            Stopped: the coordinator is being stopped.
        """
        for stage in STAGES:
            if self._run.marker(stage) is None:
                self._run_stage(stage)
        while pause := self._patiently(self._open):
            if self.stopping.wait(pause):
                raise Stopped

    def _open(self) -> float:
        """Make the model and open the partitions, as far as that is missing; seconds to pause before it is tried again."""
        facts = self._run.marker("publish")
        assert facts is not None
        assembly.start(self._run)
        self._state.open_partitions(facts["partitions"])
        if adopted := adopt(self._run, self._state):
            which = ", ".join(map(str, adopted))
            self._journal.event("adopted", f"experts that this machine trained before are accepted: {which}", partitions=adopted)
        self._activity.enter("evaluate")
        if pause := self._assembler.first_evaluation():
            return pause
        counts = self._state.counts()
        self._activity.enter("experts")
        self._journal.event("experts", f"nodes can train experts now: {counts.accepted} of {counts.total} are accepted",
                            accepted=counts.accepted, total=counts.total)  # fmt: skip
        return 0.0

    def _run_stage(self, stage: str) -> None:
        self._activity.enter(stage, process_bytes(self._run.config, stage))
        self._journal.event("stage-started", f"{SENTENCES[stage]} ...", stage=stage)
        begun = time.monotonic()
        self._try_stage(stage)
        if self._run.marker(stage) is None:
            raise ForgeError(f"The stage {stage} ended without a result: run the same command again to go on.")
        seconds = time.monotonic() - begun
        self._journal.event("stage-finished", f"{SENTENCES[stage]}: finished in {seconds:.0f} s", stage=stage,
                            seconds=round(seconds, 1))  # fmt: skip

    def _try_stage(self, stage: str) -> None:
        """Run a stage's job. One that died without a word is started again: it goes on from its checkpoint."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._run_job("stage", {"run_dir": str(self._run.root), "stage": stage}, self._show)
                return
            except ForgeError as error:
                # The subclasses are about the run and come again; the plain one is about the process.
                if type(error) is not ForgeError or attempt == ATTEMPTS:
                    raise
                self._journal.event(
                    "stage-failed", f"{error} Trying again in {RETRY_SECONDS:.0f} s (attempt {attempt} of {ATTEMPTS}).",
                    stage=stage, error=str(error))  # fmt: skip
            if self.stopping.wait(RETRY_SECONDS):
                raise Stopped

    def _show(self, event: dict[str, Any]) -> None:
        self._activity.progress(event)
        if event.get("stage") == SHARED and event.get("loss") is not None:
            self._curves.add(SHARED, int(event["step"]), float(event["loss"]))
        now = time.monotonic()
        if now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self._echo(f"  {self._activity.snapshot().phase}: {progress_facts(event)}")
