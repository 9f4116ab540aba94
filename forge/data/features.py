"""What the partitioners look at: each document's mean hidden state, or its loss, under the shared components.

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
from forge.files import atomic_file
from forge.model.lm import DenseLM
from forge.train.loop import Progress
from forge.train.loss import IGNORE_INDEX, chunked_cross_entropy
from forge.train.memory import STATISTICS_TOKENS
from forge.vocabulary import END_OF_TEXT_ID


def document_features(model: DenseLM, corpus: TokenFile, seq_len: int, path: Path, progress: Progress,
                      eos_id: int = END_OF_TEXT_ID) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:  # fmt: skip
    """Mean hidden state and mean loss of the first window of every document.

    The states, after the final norm, are written to a memory-mapped file: memory does not grow with the corpus.

    Returns:
        Features (M, D) and losses (M,) in nats a token.
    """
    documents, width = len(corpus), model.head_weight.shape[1]
    losses_M = np.zeros(documents, dtype=np.float32)
    with atomic_file(path) as file:
        file.truncate(documents * width * 4)
        for rows, batch in _batches(corpus, seq_len, eos_id):
            inputs_BT, targets_BT = pad(batch, IGNORE_INDEX)
            with torch.inference_mode():
                hidden_BTD = model(torch.from_numpy(inputs_BT)).float()
                for row, window, hidden_TD, targets_T in zip(rows, batch, hidden_BTD, targets_BT, strict=True):
                    length = len(window) - 1
                    file.write(hidden_TD[:length].mean(dim=0).numpy().tobytes())
                    losses_M[row] = float(chunked_cross_entropy(hidden_TD[:length], model.head_weight,
                                                                torch.from_numpy(targets_T[:length])))  # fmt: skip
            progress(stage="partition", step=rows.stop, steps=documents, message="reading documents")
    features = np.memmap(path, dtype=np.float32, mode="r", shape=(documents, width))
    return features, losses_M


def _batches(corpus: TokenFile, seq_len: int, eos_id: int) -> Iterator[tuple[range, list[IntArray]]]:
    """The first window of neighbouring documents; one without a token counts as an end of text that follows another."""
    first, longest = 0, 0
    batch: list[IntArray] = []
    for index in range(len(corpus)):
        tokens = corpus.document(index)[:seq_len]
        tokens = tokens if len(tokens) else np.array([eos_id])
        longest = max(longest, len(tokens))
        if batch and (len(batch) + 1) * longest > STATISTICS_TOKENS:
            yield range(first, index), batch
            first, longest, batch = index, len(tokens), []
        batch.append(np.concatenate(([eos_id], tokens)).astype(np.int64))
    if batch:
        yield range(first, len(corpus)), batch
