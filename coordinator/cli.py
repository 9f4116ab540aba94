"""The `forge-coordinator` command. Only this file parses its command line; heavy imports wait until they are needed."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
from pathlib import Path
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from forge.errors import INTERRUPTED, ConfigError, StorageError, report_errors
from forge.tracking import track_option
from forge.vocabulary import DASHBOARD_PORT, DEFAULT_PORT, INDEX_FILE

if TYPE_CHECKING:
    from forge.live import LogFormat

# gRPC's C++ core writes to stderr by itself, beside the sentence of ours that says the same; it reads this when imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

#: Nodes that the invitation lets in that `serve` prints on a terminal.
INVITED = 5


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="modularforge")
def main() -> None:
    """Coordinate a run: prepare it, lease its partitions to nodes, and assemble the experts they train."""


@main.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--config", default="default", show_default=True, metavar="FILE|NAME",
              help="Config file, or the name of a packaged one.")  # fmt: skip
@click.option("--run-dir", type=click.Path(path_type=Path), default=None,
              help="Directory of the run; default runs/NAME.")  # fmt: skip
@click.option("--listen", default=f"127.0.0.1:{DEFAULT_PORT}", show_default=True, metavar="HOST:PORT",
              help="Where to listen; 0.0.0.0:PORT for other machines.")  # fmt: skip
@click.option("--push", default=None, metavar="USER/REPO",
              help="Push the model to the Hub after every accepted expert.")  # fmt: skip
@click.option("--private", is_flag=True, help="With --push: create the repository private.")
@click.option("--dashboard", default=None, metavar="HOST:PORT|off", show_default=f"127.0.0.1:{DASHBOARD_PORT}",
              help="Where to serve the web page; another free port when the default one is in use.")  # fmt: skip
@click.option("--announce/--no-announce", default=True, show_default=True,
              help="Whether nodes on this network may find it; on a loopback address it never is announced.")  # fmt: skip
@click.option("--invite", type=click.IntRange(0, 10_000), default=None, metavar="USES", show_default="5 on a terminal when "
              "other machines can reach it, else 0", help="Print an invitation for so many nodes.")  # fmt: skip
@click.option("--ram", default=None, metavar="SIZE",
              help="Memory that a stage, a verdict or an evaluation may use, such as 8G; default all there is.")  # fmt: skip
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", help="json prints an object a line.")
@track_option
@click.option("--exit-when-done", is_flag=True, help="Exit when every expert is accepted and the model is evaluated.")
@click.option("--insecure", count=True, help="Do not encrypt; only for nodes on this machine, unless it is said twice.")
@report_errors()
def serve(overrides: tuple[str, ...], config: str, run_dir: Path | None, listen: str, push: str | None,
          private: bool, dashboard: str | None, announce: bool, invite: int | None, ram: str | None, exit_when_done: bool,
          insecure: int, log_format: LogFormat, track: str | None) -> None:  # fmt: skip
    """Start a run, or go on with it after any interruption."""
    from coordinator.addresses import is_loopback, parse_listen
    from coordinator.serve import serve as run
    from forge.config import load_config
    from forge.pipeline import check_budget
    from forge.train.memory import STAGES, parse_size

    if overrides and "=" not in overrides[0]:
        raise ConfigError(f"{overrides[0]!r} is no KEY=VALUE: did you mean --config {overrides[0]}?")
    resolved = load_config(config, overrides)
    if invite is None:  # Where no person reads it, a secret would only lie in a log.
        invite = INVITED if sys.stdout.isatty() and not is_loopback(parse_listen(listen)[0]) else 0
    ram_bytes = None if ram is None else parse_size(ram)
    if ram_bytes is not None:
        check_budget(resolved, ram_bytes, [stage for stage in STAGES if stage != "expert"])
    stopped_by = run(resolved, run_dir or Path("runs") / resolved.name, listen, push, exit_when_done,
                     insecure, dashboard, ram_bytes, announce, invite, log_format, track, private)  # fmt: skip
    if stopped_by == signal.SIGINT:
        sys.exit(INTERRUPTED)


def _run_dir(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option("--run-dir", type=click.Path(path_type=Path), default=None,
                        help=f"Directory of the run; default: {default}.")  # fmt: skip


_run_dir_option = _run_dir("the one below runs that a coordinator works in")
_stopped_run_dir_option = _run_dir("the one below runs that a coordinator works in, or worked in where none does")


def _json_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


@main.command()
@_run_dir_option
@_json_option
@report_errors()
def status(run_dir: Path | None, as_json: bool) -> None:
    """Show how far a run is, on the machine that coordinates it."""
    from coordinator.admin import describe, fetch_status, find_run

    answer = fetch_status(find_run(run_dir))
    click.echo(json.dumps(answer, indent=2) if as_json else describe(answer))


@main.command()
@click.argument("repo", metavar="USER/REPO")
@_stopped_run_dir_option
@click.option("--private", is_flag=True, help="Create the repository private.")
@report_errors()
def push(repo: str, run_dir: Path | None, private: bool) -> None:
    """Push the run's model to the Hub as it is now. Again, it sends what is missing; a coordinator may run meanwhile."""
    from coordinator.admin import find_run
    from forge.files import RunDirectory
    from forge.publish.publication import check_repository, publish

    check_repository(repo)
    run = RunDirectory(find_run(run_dir, running=False))
    if not (run.model / INDEX_FILE).is_file():
        raise StorageError(f"{run.root} has no model yet: a coordinator makes it there once its run is prepared.")
    click.echo(publish(run.model, repo, private=private))


@main.command()
@click.option("--nodes", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Machines at a time.")
@click.option("--experts", type=click.IntRange(1, 100_000), default=40, show_default=True, help="Partitions of the run.")
@click.option("--churn", type=click.FloatRange(0, 0.99), multiple=True, help="Share of the nodes that leave in the time in "
              "which a usual one trains one expert. May be given several times.  [default: 0, 0.1 .. 0.5]")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1, 1000), default=5, show_default=True, help="Runs of which the mean is shown.")
@click.option("--seed", type=int, default=0, show_default=True, help="The first of them.")
@click.option("--expert-hours", type=click.FloatRange(0, min_open=True), default=4.0, show_default=True,
              help="Hours in which a usual node trains one expert.")  # fmt: skip
@_json_option
@report_errors()
def simulate(nodes: int, experts: int, churn: tuple[float, ...], seeds: int, seed: int, expert_hours: float,
             as_json: bool) -> None:  # fmt: skip
    """Print how long a run takes with nodes that come and go. And what of their work would be wasted."""
    from coordinator.simulation import Scenario, describe, table

    base = Scenario(nodes=nodes, experts=experts, churn=0.0, seed=seed, expert_hours=expert_hours)
    rows = table(base, churn or tuple(step / 10 for step in range(6)), seeds)
    click.echo(json.dumps(rows, indent=2) if as_json else describe(rows))


@main.group()
def token() -> None:
    """Invite machines. An invitation is one string that lets a number of nodes in."""


@token.command("create")
@_stopped_run_dir_option
@click.option("--qr", is_flag=True, help="Show the line to type as a QR code, too.")
@click.option("--uses", type=click.IntRange(1, 10_000), default=1, show_default=True, help="How many nodes it lets in.")
@click.option("--expires", default="7d", show_default=True, metavar="TIME", help="How long: 90m, 12h, 7d or 2w.")
@click.option("--name", default="", help="For whom, to tell invitations apart.")
@click.option("--address", "addresses", multiple=True, metavar="HOST:PORT",
              help="Where nodes reach the coordinator; default: where the one that runs listens.")  # fmt: skip
@report_errors()
def token_create(run_dir: Path | None, qr: bool, uses: int, expires: str, name: str, addresses: tuple[str, ...]) -> None:
    """Print an invitation. Whoever has it can join; nobody can be shown it again."""
    from coordinator.addresses import is_loopback
    from coordinator.admin import find_run
    from coordinator.invite import create_token, join_line
    from forge.invitation import Invitation

    text, encrypted = create_token(find_run(run_dir, running=False), uses=uses, expires=expires, name=name, addresses=addresses)
    click.echo(text)
    line, insecure = join_line(text, encrypted), "" if encrypted else " --insecure"
    # On stderr, so that INVITATION=$(forge-coordinator token create) holds the string alone.
    click.echo(f"\non the machine that joins, once:\n\n  {line}\n\nor, where others may see the "
               f"list of processes:\n\n  FORGE_TOKEN={text} forge-node join{insecure}\n", err=True)  # fmt: skip
    if all(is_loopback(address.rpartition(":")[0]) for address in Invitation.parse(text).addresses):
        click.echo("Only this machine can use it: for others, start the coordinator with "
                   f"--listen 0.0.0.0:{DEFAULT_PORT} and make another one.\n", err=True)  # fmt: skip
    if qr:
        import segno

        segno.make_qr(line, error="l").terminal(out=sys.stderr, compact=True)


@token.command("list")
@_stopped_run_dir_option
@report_errors()
def token_list(run_dir: Path | None) -> None:
    """Show every invitation: its id, not the string."""
    from coordinator.admin import find_run
    from coordinator.invite import list_tokens

    click.echo(list_tokens(find_run(run_dir, running=False)))


@token.command("revoke")
@click.argument("invitation", metavar="ID")
@_stopped_run_dir_option
@report_errors()
def token_revoke(invitation: str, run_dir: Path | None) -> None:
    """Let nobody else in with an invitation."""
    from coordinator.admin import find_run
    from coordinator.invite import revoke_token

    click.echo(revoke_token(find_run(run_dir, running=False), invitation))


def _show(lines: str, values: Callable[[dict[str, Any]], Any], run_dir: Path | None, as_json: bool) -> None:
    """Print a part of the snapshot that the dashboard shows, too: by a function of coordinator/listing.py, or as JSON."""
    from coordinator import listing
    from coordinator.admin import fetch_status, find_run

    snapshot = fetch_status(find_run(run_dir))["snapshot"]
    click.echo(json.dumps(values(snapshot), indent=2) if as_json else "\n".join(getattr(listing, lines)(snapshot)))


@main.command()
@_run_dir_option
@_json_option
@report_errors()
def experts(run_dir: Path | None, as_json: bool) -> None:
    """Show every expert. Its state, who trains it, how far that is, its losses."""
    _show("expert_lines", lambda snapshot: snapshot["experts"], run_dir, as_json)


@main.command()
@_run_dir_option
@_json_option
@report_errors()
def partitions(run_dir: Path | None, as_json: bool) -> None:
    """Show every partition: its text, and the perplexity on it. Of the model, and of the shared components alone."""
    from coordinator.listing import partitions as rows

    _show("partition_lines", rows, run_dir, as_json)


@main.command()
@_stopped_run_dir_option
@click.option("--follow", is_flag=True, help="Go on with what happens, also when the coordinator is started anew.")
@_json_option
@report_errors()
def events(run_dir: Path | None, follow: bool, as_json: bool) -> None:
    """Show what happened, in order. No coordinator has to run for that."""
    from coordinator.admin import find_run
    from coordinator.listing import event_line
    from coordinator.listing import events as read

    for line in read(find_run(run_dir, running=False), follow=follow):
        click.echo(line if as_json else event_line(line))


@main.group(invoke_without_command=True)
@_run_dir_option
@_json_option
@click.pass_context
@report_errors()
def nodes(context: click.Context, run_dir: Path | None, as_json: bool) -> None:
    """Show nodes and what they do; with a command, send them away.

    It is what a running coordinator knows now; `nodes list` needs none, and shows with which invitation each one came.
    """
    if context.invoked_subcommand is None:
        _show("node_lines", lambda snapshot: snapshot["nodes"], run_dir, as_json)


@nodes.command("list")
@_stopped_run_dir_option
@report_errors()
def nodes_list(run_dir: Path | None) -> None:
    """Show every node that ever joined."""
    from coordinator.admin import find_run
    from coordinator.invite import list_nodes

    click.echo(list_nodes(find_run(run_dir, running=False)))


@nodes.command("revoke")
@click.argument("name")
@click.option("--drop-shards", is_flag=True, help="Take its accepted experts out of the model as well.")
@_stopped_run_dir_option
@report_errors()
def nodes_revoke(name: str, drop_shards: bool, run_dir: Path | None) -> None:
    """Refuse every further call of the node NAME (or its id). Its lease is open again at once."""
    from coordinator.admin import find_run
    from coordinator.invite import revoke_node

    click.echo(revoke_node(find_run(run_dir, running=False), name, drop_shards=drop_shards))


if __name__ == "__main__":
    main()
