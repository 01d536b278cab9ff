"""What was handed over: an export, verified by who received it, without the log it comes from."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import tempfile
import zipfile
import zlib
from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from hashlib import sha256
from itertools import zip_longest
from typing import IO, Any

import orjson

from structlog_audit import age
from structlog_audit.archive import (
    CHECKPOINT,
    ENTRIES,
    FORMAT,
    HASHED,
    HEADS,
    MANIFEST,
    MANIFEST_NOTE,
    PROOFS,
    statement,
    time_of,
)
from structlog_audit.chain import identity, line_hash
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.holds import parse_time
from structlog_audit.merkle import leaf_hash, verify_inclusion
from structlog_audit.note import Checkpoint, NoteError, VerifierKey, open_note
from structlog_audit.source import CHUNK, LONGEST_LINE, Lines, Unreadable

LARGEST = 16 * 2**20
"""Bytes of what is read as a whole: manifest, notes, a line of proofs or heads."""
_END = struct.Struct("<4s6xH8xH")
_HEADER = struct.Struct("<26xHH")
"""The record at the end of a zip file: how it begins, how many members there are, and how long a
comment is."""
_TEXTS = ("library", "made", "prefix", "from", "to", "zone", "begin", "end", "by", "verdict")
_COUNTS = ("entries", "proven", "contradicting", "sessions", "pruned")
_DAY = timedelta(days=1)
_STAMP = re.compile(r"[0-9T:.-]{26}Z")
_DAMAGED = (
    ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, EOFError,
    RuntimeError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
"""What zipfile and the readers of its members raise where bytes were changed."""


class ExportError(AuditConfigurationError):
    """Raised when an export does not hold: something in it was changed, or is missing."""

    contradicts = True


@dataclass(frozen=True, slots=True)
class Received:
    """What an export shows.

    Attributes:
        manifest: what was asked for, by whom, and when; the word of whoever made the archive.
        entries: how many entries are in it.
        proven: how many of them are proven by the signature: they are as they were recorded.
        origin: name of the log that was signed, or None.
        keys: the keys that signed the log, as text.
        stated_by: the keys that signed the manifest, as text: with it the report, and that nothing
            was left out, are the exporter's statement. None of them: they are anybody's word.
    """

    manifest: dict[str, Any]
    entries: int
    proven: int
    origin: str | None
    keys: tuple[str, ...]
    stated_by: tuple[str, ...] = ()

    @property
    def is_proven(self) -> bool:
        """Whether each entry is proven, the manifest is signed, and says nothing bad of the log."""
        whole = self.proven == self.entries and bool(self.stated_by)
        return whole and self.manifest["verdict"] != "tampered"


@dataclass(frozen=True, slots=True)
class _Head:
    size: int
    root: bytes


@dataclass(frozen=True, slots=True)
class _Signed:
    """What checkpoints vouch for, and who signed them."""

    origin: str | None
    keys: tuple[VerifierKey, ...]
    heads: dict[str, _Head]


def verify_export(
    path: str | os.PathLike[str],
    keys: Sequence[VerifierKey],
    *,
    identities: Sequence[str] = (),
) -> Received:
    """Verify an export.

    Args:
        path: the archive.
        keys: the public keys to trust.
        identities: private keys of age, where it is encrypted.

    Raises:
        ExportError: it does not hold.
        AuditConfigurationError: it cannot be read.
    """
    with _opened(os.fsdecode(path), identities) as archive:
        _check_members(archive)
        text = _read(archive, MANIFEST)
        origin, stated_by = _stated_by(archive, text, keys)
        manifest = orjson.loads(text)
        _check_manifest(archive, manifest)
        signed = _signed(archive, keys)
        if stated_by:
            _check_signers(origin, stated_by, manifest["made"])
            if signed.origin is not None and _journal(origin) != _journal(signed.origin):
                raise ExportError("the manifest and the checkpoint are of two logs")
        entries, proven = _Entries(archive, manifest, signed.heads).check()
    return Received(
        manifest, entries, proven, signed.origin,
        tuple(map(str, signed.keys)), tuple(map(str, stated_by)),
    )  # fmt: skip


@contextlib.contextmanager
def _opened(path: str, identities: Sequence[str]) -> Iterator[zipfile.ZipFile]:
    try:
        with open(path, "rb") as file, tempfile.TemporaryFile() as plain:
            ready: IO[bytes] = file
            if age.is_encrypted(file):
                age.decrypt(file, plain, identities)
                ready = plain
            with zipfile.ZipFile(ready) as archive:
                _check_ends(ready, archive)
                yield archive
    except (*_DAMAGED, age.Damaged) as error:
        reason = f"{path}: the archive is damaged, or is no export"
        raise ExportError(reason) from error
    except OSError as error:
        raise AuditConfigurationError(f"cannot read {path}: {error.strerror}") from error


def _check_ends(file: IO[bytes], archive: zipfile.ZipFile) -> None:
    """Make sure that nothing stands before or behind the archive."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END.size))
    items = archive.infolist()
    mark, count, comment = _END.unpack(file.read())
    if mark != b"PK\5\6" or comment or min((item.header_offset for item in items), default=0):
        raise ExportError("something stands before or behind the archive in its file")
    if count != len(items):
        raise zipfile.BadZipFile
    _check_gaps(file, archive)


def _check_gaps(file: IO[bytes], archive: zipfile.ZipFile) -> None:
    """Make sure that the members stand side by side, and nothing stands between them."""
    places = [0]
    items = sorted(archive.infolist(), key=lambda item: item.header_offset)
    for item in items:
        file.seek(item.header_offset)
        name, extra = _HEADER.unpack(file.read(_HEADER.size))
        places.append(item.header_offset + _HEADER.size + name + extra + item.compress_size)
    if places != [*(item.header_offset for item in items), archive.start_dir] or any(
        item.comment for item in items
    ):
        raise ExportError("something stands between the files of the archive")


def _check_members(archive: zipfile.ZipFile) -> None:
    items = archive.infolist()
    names = [item.filename for item in items]
    if set(names) - {MANIFEST_NOTE} != {*HASHED, MANIFEST} or len(set(names)) != len(names):
        raise ExportError("the archive does not hold the files of an export, and these alone")
    for item in items:
        if item.orig_filename != item.filename or item.compress_type not in (
            zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
        ):  # fmt: skip
            raise zipfile.BadZipFile


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as member:
        data = member.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ExportError(f"{name} has more than {LARGEST:,} bytes: it is none of an export")
    return data


def _parts(archive: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    with archive.open(name) as member:
        yield from iter(lambda: member.read(CHUNK), b"")


def _lines(archive: zipfile.ZipFile, name: str, longest: int = LARGEST) -> Iterator[bytes]:
    whole = Lines(_parts(archive, name), longest)
    try:
        for lines in whole:
            yield from lines
    except Unreadable as error:
        raise ExportError(f"{name}: {error.reason}: it is none of an export") from None
    if whole.tail:
        raise EOFError(name)


def _check_manifest(archive: zipfile.ZipFile, manifest: dict[str, Any]) -> None:
    if manifest["format"] != FORMAT:
        raise ExportError(f"this is no export of the format {FORMAT}")
    typed = (
        all(type(manifest[name]) is str for name in _TEXTS)
        and all(type(manifest[name]) is int and manifest[name] >= 0 for name in _COUNTS)
        and all(_STAMP.fullmatch(manifest[name]) for name in ("made", "begin", "end"))
        and type(manifest["company"]) in (str, type(None))
        and manifest["files"].keys() == HASHED
    )
    if not typed:
        raise ExportError("the manifest is none of an export")
    _check_period(manifest)
    for name, expected in manifest["files"].items():
        digest = sha256()
        for part in _parts(archive, name):
            digest.update(part)
        if digest.hexdigest() != expected:
            raise ExportError(f"{name} is not what the manifest says")


def _check_period(manifest: dict[str, Any]) -> None:
    """Make sure that begin and end fit the days; the zone may be one that is not known here."""
    for name, moment, days in (("from", "begin", 0), ("to", "end", 1)):
        day = date.fromisoformat(manifest[name]) + days * _DAY
        if abs(parse_time(manifest[moment]) - datetime.combine(day, time(), timezone.utc)) > _DAY:
            raise ExportError("the manifest has a period that is not of its days")


def _signed(archive: zipfile.ZipFile, keys: Sequence[VerifierKey]) -> _Signed:
    """Return what the checkpoints prove."""
    newest = _read(archive, CHECKPOINT).decode()
    if not newest:
        return _Signed(None, (), {})
    notes = _Notes(keys)
    checkpoint, signers = notes.opened(newest)
    heads: dict[str, _Head] = {}
    seen: set[int] = set()
    when = ""
    for line in _lines(archive, HEADS):
        fields = orjson.loads(line)
        by, signed_by = notes.opened(fields["note"])
        number, head = _head(fields, by)
        if _journal(by.origin) != _journal(checkpoint.origin):
            raise ExportError("the checkpoints are of two logs")
        if number in seen or head.get("session") in heads:
            raise ExportError(f"line {number} of the journal stands there twice")
        seen.add(number)
        if (fields["note"], number) == (newest, checkpoint.size):
            when = head["time"]
        if "root" in head and by.vouches_for(number):  # else anybody may have appended it
            _check_signers(by.origin, signed_by, head["time"])
            root = b64decode(head["root"], validate=True)
            heads[head["session"]] = _Head(head["sequence"], root)
    _check_signers(checkpoint.origin, signers, when)
    return _Signed(checkpoint.origin, notes.signers(), heads)


class _Notes:
    """The checkpoints of an archive, each of which is opened once."""

    def __init__(self, keys: Sequence[VerifierKey]) -> None:
        self._keys = keys
        self._opened: dict[str, tuple[Checkpoint, tuple[VerifierKey, ...]]] = {}

    def opened(self, note: str) -> tuple[Checkpoint, tuple[VerifierKey, ...]]:
        """Return a checkpoint, and who signed it."""
        if note not in self._opened:
            try:
                text, signers = open_note(note, self._keys)
                self._opened[note] = Checkpoint.parse(text), signers
            except NoteError as error:
                raise ExportError(f"the checkpoint does not hold: {error}") from None
        return self._opened[note]

    def signers(self) -> tuple[VerifierKey, ...]:
        """Return all who signed, those of the newest one first."""
        return tuple(dict.fromkeys(key for _, keys in self._opened.values() for key in keys))


def _head(fields: dict[str, Any], checkpoint: Checkpoint) -> tuple[int, dict[str, Any]]:
    """Return a line of the journal, and its number."""
    told = fields["head"].encode()
    head = orjson.loads(told)
    number = head["number"]
    proof = [b64decode(each, validate=True) for each in fields["proof"]]
    if not verify_inclusion(
        leaf_hash(told), number - 1, checkpoint.size, proof, checkpoint.root
    ):  # fmt: skip
        raise ExportError(f"line {number} of the journal is not signed")
    return number, head


def _check_signers(origin: str, signers: Sequence[VerifierKey], when: str) -> None:
    """Make sure that keys may sign for a log, at that time."""
    name = origin.rpartition("/")[0]
    if not any(key.name == name for key in signers):
        raise ExportError("the key signs another log")
    if not any(key.name == name and key.valid_at(parse_time(when)) for key in signers):
        raise ExportError(f"the key was not valid at {when}")


def _stated_by(
    archive: zipfile.ZipFile, manifest: bytes, keys: Sequence[VerifierKey]
) -> tuple[str, tuple[VerifierKey, ...]]:
    """Return for which log the manifest is signed, and by whom; nobody if it is not."""
    if MANIFEST_NOTE not in archive.namelist():
        return "", ()
    try:
        text, signers = open_note(_read(archive, MANIFEST_NOTE).decode(), keys)
    except NoteError as error:
        raise ExportError(f"the signature of the manifest does not hold: {error}") from None
    origin = text.partition("\n")[0]
    if text != statement(origin, manifest):
        raise ExportError("the manifest is not the one that was signed")
    return origin, signers


def _journal(origin: str) -> str:
    """Return what the origin of a log has of its journal, whatever the key is called."""
    return origin.rpartition("/")[2]


class _Entries:
    """The entries of an archive, each with its proof."""

    def __init__(
        self, archive: zipfile.ZipFile, manifest: dict[str, Any], heads: dict[str, _Head]
    ) -> None:
        self._archive = archive
        self._manifest = manifest
        self._heads = heads
        self._seen: set[str] = set()
        self._before: tuple[str, int, str] = ("", 0, "")
        self._used: set[str] = set()
        self._counts = {"entries": 0, "proven": 0, "contradicting": 0}

    def check(self) -> tuple[int, int]:
        """Check all; return how many there are, and how many are proven."""
        entries = _lines(self._archive, ENTRIES, LONGEST_LINE)
        proofs = _lines(self._archive, PROOFS)
        for line, fields in zip_longest(entries, map(orjson.loads, proofs)):
            self._check(line, fields)
        counts = {**self._counts, "sessions": len(self._used)}
        if any(self._manifest[name] != count for name, count in counts.items()):
            raise ExportError("the archive does not hold as many entries as its manifest says")
        return counts["entries"], counts["proven"]

    def _check(self, line: bytes, fields: dict[str, Any]) -> None:
        session, sequence = fields["session"], fields["sequence"]
        place = f"entry {sequence} of the session {session:.40}"
        self._check_order(session, sequence, place)
        self._check_what_was_asked(line, place)
        if fields.get("contradicts") and fields["proof"] is None:
            self._counts["contradicting"] += 1
        elif identity(line) != (session, sequence):
            raise ExportError(f"{place} has the proof of another one")
        elif self._before[:2] == (session, sequence - 1) and not line.endswith(
            b'"prev":"%b"}' % self._before[2].encode()
        ):
            raise ExportError(f"{place} does not follow the one before it")
        if fields["proof"] is not None:
            self._check_proof(line, session, sequence, fields["proof"], place)
        self._counts["entries"] += 1
        self._before = (session, sequence, line_hash(line))

    def _check_order(self, session: str, sequence: int, place: str) -> None:
        if session != self._before[0]:
            again, least = session in self._seen, 1
            self._seen.add(session)
        else:
            again, least = False, self._before[1] + 1
        if again or sequence < least:
            raise ExportError(f"{place} stands out of its order, or twice")

    def _check_what_was_asked(self, line: bytes, place: str) -> None:
        asked = self._manifest
        time = time_of(line)
        if time is None or not asked["begin"] <= time < asked["end"]:
            raise ExportError(f"{place} is not of these days")
        company = asked["company"]
        if company is not None and orjson.loads(line).get("companyId") != company:
            raise ExportError(f"{place} belongs to another company")

    def _check_proof(
        self, line: bytes, session: str, sequence: int, proof: list[str], place: str
    ) -> None:
        hashes = [b64decode(each, validate=True) for each in proof]
        head = self._heads.get(session)
        if head is None or not verify_inclusion(
            leaf_hash(line), sequence - 1, head.size, hashes, head.root
        ):
            raise ExportError(f"{place} is not the one that was signed")
        self._used.add(session)
        self._counts["proven"] += 1
