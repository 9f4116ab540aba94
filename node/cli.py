"""The command line of a node: `forge-node join` is all there is to it; the rest is for its owner's comfort."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import json
import os
from pathlib import Path
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from forge.errors import ConfigError, MemoryBudgetError, report_errors
from forge.vocabulary import DEFAULT_PORT

if TYPE_CHECKING:
    from forge.live import LogFormat
    from node.link import Link
    from node.preferences import Preferences
    from node.rules import Senses
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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="modularforge", prog_name="forge-node")
def main() -> None:
    """Train experts of a shared model on this machine."""


def _data_dir_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Where this node keeps its key, downloads and "
        "checkpoints. Default: FORGE_DATA_DIR, else ~/.local/share/modularforge.")(command)  # fmt: skip


@main.command()
@click.argument("where", required=False, metavar="[INVITATION|ADDRESS]")
@click.option("--token", metavar="INVITATION", help="The invitation, beside an ADDRESS. Default: FORGE_TOKEN.")
@click.option("--ram", metavar="SIZE", help="Memory that training may use, such as 8G or 900M. Default: what is free "
              "now, less a reserve for you, at most 8G.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads for training. "
              "Default: OMP_NUM_THREADS, else the physical cores.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), help="Where to train.  [default: auto]")
@_data_dir_option
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Options of this command as YAML, such "
              "as `hours: 22-7`; what is typed wins. Default: DATA_DIR/node.yaml.")  # fmt: skip
@click.option("--name", help="Name that your shards are credited to. Default: this machine's host name.")
@click.option("--when", type=click.Choice(["always", "idle"]), help="Train always, or only while nobody has used this "
              "machine for 3 minutes.  [default: always]")  # fmt: skip
@click.option("--hours", metavar="SPANS", help="Train only in these hours of the day, such as 22-7 or 8:30-12,14-18.")
@click.option("--on-battery", type=click.Choice(["no", "yes"]), help="Whether to train on the battery.  [default: no]")
@click.option("--nice", type=click.IntRange(0, 19), help="Priority of training: 19 takes what nobody else wants, 0 its "
              "full share.  [default: 19]")  # fmt: skip
@click.option("--disk", metavar="SIZE", help="What DATA_DIR may hold, such as 5G. Default: what the disk has.")
@click.option("--max-upload", metavar="RATE", help="Bytes a second that shards are sent with, such as 200k or 2M.")
@click.option("--max-download", metavar="RATE", help="Bytes a second that files are fetched with.")
@click.option("--once", is_flag=True, help="Leave after one shard.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", help="json prints an object a line.")
@click.option("--insecure", count=True, help="Do not encrypt; only for a coordinator on this machine that does not "
              "either, unless it is said twice.")  # fmt: skip
@report_errors()
def join(where: str | None, token: str | None, data_dir: Path | None, config: Path | None, once: bool, insecure: int,
         log_format: LogFormat, **limits: str | int | None) -> None:  # fmt: skip
    """Join a run and train one expert after the other.

    The first time it needs the INVITATION that the coordinator's operator made (or FORGE_TOKEN, which other users of
    this machine cannot see); without one it shows the coordinators on this network and asks for it. Later it
    remembers. ADDRESS (HOST[:PORT], or FORGE_COORDINATOR) is where the coordinator is now, if that is not where it was.
    """
    from node.preferences import load_preferences

    here = (data_dir or default_data_dir()).resolve()
    preferences = load_preferences(config, here, {key.replace("_", "-"): value for key, value in limits.items()})
    link = make_link(where, token, here, insecure, ask=True)
    sys.exit(run_node(link, preferences, here, once, log_format=log_format))


def make_link(where: str | None, token: str | None, data_dir: Path, insecure: int, ask: bool = False) -> Link:
    """The line to the coordinator that arguments, environment and the node's memory name, or, with `ask`, the owner does."""
    from forge.invitation import PREFIX, Invitation
    from node.link import BOOK_FILE, Link
    from node.nearby import look, meet

    # Taken out of the environment so that the training process does not inherit it.
    text = token or os.environ.pop("FORGE_TOKEN", None)
    address = where or os.environ.get("FORGE_COORDINATOR")
    if address is not None and address.startswith(PREFIX):
        text, address = token or address, None
    invitation = Invitation.parse(text) if text else None
    if ask and not (address or invitation or insecure or (data_dir / BOOK_FILE).is_file()):
        invitation = meet()
    return Link(parse_address(address) if address else None, data_dir=data_dir, insecure=insecure, invitation=invitation,
                otherwise=f"127.0.0.1:{DEFAULT_PORT}", look=None if address else look)  # fmt: skip


def run_node(link: Link, preferences: Preferences, data_dir: Path, once: bool, run_job: RunJob | None = None,
             senses: Senses | None = None, log_format: LogFormat = "text") -> int:  # fmt: skip
    """Wire the agent together and run it; gRPC and the like are imported here, so that --help stays quick.

    Args:
        link: where the coordinator is and how it is known.
        preferences: what the owner allows.
        data_dir: where the node keeps its files.
        once: the --once option.
        run_job: starts the training process; None starts the real one.
        senses: what is known of the owner; None asks the operating system.
        log_format: lines of text or of JSON.

    Returns:
        The exit code.
    """
    from forge.system import default_threads
    from forge.train.memory import check_ram
    from node.agent import Agent
    from node.client import FleetClient
    from node.console import Console
    from node.guest import Guest
    from node.identity import Identity
    from node.machine import MachineProfile
    from node.senses import Senses as OperatingSystem
    from node.throttle import Throttle
    from node.worker import Worker, run_train_expert

    machine = MachineProfile.measure(preferences.device)
    ram_bytes = preferences.ram or machine.default_ram_bytes
    check_ram(ram_bytes, machine.memory_bytes)
    if ram_bytes <= 0:
        raise MemoryBudgetError("This machine has no memory to spare right now: close something, or say with --ram how "
                                "much training may use.")  # fmt: skip
    # A service manager stops a node as its owner would: at the next checkpoint, with the lease given back.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
    console, name = Console(log_format=log_format), preferences.name or socket.gethostname() or "node"
    guest = Guest(preferences.rules, senses or OperatingSystem())
    identity = Identity.open(data_dir)
    client = FleetClient(link, identity=identity, name=name, ram_bytes=ram_bytes, on_wait=console.wait,
                         version=_version(), upload=Throttle(preferences.max_upload),
                         download=Throttle(preferences.max_download))  # fmt: skip
    worker = Worker(console, ram_bytes=ram_bytes, threads=preferences.threads or default_threads(), device=machine.device,
                    run_job=run_job or run_train_expert, hold=guest.hold, nice=preferences.nice)  # fmt: skip
    return Agent(client=client, identity=identity, machine=machine, worker=worker, console=console, data_dir=data_dir,
                 name=name, ram_bytes=ram_bytes, guest=guest, once=once, disk_bytes=preferences.disk).run()  # fmt: skip


@main.command()
@click.option("--for", "duration", metavar="TIME", help="How long, such as 90m, 2h or 1d. Default: until resume.")
@_data_dir_option
@report_errors()
def pause(duration: str | None, data_dir: Path | None) -> None:
    """Have the node here stop training and keep its lease."""
    _tell(data_dir, {"do": "pause", "seconds": None if duration is None else parse_duration(duration)})


@main.command()
@_data_dir_option
@report_errors()
def resume(data_dir: Path | None) -> None:
    """End a pause."""
    _tell(data_dir, {"do": "resume"})


@main.command()
@click.option("--now", is_flag=True, help="Do not wait for the expert: at the next checkpoint, send what was trained so far, "
              "which another node goes on from.")  # fmt: skip
@_data_dir_option
@report_errors()
def finish(now: bool, data_dir: Path | None) -> None:
    """Have the node here hand in its expert, then leave."""
    _tell(data_dir, {"do": "finish", "now": now})


@main.command()
@_data_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@report_errors()
def status(data_dir: Path | None, as_json: bool) -> None:
    """Show what the node here does, and what it waits for."""
    _tell(data_dir, {"do": "status"}, as_json)


@main.command()
@click.argument("where", required=False, metavar="[INVITATION|ADDRESS]")
@click.option("--token", metavar="INVITATION", help="The invitation, beside an ADDRESS. Default: FORGE_TOKEN.")
@_data_dir_option
@click.option("--insecure", count=True, help="As of join.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@report_errors()
def doctor(where: str | None, token: str | None, data_dir: Path | None, insecure: int, as_json: bool) -> None:
    """Check whether this machine can work for a coordinator. It says what to mend; nothing is joined."""
    from dataclasses import asdict

    from node.doctor import describe, examine
    from node.preferences import load_preferences

    here = (data_dir or default_data_dir()).resolve()
    findings = []
    for finding in examine(lambda: make_link(where, token, here, insecure), here, load_preferences(None, here, {})):
        findings.append(finding)
        if not as_json:
            click.echo(describe(finding))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    sys.exit(any(finding.state == "broken" for finding in findings))


@main.command("install-service", context_settings={"ignore_unknown_options": True})
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF JOIN]...")
@click.option("--uninstall", is_flag=True, help="Remove the service's file.")
@report_errors()
def install_service(options: tuple[str, ...], uninstall: bool) -> None:
    """Write a systemd service that runs `forge-node join`. It is yours, with these options; nothing is started.

    The node must have joined once: the service takes no invitation, which would stand in its file for everybody to read.
    """
    from forge.train.memory import check_ram
    from node import service
    from node.link import BOOK_FILE
    from node.machine import MachineProfile
    from node.preferences import Preferences, load_preferences

    if uninstall:
        click.echo(f"Removed {service.uninstall()}. What still runs ends with:  systemctl --user stop {service.UNIT_NAME}")
        return
    context = join.make_context("forge-node join", list(options))
    given = context.params
    here = (given["data_dir"] or default_data_dir()).resolve()
    join_once = f"join once with `forge-node join INVITATION --data-dir {here}`, stop it, and"
    if given["where"] or given["token"]:
        raise ConfigError(f"A service takes no invitation and no address: {join_once} leave them out here.")
    if not (here / BOOK_FILE).is_file():
        raise ConfigError(f"This node has not joined a coordinator before: {join_once} run the same command again.")
    limits = {name.replace("_", "-"): value for name, value in given.items() if name in Preferences.model_fields}
    preferences = load_preferences(given["config"], here, limits)
    check_ram(preferences.ram or 0, MachineProfile.measure(preferences.device).memory_bytes)
    typed = [option for option in join.params if isinstance(option, click.Option) and option.name != "data_dir"
             and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE]  # fmt: skip
    words = [word for option in typed for word in _words(option, given[option.name])]
    path = service.install(["--data-dir", str(here), *words])
    click.echo(f"Wrote {path}. To start it now and whenever you log in:\n\n  systemctl --user daemon-reload\n"
               f"  systemctl --user enable --now {service.UNIT_NAME}\n\n"
               "and to have it run while you are logged out too:  loginctl enable-linger")  # fmt: skip


def _words(option: click.Option, value: Any) -> list[str]:
    """An option as it is typed, with a path that is the same wherever that is done."""
    if option.is_flag or option.count:
        return [option.opts[0]] * int(value)
    return [option.opts[0], str(value.resolve() if isinstance(value, Path) else value)]


def parse_duration(text: str) -> float:
    """Seconds from `30s`, `90m`, `2h` or `1d`.

    Raises:
        ConfigError: it is none of these.
    """
    number, unit = text.strip()[:-1], text.strip()[-1:]
    if unit not in ("s", "m", "h", "d") or not number.isascii() or not number.isdigit() or not 0 < int(number) < 10_000:
        raise ConfigError(f"--for {text[:80]!r} must look like 30s, 90m, 2h or 1d.")
    return int(number) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[unit]


def _tell(data_dir: Path | None, request: dict[str, object], as_json: bool = False) -> None:
    """Say something to the node that runs here, and print how it is then."""
    from node.control import ask, describe

    answer = ask((data_dir or default_data_dir()).resolve(), request)
    click.echo(json.dumps(answer, indent=2) if as_json else describe(answer))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("modularforge")
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    main()
