"""What an audit call costs on a disk or at a server, beside the bare one, in less than a minute.

The two take turns, so that a machine that drifts hits both alike. On a disk everything happens in a
directory of its own below the one that is measured, which is removed afterwards. What a server got
stays there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from statistics import median
from time import perf_counter, perf_counter_ns
from typing import Any, Protocol

import structlog

from structlog_audit.bare_post import BarePost
from structlog_audit.chain import link
from structlog_audit.disk import bare_file, file_system, percentiles
from structlog_audit.entry import Renderer
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.handler import AuditHandler
from structlog_audit.logger import audit_log
from structlog_audit.processors import AddAuditFields, RouteAudit
from structlog_audit.settings import Settings
from structlog_audit.sinks.file import FileSink
from structlog_audit.sinks.http import HttpSink
from structlog_audit.values import plain

THREADS = (1, 8, 64)
SECONDS = 10.0
"""For single calls; each number of threads gets as long."""
ROUNDS = 5
BLOCK = 20
"""Calls until it is the other's turn."""
ENTRY: dict[str, Any] = {
    "action": "Benchmark",
    "user_id": "2780",
    "company_id": "2350",
    "data": {"invoiceId": "inv_42", "text": "x" * 150},
}
"""Some 500 bytes as a line."""
TOO_FAST = 10.0
"""Microseconds below which no device can have answered; flash with a protected cache takes more."""
PROTECTED = 500.0
"""Microseconds below which flash without a protected cache, and any disk, can hardly answer."""

Progress = Callable[[float], None]


class Floor(Protocol):
    """What takes a line and does nothing else with it."""

    def write(self, line: bytes) -> tuple[int, int]:
        """Take a line; return the nanoseconds of handing it over, and of the confirmation."""
        ...


@dataclass(slots=True)
class Bench:
    """What was measured.

    Attributes:
        target: the directory, or the address of the server.
        file_system: of the directory: type, and what a sync means on it; empty for a server.
        bytes: length of a line.
        sync: p50, p99 and most of the bare sync (or of the wait for an answer), in microseconds.
        floor: the same of a bare write and sync, or of a bare POST.
        call: the same of one audit call.
        ratio: p50 of a call, divided by that of the floor.
        serial: bare writes and syncs, or bare POSTs, a second, one after the other.
        rates: audit calls a second, by number of threads.
        verdict: what that means.
    """

    target: str
    file_system: dict[str, Any]
    bytes: int = 0
    sync: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)
    call: dict[str, float] = field(default_factory=dict)
    ratio: float = 0.0
    serial: float = 0.0
    rates: dict[int, float] = field(default_factory=dict)
    verdict: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        as_dict: dict[str, Any] = plain(asdict(self))
        return as_dict


def run_bench(
    directory: str | None, progress: Progress = lambda part: None, *, seconds: float = SECONDS
) -> Bench:
    """Measure; this configures structlog.

    Args:
        directory: on the disk to measure; None for the host's `AUDIT_LOG_DIR`.
        progress: told how much is done, from 0 to 1.
        seconds: for single calls, and for each number of threads.

    Raises:
        AuditConfigurationError: there is no such directory, or it cannot be written to.
        AuditWriteError: an audit call failed.
    """
    where = _directory(directory)
    try:
        home = tempfile.mkdtemp(prefix=".structlog-audit-bench-", dir=where)
    except OSError as error:
        raise AuditConfigurationError(f"cannot write to {where}: {error.strerror}") from error
    result = Bench(where, file_system(where))
    try:
        handler = AuditHandler(FileSink(os.path.join(home, "audit")))
        with bare_file(home, "bare") as bare:
            _measure(result, handler, bare, progress, seconds)
    finally:
        shutil.rmtree(home)
    return result


def run_server_bench(
    sink: HttpSink, progress: Progress = lambda part: None, *, seconds: float = SECONDS
) -> Bench:
    """Measure a server; this configures structlog, and the server keeps the entries.

    Args:
        sink: the server.
        progress: told how much is done, from 0 to 1.
        seconds: for single calls, and for each number of threads.

    Raises:
        AuditConfigurationError: it cannot be reached, or takes no entries from us.
        AuditWriteError: an audit call failed.
    """
    handler = AuditHandler(sink)
    handler.check()
    result = Bench(repr(sink), {})
    with closing(BarePost(sink)) as bare:
        _measure(result, handler, bare, progress, seconds)
    return result


def _directory(given: str | None) -> str:
    where = Settings.from_environ().directory if given is None else given
    if where is None:
        raise AuditConfigurationError(
            "no directory to measure", hint="name one on the disk that shall hold the audit log"
        )
    if not os.path.isdir(where):
        raise AuditConfigurationError(
            f"{where} is no directory that exists", hint="name one on the disk to measure"
        )
    return os.path.abspath(where)


def _measure(
    result: Bench, handler: AuditHandler, bare: Floor, progress: Progress, seconds: float
) -> None:
    line = link(Renderer(app="bench").render(ENTRY).text, "0" * 20, 1, "0" * 64) + b"\n"
    result.bytes = len(line)
    structlog.configure(processors=[AddAuditFields("bench"), RouteAudit(handler)])
    with closing(handler):
        audit_log.info(**ENTRY)  # opens what is to be opened
        _take_turns(result, bare, line, progress, seconds)
    result.verdict = _verdict(result)


def _take_turns(
    result: Bench, bare: Floor, line: bytes, progress: Progress, seconds: float
) -> None:
    parts = 1 + len(THREADS)
    _single_calls(result, bare, line, seconds, lambda done: progress(done / parts))
    serial = []
    for number, count in enumerate(THREADS, 1):
        rates = []
        for turn in range(ROUNDS):
            serial.append(_rate(lambda: bare.write(line), 1, seconds / ROUNDS / 2))
            rates.append(_rate(lambda: audit_log.info(**ENTRY), count, seconds / ROUNDS / 2))
            progress((number + (turn + 1) / ROUNDS) / parts)
        result.rates[count] = round(median(rates), 1)
    result.serial = round(median(serial), 1)


def _single_calls(
    result: Bench, bare: Floor, line: bytes, seconds: float, progress: Progress
) -> None:
    floor: list[tuple[int, int]] = []
    calls: list[int] = []
    begin = perf_counter()
    while not calls or perf_counter() - begin < seconds:
        for _ in range(BLOCK):
            floor.append(bare.write(line))
        for _ in range(BLOCK):
            start = perf_counter_ns()
            audit_log.info(**ENTRY)
            calls.append(perf_counter_ns() - start)
        progress(min(1.0, (perf_counter() - begin) / seconds))
    result.sync = percentiles([sync for _, sync in floor])
    result.floor = percentiles([write + sync for write, sync in floor])
    result.call = percentiles(calls)
    result.ratio = round(result.call["p50_us"] / result.floor["p50_us"], 2)


def _rate(work: Callable[[], object], count: int, seconds: float) -> float:
    """Return how often a second so many threads together do something.

    Raises:
        AuditError: what the first thread raised that failed.
    """
    done, failed = [0] * count, []
    over = threading.Event()
    end = perf_counter() + seconds

    def repeat(number: int) -> None:
        try:
            while perf_counter() < end and not over.is_set():
                work()
                done[number] += 1
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            failed.append(error)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(count)]
    begin = perf_counter()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C: nobody writes any more when the directory is removed
        over.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failed:
        raise failed[0]
    return sum(done) / (perf_counter() - begin)


def _verdict(result: Bench) -> list[str]:
    rates = "; ".join(f"{count}: {rate:,.0f}" for count, rate in result.rates.items())
    return [
        _of_the_disk(result) if result.file_system else _of_the_server(result),
        f"A request that makes one audit call takes {result.call['p50_us'] / 1000:,.2f} ms longer, "
        f"and one in a hundred {result.call['p99_us'] / 1000:,.2f} ms or more.",
        f"One process that makes one audit call for each request serves at most so many requests a "
        f"second, by threads: {rates}.",
    ]


def _of_the_disk(result: Bench) -> str:
    took = f"A sync takes {result.sync['p50_us']:,g} µs"
    if not result.file_system["durable"]:
        return f"Not durable: {result.file_system['meaning']}. The figures tell of no disk."
    if result.sync["p50_us"] < TOO_FAST:
        return (
            f"{took}: no device is as fast as that. Whatever is below this file system "
            "acknowledges without writing; a power cut loses what it acknowledged."
        )
    if result.sync["p50_us"] < PROTECTED:
        return (
            f"{took}: flash with a cache that is protected from power cuts is as fast as that, and "
            "so is a virtual disk that acknowledges early. Ask whoever runs it which one it is."
        )
    return f"{took}: what flash without a protected cache, a disk or a network takes to store it."


def _of_the_server(result: Bench) -> str:
    return (
        f"An answer takes {result.sync['p50_us']:,g} µs. What it proves is up to the server: "
        "docs/servers.md has a table."
    )
