"""Assembly beside `cp` of the same bytes, and beside mergekit-moe on the same experts: time, and peak memory.

    python -m benchmarks.assembly --mergekit /path/to/bin/mergekit-moe

Each point is a published run of random weights. A child process makes the model directory, in which every expert is a
placeholder: the shared FFN's bytes, hashed (is it the published file?) and copied once an expert under the expert's names.
Then it hashes every shard's tensors for the lineage, which moves nothing, and accepts every shard: a hard link, a lineage, an
index and a manifest each, and no byte of a tensor is read. `cp` copies the experts' files of the finished model. All end when
the disk has everything; the syncs of its small files are what an accepted shard costs.

mergekit-moe, with a random gate, makes a Mixtral checkpoint of as many dense Mistral models that lie on the disk: the shared
components and one of the same experts each. Ours beside it is everything from the published run to the model with all experts.

Peak memory is the resident set of the child: it should not depend on the number or the size of the experts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import shutil
from statistics import median
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.common import heading, published_run, show, sync, table
from forge.checkpoint.assembly import accept, start
from forge.checkpoint.hf import mixtral_config
from forge.checkpoint.provenance import keep, origin
from forge.checkpoint.safetensors_header import write_renamed
from forge.config import ModelConfig, parse_config
from forge.data.tokenizer import tokenizer_files, train_tokenizer
from forge.files import RunDirectory, write_json
from forge.model import names
from forge.system import peak_resident_bytes, peak_resident_bytes_of
from forge.train.memory import MB
from forge.vocabulary import INDEX_FILE, SHARED_FILE, expert_file

#: Experts, width, layers: 1 MB to 500 MB an expert, 4 to 64 of them.
POINTS = ((4, 128, 2), (16, 128, 2), (64, 128, 2), (4, 512, 4), (16, 512, 4), (4, 1024, 8), (4, 2048, 8))
COLUMNS = ("experts", "MB each", "cp", "placeholders", "ratio", "hash the shards", "ratio", "accept them", "ratio", "peak memory")


def main() -> int:
    """Measure every point and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--points", type=int, nargs="*", default=range(len(POINTS)), help="numbers of points; default all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", type=Path, help="the program mergekit-moe of an environment of its own")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(_assemble(RunDirectory(options.child))))
        return 0
    if options.mergekit is None or not options.mergekit.is_file():
        print("mergekit-moe is left out: install mergekit in an environment of its own, and give its path with --mergekit.")
        options.mergekit = None
    rows: list[list[str]] = []
    for number in options.points:
        with tempfile.TemporaryDirectory(prefix="forge-assembly-") as directory:
            rows.append(_measure(Path(directory), *POINTS[number], options.rounds, options.mergekit))
        print(" | ".join(rows[-1]), flush=True)
    columns = [*COLUMNS, *(("mergekit-moe", "its peak memory") if options.mergekit else ())]
    text = (heading("Assembly", "assembly") + f"\nSeconds, medians of {options.rounds} rounds (mergekit-moe: one), with the wait "
            f"for the disk.\n\n{table(columns, rows)}")  # fmt: skip
    show(text, options.output)
    return 0


def _measure(root: Path, experts: int, width: int, layers: int, rounds: int, mergekit: Path | None) -> list[str]:
    config = parse_config({
        "model": {"vocab_size": 512, "d_model": width, "d_ff": 4 * width, "n_layers": layers, "n_heads": width // 64 + 1,
                  "head_dim": 64, "n_experts": experts, "top_k": 2, "max_seq_len": 64},
        "train": {"shared": {"tokens": 1}, "expert": {"tokens": 1}}})  # fmt: skip
    run, shards = published_run(root / "run", config)
    write_json(run.root / "shards.json", shards)
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        for directory in (run.model, root / "copies", run.root / "provenance"):
            shutil.rmtree(directory, ignore_errors=True)
        sync(root)
        child = subprocess.run([sys.executable, "-m", "benchmarks.assembly", "--child", str(run.root)], stdout=subprocess.PIPE,
                               text=True, check=True)  # fmt: skip
        copied = _copy([run.model / expert_file(expert) for expert in range(experts)], root / "copies")
        found.append({**json.loads(child.stdout), "cp": copied})

    def middle(name: str) -> float:
        return median(row[name] for row in found)

    row = [str(experts), f"{(run.model / expert_file(0)).stat().st_size / MB:.1f}"]
    row.append(f"{middle('cp'):.2f}")
    for name in ("start", "hash", "accept"):
        row += [f"{middle(name):.2f}", f"{median(one[name] / one['cp'] for one in found):.2f}"]
    row.append(f"{max(row['peak'] for row in found) / MB:.1f} M")
    return row if mergekit is None else row + _merge(mergekit, run, shards, root / "merge")


def _assemble(run: RunDirectory) -> dict[str, float]:
    config, shards = run.config, json.loads((run.root / "shards.json").read_text())
    times = [time.perf_counter()]
    start(run)
    sync(run.model)
    times.append(time.perf_counter())
    for expert, sha256 in enumerate(shards):
        keep(run, origin(run.blobs.path(sha256), config, expert, b"{}", sha256=sha256), {})
    times.append(time.perf_counter())
    for expert, sha256 in enumerate(shards):
        accept(run, expert, sha256, {})
    sync(run.model)
    times.append(time.perf_counter())
    seconds = dict(zip(("start", "hash", "accept"), np.diff(times).tolist(), strict=True))
    return {**seconds, "peak": peak_resident_bytes()}


def _copy(files: list[Path], target: Path) -> float:
    target.mkdir()
    sync(target)
    began = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(target)], check=True)
    sync(target)
    return time.perf_counter() - began


# mergekit-moe ---------------------------------------------------------------------------------------------------------


def _merge(program: Path, run: RunDirectory, shards: list[str], root: Path) -> list[str]:
    """Seconds and peak memory of mergekit-moe on the same experts."""
    model = run.config.model
    for expert, sha256 in enumerate(shards):
        _dense_model(root / f"dense-{expert}", run, model, expert, sha256)
    tokenizer_files(train_tokenizer([""], 257), root / "dense-0", model.max_seq_len)  # It insists on one.
    recipe = {"base_model": str(root / "dense-0"), "gate_mode": "random", "dtype": "float32",
              "experts": [{"source_model": str(root / f"dense-{expert}"), "positive_prompts": [""]}
                          for expert in range(model.n_experts)]}  # fmt: skip
    (root / "recipe.yml").write_text(json.dumps(recipe), encoding="utf-8")
    sync(root)
    began, peak = time.perf_counter(), 0
    with open(root / "log", "wb") as log:
        process = subprocess.Popen([program, "recipe.yml", "merged", "--no-copy-tokenizer"], cwd=root, stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, peak_resident_bytes_of(process.pid))
            time.sleep(0.005)
    sync(root)
    if process.returncode:
        raise SystemExit(f"{program} ended with exit status {process.returncode}:\n{(root / 'log').read_text()[-2000:]}")
    return [f"{time.perf_counter() - began:.2f}", f"{peak / MB:.0f} M"]


def _dense_model(directory: Path, run: RunDirectory, model: ModelConfig, expert: int, sha256: str) -> None:
    """The shared components and one expert as a Mistral checkpoint."""
    directory.mkdir(parents=True)
    (directory / SHARED_FILE).hardlink_to(run.model / SHARED_FILE)
    theirs = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    rename = {names.expert_name(layer, expert, matrix): f"model.layers.{layer}.mlp.{theirs[matrix]}.weight"
              for layer in range(model.n_layers) for matrix in names.MATRICES}  # fmt: skip
    write_renamed(run.blobs.path(sha256), directory / "expert.safetensors", rename, {"format": "pt"})
    config: dict[str, Any] = {**mixtral_config(model), "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    write_json(directory / "config.json", config)
    write_json(directory / INDEX_FILE, {"metadata": {}, "weight_map": {
        **dict.fromkeys(names.shared_tensors(model), SHARED_FILE),
        **dict.fromkeys(rename.values(), "expert.safetensors")}})  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
