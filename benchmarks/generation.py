"""Tokens a second of greedy generation beside transformers on the same assembled checkpoint, and a model larger than its memory.

    python -m benchmarks.generation

Each checkpoint is a run of random weights, published and assembled from its shards. Ours is `forge.evaluate.generate`, what
`forge generate` prints with; theirs is `generate` of transformers' MixtralForCausalLM with its defaults, in float32, as ours
computes whatever the file's type, and for a bfloat16 file once more in bfloat16. They take turns in one process, continue
the same prompt, and must write the same tokens, or the exit status is 1; bfloat16 rounds its activations and is exempt.

The last table is `forge generate` itself, its model not in the page cache, in a control group that is smaller than the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import os
from pathlib import Path
from statistics import median
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks.common import assembled_run, heading, show, sync, table
from forge.config import RunConfig, load_config, parse_config
from forge.data.sources import documents
from forge.data.tokenizer import tokenizer_files, train_tokenizer
from forge.evaluate.generate import Sampling, tokens
from forge.model.moe import MixtureLM
from forge.system import default_threads
from forge.train.memory import MB, format_size, parse_size

#: Name of a packaged config, type of the file.
POINTS = (("smoke", "float32"), ("default", "float32"), ("default", "bfloat16"))
_PROMPT = range(10, 26)
_TEXT = "import os"
#: The end of text, the 256 bytes and one merge: almost all of the larger model is its experts.
_SMALL_VOCABULARY = 258

Generator = Callable[[], list[int]]


def main() -> int:
    """Time every checkpoint, then write with a model that does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="*", default=range(len(POINTS)), help="checkpoints by number")
    parser.add_argument("--tokens", type=int, nargs="*", default=(64, 256), help="new tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--limit", default="700M", help="memory of the last table's process; 0 leaves the table out")
    parser.add_argument("--larger", type=float, default=4, help="size of its model as a multiple of that memory")
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, equal = list[list[str]](), True
    for number in options.points:
        name, dtype = POINTS[number]
        with tempfile.TemporaryDirectory(prefix="forge-generation-") as directory:
            config = load_config(name, [f"model.dtype={dtype}"])
            model = assembled_run(Path(directory) / "run", config).model
            for count in options.tokens:
                row, same = _compare(config, model, min(count, config.model.max_seq_len - len(_PROMPT)), options.rounds)
                rows.append([f"{name}, {dtype}", f"{config.model.total_parameters / 1e6:.1f} M", *row])
                equal &= same
                print(" | ".join(rows[-1]), flush=True)
    text = heading("Generation", "generation")
    text += f"\n{options.threads} threads, torch {torch.__version__}, batch of one, greedy.\n\n"
    text += table(["checkpoint", "parameters", "new tokens", "ours, tokens/s", "transformers", "ratio", "equal tokens",
                   "transformers in bfloat16", "ratio"], rows)  # fmt: skip
    if limit := parse_size(options.limit) if options.limit != "0" else 0:
        with tempfile.TemporaryDirectory(prefix="forge-generation-") as directory:
            text += "\n" + _larger_than_memory(Path(directory), limit, options.larger)
    show(text, options.output)
    return int(not equal)


def _compare(config: RunConfig, directory: Path, count: int, rounds: int) -> tuple[list[str], bool]:
    types = [torch.float32] + ([torch.bfloat16] if config.model.dtype == "bfloat16" else [])
    generators = [_ours(directory, count), *(_theirs(directory, count, dtype) for dtype in types)]
    written = [generator() for generator in generators]
    seconds: list[list[float]] = [[] for _ in generators]
    for _ in range(rounds):
        for generator, times in zip(generators, seconds, strict=True):
            began = time.perf_counter()
            generator()
            times.append(time.perf_counter() - began)
    rates = [f"{count / median(times):.1f}" for times in seconds]
    ratios = [f"{median(their / our for their, our in zip(times, seconds[0], strict=True)):.2f}" for times in seconds[1:]]
    same = written[0] == written[1]
    row = [str(count), rates[0], rates[1], ratios[0], "yes" if same else "no"]
    return row + ([rates[2], ratios[1]] if len(types) > 1 else ["", ""]), same


def _ours(directory: Path, count: int) -> Generator:
    model, prompt = MixtureLM.load(directory), list(_PROMPT)
    return lambda: [token.id for token in tokens(model, prompt, Sampling(count, temperature=0))]


def _theirs(directory: Path, count: int, dtype: torch.dtype) -> Generator:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    prompt = torch.tensor([list(_PROMPT)])

    def generate() -> list[int]:
        written = model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        new: list[int] = written[0, len(_PROMPT) :].tolist()
        return new

    return generate


# A model larger than its memory ---------------------------------------------------------------------------------------


def _larger_than_memory(root: Path, limit: int, times: float) -> str:
    config = _large_config(int(limit * times))
    run = assembled_run(root / "run", config)
    text = next(document.text for document in documents(config.data))
    tokenizer_files(train_tokenizer([text], _SMALL_VOCABULARY), run.model, config.model.max_seq_len)
    size = sum(path.stat().st_size for path in run.model.iterdir())
    rows, first = list[list[str]](), ""
    for group in (None, _Group.make(limit)):
        _forget(run.model)
        if group is None and rows:
            return "This process may not make control groups, so generation under a memory limit was not tried.\n"
        seconds, peak, anonymous, written = _generate(run.model, group)
        rows.append([format_size(limit) if group else "none", f"{seconds:.1f}", f"{peak / MB:.0f} M", f"{anonymous / MB:.0f} M",
                     "yes" if written == (first := first or written) else "no"])  # fmt: skip
    what = (f"a model of {format_size(size)} with {config.model.n_experts} experts of "
            f"{config.model.expert_parameters * 4 / MB:.0f} MB")  # fmt: skip
    return (f"`forge generate` of 24 tokens, start-up included; {what}, float32. Anonymous memory cannot be read again from a "
            "file; the rest of what is resident can, and the kernel takes it back at the limit (memory.max, or "
            "memory.limit_in_bytes of cgroup v1; pages of libraries that others use are charged to them).\n\n"
            + table(["limit", "seconds", "peak resident", "peak anonymous", "same text"], rows))  # fmt: skip


def _large_config(total: int) -> RunConfig:
    """Experts of about 100 MB, so many that the model has `total` bytes."""
    def config(experts: int) -> RunConfig:
        return parse_config({
            "data": {"source": "python-stdlib"},
            "model": {"vocab_size": _SMALL_VOCABULARY, "d_model": 1024, "d_ff": 4096, "n_layers": 3, "n_heads": 16,
                      "n_experts": experts, "top_k": 2, "max_seq_len": 128},
            "train": {"shared": {"tokens": 1}, "expert": {"tokens": 1}}})  # fmt: skip

    return config(max(2, total // (config(2).model.expert_parameters * 4)))


def _generate(model: Path, group: _Group | None) -> tuple[float, int, int, str]:
    """Seconds, peak resident bytes, peak anonymous bytes and the text of one `forge generate`."""
    command = [sys.executable, "-m", "forge.cli", "generate", str(model), _TEXT, "--max-tokens", "24", "--temperature", "0"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               preexec_fn=group.enter if group else None)  # fmt: skip
    peak = anonymous = 0
    while process.poll() is None:
        held = _resident(process.pid)
        peak, anonymous = max(peak, held.get("VmHWM", 0)), max(anonymous, held.get("RssAnon", 0))
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    assert process.stdout is not None
    text = process.stdout.read()
    if group is not None:
        group.directory.rmdir()
    if process.returncode:
        raise SystemExit(f"forge generate ended with exit status {process.returncode}.")
    return seconds, peak, anonymous, text


def _forget(directory: Path) -> None:
    """Take a directory's files out of the page cache: what is there already is charged to whoever read it first."""
    sync(directory)
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)
            if name in ("VmHWM", "RssAnon")}  # fmt: skip


class _Group:
    """A control group with a memory limit, of either version, which a process enters before it begins."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def make(cls, limit: int) -> _Group | None:
        """None where this process may not."""
        mount = Path("/sys/fs/cgroup")
        for parent, limits in ((mount, "memory.max"), (mount / "memory", "memory.limit_in_bytes")):
            directory = parent / f"forge-generation-{time.monotonic_ns()}"
            try:
                directory.mkdir()
            except OSError:
                continue
            if (directory / limits).exists():
                (directory / limits).write_text(str(limit))
                return cls(directory)
            directory.rmdir()
        return None

    def enter(self) -> None:
        """Move the calling process into the group."""
        (self.directory / "cgroup.procs").write_text("0")


if __name__ == "__main__":
    sys.exit(main())
