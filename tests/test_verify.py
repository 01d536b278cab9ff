"""Verification: of directories, files, copies, streams, and of logs that are being written."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from forging import (
    events_of,
    journal_path,
    lines_of,
    put,
    put_events,
    relinked,
    rest,
    session_paths,
    signing_key,
    write_log,
)
from reading import check_cut_short
from running import HANG, environment, run_well

from structlog_audit import (
    AllOf,
    AuditConfigurationError,
    AuditHandler,
    FileSink,
    source,
    workers,
)
from structlog_audit.anchors import notes_in
from structlog_audit.checkpoint import Signer
from structlog_audit.verify import verify

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX locks and modes")


@pytest.fixture
def log(audit_dir: Path) -> Path:
    """Two sessions that ended, long ago."""
    write_log(audit_dir)
    return audit_dir


def kinds(path: Path | list[Path], **options: Any) -> set[str]:
    return {finding.kind for finding in verify(path, **options).findings}


def command(*args: object, data: bytes = b"") -> tuple[int, str, str]:
    """Run `structlog-audit verify`; return status, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "structlog_audit", "verify", *map(str, args)],
        input=data, capture_output=True, env=environment(), timeout=HANG,
    )  # fmt: skip
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err
    return done.returncode, out, err


def test_a_log_that_was_not_touched_is_valid(log: Path) -> None:
    """And its counts are right."""
    report = verify(log)

    assert (report.verdict, report.exit_code, report.findings) == ("valid", 0, ())
    assert (report.files, report.sessions, report.entries, report.closed) == (3, 2, 10, 2)
    assert report.bytes == sum(path.stat().st_size for path in log.iterdir())
    assert report.windows == ()


def test_a_report_cannot_be_changed_and_becomes_json(log: Path) -> None:
    """Frozen, with nothing in it that JSON does not have."""
    report = verify(log)

    with pytest.raises(AttributeError):
        report.verdict = "tampered"  # type: ignore[misc]
    assert json.loads(json.dumps(report.as_dict()))["verdict"] == "valid"


@posix
def test_a_session_that_is_being_written_is_valid(handler: AuditHandler, audit_dir: Path) -> None:
    """It has no end yet; what could be cut there is named."""
    handler.record({"action": "A"})
    handler.record({"action": "B"})

    report = verify(audit_dir)

    assert (report.verdict, report.open) == ("valid", 1)
    (window,) = report.windows
    assert (window.entries, window.open) == (1, True)


@posix
def test_half_a_line_of_a_session_that_is_being_written_is_no_finding(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """A write may be under way."""
    handler.record({"action": "A"})
    with session_paths(audit_dir)[0].open("ab") as file:
        file.write(b'{"level":35,"ti')

    assert verify(audit_dir).verdict == "valid"


@posix
def test_verifying_does_not_hinder_who_writes(handler: AuditHandler, audit_dir: Path) -> None:
    """Its lock is there still, and it goes on."""
    for _ in range(3):
        handler.record({"action": "A"})
        assert verify(audit_dir).open == 1
    handler.close()

    assert verify(audit_dir).closed == 1


@posix
def test_the_lock_of_a_new_file_is_left_to_its_writer(tmp_path: Path) -> None:
    """An empty file is not asked who writes it: asking takes the lock for a moment."""
    import fcntl

    path = tmp_path / "new"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with source.Source(str(path)) as looked_at:
            assert not looked_at.is_alive()
        file.write(b"x")
        file.flush()
        with source.Source(str(path)) as looked_at:
            assert looked_at.is_alive()


KILLED = """
    import os, signal, sys
    from structlog_audit import AuditHandler, FileSink
    handler = AuditHandler(FileSink(sys.argv[1]))
    for number in range(5):
        handler.record({"action": "A"})
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
@pytest.mark.parametrize("torn", [b"", b'{"level":35,"ti', b"\0" * 4096, b"\0" * 4096 + b"x\n"])
def test_a_process_that_was_killed_leaves_an_incomplete_session(
    torn: bytes, audit_dir: Path
) -> None:
    """Whole, or with a torn line, or with what a power failure leaves."""
    subprocess.run([sys.executable, "-c", _dedented(KILLED), audit_dir], env=environment())
    (path,) = session_paths(audit_dir)
    put(path, lines_of(path), torn)

    report = verify(audit_dir)

    (finding,) = report.findings
    assert (report.verdict, finding.kind) == ("incomplete", "unfinished")
    assert "4 lines stand behind" in finding.reason
    assert ("torn" in finding.reason) == bool(torn)


def _dedented(script: str) -> str:
    return textwrap.dedent(script)


@posix
def test_a_session_that_ended_by_a_failure_is_valid(audit_dir: Path) -> None:
    """The journal knows its last acknowledged line; what stands behind it was not acknowledged."""
    run_well(
        """
        import resource, signal, sys
        from structlog_audit import AuditHandler, AuditWriteError, FileSink
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        handler = AuditHandler(FileSink(sys.argv[1]))
        handler.record({"action": "A"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        try:
            handler.record({"action": "B", "data": {"text": "x" * 5000}})
        except AuditWriteError:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        handler.record({"action": "C"})
        handler.close()
        """,
        audit_dir,
    )
    report = verify(audit_dir)

    assert (report.verdict, report.broken, report.closed) == ("valid", 1, 1)


def test_a_session_that_is_not_in_the_journal_was_not_acknowledged(log: Path) -> None:
    """Its process was killed in its first write; or it has no whole line."""
    lines = lines_of(session_paths(log)[0])[:3]
    name = "audit-20261125-aaaaaaaaaaaaaaaaaaaa.ndjson"
    put(log / name, [line.replace(_session(lines[0]), b"a" * 20) for line in lines])
    put(log / name, relinked(lines_of(log / name)))

    assert kinds(log) == {"not-entered"}
    assert verify(log).verdict == "incomplete"
    put(log / name, [], b'{"level":35,"ti')
    assert kinds(log) == {"empty"}
    put(log / name, [])
    assert kinds(log) == {"empty"}


def _session(line: bytes) -> bytes:
    return line[line.rindex(b'"session":"') + 11 :][:20]


def test_the_very_first_write_of_all_may_be_cut_short(log: Path) -> None:
    """Then there is no journal either. A session that has an end had one."""
    first, second = session_paths(log)
    second.unlink()
    journal_path(log).unlink()
    assert kinds(log) == {"journal-missing", "planted"}

    put(first, lines_of(first)[:2])
    assert kinds(log) == {"not-entered"}
    assert verify(log).verdict == "incomplete"


def test_a_torn_line_of_the_journal_is_incomplete(log: Path) -> None:
    """A process was killed while it wrote it; the next one cuts it off."""
    put(journal_path(log), lines_of(journal_path(log)), b'{"time":"20')
    (finding,) = verify(log).findings
    assert (finding.verdict, finding.kind) == ("incomplete", "torn")
    assert finding.line == len(lines_of_torn(journal_path(log))) + 1

    write_log(log, sessions=1)
    assert verify(log).verdict == "valid"


def lines_of_torn(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def test_a_newer_format_cannot_be_read(log: Path) -> None:
    """Nor can a newer version's journal."""
    path = session_paths(log)[0]
    lines = lines_of(path)
    lines[0] = lines[0].replace(b'"format":1', b'"format":2')
    put(path, relinked(lines))
    assert kinds(path) == {"newer"}
    assert verify(path).verdict == "unreadable"

    events = events_of(log)
    put_events(log, [{**events[0], "format": 2}, *events[1:]])
    assert kinds(journal_path(log)) == {"newer"}
    put_events(log, [*events, {"event": "Sealed", "time": events[0]["time"]}])
    assert kinds(journal_path(log)) == {"newer"}


def packed(path: Path, suffix: str) -> Path:
    """Replace a file by a compressed copy."""
    data = path.read_bytes()
    packer = zstandard.ZstdCompressor()
    copy = path.with_name(path.name + suffix)
    copy.write_bytes(gzip.compress(data) if suffix == ".gz" else packer.compress(data))
    path.unlink()
    rest(path.parent)
    return copy


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_copies_are_what_they_are_copies_of(suffix: str, log: Path) -> None:
    """In a directory, and alone; also in several members or frames."""
    report = verify(log)
    copies = [packed(path, suffix) for path in session_paths(log)]

    assert verify(log) == report
    assert verify(copies[0]).entries == 5
    copies[0].write_bytes(copies[0].read_bytes() + copies[1].read_bytes())
    both = copies[0].rename(log.parent / "both")
    assert (verify(both).verdict, verify(both).sessions, verify(both).entries) == ("valid", 2, 10)


def gzip_lines(data: bytes) -> list[bytes]:
    """Return the whole lines that are left in a copy that was cut."""
    return zlib.decompressobj(31).decompress(data).split(b"\n")[:-1]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_copy_that_ends_too_early(suffix: str, log: Path) -> None:
    """At each byte: incomplete alone, cut for the journal; never a traceback."""
    copy = packed(session_paths(log)[0], suffix)
    data = copy.read_bytes()
    for end in range(4, len(data)):
        copy.write_bytes(data[:end])
        rest(log)
        assert verify(copy).verdict == "incomplete", end
        whole = len(gzip_lines(data[:end])) == 5 if suffix == ".gz" else False
        report = verify(log)
        assert report.verdict == ("incomplete" if whole else "tampered"), end
        assert "ends too early" in report.findings[0].reason


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_copy_that_is_damaged(suffix: str, log: Path) -> None:
    """It cannot be read, or holds something else."""
    copy = packed(session_paths(log)[0], suffix)
    data = copy.read_bytes()
    verdicts = set()
    for at in range(len(data)):
        copy.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
        verdicts.add(verify(log).verdict)
    assert verdicts <= {"unreadable", "tampered", "valid"}
    assert "unreadable" in verdicts


def test_a_copy_beside_its_original_is_left_alone(log: Path) -> None:
    """It may be in the making."""
    path = session_paths(log)[0]
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes())[:100])

    assert verify(log).verdict == "valid"


def test_without_its_package_zstd_cannot_be_read(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what has to be installed is said."""
    packed(session_paths(log)[0], ".zst")
    monkeypatch.setitem(sys.modules, "zstandard", None)

    (finding,) = verify(log).findings

    assert finding.verdict == "unreadable"
    assert "structlog-audit[zstd]" in finding.reason


def test_files_given_by_name_are_checked_alone(log: Path) -> None:
    """And that is said; with their journal, against that one."""
    one, other = session_paths(log)
    assert verify(one).verdict == "valid"
    assert any("alone" in sentence for sentence in verify(one).not_checked)

    put(one, lines_of(one)[:3])
    assert kinds(one) == {"unfinished"}
    assert kinds([one, journal_path(log)]) == {"cut"}
    assert verify([other, journal_path(log)]).verdict == "valid"
    assert kinds(journal_path(log)) == set()


def test_several_paths(log: Path, tmp_path: Path) -> None:
    """Directories and files together."""
    write_log(tmp_path / "second", sessions=1)

    report = verify([log, tmp_path / "second", session_paths(log)[0]])

    assert (report.verdict, report.sessions) == ("valid", 4)


def test_standard_input(log: Path, tmp_path: Path) -> None:
    """One session, or several ones behind each other; compressed as well."""
    one, other = (path.read_bytes() for path in session_paths(log))
    assert command("-", data=one)[0] == 0
    status, out, _ = command("--json", "-", data=one + other)
    assert (status, json.loads(out)["sessions"]) == (0, 2)
    assert command("-", data=gzip.compress(one + other))[0] == 0
    assert command("-", data=one[:-5] + other)[0] == 1
    assert command("-", data=one.replace(b'"Order"', b'"Gift!"', 1))[0] == 1
    assert command("-", data=one[: one.index(b"\n") + 1])[0] == 2
    assert command("-", data=b"")[0] == 2
    assert command("-", data=b"\x7fELF\n" * 1000)[0] == 3


@posix
def test_what_is_no_log_cannot_be_read(log: Path, tmp_path: Path) -> None:
    """A missing file, a FIFO, a device, garbage, an empty directory."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "json").write_text("{}\n[]\n")
    for path in ("missing", "fifo", "empty", "garbage", "json", "/dev/null", "/dev/zero",
                 "a\0b"):  # fmt: skip
        report = verify(tmp_path / path)
        assert report.verdict == "unreadable", path
        assert len(report.findings) == 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_unreadable(log: Path) -> None:
    """A file, or the whole directory."""
    path = session_paths(log)[0]
    path.chmod(0)
    assert kinds(log) == {"unreadable"}
    log.chmod(0)
    assert kinds(log) == {"unreadable"}
    log.chmod(0o700)


def test_a_line_of_100_megabytes(log: Path) -> None:
    """It is read; one that is longer than any of ours can be is not."""
    path = session_paths(log)[0]
    lines = lines_of(path)
    put(path, [*lines[:2], b"x" * 100_000_000, *lines[2:]])

    assert kinds(path) == {"inserted"}


def test_a_line_without_an_end_does_not_fill_the_memory(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a limit."""
    monkeypatch.setattr(source, "LONGEST_LINE", 1_000_000)
    path = session_paths(log)[0]
    put(path, lines_of(path)[:2], b"x" * 3_000_000)

    report = verify(path)

    assert report.verdict == "unreadable"
    assert "more than 1,000,000 bytes" in report.findings[0].reason


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A small one and a large one take the same."""
    write_log(tmp_path / "log", sessions=1)
    lines = lines_of(session_paths(tmp_path / "log")[0])
    sizes = []
    for count in (1_000, 100_000):
        path = tmp_path / f"{count}.ndjson"
        put(path, relinked([lines[0], *[lines[1]] * count, lines[-1]]))
        sizes.append(
            int(run_well(
                """
                import resource, sys
                from structlog_audit.verify import verify
                assert verify(sys.argv[1]).verdict == "valid"
                print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
                """, path,
            ))
        )  # fmt: skip
    assert sizes[1] < sizes[0] + 8_000


def test_many_files_are_read_by_several_processes(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same result, whatever becomes of the processes."""
    path = session_paths(log)[0]
    lines = lines_of(path)
    lines[2] = b" " + lines[2]
    put(path, lines)
    alone, seen = verify(log), []
    monkeypatch.setattr(workers, "WORTHWHILE", 0)
    monkeypatch.setattr(workers, "_cores", lambda: 2)

    assert verify(log, progress=lambda done, total: seen.append((done, total))) == alone
    assert seen[-1][0] == seen[-1][1]
    monkeypatch.setattr(workers, "_SERVE", "raise SystemExit")
    assert verify(log) == alone
    monkeypatch.setattr(sys, "executable", "/missing/python3")
    assert verify(log) == alone
    monkeypatch.setattr(sys, "executable", "")
    assert verify(log) == alone


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
def test_files_are_not_kept_open(log: Path) -> None:
    """Ten thousand of them would be too many."""
    before = len(os.listdir("/proc/self/fd"))
    verify([log, *session_paths(log)])
    assert len(os.listdir("/proc/self/fd")) == before


def test_many_sessions(audit_dir: Path) -> None:
    """More files than a process may have open."""
    handler = AuditHandler(FileSink(audit_dir))
    for _ in range(60):
        handler.record({"action": "A"})
        handler.close()
    run_well(
        """
        import resource, sys
        from structlog_audit.verify import verify
        resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
        report = verify(sys.argv[1])
        assert (report.verdict, report.closed) == ("valid", 60), report
        """,
        audit_dir,
    )


def test_other_files_in_the_directory_are_left_alone(log: Path) -> None:
    """Also those of the forwarder, and copies that somebody made."""
    shutil.copy(session_paths(log)[0], log / "backup")
    (log / ".forward").mkdir()
    (log / ".forward" / "x.json").write_text("{}")
    (log / "README").write_text("hands off")

    assert verify(log).verdict == "valid"


def test_two_prefixes_in_one_directory(log: Path) -> None:
    """Each has its journal."""
    handler = AuditHandler(FileSink(log, "shop"))
    handler.record({"action": "A"})
    handler.close()
    rest(log)
    assert (verify(log).verdict, verify(log).sessions) == ("valid", 3)

    (log / "shop-journal.ndjson").unlink()
    assert "journal-missing" in kinds(log)


def test_two_prefixes_that_hold_the_same_sessions(log: Path, tmp_path: Path) -> None:
    """Each copy is verified with its own journal."""
    directory = tmp_path / "both"
    handler = AuditHandler(AllOf(FileSink(directory, "one"), FileSink(directory, "two")))
    handler.record({"action": "A"})
    handler.close()
    rest(directory)
    assert (verify(directory).verdict, verify(directory).closed) == ("valid", 2)

    next(directory.glob("two-2*")).unlink()
    assert kinds(directory) == {"missing"}


def test_keys_and_anchors_that_cannot_be_used(log: Path, tmp_path: Path) -> None:
    """Nothing passes because of them."""
    key = signing_key(tmp_path / "key")
    other = signing_key(tmp_path / "other")
    signed = tmp_path / "signed"
    write_log(signed, Signer(tmp_path / "key"))
    notes = [event["note"] for event in events_of(signed) if event["event"] == "Checkpoint"]

    assert kinds(log, keys=[key.verifier]) == {"not-signed"}
    for path, keys, anchors in (
        (session_paths(signed)[0], [key], []),
        (signed, [], notes),
        (signed, [other], notes),
        (signed, [key], ["no note"]),
    ):
        with pytest.raises(AuditConfigurationError):
            verify(path, keys=[k.verifier for k in keys], anchors=anchors)
    with pytest.raises(AuditConfigurationError):
        verify([])


def test_of_several_logs_the_one_that_is_least_far_is_told(tmp_path: Path) -> None:
    """Up to there, all of them are signed."""
    key = signing_key(tmp_path / "key")
    for name in ("one", "two"):
        write_log(tmp_path / name, Signer(tmp_path / "key"))

    for names in (["one", "two"], ["two", "one"]):
        report = verify([tmp_path / name for name in names], keys=[key.verifier])
        assert report.signed_until is not None
        assert report.signed_until.file == str(journal_path(tmp_path / "one"))
    write_log(tmp_path / "unsigned")
    report = verify([tmp_path / "one", tmp_path / "unsigned"], keys=[key.verifier])
    assert (report.verdict, report.signed_until) == ("tampered", None)


def test_anchors_are_found_in_whatever_they_were_kept_in(log: Path, tmp_path: Path) -> None:
    """Plain notes, our own lines, an export of Seq; also below a directory, also compressed."""
    signing_key(tmp_path / "key")
    signed = tmp_path / "signed"
    write_log(signed, Signer(tmp_path / "key"))
    one, *_, other = [e["note"] for e in events_of(signed) if e["event"] == "Checkpoint"]
    kept = tmp_path / "kept"
    kept.mkdir()
    entry = {"action": "AuditCheckpoint", "data": {"note": one}}
    for text in (
        one,
        one + "\n" + other,
        one + other,
        json.dumps(entry),
        f"{json.dumps(entry)}\n{json.dumps(entry)}\n",
        json.dumps([{"@t": "2026", "Properties": [{"Name": "note", "Value": one}]}], indent=2),
        json.dumps(entry, ensure_ascii=False),
        "a line\n" * 1000 + "\n" + one,
        f"some log\n{json.dumps({'Events': [entry]})}\nend\n",
    ):
        (kept / "file").write_text(text)
        assert set(notes_in(str(kept))) <= {one, other}
        assert notes_in(str(kept / "file"))[0] == one
    (kept / "file").write_bytes(gzip.compress(one.encode()))
    assert notes_in(str(kept)) == [one]
    for text in ("", "a\n\nb\n", "{}", "[" * 100_000, "\x00\xff"):
        (kept / "file").write_text(text)
        with pytest.raises(AuditConfigurationError):
            notes_in(str(kept))


def test_the_command_tells_the_verdict_by_its_status(log: Path, tmp_path: Path) -> None:
    """0, 1, 2, 3; and 3 for whatever was used wrongly."""
    key = signing_key(tmp_path / "key")
    (tmp_path / "key.pub").write_text(f"{key.verifier}\n")
    signed = tmp_path / "signed"
    write_log(signed, Signer(tmp_path / "key"))
    notes = [event["note"] for event in events_of(signed) if event["event"] == "Checkpoint"]
    (tmp_path / "note").write_text(notes[-1])
    path = session_paths(log)[0]

    assert command(log)[0] == 0
    status, out, _ = command(signed, "--key", tmp_path / "key.pub", "--anchor", tmp_path / "note")
    assert status == 0
    assert "up to line" in out
    assert command(log, "--key", tmp_path / "key.pub")[0] == 1
    lines = lines_of(path)
    put(path, [lines[0], *lines[2:]])
    status, out, _ = command(log)
    assert (status, out.split(":")[0]) == (1, "tampered")
    assert f"{path}, line 2 (byte {len(lines[0]) + 1})" in out
    put(path, lines[:-1])
    assert command(path)[0] == 2
    assert command(tmp_path / "missing")[0] == 3
    for wrong in (
        [],
        ["--bogus", log],
        [log, "--key"],
        [log, "--key", tmp_path / "missing"],
        [log, "--key", tmp_path / "key"],
        [log, "--key", sys.executable],
        [log, "--anchor", tmp_path / "note"],
        [log, "--key", tmp_path / "key.pub", "--anchor", tmp_path / "key.pub"],
    ):
        assert command(*wrong)[0] == 3, wrong


def test_the_command_prints_json(log: Path) -> None:
    """The same report as in Python."""
    status, out, err = command("--json", log)

    assert (status, err) == (0, "")
    assert json.loads(out) == json.loads(json.dumps(verify(log).as_dict()))


@posix
def test_control_characters_do_not_reach_the_terminal(log: Path, tmp_path: Path) -> None:
    """Neither from a name nor from a line."""
    directory = log.rename(tmp_path / "a\x1b[31m\nb[red]")
    path = session_paths(directory)[0]
    lines = lines_of(path)
    put(path, [*lines[:1], b'{"\x1b[31m":"\x07"}', *lines[1:]])
    (directory / "shop-journal.ndjson").write_bytes(b'{"event":"Journal","time":"\x1b[31m"}\n')

    status, out, err = command(directory)

    assert status == 1
    assert not any(ord(c) < 0x20 and c != "\n" for c in out + err)
    assert "[red]" in out


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_text(log: Path) -> None:
    """They are shown, not stumbled over."""
    directory = os.fsencode(log) + b"\xff\xfe"
    os.rename(log, directory)
    (Path(os.fsdecode(directory)) / "shop-journal.ndjson").write_text("{}\n")

    assert command(os.fsdecode(directory))[0] == 1
    status, out, _ = command("--json", os.fsdecode(directory))
    assert (status, json.loads(out)["verdict"]) == (1, "tampered")


@posix
def test_without_a_standard_input(log: Path) -> None:
    """It was closed."""
    done = subprocess.run(["bash", "-c", '"$0" -m structlog_audit verify - <&-', sys.executable],
                          env=environment(), timeout=HANG)  # fmt: skip
    assert done.returncode == 3


@posix
def test_an_interrupted_verification_says_nothing_of_the_log(log: Path, tmp_path: Path) -> None:
    """Its status is neither 0 nor 1."""
    script = """
        import signal, sys
        from structlog_audit.cli import run
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have us ignore it
        sys.argv[1:] = ["verify", "-"]
        run()
    """
    process = subprocess.Popen([sys.executable, "-c", _dedented(script)], env=environment(),
                               stdin=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdin is not None
    data = session_paths(log)[0].read_bytes()
    process.stdin.write(data * (2**19 // len(data)))  # more than the pipe holds: it is reading
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert b"Traceback" not in err


@posix
def test_a_reader_that_leaves_is_no_verdict(log: Path) -> None:
    """The status is that of all commands whose reader has gone, and there is no word of it."""
    done = subprocess.run(
        ["bash", "-c", '"$0" -m structlog_audit verify "$1" | true; echo ${PIPESTATUS[0]}',
         sys.executable, log],
        capture_output=True, env=environment(), timeout=HANG,
    )  # fmt: skip
    assert done.stdout.split() == [b"141"]
    assert done.stderr == b""


WRITER = """
    import itertools, os, sys, time
    from structlog_audit import AuditHandler, FileSink
    from structlog_audit.checkpoint import Signer
    directory, key, seconds = sys.argv[1:]
    signer = Signer(key, interval=0.05, entries=20) if key else None
    handler = AuditHandler(FileSink(directory, signer=signer), max_bytes=20_000)
    end = time.monotonic() + float(seconds)
    for number in itertools.count():
        if time.monotonic() > end:
            break
        handler.record({"action": "A", "data": {"number": number}})
        if number % 50 == 0:
            child = os.fork()
            if child == 0:
                handler.record({"action": "B"})
                handler.close()
                os._exit(0)
            os.waitpid(child, 0)
        if number % 70 == 0:
            handler.close()
    handler.close()
"""


def writer(directory: Path, key: Path | str, sessions: int) -> subprocess.Popen[bytes]:
    """Start a process that records; with a key file, it signs."""
    script = [sys.executable, "-c", _dedented(WRITER), directory, key, str(sessions)]
    return subprocess.Popen(script, env=environment())


@pytest.fixture
def writers(audit_dir: Path, tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait()


@posix
@pytest.mark.parametrize("signed", [False, True])
def test_no_false_alarm_while_processes_write_rotate_and_fork(
    signed: bool, audit_dir: Path, tmp_path: Path, writers: list[subprocess.Popen[bytes]]
) -> None:
    """Whatever moment it is."""
    key = signing_key(tmp_path / "key")
    keys = [key.verifier] if signed else []
    writers += [writer(audit_dir, tmp_path / "key" if signed else "", 6) for _ in range(3)]
    reports = []
    while any(process.poll() is None for process in writers):
        if audit_dir.exists() and journal_path(audit_dir).exists():
            report = verify(audit_dir, keys=keys)
            assert report.verdict == "valid", report.findings
            reports.append(report)
        else:
            time.sleep(0.005)

    assert [process.returncode for process in writers] == [0, 0, 0]
    assert len(reports) > 5
    assert any(report.open for report in reports)
    last = verify(audit_dir, keys=keys)
    assert (last.verdict, last.open, last.windows) == ("valid", 0, ())
    assert last.closed == len(session_paths(audit_dir))


@posix
@pytest.mark.parametrize("signed", [False, True])
def test_processes_that_are_killed_leave_nothing_that_looks_tampered(
    signed: bool, audit_dir: Path, tmp_path: Path
) -> None:
    """At whatever moment; only that something has no end, or was not acknowledged."""
    key = signing_key(tmp_path / "key")
    keys = [key.verifier] if signed else []
    for number in range(8):
        process = writer(audit_dir, tmp_path / "key" if signed else "", 60)
        time.sleep(0.5 + number * 0.013)
        process.kill()
        process.wait()
        if audit_dir.exists():
            check_cut_short(verify(audit_dir, keys=keys), "torn", "unsigned")
