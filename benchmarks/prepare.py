"""Data preparation against the tokenizers library alone, and its memory on a large corpus.

    python -m benchmarks.prepare --mb 1000 --data FILE

Makes a corpus of the wanted size by repeating a source (by default Python's standard library), each document under a number of
its own. Row by row: the bare library encodes it in batches and writes the ids; the prepare stage does its work with the
tokenizer given (hash every document, split, encode, write); and the whole stage, which also learns a tokenizer. The ids of
both must be equal. Ends with exit status 1 when they are not, or when the stage held more than `--ram`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import itertools
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.common import heading, table
from forge import pipeline
from forge.config import DataConfig, RunConfig, load_config
from forge.data.sources import documents
from forge.data.tokenizer import load_tokenizer
from forge.data.tokens import TokenFile
from forge.files import RunDirectory
from forge.system import peak_resident_bytes, physical_cores
from forge.train.memory import MB, parse_size

#: Text that the bare library is given at a time, in bytes, as the stage gives it.
_BATCH_BYTES = 1 << 20


def main() -> int:
    """Measure the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="python-stdlib", help="the source that is repeated")
    parser.add_argument("--mb", type=int, default=1000, help="size of the corpus in millions of bytes")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--ram", default="1G", help="what the stage may hold")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    parser.add_argument("--bare", nargs=3, type=Path, metavar=("CORPUS", "TOKENIZER", "IDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare is not None:
        print(json.dumps(_bare(*options.bare)))
        return 0
    with tempfile.TemporaryDirectory(prefix="forge-prepare-") as directory:
        rows, held, equal = _measure(Path(directory), options)
    text = heading("Data preparation", "prepare") + f"\n{options.mb} MB of text, {options.threads} threads.\n\n" + table(
        ["", "seconds", "MB a second", "of the bare library's rate", "peak memory"], rows)  # fmt: skip
    text += f"\nThe ids of both are {'equal' if equal else 'NOT equal'}.\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    return int(not equal or held > parse_size(options.ram))


def _measure(root: Path, options: argparse.Namespace) -> tuple[list[list[str]], int, bool]:
    corpus = root / "corpus.jsonl"
    _repeat(options.data, corpus, options.mb * 1_000_000)
    whole, learned = _stage(root / "whole", _config(corpus, options.vocab), options.threads)
    tokenizer = learned.data / "tokenizer.json"
    given, run = _stage(root / "given", _config(corpus, options.vocab, tokenizer), options.threads)
    command = [sys.executable, "-m", "benchmarks.prepare", "--bare", str(corpus), str(tokenizer), str(root / "ids")]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(options.threads)}
    bare = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    ids = np.memmap(root / "ids", dtype=np.uint16, mode="r")
    tokens = TokenFile(run.data / "corpus.safetensors").tokens
    equal = len(ids) == len(tokens) and all(
        np.array_equal(ids[at : at + MB], tokens[at : at + MB]) for at in range(0, len(ids), MB))  # fmt: skip
    named = {"the library alone": bare, "prepare, tokenizer given": given, "prepare, whole": whole}
    rows = [[name, f"{row['seconds']:.1f}", f"{options.mb / row['seconds']:.1f}", f"{bare['seconds'] / row['seconds']:.2f}",
             f"{row['peak_bytes'] / MB:.0f} MB"] for name, row in named.items()]  # fmt: skip
    return rows, max(whole["peak_bytes"], given["peak_bytes"]), equal


def _repeat(source: str, path: Path, size: int) -> None:
    texts = [document.text for document in documents(DataConfig(source=source, max_bytes=min(size, 40_000_000)))]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for number, text in enumerate(itertools.cycle(texts)):
            text = f"{number}\n{text}"
            written += len(text.encode())
            file.write(json.dumps({"text": text}) + "\n")
            if written >= size:
                return


def _config(corpus: Path, vocabulary: int, tokenizer: Path | None = None) -> RunConfig:
    given = [f"tokenizer.path={tokenizer}"] if tokenizer is not None else []
    return load_config("default", [f"data.source={corpus}", f"model.vocab_size={vocabulary}", *given])


def _stage(root: Path, config: RunConfig, threads: int) -> tuple[dict[str, Any], RunDirectory]:
    run = RunDirectory.open(root, config)
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    began = time.monotonic()
    facts = pipeline.call("stage", {"run_dir": str(root), "stage": "prepare"}, lambda event: None, threads)
    return {"seconds": time.monotonic() - began, "peak_bytes": int(facts["peak_bytes"])}, run


def _bare(corpus: Path, tokenizer_file: Path, target: Path) -> dict[str, float]:
    tokenizer = load_tokenizer(tokenizer_file)
    began = time.monotonic()
    with open(target, "wb") as file:
        for batch in _batches(corpus):
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                file.write(np.array(encoding.ids, np.uint16).tobytes())
    return {"seconds": time.monotonic() - began, "peak_bytes": peak_resident_bytes()}


def _batches(corpus: Path) -> Iterator[list[str]]:
    batch, size = [], 0
    with open(corpus, encoding="utf-8") as file:
        for line in file:
            batch.append(json.loads(line)["text"])
            size += len(batch[-1])
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


if __name__ == "__main__":
    sys.exit(main())
