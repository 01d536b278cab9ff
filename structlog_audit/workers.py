"""All cores for many files: processes that read, and send back what they found.

They are no children of `multiprocessing`: those run the program's main module once more, and that
may be anybody's script. Whatever a worker cannot do is done here.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any

from structlog_audit.scan import Scan, Task, scan
from structlog_audit.source import STDIN

WORTHWHILE = 64 * 2**20
"""Bytes; reading fewer of them takes less time than starting a Python."""
REPORT_EVERY = 2**24
"""Bytes between two messages of how far a worker is."""
_SERVE = """import sys
sys.path[:] = sys.argv[1:]
from structlog_audit.workers import serve
serve()
"""

Progress = Callable[[int], None]
"""Is told how many more bytes were read."""


def scan_all(tasks: Sequence[Task], size: int, progress: Progress) -> list[Scan]:
    """Read files, in several processes where that is worth it.

    Args:
        tasks: which ones.
        size: bytes of all of them.
        progress: is told of what was read; from several threads, one at a time.

    Returns:
        What was found, in the order of the tasks.
    """
    count = min(_cores(), len(tasks)) if size >= WORTHWHILE and _can_start() else 1
    if count < 2 or any(task.path == STDIN for task in tasks):
        return [_scan_here(task, progress) for task in tasks]
    return _Pool(tasks, progress).run(count)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _can_start() -> bool:
    """Tell whether there is a Python to start: where it is embedded, there may be none."""
    return os.path.basename(sys.executable or "").lower().startswith(("python", "pypy"))


def _scan_here(task: Task, progress: Progress) -> Scan:
    before = 0

    def show(read: int) -> None:
        nonlocal before
        progress(read - before)
        before = read

    return scan(task, show)


class _Pool:
    def __init__(self, tasks: Sequence[Task], progress: Progress) -> None:
        self._tasks = tasks
        self._progress = progress
        self._found: list[Scan | None] = [None] * len(tasks)
        self._lock = threading.Lock()
        self._left: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(len(tasks)):
            self._left.put(number)
        self._workers: list[subprocess.Popen[bytes]] = []

    def run(self, count: int) -> list[Scan]:
        threads = [threading.Thread(target=self._lead, daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for worker in self._workers:  # interrupted: they are of no more use
                worker.kill()
        return [
            _scan_here(task, self._show) if found is None else found
            for task, found in zip(self._tasks, self._found, strict=True)
        ]

    def _show(self, count: int) -> None:
        with self._lock:
            self._progress(count)

    def _lead(self) -> None:
        """Hand one file after the other to a worker; stop when it fails, or none is left."""
        command = [sys.executable, "-I", "-c", _SERVE, *[p for p in sys.path if p]]
        try:
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603
        except OSError:
            return
        self._workers.append(worker)
        assert worker.stdin is not None
        assert worker.stdout is not None
        with worker, contextlib.suppress(OSError, EOFError, pickle.UnpicklingError, queue.Empty):
            while True:
                number = self._left.get_nowait()
                self._found[number] = self._ask(worker.stdin, worker.stdout, self._tasks[number])

    def _ask(self, to: IO[bytes], back: IO[bytes], task: Task) -> Scan:
        pickle.dump(task, to)
        to.flush()
        while True:
            answer: int | Scan = pickle.load(back)  # noqa: S301 - from our own process
            if isinstance(answer, Scan):
                return answer
            self._show(answer)


def serve() -> None:
    """Read files for another process, until it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that one gets it, too, and ends us
    source, out = sys.stdin.buffer, sys.stdout.buffer

    def tell(answer: Any) -> None:
        pickle.dump(answer, out)
        out.flush()

    with contextlib.suppress(EOFError, OSError):
        while True:
            _serve(pickle.load(source), tell)  # noqa: S301 - from the process that started us


def _serve(task: Task, tell: Callable[[Any], None]) -> None:
    unsaid = 0

    def count(more: int) -> None:
        nonlocal unsaid
        unsaid += more
        if unsaid >= REPORT_EVERY:
            tell(unsaid)
            unsaid = 0

    found = _scan_here(task, count)
    tell(unsaid)
    tell(found)
