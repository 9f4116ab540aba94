"""What the operator does to invitations and nodes, with or without a coordinator that runs.

It works on the run's database, which a running coordinator asks at every call, so everything holds at once. The model is the
coordinator's; where none runs, this takes experts out itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
import re
import secrets
import sys
import time

from coordinator.admin import is_running, read_info
from coordinator.authority import Authority
from coordinator.journal import Journal
from coordinator.records import InvitationRecord, NodeRecord
from coordinator.state import State
from forge.errors import ConfigError, StorageError
from forge.files import RunDirectory, claimed
from forge.invitation import SECRET_BYTES, Invitation, is_address

#: Characters of an invitation's name, as of a node's.
MAX_NAME = 64
_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_duration(text: str) -> float:
    """Seconds of `90m`, `12h`, `7d` or `2w`.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"(\d{1,6})([mhdw])", text.strip())
    if found is None or int(found[1]) == 0:
        raise ConfigError(f"--expires {text[:80]!r} must look like 90m, 12h, 7d or 2w.")
    return float(int(found[1]) * _UNITS[found[2]])


def create_token(run_dir: Path, *, uses: int, expires: str, name: str, addresses: Sequence[str]) -> tuple[str, bool]:
    """Make an invitation; the string, and whether the coordinator encrypts. The run directory is made when missing.

    Raises:
        ConfigError: a value is wrong, or nobody knows where the coordinator will listen.
        StorageError: the directory cannot be written.
    """
    seconds, info = parse_duration(expires), read_info(run_dir) or {}
    if len(name) > MAX_NAME or not (name.isprintable()):
        raise ConfigError(f"An invitation's name has at most {MAX_NAME} printable characters: choose another one.")
    if not (known := tuple(addresses) or tuple(info.get("addresses", ()))):
        raise ConfigError(f"No coordinator runs in {run_dir}, so nobody knows its address: start it first, or say with "
                          "--address HOST:PORT where nodes will reach it.")  # fmt: skip
    for address in known:
        if not is_address(address):
            raise ConfigError(f"--address {address[:80]!r} must look like HOST:PORT, such as 192.0.2.10:7433.")
    authority, secret = Authority(run_dir), secrets.token_bytes(SECRET_BYTES)
    state = State(RunDirectory(run_dir).database, lease_seconds=1.0)
    try:
        made = state.invite(secret, name=name, uses=uses, seconds=seconds)
    finally:
        state.close()
    _note(run_dir, "invited", invitation=made.id, name=name, uses=uses)
    text = Invitation(addresses=known, fingerprint=authority.fingerprint, secret=secret).encode()
    return text, bool(info.get("encrypted", True))


def join_line(text: str, encrypted: bool) -> str:
    """What to type on the machine that joins."""
    return f"forge-node join {text}" + ("" if encrypted else " --insecure")


def list_tokens(run_dir: Path) -> str:
    """Every invitation, a line each."""
    state = _state(run_dir)
    try:
        rows = state.invitations()
    finally:
        state.close()
    return "\n".join([f"{'id':8}  {'state':8} {'used':>9}  {'expires':16}  name", *map(_token_line, rows)])


def revoke_token(run_dir: Path, invitation_id: str) -> str:
    """Let nobody else in with an invitation; what was done.

    Raises:
        ConfigError: there is no such invitation.
    """
    state = _state(run_dir)
    try:
        revoked = state.revoke_invitation(invitation_id)
    finally:
        state.close()
    _note(run_dir, "invitation-revoked", invitation=revoked.id)
    return f"the invitation {revoked.id} is revoked; the nodes that came with it stay (see `forge-coordinator nodes list`)"


def list_nodes(run_dir: Path) -> str:
    """Every node, a line each."""
    state = _state(run_dir)
    try:
        rows = state.nodes()
    finally:
        state.close()
    head = f"{'id':16}  {'name':20} {'accepted':>8} {'rejected':>8}  {'invitation':10}  last heard of"
    return "\n".join([head, *map(_node_line, rows)])


def revoke_node(run_dir: Path, name: str, *, drop_shards: bool) -> str:
    """Send a node away; what was done.

    Args:
        run_dir: the run directory.
        name: its name, or its id where several have the name.
        drop_shards: take its accepted shards out of the model as well; a coordinator that runs does that by itself.

    Raises:
        ConfigError: there is no such node, or there are several.
        StorageError: with `drop_shards`, `forge run` works in the directory, or the model cannot be written.
    """
    state = _state(run_dir)
    try:
        nodes = state.nodes()
        found = [node for node in nodes if node.id == name] or [node for node in nodes if node.name == name]
        if not found:
            raise ConfigError(f"There is no node {name[:80]!r}: `forge-coordinator nodes list` shows them all.")
        if len(found) > 1:
            raise ConfigError(f"{len(found)} nodes are called {name!r}: give the id of one instead ("
                              f"{', '.join(node.id for node in found)}).")  # fmt: skip
        (node,) = found
        alone = drop_shards and not is_running(run_dir)
        with claimed(run_dir) if alone else nullcontext():
            dropped = state.revoke(node.id, drop_shards=drop_shards)
            _note(run_dir, "revoked", node_id=node.id, name=node.name, dropped=dropped)
            if alone:
                _take_out(RunDirectory(run_dir), dropped)
    finally:
        state.close()
    if not drop_shards:
        return f"{node.name} is revoked; its {node.accepted} accepted shards stay (--drop-shards takes them out)"
    which = (f"experts {', '.join(map(str, dropped))} leave the model and are trained anew" if len(dropped) > 1 else
             f"expert {dropped[0]} leaves the model and is trained anew" if dropped else "it had none")  # fmt: skip
    return f"{node.name} is revoked with its accepted shards: {which}"


def _take_out(run: RunDirectory, partitions: Sequence[int]) -> None:
    from forge.checkpoint import assembly  # It imports NumPy, which invitations do without.

    for partition in assembly.placed(run.model).keys() & set(partitions):
        assembly.withdraw(run, partition)


def _token_line(row: InvitationRecord) -> str:
    expires = datetime.fromtimestamp(row.expires_at).strftime("%Y-%m-%d %H:%M")
    return f"{row.id:8}  {row.state:8} {f'{row.used}/{row.uses}':>9}  {expires:16}  {row.name}".rstrip()


def _node_line(node: NodeRecord) -> str:
    heard = "revoked" if node.revoked else f"{max(0.0, time.time() - node.seen_at):.0f} s ago"
    return f"{node.id:16}  {node.name:20} {node.accepted:>8} {node.rejected:>8}  {node.invitation or '-':10}  {heard}"


def _state(run_dir: Path) -> State:
    run = RunDirectory(run_dir)
    if not run.database.is_file():
        raise StorageError(f"{run_dir} is not a coordinator's run directory: give one with --run-dir.")
    return State(run.database, lease_seconds=1.0)


def _note(run_dir: Path, event: str, **facts: object) -> None:
    Journal(run_dir / "events.jsonl", lambda line: print(line, file=sys.stderr)).event(event, **facts)
