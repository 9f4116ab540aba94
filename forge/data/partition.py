"""Which partition every document belongs to, and one set of token files a partition.

The rule is fitted on training documents and applied to the others: held-out documents go where the nearest centroid,
quantile or label puts them, without a capacity. So a document's split and its partition are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from forge.data.clustering import FloatArray, balanced_kmeans, fill_held_out, tfidf_features
from forge.data.packing import shuffled
from forge.data.tokens import IntArray, TokenFile, TokenWriter
from forge.errors import DataError

#: Splits by their number in `split`.
SPLITS: Final = ("train", "validation", "test")
TRAIN = 0


def assign(
    method: str,
    n: int,
    *,
    split: npt.NDArray[np.integer],
    tokens_per_document: npt.NDArray[np.integer],
    seed: int,
    balance: float = 1.25,
    features: FloatArray | None = None,
    texts: Callable[[int], str] | None = None,
    labels: npt.NDArray[np.integer] | None = None,
    label_names: Sequence[str] = (),
    difficulty: FloatArray | None = None,
) -> npt.NDArray[np.int32]:
    """The partition of every document, (M,) int32 in 0..n-1; every partition has a training document.

    clustered: balanced k-means on `features`. tfidf: the same on tf-idf features of `texts`. random: equal shares of the
    tokens in a random order. curriculum: the same in the order of `difficulty`, partition 0 the easiest. labels: the
    labels in the order of their numbers.

    Every method but labels also gives each partition a validation and a test document, where there are n of them.

    Args:
        method: one of `PartitionConfig.method`.
        n: number of partitions.
        split: (M,) 0 train, 1 validation, 2 test.
        tokens_per_document: (M,).
        seed: of everything random.
        balance: clustered and tfidf: largest partition as a multiple of the mean (see `assign_within` for the exact
            promise, which depends on the largest document).
        features: (M, D), for clustered; may be a memory map.
        texts: the text of a document by its index, for tfidf; called in order, some documents twice.
        labels: (M,) numbers of label values, -1 for none; for labels.
        label_names: their names, for the sentences of errors.
        difficulty: (M,) loss of each document, for curriculum.

    Raises:
        DataError: there are fewer training documents than partitions, or the labels do not fit.
    """
    split_M, tokens_M = np.asarray(split), np.asarray(tokens_per_document, dtype=np.int64)
    train = np.flatnonzero(split_M == TRAIN)
    if len(train) < n:
        raise DataError(f"The corpus has {len(train)} training documents, too few for model.n_experts: {n} partitions.")
    if method == "labels":
        assert labels is not None
        return _by_label(np.asarray(labels), split_M, n, label_names)
    if method in ("clustered", "tfidf"):
        if method == "tfidf":
            assert texts is not None
            features = tfidf_features(texts, len(tokens_M), train, seed)
        assert features is not None
        assigned, scores_MK = balanced_kmeans(features, tokens_M, train, n, balance, seed)
        assignment = scores_MK.argmin(axis=1)
        assignment[train] = assigned
    else:
        assert method == "random" or difficulty is not None
        key_M = _random_key(len(tokens_M), seed) if method == "random" else np.asarray(difficulty)
        assignment, scores_MK = _by_quantile(key_M, tokens_M, train, n)
    for number in range(1, len(SPLITS)):
        held_out = np.flatnonzero(split_M == number)
        part = assignment[held_out]
        fill_held_out(part, scores_MK[held_out])
        assignment[held_out] = part
    partition_M: npt.NDArray[np.int32] = assignment.astype(np.int32)
    return partition_M


def split_by_partition(
    corpus: TokenFile, split: npt.NDArray[np.integer], assignment: npt.NDArray[np.integer], directory: Path
) -> list[dict[str, Path]]:
    """Copy the corpus into one token file a partition and split, `DIRECTORY/NNN-SPLIT.safetensors`.

    One document is in memory at a time; equal content gives equal bytes.

    Returns:
        For every partition the paths of its "train", "validation" and "test" files.

    Raises:
        StorageError: the disk is full or the directory cannot be written.
    """
    files = []
    for partition in range(int(assignment.max()) + 1):
        paths = {name: directory / f"{partition:03d}-{name}.safetensors" for name in SPLITS}
        for number, path in enumerate(paths.values()):
            with TokenWriter(path, corpus.vocab_size) as writer:
                for index in np.flatnonzero((assignment == partition) & (split == number)):
                    writer.append(corpus.document(int(index)))
        files.append(paths)
    return files


def _random_key(documents: int, seed: int) -> npt.NDArray[Any]:
    key_M = np.empty(documents, dtype=np.int64)
    key_M[shuffled(documents, seed, 1)] = np.arange(documents)
    return key_M


def _by_quantile(
    key_M: npt.NDArray[Any], tokens_M: IntArray, train: IntArray, count: int
) -> tuple[IntArray, FloatArray]:
    """Equal shares of the training tokens in the order of a key; documents between two shares' ends go by their key."""
    order = train[np.argsort(key_M[train], kind="stable")]
    middles = np.cumsum(tokens_M[order]) - tokens_M[order] / 2
    borders = np.searchsorted(middles, tokens_M[train].sum() * np.arange(1, count) / count)
    # Each partition gets a document, even when one document is larger than a share.
    for k in range(count - 1):
        lowest = (borders[k - 1] if k else 0) + 1
        borders[k] = min(max(borders[k], lowest), len(order) - (count - 1 - k))
    position_M = np.searchsorted(key_M[order], key_M, side="left")
    position_M[order] = np.arange(len(order))
    assignment = np.searchsorted(borders, position_M, side="right")
    # How far a document is from the middle of each share, for partitions that lack a held-out one.
    edges = np.concatenate([[0], borders, [len(order)]])
    scores_MK: FloatArray = np.abs(position_M[:, None] - (edges[:-1] + edges[1:]) / 2)
    return assignment, scores_MK


def _by_label(
    labels_M: npt.NDArray[np.integer], split_M: npt.NDArray[np.integer], count: int, names: Sequence[str]
) -> npt.NDArray[np.int32]:
    missing = int((labels_M < 0).sum())
    if missing:
        raise DataError(f"{missing} documents have no value in data.label_field, which partition.method: labels needs.")
    values, assignment = np.unique(labels_M, return_inverse=True)
    if len(values) != count:
        raise DataError(f"data.label_field has {len(values)} distinct values and model.n_experts is {count}; with "
                        f"partition.method: labels set it to {len(values)}.")  # fmt: skip
    for number, split in enumerate(SPLITS):
        absent = np.flatnonzero(np.bincount(assignment[split_M == number], minlength=count) == 0)
        if len(absent):
            value = int(values[absent[0]])
            name = names[value] if value < len(names) else str(value)
            raise DataError(f"The label {name!r} has no {split} document; use more text or change the split fractions.")
    partition_M: npt.NDArray[np.int32] = assignment.astype(np.int32)
    return partition_M
