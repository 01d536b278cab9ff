"""A year of an audited service, in a directory: simulated days, several processes, real events.

    python year.py DIRECTORY KEYS [--days 365] [--processes 10]

Each process goes through the days with a clock of its own, in step with the others, and has one
session or two a day. Each company has users; each event is an operation, some of which fail. The
key changes in the middle of the year, with a month of both. KEYS gets the public keys.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import replay

from structlog_audit import AuditHandler, FileSink, Signer, entry, journal
from structlog_audit.note import SigningKey
from structlog_audit.sinks import file

EVENTS = Path(__file__).parent / "data" / "k8s-audit-events.ndjson"
FIRST = datetime(2025, 1, 1, tzinfo=timezone.utc)
COMPANIES = ("acme", "globex", "initech", "umbrella")
A_DAY = 5
"""Operations of a process in a day."""


class Clock:
    """Stands in for the module `time` in those that stamp lines and files."""

    def __init__(self) -> None:
        self.now = FIRST

    def time_ns(self) -> int:
        self.now += timedelta(milliseconds=7)
        return int(self.now.timestamp() * 1e6) * 1000

    def gmtime(self) -> time.struct_time:
        return self.now.timetuple()

    def install(self) -> None:
        """Have the library read this clock, in this process alone."""
        entry.time_ns = self.time_ns
        around = {name: getattr(time, name) for name in ("sleep", "monotonic", "strftime")}
        journal.time = SimpleNamespace(time_ns=self.time_ns, **around)
        file.time = SimpleNamespace(gmtime=self.gmtime, monotonic_ns=time.monotonic_ns, **around)


def keys_of(day: int, days: int, old: Path, both: Path, new: Path) -> Path:
    """Return the key file in force on a day."""
    middle, window = days // 2, max(1, days // 12)
    return old if day < middle else both if day < middle + window else new


def work(number: int, directory: Path, key_files: list[Path], days: int, barrier: Any) -> None:
    """Go through the days."""
    clock, chance = Clock(), random.Random(number)
    clock.install()
    events = [json.loads(line) for line in EVENTS.read_text("utf-8").splitlines()]
    for day in range(days):
        barrier.wait()
        clock.now = FIRST + timedelta(days=day, hours=6, minutes=number)
        signer = Signer(keys_of(day, days, *key_files), entries=1_000, interval=3600)
        handler = AuditHandler(FileSink(directory, signer=signer), app=f"service-{number}")
        for index in range(A_DAY):
            clock.now += timedelta(minutes=chance.randrange(1, 90))
            operation(handler, chance, events[(number * 7 + day * A_DAY + index) % len(events)])
            if chance.random() < 0.1:
                handler.reopen()
        with contextlib.closing(handler):
            pass
    barrier.wait()


def operation(handler: AuditHandler, chance: random.Random, event: dict[str, Any]) -> None:
    """Record an event as an operation: its Begin, and how it ended."""
    company = chance.choice(COMPANIES)
    fields = {
        "action": replay.action(event),
        "company_id": company,
        "user_id": f"{company}-user-{chance.randrange(12)}",
        "client_ip": f"10.{COMPANIES.index(company)}.{chance.randrange(3)}.{chance.randrange(250)}",
        "type": "REST",
        "operation_id": f"{chance.getrandbits(64):016x}",
    }
    handler.record({**fields, "data": replay.rest(event)}, "Begin")
    outcome = "Fail" if chance.random() < 0.05 else "Complete"
    handler.record({**fields, "data": {"status": 500 if outcome == "Fail" else 200}}, outcome)


def make_year(directory: Path, keys: Path, days: int, processes: int) -> None:
    """Make the directory and the file of public keys; private keys stand beside that."""
    old, new = (SigningKey.generate("example.com/audit/year") for _ in range(2))
    files = [keys.with_name(f"{name}.key") for name in ("old", "both", "new")]
    for path, some in zip(files, ([old], [old, new], [new]), strict=True):
        path.write_text("\n".join(key.reveal() for key in some))
        path.chmod(0o600)
    end = FIRST + timedelta(days=days // 2 + max(1, days // 12) + 1)
    start = FIRST + timedelta(days=days // 2)
    keys.write_text(f"{old.verifier} until={_stamp(end)}\n{new.verifier} since={_stamp(start)}\n")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    started = [
        context.Process(target=work, args=(number, directory, files, days, barrier))
        for number in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise SystemExit("a process failed")


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("keys", type=Path)
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--processes", type=int, default=10)
    given = parser.parse_args(arguments)
    make_year(given.directory, given.keys, given.days, given.processes)


if __name__ == "__main__":
    main(sys.argv[1:])
