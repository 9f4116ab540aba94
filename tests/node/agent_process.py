"""A real agent in a real process, with a job that counts: ADDRESS DATA_DIR [HOLD_AT] [KEY=VALUE]... [--deaf] [--forever]

KEY=VALUE is a preference of the owner, and signs of the owner are files in DATA_DIR. Plaintext without FORGE_TOKEN.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
import sys
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from fakes import CountingJob, SignsInFiles  # type: ignore[import-not-found]  # noqa: E402

from forge.errors import report_errors  # noqa: E402
from forge.invitation import Invitation  # noqa: E402
from node.cli import run_node  # noqa: E402
from node.link import Link  # noqa: E402
from node.preferences import load_preferences  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--deaf", action="store_true")
    parser.add_argument("--forever", action="store_true")
    parser.add_argument("rest", nargs="*")
    given = parser.parse_intermixed_args()
    hold_at = next((int(text) for text in given.rest if text.isdigit()), None)
    text = os.environ.get("FORGE_TOKEN")
    link = Link(given.address, insecure=1) if text is None else Link(given.address, invitation=Invitation.parse(text))
    preferences = load_preferences(None, given.data_dir, {
        "ram": "2G", "threads": 1, "device": "cpu", "name": "tester",
        **dict(text.split("=", 1) for text in given.rest if "=" in text)})  # fmt: skip

    def run_job(arguments: dict[str, Any], *_: object) -> CountingJob:
        return CountingJob(arguments, hold_at=hold_at, deaf=given.deaf)

    return run_node(link, preferences, given.data_dir, not given.forever, run_job, SignsInFiles(given.data_dir))


if __name__ == "__main__":
    with report_errors():
        sys.exit(main())
