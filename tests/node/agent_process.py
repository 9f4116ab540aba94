"""A real agent in a real process, with a job that counts: ADDRESS DATA_DIR [HOLD_AT]. Plaintext without FORGE_TOKEN."""

from __future__ import annotations

import os
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parent))

from fakes import CountingJob  # type: ignore[import-not-found]  # noqa: E402

from forge.errors import report_errors  # noqa: E402
from forge.invitation import Invitation  # noqa: E402
from node.cli import run_node  # noqa: E402
from node.link import Link  # noqa: E402

if __name__ == "__main__":
    address, data_dir, *rest = sys.argv[1:]
    hold_at = int(rest[0]) if rest else None
    text = os.environ.get("FORGE_TOKEN")
    link = Link(address, insecure=1) if text is None else Link(address, invitation=Invitation.parse(text))
    with report_errors():
        sys.exit(run_node(link, "2G", 1, "cpu", Path(data_dir), "tester", True, run_job=lambda arguments, threads, log,
                          ram_bytes: CountingJob(arguments, hold_at=hold_at)))  # fmt: skip
