"""What was handed over: an export, verified by who received it, without the log it comes from."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from itertools import zip_longest
from typing import IO, Any

import orjson

from structlog_audit.chain import identity, line_hash
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.export import CHUNK, FORMAT, _pyrage
from structlog_audit.merkle import leaf_hash, verify_inclusion
from structlog_audit.note import Checkpoint, NoteError, VerifierKey, open_note


class ExportError(AuditConfigurationError):
    """Raised when an export does not hold: something in it was changed, or is missing."""

    contradicts = True


@dataclass(frozen=True, slots=True)
class Received:
    """What an export shows.

    Attributes:
        manifest: what was asked for, by whom, and when.
        entries: how many entries are in it.
        proven: how many of them are proven by the signature.
        origin: name of the log that was signed, or None.
        keys: the keys that signed, as text.
    """

    manifest: dict[str, Any]
    entries: int
    proven: int
    origin: str | None
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Head:
    size: int
    root: bytes


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
        try:
            manifest = orjson.loads(archive.read("manifest.json"))
            _check_manifest(archive, manifest)
            note = archive.read("checkpoint.note").decode()
            heads, origin, signed_by = _heads(archive, note, keys)
            entries, proven = _check_entries(archive, manifest, heads)
        except NoteError as error:
            raise ExportError(f"the checkpoint does not hold: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise ExportError(f"the archive is not whole ({type(error).__name__})") from None
    if (entries, proven) != (manifest["entries"], manifest["proven"]):
        raise ExportError("the archive does not hold as many entries as its manifest says")
    return Received(manifest, entries, proven, origin, signed_by)


@contextlib.contextmanager
def _opened(path: str, identities: Sequence[str]) -> Iterator[zipfile.ZipFile]:
    try:
        with open(path, "rb") as file, tempfile.TemporaryFile() as plain:
            ready: IO[bytes] = file
            if file.read(21) == b"age-encryption.org/v1":
                file.seek(0)
                _decrypt(file, plain, identities)
                ready = plain
            with zipfile.ZipFile(ready) as archive:
                yield archive
    except OSError as error:
        raise AuditConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except zipfile.BadZipFile:
        raise ExportError(f"{path} is no export, or was damaged") from None


def _decrypt(file: IO[bytes], plain: IO[bytes], identities: Sequence[str]) -> None:
    if not identities:
        raise AuditConfigurationError("the export is encrypted", hint="give --identity FILE")
    pyrage = _pyrage()
    try:
        own = [pyrage.x25519.Identity.from_str(text) for text in identities]
        pyrage.decrypt_io(file, plain, own)
    except pyrage.IdentityError:
        raise AuditConfigurationError(
            "an identity is no private key of age", hint="it begins with AGE-SECRET-KEY-1"
        ) from None
    except pyrage.DecryptError as error:
        raise AuditConfigurationError(f"the export cannot be decrypted: {error}") from None


def _check_manifest(archive: zipfile.ZipFile, manifest: dict[str, Any]) -> None:
    if manifest["format"] != FORMAT:
        raise ExportError(f"this is no export of the format {FORMAT}")
    names = {item.filename for item in archive.infolist()} - {"manifest.json"}
    if names != set(manifest["files"]) or len(archive.infolist()) != len(names) + 1:
        raise ExportError("the archive does not hold the files that its manifest names")
    for name, expected in manifest["files"].items():
        digest = sha256()
        with archive.open(name) as member:
            for part in iter(lambda: member.read(CHUNK), b""):
                digest.update(part)
        if digest.hexdigest() != expected:
            raise ExportError(f"{name} is not what the manifest says")


def _heads(
    archive: zipfile.ZipFile, note: str, keys: Sequence[VerifierKey]
) -> tuple[dict[str, _Head], str | None, tuple[str, ...]]:
    """Return the heads that the checkpoint proves, the log's name, and who signed it."""
    if not note:
        return {}, None, ()
    text, signed_by = open_note(note, keys)
    checkpoint = Checkpoint.parse(text)
    heads: dict[str, _Head] = {}
    time = ""
    with archive.open("heads.ndjson") as lines:
        for line in lines:
            fields = orjson.loads(line)
            head_line = fields["head"].encode()
            head = orjson.loads(head_line)
            proof = [b64decode(each, validate=True) for each in fields["proof"]]
            if not verify_inclusion(leaf_hash(head_line), head["number"] - 1, checkpoint.size,
                                    proof, checkpoint.root):  # fmt: skip
                raise ExportError(f"line {head['number']} of the journal is not signed")
            if head["number"] == checkpoint.size:
                time = head["time"]
            if "root" in head:
                heads[head["session"]] = _Head(head["sequence"], b64decode(head["root"]))
    when = datetime.fromisoformat(time.replace("Z", "+00:00"))
    if not any(key.valid_at(when) for key in signed_by):
        raise ExportError(f"the key was not valid at {time}")
    return heads, checkpoint.origin, tuple(map(str, signed_by))


def _check_entries(
    archive: zipfile.ZipFile, manifest: dict[str, Any], heads: dict[str, _Head]
) -> tuple[int, int]:
    """Check each entry against its proof, and the chain where entries stand side by side."""
    entries = proven = 0
    before: tuple[str, int, str] = ("", 0, "")
    with archive.open("entries.ndjson") as lines, archive.open("proofs.ndjson") as proofs:
        for entry, fields in zip_longest(lines, map(orjson.loads, proofs)):
            line = entry.removesuffix(b"\n")
            session, sequence = identity(line)
            place = f"entry {sequence} of the session {session}"
            if (session, sequence) != (fields["session"], fields["sequence"]):
                raise ExportError(f"{place} has the proof of another one")
            follows = b'"prev":"%b"}' % before[2].encode()
            if before[:2] == (session, sequence - 1) and not line.endswith(follows):
                raise ExportError(f"{place} does not follow the one before it")
            if manifest["company"] not in (None, orjson.loads(line).get("companyId")):
                raise ExportError(f"{place} belongs to another company")
            if fields["proof"] is not None:
                _check_proof(line, sequence, fields["proof"], heads.get(session), place)
                proven += 1
            entries += 1
            before = (session, sequence, line_hash(line))
    return entries, proven


def _check_proof(
    line: bytes, sequence: int, proof: list[str], head: _Head | None, place: str
) -> None:
    hashes = [b64decode(each, validate=True) for each in proof]
    if head is None or not verify_inclusion(
        leaf_hash(line), sequence - 1, head.size, hashes, head.root
    ):
        raise ExportError(f"{place} is not the one that was signed")
