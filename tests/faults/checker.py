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

from .runner import JOURNAL, Call, Run

EVENTS = {"Journal", "Rewritten", "Open", "Close", "Break"}
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
        if path.name != JOURNAL:
            file = _read(path)
            files[file.session] = file
    return files


def read_journal_file(directory: Path) -> File:
    """Return the journal of the session files; it is empty where there is none."""
    path = directory / JOURNAL
    return _read(path) if path.exists() else File(path, [], b"")


def _read(path: Path) -> File:
    *lines, tail = path.read_bytes().split(b"\n")
    return File(path, lines, tail)


def check_run(
    run: Run,
    *,
    may_stay_empty: bool = False,
    may_be_torn: bool = False,
    may_lack_the_end: bool = False,
) -> dict[str, File]:
    """Check files, journals and trace of a run against each other.

    Args:
        run: what the child did.
        may_stay_empty: it was killed, or could not remove a file.
        may_be_torn: it was killed, or could not cut the journal.
        may_lack_the_end: the journal may have failed when the child ended; if there is a trace, it
            tells.
    """
    check_trace(run.trace)
    files = read_files(run.directory)
    for file in files.values():
        check_file(file)
        assert may_stay_empty or file.lines, f"{file.path.name} has no whole line and was left"
    check_promises(run, files)
    check_failures(run, files)
    may_lack_the_end |= any(call.path.endswith(JOURNAL) for call in run.injected)
    check_journal(run, files, may_be_torn=may_be_torn, may_lack_the_end=may_lack_the_end)
    return files


def check_journal(
    run: Run,
    files: dict[str, File],
    *,
    may_be_torn: bool = False,
    may_lack_the_end: bool = False,
) -> None:
    """The journal's lines are whole, numbered, linked; and tell what the session files hold."""
    journal = read_journal_file(run.directory)
    assert may_be_torn or not journal.tail, f"a torn line was left: {journal.tail!r}"
    previous, entered, ended = "", {}, {}
    for number, (line, entry) in enumerate(zip(journal.lines, journal.entries), 1):
        assert entry["number"] == number, f"a gap in the journal before line {number}"
        assert entry["prev"] == previous, f"line {number} of the journal is not linked"
        previous = sha256(line).hexdigest()
        assert entry["event"] in EVENTS, f"the journal tells of a {entry['event']}"
        assert (entry["event"] == "Journal") == (number == 1), "it begins twice, or not at all"
        if entry["event"] == "Open":
            assert entry["session"] not in entered, "a session was entered twice"
            entered[entry["session"]] = entry
            _check_line(entry, files)
        elif entry["event"] in ("Close", "Break"):
            assert entry["session"] in entered, "an end without a begin"
            again = ended.setdefault(entry["session"], entry)
            assert _same_end(entry, again), "a session ended twice"
            _check_end(entry, files)
    for told in run.acknowledged:
        assert told["session"] in entered, f"entry {told['ok']} was acknowledged, not its session"
        end = ended.get(told["session"])
        assert end is None or told["sequence"] <= end["sequence"], "acknowledged behind the end"
    if run.was_closed and run.acknowledged:
        missing = {told["session"] for told in run.acknowledged} - set(ended)
        last = {run.acknowledged[-1]["session"]} if may_lack_the_end else set()
        assert missing <= last, f"the end of {missing} was not entered"


def _same_end(entry: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether an end was entered again because it was in doubt."""
    names = ("event", "session", "sequence", "hash", "reason")
    return all(entry[name] == other[name] for name in names)


def _check_line(entry: dict[str, Any], files: dict[str, File]) -> None:
    """What the journal says of a session's line stands in the session's file."""
    file = files.get(entry["session"])
    assert file is not None, f"{entry['file']} was entered, and is missing"
    assert entry["file"] == file.path.name
    assert entry["sequence"] <= len(file.lines), f"{file.path.name} is shorter than was entered"
    line = file.lines[entry["sequence"] - 1]
    assert sha256(line).hexdigest() == entry["hash"], f"{file.path.name} holds another line"


def _check_end(entry: dict[str, Any], files: dict[str, File]) -> None:
    """A session that was closed ends exactly there, with its own Complete."""
    _check_line(entry, files)
    assert entry["reason"]
    if entry["event"] == "Close":
        file = files[entry["session"]]
        last = file.entries[-1]
        assert (last["action"], last["event"]) == ("AuditSession", "Complete"), "no Complete"
        assert (entry["sequence"], file.tail) == (len(file.lines), b""), "it goes on behind its end"


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
                _check_first_line(files[told["session"]], last, failed, files)
            last, failed = told, 0


def _check_first_line(
    file: File, last: dict[str, Any] | None, failed: int, files: dict[str, File]
) -> None:
    data = file.entries[0]["data"]
    assert data["gap"]["failedCalls"] == failed, f"{failed} calls failed, {data['gap']} is told"
    assert data["gap"]["reason"]
    follows = data.get("follows")
    if last is None:
        assert follows is None, "follows a session of which nothing was acknowledged"
    else:
        assert follows["session"] == last["session"], "follows another session"
        before = files[last["session"]]
        complete = before.entries[-1]["event"] == "Complete"
        expected = len(before.lines) if complete else last["sequence"]
        assert follows["sequence"] == expected, "follows another line"
        assert follows["hash"] == sha256(before.lines[expected - 1]).hexdigest()
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
    current = journal = ""
    uncut = False  # the journal has what could not be appended as a whole, or not be synced
    for call in trace:
        key = call.path if call.path.endswith(".ndjson") else f"{call.descriptor} {call.path}"
        if call.name in TOUCHES:
            assert key not in broken, f"touched after its failure: {call}"
        if _is_journal(call.path):
            journal = call.path
            assert not (uncut and call.name in WRITES), f"glued to what had failed: {call}"
            uncut = call.name != "ftruncate" and (uncut or _is_fatal(call))
        elif _is_fatal(call):
            broken |= {key, current}
        if call.name == "close" and key != call.path:
            broken.discard(key)  # a directory's number may be used for another one
        if call.name == "pwrite64" and '"{\\"error\\"' in call.arguments:
            broken.add(current)
            owed -= {("file", current), ("file", journal)}  # nothing of it is acknowledged any more
        if call.name == "pwrite64" and '"{\\"ok\\"' in call.arguments:
            assert not owed, f"acknowledged before the syncs of {sorted(owed)}"
            assert current not in broken, "acknowledged after a failed or short write"
            assert not uncut, "acknowledged with a journal that was to be cut"
        elif not call.failed:
            _settle(call, owed)
            if call.name == "openat" and "O_CREAT" in call.arguments and _is_session(call.path):
                current = call.path
    return frozenset(owed)


def _is_session(path: str) -> bool:
    return path.endswith(".ndjson") and not _is_journal(path)


def _is_journal(path: str) -> bool:
    return path.endswith(JOURNAL)


def _is_written(path: str) -> bool:
    return path.endswith(".ndjson")


def _is_fatal(call: Call) -> bool:
    """Tell whether a file must not be touched after this; Python itself repeats after EINTR."""
    if call.name in SYNCS:
        return call.failed and "EINTR" not in call.result
    if call.name not in WRITES or not _is_written(call.path):
        return False
    if call.failed:
        return "EINTR" not in call.result
    wanted = re.search(r", (\d+)(?:, \d+)?$", call.arguments)
    return wanted is not None and int(call.result.split()[0]) < int(wanted[1])


def _settle(call: Call, owed: set[tuple[str, str]]) -> None:
    """Keep account of what must be synced before the next acknowledgement."""
    parent = os.path.dirname(call.path)
    if call.name == "openat" and "O_CREAT" in call.arguments and _is_written(call.path):
        owed |= {("file", call.path), ("directory", parent)}
    elif call.name in WRITES and _is_written(call.path):
        owed.add(("file", call.path))
    elif call.name.startswith("mkdir"):
        owed.add(("directory", parent))
    elif call.name in SYNCS:
        owed -= {("file", call.path), ("directory", call.path)}
    elif call.name.startswith("unlink") and "AT_REMOVEDIR" not in call.arguments:
        owed.discard(("file", call.path))
    elif call.name == "rmdir" or "AT_REMOVEDIR" in call.arguments:
        owed.discard(("directory", parent))
