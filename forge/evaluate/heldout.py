"""The held-out windows of every partition, and which of them the rivals of the assembled model are compared on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from forge.config import EvaluationConfig, ModelConfig
from forge.data.packing import evaluation_windows
from forge.data.tokenizer import token_bytes
from forge.data.tokens import TokenFile
from forge.evaluate.perplexity import Loss, Observer, measure
from forge.model.lm import LanguageModel
from forge.vocabulary import END_OF_TEXT_ID

#: Held-out tokens a partition that rivals are compared on at least, as far as there are so many.
COMPARED_MIN_TOKENS = 2048

Windows = Iterable[npt.NDArray[Any]]


class Measured(NamedTuple):
    """Losses of a model, one a partition."""

    all: Sequence[Loss]
    """On every window."""
    compared: Sequence[Loss]
    """On the compared windows only."""


@dataclass(frozen=True)
class HeldOut:
    """The test documents of a run as windows.

    Rivals are compared on every `stride`-th window: with as many experts as that, all of them alone cost together what the
    evaluation costs, and nothing has to be measured twice to set the assembled model beside them.
    """

    files: Sequence[TokenFile]
    seq_len: int
    tokens: int
    """At most so many of each partition."""
    stride: int

    @classmethod
    def of(cls, paths: Sequence[Path], model: ModelConfig, config: EvaluationConfig) -> HeldOut:
        """Open the token file of each partition's test documents, in the order of the partitions.

        Raises:
            StorageError: a file cannot be read.
        """
        stride = max(1, min(model.n_experts, config.tokens // COMPARED_MIN_TOKENS))
        return cls([TokenFile(path) for path in paths], model.max_seq_len, config.tokens, stride)

    @property
    def partitions(self) -> int:
        """How many there are."""
        return len(self.files)

    def windows(self, partition: int) -> Iterator[npt.NDArray[Any]]:
        """All windows of a partition."""
        return evaluation_windows(self.files[partition], self.seq_len, END_OF_TEXT_ID, self.tokens)

    def compared(self, partition: int) -> Iterator[npt.NDArray[Any]]:
        """The windows that rivals are compared on."""
        return islice(self.windows(partition), 0, None, self.stride)

    def others(self, partition: int) -> Iterator[npt.NDArray[Any]]:
        """The windows that they are not compared on."""
        return (window for index, window in enumerate(self.windows(partition)) if index % self.stride)

    def measure(
        self, model: LanguageModel, tokenizer: Tokenizer, *, observe: Callable[[int], Observer] | None = None,
        after: Callable[[int, Loss], None] | None = None,
    ) -> Measured:  # fmt: skip
        """The losses of a model on every partition, in one pass over the tokens.

        Args:
            model: a dense model, or an assembled one.
            tokenizer: that the documents were encoded with.
            observe: of an assembled model: what watches the routing of a partition's tokens (see `perplexity.measure`).
            after: called with each partition and its loss.
        """
        sizes_V = np.asarray(token_bytes(tokenizer))
        measured = Measured([], [])
        for partition in range(self.partitions):
            watch = None if observe is None else observe(partition)
            compared, others = (measure(model, windows, sizes_V, observe=watch)
                                for windows in (self.compared(partition), self.others(partition)))  # fmt: skip
            measured = Measured([*measured.all, compared + others], [*measured.compared, compared])
            if after is not None:
                after(partition, compared + others)
        return measured
