"""`forge chat` and `forge generate --show-experts`, typed through a pipe and at a real terminal."""

from __future__ import annotations

import os
from pathlib import Path
import re
import select
import signal
import sys
import time

from click.testing import CliRunner, Result
import pytest

from forge.cli import main
from tests.commands import arguments
from tests.conftest import Road

#: Seconds that a terminal may be silent: torch is imported on a machine that does other things.
PATIENCE = 30


def chat(road: Road, *lines: str, options: tuple[str, ...] = ()) -> Result:
    command = ["chat", str(road.desk / "run"), "--max-tokens", "6", *options]
    return CliRunner().invoke(main, command, input="".join(line + "\n" for line in lines))


def test_each_line_is_added_to_the_text_and_the_model_goes_on(road: Road) -> None:
    told = chat(road, "The sail", "and the", "", "/text", "/reset", "/text", "The sail")
    assert told.exit_code == 0
    texts = told.stdout.split("The text is forgotten.\n")
    assert "The sail" in texts[0] and "\nand the" in texts[0]
    first = texts[0].splitlines()[0]
    assert texts[0].count(first) >= 2  # Said, and in the text so far.
    assert texts[1].splitlines()[0] == "" and texts[1].splitlines()[1] == first  # Forgotten; and the same again.
    assert len(re.findall(r"tokens/s", told.stderr)) == 4


def test_settings_change_what_is_said(road: Road) -> None:
    told = chat(road, "/set temperature 0", "The", "/reset", "/set top-k 1", "/set temperature 2", "The", "/set",
                "/set top-k off", "/set show-experts on", "The")  # fmt: skip
    lines = told.stdout.splitlines()
    greedy, again = told.stdout.split("The text is forgotten.\n")
    assert again.startswith(greedy)
    assert {"temperature 2.0", "top-k 1", "top-p off", "max-tokens 6", "show-experts off"} <= set(lines)
    shown = r"\[[01]\]"
    assert not re.search(shown, greedy) and re.search(shown, again[len(greedy) :])
    assert re.search(r"expert [01]: \d+% of the tokens", told.stderr)


@pytest.mark.parametrize(("line", "sentence"), [
    ("/set", ""), ("/set temperature -1", "must be 0"), ("/set temperature hot", "sets nothing"),
    ("/set seed off", "sets nothing"), ("/set nonsense 1", "max-tokens, temperature"),
    ("/sett", "There is no command /sett"), ("/set max-tokens 1000", ""),
])  # fmt: skip
def test_a_mistake_is_one_sentence_and_the_chat_goes_on(road: Road, line: str, sentence: str) -> None:
    told = chat(road, line, "/help")
    assert told.exit_code == 0 and "This model continues text" in told.stdout
    assert (sentence in told.stderr and told.stderr.startswith("error: ")) if sentence else told.stderr == ""


def test_a_text_beyond_the_context_loses_its_beginning(road: Road) -> None:
    told = chat(road, "The sail and the tide. " * 60, "/set max-tokens 100000", "more")
    assert re.search(r"longer than the model's context of 128: its first \d+ tokens were left out", told.stderr)
    assert "do not fit in the model's context" in told.stderr and told.exit_code == 0


class Terminal:
    """A person at a terminal."""

    def __init__(self, command: str, cwd: Path) -> None:
        import pty

        self.seen = ""
        self._pid, self._line = pty.fork()
        if self._pid == 0:
            os.chdir(cwd)
            line = arguments(command)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Whoever runs the tests in the background may ignore it.
            os.execve(line[0], line, {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "NO_COLOR": ""})

    def type(self, keys: str) -> None:
        self.seen = ""
        os.write(self._line, keys.encode())

    def until(self, pattern: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.seen, re.DOTALL):
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._line], [], [], left)[0], self.seen
            try:
                self.seen += os.read(self._line, 65536).decode(errors="replace")
            except OSError as error:  # The other end is closed.
                raise AssertionError(self.seen) from error
        return self.seen

    def ended(self) -> int:
        _, status = os.waitpid(self._pid, 0)
        os.close(self._line)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals on Windows")
def test_at_a_terminal_experts_are_colours_and_ctrl_c_does_not_leave(road: Road) -> None:
    terminal = Terminal("forge chat run --show-experts --max-tokens 8", road.desk)
    terminal.until("/help lists the commands.*> ")
    terminal.type("The sail\n")
    shown = terminal.until(r"tokens/s.*> ")
    assert re.search(r"\x1b\[38;5;(33|202)m", shown) and re.search(r"■ .*expert [01]: \d+%", shown)
    time.sleep(0.5)  # Between the prompt and the wait for a key, readline would keep the signal until the next key.
    terminal.type("\x03")
    terminal.until(r"/quit or Ctrl-D leaves.*> ")
    terminal.type("/quit\n")
    assert terminal.ended() == 0


def test_generate_shows_no_markup_in_a_pipe_and_says_its_pace_beside_the_text(road: Road) -> None:
    told = CliRunner().invoke(main, ["generate", str(road.desk / "run"), "-", "--show-experts", "--max-tokens", "8"], input="The")
    assert told.exit_code == 0 and told.stdout.startswith("The[") and "\x1b" not in told.stdout
    assert re.search(r"8 tokens, [\d.]+ tokens/s, the first after", told.stderr)
