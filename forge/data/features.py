"""What the partitioners look at: each document's mean hidden state, or its difficulty, under the shared components.

Shapes: M documents, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from forge.data.packing import pad
from forge.data.tokens import IntArray, TokenFile
from forge.evaluate.perplexity import measure
from forge.files import atomic_file
from forge.model.lm import DenseLM
from forge.train.loop import Progress
from forge.train.loss import IGNORE_INDEX
from forge.train.memory import STATISTICS_TOKENS
from forge.vocabulary import END_OF_TEXT_ID

#: Batches are padded to a multiple of so many tokens: a product in bfloat16 keeps code of its own for every shape it has seen.
_LENGTHS = 64


def document_features(model: DenseLM, corpus: TokenFile, seq_len: int, path: Path,
                      progress: Progress) -> npt.NDArray[np.float32]:  # fmt: skip
    """Mean hidden state, after the final norm, of the first window of every document, (M, D).

    It is written to a memory-mapped file: memory does not grow with the corpus.
    """
    width = model.head_weight.shape[1]
    with atomic_file(path) as file:
        for rows, batch in _batches(corpus, seq_len):
            with torch.inference_mode():
                inputs_BT = pad(batch, IGNORE_INDEX)[0]
                inputs_BT = np.pad(inputs_BT, ((0, 0), (0, -inputs_BT.shape[1] % _LENGTHS)))
                hidden_BTD = model(torch.from_numpy(inputs_BT)).float()
                for window, hidden_TD in zip(batch, hidden_BTD, strict=True):
                    file.write(hidden_TD[: len(window) - 1].mean(dim=0).numpy().tobytes())
            progress(stage="partition", step=rows.stop, steps=len(corpus), message="reading documents")
    return np.memmap(path, dtype=np.float32, mode="r", shape=(len(corpus), width))


def document_difficulties(model: DenseLM, corpus: TokenFile, seq_len: int, progress: Progress) -> npt.NDArray[np.float32]:
    """Mean loss, in nats a token, of the first window of every document, (M,)."""
    losses_M = np.zeros(len(corpus), dtype=np.float32)
    for rows, batch in _batches(corpus, seq_len):
        for row, window in zip(rows, batch, strict=True):
            losses_M[row] = measure(model, [window]).nats_per_token
        progress(stage="partition", step=rows.stop, steps=len(corpus), message="reading documents")
    return losses_M


def _batches(corpus: TokenFile, seq_len: int) -> Iterator[tuple[range, list[IntArray]]]:
    """The first window of neighbouring documents; one without a token counts as an end of text that follows another."""
    first, longest = 0, 0
    batch: list[IntArray] = []
    for index in range(len(corpus)):
        tokens = corpus.document(index)[:seq_len]
        tokens = tokens if len(tokens) else np.array([END_OF_TEXT_ID])
        longest = max(longest, len(tokens))
        if batch and (len(batch) + 1) * longest > STATISTICS_TOKENS:
            yield range(first, index), batch
            first, longest, batch = index, len(tokens), []
        batch.append(np.concatenate(([END_OF_TEXT_ID], tokens)).astype(np.int64))
    if batch:
        yield range(first, len(corpus)), batch
