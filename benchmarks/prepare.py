"""From text to partitions: tokenising beside the bare tokenizers library, the rate of partitioning, and the memory of it all.

    python -m benchmarks.prepare --data texts.jsonl.gz

The bare loop reads the same JSON lines, hands a thousand texts at a time to `encode_batch` and writes the ids: what the library
does on all cores when nothing is checked. `encode` is the last pass of the prepare stage on them; it must write the same ids, or
the exit status is 1. `prepare` is the whole stage with a given tokenizer: a pass to find duplicates and to split, and that one.

A large corpus is made of DATA's documents again and again, their lines in another order each time, since equal documents are left
out; without --data of the modules of Python's standard library. Its prepare stage runs as a run would run it, in a process of its
own, the learning of the tokenizer included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import count
import json
import os
from pathlib import Path
import random
from statistics import median
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.common import heading, show, table
from forge import pipeline
from forge.config import DataConfig, RunConfig, load_config
from forge.data.partition import assign, split_by_partition
from forge.data.prepare import CORPUS_FILE, SPLIT_FILE, encode, prepare, scan_documents
from forge.data.sources import documents
from forge.data.tokenizer import TOKENIZER_FILE, load_tokenizer, tokenizer_files, train_tokenizer
from forge.data.tokens import TokenFile, token_dtype
from forge.files import RunDirectory
from forge.system import default_threads
from forge.train.memory import MB

_BATCH_DOCUMENTS = 1000
_TOKENIZER_CHARACTERS = 20_000_000
_WIDTH, _PARTITIONS = 512, 16


def main() -> int:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="python-stdlib", help="text, as data.source of a config names it; column `text`")
    parser.add_argument("--megabytes", type=float, default=40, help="text of the paired runs")
    parser.add_argument("--large", type=float, default=1000, help="text of the large corpus, in MB; 0 leaves it out")
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to")
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory(prefix="forge-prepare-") as directory:
        root = Path(directory)
        size = _write_corpus(root / "texts.jsonl", options.data, int(options.megabytes * 1e6))
        tokenizer_files(train_tokenizer(_start(root / "texts.jsonl"), options.vocabulary), root, 512)
        config = _config(root / "texts.jsonl", options.vocabulary, root / TOKENIZER_FILE)
        rates, equal = _tokenise(config, root, size, options.rounds)
        text = heading("Preparing data", "prepare") + f"\n{size / 1e6:.0f} MB of text, {options.threads} threads, medians of "
        text += f"{options.rounds} rounds.\n\n" + rates + "\n" + _partition(config, root, size)
        if options.large:
            text += "\n" + _large(root, options)
    show(text, options.output)
    return int(not equal)


def _config(source: Path, vocabulary: int, tokenizer: Path | None = None) -> RunConfig:
    given = [] if tokenizer is None else [f"tokenizer.path={tokenizer}"]
    return load_config("default", [f"data.source={source}", f"model.vocab_size={vocabulary}", *given])


def _write_corpus(path: Path, source: str, size: int) -> int:
    """Write documents until they have `size` bytes of text; returns how many they have."""
    written, seen = 0, set[int]()
    with open(path, "w", encoding="utf-8") as file:
        for text in _endless(source):
            if hash(text) in seen:  # Lines in another order may be in the same one.
                continue
            seen.add(hash(text))
            written += len(text.encode())
            file.write(json.dumps({"text": text}) + "\n")
            if written >= size:
                break
    return written


def _endless(source: str) -> Iterator[str]:
    for seed in count():
        shuffle = random.Random(seed).shuffle
        for document in documents(DataConfig(source=source)):
            lines = document.text.splitlines(keepends=True)
            if seed:
                shuffle(lines)
            yield "".join(lines)


def _start(path: Path) -> Iterator[str]:
    seen = 0
    for document in documents(DataConfig(source=str(path))):
        yield document.text
        seen += len(document.text)
        if seen > _TOKENIZER_CHARACTERS:
            return


# Tables ---------------------------------------------------------------------------------------------------------------


def _tokenise(config: RunConfig, root: Path, size: int, rounds: int) -> tuple[str, bool]:
    """The table of tokenising, and whether the ids are the library's."""
    bare, ours, whole = root / "bare.ids", root / "ours.safetensors", root / "prepared"
    tokenizer = load_tokenizer(root / TOKENIZER_FILE)
    known = scan_documents(config.data)
    rows: dict[str, Callable[[], Any]] = {
        "bare `encode_batch`": lambda: _bare(Path(config.data.source), root / TOKENIZER_FILE, bare),
        "`encode`": lambda: encode(config, tokenizer, known, ours),
        "`prepare`": lambda: prepare(config, whole)}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, run in rows.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    first = next(iter(seconds.values()))
    lines = [[name, f"{median(times):.1f}", f"{size / 1e6 / median(times):.1f}",
              f"{median(bare / own for bare, own in zip(first, times, strict=True)):.2f}"]
             for name, times in seconds.items()]  # fmt: skip
    kind = token_dtype(config.model.vocab_size).replace("U16", "<u2").replace("U32", "<u4")
    ids = np.fromfile(bare, dtype=kind)
    equal = all(np.array_equal(ids, TokenFile(path).tokens) for path in (ours, whole / CORPUS_FILE))
    return table(["", "seconds", "MB/s", "of the bare rate"], lines) + f"\nThe ids are {'' if equal else 'NOT '}equal.\n", equal


def _bare(source: Path, tokenizer_file: Path, target: Path) -> None:
    tokenizer, batch = load_tokenizer(tokenizer_file), list[str]()
    kind = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    with open(source, encoding="utf-8") as lines, open(target, "wb") as file:
        def write() -> None:
            for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                file.write(np.array(encoding.ids, dtype=kind).tobytes())
            batch.clear()

        for line in lines:
            batch.append(json.loads(line)["text"])
            if len(batch) == _BATCH_DOCUMENTS:
                write()
        write()
        file.flush()
        os.fsync(file.fileno())


def _partition(config: RunConfig, root: Path, size: int) -> str:
    corpus, split_M = TokenFile(root / "prepared" / CORPUS_FILE), np.load(root / "prepared" / SPLIT_FILE)
    tokenizer, rng = load_tokenizer(root / TOKENIZER_FILE), np.random.default_rng(0)
    centres_KD = rng.standard_normal((_PARTITIONS, _WIDTH), dtype=np.float32)
    features_MD = centres_KD[rng.integers(_PARTITIONS, size=len(corpus))] + rng.standard_normal((len(corpus), _WIDTH), np.float32)

    def assignment(method: str) -> Any:
        return assign(method, _PARTITIONS, split=split_M, tokens_per_document=corpus.lengths, seed=0, features=features_MD,
                      texts=lambda index: tokenizer.decode(corpus.document(index).tolist()))  # fmt: skip

    steps: dict[str, Callable[[], Any]] = {
        f"balanced k-means of {_WIDTH} given features": lambda: assignment("clustered"),
        "tf-idf, decoding included": lambda: assignment("tfidf"),
        "writing the partitions": lambda: split_by_partition(corpus, split_M, assignment("random"), root)}  # fmt: skip
    rows = []
    for name, run in steps.items():
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        rows.append([name, f"{seconds:.2f}", f"{len(corpus) / seconds:,.0f}", f"{size / 1e6 / seconds:.1f}"])
    return f"{len(corpus):,} documents in {_PARTITIONS} partitions:\n\n" + table(["", "seconds", "documents/s", "MB/s"], rows)


def _large(root: Path, options: argparse.Namespace) -> str:
    size = _write_corpus(root / "large.jsonl", options.data, int(options.large * 1e6))
    run = RunDirectory.open(root / "run", _config(root / "large.jsonl", options.vocabulary))
    began = time.perf_counter()
    facts = pipeline.call("stage", {"run_dir": str(run.root), "stage": "prepare", "ram_bytes": 1 << 40}, lambda event: None,
                          options.threads)  # fmt: skip
    seconds = time.perf_counter() - began
    peak = int(facts["peak_bytes"])
    return ("The prepare stage of a large corpus, the tokenizer learned:\n\n" + table(
        ["text", "documents", "tokens", "seconds", "MB/s", "peak resident"],
        [[f"{size / 1e6:,.0f} MB", f"{facts['documents']:,}", f"{facts['tokens']:,}", f"{seconds:.0f}",
          f"{size / 1e6 / seconds:.1f}", f"{peak / MB:.0f} M"]]))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
