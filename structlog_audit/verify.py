"""Verification: is a log what was recorded, all of it, and what vouches for that?

1. Nothing is believed that was not computed from the bytes, and nothing is written.
2. In a directory, the journal tells which session files there are, and how far each one goes.
   A file alone has only its own chain.
3. A chain, and a journal, can be recomputed by whoever may write them. Keys tell whether the
   journal was, up to its last checkpoint; anchors tell whether that was the last one.
4. What could not be checked is said, whatever the verdict.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Union

from structlog_audit.account import Account, Case
from structlog_audit.anchors import Anchor, read_anchors
from structlog_audit.directory import (
    SessionFile,
    find,
    list_directory,
    listing_of,
    look,
    session_file,
)
from structlog_audit.evidence import Evidence, read_journal
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.judge import judge
from structlog_audit.log import Log
from structlog_audit.note import NoteError, VerifierKey
from structlog_audit.report import Finding, Report
from structlog_audit.scan import Scan
from structlog_audit.scan import scan as scan_file
from structlog_audit.source import STDIN, Unreadable
from structlog_audit.workers import scan_all

ATTEMPTS = 3
"""How often to begin anew when the journal was taken back meanwhile: a write to it failed."""

Path = Union[str, "os.PathLike[str]"]
Progress = Callable[[int, int], None]


def verify(
    path: Path | Iterable[Path],
    *,
    keys: Sequence[VerifierKey] = (),
    anchors: Iterable[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Verify directories, session files, or both; also while they are being written.

    Args:
        path: a directory, a session file or a journal, plain or compressed (`.gz`, `.zst`); `-`
            for standard input; or several of them. Files given by name are checked alone, or
            with the journal of their directory, if that is given as well.
        keys: public keys (`note.read_keys`). At least one must have signed each journal.
        anchors: notes that were kept elsewhere (`anchors.notes_in`).
        progress: is told how many bytes were read, and how many there are.

    Returns:
        The verdict, and everything that led to it.

    Raises:
        AuditConfigurationError: there is nothing to verify, or keys or anchors are of no use.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not paths:
        raise AuditConfigurationError("there is nothing to verify", hint="name a directory")
    usable = _usable(list(anchors), keys)
    names = list(dict.fromkeys(os.fsdecode(each) for each in paths))
    account = Account(keys, usable)
    for _ in range(ATTEMPTS):
        account = Account(keys, usable)
        _gather(names, account)
        _read(account, progress)
        if account.still_stands():
            break
    return account.report()


def _usable(notes: list[str], keys: Sequence[VerifierKey]) -> list[Anchor]:
    """Return the anchors among notes that were kept elsewhere."""
    if not notes:
        return []
    if not keys:
        raise AuditConfigurationError(
            "anchors are verified with keys", hint="give the public key as well"
        )
    try:
        anchors, others = read_anchors(notes, keys)
    except NoteError as error:
        raise AuditConfigurationError(f"a note among the anchors is of no use: {error}") from None
    if not anchors:
        raise AuditConfigurationError(
            f"none of the {others:,} notes among the anchors was signed by the given keys",
            hint="give the key of this log, or other anchors",
        )
    return anchors


def _read(account: Account, progress: Progress | None) -> None:
    """Read all files, and judge them."""
    tasks = [case.task() for case in account.cases]
    total = sum(case.file.size for case in account.cases)
    done = 0

    def show(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, max(total, done))

    scans = scan_all(tasks, total, show)
    now: dict[str, Evidence] = {}
    for case, scan in zip(account.cases, scans, strict=True):
        judge(account, case, _found_again(case, scan, account, now) if scan.missing else scan)


def _found_again(case: Case, scan: Scan, account: Account, now: dict[str, Evidence]) -> Scan:
    """Look where a file went meanwhile: it was compressed, or pruned, or somebody took it away.

    Args:
        now: the journals as they are since, by their paths.
    """
    evidence, facts = case.evidence, case.facts
    if evidence is None or facts is None:
        return scan
    copy = find(os.path.dirname(case.file.path), case.file.plain)
    if copy is not None:
        case.file = copy
        return scan_file(case.task())
    if evidence.path not in now:
        now[evidence.path] = read_journal(evidence.path, None, account.keys, account.anchors)
    later = now[evidence.path].sessions.get(case.file.session or case.file.named)
    if later is not None and later.prunes:
        case.evidence, case.facts = now[evidence.path], later
    return scan


def _gather(names: list[str], account: Account) -> None:
    alone: list[str] = []
    for name in names:
        if name != STDIN and os.path.isdir(name):
            _verify_directory(name, account)
        else:
            alone.append(name)
    named: dict[str, list[str]] = {}
    for name in alone:
        named.setdefault(os.path.dirname(name), []).append(name)
    for directory, files in named.items():
        _verify_named(directory, files, account)


def _verify_directory(path: str, account: Account) -> None:
    try:
        listing = list_directory(path)
    except Unreadable as error:
        account.add(Finding("unreadable", "unreadable", path, f"it cannot be listed: {error}"))
        return
    log = Log(listing, account)
    log.read_journals()
    log.look_again()
    log.prepare()


def _verify_named(directory: str, names: list[str], account: Account) -> None:
    """Verify files that are given by name: together, if their journal is among them."""
    listing = listing_of(directory, [os.path.basename(n) for n in names if n != STDIN], follow=True)
    if listing.journals:
        log = Log(listing, account, whole=False)
        log.read_journals()
        log.look_again()
        log.prepare()
        names = [os.path.join(directory, name) for name in listing.others]
    if names and account.keys and not listing.journals:
        raise AuditConfigurationError(
            "a session file alone has no signature that the keys could verify",
            hint="name the directory, or the journal as well",
        )
    for name in names:
        account.add_alone(_alone(name))


def _alone(name: str) -> SessionFile:
    """Look at a file; where its name is none of ours, there may be several sessions in it."""
    file = None if name == STDIN else session_file(name, follow=True)
    if file is None:
        file = SessionFile(name, os.path.basename(name))
        if name != STDIN:
            look(file, follow=True)
            file.session = ""
    return file
