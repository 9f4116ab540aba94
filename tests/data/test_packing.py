from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from forge.data.packing import SequenceSampler, evaluation_windows, shuffled
from forge.data.tokens import TokenFile, TokenWriter

EOS = 0
LENGTHS = st.lists(st.integers(0, 25), min_size=1, max_size=12)


def token_file(path: Path, lengths: list[int], first: int = 1) -> TokenFile:
    """Documents in which every token is another number."""
    with TokenWriter(path, 100_000) as writer:
        for length in lengths:
            writer.append(range(first, first + length))
            first += length
    return TokenFile(path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packing")


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 12), seed=st.integers(0, 2**70), data=st.data())
def test_an_epoch_has_every_window_once(
    directory: Path, lengths: list[int], seq_len: int, seed: int, data: st.DataObject
) -> None:
    file = token_file(directory / "t", lengths)
    documents = np.array(data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True)))
    sampler = SequenceSampler(file, seq_len, seed, EOS, documents)
    stream = [token for i in documents for token in (EOS, *file.document(i).tolist())]
    ring = stream * (2 + (seq_len + 1) // len(stream))
    expected = sorted(ring[start : start + seq_len + 1] for start in range(0, len(stream), seq_len))
    assert sampler.windows == len(expected)
    for epoch in range(2):
        seen = [sampler.batch(epoch * sampler.windows + i, 1)[0].tolist() for i in range(sampler.windows)]
        assert sorted(seen) == expected
    targets = Counter(token for window in expected for token in window[1:])
    assert targets >= Counter(stream) and targets.total() < len(stream) + seq_len


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, batch_size=st.integers(1, 9), step=st.integers(0, 50))
def test_a_batch_depends_on_the_step_only(directory: Path, lengths: list[int], batch_size: int, step: int) -> None:
    file = token_file(directory / "t", lengths)
    used = SequenceSampler(file, 5, 7, EOS)
    for earlier in (step + 3, 0, 11):
        used.batch(earlier, batch_size)
    batch = used.batch(step, batch_size)
    assert batch.shape == (batch_size, 6) and batch.dtype == np.int64
    np.testing.assert_array_equal(batch, SequenceSampler(file, 5, 7, EOS).batch(step, batch_size))
    singles = [SequenceSampler(file, 5, 7, EOS).batch(step * batch_size + i, 1)[0] for i in range(batch_size)]
    np.testing.assert_array_equal(batch, singles)


def test_seeds_and_epochs_have_orders_of_their_own(directory: Path) -> None:
    orders = [tuple(shuffled(50, seed, epoch)) for seed in (0, 1, 2**64 - 1) for epoch in (0, 1)]
    assert len(set(orders)) == 6 and all(sorted(order) == list(range(50)) for order in orders)
    assert shuffled(6, 3, 1).tolist() == [3, 5, 4, 0, 2, 1]  # the same on every machine and in every version


def test_a_sampler_needs_a_document(directory: Path) -> None:
    with pytest.raises(ValueError, match="at least one document"):
        SequenceSampler(token_file(directory / "t", [3]), 4, 0, EOS, np.array([], dtype=np.int64))


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 12), max_tokens=st.none() | st.integers(0, 200))
def test_evaluation_windows_stay_in_their_document(
    directory: Path, lengths: list[int], seq_len: int, max_tokens: int | None
) -> None:
    file = token_file(directory / "t", lengths)
    windows = [window.tolist() for window in evaluation_windows(file, seq_len, EOS, max_tokens)]
    total = sum(lengths)
    targets = [token for window in windows for token in window[1:]]
    assert len(targets) == (total if max_tokens is None else min(total, max_tokens))
    assert targets == sorted(set(targets))
    starts = set(file.offsets[:-1] + 1)
    for window in windows:
        assert 2 <= len(window) <= seq_len + 1
        assert window[0] == (EOS if window[1] in starts else window[1] - 1)
        assert window[1:] == list(range(window[1], window[1] + len(window) - 1))
        assert not starts & set(window[2:])
    again = [window.tolist() for window in evaluation_windows(file, seq_len, EOS, max_tokens)]
    assert windows == again


def test_evaluation_windows_of_chosen_documents(directory: Path) -> None:
    file = token_file(directory / "t", [3, 4, 5])
    windows = [window.tolist() for window in evaluation_windows(file, 4, EOS, None, np.array([2, 0]))]
    assert windows == [[EOS, 8, 9, 10, 11], [11, 12], [EOS, 1, 2, 3]]


def test_a_capped_measurement_is_spread_over_the_file(directory: Path) -> None:
    file = token_file(directory / "t", [100] * 50)
    first = [int(window[1]) for window in evaluation_windows(file, 10, EOS, 500)]
    assert len(first) == 50 and min(first) < 1000 and max(first) > 4000
