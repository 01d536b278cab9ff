"""What `structlog-audit bench` says of a disk, and what it does when the disk fails."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from pathlib import Path

import orjson
import pytest
import structlog
from servers.certificates import make_certificates
from servers.processes import SeqServer
from servers.scripted import ScriptedServer, Step, accepted, close_after_reading, error

from structlog_audit import AuditConfigurationError, AuditWriteError, SeqSink, bench, disk
from structlog_audit.bare_post import BarePost
from structlog_audit.sinks import _durable

LINE = (
    b'{"level":35,"time":"2026-11-22T07:04:20.040123Z","pid":7,"hostname":"h","name":"audit-log",'
    b'"action":"A","event":"Record","data":{},"session":"k3v9w0q1z7m2x8c4b6n5","sequence":1,'
    b'"prev":""}\n'
)


@pytest.mark.parametrize(
    ("durable", "sync", "words"),
    [
        (False, 0.5, "Not durable: tmpfs, said the test"),
        (True, 0.5, "acknowledges without writing"),
        (True, 60.0, "flash with a cache that is protected"),
        (True, 4_000.0, "without a protected cache"),
    ],
)
def test_the_verdict_is_plain(durable: bool, sync: float, words: str) -> None:
    """What a sync means there comes first."""
    times = {"p50_us": sync, "p99_us": sync, "max_us": sync}
    system = {"durable": durable, "meaning": "tmpfs, said the test"}
    result = bench.Bench("/x", system, sync=times, floor=times, call=times, rates={1: 1e3, 8: 5e3})

    first, longer, most = bench._verdict(result)

    assert words in first
    assert f"{sync / 1000:,.2f} ms longer" in longer
    assert most.endswith("1: 1,000; 8: 5,000.")


@pytest.mark.parametrize("threads", [1, 8])
def test_a_disk_that_fails_meanwhile_is_told_of(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whichever thread it happens; nothing stays behind."""
    calls = 0

    def fail(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 200:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(_durable, "sync", fail)
    monkeypatch.setattr(bench, "THREADS", (threads,))

    with pytest.raises((AuditWriteError, AuditConfigurationError), match="Input/output error"):
        bench.run_bench(str(tmp_path), seconds=0.01)

    structlog.reset_defaults()
    assert list(tmp_path.iterdir()) == []


def test_a_server_is_measured(tmp_path: Path) -> None:
    """Beside POSTs of the standard library, each of which the server stores."""
    with SeqServer(tmp_path) as server:
        result = bench.run_server_bench(SeqSink(server.url), seconds=0.05)
        stored = server.stored()

    assert result.target == f"SeqSink('{server.url}')"
    assert result.ratio > 0
    assert set(result.rates) == set(bench.THREADS)
    assert result.verdict[0].startswith("An answer takes")
    assert {event["Action"] for event in stored} == {"AuditSession", "Benchmark"}


@pytest.mark.parametrize(
    ("step", "words"),
    [(error(503), "answers 503"), (close_after_reading(), "did not answer")],
)
def test_a_server_that_takes_nothing_from_the_bare_post_is_told_of(step: Step, words: str) -> None:
    """A floor that nothing confirmed would be none."""
    with ScriptedServer([step]) as server:
        bare = BarePost(SeqSink(server.url))

        with pytest.raises(AuditConfigurationError, match=words):
            bare.write(LINE)

        bare.close()


def test_a_server_with_a_certificate_and_a_key_is_measured(tmp_path: Path) -> None:
    """The bare POST trusts and proves what the sink does."""
    certificates = make_certificates(tmp_path)
    with ScriptedServer([accepted()] * 2, tls=certificates.good.server_context()) as server:
        sink = SeqSink(server.url, api_key="sesame", ca=certificates.ca)
        with closing(BarePost(sink)) as bare:
            assert min(bare.write(LINE)) > 0
        with pytest.raises(AuditConfigurationError, match="cannot be reached"):
            BarePost(SeqSink(server.url))

    assert server.requests[0].headers["x-seq-apikey"] == "sesame"


def test_a_full_disk_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare file takes a part of a line."""
    monkeypatch.setattr(_durable, "append", lambda descriptor, data: os.write(descriptor, data[:9]))

    with (
        pytest.raises(AuditConfigurationError, match="short write"),
        disk.bare_file(str(tmp_path), "bare") as file,
    ):
        file.write(b"0123456789")

    assert list(tmp_path.iterdir()) == []


def test_progress_ends_at_the_end(tmp_path: Path) -> None:
    """It only grows."""
    parts: list[float] = []

    bench.run_bench(str(tmp_path), parts.append, seconds=0.05)

    assert parts == sorted(parts)
    assert parts[-1] == 1.0


def test_an_interrupt_among_threads_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C strikes while all write; they stop before their directory is removed."""
    interrupted: list[bool] = []

    class Thread(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            if not interrupted:
                interrupted.append(True)
                raise KeyboardInterrupt
            super().join(timeout)

    monkeypatch.setattr(bench.threading, "Thread", Thread)
    monkeypatch.setattr(bench, "THREADS", (8,))

    with pytest.raises(KeyboardInterrupt):
        bench.run_bench(str(tmp_path), seconds=0.5)

    assert interrupted
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "point"),
    [
        ("36 35 98:0 / /mnt/caf\u00e9 rw - tmpfs tmpfs rw", "/mnt/caf\u00e9"),
        (r"36 35 98:0 / /mnt/a\040b\134c rw - ext4 /dev/x rw", r"/mnt/a b\c"),
        ("36 35 98:0 / /mnt/\udce9 rw - tmpfs tmpfs rw", "/mnt/\udce9"),
    ],
)
def test_mount_points_have_any_name(line: str, point: str) -> None:
    """Letters beyond ASCII, blanks, bytes that are no text."""
    assert disk._mount(line)[0] == point


def test_figures_of_a_directory_whose_name_is_no_text_can_be_printed() -> None:
    """JSON has a form for it."""
    result = bench.Bench("/mnt/\udce9", {}, rates={1: 2.0})

    assert orjson.loads(orjson.dumps(result.as_dict()))["rates"] == {"1": 2.0}
