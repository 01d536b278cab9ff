"""A directory of session files, as it is while others write to it.

The order makes it a picture that holds: first the list of files and who writes them, then the
journals, then the files. So whatever was at its end before is known to have ended, and each file
holds at least what the journal says of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from structlog_audit.names import COPIES, JOURNAL, SESSION_FILE
from structlog_audit.scan import Begin, begin_of, session_of
from structlog_audit.source import Source, Unreadable, first_line

RECENT = 60.0
"""Seconds after which nothing is under way any more that was not finished."""


@dataclass(slots=True)
class SessionFile:
    """A file that holds a session, by its name or by its first line.

    Attributes:
        path: where it is.
        plain: its name, without the suffix of a compressed copy.
        prefix: begin of its name; empty if that is no session file's.
        named: the session in its name; empty if there is none.
        session: the session in its first line; empty if there is none.
        begin: what its first line says, or None.
        size: bytes of it.
        alive: whether it is being written.
        recent: whether it was changed a short while ago.
        trouble: why it cannot be read, or None.
        gone: whether it is not there any more.
        settled: whether it was looked at before its journal was read.
    """

    path: str
    plain: str
    prefix: str = ""
    named: str = ""
    session: str = ""
    begin: Begin | None = None
    size: int = 0
    alive: bool = False
    recent: bool = False
    trouble: str | None = None
    gone: bool = False
    settled: bool = False


@dataclass(slots=True)
class Listing:
    """What is in a directory.

    Attributes:
        path: the directory.
        files: the session files, by their names.
        journals: paths of the journals, by prefix.
        others: names of other files.
        copies: how many of these are compressed copies beside their originals.
    """

    path: str
    files: list[SessionFile]
    journals: dict[str, str]
    others: list[str]
    copies: int = 0


def list_directory(path: str) -> Listing:
    """Look what is in a directory, and who is writing there.

    Raises:
        Unreadable: it cannot be listed.
    """
    try:
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries)
    except OSError as error:
        raise Unreadable(error.strerror or type(error).__name__) from error
    return listing_of(path, names)


def listing_of(path: str, names: Iterable[str], *, follow: bool = False) -> Listing:
    """Look at these files of a directory."""
    files: dict[str, list[SessionFile]] = {}
    journals: dict[str, str] = {}
    others: list[str] = []
    copies = 0
    for name in sorted(names):
        journal = JOURNAL.fullmatch(name)
        file = session_file(os.path.join(path, name), follow=follow)
        if journal is not None and journal[1] in journals:
            copies += 1  # behind its original, as names are sorted
            others.append(name)
        elif journal is not None:
            journals[journal[1]] = os.path.join(path, name)
        elif file is None:
            others.append(name)
        elif not file.gone:
            files.setdefault(file.plain, []).append(file)
    kept = [file for each in files.values() for file in _originals(each)]
    paths = {file.path for file in kept}
    looked_at = (file.path for each in files.values() for file in each)
    beside = [os.path.basename(path) for path in looked_at if path not in paths]
    return Listing(path, kept, journals, others + beside, copies + len(beside))


def _originals(copies: list[SessionFile]) -> list[SessionFile]:
    """Leave compressed copies out that stand beside their original: one may be in the making."""
    plain = [file for file in copies if file.path.endswith(".ndjson")]
    return plain or copies


def session_file(path: str, *, follow: bool = False) -> SessionFile | None:
    """Look at a file, if its name is a session file's."""
    name = SESSION_FILE.fullmatch(os.path.basename(path))
    if name is None:
        return None
    file = SessionFile(path, name["plain"], name["prefix"], name["session"])
    look(file, follow=follow)
    return file


def look(file: SessionFile, *, follow: bool = False) -> None:
    """Take in who writes a file, and what its first line says."""
    try:
        with Source(file.path, follow=follow) as source:
            file.alive = source.is_alive()  # first: what is not alive does not change any more
            file.recent = source.age() < RECENT
            file.size = source.size or 0
            line = first_line(source)
            file.session = session_of(line) or ""
            file.begin = begin_of(line)
    except Unreadable as error:
        file.trouble, file.gone = error.reason, error.missing


def find(path: str, plain: str) -> SessionFile | None:
    """Look for a session file, or a compressed copy of it."""
    for suffix in ("", *COPIES):
        file = session_file(os.path.join(path, plain + suffix))
        if file is not None and not file.gone:
            return file
    return None


def find_renamed(listing: Listing, sessions: set[str]) -> dict[str, str]:
    """Look whether files with foreign names hold some of these sessions; return their names."""
    found: dict[str, str] = {}
    for name in listing.others:
        file = SessionFile(os.path.join(listing.path, name), name)
        look(file)
        if file.session in sessions:
            found.setdefault(file.session, name)
    return found
