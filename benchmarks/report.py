"""What was measured, on what, and how it is shown."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

BIASES = """\
- For all: each contender has a process and a file of its own, and its turn comes round by round.
- For us: nothing else uses the process's interpreter, and an application's own work does not
  empty the processor's caches between two calls.
- Against us: the floor neither makes its line nor leaves anybody something to check.
- For the others: they store the entry alone, without identity, session and link (rust-py-audit:
  with a link), so their bytes are fewer.
- A virtual disk may acknowledge a sync before anything is stable; then all ratios look worse for
  us than they would on a disk that keeps its word."""


def header(directory: Path) -> dict[str, str]:
    """Say on what the figures were measured."""
    disk, kind = _file_system(directory)
    load = ", ".join(f"{part:.2f}" for part in os.getloadavg()) if sys.platform != "win32" else "?"
    return {
        "disk": f"{disk}, file system {kind}",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, "
        f"{os.cpu_count()} CPUs ({_processor()}), load {load}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")


def _file_system(directory: Path) -> tuple[str, str]:
    """Look up the mount that a directory is on; Linux only."""
    best = ("unknown", "unknown")
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return best
    where, length = directory.resolve(), -1
    for line in mounts:
        device, point, kind = line.split()[:3]
        if where.is_relative_to(point) and len(point) >= length:
            best, length = (device, kind), len(point)
    return best


def percentile(values: Sequence[float], part: float) -> float:
    """Return the value that so big a part of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Show the median of repetitions, and the least and the most of them."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    print(f"\n{title}")
    for row in (columns, *rows):
        cells = zip(row[1:], widths[1:], strict=True)
        print("  " + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in cells)]))
    sys.stdout.flush()
