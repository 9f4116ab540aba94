"""What a source holds, before anything is trained on it: sizes, what its partitions would be about, and warnings.

The whole source passes once as a stream; what needs the texts side by side (tokens, partitions, near duplicates, languages)
looks at a uniform sample of it. Memory: the beginnings of the sampled documents, and some 40 bytes a document.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
import random
import re
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from forge.config import DataConfig, PartitionConfig
from forge.data.clustering import balanced_kmeans, tfidf_features
from forge.data.languages import UNKNOWN, language_of
from forge.data.sources import HashSet, documents, text_digest
from forge.data.tokenizer import encode_documents, learn_tokenizer
from forge.data.topics import most_typical, telling_words, word_counts
from forge.errors import DataError

#: Characters of a sampled document that are kept: with the default sample of 2,000 documents, 20 MB.
SAMPLE_CHARACTERS = 10_000
#: Tokens of the tokenizer that is learned from the sample where no run lends one; `model.vocab_size` of the default config.
VOCABULARY = 16384
#: A document with fewer characters than this teaches hardly more than its own words.
NEAR_EMPTY_CHARACTERS = 50
#: Two documents are near duplicates when they share this much (Jaccard) of their runs of `SHINGLE_WORDS` words.
NEAR_DUPLICATE, SHINGLE_WORDS = 0.8, 5
#: Hashed shingles, and documents that are compared with all the others at a time.
SHINGLE_FEATURES, SHINGLE_ROWS = 1 << 18, 256
#: A second language with this share of the sample is worth a warning.
MIXED_SHARE = 0.05

Progress = Callable[[int], None]
_NOT_WORDS = re.compile(r"[\W\d_]+")


def survey(config: DataConfig, *, partitions: int, sample: int, tokenizer: Tokenizer | None = None, seed: int = 0,
           progress: Progress | None = None) -> dict[str, Any]:  # fmt: skip
    """Read a source and describe it.

    Args:
        config: the source.
        partitions: how many clusters to describe.
        sample: documents that are looked at closely, at most.
        tokenizer: counts the tokens; None learns one from the sample.
        seed: of the sample and the clusters.
        progress: called with the documents read so far.

    Returns:
        JSON values: documents, characters, bytes, lengths (characters: min, 10th, 50th and 90th percentile, max), tokens (an
        estimate), vocab_size, sample, partitions (share of the sample's tokens, documents, words, sample), languages (share of
        the sample), blank, equal, alike, near_empty, near_duplicates (of the sample), warnings.

    Raises:
        DataError: the source is missing, damaged or empty, or gives fewer documents than partitions.
        HubError: the Hugging Face Hub cannot be reached.
    """
    passed_over, alike, alike_set = Counter[str](), 0, HashSet()
    lengths, size, kept, generator = array("q"), 0, list[str](), random.Random(seed)
    for index, document in enumerate(documents(config, passed_over)):
        text = document.text
        lengths.append(len(text))
        size += document.size
        alike += not alike_set.add(text_digest(_NOT_WORDS.sub(" ", text.lower()).strip().encode()))
        place = index if index < sample else generator.randrange(index + 1)  # Algorithm R (Vitter 1985)
        if place < sample:
            kept[place:place + 1] = [text[:SAMPLE_CHARACTERS]]
        if progress:
            progress(index + 1)
    if not lengths:
        raise DataError(f"The source {config.source} has no text: every document is empty or blank.")
    if len(kept) < partitions:
        raise DataError(f"The source {config.source} gives a sample of {len(kept):,} documents, too few for "
                        f"{partitions} partitions; use more text, or a smaller --partitions.")  # fmt: skip
    length_M = np.frombuffer(lengths, dtype=np.int64)
    tokenizer = tokenizer or learn_tokenizer(kept, VOCABULARY)
    tokens_N = np.array([len(ids) for ids in encode_documents(tokenizer, kept)])
    languages = Counter(map(language_of, kept))
    found: dict[str, Any] = {
        "source": config.source, "documents": len(lengths), "characters": int(length_M.sum()), "bytes": size,
        "lengths": {name: int(value) for name, value in zip(
            ("min", "p10", "p50", "p90", "max"), np.percentile(length_M, [0, 10, 50, 90, 100]), strict=True)},
        "tokens": round(int(tokens_N.sum()) / sum(map(len, kept)) * int(length_M.sum())),
        "vocab_size": tokenizer.get_vocab_size(), "sample": len(kept),
        "blank": passed_over["blank"], "equal": passed_over["equal"], "alike": alike,
        "near_empty": int((length_M < NEAR_EMPTY_CHARACTERS).sum()), "near_duplicates": near_duplicates(kept),
        "languages": {name: count / len(kept) for name, count in languages.most_common()},
        "partitions": _describe(kept, tokens_N, partitions, seed),
    }  # fmt: skip
    return found | {"warnings": warnings_of(found)}


def near_duplicates(texts: list[str]) -> int:
    """How many texts share `NEAR_DUPLICATE` of their runs of five words with an earlier one; shorter texts are left out."""
    from sklearn.feature_extraction.text import HashingVectorizer

    shingles = HashingVectorizer(n_features=SHINGLE_FEATURES, ngram_range=(SHINGLE_WORDS, SHINGLE_WORDS), binary=True,
                                 norm=None, alternate_sign=False, dtype=np.float32)  # fmt: skip
    present_NS = shingles.transform(texts)
    count_N = np.asarray(present_NS.sum(axis=1)).ravel()
    found = 0
    for start in range(0, len(texts), SHINGLE_ROWS):
        shared = (present_NS[start:start + SHINGLE_ROWS] @ present_NS.T).tocoo()
        rows = shared.row + start
        close = shared.data >= NEAR_DUPLICATE * (count_N[rows] + count_N[shared.col] - shared.data)
        found += len(np.unique(rows[close & (shared.col < rows)]))
    return found


def warnings_of(found: dict[str, Any]) -> list[str]:
    """What somebody should know before training on the text, one sentence each."""
    documents, sample = found["documents"], found["sample"]
    known = [(name, share) for name, share in found["languages"].items() if name != UNKNOWN]
    parts = [f"{name} {share:.0%}" for name, share in known if share >= MIXED_SHARE]
    facts = [
        (found["equal"], f"{found['equal']:,} documents equal an earlier one; a run leaves them out."),
        (found["blank"], f"{found['blank']:,} documents are blank; a run leaves them out."),
        (found["alike"], f"{found['alike']:,} of {documents:,} documents differ from an earlier one in case, digits, punctuation "
         "or white space only; a run keeps them."),
        (found["near_duplicates"], f"{found['near_duplicates']:,} of {sample:,} sampled documents are near duplicates of another "
         "one in the sample; a run keeps them" + (", and the whole source has a larger share." if sample < documents else ".")),
        (found["near_empty"], f"{found['near_empty']:,} of {documents:,} documents have fewer than {NEAR_EMPTY_CHARACTERS} "
         "characters."),
        (len(parts) > 1, f"Languages are mixed ({', '.join(parts)}): partitions will follow the language before the topic."),
    ]  # fmt: skip
    return [sentence for holds, sentence in facts if holds]


def lines(found: dict[str, Any]) -> list[str]:
    """The survey for people."""
    lengths = found["lengths"]
    about = "" if found["sample"] == found["documents"] else f", by a sample of {found['sample']:,} documents"
    rows = [
        f"documents   {found['documents']:>15,}",
        f"characters  {found['characters']:>15,}",
        f"bytes       {found['bytes']:>15,}",
        f"tokens      {found['tokens']:>15,}   about, with a vocabulary of {found['vocab_size']:,}{about}",
        f"length      {lengths['p50']:>15,}   characters, the median; 80 % have {lengths['p10']:,} to {lengths['p90']:,}, all "
        f"{lengths['min']:,} to {lengths['max']:,}",
        "language    " + ", ".join(f"{name} {share:.0%}" for name, share in found["languages"].items() if share >= 0.01),
        "",
        f"{len(found['partitions'])} partitions, by tf-idf{about}; share of the tokens",
    ]  # fmt: skip
    for index, part in enumerate(found["partitions"]):
        rows += [f"  {index}  {part['share']:4.0%}  {', '.join(part['words']) or '(no word tells it from the others)'}",
                 f"           {part['sample']}"]  # fmt: skip
    return rows + [""] + ([f"warning: {sentence}" for sentence in found["warnings"]] or ["no warnings"])


def _describe(texts: list[str], tokens_N: npt.NDArray[np.int64], partitions: int, seed: int) -> list[dict[str, Any]]:
    train = np.arange(len(texts))
    features = tfidf_features(texts.__getitem__, len(texts), train, seed)
    assignment, _ = balanced_kmeans(features, tokens_N, train, partitions, PartitionConfig().balance, seed)
    members = [[texts[index] for index in np.flatnonzero(assignment == part)] for part in range(partitions)]
    counts = [Counter[str]() for _ in members]
    for count, some in zip(counts, members, strict=True):
        for text in some:
            count.update(word_counts(text))
    everywhere = sum(counts, Counter[str]())
    described = []
    for part, (some, count) in enumerate(zip(members, counts, strict=True)):
        words = telling_words(count, everywhere)
        described.append({"documents": len(some), "share": float(tokens_N[assignment == part].sum() / max(1, tokens_N.sum())),
                          "words": words, "sample": most_typical(some, set(words))})  # fmt: skip
    return described
