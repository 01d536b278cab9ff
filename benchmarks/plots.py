"""Pictures of the figures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.sections import Figures


def draw(results: dict[str, Figures], where: Path) -> list[Path]:
    """Draw what there are figures for; return the files. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    for name, picture in (
        ("one_call", _latency), ("many_threads", _threads), ("sizes", _sizes), ("big_files", _files)
    ):  # fmt: skip
        if results.get(name):
            path = where / f"{name}.png"
            picture(results, path)
            drawn.append(path)
    return drawn


def _save(figure: Any, axes: Any, title: str, path: Path, *labels: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _latency(results: dict[str, Figures], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for name, its in results["one_call"].items():
        times = sorted(ns / 1000 for ns in its["ns"])
        axes.plot(times, [number / len(times) for number in range(len(times))], label=name)
    axes.set_xscale("log")
    _save(figure, axes, "One call, 500 B", path, "microseconds", "part of the calls")


def _threads(results: dict[str, Figures], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    disks = {"this disk": results["many_threads"]}
    disks.update(
        {f"{name} a sync": its["threads"] for name, its in results.get("slow_disks", {}).items()}
    )
    for name, its in disks.items():
        counts = [int(count) for count in its]
        ratios = [statistics.median(one["ratio"]) for one in its.values()]
        axes.plot(counts, ratios, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    _save(figure, axes, "Throughput of threads", path, "threads", "entries / floor's, one by one")


def _sizes(results: dict[str, Figures], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    its = results["sizes"]
    for key, name in (("floor_us", "write + fdatasync"), ("ours_us", "structlog-audit")):
        axes.plot(
            list(its), [statistics.median(one[key]) for one in its.values()], "o-", label=name
        )
    axes.set_ylim(bottom=0)
    _save(figure, axes, "Cost over the size of an entry", path, "entry", "microseconds, p50")


def _files(results: dict[str, Figures], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    its = results["big_files"]
    times = [statistics.median(one["ours_us"]) for one in its.values()]
    axes.plot(list(its), times, "o-", label="structlog-audit")
    axes.set_ylim(bottom=0)
    _save(figure, axes, "Cost over the size of the session file", path, "file", "microseconds, p50")
