"""The vectors: small logs, each with the verdict that a verifier must come to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import HANG, environment
from vectors import make

from structlog_audit.anchors import notes_in
from structlog_audit.note import read_keys
from structlog_audit.verify import verify

HOME = Path(__file__).parent / "vectors"
WITH = ("chain", "key", "anchor")


def expected(vector: str, with_: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HOME / vector / "expected.json").read_text())[with_]
    return found


def content(home: Path) -> dict[str, bytes]:
    """Return all files of the vectors."""
    return {
        str(path.relative_to(home)): path.read_bytes()
        for vector in make.VECTORS
        for path in (home / vector).rglob("*")
        if path.is_file()
    }


def test_the_vectors_are_made_again_byte_for_byte(tmp_path: Path) -> None:
    """And there are no others."""
    make.make(tmp_path)

    assert content(HOME) == content(tmp_path)
    assert {path.parent.name for path in HOME.glob("*/expected.json")} == set(make.VECTORS)


@pytest.mark.parametrize("with_", WITH)
@pytest.mark.parametrize("vector", make.VECTORS)
def test_the_library_comes_to_the_verdict(vector: str, with_: str) -> None:
    """With the chain alone, with the key, with anchors."""
    home = HOME / vector
    keys = () if with_ == "chain" else read_keys((home / "key.pub").read_text())
    noted = with_ == "anchor" and list((home / "anchors").glob("*.note"))

    report = verify(
        home / "log", keys=keys, anchors=notes_in(str(home / "anchors")) if noted else ()
    )

    kinds = sorted({finding.kind for finding in report.findings})
    assert {"verdict": report.verdict, "kinds": kinds} == expected(vector, with_)
    assert bool(report.not_checked) or with_ == "anchor"


@pytest.mark.parametrize("vector", make.VECTORS)
def test_the_command_comes_to_the_verdict(vector: str) -> None:
    """By its status, and as JSON."""
    home = HOME / vector
    done = subprocess.run(
        [sys.executable, "-m", "structlog_audit", "verify", "--json", home / "log",
         "--key", home / "key.pub"],
        capture_output=True, env=environment(), timeout=HANG,
    )  # fmt: skip
    report = json.loads(done.stdout)

    wanted = expected(vector, "key")
    assert report["verdict"] == wanted["verdict"]
    assert sorted({finding["kind"] for finding in report["findings"]}) == wanted["kinds"]
    status = {"valid": 0, "tampered": 1, "incomplete": 2, "unreadable": 3}
    assert done.returncode == status[wanted["verdict"]]
