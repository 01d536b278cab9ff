"""What tamper evidence costs: the processor time of a call, and how fast a log is verified.

    python -m benchmarks.evidence [--directory DIR] [--rounds 9] [--entries 20000] [--megabytes 512]

Three kinds of handler take turns, each with new session files in a directory in memory, where a
sync costs nothing: without chain and journal (patched away: no such option exists), with them, and
with signed checkpoints as well, whose thread counts too. Then `verify` reads files on the disk,
beside `sha256sum` of the same files.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import entries as made
from benchmarks.report import header, spread, table
from structlog_audit import AuditHandler, FileSink, Signer, session
from structlog_audit.journal import Journal
from structlog_audit.note import SigningKey

Entry = dict[str, Any]
KINDS = {
    "bare": "without chain and journal",
    "chain": "with chain and journal",
    "signed": "and a checkpoint every 1,000 entries, its thread included",
}


@contextmanager
def _bare() -> Iterator[None]:
    """Take chain and journal away."""
    with (
        patch.object(session, "link", lambda head, *_: head + b"}"),
        patch.object(session, "line_hash", lambda line: ""),
        patch.object(Journal, "append", lambda *_: None),
    ):
        yield


def _cost(directory: Path, entries: Sequence[Entry], signer: Signer | None) -> float:
    """Return the processor time of an entry in microseconds, session's begin and end included."""
    handler = AuditHandler(FileSink(directory, signer=signer))
    begin = time.process_time()
    for entry in entries:
        handler.record(entry)
    handler.close()
    return (time.process_time() - begin) / len(entries) * 1e6


def calls(home: Path, rounds: int, count: int) -> None:
    """Measure the calls, kind by kind in turn."""
    key = home / "key"
    key.write_text(SigningKey.generate("example.com/bench").reveal())
    key.chmod(0o600)
    some = made.entries("500 B")
    entries = [some[number % len(some)] for number in range(count)]
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind, found in times.items():
            directory = home / f"{kind}-{number}"
            signer = Signer(key, entries=1_000) if kind == "signed" else None
            with _bare() if kind == "bare" else nullcontext():
                found.append(_cost(directory, entries, signer))
            shutil.rmtree(directory)
    rows = []
    for kind, found in times.items():
        more = [mine - bare for mine, bare in zip(found, times["bare"], strict=True)]
        rows.append([KINDS[kind], spread(found, 1), spread(more, 1)])
    table(
        f"processor time of a call, µs, {count:,} entries of 500 B a session, no disk: median "
        f"(least to most) of {rounds} rounds",
        ["", "a call", "more than without"],
        rows,
    )


def verifying(home: Path, rounds: int, megabytes: int) -> None:
    """Measure `verify` beside `sha256sum`, one file on one core, then eight on all."""
    for kind in ("500 B", made.MIX):
        directory = home / "verified"
        size = _written(directory, kind, megabytes)
        files = sorted(map(str, directory.glob("audit-2*.ndjson")))
        commands = {
            "sha256sum, one after the other": ["sha256sum", *files],
            "verify, one core": [*_PINNED, *_VERIFY, str(directory)],
            "verify, all cores": [*_VERIFY, str(directory)],
        }
        speeds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                begin = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                speeds[name].append(size / (time.perf_counter() - begin) / 1e6)
        rows = [[name, spread(found, 0)] for name, found in speeds.items()]
        table(f"verify, {kind}, {size / 1e6:,.0f} MB in {len(files)} files in the page cache",
              ["", "MB/s"], rows)  # fmt: skip
        shutil.rmtree(directory)


_VERIFY = [sys.executable, "-m", "structlog_audit", "verify"]
_PINNED = ["taskset", "-c", "0"] if shutil.which("taskset") else []


def _written(directory: Path, kind: str, megabytes: int) -> int:
    """Write eight sessions; return their bytes."""
    entries = made.entries(kind)
    for _ in range(8):
        handler = AuditHandler(FileSink(directory), max_bytes=None)
        size = 0
        while size < megabytes * 1_000_000 / 8:
            # outcomes share a sync, so that the files are there soon
            for entry in entries * 40:
                handler.submit(entry)
            handler.record(entries[0])
            size = max(path.stat().st_size for path in directory.glob(
                f"audit-2*-{handler.current.session}.ndjson"))  # type: ignore[union-attr]  # fmt: skip
        handler.close()
    return sum(path.stat().st_size for path in directory.glob("audit-2*.ndjson"))


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--directory", type=Path, help="on the disk, for verify")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--entries", type=int, default=20_000)
    parser.add_argument("--megabytes", type=int, default=512)
    given = parser.parse_args()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as home:
        calls(Path(home), given.rounds, given.entries)
    with tempfile.TemporaryDirectory(dir=given.directory) as home:
        for name, value in header(Path(home)).items():
            print(f"{name}: {value}")
        verifying(Path(home), min(given.rounds, 5), given.megabytes)


_Raw = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    main()
