"""The table of faults: every system call on the way to the disk, broken from outside.

Not in the table: a call that was done and reported as failed, but for the syncs. strace replaces a
call and cannot do both; for the syncs a wrapper inside the child does it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faults.checker import check_run, read_files
from faults.runner import JOURNAL, Call, Run, needs, run, run_traced
from faults.table import CALLS, FAULTS, NAMED, POINTS, Point, fault_free, prepare, run_case

strace = pytest.mark.fault


@strace
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_what_was_acknowledged_is_whole_and_what_failed_raised(
    point: Point, fault: str, tmp_path: Path
) -> None:
    """One system call fails, or the process dies there; the promise holds, the next start works."""
    run_case(point, fault, tmp_path)


@strace
@pytest.mark.parametrize("taken", [0, 1, 100])
@pytest.mark.parametrize("name", ["first write", "second write", "fourth write"])
def test_a_short_write_ends_the_session(name: str, taken: int, tmp_path: Path) -> None:
    """The kernel takes fewer bytes than it was given; the call raises, the rest never follows."""
    run_case(NAMED[name], f"short {taken}", tmp_path)


@strace
@pytest.mark.parametrize(
    ("verb", "when", "record"), [("fsync", 2, 0), ("fsync", 3, 0), ("fdatasync", 3, 3)]
)
def test_a_sync_that_was_done_and_reported_as_failed_counts_as_failed(
    verb: str, when: int, record: int, tmp_path: Path
) -> None:
    """The entry may exist, its caller is told that it failed, and nobody writes it again."""
    directory = prepare(tmp_path)
    result = run_traced(directory, tmp_path / "journal", calls=CALLS, pretend=[verb, when])
    assert [(line["error"], line["persisted"]) for line in result.errors] == [(record, "unknown")]
    assert len(result.acknowledged) == CALLS - 1
    check_run(result)


@strace
def test_a_new_file_and_its_directory_are_synced_before_the_first_acknowledgement() -> None:
    """The order of calls is the one that a crash cannot spoil, up to the first receipt.

    What the journal says is durable stands in a file that is.
    """
    trace, directory = fault_free(missing=False)
    assert _verbs(trace, directory)[:10] == [
        "fsync parent", "openat file", "write file", "fsync file", "fsync directory",
        "openat journal", "write journal", "fsync journal", "fsync directory", "receipt",
    ]  # fmt: skip


@strace
def test_each_later_entry_is_synced_before_its_acknowledgement() -> None:
    """One write and one fdatasync a call, and nothing else that changes a file; the end as well."""
    trace, directory = fault_free(missing=False)
    later = _verbs(trace, directory)[10:]
    assert later == ["write file", "fdatasync file", "receipt"] * (CALLS - 1) + [
        "write file", "fdatasync file", "write journal", "fdatasync journal",
    ]  # fmt: skip


@strace
def test_each_directory_that_was_made_is_synced_in_its_parent() -> None:
    """The names of new directories are durable before anything is acknowledged below them."""
    trace, directory = fault_free(missing=True)
    verbs = _verbs(trace, directory)
    made = [verb for verb in verbs if verb.startswith("mkdir")]
    assert made == ["mkdir parent", "mkdir directory"]
    assert "fsync above" in verbs[verbs.index(made[0]) : verbs.index("receipt")]
    assert "fsync parent" in verbs[verbs.index(made[1]) : verbs.index("receipt")]


@strace
def test_a_file_is_created_exclusively_for_appending_and_for_its_owner() -> None:
    """The flags refuse a file or link that is there, and keep the descriptor to the process."""
    trace, directory = fault_free(missing=False)
    session, journal = (call for call in trace if "O_CREAT" in call.arguments)
    flags = {"O_CREAT", "O_EXCL", "O_APPEND", "O_NOFOLLOW", "O_CLOEXEC"}
    for created, access in ((session, {"O_WRONLY"}), (journal, {"O_RDWR", "O_NONBLOCK"})):
        assert set(re.search(r"O_[A-Z_|O]+", created.arguments)[0].split("|")) == flags | access
        assert created.arguments.endswith(", 0600")
        assert created.path.startswith(f"{directory}/")


def _verbs(trace: list[Call], directory: Path) -> list[str]:
    """Return what changes or syncs something, and the receipts, in order."""
    names = {str(directory): "directory", str(directory.parent): "parent"}
    names[str(directory.parent.parent)] = "above"
    names[str(directory / JOURNAL)] = "journal"
    verbs = []
    for call in trace:
        if call.name == "pwrite64":
            verbs += ["receipt"] if '"{\\"ok\\"' in call.arguments else []
        elif call.name.startswith(("write", "fsync", "fdatasync", "mkdir")) or (
            "O_CREAT" in call.arguments
        ):
            assert not call.failed, f"failed without a fault: {call}"
            verbs.append(f"{call.name.removesuffix('at') if call.name == 'mkdirat' else call.name}"
                         f" {names.get(call.path, 'file')}")  # fmt: skip
    return verbs


def _run_with_libfiu(tmp_path: Path, enable: str, calls: int) -> Run:
    """Run the child with libfiu between it and the system; it hits every descriptor."""
    needs("fiu-run")
    before = ("fiu-run", "-x", "-c", enable)
    directory = tmp_path / "audit"
    result = run(directory, tmp_path / "journal", before=before, calls=calls)
    assert result.status == 0, result.stderr
    assert result.errors, "the fault was never hit"
    check_run(result, may_lack_the_end=True)
    again = run(directory, tmp_path / "again", calls=2, first=1000)
    assert len(again.acknowledged) == 2
    return result


@strace
@pytest.mark.parametrize(
    ("name", "errno"),
    [
        ("posix/io/rw/write", 28),
        ("posix/io/sync/fsync", 5),
        ("posix/io/sync/fdatasync", 122),
    ],
)
def test_a_library_that_fails_once_costs_one_call(name: str, errno: int, tmp_path: Path) -> None:
    """libfiu reports one error from the C library; that call raises it, all others succeed."""
    result = _run_with_libfiu(tmp_path, f"enable name={name},failinfo={errno},onetime", calls=6)
    assert [line["errno"] for line in result.errors] == [errno]
    assert len(result.acknowledged) == 5


@strace
def test_writes_that_are_cut_at_random_leave_torn_tails_at_ends_only(tmp_path: Path) -> None:
    """Three writes in ten stop somewhere; what is torn is never continued."""
    enable = "enable_random name=posix/io/rw/write/reduce,failinfo=1,probability=0.3"
    result = _run_with_libfiu(tmp_path, enable, calls=80)
    assert result.acknowledged
    tails = [file for file in read_files(result.directory).values() if file.tail]
    assert tails, "no write was cut"


@strace
def test_syncs_that_fail_at_random_never_acknowledge(tmp_path: Path) -> None:
    """Three syncs in ten fail; each costs a session and a call, and no acknowledged entry."""
    enable = "enable_random name=posix/io/sync/fdatasync,failinfo=5,probability=0.3"
    result = _run_with_libfiu(tmp_path, enable, calls=80)
    of_journal = [line for line in result.errors if JOURNAL in line["text"]]
    of_session = [line for line in result.errors if JOURNAL not in line["text"]]
    assert {line["persisted"] for line in of_session} == {"unknown"}
    assert {line["persisted"] for line in of_journal} <= {"no"}  # it was cut, the file removed
    assert result.acknowledged
