"""What `import structlog_audit` costs over importing structlog and orjson.

    python -m benchmarks.import_time [--repetitions N]

Each import runs in a fresh interpreter; the kinds alternate, with warm file caches.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import header

CODE = """\
from time import perf_counter_ns
start = perf_counter_ns()
import structlog, orjson
between = perf_counter_ns()
{ours}
print(between - start, perf_counter_ns() - between)
"""
FORBIDDEN = ("requests", "urllib3", "tenacity", "click", "rich", "django", "flask", "starlette")


def measure(ours: str, environment: dict[str, str]) -> tuple[float, float]:
    """Return milliseconds for structlog and orjson, and for ours, in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(ours=ours)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    theirs, added = map(int, done.stdout.split())
    return theirs / 1e6, added / 1e6


def needless() -> list[str]:
    """Return libraries that our import loads although it should not."""
    code = "import sys, structlog, orjson; a = set(sys.modules); import structlog_audit; "
    code += "print(*set(sys.modules) - a)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return sorted(set(FORBIDDEN) & {name.partition(".")[0] for name in done.stdout.split()})


def main() -> None:
    """Read the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=21)
    repetitions = parser.parse_args().repetitions
    with tempfile.TemporaryDirectory() as cache:
        # an installed package comes compiled, whatever this environment says of its own files
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        run(repetitions, environment)


def run(repetitions: int, environment: dict[str, str]) -> None:
    """Measure in turns and print."""
    measure("import structlog_audit", environment)  # compiles, and warms the file cache
    theirs, added, nothing = [], [], []
    for _ in range(repetitions):
        base, ours = measure("import structlog_audit", environment)
        theirs.append(base)
        added.append(ours)
        nothing.append(measure("pass", environment)[1])
    print(header(Path.cwd()))
    print(f"medians of {repetitions} fresh interpreters (least to most), milliseconds")
    for name, times in (
        ("structlog and orjson", theirs),
        ("structlog_audit on top", added),
        ("nothing on top", nothing),
    ):
        print(
            f"  {name:24}{statistics.median(times):7.1f}   ({min(times):.1f} to {max(times):.1f})"
        )
    print(f"  loaded needlessly: {', '.join(needless()) or 'none'}")


if __name__ == "__main__":
    main()
