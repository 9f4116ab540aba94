"""What every row of the benchmark has in common: sizes, corpus, splits, and where its files lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.config import RunConfig, parse_config
from forge.data.packing import SequenceSampler, evaluation_windows
from forge.data.prepare import prepare
from forge.data.tokenizer import encode_documents, load_tokenizer, token_bytes
from forge.data.tokens import TokenFile, TokenWriter
from forge.files import read_json, write_json
from forge.vocabulary import END_OF_TEXT_ID

TRAIN, VALIDATION, TEST = range(3)
CONTEXT_CHANNELS = 8
#: Name of the domain that nobody trains on, among the partitions' numbers.
OUTSIDE = "ood"


@dataclass(frozen=True)
class Scale:
    """Sizes of the models of a benchmark."""

    d_model: int
    """Of the rivals; ours has the context channels beside it."""
    d_ff: int
    n_layers: int
    n_heads: int
    """Of the rivals; ours has the context head beside them."""
    vocab_size: int
    seq_len: int
    batch_size: int
    learning_rate: float
    """Of every phase that trains all parameters."""
    expert_learning_rate: float
    expert_batch_size: int
    """Sequences of an expert's optimiser step: it sees fewer tokens than the shared phase, so it gains more from steps."""
    eval_tokens: int
    """Test tokens a partition."""
    router_tokens: int


SCALES = {
    # A minute on one core; for tests.
    "tiny": Scale(32, 96, 2, 2, 512, 64, 8, 1.2e-2, 4e-3, 8, 2_000, 20_000),
    # 32,928 parameters beside the embedding: 200 tokens for each are 6.6 million, so that great maturity can be afforded.
    "mini": Scale(32, 128, 2, 2, 2048, 256, 8, 6e-3, 8e-3, 4, 40_000, 400_000),
    # 262,720 parameters beside the embedding: 50 tokens for each of them take 20 minutes on one core.
    "small": Scale(64, 256, 4, 4, 2048, 256, 8, 6e-3, 8e-3, 4, 40_000, 400_000),
    "medium": Scale(128, 512, 4, 4, 4096, 256, 32, 8e-3, 3e-3, 16, 40_000, 400_000),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One scale, one corpus, one number of experts, one seed; every file lies under `root`."""

    root: Path
    scale: Scale
    experts: int = 5
    top_k: int = 2
    seed: int = 0

    @property
    def data(self) -> Path:
        """The prepared corpus, the same for every seed."""
        return self.root / "data"

    @property
    def work(self) -> Path:
        """What this seed trained."""
        return self.root / f"seed-{self.seed}"

    def rival(self, **model: Any) -> dict[str, Any]:
        """Fields of the architecture that a rival has: the same live weights, without context channels and context head."""
        s = self.scale
        return {"d_model": s.d_model, "n_heads": s.n_heads, "context_channels": 0, **model}

    def config(self, **model: Any) -> RunConfig:
        """A run's config at this scale; keyword arguments replace fields of the model."""
        s = self.scale
        method = "bayes" if model.get("context_channels", CONTEXT_CHANNELS) else "ridge"
        return parse_config({
            "seed": self.seed,
            "data": {"source": str(self.root / "text" / "train.jsonl"), "label_field": "domain",
                     "validation_fraction": 0.03, "test_fraction": 0.05},
            "model": {"vocab_size": s.vocab_size, "d_model": s.d_model + CONTEXT_CHANNELS, "d_ff": s.d_ff,
                      "n_layers": s.n_layers, "n_heads": s.n_heads + 1, "head_dim": s.d_model // s.n_heads,
                      "context_channels": CONTEXT_CHANNELS, "n_experts": self.experts, "top_k": self.top_k,
                      "max_seq_len": s.seq_len, **model},
            "tokenizer": {"train_bytes": 12_000_000},
            "router": {"tokens": s.router_tokens, "method": method},
            "train": {"batch_size": s.batch_size, "checkpoint_seconds": 60,
                      "shared": {"tokens": 1}, "expert": {"tokens": 1}}})  # fmt: skip

    @property
    def parameters(self) -> int:
        """Live parameters of the shared components without the embedding: the unit of maturity."""
        model = self.config(**self.rival()).model
        return model.dense_parameters - model.embedding_parameters

    @cached_property
    def corpus(self) -> TokenFile:
        """All documents of the domains that are trained on."""
        return TokenFile(self.data / "corpus.safetensors")

    @cached_property
    def split(self) -> npt.NDArray[np.uint8]:
        """Split of each document: train, validation, test."""
        split: npt.NDArray[np.uint8] = np.load(self.data / "split.npy")
        return split

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of every token."""
        return token_bytes(load_tokenizer(self.data / "tokenizer.json"))

    def documents(self, split: int, assignment: npt.NDArray[np.integer] | None = None,
                  partition: int | None = None) -> npt.NDArray[np.intp]:  # fmt: skip
        """Indices of the documents of a split, of one partition or of all."""
        chosen = self.split == split
        if assignment is not None:
            chosen = chosen & (assignment == partition)
        return np.flatnonzero(chosen)

    def sampler(self, documents: npt.NDArray[np.integer], seed: int) -> SequenceSampler:
        """Batches of some documents, in an order that depends on the seed only."""
        return SequenceSampler(self.corpus, self.scale.seq_len, seed, END_OF_TEXT_ID, documents)

    def windows(self, documents: npt.NDArray[np.integer], tokens: int | None = None) -> Iterator[npt.NDArray[np.int64]]:
        """Evaluation windows of some documents."""
        return evaluation_windows(self.corpus, self.scale.seq_len, END_OF_TEXT_ID, tokens or self.scale.eval_tokens, documents)

    def outside_windows(self) -> Iterator[npt.NDArray[np.int64]]:
        """Evaluation windows of the domain that nobody trained on."""
        file = TokenFile(self.data / "outside.safetensors")
        return evaluation_windows(file, self.scale.seq_len, END_OF_TEXT_ID, self.scale.eval_tokens)


def prepare_data(setting: Setting, source: Path, hold_out: str) -> dict[str, Any]:
    """Split the domains of a jsonl file into those that are trained on and the one that is not, and tokenise both."""
    marker = setting.data / "facts.json"
    if marker.is_file():
        return dict(read_json(marker))
    text = setting.root / "text"
    text.mkdir(parents=True, exist_ok=True)
    outside: list[str] = []
    opener = gzip.open if source.suffix == ".gz" else open
    with opener(source, "rt", encoding="utf-8") as lines, open(text / "train.jsonl", "w", encoding="utf-8") as train:
        for line in lines:
            row = json.loads(line)
            if row["domain"] == hold_out:
                outside.append(row["text"])
            else:
                train.write(line)
    setting.data.mkdir(parents=True, exist_ok=True)
    facts = prepare(setting.config(), setting.data)
    tokenizer = load_tokenizer(setting.data / "tokenizer.json")
    with TokenWriter(setting.data / "outside.safetensors", setting.scale.vocab_size) as writer:
        for start in range(0, len(outside), 64):
            for ids in encode_documents(tokenizer, outside[start : start + 64]):
                writer.append(ids)
    facts["hold_out"] = hold_out
    write_json(marker, facts)
    return facts
