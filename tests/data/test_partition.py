from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import numpy.typing as npt
import pytest

from forge.data.clustering import assign_within, balanced_kmeans
from forge.data.partition import SPLITS, assign, split_by_partition
from forge.data.tokens import TokenFile, TokenWriter
from forge.errors import DataError
from forge.system import resident_bytes

Split = npt.NDArray[np.uint8]
WORDS = ("apple pear plum cherry", "engine wheel brake gear", "cell gene protein enzyme")


def ones(documents: int) -> npt.NDArray[np.int64]:
    return np.ones(documents, dtype=np.int64)


def splits(documents: int) -> Split:
    return (np.arange(documents) % 6 // 4 * (1 + np.arange(documents) % 2)).astype(np.uint8)


def blobs(documents: int, n: int, seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    truth = random.integers(n, size=documents)
    centres = 10 * random.normal(size=(n, 8))
    return (centres[truth] + random.normal(size=(documents, 8))).astype(np.float32), truth


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 50), min_size=6, max_size=60),
    n=st.integers(1, 6),
    balance=st.floats(1.0, 3.0),
    seed=st.integers(0, 1000),
    lopsided=st.booleans(),
)
def test_the_promise_about_balance(tokens: list[int], n: int, balance: float, seed: int, lopsided: bool) -> None:
    sizes = np.array(tokens)
    scores = np.random.default_rng(seed).random((len(tokens), n))
    if lopsided:
        scores[:, 0] -= 5
    assignment = assign_within(scores, sizes, balance)
    loads = np.bincount(assignment, weights=sizes, minlength=n)
    mean, largest = sizes.sum() / n, sizes.max()
    assert loads.max() <= max(balance * mean, mean + largest) + 1e-6
    if largest <= (balance - 1) * mean:
        assert loads.max() <= balance * mean + 1e-6
    if largest <= mean * (1 - 1 / (2 * balance)) and largest <= (balance - 1) * mean:
        assert loads.min() >= mean / (2 * balance) - 1e-6
    assert np.bincount(assignment, minlength=n).min() >= 1


def test_clusters_are_found_and_held_out_documents_follow() -> None:
    features, truth = blobs(600, 4)
    split = splits(600)
    found = assign("clustered", 4, split=split, tokens_per_document=np.full(600, 10), seed=3, features=features)
    assert found.dtype == np.int32
    assert len(set(zip(found.tolist(), truth.tolist(), strict=True))) == 4
    again = assign("clustered", 4, split=split, tokens_per_document=np.full(600, 10), seed=3, features=features)
    np.testing.assert_array_equal(found, again)


def test_features_of_a_file_are_read_and_not_kept(tmp_path: Path) -> None:
    features, _ = blobs(40_000, 4)
    wide = np.tile(features, (1, 512 // features.shape[1])).astype(np.float32)  # 82 MB
    wide.tofile(tmp_path / "features.f32")
    train = np.arange(0, 40_000, 2)
    expected = balanced_kmeans(wide, ones(40_000), train, 4, 1.25, seed=3)
    mapped = np.memmap(tmp_path / "features.f32", dtype=np.float32, mode="r", shape=wide.shape)
    del wide
    before = resident_bytes()
    found = balanced_kmeans(mapped, ones(40_000), train, 4, 1.25, seed=3)
    assert resident_bytes() - before < 40e6
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_lopsided_corpus_is_balanced() -> None:
    random = np.random.default_rng(1)
    features = np.where(np.arange(500)[:, None] < 400, 0.0, 30.0) + random.normal(size=(500, 4))
    tokens = random.integers(1, 30, size=500)
    split = splits(500)
    found = assign("clustered", 3, split=split, tokens_per_document=tokens, seed=0, features=features, balance=1.25)
    train = split == 0
    loads = np.bincount(found[train], weights=tokens[train])
    assert loads.max() <= 1.25 * loads.mean()


def test_equal_features_and_a_single_partition() -> None:
    split = splits(60)
    same = np.ones((60, 4), dtype=np.float32)
    found = assign("clustered", 3, split=split, tokens_per_document=ones(60), seed=0, features=same)
    assert np.bincount(found[split == 0]).max() <= 1.25 * 40 / 3
    only = assign("clustered", 1, split=split, tokens_per_document=ones(60), seed=0, features=same)
    assert not only.any()


def test_tfidf_finds_topics() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(3, size=240)
    documents = [" ".join(random.choice(WORDS[topic].split(), size=20)) for topic in truth]
    found = assign("tfidf", 3, split=splits(240), tokens_per_document=np.full(240, 20), seed=0,
                   texts=documents.__getitem__)  # fmt: skip
    assert len(set(zip(found.tolist(), truth.tolist(), strict=True))) == 3


@settings(max_examples=40, deadline=None)
@given(documents=st.integers(30, 90), n=st.integers(1, 5), seed=st.integers(0, 2**64),
       method=st.sampled_from(["random", "curriculum", "clustered"]))  # fmt: skip
def test_every_partition_has_documents_of_every_split(documents: int, n: int, seed: int, method: str) -> None:
    split = splits(documents)
    tokens = np.random.default_rng(documents).integers(1, 40, size=documents)
    key = np.random.default_rng(n).random(documents)
    found = assign(method, n, split=split, tokens_per_document=tokens, seed=seed, difficulty=key,
                   features=np.outer(key**4, [1.0, 2.0]))  # fmt: skip
    for number in range(len(SPLITS)):
        counts = np.bincount(found[split == number], minlength=n)
        assert len(counts) == n
        assert counts.min() >= (1 if (split == number).sum() >= n else 0)
    if method != "clustered":
        loads = np.bincount(found[split == 0], weights=tokens[split == 0], minlength=n)
        assert loads.max() <= loads.mean() + tokens.max()


def test_curriculum_goes_from_easy_to_hard() -> None:
    split = splits(90)
    loss = np.random.default_rng(0).random(90)
    found = assign("curriculum", 3, split=split, tokens_per_document=ones(90), seed=0, difficulty=loss)
    train = split == 0
    for k in range(2):
        assert loss[train & (found == k)].max() < loss[train & (found == k + 1)].min()
    assert np.corrcoef(loss[~train], found[~train])[0, 1] > 0.9


def test_one_huge_document_leaves_no_partition_empty() -> None:
    tokens = np.array([1000, 1, 1, 1, 1, 1])
    for order in (np.arange(6.0), -np.arange(6.0)):
        found = assign("curriculum", 4, split=np.zeros(6, dtype=np.int64), tokens_per_document=tokens, seed=0, difficulty=order)
        assert set(found) == {0, 1, 2, 3}


def test_random_depends_on_the_seed() -> None:
    one, other, again = (
        assign("random", 2, split=splits(90), tokens_per_document=ones(90), seed=seed) for seed in (0, 1, 0)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_labels_are_partitions() -> None:
    labels = np.arange(60) // 6 % 3 * 2
    found = assign("labels", 3, split=splits(60), tokens_per_document=ones(60), seed=0, labels=labels)
    np.testing.assert_array_equal(found, labels // 2)


def test_labels_that_do_not_fit() -> None:
    split, tokens, labels = splits(60), ones(60), np.arange(60) // 6 % 3

    def by_label(values: npt.NDArray[np.int64], n: int) -> object:
        return assign("labels", n, split=split, tokens_per_document=tokens, seed=0, labels=values,
                      label_names=["a", "b", "c"])  # fmt: skip

    with pytest.raises(DataError, match="3 distinct values and model.n_experts is 4"):
        by_label(labels, 4)
    with pytest.raises(DataError, match="6 documents have no value"):
        by_label(np.where(np.arange(60) < 6, -1, labels), 3)
    with pytest.raises(DataError, match="label 'c' has no validation document"):
        by_label(np.where((split == 1) & (labels == 2), 0, labels), 3)
    with pytest.raises(DataError, match="2 training documents, too few for model.n_experts: 3"):
        assign("random", 3, split=np.array([0, 0, 1, 2]), tokens_per_document=ones(4), seed=0)


def test_partition_files_hold_every_document_once(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "corpus", 70_000) as writer:
        for index in range(60):
            writer.append([index] * (1 + index % 3))
    corpus = TokenFile(tmp_path / "corpus")
    split = splits(60)
    found = assign("random", 3, split=split, tokens_per_document=corpus.lengths, seed=0)
    files = split_by_partition(corpus, split, found, tmp_path / "parts")
    assert len(files) == 3
    seen = []
    for partition, paths in enumerate(files):
        assert list(paths) == list(SPLITS)
        for number, path in enumerate(paths.values()):
            part = TokenFile(path)
            assert part.vocab_size == 70_000
            ids = [int(part.document(i)[0]) for i in range(len(part))]
            assert all(found[i] == partition and split[i] == number for i in ids)
            assert [len(part.document(i)) for i in range(len(part))] == [1 + i % 3 for i in ids]
            seen += ids
    assert sorted(seen) == list(range(60))
