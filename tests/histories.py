"""Makes histories of logs at random, and verifies each: none may be called tampered with.

Writers in several processes, with and without a key, record in threads, rotate and fork, and end,
exit or are killed, on disks that have room, that are full or that let a file grow no further; once
or several times in one directory. What was acknowledged must be there.

Run as `python histories.py COUNT [SEED [SMALL]]`; SMALL is a directory on a small file system.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import threading
from collections import Counter
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from signing import make_key

from structlog_audit import AuditError, AuditHandler, FileSink, Signer
from structlog_audit.verify import verify

CALLS = 60
"""Of a thread; most writers do not come to their end."""
DEADLINE = 60
"""Seconds after which a writer hangs for sure."""


class Writer(NamedTuple):
    """What a process does, and what becomes of it.

    Args:
        seed: of what it decides by itself.
        threads: how many record in it.
        room: bytes that a file may have; None for any number.
        max_bytes: of a session.
        fork_at: the call before which it forks; the child goes on as well.
        exits: it ends without a word to the log.
        killed_after: acknowledgements of all writers, after which it is killed; None if it is not.
    """

    seed: int
    threads: int
    room: int | None
    max_bytes: int
    fork_at: int | None
    exits: bool
    killed_after: int | None


def _writer(rng: random.Random) -> Writer:
    return Writer(
        seed=rng.getrandbits(32),
        threads=rng.choice([1, 1, 3]),
        room=rng.choice([None, None, None, 3_000, 9_000]),
        max_bytes=rng.choice([2_000, 10_000, 10**6]),
        fork_at=rng.choice([None, None, 5]),
        exits=rng.random() < 0.2,
        killed_after=rng.choice([None, rng.randrange(1, 120)]),
    )


def _write(writer: Writer, directory: Path, key: Path | None, pipe: int) -> None:
    """Be a writer, in a process of our own."""
    signal.alarm(DEADLINE)
    if writer.room is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (writer.room, resource.RLIM_INFINITY))
    signer = None if key is None else Signer(key, entries=10, interval=0.02)
    handler = AuditHandler(FileSink(directory, signer=signer), max_bytes=writer.max_bytes)

    def record(thread: int) -> None:
        size = random.Random(writer.seed + thread)
        for call in range(CALLS):
            if thread == 0 and call == writer.fork_at and os.fork() == 0:
                signal.alarm(DEADLINE)
                _end(handler, lambda: record(1), exits=writer.exits)
            with suppress(AuditError):
                entry = {"action": "A", "data": {"filler": "x" * size.randrange(300)}}
                os.write(pipe, f"{handler.record(entry).hash}\n".encode())

    def record_in_threads() -> None:
        threads = [threading.Thread(target=record, args=(n,)) for n in range(writer.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    _end(handler, record_in_threads, exits=writer.exits)


def _end(handler: AuditHandler, work: object, *, exits: bool) -> None:
    try:
        work()  # type: ignore[operator]
        if not exits:
            with suppress(AuditError):
                handler.close()
    finally:
        os._exit(0)


def _generation(writers: list[Writer], directory: Path, key: Path | None) -> list[str]:
    """Have writers at work at the same time; return the hashes that were acknowledged."""
    reading, writing = os.pipe()
    processes: list[tuple[int, Writer]] = []
    for writer in writers:
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            os.setpgid(0, 0)  # its child is killed with it
            _write(writer, directory, key, writing)
        with suppress(OSError):
            os.setpgid(pid, pid)
        processes.append((pid, writer))
    os.close(writing)
    told = []
    with open(reading) as pipe:
        for line in pipe:
            told.append(line.strip())
            for pid, writer in processes:
                if len(told) == writer.killed_after:
                    with suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
    for pid, _ in processes:
        status = os.waitpid(pid, 0)[1]
        assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL, f"it hung: {status}"
    return told


def check_history(seed: int, directory: Path, full: Path | None = None) -> list[str]:
    """Make the history of that number, and verify after each of its generations.

    Args:
        seed: its number.
        directory: where to make it.
        full: a small file system, on which some histories are made instead.

    Returns:
        The verdicts.
    """
    rng = random.Random(seed)
    log = (full if full is not None and rng.random() < 0.3 else directory) / f"audit-{seed}"
    key = directory / f"{seed}.key" if rng.random() < 0.7 else None
    public = [] if key is None else [make_key(key).verifier]
    told: list[str] = []
    verdicts = []
    for _ in range(rng.choice([1, 2, 3])):
        writers = [_writer(rng) for _ in range(rng.choice([1, 1, 2, 4]))]
        told += _generation(writers, log, key)
        if not log.exists():
            verdicts.append("nothing")  # no writer came so far
            continue
        report = verify(log, keys=public)
        assert report.verdict in ("valid", "incomplete"), f"{seed}: {report.findings}"
        there = {
            sha256(line).hexdigest()
            for file in log.glob("audit-*-*.ndjson")
            for line in file.read_bytes().split(b"\n")
        }
        lost = set(told) - there
        assert not lost, f"{seed}: {len(lost)} acknowledged entries are lost"
        assert len(told) == len(set(told)), f"{seed}: acknowledged twice"
        verdicts.append(report.verdict)
    shutil.rmtree(log, ignore_errors=True)
    return verdicts


def main() -> None:
    """Make so many, and tell of the verdicts."""
    count, first = int(sys.argv[1]), int([*sys.argv, 1][2])
    small = list(map(Path, sys.argv[3:4]))
    verdicts: Counter[str] = Counter()
    with TemporaryDirectory() as directory:
        for seed in range(first, first + count):
            verdicts.update(check_history(seed, Path(directory), *small))
    print(f"{count} histories: {dict(verdicts)}")


if __name__ == "__main__":
    main()
