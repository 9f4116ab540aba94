"""The documentation: what is generated is current, what can be run runs, links lead somewhere, quoted sentences are said."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
import re
import subprocess
import sys

import pytest

from docs.generate import DOCS, PAGES
from tests.conftest import Road
from tests.pages import PROGRAMS, ROOT, RUNNABLE, Block, blocks, pages

ALL = [block for page in pages() for block in blocks(page)]
#: Pages with a block that is run; yaml that no file is made of is only read.
RUN = list(dict.fromkeys(block.where.split(":")[0] for block in ALL if not block.why_not))
#: Linked, and not written yet.
_NETWORK = ["unshare", "--user", "--map-root-user", "--net"]


@functools.cache
def _why_not() -> str:
    """Why this system gives a page no network of its own, where its ports are free; empty where it does."""
    try:
        tried = subprocess.run([*_NETWORK, "true"], capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"no network namespaces: {error}"
    return "" if tried.returncode == 0 else f"no network namespaces: {tried.stderr.strip()}"


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_what_the_code_says(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), f"docs/{name} is stale: run make docs"


@pytest.mark.parametrize("block", ALL, ids=[block.where for block in ALL])
def test_every_block_is_run_or_says_why_not(block: Block) -> None:
    if block.why_not:
        pytest.skip(f"{block.where} is not run: {block.why_not}")
    assert block.language in RUNNABLE, f"{block.where}: nothing here runs {block.language}: use one of {sorted(RUNNABLE)}"
    if block.language in ("sh", "console"):
        assert block.script.strip(), f"{block.where} has no command after `$ `"
        assert block.strangers() == [], (f"{block.where}: only {sorted(PROGRAMS)} are run here; "
                                         "write <!-- not run: WHY --> above the block")  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(bool(_why_not()), reason=_why_not())
@pytest.mark.parametrize("page", RUN)
def test_a_page_does_what_it_says(page: str, road: Road) -> None:
    command = [*_NETWORK, sys.executable, "-m", "tests.pages", page, "--desk", str(road.desk), "--own-network"]
    typed = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    print(typed.stdout)
    assert typed.returncode == 0, typed.stderr


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name} links to {link}, which is not there"
            assert not anchor or anchor in _anchors(target), f"{page.name} links to {link}, and no heading is called so"


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in pages()[1:] if f"(docs/{page.name})" not in readme] == []
    assert len(readme.splitlines()) < 250


@functools.cache
def _sentences() -> str:
    """Every text that the three packages may print, with a mark where a value stands."""
    found = []
    for package in ("forge", "coordinator", "node"):
        for path in (ROOT / package).rglob("*.py"):
            for part in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(part, ast.JoinedStr):
                    found.append("".join(str(piece.value) if isinstance(piece, ast.Constant) else "…" for piece in part.values))
                elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                    found.append(part.value)
    return "\n".join(found)


def test_troubleshooting_quotes_what_is_said() -> None:
    quoted = re.findall(r"“(.*?)”", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(quoted) > 20
    assert [sentence for sentence in quoted if any(part.strip() not in _sentences() for part in sentence.split("…"))] == []
