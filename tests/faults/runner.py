"""Runs the child, alone, under strace, or under libfiu, and reads what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import structlog_audit

JOURNAL = "audit-journal.ndjson"
CHILD = Path(__file__).with_name("child.py")
PACKAGE = Path(structlog_audit.__file__).parents[1]
PATIENCE = 120
"""Seconds after which a child hangs for sure."""
WATCHED = (
    "openat,?open,?mkdir,mkdirat,?rmdir,fchmod,?chmod,fchmodat,?fstat,?newfstatat,?stat,?lstat,?statx,write,writev,"
    "pwrite64,fsync,fdatasync,sync_file_range,ftruncate,close,?unlink,unlinkat,?rename,renameat,"
    "renameat2,?statfs,?fstatfs,flock,lseek,read"
)


def needs(tool: str) -> None:
    """Skip where a tool is missing."""
    if not sys.platform.startswith("linux"):
        pytest.skip(f"{tool} injects faults on Linux only")
    if shutil.which(tool) is None:
        pytest.skip(f"fault tool missing: {tool}")


@dataclass(frozen=True)
class Call:
    """One line of a trace."""

    name: str
    arguments: str
    path: str
    descriptor: str
    result: str
    injected: bool

    @property
    def failed(self) -> bool:
        return self.result.startswith(("-1", "?"))

    def __str__(self) -> str:
        return f"{self.name}({self.arguments}) = {self.result}"


@dataclass
class Run:
    """What a child did, as its journal and its trace tell."""

    directory: Path
    status: int
    journal: list[dict[str, Any]]
    trace: list[Call] = field(default_factory=list)
    stderr: str = ""

    @property
    def acknowledged(self) -> list[dict[str, Any]]:
        return [line for line in self.journal if "ok" in line]

    @property
    def errors(self) -> list[dict[str, Any]]:
        return [line for line in self.journal if "error" in line]

    @property
    def was_closed(self) -> bool:
        """Tell whether the child came to its end."""
        return bool(self.journal) and "closed" in self.journal[-1]

    @property
    def injected(self) -> list[Call]:
        return [call for call in self.trace if call.injected]


def environment(package: Path = PACKAGE) -> dict[str, str]:
    """Return an environment in which the child imports the package from there."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AUDIT_", "PYTHON", "COV"))}
    return {**kept, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}


def child(directory: Path, calls: int = 6, **options: Any) -> list[str]:
    """Return the command that runs the child."""
    config = {"directory": str(directory), "calls": calls, **options}
    return [sys.executable, str(CHILD), json.dumps(config)]


def run(
    directory: Path,
    journal: Path,
    *,
    package: Path = PACKAGE,
    before: tuple[str, ...] = (),
    **options: Any,
) -> Run:
    """Run the child to its end, behind the command `before`."""
    journal.unlink(missing_ok=True)
    done = subprocess.run(
        [*before, *child(directory, journal=str(journal), **options)],
        env=environment(package),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return Run(directory, done.returncode, read_journal(journal), stderr=done.stderr)


def read_journal(journal: Path) -> list[dict[str, Any]]:
    """Return the journal's lines."""
    if not journal.exists():
        return []
    return [json.loads(line) for line in journal.read_text().splitlines()]


def session_files(directory: Path) -> list[Path]:
    """Return the paths that the first sessions of children will have, today or after midnight."""
    now = time.time()
    days = sorted({time.strftime("%Y%m%d", time.gmtime(now + wait)) for wait in (0, PATIENCE)})
    return [directory / f"audit-{day}-{letter * 20}.ndjson" for letter in "abcmn" for day in days]


def run_traced(
    directory: Path,
    journal: Path,
    *injections: str,
    package: Path = PACKAGE,
    names: str = "a",
    **options: Any,
) -> Run:
    """Run the child under strace, with faults injected at calls that concern the directory.

    strace matches paths as they are given, so that the files are named as the child opens them
    (relative to their directory) and as they are (absolute). It is attached when the child has
    imported everything. `names` is the letter that the first session's name is made of.
    """
    needs("strace")
    trace = journal.with_suffix(".trace")
    files = [directory / JOURNAL, *session_files(directory)]
    watched = [journal, *_upwards(directory), *files]
    paths = [*map(str, watched), *(path.name for path in files)]
    command = child(directory, journal=str(journal), traced=ord(names) - ord("a"), **options)
    with _popen(command, environment(package)) as recorder:
        assert recorder.stdout.readline() == "ready\n", recorder.stderr.read()
        strace = (
            "strace", "-f", "-y", "-s", "64", "-o", str(trace), "-p", str(recorder.pid),
            "-e", f"trace={WATCHED}",
            *(word for path in paths for word in ("-P", path)),
            *(word for injection in injections for word in ("-e", f"inject={injection}")),
        )  # fmt: skip
        with _popen(strace, dict(os.environ)) as tracer:
            for line in tracer.stderr:
                if "attached" in line:
                    break
            else:
                recorder.kill()
                pytest.fail(f"strace could not attach: {line}")
            _, errors = recorder.communicate("\n", timeout=PATIENCE)
            tracer.communicate(timeout=PATIENCE)
    return Run(directory, recorder.returncode, read_journal(journal), read_trace(trace), errors)


def _popen(command: Sequence[str], environ: dict[str, str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def _upwards(directory: Path) -> list[Path]:
    """Return the directory, its parent, and the one above: what the child may have to make."""
    return [directory, directory.parent, directory.parent.parent]


_LINE = re.compile(r"^\d+ +(\w+)\((.*)\) += (.*)$")
_NAMED = re.compile(r'^(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"([^"]+)"')
_OPEN = re.compile(r"^(\d+)<([^>]*)>")
_BY_DESCRIPTOR = re.compile(r"write|sync|close|truncate|fchmod|fstat|flock|lseek|read")


def read_trace(trace: Path) -> list[Call]:
    """Return the calls of a trace, in order."""
    calls = []
    for line in trace.read_text().splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        name, arguments, result = found.groups()
        descriptor, path = "", ""
        named = None if _BY_DESCRIPTOR.search(name.replace("newf", "")) else _NAMED.match(arguments)
        if named:
            path = os.path.join(named[1] or "", named[2])
        elif opened := _OPEN.match(arguments):
            descriptor, path = opened.groups()
        calls.append(Call(name, arguments, path, descriptor, result, result.endswith("(INJECTED)")))
    return calls
