"""Disks and users of their own, for which a test has to be root."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a matter of Linux")
NOBODY = 65_534


def needs_root() -> None:
    """Skip where nobody may mount, or become another user."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounts and changes of user need root on Linux")


def mount(*arguments: str) -> None:
    """Mount something; skip where the host does not let root do so."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this host lets nobody mount: {done.stderr.strip()}")


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """Have a file system of 64 KiB; return the path in it for session files."""
    needs_root()
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(place))
    try:
        yield place / "audit"
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
