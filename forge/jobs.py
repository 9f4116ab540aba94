"""Heavy work in a child process: the coordinator and the node's agent stay small and never import torch.

A job is `python -m forge.jobs NAME`. Its arguments are one JSON line on stdin; a further line `finish` asks it to stop at
the next checkpoint; the end of stdin means that the parent died, and the child exits at once. Every line on the child's
stdout is a JSON event: `progress`, then one `result` or `error`.
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

import psutil

from forge.errors import BY_CODE, ForgeError, storage_errors
from forge.system import peak_resident_bytes, resident_bytes

#: Seconds between two looks at a child's resident memory.
_SAMPLE_SECONDS = 0.25
#: A progress event is written at most this often, in seconds.
_PROGRESS_SECONDS = 0.5
#: glibc gives blocks of this size back as soon as they are freed, instead of keeping a heap with holes: training an expert
#: of the default size took 288 MB above its imports instead of 377, and its plan can be exact. Huge pages win back half
#: of the time that this costs (docs/log.md). Other C libraries ignore it.
_ALLOCATOR = f"glibc.malloc.mmap_threshold={1 << 18}:glibc.malloc.hugetlb=1"

Progress = Callable[..., None]


class Job:
    """One child process.

    Args:
        name: `stage`, `train-expert`, `validate` or `evaluate`.
        arguments: the job's arguments; JSON values only.
        threads: threads that torch may use; None leaves torch's choice.
        log: file that the child's stderr is appended to; None inherits this process's.
    """

    def __init__(self, name: str, arguments: dict[str, Any], *, threads: int | None = None,
                 log: Path | None = None) -> None:  # fmt: skip
        environment = {"GLIBC_TUNABLES": _ALLOCATOR, **os.environ, "PYTHONUNBUFFERED": "1"}
        if threads is not None:
            environment.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        with storage_errors(log or "the log"):
            self._log: IO[bytes] | None = open(log, "ab") if log is not None else None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "forge.jobs", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, env=environment, text=True,
            start_new_session=True)  # fmt: skip - Ctrl-C in the terminal is the parent's to handle
        self.name = name
        self.peak_rss = 0
        self._outcome: dict[str, Any] | None = None
        self._stdin_lock = threading.Lock()
        self._send(json.dumps(arguments))
        threading.Thread(target=self._sample, name=f"{name}-memory", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield progress events until the child ends."""
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            return
        for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "progress":
                yield event
            else:
                self._outcome = event
                if self._log is not None and event.get("detail"):
                    self._log.write(f"{event['detail']}\n".encode())
        self._process.wait()
        self._close()

    def result(self) -> dict[str, Any]:
        """What the job returned; drains the events first.

        Raises:
            ForgeError: of the class that the job raised, or a plain one when the child died without a word.
        """
        for _ in self.events():
            pass
        if self._outcome is None:
            raise ForgeError(f"The {self.name} process ended unexpectedly ({self._ending()}); run the same command again "
                             "to go on from the last checkpoint.")  # fmt: skip
        if self._outcome["event"] == "error":
            raise BY_CODE.get(self._outcome["code"], ForgeError)(self._outcome["message"], detail=self._outcome.get("detail"))
        return dict(self._outcome["value"])

    def finish(self) -> None:
        """Ask the child to stop at the next checkpoint."""
        self._send("finish")

    def kill(self) -> None:
        """Stop the child now."""
        self._process.kill()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with self._stdin_lock:
            try:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
            except (BrokenPipeError, ValueError):
                pass  # The child is gone; result() says how.

    def _sample(self) -> None:
        try:
            child = psutil.Process(self.pid)
            while self._process.poll() is None:
                self.peak_rss = max(self.peak_rss, child.memory_info().rss)
                time.sleep(_SAMPLE_SECONDS)
        except psutil.Error:
            pass  # The child ended between two looks.

    def _ending(self) -> str:
        code = self._process.returncode
        return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass  # Closing flushes what the dead child never read, and what the full disk of the log never took.


def main() -> None:
    """Entry point of the child process."""
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
        if now - last >= _PROGRESS_SECONDS or fields.get("step") == fields.get("steps"):
            last = now
            emit({"event": "progress", "stage": None, "step": 0, "steps": 0, "loss": None, "tokens_per_second": None,
                  "message": None, **fields, "resident_bytes": resident_bytes()})  # fmt: skip

    try:
        from forge import pipeline

        value = pipeline.JOBS[sys.argv[1]](arguments, progress, stop.is_set)
    except ForgeError as error:
        emit({"event": "error", "code": error.code, "message": str(error), "detail": error.detail})
        sys.exit(error.exit_code)
    emit({"event": "result", "value": {"peak_bytes": peak_resident_bytes(), **value}})


def _watch_parent(stop: threading.Event) -> None:
    for line in sys.stdin:
        if line.strip() == "finish":
            stop.set()
    os._exit(1)  # The parent is gone: so is whoever would use the result.


if __name__ == "__main__":
    main()
