"""Training throughput on a machine that other programs use too, as a volunteer's is: ours, and a plain PyTorch loop.

    python -m benchmarks.busy --rounds 3

Expert training at the shapes of --config, as `benchmarks/speed.py` runs it, beside programs that each keep one processor busy
at normal priority. `ours, N looks` is ours with another `GOMP_SPINCOUNT` than `forge.system.wait_asleep` sets: 300,000 is what
GNU's OpenMP does by itself. Rows take turns; medians over the steps of all rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
from statistics import median
import subprocess
import sys
import tempfile

from benchmarks import speed
from benchmarks.common import heading, table
from forge.config import load_config
from forge.files import RunDirectory
from forge.system import default_threads

OURS, LOOP = "ours", "PyTorch loop"


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="default")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the config")
    parser.add_argument("--others", nargs="*", type=int, default=[0, 1], help="programs that run beside it")
    parser.add_argument("--looks", nargs="*", type=int, default=[300_000], help="further rows of ours, with so many looks")
    parser.add_argument("--micro-batch", type=int, default=4, help="of the PyTorch loop")
    parser.add_argument("--ram", default="8G", help="what ours may hold")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    config = load_config(options.config, speed.lengths(options.config, options.set, options.steps))
    rows = {OURS: None, **{f"{OURS}, {looks:,} looks": looks for looks in options.looks}, LOOP: None}
    taken: dict[tuple[int, str], list[float]] = {(others, row): [] for others in options.others for row in rows}
    with tempfile.TemporaryDirectory(prefix="forge-busy-") as directory:
        corpus = Path(directory) / "corpus"
        speed.random_corpus(RunDirectory.open(corpus, config))
        speed.measure_ours(config, "expert", options, corpus, Path(directory) / "first")  # The shared components, once.
        for turn in range(options.rounds):
            for others, row in taken:
                with _beside(others), _looking(rows[row]):
                    if row == LOOP:
                        result = speed.measure_rival("loop", "expert", options.micro_batch, options)
                    else:
                        result = speed.measure_ours(config, "expert", options, corpus, Path(directory) / f"{turn}-{others}-{row}")
                taken[others, row] += result["tokens_per_second"]
                print(f"{others} others, {row}: {median(result['tokens_per_second']):,.0f}", flush=True)
    lines = [[row, *(f"{median(taken[others, row]):,.0f}" for others in options.others)] for row in rows]
    print(heading("Training beside other programs", "busy"))
    print(table(["tokens a second", *(f"{others} other programs" for others in options.others)], lines))
    return 0


@contextmanager
def _beside(others: int) -> Iterator[None]:
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) for _ in range(others)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


@contextmanager
def _looking(looks: int | None) -> Iterator[None]:
    if looks is not None:
        os.environ["GOMP_SPINCOUNT"] = str(looks)
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


if __name__ == "__main__":
    sys.exit(main())
