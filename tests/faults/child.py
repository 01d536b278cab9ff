"""A program that records entries one after the other, and keeps a journal of what it was told.

Run as `python child.py JSON`. The journal is written with `pwrite` to a file (or with `write` to a
pipe), so that faults of `write` in the audit log do not hit it. Each call leaves one line there:
`{"ok": n, "session": …, "sequence": …, "hash": …}` or `{"error": n, "persisted": …, …}`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading


class Journal:
    """Lines on a descriptor that the test reads."""

    def __init__(self, descriptor: int, *, pipe: bool) -> None:
        self._descriptor = descriptor
        self._pipe = pipe
        self._offset = 0
        self._lock = threading.Lock()

    def add(self, **line: object) -> None:
        data = json.dumps(line).encode() + b"\n"
        if self._pipe:
            os.write(self._descriptor, data)
            return
        with self._lock:
            os.pwrite(self._descriptor, data, self._offset)
            self._offset += len(data)


def name_sessions_beforehand(first: int) -> None:
    """Make the sessions' names known: strace wants the paths before they exist."""
    real, numbers = os.urandom, itertools.count(first)
    os.urandom = lambda size: bytes([next(numbers)]) * size if size == 32 else real(size)


def wait_for_the_tracer() -> None:
    """Let any process trace this one (Yama asks for that), and wait until it does."""
    import ctypes

    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER, _ANY
    print("ready", flush=True)
    sys.stdin.readline()


def do_it_and_report_a_failure(verb: str, when: int) -> None:
    """Let the n-th call of a sync do its work and fail all the same."""
    real, numbers = getattr(os, verb), itertools.count(1)

    def pretend(descriptor: int) -> None:
        real(descriptor)
        if next(numbers) == when:
            raise OSError(5, "Input/output error")

    setattr(os, verb, pretend)


def limit(config: dict[str, int]) -> None:
    """Give up rights and resources."""
    import resource

    for name in ("FSIZE", "NOFILE"):
        if name in config:
            number = getattr(resource, f"RLIMIT_{name}")
            resource.setrlimit(number, (config[name], resource.getrlimit(number)[1]))
    if "uid" in config:
        os.setgroups([])
        os.setgid(config["uid"])
        os.setuid(config["uid"])


def open_descriptors() -> int:
    """Count them; that takes one more than a limit may leave."""
    if not os.path.isdir("/proc/self/fd"):
        return 0
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    try:
        return len(os.listdir("/proc/self/fd"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def main(config: dict) -> None:
    if "pipe" in config:
        journal = Journal(config["pipe"], pipe=True)
    else:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        journal = Journal(os.open(config["journal"], flags, 0o666), pipe=False)
    from structlog_audit import AuditError, AuditHandler, ConsoleSink, FileSink

    sink = ConsoleSink() if config.get("console") else FileSink(config["directory"])
    handler = AuditHandler(sink, **config.get("options", {}))
    if "pretend" in config:
        do_it_and_report_a_failure(*config["pretend"])
    limit(config.get("limits", {}))
    if "traced" in config:
        name_sessions_beforehand(config["traced"])
        wait_for_the_tracer()
    before = open_descriptors()

    def record(number: int) -> None:
        if number in config.get("reopen", ()):
            handler._sessions.request_reopen()  # without its thread: calls shall keep their order
        entry = {"action": "InvoiceDelete", "n": number, "filler": "x" * config.get("bytes", 100)}
        try:
            receipt = handler.record(entry)
        except AuditError as error:
            journal.add(
                error=number,
                type=type(error).__name__,
                persisted=getattr(error, "persisted", None),
                errno=getattr(error, "errno", None),
                text=str(error),
            )
        else:
            journal.add(
                ok=number,
                session=receipt.session,
                sequence=receipt.sequence,
                hash=receipt.hash,
            )

    def work(numbers: range) -> None:
        for number in numbers:
            record(number)
            if number in config.get("pauses", ()):  # until the test has changed something
                print("paused", flush=True)
                sys.stdin.readline()

    threads, calls = config.get("threads", 1), config["calls"]
    first = config.get("first", 0)
    if threads == 1:
        work(range(first, first + calls))
    else:
        workers = [
            threading.Thread(target=work, args=(range(first + i * calls, first + (i + 1) * calls),))
            for i in range(threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    handler.close()
    journal.add(closed=True, descriptors=[before, open_descriptors()])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
