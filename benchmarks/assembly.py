"""Assembly against copying: the time to put experts in place beside `cp` of the same bytes, and the peak memory of it.

    python benchmarks/assembly.py

Each point is a published run of random weights. A child process makes the model directory (every expert a placeholder), then
accepts a shard for each expert; `cp` copies the same files, and `sync` waits for the disk as the assembly does. Peak memory is
the child's resident set: it should not depend on the number or the size of the experts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own directory is on the path, its package is not

from forge.checkpoint.assembly import accept, start  # noqa: E402
from forge.checkpoint.safetensors_header import TensorEntry, header_bytes  # noqa: E402
from forge.config import RunConfig, parse_config  # noqa: E402
from forge.files import RunDirectory, write_json  # noqa: E402
from forge.model import names  # noqa: E402
from forge.system import peak_resident_bytes  # noqa: E402
from forge.vocabulary import expert_file  # noqa: E402

MB = 1 << 20
#: Experts, width, layers: 1 MB to 500 MB an expert, 4 to 64 of them.
POINTS = ((4, 128, 2), (16, 128, 2), (64, 128, 2), (4, 512, 4), (16, 512, 4), (4, 1024, 8), (4, 2048, 8))


def main() -> int:
    """Measure every point and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--points", type=int, nargs="*", default=range(len(POINTS)), help="numbers of points; default all")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(_assemble(RunDirectory(options.child))))
        return 0
    lines = ["| experts | MB each | placeholders | cp | ratio | accept all | cp | ratio | peak memory |", "|" + "---|" * 9]
    print("\n".join(lines))
    for number in options.points:
        with tempfile.TemporaryDirectory(prefix="forge-assembly-") as directory:
            lines.append(_measure(Path(directory), *POINTS[number]))
        print(lines[-1], flush=True)
    if options.output is not None:
        head = "# Assembly\n\nPrinted by `benchmarks/assembly.py`; times in seconds, with the wait for the disk.\n\n"
        options.output.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    return 0


def _measure(root: Path, experts: int, width: int, layers: int) -> str:
    config = parse_config({
        "model": {"vocab_size": 512, "d_model": width, "d_ff": 4 * width, "n_layers": layers, "n_heads": width // 64 + 1,
                  "head_dim": 64, "n_experts": experts, "top_k": 2, "max_seq_len": 64},
        "train": {"shared": {"tokens": 1}, "expert": {"tokens": 1}}})  # fmt: skip
    run = _publish(root / "run", config)
    found = json.loads(subprocess.run([sys.executable, __file__, "--child", str(run.root)], stdout=subprocess.PIPE,
                                      text=True, check=True).stdout)  # fmt: skip
    files = [run.model / expert_file(expert) for expert in range(experts)]
    copied = _copy(files, root / "copies")
    size = files[0].stat().st_size
    return (f"| {experts} | {size / MB:.1f} | {found['start']:.2f} | {copied:.2f} | {found['start'] / copied:.2f} | "
            f"{found['accept']:.2f} | {copied:.2f} | {found['accept'] / copied:.2f} | {found['peak'] / MB:.1f} M |")  # fmt: skip


def _assemble(run: RunDirectory) -> dict[str, float]:
    shards = json.loads((run.root / "shards.json").read_text())
    began = time.perf_counter()
    start(run)
    subprocess.run(["sync", "-f", str(run.model)], check=True)
    started = time.perf_counter()
    for expert, sha256 in enumerate(shards):
        accept(run, expert, sha256, {})
    subprocess.run(["sync", "-f", str(run.model)], check=True)
    return {"start": started - began, "accept": time.perf_counter() - started, "peak": peak_resident_bytes()}


def _copy(files: list[Path], target: Path) -> float:
    target.mkdir()
    subprocess.run(["sync", "-f", str(target)], check=True)
    began = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    return time.perf_counter() - began


def _publish(root: Path, config: RunConfig) -> RunDirectory:
    """A run that has published random components, with a shard of random weights for every expert among its blobs."""
    run, model = RunDirectory.open(root, config), config.model
    facts: dict[str, Any] = {"run_id": run.run_id, "config_fingerprint": config.fingerprint, "partitions": []}
    shapes = {"shared_with_context": names.shared_tensors(model), "router": names.router_tensors(model),
              "shared_ffn": names.ffn_tensors(model)}  # fmt: skip
    for part, tensors in shapes.items():
        facts[part] = _random_file(run, tensors)
    facts["shared"] = facts["shared_with_context"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_json(run.data / name, {})
    shards = [_random_file(run, names.expert_tensors(model, expert))["sha256"] for expert in range(model.n_experts)]
    write_json(run.root / "shards.json", shards)
    run.finish("publish", facts)
    subprocess.run(["sync", "-f", str(root)], check=True)
    return run


def _random_file(run: RunDirectory, shapes: dict[str, names.Shape]) -> dict[str, str | int]:
    rng, end, entries = np.random.default_rng(), 0, {}
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        entries[name] = TensorEntry("F32", shape, end, end + size)
        end += size
    path = run.work / "random.safetensors"
    with open(path, "wb") as file:
        file.write(header_bytes(entries, {"format": "pt"}))
        for begin in range(0, end, MB):
            file.write(rng.standard_normal(min(MB, end - begin) // 4, dtype=np.float32).tobytes())
    return {"sha256": run.blobs.adopt(path), "size": path.stat().st_size if path.exists() else end}


if __name__ == "__main__":
    sys.exit(main())
