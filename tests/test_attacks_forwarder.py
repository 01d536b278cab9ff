"""What an attacker tried with the forwarder: one bad file or line must never stop the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from servers import scripted
from servers.processes import SeqServer
from servers.scripted import ScriptedServer

from structlog_audit import (
    AllOf,
    AuditConfigurationError,
    AuditHandler,
    FileSink,
    HttpSink,
    LineRefused,
    SeqSink,
    SinkError,
    cli,
    doctor,
)
from structlog_audit.forward import Forwarder, lag_of
from structlog_audit.testing import MemorySink

Record = Callable[..., Path]


@pytest.fixture
def record(audit_dir: Path) -> Record:
    """Record a session with so many entries of its own; return its file."""

    def record(entries: int = 3) -> Path:
        handler = AuditHandler(FileSink(audit_dir))
        for number in range(entries):
            handler.record({"action": "Forward", "number": number})
        path = handler.sink.path  # type: ignore[attr-defined]
        handler.close()
        return Path(path)

    return record


def forge(directory: Path) -> Path:
    """Write a file whose only line fits its session and says nothing else."""
    session = "k3v9w0q1z7m2x8c4b6n5"
    path = directory / f"audit-20200101-{session}.ndjson"
    path.write_text(f'{{"session":"{session}","sequence":1,"prev":""}}\n')
    return path


class Slow(MemorySink):
    """Confirms so many lines in its time, and then is too late."""

    def __init__(self, most: int, *, delivers: bool) -> None:
        super().__init__()
        self.most = most
        self.delivers = delivers
        self.sizes: list[int] = []

    def __repr__(self) -> str:
        return "Slow()"

    def write(self, lines: Sequence[bytes]) -> None:
        self.sizes.append(len(lines))
        if len(lines) <= self.most:
            super().write(lines)
            return
        error = SinkError("no answer in time")
        if self.delivers:
            super().write(lines[: self.most])
            error.delivered = self.most
        raise error


class Picky(MemorySink):
    """Refuses each line that has this in it."""

    def write(self, lines: Sequence[bytes]) -> None:
        for count, line in enumerate(lines):
            if b'"number":1' in line:
                raise LineRefused("it is not to its taste", delivered=count)
            super().write([line])


@pytest.mark.parametrize("kind", ["clef", "otlp"])
def test_a_line_that_fits_and_is_none_of_ours_is_refused_alone(
    kind: Any, audit_dir: Path, record: Record
) -> None:
    """The files behind it are shipped, and who reads the problem knows file and line."""
    good, bad = record(), forge(audit_dir)
    body = b"" if kind == "otlp" else scripted.SEQ_BODY
    with ScriptedServer([scripted.storing(scripted.answer(201, body))]) as server:
        sink = SeqSink(server.url) if kind == "clef" else HttpSink(server.url, format=kind)
        progress = Forwarder(audit_dir, sink).run_once()

    assert progress.entries == len(good.read_bytes().splitlines())
    assert [(p.kind, p.file, p.line) for p in progress.problems] == [("refused", bad.name, 1)]


@pytest.mark.parametrize("delivers", [True, False])
def test_a_batch_that_is_never_in_time_becomes_smaller(
    delivers: bool, audit_dir: Path, record: Record
) -> None:
    """And what was confirmed of it counts."""
    path = record(40)
    sink = Slow(5, delivers=delivers)
    forwarder = Forwarder(audit_dir, sink)
    for _ in range(30):
        try:
            forwarder.run_once()
            break
        except SinkError:
            continue

    assert sink.lines == path.read_bytes().splitlines(keepends=True)
    assert sorted(sink.sizes, reverse=True)[0] == 42


def test_another_query_is_another_target(audit_dir: Path, record: Record) -> None:
    """The messages do not show it; the cursors tell it apart all the same."""
    record()
    with ScriptedServer([scripted.storing(scripted.answer(200))]) as server:
        for index in ("one", "two"):
            sink = HttpSink(f"{server.url}/in?index={index}")
            assert Forwarder(audit_dir, sink).run_once().entries == 5
            assert index not in Forwarder(audit_dir, sink).target


def test_a_line_that_the_second_of_two_servers_refuses_holds_its_file_alone(
    audit_dir: Path, record: Record
) -> None:
    """Both have what stands before it."""
    record()
    path = record()
    one, two = MemorySink(), Picky()
    progress = Forwarder(audit_dir, AllOf(one, two), target="both").run_once()

    assert {problem.kind for problem in progress.problems} == {"refused"}
    assert {problem.line for problem in progress.problems} == {3}
    assert len(progress.problems) == 2
    assert len(two.lines) == 4
    assert path.name in {problem.file for problem in progress.problems}


def test_a_directory_of_cursors_that_cannot_be_read_disables_no_auditing(
    audit_dir: Path, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry can be recorded; only the lag is not known."""
    record()
    (tmp_path / "elsewhere").mkdir()
    (audit_dir / ".forward").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))

    report = doctor.diagnose()

    assert report.enabled
    assert any("cannot be told" in problem for problem in report.problems)


def test_a_file_that_is_held_grows_older(audit_dir: Path, record: Record) -> None:
    """Whoever watches the seconds of the lag is not told that all is well."""
    path = record()
    text = path.read_text().replace('"number":1', '"number":9')
    path.write_text(text)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    Forwarder(audit_dir, MemorySink(), target="t").run_once()

    lag = lag_of(audit_dir)

    assert [problem.kind for problem in lag.problems] == ["altered"]
    assert lag.seconds is not None
    assert lag.seconds > 100_000


@pytest.mark.parametrize(
    "options",
    [
        {"batch_lines": 2.5},
        {"batch_lines": 10**12},
        {"batch_bytes": 0.5},
        {"target": 5},
        {"target": "\ud800"},
        {"target": "x" * 2_000},
        {"target": ""},
    ],
)
def test_an_option_that_would_fail_later_is_refused(
    options: dict[str, Any], audit_dir: Path, record: Record
) -> None:
    """When the forwarder is made."""
    record()
    with pytest.raises(AuditConfigurationError):
        Forwarder(audit_dir, MemorySink(), **options)


def test_a_number_of_a_line_with_thousands_of_digits_is_none() -> None:
    """Two lines of explanation, and no traceback."""
    with pytest.raises(AuditConfigurationError, match="is no number of a line"):
        cli._line_number("9" * 5_000)


def test_what_lies_in_the_way_of_the_tidying_stops_nothing(audit_dir: Path, record: Record) -> None:
    """A directory with the name of a file that is to be removed."""
    record()
    Forwarder(audit_dir, MemorySink(), target="t").run_once()
    (audit_dir / ".forward" / "x.new").mkdir()

    assert Forwarder(audit_dir, MemorySink(), target="t").run_once().problems == ()


def test_files_share_a_connection(audit_dir: Path, record: Record, tmp_path: Path) -> None:
    """A connection for each of ten thousand files takes its time."""
    for _ in range(5):
        record()
    with SeqServer(tmp_path) as seq, ScriptedServer([scripted.accepted()]) as server:
        Forwarder(audit_dir, SeqSink(server.url)).run_once()
        Forwarder(audit_dir, SeqSink(seq.url)).run_once()
        assert len(seq.stored()) == 25

    assert {request.connection for request in server.requests} == {1}
