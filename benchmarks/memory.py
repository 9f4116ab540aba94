"""Predicted against measured peak memory: every process of a run, at models over two orders of magnitude and several `--ram`.

Each point is a run directory of its own, taken by real processes from text to text in two optimiser steps a phase: what a
process holds does not grow with its steps. Measured is the peak resident set of the process (RSS: shared libraries and mapped
files count in full), as the kernel keeps it. Ends with exit status 1 when a prediction is off by more than 10 % or a process
exceeds its `--ram`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
import json
from pathlib import Path
import subprocess
import sys
import tempfile
import time
from typing import Any

from forge import pipeline
from forge.checkpoint.assembly import accept, start
from forge.config import DataConfig, RunConfig, load_config
from forge.data.sources import documents
from forge.data.tokenizer import tokenizer_files, train_tokenizer
from forge.errors import MemoryBudgetError
from forge.files import RunDirectory
from forge.system import cpu_products, peak_resident_bytes_of
from forge.train.memory import MB, Stage, parse_size, plan, predict
from forge.vocabulary import STAGES

#: Largest error of a prediction, as a share of what was measured.
TOLERANCE = 0.10
DOCUMENTS, DOCUMENT_CHARACTERS = 32, 3_000


@dataclass(frozen=True)
class Point:
    """A model and a budget."""

    ram: str
    d_model: int
    n_layers: int
    vocab_size: int
    max_seq_len: int
    batch_size: int = 4
    dtype: str = "float32"

    def overrides(self, source: Path, tokenizer: Path) -> list[str]:
        """The config of the point, for `load_config`: two steps of each phase on a small corpus."""
        tokens = 2 * self.batch_size * self.max_seq_len
        head_dim = min(64, self.d_model // 2)
        return [
            f"data.source={source}", f"data.max_bytes={source.stat().st_size}", f"tokenizer.path={tokenizer}",
            f"model.d_model={self.d_model}", f"model.d_ff={4 * self.d_model}", f"model.n_layers={self.n_layers}",
            f"model.n_heads={self.d_model // head_dim + 1}", f"model.head_dim={head_dim}",
            f"model.vocab_size={self.vocab_size}", "model.n_experts=2",
            f"model.max_seq_len={self.max_seq_len}", f"model.dtype={self.dtype}", f"train.batch_size={self.batch_size}",
            f"train.shared.tokens={tokens}", f"train.expert.tokens={tokens}", "router.tokens=2100",
            "evaluation.tokens=1000", "evaluation.samples=1", "evaluation.sample_tokens=8"]  # fmt: skip


POINTS = [
    Point("16G", 64, 2, 2048, 128), Point("16G", 128, 3, 2048, 128), Point("440M", 128, 3, 2048, 1024),
    Point("16G", 256, 4, 8192, 256), Point("440M", 256, 4, 8192, 256), Point("16G", 512, 4, 16384, 512),
    Point("720M", 512, 4, 16384, 512), Point("600M", 512, 4, 8192, 512, dtype="bfloat16"),
    Point("16G", 768, 4, 16384, 128), Point("1500M", 1024, 3, 8192, 128, 2), Point("8G", 1024, 6, 32768, 512, 2, "bfloat16"),
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One process."""

    process: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """How far the prediction is above the measurement, as a share of it."""
        return self.predicted / self.measured - 1


def main() -> int:
    """Measure every point and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--points", type=int, nargs="*", default=range(len(POINTS)), help="numbers of points; default all")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args()
    lines, bad = [], 0
    for number in options.points:
        point = POINTS[number]
        with tempfile.TemporaryDirectory(prefix="forge-memory-") as directory:
            began = time.monotonic()
            config = _config(point, Path(directory))
            try:
                rows = list(_measure(config, Path(directory) / "run", parse_size(point.ram), options.threads))
            except MemoryBudgetError as error:  # PyTorch built for CUDA needs more than the smaller points allow.
                print(f"point {number}: not measured. {error}", flush=True)
                bad += 1
                continue
        line, wrong = _summary(config, point, rows)
        lines.append(line)
        bad += wrong
        print(f"point {number}: {line}   ({time.monotonic() - began:.0f} s)", flush=True)
        for row in rows:
            print(f"  {row.process:10}{row.predicted / MB:8.0f}M{row.measured / MB:8.0f}M{row.error:+8.1%}", flush=True)
    if options.output is not None:
        options.output.write_text(_table(lines, options.threads), encoding="utf-8")
    print(f"{bad} predictions are off by more than {TOLERANCE:.0%}, processes above their --ram, or points not measured.")
    return int(bad > 0)


def _config(point: Point, directory: Path) -> RunConfig:
    text = "\n".join(text for text, *_ in documents(DataConfig(source="python-stdlib")))
    tokenizer_files(train_tokenizer([text], point.vocab_size), directory, point.max_seq_len)
    source = directory / "corpus.jsonl"
    pieces = [text[i * DOCUMENT_CHARACTERS : (i + 1) * DOCUMENT_CHARACTERS] for i in range(DOCUMENTS)]
    source.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")
    return load_config("default", point.overrides(source, directory / "tokenizer.json"))


def _measure(config: RunConfig, root: Path, ram: int, threads: int) -> Iterator[Row]:
    """Take a run through every stage, and an expert through training, validation, assembly, evaluation and generation."""
    run = RunDirectory.open(root, config)

    def job(name: str, process: Stage, **arguments: Any) -> tuple[Row, dict[str, Any]]:
        facts = pipeline.call(name, arguments, lambda event: None, threads)
        return Row(process, plan(config, process, ram).peak_bytes, int(facts["peak_bytes"])), facts

    for stage in STAGES:
        yield job("stage", stage, run_dir=str(root), stage=stage, ram_bytes=ram)[0]
    start(run)
    row, trained = job("train-expert", "expert", assignment=pipeline.local_assignment(run, 0), ram_bytes=ram,
                       work_dir=str(run.work / "partition-000"), device="cpu")  # fmt: skip
    yield row
    shard = trained["shard"]
    yield job("validate", "validate", run_dir=str(root), partition=0, shard=shard)[0]
    accept(run, 0, run.blobs.adopt(Path(shard)), {"node_name": "this machine", "loss": 0.0, "shared_loss": 0.0, "tokens": 0})
    yield job("evaluate", "evaluate", run_dir=str(root), final=True)[0]
    yield _command(config, "generate", [str(run.model), "import os\n" * 8, "--max-tokens", "24"])
    yield _command(config, "assemble", [str(root)])


def _command(config: RunConfig, stage: Stage, arguments: list[str]) -> Row:
    """A `forge` command as a process of its own, looked at until it ends."""
    process = subprocess.Popen([sys.executable, "-m", "forge.cli", stage, *arguments], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_resident_bytes_of(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"forge {stage} ended with exit status {process.returncode}.")
    return Row(stage, predict(config, stage).peak_bytes, peak)


def _summary(config: RunConfig, point: Point, rows: list[Row]) -> tuple[str, int]:
    ram = parse_size(point.ram)
    training = plan(config, "shared", ram)
    worst = max(rows, key=lambda row: abs(row.error))
    cells = " | ".join(f"{row.predicted / MB:.0f} / {row.measured / MB:.0f}" for row in rows)
    shape = f"{point.d_model} x {point.n_layers}, {point.max_seq_len}, {point.vocab_size}"
    shape += ", bf16" if point.dtype == "bfloat16" else ""
    chosen = f"{training.micro_batch}{', recompute' if training.recompute else ''}"
    line = (f"| {config.model.total_parameters / 1e6:.1f} M | {shape} | {point.ram} | {chosen} | {cells} "
            f"| {worst.process} {worst.error:+.1%} |")  # fmt: skip
    return line, sum(abs(row.error) > TOLERANCE or row.measured > ram for row in rows)


def _table(lines: list[str], threads: int) -> str:
    names = [*STAGES, "expert", "validate", "evaluate", "generate", "assemble"]
    header = f"| parameters | width x layers, context, vocabulary | `--ram` | micro-batch | {' | '.join(names)} | worst |"
    rule = "|" + "---|" * (5 + len(names))
    return ("# Predicted / measured peak memory\n\nMB resident (RSS) of every process, "
            f"{threads} thread{'s' if threads > 1 else ''}, {cpu_products()} products in training; "
            "made by `python -m benchmarks.memory`.\n\n"
            + "\n".join([header, rule, *lines]) + "\n")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
