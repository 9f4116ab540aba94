"""Cut documents into windows: packed for training, one document at a time for measuring.

Shapes: B sequences, T = seq_len. A training window has T + 1 tokens: inputs are its first T, targets its last T.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.data.tokens import IntArray, TokenFile

_WORD = (1 << 64) - 1
#: Seed of the choice of windows when a measurement is capped: the same windows in every run and on every machine.
_EVALUATION_SEED = 0x6576616C
#: Windows that are sorted by length at a time, so that a batch holds windows of about one length and little padding.
SORTED_WINDOWS = 128


class SequenceSampler:
    """Training batches as a pure function of (seed, step): nothing to save, nothing to restore.

    The chosen documents, each after an end-of-text, make one virtual stream, which is cut every `seq_len` tokens; a
    window has one token more, its last target, which is also the next window's first input. The stream is a ring: the
    last window ends with the stream's beginning, so every token is a target once an epoch (those that fill the last
    window twice), and a partition shorter than one window works. Each epoch visits all windows once, in an order of its
    own; a batch that an epoch ends in goes on with the next epoch.

    Attention crosses document borders within a window, where an end-of-text stands between the documents: no mask
    separates them (as in GPT-2 and GPT-3; Brown et al. 2020, section 2.3).

    The corpus is neither copied nor mapped; memory is 16 bytes a chosen document and 8 bytes a window.

    Args:
        file: the token file.
        seq_len: T, the inputs of one sequence.
        seed: of the order.
        eos_id: the end-of-text token.
        documents: which documents, in stream order; None means all.

    Raises:
        ValueError: there is no document.
    """

    def __init__(
        self,
        file: TokenFile,
        seq_len: int,
        seed: int,
        eos_id: int,
        documents: npt.NDArray[np.integer] | None = None,
    ) -> None:
        self._file = file
        self.seq_len, self.seed, self.eos_id = seq_len, seed, eos_id
        if documents is None:
            documents = np.arange(len(file))
        if not len(documents):
            raise ValueError("a sampler needs at least one document")
        self._documents: IntArray = np.asarray(documents, dtype=np.int64)
        lengths: IntArray = file.lengths[self._documents] + 1
        self._starts: IntArray = np.concatenate([[0], np.cumsum(lengths)])
        self._order: tuple[int, IntArray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def stream_tokens(self) -> int:
        """Tokens of the stream, end-of-texts included: the targets of one epoch."""
        return int(self._starts[-1])

    @property
    def windows(self) -> int:
        """Windows of one epoch."""
        return -(-self.stream_tokens // self.seq_len)

    def batch(self, step: int, batch_size: int) -> IntArray:
        """The windows of one optimiser step, (batch_size, seq_len + 1) int64, whatever was asked for before."""
        first = step * batch_size
        return np.stack([self.window(self._window_at(position)) for position in range(first, first + batch_size)])

    def window(self, index: int) -> IntArray:
        """Window `index` of the stream, (seq_len + 1,) int64."""
        out_T1 = np.empty(self.seq_len + 1, dtype=np.int64)
        position, filled = index * self.seq_len % self.stream_tokens, 0
        row = int(np.searchsorted(self._starts, position, side="right")) - 1
        while filled < len(out_T1):
            count = min(len(out_T1) - filled, int(self._starts[row + 1]) - position)
            self._fill(out_T1[filled : filled + count], row, position - int(self._starts[row]))
            filled, position, row = filled + count, position + count, row + 1
            if row == len(self._documents):
                row, position = 0, 0
        return out_T1

    def _fill(self, out: IntArray, row: int, start: int) -> None:
        """Copy tokens [start, start + len(out)) of end-of-text + document into `out`."""
        if start == 0:
            out[0] = self.eos_id
            out = out[1:]
            start = 1
        begin = int(self._file.offsets[self._documents[row]]) + start - 1
        if len(out):
            out[:] = self._file.read(begin, begin + len(out))

    def _window_at(self, position: int) -> int:
        epoch, rank = divmod(position, self.windows)
        if self._order[0] != epoch:
            self._order = (epoch, shuffled(self.windows, self.seed, epoch))
        return int(self._order[1][rank])


def shuffled(count: int, seed: int, stream: int) -> IntArray:
    """A permutation of range(count) that depends on (seed, stream) only.

    It sorts raw words of Philox (Salmon et al. 2011), which numpy promises to keep between versions; it makes no such
    promise for `Generator.permutation`.
    """
    key = np.array([seed & _WORD, stream & _WORD], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def evaluation_windows(
    file: TokenFile,
    seq_len: int,
    eos_id: int,
    max_tokens: int | None,
    documents: npt.NDArray[np.integer] | None = None,
) -> Iterator[IntArray]:
    """Yield windows that never cross documents, so that losses do not depend on what stands beside a document.

    The first window of a document is [end-of-text, t1, ..., tT]; later ones begin with the last token of the one
    before; the last may be short. Every token of a document is a target once; the end-of-text is none.

    Args:
        file: the documents.
        seq_len: T; windows have at most T + 1 tokens.
        eos_id: the end-of-text token.
        max_tokens: targets in total, None for all. Above it, windows spread over the whole file are chosen, always the
            same ones, and the last one chosen is cut.
        documents: which documents, None for all.

    Yields:
        int64 arrays of 2 to T + 1 tokens, in the order of the file (of `documents`).
    """
    chosen: IntArray = np.arange(len(file)) if documents is None else np.asarray(documents, dtype=np.int64)
    lengths = file.lengths[chosen]
    counts = -(-lengths // seq_len)  # windows of each document
    rows: IntArray = np.repeat(np.arange(len(chosen)), counts)
    parts: IntArray = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    targets: IntArray = np.minimum(lengths[rows] - parts * seq_len, seq_len)
    if max_tokens is not None and targets.sum() > max_tokens:
        order = shuffled(len(rows), _EVALUATION_SEED, 0)
        before = np.cumsum(targets[order]) - targets[order]
        targets[order] = np.clip(max_tokens - before, 0, targets[order])
    for index in np.flatnonzero(targets):
        start = int(parts[index]) * seq_len
        begin = int(file.offsets[chosen[rows[index]]]) + start
        window_T1 = np.empty(int(targets[index]) + 1, dtype=np.int64)
        if start:
            window_T1[:] = file.read(begin - 1, begin + int(targets[index]))
        else:
            window_T1[0] = eos_id
            window_T1[1:] = file.read(begin, begin + int(targets[index]))
        yield window_T1


def batches(windows: Iterable[npt.NDArray[Any]], batch_tokens: int) -> Iterator[list[IntArray]]:
    """Group windows of similar length for one forward pass each; windows of one token predict nothing and are dropped.

    Args:
        windows: token ids, (length + 1,) each.
        batch_tokens: inputs of a batch, padding included; a longer window is a batch of its own.
    """
    stream = (np.asarray(window, dtype=np.int64) for window in windows if len(window) > 1)
    while chunk := sorted(islice(stream, SORTED_WINDOWS), key=len, reverse=True):
        batch: list[IntArray] = []
        for window in chunk:
            if batch and (len(batch) + 1) * (len(batch[0]) - 1) > batch_tokens:
                yield batch
                batch = []
            batch.append(window)
        yield batch


def pad(batch: Sequence[IntArray], ignore: int) -> tuple[IntArray, IntArray]:
    """Inputs and targets of windows, (B, T) each. Padding is on the right, so that causal attention never sees it.

    Args:
        batch: windows, (length + 1,) each.
        ignore: the target of positions that are padding.
    """
    length = max(len(window) for window in batch) - 1
    inputs_BT: IntArray = np.zeros((len(batch), length), dtype=np.int64)
    targets_BT: IntArray = np.full((len(batch), length), ignore, dtype=np.int64)
    for row, window in enumerate(batch):
        inputs_BT[row, : len(window) - 1] = window[:-1]
        targets_BT[row, : len(window) - 1] = window[1:]
    return inputs_BT, targets_BT
