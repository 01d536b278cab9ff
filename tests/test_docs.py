"""Every code block of README and docs runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INSTALL = "pip install "  # the README's two commands; .ci/run runs them from nothing


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    return [code for name, code in BLOCK.findall(page.read_text("utf-8")) if name == language]


def run(command: list[str], directory: Path) -> str:
    """Run a command in a directory and return what it printed; it must succeed."""
    scripts = Path(sys.executable).parent
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AUDIT_")}
    environment["PATH"] = f"{scripts}{os.pathsep}{environment['PATH']}"
    environment.setdefault("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, tmp_path: Path) -> None:
    """The Python blocks of a page run one after the other, then its shell blocks."""
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")), "utf-8")
    run([sys.executable, "-W", "error", str(script)], tmp_path)
    for code in blocks(page, "bash"):
        if not code.startswith(INSTALL):
            run(["bash", "-euo", "pipefail", "-c", code], tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_has_a_language_that_is_checked(page: Path) -> None:
    """No block escapes: what is neither run nor parsed is not allowed."""
    assert {name for name, _ in BLOCK.findall(page.read_text("utf-8"))} <= {
        "python",
        "bash",
        "json",
    }
    for code in blocks(page, "json"):
        json.loads(code)


def test_the_chain_of_the_readme_can_be_followed_with_stock_tools(tmp_path: Path) -> None:
    """The shell block of the README prints the same hash twice for each session file."""
    readme = TOP / "README.md"
    (tmp_path / "example.py").write_text("\n".join(blocks(readme, "python")), "utf-8")
    run([sys.executable, "example.py"], tmp_path)
    chain = next(code for code in blocks(readme, "bash") if "sha256sum" in code)
    hashes = run(["bash", "-c", chain], tmp_path).split()
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 64


def test_the_readme_has_its_two_commands() -> None:
    """One command runs the main job, one the tests, each in a line of its own."""
    commands = [code for code in blocks(TOP / "README.md", "bash") if code.startswith(INSTALL)]
    assert commands == [
        "pip install '.[cli]' && structlog-audit demo\n",
        "pip install '.[test]' && pytest\n",
    ]
