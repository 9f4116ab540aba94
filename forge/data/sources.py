"""Where text comes from: one stream of distinct documents, whatever the source, in bounded memory.

A source is `python-stdlib`, `wikitext-103`, `hf:name[:config][:split][:column]`, or a directory, path or glob of .txt, .jsonl
and .parquet files (each also .gz or .zst). The order is the same on every reading. Of documents with equal text only the first is
kept: a copy would weigh double in training, and one document must be in one split only.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
import glob
import hashlib
import os
from pathlib import Path
import re
import sysconfig
import tokenize
from typing import NamedTuple

from forge.config import DataConfig
from forge.data.hub import HubSource, read_hub
from forge.data.readers import Columns, Row, format_of, read_file
from forge.errors import DataError

PYTHON_STDLIB = "python-stdlib"
WIKITEXT = "wikitext-103"
WIKITEXT_SOURCE = HubSource("Salesforce/wikitext", "wikitext-103-raw-v1", "train", "text")
#: Directories of the standard library that are no part of it or hold tests and their data.
STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "_bundled", "__pycache__", "lib-dynload"}
)
#: The documentation topics are documents of their own; the module that holds them as one literal is not another.
STDLIB_TOPICS = "pydoc_data/topics.py"

_HEADING = re.compile(r"^ = [^=\s](?:.*[^=\s])? = $")


class Document(NamedTuple):
    """One document of the corpus."""

    text: str
    """Its text, without lone surrogates, so that it has a UTF-8 form."""
    label: str | None
    """Value of `data.label_field`, if that is set and the row has one."""
    size: int
    """Bytes of its UTF-8 form."""
    digest: int
    """What duplicates are known by and the split is decided by."""


def documents(config: DataConfig, passed_over: Counter[str] | None = None) -> Iterator[Document]:
    """Yield the distinct, non-blank documents of a source in a fixed order, up to `max_bytes` of UTF-8 text.

    The last document is cut at a character border where `max_bytes` is reached. Memory is one document and about 16
    bytes a document for the hashes (with 64 bits, 10 million documents collide by chance with a probability of 3e-6).

    Args:
        config: the source.
        passed_over: counts the documents that are not yielded, as `blank` and `equal`.

    Raises:
        DataError: a file, column or match is missing, or a file is damaged.
        HubError: the Hugging Face Hub cannot be reached.
    """
    seen = HashSet()
    left = config.max_bytes
    for text, label in _rows(config):
        data = text.encode("utf-8", "replace")
        if left is not None and len(data) > left:
            text = data[:left].decode("utf-8", "ignore")
            data, left = text.encode(), 0
        elif not text.isascii():
            text = data.decode("utf-8")
        if left:
            left -= len(data)
        reason = None
        if not text.strip():
            reason = "blank"
        elif not seen.add(digest := text_digest(data)):
            reason = "equal"
        else:
            yield Document(text, label, len(data), digest)
        if passed_over is not None and reason:
            passed_over[reason] += 1
        if left == 0:
            return


def text_digest(data: bytes) -> int:
    """64 bits of blake2b of a text's UTF-8 form."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def split_articles(lines: Iterable[str]) -> Iterator[str]:
    """Split WikiText's lines into articles, each from its ` = Title = ` heading to the next one.

    A heading of an article stands between blank lines; ` = = Section = = ` headings belong to their article, and so
    does a line that only looks like a heading (an equation within a text).

    Args:
        lines: the lines of the corpus in order, with or without their ends.
    """
    article: list[str] = []
    blank, held = True, None
    for line in lines:
        line = line.rstrip("\r\n")
        if held is not None:
            if not line.strip():
                if "".join(article).strip():
                    yield "\n".join(article)
                article = []
            article.append(held)
            held = None
        if blank and _HEADING.match(line):
            held = line
        else:
            article.append(line)
        blank = not line.strip()
    if held is not None:
        article.append(held)
    if "".join(article).strip():
        yield "\n".join(article)


def read_stdlib(directory: Path) -> Iterator[str]:
    """Yield the modules of a Python standard library in the order of their paths, one document each.

    Test packages, bundled wheels and installed packages are left out, and so is the module of documentation topics.
    """
    for path in _python_files(directory):
        if path.relative_to(directory).as_posix() == STDLIB_TOPICS:
            continue
        try:
            with tokenize.open(path) as file:  # knows the coding cookie of the older modules
                yield file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # a file that is no Python source, or was removed by an upgrade of the interpreter meanwhile


def local_files(source: str) -> list[Path]:
    """The files that a path, directory (all that is below it) or glob (`**` reaches into sub-directories) names, sorted.

    Raises:
        DataError: there is none.
    """
    pattern = os.path.expanduser(source)
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        pattern = os.path.join(glob.escape(pattern), "**", "*")
    elif not glob.has_magic(pattern):
        raise DataError(f"There is no file {source}; data.source takes a path, a directory, a glob, {PYTHON_STDLIB}, "
                        f"{WIKITEXT}, or hf:name.")  # fmt: skip
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    if not files and not path.is_dir():
        raise DataError(f"No file matches {source}; check data.source.")
    if not any(format_of(file.name) for file in files):
        raise DataError(f"No .txt, .jsonl or .parquet file (each also .gz or .zst) is in {source}; check data.source.")
    return [file for file in files if format_of(file.name)]


def _rows(config: DataConfig) -> Iterator[Row]:
    source = config.source
    columns = Columns(config.text_field, config.label_field)
    if source in (PYTHON_STDLIB, WIKITEXT):
        if config.label_field is not None:
            raise DataError(f"The source {source} has no column {config.label_field!r} for data.label_field.")
        texts = _stdlib_and_topics() if source == PYTHON_STDLIB else _wikitext()
        yield from ((text, None) for text in texts)
    elif source.startswith("hf:"):
        yield from read_hub(HubSource.parse(source), columns)
    else:
        for path in local_files(source):
            yield from read_file(path, columns)


def _stdlib_and_topics() -> Iterator[str]:
    from pydoc_data import topics

    yield from read_stdlib(Path(sysconfig.get_path("stdlib")))
    for name in sorted(topics.topics):
        yield topics.topics[name]


def _wikitext() -> Iterator[str]:
    return split_articles(text for text, _ in read_hub(WIKITEXT_SOURCE, Columns("text")))


def _python_files(directory: Path) -> Iterator[Path]:
    for root, directories, files in os.walk(directory):
        directories[:] = sorted(name for name in directories if name not in STDLIB_SKIPPED)
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(root, name)


class HashSet:
    """A set of 64-bit hashes in open addressing: 11 to 32 bytes an entry, where Python's set takes about 100."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 << 10))
        self._count = 0

    def add(self, value: int) -> bool:
        """Add a hash; whether it is new."""
        value = value or 1  # zero marks an empty slot
        if 4 * self._count >= 3 * len(self._slots):
            self._grow()
        slot = self._find(value)
        if self._slots[slot]:
            return False
        self._slots[slot] = value
        self._count += 1
        return True

    def _find(self, value: int) -> int:
        mask = len(self._slots) - 1
        slot = value & mask
        while self._slots[slot] not in (0, value):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(16 * len(old)))
        for value in old:
            if value:
                self._slots[self._find(value)] = value
