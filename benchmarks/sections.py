"""What is measured, section by section. Each prints a table and returns its figures for JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import (
    BARE,
    BARE_POST,
    CONTENDERS,
    NOWHERE,
    OURS,
    OURS_POST,
    REDACTING,
)
from benchmarks.crew import Answer, Member, crew, has_compiler, rounds, server
from benchmarks.entries import MIX, SIZES
from benchmarks.report import percentile, spread, table

Figures = dict[str, Any]
SLOW = {"1 ms": 1_000, "2 ms": 2_000, "5 ms": 5_000}
MANY_FILES = 10_000
ON_DISK = [name for name in CONTENDERS if name not in (NOWHERE, BARE_POST, OURS_POST)]


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        disk: directory on the disk to measure.
        rounds: repetitions of everything.
        calls: calls of a contender in one round.
        big: bytes of the biggest session file.
        threads: how many threads to try.
        tasks: how many asyncio tasks to try.
        files: session files that a full directory has.
    """

    disk: Path
    rounds: int = 7
    calls: int = 400
    big: int = 2**30
    threads: Sequence[int] = (1, 2, 8, 64, 256)
    tasks: Sequence[int] = (1, 10, 100, 1_000)
    files: int = MANY_FILES


SMOKE: dict[str, Any] = {
    "rounds": 1,
    "calls": 4,
    "big": 2**20,
    "threads": (2,),
    "tasks": (4,),
    "files": 10,
}
"""A plan that proves no more than that everything runs."""


def _p(answers: list[Answer], part: float) -> list[float]:
    """Return a percentile of each round, in microseconds."""
    return [percentile(answer["ns"], part) / 1000 for answer in answers]


def _ratios(answers: list[Answer], floor: list[Answer], part: float = 0.5) -> list[float]:
    """Return the ratio of a percentile to the floor's, of each round."""
    return [a / b for a, b in zip(_p(answers, part), _p(floor, part), strict=True)]


def _available(names: Sequence[str]) -> list[str]:
    try:
        import rust_py_audit  # noqa: F401
    except ImportError:
        print("(rust-py-audit is not installed: left out)")
        return [name for name in names if not name.startswith("rust")]
    return list(names)


def one_call(plan: Plan) -> Figures:
    """One call after the other: everybody, beside the floor."""
    names = _available(ON_DISK)
    with crew(plan.disk, names) as members:
        rounds(members, 1, do="latency", calls=plan.calls // 4 + 1)  # warm
        answers = rounds(members, plan.rounds, do="latency", calls=plan.calls)
    floor = answers[names.index(BARE)]
    table(
        f"One call, 500 B, µs: median of {plan.rounds} rounds of {plan.calls} (least to most)",
        ("", "p50", "p99", "p50 / floor", "what it promises"),
        [
            (name, spread(_p(its, 0.5), 0), spread(_p(its, 0.99), 0), spread(_ratios(its, floor)),
             CONTENDERS[name][1].partition(";")[0])
            for name, its in zip(names, answers, strict=True)
        ],
    )  # fmt: skip
    return {
        name: {
            "p50_us": _p(its, 0.5), "p99_us": _p(its, 0.99), "ratio": _ratios(its, floor),
            "ns": [ns for answer in its for ns in answer["ns"]],
        }
        for name, its in zip(names, answers, strict=True)
    }  # fmt: skip


def sizes(plan: Plan) -> Figures:
    """What the size of an entry costs, and redaction."""
    figures: Figures = {}
    rows = []
    with crew(plan.disk, [BARE, OURS, REDACTING]) as members:
        for kind in (*SIZES, MIX):
            floor, ours, redacting = rounds(
                members, plan.rounds, do="latency", calls=plan.calls, entries=kind
            )
            figures[kind] = {
                "floor_us": _p(floor, 0.5),
                "ours_us": _p(ours, 0.5),
                "ratio": _ratios(ours, floor),
                "redacting": _ratios(redacting, floor),
            }
            its = figures[kind]
            rows.append(
                (kind, spread(its["floor_us"], 0), spread(its["ours_us"], 0),
                 spread(its["ratio"]), spread(its["redacting"]))
            )  # fmt: skip
    table(
        "Size of an entry: p50 of one call, µs",
        ("", "floor", "ours", "ours / floor", "with Redact / floor"),
        rows,
    )
    return figures


def processor(plan: Plan) -> Figures:
    """What the processor does for one call when there is no disk."""
    calls = plan.calls * 5
    figures: Figures = {}
    with crew(plan.disk, [NOWHERE]) as members:
        rounds(members, 1, do="processor", calls=calls)
        for kind in (*SIZES, MIX):
            (answers,) = rounds(members, plan.rounds, do="processor", calls=calls, entries=kind)
            figures[kind] = [answer["ns"] / 1000 for answer in answers]
    table(
        "Processor time of one call in a tight loop, to a sink that does nothing, µs",
        ("", "ours"),
        [(kind, spread(its, 1)) for kind, its in figures.items()],
    )
    return figures


def _throughput(plan: Plan, slow: int, counts: Sequence[int]) -> tuple[list[Any], Figures]:
    rows, figures = [], {}
    with crew(plan.disk, [BARE, OURS], slow=slow) as (bare, ours):
        for count in counts:
            calls = _enough(plan, count, slow)
            serial, rates, waits, syncs = [], [], [], []
            for _ in range(plan.rounds):
                floor = bare.do(do="threads", calls=_few(plan, calls), count=1)
                answer = ours.do(do="threads", calls=calls, count=count)
                serial.append(floor["rate"])
                rates.append(answer["rate"])
                syncs.append(1e9 / floor["rate"])
                waits.append(percentile(answer["ns"], 0.99) / (2 * syncs[-1]))
            ratios = [a / b for a, b in zip(rates, serial, strict=True)]
            figures[str(count)] = {"rate": rates, "serial": serial, "ratio": ratios, "wait": waits}
            rows.append(
                (f"{count} threads", spread(serial, 0), spread(rates, 0), spread(ratios, 1),
                 spread(waits))
            )  # fmt: skip
    return rows, figures


def _enough(plan: Plan, count: int, slow: int) -> int:
    """Return calls for a round: so many that beginning and end do not count, not for minutes."""
    return max(plan.calls * (1 if slow else 4), 25 * count if plan.calls > 10 else count)


def _few(plan: Plan, calls: int) -> int:
    """Return calls for the floor in a round; one after the other, they take their time."""
    return max(1, min(calls // 10, plan.calls // 4))


_COLUMNS = ("", "floor, one by one, /s", "ours, /s", "ours / floor", "p99 wait / two syncs")


def many_threads(plan: Plan) -> Figures:
    """Throughput of many threads beside the floor's serial rate."""
    rows, figures = _throughput(plan, 0, plan.threads)
    table("Threads: entries a second, 500 B", _COLUMNS, rows)
    return figures


def _async(plan: Plan, slow: int) -> tuple[list[Any], Figures]:
    rows, figures = [], {}
    with crew(plan.disk, [BARE, OURS], slow=slow) as (bare, ours):
        for count in plan.tasks:
            calls = _enough(plan, count, slow)
            serial, rates = [], []
            for _ in range(plan.rounds):
                serial.append(bare.do(do="threads", calls=_few(plan, calls), count=1)["rate"])
                rates.append(ours.do(do="tasks", calls=calls, count=count)["rate"])
            ratios = [a / b for a, b in zip(rates, serial, strict=True)]
            figures[str(count)] = {"rate": rates, "serial": serial, "ratio": ratios}
            rows.append((f"{count} tasks", spread(serial, 0), spread(rates, 0), spread(ratios, 1)))
    return rows, figures


def many_tasks(plan: Plan) -> Figures:
    """Throughput of asyncio tasks beside the floor's serial rate."""
    rows, figures = _async(plan, 0)
    table("asyncio: entries a second, 500 B", _COLUMNS[:4], rows)
    return figures


def many_processes(plan: Plan) -> Figures:
    """Throughput of several processes, each with a session of its own."""
    rows, figures = [], {}
    for count in (1, 2, 4):
        rates: dict[str, list[float]] = {BARE: [], OURS: []}
        names = [*[BARE] * count, *[OURS] * count]
        with crew(plan.disk, names) as members:
            for _ in range(plan.rounds):
                for name in rates:
                    team = [member for member in members if member.name == name]
                    rates[name].append(_together(team, plan.calls))
        ratios = [a / b for a, b in zip(rates[OURS], rates[BARE], strict=True)]
        figures[str(count)] = {"rate": rates[OURS], "floor": rates[BARE], "ratio": ratios}
        rows.append(
            (f"{count} processes", spread(rates[BARE], 0), spread(rates[OURS], 0), spread(ratios))
        )
    table(
        "Processes at once: entries a second, 500 B",
        ("", "floor, as many processes, /s", "ours, /s", "ours / floor"),
        rows,
    )
    return figures


def _together(team: Sequence[Member], calls: int) -> float:
    for member in team:
        member.order(do="threads", calls=calls, count=1)
    return sum(float(member.answer()["rate"]) for member in team)


def slow_disks(plan: Plan) -> Figures:
    """The same on disks whose sync takes 1, 2 and 5 ms."""
    if not has_compiler():
        print("\nSlow disks: left out, the emulation needs Linux and a C compiler")
        return {}
    figures: Figures = {}
    print("\nSlow disks: every sync takes at least so long; the real one is done within that time")
    calls = max(4, plan.calls // 4)
    for name, slow in SLOW.items():
        with crew(plan.disk, [BARE, OURS], slow=slow) as members:
            floor, ours = rounds(members, plan.rounds, do="latency", calls=calls)
        ratios = _ratios(ours, floor)
        counts = [count for count in plan.threads if count in (2, 64, 256)]
        rows, threads = _throughput(plan, slow, counts)
        more, tasks = _async(plan, slow)
        figures[name] = {"one_call": ratios, "threads": threads, "tasks": tasks}
        one = (f"{spread(_p(floor, 0.5), 0)} µs", f"{spread(_p(ours, 0.5), 0)} µs")
        rows = [("one call, p50", *one, spread(ratios, 3), ""), *rows]
        rows += [(*row, "") for row in more]
        table(f"A sync of {name}", _COLUMNS, rows)
    return figures


def servers(plan: Plan) -> Figures:
    """A call over HTTP beside a bare POST of the same bytes, to the same server on this machine."""
    with (
        server(plan.disk) as url,
        crew(plan.disk, [BARE_POST, OURS_POST], options={"url": url}) as members,
    ):
        bare, ours = members
        rounds(members, 1, do="latency", calls=plan.calls // 4 + 1)  # warm
        floor, posts = rounds(members, plan.rounds, do="latency", calls=plan.calls)
        rows, figures = [], {}
        for count in [count for count in plan.threads if count in (1, 2, 8, 64)]:
            serial, rates = [], []
            for _ in range(plan.rounds):
                few = max(1, plan.calls // 4)
                serial.append(bare.do(do="threads", calls=few, count=1)["rate"])
                calls = max(plan.calls, 25 * count if plan.calls > 10 else count)
                rates.append(ours.do(do="threads", calls=calls, count=count)["rate"])
            ratios = [a / b for a, b in zip(rates, serial, strict=True)]
            figures[str(count)] = {"rate": rates, "serial": serial, "ratio": ratios}
            rows.append((f"{count} threads", spread(serial, 0), spread(rates, 0), spread(ratios)))
    ratios = _ratios(posts, floor)
    one = (f"{spread(_p(floor, 0.5), 0)} µs", f"{spread(_p(posts, 0.5), 0)} µs", spread(ratios))
    table(
        "A server on this machine that syncs each request: entries a second, 500 B",
        ("", "floor, one by one, /s", "ours, /s", "ours / floor"),
        [("one call, p50", *one), *rows],
    )
    return {"one_call": ratios, "threads": figures}


def first_calls(plan: Plan) -> Figures:
    """The first call after the start: it makes the file, and syncs it with its directory."""
    firsts: dict[str, list[float]] = {BARE: [], OURS: []}
    for _ in range(max(3, plan.rounds) if plan.calls > 10 else 1):
        with crew(plan.disk, list(firsts)) as members:
            for member in members:
                firsts[member.name].append(member.first / 1000)
    table(
        "First call of a process, µs (the floor has its file already)",
        ("", "first call"),
        [(name, spread(its, 0)) for name, its in firsts.items()],
    )
    return firsts


def rotation(plan: Plan) -> Figures:
    """What it costs that a session ends and another begins."""
    limit = 50_000
    with (
        crew(plan.disk / "never", [OURS]) as members,
        crew(plan.disk / "often", [OURS], options={"max_bytes": limit}) as others,
    ):
        never, often = rounds([*members, *others], plan.rounds, do="latency", calls=plan.calls)
    figures = {"never": _p(never, 0.5), "often": _p(often, 0.5), "often_p99": _p(often, 0.99),
               "never_p99": _p(never, 0.99), "ratio": _ratios(often, never)}  # fmt: skip
    table(
        f"Rotation every {limit:,} bytes, µs",
        ("", "p50", "p99", "p50 / without"),
        [
            ("without", spread(figures["never"], 0), spread(figures["never_p99"], 0), ""),
            ("with", spread(figures["often"], 0), spread(figures["often_p99"], 0),
             spread(figures["ratio"])),
        ],
    )  # fmt: skip
    return figures


def big_files(plan: Plan) -> Figures:
    """A call when the session file is big already, beside one to a small file."""
    steps = [size for size in (2**20, 10 * 2**20, 100 * 2**20, 2**30) if size <= plan.big]
    rows, figures = [], {}
    with crew(plan.disk, [BARE, BARE, OURS, OURS]) as members:
        for member in members:
            member.do(do="grow", size=2**20)
        had = 2**20
        for size in steps:
            for member in (members[1], members[3]):
                member.do(do="grow", size=size - had)
            had = size
            floor, big_floor, small, big = rounds(
                members, plan.rounds, do="latency", calls=plan.calls
            )
            name = f"{size // 2**20:,} MB"
            ratios, floors = _ratios(big, small), _ratios(big_floor, floor)
            figures[name] = {"ours_us": _p(big, 0.5), "ratio": ratios, "floor_ratio": floors}
            rows.append((name, spread(_p(big, 0.5), 0), spread(ratios), spread(floors)))
    table(
        "A session file that is big already: p50 of one call, µs",
        ("file", "ours", "ours / ours at 1 MB", "floor / floor at 1 MB"),
        rows,
    )
    return figures


def full_directory(plan: Plan) -> Figures:
    """A call in a directory with many session files, beside one in an empty directory."""
    with crew(plan.disk / "empty", [OURS]) as members, crew(plan.disk / "full", [OURS]) as others:
        where = plan.disk / "full" / "crew" / "0" / "audit"
        for number in range(plan.files):
            (where / f"audit-20260101-{number:020}.ndjson").write_bytes(b"{}\n")
        empty, full = rounds([*members, *others], plan.rounds, do="latency", calls=plan.calls)
    ratios = _ratios(full, empty)
    table(
        f"A directory with {plan.files:,} session files: p50 of one call, µs",
        ("empty", "full", "full / empty"),
        [(spread(_p(empty, 0.5), 0), spread(_p(full, 0.5), 0), spread(ratios))],
    )
    return {"ratio": ratios}


SECTIONS: dict[str, Callable[[Plan], Figures]] = {
    section.__name__: section
    for section in (
        one_call, sizes, processor, many_threads, many_tasks, many_processes, slow_disks,
        servers, first_calls, rotation, big_files, full_directory,
    )
}  # fmt: skip
