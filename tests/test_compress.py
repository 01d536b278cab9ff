"""Compression of sessions that have ended, and who reads them afterwards."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from aging import command, contents, days_ago, done, journal_events, record
from forging import edited, lines_of, put
from running import HANG, environment, run_well
from signing import make_key

from structlog_audit import AuditHandler, FileSink, Signer
from structlog_audit.forward import Forwarder
from structlog_audit.note import read_keys
from structlog_audit.proof import prove, verify_proof
from structlog_audit.testing import MemorySink
from structlog_audit.verify import verify

pytest.importorskip("click", reason="the command line is an extra")


def copy_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.zst")


def text(path: Path) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())


def compress(directory: Path, *options: object) -> str:
    return done("compress", directory, *options)


def test_without_yes_nothing_is_changed(audit_dir: Path) -> None:
    """What would be compressed is shown."""
    old, _ = record(audit_dir, 3), record(audit_dir, 2)
    before = contents(audit_dir)
    shown = compress(audit_dir)
    assert contents(audit_dir) == before
    assert "1 session would be compressed" in shown
    assert old.name in shown


def test_sessions_that_have_ended_are_compressed_and_stay_valid(audit_dir: Path) -> None:
    """Those older than a day, not the newest; the content is the same, and so is the journal."""
    old = [record(audit_dir, days, entries=50) for days in (3, 2)]
    young, newest = record(audit_dir, 0.5), record(audit_dir, 0.4)
    before = contents(audit_dir)

    shown = compress(audit_dir, "--yes")

    assert "2 sessions compressed" in shown
    for path in old:
        assert not path.exists()
        assert text(copy_of(path)) == before[path.name]
        assert copy_of(path).stat().st_size < len(before[path.name]) / 3
        assert copy_of(path).stat().st_mode & 0o777 == 0o600
    assert young.exists()
    assert newest.exists()
    report = verify(audit_dir)
    assert report.verdict == "valid"
    assert report.entries == 2 * 52 + 2 * 4
    assert contents(audit_dir)["audit-journal.ndjson"] == before["audit-journal.ndjson"]


def test_the_newest_stays_however_old_it_is(audit_dir: Path) -> None:
    """And is named."""
    newest = record(audit_dir, 30)
    assert f"{newest.name}: it is the newest session" in compress(audit_dir, "--yes")
    assert newest.exists()


def test_the_same_session_becomes_the_same_copy(audit_dir: Path, tmp_path: Path) -> None:
    """Copies on two hosts can be compared."""
    path, _ = record(audit_dir, 3, entries=2_000), record(audit_dir, 2)
    shutil.copytree(audit_dir, tmp_path / "again")
    for directory in (audit_dir, tmp_path / "again"):
        compress(directory, "--yes")
    again = tmp_path / "again" / copy_of(path).name
    assert copy_of(path).read_bytes() == again.read_bytes()


def test_a_session_that_is_being_written_is_left_alone(audit_dir: Path) -> None:
    """Its process goes on."""
    with days_ago(3):
        handler = AuditHandler(FileSink(audit_dir))
        handler.record({"action": "A"})
    record(audit_dir, 2)
    assert "it is being written" in compress(audit_dir, "--yes")
    handler.record({"action": "B"})
    handler.close()
    assert verify(audit_dir).verdict == "valid"


def test_a_file_that_was_changed_is_left_as_it_is(audit_dir: Path) -> None:
    """It is evidence."""
    path, _ = record(audit_dir, 3), record(audit_dir, 2)
    lines = lines_of(path)
    put(path, [lines[0], edited(lines[1]), *lines[2:]])
    assert "line 2 was edited" in compress(audit_dir, "--yes")
    assert path.exists()
    assert not copy_of(path).exists()


def test_a_hold_does_not_forbid_it(audit_dir: Path) -> None:
    """The content stays, and the hold with it."""
    path, _ = record(audit_dir, 200), record(audit_dir, 80)
    done("hold", "add", audit_dir, "--reason", "x")
    compress(audit_dir, "--yes")
    assert copy_of(path).exists()
    assert "under the hold" in done("retain", audit_dir, "--keep", "90d", "--yes")
    assert copy_of(path).exists()


def test_a_copy_that_a_crash_left_beside_its_original_is_used(audit_dir: Path) -> None:
    """It is compared, and the original goes; verification takes either."""
    path, _ = record(audit_dir, 200), record(audit_dir, 80)
    original = path.read_bytes()
    compress(audit_dir, "--yes")
    path.write_bytes(original)
    assert verify(audit_dir).verdict == "valid"
    assert "run structlog-audit compress" in done("retain", audit_dir, "--keep", "90d")
    made = copy_of(path).stat().st_mtime_ns

    compress(audit_dir, "--yes")

    assert not path.exists()
    assert copy_of(path).stat().st_mtime_ns == made


@pytest.mark.parametrize("content", [b"mine", b"", zstandard.compress(b"another\n")])
def test_something_else_under_the_copys_name_is_never_overwritten(
    audit_dir: Path, content: bytes
) -> None:
    """Both stay; the status says so."""
    path, _ = record(audit_dir, 3), record(audit_dir, 2)
    copy_of(path).write_bytes(content)
    ran = command("compress", audit_dir, "--yes")
    assert ran.returncode == 1
    assert f"error: {path.name} stays: " in ran.stderr
    assert path.exists()
    assert copy_of(path).read_bytes() == content


def test_a_part_that_a_crash_left_is_removed(audit_dir: Path) -> None:
    """Of a copy in the making; nothing else that begins with a dot."""
    path, newest = record(audit_dir, 3), record(audit_dir, 2)
    part, other = audit_dir / f".{newest.name}.zst.part", audit_dir / ".mine.part"
    part.write_bytes(b"half")
    other.write_bytes(b"mine")
    compress(audit_dir, "--yes")
    assert not part.exists()
    assert other.exists()
    assert copy_of(path).exists()


def test_a_compressed_session_is_proven_forwarded_before_and_retained(
    audit_dir: Path, tmp_path: Path
) -> None:
    """It goes as it is, and its tombstone names the file in the journal."""
    key = make_key(tmp_path / "audit.key")
    signer = Signer(tmp_path / "audit.key")
    environ = {"AUDIT_LOG_SIGNING_KEY_FILE": str(tmp_path / "audit.key")}
    with days_ago(200):
        handler = AuditHandler(FileSink(audit_dir, signer=signer))
        receipt = handler.record({"action": "A"})
        handler.close()
    record(audit_dir, 80, signer=signer)
    (path,) = [audit_dir / e["file"] for e in journal_events(audit_dir) if e["event"] == "Close"][
        :1
    ]
    sink = MemorySink()
    Forwarder(audit_dir, sink, target="seq").run_once()
    done("compress", audit_dir, "--yes", **environ)
    assert copy_of(path).exists()

    proven = verify_proof(prove(receipt, audit_dir), read_keys(str(key.verifier)))
    assert proven.session == receipt.session
    shipped = len(sink.lines)
    Forwarder(audit_dir, sink, target="seq").run_once()
    assert len(sink.lines) == shipped

    archive = tmp_path / "archive"
    done("retain", audit_dir, "--keep", "90d", "--archive", archive, "--yes", **environ)
    assert [each.name for each in archive.iterdir()] == [copy_of(path).name]
    report = verify(audit_dir, keys=[key.verifier])
    assert report.verdict == "valid"
    assert [each.file for each in report.pruned] == [str(path)]


def test_a_broken_session_is_compressed_with_its_torn_end(audit_dir: Path) -> None:
    """All bytes of it; what was not acknowledged stays what it is."""
    with days_ago(3):
        sink = FileSink(audit_dir)
        handler = AuditHandler(sink)
        handler.record({"action": "A"})
        path = Path(str(sink.path))
        with path.open("ab") as file:
            file.write(b'{"torn')
        handler.record({"action": "B"})
        handler.close()
    record(audit_dir, 2)
    original = path.read_bytes()
    compress(audit_dir, "--yes")
    assert text(copy_of(path)) == original
    report = verify(audit_dir)
    assert (report.verdict, report.broken) == ("valid", 1)


def test_without_the_package_it_says_what_to_install(audit_dir: Path) -> None:
    """Before anything is looked at."""
    record(audit_dir, 3)
    script = (
        "import sys; sys.modules['zstandard'] = None\n"
        "from structlog_audit.cli import run; sys.argv[1:] = ['compress', sys.argv[1], '--yes']\n"
        "run()"
    )
    ran = subprocess.run([sys.executable, "-c", script, str(audit_dir)], env=environment(),
                         capture_output=True, text=True, timeout=HANG)  # fmt: skip
    assert ran.returncode == 1
    assert "structlog-audit[zstd]" in ran.stderr


def test_memory_is_bounded_whatever_the_size(audit_dir: Path) -> None:
    """A session of 60 MB needs a small part of that."""
    with days_ago(3):
        handler = AuditHandler(FileSink(audit_dir))
        for number in range(1_000):
            handler.record({"action": "A", "data": {"filler": "x" * 60_000, "number": number}})
        handler.close()
    record(audit_dir, 2)
    script = """
        import datetime, resource, sys
        from structlog_audit import Settings
        from structlog_audit.keeping import Keeping
        keeping = Keeping(sys.argv[1], Settings())
        keeping.survey()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        plan = keeping.compress(datetime.timedelta(days=1))
        assert len(plan.goes) == 1, plan
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    grown = int(run_well(script, audit_dir))
    assert grown < 40_000, f"{grown} kB"
    assert verify(audit_dir).verdict == "valid"
