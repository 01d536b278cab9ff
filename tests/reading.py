"""A reader that shares no code with the library: it hashes the bytes and believes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

ALWAYS = {"level", "time", "pid", "hostname", "name", "app", "action", "event", "session",
          "sequence", "prev"}  # fmt: skip
SOMETIMES = {"userId", "companyId", "serviceId", "clientIpAddress", "remoteAddress", "forwardedFor",
             "type", "operationId", "requestId", "traceId", "spanId", "data"}  # fmt: skip
KINDS = {"Record", "Begin", "Complete", "Fail", "Abandon"}
FILE_NAME = re.compile(r"[A-Za-z0-9._-]+-\d{8}-([a-z0-9]{20})\.ndjson")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")

Entry = dict[str, Any]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Entry:
    entry = dict(pairs)
    assert len(entry) == len(pairs), f"a name stands twice: {pairs}"
    return entry


def _no_constant(text: str) -> NoReturn:
    raise AssertionError(f"{text} is no JSON")


def parse_line(line: bytes) -> Entry:
    """Parse one line without its newline, strictly."""
    assert b"\n" not in line
    assert b"\r" not in line
    entry = json.loads(
        line.decode("utf-8", "strict"),
        object_pairs_hook=_no_duplicates,
        parse_constant=_no_constant,
    )
    names = set(entry)
    assert names >= ALWAYS, f"missing: {ALWAYS - names}"
    assert names <= ALWAYS | SOMETIMES, f"unknown: {names - ALWAYS - SOMETIMES}"
    assert entry["level"] == 35
    assert entry["name"] == "audit-log"
    assert entry["event"] in KINDS
    assert entry["action"]
    assert TIME.fullmatch(entry["time"])
    return entry


def read_lines(data: bytes) -> list[Entry]:
    """Read the lines of one session, and verify session, sequence and chain."""
    assert data.endswith(b"\n"), f"torn: {data[-200:]!r}"
    entries, prev = [], ""
    for number, line in enumerate(data[:-1].split(b"\n"), 1):
        entry = parse_line(line)
        assert entry["sequence"] == number, f"line {number} has the number {entry['sequence']}"
        assert entry["prev"] == prev, f"line {number} does not follow the one before it"
        prev = hashlib.sha256(line).hexdigest()
        entries.append(entry)
    first = entries[0]
    assert len({entry["session"] for entry in entries}) == 1, "two sessions in one file"
    assert len({entry["pid"] for entry in entries}) == 1, "two processes in one session"
    assert (first["action"], first["event"]) == ("AuditSession", "Begin")
    assert first["data"]["format"] == 1
    assert not [e for e in entries[1:-1] if e["action"] == "AuditSession"]
    return entries


def read_session(path: Path) -> list[Entry]:
    """Read a session file as `read_lines` does; it must bear its session's name."""
    name = FILE_NAME.fullmatch(path.name)
    assert name, f"{path.name} is no name of a session file"
    entries = read_lines(path.read_bytes())
    assert entries[0]["session"] == name[1]
    return entries


def session_files(directory: Path) -> list[Path]:
    """Return the session files of a directory, which may hold other files, and be written to."""
    return sorted(directory.glob(f"*-{'[0-9]' * 8}-*.ndjson"))


def only_file(directory: Path) -> Path:
    """Return the one session file of a directory."""
    (path,) = session_files(directory)
    return path


def read_sessions(directory: Path) -> list[list[Entry]]:
    """Read all session files of a directory, in the order in which they began."""
    return sorted(map(read_session, session_files(directory)), key=lambda s: s[0]["time"])


def recorded(directory: Path) -> list[Entry]:
    """Return the entries of all sessions, without the sessions' own."""
    return [e for session in read_sessions(directory) for e in session if not is_own(e)]


def is_own(entry: Entry) -> bool:
    """Tell whether an entry is the session's own Begin or Complete."""
    return entry["action"] == "AuditSession"


def ends(directory: Path) -> list[str | None]:
    """Return the reason in each session's own Complete; None where there is none."""
    return [
        session[-1]["data"]["reason"] if is_own(session[-1]) and len(session) > 1 else None
        for session in read_sessions(directory)
    ]


def journal_path(directory: Path, prefix: str = "audit") -> Path:
    """Return the path of the journal."""
    return directory / f"{prefix}-journal.ndjson"


def read_journal(directory: Path, prefix: str = "audit") -> list[Entry]:
    """Return the lines of the journal: whole, numbered, linked, with their author and time."""
    data = journal_path(directory, prefix).read_bytes()
    assert data.endswith(b"\n"), f"torn: {data[-200:]!r}"
    entries, prev = [], ""
    for number, line in enumerate(data[:-1].split(b"\n"), 1):
        entry = json.loads(line.decode("utf-8", "strict"), object_pairs_hook=_no_duplicates)
        assert entry["number"] == number, f"line {number} has the number {entry['number']}"
        assert entry["prev"] == prev, f"line {number} does not follow the one before it"
        assert (entry["event"] == "Journal") == (number == 1)
        assert TIME.fullmatch(entry["time"])
        assert entry["pid"] > 0
        assert entry["hostname"]
        prev = hashlib.sha256(line).hexdigest()
        entries.append(entry)
    return entries


def told_of(directory: Path, session: str) -> list[Entry]:
    """Return what the journal tells of a session, each line checked against the session's file."""
    told = [entry for entry in read_journal(directory) if entry.get("session") == session]
    for entry in told:
        lines = (directory / entry["file"]).read_bytes().split(b"\n")
        assert hashlib.sha256(lines[entry["sequence"] - 1]).hexdigest() == entry["hash"]
        assert entry["event"] != "Close" or len(lines) - 1 == entry["sequence"]
    return told


def check_cut_short(report: Any, *more: str) -> None:
    """Check that a report finds no more than what a killed process leaves unfinished.

    Args:
        report: what `verify` returned.
        more: kinds of findings that are expected besides.
    """
    expected = {"empty", "not-entered", "unfinished", *more}
    assert {finding.kind for finding in report.findings} <= expected, report.findings
    assert report.verdict == ("incomplete" if report.findings else "valid")


def written_when_it_says(path: Path) -> None:
    """Have a file that a clock of ours has stamped look as if it had been written then."""
    last = json.loads(path.read_bytes().splitlines()[-1])["time"]
    then = datetime.fromisoformat(last.replace("Z", "+00:00")).timestamp()
    os.utime(path, (then, then))
