"""A console that tears lines: several processes on one pipe, and writes that break off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from reading import is_own, read_lines
from running import HANG, environment, run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX pipes and processes")


def sessions_in(data: bytes) -> tuple[list[list[dict[str, Any]]], list[bytes]]:
    """Return the whole sessions of a stream, and the lines that are none."""
    lines: dict[str, list[bytes]] = {}
    garbage = []
    for line in filter(None, data.splitlines()):
        try:
            lines.setdefault(json.loads(line)["session"], []).append(line)
        except ValueError:
            garbage.append(line)
    whole = [read_lines(b"\n".join(session) + b"\n") for session in lines.values()]
    return whole, garbage


WORKERS = """
    import os, sys
    from structlog_audit import AuditHandler, ConsoleSink
    workers = []
    for worker in range(3):
        workers.append(os.fork())
        if workers[-1] == 0:
            handler = AuditHandler(ConsoleSink())
            for number in range(40):
                handler.record({"action": f"Worker{worker}", "filler": "x" * int(sys.argv[1])})
            handler.close()
            os._exit(0)
    for worker in workers:
        assert os.waitpid(worker, 0)[1] == 0
"""


@pytest.mark.parametrize("size", [100, 20_000])
def test_workers_on_one_pipe_do_not_tear_each_others_lines(size: int) -> None:
    """More than 4,096 bytes are no longer written in one piece when the pipe is full."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORKERS), str(size)],
        env=environment(), stdout=subprocess.PIPE, bufsize=0,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        data = b"".join(iter(lambda: os.read(process.stdout.fileno(), 4096), b""))
        assert process.wait(HANG) == 0

    sessions, garbage = sessions_in(data)
    assert not garbage
    told = Counter(e["action"] for session in sessions for e in session if not is_own(e))
    assert told == {"Worker0": 40, "Worker1": 40, "Worker2": 40}


SHORT_WRITE = """
    import resource
    from structlog_audit import AuditHandler, AuditWriteError, ConsoleSink
    handler = AuditHandler(ConsoleSink())
    handler.record({"action": "Before"})
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        handler.record({"action": "Torn", "filler": "x" * 20_000})
    except AuditWriteError as error:
        assert error.persisted == "unknown", error
    else:
        raise SystemExit("it was acknowledged")
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    handler.record({"action": "After"})
    handler.close()
"""


def check_torn_stream(data: bytes) -> None:
    (before, after), garbage = sessions_in(data)
    assert [entry["action"] for entry in before] == ["AuditSession", "Before"]
    assert [entry["action"] for entry in after] == ["AuditSession", "After", "AuditSession"]
    assert after[0]["data"]["gap"]["failedCalls"] == 1
    assert len(garbage) == 1
    assert b'"Torn"' in garbage[0]


def test_a_line_after_a_torn_one_stands_on_a_line_of_its_own(tmp_path: Path) -> None:
    """Stdout is a file that could not take a line as a whole; then there is room again."""
    path = tmp_path / "out"
    with path.open("wb") as file:
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SHORT_WRITE)],
            env=environment(), stdout=file, check=True, timeout=HANG,
        )  # fmt: skip

    check_torn_stream(path.read_bytes())


INTERRUPTED = """
    import builtins, fcntl, os, signal, sys, termios, threading
    from structlog_audit import AuditHandler, AuditWriteError, ConsoleSink

    class Interrupted(getattr(builtins, sys.argv[1])):
        pass

    def interrupt(*_):
        raise Interrupted

    def interrupt_when_full():
        held, before = 0, -1
        while held <= 4096 or held != before:  # it has begun, and the pipe takes no more
            before = held
            patience.wait(0.02)
            held = int.from_bytes(fcntl.ioctl(0, termios.FIONREAD, bytes(4)), sys.byteorder)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    patience = threading.Event()
    signal.signal(signal.SIGUSR1, interrupt)
    reading, writing = os.pipe()
    output = os.dup(1)
    os.dup2(reading, 0)
    os.dup2(writing, 1)
    handler = AuditHandler(ConsoleSink())
    handler.record({"action": "Before"})
    threading.Thread(target=interrupt_when_full).start()
    try:
        handler.record({"action": "Torn", "filler": "x" * 200_000})
    except AuditWriteError as error:
        assert error.persisted == "unknown", error
    else:
        raise SystemExit("it was not interrupted")
    data = os.read(0, 2**20)
    handler.record({"action": "After"})
    handler.close()
    os.close(writing)
    os.close(1)
    while more := os.read(0, 2**20):
        data += more
    with open(output, "wb") as out:
        out.write(data)
    os._exit(0)
"""


@pytest.mark.parametrize("base", ["Exception", "TimeoutError"])
def test_a_line_after_an_interrupted_one_stands_on_a_line_of_its_own(base: str) -> None:
    """A signal handler raised while the pipe was full, with a part of the line in it.

    `TimeoutError` is an `OSError`, and yet not the system's answer.
    """
    done = run_python(INTERRUPTED, base)

    assert done.returncode == 0, done.stderr
    check_torn_stream(done.stdout.encode())
