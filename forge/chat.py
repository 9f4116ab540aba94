"""What `forge generate` and `forge chat` show: text as it comes, which expert spoke it, and how fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
import os
from pathlib import Path
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from forge.errors import ConfigError, ForgeError
from forge.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from forge.evaluate.generate import Piece, Sampling
    from forge.model.moe import MixtureLM

#: Colours of the 256 that terminals have, readable on black and on white; after the last one they begin again, underlined.
COLOURS = (33, 202, 35, 172, 170, 99, 70, 37)

#: What /set changes, and those of them that may be off.
NUMBERS: dict[str, Callable[[str], Any]] = {"max-tokens": int, "temperature": float, "top-k": int, "top-p": float,
                                            "repetition-penalty": float, "seed": int}  # fmt: skip
LIMITS = ("max-tokens", "top-k", "top-p")

HELP = """This model continues text; it was not taught to answer. What you type is added to the text so far, on a new line,
and the model goes on from there. An empty line lets it go on by itself. Ctrl-C stops it.

  /set                 show the settings
  /set NAME VALUE      change one, such as /set temperature 0.5 or /set show-experts on; off takes a limit away
  /text                show the text so far, as the model sees it
  /reset               forget the text so far
  /help                show this
  /quit                leave (or Ctrl-D)
"""


class Voice:
    """Prints pieces as they come, and then in a line on stderr how fast they came.

    Args:
        show_experts: tell which expert spoke: by colour on a terminal, else by its number in brackets where it changes.
        topics: partition -> its telling words, for the legend; empty where nobody knows them.
    """

    def __init__(self, show_experts: bool, topics: Mapping[int, Sequence[str]]) -> None:
        self.show_experts = show_experts
        self._topics = topics
        self._terminal = sys.stdout.isatty()
        self._coloured = self._terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def speak(self, pieces: Iterable[Piece], after: str = "") -> None:
        """Print the pieces, `after` the text that they continue; Ctrl-C comes through when the line is ended."""
        spoke, before = Counter[int](), -1
        begun = time.perf_counter()
        coming = iter(pieces)
        piece = next(coming, None)  # Whatever is wrong is said before anything is printed.
        first = time.perf_counter()
        click.echo(after, nl=False)
        try:
            while piece is not None:
                spoke[piece.expert] += piece.tokens
                if piece.text:
                    click.echo(self._shown(piece, before), nl=False, color=self._coloured)
                    before = piece.expert
                piece = next(coming, None)
        finally:
            click.echo()
        ended = time.perf_counter()
        if self.show_experts:
            self._legend(spoke)
        self._pace(sum(spoke.values()), first - begun, ended - first)

    def _shown(self, piece: Piece, before: int) -> str:
        # A terminal obeys what is not printable; the text of a model is whatever the corpus was.
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece.text) if self._terminal else piece.text
        if not self.show_experts:
            return text
        if self._coloured:
            return _coloured(text, piece.expert)
        return text if piece.expert == before else f"[{piece.expert}]{text}"

    def _legend(self, spoke: Counter[int]) -> None:
        total = sum(spoke.values())
        for expert, count in spoke.most_common():
            mark = _coloured("■ ", expert) if self._coloured else ""
            words = ", ".join(self._topics.get(expert, ()))
            click.echo(f"{mark}expert {expert}: {count / total:.0%} of the tokens" + (f" ({words})" if words else ""),
                       err=True, color=self._coloured)  # fmt: skip

    def _pace(self, count: int, waited: float, seconds: float) -> None:
        if count == 0:
            click.echo("no token: the model ends the text here", err=True)
        elif count == 1:
            click.echo(f"1 token, after {waited:.2f} s", err=True)
        else:
            click.echo(f"{count} tokens, {(count - 1) / max(seconds, 1e-9):.1f} tokens/s, the first after {waited:.2f} s",
                       err=True)  # fmt: skip


class Chat:
    """A loop that reads a line, adds it to the text, and lets the model go on.

    Args:
        model: the assembled model.
        tokenizer: its tokenizer.
        sampling: how to choose tokens; `/set` changes it.
        voice: shows what is said.
    """

    def __init__(self, model: MixtureLM, tokenizer: Tokenizer, sampling: Sampling, voice: Voice) -> None:
        self._model, self._tokenizer, self._sampling, self._voice = model, tokenizer, sampling, voice
        self._text, self._turn = "", 0
        self._commands: dict[str, Callable[[list[str]], None]] = {
            "/help": lambda _: click.echo(HELP, nl=False), "/set": self._set, "/text": lambda _: click.echo(self._text),
            "/reset": self._reset}  # fmt: skip

    def run(self) -> None:
        """Go on until the end of the input, or until /quit."""
        terminal = sys.stdin.isatty()
        if terminal:
            with suppress(ImportError):  # Windows has none, and a console that does the same.
                import readline  # noqa: F401 - gives `input` a history and editing
            click.echo("The model continues what you type. /help lists the commands, Ctrl-D leaves.")
        while True:
            try:
                line = input("> " if terminal else "")
            except EOFError:
                return click.echo() if terminal else None
            except KeyboardInterrupt:
                click.echo("\n(/quit or Ctrl-D leaves)")
                continue
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self._take(line)
            except ForgeError as error:
                click.echo(f"error: {error}", err=True)

    def _take(self, line: str) -> None:
        name, *arguments = line.split() or [""]
        if name.startswith("/") and name in self._commands:
            self._commands[name](arguments)
        elif name.startswith("/") and name[1:].isalpha():
            raise ConfigError(f"There is no command {name}: /help lists them.")
        else:
            self._go_on(line)

    def _go_on(self, line: str) -> None:
        from forge.evaluate.generate import go_on

        text = self._text + ("\n" if self._text and line and not self._text.endswith("\n") else "") + line
        sampling = replace(self._sampling, seed=self._sampling.seed + self._turn)
        pieces, left_out = go_on(self._model, self._tokenizer, text, sampling)
        said: list[str] = []

        def listened() -> Iterable[Piece]:
            for piece in pieces:
                said.append(piece.text)
                yield piece

        try:
            self._voice.speak(listened())
        except KeyboardInterrupt:
            click.echo("(stopped)", err=True)
        if left_out:
            click.echo(f"(the text is longer than the model's context of {self._model.config.max_seq_len}: its first "
                       f"{left_out} tokens were left out)", err=True)  # fmt: skip
        self._text, self._turn = text + "".join(said), self._turn + 1

    def _reset(self, arguments: list[str]) -> None:
        self._text, self._turn = "", 0
        click.echo("The text is forgotten.")

    def _set(self, arguments: list[str]) -> None:
        values: dict[str, Any] = {name.replace("_", "-"): value for name, value in vars(self._sampling).items()}
        if not arguments:
            for name, value in {**values, "show-experts": self._voice.show_experts}.items():
                click.echo(f"{name} {'on' if value is True else 'off' if value is None or value is False else value}")
            return
        name, value = arguments[0], " ".join(arguments[1:])
        if name == "show-experts" and value in ("on", "off"):
            self._voice.show_experts = value == "on"
            return
        try:
            chosen = None if value == "off" and name in LIMITS else NUMBERS[name](value)
        except (KeyError, ValueError):
            raise ConfigError(f"/set {name} {value} sets nothing: give one of {', '.join(NUMBERS)} a number, or "
                              "show-experts on or off.") from None  # fmt: skip
        changed: dict[str, Any] = {name.replace("-", "_"): chosen}
        sampling = replace(self._sampling, **changed)
        sampling.check()
        self._sampling = sampling


def telling_words(model_dir: Path) -> dict[int, list[str]]:
    """Partition -> its telling words, where the model lies in a run directory that knows them."""
    marker = model_dir.absolute().parent / "stages" / "publish.json"
    if not marker.is_file():
        return {}
    rows = read_json(marker).get("partitions", [])
    return {int(row["partition"]): list(row["topic"]["words"]) for row in rows if row.get("topic")}


def _coloured(text: str, expert: int) -> str:
    return click.style(text, fg=COLOURS[expert % len(COLOURS)], underline=True if expert // len(COLOURS) % 2 else None)
