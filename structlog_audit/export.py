"""Exports: the entries of a few days in one archive, with what proves them.

1. The archive is a zip file. `entries.ndjson` has the exact lines; `proofs.ndjson` beside it, line
   by line, how each one follows from the head of its session; `heads.ndjson` the signed heads, and
   how each one follows from the note that its signer wrote behind it. `checkpoint.note` is the
   newest of these notes. `manifest.json` has the SHA-256 of each of them.
2. It can be verified without the log it comes from, with the public key alone (`handover.py`).
3. It is an entry of the log itself, recorded when the archive is durable and before it has its
   name. Without that entry there is no archive, and there is never half a one. A crash between the
   two leaves an entry of an export that nobody has.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from hashlib import sha256
from typing import IO, Any

import orjson

from structlog_audit import age
from structlog_audit._version import __version__
from structlog_audit.act import user
from structlog_audit.activity import ActivityReport
from structlog_audit.archive import (
    CHECKPOINT,
    ENTRIES,
    FORMAT,
    HEADS,
    KEYS,
    MANIFEST,
    MANIFEST_NOTE,
    PROOFS,
    README,
    README_TEXT,
    REPORT,
    VERIFICATION,
    Members,
    statement,
    time_of,
)
from structlog_audit.business import Calendar
from structlog_audit.chain import line_hash, link
from structlog_audit.checkpoint import Signer
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.journal import journal_origin
from structlog_audit.listing import Bounds, File, find_files, may_be_in
from structlog_audit.merkle import Tree, leaf_hash
from structlog_audit.names import SESSION_FILE, journal_name
from structlog_audit.new_file import check_new, write_new
from structlog_audit.note import VerifierKey, sign
from structlog_audit.reader import Entry
from structlog_audit.report import Pruned, Report
from structlog_audit.report_page import page
from structlog_audit.selection import Selection, select, stamp
from structlog_audit.signed_heads import Head, read_signed_heads
from structlog_audit.source import CHUNK, Lines, Source, Unreadable
from structlog_audit.summary import Summary
from structlog_audit.values import well_formed
from structlog_audit.verify import verify

ACTION = "AuditExport"
LIMIT = 5
"""Business days at a time; the rule of the hosted product whose audit log ours follows."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was exported.

    Attributes:
        path: the archive.
        entries: how many entries are in it.
        proven: how many of them come with a proof.
        sha256: of the archive, in hex, as it stands in the log.
        verdict: what verification says of the log that it comes from.
        contradicting: how many of the entries have no proof because their session is not as it
            was signed, or not linked, by the names of the sessions' files.
        pruned: how many sessions went under a policy that may have had entries of these days.
    """

    path: str
    entries: int
    proven: int
    sha256: str
    verdict: str
    contradicting: Mapping[str, int]
    pruned: int


def export(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    first: date,
    last: date,
    record: Callable[[Mapping[str, object]], object],
    calendar: Calendar | None = None,
    limit: int | None = LIMIT,
    company: str | None = None,
    prefix: str = "audit",
    keys: Sequence[VerifierKey] = (),
    signer: Signer | None = None,
    recipients: Sequence[str] = (),
) -> Exported:
    """Write the entries of some days into an archive.

    Args:
        directory: the log.
        output: the archive; it must not be there yet.
        first: the first day.
        last: the last day, included.
        record: records the entry that tells of the export (`act.Recorder`).
        calendar: which days are business days; Monday to Friday in UTC if None.
        limit: how many business days there may be; None for any number.
        company: leave out what belongs to others; None takes all.
        prefix: begin of the names of the session files.
        keys: the public keys, which go into the archive, and with which the log is verified;
            those of the signer are known.
        signer: signs what the archive says of itself, with the log's key (`act.Recorder.signer`).
        recipients: public keys of age; the archive is encrypted to them.

    Raises:
        AuditConfigurationError: the days, the company, the recipients or the paths are unusable,
            or a file of the log cannot be read.
        AuditError: the entry that tells of the export could not be recorded.
    """
    where, name = os.path.abspath(os.fsdecode(directory)), os.path.abspath(os.fsdecode(output))
    calendar = calendar or Calendar()
    _check_paths(where, name, prefix)
    _check_days(first, last, calendar, limit)
    begin, end = calendar.span(first, last)
    asked = select(since=begin, until=end, company=company)
    to = [age.recipient(text) for text in recipients]
    about: dict[str, object] = {
        "prefix": prefix, "from": first.isoformat(), "to": last.isoformat(),
        "zone": str(calendar.zone), "begin": stamp(begin), "end": stamp(end), "company": company,
        "by": user(),
    }  # fmt: skip
    known = _with_own(keys, signer)
    with _explained(name), _unnamed(name) as plain:
        report = verify(where, keys=known)
        selection = _Part(where, prefix, asked, company, known)
        pruned = about["pruned"] = _pruned(report.pruned, prefix, asked)
        counts = _pack(plain, selection, about, report, known, signer)
        with _encrypted(plain, to, name) as ready:
            digest = _digest(ready)
            told = {**about, **counts, "sha256": digest, "recipients": list(recipients)}
            act = {"action": ACTION, "data": told}
            write_new(name, _parts(ready), before=lambda: record(act))
    return Exported(name, counts["entries"], counts["proven"], digest, report.verdict,
                    selection.contradicting, pruned)  # fmt: skip


def _with_own(keys: Sequence[VerifierKey], signer: Signer | None) -> tuple[VerifierKey, ...]:
    """Return the given keys, and those of the signer that are not among them."""
    own = () if signer is None else [key.verifier for key in signer.keys]
    named = {(key.name, key.public) for key in keys}
    return (*keys, *(key for key in own if (key.name, key.public) not in named))


def _pack(
    file: IO[bytes],
    part: _Part,
    about: Mapping[str, object],
    report: Report,
    keys: Sequence[VerifierKey],
    signer: Signer | None,
) -> dict[str, int]:
    """Write the archive; return how many entries, proofs and sessions are in it."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        members = Members(archive)
        counts, now = part.write(members), datetime.now(timezone.utc)
        members.add(VERIFICATION, orjson.dumps(_verification(report, part, keys)))
        asked = {name: str(about[name]) for name in ("from", "to", "zone", "company")}
        made = ActivityReport(part.summary, [part.name], now, asked, report.verdict)
        members.add(REPORT, page(made).encode())
        members.add(KEYS, "".join(f"{key}\n" for key in keys).encode())
        members.add(README, README_TEXT.encode())
        manifest = orjson.dumps({
            "format": FORMAT, "library": f"structlog-audit {__version__}", "made": stamp(now),
            **about, **counts, "verdict": report.verdict, "files": members.hashes,
        }, option=orjson.OPT_INDENT_2)  # fmt: skip
        archive.writestr(MANIFEST, manifest)
        if signer is not None:
            origin = journal_origin(signer.keys[0].name, part.signed.first)
            archive.writestr(MANIFEST_NOTE, sign(statement(origin, manifest), signer.keys))
    return counts


def _verification(report: Report, part: _Part, keys: Sequence[VerifierKey]) -> dict[str, Any]:
    """Return what the receiver is told of the verification: no paths of this host.

    Whoever gets the entries of one company is told nothing of the files and totals of all.
    """
    if part.company is None:
        told: dict[str, Any] = _without(f"{part.directory}{os.sep}", report.as_dict())
        return told
    until = report.signed_until
    return {
        "verdict": report.verdict,
        "keys": [str(key) for key in keys],
        "checkpoint": None if until is None else {"line": until.line, "time": until.time},
        "findings": Counter(finding.kind for finding in report.findings),
    }


def _without(directory: str, value: Any) -> Any:
    if isinstance(value, str):
        return well_formed(value.replace(directory, ""))
    if isinstance(value, dict):
        return {key: _without(directory, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without(directory, each) for each in value]
    return value


def _pruned(tombstones: Sequence[Pruned], prefix: str, asked: Selection) -> int:
    """Count the sessions that are gone, and may have had entries of these days."""
    count, bounds = 0, Bounds()
    for each in tombstones:
        named = SESSION_FILE.fullmatch(os.path.basename(each.file))
        if named is not None and named["prefix"] == prefix and not each.there:
            count += may_be_in(File(each.file, prefix, named["day"]), asked, bounds)
    return count


@dataclass(slots=True)
class _Lines:
    """What was asked for of a session's file.

    Attributes:
        leaves: of the tree over the lines that are signed.
        found: the lines that were asked for, with their numbers.
        linked: whether each line follows the one before it.
    """

    leaves: list[bytes] = field(default_factory=list)
    found: list[tuple[int, bytes]] = field(default_factory=list)
    linked: bool = True


class _Part:
    """The entries of some days, and what proves them."""

    def __init__(
        self, directory: str, prefix: str, asked: Selection, company: str | None,
        keys: Sequence[VerifierKey],
    ) -> None:  # fmt: skip
        self.directory = directory
        self.name = well_formed(os.path.basename(directory))
        self.company = company
        self._prefix = prefix
        self._asked = asked
        self._begin, self._end = stamp(asked.since), stamp(asked.until)
        self.signed = read_signed_heads(os.path.join(directory, journal_name(prefix)), keys)
        self._used: dict[str, Head] = {}
        self.summary = Summary(is_partial=True)
        self.contradicting: Counter[str] = Counter()
        self._entries = self._proven = 0

    def write(self, members: Members) -> dict[str, int]:
        """Write entries, proofs, heads and checkpoint; return how many there are."""
        with tempfile.TemporaryFile() as proofs:
            members.add_all(ENTRIES, self._lines(proofs))
            members.add_all(PROOFS, _parts(proofs))
        members.add_all(HEADS, self._heads())
        members.add(CHECKPOINT, (self.signed.note or "").encode())
        return {"entries": self._entries, "proven": self._proven, "sessions": len(self._used),
                "contradicting": self.contradicting.total()}  # fmt: skip

    def _lines(self, proofs: IO[bytes]) -> Iterator[bytes]:
        for path, session in self._files():
            head = self.signed.heads.get(session)
            part = self._selected(path, session, head.sequence if head else 0)
            tree = Tree(part.leaves if part.found else [])
            fits = head is not None and (tree.size, tree.root()) == (head.sequence, head.root)
            for number, line in part.found:
                told: dict[str, object] = {"session": session, "sequence": number, "proof": None}
                if head is not None and fits and number <= tree.size:
                    told["proof"] = [b64encode(each).decode() for each in tree.proof(number - 1)]
                    self._used[session] = head
                    self._proven += 1
                elif not part.linked or (head is not None and not fits):
                    told["contradicts"] = True
                    self.contradicting[os.path.basename(path)] += 1
                self._entries += 1
                self._sum_up(path, number, line)
                proofs.write(orjson.dumps(told) + b"\n")
                yield line + b"\n"

    def _sum_up(self, path: str, number: int, line: bytes) -> None:
        try:
            self.summary.add(Entry(line, path, number, orjson.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            self.summary.cannot_read(f"line {number} of {os.path.basename(path)}: no entry")

    def _files(self) -> Iterator[tuple[str, str]]:
        """Return the files that may hold entries of these days, and their sessions."""
        bounds = Bounds()
        for file in find_files(self.directory):
            if file.prefix == self._prefix and may_be_in(file, self._asked, bounds):
                yield file.path, file.session

    def _selected(self, path: str, session: str, covered: int) -> _Lines:
        """Read a file, of whose lines so many are signed."""
        part, number, prev = _Lines(), 0, ""
        try:
            with Source(path, follow=False) as source:
                for lines in Lines(source.chunks()):
                    for line in lines:
                        number += 1
                        part.linked &= line.endswith(link(b"", session, number, prev))
                        prev = line_hash(line)
                        if number <= covered:
                            part.leaves.append(leaf_hash(line))
                        if self._is_asked_for(line):
                            part.found.append((number, line))
        except Unreadable as error:
            raise AuditConfigurationError(
                f"cannot read {path}: {error.reason}; it may hold entries of these days",
                hint="run structlog-audit verify on the log; if that is no file of the log, move "
                "it away, and find out who put it there",
            ) from None
        return part

    def _is_asked_for(self, line: bytes) -> bool:
        time = time_of(line)
        if time is None or not self._begin <= time < self._end:
            return False
        if self.company is None:
            return True
        try:
            return bool(orjson.loads(line).get("companyId") == self.company)
        except (ValueError, AttributeError):
            return False

    def _heads(self) -> Iterator[bytes]:
        """Return the last line that is signed, which tells when that was; then the heads."""
        tree = self.signed.tree
        if not tree.size:
            return
        last = (self.signed.last, self.signed.note, tree.size)
        used = {head.number: (head.line, head.note, head.size) for head in self._used.values()}
        for number, (line, note, size) in {tree.size: last, **used}.items():
            proof = [b64encode(each).decode() for each in tree.proof(number - 1, size)]
            told = {"head": line.decode(), "proof": proof, "note": note}
            yield orjson.dumps(told) + b"\n"


def _check_paths(directory: str, output: str, prefix: str) -> None:
    if not os.path.isdir(directory):
        raise AuditConfigurationError(f"there is no directory {directory}")
    if not os.path.lexists(os.path.join(directory, journal_name(prefix))):
        raise AuditConfigurationError(
            f"there is no log with the prefix {prefix!r} in {directory}",
            hint=f"it would have a journal there, {journal_name(prefix)}",
        )
    check_new(output)
    if not os.path.isdir(os.path.dirname(output)):
        raise AuditConfigurationError(f"there is no directory {os.path.dirname(output)}")


def _check_days(first: date, last: date, calendar: Calendar, limit: int | None) -> None:
    if last < first:
        raise AuditConfigurationError(f"the last day, {last}, is before the first one, {first}")
    if limit is not None and (days := calendar.business_days(first, last)) > limit:
        raise AuditConfigurationError(
            f"from {first} to {last} there are {days} business days, and {limit} may be exported "
            "at a time",
            hint="take fewer days, or --no-limit",
        )


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AuditConfigurationError(
            f"{path} cannot be written: {error.strerror or type(error).__name__}",
            hint="nothing of it is left there; free some space, or name another place",
        ) from error


def _unnamed(output: str) -> IO[bytes]:
    """Return a file without a name, on the file system of the archive."""
    return tempfile.TemporaryFile(dir=os.path.dirname(output))


@contextlib.contextmanager
def _encrypted(plain: IO[bytes], recipients: Sequence[Any], output: str) -> Iterator[IO[bytes]]:
    plain.seek(0)
    if not recipients:
        yield plain
        return
    with _unnamed(output) as ready:
        age.encrypt(plain, ready, recipients)
        yield ready


def _parts(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    yield from iter(lambda: file.read(CHUNK), b"")


def _digest(file: IO[bytes]) -> str:
    digest = sha256()
    for part in _parts(file):
        digest.update(part)
    return digest.hexdigest()
