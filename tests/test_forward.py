"""The forwarder: every line arrives, in order, byte for byte, whatever happens on the way."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from doubles import BrokenSink, HangingSink, refusal
from reading import session_files
from running import HANG, environment, eventually, in_child, run_well
from servers.processes import SeqServer

from structlog_audit import (
    AuditConfigurationError,
    AuditHandler,
    FileSink,
    LineRefused,
    SeqSink,
    SessionOver,
    SinkError,
    cursor,
    forward,
    spool,
)
from structlog_audit.chain import line_hash, link
from structlog_audit.forward import Forwarder, Problem, is_forwarded, lag_of
from structlog_audit.sinks import _durable
from structlog_audit.testing import FailingSink, MemorySink

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes, links and signals")
Lines = dict[str, list[bytes]]


class Receiver(MemorySink):
    """Keeps lines in memory, and what it was asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[bytes]] = []
        self.calls: list[str] = []

    def __repr__(self) -> str:
        return "Receiver()"

    def open(self, session: str) -> None:
        self.calls.append(f"open {session}")

    def write(self, lines: Sequence[bytes]) -> None:
        super().write(lines)
        self.batches.append(list(lines))

    def close(self) -> None:
        self.calls.append("close")


class Picky(Receiver):
    """Refuses lines that contain something, as a server with a limit does."""

    def __init__(self, refused: bytes | None) -> None:
        super().__init__()
        self.refused = refused

    def write(self, lines: Sequence[bytes]) -> None:
        for count, line in enumerate(lines):
            if self.refused is not None and self.refused in line:
                if count:
                    super().write(lines[:count])
                raise LineRefused("it is too long", delivered=count)
        super().write(lines)


@pytest.fixture
def record(audit_dir: Path) -> Callable[..., Path]:
    """Record a session with so many entries of its own; return its file."""

    def record(entries: int = 3, **fields: object) -> Path:
        handler = AuditHandler(FileSink(audit_dir))
        for number in range(entries):
            handler.record({"action": "Forward", "number": number, **fields})
        path = handler.sink.path  # type: ignore[attr-defined]
        handler.close()
        return Path(path)

    return record


Record = Callable[..., Path]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once while a sink fails."""
    monkeypatch.setattr(forward, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(forward, "LONGEST_PAUSE", 0.01)


@pytest.fixture
def held_for_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at files that are held again with every look."""
    monkeypatch.setattr(cursor, "HELD_PAUSE", 0.0)


@contextlib.contextmanager
def following(forwarder: Forwarder) -> Iterator[None]:
    """Follow in a thread for the length of a block."""
    forwarder.start(interval=0.001)
    try:
        yield
    finally:
        assert forwarder.stop(HANG)


def lines_of(path: Path) -> list[bytes]:
    """Return the whole lines of a file."""
    return [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]]


def written(directory: Path) -> Lines:
    """Return the whole lines of each session file."""
    return {path.name[-27:-7]: lines_of(path) for path in session_files(directory)}


def arrived(lines: Iterable[bytes]) -> Lines:
    """Return the lines of each session as they arrived, without repeats.

    A repeat has the very bytes of the first; without repeats, they came in order.
    """
    known: defaultdict[str, dict[int, bytes]] = defaultdict(dict)
    for line in lines:
        entry = json.loads(line)
        first = known[entry["session"]].setdefault(entry["sequence"], line)
        assert first == line, "two lines of one identity"
    for session in known.values():
        assert list(session) == list(range(1, len(session) + 1)), "out of order"
    return {session: list(found.values()) for session, found in known.items()}


def cursor_of(path: Path) -> Path:
    return path.parent / ".forward" / f"{path.name}.json"


def kinds(problems: Iterable[Problem]) -> list[str]:
    return [problem.kind for problem in problems]


# what is shipped


def test_every_line_is_shipped_byte_for_byte(audit_dir: Path, record: Record) -> None:
    """Three sessions, each with its Begin and its Complete, in their order."""
    for entries in (1, 5, 9):
        record(entries, text="naïve \u2028 “quotes” \x00 \ud800")
    sink = Receiver()

    progress = Forwarder(audit_dir, sink).run_once()

    assert arrived(sink.lines) == written(audit_dir)
    assert len(sink.lines) == progress.entries == 1 + 5 + 9 + 3 * 2
    assert progress.bytes == sum(map(len, sink.lines))
    assert (progress.files, progress.problems) == (3, ())


def test_a_second_run_ships_nothing_again(audit_dir: Path, record: Record) -> None:
    """Cursors are on the disk: another forwarder goes on where the first one stopped."""
    record()
    Forwarder(audit_dir, Receiver()).run_once()
    sink = Receiver()

    progress = Forwarder(audit_dir, sink).run_once()

    assert sink.lines == []
    assert (progress.files, progress.entries, progress.bytes) == (0, 0, 0)


def test_what_is_written_later_is_shipped_later(handler: AuditHandler, audit_dir: Path) -> None:
    """A file that is still being written is followed."""
    sink = Receiver()
    forwarder = Forwarder(audit_dir, sink)
    for number in range(3):
        handler.record({"action": "Later", "number": number})
        forwarder.run_once()

    assert [len(batch) for batch in sink.batches] == [2, 1, 1]
    assert arrived(sink.lines) == written(audit_dir)


def test_files_are_shipped_in_order_of_date_then_of_age(audit_dir: Path, record: Record) -> None:
    """The date in the name comes first, then the time of the file."""
    paths = [record(1) for _ in range(3)]
    sessions = [path.name[-27:-7] for path in paths]
    paths[0].rename(audit_dir / f"audit-20990101-{sessions[0]}.ndjson")
    for path, age in ((paths[1], 1_000), (paths[2], 2_000)):
        os.utime(path, (age, 4_000_000_000 - age))
    if hasattr(os.stat(audit_dir), "st_birthtime"):
        pytest.skip("files have a time of birth here, which cannot be set")
    sink = Receiver()

    Forwarder(audit_dir, sink).run_once()

    assert list(arrived(sink.lines)) == [sessions[2], sessions[1], sessions[0]]


def test_batches_are_bounded(audit_dir: Path, record: Record) -> None:
    """By bytes and by lines; a line that is longer than a batch goes alone."""
    path = record(20)
    record(1, text="x" * 9_000)
    size = max(map(len, lines_of(path)))
    sink = Receiver()

    Forwarder(audit_dir, sink, batch_lines=4, batch_bytes=3 * size).run_once()

    assert arrived(sink.lines) == written(audit_dir)
    assert max(map(len, sink.batches)) == 3
    long = [batch for batch in sink.batches if sum(map(len, batch)) > 3 * size]
    assert [len(batch) for batch in long] == [1]
    Forwarder(audit_dir, again := Receiver(), target="again", batch_lines=2).run_once()
    assert max(map(len, again.batches)) == 2


def test_the_sink_is_opened_with_the_session_of_each_file(audit_dir: Path, record: Record) -> None:
    """Every open has its close, the last one included."""
    sessions = {record().name[-27:-7] for _ in range(2)}
    sink = Receiver()

    Forwarder(audit_dir, sink, batch_lines=1).run_once()

    opens, closes = sink.calls[::2], sink.calls[1::2]
    assert {call.removeprefix("open ") for call in opens} == sessions
    assert closes == ["close", "close"]


def test_only_session_files_of_the_prefix_are_shipped(audit_dir: Path, record: Record) -> None:
    """Other names in the directory are nobody's business."""
    path = record()
    session = path.name[-27:-7]
    for name in (
        f"audit-shop-20260101-{session}.ndjson",
        f"audit-20260101-{session}.ndjson.gz",
        f"audit-2026011-{session}.ndjson",
        f"audit-20260101-{session[:-1]}.ndjson",
        f"audit-20260101-{session}.ndjson\n",
        "notes.txt",
    ):
        (audit_dir / name).write_bytes(b"no entry\n")
    sink = Receiver()

    progress = Forwarder(audit_dir, sink).run_once()

    assert progress.problems == ()
    assert sink.lines == lines_of(path)


def test_session_files_are_left_as_they_are(audit_dir: Path, record: Record) -> None:
    """Nothing but the forwarder's own directory is made or changed."""
    path = record()
    journal = audit_dir / "audit-journal.ndjson"

    def state() -> list[tuple[bytes, int, int]]:
        return [
            (item.read_bytes(), item.stat().st_mtime_ns, stat.S_IMODE(item.stat().st_mode))
            for item in (path, journal)
        ]

    before = state()

    Forwarder(audit_dir, Receiver()).run_once()

    assert state() == before
    assert {item.name for item in audit_dir.iterdir()} == {path.name, journal.name, ".forward"}


def test_progress_tells_bytes_done_and_in_all(audit_dir: Path, record: Record) -> None:
    """For a bar: from nothing to all of it, never back."""
    total = sum(record().stat().st_size for _ in range(3))
    told: list[tuple[int, int]] = []

    Forwarder(audit_dir, Receiver(), batch_lines=2).run_once(lambda *part: told.append(part))

    assert {part[1] for part in told} == {total}
    assert [part[0] for part in told] == sorted({part[0] for part in told})
    assert (told[0], told[-1]) == ((0, total), (total, total))


# writers and kills

WRITER = """
    import json, sys
    from structlog_audit import AuditHandler, FileSink

    handler = AuditHandler(FileSink(sys.argv[1]), max_bytes=4_000)
    for number in range(int(sys.argv[2])):
        receipt = handler.record({"action": "Write", "text": "x" * (number % 700)})
        print(json.dumps([receipt.session, receipt.sequence, receipt.hash]), flush=True)
    handler.close()
"""


@contextlib.contextmanager
def writers(directory: Path, processes: int, entries: int) -> Iterator[list[Any]]:
    """Let other processes record and rotate; what they acknowledged is there behind the block."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(directory), str(entries)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
        for _ in range(processes)
    ]
    acknowledged: list[Any] = []
    try:
        yield acknowledged
        for process in started:
            output, _ = process.communicate(timeout=HANG)
            assert process.returncode == 0
            acknowledged += map(json.loads, output.splitlines())
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def check_acknowledged(acknowledged: list[Any], received: Lines) -> None:
    """Make sure that every receipt has its line at the receiver."""
    for session, sequence, digest in acknowledged:
        assert line_hash(received[session][sequence - 1][:-1]) == digest


def test_ten_processes_that_write_and_rotate_are_followed(audit_dir: Path) -> None:
    """All that they acknowledged arrives, once, while they go on."""
    audit_dir.mkdir()
    sink = Receiver()
    forwarder = Forwarder(audit_dir, sink)
    with following(forwarder):
        with writers(audit_dir, 10, 60) as acknowledged:
            eventually(lambda: len(sink.lines) > 10)
        eventually(lambda: forwarder.lag().entries == 0)

    received = arrived(sink.lines)
    assert received == written(audit_dir)
    assert len(sink.lines) == sum(map(len, received.values())), "repeated without need"
    assert len(acknowledged) == 10 * 60
    assert len(received) > 2 * 10, "they did not rotate"
    check_acknowledged(acknowledged, received)


FORWARDER = """
    import os, sys, threading
    from structlog_audit.forward import Forwarder

    class Receiver:
        def __init__(self, directory):
            path = os.path.join(directory, str(os.getpid()))
            self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)

        def __repr__(self):
            return "Receiver()"

        def open(self, session):
            pass

        def write(self, lines):
            data = b"".join(lines)
            assert os.write(self.file, data) == len(data)
            os.fsync(self.file)

        def close(self):
            pass

    forwarder = Forwarder(sys.argv[1], Receiver(sys.argv[2]), batch_lines=7)
    print("ready", flush=True)
    forwarder.follow(threading.Event(), interval=0.001)
"""


@posix
def test_kill_9_in_a_loop_loses_nothing(audit_dir: Path, tmp_path: Path) -> None:
    """A forwarder is killed again and again at any point; repeats have the very same bytes."""
    audit_dir.mkdir()
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    command = [sys.executable, "-c", textwrap.dedent(FORWARDER), str(audit_dir), str(inbox)]
    moments = random.Random(7)
    kills = 0
    with writers(audit_dir, 4, 150) as acknowledged:
        while kills < 15:
            with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                time.sleep(moments.uniform(0, 0.1))
                assert process.poll() is None, "it ended by itself"
                process.kill()
            kills += 1
    last = Receiver()
    Forwarder(audit_dir, last, target="Receiver()").run_once()

    runs = sorted(inbox.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    lines = [line for run in runs for line in lines_of(run)]
    received = arrived([*lines, *last.lines])
    assert received == written(audit_dir)
    assert lines, "nothing was shipped before the kills"
    assert len(lines) + len(last.lines) <= sum(map(len, received.values())) + 7 * kills
    check_acknowledged(acknowledged, received)


@posix
def test_a_server_that_is_killed_again_and_again_gets_everything(
    audit_dir: Path, record: Record, tmp_path: Path
) -> None:
    """Over a real connection, with a sink that retries, too; each event names its line's hash."""
    audit_dir.mkdir()
    told: list[Problem] = []
    with SeqServer(tmp_path) as server:
        sink = SeqSink(server.url, timeout=0.2)
        forwarder = Forwarder(audit_dir, sink, batch_lines=5, on_problem=told.append)
        with following(forwarder):
            with writers(audit_dir, 4, 100):
                eventually(lambda: bool(server.stored_lines()))
                server.kill()
                server.restart()
            for _ in range(3):
                eventually(lambda: forwarder.lag().entries == 0)
                told.clear()
                server.kill()
                record()
                eventually(lambda: bool(told))
                server.restart()
            eventually(lambda: forwarder.lag().entries == 0)
        stored = [event["Hash"] for event in server.stored()]

    lines = [line for session in written(audit_dir).values() for line in session]
    assert set(stored) == {line_hash(line[:-1]) for line in lines}
    assert set(kinds(told)) <= {"failing", "working"}


STEPS = [(_durable, verb) for verb in ("create", "append", "sync", "close", "sync_directory")]


def die_at_a_step(directory: Path, inbox: Path, deadly: int) -> bool:
    """Run a forwarder in a forked child that kills itself at a step; tell whether it got there."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), status
        return status != 0
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            step()
            result = real(*args, **options)
            step()
            return result

        return call

    class Inbox(Receiver):
        def write(self, lines: Sequence[bytes]) -> None:
            with inbox.open("ab") as file:
                file.write(b"".join(lines))

    Inbox.write = around(Inbox.write)  # type: ignore[method-assign]
    for owner, verb in [*STEPS, (os, "replace")]:
        setattr(owner, verb, around(getattr(owner, verb)))
    try:
        Forwarder(directory, Inbox(), batch_lines=3).run_once()
    finally:
        os._exit(0)


@posix
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_kill_9_at_every_step_repeats_one_batch_at_most(
    audit_dir: Path, record: Record, tmp_path: Path
) -> None:
    """Before and after each call on the way from the sink's answer to the durable cursor."""
    record(4)
    record(1)
    whole = written(audit_dir)
    killed = 0
    while True:
        inbox = tmp_path / f"inbox{killed}"
        inbox.touch()
        shutil.rmtree(audit_dir / ".forward", ignore_errors=True)
        if not die_at_a_step(audit_dir, inbox, killed + 1):
            break
        killed += 1
        die_at_a_step(audit_dir, inbox, 0)
        lines = inbox.read_bytes().splitlines(keepends=True)
        assert arrived(lines) == whole
        assert len(lines) <= 9 + 3
        assert not list((audit_dir / ".forward").glob("*.new"))
    assert killed > 40


def test_a_cursor_is_durable_before_the_next_batch(
    audit_dir: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Confirmed, written under another name, synced, renamed, and the name synced."""
    record(4)
    done: list[str] = []

    def noting(owner: Any, verb: str) -> None:
        real = getattr(owner, verb)

        def call(*args: Any, **options: Any) -> Any:
            result = real(*args, **options)
            done.append(verb)
            return result

        monkeypatch.setattr(owner, verb, call)

    sink = Receiver()
    for owner, verb in [*STEPS, (os, "replace"), (sink, "write")]:
        noting(owner, verb)
    Forwarder(audit_dir, sink, batch_lines=3).run_once()

    batches = " ".join(done).split("write ")[1:]
    assert len(batches) == 2
    for batch in batches:
        assert batch.startswith("create append sync close replace sync_directory")


@posix
def test_a_lock_is_free_after_kill_9(audit_dir: Path, record: Record, tmp_path: Path) -> None:
    """Nobody has to clean up."""
    record()
    command = [sys.executable, "-c", textwrap.dedent(FORWARDER), str(audit_dir), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        eventually(lambda: len(list((audit_dir / ".forward").glob("*.json"))) == 1)
        process.kill()

    assert Forwarder(audit_dir, Receiver(), target="Receiver()").run_once().entries == 0


# lines without an end, files that are not what they were


def test_a_torn_tail_is_reported_and_waited_for(audit_dir: Path, record: Record) -> None:
    """Nothing of it is shipped until its newline is there."""
    path = record()
    last = lines_of(path)[-1]
    os.truncate(path, path.stat().st_size - 10)
    sink = Receiver()
    forwarder = Forwarder(audit_dir, sink)

    (problem,) = forwarder.run_once().problems
    assert (problem.kind, problem.file, problem.holds) == ("unfinished", path.name, False)
    assert f"{len(last) - 10} bytes" in problem.reason
    assert len(sink.lines) == 4
    with path.open("ab") as file:
        file.write(last[-10:])
    assert forwarder.run_once().problems == ()
    assert sink.lines[4:] == [last]


def test_a_torn_tail_is_told_when_it_stays(audit_dir: Path, record: Record) -> None:
    """The hook hears of it once, and only if a second look finds it unchanged."""
    path = record()
    os.truncate(path, path.stat().st_size - 10)
    told: list[Problem] = []
    forwarder = Forwarder(audit_dir, Receiver(), on_problem=told.append)

    forwarder.run_once()
    assert told == []
    with following(forwarder):
        eventually(lambda: bool(told))
        again = len(told)
        record()
        eventually(lambda: forwarder.lag().entries == 0)
    assert kinds(told) == ["unfinished"]
    assert again == 1


def replace_file(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)


def rewrite(path: Path) -> None:
    data = path.read_bytes().replace(b"Forward", b"Backward", 1)
    with path.open("r+b") as file:
        file.write(data)


def rewrite_and_continue(path: Path) -> None:
    *lines, last = lines_of(path)
    last = last.replace(b"entries", b"lines__")
    lines += [last, link(b'{"level":35', path.name[-27:-7], 6, line_hash(last[:-1])) + b"\n"]
    with path.open("r+b") as file:
        file.write(b"".join(lines))


def append_a_gap(path: Path) -> None:
    with path.open("ab") as file:
        file.write(lines_of(path)[0])


def append_nonsense(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0\0\0\n")


@pytest.mark.parametrize(
    ("accident", "reason"),
    [
        (lambda path: os.truncate(path, 100), "was cut: it has 100 bytes"),
        (lambda path: path.write_bytes(b""), "was cut: it has 0 bytes"),
        (replace_file, "was replaced"),
        (rewrite, "does not continue the session"),
        (rewrite_and_continue, "does not continue the session"),
        (append_a_gap, "does not continue the session"),
        (append_nonsense, "does not continue the session"),
    ],
    ids=["cut", "emptied", "replaced", "rewritten", "continued", "repeated", "nonsense"],
)
def test_a_file_that_is_not_what_it_was_is_held(
    audit_dir: Path, record: Record, accident: Callable[[Path], None], reason: str
) -> None:
    """It is an alarm for the command and for the doctor; the other files go on."""
    path = record()
    Forwarder(audit_dir, Receiver()).run_once()
    accident(path)
    other = record()
    sink = Receiver()

    (problem,) = Forwarder(audit_dir, sink).run_once().problems

    assert (problem.kind, problem.file, problem.holds) == ("altered", path.name, True)
    assert reason in problem.reason
    assert list(arrived(sink.lines)) == [other.name[-27:-7]]
    assert problem in lag_of(audit_dir).problems
    assert cursor_of(path).exists()


def test_a_line_that_is_no_entry_holds_its_file(audit_dir: Path, record: Record) -> None:
    """The lines before it are shipped, it and those behind it are not; its number is told."""
    path = record()
    lines = lines_of(path)
    path.write_bytes(b"".join([*lines[:2], b"\xff" + lines[2][1:], *lines[3:]]))
    sink = Receiver()

    (problem,) = Forwarder(audit_dir, sink).run_once().problems

    assert sink.lines == lines[:2]
    assert (problem.kind, problem.line) == ("altered", 3)
    assert str(problem).startswith(f"{path.name}, line 3: ")


def test_a_line_without_end_does_not_fill_the_memory(
    audit_dir: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a limit, and it is told."""
    monkeypatch.setattr(cursor, "LONGEST_LINE", 2_000)
    path = record()
    with path.open("ab") as file:
        file.write(b"x" * 10_000)
    sink = Receiver()

    (problem,) = Forwarder(audit_dir, sink, batch_bytes=1_000).run_once().problems

    assert len(sink.lines) == 5
    assert (problem.kind, problem.line) == ("altered", 6)


def test_an_operator_may_start_a_file_over(
    audit_dir: Path, record: Record, held_for_no_time: None
) -> None:
    """Removing the cursor, while the forwarder runs, ships the file from its beginning."""
    path = record()
    sink = Receiver()
    told: list[Problem] = []
    forwarder = Forwarder(audit_dir, sink, on_problem=told.append)
    forwarder.run_once()
    replace_file(path)
    with following(forwarder):
        eventually(lambda: kinds(told) == ["altered"])
        cursor_of(path).unlink()
        eventually(lambda: len(sink.lines) == 10)

    assert sink.lines[:5] == sink.lines[5:]
    assert kinds(told) == ["altered"]


@posix
@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
def test_what_is_no_regular_file_is_not_read(audit_dir: Path, record: Record, kind: str) -> None:
    """Whatever bears the name of a session file; it is told, and the others are shipped."""
    path = record()
    name = f"audit-20260101-{'a' * 20}.ndjson"
    if kind == "link":
        (audit_dir / name).symlink_to(path)
    elif kind == "directory":
        (audit_dir / name).mkdir()
    else:
        os.mkfifo(audit_dir / name)
    sink = Receiver()

    (problem,) = Forwarder(audit_dir, sink).run_once().problems

    assert (problem.kind, problem.file) == ("unreadable", name)
    assert arrived(sink.lines) == {path.name[-27:-7]: lines_of(path)}


@posix
def test_a_link_that_takes_the_place_of_a_file_is_not_followed(
    audit_dir: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even between looking at it and opening it."""
    path = record()
    real = spool.Directory.read

    def swap(directory: Any, name: str) -> Any:
        if name == path.name and not path.is_symlink():
            path.rename(audit_dir / "moved")
            path.symlink_to(audit_dir / "moved")
        return real(directory, name)

    monkeypatch.setattr(spool.Directory, "read", swap)
    sink = Receiver()

    (problem,) = Forwarder(audit_dir, sink).run_once().problems

    assert problem.kind == "unreadable"
    assert sink.lines == []


def test_a_file_that_was_moved_is_forgotten_after_a_while(audit_dir: Path, record: Record) -> None:
    """Its cursor is kept as long as it may come back."""
    kept, moved, recent = record(), record(), record()
    forwarder = Forwarder(audit_dir, Receiver())
    forwarder.run_once()
    moved.unlink()
    recent.unlink()
    for path in (kept, moved):
        os.utime(cursor_of(path), (0, 0))

    forwarder.run_once()

    assert [cursor_of(path).exists() for path in (kept, moved, recent)] == [True, False, True]


@posix
def test_a_directory_that_was_replaced_is_followed(
    audit_dir: Path, record: Record, tmp_path: Path
) -> None:
    """A mount or a move underneath does not leave the forwarder in the old one."""
    record()
    sink = Receiver()
    told: list[Problem] = []
    forwarder = Forwarder(audit_dir, sink, on_problem=told.append)
    with following(forwarder):
        eventually(lambda: len(sink.lines) == 5)
        audit_dir.rename(tmp_path / "old")
        eventually(lambda: kinds(told) == ["failing"])
        record()
        eventually(lambda: len(sink.lines) == 10)
    assert f"no directory {audit_dir}" in told[0].reason


# a sink that refuses or fails


def test_a_refused_line_holds_its_file_alone(audit_dir: Path, record: Record) -> None:
    """It is told by file, number and reason, never by what is in it; the others go on."""
    path, other = record(3, text="secret"), record()
    sink = Picky(b'"number":1,"text":"secret"')

    progress = Forwarder(audit_dir, sink).run_once()

    received = arrived(sink.lines)
    whole = written(audit_dir)
    assert received[path.name[-27:-7]] == whole[path.name[-27:-7]][:2]
    assert received[other.name[-27:-7]] == whole[other.name[-27:-7]]
    (problem,) = progress.problems
    assert (problem.kind, problem.file, problem.line) == ("refused", path.name, 3)
    assert problem.holds
    assert "it is too long" in problem.reason
    assert "secret" not in str(problem) + cursor_of(path).read_text()
    assert lag_of(audit_dir).problems == (problem,)
    assert progress.entries == len(sink.lines)


@pytest.mark.parametrize("delivered", [-1, 99])
def test_a_sink_that_miscounts_its_refusal_skips_nothing(
    audit_dir: Path, record: Record, delivered: int
) -> None:
    """At least the refused line is held, whatever a foreign sink says."""
    record()
    sink = FailingSink(error=LineRefused("no", delivered=delivered))

    progress = Forwarder(audit_dir, sink).run_once()

    assert kinds(progress.problems) == ["refused"]
    assert lag_of(audit_dir).entries >= 1


def test_a_refused_line_is_tried_again(
    audit_dir: Path, record: Record, held_for_no_time: None
) -> None:
    """When the receiver takes it, the file goes on by itself."""
    record()
    sink = Picky(b'"number":1')
    told: list[Problem] = []
    forwarder = Forwarder(audit_dir, sink, on_problem=told.append)
    with following(forwarder):
        eventually(lambda: bool(told))
        sink.refused = None
        eventually(lambda: forwarder.lag().entries == 0)

    assert arrived(sink.lines) == written(audit_dir)
    assert kinds(told) == ["refused"]
    assert lag_of(audit_dir).problems == ()


def test_an_operator_may_leave_a_refused_line_out(audit_dir: Path, record: Record) -> None:
    """That line alone, and it is said ever after."""
    path = record()
    sink = Picky(b'"number":1')
    forwarder = Forwarder(audit_dir, sink)
    for line in (2, 3, 4):
        with pytest.raises(AuditConfigurationError, match="not one that was refused"):
            forwarder.skip(path.name, line)
    forwarder.run_once()
    for line in (2, 4):
        with pytest.raises(AuditConfigurationError, match="not one that was refused"):
            forwarder.skip(path.name, line)
    with pytest.raises(AuditConfigurationError, match="no name of a session file"):
        forwarder.skip(f"../{path.name}", 3)

    whole = path.read_bytes()
    os.truncate(path, sum(map(len, lines_of(path)[:2])))
    with pytest.raises(AuditConfigurationError, match="the line is gone"):
        forwarder.skip(path.name, 3)
    path.write_bytes(whole)

    forwarder.skip(path.name, 3)
    (problem,) = forwarder.run_once().problems

    lines = lines_of(path)
    assert sink.lines == [*lines[:2], *lines[3:]]
    assert (problem.kind, problem.line, problem.holds) == ("skipped", 3, False)
    assert lag_of(audit_dir).problems == (problem,)


def test_a_failing_sink_is_raised_by_a_single_run(audit_dir: Path, record: Record) -> None:
    """What was confirmed before it failed is not shipped again."""
    record(8)
    sink = FailingSink(lambda number: number == 3)
    forwarder = Forwarder(audit_dir, sink, batch_lines=2)

    with pytest.raises(SinkError, match="told to fail"):
        forwarder.run_once()
    assert len(sink.lines) == 4
    forwarder.run_once()

    assert len(sink.lines) == 10
    assert arrived(sink.lines) == written(audit_dir)


@pytest.mark.parametrize(
    "error", [refusal("unknown"), ZeroDivisionError()], ids=["ours", "foreign"]
)
def test_a_failing_sink_is_tried_again_until_it_recovers(
    audit_dir: Path, record: Record, error: Exception
) -> None:
    """Its failure is told once, and nothing is lost or out of order."""
    record()
    sink = BrokenSink(error)
    told: list[Problem] = []
    forwarder = Forwarder(audit_dir, sink, on_problem=told.append)
    with following(forwarder):
        eventually(lambda: bool(told))
        record()
        sink.error = None
        eventually(lambda: forwarder.lag().entries == 0)

    assert arrived(sink.lines) == written(audit_dir)
    assert kinds(told) == ["failing", "working"]
    assert told[0].file is None


def test_a_failure_that_comes_back_is_told_again(audit_dir: Path, record: Record) -> None:
    """Once for each time that it fails, not once for ever."""
    record()
    sink = BrokenSink(refusal())
    told: list[Problem] = []
    with following(Forwarder(audit_dir, sink, on_problem=told.append)):
        eventually(lambda: len(told) == 1)
        sink.error = None
        eventually(lambda: len(told) == 2)
        sink.error = refusal()
        record()
        eventually(lambda: len(told) == 3)
        sink.error = None

    assert kinds(told)[:3] == ["failing", "working", "failing"]


def test_a_sink_that_wants_a_new_session_is_opened_again(audit_dir: Path, record: Record) -> None:
    """As the handler does it: nothing was written, and the same lines are written again."""
    record()
    sink = FailingSink(lambda number: number == 1, SessionOver("the next sink takes over"))

    Forwarder(audit_dir, sink).run_once()

    assert sink.writes == 2
    assert arrived(sink.lines) == written(audit_dir)


@pytest.mark.parametrize("batch", [2, 100])
def test_a_cursor_that_cannot_be_written_stops_shipping(
    audit_dir: Path, record: Record, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Nothing more leaves until the disk takes it, and nothing is sent twice then."""
    record(8)
    record(8)
    sink = Receiver()
    told: list[Problem] = []
    full = threading.Event()
    attempts: list[int] = []
    real = _durable.append

    def append(descriptor: int, data: bytes) -> int:
        if not full.is_set() or not data.startswith(b'{"format"'):
            return real(descriptor, data)
        attempts.append(len(data))
        return 3

    monkeypatch.setattr(_durable, "append", append)
    forwarder = Forwarder(audit_dir, sink, batch_lines=batch, on_problem=told.append)
    full.set()
    with following(forwarder):
        eventually(lambda: len(attempts) > 3)
        assert len(sink.lines) == min(batch, 10)
        assert lag_of(audit_dir).entries == 20
        full.clear()
        eventually(lambda: forwarder.lag().entries == 0)

    assert len(sink.lines) == 20
    assert "[ENOSPC]" in told[0].reason
    assert set(kinds(told)) <= {"failing", "working"}


def test_a_single_run_raises_when_its_cursor_cannot_be_written(
    audit_dir: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cursor that was not synced does not count: the next run repeats the batch."""
    record(8)
    sink = Receiver()
    forwarder = Forwarder(audit_dir, sink, batch_lines=2)

    def sync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(_durable, "sync", sync)
        with pytest.raises(SinkError, match="EIO"):
            forwarder.run_once()
    forwarder.run_once()

    assert len(sink.lines) == 2 + 10
    assert arrived(sink.lines) == written(audit_dir)


# cursors, lock, directory


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0" * 100,
        b"[]",
        b"null",
        b'{"format":1}',
        b'{"format":2,"target":"Receiver()","inode":1,"offset":0,"sequence":0,"hash":"",'
        b'"refused":null,"skipped":[]}',
        b'{"format":1,"target":"Receiver()","inode":1,"offset":"9","sequence":0,"hash":"",'
        b'"refused":null,"skipped":[]}',
        b'{"format":1,"target":"Receiver()","inode":1,"offset":-9,"sequence":0,"hash":"",'
        b'"refused":null,"skipped":[]}',
        b'{"format":1,"target":"Receiver()","inode":1,"offset":0,"sequence":0,"hash":null,'
        b'"refused":null,"skipped":[]}',
        b'{"format":1,"target":"Receiver()","inode":1,"offset":0,"sequence":0,"hash":"",'
        b'"refused":null,"skipped":7}',
    ],
)
def test_a_damaged_cursor_loses_nothing(audit_dir: Path, record: Record, garbage: bytes) -> None:
    """Its file is shipped from its beginning, and that is said."""
    path, _ = record(), record()
    told: list[Problem] = []
    Forwarder(audit_dir, Receiver()).run_once()
    cursor_of(path).write_bytes(garbage)
    assert kinds(lag_of(audit_dir).problems) == ["restarted"]
    assert lag_of(audit_dir).entries == 5
    sink = Receiver()

    progress = Forwarder(audit_dir, sink, on_problem=told.append).run_once()

    assert sink.lines == lines_of(path)
    assert list(progress.problems) == told
    assert [(problem.kind, problem.file) for problem in told] == [("restarted", path.name)]
    assert Forwarder(audit_dir, Receiver()).run_once().problems == ()


def test_a_cursor_that_cannot_be_read_is_not_written_anew(
    audit_dir: Path, record: Record, held_for_no_time: None
) -> None:
    """Its file waits until it can be; that is no reason to start over."""
    path = record()
    sink = Receiver()
    Forwarder(audit_dir, sink).run_once()
    cursor_of(path).rename(audit_dir / "cursor")
    cursor_of(path).mkdir()
    told: list[Problem] = []
    with following(Forwarder(audit_dir, sink, on_problem=told.append)):
        eventually(lambda: bool(told))
        record()
        eventually(lambda: len(sink.lines) == 10)
        cursor_of(path).rmdir()
        (audit_dir / "cursor").rename(cursor_of(path))
        append_nonsense(path)
        eventually(lambda: len(told) == 2)

    assert kinds(told) == ["unreadable", "altered"]
    assert told[0].file == path.name
    assert len(sink.lines) == 10


def test_no_descriptor_is_left_open(audit_dir: Path, record: Record, tmp_path: Path) -> None:
    """Whatever went wrong: a file, a cursor, the sink, the lock, the directory."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc")
    damaged, unreadable = record(), record()
    append_nonsense(damaged)
    (audit_dir / "audit-20260101-aaaaaaaaaaaaaaaaaaaa.ndjson").mkdir()
    forwarder = Forwarder(audit_dir, Receiver())
    forwarder.run_once()
    cursor_of(unreadable).unlink()
    cursor_of(unreadable).mkdir()
    before = len(list(descriptors.iterdir()))

    for _ in range(3):
        assert len(forwarder.run_once().problems) == len(lag_of(audit_dir).problems) == 3
        with pytest.raises(SinkError):
            Forwarder(audit_dir, FailingSink(), target="other").run_once()
        with pytest.raises(AuditConfigurationError):
            Forwarder(tmp_path / "missing", Receiver()).run_once()
        with following(forwarder), pytest.raises(AuditConfigurationError):
            Forwarder(audit_dir, Receiver()).run_once()
    assert len(list(descriptors.iterdir())) == before


def test_another_target_gets_everything(audit_dir: Path, record: Record) -> None:
    """What one receiver has, another one has not."""
    record()
    Forwarder(audit_dir, Receiver()).run_once()
    sink = FailingSink(lambda number: False)
    assert lag_of(audit_dir).entries == 0
    assert lag_of(audit_dir, target="elsewhere").entries == 5

    (problem,) = Forwarder(audit_dir, sink).run_once().problems

    assert arrived(sink.lines) == written(audit_dir)
    assert problem.kind == "restarted"
    assert "Receiver()" in problem.reason


def test_a_sink_without_a_text_of_its_own_is_named_by_its_class(audit_dir: Path) -> None:
    """The address of an object is another one in the next process."""

    class Bare:
        open = write = close = print

    forwarder = Forwarder(audit_dir, Bare())

    assert forwarder.target.endswith("Bare")
    assert "0x" not in forwarder.target


def test_the_state_is_for_its_owner_alone(audit_dir: Path, record: Record) -> None:
    """0700 for the directory, 0600 for what is in it."""
    path = record()
    Forwarder(audit_dir, Receiver()).run_once()

    state = audit_dir / ".forward"
    known = json.loads(cursor_of(path).read_bytes())
    assert (known["offset"], known["sequence"]) == (path.stat().st_size, 5)
    assert {item.name for item in state.iterdir()} == {f"{path.name}.json", "lock"}
    if os.name == "posix":
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        assert {stat.S_IMODE(item.stat().st_mode) for item in state.iterdir()} == {0o600}


def test_a_second_forwarder_is_refused(audit_dir: Path, record: Record) -> None:
    """In this process or in another one; it is told who was first."""
    record()
    sink = HangingSink()
    first = Forwarder(audit_dir, sink)
    with following(first):
        for second in (first, Forwarder(audit_dir, Receiver())):
            with pytest.raises(AuditConfigurationError, match=f"process {os.getpid()}\\b"):
                second.run_once()
            with pytest.raises(AuditConfigurationError, match=f"process {os.getpid()}\\b"):
                second.start()
        script = """
            import sys
            from structlog_audit import AuditConfigurationError
            from structlog_audit.forward import Forwarder
            from structlog_audit.testing import MemorySink
            try:
                Forwarder(sys.argv[1], MemorySink()).run_once()
            except AuditConfigurationError as error:
                print(error)
        """
        assert f"process {os.getpid()} on " in run_well(script, audit_dir)
    Forwarder(audit_dir, Receiver()).run_once()


def test_a_directory_that_is_not_there_is_refused(audit_dir: Path) -> None:
    """It is not made: a typo would ship nothing for ever."""
    forwarder = Forwarder(audit_dir, Receiver())
    for attempt in (forwarder.run_once, forwarder.start, forwarder.lag):
        with pytest.raises(AuditConfigurationError, match="no directory"):
            attempt()
    assert not audit_dir.exists()


@pytest.mark.parametrize("place", ["file", "link"])
def test_a_state_that_is_no_directory_is_refused(
    audit_dir: Path, record: Record, place: str, tmp_path: Path
) -> None:
    """A file, or a link to somewhere else."""
    record()
    if place == "file":
        (audit_dir / ".forward").write_bytes(b"")
    else:
        (audit_dir / ".forward").symlink_to(tmp_path)
    sink = Receiver()

    with pytest.raises(AuditConfigurationError, match="cannot keep cursors"):
        Forwarder(audit_dir, sink).run_once()
    assert sink.lines == []


@posix
def test_a_state_that_anybody_may_write_to_is_refused(audit_dir: Path, record: Record) -> None:
    """Somebody could say there that everything was shipped."""
    record()
    (audit_dir / ".forward").mkdir()
    (audit_dir / ".forward").chmod(0o777)

    with pytest.raises(AuditConfigurationError, match="by anybody"):
        Forwarder(audit_dir, Receiver()).run_once()


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="gives rights away")
@pytest.mark.parametrize(("owner", "mode"), [(65534, 0o500), (0, 0o755), (1, 0o777)])
def test_a_state_that_cannot_be_kept_is_refused_before_anything_is_shipped(
    record: Record, audit_dir: Path, owner: int, mode: int
) -> None:
    """As an ordinary user, in a directory that is read-only, or another user's."""
    path = record()
    with tempfile.TemporaryDirectory() as place:
        state = Path(place, ".forward")
        state.mkdir()
        os.chmod(state, mode)
        (state / "lock").touch(0o600)
        for path_of_state in (state, state / "lock"):
            os.chown(path_of_state, owner, owner)
        Path(place).chmod(0o755)
        Path(place, path.name).write_bytes(path.read_bytes())

        def ship() -> tuple[str, int]:
            os.setuid(65534)
            sink = Receiver()
            with pytest.raises(AuditConfigurationError) as caught:
                Forwarder(place, sink).run_once()
            return str(caught.value), len(sink.lines)

        message, shipped = in_child(ship)
    assert str(state) in message
    assert shipped == 0


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="gives rights away")
def test_a_state_of_another_user_is_refused(audit_dir: Path, record: Record) -> None:
    """Also by root: what it made there would lock that user out."""
    record()
    (audit_dir / ".forward").mkdir(0o700)
    os.chown(audit_dir / ".forward", 1, 1)

    with pytest.raises(AuditConfigurationError, match="belongs to user 1"):
        Forwarder(audit_dir, Receiver()).run_once()


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="gives rights away")
def test_a_file_of_another_user_is_told(record: Record) -> None:
    """The forwarder needs the rights of those who write; it ships what it may read."""
    mine, others = record(), record()
    with tempfile.TemporaryDirectory() as place:
        os.chown(place, 65534, 65534)
        for path, owner in ((mine, 65534), (others, 0)):
            shutil.copy(path, place)
            os.chmod(Path(place, path.name), 0o600)
            os.chown(Path(place, path.name), owner, owner)

        def ship() -> tuple[Any, ...]:
            os.setuid(65534)
            sink = Receiver()
            problems = Forwarder(place, sink).run_once().problems
            return sink.lines, problems, lag_of(place).problems

        lines, problems, seen = in_child(ship)
    assert lines == lines_of(mine)
    assert [(problem.kind, problem.file) for problem in problems] == [("unreadable", others.name)]
    assert "needs the rights" in str(problems[0])
    assert seen == problems


def test_arguments_are_checked_at_once(audit_dir: Path) -> None:
    """Not in the middle of the night."""
    wrong: list[Callable[[], object]] = [
        lambda: Forwarder(audit_dir, Receiver(), prefix="../x"),
        lambda: Forwarder(audit_dir, object()),  # type: ignore[arg-type]
        lambda: Forwarder(audit_dir, Receiver(), batch_lines=0),
        lambda: Forwarder(audit_dir, Receiver(), batch_bytes=-1),
        lambda: Forwarder(audit_dir, Receiver()).start(interval=0),
        lambda: Forwarder("", Receiver()),
    ]
    for make in wrong:
        with pytest.raises(AuditConfigurationError):
            make()


def test_a_directory_is_no_target(audit_dir: Path, tmp_path: Path) -> None:
    """A session file is never appended to, so no copy of one could be continued."""
    with pytest.raises(AuditConfigurationError, match="not to another directory"):
        Forwarder(audit_dir, FileSink(tmp_path / "copy"))


# in a thread, and across a fork


def test_a_block_follows_in_the_background(audit_dir: Path, record: Record) -> None:
    """The lock is free and the sink is closed behind it."""
    record()
    sink = Receiver()
    with Forwarder(audit_dir, sink) as forwarder:
        eventually(lambda: len(sink.lines) == 5)
        assert "ships" in repr(forwarder)
    assert sink.calls[-1] == "close"
    assert "idle, 5 entries" in repr(forwarder)
    Forwarder(audit_dir, sink).run_once()


def test_a_forwarder_can_be_started_again(audit_dir: Path, record: Record) -> None:
    """It goes on where it was."""
    sink = Receiver()
    record()
    forwarder = Forwarder(audit_dir, sink)
    for count in (5, 10):
        with following(forwarder):
            eventually(lambda count=count: len(sink.lines) == count)  # type: ignore[misc]
        record()
    assert forwarder.stop()


def test_stopping_waits_for_the_sink_only_as_long_as_it_is_told(
    audit_dir: Path, record: Record
) -> None:
    """It tells whether the thread has ended."""
    record()
    sink = HangingSink()
    sink.hang()
    forwarder = Forwarder(audit_dir, sink)
    forwarder.start()
    assert sink.entered.wait(HANG)

    assert not forwarder.stop(0.001)
    sink.go_on()
    assert forwarder.stop(HANG)


def test_a_thread_that_fails_is_not_silent(
    audit_dir: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook and the excepthook hear of it, and the lock is given up."""
    record()
    told: list[Problem] = []
    raised: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: raised.append(args.exc_type))
    forwarder = Forwarder(audit_dir, BrokenSink(KeyboardInterrupt()), on_problem=told.append)

    forwarder.start()
    eventually(lambda: bool(raised))

    assert raised == [KeyboardInterrupt]
    assert kinds(told) == ["stopped"]
    assert forwarder.stop(HANG)
    Forwarder(audit_dir, Receiver()).run_once()


def test_without_a_hook_problems_are_logged(
    audit_dir: Path, record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    """And what a hook raises is logged, and stops nothing."""
    path = record()
    record()
    append_nonsense(path)

    def broken(problem: Problem) -> None:
        raise ZeroDivisionError

    with caplog.at_level(logging.WARNING, "structlog_audit"):
        Forwarder(audit_dir, Receiver()).run_once()
        Forwarder(audit_dir, sink := Receiver(), target="x", on_problem=broken).run_once()

    assert f"{path.name}, line 6: the line does not continue" in caplog.messages[0]
    assert "ZeroDivisionError" in caplog.messages[1]
    assert len(sink.lines) == 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_neither_forwarder_nor_lock(audit_dir: Path, record: Record) -> None:
    """Its parent's goes on; when that one stops, the lock is free although the child lives."""
    record()
    sink = Receiver()
    forwarder = Forwarder(audit_dir, sink)
    told, telling = os.pipe()
    waiting, leaving = os.pipe()
    with following(forwarder):
        eventually(lambda: len(sink.lines) == 5)
        child = os.fork()
        if child == 0:
            try:
                answer = f"{forwarder.stop()}, {threading.active_count()}"
                with pytest.raises(AuditConfigurationError, match=f"process {os.getppid()} "):
                    forwarder.run_once()
            except BaseException as error:
                answer = repr(error)
            os.write(telling, answer.encode())
            os.read(waiting, 1)
            os._exit(0)
        try:
            assert os.read(told, 1_000) == b"True, 1"
            record()
            eventually(lambda: len(sink.lines) == 10)
            assert forwarder.stop(HANG)
            assert Forwarder(audit_dir, sink).run_once().problems == ()
        finally:
            os.write(leaving, b"x")
            os.waitpid(child, 0)
            for descriptor in (told, telling, waiting, leaving):
                os.close(descriptor)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_that_outlives_its_parent_does_not_keep_the_lock(
    audit_dir: Path, record: Record
) -> None:
    """Not even if the parent was killed, and had no time to give it up."""
    record()
    script = """
        import os, signal, sys, warnings
        warnings.simplefilter("ignore")
        from structlog_audit.forward import Forwarder
        from structlog_audit.testing import MemorySink
        forwarder = Forwarder(sys.argv[1], MemorySink())
        forwarder.start()
        if os.fork() == 0:
            print(os.getpid(), flush=True)
        signal.pause()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(audit_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            process.kill()
            process.wait(HANG)
            Forwarder(audit_dir, Receiver()).run_once()
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_closes_its_parents_connection_before_its_own(
    audit_dir: Path, record: Record
) -> None:
    """A sink that is open in the parent is let go in the child before it is used there."""
    record()
    sink = HangingSink()
    calls: list[str] = []
    sink.open = lambda session: calls.append("open")  # type: ignore[method-assign]
    sink.close = lambda: calls.append("close")  # type: ignore[method-assign]
    forwarder = Forwarder(audit_dir, sink)
    sink.hang()
    forwarder.start(0.001)
    assert sink.entered.wait(HANG)

    def child() -> list[str]:
        sink.gate = threading.Event()
        sink.gate.set()
        shutil.rmtree(audit_dir / ".forward")  # as if the parent were gone
        calls.clear()
        forwarder.run_once()
        return calls

    assert in_child(child) == ["close", "open", "close"]
    sink.go_on()
    assert forwarder.stop(HANG)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_that_is_forked_in_the_middle_does_not_go_on(
    audit_dir: Path, record: Record
) -> None:
    """A sink or a hook may fork; only the parent ships."""
    record(8)

    class Forking(Receiver):
        child: int | None = None

        def write(self, lines: Sequence[bytes]) -> None:
            super().write(lines)
            if self.child is None:
                self.child = os.fork()

    sink = Forking()
    forwarder = Forwarder(audit_dir, sink, batch_lines=2)
    try:
        forwarder.run_once()
    except BaseException as error:
        if sink.child:
            raise
        os._exit(7 if isinstance(error, RuntimeError) and len(sink.lines) == 2 else 1)
    if sink.child == 0:
        os._exit(2)
    assert sink.child is not None
    _, status = os.waitpid(sink.child, 0)

    assert os.waitstatus_to_exitcode(status) == 7
    assert len(sink.lines) == 10


# the lag


def test_the_lag_counts_what_is_not_shipped(audit_dir: Path, record: Record) -> None:
    """Entries, bytes and files, before and after."""
    paths = [record(), record(5)]
    forwarder = Forwarder(audit_dir, Receiver())

    before = forwarder.lag()
    assert (before.files, before.entries) == (2, 5 + 7)
    assert before.bytes == sum(path.stat().st_size for path in paths)
    assert before.seconds is not None
    assert not is_forwarded(audit_dir)
    assert not (audit_dir / ".forward").exists()
    forwarder.run_once()
    assert is_forwarded(audit_dir)
    after = forwarder.lag()
    assert (after.files, after.entries, after.bytes, after.seconds) == (0, 0, 0, None)
    assert after.problems == ()


def test_the_lag_has_the_age_of_the_oldest_entry(audit_dir: Path, record: Record) -> None:
    """By the time in its line, of whichever file; what has no time does not hinder."""
    paths = [record(1) for _ in range(3)]
    for path, when in zip(paths, (b"2026-11-22T07:04:20.040123Z", b"soon"), strict=False):
        first, rest = path.read_bytes().split(b"\n", 1)
        time_of_line = json.loads(first)["time"].encode()
        path.write_bytes(first.replace(time_of_line, when) + b"\n" + rest)

    lag = lag_of(audit_dir)

    assert lag.seconds is not None
    oldest = time.time() - lag.seconds
    assert abs(oldest - 1795331060.04) < 5


def test_the_lag_tells_of_a_torn_tail(audit_dir: Path, record: Record) -> None:
    """It counts the lines before it."""
    path = record()
    os.truncate(path, path.stat().st_size - 10)

    lag = lag_of(audit_dir)

    assert kinds(lag.problems) == ["unfinished"]
    assert lag.entries == 4
    assert lag.bytes == sum(map(len, lines_of(path)[:4]))


def test_the_lag_is_measured_in_little_memory(audit_dir: Path, record: Record) -> None:
    """A day that was not shipped is read in pieces."""
    path = record(1)
    lines = 60_000
    with path.open("ab") as file:
        for _ in range(lines // 1_000):
            file.write((b"x" * 499 + b"\n") * 1_000)
    tracemalloc.start()
    try:
        lag = lag_of(audit_dir)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert lag.entries == lines + 3
    assert most < 8 * 2**20 < lag.bytes


def test_the_lag_can_be_measured_while_a_forwarder_is_at_work(
    audit_dir: Path, record: Record
) -> None:
    """It takes no lock, and leaves no trace."""
    record()
    sink = HangingSink()
    sink.hang()
    with following(forwarder := Forwarder(audit_dir, sink)):
        assert sink.entered.wait(HANG)
        assert forwarder.lag().entries == 5
        sink.go_on()
        eventually(lambda: forwarder.lag().entries == 0)


@pytest.mark.parametrize("late", [True, False])
def test_the_lag_does_not_take_a_forwarder_that_is_ahead_for_a_cut(
    audit_dir: Path, handler: AuditHandler, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """A file may grow, and be shipped, between two looks at it; or be moved away."""
    handler.record({"action": "Forward"})
    Forwarder(audit_dir, Receiver()).run_once()
    real = spool.Spool.load

    def load(place: Any, name: str, target: str | None) -> Any:
        monkeypatch.setattr(spool.Spool, "load", real)
        if late:
            handler.record({"action": "Forward"})
            Forwarder(audit_dir, Receiver()).run_once()
        else:
            (audit_dir / name).unlink()
        return real(place, name, target)

    monkeypatch.setattr(spool.Spool, "load", load)
    lag = lag_of(audit_dir)

    assert (lag.entries, lag.problems) == (0, ())


def test_the_forwarder_loads_no_client(tmp_path: Path) -> None:
    """Neither requests nor tenacity nor asyncio's servers: those are the sinks' business."""
    script = "import sys, structlog_audit.forward; print(*sys.modules)"
    roots = {name.split(".")[0] for name in run_well(script).split()}

    assert not roots & {"requests", "urllib3", "tenacity", "click"}
