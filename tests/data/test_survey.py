from __future__ import annotations

import json
from pathlib import Path
import tracemalloc
from typing import Any

import pytest

from forge.config import DataConfig
from forge.data.languages import language_of
from forge.data.survey import lines, near_duplicates, survey
from forge.data.tokenizer import train_tokenizer
from tests.commands import is_one_sentence, run, worked, write_inputs

from .test_topics import KITCHEN, SEA

ENGLISH = "The harbour was full of ships and the captain told us that this is not the way to the open sea. "
GERMAN = "Der Hafen war voll von Schiffen und die Kapitäne sagten uns, dass das nicht der Weg auf die See ist. "


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def look(path: Path, **options: Any) -> dict[str, Any]:
    return survey(DataConfig(source=str(path)), **{"partitions": 2, "sample": 1000, **options})


def test_two_topics_are_told_apart_and_everything_is_counted(tmp_path: Path) -> None:
    texts = [f"{text} {text} Number {'i' * i}." for i in range(1, 21) for text in (SEA, KITCHEN)]
    found = look(write(tmp_path / "a.jsonl", [*texts, texts[0], " "]))
    assert found["documents"] == 40 and found["characters"] == sum(map(len, texts)) == found["bytes"]
    assert (found["blank"], found["equal"]) == (1, 1)
    assert found["lengths"]["min"] == min(map(len, texts)) and found["lengths"]["max"] == max(map(len, texts))
    words = sorted(sorted(part["words"])[:2] for part in found["partitions"])
    assert words == [["butter", "flour"], ["captain", "gull"]]
    assert [part["documents"] for part in found["partitions"]] == [20, 20]
    assert {part["sample"][:8] for part in found["partitions"]} == {SEA[:8], KITCHEN[:8]}
    assert sum(part["share"] for part in found["partitions"]) == pytest.approx(1)
    assert any("1 documents equal" in sentence for sentence in found["warnings"])
    assert len(lines(found)) > 12 and json.loads(json.dumps(found)) == found


def test_tokens_are_exact_where_the_sample_is_everything(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([SEA, KITCHEN], 300)
    texts = [ENGLISH * n for n in range(1, 9)]
    path = write(tmp_path / "a.jsonl", texts)
    exact = sum(len(tokenizer.encode(text).ids) for text in texts)
    assert look(path, tokenizer=tokenizer)["tokens"] == exact
    assert look(path, tokenizer=tokenizer, sample=3)["tokens"] == pytest.approx(exact, rel=0.1)


def test_near_duplicates_are_found_and_different_texts_are_not() -> None:
    words = [f"word{i}" for i in range(400)]
    base = " ".join(words)
    edited = " ".join(words[:200] + ["changed"] + words[201:])
    half = " ".join(words[:200] + [f"other{i}" for i in range(200)])
    assert near_duplicates([base, edited, half, "short", "short"]) == 1
    assert near_duplicates([half, base]) == 0
    assert near_duplicates([f"{base} {i}" for i in range(600)]) == 599


def test_copies_in_other_clothes_short_documents_and_mixed_languages_are_warned_of(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ENGLISH * 2, ENGLISH.upper() * 2, "short one", GERMAN * 2, GERMAN * 3, ENGLISH * 5])
    found = look(path)
    assert found["alike"] == 1 and found["near_empty"] == 1
    assert found["languages"] == {"English": 3 / 6, "German": 2 / 6, "unknown": 1 / 6}
    text = " ".join(found["warnings"])
    assert "1 of 6 documents differ" in text and "fewer than 50" in text and "English 50%, German 33%" in text
    assert look(write(tmp_path / "b.jsonl", [ENGLISH * 2 + "Alpha", GERMAN.replace("H", "K") * 0 + SEA * 3]))["warnings"] == []


@pytest.mark.parametrize(("text", "language"), [
    (ENGLISH, "English"), (GERMAN, "German"), ("Привет, как дела? Всё хорошо.", "Cyrillic script"),
    ("これはとても短い日本語のテキストです。", "Hiragana script"), ("123 !?", "unknown"),
    ("def f(x):\n    return x + 1\n", "unknown"),
    ("Les bateaux sont dans le port et le capitaine ne sait pas que la mer est calme pour des heures.", "French"),
    ("Los barcos están en el puerto y el capitán no sabe que las olas son más altas por la noche.", "Spanish"),
])  # fmt: skip
def test_languages(text: str, language: str) -> None:
    assert language_of(text) == language


def test_memory_does_not_grow_with_the_length_of_the_documents(tmp_path: Path) -> None:
    def peak(words: int) -> int:
        """Bytes; the first 10,000 characters of a document are kept, however long it is."""
        path = write(tmp_path / f"{words}.jsonl", [f"{i} " + "harbour " * words for i in range(20)])
        tracemalloc.start()
        try:
            look(path, sample=10)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2_000)  # imports
    assert peak(40_000) < peak(2_000) + 4_000_000


def test_the_command(tmp_path: Path) -> None:
    desk = write_inputs(tmp_path)
    worked(run("forge prepare tiny.yaml --run-dir run", desk))
    text = worked(run("forge data inspect corpus.jsonl --partitions 2 --run run", desk)).out
    assert "2 partitions, by tf-idf" in text and "vocabulary of 300" in text
    assert json.loads(worked(run("forge data inspect corpus.jsonl --json --partitions 3", desk)).out)["documents"] == 60
    worked(run("forge data inspect small.txt --partitions 1", desk))


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    desk = write_inputs(tmp_path)
    is_one_sentence(run("forge data inspect nowhere.txt", desk), "data", "There is no file nowhere.txt")
    is_one_sentence(run("forge data inspect blank.txt", desk), "data", "blank.txt has no text")
    is_one_sentence(run("forge data inspect small.txt", desk), "data", "1 documents", "5 partitions", "--partitions")
    is_one_sentence(run("forge data inspect corpus.jsonl --text-field body", desk), "data", "no column 'body'")
    is_one_sentence(run("forge data inspect corpus.jsonl --run .", desk), "storage", "not a run directory")
    is_one_sentence(run("forge data inspect corpus.jsonl --max-bytes much", desk), "config", "'much' is not a size")
