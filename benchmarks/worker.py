"""A contender in a fresh process: does what it is told on stdin, answers on stdout.

    python -m benchmarks.worker CONTENDER DIRECTORY OPTIONS

One JSON object a line, both ways. While another contender has its turn, this process sleeps.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns, thread_time_ns
from typing import Any

from benchmarks.contenders import CONTENDERS, Bare, BarePost, Call
from benchmarks.entries import Entry, entries
from structlog_audit import audit_log

FILL = 200_000
"""Bytes of an entry that makes a file grow."""


def latency(call: Call, given: list[Entry], calls: int) -> dict[str, Any]:
    """Call one after the other; return the nanoseconds of each."""
    taken = []
    for number in range(calls):
        entry = given[number % len(given)]
        start = perf_counter_ns()
        call(entry)
        taken.append(perf_counter_ns() - start)
    return {"ns": taken}


def processor(call: Call, given: list[Entry], calls: int) -> dict[str, Any]:
    """Call in a tight loop; return the processor's nanoseconds for one call."""
    start = thread_time_ns()
    for number in range(calls):
        call(given[number % len(given)])
    return {"ns": (thread_time_ns() - start) / calls}


def threads(call: Call, given: list[Entry], calls: int, count: int) -> dict[str, Any]:
    """Call from so many threads; return seconds for all, and the nanoseconds of each call."""
    gate = threading.Barrier(count + 1)
    taken: list[int] = []

    def work() -> None:
        own = []
        gate.wait()
        for number in range(calls // count):
            start = perf_counter_ns()
            call(given[number % len(given)])
            own.append(perf_counter_ns() - start)
        taken.extend(own)

    workers = [threading.Thread(target=work) for _ in range(count)]
    for worker in workers:
        worker.start()
    gate.wait()
    start = perf_counter_ns()
    for worker in workers:
        worker.join()
    return {"rate": calls // count * count / (perf_counter_ns() - start) * 1e9, "ns": taken}


def tasks(call: Call, given: list[Entry], calls: int, count: int) -> dict[str, Any]:
    """Await `ainfo` from so many tasks of one loop; return calls a second."""

    async def work() -> None:
        for number in range(calls // count):
            await audit_log.ainfo("An invoice was deleted.", **given[number % len(given)])

    async def main() -> float:
        start = perf_counter_ns()
        await asyncio.gather(*(work() for _ in range(count)))
        return calls // count * count / (perf_counter_ns() - start) * 1e9

    return {"rate": asyncio.run(main())}


def grow(call: Call, given: list[Entry], size: int) -> dict[str, Any]:
    """Make the file grow by so many bytes, fast: with big entries."""
    filler: Entry = {"action": "Fill", "data": {"text": "x" * FILL}}
    _prepare(call, [filler])
    for _ in range(size // FILL):
        call(filler)
    return {}


WORK: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function for function in (latency, processor, threads, tasks, grow)
}


def _prepare(call: Call, given: list[Entry]) -> None:
    if isinstance(call, (Bare, BarePost)):
        for entry in given:
            call.prepare(entry)


def main(name: str, directory: str, options: str) -> None:
    """Open the contender, time its first call, then do what stdin says."""
    given_options = json.loads(options)
    kinds: dict[str, list[Entry]] = {}
    call = CONTENDERS[name][0](Path(directory), given_options)
    first = entries("500 B", 1)
    _prepare(call, first)
    start = perf_counter_ns()
    call(first[0])
    print(json.dumps({"first": perf_counter_ns() - start}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        kind = order.pop("entries", "500 B")
        if kind not in kinds:
            kinds[kind] = entries(kind)
            _prepare(call, kinds[kind])
            for entry in kinds[kind]:
                call(entry)
        answer = WORK[order.pop("do")](call, kinds[kind], **order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
