"""A coordinator under a whole fleet: how fast it answers heartbeats, what it holds, and how many shards a minute it takes.

    python -m benchmarks.fleet                            # 1,000 nodes, ten minutes
    python -m benchmarks.fleet --nodes 100 --seconds 60

The coordinator is `forge-coordinator serve` as it is, with its dashboard, which one page watches. Every node is the node
package's own `Agent` with a key, an invitation, a TLS connection and a data directory of its own, as a thread of one of a few
processes: it joins, leases, downloads, sends heartbeats as often as it is asked to, uploads, commits and asks for verdicts.

Two things are not as on a thousand machines. Training takes turns: one node trains at a time, in a real child process, one every
`--train-every` seconds, and until its turn a node that holds a lease reports steps of a training that stands still. And
everything, the nodes too, runs on this machine, so the latencies are upper bounds: they are taken in the nodes, around the call.

The text is Python's own standard library in `--partitions` random parts, the model as small as it can be. What is judged and
evaluated costs as much as it does there, which is the table's last part: shards wait for their verdict, heartbeats for nothing.
Ends with exit status 1 when a call failed or the 99th percentile of a heartbeat is above 100 ms.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO, Any
import urllib.request

from benchmarks.common import heading
from forge.config import DataConfig, parse_config
from forge.data.sources import documents
from forge.files import read_json
from forge.invitation import Invitation
from forge.jobs import Job
from forge.system import resident_bytes_of
from node.agent import Agent
from node.client import FleetClient
from node.console import Console
from node.guest import Guest
from node.heartbeat import Heartbeats
from node.identity import Identity
from node.link import Link
from node.machine import MachineProfile
from node.messages import Order, Progress
from node.rules import Rules
from node.senses import Senses
from node.worker import RunningJob, Trained, Worker

MB = 1 << 20
RAM_BYTES = 1 << 30
#: The 99th percentile, in milliseconds, of a heartbeat that is promised.
HEARTBEAT_MS = 100.0
#: Nodes that start in a second.
RAMP = 20
#: Seconds between two looks at the coordinator's resident memory.
LOOK_SECONDS = 2.0
#: Seconds between two steps that a node reports while it waits for its turn to train.
STEP_SECONDS = 10.0
#: Documents a partition and characters a document: enough that every partition has one in each split.
DOCUMENTS, CHARACTERS = 8, 120
#: Seconds that the stages before the first lease may take: some for each partition.
PREPARE_SECONDS = 600


def main() -> int:
    """Run the coordinator and the fleet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to measure, once every node has its answer")
    parser.add_argument("--partitions", type=int, help="default: one a node")
    parser.add_argument("--processes", type=int, default=4, help="processes that the nodes are threads of")
    parser.add_argument("--train-every", type=float, default=10.0, help="seconds between two trainings that begin")
    parser.add_argument("--lease-seconds", type=float, default=120.0, help="a node sends four heartbeats in this time")
    parser.add_argument("--directory", type=Path, help="where the run is kept, and gone on with; default: nowhere")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share is not None:
        return _share(json.loads(options.share))
    with ExitStack() as end:
        root = options.directory or Path(end.enter_context(tempfile.TemporaryDirectory(prefix="forge-fleet-")))
        rows, failed = _measure(root.absolute(), options)
    print("\n".join(rows))
    if options.output is not None:
        head = heading("A fleet", "fleet") + "\n"
        options.output.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    return int(failed)


def _measure(root: Path, options: argparse.Namespace) -> tuple[list[str], bool]:
    partitions = options.partitions or options.nodes
    root.mkdir(parents=True, exist_ok=True)
    config = _write_run(root, partitions, options.lease_seconds)
    with _coordinator(root, config) as coordinator, ExitStack() as end:
        invitation = _invitation(root / "run", options.nodes)
        shares = [subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fleet", "--share", json.dumps({
                "first": first, "nodes": options.nodes, "step": options.processes, "invitation": invitation,
                "root": str(root), "train_every": options.train_every})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(root / f"share-{first}.log", "w"),  # noqa: SIM115
            text=True) for first in range(options.processes)]  # fmt: skip
        for share in shares:
            end.callback(share.kill)
        began = time.monotonic()
        for share in shares:
            _expect(share, "ready")
        joined = time.monotonic() - began
        print(f"{options.nodes} nodes have their answers after {joined:.0f} s", flush=True)
        for share in shares:
            _say(share, "begin")
        watcher = _Page(read_json(root / "run" / "coordinator.json")["dashboard"])
        before, memory, cpu = _counts(root), [], _cpu_seconds(coordinator.pid)
        began = time.monotonic()
        while (seconds := time.monotonic() - began) < options.seconds:
            memory.append((seconds, resident_bytes_of(coordinator.pid) / MB))
            if coordinator.poll() is not None:
                raise SystemExit(f"The coordinator ended with exit status {coordinator.returncode}: {root}/coordinator.txt")
            time.sleep(min(LOOK_SECONDS, max(0.1, options.seconds - seconds)))
        cpu = _cpu_seconds(coordinator.pid) - cpu
        for share in shares:
            _say(share, "end")
        found = [json.loads(_line(share)) for share in shares]
        after = _counts(root)
    times: dict[str, list[float]] = defaultdict(list)
    for share_found in found:
        for call, taken in share_found["times"].items():
            times[call] += taken
    troubles = [trouble for share_found in found for trouble in share_found["troubles"]]
    rows = [f"{options.nodes:,} nodes, {partitions:,} partitions, measured for {seconds:.0f} s; a heartbeat every "
            f"{options.lease_seconds / 4:.0f} s.", "",
            "| call | calls | a second | median ms | p99 ms | slowest ms |", "|" + "---|" * 6]  # fmt: skip
    for call, taken in sorted(times.items()):
        ranked = sorted(taken)
        rows.append(f"| {call} | {len(ranked):,} | {len(ranked) / seconds:.1f} | {_at(ranked, 0.5):.1f} | "
                    f"{_at(ranked, 0.99):.1f} | {ranked[-1]:.1f} |")  # fmt: skip
    part = max(1, len(memory) // 5)
    first, last = (sorted(size for _, size in some)[part // 2] for some in (memory[:part], memory[-part:]))
    rows += ["", "| | |", "|---|---|", f"| failed or repeated calls | {len(troubles)} |",
             f"| all nodes joined and answered in | {joined:.0f} s |",
             f"| coordinator: processor | {cpu / seconds:.1%} of one |",
             f"| coordinator: memory in the first fifth, the last, at most | {first:.0f}, {last:.0f}, "
             f"{max(size for _, size in memory):.0f} MB |",
             f"| events that the dashboard's page got | {watcher.events} |",
             *(f"| shards {name} | {after[name] - before[name]} ({(after[name] - before[name]) * 60 / seconds:.1f} a minute) |"
               for name in after)]  # fmt: skip
    for trouble in troubles[:10]:
        print(f"trouble: {trouble}", file=sys.stderr)
    return rows, bool(troubles) or not times["heartbeat"] or _at(sorted(times["heartbeat"]), 0.99) > HEARTBEAT_MS


# --- the coordinator ------------------------------------------------------------------------------------------------


def _write_run(root: Path, partitions: int, lease_seconds: float) -> Path:
    """The corpus and the config of the smallest run with so many partitions."""
    text = "\n".join(text for text, *_ in documents(DataConfig(source="python-stdlib")))
    corpus, path = root / "corpus.jsonl", root / "fleet.yaml"
    corpus.write_text("".join(json.dumps({"text": text[at : at + CHARACTERS]}) + "\n" for at in range(
        0, DOCUMENTS * partitions * CHARACTERS, CHARACTERS)), encoding="utf-8")  # fmt: skip
    path.write_text(parse_config({
        "name": "fleet", "data": {"source": str(corpus), "validation_fraction": 0.2, "test_fraction": 0.2},
        "model": {"vocab_size": 300, "d_model": 16, "d_ff": 64, "n_layers": 1, "n_heads": 2, "head_dim": 8,
                  "n_experts": partitions, "top_k": min(2, partitions), "max_seq_len": 64},
        "partition": {"method": "random"}, "router": {"tokens": 64 * partitions},
        "train": {"batch_size": 8, "shared": {"tokens": 8192, "learning_rate": 0.006},
                  "expert": {"tokens": 1024, "learning_rate": 0.003}},
        # Documents of some 60 tokens say little, and whether a shard is good is not the question here.
        "assembly": {"slice_tokens": 64, "margin": 0.0, "tolerance": 100.0},
        "evaluation": {"tokens": 64, "samples": 0}, "fleet": {"lease_seconds": lease_seconds}}).to_yaml())  # fmt: skip
    return path


@contextmanager
def _coordinator(root: Path, config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A coordinator that gives leases out."""
    run, printed = root / "run", root / "coordinator.txt"
    with open(printed, "wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "coordinator.cli", "serve", "--config", str(config), "--run-dir",
                                    str(run), "--listen", "127.0.0.1:0", "--dashboard", "127.0.0.1:0"],
                                   stdout=file, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        deadline = time.monotonic() + PREPARE_SECONDS
        while "nodes can train experts now" not in printed.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"The coordinator has not begun to give leases out:\n{printed.read_text()}")
            time.sleep(0.2)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


def _invitation(run: Path, uses: int) -> str:
    made = subprocess.run([sys.executable, "-m", "coordinator.cli", "token", "create", "--run-dir", str(run), "--uses",
                           str(uses)], stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    found = re.search(r"forge1_\S+", made.stdout)
    assert found is not None, made.stdout
    return found[0]


def _counts(root: Path) -> dict[str, int]:
    """How many shards were handed in, accepted and rejected so far, by the run's journal."""
    events = [json.loads(line)["event"] for line in (root / "run" / "events.jsonl").read_text().splitlines()]
    return {"handed in": len(set(_handed_in(root))), "accepted": events.count("accepted"), "rejected": events.count("rejected"),
            "followed by an evaluation": events.count("evaluated")}  # fmt: skip


def _handed_in(root: Path) -> Iterator[str]:
    for line in (root / "run" / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "uploaded":
            yield event["sha256"]


def _cpu_seconds(pid: int) -> float:
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


class _Page:
    """Reads what the dashboard sends to a page, in a thread."""

    def __init__(self, address: str) -> None:
        self.events = 0
        self._stream: IO[bytes] = urllib.request.urlopen(address.rstrip("/") + "/events", timeout=30)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._stream:
            self.events += line.startswith(b"data:")


# --- the nodes ------------------------------------------------------------------------------------------------------


class Notes:
    """What the nodes of one process note; safe from any thread."""

    def __init__(self) -> None:
        self.lock, self.recording = threading.Lock(), False
        self.times: dict[str, list[float]] = defaultdict(list)
        self.troubles: list[str] = []
        self.answered: set[str] = set()

    def trouble(self, sentence: str) -> None:
        """A call failed, or is about to be made again."""
        with self.lock:
            self.troubles.append(sentence)


class TimedClient(FleetClient):
    """The node's client; what its small calls take, retries included, is noted in milliseconds."""

    def __init__(self, notes: Notes, link: Link, **more: Any) -> None:
        super().__init__(link, on_wait=notes.trouble, **more)
        self._notes = notes

    def _timed(self, name: str, call: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        answer = call(*arguments)
        taken = 1000 * (time.perf_counter() - began)
        with self._notes.lock:
            self._notes.answered.add(self._name)
            if self._notes.recording:
                self._notes.times[name].append(round(taken, 2))
        return answer

    def lease(self, preferred_partitions: list[int]) -> Any:
        """Timed."""
        return self._timed("lease", super().lease, preferred_partitions)

    def heartbeat(self, lease_id: str, progress: Progress) -> tuple[Order, str]:
        """Timed; a failure is noted, since the agent only says it to its owner."""
        try:
            beat: tuple[Order, str] = self._timed("heartbeat", super().heartbeat, lease_id, progress)
            return beat
        except Exception as error:
            self._notes.trouble(f"heartbeat: {error}")
            raise

    def open_upload(self, lease_id: str, sha256: str, size: int, checkpoint: bool = False) -> Any:
        """Timed."""
        return self._timed("open upload", super().open_upload, lease_id, sha256, size, checkpoint)

    def commit(self, lease_id: str, sha256: str, manifest: bytes, signature: bytes) -> Any:
        """Timed."""
        return self._timed("commit", super().commit, lease_id, sha256, manifest, signature)


class PatientWorker(Worker):
    """Trains when it is this node's turn, and reports a training that stands still until then."""

    def __init__(self, turn: Turn, console: Console) -> None:
        super().__init__(console, ram_bytes=RAM_BYTES, threads=1, device="cpu", run_job=_train)
        self._turn = turn

    def train(self, assignment: dict[str, Any], work_dir: Path, beats: Heartbeats, predicted: int) -> Trained:
        """Wait, then train."""
        step = 0
        while not self._turn.take():
            if beats.order is not Order.CONTINUE:
                return Trained(order=beats.order)
            step += 1
            beats.update(Progress(activity="training", step=step, steps=10_000, loss=5 + 1 / step, tokens_per_second=100.0,
                                  resident_bytes=200 * MB))  # fmt: skip
            time.sleep(STEP_SECONDS)
        try:
            return super().train(assignment, work_dir, beats, predicted)
        finally:
            self._turn.give()


def _train(arguments: dict[str, Any], threads: int, log: Path, ram_bytes: int) -> RunningJob:
    return Job("train-expert", arguments, threads=threads, log=log)  # No limit: the clock of a watchdog for each is too much.


class Turn:
    """Whose turn it is to train, among all processes; one begins every so many seconds at most."""

    def __init__(self, path: Path, every: float) -> None:
        self._path, self._every = path, every

    def take(self) -> bool:
        """Whether it is the caller's turn, which lasts until `give`."""
        try:
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        begun = self._path.with_suffix(".begun")
        if begun.exists() and time.time() - begun.stat().st_mtime < self._every:
            self.give()
            return False
        begun.touch()
        return True

    def give(self) -> None:
        """Let the next one train."""
        self._path.unlink()


def _share(facts: dict[str, Any]) -> int:
    """One process's share of the nodes, until the parent has heard what they noted."""
    threading.stack_size(512 << 10)
    notes, root = Notes(), Path(facts["root"])
    machine, turn = MachineProfile.measure("cpu"), Turn(root / "turn", facts["train_every"])
    numbers = range(facts["first"], facts["nodes"], facts["step"])
    console = Console(open(os.devnull, "w"), live=False)  # noqa: SIM115
    began = time.monotonic()
    for number in numbers:
        time.sleep(max(0.0, began + number / RAMP - time.monotonic()))
        threading.Thread(target=_node, args=(number, facts, notes, machine, turn, console), daemon=True).start()
    while len(notes.answered) < len(numbers) and not notes.troubles:
        time.sleep(0.1)
    print("ready", flush=True)
    for line in sys.stdin:
        with notes.lock:
            notes.recording = line.strip() == "begin"
            if not notes.recording:
                print(json.dumps({"times": notes.times, "troubles": notes.troubles}), flush=True)
                os._exit(0)
    os._exit(1)


def _node(number: int, facts: dict[str, Any], notes: Notes, machine: MachineProfile, turn: Turn, console: Console) -> None:
    try:
        directory, name = Path(facts["root"]) / "nodes" / f"{number:05d}", f"node-{number:05d}"
        directory.mkdir(parents=True, exist_ok=True)
        identity = Identity.open(directory)
        link = Link(None, data_dir=directory, invitation=Invitation.parse(facts["invitation"]))
        client = TimedClient(notes, link, identity=identity, name=name, ram_bytes=RAM_BYTES)
        Agent(client=client, identity=identity, machine=machine, worker=PatientWorker(turn, console), console=console,
              data_dir=directory, name=name, ram_bytes=RAM_BYTES, sleep=time.sleep,
              guest=Guest(Rules(on_battery=True), Senses())).run()  # fmt: skip
    except Exception as error:
        notes.trouble(f"node {number}: {type(error).__name__}: {error}")


def _say(share: subprocess.Popen[str], word: str) -> None:
    assert share.stdin is not None
    share.stdin.write(word + "\n")
    share.stdin.flush()


def _line(share: subprocess.Popen[str]) -> str:
    assert share.stdout is not None
    return share.stdout.readline()


def _expect(share: subprocess.Popen[str], word: str) -> None:
    said = _line(share).strip()
    if said != word:
        raise SystemExit(f"A process of nodes ended with exit status {share.wait()} after {said!r}.")


def _at(ranked: list[float], share: float) -> float:
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


if __name__ == "__main__":
    sys.exit(main())
