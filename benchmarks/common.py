"""What the benchmarks share: a line that names the machine, and a published run of random weights with all its shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
from pathlib import Path
import platform
import subprocess
import time
from typing import Any

import numpy as np
import psutil

from forge.checkpoint.assembly import accept, start
from forge.checkpoint.safetensors_header import TensorEntry, header_bytes, tensors_sha256
from forge.config import RunConfig
from forge.files import RunDirectory, write_json
from forge.model import names
from forge.train.memory import MB

_CHUNK_VALUES = MB // 4


def heading(title: str, module: str) -> str:
    """The first lines of a page of results: what printed it, when and on what."""
    return f"# {title}\n\nPrinted by `python -m benchmarks.{module}` on {time.strftime('%Y-%m-%d')}: {machine()}.\n"


def machine() -> str:
    """The processor, its threads, the memory and the interpreter, as one phrase."""
    memory = psutil.virtual_memory().total / (1 << 30)
    return (f"{_processor()}, {psutil.cpu_count()} hardware threads, {memory:.0f} GiB, {platform.system()} "
            f"{platform.release()}, Python {platform.python_version()}")  # fmt: skip


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def sync(directory: Path) -> None:
    """Wait until the disk has what was written to a file system."""
    subprocess.run(["sync", "-f", str(directory)], check=True)


def show(text: str, output: Path | None) -> None:
    """Print a page of results, and write it where it is to be kept."""
    print(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")


class Kept:
    """Results in a file of JSON lines, so that a second call does not try again what the first one tried."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        self._known: list[dict[str, Any]] = [json.loads(line) for line in lines]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in self._known), encoding="utf-8")
        self._read = 0

    def once(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The next result: the one that is known, or the one that is made now."""
        self._read += 1
        if self._read > len(self._known):
            self._known.append(make())
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f"{json.dumps(self._known[-1])}\n")
        return self._known[self._read - 1]


def published_run(root: Path, config: RunConfig, tokenizer: Any = None) -> tuple[RunDirectory, list[str]]:
    """A run that has published random components, and the shards of random experts among its blobs, by partition.

    Matrices are normal with the variance 1 / inputs and norms are 1, so that activations, routing and logits are of the
    size that training gives them.
    """
    run, model = RunDirectory.open(root, config), config.model
    rng = np.random.default_rng(config.seed)
    facts: dict[str, Any] = {"run_id": run.run_id, "config_fingerprint": config.fingerprint, "partitions": []}
    shapes = {"shared_with_context": names.shared_tensors(model), "router": names.router_tensors(model),
              "shared_ffn": names.ffn_tensors(model)}  # fmt: skip
    for part, tensors in shapes.items():
        facts[part] = _random_file(run, tensors, model.dtype, rng)
    facts["shared"], ffn = facts["shared_with_context"], facts["shared_ffn"]
    ffn["tensors_sha256"] = tensors_sha256(run.blobs.path(ffn["sha256"]), names.ffn_tensors(model))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_json(run.data / name, {})
    shards = [_random_file(run, names.expert_tensors(model, expert), model.dtype, rng)["sha256"]
              for expert in range(model.n_experts)]  # fmt: skip
    run.finish("publish", facts)
    return run, shards


def assembled_run(root: Path, config: RunConfig) -> RunDirectory:
    """The same with every shard accepted into its model."""
    run, shards = published_run(root, config)
    start(run)
    for expert, sha256 in enumerate(shards):
        accept(run, expert, sha256, {})
    return run


def _random_file(run: RunDirectory, shapes: Mapping[str, names.Shape], dtype: str,
                 rng: np.random.Generator) -> dict[str, Any]:  # fmt: skip
    code, width = ("BF16", 2) if dtype == "bfloat16" else ("F32", 4)
    end, entries = 0, {}
    for name, shape in shapes.items():
        size = width * int(np.prod(shape))
        entries[name] = TensorEntry(code, shape, end, end + size)
        end += size
    path = run.work / "random.safetensors"
    with open(path, "wb") as file:
        file.write(header_bytes(entries, {"format": "pt"}))
        for shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                count = min(left, _CHUNK_VALUES)
                values = (np.ones(count, np.float32) if len(shape) == 1
                          else rng.standard_normal(count, dtype=np.float32) * shape[-1] ** -0.5)  # fmt: skip
                # The upper half of a float32 is a bfloat16, cut off instead of rounded.
                file.write(values.astype("<f4").view("<u2")[1::2].tobytes() if width == 2 else values.tobytes())
                left -= count
    size = path.stat().st_size
    return {"sha256": run.blobs.adopt(path), "size": size}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
