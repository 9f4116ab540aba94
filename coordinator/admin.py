"""Asking a running coordinator how it is: the client of `AdminService`, kept apart so that it starts quickly.

The operator is who can read the run directory: the credential and the CA that these calls need lie there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forge.errors import ConfigError, NetworkError, ProtocolError, StorageError
from forge.invitation import SERVER_NAME
from forge.system import is_locked
from forge.vocabulary import DATABASE_FILE, LOCK_FILE

#: Seconds to wait for an answer; a coordinator answers from memory and a small database.
ANSWER_SECONDS = 5.0
#: What a node does while its progress counts bytes.
TRANSFERS = ("downloading", "uploading")
INFO_FILE, SECRET_FILE = "coordinator.json", "coordinator.secret"


def find_run(run_dir: Path | None, *, running: bool = True) -> Path:
    """The run directory as given, else the one below `runs` that a coordinator works in.

    Args:
        run_dir: the --run-dir option.
        running: whether a coordinator has to run; else, where none does, the one that a coordinator worked in is as good.

    Raises:
        NetworkError: there is none.
        ConfigError: there are several.
    """
    if run_dir is not None:
        return run_dir
    served = sorted(path.parent for path in Path("runs").glob(f"*/{DATABASE_FILE}"))
    found = [path for path in served if is_running(path)]
    if not running and not found:
        found = served
    if not found:
        raise NetworkError("No coordinator runs in a directory below runs: start one with `forge-coordinator serve`, or "
                           "give its directory with --run-dir.")  # fmt: skip
    if len(found) > 1:
        raise ConfigError(f"{', '.join(map(str, found))} are coordinators' run directories: say which with --run-dir.")
    return found[0]


def is_running(run_dir: Path) -> bool:
    """Whether a coordinator works in a run directory; one that was killed left its file there and holds no lock."""
    return (run_dir / INFO_FILE).is_file() and is_locked(run_dir / LOCK_FILE)


def read_info(run_dir: Path) -> dict[str, Any] | None:
    """Where the coordinator of a run directory listens, as it wrote it down; None where none runs."""
    try:
        return dict(json.loads((run_dir / INFO_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def fetch_status(run_dir: Path) -> dict[str, Any]:
    """The answer of `GetStatus` as plain values, named as in the proto; `snapshot` is what the dashboard shows.

    Raises:
        NetworkError: nobody answers.
        StorageError: the run directory's secret or CA cannot be read.
        ProtocolError: who answers is no coordinator of this version.
    """
    from google.protobuf.json_format import MessageToDict
    import grpc
    from modularforge.v1 import admin_pb2, admin_pb2_grpc

    info = read_info(run_dir)
    if info is None:
        raise NetworkError(f"No coordinator runs in {run_dir}: start one with `forge-coordinator serve --run-dir "
                           f"{run_dir}`.")  # fmt: skip
    address = str(info["address"])
    try:
        with _channel(run_dir, address, bool(info.get("encrypted", True))) as channel:
            answer = admin_pb2_grpc.AdminServiceStub(channel).GetStatus(
                admin_pb2.GetStatusRequest(), timeout=ANSWER_SECONDS, metadata=_credential(run_dir))  # fmt: skip
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise NetworkError(f"No coordinator answers at {address}: start one with `forge-coordinator serve`, or "
                               "check the address.", detail=error.details()) from error  # fmt: skip
        why = error.details() or error.code().name
        raise ProtocolError(f"The coordinator at {address} refused: {why}.") from error
    status = dict(MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
    return {**status, "snapshot": json.loads(status.pop("snapshot_json") or "{}")}


def _channel(run_dir: Path, address: str, encrypted: bool) -> Any:
    import grpc

    # gRPC takes 4 MB by itself, and the evaluations of a run with 700 experts have 4.3.
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]
    host, _, port = address.rpartition(":")
    here = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    if not encrypted:
        return grpc.insecure_channel(f"{here}:{port}", options=options)
    from coordinator.authority import ca_certificate

    return grpc.secure_channel(f"{here}:{port}", grpc.ssl_channel_credentials(ca_certificate(run_dir)),
                               options=[*options, ("grpc.ssl_target_name_override", SERVER_NAME)])  # fmt: skip


def _credential(run_dir: Path) -> tuple[tuple[str, str], ...]:
    from coordinator.auth import OPERATOR, Credentials

    if not (run_dir / SECRET_FILE).is_file():
        raise StorageError(f"{run_dir} holds no coordinator's secret: give the run directory with --run-dir.")
    return (("forge-credential", Credentials.load(run_dir / SECRET_FILE).issue(OPERATOR)),)


def describe(status: dict[str, Any]) -> str:
    """The status for people: the run, a line a partition, a line a node, the perplexities."""
    run = status["run"]
    lines = [f"run {run['name']} ({run['run_id'][:12]}), phase {run['phase']}: {status['activity']}", ""]
    if status["partitions"]:
        lines.append(f"{'expert':>6}  {'state':9} {'tokens':>13}  {'node':20} {'step':>15}  {'loss':>8} {'shared':>8}")
        lines += [_partition_line(partition) for partition in status["partitions"]]
        lines.append("")
    for node in status["nodes"]:
        lines.append(f"node {node['name']}: {node['accepted']} accepted, {node['rejected']} rejected, last heard of "
                     f"{node['idle_seconds']:.0f} s ago")  # fmt: skip
    for node in status["snapshot"].get("contributors", ()):
        if node["nats"] is None:
            continue
        experts = ", ".join(f"{expert['partition']} ({_nats(expert['nats'])})" for expert in node["experts"])
        lines.append(f"contribution of {node['name']}: {_nats(node['nats'])} nats a token, by expert {experts}")
    for point in status["evaluations"]:
        lines.append(f"with {point['experts']} of {len(status['partitions'])} experts: mean perplexity "
                     f"{_number(point['mean_perplexity'], 2)}, pooled {_number(point['pooled_perplexity'], 2)}")  # fmt: skip
    return "\n".join(lines).rstrip()


def _partition_line(partition: dict[str, Any]) -> str:
    progress = partition.get("progress") or {}
    steps = 0 if progress.get("activity") in TRANSFERS else int(progress.get("steps", 0))
    step = f"{int(progress['step']):,}/{steps:,}" if steps else "-"
    rejected = f"  (last rejected: {'; '.join(partition['last_rejection'])})" if partition["last_rejection"] else ""
    return (f"{partition['partition']:>6}  {partition['state']:9} {int(partition['tokens']):>13,}  "
            f"{partition['node_name'] or '-':20} {step:>15}  {_number(partition['loss'], 4):>8} "
            f"{_number(partition['shared_loss'], 4):>8}{rejected}")  # fmt: skip


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _number(value: Any, digits: int) -> str:
    number = float(value)  # JSON of a protobuf writes NaN as a word.
    return f"{number:.{digits}f}" if number == number and number else "-"
