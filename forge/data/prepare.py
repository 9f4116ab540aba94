"""The prepare stage: from a source to a tokenizer, a token file and a split, in three passes and bounded memory.

Pass 1 hashes the documents, which decides the split; pass 2 learns the tokenizer from the start of the training
documents; pass 3 encodes. Nothing half-written is left by a kill, and running it again gives the same bytes.

Files: tokenizer.json, tokenizer_config.json, corpus.safetensors (a token file of all documents), split.npy ((M,) uint8:
0 train, 1 validation, 2 test), label.npy ((M,) int32: index into the names, -1 for none), bytes.npy ((M,) int64: bytes of
UTF-8 text), documents.json (names of the labels).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
import io
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from forge.config import DataConfig, RunConfig
from forge.data.partition import SPLITS, TRAIN
from forge.data.sources import Document, documents
from forge.data.tokenizer import encode_documents, load_tokenizer, tokenizer_files, train_tokenizer
from forge.data.tokens import IntArray, TokenFile, TokenWriter
from forge.errors import DataError
from forge.files import write_bytes, write_json

CORPUS_FILE: Final = "corpus.safetensors"
SPLIT_FILE: Final = "split.npy"
LABEL_FILE: Final = "label.npy"
BYTES_FILE: Final = "bytes.npy"
DOCUMENTS_FILE: Final = "documents.json"

#: Fewest documents an expert: two to train on, one to validate and one to test.
DOCUMENTS_PER_EXPERT = 4
#: Held-out documents an expert that a small corpus aims at, in each of validation and test ...
HELD_OUT_PER_EXPERT = 4
#: ... as long as that is at most this share of all documents.
HELD_OUT_SHARE = 0.05
#: Text that is encoded at a time, in bytes and documents: keeps all cores busy, and some 50 MB in the library.
BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1024

Progress = Callable[[int, int, str], None]
_SPACE = 1 << 64


def _silent(done: int, total: int, message: str) -> None:
    """Tell nobody."""


@dataclass
class Scan:
    """What pass 1 learns of every document."""

    digests: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    labels: array[int] = field(default_factory=lambda: array("i"))
    names: dict[str, int] = field(default_factory=dict)

    def add(self, document: Document) -> None:
        """Remember the next document."""
        self.digests.append(document.digest)
        self.sizes.append(document.size)
        label = document.label
        self.labels.append(-1 if label is None else self.names.setdefault(label, len(self.names)))


def prepare(config: RunConfig, directory: Path, on_progress: Progress | None = None) -> dict[str, Any]:
    """Read the corpus of a run and write its tokenizer, tokens and split into `directory`.

    Args:
        config: the run.
        directory: where the files of the module's docstring go.
        on_progress: called with (bytes done, bytes in total or 0 while unknown, what is being done).

    Returns:
        documents, tokens, bytes (of UTF-8 text), vocab_size, labels (names), and splits: the first three for each of
        train, validation and test.

    Raises:
        DataError: a source is missing, damaged, empty, too small for n_experts or for the vocabulary, or the tokenizer
            given does not fit.
        HubError: the Hugging Face Hub cannot be reached.
        StorageError: the disk is full or the directory cannot be written.
    """
    progress = on_progress or _silent
    given = None
    if config.tokenizer.path is not None:  # before hours of reading
        given = load_tokenizer(Path(config.tokenizer.path).expanduser(), config.model.vocab_size)
    scan = scan_documents(config.data, progress)
    split_M = split_documents(np.frombuffer(scan.digests, dtype=np.uint64), config.model.n_experts,
                              config.data.validation_fraction, config.data.test_fraction)  # fmt: skip
    sizes_M = np.frombuffer(scan.sizes, dtype=np.int64)
    text = _training_text(config, split_M, int(sizes_M[split_M == TRAIN].sum()), progress)
    tokenizer = given or train_tokenizer(text, config.model.vocab_size)
    tokenizer_files(tokenizer, directory, config.model.max_seq_len)
    encode(config, tokenizer, scan, directory / CORPUS_FILE, progress)
    lengths_M = TokenFile(directory / CORPUS_FILE).lengths
    facts = _facts(split_M, lengths_M, sizes_M)
    needed = config.model.n_experts * (config.model.max_seq_len + 1)
    if facts["splits"]["train"]["tokens"] < needed:
        raise DataError(
            f"The corpus has {facts['splits']['train']['tokens']:,} training tokens, too few for model.n_experts: "
            f"{config.model.n_experts} (one sequence each is {needed:,}); use more text or fewer experts.")  # fmt: skip
    _save(directory / SPLIT_FILE, split_M)
    _save(directory / LABEL_FILE, np.frombuffer(scan.labels, dtype=np.intc).astype(np.int32))
    _save(directory / BYTES_FILE, sizes_M)
    write_json(directory / DOCUMENTS_FILE, {"labels": list(scan.names)})
    return facts | {"vocab_size": config.model.vocab_size, "labels": list(scan.names)}


def split_documents(
    digests_M: npt.NDArray[np.uint64], n_experts: int, validation_fraction: float, test_fraction: float
) -> npt.NDArray[np.uint8]:
    """The split of every document by the hash of its text: 0 train, 1 validation, 2 test, (M,) uint8.

    Read as a number in [0, 1), a hash below `test_fraction` means test, and one in the next `validation_fraction`
    validation: a document's split does not depend on the others. In a small corpus that could leave an expert without a
    held-out document, so both splits have at least n_experts documents, and 4 * n_experts as long as this is at most a
    twentieth of the corpus; the documents with the next higher hashes make up the number.

    Raises:
        DataError: there are fewer than 4 documents an expert.
    """
    count = len(digests_M)
    if count < DOCUMENTS_PER_EXPERT * n_experts:
        raise DataError(
            f"The corpus has {count} documents, too few for model.n_experts: {n_experts} (at least "
            f"{DOCUMENTS_PER_EXPERT} an expert; a .txt file is one document); use more text or fewer experts.")  # fmt: skip
    fewest = max(n_experts, min(HELD_OUT_PER_EXPERT * n_experts, int(HELD_OUT_SHARE * count)))
    order = np.argsort(digests_M, kind="stable")
    ranked_M = digests_M[order]
    test = max(fewest, _below(ranked_M, test_fraction))
    held_out = max(test + fewest, _below(ranked_M, test_fraction + validation_fraction))
    split_M = np.full(count, TRAIN, dtype=np.uint8)
    split_M[order[:test]] = SPLITS.index("test")
    split_M[order[test:held_out]] = SPLITS.index("validation")
    return split_M


def _below(ranked_M: npt.NDArray[np.uint64], fraction: float) -> int:
    """How many of the sorted hashes are below a fraction of their space."""
    return int(np.searchsorted(ranked_M, np.uint64(min(_SPACE - 1, int(fraction * _SPACE))), side="left"))


def scan_documents(config: DataConfig, progress: Progress = _silent) -> Scan:
    """Pass 1: what is known of every document.

    Raises:
        DataError: the source is missing, damaged or empty.
        HubError: the Hugging Face Hub cannot be reached.
    """
    scan, done, told = Scan(), 0, 0
    for document in documents(config):
        scan.add(document)
        done += scan.sizes[-1]
        if done - told >= BATCH_BYTES:
            progress(done, 0, "reading the corpus")
            told = done
    if not scan.sizes:
        raise DataError(f"The source {config.source} has no text: every document is empty or blank.")
    cut = config.max_bytes is not None and done >= config.max_bytes
    progress(done, done, "reading the corpus" + (", which ends at data.max_bytes" if cut else ""))
    return scan


def _training_text(config: RunConfig, split_M: npt.NDArray[np.uint8], size: int, progress: Progress) -> Iterator[str]:
    """The text that the tokenizer is learned from: the start of the training documents, which have so many bytes."""
    total = left = min(config.tokenizer.train_bytes, size)
    for index, document in enumerate(documents(config.data)):
        if index >= len(split_M) or split_M[index] != TRAIN:
            continue
        data = document.text.encode()
        yield document.text if len(data) <= left else data[:left].decode("utf-8", "ignore")
        left -= len(data)
        if left <= 0:
            break
        progress(total - left, total, "learning the tokenizer")
    progress(total, total, "learning the tokenizer")


def encode(config: RunConfig, tokenizer: Tokenizer, scan: Scan, path: Path, progress: Progress = _silent) -> None:
    """Pass 3: the tokens of all documents as a token file. A batch is encoded while its neighbours are read and written.

    Raises:
        DataError: the source is not what `scan` saw.
        StorageError: the disk is full or the directory cannot be written.
    """
    done, total = 0, sum(scan.sizes)
    with TokenWriter(path, config.model.vocab_size) as writer, ThreadPoolExecutor(1) as pool:

        def finish(encoded: Future[list[IntArray]] | None) -> None:
            nonlocal done
            for ids in encoded.result() if encoded is not None else ():
                done += scan.sizes[writer.documents]
                writer.append(ids)
            progress(done, total, "encoding")

        before = None
        for texts in _batches(config.data, scan):
            after = pool.submit(encode_documents, tokenizer, texts)
            finish(before)
            before = after
        finish(before)
        if writer.documents != len(scan.sizes):
            raise _changed(config.data)


def _batches(config: DataConfig, scan: Scan) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for index, document in enumerate(documents(config)):
        if index >= len(scan.digests) or document.digest != scan.digests[index]:
            raise _changed(config)
        batch.append(document.text)
        size += scan.sizes[index]
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _changed(config: DataConfig) -> DataError:
    return DataError(f"The source {config.source} changed while it was read; run the same command again.")


def _facts(split_M: npt.NDArray[np.uint8], lengths_M: IntArray, sizes_M: IntArray) -> dict[str, Any]:
    def sums(chosen_M: npt.NDArray[np.bool_]) -> dict[str, int]:
        return {
            "documents": int(chosen_M.sum()),
            "tokens": int(lengths_M[chosen_M].sum()),
            "bytes": int(sizes_M[chosen_M].sum()),
        }

    everything = np.ones(len(split_M), dtype=np.bool_)
    return sums(everything) | {"splits": {name: sums(split_M == number) for number, name in enumerate(SPLITS)}}


def _save(path: Path, array_M: npt.NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array_M, allow_pickle=False)
    write_bytes(path, buffer.getvalue())
