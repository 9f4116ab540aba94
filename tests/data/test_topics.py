from __future__ import annotations

from collections import Counter
from pathlib import Path
import tracemalloc

from tokenizers import Tokenizer

from forge.data import topics
from forge.data.tokenizer import encode_documents, train_tokenizer
from forge.data.tokens import TokenWriter
from forge.data.topics import SAMPLE_CHARACTERS, WORDS, describe_partitions, telling_words

SEA = "The wave and the tide meet the harbour; a gull and the storm follow the captain."
KITCHEN = "The oven and the flour meet the butter; a spoon and the pepper follow the recipe."


def write(path: Path, tokenizer: Tokenizer, texts: list[str]) -> Path:
    with TokenWriter(path, tokenizer.get_vocab_size()) as writer:
        for ids in encode_documents(tokenizer, texts):
            writer.append(ids)
    return path


def test_words_that_are_everywhere_tell_nothing(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([SEA, KITCHEN] * 20, 300)
    files = [write(tmp_path / "sea", tokenizer, [SEA] * 6 + ["The oven, again and again."]),
             write(tmp_path / "kitchen", tokenizer, [KITCHEN] * 6)]  # fmt: skip
    sea, kitchen = describe_partitions(files, tokenizer)
    assert set(sea["words"]) == {"wave", "tide", "harbour", "gull", "storm", "captain"}
    assert set(kitchen["words"]) == {"oven", "flour", "butter", "spoon", "pepper", "recipe"}
    assert sea["sample"] == SEA and kitchen["sample"] == KITCHEN


def test_a_rare_word_tells_less_than_a_frequent_one_and_there_are_only_so_many() -> None:
    here = Counter({f"word{number}": number for number in range(3, 30)} | {"the": 500, "once": 1})
    everywhere = here + Counter({"the": 500, "else": 300})
    words = telling_words(here, everywhere)
    assert words == [f"word{number}" for number in range(29, 29 - WORDS, -1)]
    assert telling_words(Counter(), everywhere) == []
    assert telling_words(Counter({"alone": 5}), Counter({"alone": 5})) == ["alone"]  # One partition: what is frequent.


def test_a_sample_is_one_short_printable_line(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([SEA, KITCHEN] * 20, 300)
    files = [write(tmp_path / "odd", tokenizer, ["line\x00one\n\n\tline \u202e two " * 100]),
             write(tmp_path / "empty", tokenizer, [""])]  # fmt: skip
    odd, empty = describe_partitions(files, tokenizer)
    assert odd["sample"].isprintable() and len(odd["sample"]) <= SAMPLE_CHARACTERS + 4 and odd["sample"].endswith(" ...")
    assert odd["sample"].startswith("line one line two line")
    assert empty == {"words": [], "sample": ""}


def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([SEA, KITCHEN] * 20, 300)

    def peak(documents: int) -> int:
        files = [write(tmp_path / f"{documents}-{k}", tokenizer, [SEA * 40] * documents) for k in range(2)]
        tracemalloc.start()
        describe_partitions(files, tokenizer)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    enough = topics.PARTITION_TOKENS // topics.DOCUMENT_TOKENS
    assert peak(enough * 4) < 1.2 * peak(enough)
