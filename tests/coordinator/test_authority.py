from __future__ import annotations

import os
from pathlib import Path
import signal
import ssl
import stat
import subprocess
import sys
import time

from cryptography import x509
import pytest

from coordinator.authority import CA_FILE, DIRECTORY, SERVER_DAYS, SERVER_FILE, Authority, own_addresses
from forge.errors import StorageError
from forge.invitation import SERVER_NAME, fingerprint

from .fakes import Clock

DAY = 86400.0


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def names(path: Path) -> set[str]:
    held = certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in held}


def test_it_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        first = Authority(tmp_path)
        pair = first.server_pair()
    finally:
        os.umask(before)
    directory = tmp_path / DIRECTORY
    assert {path.name for path in directory.iterdir()} == {CA_FILE, SERVER_FILE}
    assert [stat.S_IMODE(path.stat().st_mode) for path in (directory, *sorted(directory.iterdir()))] == [0o700, 0o600, 0o600]
    again = Authority(tmp_path)
    assert (again.fingerprint, again.server_pair()) == (first.fingerprint, pair)
    assert fingerprint(ssl.PEM_cert_to_DER_cert(first.ca_pem.decode())) == first.fingerprint
    assert Authority(tmp_path / "other").fingerprint != first.fingerprint


def test_modes_that_somebody_widened_are_narrowed(tmp_path: Path) -> None:
    Authority(tmp_path).server_pair()
    for path in ((tmp_path / DIRECTORY), *(tmp_path / DIRECTORY).iterdir()):
        path.chmod(0o755)
    Authority(tmp_path).server_pair()
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in (tmp_path / DIRECTORY).iterdir())
    assert stat.S_IMODE((tmp_path / DIRECTORY).stat().st_mode) == 0o700


def test_the_certificate_names_everything_that_this_machine_is_called(tmp_path: Path) -> None:
    Authority(tmp_path, "192.0.2.7").server_pair()
    assert names(tmp_path / DIRECTORY / SERVER_FILE) >= {
        SERVER_NAME, "localhost", "127.0.0.1", "::1", "192.0.2.7", os.uname().nodename, *own_addresses()}  # fmt: skip


def test_another_address_means_another_certificate_of_the_same_ca(tmp_path: Path) -> None:
    first = Authority(tmp_path, "127.0.0.1")
    pair = first.server_pair()
    moved = Authority(tmp_path, "moved.example")
    assert moved.server_pair() != pair and moved.fingerprint == first.fingerprint
    assert "moved.example" in names(tmp_path / DIRECTORY / SERVER_FILE)
    certificate(tmp_path / DIRECTORY / SERVER_FILE).verify_directly_issued_by(certificate(tmp_path / DIRECTORY / CA_FILE))


def test_a_certificate_near_its_end_is_replaced_and_one_of_another_ca_too(tmp_path: Path) -> None:
    clock = Clock()
    authority = Authority(tmp_path, clock=clock)
    pair = authority.server_pair()
    clock.now += (SERVER_DAYS - 31) * DAY
    assert authority.server_pair() == pair
    clock.now += 2 * DAY
    renewed = authority.server_pair()
    assert renewed != pair
    other = Authority(tmp_path / "other", clock=clock)
    other.server_pair()
    (tmp_path / "other" / DIRECTORY / SERVER_FILE).replace(tmp_path / DIRECTORY / SERVER_FILE)
    assert authority.server_pair()[1].endswith(authority.ca_pem)
    certificate(tmp_path / DIRECTORY / SERVER_FILE).verify_directly_issued_by(certificate(tmp_path / DIRECTORY / CA_FILE))


def test_a_damaged_ca_is_never_replaced(tmp_path: Path) -> None:
    Authority(tmp_path)
    path = tmp_path / DIRECTORY / CA_FILE
    path.write_bytes(half := path.read_bytes()[:300])
    with pytest.raises(StorageError, match="damaged"):
        Authority(tmp_path)
    assert path.read_bytes() == half


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_while_it_is_made_there_is_none_or_a_whole_one(tmp_path: Path) -> None:
    """Processes that make one after another, killed after different times: none leaves half a key."""
    code = ("import sys; from pathlib import Path; from coordinator.authority import Authority; import itertools\n"
            "for n in itertools.count(): Authority(Path(sys.argv[1]) / str(n)).server_pair()")  # fmt: skip
    made = 0
    for attempt in range(6):
        root = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", code, str(root)])
        while not list(root.glob("0/tls/*")):
            time.sleep(0.001)
        time.sleep(0.0137 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for run_dir in root.iterdir():
            for path in (run_dir / DIRECTORY).glob("*.pem"):
                assert certificate(path) and b"END PRIVATE KEY" in path.read_bytes()
                made += 1
            Authority(run_dir).credentials()
            assert {path.name for path in (run_dir / DIRECTORY).iterdir()} == {CA_FILE, SERVER_FILE}
    assert made
