"""The archive of an export: which members it has, and what signs them.

`manifest.json` has the SHA-256 of each other member, and `manifest.note` signs the manifest: a C2SP
signed note by the keys of whoever made the archive. Its text is none of a checkpoint, whose second
line is a number.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from hashlib import sha256

from structlog_audit.note import EXPORTED

FORMAT = "structlog-audit/export/1"
MANIFEST, MANIFEST_NOTE = "manifest.json", "manifest.note"
ENTRIES, PROOFS, HEADS = "entries.ndjson", "proofs.ndjson", "heads.ndjson"
CHECKPOINT, KEYS, README = "checkpoint.note", "keys.pub", "README.txt"
REPORT, VERIFICATION = "report.html", "verification.json"
HASHED = frozenset({ENTRIES, PROOFS, HEADS, CHECKPOINT, KEYS, README, REPORT, VERIFICATION})
"""What the manifest names; there is nothing else in an archive but the manifest and its note."""
_TIME = re.compile(rb'\{"level":35,"time":"([0-9T:.-]{26}Z)"')


class Members:
    """The members of an archive that is being written.

    Args:
        archive: where they go.

    Attributes:
        hashes: SHA-256 of each, in hex.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self.hashes: dict[str, str] = {}

    def add(self, name: str, data: bytes) -> None:
        """Add a small one."""
        self.add_all(name, [data])

    def add_all(self, name: str, parts: Iterable[bytes]) -> None:
        """Add one of any size."""
        digest = sha256()
        with self._archive.open(name, "w", force_zip64=True) as member:
            for part in parts:
                digest.update(part)
                member.write(part)
        self.hashes[name] = digest.hexdigest()


def statement(origin: str, manifest: bytes) -> str:
    """Return the text that the exporter signs.

    Args:
        origin: name of the log.
        manifest: the content of `manifest.json`.
    """
    return f"{origin}\n{EXPORTED}\nsha256:{sha256(manifest).hexdigest()}\n"


def time_of(line: bytes) -> str | None:
    """Return when an entry was recorded, as its line has it; None if it is no entry."""
    found = _TIME.match(line)
    return None if found is None else found[1].decode()


README_TEXT = """\
This archive holds entries of an audit log, and what proves that they were recorded as they stand.

  entries.ndjson      the entries, one JSON object a line, byte for byte
  proofs.ndjson       line by line, how each entry follows from the head of its session (RFC 6962)
  heads.ndjson        the heads of the sessions, each with the signature of the log by whoever wrote
                      it (C2SP signed note), and how it follows from that (RFC 6962)
  checkpoint.note     the newest of these signatures
  keys.pub            the public keys; take them from somebody you trust rather than from here
  report.html         who did what how often, and what failed, to be read and printed
  verification.json   what a verification of the whole log said when this was made
  manifest.json       what was asked for, and the SHA-256 of each of these files
  manifest.note       the exporter's signature over the manifest (C2SP signed note); not there if
                      the log has no key

To verify it, with the public key from somebody you trust:

  pip install 'structlog-audit[cli,sign]'
  structlog-audit verify-export ARCHIVE --key KEY.pub

What is proven then: each entry that has a proof is as it was recorded, signed by the log's key at
that time. If the manifest is signed: the manifest, the report, the verification of the log as a
whole, and that these are all entries that were asked for, are as the exporter stated them.

What is not proven: that the exporter's statements are true. What the exporter left out cannot be
seen from this archive. If the manifest is not signed, anything here but the proven entries, also
what was left out, is the word of whoever made the file.
"""
