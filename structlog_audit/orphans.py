"""Sessions that have no end, and whose process is gone: their ends as they were found.

A process that is killed enters no end in the journal, and signs none. Whoever signs there next
enters what is there: the last line that follows from what the journal knows. From then on it is
covered; what was cut off or changed in between cannot be told.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from structlog_audit.entry import SESSION_ACTION
from structlog_audit.names import is_file_of
from structlog_audit.session_tree import SessionTree
from structlog_audit.sinks._lock import is_locked

REASON = "found without its process"
_log = logging.getLogger("structlog_audit")


@dataclass(slots=True)
class Known:
    """What the journal says last of a session without an end."""

    file: str
    sequence: int
    hash: str


def without_end(journal: str) -> dict[str, Known]:
    """Return the sessions that have no end in a journal, by name.

    Args:
        journal: its path; others may be appending to it.
    """
    found: dict[str, Known] = {}
    with open(journal, "rb") as file:
        for line in file:
            fields = _fields(line)
            session, event = str(fields.get("session")), fields.get("event")
            sequence, hash_ = fields.get("sequence"), fields.get("hash")
            if not (isinstance(sequence, int) and isinstance(hash_, str)):
                continue  # it tells of no session: verification says if it is no line of ours
            if event == "Open" and is_file_of(session, str(fields.get("file"))):
                found[session] = Known(fields["file"], sequence, hash_)
            elif event == "Head" and session in found:
                found[session].sequence, found[session].hash = sequence, hash_
            elif event in ("Close", "Break"):
                found.pop(session, None)
    return found


def ends_as_found(directory: str, journal: str) -> list[Mapping[str, object]]:
    """Return what is to be entered in a journal for each session whose process is gone.

    A session that ends while it is looked at has its end in the journal before its lock is free;
    so the journal is asked once more, afterwards.

    Args:
        directory: where the session files are.
        journal: path of the journal.
    """
    ends = list(_ends(directory, journal))
    still = without_end(journal) if ends else {}
    return [end for end in ends if end["session"] in still]


def _ends(directory: str, journal: str) -> Iterator[Mapping[str, object]]:
    for session, known in without_end(journal).items():
        path = os.path.join(directory, os.path.basename(known.file))
        try:
            end = _end_of(path, known)
        except OSError:
            continue  # it is missing, or no file: verification says so
        if end is not None:
            yield {"file": known.file, "session": session, **end, "reason": REASON}


def _end_of(path: str, known: Known) -> dict[str, object] | None:
    """Return how far a file goes; None if it is being written, or contradicts the journal."""
    if not stat.S_ISREG(os.lstat(path).st_mode) or is_locked(path):
        return None
    tree = SessionTree(path)
    last = tree.follow(known.sequence, known.hash)
    if last is None:
        _log.error(
            "%s was changed: it does not hold what the journal knows of it; keep both for an "
            "investigation", path,
        )  # fmt: skip
        return None
    fields = _fields(last)
    closed = fields.get("action") == SESSION_ACTION and fields.get("event") == "Complete"
    return {"event": "Close" if closed else "Break", "sequence": tree.size, "hash": tree.last_hash,
            "found": True, "root": tree.root_text()}  # fmt: skip


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(line)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
