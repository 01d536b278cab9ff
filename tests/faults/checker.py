"""Checks from outside what a child was told against what stands in the files.

Nothing of the package is used here: json and hashlib read the files, strace saw the calls.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from .runner import Call, Run

WRITES = {"write", "writev", "pwrite64"}
SYNCS = {"fsync", "fdatasync"}
TOUCHES = WRITES | SYNCS | {"ftruncate", "sync_file_range"}


@dataclass(frozen=True)
class File:
    """A session file: its whole lines, and what stands behind the last newline."""

    path: Path
    lines: list[bytes]
    tail: bytes

    @property
    def session(self) -> str:
        return self.path.stem.rsplit("-", 1)[1]

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


def read_files(directory: Path) -> dict[str, File]:
    """Return the session files by session."""
    files = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        *lines, tail = path.read_bytes().split(b"\n")
        file = File(path, lines, tail)
        files[file.session] = file
    return files


def check_run(run: Run, *, may_stay_empty: bool = False) -> dict[str, File]:
    """Check files, journal and trace of a run against each other.

    Args:
        run: what the child did.
        may_stay_empty: it was killed, or could not remove a file.
    """
    check_trace(run.trace)
    files = read_files(run.directory)
    for file in files.values():
        check_file(file)
        assert may_stay_empty or file.lines, f"{file.path.name} has no whole line and was left"
    check_promises(run, files)
    check_failures(run, files)
    return files


def check_file(file: File) -> None:
    """A file is one session: whole, numbered, linked lines, and a torn tail at most."""
    previous = ""
    for number, line in enumerate(file.lines, 1):
        entry = json.loads(line)
        assert entry["session"] == file.session, f"a foreign line in {file.path.name}"
        assert entry["sequence"] == number, f"a gap in {file.path.name} before line {number}"
        assert entry["prev"] == previous, f"line {number} of {file.path.name} is not linked"
        previous = sha256(line).hexdigest()
    if file.lines:
        first = file.entries[0]
        assert (first["action"], first["event"]) == ("AuditSession", "Begin"), "no Begin"


def check_promises(run: Run, files: dict[str, File]) -> None:
    """What was acknowledged is there, whole, where the receipt says; nothing is there twice."""
    for told in run.acknowledged:
        file = files.get(told["session"])
        assert file is not None, f"entry {told['ok']} was acknowledged, its file is missing"
        assert told["sequence"] <= len(file.lines), f"entry {told['ok']} was acknowledged and lost"
        line = file.lines[told["sequence"] - 1]
        assert sha256(line).hexdigest() == told["hash"], f"entry {told['ok']} is another one"
        assert json.loads(line)["data"]["n"] == told["ok"], f"entry {told['ok']} is another one"
    there = [number for file in files.values() for number in _numbers(file)]
    assert len(there) == len(set(there)), f"an entry stands there twice: {sorted(there)}"
    refused = {line["error"] for line in run.errors if line["persisted"] == "no"}
    assert not refused & set(there), "an entry that was 'not stored' stands there whole"


def _numbers(file: File) -> list[int]:
    return [entry["data"]["n"] for entry in file.entries if "n" in entry["data"]]


def check_failures(run: Run, files: dict[str, File]) -> None:
    """A failure ends its session, and the next one's first line tells of it."""
    ended: set[str] = set()
    last: dict[str, Any] | None = None
    failed = 0
    for told in run.journal:
        if "error" in told:
            assert told["type"] == "AuditWriteError", f"raised {told['type']}: {told['text']}"
            failed += 1
            if last is not None:
                ended.add(last["session"])
        elif "ok" in told:
            assert told["session"] not in ended, "a session went on after a failure"
            if failed:
                _check_first_line(files[told["session"]], last, failed)
            last, failed = told, 0


def _check_first_line(file: File, last: dict[str, Any] | None, failed: int) -> None:
    data = file.entries[0]["data"]
    assert data["gap"]["failedCalls"] == failed, f"{failed} calls failed, {data['gap']} is told"
    assert data["gap"]["reason"]
    follows = data.get("follows")
    if last is None:
        assert follows is None, "follows a session of which nothing was acknowledged"
    else:
        told = {key: follows[key] for key in ("session", "sequence", "hash")}
        assert told == {key: last[key] for key in told}, "follows another session"
        assert follows["ended"]


Debts = frozenset[tuple[str, str]]
"""Files and directories that must be synced before anything is acknowledged."""


def check_trace(trace: list[Call], inherited: Debts = frozenset()) -> Debts:
    """No acknowledgement before its syncs; nothing touches a file after its failure.

    Args:
        trace: the calls of a process.
        inherited: what the process before it left to sync.

    Returns:
        What is left to sync.
    """
    owed = set(inherited)
    broken: set[str] = set()
    current = ""
    for call in trace:
        key = call.path if call.path.endswith(".ndjson") else f"{call.descriptor} {call.path}"
        if call.name in TOUCHES:
            assert key not in broken, f"touched after its failure: {call}"
        if _is_fatal(call):
            broken |= {key, current}
        if call.name == "close" and key != call.path:
            broken.discard(key)  # a directory's number may be used for another one
        if call.name == "pwrite64" and '"{\\"error\\"' in call.arguments:
            broken.add(current)
            owed.discard(("file", current))  # nothing of it is acknowledged any more
        if call.name == "pwrite64" and '"{\\"ok\\"' in call.arguments:
            assert not owed, f"acknowledged before the syncs of {sorted(owed)}"
            assert current not in broken, "acknowledged after a failed or short write"
        elif not call.failed:
            _settle(call, owed)
            if call.name == "openat" and "O_CREAT" in call.arguments and _is_session(call.path):
                current = call.path
    return frozenset(owed)


def _is_session(path: str) -> bool:
    return path.endswith(".ndjson")


def _is_fatal(call: Call) -> bool:
    """Tell whether a file must not be touched after this; Python itself repeats after EINTR."""
    if call.name in SYNCS:
        return call.failed and "EINTR" not in call.result
    if call.name not in WRITES or not _is_session(call.path):
        return False
    if call.failed:
        return "EINTR" not in call.result
    wanted = re.search(r", (\d+)(?:, \d+)?$", call.arguments)
    return wanted is not None and int(call.result.split()[0]) < int(wanted[1])


def _settle(call: Call, owed: set[tuple[str, str]]) -> None:
    """Keep account of what must be synced before the next acknowledgement."""
    parent = os.path.dirname(call.path)
    if call.name == "openat" and "O_CREAT" in call.arguments and _is_session(call.path):
        owed |= {("file", call.path), ("directory", parent)}
    elif call.name in WRITES and _is_session(call.path):
        owed.add(("file", call.path))
    elif call.name.startswith("mkdir"):
        owed.add(("directory", parent))
    elif call.name in SYNCS:
        owed -= {("file", call.path), ("directory", call.path)}
    elif call.name.startswith("unlink") and "AT_REMOVEDIR" not in call.arguments:
        owed.discard(("file", call.path))
    elif call.name == "rmdir" or "AT_REMOVEDIR" in call.arguments:
        owed.discard(("directory", parent))
