"""Write docs/cli.md and docs/configuration.md from the commands and from the schema of the configuration.

`make docs` writes them; `tests/test_docs.py` fails when they are not what this would write.
"""

from __future__ import annotations

from collections.abc import Iterator
import inspect
import json
from pathlib import Path
import re
from typing import Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from coordinator.cli import main as coordinator
from forge.cli import main as forge
from forge.config import RunConfig, Section, load_config, packaged_configs
from node.cli import main as node
from node.preferences import Preferences

DOCS = Path(__file__).resolve().parent
_NOTICE = "<!-- Written by `make docs` from the code: change it there. -->"

#: What stands in capitals in a usage line. A word that is missing here stops the generator.
_WORDS = {
    "CONFIG": "a YAML file, or the name of a packaged config: {packaged}",
    "FILE|NAME": "a YAML file, or the name of a packaged config",
    "[KEY=VALUE]": "any key of the [configuration](configuration.md), such as `train.expert.tokens=2e6`; repeatable",
    "TARGET": "a run directory, or a model directory",
    "MODEL_DIR|RUN_DIR": "either of the two",
    "RUN_DIR": "the directory of a run, such as `runs/default`",
    "MODEL_DIR": "a model directory: `model` below a run directory, or a copy of one from the Hub",
    "MODEL": "a model directory or a run directory",
    "PROMPT": "the beginning of the text; `-` reads it from stdin",
    "SOURCE": "any value of [`data.source`](configuration.md#data)",
    "USER/REPO": "a repository of the Hugging Face Hub",
    "SIZE": "bytes: `8G`, `900M`, `1.5G`; K, M, G and T count by 1024",
    "RATE": "bytes a second, written like a SIZE: `200k`, `2M`",
    "TIME": "`30s`, `90m`, `12h` or `7d`; an invitation also takes `2w`",
    "SPANS": "spans of the day in local time: `22-7`, `8:30-12,14-18`",
    "HOST:PORT": "an address of this machine or, for nodes, of the coordinator",
    "HOST:PORT|off": "an address of this machine, or `off`",
    "INVITATION": "what `forge-coordinator token create` printed; it begins with `forge1_`",
    "[INVITATION|ADDRESS]": "an invitation, or HOST or HOST:PORT where the coordinator is now",
    "USES": "how many nodes an invitation lets in",
    "[OPTIONS OF JOIN]": "the options of `forge-node join`, but for an invitation",
    "ID": "what `forge-coordinator token list` shows",
    "[COMMAND] [ARGS]": "one of the commands below, with its options",
    "NAME": "what `forge-coordinator nodes list` shows: a node's name or id",
}
_PLAIN = {"DIRECTORY", "FILE", "FLOAT", "INTEGER", "PATH", "TEXT"}

_ENVIRONMENT = """\
| variable | of | what it does |
|---|---|---|
| `FORGE_TOKEN` | `forge-node join`, `doctor` | the invitation, where the list of processes does not show it |
| `FORGE_COORDINATOR` | `forge-node join`, `doctor` | the coordinator's address |
| `FORGE_DATA_DIR` | `forge-node` | the node's data directory |
| `HF_TOKEN` | `forge push`, `serve --push`, sources `hf:` | the Hub's token, as of `hf auth login` |
| `HF_HOME` | the same | where the Hub's client keeps what it downloads |
"""


def cli_page() -> str:
    """The text of docs/cli.md."""
    seen: dict[str, None] = {}
    commands = "\n".join("\n".join(_program(name, group, seen)) for name, group in
                         (("forge", forge), ("forge-coordinator", coordinator), ("forge-node", node)))  # fmt: skip
    packaged = ", ".join(f"`{name}`" for name in packaged_configs())
    if unknown := seen.keys() - _WORDS.keys() - _PLAIN:
        raise ValueError(f"docs/generate.py does not say what stands for {sorted(unknown)}: add it to _WORDS")
    words = "\n".join(f"| {_escape(word)} | {_WORDS[word].format(packaged=packaged)} |" for word in _WORDS if word in seen)
    return f"""{_NOTICE}

# The commands

Three programs: `forge` does everything on one machine, `forge-coordinator` coordinates a run of many, `forge-node` lends a
machine to one. Each has `--help` and `--version`, every command has `--help`. A command that succeeds exits with 0; an error
is one sentence on stderr and one of these [exit codes](exit-codes.md). What to do about the sentence:
[troubleshooting.md](troubleshooting.md).

## Words in capitals

| word | what stands there |
|---|---|
{words}

## Environment

{_ENVIRONMENT}
{commands}"""


def _program(name: str, group: click.Group, seen: dict[str, None]) -> Iterator[str]:
    yield f"## `{name}`\n\n{group.help}\n"
    for command, context in _commands(group, click.Context(group, info_name=name)):
        yield f"### `{context.command_path}`\n"
        pieces = command.collect_usage_pieces(context)
        seen.update(dict.fromkeys(_plain(piece) for piece in pieces if piece != "[OPTIONS]"))
        yield f"    {context.command_path} {' '.join(pieces)}\n"
        yield inspect.cleandoc(command.help or "") + "\n"
        options = [option for option in command.params if isinstance(option, click.Option)]
        if options:
            yield "| option | default | |\n|---|---|---|"
            yield from (_option_row(option, context, seen) for option in options)
            yield ""


def _commands(group: click.Group, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    for name, command in group.commands.items():
        below = click.Context(command, info_name=name, parent=context)
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield command, below
        if isinstance(command, click.Group):
            yield from _commands(command, below)


def _option_row(option: click.Option, context: click.Context, seen: dict[str, None]) -> str:
    if not option.help:
        raise ValueError(f"{context.command_path} {option.opts[0]} has no help")
    names, note = ", ".join((*option.opts, *option.secondary_opts)), ""
    if isinstance(option.type, click.Choice):
        names += " " + "|".join(map(str, option.type.choices))
    elif not option.is_flag and not option.count:
        word = option.make_metavar(context)
        word = re.sub(r" RANGE$", "", word)
        names += f" {word}"
        seen[word] = None
    if isinstance(option.type, click.IntRange | click.FloatRange) and not option.count:
        note = f" ({_bounds(option.type.min, option.type.max, option.type.min_open)})"
    match = re.fullmatch(r"(.*?)(?:[;.] |\s+\[)[Dd]efault:? (.*?)[.\]]*", option.help)
    text, default = (match[1], match[2]) if match else (option.help, "required" if option.required else "")
    if isinstance(option.show_default, str):
        default = option.show_default
    elif option.show_default and option.is_flag:
        default = "yes" if option.default else "no"
    elif option.show_default:
        default = f"`{option.default}`"
    return f"| `{_escape(names)}` | {_escape(default)} | {_escape(text.rstrip('.'))}{note} |"


def configuration_page() -> str:
    """The text of docs/configuration.md."""
    sections = "\n".join(_section(RunConfig, ""))
    names = packaged_configs()
    configs = [dict(_leaves(load_config(name).model_dump(mode="json"))) for name in names]
    defaults = {key: field for key, field in _fields(RunConfig, "")}
    rows = [f"| `{key}` | {' | '.join(_value(config[key]) for config in configs)} |" for key in configs[0]
            if any(config[key] != defaults[key].get_default() for config in configs)]  # fmt: skip
    return f"""{_NOTICE}

# The configuration

## Of a run

A run is described by one YAML file, or by the name of a packaged one. What the file leaves out has the default of the tables
below; a key that does not exist is an error that names the nearest one. On the command line `section.key=value` wins over
the file, as in `forge run smoke train.expert.tokens=2e6`. `forge config CONFIG` prints the whole of it, with parameters and
memory; `forge plan CONFIG` says how training will run.

`name`, `evaluation` and `fleet` may be changed while a run is in progress. All other keys decide the result: their
fingerprint is in the run directory, and a directory is refused to another one (exit code 10).

{sections}
### The packaged configs

Where they differ from the defaults above:

| key | {" | ".join(f"`{name}`" for name in names)} |
|---|{"---|" * len(names)}
{chr(10).join(rows)}

## Of a node

`node.yaml` in the node's data directory, or the file that `forge-node join --config FILE` names. Each key is an option of
[`forge-node join`](cli.md#forge-node-join) as well, which wins. What they are for: [volunteer.md](volunteer.md).

| key | value | default | |
|---|---|---|---|
{chr(10).join(_row(field.alias or name, field) for name, field in Preferences.model_fields.items())}
"""


def _section(section: type[BaseModel], prefix: str) -> Iterator[str]:
    nested = [(name, field, inner) for name, field in section.model_fields.items() if (inner := _inner(field)) is not None]
    values = {name: field for name, field in section.model_fields.items() if _inner(field) is None}
    if values:
        title = f"`{prefix.rstrip('.')}`" if prefix else "The top"
        doc = " ".join((section.__doc__ or "").split())
        yield f"### {title}\n\n{doc}\n\n| key | value | default | |\n|---|---|---|---|"
        yield from (_row(prefix + name, field) for name, field in values.items())
        yield ""
    for name, _, inner in nested:
        yield from _section(inner, f"{prefix}{name}.")


def _inner(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _fields(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        inner = _inner(field)
        if inner is None:
            yield prefix + name, field
        else:
            yield from _fields(inner, f"{prefix}{name}.")


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _row(key: str, field: FieldInfo) -> str:
    if not field.description:
        raise ValueError(f"{key} has no docstring")
    default = "required" if field.is_required() else "see right" if field.default is PydanticUndefined else _value(field.default)
    return f"| `{key}` | {_kind(field)} | {default} | {_escape(' '.join(field.description.split()).rstrip('.'))} |"


def _kind(field: FieldInfo) -> str:
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    if get_origin(kinds[0]) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kinds[0]))
    source = str([*field.metadata, *kinds])
    for validator, word in (("_bytes", "SIZE"), ("_rate", "RATE"), ("_hours", "SPANS")):
        if validator in source:
            return f"[{word}](cli.md#words-in-capitals)"
    limits = {name: getattr(limit, name) for limit in field.metadata for name in ("ge", "gt", "le") if hasattr(limit, name)}
    low = limits.get("ge", limits.get("gt"))
    name = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}.get(kinds[0], "whole number")
    bounds = _bounds(low, limits.get("le"), "gt" in limits)
    return f"{name}, {bounds}" if bounds else name


def _bounds(low: float | None, high: float | None, open_below: bool) -> str:
    if low is None:
        return "" if high is None else f"at most {high:g}"
    start = f"above {low:g}" if open_below else f"{low:g}"
    if high is None:
        return start if open_below else f"{start} or more"
    return f"{start} to {high:g}" if not open_below else f"{start}, at most {high:g}"


def _value(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace(",", "_") if value >= 100_000 else str(value)
    return f"`{value}`" if isinstance(value, str) else json.dumps(value)


def _plain(piece: str) -> str:
    """The word of an argument in a usage line, without the brackets and dots around it."""
    piece = piece.removesuffix("...")
    return piece[1:-1] if piece.startswith("[") and piece[1:-1].isidentifier() else piece


def _escape(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")


PAGES = {"cli.md": cli_page, "configuration.md": configuration_page}


def main() -> None:
    """Write every generated page."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
