"""A new file is there whole or not at all, whatever happens at which system call."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import HANG, environment

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.new_file import write_new

STRACE = shutil.which("strace")
DATA = b"whole\n" * 1000
SCRIPT = """
import sys
from structlog_audit.exceptions import AuditError
from structlog_audit.new_file import write_new
try:
    write_new(sys.argv[1], [b"whole\\n" * 500] * 2)
except AuditError as error:
    sys.exit(error.reason)
"""
CALLS = ("openat", "write", "fsync", "link", "linkat", "unlink", "unlinkat", "close", "fchmod")
needs_strace = pytest.mark.skipif(not STRACE, reason="strace missing")


def write_under(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Write the file in a process whose system calls are traced, and go wrong as told."""
    command = [str(STRACE), "-f", *options, sys.executable, "-c", SCRIPT, str(path)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=HANG)


@pytest.mark.skipif(os.name != "posix", reason="needs links")
@pytest.mark.parametrize("there", ["a file", "a link to nowhere"])
def test_what_is_there_is_never_replaced(tmp_path: Path, there: str) -> None:
    """Whoever came first stays, and nothing else is left behind."""
    target = tmp_path / "report"
    target.write_text("kept") if there == "a file" else target.symlink_to("nowhere")

    with pytest.raises(AuditConfigurationError, match="exists already"):
        write_new(str(target), [DATA])

    assert os.listdir(tmp_path) == ["report"]
    if there == "a file":
        assert target.read_text() == "kept"
    else:
        assert os.readlink(target) == "nowhere"


@pytest.mark.parametrize("name", ["r" * 255, "€" * 85], ids=["of letters", "of three bytes each"])
def test_a_name_as_long_as_names_may_be(name: str, tmp_path: Path) -> None:
    """The name beside it is not longer, in bytes."""
    target = tmp_path / name

    write_new(str(target), [DATA])

    assert target.read_bytes() == DATA


def test_what_has_to_happen_before_happens_when_all_is_written(tmp_path: Path) -> None:
    """The content is there, under another name; afterwards it has its own."""
    target, seen = tmp_path / "report", []

    def before() -> None:
        (part,) = tmp_path.iterdir()
        seen.append((part.name != "report", part.read_bytes()))

    write_new(str(target), (part for part in (b"a", b"", b"b")), before=before)

    assert seen == [(True, b"ab")]
    assert os.listdir(tmp_path) == ["report"]


@pytest.mark.parametrize("which", ["the content", "what has to happen before"])
def test_an_error_of_the_caller_leaves_nothing(which: str, tmp_path: Path) -> None:
    """It comes out as it was raised."""

    def parts() -> Iterator[bytes]:
        yield b"whole"
        if which == "the content":
            raise LookupError

    def before() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        write_new(str(tmp_path / "report"), parts(), before=before)

    assert os.listdir(tmp_path) == []


@needs_strace
@pytest.mark.fault
def test_a_kill_at_any_call_leaves_no_half_file(tmp_path: Path) -> None:
    """Under its name, the file is whole or not there."""
    traced = write_under(tmp_path / "first", "-e", f"trace={','.join(CALLS)}")
    calls = re.findall(r"^(?:\[pid +\d+\] )?(\w+)\(", traced.stderr, re.MULTILINE)
    lines = [line for line in traced.stderr.splitlines() if "(" in line]
    begin = next(n for n, line in enumerate(lines) if ".first." in line)
    killed = whole = 0
    for number in range(begin, len(calls)):
        target = tmp_path / f"report-{number}"
        when = calls[: number + 1].count(calls[number])
        done = write_under(
            target, "-e", f"inject={calls[number]}:signal=KILL:when={when}", "-o", os.devnull
        )
        killed += done.returncode != 0
        if target.exists():
            assert target.read_bytes() == DATA
            whole += 1
    assert killed >= 5
    assert whole


@needs_strace
@pytest.mark.fault
@pytest.mark.parametrize(
    ("call", "error"),
    [("write", "ENOSPC"), ("fsync", "EIO"), ("fsync:when=2", "EIO"), ("fsync:when=3", "EIO")],
)
def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, call: str, error: str) -> None:
    """The error says so, and no file is left, whole or half; the third sync is of its name."""
    name, _, when = call.partition(":")
    done = write_under(
        tmp_path / "report", "-e", f"inject={name}:error={error}:{when}".rstrip(":"),
        "-o", os.devnull,
    )  # fmt: skip

    assert done.returncode == 1
    assert os.listdir(tmp_path) == []


@needs_strace
@pytest.mark.fault
def test_a_file_system_without_links_will_do(tmp_path: Path) -> None:
    """The file gets its name by a renaming then, and an existing one stays all the same."""
    options = ("-e", "inject=link,linkat:error=EPERM", "-o", os.devnull)
    target = tmp_path / "report"

    first = write_under(target, *options)
    target.write_bytes(target.read_bytes() + b"more")
    second = write_under(target, *options)

    assert (first.returncode, second.returncode) == (0, 1)
    assert "exists already" in second.stderr
    assert target.read_bytes() == DATA + b"more"
    assert os.listdir(tmp_path) == ["report"]
