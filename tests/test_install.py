"""The ways to install: the wheel, in an environment of its own and with no checkout near; the container files, as far as they
can be held against the code where no image is built."""

from __future__ import annotations

import os
from pathlib import Path
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from typing import Any
import venv
import zipfile

import click
import nbclient
import nbformat
import pytest
import yaml

from coordinator.cli import main as coordinator
from forge.cli import main as forge
from node.cli import main as node
from tests.commands import write_inputs

ROOT = Path(__file__).resolve().parent.parent
#: Where a package of the wheel comes from -> where it lies in the wheel.
PACKED = {"forge": "forge", "coordinator": "coordinator", "node": "node", "proto/modularforge": "modularforge",
          "configs": "forge/configs"}  # fmt: skip
CONTAINER = ROOT / "docs" / "container"
PROGRAMS = {"forge": forge, "forge-coordinator": coordinator, "forge-node": node}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: beside the sources, setuptools would pack what an earlier build left in build/."""
    copy = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("forge", "coordinator", "node", "proto", "configs", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", copy / "dist", copy],
                   check=True)  # fmt: skip
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a fresh environment: the wheel is installed in it, its dependencies are those of the running one."""
    root = tmp_path_factory.mktemp("fresh")
    venv.create(root, with_pip=False)
    scripts = root / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([sys.executable, "-m", "pip", "--python", scripts / "python", "install", "-q", "--no-deps", wheel], check=True)
    said = run(scripts, "python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'", root)
    Path(said.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def run(scripts: Path, command: str, cwd: Path) -> str:
    """What a program of that environment prints; nothing of this process leads it to the checkout."""
    program, *arguments = shlex.split(command)
    done = subprocess.run([scripts / program, *arguments], cwd=cwd, text=True, capture_output=True,
                          env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_four_packages_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {f"{package}/{path.relative_to(ROOT / source).as_posix()}" for source, package in PACKED.items()
               for path in (ROOT / source).rglob("*") if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    assert names == sources


@pytest.mark.slow
def test_the_wheel_works_with_no_checkout_near(scripts: Path, tmp_path: Path) -> None:
    for package in ("forge", "coordinator", "node", "modularforge.v1", "forge.configs"):
        (found,) = run(scripts, f"python -c 'import {package}; print(*{package}.__path__)'", tmp_path).splitlines()
        assert scripts.parent in Path(found).parents
    for program in ("forge", "forge-coordinator", "forge-node"):
        assert run(scripts, f"{program} --help", tmp_path).startswith(f"Usage: {program} ")
    assert "peak" in run(scripts, "forge plan smoke --ram 4G", tmp_path)


def _ours(command: str) -> list[list[str]]:
    """The command lines of our programs in a service's command, also in one that a shell is given, as Compose passes them on."""
    text = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", command).replace("$$", "$")
    words = shlex.split(text)
    lines = words[2].split("&&") if words[:2] == ["sh", "-c"] else [text]
    stripped = [re.sub(r"^\s*(\w+=(\$\(.*?\)|\S+)\s+)*(exec\s+)?|\s*>.*", "", line) for line in lines]
    return [shlex.split(line) for line in stripped if line.startswith("forge")]


def _accept(program: str, *arguments: str) -> dict[str, object]:
    """What the parser of a program makes of arguments; nothing is run."""
    command: click.Command = PROGRAMS[program]
    context, left = click.Context(command, info_name=program), list(arguments)
    while isinstance(command, click.Group):
        _, found, left = command.resolve_command(context, left)
        assert found is not None
        command = found
    return command.make_context(None, left, parent=context).params


def test_every_command_in_the_compose_file_is_one_of_ours() -> None:
    compose = yaml.safe_load((CONTAINER / "compose.yaml").read_text(encoding="utf-8"))
    services = compose["services"]
    lines = {name: [line for command in (service["command"], service.get("healthcheck", {}).get("test", ""))
                    for line in _ours(command)] for name, service in services.items()}  # fmt: skip
    assert {name: len(found) for name, found in lines.items()} == {"coordinator": 2, "invitation": 1, "node": 1}
    (serve, status), (invite,), (join,) = ([_accept(*line) for line in found] for found in lines.values())
    assert serve["run_dir"] == status["run_dir"] == invite["run_dir"] and serve["announce"] is False
    assert f"coordinator:{str(serve['listen']).rpartition(':')[2]}" in invite["addresses"]  # type: ignore[operator]
    assert join["where"] is None and join["ram"] == "2G"
    page = str(serve["dashboard"]).rpartition(":")[2]
    assert services["coordinator"]["ports"] == [f"127.0.0.1:{page}:{page}"]


def test_what_the_compose_file_refers_to_is_there() -> None:
    compose = yaml.safe_load((CONTAINER / "compose.yaml").read_text(encoding="utf-8"))
    build = compose["services"]["coordinator"]["build"]
    context = (CONTAINER / build["context"]).resolve()
    assert context == ROOT and (context / build["dockerfile"]).samefile(CONTAINER / "Containerfile")
    for service in compose["services"].values():
        assert service["image"] == compose["services"]["coordinator"]["image"]
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        assert {volume.split(":")[0] for volume in service["volumes"]} <= set(compose["volumes"])


def test_the_container_file_copies_what_is_there_and_installs_what_exists() -> None:
    text = re.sub(r"\\\n|^#.*\n", "", (CONTAINER / "Containerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    steps = [line.split(None, 1) for line in text.splitlines() if line]
    assert {step for step, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "ENV", "USER", "VOLUME", "EXPOSE", "CMD"}
    copied = {source for step, rest in steps if step == "COPY" and "--from" not in rest for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'^(?:readme = |license-files = \[)"(.*?)"', project, flags=re.MULTILINE)
    assert copied == {"pyproject.toml", "constraints.txt", *named, *(source.split("/")[0] for source in PACKED)}
    (install,) = [rest for step, rest in steps if step == "RUN" and "pip install" in rest]
    assert "--constraint constraints.txt" in install and install.endswith(" .")
    assert [rest for step, rest in steps if step == "USER"] == ["forge"] and steps[-1] == ["CMD", '["forge", "--help"]']


@pytest.fixture(scope="module")
def notebook() -> Any:
    found = nbformat.read(ROOT / "docs" / "kaggle.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(found)
    return found


def _tagged(cell: Any, *tags: str) -> bool:
    return not {*tags}.isdisjoint(cell.metadata.get("tags", ()))


def test_the_notebook_is_stored_without_output_and_its_commands_exist(notebook: Any) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    lines = [line for cell in cells for line in re.findall(r"\bforge(?:-\w+)? [^;\n]+", cell.source)]
    assert [" ".join(line.split()[:2]) for line in lines] == ["forge plan", "forge run", "forge generate", "forge report",
                                                              "forge push", "forge-node doctor", "forge-node join"]  # fmt: skip
    for line in lines:
        _accept(*shlex.split(line.replace("$OVERRIDES", "seed=1")))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_trains_a_model_and_lets_it_write(notebook: Any, tmp_path: Path) -> None:
    """Its cells in a real kernel; all but `install`: what it installs is installed here, and PyPI is not asked again."""
    write_inputs(tmp_path)
    notebook.cells = [cell for cell in notebook.cells if not _tagged(cell, "install")]
    (at,) = [at for at, cell in enumerate(notebook.cells) if _tagged(cell, "parameters")]
    notebook.cells[at].source += "\nos.environ.update(CONFIG='tiny.yaml', OVERRIDES='seed=1', PROMPT='The sail')"
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
                            ).execute(env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"})  # fmt: skip
    said = {cell.source: "".join(output.get("text", "") for output in cell.outputs)
            for cell in notebook.cells if cell.cell_type == "code"}  # fmt: skip
    assert re.search(r"^2 experts \(final\) +\d", next(text for cell, text in said.items() if "forge run" in cell), re.MULTILINE)
    assert next(text for cell, text in said.items() if "forge generate" in cell).startswith("The sail")
    pictures = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs if "data" in output]
    assert pictures and all("image/png" in output.data for output in pictures)
