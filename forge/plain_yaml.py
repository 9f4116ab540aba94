"""YAML that somebody wrote, as plain values of a bounded size; whatever is in the text, there is a tree or one sentence."""

from __future__ import annotations

from typing import Any, Final

import yaml

from forge.errors import ConfigError

#: Values in a tree, aliases written out, and levels of nesting: a config has some 60 of the first and 4 of the second.
MAX_VALUES: Final = 10_000
MAX_DEPTH: Final = 32
#: Numbers beyond 64 bits are no settings, and Python refuses to print very long ones.
MAX_NUMBER: Final = 1 << 64


class _Loader(yaml.SafeLoader):
    """The safe loader, which of a key that is there twice would drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document.
        where: what it is, for the sentence.

    Raises:
        ConfigError: it is not valid YAML, has a key twice, or is larger, deeper or of larger numbers than any config.
    """
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it could not be parsed"
        raise ConfigError(f"{where}{line} is not valid YAML: {problem}.", detail=str(error)) from error
    # An impossible date or number, a key that cannot be one, a thousand brackets: the library lets Python's errors through.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where} is not valid YAML: it holds a value that cannot be read.", detail=repr(error)) from error
    _check_size(tree, where)
    return tree


def _check_size(tree: Any, where: str) -> None:
    """Walk the tree as a program that prints it would: an alias is as many values as what it stands for."""
    waiting, seen = [(tree, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > MAX_VALUES or depth > MAX_DEPTH:
            raise ConfigError(f"{where} is larger or deeper than any config: at most {MAX_VALUES:,} values in {MAX_DEPTH} "
                              "levels, aliases written out.")  # fmt: skip
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise ConfigError(f"{where} holds a number of more than 64 bits.")
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, list | tuple | set):
            waiting += [(item, depth + 1) for item in value]
