"""The dashboard in a real browser: headless Chromium before a real coordinator, a node that lies, and a real node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import io
import json
import os
from pathlib import Path
import shutil
import socket
import subprocess
import sys
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
import psutil
import pytest
from safetensors.numpy import save
import zxingcpp

from coordinator.serve import Coordinator
from forge import pipeline
from forge.config import load_config
from forge.files import RunDirectory
from forge.vocabulary import STAGES
from tests.commands import write_inputs
from tests.coordinator.fakes import CONFIG, FakeJobs, FakeNode, until

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
#: Milliseconds that a step may take: a job imports torch first, on a machine that does other things.
PATIENCE = 240_000
OVERRIDES = ("fleet.lease_seconds=2", "train.expert.tokens=160000", "train.batch_size=1", "router.tokens=2000",
             "evaluation.tokens=4096")  # So many that contributions are measured after each shard.
EVIL_NAME = "<img src=x onerror=alert(1)>"
#: What Chromium itself says on the console while nobody listens at the address.
AWAY = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE")


class Fleet:
    """The commands of a coordinator and its nodes, on fixed ports."""

    def __init__(self, root: Path) -> None:
        self.root, self.run_dir = root, root / "run"
        self.address, self.page = (f"127.0.0.1:{_free_port()}" for _ in range(2))
        self._processes: list[subprocess.Popen[bytes]] = []

    def coordinator(self) -> subprocess.Popen[bytes]:
        return self._start("coordinator", "coordinator.cli", "serve", "--config", str(self.run_dir / "run.yaml"), "--run-dir",
                           str(self.run_dir), "--listen", self.address, "--dashboard", self.page)  # fmt: skip

    def node(self, name: str) -> subprocess.Popen[bytes]:
        made = subprocess.run([sys.executable, "-m", "coordinator.cli", "token", "create", "--run-dir", str(self.run_dir)],
                              capture_output=True, check=True, text=True)  # fmt: skip
        return self._start("node", "node.cli", "join", made.stdout.strip(), "--ram", "3G", "--threads", "1", "--name", name,
                           "--data-dir", str(self.root / "node"), "--nice", "0")  # fmt: skip

    def status(self) -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-m", "coordinator.cli", "status", "--run-dir", str(self.run_dir), "--json"],
                              capture_output=True, check=True)  # fmt: skip
        return dict(json.loads(done.stdout)["snapshot"])

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self, log: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.root / f"{log}.log", "ab") as file:
            process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=file, stderr=file,
                                       env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        self._processes.append(process)
        return process


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A run that is published: its stages ran here, so that torch is imported once for all of them."""
    write_inputs(tmp_path)
    run = RunDirectory.open(tmp_path / "run", load_config(str(tmp_path / "tiny.yaml"), OVERRIDES))
    for stage in STAGES:
        pipeline.run_stage({"run_dir": str(run.root), "stage": stage}, lambda **_: None, lambda: False)
    fleet = Fleet(tmp_path)
    try:
        yield fleet
    finally:
        fleet.close()


@pytest.fixture
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: install one, such as Debian's package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


class Watched:
    """A page, with everything that it asked for and complained about."""

    def __init__(self, page: Page) -> None:
        self.page, self.asked, self.complaints = page, list[str](), list[str]()
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(f"a dialog: {dialog.message}"))

    def cell(self, partition: int, shows: str) -> Any:
        return self.page.locator(f'.cell[data-partition="{partition}"][data-shows="{shows}"]')

    def sees(self, selector: str, text: str = "") -> None:
        found = self.page.locator(selector)
        expect(found.first).to_contain_text(text, timeout=PATIENCE) if text else found.first.wait_for(timeout=PATIENCE)

    def points(self, chart: str) -> int:
        counts = self.page.locator(f"#{chart} path").evaluate_all("paths => paths.map(path => +path.dataset.points)")
        return max(counts, default=0)

    def until_points(self, chart: str, more_than: int) -> int:
        self.page.wait_for_function(
            "([chart, least]) => [...document.querySelectorAll(`#${chart} path`)].some(path => path.dataset.points > least)",
            arg=[chart, more_than], timeout=PATIENCE)  # fmt: skip
        return self.points(chart)


@contextmanager
def _liar(fleet: Fleet) -> Iterator[FakeNode]:
    node = FakeNode(fleet.address, EVIL_NAME, fleet.run_dir)
    try:
        yield node
    finally:
        node.channel.close()


def test_the_operator_sees_the_invitation_and_its_code(tmp_path: Path, browser: Browser) -> None:
    said: list[str] = []
    with Coordinator(CONFIG, tmp_path / "run", "127.0.0.1:0", dashboard="127.0.0.1:0", invite=1, run_job=FakeJobs(),
                     echo=said.append):  # fmt: skip
        (url,) = [line.split()[2] for line in said if line.startswith("to watch:")]
        watched = Watched(browser.new_page(viewport={"width": 1200, "height": 900}))
        watched.page.goto(url)
        watched.sees("#join", "forge-node join forge1_")
        box = watched.page.locator("#qr svg").bounding_box()
        assert box is not None and box["width"] == box["height"] == 240
        picture = Image.open(io.BytesIO(watched.page.locator("#invite").screenshot()))
        assert [code.text for code in zxingcpp.read_barcodes(picture)] == [watched.page.locator("#join").inner_text()]
        if directory := os.environ.get("FORGE_SCREENSHOTS"):
            watched.page.screenshot(path=Path(directory) / "invitation.png", full_page=True)
        watched.page.goto(url.partition("#")[0] + "?anew")
        watched.sees("#foot")
        assert not watched.page.locator("#invite").is_visible() and watched.complaints == []


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_person_watches_a_run(fleet: Fleet, browser: Browser) -> None:
    coordinator = fleet.coordinator()
    _until_listening(fleet.page)
    watched = Watched(browser.new_page(viewport={"width": 1200, "height": 900}))
    watched.page.goto(f"http://{fleet.page}/")
    watched.sees("#phase", "Taking experts")
    assert watched.page.locator('.cell[data-shows="open"]').count() == 2
    watched.sees("#quality", "perplexity")
    watched.until_points("by-experts", 0)
    watched.sees("#topics li")
    watched.sees("#router rect")
    expect(watched.page.locator("#asked")).to_have_text("The model can be asked when the first shard is accepted.")
    assert watched.page.locator("#go").is_disabled()
    assert watched.complaints == []

    _hand_in_nonsense(fleet, watched)
    _restart(fleet, watched, coordinator)
    _train_one(fleet, watched)
    shown, told = watched.page.locator("#quality").inner_text(), fleet.status()["quality"]
    assert shown.startswith(f"{told['mean_perplexity']:.2f}") and told["experts"] == 1
    _ask(fleet, watched)
    for width, scheme in ((390, "dark"), (1200, "light")):
        watched.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        watched.page.set_viewport_size({"width": width, "height": 800})
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
    parts = ("", "page.css", "page.js", "prompt.js", "invite.js", "events", "prompt")
    assert {url.split("?")[0] for url in watched.asked} == {f"http://{fleet.page}/{part}" for part in parts}
    assert [complaint for complaint in watched.complaints if not any(word in complaint for word in AWAY)] == []


def _hand_in_nonsense(fleet: Fleet, watched: Watched) -> None:
    """A shard that is none is rejected, and the page says why; a name that is markup is a name."""
    with _liar(fleet) as liar:
        joined = liar.join()
        work = liar.lease(0)
        watched.cell(0, "leased").wait_for(timeout=PATIENCE)
        liar.hand_in(work, save({}, {"format": "pt"}), joined.run.run_id)
    watched.cell(0, "rejected").wait_for(timeout=PATIENCE)
    reason = watched.cell(0, "rejected").locator(".why").inner_text()
    assert reason == "; ".join(fleet.status()["experts"][0]["rejected"]) and len(reason) > 20
    assert watched.page.locator("#nodes td").first.inner_text() == EVIL_NAME
    assert watched.page.locator("img").count() == 0


def _restart(fleet: Fleet, watched: Watched, coordinator: subprocess.Popen[bytes]) -> None:
    assert watched.complaints == []
    coordinator.kill()
    coordinator.wait()
    watched.sees("#line.lost", "trying again")
    fleet.coordinator()
    watched.sees("#line.live")
    watched.sees("#phase", "Taking experts")
    assert watched.cell(0, "rejected").locator(".why").inner_text()


def _train_one(fleet: Fleet, watched: Watched) -> None:
    """The grid changes and the curves grow while a real node trains, until its expert is in the model."""
    before = watched.points("by-experts")
    fleet.node("laptop")
    watched.sees('.cell[data-shows="training"]', "laptop")
    seen = watched.until_points("losses", 0)
    watched.until_points("losses", seen)
    watched.sees('.cell[data-shows="accepted"]', "laptop")
    assert watched.until_points("by-experts", before) == before + 1
    watched.sees("#change", "below the shared components alone")


def _ask(fleet: Fleet, watched: Watched) -> None:
    """The model goes on with a text, each piece in its expert's colour; who trained that expert leads the board."""
    watched.sees("#contributors tbody .bar")
    (leader,) = fleet.status()["contributors"]
    watched.sees("#contributors tbody tr", "laptop")
    watched.sees("#contributors tbody tr", f"{leader['nats']:+.4f}")
    before = _coordinator_memory(fleet)
    watched.page.locator("#prompt").fill("The sail and the")
    watched.page.locator("#go").click()
    watched.sees("#go", "Stop")
    watched.sees("#answer .said")
    watched.sees("#asked", "token")
    watched.sees("#go", "Go on")
    pieces = watched.page.locator("#answer .said").evaluate_all(
        "spans => spans.map(span => [span.dataset.expert, getComputedStyle(span).backgroundColor])")  # fmt: skip
    assert len(pieces) == int(watched.page.locator("#asked").inner_text().split()[0]) > 8
    colours = dict(pieces)
    assert all(colours[expert] == colour for expert, colour in pieces) and len(set(colours.values())) == len(colours)
    topics = {str(topic["partition"]): topic["words"] for topic in fleet.status()["topics"]}
    for entry in watched.page.locator("#spoke > span").all():
        expert = str(entry.get_attribute("data-expert"))
        assert expert in colours and topics[expert][0] in entry.inner_text()
    assert watched.page.locator("#answer").inner_text().startswith("The sail and the")
    assert _coordinator_memory(fleet) - before < 20 << 20
    watched.page.locator("#go").click()
    watched.page.locator("#go", has_text="Stop").click()
    watched.sees("#asked", "Stopped.")
    watched.page.locator("#go", has_text="Go on").click()  # Waits until the stopped one has ended.
    watched.sees("#answer .said")
    watched.sees("#asked", "token")


def _coordinator_memory(fleet: Fleet) -> int:
    """Resident bytes of the coordinator's own process, which never imports torch."""
    return psutil.Process(json.loads((fleet.run_dir / "coordinator.json").read_text())["pid"]).memory_info().rss


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until_listening(address: str) -> None:
    host, port = address.split(":")

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    until(listening, 120)
