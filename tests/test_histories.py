"""Histories of logs, made at random by writers that crash: no false alarm, and nothing lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import environment

if sys.platform == "win32":
    pytest.skip("writers are forked and killed here", allow_module_level=True)

pytest.importorskip("cryptography")
COUNT = 25
HANG = 300


@pytest.fixture
def small(tmp_path: Path) -> Iterator[list[Path]]:
    """A file system that histories fill, where this host lets us mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", place]
    mounted = sys.platform == "linux" and not subprocess.run(mount, capture_output=True).returncode
    yield [place] if mounted else []
    if mounted:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.fault
def test_no_history_is_called_tampered_with_and_none_has_lost_an_entry(small: list[Path]) -> None:
    """In processes of their own: they fork, and are killed."""
    script = Path(__file__).with_name("histories.py")
    command = [sys.executable, str(script), str(COUNT), "1", *map(str, small)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert done.stdout.startswith(f"{COUNT} histories")
    assert "'valid'" in done.stdout
    assert "'incomplete'" in done.stdout
