"""A coordinator process: opens the run, answers nodes, and works through the phases until it is stopped or done.

Killed at any instant and started with the same command, it goes on: the run directory's markers and the database are
all it needs to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
import logging
from logging.handlers import RotatingFileHandler
import os
from pathlib import Path
import shlex
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

import grpc

from coordinator.activity import Activity
from coordinator.addresses import bind, check_free, invitation_addresses, is_loopback, parse_listen
from coordinator.admin import INFO_FILE, SECRET_FILE
from coordinator.assembler import Assembler
from coordinator.audits import Audits
from coordinator.auth import Credentials
from coordinator.authority import Authority
from coordinator.blobs import Uploads, largest_shard
from coordinator.console import watching
from coordinator.curves import Curves
from coordinator.gate import Gate
from coordinator.handlers import Desk
from coordinator.invite import create_token, join_line
from coordinator.jobs import GRACE_SECONDS, JobRunner, RunJob
from coordinator.journal import Journal, print_line, time_of_day
from coordinator.phases import Work
from coordinator.publication import Publication
from coordinator.push import check_repo, pusher
from coordinator.quotas import Limits, Quotas
from coordinator.servicer import register
from coordinator.snapshot import Json, Snapshots
from coordinator.state import State
from forge.checkpoint.handover import largest_checkpoint
from forge.config import RunConfig
from forge.errors import ConfigError, NetworkError, StorageError, storage_errors
from forge.files import RunDirectory, claimed, write_json
from forge.lan import Announcement, announced, shown
from forge.live import LogFormat, Output
from forge.system import peak_resident_bytes
from forge.tracking import tracking
from forge.vocabulary import CHUNK_BYTES

if TYPE_CHECKING:
    from coordinator.dashboard.server import Dashboard

#: Calls answered at the same time; a transfer takes one for as long as it lasts, and there are fewer of those
#: (`Limits.transfers`), so that a small call never waits for the end of a large one.
WORKERS = 192
#: Seconds that calls get to end when the coordinator is stopped.
CALL_GRACE_SECONDS = 1.0
#: Seconds, at most, that a finished coordinator stays so that waiting nodes hear that nothing is left to do: longer than the
#: longest pause of a node that found it away.
FAREWELL_SECONDS = 20.0
#: Seconds after an answer in which a node that did not get it has asked again.
ANSWER_SECONDS = 2.0
#: A node that was seen within so many seconds, or within as many before the coordinator was killed, is still waited for: it may
#: not have found its way back.
LATELY_SECONDS = 60.0
#: How long the invitation is good that is printed at the start.
INVITED_FOR = "7d"
#: `--dashboard off`.
OFF = "off"
#: Calls that may wait for a worker or be answered at one time; more are told to come back.
MAX_CALLS = 1024

_SERVER_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.so_reuseport", 0),  # a second coordinator on one port must fail, not share it
    # What a stranger may cost: see coordinator/gate.py. The largest message is a chunk with the names around it.
    ("grpc.max_receive_message_length", CHUNK_BYTES + (64 << 10)),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 8 << 10),
    ("grpc.max_concurrent_streams", 32),  # of one connection; a node of ours has four
    ("grpc.max_allowed_incoming_connections", 4096),
    ("grpc.server_handshake_timeout_ms", 10_000),  # a connection that does not even begin to speak
    ("grpc.max_connection_idle_ms", 300_000),  # one without a call; nodes of ours make one at every heartbeat
    # A peer that vanished without a word (laptop closed, cable pulled) must not keep its stream's thread.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # What a stream that nobody reads just now may leave in memory. Left to itself gRPC lets it grow on a fast line: 64 uploads at
    # once took 568 MB instead of 244. On a line of 100 ms there and back it still lets 10 MB/s through.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 20),
]


def serve(config: RunConfig, run_dir: Path, listen: str, push: str | None = None, exit_when_done: bool = False,
          insecure: int = 0, dashboard: str | None = None, ram_bytes: int | None = None, announce: bool = True,
          invite: int = 0, log_format: LogFormat = "text", track: str | None = None,
          private: bool = False) -> int:  # fmt: skip
    """Coordinate a run until it is stopped by SIGINT or SIGTERM, or, with `exit_when_done`, until it is done.

    Args:
        config: the run's config.
        run_dir: made when it is missing, gone on with when it holds the same run.
        listen: `HOST:PORT`; port 0 takes a free one.
        push: `USER/REPO` on the Hub that gets the model after every accepted shard.
        exit_when_done: return when every expert is accepted and the model evaluated.
        insecure: how often --insecure was said: once for plaintext on this machine, twice for plaintext on a network.
        dashboard: `HOST:PORT` of the web page, `off`, or None for the default port, else a free one, of this machine.
        announce: whether nodes on this network may find it; one that listens on loopback never is announced.
        invite: how many nodes an invitation lets in that is printed; 0 prints none.
        log_format: lines of text or of JSON.
        track: a tracker of forge/tracking.py that is told losses and perplexities, or None.
        private: whether the repository of `push` is private, if it is made now.
        ram_bytes: memory that each of its jobs may use (a stage, a verdict, an evaluation); None is all there is.

    Returns:
        The number of the signal that stopped it, or 0.

    Raises:
        NetworkError: the address cannot be listened on.
        RunMismatchError: the directory holds another run.
        StorageError: the directory cannot be written, or another process works in it.
        ForgeError: what stopped a stage.
    """
    out = Output(log_format=log_format, stamp=time_of_day)
    coordinator = Coordinator(config, run_dir, listen, push=push, private=private, exit_when_done=exit_when_done,
                              insecure=insecure, dashboard=dashboard, ram_bytes=ram_bytes, announce=announce, invite=invite,
                              echo=out, watched=out.live or out.json)  # fmt: skip
    with (nullcontext() if track is None else tracking(track, run_dir) as tracker, _signals(coordinator.stop_soon) as received,
          coordinator, watching(out, coordinator.snapshot, ram_bytes, tracker)):  # fmt: skip
        coordinator.wait()
    return received[0] if received else 0


class Coordinator:
    """One coordinator: `start`, `wait`, `stop`; as a context manager it is started and stopped by itself.

    Args:
        config: the run's config.
        run_dir: the run directory.
        listen: `HOST:PORT`.
        push, private: as for `serve`.
        exit_when_done: whether `wait` returns when the run is done.
        insecure: as for `serve`.
        dashboard: `HOST:PORT`, `off`, or None for the default port or a free one.
        run_job: does the heavy work; None starts child processes.
        echo: shows a line to whoever watches.
        clock: seconds since the epoch.
        database: an SQLAlchemy URL; None is the run directory's SQLite file.
        limits: what one node may have.
        announce, invite: as for `serve`.
        watched: whether the snapshots are shown, so that lines of progress are left out.
        ram_bytes: memory that each job may use, or None.
    """

    def __init__(self, config: RunConfig, run_dir: Path, listen: str, *, push: str | None = None,
                 private: bool = False, exit_when_done: bool = False, insecure: int = 0, dashboard: str | None = OFF,
                 run_job: RunJob | None = None, echo: Callable[[str], None] = print_line,
                 clock: Callable[[], float] = time.time, database: str | None = None,
                 limits: Limits | None = None, ram_bytes: int | None = None, announce: bool = False,
                 invite: int = 0, watched: bool = False) -> None:  # fmt: skip
        self._config, self._run_dir, self._listen = config, run_dir.absolute(), listen
        self._push, self._private = push, private
        self._exit_when_done, self._run_job, self._echo, self._clock = exit_when_done, run_job, echo, clock
        self._database, self._insecure, self._limits = database, insecure, limits or Limits()
        self._dashboard, self._ram_bytes, self._announce, self._invite = dashboard, ram_bytes, announce, invite
        self._watched = watched
        self._stop_asked = threading.Event()
        self._awaited: set[str] = set()
        self._cleanup = ExitStack()
        self.address = ""

    def __enter__(self) -> Coordinator:
        self.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._cleanup.__exit__(*raised)

    def start(self) -> None:
        """Listen, open the run and begin to work. Nothing is written when the address is taken (see `serve`)."""
        host, port = parse_listen(self._listen)
        if self._push is not None:
            check_repo(self._push)
        if self._insecure == 1 and not is_loopback(host):
            raise ConfigError(f"--insecure on {host} would let everybody on the network read and change what nodes send: "
                              "leave it out, or say it twice.")  # fmt: skip
        with ExitStack() as undo:
            page = self._dashboard_page = self._page()
            if page is not None:
                undo.callback(page.stop)
            check_free(host, port)
            undo.enter_context(claimed(self._run_dir))
            run = RunDirectory.open(self._run_dir, self._config)
            undo.enter_context(_logging(run.root / "coordinator.log"))
            self._assemble_parts(run, undo)
            authority = Authority(run.root, host)
            server = grpc.server(
                ThreadPoolExecutor(WORKERS, "call"), options=_SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS,
                interceptors=[Gate(self._desk, b"" if self._insecure else authority.fingerprint, self._echo)])  # fmt: skip
            undo.callback(lambda: server.stop(CALL_GRACE_SECONDS).wait())  # before what its calls use is closed
            bound = bind(server, host, port, None if self._insecure else authority.credentials())
            self.address = f"{host}:{bound}"
            register(server, self._desk, self._echo)
            server.start()
            addresses = invitation_addresses(host, bound)
            if (run.root / INFO_FILE).exists():  # Who wrote it was killed, however long ago: its nodes look for this one.
                self._awaited = self._nodes_since(max((node.seen_at for node in self._desk.state.nodes()), default=0.0))
            write_json(run.root / INFO_FILE, {
                "address": self.address, "addresses": addresses, "pid": os.getpid(),
                "encrypted": not self._insecure, **({} if page is None else {"dashboard": page.url})})  # fmt: skip
            undo.callback((run.root / INFO_FILE).unlink, missing_ok=True)
            self._journal.event("started", address=self.address, pid=os.getpid(), run_id=run.run_id)
            invitation = self._invitation(run, addresses) if self._invite else ""
            if page is not None:
                page.start(self._desk.snapshots.take, self._job, str(run.root), invitation)
                undo.callback(page.stop)  # before the database that it reads is closed
            self._greet(run, authority.fingerprint, invitation)
            if self._announce and not is_loopback(host) and not self._insecure:
                undo.enter_context(self._found_on_network(addresses, authority.fingerprint))
            for line in () if page is None else page.greeting:
                self._echo(line)
            self._work.start()
            undo.callback(self._end_work)
            self._cleanup = undo.pop_all()

    def wait(self) -> None:
        """Block until the run is done (with `exit_when_done`), something failed, or `stop_soon` was called.

        Raises:
            ForgeError: what failed; with `exit_when_done`, that may be the last push.
        """
        while not self._stop_asked.wait(0.2):
            if not self._work.ended.is_set():
                continue
            if self._work.error is not None:
                raise self._work.error
            if self._exit_when_done:
                self._see_off()
                if self._assembler.push_error is not None:
                    raise self._assembler.push_error
                return

    def snapshot(self) -> Json:
        """The run now, as the dashboard shows it; only while it is started."""
        return self._desk.snapshots.take()

    def stop_soon(self) -> None:
        """Ask `wait` to return; safe in a signal handler."""
        self._stop_asked.set()

    def stop(self) -> None:
        """Stop answering, let shared training write a last checkpoint, and close everything."""
        self._cleanup.close()

    def _assemble_parts(self, run: RunDirectory, undo: ExitStack) -> None:
        config = self._config
        state = State(self._database or run.database, lease_seconds=config.fleet.lease_seconds, clock=self._clock)
        undo.callback(state.close)
        state.extend_leases()
        curves = Curves(run.reports / "curves.json")
        undo.callback(curves.save)
        activity, journal = Activity(), Journal(run.root / "events.jsonl", self._echo)
        job: RunJob = self._run_job or JobRunner(run.root / "jobs.log", _memory_notes(run), self._ram_bytes)
        if isinstance(job, JobRunner):
            undo.callback(job.stop)
        credentials = Credentials.load(run.root / SECRET_FILE)
        audits = Audits(run=run, config=config, state=state, credentials=credentials, clock=self._clock)
        assembler = Assembler(run=run, config=config, state=state, run_job=job, activity=activity, journal=journal, audits=audits,
                              push=None if self._push is None else pusher(run, state, self._push, self._private))  # fmt: skip
        self._journal, self._job, self._run, self._assembler = journal, job, run, assembler
        publication = Publication(run)
        uploads = Uploads(
            run.blobs, largest_shard(config.model), largest_checkpoint(config),
            needed=lambda sha256: publication.made(sha256) or state.needs(sha256) or audits.needs(sha256))  # fmt: skip
        self._work = Work(run=run, state=state, assembler=assembler, uploads=uploads, run_job=job, activity=activity,
                          journal=journal, echo=(lambda _: None) if self._watched else self._echo, curves=curves)  # fmt: skip
        snapshots = Snapshots(config=config, run=run, state=state, activity=activity, curves=curves, clock=self._clock)
        self._desk = Desk(
            config=config, run=run, run_id=run.run_id, state=state, activity=activity, clock=self._clock,
            publication=publication, uploads=uploads, note=journal.event, quotas=Quotas(self._limits), curves=curves,
            snapshots=snapshots, credentials=credentials, audits=audits)  # fmt: skip

    def _page(self) -> Dashboard | None:
        """The dashboard, which listens but does not answer yet; None when it is off."""
        if self._dashboard == OFF:
            return None
        from coordinator.dashboard.server import Dashboard  # Its libraries are imported by who uses them.

        return Dashboard(None if self._dashboard is None else parse_listen(self._dashboard, "--dashboard"))

    @contextmanager
    def _found_on_network(self, addresses: list[str], fingerprint: bytes) -> Iterator[None]:
        """Let nodes find this coordinator; a network that does not carry it stops nothing."""
        with ExitStack() as stack:
            try:
                stack.enter_context(announced(Announcement(name=self._config.name, addresses=addresses, fingerprint=fingerprint)))
                self._echo("announced on this network: `forge-node join` finds it there (--no-announce ends that)")
            except NetworkError as error:
                self._echo(f"{error} Nodes need the invitation's address.")
            yield

    def _invitation(self, run: RunDirectory, addresses: list[str]) -> str:
        text, encrypted = create_token(run.root, uses=self._invite, expires=INVITED_FOR, name="printed at the start",
                                       addresses=addresses)  # fmt: skip
        return join_line(text, encrypted)

    def _greet(self, run: RunDirectory, fingerprint: bytes, invitation: str) -> None:
        ca = "" if self._insecure else f", CA {shown(fingerprint)}"
        self._echo(f"coordinating {self._config.name!r} in {run.root}, listening on {self.address}{ca}")
        if self._insecure:
            self._echo("WARNING: nothing is encrypted (--insecure): whoever is on the line can read and change everything")
        host, _, port = self.address.rpartition(":")
        if is_loopback(host) and not self._insecure:
            self._echo(f"only this machine can join: start with --listen 0.0.0.0:{port} for others")
        if invitation:
            self._echo(f"to send to a friend (a secret; good {self._invite} times in {INVITED_FOR}):  {invitation}")
        self._echo(f"to invite a machine:  forge-coordinator token create --run-dir {shlex.quote(str(run.root))}")

    def _see_off(self) -> None:
        """Stay until every node that was here lately has heard that nothing is left to do."""
        deadline = time.monotonic() + FAREWELL_SECONDS
        while time.monotonic() < deadline and not self._stop_asked.wait(0.2):
            present = self._awaited | self._nodes_since(self._clock())
            told = self._desk.told_done
            # An answer can be lost on its way: who did not get it asks again at once.
            if all(node in told and time.monotonic() - told[node] > ANSWER_SECONDS for node in present):
                return

    def _nodes_since(self, moment: float) -> set[str]:
        """The nodes that were heard of not long before a moment, or after it."""
        nodes = self._desk.state.nodes()
        return {node.id for node in nodes if node.seen_at >= moment - LATELY_SECONDS and node.public_key and not node.revoked}

    def _end_work(self) -> None:
        self._work.stopping.set()
        if isinstance(self._job, JobRunner):
            self._job.stop()
        self._work.join(GRACE_SECONDS + 5.0)
        with suppress(StorageError):  # A full disk that stopped the run is the better sentence.
            _memory_notes(self._run)("coordinator", {}, {"peak_bytes": peak_resident_bytes()})
        self._journal.event("stopped", "the coordinator is stopped; the same command goes on from here"
                            if self._stop_asked.is_set() else "")  # fmt: skip


@contextmanager
def _logging(path: Path) -> Iterator[None]:
    with storage_errors(path):
        handler = RotatingFileHandler(path, maxBytes=10 << 20, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logger = logging.getLogger("coordinator")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Have SIGINT and SIGTERM call `stop`; a second one ends the process at once. Yields the signals received."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        # Not from here: the main thread may hold the lock of the very event that this sets, and would wait for itself.
        threading.Thread(target=stop, daemon=True).start()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _memory_notes(run: RunDirectory) -> Callable[[str, dict[str, Any], dict[str, Any]], None]:
    from forge.pipeline import note_memory

    def note(name: str, arguments: dict[str, Any], result: dict[str, Any]) -> None:
        note_memory(run, str(arguments.get("stage", name)), result)

    return note
