"""The dashboard over real HTTP, with a coordinator whose jobs need no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
import json
from pathlib import Path
import re
import socket
import subprocess
import sys
from typing import Any

from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
import pytest

from coordinator.cli import main
from coordinator.dashboard import app, metrics, server
from coordinator.serve import Coordinator
from forge.errors import ConfigError, NetworkError
from forge.invitation import Invitation
from tests.coordinator.conftest import World
from tests.coordinator.fakes import CONFIG, FakeJobs, make_shard, until

LOCAL = "127.0.0.1:0"


@pytest.fixture
def world(make_world: Callable[[], World]) -> World:
    world = make_world()
    world.start(dashboard=LOCAL)
    return world


@pytest.fixture
def port(world: World) -> int:
    return page_port(world)


def page_port(world: World) -> int:
    url = json.loads((world.root / "coordinator.json").read_text())["dashboard"]
    return int(url.rsplit(":", 1)[1].rstrip("/"))


def get(port: int, path: str = "/", **headers: str) -> tuple[HTTPResponse, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response, body


class Reader:
    """A page's line to the coordinator."""

    def __init__(self, port: int, after: str = "", **headers: str) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=10)
        self._connection.request("GET", f"/events?after={after}",
                                 headers={name.replace("_", "-"): value for name, value in headers.items()})  # fmt: skip
        self.response = self._connection.getresponse()
        self.id = ""

    def next(self) -> dict[str, Any]:
        while True:
            line = self.response.readline().decode()
            assert line, "the stream ended"
            if line.startswith("id: "):
                self.id = line[4:].strip()
            if line.startswith("data: "):
                return dict(json.loads(line[6:]))

    def until(self, wanted: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The sections, one over the other, as soon as they are as wanted."""
        sections: dict[str, Any] = {}
        for _ in range(100):
            sections |= self.next()["sections"]
            if wanted(sections):
                return sections
        raise AssertionError(f"not in 100 events: {sections}")

    def close(self) -> None:
        self._connection.close()
        self.response.close()


@contextmanager
def reading(port: int, after: str = "", **headers: str) -> Iterator[Reader]:
    reader = Reader(port, after, **headers)
    try:
        yield reader
    finally:
        reader.close()


def test_everything_on_the_page_is_in_status_json(world: World, port: int) -> None:
    assert world.coordinator is not None
    node = world.node("laptop")
    first, second = node.lease(1), make_shard(world.run, 1)
    node.heartbeat(first.lease_id, activity="training", step=5, steps=10, loss=3.25, tokens_per_second=64.0, resident_bytes=7)
    with reading(port) as page:
        shown = page.until(lambda sections: sections["experts"][1]["shows"] == "training")
        assert shown["curve 1"] == [[5, 3.25]]
        expert = shown["experts"][1]
        assert (expert["step"], expert["training_loss"], expert["node_name"]) == (5, 3.25, "laptop")
        assert shown["nodes"]["shown"][0]["resident_bytes"] == 7 and shown["nodes"]["total"] == 1
        node.hand_in(first, second, world.run_id)
        page.until(lambda sections: sections.get("quality", {}).get("experts") == 1)
    answer = json.loads(CliRunner().invoke(main, ["status", "--json", "--run-dir", str(world.root)]).output)["snapshot"]
    with reading(port) as page:
        sections = page.next()["sections"]
    curves = {f"curve {name}": points for name, points in answer.pop("curves").items()}
    answer.pop("now")
    assert sections == answer | curves
    assert answer["experts"][1]["shows"] == "accepted" and answer["quality"]["mean_perplexity"] == 99.0
    assert answer["phase"]["stages"][0] == {"stage": "prepare", "done": True, "now": False}


def test_who_contributed_most_comes_first_wherever_it_is_told(world: World, port: int) -> None:
    with reading(port) as page:
        for name, partition in (("laptop", 0), ("desktop", 2)):
            node = world.node(name)
            node.hand_in(node.lease(partition), make_shard(world.run, partition), world.run_id)
            page.until(lambda sections, name=name: sections.get("contributors") and any(
                node["name"] == name and node["nats"] is not None for node in sections["contributors"]))  # type: ignore[misc]
    status = json.loads(CliRunner().invoke(main, ["status", "--json", "--run-dir", str(world.root)]).output)["snapshot"]
    assert [(node["name"], node["nats"], node["experts"]) for node in status["contributors"]] == [
        ("desktop", 0.5, [{"partition": 2, "nats": 0.5}]), ("laptop", 0.0, [{"partition": 0, "nats": 0.0}])]  # fmt: skip
    plain = CliRunner().invoke(main, ["status", "--run-dir", str(world.root)]).output
    assert ("contribution of desktop: +0.5000 nats a token, by expert 2 (+0.5000)\n"
            "contribution of laptop: +0.0000 nats a token, by expert 0 (+0.0000)\n") in plain  # fmt: skip
    families = {family.name: family.samples for family in text_string_to_metric_families(get(port, "/metrics")[1])}
    assert [(s.labels["node"], s.value) for s in families["modularforge_node_contribution_nats"]] == [
        ("desktop", 0.5), ("laptop", 0.0)]  # fmt: skip
    assert {s.labels["expert"]: s.value for s in families["modularforge_expert_contribution_nats"]} == {"2": 0.5, "0": 0.0}


def test_a_rejected_shard_shows_why_and_who_trains_it_now(world: World, port: int) -> None:
    node = world.node("laptop")
    world.jobs.verdicts.append({"accepted": False, "reasons": ["it is no better than nothing"]})
    assignment, shard = node.lease(0), make_shard(world.run, 0)
    with reading(port) as page:
        node.hand_in(assignment, shard, world.run_id)
        shown = page.until(lambda sections: sections.get("experts") and sections["experts"][0]["shows"] == "rejected")
        assert shown["experts"][0]["rejected"] == ["it is no better than nothing"]
        node.lease(0)
        shown = page.until(lambda sections: sections.get("experts") and sections["experts"][0]["shows"] == "leased")
        assert shown["experts"][0]["rejected"] == ["it is no better than nothing"]


def test_a_page_goes_on_where_it_was_and_a_new_process_tells_it_everything(world: World, port: int) -> None:
    node = world.node("laptop")
    with reading(port) as page:
        assert page.next()["full"] is True
        seen = page.id
    for header in ({"Last_Event_ID": seen}, {"after": seen}):
        with reading(port, **header) as page:
            again = page.next()
            assert again["full"] is False and set(again["sections"]) <= {"nodes", "estimate"}
    node.channel.close()
    world.stop()
    world.start(dashboard=f"127.0.0.1:{port}")
    with reading(port, seen) as page:
        assert page.next()["full"] is True


def test_healthz_and_metrics(world: World, port: int) -> None:
    node = world.node('a "quoted" \\ name')
    node.heartbeat(node.lease(2).lease_id, activity="training", step=5, steps=10, loss=3.25, tokens_per_second=64.0)
    response, body = get(port, "/healthz")
    assert (response.status, json.loads(body)) == (200, {"phase": "experts"})

    def exposed() -> dict[str, Any]:
        response, body = get(port, "/metrics")
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        return {family.name: family for family in text_string_to_metric_families(body)}

    until(lambda: "modularforge_expert_training_loss_nats" in exposed())
    families = exposed()
    (sample,) = families["modularforge_expert_training_loss_nats"].samples
    assert (sample.labels, sample.value) == ({"expert": "2"}, 3.25)
    (sample,) = families["modularforge_node_tokens_per_second"].samples
    assert (sample.labels["node"], sample.value) == ('a "quoted" \\ name', 64.0)
    phases = {s.labels["phase"]: s.value for s in families["modularforge_phase"].samples}
    assert phases["experts"] == 1 and sum(phases.values()) == 1
    states = {s.labels["state"]: s.value for s in families["modularforge_experts"].samples}
    assert (states["training"], states["open"]) == (1, 2)
    assert all(family.type == "gauge" and family.documentation for family in families.values())


def test_the_documentation_lists_every_series() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "dashboard.md").read_text()
    lines = re.findall(r"^\| `modularforge_.*\|$", page, re.MULTILINE)
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    assert rows == [(f"`{s.name}`", s.unit, s.labels, s.help) for s in metrics.SERIES]


def test_grafana_asks_for_series_and_labels_that_are_exported() -> None:
    board = json.loads((Path(__file__).resolve().parents[3] / "docs" / "grafana.json").read_text())
    labels = {series.name: set(series.labels.split(", ")) for series in metrics.SERIES}
    for panel in board["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"modularforge_\w+", target["expr"])
            assert names and set(names) <= set(labels), target
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set.intersection(*(labels[name] for name in names))
        assert panel["datasource"] == {"type": "prometheus", "uid": f"${{{board['templating']['list'][0]['name']}}}"}


def test_the_page_may_do_nothing_but_read_what_is_its_own(port: int) -> None:
    response, html = get(port)
    assert response.status == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
    assert set(re.findall(r'(?:src|href)="(?!data:)([^"]*)"', html)) == {path[1:] for path in app.FILES} - {""}
    for path in list(app.FILES)[1:]:
        part, text = get(port, path)
        assert part.status == 200 and part.headers["content-security-policy"] == response.headers["content-security-policy"]
        html += text
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    for header, value in (("x-content-type-options", "nosniff"), ("x-frame-options", "DENY"), ("connection", "close"),
                          ("referrer-policy", "no-referrer"), ("cache-control", "no-store")):  # fmt: skip
        assert response.headers[header] == value
    assert "innerHTML" not in html and "document.write" not in html and " style=" not in html
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+", re.sub(r"^//.*$|  // .*$", "", html, flags=re.M)))
    assert addresses == {"http://www.w3.org"}  # The name of SVG's vocabulary; nothing is asked there.


def test_a_name_that_is_not_this_machines_is_refused(port: int) -> None:
    for host in (f"127.0.0.1:{port}", "localhost:9999", "LOCALHOST", "localhost.", "[::1]:80", "127.0.0.1"):
        assert get(port, "/healthz", Host=host)[0].status == 200
    for host in (f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "[", "127.0.0.1:x"):
        for path in ("/", "/metrics", "/healthz", "/events"):
            response, body = get(port, path, Host=host)
            assert response.status == 421 and "not known by that name" in body
            assert response.headers["content-security-policy"]


def test_a_page_of_another_site_gets_no_events(port: int) -> None:
    def status(**headers: str) -> int:
        with reading(port, **headers) as page:
            return page.response.status

    assert status() == status(Sec_Fetch_Site="same-origin") == status(Origin=f"http://127.0.0.1:{port}") == 200
    for foreign in ({"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}, {"Origin": "http://evil.example"},
                    {"Origin": "null"}, {"Origin": f"http://127.0.0.1:{port + 1}"}):  # fmt: skip
        assert status(**foreign) == 403


def test_nothing_can_be_changed_from_the_page(port: int) -> None:
    for path in (*app.FILES, "/events", "/healthz", "/metrics", "/prompt"):
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH"} - ({"POST"} if path == "/prompt" else {"GET"}):
            connection = HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request(method, path, body=b"x" * 100_000)
            assert connection.getresponse().status == 405
            connection.close()
    assert get(port, "/nowhere")[0].status == 404


def test_there_is_a_limit_on_pages_and_a_closed_one_makes_room(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MAX_CLIENTS", 2)
    with reading(port) as first:
        first.next()
        with reading(port) as second:
            second.next()
            response, body = get(port, "/events")
            assert (response.status, response.headers["retry-after"]) == (503, "10") and "2 pages watch" in body
        until(lambda: not _refused(port))


def _refused(port: int) -> bool:
    with reading(port) as page:
        return page.response.status != 200


def test_idle_and_surplus_connections_are_cut(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    port = page_port(world)
    with reading(port) as page:
        page.next()
        lines = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(5)]
        lines[0].sendall(b"GET / HTTP/1.1\r\nHost: localh")  # and never the rest
        for line in lines:
            assert _ended(line)
            line.close()
        world.node("laptop")
        assert page.until(lambda sections: sections.get("nodes", {}).get("total") == 1)  # A stream may last.
    assert get(port, "/healthz")[0].status == 200


def _ended(line: socket.socket) -> bool:
    try:
        return line.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_reader_that_does_not_read_is_cut(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(app, "LOOK_SECONDS", 0.0)
    assert world.coordinator is not None
    page, take = world.coordinator._dashboard_page, world.coordinator._desk.snapshots.take
    assert page is not None and page._pages is not None and page._server is not None
    # More than the system's buffers take.
    monkeypatch.setattr(page._pages, "_take", lambda: take() | {"topics": "x" * 8_000_000})
    connections: set[Any] = page._server.server_state.connections
    with socket.create_connection(("127.0.0.1", page_port(world)), timeout=10) as line:
        line.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: any(connection.flow.write_paused for connection in list(connections)))
        until(lambda: not connections)


def test_a_stopped_coordinator_ends_its_streams_at_once(world: World, port: int) -> None:
    with reading(port) as page:
        page.next()
        world.stop()
        while page.response.readline():
            pass
    with pytest.raises(ConnectionRefusedError):
        get(port)


def test_a_database_that_cannot_be_read_shows_the_state_before(world: World, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world.node("laptop")
    assert get(port, "/healthz")[0].status == 200
    assert world.coordinator is not None
    monkeypatch.setattr(world.coordinator._desk.state, "counts", _broken)
    with reading(port) as page:
        assert page.next()["sections"]["run"]["name"] == "tiny"
    assert get(port, "/healthz")[0].status == 200


def _broken() -> None:
    from forge.errors import StorageError

    raise StorageError("The database is locked.")


def test_the_default_port_gives_way_and_another_one_does_not(make_world: Callable[[], World], tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        used = taken.getsockname()[1]
        monkeypatch.setattr(server, "DASHBOARD_PORT", used)
        world = make_world()
        world.start(dashboard=None)
        assert page_port(world) != used
        assert any(f"to watch:  http://127.0.0.1:{page_port(world)}/  (port {used} is in use)" in line for line in world.said)
        with pytest.raises(NetworkError, match="choose another one with --dashboard"):
            Coordinator(CONFIG, tmp_path / "other", "127.0.0.1:0", dashboard=f"127.0.0.1:{used}", run_job=FakeJobs(),
                        echo=lambda _: None).start()  # fmt: skip
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match="--dashboard 'nonsense' must look like HOST:PORT"):
        make_world().start(dashboard="nonsense")


def test_on_all_addresses_any_name_is_answered(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.start(dashboard="0.0.0.0:0")
    assert get(page_port(world), "/healthz", Host="desktop.lan")[0].status == 200
    assert any("WARNING: anybody who reaches" in line for line in world.said)


def test_the_invitation_is_shown_to_who_has_the_key_and_is_nowhere_else(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.start(dashboard=LOCAL, invite=3)
    (line,) = [said.partition(":  ")[2] for said in world.said if "to send to a friend" in said]
    (url,) = [said.split()[2] for said in world.said if said.startswith("to watch:")]
    key, port = url.partition("#")[2], page_port(world)
    assert Invitation.parse(line.split()[2]).addresses and line.startswith("forge-node join forge1_")
    for sent in ("", key, "Bearer ", f"Bearer {key[:-1]}", f"Bearer {key}x", "Bearer é"):
        answer, body = get(port, "/invitation", authorization=sent)
        assert answer.status == 403 and "forge1_" not in body
    answer, body = get(port, "/invitation", authorization=f"Bearer {key}")
    shown = json.loads(body)
    assert answer.status == 200 and shown["line"] == line and shown["svg"].startswith("<svg")
    secret = line.split()[2]
    assert all(secret not in get(port, path)[1] for path in ("/", "/metrics", "/healthz"))
    assert key not in (world.root / "coordinator.json").read_text()
    kept = [path for path in world.root.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert kept == []


def test_a_page_without_encryption_on_a_network_shows_no_invitation(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.start(dashboard="0.0.0.0:0", invite=1)
    assert get(page_port(world), "/invitation")[0].status == 404
    (url,) = [said for said in world.said if said.startswith("to watch:")]
    assert "#" not in url and any("to send to a friend" in said for said in world.said)


def test_off_means_that_its_libraries_are_not_even_imported(tmp_path: Path) -> None:
    code = ("import sys; from pathlib import Path; from coordinator.serve import Coordinator\n"
            "from tests.coordinator.fakes import CONFIG, FakeJobs\n"
            "with Coordinator(CONFIG, Path(sys.argv[1]), '127.0.0.1:0', dashboard='off', run_job=FakeJobs()): pass\n"
            "sys.exit(any(name in sys.modules for name in ('starlette', 'uvicorn', 'anyio', 'torch', 'pandas')))")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False).returncode == 0


def test_an_error_of_the_page_is_in_the_coordinators_log(world: World, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a mistake of ours")

    def log() -> str:
        return (world.root / "coordinator.log").read_text()

    assert world.coordinator is not None
    monkeypatch.setattr(world.coordinator._desk.state, "counts", fail)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.sendall(b"nonsense\r\n\r\n")
        assert b"400" in line.recv(1000)
    assert get(port, "/healthz")[0].status == 500
    until(lambda: "a mistake of ours" in log())
    assert "Invalid HTTP" not in log()
