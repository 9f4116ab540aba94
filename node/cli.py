"""The command line of a node: `forge-node join` is all there is to it."""

from __future__ import annotations

from collections.abc import Mapping
import os
from pathlib import Path
import signal
import socket
import sys
from typing import TYPE_CHECKING

import click

from forge.errors import ConfigError, MemoryBudgetError, report_errors
from forge.vocabulary import DEFAULT_PORT

if TYPE_CHECKING:
    from node.link import Link
    from node.worker import RunJob


def default_data_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """`FORGE_DATA_DIR`, else `modularforge` below the user's data directory (XDG, or `~/.local/share`)."""
    if chosen := environment.get("FORGE_DATA_DIR"):
        return Path(chosen)
    base = environment.get("XDG_DATA_HOME", "")
    # The XDG specification says to ignore relative paths.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "share") / "modularforge"


def parse_address(text: str) -> str:
    """`HOST:PORT` from `HOST`, `HOST:PORT` or an IPv6 address in brackets.

    Raises:
        ConfigError: it is none of these.
    """
    text = text.strip()
    head, bracket, tail = text.rpartition("]")
    host, colon, port = (head + bracket + tail).rpartition(":") if ":" in tail else (text, "", str(DEFAULT_PORT))
    bare = host.removeprefix("[").removesuffix("]") if bracket else host
    bad = "/" in host or any(c.isspace() for c in host) or not bare or (":" in host and not bracket)
    if bad or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{text!r} is not the address of a coordinator: write HOST or HOST:PORT.")
    return f"{host}:{port}"


# gRPC's C++ core writes to stderr by itself, beside the sentence of ours that says the same; it reads this when imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@click.group()
@click.version_option(package_name="modularforge", prog_name="forge-node")
def main() -> None:
    """Train experts of a shared model on this machine."""


@main.command()
@click.argument("where", required=False, metavar="[INVITATION|ADDRESS]")
@click.option("--token", metavar="INVITATION", help="The invitation, beside an ADDRESS. Default: FORGE_TOKEN.")
@click.option("--ram", metavar="SIZE", help="Memory that training may use, such as 8G or 900M. Default: what is free "
              "now, less a reserve for you, at most 8G.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads for training. Default: all usable cores.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True,
              help="Where to train.")  # fmt: skip
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Where this node keeps its key, "
              "downloads and checkpoints. Default: FORGE_DATA_DIR, else ~/.local/share/modularforge.")  # fmt: skip
@click.option("--name", help="Name that your shards are credited to. Default: this machine's host name.")
@click.option("--once", is_flag=True, help="Leave after one shard.")
@click.option("--insecure", count=True, help="Do not encrypt; only for a coordinator on this machine that does not "
              "either, unless it is said twice.")  # fmt: skip
@report_errors()
def join(where: str | None, token: str | None, ram: str | None, threads: int | None, device: str, data_dir: Path | None,
         name: str | None, once: bool, insecure: int) -> None:  # fmt: skip
    """Join a run and train one expert after the other.

    The first time it needs the INVITATION that the coordinator's operator made (or FORGE_TOKEN, which other users of
    this machine cannot see); later it remembers. ADDRESS (HOST[:PORT], or FORGE_COORDINATOR) is where the coordinator
    is now, if that is not where it was.
    """
    from forge.invitation import PREFIX, Invitation
    from node.link import Link

    here = (data_dir or default_data_dir()).resolve()
    # Taken out of the environment so that the training process does not inherit it.
    text = token or os.environ.pop("FORGE_TOKEN", None)
    address = where or os.environ.get("FORGE_COORDINATOR")
    if address is not None and address.startswith(PREFIX):
        text, address = token or address, None
    link = Link(parse_address(address) if address else None, data_dir=here, insecure=insecure,
                invitation=Invitation.parse(text) if text else None, otherwise=f"127.0.0.1:{DEFAULT_PORT}")  # fmt: skip
    sys.exit(run_node(link, ram, threads, device, here, name or socket.gethostname() or "node", once))


def run_node(link: Link, ram: str | None, threads: int | None, device: str, data_dir: Path, name: str, once: bool,
             run_job: RunJob | None = None) -> int:  # fmt: skip
    """Wire the agent together and run it; gRPC and the like are imported here, so that --help stays quick.

    Args:
        link: where the coordinator is and how it is known.
        ram: the --ram option.
        threads: the --threads option.
        device: the --device option.
        data_dir: where the node keeps its files.
        name: the node's name.
        once: the --once option.
        run_job: starts the training process; None starts the real one.

    Returns:
        The exit code.
    """
    from forge.train.memory import parse_size
    from node.agent import Agent
    from node.client import FleetClient
    from node.console import Console
    from node.identity import Identity
    from node.machine import MachineProfile
    from node.worker import Worker, run_train_expert

    machine = MachineProfile.measure(device)
    ram_bytes = parse_size(ram) if ram is not None else machine.default_ram_bytes
    machine.check_ram(ram_bytes)
    if ram_bytes <= 0:
        raise MemoryBudgetError("This machine has no memory to spare right now: close something, or say with --ram how "
                                "much training may use.")  # fmt: skip
    # A service manager stops a node as its owner would: at the next checkpoint, with the lease given back.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    identity = Identity.open(data_dir)
    client = FleetClient(link, identity=identity, name=name, ram_bytes=ram_bytes, on_wait=console.wait,
                         version=_version())  # fmt: skip
    worker = Worker(console, ram_bytes=ram_bytes, threads=threads or machine.cores, device=machine.device,
                    run_job=run_job or run_train_expert)  # fmt: skip
    return Agent(client=client, identity=identity, machine=machine, worker=worker, console=console, data_dir=data_dir,
                 name=name, ram_bytes=ram_bytes, once=once).run()  # fmt: skip


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("modularforge")
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    main()
