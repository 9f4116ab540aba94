"""Questions to the model over real HTTP; tests/test_dashboard.py has a real model, in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http.client import HTTPConnection
import json
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

from coordinator.dashboard import prompt
from coordinator.jobs import JobRunner
from forge.errors import StorageError
from tests.coordinator.conftest import World
from tests.coordinator.dashboard.test_http import LOCAL, get, page_port
from tests.coordinator.fakes import make_shard

QUESTION = json.dumps({"prompt": "The", "seed": 3})


@pytest.fixture
def world(make_world: Callable[[], World]) -> World:
    """A coordinator that has accepted a shard."""
    world = make_world()
    world.start(dashboard=LOCAL)
    node = world.node("laptop")
    assignment, shard = node.lease(1), make_shard(world.run, 1)
    node.hand_in(assignment, shard, world.run_id)
    node.verdict(assignment, shard, world.run_id)
    return world


def ask(port: int, body: str | bytes = QUESTION, **headers: str) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/prompt", body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_piece_is_a_line_with_the_expert_that_spoke_it(world: World) -> None:
    status, answer = ask(page_port(world))
    assert status == 200 and lines(answer) == [
        {"text": " sail", "expert": 0}, {"text": " and", "expert": 1}, {"text": " tide", "expert": 0},
        {"tokens": 3, "left_out": 0}]  # fmt: skip
    assert world.jobs.arguments["generate"] == {"run_dir": str(world.root), "prompt": "The", "seed": 3}


def test_it_comes_as_it_is_spoken_and_one_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "WAIT_SECONDS", 0.2)
    go_on = threading.Event()

    def slowly() -> Iterator[str]:
        yield "now"
        assert go_on.wait(10)
        yield "later"

    world.jobs.pieces, port = slowly(), page_port(world)
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/prompt", QUESTION)
    response = connection.getresponse()
    assert json.loads(response.readline()) == {"text": "now", "expert": 0}
    assert ask(port) == (503, "The model answers somebody else: ask again in a moment.\n")
    assert get(port, "/healthz")[0].status == 200
    go_on.set()
    assert [json.loads(line).get("text") for line in response] == ["later", None]
    connection.close()
    assert ask(port)[0] == 200


def test_an_answer_that_nobody_reads_ends_at_its_next_word_and_makes_room(world: World) -> None:
    said = 0

    def endless() -> Iterator[str]:
        nonlocal said
        while True:
            said += 1
            threading.Event().wait(0.02)
            yield "on"

    world.jobs.pieces, port = endless(), page_port(world)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.sendall(f"POST /prompt HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(QUESTION)}\r\n\r\n{QUESTION}".encode())
        answer = line.makefile("rb")
        assert b"200 OK" in answer.readline()
        while b'"text"' not in answer.readline():  # Until it has begun to speak.
            pass
        answer.close()
    world.jobs.pieces = ("again",)
    assert lines(ask(port)[1])[0] == {"text": "again", "expert": 0}
    ended = said
    threading.Event().wait(0.1)
    assert said == ended


def test_a_stopped_coordinator_ends_its_answer_at_once(world: World) -> None:
    go_on = threading.Event()

    def slowly() -> Iterator[str]:
        yield "now"
        go_on.wait(10)

    world.jobs.pieces = slowly()
    connection = HTTPConnection("127.0.0.1", page_port(world), timeout=10)
    connection.request("POST", "/prompt", QUESTION)
    response = connection.getresponse()
    response.readline()
    threading.Timer(0.5, go_on.set).start()
    world.stop()
    assert response.read() in (b"", b'{"error":"The answer was stopped."}\n')


def test_what_goes_wrong_is_the_last_line(world: World) -> None:
    world.jobs.failures["generate"] = [StorageError("The model cannot be read.")]
    assert lines(ask(page_port(world))[1]) == [{"error": "The model cannot be read."}]


NONSENSE = [
    b"", b"{", b"[]", b"7", b"null", b'"The"', b"{}", b'{"prompt": 7}', b'{"prompt": null}', b'{"prompt": ["a"]}', b"\xff",
    b'{"prompt": "\\ud800"}', b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "a", "seed": "1"}', b'{"prompt": "a", "seed": -1}',
    b'{"prompt": "a", "seed": 1.0}', b'{"prompt": "a", "seed": true}', b'{"prompt": "a", "seed": NaN}',
    b'{"prompt": "a", "seed": 9007199254740992}', b"[" * 20_000,
]  # fmt: skip


def test_what_is_no_question_is_refused(world: World) -> None:
    for body in NONSENSE:
        status, sentence = ask(page_port(world), body)
        assert status == 400 and "The history of" in sentence, body[:40]
    assert "generate" not in world.jobs.calls


def test_a_long_text_is_refused_and_the_longest_is_not(world: World) -> None:
    port = page_port(world)
    for characters in (prompt.MAX_CHARACTERS + 1, 10 * prompt.MAX_CHARACTERS, 400 * prompt.MAX_CHARACTERS):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
            body = json.dumps({"prompt": "x" * characters})
            line.sendall(f"POST /prompt HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode())
            line.sendall(body[:100_000].encode())
            assert b"413 " in line.recv(4096)
    assert ask(port, json.dumps({"prompt": "\U0001f600" * prompt.MAX_CHARACTERS}))[0] == 200


def test_a_body_that_does_not_come_is_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", page_port(world)), timeout=10) as line:
        line.sendall(b"POST /prompt HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{")
        assert b"408 " in line.recv(4096)


def test_only_pages_of_this_dashboard_may_ask(world: World) -> None:
    port = page_port(world)
    assert ask(port, Origin=f"http://127.0.0.1:{port}", Sec_Fetch_Site="same-origin")[0] == 200
    for foreign in ({"Sec_Fetch_Site": "cross-site"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        assert ask(port, **foreign)[0] == 403
    assert ask(port, Host="evil.example")[0] == 421
    assert world.jobs.calls.count("generate") == 1


def test_before_the_first_shard_there_is_nothing_to_ask(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.start(dashboard=LOCAL)
    world.node("laptop")
    assert ask(page_port(world)) == (409, "No shard has been accepted yet: the model can be asked when the first one is.\n")


def test_a_job_whose_listener_raises_is_ended(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real child: it would go on for a minute."""
    code = ("import json, sys, time; sys.stdin.readline()\n"
            "for n in range(600): print(json.dumps({'event': 'progress', 'n': n}), flush=True); time.sleep(0.1)")  # fmt: skip
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def child(command: list[str], **options: Any) -> subprocess.Popen[str]:
        started.append(popen([sys.executable, "-c", code], **options))
        return started[-1]

    def hear(event: dict[str, Any]) -> None:
        raise LookupError

    monkeypatch.setattr(subprocess, "Popen", child)
    with pytest.raises(LookupError):
        JobRunner(tmp_path / "jobs.log", lambda *_: None)("generate", {}, hear)
    assert started[0].poll() is not None
