from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys

import psutil
import pytest

from node.senses import LOAD_SECONDS, Senses, others_cpu_seconds

INTERRUPTS = """\
            CPU0       CPU1
   1:       {keyboard}         10   IO-APIC    1-edge      i8042
  16:    {disk}          0   IO-APIC   16-fasteoi   xhci_hcd:usb1
  51:       {touchpad}          0   intel-gpio   51  ELAN1200:00
 NMI:          0          0   Non-maskable interrupts
"""
DEVICES = """\
I: Bus=0011 Vendor=0001 Product=0001 Version=ab41
N: Name="AT Translated Set 2 keyboard"
I: Bus=0018 Vendor=04f3 Product=3090 Version=0100
N: Name="ELAN1200:00 04F3:3090 Touchpad"
"""


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Machine:
    """Files of the kernel, and a clock."""

    def __init__(self, root: Path) -> None:
        self.root, self.now, self.cpu = root, 0.0, 0.0
        self.counts = {"keyboard": 5, "disk": 1000, "touchpad": 7}
        _write(root / "proc/bus/input/devices", DEVICES)
        for device, interface, protocol in (("1-1", "1-1:1.0", "02"), ("1-2", "1-2:1.0", "00")):
            _write(root / f"sys/bus/usb/devices/{device}/urbnum", "100\n")
            _write(root / f"sys/bus/usb/devices/{interface}/bInterfaceProtocol", f"{protocol}\n")
            _write(root / f"sys/bus/usb/devices/{interface}/bInterfaceClass", "03\n")
        _write(root / "dev/pts/0", "")
        self.type(at=1000)
        self.interrupt()
        self.senses = Senses(root, lambda: self.now, lambda: self.cpu)

    def interrupt(self, **more: int) -> None:
        for name, count in more.items():
            self.counts[name] += count
        _write(self.root / "proc/interrupts", INTERRUPTS.format(**self.counts))

    def type(self, at: int) -> None:
        os.utime(self.root / "dev/pts/0", (at, 1000))

    def print(self) -> None:
        os.utime(self.root / "dev/pts/0", (1000, 2000))

    def report(self, device: str) -> None:
        _write(self.root / f"sys/bus/usb/devices/{device}/urbnum", "101\n")

    def quiet_after(self, seconds: float) -> float:
        self.now += seconds
        return self.senses.quiet_seconds()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("sign", [
    lambda machine: machine.interrupt(keyboard=2), lambda machine: machine.interrupt(touchpad=40),
    lambda machine: machine.report("1-1"), lambda machine: machine.type(at=1008),
], ids=["keyboard", "touchpad", "USB mouse", "terminal"])  # fmt: skip
def test_input_is_a_sign(machine: Machine, sign: object) -> None:
    assert machine.quiet_after(0) == 0 and machine.quiet_after(100) == 100
    sign(machine)  # type: ignore[operator]
    assert machine.quiet_after(100) == 0 and machine.quiet_after(50) == 50


@pytest.mark.parametrize("other", [
    lambda machine: machine.interrupt(disk=10**6), lambda machine: machine.report("1-2"), lambda machine: machine.print(),
], ids=["disk", "a USB device that is no keyboard or mouse", "what is printed"])  # fmt: skip
def test_other_things_are_none(machine: Machine, other: object) -> None:
    assert machine.quiet_after(0) == 0
    other(machine)  # type: ignore[operator]
    assert machine.quiet_after(100) == 100


def test_load_of_others_over_a_minute_is_a_sign(machine: Machine) -> None:
    machine.quiet_after(0)
    machine.cpu += 20.0  # A burst of less than half a core, averaged over the minute.
    assert machine.quiet_after(LOAD_SECONDS) == LOAD_SECONDS
    machine.cpu += 40.0
    assert machine.quiet_after(LOAD_SECONDS) == 0
    assert machine.quiet_after(LOAD_SECONDS) == LOAD_SECONDS


def test_a_machine_without_any_of_this(tmp_path: Path) -> None:
    senses = Senses(tmp_path)
    assert senses.quiet_seconds() < 60 and senses.on_battery() in (True, False)


SPIN = "import time\nwhile time.process_time() < {seconds}: pass\nprint('spun', flush=True)\nimport sys; sys.stdin.read()"


def _spent(code: str) -> tuple[float, float]:
    """CPU seconds that this machine, and that others on it, spent while a child ran until it printed."""
    def look() -> tuple[float, float]:
        times = psutil.cpu_times()
        return times.user + times.system, others_cpu_seconds()

    before = look()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None and child.stdout.readline() == "spun\n"
        after = look()
        child.stdin.close()
    return after[0] - before[0], after[1] - before[1]


def test_cpu_time_of_other_processes_counts_and_that_of_our_children_does_not() -> None:
    """A grandchild stands for a process that is not ours: only children of the agent train."""
    spin = SPIN.format(seconds=1.5)  # On a busy machine it gets a part of that.
    machine, others = _spent(spin)
    assert machine - others > 0.4
    machine, others = _spent(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}], stdin=0)")
    assert others > 0.4
