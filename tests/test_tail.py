"""The newest entries, and those that come: from several processes, across rotation."""

from __future__ import annotations

import gzip
import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reading import recorded, session_files
from running import HANG, environment
from terminal import run, start

from structlog_audit import AuditConfigurationError, AuditHandler, follow
from structlog_audit.follow import Tail
from structlog_audit.reader import Problem, entries
from structlog_audit.selection import select

pytest.importorskip("click", reason="the command line is an extra")

Make = Callable[..., AuditHandler]


def last(directory: Path, count: int, **query: Any) -> list[bytes]:
    return [entry.line for entry in Tail(directory, select(**query)).last(count)]


@pytest.mark.parametrize("count", [0, 1, 10, 100, 10_000])
@pytest.mark.parametrize(
    "query",
    [{}, {"company": "acme"}, {"until": "2025-01-09"}, {"ip": "10.3.0.0/16"}, {"own": True}],
)
def test_the_last_entries_of_all_sessions_are_shown_in_order_of_time(
    month: Path, count: int, query: dict[str, Any]
) -> None:
    """The same as the end of all entries in order of time."""
    whole = [entry.line for entry in entries(month, in_time_order=True, **query)]
    found = last(month, count, **query)
    assert len(found) == min(count, len(whole))
    assert [json.loads(line)["time"] for line in found] == [
        json.loads(line)["time"] for line in whole[len(whole) - len(found) :]
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("block", [1, 10, 333, 4096])
def test_files_are_read_from_their_ends_in_pieces_of_any_size(
    month: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines are longer than the pieces, or begin where one does."""
    path = session_files(month)[0]
    whole = path.read_bytes()
    expected = list(reversed(whole.splitlines()))
    monkeypatch.setattr(follow, "BLOCK", block)
    found = list(follow._backwards(str(path), len(whole)))
    assert [line for _, line in found] == expected
    assert all(whole[at : at + len(line)] == line for at, line in found)
    torn = list(follow._backwards(str(path), len(whole) - 5))
    assert [line for _, line in torn] == expected[1:]
    assert not list(follow._backwards(str(path), 5))


def looks(count: int) -> Callable[[], bool]:
    """Return what stops after so many looks."""
    numbers = itertools.count(1)
    return lambda: next(numbers) > count


def come(tail: Tail, looks_at: int = 1) -> list[str]:
    """Return the actions of what has come."""
    return [entry.action for entry in tail.follow(looks(looks_at))]


def record(handler: AuditHandler, *actions: str) -> None:
    for action in actions:
        handler.record({"action": action})


def test_what_comes_is_shown_once(make_handler: Make, audit_dir: Path) -> None:
    """In old files, in new ones, and behind the last entries that were shown."""
    one, two = make_handler(), make_handler()
    record(one, "A", "B")
    tail = Tail(audit_dir, select())
    assert [entry.action for entry in tail.last(1)] == ["B"]
    record(one, "C")
    record(two, "D")
    assert come(tail) == ["C", "D"]
    assert come(tail) == []
    one.reopen()
    record(one, "E")
    record(two, "F")
    one.close()
    record(one, "G")
    assert come(tail) == ["E", "F", "G"]
    assert come(tail) == []


def test_several_files_that_have_grown_are_shown_in_order_of_time(
    make_handler: Make, audit_dir: Path
) -> None:
    """Not one file after the other."""
    handlers = [make_handler() for _ in range(3)]
    tail = Tail(audit_dir, select(), may_be_empty=True) if audit_dir.mkdir() is None else None
    assert tail is not None
    assert tail.last(10) == []
    for number in range(12):
        record(handlers[number % 3], f"A{number:02}")
    assert come(tail) == [f"A{number:02}" for number in range(12)]


def test_the_filters_apply_to_what_comes(handler: AuditHandler, audit_dir: Path) -> None:
    """As they do in a search."""
    record(handler, "A")
    tail = Tail(audit_dir, select(company="acme", action="Invoice*"))
    assert tail.last(10) == []
    for company, action in [("acme", "InvoicePay"), ("acme", "Login"), ("other", "InvoicePay")]:
        handler.record({"action": action, "company_id": company})
    assert come(tail) == ["InvoicePay"]


def test_a_line_that_is_half_written_is_shown_when_it_is_whole(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """And not in two halves."""
    record(handler, "A", "B")
    (path,) = session_files(audit_dir)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    problems: list[Problem] = []
    tail = Tail(audit_dir, select(), problems.append)
    assert [entry.action for entry in tail.last(10)] == ["A"]
    assert come(tail) == []
    path.write_bytes(whole[:-1])
    assert come(tail) == []
    path.write_bytes(whole)
    assert come(tail) == ["B"]
    assert not problems


def test_a_file_that_is_compressed_is_read_on_in_its_copy(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """From where it was; and nothing of it comes twice."""
    record(handler, "A")
    tail = Tail(audit_dir, select())
    tail.last(1)
    record(handler, "B")
    (path,) = session_files(audit_dir)
    Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert come(tail) == ["B"]
    assert come(tail) == []


def test_files_that_vanish_are_no_problem(make_handler: Make, audit_dir: Path) -> None:
    """They are pruned; the others go on, and so does the directory when it is back."""
    one, two = make_handler(), make_handler()
    record(one, "A")
    record(two, "B")
    problems: list[Problem] = []
    tail = Tail(audit_dir, select(), problems.append)
    tail.last(1)
    first = next(entries(audit_dir, action="A")).file
    Path(first).unlink()
    record(two, "C")
    assert come(tail) == ["C"]
    moved = audit_dir.rename(audit_dir.with_name("elsewhere"))
    assert come(tail) == []
    moved.rename(audit_dir)
    record(two, "D")
    assert come(tail) == ["D"]
    assert not problems


def test_a_file_that_was_cut_and_foreign_lines_are_reported(
    make_handler: Make, audit_dir: Path
) -> None:
    """The first is not read again from its beginning; the others do not stop anything."""
    one, two = make_handler(), make_handler()
    record(one, "A", "B")
    record(two, "C")
    problems: list[Problem] = []
    tail = Tail(audit_dir, select(), problems.append)
    tail.last(1)
    path = Path(next(entries(audit_dir, action="A")).file)
    path.write_bytes(path.read_bytes()[:100])
    other = Path(next(entries(audit_dir, action="C")).file)
    with other.open("ab") as file:
        file.write(b"no JSON\n")
    assert come(tail, 2) == []
    assert sorted(problem.file for problem in problems) == sorted([str(path), str(other)])


def test_standard_input_has_no_end_to_look_at(tmp_path: Path) -> None:
    """It is wrong use, as is a path that does not exist."""
    with pytest.raises(AuditConfigurationError):
        Tail("-", select())
    with pytest.raises(AuditConfigurationError):
        Tail(tmp_path / "x", select())


WRITER = """
    import sys
    from structlog_audit import AuditHandler, FileSink

    directory, name = sys.argv[1:]
    handler = AuditHandler(FileSink(directory), app=name, max_bytes=6_000)
    for number in range(100):
        handler.record({"action": f"A{number}"})
    handler.close()
"""


def test_three_processes_are_followed_across_rotation(tmp_path: Path) -> None:
    """Nothing is missed, nothing comes twice, and each process's entries come in its order."""
    directory = tmp_path / "audit"
    directory.mkdir()
    writer = tmp_path / "writer.py"
    writer.write_text("\n".join(line[4:] for line in WRITER.splitlines()))
    with start("tail", "-f", "-n", "500", "--json", directory) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        writers = [
            subprocess.Popen([sys.executable, str(writer), str(directory), f"p{number}"],
                             env=environment()) for number in range(3)
        ]  # fmt: skip
        watch = threading.Timer(HANG, process.kill)
        watch.start()
        came = [json.loads(process.stdout.readline()) for _ in range(300)]
        watch.cancel()
        assert [each.wait(HANG) for each in writers] == [0, 0, 0]
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG) == 130
        assert process.stdout.read() == b""
        assert process.stderr.read() == b""
    for number in range(3):
        ours = [entry["action"] for entry in came if entry["app"] == f"p{number}"]
        assert ours == [f"A{n}" for n in range(100)]
    key = lambda entry: (entry["session"], entry["sequence"])  # noqa: E731
    assert sorted(came, key=key) == sorted(recorded(directory), key=key)
    assert len(session_files(directory)) > 9


def test_a_closed_pipe_ends_it_without_a_word(handler: AuditHandler, audit_dir: Path) -> None:
    """When the next entry comes."""
    record(handler, "A")
    with start("tail", "-f", audit_dir) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"A" in process.stdout.readline()
        process.stdout.close()
        record(handler, "B")
        assert process.wait(HANG) == 141
        assert process.stderr.read() == b""


def test_the_command_shows_each_entry_as_a_row(handler: AuditHandler, audit_dir: Path) -> None:
    """A Begin is not joined: its outcome may take its time."""
    for event in ("Begin", "Complete"):
        handler.record({"action": "A", "operation_id": "o", "user_id": "u"}, event)  # type: ignore[arg-type]
    done = run("tail", audit_dir, "-n", "2")
    assert [line.split()[4] for line in done.stdout.splitlines()] == ["Begin", "Complete"]
    assert (done.returncode, done.stderr) == (0, "")
    assert run("tail", audit_dir, "--user", "x").returncode == 1
