"""How soon the commands answer that have nothing to compute: whole processes, from their start to their end.

    python -m benchmarks.startup

The commands take turns. `status` asks a real coordinator that waits for nodes with a tiny published run. Ends with exit
status 1 when a median is above 0.4 s.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
import signal
from statistics import median
import subprocess
import sys
import tempfile
import time

import psutil

from benchmarks.common import heading, show, table
from forge.files import RunDirectory

#: Seconds that feel like an answer at once.
AT_ONCE = 0.4
COMMANDS = {"forge --help": ["forge.cli", "--help"], "forge-node --help": ["node.cli", "--help"],
            "forge-coordinator --help": ["coordinator.cli", "--help"]}  # fmt: skip
STATUS = "forge-coordinator status"
#: A run that is published after a few seconds a stage, almost all of them imports.
_TINY = ["data.max_bytes=600000", "model.vocab_size=512", "model.d_model=64", "model.d_ff=128", "model.n_heads=3",
         "model.n_experts=2", "model.max_seq_len=64", "train.shared.tokens=4096", "train.expert.tokens=4096",
         "router.tokens=2000", "evaluation.tokens=1000", "evaluation.samples=1", "evaluation.sample_tokens=4"]  # fmt: skip


def main() -> int:
    """Time every command and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--without-status", action="store_true", help="start no coordinator")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args()
    if options.without_status:
        rows, slow = _measure(COMMANDS, options.rounds)
    else:
        with tempfile.TemporaryDirectory(prefix="forge-startup-") as directory, _waiting_coordinator(Path(directory)) as run:
            status = ["coordinator.cli", "status", "--run-dir", str(run)]
            rows, slow = _measure({**COMMANDS, STATUS: status}, options.rounds)
    text = heading("Start-up", "startup") + f"\nSeconds of {options.rounds} rounds.\n\n"
    text += table(["command", "median", "fastest", "slowest"], rows)
    show(text, options.output)
    return int(slow)


def _measure(commands: dict[str, list[str]], rounds: int) -> tuple[list[list[str]], bool]:
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, (module, *arguments) in commands.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.DEVNULL)
            if number:  # The first round fills the page cache.
                seconds[name].append(time.perf_counter() - began)
    rows = [[f"`{name}`", *(f"{value:.3f}" for value in (median(times), min(times), max(times)))]
            for name, times in seconds.items()]  # fmt: skip
    return rows, any(median(times) > AT_ONCE for times in seconds.values())


@contextmanager
def _waiting_coordinator(root: Path) -> Iterator[Path]:
    """The directory of a published run whose coordinator has nothing to do but to answer."""
    run = root / "run"
    command = [sys.executable, "-m", "coordinator.cli", "serve", "--config", "smoke", "--run-dir", str(run),
               "--listen", "127.0.0.1:0", "--dashboard", "off", *_TINY]  # fmt: skip
    with open(root / "log", "wb") as log:
        process = psutil.Popen(command, stdout=log, stderr=log)
    try:
        while RunDirectory(run).marker("publish") is None or process.children():
            if process.poll() is not None:
                raise SystemExit(f"The coordinator ended with exit status {process.returncode}:\n{(root / 'log').read_text()}")
            time.sleep(0.5)
        yield run
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
