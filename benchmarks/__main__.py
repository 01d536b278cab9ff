"""Measure everything, print tables, write JSON and pictures.

python -m benchmarks [--directory DIR] [--output DIR] [--only SECTION …] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from time import monotonic

from benchmarks.contenders import CONTENDERS
from benchmarks.plots import draw
from benchmarks.report import BIASES, header
from benchmarks.sections import SECTIONS, SMOKE, Figures, Plan


def run(plan: Plan, names: list[str]) -> dict[str, Figures]:
    """Measure section by section."""
    results: dict[str, Figures] = {}
    for name in names:
        start = monotonic()
        results[name] = SECTIONS[name](plan)
        print(f"  ({name}: {monotonic() - start:.0f} s)")
    return results


def show_header(directory: Path) -> dict[str, str]:
    """Print on what is measured, who takes part and what speaks for whom."""
    lines = header(directory)
    for name, text in lines.items():
        print(f"{name:8}{text}")
    print("\nWhat each contender promises when its call returns")
    for name, (_, promise) in CONTENDERS.items():
        print(f"  {name:26}{promise}")
    print(f"\nBiases\n{BIASES}")
    return lines


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="What an audit call costs beside the bare disk.")
    parser.add_argument("--directory", type=Path, default=Path("."), help="on the disk to measure")
    parser.add_argument("--output", type=Path, help="directory for results.json and pictures")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--smoke", action="store_true", help="show in seconds that all runs")
    given = parser.parse_args()
    lines = show_header(given.directory)
    with tempfile.TemporaryDirectory(dir=given.directory, prefix="benchmarks-") as name:
        plan = Plan(Path(name), **(SMOKE if given.smoke else {}))
        results = run(plan, given.only)
    if given.output is not None:
        given.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"header": lines, "results": results})
        (given.output / "results.json").write_text(text, encoding="utf-8")
        for path in (given.output / "results.json", *draw(results, given.output)):
            print(path)


if __name__ == "__main__":
    main()
