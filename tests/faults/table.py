"""The table: every system call on the way to the disk, and what can become of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from .checker import File, check_run, check_trace, read_files, read_journal_file
from .runner import JOURNAL, PACKAGE, Call, Run, run_traced
from .verdict import check_verdict

CALLS = 6
HARD = ("EIO", "ENOSPC", "EDQUOT")
FAULTS = (*HARD, "EINTR", "SIGKILL")
ERRNO = {"EIO": 5, "ENOSPC": 28, "EDQUOT": 122}
STAT = "fstat|newfstatat|l?stat|statx"


@dataclass(frozen=True)
class Point:
    """A system call on the way to the disk.

    Args:
        name: what it is for.
        verb: its name, as a pattern: they differ between machines.
        where: what it is about.
        nth: which of the calls that fit, from 1.
        record: which record fails with it, from 0; None if no record may fail.
        persisted: what the error says of the entry.
        by: `descriptor` or `path`, where the verb can have both.
        missing: the directory and its parent are not there yet.
        second: the fourth record begins a second session.
        also: the point whose fault (EIO) leads to this call.
    """

    name: str
    verb: str
    where: str
    nth: int = 1
    record: int | None = None
    persisted: str = "no"
    by: str = ""
    missing: bool = False
    second: bool = False
    also: str = ""

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    def fits(self, call: Call, directory: Path) -> bool:
        """Tell whether a call is one of those meant."""
        places = {
            "directory": str(directory),
            "parent": str(directory.parent),
            "above": str(directory.parent.parent),
            "journal": str(directory / JOURNAL),
        }
        place = call.path == places[self.where] if self.where in places else _is_first(call.path)
        if self.by:
            place = place and bool(call.descriptor) == (self.by == "descriptor")
        return place and re.fullmatch(self.verb, call.name) is not None


def _is_first(path: str) -> bool:
    return path.endswith(f"{'a' * 20}.ndjson")


POINTS = (
    Point("look for the directory", STAT, "directory", by="path"),
    Point("open the parent to sync it", "openat", "parent", record=0),
    Point("sync of the parent of what is there", "fsync", "parent", record=0),
    Point("close of the parent of what is there", "close", "parent", record=0),
    Point("open the directory", "openat", "directory", record=0),
    Point("mode of the directory", STAT, "directory", by="descriptor", record=0),
    Point("create the file", "openat", "file", record=0),
    Point("mode of the file", "fchmod", "file", record=0),
    Point("identity of the file", STAT, "file", by="descriptor", record=0),
    Point("first write", "write", "file", record=0),
    Point("sync of the new file", "fsync", "file", record=0, persisted="unknown"),
    Point("sync of the directory", "fsync", "directory", record=0, persisted="unknown"),
    Point("free space", "f?statfs", "directory"),
    Point("second look at the path", STAT, "file", by="path", nth=1, record=1),
    Point("second write", "write", "file", nth=2, record=1),
    Point("sync of the second write", "fdatasync", "file", nth=1, record=1, persisted="unknown"),
    Point("fourth look at the path", STAT, "file", by="path", nth=3, record=3),
    Point("fourth write", "write", "file", nth=4, record=3),
    Point("sync of the fourth write", "fdatasync", "file", nth=3, record=3, persisted="unknown"),
    Point("last line", "write", "file", nth=CALLS + 1),
    Point("sync of the last line", "fdatasync", "file", nth=CALLS),
    Point("close of the file", "close", "file"),
    Point("close of the directory", "close", "directory", nth=2),
    Point("removal of the file", "unlink(at)?", "file", record=0, also="first write"),
    Point(
        "removal after a sync",
        "unlink(at)?",
        "file",
        record=0,
        persisted="unknown",
        also="sync of the new file",
    ),
    Point(
        "close after a failed sync",
        "close",
        "file",
        record=3,
        persisted="unknown",
        also="sync of the fourth write",
    ),
    Point("close after a failed mode", "close", "file", record=0, also="mode of the file"),
    Point("look for the parent", STAT, "parent", missing=True),
    Point("open the one above", "openat", "above", record=0, missing=True),
    Point("make the parent", "mkdir(at)?", "parent", record=0, missing=True),
    Point("mode of the parent", "f?chmod(at)?", "parent", record=0, missing=True),
    Point("sync of the one above", "fsync", "above", record=0, missing=True),
    Point(
        "removal of the parent",
        "rmdir|unlinkat",
        "parent",
        record=0,
        missing=True,
        also="sync of the one above",
    ),
    Point("close of the one above", "close", "above", record=0, missing=True),
    Point("open the parent", "openat", "parent", record=0, missing=True),
    Point("make the directory", "mkdir(at)?", "directory", record=0, missing=True),
    Point("mode of the made directory", "f?chmod(at)?", "directory", record=0, missing=True),
    Point("sync of the parent", "fsync", "parent", record=0, missing=True),
    Point(
        "removal of the directory",
        "rmdir|unlinkat",
        "directory",
        record=0,
        missing=True,
        also="sync of the parent",
    ),
    Point("close of the parent", "close", "parent", record=0, missing=True),
)
J = "journal"
JOURNAL_POINTS = (
    Point("open the directory for the journal", "openat", "directory", nth=2, record=0),
    Point("open the journal", "openat", J, record=0),
    Point("create the journal", "openat", J, nth=2, record=0),
    Point("mode of the journal", "fchmod", J, record=0),
    Point("identity of the journal", STAT, J, by="descriptor", record=0),
    Point("look at the journal", STAT, J, by="path", record=0),
    Point("lock of the journal", "flock", J, record=0),
    Point("look at the locked journal", STAT, J, by="path", nth=2, record=0),
    Point("size of the journal", STAT, J, by="descriptor", nth=2, record=0),
    Point("first write of the journal", "write", J, record=0),
    Point("sync of the new journal", "fsync", J, record=0),
    Point("sync of the directory for the journal", "fsync", "directory", nth=2, record=0),
    Point("unlock of the journal", "flock", J, nth=2),
    Point("close of the journal", "close", J),
    Point("close of the directory for the journal", "close", "directory"),
    Point(
        "cut of the journal",
        "ftruncate",
        J,
        record=0,
        persisted="unknown",
        also="first write of the journal",
    ),
    Point(
        "cut of the new journal",
        "ftruncate",
        J,
        record=0,
        persisted="unknown",
        also="sync of the new journal",
    ),
    Point(
        "removal of the file for the journal",
        "unlink(at)?",
        "file",
        record=0,
        persisted="unknown",
        also="first write of the journal",
    ),
    Point(
        "sync of that removal",
        "fsync",
        "directory",
        nth=2,
        record=0,
        persisted="unknown",
        also="first write of the journal",
    ),
    # the first session's end: nobody fails with it, and the next session's begin tells of it
    Point("open the journal for an end", "openat", J, nth=3, second=True),
    Point("lock for an end", "flock", J, nth=3, second=True),
    Point("go to the last line", "lseek", J, nth=2, second=True),
    Point("read the last line", "read", J, second=True),
    Point("write of an end", "write", J, nth=2, second=True),
    Point("sync of an end", "fdatasync", J, second=True),
    # the second session's begin
    Point("open the journal again", "openat", J, nth=4, record=3, second=True),
    Point("lock again", "flock", J, nth=5, record=3, second=True),
    Point("read the last line again", "read", J, nth=3, record=3, second=True),
    Point("write of a begin", "write", J, nth=3, record=3, second=True),
    Point("sync of a begin", "fdatasync", J, nth=2, record=3, second=True),
    Point("cut of an end", "ftruncate", J, second=True, also="sync of an end"),
    Point(
        "cut of a begin",
        "ftruncate",
        J,
        record=3,
        persisted="unknown",
        second=True,
        also="sync of a begin",
    ),
    Point("last end", "write", J, nth=4, second=True),
    Point("sync of the last end", "fdatasync", J, nth=3, second=True),
)
NAMED = {point.name: point for point in (*POINTS, *JOURNAL_POINTS)}


@cache
def fault_free(
    missing: bool, also: str = "", package: Path = PACKAGE, *, second: bool = False
) -> tuple[list[Call], Path]:
    """Return the trace of a run without the fault, and its directory."""
    with TemporaryDirectory() as place:
        directory = prepare(Path(place), missing=missing)
        result = run_traced(
            directory, Path(place, "journal"), *_also(also, package), package=package, calls=CALLS,
            **_sessions(second),
        )  # fmt: skip
        if not also:
            assert result.status == 0, result.stderr
            check_run(result)
            assert len(result.acknowledged) == CALLS
        return result.trace, directory


def prepare(place: Path, *, missing: bool = False) -> Path:
    """Return the directory for session files; its parents may be missing, too."""
    place = place.resolve() / "above"
    directory = place / "parent" / "audit"
    (place if missing else directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _sessions(second: bool) -> dict[str, list[int]]:
    return {"reopen": [3]} if second else {}


def _also(name: str, package: Path) -> list[str]:
    return [injection(NAMED[name], "EIO", package)] if name else []


def injection(point: Point, fault: str, package: Path = PACKAGE) -> str:
    """Return strace's expression for a fault at a point, counted in a run without it."""
    trace, directory = fault_free(point.missing, point.also, package, second=point.second)
    fitting = [number for number, call in enumerate(trace) if point.fits(call, directory)]
    assert len(fitting) >= point.nth, f"there is no call for: {point.name}"
    target = trace[fitting[point.nth - 1]]
    before = trace[: fitting[point.nth - 1] + 1]
    when = sum(call.name == target.name for call in before)
    if fault == "SIGKILL":
        what = "signal=SIGKILL"
    elif fault.startswith("short"):
        what = f"retval={fault.removeprefix('short ')}"
    else:
        what = f"error={fault}"
    return f"{target.name}:{what}:when={when}"


def run_case(point: Point, fault: str, place: Path, package: Path = PACKAGE) -> Run:
    """Run the child with a fault at a point, and check all that must hold then."""
    directory = prepare(place, missing=point.missing)
    faults = [injection(point, fault, package), *_also(point.also, package)]
    journal = place / "journal"
    result = run_traced(
        directory, journal, *faults, package=package, calls=CALLS, **_sessions(point.second)
    )
    _check_hit(result, point, fault)
    killed = fault == "SIGKILL"
    exempt = killed or bool(point.also)
    files = check_run(result, may_stay_empty=exempt, may_be_torn=exempt)
    if not killed:
        _check_outcome(result, point, fault)
    check_verdict(result.directory)
    _check_next_start(result, files, place, package)
    check_verdict(result.directory)
    return result


def _check_next_start(run: Run, files: dict[str, File], place: Path, package: Path) -> None:
    """A new process records beside what is there, and syncs what the one before it left."""
    left = {debt for debt in check_trace(run.trace) if debt[1] in (
        str(run.directory.parent), str(run.directory.parent.parent))}  # fmt: skip
    before = {file.path: file.path.read_bytes() for file in files.values()}
    entered = read_journal_file(run.directory).lines
    again = run_traced(
        run.directory, place / "again", package=package, names="m", calls=2, first=100
    )
    assert (again.status, len(again.acknowledged)) == (0, 2), f"no next start: {again.stderr}"
    check_run(again, may_stay_empty=True)
    check_trace(again.trace, frozenset(left))
    assert read_journal_file(run.directory).lines[: len(entered)] == entered
    for path, data in before.items():
        assert path.read_bytes() == data, f"{path.name} was changed by the next start"


def _check_hit(result: Run, point: Point, fault: str) -> None:
    if fault == "SIGKILL":
        assert result.status == -9, f"not killed: {result.status} {result.stderr}"
        return
    assert result.status == 0, result.stderr
    hit = [call for call in result.injected if point.fits(call, result.directory)]
    assert hit, f"the fault was never hit: {result.injected}"


def _check_outcome(result: Run, point: Point, fault: str) -> None:
    """Exactly the call that met the fault failed, and said which error it was."""
    failed = [line["error"] for line in result.errors]
    assert len(result.acknowledged) + len(failed) == CALLS
    assert result.journal[-1].get("closed"), "it was not closed"
    if fault == "EINTR":  # Python repeats most calls (PEP 475), and raises in others
        assert failed in ([], [point.record])
        return
    assert failed == ([] if point.record is None else [point.record])
    for line in result.errors:
        assert line["persisted"] == point.persisted, line["text"]
        if fault in ERRNO and not point.also:
            assert line["errno"] == ERRNO[fault], line["text"]
            assert f"[{fault}]" in line["text"]
    if point.verb != "close":  # strace has not closed it, either
        before, after = result.journal[-1]["descriptors"]
        assert before == after, f"{after - before} descriptors were left open"
    assert not any(file.tail for file in read_files(result.directory).values()) or failed
