"""The benchmarks of assembly, data preparation, generation and start-up, each once at its smallest size."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parents[2]


def table(page: Path, first: str) -> list[dict[str, str]]:
    """The rows of the table of a page of results whose first column is called `first`."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")]
                       for line in takewhile(lambda line: line.startswith("|"), lines[start:]))  # fmt: skip
    return [dict(zip(names, row, strict=True)) for row in rows]


def run(tmp_path: Path, module: str, *arguments: str) -> Path:
    page = tmp_path / "page.md"
    subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *arguments, "--output", str(page)], cwd=ROOT, check=True)
    return page


def test_assembly_holds_a_chunk_and_not_an_expert(tmp_path: Path) -> None:
    (row,) = table(run(tmp_path, "assembly", "--points", "0", "--rounds", "1"), "experts")
    assert row["experts"] == "4" and float(row["peak memory"].removesuffix(" M")) < 80


def test_preparing_writes_the_ids_of_the_library(tmp_path: Path) -> None:
    page = run(tmp_path, "prepare", "--megabytes", "1", "--large", "0", "--vocabulary", "512", "--rounds", "1", "--threads", "1")
    assert "The ids are equal." in page.read_text(encoding="utf-8")
    assert [row[""] for row in table(page, "")] == ["bare `encode_batch`", "`encode`", "`prepare`"]


def test_generation_writes_the_tokens_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    page = run(tmp_path, "generation", "--points", "0", "--tokens", "8", "--rounds", "1", "--threads", "1", "--limit", "0")
    (row,) = table(page, "checkpoint")
    assert row["equal tokens"] == "yes" and float(row["ours, tokens/s"]) > 0


def test_help_is_timed(tmp_path: Path) -> None:
    rows = table(run(tmp_path, "startup", "--rounds", "1", "--without-status"), "command")
    assert len(rows) == 3 and all(float(row["median"]) > 0 for row in rows)
