"""Memory over many entries: flat, or not.

    python -m benchmarks.memory [--entries N] [--file-entries N] [--directory DIR]

A million entries go to a sink that does nothing, fewer to a file.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import header
from structlog_audit import AuditHandler, FileSink, Redact, Sink, audit_log
from structlog_audit.settings import audit_processors

PARTS = 10


class Nowhere:
    """A sink that does nothing."""

    def open(self, session: str) -> None:
        """Do nothing."""

    def write(self, lines: Sequence[bytes]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def resident() -> int:
    """Return the memory of this process in KiB, as Linux counts it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise SystemExit("this needs /proc/self/status (Linux)")


def measure(title: str, sink: Sink, entries: int) -> None:
    """Record entries and print the memory after each tenth of them."""
    import structlog

    handler = AuditHandler(sink, max_bytes=2**26)
    structlog.configure(processors=[Redact(), *audit_processors(handler=handler)])
    print(f"\n{entries:,} entries to {title}, every one different, in sessions of 64 MiB")
    print(f"  {'entries':>10}{'RSS, KiB':>12}{'change':>10}")
    before = resident()
    for part in range(PARTS):
        for number in range(part * entries // PARTS, (part + 1) * entries // PARTS):
            audit_log.info(
                action="InvoiceDelete",
                user_id=number,
                data={"invoiceId": f"inv_{number}", f"key{number}": [number] * 3, "token": "x"},
            )
        now = resident()
        print(f"  {(part + 1) * entries // PARTS:>10,}{now:>12,}{now - before:>+10,}")
        before = now
    handler.close()


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, default=Path("."), help="on the disk to use")
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--file-entries", type=int, default=50_000)
    given = parser.parse_args()
    print(header(given.directory))
    measure("a sink that does nothing", Nowhere(), given.entries)
    with tempfile.TemporaryDirectory(dir=given.directory, prefix="memory-") as name:
        measure("a file", FileSink(Path(name) / "audit"), given.file_entries)


if __name__ == "__main__":
    main()
