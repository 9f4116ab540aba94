"""The whole product on one machine: a coordinator and two nodes as separate processes train configs/smoke.yaml.

Ends with the perplexity table, three generated samples, the peak memory of every process beside its prediction, and the
directory of the model. Interrupted and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

from forge.system import peak_resident_bytes_of
from forge.terminal import print_evaluation
from forge.train.memory import LIGHT_MB, MB, format_size

ROOT = Path(__file__).resolve().parent.parent
NODES = 2
#: Seconds that the nodes may take to notice that the run is done: one wait between two requests for work.
_LEAVE_SECONDS = 30
#: What a node says of its training process at the end: partition, measured and predicted peak.
_TRAINER = re.compile(r"trainer of partition (\d+): peak memory: measured (\S+) of predicted (\S+),")
_trainers: list[str] = []


def main() -> int:
    """Start the processes, relay what they print, and sum up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--config", default="smoke")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run in the directory first")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(options.run_dir, ignore_errors=True)
    started, address, environment = time.monotonic(), f"127.0.0.1:{_free_port()}", dict(os.environ)
    commands = {"coordinator": [sys.executable, "-m", "coordinator.cli", "serve", "--config", options.config, "--run-dir",
                                str(options.run_dir), "--listen", address, "--exit-when-done"]}  # fmt: skip
    for index in range(NODES):
        commands[f"node-{index}"] = [sys.executable, "-m", "node.cli", "join", "--ram", "2G", "--threads", "1",
                                     "--name", f"node-{index}", "--data-dir", f"{options.run_dir}-node-{index}"]  # fmt: skip
    processes: dict[str, subprocess.Popen[str]] = {}
    peaks: dict[str, int] = dict.fromkeys(commands, 0)
    try:
        for name, command in commands.items():
            processes[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                               env=environment)  # fmt: skip
            threading.Thread(target=_relay, args=(name, processes[name]), daemon=True).start()
            if name == "coordinator":
                _wait_for(address, processes[name])
                environment["FORGE_TOKEN"] = _invitation(options.run_dir)
        threading.Thread(target=_watch, args=(processes, peaks), daemon=True).start()
        if (code := processes["coordinator"].wait()) != 0:
            print(f"The coordinator ended with exit status {code}; see its lines above.", file=sys.stderr)
            return code
        for name, process in processes.items():
            if name != "coordinator":
                try:
                    process.wait(timeout=_LEAVE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.terminate()
    except KeyboardInterrupt:
        print("Interrupted: run the same command again to go on.", file=sys.stderr)
        return 130
    finally:
        for process in processes.values():
            process.kill()
    print_evaluation(options.run_dir)
    print("".join(_trainers), end="")
    for name, peak in peaks.items():
        if name != "coordinator":  # It has noted its own.
            print(f"{name + ' (without torch)':28}{format_size(peak):>9}{format_size(LIGHT_MB['node'] * MB):>11}")
    print(f"\nmodel: {options.run_dir / 'model'}   ({time.monotonic() - started:.0f} s)")
    return 0


def _relay(name: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if (found := _TRAINER.match(line)) is not None:
            _trainers.append(f"{f'expert {found[1]} on {name}':28}{found[2]:>9}{found[3]:>11}\n")
        print(f"[{name}] {line}", end="", flush=True)


def _watch(processes: dict[str, subprocess.Popen[str]], peaks: dict[str, int]) -> None:
    while any(process.poll() is None for process in processes.values()):
        for name, process in processes.items():
            peaks[name] = max(peaks[name], peak_resident_bytes_of(process.pid))
        time.sleep(0.25)


def _wait_for(address: str, process: subprocess.Popen[str]) -> None:
    host, port = address.split(":")
    while process.poll() is None:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)


def _invitation(run_dir: Path) -> str:
    """What an operator types to invite both nodes."""
    command = [sys.executable, "-m", "coordinator.cli", "token", "create", "--run-dir", str(run_dir), "--uses", str(NODES)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False, text=True).stdout.strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
