"""What the owner allows: the options of `forge-node join`, and the file with the same keys. The command line wins."""

from __future__ import annotations

from collections.abc import Mapping
import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from forge.config import Section
from forge.errors import ConfigError
from forge.plain_yaml import read_yaml
from forge.train.memory import parse_size
from node.rules import Hours, Rules
from node.senses import LOWEST

PREFERENCES_FILE = "node.yaml"


def _bytes(value: object) -> int:
    try:
        return parse_size(str(value))
    except ConfigError as error:
        raise ValueError(str(error).rstrip(".")) from error


def _rate(value: object) -> int:
    try:
        return parse_size(str(value).removesuffix("/s"))
    except ConfigError:
        raise ValueError(f"{str(value)!r} is not a rate: write for example 200k or 2M, bytes a second") from None


def _hours(value: object) -> Hours:
    return Hours.parse(",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))


def _word(value: object) -> object:
    """YAML reads a bare yes or no as a truth."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


Size = Annotated[int, BeforeValidator(_bytes)]
Rate = Annotated[int, BeforeValidator(_rate)]


class Preferences(Section):
    """Every limit that an owner can set; the key of `max_upload` is `max-upload`, as the option's."""

    model_config = ConfigDict(alias_generator=lambda name: name.replace("_", "-"), arbitrary_types_allowed=True)

    ram: Size | None = None
    """Memory of the training process in bytes; none takes what is free, less a reserve for the owner, at most 8 GiB."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the training process; none takes OMP_NUM_THREADS, else the physical cores."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    name: str | None = None
    """Name that shards are credited to; none takes the host's name."""
    when: Literal["always", "idle"] = "always"
    """idle: train only while nobody uses the machine."""
    hours: Annotated[Hours, BeforeValidator(_hours)] | None = None
    """Spans of the day in local time; none trains at any hour."""
    on_battery: Annotated[Literal["no", "yes"], BeforeValidator(_word)] = "no"
    """Whether to train on the battery."""
    nice: int = Field(default=LOWEST, ge=0, le=19)
    """Priority of the training process: 19 gets what nobody else wants, 0 is that of every other process."""
    disk: Size | None = None
    """Bytes that the data directory may hold; none is bounded by the disk only."""
    max_upload: Rate | None = None
    """Bytes a second that shards are sent with; none does not limit them."""
    max_download: Rate | None = None
    """Bytes a second that files of the run are fetched with; none does not limit them."""

    @property
    def rules(self) -> Rules:
        """When the node may work."""
        return Rules(idle=self.when == "idle", hours=self.hours, on_battery=self.on_battery == "yes")


def load_preferences(file: Path | None, data_dir: Path, given: Mapping[str, object]) -> Preferences:
    """What the owner allows: `file`, else `DATA_DIR/node.yaml` if there is one, and over it what was typed.

    Args:
        file: the --config option.
        data_dir: the node's data directory.
        given: options by key; None where one was not typed.

    Raises:
        ConfigError: the file is missing, is not YAML, or a key or value is wrong.
    """
    path = file or data_dir / PREFERENCES_FILE
    tree = _read(path) if file is not None or os.path.isfile(path) else {}
    _validate(tree, f"{path}: ")
    return _validate({**tree, **{key: value for key, value in given.items() if value is not None}}, "--")


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the config file {path}: it is missing or no text; check --config.",
                          detail=str(error)) from error  # fmt: skip
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} must hold options of `forge-node join`, such as `hours: 22-7`, one a line.")
    return {str(key): value for key, value in (tree or {}).items()}


def _validate(tree: Mapping[str, object], where: str) -> Preferences:
    try:
        return Preferences.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            keys = [field.alias or name for name, field in Preferences.model_fields.items()]
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
            raise ConfigError(f"{where}unknown key {key!r}; did you mean {near[0]!r}?") from error
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}{key} {first['input']!r} is wrong: {message[0].lower()}{message[1:]}.") from error
