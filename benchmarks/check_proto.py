"""Fail when the committed stubs are not what the protos generate."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path
import subprocess
import sys
import tempfile

ROOT = Path(__file__).resolve().parent.parent
STUBS = ROOT / "proto" / "modularforge" / "v1"


def main() -> int:
    """Generate into a temporary directory and compare."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["sh", str(ROOT / "proto" / "generate.sh"), directory], check=True, stderr=subprocess.DEVNULL,
                       env=dict(os.environ, PYTHON=sys.executable, PATH=path))  # fmt: skip
        made = sorted(Path(directory).rglob("*_pb2*"))
        drifted = [file.name for file in made if not filecmp.cmp(file, STUBS / file.name, shallow=False)]
    if drifted or not made:
        print(f"The stubs {', '.join(drifted)} are not what the protos generate: run proto/generate.sh and commit.")
        return 1
    print(f"{len(made)} stubs equal what the protos generate")
    return 0


if __name__ == "__main__":
    sys.exit(main())
