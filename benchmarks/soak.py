"""Threads and tasks through a proxy that fails at random: what stays behind, and what is true.

    python -m benchmarks.soak [--seconds 180]

64 threads and 1,000 asyncio tasks record at the tests' stand-in for Seq, through HAProxy, which
answers 503 to one request in ten, and 502 instead of a confirmation to one in ten. Memory, sockets
and threads are shown as it goes on; at the end, whatever was acknowledged must be stored.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import os
import sys
import tempfile
import threading
import time
from array import array
from pathlib import Path
from typing import Any

from structlog_audit import AuditError, AuditHandler, Receipt, SeqSink

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
servers: Any = importlib.import_module("servers.processes")  # the tests' own

THREADS, TASKS, STEPS = 64, 1_000, 12
RULES = ("http-request return status 503 if { rand(10) eq 0 }",
         "http-response return status 502 if { rand(10) eq 0 }")  # fmt: skip


class Load:
    """Callers that go on until they are told to stop, and count."""

    def __init__(self, handler: AuditHandler) -> None:
        self.handler = handler
        self.stop = threading.Event()
        self.failed = 0
        self._acknowledged: dict[str, array[int]] = {}  # small: it must not look like a leak

    def call(self) -> None:
        """Record from a thread."""
        while not self.stop.is_set():
            try:
                self.note(self.handler.record({"action": "Soak"}))
            except AuditError:
                self.failed += 1

    def note(self, receipt: Receipt) -> None:
        """Remember what was acknowledged."""
        self._acknowledged.setdefault(receipt.session, array("L")).append(receipt.sequence)

    def acknowledged(self) -> list[tuple[str, int]]:
        """Return session and sequence of all that was acknowledged."""
        return [(name, n) for name, found in self._acknowledged.items() for n in found]

    def count(self) -> int:
        """Return how many were."""
        return sum(map(len, self._acknowledged.copy().values()))

    async def acall(self) -> None:
        """Record from a task, now and then."""
        while not self.stop.is_set():
            with contextlib.suppress(AuditError):
                self.note(await self.handler.arecord({"action": "Soak"}))
            await asyncio.sleep(0.5)

    async def tasks(self) -> None:
        """Run all tasks in one loop."""
        await asyncio.gather(*(self.acall() for _ in range(TASKS)))


def state() -> str:
    """Say what the process holds."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    memory = next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS"))
    descriptors = len(os.listdir("/proc/self/fd"))
    return f"{int(memory):>10,} {descriptors:>12} {threading.active_count():>8}"


def soak(url: str, seconds: float) -> Load:
    """Load a server for so long, showing the state."""
    handler = AuditHandler(SeqSink(url, timeout=5.0), timeout=20.0)
    load = Load(handler)
    callers = [threading.Thread(target=load.call) for _ in range(THREADS)]
    callers.append(threading.Thread(target=lambda: asyncio.run(load.tasks())))
    for caller in callers:
        caller.start()
    print(f"{'seconds':>8} {'RSS, KiB':>10} {'descriptors':>12} {'threads':>8} {'recorded':>9}")
    for step in range(STEPS):
        time.sleep(seconds / STEPS)
        done = f"{load.count():>9,}"
        print(f"{seconds / STEPS * (step + 1):>8.0f} {state()} {done}", flush=True)
    load.stop.set()
    for caller in callers:
        caller.join()
    handler.close()
    print(f"{'after':>8} {state()}")
    return load


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="A long run through a proxy that fails.")
    parser.add_argument("--seconds", type=float, default=180.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, servers.SeqServer(Path(name)) as seq:
        with servers.haproxy(Path(name), servers._haproxy(seq.port, *RULES)) as proxy:
            load = soak(proxy.url, given.seconds)
        stored = {(event["AuditSession"], event["SequenceNumber"]) for event in seq.stored()}
    acknowledged = load.acknowledged()
    lost = set(acknowledged) - stored
    twice = len(acknowledged) - len(set(acknowledged))
    print(f"acknowledged {len(acknowledged):,}, failed {load.failed:,}, of the acknowledged "
          f"not stored {len(lost)}, with the same identity {twice}")  # fmt: skip
    sys.exit(1 if lost or twice else 0)


if __name__ == "__main__":
    main()
