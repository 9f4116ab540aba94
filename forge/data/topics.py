"""What each partition is about: its most telling words, and the beginning of its most typical document.

A word tells when it is more frequent in the partition than in the others: the log-odds ratio with an informative
Dirichlet prior, in standard deviations (Monroe, Colaresi and Quinn 2008, "Fightin' Words", equations 15, 16, 20 and 22).
The counts are of a capped sample of held-out documents, so that memory grows neither with the corpus nor with the number
of partitions. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
import math
from pathlib import Path
import re
from typing import Any

from tokenizers import Tokenizer

from forge.data.tokens import TokenFile

#: Tokens that are read of one partition, and of all of them together: with 64 partitions 6,250 each.
PARTITION_TOKENS, ALL_TOKENS = 20_000, 400_000
#: Tokens that are read of one document, so that a book does not stand for its partition.
DOCUMENT_TOKENS = 500
#: Telling words that are kept, and characters of the sample.
WORDS, SAMPLE_CHARACTERS = 8, 240
#: A word that occurs less often in the partition tells about one document and not about the partition.
MIN_COUNT = 3
#: Weight of the prior in words: some a hundredth of a partition's sample.
PRIOR_WORDS = 100.0
#: Standard deviations from chance below which a word tells nothing.
LEAST_Z = 1.0

_WORD = re.compile(r"[^\W\d_]{2,24}")


def describe_partitions(files: Sequence[Path], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The `words`, most telling first, and the `sample` of every partition.

    Args:
        files: a token file of each partition's held-out documents.
        tokenizer: turns their tokens into text.

    Raises:
        StorageError: a token file cannot be read.
    """
    share = min(PARTITION_TOKENS, ALL_TOKENS // max(1, len(files)))
    counts = [sum((word_counts(text) for text in _texts(path, tokenizer, share)), Counter()) for path in files]
    everywhere = sum(counts, Counter())
    described = []
    for path, count in zip(files, counts, strict=True):
        words = telling_words(count, everywhere)
        described.append({"words": words, "sample": most_typical(_texts(path, tokenizer, share), set(words))})
    return described


def telling_words(here: Counter[str], everywhere: Counter[str], number: int = WORDS) -> list[str]:
    """The words of `here` that are most over-represented against the rest of `everywhere`, most telling first."""
    total = sum(everywhere.values())
    n_here = sum(here.values())
    n_there = total - n_here
    if not n_here or not n_there:
        return [word for word, _ in here.most_common(number)]

    def z(word: str) -> float:
        prior = PRIOR_WORDS * everywhere[word] / total
        a, b = here[word] + prior, everywhere[word] - here[word] + prior
        odds = math.log(a / (n_here + PRIOR_WORDS - a)) - math.log(b / (n_there + PRIOR_WORDS - b))
        return odds / math.sqrt(1 / a + 1 / b)

    ranked = sorted(((z(word), word) for word, times in here.items() if times >= MIN_COUNT), reverse=True)
    return [word for score, word in ranked[:number] if score > LEAST_Z]


def _texts(path: Path, tokenizer: Tokenizer, tokens: int) -> list[str]:
    """The beginnings of the first documents, at most `tokens` tokens in all."""
    file, texts = TokenFile(path), []
    for index in range(len(file)):
        if tokens <= 0:
            break
        start = int(file.offsets[index])
        stop = min(int(file.offsets[index + 1]), start + min(DOCUMENT_TOKENS, tokens))
        texts.append(tokenizer.decode(file.read(start, stop).tolist()))
        tokens -= max(1, stop - start)
    return texts


def word_counts(text: str) -> Counter[str]:
    """How often each word is in a text, in small letters."""
    return Counter(_WORD.findall(text.lower()))


def most_typical(texts: Sequence[str], telling: set[str]) -> str:
    """The beginning of the document in which the largest share of the words tells; printable, on one line."""
    def share(text: str) -> float:
        words = word_counts(text)
        return sum(times for word, times in words.items() if word in telling) / max(20, sum(words.values()))

    text = max(texts, key=share, default="")
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= SAMPLE_CHARACTERS else line[:SAMPLE_CHARACTERS].rsplit(" ", 1)[0] + " ..."
