"""Announcing and finding over real multicast, on the loopback interface: nothing leaves this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
import os
from pathlib import Path
import subprocess
import sys

import pytest

from forge import lan
from forge.errors import AccessError, NetworkError
from forge.invitation import PREFIX, Invitation
from forge.lan import Announcement, announced, find
from node.nearby import among
from tests.commands import DOCUMENTED, Outcome, is_one_sentence, write_inputs
from tests.lan import missing, network, terminals

LOOPBACK = ["127.0.0.1"]
#: Longer than a look takes when all is well; a busy machine may need it.
PATIENCE = 20.0


def announcement(name: str, digit: int, *addresses: str) -> Announcement:
    return Announcement(name=name, fingerprint=bytes([digit]) * 32, addresses=addresses or ("127.0.0.1:7433",))


@contextmanager
def raw(name: str, **properties: str) -> Iterator[None]:
    """What somebody else may announce under our service."""
    from zeroconf import ServiceInfo, Zeroconf

    zeroconf = Zeroconf(interfaces=LOOPBACK)
    try:
        info = ServiceInfo(lan.SERVICE, f"{name}.{lan.SERVICE}", port=1, parsed_addresses=["127.0.0.1"],
                           properties=dict(properties), server=f"{name}.local.")  # fmt: skip
        zeroconf.register_service(info, cooperating_responders=True)
        yield
    finally:
        zeroconf.close()


def test_what_is_announced_is_found_as_it_was_said_until_it_ends() -> None:
    home = announcement("a run. with \x1b[31m dots", 1, "127.0.0.1:7433", "192.0.2.7:7433")
    with announced(home, LOOPBACK):
        (found,) = find(lambda found: found.fingerprint == home.fingerprint, LOOPBACK, PATIENCE)
    assert found.name == "a run. with ?[31m dots" and found.fingerprint == home.fingerprint
    assert sorted(found.addresses) == sorted(home.addresses)
    assert find(interfaces=LOOPBACK, seconds=1.0) == []


def test_several_are_found_and_what_is_no_announcement_of_ours_is_left_out() -> None:
    first, second = announcement("first", 1), announcement("second", 2)
    with announced(first, LOOPBACK), raw("no-ca"), raw("short", ca="abcd"), raw("letters", ca="xy" * 32):
        with announced(second, LOOPBACK):
            seen: set[bytes] = set()

            def both(found: Announcement) -> bool:
                seen.add(found.fingerprint)
                return len(seen) == 2

            found = find(both, LOOPBACK, PATIENCE)
    assert sorted(str(one) for one in found) == ["'first' at 127.0.0.1:7433 (CA 0101010101010101)",
                                                 "'second' at 127.0.0.1:7433 (CA 0202020202020202)"]  # fmt: skip


def test_the_invitation_says_which_and_what_it_does_not_name_is_refused() -> None:
    invitation = Invitation(addresses=("192.0.2.1:7433",), fingerprint=bytes([2]) * 32, secret=bytes(32))
    found = [announcement("first", 1, "10.0.0.1:7433"), announcement("second", 2, "10.0.0.2:7433")]
    assert among(found, invitation).addresses == ("10.0.0.2:7433", "192.0.2.1:7433")
    with pytest.raises(AccessError, match="its CA is 0202020202020202.*'first' at 10.0.0.1:7433 .CA 0101"):
        among(found[:1], invitation)


def test_a_machine_without_an_address_is_not_announced_and_that_is_no_traceback() -> None:
    nowhere = announcement("a name", 1, "a-machine:7433")
    with pytest.raises(NetworkError, match="cannot be announced"), announced(nowhere, LOOPBACK):
        pytest.fail("it was announced")


def test_without_the_package_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeroconf", None)  # What an import of what is not installed meets.
    with pytest.raises(NetworkError, match="zeroconf.*not installed: pip install zeroconf"):
        find()


def test_the_module_itself_needs_no_package() -> None:
    code = "import sys, forge.lan, node.cli; print('zeroconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip() == b"False"


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_machines_on_one_network_find_each_other(tmp_path: Path) -> None:
    if why := missing():
        pytest.skip(why)
    write_inputs(tmp_path)
    node = "forge-node join --ram 64M --data-dir"  # Too little for any run: it leaves right after it has joined.
    with network("home", "ada") as (home, ada), terminals() as open_terminal:
        coordinator = open_terminal(home, "forge-coordinator serve --config tiny.yaml --run-dir run --listen 0.0.0.0:7433 "
                                    "--dashboard off", tmp_path)  # fmt: skip
        coordinator.wait_for("announced on this network")
        invitation = next(word for word in coordinator.text.split() if word.startswith(PREFIX))

        def outcome(command: str, **environment: str) -> Outcome:
            done = subprocess.run(ada.command(command), cwd=tmp_path, capture_output=True, text=True, timeout=60,
                                  stdin=subprocess.DEVNULL, env={**os.environ, **environment})  # fmt: skip
            return Outcome(done.returncode, done.stdout, done.stderr)

        is_one_sentence(outcome(f"{node} alone"), "access", "'tiny' at 10.77.0.1:7433 (CA ")
        assert not (tmp_path / "alone").exists()
        typed = open_terminal(ada, f"{node} typed", tmp_path)
        typed.wait_for("(not shown)")
        typed.type(invitation)
        assert typed.end() == DOCUMENTED["memory"] and invitation not in typed.text, typed.text
        # The address in the invitation is not the coordinator's any more: it is looked for by its fingerprint.
        stale = replace(Invitation.parse(invitation), addresses=("192.0.2.1:7433",))
        is_one_sentence(outcome(f"{node} stale", FORGE_TOKEN=stale.encode()), "memory", "--ram allows 64M")
        foreign = open_terminal(ada, f"{node} foreign", tmp_path)
        foreign.wait_for("(not shown)")
        foreign.type(replace(stale, fingerprint=bytes(32)).encode())
        assert foreign.end() == DOCUMENTED["access"] and "is of another coordinator (its CA is 0000" in foreign.text
