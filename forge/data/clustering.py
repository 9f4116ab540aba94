"""Balanced k-means and tf-idf features: what the `clustered` and `tfidf` partitioners are made of.

Shapes: M documents, K partitions, D features. Scores are distances up to a constant a row: lower is nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import warnings

import numpy as np
import numpy.typing as npt

from forge.data.packing import shuffled
from forge.data.tokens import IntArray
from forge.train.memory import SAMPLE_DOCUMENTS

FloatArray = npt.NDArray[np.floating]
#: Rows of features in memory at a time.
CHUNK_ROWS = 4096
#: Rounds of (assign within the capacities, move the centroids); most corpora are stable before.
BALANCED_ROUNDS = 8
#: Hashed words, and the width of their projection.
TFIDF_WORDS = 1 << 15
TFIDF_WIDTH = 64
#: Characters at the start of a document that tf-idf looks at.
TFIDF_CHARACTERS = 50_000


def balanced_kmeans(
    features_MD: FloatArray, tokens_M: IntArray, train: IntArray, count: int, balance: float, seed: int
) -> tuple[IntArray, FloatArray]:
    """Cluster the training documents under a capacity in tokens.

    k-means (k-means++, 4 starts) gives the first centroids; then documents are assigned by `assign_within` and the
    centroids move to the means, until nothing changes. The features are used as they are, unscaled.

    Args:
        features_MD: of all documents; may be a memory map.
        tokens_M: tokens of all documents.
        train: indices of the training documents, at least `count`.
        count: K.
        balance: capacity as a multiple of the mean tokens of a partition.
        seed: of the k-means starts and of the sample.

    Returns:
        The partition of every training document, (len(train),), and the scores of all documents, (M, K).
    """
    centroids_KD = _kmeans(features_MD, train, count, seed)
    scores_MK = _scores(features_MD, centroids_KD)
    assignment = assign_within(scores_MK[train], tokens_M[train], balance)
    for _ in range(BALANCED_ROUNDS):
        if np.array_equal(assignment, scores_MK[train].argmin(axis=1)):
            break
        scores_MK = _scores(features_MD, _means(features_MD, train, assignment, count))
        before, assignment = assignment, assign_within(scores_MK[train], tokens_M[train], balance)
        if np.array_equal(before, assignment):
            break
    return assignment, scores_MK


def assign_within(scores_MK: FloatArray, tokens_M: IntArray, balance: float) -> IntArray:
    """The nearest partition with room for every document, those first that lose most by their second choice.

    With mean = tokens / K: no partition exceeds max(balance * mean, mean + the largest document), and none exceeds
    balance * mean when no document is larger than (balance - 1) * mean. No partition stays empty (M >= K), and none
    below mean / (2 * balance) when no document is larger than mean * (1 - 1 / (2 * balance)): an expert needs text.

    Returns:
        (M,) partitions.
    """
    documents, count = scores_MK.shape
    mean = float(tokens_M.sum()) / count
    capacity = balance * mean
    preferences_MK = np.argsort(scores_MK, axis=1, kind="stable")
    ranked_MK = np.take_along_axis(scores_MK, preferences_MK, axis=1)
    regret_M = ranked_MK[:, min(1, count - 1)] - ranked_MK[:, 0]
    assignment = np.zeros(documents, dtype=np.int64)
    loads = [0.0] * count
    for index in np.argsort(-regret_M, kind="stable"):
        size = int(tokens_M[index])
        chosen = next((int(k) for k in preferences_MK[index] if loads[k] + size <= capacity), None)
        if chosen is None:
            chosen = min(range(count), key=loads.__getitem__)
        assignment[index] = chosen
        loads[chosen] += size
    _raise_to_floor(assignment, scores_MK, tokens_M, loads, mean / (2 * balance), capacity)
    _fill_empty(assignment, scores_MK)
    return assignment


def fill_held_out(assignment_H: IntArray, scores_HK: FloatArray) -> None:
    """Give every partition a held-out document where there are enough, in place.

    A partition without one takes the nearest from those that have several: a shard cannot be judged on nothing.
    """
    if len(assignment_H) >= scores_HK.shape[1]:
        _fill_empty(assignment_H, scores_HK)


def tfidf_features(texts: Callable[[int], str], documents: int, train: IntArray, seed: int) -> FloatArray:
    """Unit vectors of every document: hashed words, tf-idf, projected by a truncated SVD; (M, <= 64) float32.

    Weights and projection are fitted on a sample of the training documents; the rest passes in chunks.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    words = HashingVectorizer(n_features=TFIDF_WORDS, alternate_sign=False, norm=None, dtype=np.float32)

    def counts(indices: IntArray) -> object:
        return words.transform(texts(int(index))[:TFIDF_CHARACTERS] for index in indices)

    chosen = _sample(train, seed)
    weights = TfidfTransformer(sublinear_tf=True)
    sample = weights.fit_transform(counts(chosen))
    width = max(1, min(TFIDF_WIDTH, len(chosen) - 1))
    with np.errstate(invalid="ignore"):  # The variance that is explained, of documents that do not vary; not looked at.
        projection = TruncatedSVD(n_components=width, random_state=seed % 2**32).fit(sample)
    features_MD = np.zeros((documents, width), dtype=np.float32)
    for rows in _slices(documents):
        features_MD[rows] = projection.transform(weights.transform(counts(np.arange(rows.start, rows.stop))))
    norms_M1 = np.linalg.norm(features_MD, axis=1, keepdims=True)
    return features_MD / np.where(norms_M1 > 0, norms_M1, 1)


def _kmeans(features_MD: FloatArray, train: IntArray, count: int, seed: int) -> FloatArray:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    wanted_M = np.zeros(len(features_MD), dtype=bool)
    wanted_M[_sample(train, seed)] = True
    sample = np.concatenate([some_ND[wanted_M[rows]] for rows, some_ND in _chunks(features_MD)])
    with warnings.catch_warnings():
        # Fewer distinct documents than partitions: equal centroids, and the capacities tell the documents apart.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = KMeans(count, n_init=4, random_state=seed % 2**32).fit(sample)
    centroids_KD: FloatArray = fitted.cluster_centers_
    return centroids_KD


def _sample(train: IntArray, seed: int) -> IntArray:
    if len(train) <= SAMPLE_DOCUMENTS:
        return train
    return np.sort(train[shuffled(len(train), seed, 0)[:SAMPLE_DOCUMENTS]])


def _scores(features_MD: FloatArray, centroids_KD: FloatArray) -> FloatArray:
    """Squared distances to the centroids, without the term that is the same for all of them."""
    scores_MK = np.empty((len(features_MD), len(centroids_KD)), dtype=np.float64)
    squares_K = (centroids_KD**2).sum(axis=1)
    for rows, some_ND in _chunks(features_MD):
        scores_MK[rows] = squares_K - 2 * some_ND @ centroids_KD.T
    return scores_MK


def _means(features_MD: FloatArray, train: IntArray, assignment: IntArray, count: int) -> FloatArray:
    sums_KD = np.zeros((count, features_MD.shape[1]), dtype=np.float64)
    owner_M = np.full(len(features_MD), -1)
    owner_M[train] = assignment
    for rows, some_ND in _chunks(features_MD):
        owned_N = owner_M[rows] >= 0
        np.add.at(sums_KD, owner_M[rows][owned_N], some_ND[owned_N])
    return sums_KD / np.maximum(np.bincount(assignment, minlength=count), 1)[:, None]


def _chunks(features_MD: FloatArray) -> Iterator[tuple[slice, FloatArray]]:
    """Neighbouring rows, as float64. Those of a memory map are read from its file: pages that are touched would stay resident."""
    for rows in _slices(len(features_MD)):
        if isinstance(features_MD, np.memmap):
            width = features_MD.shape[1]
            some = np.fromfile(str(features_MD.filename), features_MD.dtype, (rows.stop - rows.start) * width,
                               offset=rows.start * width * features_MD.itemsize)  # fmt: skip
            yield rows, some.reshape(-1, width).astype(np.float64)
        else:
            yield rows, np.asarray(features_MD[rows], dtype=np.float64)


def _slices(rows: int) -> Iterator[slice]:
    for start in range(0, rows, CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, rows))


def _raise_to_floor(
    assignment: IntArray, scores_MK: FloatArray, tokens_M: IntArray, loads: list[float], floor: float, capacity: float
) -> None:
    """Move the documents that lose least into partitions below the floor, while their donors stay above it."""
    own_M = np.arange(len(assignment))
    for target in range(len(loads)):
        if loads[target] >= floor:
            continue
        loss_M = scores_MK[:, target] - scores_MK[own_M, assignment]
        for index in np.argsort(loss_M, kind="stable"):
            donor, size = int(assignment[index]), int(tokens_M[index])
            if donor != target and loads[donor] - size >= floor and loads[target] + size <= capacity:
                assignment[index] = target
                loads[donor] -= size
                loads[target] += size
                if loads[target] >= floor:
                    break


def _fill_empty(assignment: IntArray, scores_MK: FloatArray) -> None:
    """Move the nearest document of a partition that has several into each partition that has none."""
    counts = np.bincount(assignment, minlength=scores_MK.shape[1])
    for target in np.flatnonzero(counts == 0):
        loss_M = scores_MK[:, target] - scores_MK[np.arange(len(assignment)), assignment]
        loss_M[counts[assignment] < 2] = np.inf
        index = int(loss_M.argmin())
        counts[assignment[index]] -= 1
        assignment[index] = target
        counts[target] = 1
