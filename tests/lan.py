"""A whole run across machines: the coordinator and three nodes in network namespaces that a bridge joins, as a switch would.

    python -m tests.lan [--run-dir DIRECTORY] [--set KEY=VALUE ...]

Nodes are started as `forge-node join`; they find the coordinator by multicast, and get the invitation typed at their prompt. It
ends with the model on a Hub (tests/fakes/hub.py) and the report of the run, and prints what every terminal showed: the
transcript in docs/across-machines.md. Needs Linux, root and the command `ip` (iproute2); the namespaces are its own, and the
network of the machine is left alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from forge.invitation import PREFIX
from tests.commands import arguments
from tests.fakes.hub import fake_hub

NODES = ("ada", "ben", "cleo")
REPO = "ada/lan"
#: What the run is scaled down by; with less training an expert is no better than the shared components, and refused.
SCALE = ("train.shared.tokens=250_000", "train.expert.tokens=100_000", "train.expert.learning_rate=0.002",
         "router.tokens=100_000", "evaluation.tokens=4_000", "evaluation.sample_tokens=16")  # fmt: skip
#: Seconds that anything here may take on a machine that does twenty other things.
DEADLINE = 3600.0


def missing() -> str:
    """Why namespaces cannot be had here; empty when they can."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need Linux, root and the command ip (iproute2)"
    name = f"forge-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return f"`ip netns add` does not work here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True)
class Machine:
    """A network namespace with one address on the network."""

    namespace: str
    name: str
    address: str

    def command(self, line: str) -> list[str]:
        """A command line of ours, to be run on this machine."""
        return ["ip", "netns", "exec", self.namespace, *arguments(line)]


@contextmanager
def network(*names: str) -> Iterator[list[Machine]]:
    """Machines on one switch, which is a bridge in a namespace of its own."""
    prefix = f"fl{os.getpid()}"
    switch, namespaces = f"{prefix}-switch", [f"{prefix}-{name}" for name in names]
    try:
        _ip(f"netns add {switch}")
        # Without snooping a bridge floods multicast, as a switch without a querier does.
        _ip("link add br0 type bridge mcast_snooping 0", switch)
        _ip("link set br0 up", switch)
        machines = []
        for index, (name, namespace) in enumerate(zip(names, namespaces, strict=True)):
            _ip(f"netns add {namespace}")
            _ip(f"link add port{index} type veth peer name eth0 netns {namespace}", switch)
            _ip(f"link set port{index} master br0 up", switch)
            _ip(f"address add 10.77.0.{index + 1}/24 dev eth0", namespace)
            _ip("link set eth0 up", namespace)
            _ip("link set lo up", namespace)
            machines.append(Machine(namespace, name, f"10.77.0.{index + 1}"))
        yield machines
    finally:
        for namespace in (*namespaces, switch):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def _ip(line: str, namespace: str = "") -> None:
    subprocess.run(["ip", *(("-n", namespace) if namespace else ()), *line.split()], check=True, capture_output=True)


@dataclass
class Terminal:
    """A command in a terminal of its own on a machine: what it shows is read, and what is typed is written."""

    machine: Machine
    line: str
    cwd: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        self._master, slave = os.openpty()
        # A terminal that cannot move its cursor gets plain lines.
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "120", "OMP_NUM_THREADS": "1", **self.environment}
        self.process = subprocess.Popen(self.machine.command(self.line), cwd=self.cwd, stdin=slave, stdout=slave, stderr=slave,
                                        env=environment, start_new_session=True)  # fmt: skip
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, words: str) -> None:
        """Wait until it has shown these words."""
        until(lambda: words in self.text or self.process.poll() is not None, f"{self.line!r} did not say {words!r}")
        assert words in self.text, f"{self.line!r} ended without {words!r}:\n{self.text}"

    def type(self, text: str) -> None:
        """Type a line."""
        os.write(self._master, text.encode() + b"\n")

    def end(self) -> int:
        """Wait for its end; the exit code."""
        until(lambda: self.process.poll() is not None, f"{self.line!r} did not end")
        self._reader.join(10.0)
        return int(self.process.returncode)

    def close(self) -> None:
        """End it however it is."""
        self.process.kill()
        self.process.wait()
        self._reader.join(10.0)
        os.close(self._master)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # Linux's way to say that the other end is closed.
                return
            self.text += data.decode(errors="replace").replace("\r\n", "\n")


def until(condition: Callable[[], bool], otherwise: str) -> None:
    """Wait for another process."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(otherwise)
        time.sleep(0.05)


@contextmanager
def terminals() -> Iterator[Callable[..., Terminal]]:
    """Opens terminals, and ends what still runs in them."""
    with ExitStack() as stack:
        def open_terminal(machine: Machine, line: str, cwd: Path, **environment: str) -> Terminal:
            terminal = Terminal(machine, line, cwd, environment)
            stack.callback(terminal.close)
            return terminal

        yield open_terminal


@contextmanager
def hub_on(machine: Machine, directory: Path) -> Iterator[str]:
    """A Hub on a machine; its endpoint. What was pushed lies in `directory/model` afterwards."""
    command = ["ip", "netns", "exec", machine.namespace, sys.executable, "-m", "tests.lan", "--hub", str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.communicate()


def _serve_hub(directory: Path) -> None:
    """The process of `hub_on`: serves until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with fake_hub() as hub:
        print(hub.endpoint, flush=True)
        sys.stdin.read()
        if REPO in hub.repos:
            hub.materialise(REPO, hub.repos[REPO].head, directory / "model")


def run(directory: Path, overrides: Sequence[str] = SCALE) -> list[Terminal]:
    """The whole run below a directory; the terminals, closed: the coordinator's, then the nodes'."""
    with network("coordinator", *NODES) as (home, *others), hub_on(home, directory) as endpoint, terminals() as open_terminal:
        coordinator = open_terminal(
            home, f"forge-coordinator serve --config smoke --listen 0.0.0.0:7433 --push {REPO} --exit-when-done "
            + " ".join(overrides), directory, HF_ENDPOINT=endpoint, HF_TOKEN="hf_any", HF_HUB_DISABLE_XET="1",
            HF_HOME=str(directory / "hf"))  # fmt: skip
        coordinator.wait_for("announced on this network")
        invitation = next(word for word in coordinator.text.split() if word.startswith(PREFIX))
        nodes = [open_terminal(machine, f"forge-node join --ram 1G --threads 1 --nice 0 --name {machine.name}", directory,
                               FORGE_DATA_DIR=str(directory / machine.name)) for machine in others]  # fmt: skip
        for node in nodes:
            node.wait_for("(not shown)")
            node.type(invitation)
        assert coordinator.end() == 0, coordinator.text
        for node in nodes:
            assert node.end() == 0, node.text
            assert "at 10.77.0.1:7433" in node.text and invitation not in node.text
    return [coordinator, *nodes]


def main() -> int:
    """Run it, check what came out, and print what everybody saw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, help="where to work; a temporary directory when not given")
    parser.add_argument("--set", nargs="*", default=list(SCALE), metavar="KEY=VALUE", help="instead of what scales it down")
    parser.add_argument("--hub", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hub is not None:
        _serve_hub(options.hub)
        return 0
    if why := missing():
        print(f"skipped: {why}", file=sys.stderr)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Namespaces and processes are ended then, too.
    with tempfile.TemporaryDirectory() as temporary:
        directory = (options.run_dir or Path(temporary)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        shown = run(directory, options.set)
        seconds = time.monotonic() - began
        for terminal in shown:
            text = re.sub(rf"({PREFIX}|/#)\S+", r"\1...", terminal.text)
            print(f"\n--- {terminal.machine.name} ({terminal.machine.address})\n$ {terminal.line}\n{text}", end="")
        for line in (f"forge verify {directory / 'model'}", "forge report runs/smoke"):
            done = subprocess.run(arguments(line), cwd=directory, capture_output=True, text=True)
            print(f"\n$ {line}\n{done.stdout}{done.stderr}", end="")
            if done.returncode:
                return done.returncode
        print(f"\nfrom nothing to a pushed model on four machines in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
