"""Exports: handed over whole, verified without the log, and never half."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from aging import NOW, done, record
from faults.runner import needs
from reading import check_cut_short, session_files
from running import HANG, environment, run_python
from signing import make_key

from structlog_audit import (
    AuditConfigurationError,
    AuditEntryError,
    AuditHandler,
    FileSink,
    Receipt,
    Signer,
    selection,
)
from structlog_audit.business import Calendar, read_calendar, read_zone
from structlog_audit.export import Exported, export
from structlog_audit.handover import ExportError, verify_export
from structlog_audit.note import SigningKey, read_keys
from structlog_audit.selection import read_day
from structlog_audit.verify import verify

TODAY = datetime.now(timezone.utc).date()
COMPANIES = ("acme", "globex", None)


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return make_key(tmp_path / "audit.key")


@pytest.fixture
def log(audit_dir: Path, tmp_path: Path, key: SigningKey) -> Path:
    """Three signed sessions, with entries of three companies."""
    for _ in range(3):
        signer = Signer(tmp_path / "audit.key", interval=3600)
        handler = AuditHandler(FileSink(audit_dir, signer=signer))
        for number in range(9):
            company = COMPANIES[number % 3]
            handler.record({"action": "A", "company_id": company, "data": {"n": number}})
        handler.close()
    return audit_dir


class Log:
    """Keeps the entries that tell of exports."""

    def __init__(self) -> None:
        self.entries: list[Mapping[str, Any]] = []

    def record(self, entry: Mapping[str, Any]) -> Receipt:
        self.entries.append(entry)
        return Receipt("", 0, "", "")


def exported(log: Path, output: Path, **options: Any) -> Exported:
    given = {"first": TODAY - timedelta(days=1), "last": TODAY, "record": Log().record, **options}
    return export(log, output, **given)


def lines(archive: Path, name: str = "entries.ndjson") -> list[bytes]:
    with zipfile.ZipFile(archive) as file:
        return file.read(name).splitlines()


def recorded_lines(log: Path) -> list[bytes]:
    return [line for path in session_files(log) for line in path.read_bytes().splitlines()]


def test_an_export_has_the_exact_lines_and_proves_each(
    log: Path, tmp_path: Path, key: SigningKey
) -> None:
    """And whoever has the public key can verify it without the log."""
    done = exported(log, tmp_path / "x.zip", keys=[key.verifier])

    assert lines(tmp_path / "x.zip") == recorded_lines(log)
    assert done.entries == done.proven == 33
    received = verify_export(tmp_path / "x.zip", [key.verifier])
    assert (received.entries, received.proven) == (33, 33)
    assert (received.stated_by, received.is_proven) == ((), False)  # no signer was given
    assert (received.origin or "").startswith("example.com/audit/")
    assert received.manifest["verdict"] == done.verdict == "valid"
    assert b"Audit report" in b"".join(lines(tmp_path / "x.zip", "report.html"))
    assert (tmp_path / "x.zip").stat().st_mode & 0o777 == 0o600
    assert read_keys(lines(tmp_path / "x.zip", "keys.pub")[0].decode()) == (key.verifier,)


def test_the_entries_of_a_company_are_handed_over_without_others(
    log: Path, tmp_path: Path, key: SigningKey
) -> None:
    """Nothing of another company's is in the archive."""
    exported(log, tmp_path / "x.zip", company="acme")

    assert len(lines(tmp_path / "x.zip")) == 9
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert not [name for name in archive.namelist() if b"globex" in archive.read(name)]
    assert verify_export(tmp_path / "x.zip", [key.verifier]).proven == 9


def test_other_days_are_left_out(log: Path, tmp_path: Path) -> None:
    """By the time of the entry."""
    day = TODAY - timedelta(days=30)

    assert exported(log, tmp_path / "x.zip", first=day, last=day).entries == 0


def test_an_export_is_an_entry_before_it_is_there(log: Path, tmp_path: Path) -> None:
    """With what was asked for, and the hash of the archive."""
    output, kept = tmp_path / "x.zip", Log()

    def record(entry: Mapping[str, Any]) -> Receipt:
        assert not output.exists()
        return kept.record(entry)

    done = exported(log, output, record=record, company="acme")

    (entry,) = kept.entries
    assert entry["action"] == "AuditExport"
    assert entry["data"]["sha256"] == done.sha256
    assert entry["data"]["company"] == "acme"
    assert entry["data"]["entries"] == 9


def test_without_its_entry_there_is_no_export(log: Path, tmp_path: Path) -> None:
    """Nor a part of one."""

    def record(entry: Mapping[str, Any]) -> Receipt:
        raise AuditEntryError("it cannot be recorded")

    with pytest.raises(AuditEntryError):
        exported(log, tmp_path / "out" / "x.zip" if False else tmp_path / "x.zip", record=record)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["audit", "audit.key"]


def test_five_business_days_may_be_exported_at_a_time(log: Path, tmp_path: Path) -> None:
    """Monday to Friday count, holidays do not; the limit can be lifted."""
    monday = date(2026, 11, 16)
    with pytest.raises(AuditConfigurationError, match="6 business days, and 5"):
        exported(log, tmp_path / "x.zip", first=monday, last=monday + timedelta(days=7))
    exported(log, tmp_path / "a.zip", first=monday, last=monday + timedelta(days=6))
    feast = Calendar(holidays=frozenset({monday}))
    exported(log, tmp_path / "b.zip", first=monday, last=monday + timedelta(days=7), calendar=feast)
    exported(log, tmp_path / "c.zip", first=monday, last=monday + timedelta(days=99), limit=None)
    with pytest.raises(AuditConfigurationError, match="before the first"):
        exported(log, tmp_path / "x.zip", first=monday, last=monday - timedelta(days=1))


def test_a_calendar_is_read_from_text() -> None:
    """Holidays, the weekend, and where a day begins."""
    calendar = read_calendar("2026-12-25  # Christmas\n\nweekend fri sat\nzone Asia/Dubai\n")

    assert calendar.holidays == {date(2026, 12, 25)}
    assert calendar.weekend == {4, 5}
    begin, end = calendar.span(date(2026, 12, 25), date(2026, 12, 25))
    assert begin.astimezone(timezone.utc).isoformat() == "2026-12-24T20:00:00+00:00"
    assert end - begin == timedelta(days=1)
    for text in ("tomorrow", "weekend someday", "zone Atlantis/Here", "2026-12-25 2026-12-26",
                 "weekend", "weekend # none", "zone"):  # fmt: skip
        with pytest.raises(AuditConfigurationError, match="line 1"):
            read_calendar(text)
    for text in ("zone UTC\nzone Asia/Dubai", "weekend fri\nweekend sat sun"):
        with pytest.raises(AuditConfigurationError, match="line 2"):
            read_calendar(text)


def test_days_are_said_as_to_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the calendar is."""
    monkeypatch.setattr(selection, "now", lambda: datetime(2026, 11, 24, 22, tzinfo=timezone.utc))
    dubai = read_zone("Asia/Dubai")

    for text, zone, day in (
        ("2026-11-16", dubai, 16), ("today", timezone.utc, 24), ("today", dubai, 25),
        ("Yesterday", dubai, 24), ("tuesday", timezone.utc, 17), ("tuesday", dubai, 24),
    ):  # fmt: skip
        assert read_day(text, zone) == date(2026, 11, day)


def changed(archive: Path, name: str, change: Callable[[bytes], bytes], *, again: bool) -> Path:
    """Change a file of an archive; perhaps with its hash in the manifest."""
    from hashlib import sha256

    with zipfile.ZipFile(archive) as source:
        members = {item: source.read(item) for item in source.namelist()}
    assert members[name] != change(members[name])
    members[name] = change(members[name])
    if again:
        manifest = json.loads(members["manifest.json"])
        manifest["files"][name] = sha256(members[name]).hexdigest()
        members["manifest.json"] = json.dumps(manifest).encode()
    target = archive.with_suffix(".forged.zip")
    with zipfile.ZipFile(target, "w") as out:
        for item, data in members.items():
            out.writestr(item, data)
    return target


FORGERIES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "an entry": ("entries.ndjson", lambda data: data.replace(b'"n":3', b'"n":4', 1)),
    "an entry less": ("entries.ndjson", lambda data: data.partition(b"\n")[2]),
    "two entries swapped": (
        "entries.ndjson", lambda data: b"".join(data.splitlines(keepends=True)[::-1])),
    "a proof": ("proofs.ndjson", lambda data: data.replace(b'"proof":["', b'"proof":["A', 1)),
    "no proofs": ("proofs.ndjson", lambda data: b""),
    "a head": ("heads.ndjson", lambda data: data.replace(b"sequence", b"Sequence", 1)),
    "no heads": ("heads.ndjson", lambda data: b""),
    "the checkpoint": ("checkpoint.note", lambda data: data.replace(b"audit", b"audits", 1)),
    "no checkpoint": ("checkpoint.note", lambda data: b""),
}  # fmt: skip


@pytest.mark.parametrize("what", FORGERIES)
@pytest.mark.parametrize("again", [False, True], ids=["", "with its hash"])
def test_a_forged_export_does_not_hold(
    log: Path, tmp_path: Path, key: SigningKey, what: str, again: bool
) -> None:
    """Neither against the manifest, nor, with a new hash there, against the signature."""
    exported(log, tmp_path / "x.zip")
    name, change = FORGERIES[what]

    with pytest.raises(ExportError):
        verify_export(changed(tmp_path / "x.zip", name, change, again=again), [key.verifier])


def test_what_no_signature_covers_is_held_by_the_manifest_and_the_chain(
    audit_dir: Path, tmp_path: Path, key: SigningKey
) -> None:
    """The other files of an archive; and the entries of a log that nobody signs."""
    handler = AuditHandler(FileSink(audit_dir))
    for number in range(5):
        handler.record({"action": "A", "data": {"n": number}})
    handler.close()
    exported(audit_dir, tmp_path / "x.zip")
    for name, change in (
        ("verification.json", lambda data: data.replace(b"valid", b"VALID", 1)),
        ("README.txt", lambda data: data + b"rm -rf /"),
    ):
        with pytest.raises(ExportError, match="not what the manifest says"):
            verify_export(changed(tmp_path / "x.zip", name, change, again=False), [key.verifier])
    for what, said in (("an entry", "does not follow"), ("an entry less", "of another one")):
        name, change = FORGERIES[what]
        with pytest.raises(ExportError, match=said):
            verify_export(changed(tmp_path / "x.zip", name, change, again=True), [key.verifier])


def test_another_key_or_a_damaged_file_does_not_hold(
    log: Path, tmp_path: Path, key: SigningKey
) -> None:
    """In words."""
    exported(log, tmp_path / "x.zip")
    other = SigningKey.generate("example.com/audit").verifier
    with pytest.raises(ExportError, match="checkpoint does not hold"):
        verify_export(tmp_path / "x.zip", [other])
    (late,) = read_keys(f"{key.verifier} until=2020-01-01T00:00:00Z")
    with pytest.raises(ExportError, match="not valid"):
        verify_export(tmp_path / "x.zip", [late])
    (tmp_path / "y.zip").write_bytes((tmp_path / "x.zip").read_bytes()[:-200])
    with pytest.raises(ExportError, match="the archive is damaged"):
        verify_export(tmp_path / "y.zip", [key.verifier])
    with pytest.raises(AuditConfigurationError, match="cannot read"):
        verify_export(tmp_path / "nowhere.zip", [key.verifier])


def test_a_log_that_nobody_signs_is_exported_without_proofs(
    audit_dir: Path, tmp_path: Path, key: SigningKey
) -> None:
    """And the receiver is told how many entries are not proven."""
    handler = AuditHandler(FileSink(audit_dir))
    handler.record({"action": "A"})
    handler.close()

    done = exported(audit_dir, tmp_path / "x.zip")
    received = verify_export(tmp_path / "x.zip", [key.verifier])
    assert (done.entries, done.proven) == (received.entries, received.proven) == (3, 0)


def test_nothing_is_overwritten(log: Path, tmp_path: Path) -> None:
    """Also if the file appears while the archive is being made."""
    output = tmp_path / "x.zip"

    def record(entry: Mapping[str, Any]) -> Receipt:
        output.write_text("theirs")
        return Receipt("", 0, "", "")

    with pytest.raises(AuditConfigurationError, match="exists already"):
        exported(log, output, record=record)
    assert output.read_text() == "theirs"
    with pytest.raises(AuditConfigurationError, match="exists already"):
        exported(log, output)
    with pytest.raises(AuditConfigurationError, match="no directory"):
        exported(log, tmp_path / "nowhere" / "x.zip")
    with pytest.raises(AuditConfigurationError, match="no directory"):
        exported(tmp_path / "nowhere", tmp_path / "z.zip")
    with pytest.raises(AuditConfigurationError, match="no log with the prefix"):
        exported(tmp_path, tmp_path / "z.zip")


def test_an_export_is_encrypted_to_whoever_shall_read_it(
    log: Path, tmp_path: Path, key: SigningKey
) -> None:
    """With age: nobody else reads it, and the command of age does."""
    pyrage = pytest.importorskip("pyrage", reason="encryption is an extra")
    identity, other = (pyrage.x25519.Identity.generate() for _ in range(2))
    output = tmp_path / "x.zip.age"
    exported(log, output, recipients=[str(identity.to_public())])

    assert output.read_bytes().startswith(b"age-encryption.org/v1")
    assert verify_export(output, [key.verifier], identities=[str(identity)]).proven == 33
    for identities, said in (
        ([], "is encrypted"),
        ([str(other)], "cannot be decrypted"),
        (["AGE-SECRET-KEY-1"], "no private key"),
    ):
        with pytest.raises(AuditConfigurationError, match=said) as caught:
            verify_export(output, [key.verifier], identities=identities)
        assert str(other) not in str(caught.value)
    with pytest.raises(AuditConfigurationError, match="no public key of age"):
        exported(log, tmp_path / "y.zip", recipients=["age1"])


def test_a_session_that_is_not_what_was_signed_has_no_proof_and_spoils_no_other(
    log: Path, tmp_path: Path, key: SigningKey
) -> None:
    """Edited, cut short, recomputed, or filled with something else: it is told, by its file."""
    path = session_files(log)[1]
    whole = path.read_bytes()
    some = whole.splitlines(keepends=True)
    for number, (data, count, proven) in enumerate([
        (whole.replace(b'"n":3', b'"n":4'), 11, 22),
        (b"".join(some[:-2]), 9, 22),
        (b"".join([*some[:4], *some[5:]]), 10, 22),
        (b"".join([*some, *some]), 11, 33),
        (b"".join(line[:60] + b"\n" for line in some), 11, 22),  # no JSON
        (b"".join(line[:48] + b"}\n" for line in some), 11, 22),  # no entry
    ]):  # fmt: skip
        path.write_bytes(data)
        done = exported(log, tmp_path / f"{number}.zip", signer=Signer(tmp_path / "audit.key"))
        assert done.contradicting == {path.name: count}
        assert (done.proven, done.entries, done.verdict) == (proven, proven + count, "tampered")
        received = verify_export(tmp_path / f"{number}.zip", [key.verifier])
        assert (received.proven, received.entries) == (proven, proven + count)
        assert not received.is_proven


def test_a_chain_that_is_broken_in_a_log_without_a_key_is_told(
    audit_dir: Path, tmp_path: Path, key: SigningKey
) -> None:
    """Nothing else shows it there."""
    handler = AuditHandler(FileSink(audit_dir))
    for number in range(5):
        handler.record({"action": "A", "data": {"n": number}})
    handler.close()
    (path,) = session_files(audit_dir)
    path.write_bytes(path.read_bytes().replace(b'"n":3', b'"n":4'))

    assert exported(audit_dir, tmp_path / "x.zip").contradicting == {path.name: 7}
    assert verify_export(tmp_path / "x.zip", [key.verifier]).manifest["contradicting"] == 7


def test_a_checkpoint_by_another_key_takes_no_proof_away(
    log: Path, tmp_path: Path, key: SigningKey
) -> None:
    """The newest one by a known key counts, in its time, and what it covers."""
    make_key(tmp_path / "other.key")
    handler = AuditHandler(FileSink(log, signer=Signer(tmp_path / "other.key")))
    handler.record({"action": "A"})
    handler.close()

    done = exported(log, tmp_path / "x.zip", keys=[key.verifier])
    assert (done.entries, done.proven, done.contradicting) == (36, 33, {})
    assert verify_export(tmp_path / "x.zip", [key.verifier]).proven == 33
    late = read_keys(f"{key.verifier} since=2100-01-01T00:00:00Z")
    assert exported(log, tmp_path / "y.zip", keys=late).proven == 0


def test_sessions_that_were_pruned_are_counted(tmp_path: Path) -> None:
    """Or the days on which they were would look as if nothing had happened."""
    file, log = tmp_path / "audit.key", tmp_path / "audit"
    public = make_key(file).verifier
    for days in (200, 150, 80):
        record(log, days, signer=Signer(file))
    environ = {"AUDIT_LOG_SIGNING_KEY_FILE": str(file)}
    done("retain", log, "--keep", "90d", "--yes", **environ)
    day = (NOW - timedelta(days=200)).date()
    given: dict[str, Any] = {"signer": Signer(file), "limit": None}

    assert exported(log, tmp_path / "a.zip", first=day, last=day, **given).pruned == 1
    whole = exported(log, tmp_path / "b.zip", first=day, last=TODAY, **given)
    later = exported(log, tmp_path / "c.zip", first=day + timedelta(days=60), last=TODAY, **given)
    assert (whole.pruned, later.pruned) == (2, 0)
    assert verify_export(tmp_path / "b.zip", [public]).manifest["pruned"] == 2
    (tmp_path / "key.pub").write_text(str(public))
    said = "2 sessions that may have had entries of these days were pruned"
    assert said in done("export", log, "--from", day, "--to", "today", "--no-limit", "--output",
                        tmp_path / "d.zip", **environ)  # fmt: skip
    shown = done("verify-export", tmp_path / "d.zip", "--key", tmp_path / "key.pub")
    assert f"stated by the exporter: {said}" in shown


def test_the_receiver_learns_nothing_of_this_host_nor_of_other_companies(
    log: Path, tmp_path: Path, key: SigningKey
) -> None:
    """No absolute paths; and of the verification only what concerns the entries."""
    path = session_files(log)[0]
    path.write_bytes(path.read_bytes().replace(b'"n":3', b'"n":4'))
    exported(log, tmp_path / "all.zip", keys=[key.verifier])
    exported(log, tmp_path / "x.zip", keys=[key.verifier], company="acme")
    for name in ("all.zip", "x.zip"):
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert not [
                each for each in archive.namelist() if str(tmp_path).encode() in archive.read(each)
            ]
    (told,) = map(json.loads, lines(tmp_path / "x.zip", "verification.json"))
    assert told.keys() == {"verdict", "keys", "checkpoint", "findings"}
    assert told["findings"] == {"edited": 1}
    (all_,) = map(json.loads, lines(tmp_path / "all.zip", "verification.json"))
    assert {finding["file"] for finding in all_["findings"]} == {path.name}


COMMAND = "import sys; from structlog_audit.__main__ import main; main()"


def command(*arguments: object, **environ: str) -> tuple[int, str, str]:
    done = run_python(
        "import sys; sys.argv[0] = 'structlog-audit'\n" + COMMAND, *arguments, **environ
    )
    return done.returncode, done.stdout, done.stderr


def test_the_commands_hand_over_and_take(log: Path, tmp_path: Path, key: SigningKey) -> None:
    """The export is an entry of the log, signed as the log is."""
    (tmp_path / "key.pub").write_text(str(key.verifier))
    days = ("--from", TODAY - timedelta(days=1), "--to", TODAY)
    status, shown, error = command(
        "export", log, *days, "--output", tmp_path / "x.zip",
        AUDIT_LOG_SIGNING_KEY_FILE=str(tmp_path / "audit.key"), AUDIT_LOG_DIR=str(log),
    )  # fmt: skip
    assert (status, error) == (0, "")
    assert "33 entries, 33 of them proven" in shown
    told = [json.loads(line) for line in recorded_lines(log) if b"AuditExport" in line]
    assert [entry["data"]["entries"] for entry in told] == [33]

    taken = command("verify-export", tmp_path / "x.zip", "--key", tmp_path / "key.pub")
    assert taken[0] == 0
    assert "proven: 33 of them are as they were recorded in the log example.com/aud" in taken[1]
    assert f"signed by {key.verifier}" in taken[1]
    assert "stated by the exporter: the manifest and the report" in taken[1]
    assert "stated by the exporter: the log as a whole was valid" in taken[1]
    assert "not proven: what the exporter left out cannot be seen" in taken[1]

    for arguments in (
        ("export", log, "--from", "x", "--to", "2026-01-01", "--output", tmp_path / "z"),
        ("export", tmp_path / "nowhere", *days, "--output", tmp_path / "z"),
        ("verify-export", tmp_path / "key.pub", "--key", tmp_path / "key.pub"),
    ):
        status, shown, error = command(*arguments)
        assert status == 1
        assert error.startswith("error: ")
        assert "Traceback" not in error


def test_a_live_log_is_exported(audit_dir: Path, tmp_path: Path, key: SigningKey) -> None:
    """What is signed by then is proven, the rest is there without proof."""
    signer = Signer(tmp_path / "audit.key", interval=3600)
    handler = AuditHandler(FileSink(audit_dir, signer=signer))
    handler.record({"action": "A"})
    handler.record({"action": "B"})

    done = exported(audit_dir, tmp_path / "x.zip")
    handler.close()

    assert done.entries == 3
    assert verify_export(tmp_path / "x.zip", [key.verifier]).proven == done.proven < 3


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_export_that_is_killed_leaves_nothing_under_its_name(log: Path, tmp_path: Path) -> None:
    """In the instant before it would have been named."""
    script = f"""
        import os, signal
        from datetime import date, timedelta
        from structlog_audit.export import export
        export({str(log)!r}, {str(tmp_path / "x.zip")!r}, first=date.today() - timedelta(days=2),
               last=date.today(), limit=None,
               record=lambda entry: os.kill(os.getpid(), signal.SIGKILL))
    """
    assert run_python(script).returncode == -9
    assert not (tmp_path / "x.zip").exists()
    assert os.listdir(tmp_path)


CALLS = ("fdatasync", "fsync", "link", "linkat", "unlink", "unlinkat")


@pytest.mark.fault
def test_killed_at_any_call_an_export_is_whole_and_on_record_or_not_there(
    log: Path, tmp_path: Path, key: SigningKey
) -> None:
    """What is there holds; and whoever has it stands in the log."""
    needs("strace")
    (tmp_path / "key.pub").write_text(str(key.verifier))
    output, killed = tmp_path / "x.zip", 0
    for name in CALLS:
        for number in itertools.count(1):
            done = subprocess.run(
                ["strace", "-f", "-o", os.devnull, "-e", f"trace=?{name}",
                 "-e", f"inject=?{name}:signal=KILL:when={number}",
                 sys.executable, "-m", "structlog_audit", "export", log,
                 "--from", str(TODAY - timedelta(days=1)), "--to", str(TODAY), "--output", output],
                env=environment(AUDIT_LOG_SIGNING_KEY_FILE=str(tmp_path / "audit.key")),
                capture_output=True, timeout=HANG,
            )  # fmt: skip
            told = sum(b'"AuditExport"' in line for line in recorded_lines(log))
            if output.exists():
                assert verify_export(output, [key.verifier]).entries
                assert told
                output.unlink()
            check_cut_short(verify(log, keys=[key.verifier]))
            if done.returncode == 0:
                break
            killed += 1
    assert killed > 10


def test_a_copy_beside_its_original_is_not_exported_as_well(log: Path, tmp_path: Path) -> None:
    """Or each of its entries would be there twice."""
    path = session_files(log)[0]
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))

    assert exported(log, tmp_path / "x.zip").entries == 33


def test_the_command_that_exports_says_what_cannot_be_proven(
    log: Path, tmp_path: Path, key: SigningKey
) -> None:
    """And tells it by its status."""
    path = session_files(log)[0]
    path.write_bytes(path.read_bytes().replace(b'"n":3', b'"n":4'))
    environ = {"AUDIT_LOG_SIGNING_KEY_FILE": str(tmp_path / "audit.key")}
    (tmp_path / "key.pub").write_text(str(key.verifier))

    status, shown, error = command(
        "export", log, "--from", "yesterday", "--to", "Today", "--output", tmp_path / "x.zip",
        **environ,
    )  # fmt: skip

    assert (status, "33 entries, 22 of them proven" in shown) == (2, True)
    assert f"11 entries of {path.name} have no proof" in error
    assert "the log itself is tampered" in error
    status, shown, error = command("verify-export", tmp_path / "x.zip", "--key",
                                   tmp_path / "key.pub")  # fmt: skip
    assert status == 2
    assert "stated by the exporter: the log as a whole was tampered" in shown
    assert "11 of these are in files that were not what the log had signed" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "9999-12-31", "--no-limit"), "more than there are times for"),
        (("--from", "0001-01-01", "--no-limit", "--calendar", "dubai"), "more than there are"),
        (("--company", os.fsdecode(b"\xff")), "is no text that an entry can have"),
        (("--company", ""), "the company to look for is empty"),
        (("--output", "-"), "an archive is not written to stdout"),
        (("--to", "2h"), "'2h' is no day"),
        (("--to", "2026-11-24T10:00"), "is no day"),
        (("--prefix",), "requires an argument"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_words(
    log: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    """With status 1, as nothing was made."""
    (tmp_path / "dubai").write_text("zone Asia/Dubai")
    before = recorded_lines(log)
    ran = subprocess.run(
        [sys.executable, "-m", "structlog_audit", "export", log, "--from", "yesterday",
         "--to", "today", "--output", tmp_path / "x.zip", *arguments], cwd=tmp_path,
        env=environment(AUDIT_LOG_SIGNING_KEY_FILE=str(tmp_path / "audit.key")),
        capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip

    assert ran.returncode == 1
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list(tmp_path.glob("*.zip"))
    assert not (tmp_path / "-").exists()
    assert recorded_lines(log) == before


@pytest.mark.skipif(sys.platform == "win32", reason="FIFOs")
def test_something_that_is_no_file_is_named(log: Path, tmp_path: Path) -> None:
    """And what to do with it."""
    path = log / f"audit-{TODAY:%Y%m%d}-{'a' * 20}.ndjson"
    os.mkfifo(path)

    with pytest.raises(AuditConfigurationError, match=f"{path}.*move it away"):
        exported(log, tmp_path / "x.zip")
