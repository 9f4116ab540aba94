"""The partition stage of a run: features, assignment, and one set of token files a partition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from forge.data.features import document_difficulties, document_features
from forge.data.partition import assign, split_by_partition
from forge.data.tokenizer import load_tokenizer
from forge.data.tokens import TokenFile
from forge.evaluate.validation import load_shared
from forge.files import RunDirectory, read_json
from forge.train.loop import Progress
from forge.train.precision import product_dtype

SPLITS = ("train", "validation", "test")


def partition_corpus(run: RunDirectory, progress: Progress) -> dict[str, Any]:
    """Split the corpus into one partition an expert, each with train, validation and test blobs.

    Raises:
        DataError: a partition has no document in one of the splits.
    """
    config = run.config
    corpus = TokenFile(run.data / "corpus.safetensors")
    split = np.load(run.data / "split.npy")
    method = config.partition.method
    features = difficulty = None
    if method == "clustered":
        model = load_shared(run)
        model.compute_in(product_dtype("cpu"))  # The mean of a document moves by less than a hundredth of its length.
        features = document_features(model, corpus, config.model.max_seq_len, run.work / "features.f32", progress)
        del model  # Its memory is needed for the clustering.
    elif method == "curriculum":
        difficulty = document_difficulties(load_shared(run), corpus, config.model.max_seq_len, progress)
    tokenizer = load_tokenizer(run.data / "tokenizer.json")
    assignment = assign(method, config.model.n_experts, split=split, features=features,
                        tokens_per_document=np.diff(corpus.offsets),
                        texts=lambda i: tokenizer.decode(corpus.document(i).tolist()),
                        labels=np.load(run.data / "label.npy"), difficulty=difficulty,
                        label_names=read_json(run.data / "documents.json")["labels"],
                        balance=config.partition.balance, seed=config.seed)  # fmt: skip
    files = split_by_partition(corpus, split, assignment, run.work / "partitions")
    progress(stage="partition", step=len(files), steps=len(files), message="writing partitions")
    partitions = []
    for partition, paths in enumerate(files):
        row = {"partition": partition} | _sizes(paths["train"])
        for name in SPLITS:
            size = paths[name].stat().st_size
            row[name] = {"sha256": run.blobs.adopt(paths[name]), "size": size}
        partitions.append(row)
    return {"partitions": partitions}


def _sizes(path: Path) -> dict[str, Any]:
    """A function of its own, so that the file is closed again: Windows moves none that is open."""
    file = TokenFile(path)
    return {"tokens": file.total_tokens, "documents": len(file)}
