"""What an audit call costs on a disk, beside the bare disk, in less than a minute.

The two take turns, so that a machine that drifts hits both alike. Everything happens in a directory
of its own below the one that is measured, which is removed afterwards.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from time import perf_counter, perf_counter_ns
from typing import Any

import structlog

from structlog_audit.disk import BareFile, bare_file, file_system, percentiles
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.handler import AuditHandler
from structlog_audit.logger import audit_log
from structlog_audit.processors import AddAuditFields, RouteAudit
from structlog_audit.settings import Settings
from structlog_audit.sinks.file import FileSink
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


@dataclass(slots=True)
class Bench:
    """What was measured.

    Attributes:
        directory: where.
        file_system: type, and what a sync means on it.
        bytes: length of a line.
        sync: p50, p99 and most of the bare sync alone, in microseconds.
        floor: the same of a bare write and sync.
        call: the same of one audit call.
        ratio: p50 of a call, divided by that of the floor.
        serial: bare writes and syncs a second, one after the other.
        rates: audit calls a second, by number of threads.
        verdict: what that means.
    """

    directory: str
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
    handler = AuditHandler(FileSink(os.path.join(home, "audit")))
    try:
        structlog.configure(processors=[AddAuditFields("bench"), RouteAudit(handler)])
        result = Bench(where, file_system(where))
        with bare_file(home, "bare") as bare:
            _measure(result, handler, bare, progress, seconds)
    finally:
        try:
            handler.close()
        finally:
            shutil.rmtree(home)
    result.verdict = _verdict(result)
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
    result: Bench, handler: AuditHandler, bare: BareFile, progress: Progress, seconds: float
) -> None:
    line = _line(handler)
    result.bytes = len(line)
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


def _line(handler: AuditHandler) -> bytes:
    audit_log.info(**ENTRY)
    assert isinstance(handler.sink, FileSink)
    assert handler.sink.path is not None
    with open(handler.sink.path, "rb") as file:
        return file.readlines()[-1]


def _single_calls(
    result: Bench, bare: BareFile, line: bytes, seconds: float, progress: Progress
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
        _of_the_disk(result),
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
