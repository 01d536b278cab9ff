"""What somebody can do to an archive on its way, with or without a key, and what damage does."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from aging import command
from forging import append_head, inclusion, journal_path, lines_of, relinked, root_of, session_paths
from signing import make_key

from structlog_audit import AuditHandler, FileSink, Signer, handover
from structlog_audit.anchors import notes_in
from structlog_audit.archive import statement
from structlog_audit.export import export
from structlog_audit.handover import ExportError, Received, verify_export
from structlog_audit.note import (
    Checkpoint,
    NoteError,
    SigningKey,
    VerifierKey,
    open_note,
    sign,
    text_of,
)
from structlog_audit.verify import verify

TODAY = datetime.now(timezone.utc).date()
Members = dict[str, bytes]
Change = Callable[[Members], object]


class Archive:
    """An export of a signed log, and what is made of it."""

    def __init__(self, place: Path) -> None:
        self.log, self.path, self.forged = place / "audit", place / "x.zip", place / "forged.zip"
        self.key_file, self.public = place / "audit.key", place / "audit.key.pub"
        self.key = make_key(self.key_file)
        self.public.write_text(str(self.key.verifier))
        self.signer = Signer(self.key_file)
        for _ in range(2):
            self.record(self.signer)
        self.export()
        self.members = contents(self.path.read_bytes())

    def record(self, signer: Signer) -> None:
        handler = AuditHandler(FileSink(self.log, signer=signer))
        for number in range(3):
            handler.record({"action": "A", "company_id": "acme", "data": {"n": number}})
        handler.close()

    def export(self, *keys: VerifierKey) -> None:
        self.path.unlink(missing_ok=True)
        export(self.log, self.path, first=TODAY - timedelta(days=1), last=TODAY, company="acme",
               record=lambda entry: None, signer=self.signer, keys=keys)  # fmt: skip

    def verify(self, path: Path | None = None) -> Received:
        return verify_export(path or self.path, [self.key.verifier])

    def change(self, change: Change, *, signed: bool = True) -> Path:
        """Change members, correct hashes and counts, and perhaps leave the signature out."""
        members = dict(self.members)
        change(members)
        manifest = json.loads(members["manifest.json"])
        manifest["files"] = {
            name: sha256(data).hexdigest()
            for name, data in members.items()
            if not name.startswith("manifest.")
        }
        proofs = [json.loads(line) for line in members["proofs.ndjson"].splitlines()]
        proven = [proof for proof in proofs if proof["proof"]]
        manifest |= {"entries": len(proofs), "proven": len(proven),
                     "sessions": len({proof["session"] for proof in proven})}  # fmt: skip
        members["manifest.json"] = json.dumps(manifest).encode()
        if not signed:
            members.pop("manifest.note", None)
        return self.write(members)

    def write(self, members: Members) -> Path:
        with zipfile.ZipFile(self.forged, "w", zipfile.ZIP_DEFLATED) as out:
            for name, data in members.items():
                out.writestr(name, data)
        return self.forged


def contents(data: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {item.filename: archive.read(item) for item in archive.infolist()}


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path)


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Change:
    """Change entries, and their proofs along with them."""

    def changed(members: Members) -> None:
        for name in ("entries.ndjson", "proofs.ndjson"):
            members[name] = b"".join(change(members[name].splitlines(keepends=True)))

    return changed


def manifest(**fields: Any) -> Change:
    def changed(members: Members) -> None:
        told = {**json.loads(members["manifest.json"]), **fields}
        members["manifest.json"] = json.dumps(told).encode()

    return changed


def member(name: str, data: bytes) -> Change:
    return lambda members: members.update({name: data})


def empty(members: Members) -> None:
    for name in ("entries.ndjson", "proofs.ndjson", "heads.ndjson", "checkpoint.note"):
        members[name] = b""


HIDDEN: dict[str, Change] = {
    "an entry less": lines(lambda all_: all_[1:]),
    "no entries": lines(lambda all_: []),
    "another exporter": manifest(by="mallory"),
    "another time": manifest(made="2020-01-01T00:00:00.000000Z"),
    "another zone": manifest(zone="Asia/Dubai"),
    "all companies": manifest(company=None),
    "a better verdict": manifest(verdict="VALID"),
    "less pruned": manifest(pruned=17),
    "another report": member("report.html", b"<h1>nothing happened</h1>"),
    "another README": member("README.txt", b"pip install evil"),
    "another verification": member("verification.json", b"{}"),
    "everything emptied": empty,
}
"""What nothing in an archive contradicts but the signature of the manifest."""
SHOWN: dict[str, tuple[Change, str]] = {
    "an entry twice": (lines(lambda all_: [all_[0], *all_]), "out of its order, or twice"),
    "reordered": (lines(lambda all_: all_[::-1]), "out of its order, or twice"),
    "sessions mixed": (
        lines(lambda all_: [*all_[:1], *all_[3:], *all_[1:3]]), "out of its order, or twice"),
    "another company": (manifest(company="globex"), "belongs to another company"),
    "other days": (manifest(**{"from": "2020-01-01", "to": "2020-01-05"}), "not of its days"),
    "another period": (
        manifest(**{"from": "2020-01-01", "to": "2020-01-01", "begin":
                 "2020-01-01T00:00:00.000000Z", "end": "2020-01-02T00:00:00.000000Z"}),
        "not of these days"),
    "an extra file": (member("extra.html", b"x"), "these alone"),
    "a file elsewhere": (member("../e", b"x"), "these alone"),
    "a directory": (member("entries.ndjson/", b""), "these alone"),
    "a file less": (lambda members: members.pop("report.html"), "these alone"),
    "a head twice": (
        lambda members: members.update({"heads.ndjson": members["heads.ndjson"] * 2}),
        "stands there twice"),
}  # fmt: skip
"""What also shows without it."""


def test_a_whole_archive_is_proven_and_its_manifest_stated_by_the_exporter(
    archive: Archive,
) -> None:
    """The text of that signature can be taken for no checkpoint."""
    received = archive.verify()

    assert received.is_proven
    assert received.stated_by == received.keys == (str(archive.key.verifier),)
    text, _ = open_note(archive.members["manifest.note"].decode(), [archive.key.verifier])
    assert text == statement(received.origin or "", archive.members["manifest.json"])
    with pytest.raises(NoteError):
        Checkpoint.parse(text)
    told = " ".join(archive.members["README.txt"].decode().split())
    assert "What the exporter left out cannot be seen from this archive." in told
    assert "are as the exporter stated them" in told


@pytest.mark.parametrize("what", [*HIDDEN, *SHOWN])
def test_what_the_exporter_stated_cannot_be_changed(archive: Archive, what: str) -> None:
    """Even with all hashes and counts corrected."""
    change, said = SHOWN.get(what) or (HIDDEN[what], "")
    if said != "these alone":
        said = "not the one that was signed"

    with pytest.raises(ExportError, match=said):
        archive.verify(archive.change(change))


@pytest.mark.parametrize("what", HIDDEN)
def test_an_archive_without_that_signature_is_never_proven(archive: Archive, what: str) -> None:
    """It is told that nobody vouches for what surrounds the proven entries."""
    forged = archive.change(HIDDEN[what], signed=False)

    assert not archive.verify(forged).is_proven
    ran = command("verify-export", forged, "--key", archive.public)
    assert ran.returncode == 2
    assert "incomplete: the manifest is NOT signed. Only the proven entries" in ran.stderr
    assert "the word of whoever made the file" in ran.stderr
    assert "stated by the exporter" not in ran.stdout


@pytest.mark.parametrize("what", SHOWN)
def test_what_contradicts_itself_does_not_hold_without_that_signature(
    archive: Archive, what: str
) -> None:
    """Nor is anything in it that does not belong there."""
    change, said = SHOWN[what]

    with pytest.raises(ExportError, match=said):
        archive.verify(archive.change(change, signed=False))


def test_the_signature_of_the_manifest_is_the_one_of_this_log(
    archive: Archive, tmp_path: Path
) -> None:
    """By a key that is given, in its time, for the journal that the checkpoint is of."""
    other = make_key(tmp_path / "other.key")
    text = archive.members["manifest.json"]
    origin = archive.verify().origin or ""
    for note, said in (
        (sign(statement(origin, text), [other]), "signature of the manifest does not hold"),
        (sign(statement(f"{archive.key.name}/{'0' * 16}", text), [archive.key]), "of two logs"),
        (sign(statement(f"elsewhere/{origin[-16:]}", text), [archive.key]), "signs another log"),
        (sign(f"{origin}\n17\n{'A' * 43}=\n", [archive.key]), "not the one that was signed"),
        (archive.members["checkpoint.note"].decode(), "not the one that was signed"),
        ("", "signature of the manifest does not hold"),
    ):
        forged = archive.write({**archive.members, "manifest.note": note.encode()})
        with pytest.raises(ExportError, match=said):
            archive.verify(forged)


def forged_log(archive: Archive) -> list[bytes]:
    """Append a head of the first session with a root over other lines, have it signed, and return
    these."""
    lines = lines_of(session_paths(archive.log)[0])
    forged = relinked([line.replace(b'"n":1', b'"n":9') for line in lines])
    assert len(set(forged) - set(lines)) > 1
    append_head(archive.log, forged)
    archive.record(archive.signer)
    return forged


def ndjson(*lines: object) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def test_a_root_that_somebody_appended_to_the_journal_proves_nothing(archive: Archive) -> None:
    """Although the next note covers it: that says which lines its signer wrote."""
    forged = forged_log(archive)
    journal = lines_of(journal_path(archive.log))
    note = [json.loads(line)["note"] for line in journal if b'"note":' in line][-1]
    size = Checkpoint.parse(text_of(note)).size
    session = json.loads(forged[0])["session"]
    claimed = next(n for n, line in enumerate(journal, 1) if root_of(forged).encode() in line)

    def lie(members: Members) -> None:
        members["entries.ndjson"] = b"".join(line + b"\n" for line in forged[1:4])
        members["proofs.ndjson"] = ndjson(*(
            {"session": session, "sequence": number, "proof": inclusion(forged, number, 5)}
            for number in (2, 3, 4)
        ))  # fmt: skip
        members["heads.ndjson"] = ndjson(*(
            {"head": journal[n - 1].decode(), "proof": inclusion(journal, n, size), "note": note}
            for n in (size, claimed)
        ))  # fmt: skip
        members["checkpoint.note"] = note.encode()

    with pytest.raises(ExportError, match="is not the one that was signed"):
        archive.verify(archive.change(lie, signed=False))


def test_a_root_that_somebody_appended_takes_no_proof_away(archive: Archive) -> None:
    """An export passes it over."""
    forged_log(archive)
    archive.export()

    received = archive.verify()

    assert (received.entries, received.proven) == (9, 9)
    assert received.manifest["contradicting"] == 0
    assert received.manifest["verdict"] == "tampered"


def test_each_head_is_signed_by_the_key_of_its_time(archive: Archive, tmp_path: Path) -> None:
    """Who verifies has all of them."""
    new = make_key(tmp_path / "new.key")
    archive.record(Signer(tmp_path / "new.key"))
    both = [archive.key.verifier, new.verifier]
    archive.export(*both)

    received = verify_export(archive.path, both)

    assert (received.entries, received.proven) == (9, 9)
    assert set(received.keys) == {str(key) for key in both}
    for key in both:
        with pytest.raises(ExportError, match="none of the known keys"):
            verify_export(archive.path, [key])


def test_something_before_or_behind_an_archive_is_seen(archive: Archive) -> None:
    """As it might be read by another program."""
    data = archive.path.read_bytes()
    for whole in (b"#!/bin/sh\n" + data, data + b"more", data[:-2] + b"\4\0more"):
        archive.forged.write_bytes(whole)
        with pytest.raises(ExportError, match="before or behind"):
            archive.verify(archive.forged)


def test_something_between_the_files_of_an_archive_is_seen(archive: Archive) -> None:
    """A program that reads from the front would see a member that others do not."""
    data = archive.path.read_bytes()
    with zipfile.ZipFile(archive.path) as read:
        start = read.start_dir
    hidden = io.BytesIO()
    with zipfile.ZipFile(hidden, "w") as more:
        more.writestr("entries.ndjson", b"{}\n")
    local = hidden.getvalue()[: more.start_dir]
    moved = data[-22:-6] + (start + len(local)).to_bytes(4, "little") + data[-2:]
    archive.forged.write_bytes(data[:start] + local + data[start:-22] + moved)
    assert contents(archive.forged.read_bytes()) == archive.members
    with pytest.raises(ExportError, match="between the files"):
        archive.verify(archive.forged)

    archive.write(archive.members)
    with zipfile.ZipFile(archive.forged, "a") as out:
        out.infolist()[0].comment = b"told nobody"
        out.comment = b"x"  # so that the directory is written anew
        out.comment = b""
    with pytest.raises(ExportError, match="between the files"):
        archive.verify(archive.forged)


def test_an_archive_that_was_unpacked_is_an_anchor(archive: Archive, tmp_path: Path) -> None:
    """Its checkpoint is; what signs the archive is none."""
    place = tmp_path / "unpacked"
    place.mkdir()
    for name, data in archive.members.items():
        (place / name).write_bytes(data)
    notes = notes_in(str(place))
    report = verify(archive.log, keys=[archive.key.verifier], anchors=notes)
    assert report.anchored_until is not None


def sizes(data: bytes) -> list[int]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [item.compress_size for item in archive.infolist()]


def whole_at(place: int, data: bytes, archive: Archive) -> bool:
    """Tell whether an archive is the same, after a byte of it was flipped."""
    if place - len(data) in (-12, -11, -2, -1):  # how many members there are, and what follows
        return False
    try:
        return contents(data) == archive.members and sizes(data) == sizes(archive.path.read_bytes())
    except Exception:  # zipfile raises whatever it meets
        return False


def test_any_damage_is_told_as_damage(archive: Archive) -> None:
    """Bytes that were flipped: it holds if each member can still be read, as it was."""
    data, seen = archive.path.read_bytes(), {True: 0, False: 0}
    for place in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[place] ^= 0xFF
        archive.forged.write_bytes(flipped)
        if whole_at(place, bytes(flipped), archive):
            assert archive.verify(archive.forged).is_proven, place
        else:
            with pytest.raises(ExportError):
                archive.verify(archive.forged)
        seen[whole_at(place, bytes(flipped), archive)] += 1
    assert min(seen.values()) > 10


def bzip2(archive: Archive) -> bytes:
    with zipfile.ZipFile(archive.forged, "w", zipfile.ZIP_BZIP2) as out:
        for name, data in archive.members.items():
            out.writestr(name, data)
    return archive.forged.read_bytes()


def in_directory(archive: Archive, offset: int, value: bytes) -> bytes:
    """Change the first record of the archive's directory."""
    data = bytearray(archive.path.read_bytes())
    place = data.index(b"PK\1\2") + offset
    data[place : place + len(value)] = value
    return bytes(data)


DAMAGES: dict[str, Callable[[Archive], bytes]] = {
    "another compression": bzip2,
    "an unknown compression": lambda archive: in_directory(archive, 10, b"\x63\0"),
    "the flag of encryption": lambda archive: in_directory(archive, 8, b"\1\0"),
    "cut short": lambda archive: archive.path.read_bytes()[:-200],
    "empty": lambda archive: b"",
    "no archive": lambda archive: b"hello",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_the_command_says_that_an_archive_is_damaged(archive: Archive, what: str) -> None:
    """And never that something in the command went wrong."""
    archive.forged.write_bytes(DAMAGES[what](archive))

    ran = command("verify-export", archive.forged, "--key", archive.public)

    assert ran.returncode == 1
    assert ran.stderr == f"error: {archive.forged}: the archive is damaged, or is no export\n"


def test_an_encrypted_archive_that_was_cut_short_is_damaged(archive: Archive) -> None:
    """Wherever that was."""
    pyrage = pytest.importorskip("pyrage", reason="encryption is an extra")
    identity = pyrage.x25519.Identity.generate()
    data = pyrage.encrypt(archive.path.read_bytes(), [identity.to_public()])
    for length in (100, 300, 900, len(data) - 1):
        archive.forged.write_bytes(data[:length])
        with pytest.raises(ExportError, match="the archive is damaged"):
            verify_export(archive.forged, [archive.key.verifier], identities=[str(identity)])


@pytest.mark.parametrize(
    "name", ["manifest.json", "manifest.note", "checkpoint.note", "heads.ndjson", "proofs.ndjson"]
)
def test_what_is_read_as_a_whole_is_bounded(archive: Archive, name: str) -> None:
    """Or a small archive would take all memory."""
    big = archive.members[name] + b" " * (handover.LARGEST + 1)
    members = {**archive.members, name: big}
    if not name.startswith("manifest."):
        told = json.loads(members["manifest.json"])
        told["files"][name] = sha256(big).hexdigest()
        members["manifest.json"] = json.dumps(told).encode()
        del members["manifest.note"]

    with pytest.raises(ExportError, match="has more than 16,777,216 bytes"):
        archive.verify(archive.write(members))


def test_an_entry_is_bounded_as_a_line_is_elsewhere(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what a reader takes."""
    monkeypatch.setattr(handover, "LONGEST_LINE", 200)
    monkeypatch.setattr("structlog_audit.handover.CHUNK", 100)

    with pytest.raises(ExportError, match=r"entries\.ndjson: a line has more than 200 bytes"):
        archive.verify()


def test_the_key_of_another_log_states_nothing(archive: Archive) -> None:
    """A signature by a key that is not given is none."""
    other = SigningKey.generate(archive.key.name).verifier

    with pytest.raises(ExportError, match="does not hold"):
        verify_export(archive.path, [other])
