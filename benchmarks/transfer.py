"""Uploads and downloads against a bare gRPC stream of the same bytes, and what many uploads at once cost the coordinator.

    python -m benchmarks.transfer
    python -m benchmarks.transfer --mb 4 --rounds 1 --uploads 4

The coordinator is a process with all that a node meets (TLS, the gate, SQLite, files, hashes); nothing is trained, so it is
held in its first stage while its leases and its blobs, which are random, are there. The nodes use the node's own client. Both
ways are timed until the bytes lie in a file, checked against their hash and synced. A round's files are deleted after it, so
that all rounds but the first, which is not counted, write into memory that the machine has already.

The bare stream is gRPC's Python library and nothing else: messages of the same size made of one block of memory and thrown away
by who gets them, over the same TLS, with the same options, in processes of their own. The kept stream is the same, but who
gets it writes it into a file, hashes it (SHA-256) and syncs: the least that a transfer can do. All are taken in turns; medians
are shown.

Ends with exit status 1 when a transfer is slower than 70 % of the kept stream, or the coordinator's resident memory grows by more
than 300 MB while all uploads run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
import hashlib
import os
from pathlib import Path
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import grpc

from benchmarks.common import heading
from coordinator import invite
from coordinator.addresses import bind
from coordinator.authority import Authority
from coordinator.serve import _SERVER_OPTIONS, Coordinator
from forge.config import RunConfig, load_config, parse_config
from forge.files import BlobStore, RunDirectory, hash_file
from forge.invitation import Invitation
from forge.system import peak_resident_bytes_of, resident_bytes_of
from forge.vocabulary import CHUNK_BYTES
from node.client import FleetClient
from node.connection import open_channel
from node.identity import Identity
from node.link import Link
from node.machine import MachineProfile
from node.messages import Assignment, Blob

MB = 1 << 20
#: The share of the bare stream's speed, and the memory in MB, that are promised.
SPEED, MEMORY_MB = 0.70, 300
BARE, KEPT = "/bare.Bytes/", "kept"
#: Processes that the nodes of the second part are threads of.
SENDERS = 2
#: Seconds between two looks at the coordinator's memory.
LOOK_SECONDS = 0.05


def main() -> int:
    """Measure both parts and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=100, help="size of every transfer")
    parser.add_argument("--rounds", type=int, default=7, help="transfers of each kind that the medians are of")
    parser.add_argument("--uploads", type=int, default=64, help="uploads at once in the second part")
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        children: dict[str, Callable[..., int]] = {"coordinator": _coordinate, "bare": _serve_bare, "send": _send}
        return children[options.child[0]](*options.child[1:])
    with tempfile.TemporaryDirectory(prefix="forge-transfer-") as directory:
        rows, failed = _measure(Path(directory), options.mb * MB, options.rounds, options.uploads)
    print("\n".join(rows))
    if options.output is not None:
        head = heading("Transfers", "transfer") + "\n"
        options.output.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    return int(failed)


def _measure(root: Path, size: int, rounds: int, uploads: int) -> tuple[list[str], bool]:
    run = RunDirectory.open(root / "run", _config(size, uploads + 1))
    _publish(run, size, uploads + 1)
    with ExitStack() as end:
        coordinator, address = end.enter_context(_child("coordinator", str(run.root)))
        _, bare_address = end.enter_context(_child("bare", str(run.root)))
        text, _ = invite.create_token(run.root, uses=uploads + 1, expires="1h", name="", addresses=[address])
        rows, slow = _speeds(root, run.blobs, text, bare_address, Authority(run.root).ca_pem, size, rounds)
        memory, large = _crowd(root, text, coordinator.pid, size, uploads)
    return [*rows, "", *memory], slow or large


# --- the speed of one transfer --------------------------------------------------------------------------------------


def _speeds(root: Path, store: BlobStore, invitation: str, bare_address: str, ca: bytes, size: int,
            rounds: int) -> tuple[list[str], bool]:  # fmt: skip
    channel = open_channel(bare_address, ca)
    client, assignment = _join(root / "node", invitation)
    shard = _random(root / "shard", size)
    sha256, target, kept = hash_file(shard), root / "blob", root / "kept"

    kinds: dict[str, Callable[[], object]] = {
        "bare up": lambda: _bare_up(channel, size, "Up"), "kept up": lambda: _bare_up(channel, size, "UpKept"),
        "up": lambda: client.upload(assignment.lease_id, sha256, shard),
        "bare down": lambda: _bare_down(channel, size), "kept down": lambda: _bare_down(channel, size, kept),
        "down": lambda: client.fetch_blob(assignment.shared.sha256, size, target)}  # fmt: skip
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, transfer in kinds.items():
            began = time.perf_counter()
            transfer()
            if number:  # Before the first round the machine may not have the memory yet that its cache of files takes.
                taken[kind].append(time.perf_counter() - began)
        for file in (store.path(sha256), target, kept, store.directory / KEPT):
            file.unlink()
    client.close()
    speed = {kind: size / MB / statistics.median(seconds) for kind, seconds in taken.items()}
    ratios = {f"{stream} {kind}": statistics.median(
        theirs / ours for theirs, ours in zip(taken[f"{stream} {kind}"], taken[kind], strict=True))
        for kind in ("up", "down") for stream in ("bare", "kept")}  # fmt: skip
    rows = [f"{size / MB:.0f} MB at a time in messages of {CHUNK_BYTES >> 10} KB, MB/s, medians of {rounds}.", "",
            "| | ours | bare stream | ratio | kept stream | ratio |", "|" + "---|" * 6]  # fmt: skip
    rows += [f"| {name} | {speed[kind]:.0f} | {speed[f'bare {kind}']:.0f} | {ratios[f'bare {kind}']:.2f} | "
             f"{speed[f'kept {kind}']:.0f} | {ratios[f'kept {kind}']:.2f} |"
             for name, kind in (("upload", "up"), ("download", "down"))]  # fmt: skip
    return rows, min(ratios["kept up"], ratios["kept down"]) < SPEED


def _bare_up(channel: grpc.Channel, size: int, method: str) -> None:
    block = os.urandom(CHUNK_BYTES)
    call: Any = channel.stream_unary(BARE + method, None, None)
    assert int(call(block for _ in range(0, size, CHUNK_BYTES))) == size


def _bare_down(channel: grpc.Channel, size: int, target: Path | None = None) -> None:
    call: Any = channel.unary_stream(BARE + "Down", None, None)
    chunks = call(str(size).encode())
    assert (sum(map(len, chunks)) if target is None else _keep(chunks, target)) == size


def _keep(chunks: Iterable[bytes], target: Path) -> int:
    digest = hashlib.sha256()
    with open(target, "wb", buffering=0) as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        os.fsync(file.fileno())
    return target.stat().st_size


# --- many uploads at once -------------------------------------------------------------------------------------------


def _crowd(root: Path, invitation: str, pid: int, size: int, uploads: int) -> tuple[list[str], bool]:
    shares = [str(len(range(first, uploads, SENDERS))) for first in range(min(SENDERS, uploads))]
    senders = [subprocess.Popen([sys.executable, "-m", "benchmarks.transfer", "--child", "send", str(root / f"senders-{number}"),
                                 invitation, str(size), share], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for number, share in enumerate(shares)]  # fmt: skip
    try:
        for sender in senders:
            assert sender.stdout is not None and sender.stdout.readline() == "ready\n"
        idle = peak = resident_bytes_of(pid)
        before, began = peak_resident_bytes_of(pid), time.perf_counter()
        for sender in senders:
            assert sender.stdin is not None
            sender.stdin.close()
        while any(sender.poll() is None for sender in senders):
            peak = max(peak, resident_bytes_of(pid))
            time.sleep(LOOK_SECONDS)
        seconds = time.perf_counter() - began
        if (highest := peak_resident_bytes_of(pid)) > before:
            peak = highest  # As the kernel keeps it: no look can miss it.
        codes = [sender.returncode for sender in senders]
        if any(codes):
            raise SystemExit(f"Senders ended with exit statuses {codes}.")
    finally:
        for sender in senders:
            sender.kill()
    grown = (peak - idle) / MB
    return [f"{uploads} uploads of {size / MB:.0f} MB at once:", "", "| | |", "|---|---|",
            f"| all of them | {uploads * size / MB / seconds:.0f} MB/s |", f"| coordinator, idle | {idle / MB:.0f} MB |",
            f"| coordinator, at most | {peak / MB:.0f} MB, {grown:.0f} more |"], grown > MEMORY_MB  # fmt: skip


def _send(directory: str, invitation: str, size: str, uploads: str) -> int:
    """Join with so many nodes, and upload with all of them at once when standard input ends."""
    root = Path(directory)
    nodes = [_join(root / f"node-{number}", invitation) for number in range(int(uploads))]
    files = [_random(root / f"shard-{number}", int(size)) for number in range(len(nodes))]
    hashes = [hash_file(file) for file in files]
    print("ready", flush=True)
    sys.stdin.read()

    def upload(number: int) -> None:
        client, assignment = nodes[number]
        client.upload(assignment.lease_id, hashes[number], files[number])

    with ThreadPoolExecutor(len(nodes)) as pool:
        list(pool.map(upload, range(len(nodes))))
    return 0


# --- both ends ------------------------------------------------------------------------------------------------------


def _config(size: int, experts: int) -> RunConfig:
    """A model whose shards have `size` bytes or a little more."""
    config = load_config("default", [f"model.n_experts={experts}"])
    layer = config.model.expert_parameters // config.model.n_layers * 4
    tree = config.model_dump()
    return parse_config(tree | {"model": tree["model"] | {"n_layers": -(-size // layer)}})


def _publish(run: RunDirectory, size: int, partitions: int) -> None:
    """Publish random bytes as shared components and as text."""
    large, small = ({"sha256": run.blobs.adopt(_random(run.work / "blob", some)), "size": some} for some in (size, 1000))
    parts = [{"partition": number, "tokens": 1000, "train": small} for number in range(partitions)]
    run.finish("publish", {"run_id": run.run_id, "config_fingerprint": run.config.fingerprint, "shared": large,
                           "shared_ffn": small, "partitions": parts})  # fmt: skip


def _random(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for begin in range(0, size, MB):
            file.write(os.urandom(min(MB, size - begin)))
        file.flush()
        os.fsync(file.fileno())
    return path


def _join(directory: Path, invitation: str) -> tuple[FleetClient, Assignment]:
    """A node that holds a lease."""
    directory.mkdir(parents=True, exist_ok=True)
    link = Link(None, data_dir=directory, invitation=Invitation.parse(invitation))
    client = FleetClient(link, identity=Identity.open(directory), name=directory.name, ram_bytes=1 << 30,
                         on_wait=lambda sentence: print(sentence, file=sys.stderr))  # fmt: skip
    client.join(MachineProfile.measure("cpu"))
    answer = client.lease([])
    assert isinstance(answer, Assignment) and isinstance(answer.shared, Blob), answer
    return client, answer


@contextmanager
def _child(role: str, root: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.transfer", "--child", role, root], stdout=subprocess.PIPE,
                               text=True)  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise SystemExit(f"The {role} ended with exit status {process.wait()}.")
        yield process, address
    finally:
        process.kill()
        process.wait()


def _coordinate(root: str) -> int:
    """The coordinator, held in its first stage."""
    began, held = threading.Event(), threading.Event()

    def hold(name: str, arguments: dict[str, Any], on_progress: Any) -> dict[str, Any]:
        began.set()
        held.wait()
        return {}

    run = RunDirectory(Path(root))
    with Coordinator(run.config, run.root, "127.0.0.1:0", run_job=hold, echo=lambda line: None) as coordinator:
        began.wait()  # The stage must have been entered before another one is.
        desk = coordinator._desk
        desk.state.open_partitions(desk.publication.facts["partitions"])
        desk.activity.enter("experts")
        print(coordinator.address, flush=True)
        signal.pause()
    return 0


def _serve_bare(root: str) -> int:
    """Streams of bytes, over the same TLS."""
    def up(requests: Iterator[bytes], context: Any) -> bytes:
        return str(sum(map(len, requests))).encode()

    def down(request: bytes, context: Any) -> Iterator[bytes]:
        block = os.urandom(CHUNK_BYTES)
        return (block for _ in range(0, int(request), CHUNK_BYTES))

    def up_kept(requests: Iterator[bytes], context: Any) -> bytes:
        return str(_keep(requests, RunDirectory(Path(root)).blobs.directory / KEPT)).encode()

    server = grpc.server(ThreadPoolExecutor(4), options=_SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bytes", {
        "Up": grpc.stream_unary_rpc_method_handler(up), "UpKept": grpc.stream_unary_rpc_method_handler(up_kept),
        "Down": grpc.unary_stream_rpc_method_handler(down)}),))  # fmt: skip
    port = bind(server, "127.0.0.1", 0, Authority(Path(root), "127.0.0.1").credentials())
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
