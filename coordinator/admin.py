"""Asking a running coordinator how it is: the client of `AdminService`, kept apart so that it starts quickly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from forge.errors import NetworkError, ProtocolError
from forge.vocabulary import DEFAULT_PORT

#: Seconds to wait for an answer; a coordinator answers from memory and a small database.
ANSWER_SECONDS = 5.0


def find_address(address: str | None, run_dir: Path | None) -> str:
    """Where the coordinator listens: as given, as its run directory says, FORGE_COORDINATOR, or the default port here.

    Raises:
        NetworkError: no coordinator runs in the directory.
    """
    if address is not None:
        return address
    if run_dir is not None:
        try:
            return str(json.loads((run_dir / "coordinator.json").read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError) as error:
            raise NetworkError(f"No coordinator runs in {run_dir}: start one with `forge-coordinator serve --run-dir "
                               f"{run_dir}`.", detail=str(error)) from error  # fmt: skip
    return os.environ.get("FORGE_COORDINATOR") or f"127.0.0.1:{DEFAULT_PORT}"


def fetch_status(address: str) -> dict[str, Any]:
    """The answer of `GetStatus` as plain values, named as in the proto.

    Raises:
        NetworkError: nobody answers.
        ProtocolError: who answers is no coordinator of this version.
    """
    from google.protobuf.json_format import MessageToDict
    import grpc
    from modularforge.v1 import admin_pb2, admin_pb2_grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = admin_pb2_grpc.AdminServiceStub(channel).GetStatus(
                admin_pb2.GetStatusRequest(), timeout=ANSWER_SECONDS)  # fmt: skip
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise NetworkError(f"No coordinator answers at {address}: start one with `forge-coordinator serve`, or "
                                   "check the address.", detail=error.details()) from error  # fmt: skip
            why = error.details() or error.code().name
            raise ProtocolError(f"The coordinator at {address} refused: {why}.") from error
    return dict(MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))


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
    for point in status["evaluations"]:
        lines.append(f"with {point['experts']} experts: mean perplexity {_number(point['mean_perplexity'], 2)}, pooled "
                     f"{_number(point['pooled_perplexity'], 2)}")  # fmt: skip
    return "\n".join(lines).rstrip()


def _partition_line(partition: dict[str, Any]) -> str:
    progress = partition.get("progress") or {}
    steps = int(progress.get("steps", 0))
    step = f"{int(progress['step']):,}/{steps:,}" if steps else "-"
    rejected = f"  (last rejected: {'; '.join(partition['last_rejection'])})" if partition["last_rejection"] else ""
    return (f"{partition['partition']:>6}  {partition['state']:9} {int(partition['tokens']):>13,}  "
            f"{partition['node_name'] or '-':20} {step:>15}  {_number(partition['loss'], 4):>8} "
            f"{_number(partition['shared_loss'], 4):>8}{rejected}")  # fmt: skip


def _number(value: Any, digits: int) -> str:
    number = float(value)  # JSON of a protobuf writes NaN as a word.
    return f"{number:.{digits}f}" if number == number and number else "-"
