"""The tokenizer: byte-level BPE with GPT-2's pre-tokenizer (Radford et al. 2019, section 2.2), as tokenizer.json.

Every text has a form in it (the 256 bytes are tokens), `<|endoftext|>` is the only special token and has the id 0, and
the same text gives the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from forge.errors import DataError
from forge.files import write_bytes, write_json
from forge.vocabulary import END_OF_TEXT, END_OF_TEXT_ID

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
#: Characters encoded in one piece: the library keeps some 150 bytes a token while it encodes.
PIECE_CHARACTERS = 1 << 18


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a tokenizer of `vocab_size` tokens: the end of text, the 256 bytes, then the merges.

    Memory grows with the distinct words of the texts, not with their length.

    Raises:
        DataError: the texts have too few distinct words for so many merges.
    """
    tokenizer = learn_tokenizer(texts, vocab_size)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise DataError(f"The corpus is too small for model.vocab_size: {vocab_size}: it gives {reached} tokens; set "
                        f"model.vocab_size to {reached} or less, or use more text.")  # fmt: skip
    return tokenizer


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Like `train_tokenizer`, with fewer tokens where the texts do not give so many."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def parse_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json of any kind. Text that spells a special token is encoded as plain text, none is cut or filled up.

    Raises:
        DataError: the file is no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises a bare Exception
        raise DataError(f"{path} is not a tokenizer.json.", detail=str(error)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path, vocab_size: int | None = None) -> Tokenizer:
    """Read a tokenizer.json that a run can use.

    Args:
        path: the file.
        vocab_size: what its vocabulary must have, added tokens included; None accepts any.

    Raises:
        DataError: the file is missing or no tokenizer, is not byte-level, has no end of text with the id 0, or has
            another vocabulary size.
    """
    if not path.is_file():
        raise DataError(f"There is no tokenizer file {path}; check tokenizer.path.")
    tokenizer = parse_tokenizer(path)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    end = vocabulary.get(END_OF_TEXT)
    if end is None:
        raise DataError(f"The tokenizer {path} has no {END_OF_TEXT} token, which separates documents.")
    if end != END_OF_TEXT_ID:
        raise DataError(f"The tokenizer {path} has {END_OF_TEXT} as id {end}; it must be id {END_OF_TEXT_ID}.")
    if not set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocabulary):
        raise DataError(f"The tokenizer {path} is not byte-level: some of the 256 bytes are missing.")
    if vocab_size is not None and len(vocabulary) != vocab_size:
        raise DataError(f"The tokenizer {path} has {len(vocabulary)} tokens and model.vocab_size is {vocab_size}; set "
                        f"it to {len(vocabulary)}.")  # fmt: skip
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer, directory: Path, max_seq_len: int) -> tuple[Path, Path]:
    """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads without custom code.

    Returns:
        The two paths.

    Raises:
        StorageError: the directory cannot be written.
    """
    files = directory / TOKENIZER_FILE, directory / TOKENIZER_CONFIG_FILE
    write_bytes(files[0], tokenizer.to_str(pretty=True).encode())
    write_json(files[1], _transformers_config(max_seq_len))
    return files


def _transformers_config(max_seq_len: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[npt.NDArray[np.int64]]:
    """Token ids of every text, each (tokens,), without an end of text; large texts go through in pieces.

    With GPT-2's pre-tokenizer the ids are those of the whole text: a piece ends before a line end that follows a
    character that is not white space, and there every match of its pattern ends too. (Only a stretch of
    `PIECE_CHARACTERS` without such a place is cut elsewhere.)
    """
    pieces = [list(split_pieces(text)) for text in texts]
    encoded = iter(tokenizer.encode_batch_fast([piece for some in pieces for piece in some], add_special_tokens=False))
    return [np.concatenate([np.array(next(encoded).ids, dtype=np.int64) for _ in some]) for some in pieces]


def split_pieces(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters that encode as the whole does."""
    start = 0
    while len(text) - start > limit:
        cut = text.rfind("\n", start + 1, start + limit + 1)
        while cut > start and text[cut - 1].isspace():
            cut = text.rfind("\n", start + 1, cut)
        if cut <= start:
            cut = start + limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """UTF-8 bytes that every id stands for, (vocab_size,); zero for special tokens.

    The byte-level alphabet has one character a byte, so it is the length of the token's name; tokens that were added
    later carry their plain text.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    sizes_V = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        sizes_V[index] = len(token)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        sizes_V[index] = 0 if added.special else len(added.content.encode())
    return sizes_V
