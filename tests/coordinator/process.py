"""A coordinator in a process of its own, with jobs that need no torch, that kills itself when it comes to a job.

python -m tests.coordinator.process RUN_DIR [JOB [REPO]]
"""

from __future__ import annotations

import os
from pathlib import Path
import signal
import sys

from coordinator.serve import Coordinator
from forge.errors import ForgeError

from .fakes import CONFIG, FakeJobs


def main(run_dir: str, kill_at: str = "", repo: str = "") -> None:
    jobs = FakeJobs()

    def before(what: str) -> None:
        if what == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    jobs.before = before
    coordinator = Coordinator(CONFIG, Path(run_dir), "127.0.0.1:0", push=repo or None, run_job=jobs, exit_when_done=True)
    coordinator.start()
    try:
        coordinator.wait()
    except ForgeError as error:
        sys.exit(error.exit_code)
    finally:
        coordinator.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
