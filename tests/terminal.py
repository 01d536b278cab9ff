"""The command in a process of its own: with pipes, or on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

from running import HANG, environment

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
HIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What must never reach a terminal; a newline ends our lines."""


def command(*arguments: object) -> list[str]:
    """Return the command line."""
    return [sys.executable, "-m", "structlog_audit", *map(str, arguments)]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command with pipes."""
    return subprocess.run(command(*arguments), env=environment(), capture_output=True,
                          encoding="utf-8", timeout=HANG, **options)  # fmt: skip


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start the command with pipes."""
    return subprocess.Popen(command(*arguments), env=environment(), stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # fmt: skip


def run_on_terminal(*arguments: object, columns: int = 200, **variables: str) -> str:
    """Run the command on a terminal of so many columns; return what that has got."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, columns)) if sys.version_info >= (3, 11) else None
    env = environment(TERM="xterm-256color", COLUMNS=str(columns), **variables)
    process = subprocess.Popen(command(*arguments), env=env, stdin=theirs, stdout=theirs,
                               stderr=subprocess.PIPE)  # fmt: skip
    os.close(theirs)
    got = b""
    try:
        while select.select([ours], [], [], HANG)[0]:
            try:
                got += os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
        _, errors = process.communicate(timeout=HANG)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert not errors, errors
    return got.decode("utf-8").replace("\r\n", "\n")


def big(directory: Path, source: Path, size: int) -> Path:
    """Make a file of so many bytes by repeating that of a session."""
    made = directory / "big.ndjson"
    data = source.read_bytes()
    with made.open("wb") as file:
        for _ in range(size // len(data) + 1):
            file.write(data)
    return made
