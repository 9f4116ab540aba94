"""What the partitioners look at: each document's mean hidden state, or its loss, under the shared components.

Shapes: M documents, T tokens, D model width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from forge.data.tokens import TokenFile
from forge.files import atomic_file
from forge.model.lm import DenseLM
from forge.train.loop import Progress
from forge.train.loss import chunked_cross_entropy
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
        for index in range(documents):
            tokens = np.concatenate(([eos_id], corpus.document(index)[:seq_len])).astype(np.int64)
            with torch.inference_mode():
                hidden_1TD = model(torch.from_numpy(tokens[None, :-1] if len(tokens) > 1 else tokens[None]))
                file.write(hidden_1TD[0].float().mean(dim=0).numpy().tobytes())
                if len(tokens) > 1:
                    losses_M[index] = float(chunked_cross_entropy(hidden_1TD[0], model.head_weight,
                                                                  torch.from_numpy(tokens[1:])))  # fmt: skip
            progress(stage="partition", step=index + 1, steps=documents, message="reading documents")
    features = np.memmap(path, dtype=np.float32, mode="r", shape=(documents, width))
    return features, losses_M
