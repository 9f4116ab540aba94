"""A model of a billion parameters within 8 GB: every step of its life, held to the limit, with the peaks.

    python -m benchmarks.billion

Takes `configs/billion.yaml` from text to text on this machine: a few optimiser steps of the shared components and of one
expert (what a process holds does not grow with its steps), the assembly of all experts, evaluation and generation. The
other experts are the shared FFN under their names: what an assembly costs does not depend on the numbers in it. Every
process is held to `--ram`, by the kernel where this machine lets us; measured is the resident memory of the whole tree of
processes, looked at 50 times a second. Ends with exit status 1 when it was ever above `--ram`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import psutil

from benchmarks.common import machine
from forge import pipeline
from forge.checkpoint.assembly import accept, arrived, start
from forge.checkpoint.safetensors_header import header_bytes, read_header
from forge.config import RunConfig, load_config
from forge.files import RunDirectory, read_json, write_json
from forge.jobs import enforcement
from forge.model import names
from forge.system import default_threads
from forge.train.memory import MB, Stage, format_size, parse_size, plan
from forge.vocabulary import STAGES

_LOOK_SECONDS = 0.02
_CHUNK = 4 * MB


def main() -> int:
    """Go through every stage and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="billion")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of the config")
    parser.add_argument("--ram", default="8G", help="the limit")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of each training phase")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--run-dir", type=Path, help="a directory to keep: after a kill the same command goes on in it")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args()
    base = load_config(options.config, options.set)
    config = load_config(options.config, [
        "data.source=python-stdlib", "data.max_bytes=8_000_000", "router.tokens=50_000", "evaluation.tokens=2_000",
        "evaluation.samples=1", "evaluation.sample_tokens=16",
        *(f"train.{stage}.tokens={options.steps * base.step_tokens(stage)}" for stage in ("shared", "expert")),
        *options.set])  # fmt: skip
    limit = parse_size(options.ram)
    with tempfile.TemporaryDirectory(prefix="forge-billion-") as directory:
        lines = [f"# {config.model.total_parameters:,} parameters within {format_size(limit)}\n",
                 f"Printed by `python -m benchmarks.billion` on {time.strftime('%Y-%m-%d')}: {machine()}. "
                 f"{options.steps} steps a training phase. {enforcement(limit)} "
                 "Peaks are of the whole tree of processes, this one included.\n",
                 "| | seconds | threads | predicted | peak of the tree |", "|---|---|---|---|---|"]  # fmt: skip
        print("\n".join(lines), flush=True)
        root = options.run_dir or Path(directory) / "run"
        kept = root / "measured.json"
        measured: dict[str, Any] = read_json(kept) if kept.is_file() else {}
        for name, stage, work in _steps(config, root, limit, options.threads):
            if name not in measured:
                with _Watch() as watch:
                    work()
                measured[name] = {"seconds": watch.seconds, "peak": watch.peak, "threads": options.threads}
                write_json(kept, measured)
            row = measured[name]
            predicted = format_size(plan(config, stage, limit).peak_bytes) if stage else ""
            lines.append(f"| {name} | {row['seconds']:.0f} | {row['threads']} | {predicted} | {format_size(row['peak'])} |")
            print(lines[-1], flush=True)
    highest = max(row["peak"] for row in measured.values())
    lines.append(f"\nThe highest is {format_size(highest)}, {highest / limit:.0%} of the limit.")
    print(lines[-1], flush=True)
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(highest > limit)


Step = tuple[str, Stage | None, Callable[[], Any]]


def _steps(config: RunConfig, root: Path, limit: int, threads: int) -> list[Step]:
    run = RunDirectory.open(root, config)
    inside = limit - psutil.Process().memory_info().rss - 16 * MB  # What this process leaves for its children.

    def stage(name: str) -> Step:
        def work() -> None:
            pipeline.prepare_run(root, config, (name,), ram_bytes=inside, threads=threads, on_event=_silent)

        return name, name, work  # type: ignore[return-value]

    def expert() -> None:
        start(run)
        if 0 not in arrived(run.model):
            pipeline.train_and_accept(run, 0, ram_bytes=inside, threads=threads, device="cpu", on_event=_silent)

    def others() -> None:
        for number in range(1, config.model.n_experts):
            accept(run, number, run.blobs.adopt(_stand_in(run, number)), {})

    def evaluate() -> None:
        pipeline.call("evaluate", {"run_dir": str(root), "final": False}, _silent, threads, inside)

    def generate() -> None:
        subprocess.run([sys.executable, "-m", "forge.cli", "generate", str(run.model), "import os\n", "--max-tokens", "32"],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

    return [*map(stage, STAGES), ("one expert, validated and accepted", "expert", expert),
            (f"the other {config.model.n_experts - 1} experts assembled", "assemble", others),
            ("evaluate", "evaluate", evaluate), ("generate", "generate", generate)]  # fmt: skip


def _stand_in(run: RunDirectory, number: int) -> Path:
    """A shard of the shared FFN's tensors under the names of an expert's, copied a chunk at a time."""
    published = run.marker("publish")
    assert published is not None
    source, path = run.blobs.path(published["shared_ffn"]["sha256"]), run.work / "stand-in.safetensors"
    header = read_header(source)
    renamed = dict(zip(names.ffn_tensors(run.config.model), names.expert_tensors(run.config.model, number), strict=True))
    with open(source, "rb") as reading, open(path, "wb") as writing:
        writing.write(header_bytes({renamed[name]: entry for name, entry in header.tensors.items()}, {"format": "pt"}))
        reading.seek(header.data_start)
        while chunk := reading.read(_CHUNK):
            writing.write(chunk)
    return path


def _silent(event: dict[str, Any]) -> None:
    """Nobody reads the events."""


class _Watch:
    """The largest resident memory of this process and all below it while a `with` lasts."""

    def __init__(self) -> None:
        self.peak, self.seconds = 0, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.monotonic() - self._began
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        own = psutil.Process()
        while not self._over.wait(_LOOK_SECONDS):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    pass  # It has ended.
            self.peak = max(self.peak, total)


if __name__ == "__main__":
    sys.exit(main())
