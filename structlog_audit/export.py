"""Exports: the entries of a few days in one archive, with what proves them.

1. The archive is a zip file. `entries.ndjson` has the exact lines; `proofs.ndjson` beside it, line
   by line, how each one follows from the head of its session; `heads.ndjson` the signed heads, and
   how they follow from `checkpoint.note`. `manifest.json` has the SHA-256 of each of them.
2. It can be verified without the log it comes from, with the public key alone (`handover.py`).
3. It is an entry of the log itself, recorded when the archive is durable and before it has its
   name. Without that entry there is no archive, and there is never half a one. A crash between the
   two leaves an entry of an export that nobody has.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import zipfile
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from hashlib import sha256
from typing import IO, Any

import orjson

from structlog_audit._version import __version__
from structlog_audit.act import user
from structlog_audit.activity import ActivityReport
from structlog_audit.business import Calendar
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.listing import Bounds, find_files, may_be_in
from structlog_audit.merkle import Tree, leaf_hash
from structlog_audit.names import journal_name
from structlog_audit.new_file import check_new, write_new
from structlog_audit.note import VerifierKey
from structlog_audit.reader import Entry
from structlog_audit.report import Report
from structlog_audit.report_page import page
from structlog_audit.selection import select
from structlog_audit.source import Lines, Source, Unreadable
from structlog_audit.summary import Summary
from structlog_audit.verify import verify

FORMAT = "structlog-audit/export/1"
ACTION = "AuditExport"
CHUNK = 2**18
LIMIT = 5
"""Business days at a time; the rule of the hosted product whose audit log ours follows."""
_TIME = re.compile(rb'\{"level":35,"time":"([0-9T:.-]{26}Z)"')


@dataclass(frozen=True, slots=True)
class Exported:
    """What was exported.

    Attributes:
        path: the archive.
        entries: how many entries are in it.
        proven: how many of them come with a proof.
        sha256: of the archive, in hex, as it stands in the log.
        verdict: what verification says of the log that it comes from.
    """

    path: str
    entries: int
    proven: int
    sha256: str
    verdict: str


@dataclass(slots=True)
class _Head:
    """The last signed head of a session."""

    line: bytes
    number: int
    sequence: int


@dataclass(slots=True)
class _Journal:
    """What the journal says, as far as an export needs it."""

    heads: dict[str, _Head] = field(default_factory=dict)
    note: str | None = None
    last: bytes = b""
    tree: Tree | None = None


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
        keys: the public keys, which go into the archive, and with which the log is verified.
        recipients: public keys of age; the archive is encrypted to them.

    Raises:
        AuditConfigurationError: the days, the recipients or the paths are unusable.
        AuditError: the entry that tells of the export could not be recorded.
    """
    where, name = os.path.abspath(os.fsdecode(directory)), os.path.abspath(os.fsdecode(output))
    calendar = calendar or Calendar()
    _check_paths(where, name, prefix)
    _check_days(first, last, calendar.business_days(first, last), limit)
    to = [_recipient(text) for text in recipients]
    about: dict[str, object] = {
        "prefix": prefix, "from": first.isoformat(), "to": last.isoformat(),
        "zone": str(calendar.zone), "company": company, "by": user(),
    }  # fmt: skip
    begin, end = map(_stamp, calendar.span(first, last))
    with _explained(name), _unnamed(name) as plain:
        report = verify(where, keys=keys)
        selection = _Selection(where, prefix, begin, end, company)
        counts = _pack(plain, selection, about, report, keys)
        with _encrypted(plain, to, name) as ready:
            digest = _digest(ready)
            told = {**about, **counts, "sha256": digest, "recipients": list(recipients)}
            act = {"action": ACTION, "data": told}
            write_new(name, _parts(ready), before=lambda: record(act))
    return Exported(name, counts["entries"], counts["proven"], digest, report.verdict)


def _pack(
    file: IO[bytes],
    selection: _Selection,
    about: Mapping[str, object],
    report: Report,
    keys: Sequence[VerifierKey],
) -> dict[str, int]:
    """Write the archive; return how many entries, proofs and sessions are in it."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        members = _Members(archive)
        counts, now = selection.write(members), datetime.now(timezone.utc)
        members.add("verification.json", orjson.dumps(report.as_dict()))
        asked = {name: str(about[name]) for name in ("from", "to", "zone", "company")}
        made = ActivityReport(selection.summary, [selection.name], now, asked, report.verdict)
        members.add("report.html", page(made).encode())
        members.add("keys.pub", "".join(f"{key}\n" for key in keys).encode())
        members.add("README.txt", _README.encode())
        manifest = {
            "format": FORMAT, "library": f"structlog-audit {__version__}", "made": _stamp(now),
            **about, **counts, "verdict": report.verdict, "files": members.hashes,
        }  # fmt: skip
        archive.writestr("manifest.json", orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    return counts


class _Members:
    """The files in an archive, and their hashes."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self.hashes: dict[str, str] = {}

    def add(self, name: str, data: bytes) -> None:
        """Add a small file."""
        self.add_all(name, [data])

    def add_all(self, name: str, parts: Iterable[bytes]) -> None:
        """Add a file of any size."""
        digest = sha256()
        with self._archive.open(name, "w", force_zip64=True) as member:
            for part in parts:
                digest.update(part)
                member.write(part)
        self.hashes[name] = digest.hexdigest()


class _Selection:
    """The entries of some days, and what proves them."""

    def __init__(
        self, directory: str, prefix: str, begin: str, end: str, company: str | None
    ) -> None:
        self._directory = directory
        self.name = os.path.basename(directory)
        self._prefix = prefix
        self._begin, self._end = begin, end
        self._company = company
        self._journal = _read_journal(os.path.join(directory, journal_name(prefix)))
        self._used: dict[str, _Head] = {}
        self.summary = Summary(is_partial=True)
        self._entries = self._proven = 0

    def write(self, members: _Members) -> dict[str, int]:
        """Write entries, proofs, heads and checkpoint; return how many there are."""
        with tempfile.TemporaryFile() as proofs:
            members.add_all("entries.ndjson", self._lines(proofs))
            members.add_all("proofs.ndjson", _parts(proofs))
        members.add_all("heads.ndjson", self._heads())
        members.add("checkpoint.note", (self._journal.note or "").encode())
        return {"entries": self._entries, "proven": self._proven, "sessions": len(self._used)}

    def _lines(self, proofs: IO[bytes]) -> Iterator[bytes]:
        for path, session in self._files():
            head = self._journal.heads.get(session)
            leaves, found = self._selected(path, head.sequence if head else 0)
            tree = Tree(leaves) if found and head else None
            for number, line in found:
                proof = None
                if tree is not None and head is not None and number <= tree.size == head.sequence:
                    proof = [b64encode(each).decode() for each in tree.proof(number - 1)]
                    self._used[session] = head
                    self._proven += 1
                self._entries += 1
                self._sum_up(path, number, line)
                proofs.write(orjson.dumps({"session": session, "sequence": number, "proof": proof}))
                proofs.write(b"\n")
                yield line + b"\n"

    def _sum_up(self, path: str, number: int, line: bytes) -> None:
        try:
            self.summary.add(Entry(line, path, number, orjson.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            self.summary.cannot_read(f"line {number} of {os.path.basename(path)}: no entry")

    def _files(self) -> Iterator[tuple[str, str]]:
        """Return the files that may hold entries of these days, and their sessions."""
        bounds, asked = Bounds(), select(since=self._begin, until=self._end)
        for file in find_files(self._directory):
            if file.prefix == self._prefix and may_be_in(file, asked, bounds):
                yield file.path, file.session

    def _selected(self, path: str, covered: int) -> tuple[list[bytes], list[tuple[int, bytes]]]:
        """Return the leaves of the signed part of a file, and the lines that were asked for."""
        leaves, found, number = [], [], 0
        try:
            with Source(path, follow=False) as source:
                for lines in Lines(source.chunks()):
                    for line in lines:
                        number += 1
                        if number <= covered:
                            leaves.append(leaf_hash(line))
                        if self._is_asked_for(line):
                            found.append((number, line))
        except Unreadable as error:
            raise AuditConfigurationError(f"cannot read {path}: {error.reason}") from None
        return leaves, found

    def _is_asked_for(self, line: bytes) -> bool:
        time = _TIME.match(line)
        if time is None or not self._begin <= time[1].decode() < self._end:
            return False
        if self._company is None:
            return True
        try:
            return bool(orjson.loads(line).get("companyId") == self._company)
        except (ValueError, AttributeError):
            return False

    def _heads(self) -> Iterator[bytes]:
        """Return the last line that is signed, which tells when that was; then the heads."""
        tree, last = self._journal.tree, self._journal.last
        if tree is None or not tree.size:
            return
        for line, number in [(last, tree.size), *((h.line, h.number) for h in self._used.values())]:
            proof = [b64encode(each).decode() for each in tree.proof(number - 1)]
            yield orjson.dumps({"head": line.decode(), "proof": proof}) + b"\n"


def _read_journal(path: str) -> _Journal:
    """Read which heads are signed by the newest checkpoint, and which sessions have ended."""
    journal, leaves, before = _Journal(), [], b""
    if not os.path.lexists(path):
        return journal
    fresh: dict[str, _Head] = {}
    covered = 0
    try:
        with Source(path) as source:
            for lines in Lines(source.chunks()):
                for line in lines:
                    fields = orjson.loads(line)
                    leaves.append(leaf_hash(line))
                    session, event = fields.get("session"), fields.get("event")
                    if "root" in fields:
                        fresh[session] = _Head(line, len(leaves), fields["sequence"])
                    if event == "Checkpoint":
                        journal.heads |= fresh
                        journal.note, journal.last, fresh = fields["note"], before, {}
                        covered = len(leaves) - 1
                    before = line
    except (Unreadable, ValueError, KeyError, TypeError, AttributeError):
        raise AuditConfigurationError(
            f"{path} cannot be read as a journal", hint="run structlog-audit verify on the log"
        ) from None
    journal.tree = Tree(leaves[:covered])
    return journal


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


def _check_days(first: date, last: date, days: int, limit: int | None) -> None:
    if last < first:
        raise AuditConfigurationError(f"the last day, {last}, is before the first one, {first}")
    if limit is not None and days > limit:
        raise AuditConfigurationError(
            f"from {first} to {last} there are {days} business days, and {limit} may be exported "
            "at a time",
            hint="take fewer days, or --no-limit",
        )


def _stamp(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


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


def _recipient(text: str) -> Any:
    pyrage = _pyrage()
    try:
        return pyrage.x25519.Recipient.from_str(text)
    except pyrage.RecipientError:
        raise AuditConfigurationError(
            "a recipient is no public key of age", hint="it begins with age1; age-keygen makes one"
        ) from None


def _pyrage() -> Any:
    try:
        import pyrage
    except ImportError:
        raise AuditConfigurationError(
            "encryption needs the package pyrage", hint="pip install 'structlog-audit[export]'"
        ) from None
    return pyrage


@contextlib.contextmanager
def _encrypted(plain: IO[bytes], recipients: Sequence[Any], output: str) -> Iterator[IO[bytes]]:
    plain.seek(0)
    if not recipients:
        yield plain
        return
    with _unnamed(output) as ready:
        _pyrage().encrypt_io(plain, ready, recipients)
        yield ready


def _parts(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    yield from iter(lambda: file.read(CHUNK), b"")


def _digest(file: IO[bytes]) -> str:
    digest = sha256()
    for part in _parts(file):
        digest.update(part)
    return digest.hexdigest()


_README = """\
This archive holds entries of an audit log, and what proves that they were recorded as they stand.

  entries.ndjson      the entries, one JSON object a line, byte for byte
  proofs.ndjson       line by line, how each entry follows from the head of its session (RFC 6962)
  heads.ndjson        the heads of the sessions, and how they follow from the checkpoint (RFC 6962)
  checkpoint.note     the signature over all of it (C2SP signed note)
  keys.pub            the public keys; take them from somebody you trust rather than from here
  report.html         who did what how often, and what failed, to be read and printed
  verification.json   what a verification of the whole log said when this was made
  manifest.json       what was asked for, and the SHA-256 of each of these files

To verify it, with the public key from somebody you trust:

  pip install 'structlog-audit[cli,sign]'
  structlog-audit verify-export ARCHIVE --key KEY.pub
"""
