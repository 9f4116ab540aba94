"""Data sets of the Hugging Face Hub, read file by file through the unmodified huggingface_hub client.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean to every other program. A file is fetched
when reading comes to it, into the client's cache, so `data.max_bytes` also bounds the download.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
import os
from pathlib import Path, PurePosixPath
import re
from typing import Any, TypeVar

from forge.data.readers import FORMATS, Columns, Row, format_of, read_file
from forge.errors import DataError, HubError

DEFAULT_SPLIT = "train"
_T = TypeVar("_T")


@dataclass(frozen=True)
class HubSource:
    """A parsed `hf:name[:config][:split][:column]`; a part left empty (`hf:name::test`) takes its default."""

    name: str
    config: str | None
    split: str | None
    column: str | None

    @classmethod
    def parse(cls, source: str) -> HubSource:
        """Parse a source.

        Raises:
            DataError: it has no name or too many parts.
        """
        name, *rest = source.removeprefix("hf:").split(":")
        if not name or len(rest) > 3:
            raise DataError(f"The source {source!r} must look like hf:name[:config][:split][:column].")
        config, split, column = ([part or None for part in rest] + [None] * 3)[:3]
        return cls(name, config, split, column)


def select_files(names: list[str], source: HubSource) -> list[str]:
    """The files of a data set that a source means, sorted.

    A file belongs to a config when one of its directories has the config's name or its own name begins with it, and to
    a split when a word of its own name, or one of its directories, is the split. With no split named, `train` is meant
    where there is one. Only one format is read: parquet where there is any, else jsonl, else txt.

    Raises:
        DataError: no file fits, or several configs do and none was named.
    """
    files = sorted(name for name in names if format_of(name) and not name.startswith("."))
    if source.config is not None:
        files = [name for name in files if _in_config(name, source.config)]
    split = source.split or DEFAULT_SPLIT
    of_split = [name for name in files if _in_split(name, split)]
    if of_split or source.split is not None:
        files = of_split
    for suffix in FORMATS:
        if any(format_of(name) == suffix for name in files):
            files = [name for name in files if format_of(name) == suffix]
            break
    if not files:
        raise DataError(f"The data set {source.name} has no .parquet, .jsonl or .txt file for config "
                        f"{source.config or '(any)'} and split {split}; look at its files on the Hub.")  # fmt: skip
    directories = sorted({str(PurePosixPath(name).parent) for name in files})
    if source.config is None and len(directories) > 1:
        raise DataError(f"The data set {source.name} has several configs ({', '.join(directories[:8])}): name one, as "
                        f"in hf:{source.name}:{directories[0].split('/')[0]}.")  # fmt: skip
    return files


def read_hub(source: HubSource, columns: Columns) -> Iterator[Row]:
    """Yield (text, label or None) of every document of a data set of the Hub.

    Raises:
        DataError: there is no such data set, file or column, or a file is damaged.
        HubError: the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    cache = os.environ.get("HF_HUB_CACHE")
    names: list[str] = _ask(source, lambda: api.list_repo_files(source.name, repo_type="dataset"))
    columns = Columns(source.column or columns.text, columns.label)
    for name in select_files(names, source):

        def fetch(name: str = name) -> Any:
            return api.hf_hub_download(source.name, name, repo_type="dataset", cache_dir=cache)

        yield from read_file(Path(_ask(source, fetch)), columns, f"{source.name}/{name}")


def _in_config(name: str, config: str) -> bool:
    path = PurePosixPath(name)
    return config in path.parent.parts or path.name.startswith((f"{config}-", f"{config}_", f"{config}."))


def _in_split(name: str, split: str) -> bool:
    path = PurePosixPath(name)
    return split in path.parent.parts or split in re.split(r"[-_.]", path.name)


def _ask(source: HubSource, call: Callable[[], _T]) -> _T:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return call()
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise DataError(f"The Hub has no public data set {source.name}; check data.source, or set HF_TOKEN if it is "
                        "private.", detail=str(error)) from error  # fmt: skip
    except Exception as error:  # the client lets errors of its transport and of its own through, of many classes
        detail = f"{type(error).__name__}: {error}"
        raise HubError(f"The data set {source.name} cannot be fetched from the Hugging Face Hub; check the connection "
                       "and run the same command again.", detail=detail) from error  # fmt: skip
