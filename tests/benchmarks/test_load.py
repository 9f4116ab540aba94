"""The benchmarks of the coordinator at their smallest size."""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, output: Path, *options: str) -> str:
    """What a benchmark wrote. Its promises are about other sizes and idle machines, so they may be missed here."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--output", str(output), *options], cwd=ROOT, capture_output=True,
        text=True, timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert output.is_file(), done.stdout + done.stderr
    return output.read_text()


def test_a_fleet_of_three_hands_a_shard_in(tmp_path: Path) -> None:
    table = run("fleet", tmp_path / "fleet.md", "--nodes", "3", "--partitions", "2", "--seconds", "60", "--processes", "1",
                "--lease-seconds", "4", "--train-every", "1", "--directory", str(tmp_path / "run"))  # fmt: skip
    assert "| failed or repeated calls | 0 |" in table and "| heartbeat | " in table
    assert '"event": "uploaded"' in (tmp_path / "run" / "run" / "events.jsonl").read_text()


def test_transfers_end_whole_and_are_compared(tmp_path: Path) -> None:
    table = run("transfer", tmp_path / "transfer.md", "--mb", "2", "--rounds", "1", "--uploads", "2")
    assert "| upload | " in table and "| download | " in table and "2 uploads of 2 MB at once" in table
