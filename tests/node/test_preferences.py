from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.errors import ConfigError
from node.preferences import Preferences, load_preferences
from node.rules import Hours, Rules

FILE = """\
ram: 2G
threads: 1
when: idle
hours: [22-7, 12:30-13]
on-battery: yes
disk: 5G
max-upload: 200k
max-download: 2M/s
"""


def test_without_a_file_nothing_is_limited(tmp_path: Path) -> None:
    preferences = load_preferences(None, tmp_path / "not yet", {"ram": None})
    assert preferences == Preferences() and preferences.rules == Rules()


def test_the_file_of_the_data_directory_and_over_it_what_was_typed(tmp_path: Path) -> None:
    (tmp_path / "node.yaml").write_text(FILE)
    preferences = load_preferences(None, tmp_path, {"ram": "1G", "hours": "20-6", "threads": None})
    assert (preferences.ram, preferences.threads, preferences.disk) == (1 << 30, 1, 5 << 30)
    assert (preferences.max_upload, preferences.max_download) == (200 << 10, 2 << 20)
    assert preferences.rules == Rules(idle=True, hours=Hours.parse("20-6"), on_battery=True)
    (tmp_path / "other.yaml").write_text("on-battery: no\nhours: 22-7,12:30-13")
    other = load_preferences(tmp_path / "other.yaml", tmp_path, {})
    assert other.ram is None and other.rules == Rules(hours=Hours.parse("22-7,12:30-13"))
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_preferences(tmp_path / "empty.yaml", tmp_path, {}) == Preferences()


@pytest.mark.parametrize(("text", "words"), [
    ("max_upload: 1k", "unknown key 'max_upload'; did you mean 'max-upload'?"),
    ("hour: 22-7", "unknown key 'hour'; did you mean 'hours'?"),
    ("hours: 22", "hours 22 is wrong: '22' is not a span of hours: write for example 22-7 or 8:30-12,14-18."),
    ("when: sometimes", "when 'sometimes' is wrong: input should be 'always' or 'idle'."),
    ("threads: 0", "threads 0 is wrong: input should be greater than or equal to 1."),
    ("disk: much", "disk 'much' is wrong: 'much' is not a size: write for example 8G or 512M."),
    ("max-upload: fast", "max-upload 'fast' is wrong: 'fast' is not a rate: write for example 200k or 2M, bytes a second."),
    ("- a list", "must hold options of `forge-node join`, such as `hours: 22-7`, one a line."),
    ("a: b: c", "node.yaml, line 1 is not valid YAML: mapping values are not allowed here."),
])  # fmt: skip
def test_a_wrong_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "node.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_preferences(None, tmp_path, {})
    assert str(error.value).startswith(str(path)) and str(error.value).endswith(words)


@pytest.mark.parametrize(("given", "words"), [
    ({"hours": "25-3"}, "--hours '25-3' is wrong: '25-3' is not a span of hours"),
    ({"ram": "much"}, "--ram 'much' is wrong: 'much' is not a size"),
])  # fmt: skip
def test_a_wrong_option(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_preferences(None, tmp_path, given)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read the config file .*nowhere.yaml: it is missing or no text"):
        load_preferences(tmp_path / "nowhere.yaml", tmp_path, {})
