"""`forge-node doctor`: whether this machine can work for a coordinator, and what to mend where it cannot.

Nothing is joined, leased or changed: an invitation keeps its use. The coordinator is asked for its certificates and for its
health, which it tells everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
import platform
import re
import shutil
import tempfile
from typing import Literal

from forge.errors import ForgeError
from forge.train.memory import format_size
from node.connection import StalledError
from node.link import Link, PlaintextError, shown_certificates
from node.machine import MachineProfile
from node.preferences import Preferences
from node.senses import Senses

#: Python that the package asks for, and the oldest libraries that it was tested with (pyproject.toml says the same).
PYTHON, LIBRARIES = (3, 10), {"torch": (2, 13), "grpcio": (1, 76)}
#: Memory and disk below which hardly any run finds room: the libraries alone take some 270 MB.
LITTLE_MEMORY, LITTLE_DISK = 512 << 20, 1 << 30
#: Seconds for the answer to one small question.
ANSWER_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at; `mend` is empty where nothing has to be done."""

    what: str
    state: Literal["ok", "warning", "broken"]
    found: str
    mend: str = ""


def examine(link: Callable[[], Link], data_dir: Path, preferences: Preferences) -> Iterator[Finding]:
    """Look at one thing after the other, what needs no network first.

    Args:
        link: makes the line to the coordinator; what it raises is a finding.
        data_dir: the node's data directory.
        preferences: what the owner allows.
    """
    yield _python()
    yield from _libraries()
    yield _multiplication()
    yield _memory(preferences)
    yield _disk(data_dir)
    yield _owner(preferences)
    yield from _coordinator(link)


def describe(finding: Finding) -> str:
    """A finding for people."""
    mend = f"\n{'':>21}{finding.mend}" if finding.mend else ""
    return f"{finding.state:8} {finding.what:11} {finding.found}{mend}"


def _python() -> Finding:
    found, asked = platform.python_version(), ".".join(map(str, PYTHON))
    if tuple(map(int, platform.python_version_tuple()[:2])) < PYTHON:
        return Finding(what="python", state="broken", found=found, mend=f"Install Python {asked} or newer.")
    return Finding(what="python", state="ok", found=found)


def _libraries() -> Iterator[Finding]:
    for name, oldest in LIBRARIES.items():
        asked = ".".join(map(str, oldest))
        mend = f"Install it anew: pip install '{name}>={asked}'."
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(what=name, state="broken", found="not installed", mend=mend)
            continue
        numbers = re.match(r"(\d+)\.(\d+)", found)
        old = numbers is not None and (int(numbers[1]), int(numbers[2])) < oldest
        yield Finding(what=name, state="broken" if old else "ok", found=found, mend=mend if old else "")


def _multiplication() -> Finding:
    """Which number format training will compute in, by the probe that training itself makes."""
    try:
        from forge.train.precision import product_dtype, resolve_device

        device = resolve_device("auto")
        kind = str(product_dtype(device)).removeprefix("torch.")
    except (ImportError, OSError, RuntimeError) as error:
        return Finding(what="training", state="broken", found=f"torch does not work: {str(error).splitlines()[0]}",
                       mend="Install torch anew, for this kind of machine.")  # fmt: skip
    why = "which is faster here" if kind == "bfloat16" else "bfloat16 is not faster here"
    return Finding(what="training", state="ok", found=f"on {device}, in {kind}; {why}")


def _memory(preferences: Preferences) -> Finding:
    machine = MachineProfile.measure()
    allowed = preferences.ram or machine.default_ram_bytes
    found = (f"{format_size(machine.free_bytes)} of {format_size(machine.memory_bytes)} are free; training may use "
             f"{format_size(allowed)}")  # fmt: skip
    if allowed > machine.memory_bytes:
        return Finding(what="memory", state="broken", found=found,
                       mend=f"Give at most --ram {machine.memory_bytes >> 20}M.")  # fmt: skip
    if allowed < LITTLE_MEMORY:
        return Finding(what="memory", state="broken", found=found, mend="Close something, or allow more with --ram.")
    if machine.spare_bytes < allowed:
        return Finding(what="memory", state="warning", found=found, mend="Close something before you join: training is "
                       "planned within what is free then.")  # fmt: skip
    return Finding(what="memory", state="ok", found=found)


def _disk(data_dir: Path) -> Finding:
    at = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=at):
            free = shutil.disk_usage(at).free
    except OSError as error:
        return Finding(what="disk", state="broken", found=f"{at} cannot be written: {error.strerror or error}",
                       mend="Choose another directory with --data-dir.")  # fmt: skip
    found = f"{format_size(free)} are free for {data_dir}"
    if free < LITTLE_DISK:
        return Finding(what="disk", state="warning", found=found, mend="Free some space, or use --data-dir.")
    return Finding(what="disk", state="ok", found=found)


def _owner(preferences: Preferences) -> Finding:
    """Whether the owner's rules would let it train now, and what `--when idle` can go by."""
    senses = Senses()
    hold = preferences.rules.hold(datetime.now(), senses)
    if preferences.rules.idle:
        return Finding(what="your rules", state="ok", found="trains while this machine is idle, which is seen by "
                       f"{senses.seen()}")  # fmt: skip
    return Finding(what="your rules", state="ok", found=f"would wait now: {hold}" if hold else "would train now")


def _coordinator(link: Callable[[], Link]) -> Iterator[Finding]:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    try:
        line = link()
    except ForgeError as error:
        yield _refused(error)
        return
    if not line.named:
        yield Finding(what="coordinator", state="warning", found="this machine has not joined one yet", mend="Ask its operator "
                      "for an invitation: `forge-node doctor INVITATION` tries the way there, `forge-node join INVITATION` "
                      "joins.")  # fmt: skip
        return
    try:
        channel = line.open()
    except (StalledError, ForgeError) as error:
        # Without an invitation nobody is looked for; whether the address answers is worth knowing all the same.
        yield _unreached(line.address, error) or _refused(error)
        return
    if line.ca_fingerprint:
        yield _clock(line.address)
    try:
        with channel:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_SECONDS)
    except grpc.RpcError as error:
        yield Finding(what="coordinator", state="broken", found=f"{line.address} does not answer as a coordinator does "
                      f"({error.code().name})", mend="Check the address and both clocks, or install the same version on "
                      "both sides.")  # fmt: skip
        return
    known = f"known by its CA {line.ca_fingerprint.hex()[:16]}" if line.ca_fingerprint else "not encrypted"
    unused = "; only joining tells whether the invitation is still good" if line.secret else ""
    yield Finding(what="coordinator", state="ok", found=f"{line.address} answers, {known}{unused}")


def _refused(error: Exception) -> Finding:
    what, _, mend = str(error).partition(": ")
    return Finding(what="coordinator", state="broken", found=what, mend=mend[:1].upper() + mend[1:])


def _unreached(address: str, error: Exception) -> Finding | None:
    """That nobody answers at an address; None when somebody does."""
    if not isinstance(error, StalledError):
        try:
            shown_certificates(address)
            return None
        except PlaintextError:
            return None
        except StalledError as stalled:
            error = stalled
    return Finding(what="coordinator", state="broken", found=f"nobody answers at {address}: {error}", mend="Check the address, "
                   "the network and the firewall there, or ask its operator whether it runs.")  # fmt: skip


def _clock(address: str) -> Finding:
    """The clock here against the coordinator's, as far as its certificate tells: it is good from a day before its issue."""
    from cryptography.x509 import load_der_x509_certificate

    certificate = load_der_x509_certificate(shown_certificates(address)[0])
    now, first, last = (datetime.now(timezone.utc), certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    if first <= now <= last:
        return Finding(what="clock", state="ok", found=f"{now:%Y-%m-%d %H:%M} UTC, within the coordinator's certificate")
    return Finding(what="clock", state="broken", found=f"{now:%Y-%m-%d %H:%M} UTC, and the coordinator's certificate is good "
                   f"from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M}", mend="Set this clock, or have the coordinator's "
                   "operator look at that one.")  # fmt: skip
