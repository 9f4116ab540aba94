"""The `forge-coordinator` command. Only this file parses its command line; heavy imports wait until they are needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
import signal
import sys

import click

from forge.errors import INTERRUPTED, report_errors
from forge.vocabulary import DEFAULT_PORT

# gRPC's C++ core writes to stderr by itself, beside the sentence of ours that says the same; it reads this when imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


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
@click.option("--exit-when-done", is_flag=True, help="Exit when every expert is accepted and the model is evaluated.")
@report_errors()
def serve(overrides: tuple[str, ...], config: str, run_dir: Path | None, listen: str, push: str | None,
          exit_when_done: bool) -> None:  # fmt: skip
    """Start, or go on with, a run; the same command goes on after any interruption."""
    from coordinator.serve import serve as run
    from forge.config import load_config

    resolved = load_config(config, overrides)
    stopped_by = run(resolved, run_dir or Path("runs") / resolved.name, listen, push, exit_when_done)
    if stopped_by == signal.SIGINT:
        sys.exit(INTERRUPTED)


@main.command()
@click.argument("address", required=False)
@click.option("--run-dir", type=click.Path(path_type=Path), default=None,
              help="Ask the coordinator that works in this directory.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@report_errors()
def status(address: str | None, run_dir: Path | None, as_json: bool) -> None:
    """Show how far a run is; ADDRESS is HOST:PORT, else FORGE_COORDINATOR, else this machine's default port."""
    from coordinator.admin import describe, fetch_status, find_address

    answer = fetch_status(find_address(address, run_dir))
    click.echo(json.dumps(answer, indent=2) if as_json else describe(answer))


if __name__ == "__main__":
    main()
