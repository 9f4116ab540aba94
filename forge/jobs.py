"""Heavy work in a child process: the coordinator and the node's agent stay small and never import torch.

A job is `python -m forge.jobs NAME`. Its arguments are one JSON line on stdin; a further line `finish` asks it to stop at
the next checkpoint; the end of stdin means that the parent died, and the child exits at once. Every line on the child's
stdout is a JSON event: `progress`, then one `result` or `error`.

A job that is given a limit is held to it, by the kernel where that may be and by a watchdog everywhere. Training that comes
near its limit is asked to stop at a checkpoint, or is killed at the limit; it then goes on in a new process with the next
smaller plan. The parent notices a sentence more, and the result is the same: a plan decides memory, not numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time
from typing import IO, Any

from forge.errors import BY_CODE, ForgeError, MemoryBudgetError, file_errors, storage_errors
from forge.system import (
    MemoryGroup,
    memory_group_parent,
    peak_resident_bytes,
    resident_bytes,
    resident_bytes_of,
    wait_asleep,
)
from forge.train.memory import MB, format_size

#: Seconds between two looks at a child's resident memory.
_SAMPLE_SECONDS = 0.25
#: Share of its limit at which training is asked to stop at a checkpoint, so that no step of it is lost. A good plan stays
#: below: predictions are within a few percent (`benchmarks/memory.py`), and only a plan that has a smaller one is asked.
_SOFT_SHARE = 0.97
#: A progress event is written at most this often, in seconds.
_PROGRESS_SECONDS = 0.5
#: Unless it has one of these: the plan of a training phase, or a piece of a generated text.
_NEVER_DROPPED = {"plan", "piece"}
#: How glibc keeps memory; other C libraries ignore it. Most jobs give blocks of this size back as soon as they are freed,
#: instead of keeping a heap with holes, so that their predictions can be exact. Training takes and frees the same blocks
#: for every micro-batch, and the page faults would cost half of its speed: it keeps what it had (docs/log.md).
_GIVE_BACK = f"glibc.malloc.mmap_threshold={1 << 18}:glibc.malloc.hugetlb=1"
_KEEP = f"glibc.malloc.mmap_threshold={1 << 30}:glibc.malloc.trim_threshold={1 << 40}:glibc.malloc.hugetlb=1"

Progress = Callable[..., None]


def enforcement(ram_bytes: int) -> str:
    """How jobs are held to their limit on this machine, as a sentence for its owner."""
    who = (f"a watchdog that looks every {_SAMPLE_SECONDS} s" if memory_group_parent() is None
           else "the kernel (memory.max of a control group) and by a watchdog")  # fmt: skip
    return f"Work in child processes is held to {format_size(ram_bytes)} by {who}."


class Job:
    """Work in a child process, and in a next one with a smaller plan whenever one outgrows its memory.

    Args:
        name: one of `forge.pipeline.JOBS`.
        arguments: the job's arguments; JSON values only. `ram_bytes` among them is what training plans with.
        threads: threads that torch may use; None leaves torch's choice.
        log: file that the child's stderr is appended to; None inherits this process's.
        ram_bytes: resident memory that the child may have; None does not limit it.

    Attributes:
        peak_rss: largest resident memory that was seen.
    """

    def __init__(self, name: str, arguments: dict[str, Any], *, threads: int | None = None,
                 log: Path | None = None, ram_bytes: int | None = None) -> None:  # fmt: skip
        self.name = name
        self.peak_rss = 0
        self._arguments, self._ram_bytes = dict(arguments), ram_bytes
        training = name in ("train-expert", "replay") or arguments.get("stage") == "shared"
        self._environment = {"GLIBC_TUNABLES": _KEEP if training else _GIVE_BACK, **os.environ, "PYTHONUNBUFFERED": "1"}
        if threads is not None:
            self._environment.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        self._log = log
        self._lock = threading.Lock()
        self._finishing = self._killed = False
        self._child = self._start()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._child.pid

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield progress events until the work ends."""
        while True:
            child = self._child
            yield from child.events()
            self.peak_rss = max(self.peak_rss, child.peak_rss)
            if not self._plan_smaller(child) or not self._restart():
                return
            yield _progress_event(resident_bytes=child.peak_rss, message=f"{self._title} held "
                                  f"{format_size(child.peak_rss)} of the {format_size(self._ram_bytes or 0)} allowed: it "
                                  "goes on from its checkpoint with a smaller plan.")  # fmt: skip

    def result(self) -> dict[str, Any]:
        """What the job returned; drains the events first.

        Raises:
            MemoryBudgetError: not even the smallest plan stayed within the limit.
            ForgeError: of the class that the job raised, or a plain one when the child died without a word.
        """
        for _ in self.events():
            pass
        outcome = self._child.outcome
        if outcome is None and self._child.outgrown:
            raise self._over_budget()
        if outcome is None:
            raise ForgeError(f"The {self.name} process ended unexpectedly ({self._child.ending()}); run the same command "
                             "again to go on from the last checkpoint.")  # fmt: skip
        if outcome["event"] == "error":
            raise BY_CODE.get(outcome["code"], ForgeError)(outcome["message"], detail=outcome.get("detail"))
        return dict(outcome["value"])

    def finish(self) -> None:
        """Ask the child to stop at the next checkpoint."""
        with self._lock:
            self._finishing = True
            self._child.send("finish")

    def kill(self) -> None:
        """Stop the child now."""
        with self._lock:
            self._killed = True
            self._child.kill()

    def _start(self) -> _Child:
        return _Child(self.name, self._arguments, self._environment, self._log, self._ram_bytes)

    def _plan_smaller(self, child: _Child) -> bool:
        """Whether the child ended because of its memory and a smaller plan is left, which the arguments then ask for."""
        if child.outcome is None:
            stopped = child.outgrown
        else:
            stopped = child.asked and not self._finishing and child.outcome.get("value", {}).get("finished") is False
        if not stopped or not child.plan.get("smaller"):
            return False
        self._arguments["ram_bytes"] = int(child.plan["peak_bytes"]) - 1
        return True

    def _restart(self) -> bool:
        """Start the next child; False when the job was killed meanwhile."""
        with self._lock:
            if self._killed:
                return False
            self._child = self._start()
            if self._finishing:  # It was asked and never got there: the new child stops at the checkpoint it finds.
                self._child.send("finish")
        return True

    @property
    def _title(self) -> str:
        if self.name == "train-expert":
            return f"Training partition {self._arguments['assignment']['partition']}"
        return f"The {self._arguments.get('stage', self.name)} stage"

    def _over_budget(self) -> MemoryBudgetError:
        allowed = self._ram_bytes or 0
        used = max(self._child.peak_rss, allowed)
        enough = -(-used * 9 // 8 // (64 * MB)) * 64
        # The kernel kills a process at its limit, before the watchdog sees it above.
        what = f"used {format_size(used)}, more than" if used > allowed else "needed more than"
        kept = "its checkpoint" if self._child.plan else "what was finished before"
        return MemoryBudgetError(
            f"{self._title} {what} the {format_size(allowed)} that --ram allows, and was stopped; {kept} is kept: run "
            f"the same command again with --ram {enough}M.")  # fmt: skip


class _Child:
    """One process of a job, watched while it runs.

    Attributes:
        plan: the plan that training reported: `peak_bytes`, and whether there is a `smaller` one.
        outcome: its `result` or `error` event; None when it died without a word.
        asked: whether it was asked to stop because it came near its limit.
        outgrown: whether it was killed because it reached its limit; known when the events have ended.
    """

    def __init__(self, name: str, arguments: dict[str, Any], environment: dict[str, str], log: Path | None,
                 ram_bytes: int | None) -> None:  # fmt: skip
        with storage_errors(log or "the log"):
            self._log: IO[bytes] | None = open(log, "ab") if log is not None else None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "forge.jobs", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, env=environment, text=True,
            start_new_session=True)  # fmt: skip - Ctrl-C in the terminal is the parent's to handle
        self.pid = self._process.pid
        self.peak_rss = 0
        self.plan: dict[str, Any] = {}
        self.outcome: dict[str, Any] | None = None
        self.asked = self.outgrown = False
        self._ram_bytes = ram_bytes
        # Before it gets its arguments, and so before it imports or allocates anything of size.
        self._group = MemoryGroup.hold(self.pid, ram_bytes) if ram_bytes is not None else None
        self._stdin_lock = threading.Lock()
        self._ended = threading.Event()
        self.send(json.dumps(arguments))
        self._watcher = threading.Thread(target=self._watch, name=f"{name}-memory", daemon=True)
        self._watcher.start()

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield progress events until the child ends."""
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            return
        for line in self._process.stdout:
            if not line.endswith("\n"):
                break  # The child was killed as it wrote.
            event = json.loads(line)
            if event["event"] == "progress":
                self.plan = event.get("plan") or self.plan
                yield event
            else:
                self.outcome = event
                if self._log is not None and event.get("detail"):
                    self._log.write(f"{event['detail']}\n".encode())
        self._process.wait()
        self._ended.set()
        self._watcher.join()
        self._close()

    def send(self, line: str) -> None:
        """Write a line to the child."""
        assert self._process.stdin is not None
        with self._stdin_lock:
            try:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
            except (BrokenPipeError, ValueError):
                pass  # The child is gone; its ending says how.

    def kill(self) -> None:
        """Stop the child now, and leave no control group behind."""
        self._process.kill()
        if self._group is not None:
            self._watcher.join(timeout=8 * _SAMPLE_SECONDS)

    def ending(self) -> str:
        """How the child ended, for a sentence."""
        code = self._process.returncode
        return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"

    def _watch(self) -> None:
        limit = self._ram_bytes or sys.maxsize
        while self._process.poll() is None:
            held = resident_bytes_of(self.pid)  # All of it: no job starts processes of its own.
            self.peak_rss = max(self.peak_rss, held)
            if held > limit:
                self.outgrown = True
                self._process.kill()
            elif held > limit * _SOFT_SHARE and self.plan.get("smaller") and not self.asked:
                self.asked = True
                self.send("finish")
            self._ended.wait(_SAMPLE_SECONDS)
        if self._group is not None:
            self.outgrown = self.outgrown or self._group.killed()
            self._group.remove()

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass  # Closing flushes what the dead child never read, and what the full disk of the log never took.


def _progress_event(**fields: Any) -> dict[str, Any]:
    return {"event": "progress", "stage": None, "step": 0, "steps": 0, "loss": None, "tokens_per_second": None,
            "message": None, "resident_bytes": resident_bytes(), **fields}  # fmt: skip


def main() -> None:
    """Entry point of the child process."""
    wait_asleep()
    # Events own the real stdout; whatever a library prints goes to stderr instead of between them.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def emit(event: dict[str, Any]) -> None:
        with lock:
            events.write(json.dumps(event) + "\n")
            events.flush()

    arguments = json.loads(sys.stdin.readline() or "{}")
    stop = threading.Event()
    threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
    last = 0.0

    def progress(**fields: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PROGRESS_SECONDS or fields.get("step") == fields.get("steps") or _NEVER_DROPPED & fields.keys():
            last = now
            emit(_progress_event(**fields))

    code = 0
    try:
        from forge import pipeline

        with file_errors():
            value = pipeline.JOBS[sys.argv[1]](arguments, progress, stop.is_set)
        emit({"event": "result", "value": {"peak_bytes": peak_resident_bytes(), **value}})
    except ForgeError as error:
        emit({"event": "error", "code": error.code, "message": str(error), "detail": error.detail})
        code = error.exit_code
    sys.stderr.flush()
    os._exit(code)  # Unloading PyTorch takes time and, where it was built for CUDA, another 160 MB of its libraries' pages.


def _watch_parent(stop: threading.Event) -> None:
    for line in sys.stdin:
        if line.strip() == "finish":
            stop.set()
    os._exit(1)  # The parent is gone: so is whoever would use the result.


if __name__ == "__main__":
    main()
