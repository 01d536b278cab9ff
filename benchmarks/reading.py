"""Searching a log beside grep, jq and DuckDB, over the same files.

    python -m benchmarks.reading --directory DIR [--megabytes N] [--rounds N]

DIR gets session files of 64 MiB of events of Kubernetes servers, each an operation, with a journal;
they are kept, and used again. The files are read once before anything is measured, so all find
them in memory, as far as it reaches. Each command has a process of its own, in turn.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from time import perf_counter

from benchmarks.entries import MIX, SEED, entries
from benchmarks.report import header
from structlog_audit.chain import line_hash, link
from structlog_audit.entry import Head, Kind, Renderer
from structlog_audit.journal import Journal
from structlog_audit.session import new_session_id

MB = 10**6
SESSION = 64 * 2**20
COMPANIES = ("acme", "globex", "initech", "umbrella")
RARE = "user-who-came-once"
FIRST = datetime(2026, 1, 1, 6, tzinfo=timezone.utc)


class Maker:
    """Makes the lines of a service, session by session; the rare user comes in the middle."""

    def __init__(self, size: int) -> None:
        self._chance = random.Random(SEED)
        self._renderer = Renderer(app="billing")
        self._events = entries(MIX)
        self._size = size
        self._made = 0
        self._rare = size // 2
        self._now = FIRST

    def session(self, identity: str) -> Iterator[bytes]:
        """Return the lines of one session."""
        sequence, prev, length = 0, "", 0
        while length < SESSION and self._made < self._size:
            for head in self._operation():
                sequence += 1
                line = link(head.text, identity, sequence, prev)
                prev, length = line_hash(line), length + len(line) + 1
                self._made += len(line) + 1
                yield line + b"\n"

    def _operation(self) -> Iterator[Head]:
        company = self._chance.choice(COMPANIES)
        user = f"{company}-user-{self._chance.randrange(500)}"
        if self._made >= self._rare:
            user, self._rare = RARE, 2 * self._size
        fields = {
            "user_id": user,
            "company_id": company,
            "client_ip": f"10.{COMPANIES.index(company)}.{self._chance.randrange(250)}.7",
            "type": "REST",
            "operation_id": f"{self._chance.getrandbits(64):016x}",
        }
        event = self._chance.choice(self._events)
        outcome: Kind = "Fail" if self._chance.random() < 0.02 else "Complete"
        yield self._head({**event, **fields}, "Begin")
        status = 500 if outcome == "Fail" else 200
        yield self._head({**fields, "action": event["action"], "data": {"status": status}}, outcome)

    def _head(self, entry: dict[str, object], kind: Kind) -> Head:
        self._now += timedelta(milliseconds=700)
        time = self._now.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
        return self._renderer.render(entry, kind, time=time)

    @property
    def day(self) -> str:
        """The day that it is in the log."""
        return self._now.strftime("%Y%m%d")

    @property
    def is_done(self) -> bool:
        """Whether the log has its size."""
        return self._made >= self._size


def make(directory: Path, megabytes: int) -> list[Path]:
    """Make the log, unless it is there; return its files."""
    directory.mkdir(parents=True, exist_ok=True)
    if not list(directory.glob("audit-*.ndjson")):
        maker, journal = Maker(megabytes * MB), Journal(str(directory), "audit")
        while not maker.is_done:
            identity = new_session_id()
            path = directory / f"audit-{maker.day}-{identity}.ndjson"
            with path.open("wb") as file:
                file.writelines(maker.session(identity))
            journal.append({"event": "Open", "file": path.name, "session": identity})
    return sorted(directory.glob("audit-*-*.ndjson"))


@dataclass(frozen=True, slots=True)
class Contender:
    """A command.

    Attributes:
        name: as it is shown.
        command: what is run.
        rounds: how often at most; some take minutes.
    """

    name: str
    command: tuple[str, ...]
    rounds: int = 99


@dataclass(frozen=True, slots=True)
class Run:
    """What one run took.

    Attributes:
        seconds: from start to end.
        memory: the most that was resident, in MiB; never less than ours, which begins it.
        lines: lines that were printed.
    """

    seconds: float
    memory: float
    lines: int


def ours(directory: Path, *arguments: str) -> tuple[str, ...]:
    """Return our command."""
    return (sys.executable, "-m", "structlog_audit", "search", str(directory), *arguments)


def duckdb(directory: Path, where: str) -> tuple[str, ...]:
    """Return a query of DuckDB, which prints as many lines as there are answers."""
    code = (
        "import duckdb, sys\n"
        "found = duckdb.sql(f\"SELECT time, userId, action FROM read_json('{sys.argv[1]}', "
        "format='newline_delimited', columns={{time: 'VARCHAR', userId: 'VARCHAR', "
        "companyId: 'VARCHAR', action: 'VARCHAR', event: 'VARCHAR'}}) WHERE {sys.argv[2]}\")\n"
        "for row in found.fetchall(): print(*row)"
    )
    return (sys.executable, "-c", code, str(directory / "audit-2*.ndjson"), where)


def tasks(directory: Path, files: Sequence[Path]) -> dict[str, list[Contender]]:
    """Return what is measured."""
    names = tuple(map(str, files))
    rare, common = f'"userId":"{RARE}"', '"companyId":"acme"'
    grep = shutil.which("grep") or "grep"
    jq = (shutil.which("jq") or "jq", "-c")
    failed = '.companyId == "acme" and .event == "Fail"'
    return {
        "a user who came once (2 lines)": [
            Contender("grep -F", (grep, "-hF", rare, *names)),
            Contender("search --json", ours(directory, "--user", RARE, "--json")),
            Contender("search", ours(directory, "--user", RARE)),
            Contender("DuckDB", duckdb(directory, f"userId = '{RARE}'"), 3),
            Contender("jq", (*jq, f'select(.userId == "{RARE}")', *names), 1),
        ],
        "what failed at a company (0.25 % of the lines)": [
            Contender("grep -F | grep -F", (
                "sh", "-c", f"{grep} -hF '\"event\":\"Fail\"' \"$@\" | {grep} -F '{common}'", "sh",
                *names)),
            Contender("search --json",
                      ours(directory, "--company", "acme", "--event", "Fail", "--json")),
            Contender("DuckDB", duckdb(directory, "companyId = 'acme' AND event = 'Fail'"), 3),
            Contender("jq", (*jq, f"select({failed})", *names), 1),
        ],
        "a network (25 % of the lines)": [
            Contender("grep -F", (grep, "-hF", '"clientIpAddress":"10.0.', *names), 3),
            Contender("search --json", ours(directory, "--ip", "10.0.0.0/16", "--json"), 3),
            Contender("search", ours(directory, "--ip", "10.0.0.0/16"), 1),
        ],
    }  # fmt: skip


def measure(contender: Contender) -> Run:
    """Run a command; count what it prints."""
    start = perf_counter()
    process = subprocess.Popen(contender.command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    output = functools.partial(os.read, process.stdout.fileno(), MB)
    lines = sum(chunk.count(b"\n") for chunk in iter(output, b""))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    seconds = perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{contender.name} failed")
    return Run(seconds, usage.ru_maxrss / 1024, lines)


def compare(title: str, contenders: Sequence[Contender], rounds: int) -> None:
    """Measure in turns; print medians beside the first contender's."""
    runs: dict[str, list[Run]] = {each.name: [] for each in contenders}
    for number in range(rounds):
        for each in contenders:
            if number < each.rounds:
                runs[each.name].append(measure(each))
    print(f"\n{title}")
    print(f"  {'':20}{'median, s':>12}{'least':>8}{'most':>8}{'times':>8}{'MiB':>8}{'lines':>10}")
    floor = statistics.median(run.seconds for run in runs[contenders[0].name])
    for name, found in runs.items():
        seconds = [run.seconds for run in found]
        median = statistics.median(seconds)
        print(
            f"  {name:20}{median:>12.2f}{min(seconds):>8.2f}{max(seconds):>8.2f}"
            f"{median / floor:>8.2f}{max(run.memory for run in found):>8.0f}{found[0].lines:>10,}"
        )


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description="Searching beside grep, jq and DuckDB.")
    parser.add_argument("--directory", type=Path, required=True, help="for the log; it is kept")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the questions, from 0")
    given = parser.parse_args()
    files = make(given.directory, given.megabytes)
    for name, text in header(given.directory).items():
        print(f"{name:8}{text}")
    size = sum(path.stat().st_size for path in files)
    print(f"log     {len(files)} files, {size / MB:,.0f} MB; {given.rounds} rounds, medians")
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    for number, (title, contenders) in enumerate(tasks(given.directory, files).items()):
        if given.only is None or number in given.only:
            compare(title, contenders, given.rounds)


if __name__ == "__main__":
    main()
