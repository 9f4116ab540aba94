"""The commands of operator and owner against a real coordinator: joining, moving, and everybody who is not who they say.

A node that got in is one that is then refused for its memory (exit code 5), before it leases anything.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import os
from pathlib import Path
import socket
import stat
import subprocess
import sys
import time

from PIL import Image
import pytest
import zxingcpp

from forge.invitation import Invitation
from tests.commands import Outcome, is_one_sentence, run, tree

from .conftest import World
from .fakes import invite, until

#: Too little for any run, so that a node leaves right after it has joined.
JOIN = "forge-node join --ram 64M --data-dir node"


def port_of(world: World) -> int:
    assert world.coordinator is not None
    return int(world.coordinator.address.rpartition(":")[2])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def token(world: World, desk: Path, *options: str) -> str:
    made = run(" ".join(["forge-coordinator token create --run-dir", str(world.root), *options]), desk)
    assert made.code == 0 and made.out.strip() in made.err and "FORGE_TOKEN=" in made.err, made
    return made.out.strip()


def joined(outcome: Outcome) -> None:
    is_one_sentence(outcome, "memory", "--ram allows 64M")


def test_the_string_is_needed_once_and_nothing_is_typed_again(world: World, tmp_path: Path) -> None:
    text = token(world, tmp_path)
    is_one_sentence(run(JOIN, tmp_path), "access", "ask its operator for an invitation")
    joined(run(f"{JOIN} {text}", tmp_path))
    assert "used up" in run(f"forge-coordinator token list --run-dir {world.root}", tmp_path).out
    port = port_of(world)
    world.stop()
    world.start(listen=f"127.0.0.1:{port}")
    joined(run(JOIN, tmp_path))
    assert stat.S_IMODE((tmp_path / "node" / "node.key").stat().st_mode) == 0o600
    secret = Invitation.parse(text).secret
    for path in (tmp_path / "node").iterdir():
        assert text.encode() not in path.read_bytes() and secret not in path.read_bytes()
    another = run(f"{JOIN.replace('node', 'other').replace('forge-other', 'forge-node')} {text}", tmp_path)
    is_one_sentence(another, "access", "good once and is used up")


def test_that_only_this_machine_can_use_an_invitation_is_said(world: World, tmp_path: Path) -> None:
    create = f"forge-coordinator token create --run-dir {world.root}"
    words = "Only this machine can use it"
    assert words in run(create, tmp_path).err and words not in run(f"{create} --address 192.0.2.1:7433", tmp_path).err
    (said,) = [line for line in world.said if "only this machine can join" in line]
    assert said.endswith(f"start with --listen 0.0.0.0:{port_of(world)} for others")


def test_a_phone_reads_the_code_on_the_terminal(world: World, tmp_path: Path) -> None:
    made = run(f"forge-coordinator token create --qr --run-dir {world.root}", tmp_path)
    halves = {" ": (0, 0), "▀": (255, 0), "▄": (0, 255), "█": (255, 255)}  # What a light character leaves of each half.
    drawn = [[halves[character] for character in line] for line in made.err.splitlines() if line and set(line) <= set(halves)]
    pixels = bytes(half for line in drawn for row in zip(*line, strict=True) for half in row)
    picture = Image.frombytes("L", (len(drawn[0]), 2 * len(drawn)), pixels)
    (code,) = zxingcpp.read_barcodes(picture.resize((8 * picture.width, 8 * picture.height), Image.Resampling.NEAREST))
    assert code.text == f"forge-node join {made.out.strip()}"


def test_the_environment_holds_the_invitation_and_the_training_process_does_not(world: World, tmp_path: Path) -> None:
    text = token(world, tmp_path, "--uses 2")
    joined(run(JOIN, tmp_path, environment={"FORGE_TOKEN": text}))
    code = ("import os, node.cli as cli\n"
            "cli.run_node = lambda *_, **options: print('FORGE_TOKEN' in os.environ) or 0\n"
            "cli.main(['join'])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "FORGE_TOKEN": text, "FORGE_DATA_DIR": str(tmp_path / "node")})  # fmt: skip
    assert done.stdout == "False\n", done.stderr


def test_an_invitation_that_the_environment_holds_is_in_no_list_of_processes(world: World, tmp_path: Path) -> None:
    text, port = token(world, tmp_path), port_of(world)
    world.stop()  # so that the node waits
    command = [sys.executable, "-m", "node.cli", "join", f"127.0.0.1:{port}", "--data-dir", str(tmp_path / "node")]
    node = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "FORGE_TOKEN": text, "PYTHONUNBUFFERED": "1"})  # fmt: skip
    try:
        assert node.stdout is not None
        until(lambda: "waiting for the coordinator" in str(node.stdout and node.stdout.readline()))
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                assert text.encode() not in path.read_bytes()
            except OSError:
                continue  # it ended
    finally:
        node.kill()
        node.communicate()


def test_a_coordinator_that_moved_is_known_by_its_ca(world: World, tmp_path: Path) -> None:
    text, old = token(world, tmp_path, "--uses 2"), port_of(world)
    joined(run(f"{JOIN} {text}", tmp_path))
    world.stop()
    moved = free_port()
    world.start(listen=f"127.0.0.2:{moved}")
    joined(run(f"{JOIN} 127.0.0.2:{moved}", tmp_path))
    joined(run(JOIN, tmp_path))
    held = json.loads((tmp_path / "node" / "coordinators.json").read_text())
    assert [entry["addresses"] for entry in held] == [[f"127.0.0.2:{moved}"]]
    # An invitation of before, with the address of now; and one with two addresses, of which the second one answers.
    joined(run(f"forge-node join 127.0.0.2:{moved} --token {text} --ram 64M --data-dir second", tmp_path))
    both = token(world, tmp_path, f"--address 127.0.0.1:{old} --address 127.0.0.2:{moved}")
    joined(run(f"forge-node join {both} --ram 64M --data-dir third", tmp_path))


def test_another_coordinator_at_the_same_address_is_not_believed(make_world: Callable[[], World], tmp_path: Path) -> None:
    world, impostor = make_world(), make_world()
    world.start()
    text, port = token(world, tmp_path, "--uses 3"), port_of(world)
    joined(run(f"{JOIN} {text}", tmp_path))
    before = tree(tmp_path / "node")
    world.stop()
    impostor.start(listen=f"127.0.0.1:{port}")
    is_one_sentence(run(JOIN, tmp_path), "access", f"What answers at 127.0.0.1:{port} is not a coordinator that this node "
                    "has joined", "somebody stands in between")  # fmt: skip
    is_one_sentence(run(f"forge-node join {text} --ram 64M --data-dir second", tmp_path), "access",
                    f"What answers at 127.0.0.1:{port} is not the coordinator of this invitation",
                    Invitation.parse(text).fingerprint.hex()[:16], "somebody stands in between")  # fmt: skip
    assert tree(tmp_path / "node") == before
    assert impostor.coordinator is not None and impostor.coordinator._desk.state.nodes() == []
    impostor.stop()
    world.start(listen=f"127.0.0.1:{port}")
    joined(run(JOIN, tmp_path))


def test_an_impostor_in_mid_run_is_waited_out_and_learns_nothing(make_world: Callable[[], World], tmp_path: Path) -> None:
    """The node is already connected when another coordinator takes the port: it says so, sends nothing, and goes on."""
    world, impostor = make_world(), make_world()
    proceed: list[str] = []
    world.jobs.before = lambda what: until(lambda: what != "shared" or proceed, 60)
    world.start()
    text, port = token(world, tmp_path), port_of(world)
    command = [sys.executable, "-m", "node.cli", "join", "--ram", "2G", "--data-dir", str(tmp_path / "node")]
    log = tmp_path / "log"
    with open(log, "w") as out:
        node = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "FORGE_TOKEN": text})
    try:
        until(lambda: "waiting for work" in log.read_text(), 20)
        proceed.append("go")
        world.stop()
        impostor.start(listen=f"127.0.0.1:{port}")
        until(lambda: "what answers there is not the coordinator that this node joined" in log.read_text(), 40)
        assert node.poll() is None
        assert impostor.coordinator is not None and impostor.coordinator._desk.state.nodes() == []
        impostor.stop()
        seen = time.time()
        world.clock.now = seen
        coordinator = world.start(listen=f"127.0.0.1:{port}")
        world.clock.now = seen + 1
        until(lambda: coordinator._desk.state.nodes()[0].seen_at > seen, 40)
    finally:
        node.kill()
        node.wait()


def test_plaintext_and_tls_do_not_meet(make_world: Callable[[], World], tmp_path: Path) -> None:
    world = make_world()
    world.start()
    text = token(world, tmp_path, "--uses 5")
    is_one_sentence(run(f"{JOIN} {text} --insecure", tmp_path), "access", "encrypts", "without --insecure")
    port = port_of(world)
    world.stop()
    world.start(listen=f"127.0.0.1:{port}", insecure=1)
    is_one_sentence(run(f"{JOIN} {text}", tmp_path), "access", f"What answers at 127.0.0.1:{port} does not encrypt")
    shown = run(f"forge-coordinator token create --run-dir {world.root}", tmp_path)
    assert f"forge-node join {shown.out.strip()} --insecure" in shown.err
    joined(run(f"{JOIN} {text} --insecure", tmp_path))
    joined(run(f"{JOIN} --insecure", tmp_path))
    other = run(f"forge-node join 127.0.0.1:{port} --insecure --ram 64M --data-dir other", tmp_path)
    is_one_sentence(other, "access", "does not know this node", "`forge-coordinator token create`")
    assert "phase" in run(f"forge-coordinator status --run-dir {world.root}", tmp_path).out


def test_a_node_that_is_revoked_while_it_trains_stops_in_one_sentence(world: World, tmp_path: Path) -> None:
    text = token(world, tmp_path)
    assert world.coordinator is not None
    state = world.coordinator._desk.state
    script = Path(__file__).parents[1] / "node" / "agent_process.py"
    command = [sys.executable, str(script), world.coordinator.address, str(tmp_path / "node"), "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "FORGE_TOKEN": text}) as node:  # fmt: skip
        try:
            until(lambda: [part.state for part in state.partitions()] == ["leased", "open", "open"], 30)
            until(lambda: list((tmp_path / "node").rglob("checkpoint.safetensors")), 30)
            assert "tester is revoked" in run(f"forge-coordinator nodes revoke tester --run-dir {world.root}", tmp_path).out
            assert [part.state for part in state.partitions()] == ["open"] * 3
            out, err = node.communicate(timeout=60)
        finally:
            node.kill()
    assert "its checkpoint is kept" in out
    is_one_sentence(Outcome(node.returncode, out, err), "access", "was revoked by the coordinator's operator")


@pytest.mark.parametrize("state", ["revoked invitation", "revoked node"])
def test_who_was_sent_away_hears_it_in_one_sentence(state: str, world: World, tmp_path: Path) -> None:
    text = token(world, tmp_path, "--name ada")
    if state == "revoked node":
        joined(run(f"{JOIN} --name laptop {text}", tmp_path))
        assert "laptop is revoked" in run(f"forge-coordinator nodes revoke laptop --run-dir {world.root}", tmp_path).out
        is_one_sentence(run(JOIN, tmp_path), "access", "was revoked by the coordinator's operator")
        text = invite(world.root).encode()
        assert world.coordinator is not None
        is_one_sentence(run(f"{JOIN} {world.coordinator.address} --token {text}", tmp_path), "access", "was revoked")
    else:
        listed = run(f"forge-coordinator token list --run-dir {world.root}", tmp_path).out
        invitation_id = next(line.split()[0] for line in listed.splitlines() if line.endswith("ada"))
        run(f"forge-coordinator token revoke {invitation_id} --run-dir {world.root}", tmp_path)
        is_one_sentence(run(f"{JOIN} {text}", tmp_path), "access", "This invitation was revoked")
