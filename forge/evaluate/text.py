"""The loss of any Mixtral checkpoint on texts of the user's, whatever its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, pre_tokenizers

from forge.data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, encode_documents, parse_tokenizer
from forge.errors import ConfigError, DataError, StorageError
from forge.evaluate.perplexity import finite, measure
from forge.model.moe import MixtureLM
from forge.vocabulary import END_OF_TEXT

#: Tokens of a window at most: some checkpoints claim a context that no ordinary machine has the memory for.
LONGEST_WINDOW: Final = 4096


def evaluate_text(model_dir: Path, texts: Iterable[str]) -> dict[str, Any]:
    """Measure a model directory, which must hold its tokenizer, on documents of text.

    Each document begins after the token that the model's texts begin with, and is cut into windows of the model's context
    or of `LONGEST_WINDOW` tokens, whichever is shorter; a window begins with the last token of the one before.

    Args:
        model_dir: an assembled model, or any other Mixtral checkpoint.
        texts: documents.

    Returns:
        `documents`, `tokens`, `bytes` (of UTF-8), `window` (its tokens), `loss` (nats a token), `perplexity` and
        `bits_per_byte`, over all tokens.

    Raises:
        StorageError: the model cannot be read, or has no tokenizer.
        ConfigError: the model is not one that can be loaded, or its tokenizer is another model's.
        DataError: there is no text, or the tokenizer cannot be read, or nothing says what a text begins with.
    """
    model = MixtureLM.load(model_dir)
    tokenizer = read_tokenizer(model_dir)
    if tokenizer.get_vocab_size(with_added_tokens=True) > model.config.vocab_size:
        raise ConfigError(f"{model_dir / TOKENIZER_FILE} has more tokens than the model beside it: it is another model's.")
    start, length = start_of_text(model_dir, tokenizer), min(model.config.max_seq_len, LONGEST_WINDOW)
    documents = size = 0

    def windows() -> Iterator[npt.NDArray[np.int64]]:
        nonlocal documents, size
        for text in texts:
            ids_T = np.concatenate(([start], encode(tokenizer, text)))
            documents, size = documents + 1, size + len(text.encode())
            for begin in range(0, len(ids_T) - 1, length):
                yield ids_T[begin : begin + length + 1]

    loss = replace(measure(model, windows()), bytes=size)
    if not loss.tokens:
        raise DataError("There is no text to evaluate the model on: every document is empty or blank; give another source.")
    return {"documents": documents, "tokens": loss.tokens, "bytes": loss.bytes, "window": length,
            "loss": finite(loss.nats_per_token), "perplexity": finite(loss.perplexity),
            "bits_per_byte": finite(loss.bits_per_byte)}  # fmt: skip


def read_tokenizer(model_dir: Path) -> Tokenizer:
    """The tokenizer beside a model, of any kind.

    Raises:
        StorageError: there is none.
        DataError: the file is no tokenizer.
    """
    path = model_dir / TOKENIZER_FILE
    if not path.is_file():
        raise StorageError(f"{model_dir} holds no {TOKENIZER_FILE}, so no text can be read by its model.")
    return parse_tokenizer(path)


def start_of_text(model_dir: Path, tokenizer: Tokenizer) -> int:
    """The token that a model's texts begin with: its beginning of text or, where it has none, its end of text.

    `tokenizer_config.json` is asked before `config.json`, whose ids are often left at the defaults of a library.

    Raises:
        DataError: none of the files names a token of the vocabulary.
    """
    told = _json(model_dir / TOKENIZER_CONFIG_FILE)
    named = [told.get("bos_token"), told.get("eos_token")]
    texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in named]
    ids: list[Any] = [tokenizer.token_to_id(text) for text in texts if isinstance(text, str)]
    config = _json(model_dir / "config.json")
    for value in (config.get("bos_token_id"), config.get("eos_token_id")):
        ids.append(value[0] if isinstance(value, list) and value else value)
    ids.append(tokenizer.token_to_id(END_OF_TEXT))
    for token in ids:
        if isinstance(token, int) and tokenizer.id_to_token(token) is not None:
            return token
    raise DataError(f"Nothing in {model_dir} says which token a text begins with: name a token of {TOKENIZER_FILE} as bos_token "
                    f"or eos_token in {TOKENIZER_CONFIG_FILE}, or its id as bos_token_id in config.json.")  # fmt: skip


def encode(tokenizer: Tokenizer, text: str) -> npt.NDArray[np.int64]:
    """Token ids of a text, (tokens,), without special tokens; in pieces where pieces give the ids of the whole."""
    splitter = tokenizer.pre_tokenizer
    if isinstance(splitter, pre_tokenizers.ByteLevel) and not splitter.add_prefix_space and tokenizer.normalizer is None:
        return encode_documents(tokenizer, [text])[0]
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _json(path: Path) -> dict[str, Any]:
    """The file's object; an empty one where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
