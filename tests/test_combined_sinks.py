"""Several sinks: all that are asked for confirm, or the call fails and says who did what."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from doubles import BrokenSink, CountingSink, begins, refusal
from reading import read_sessions, recorded, session_files
from running import eventually

from structlog_audit import (
    AllOf,
    AuditConfigurationError,
    AuditHandler,
    AuditWriteError,
    FileSink,
    FirstOf,
    LineRefused,
    SinkError,
)
from structlog_audit.sinks import combine
from structlog_audit.testing import MemorySink

MakeHandler = Callable[..., AuditHandler]


class Choosy(MemorySink):
    """Refuses every line with the word `refuse` in it, and stores those before it."""

    def write(self, lines: Sequence[bytes]) -> None:
        for number, line in enumerate(lines):
            if b"refuse" in line:
                super().write(lines[:number])
                raise LineRefused("no", delivered=number)
        super().write(lines)


class Named(BrokenSink):
    """A sink with a name, which fails while it has an error."""

    def __init__(self, name: str, error: BaseException | None = None) -> None:
        super().__init__(error)
        self.name = name
        self.checks = 0

    def __repr__(self) -> str:
        return self.name

    def check(self) -> None:
        self.checks += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a sink that failed be asked again soon."""
    monkeypatch.setattr(combine, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(combine, "LONGEST_PAUSE", 0.02)


def actions(sink: MemorySink) -> list[str]:
    return [entry["action"] for entry in sink.entries]


@pytest.mark.parametrize("combination", [AllOf, FirstOf])
def test_a_combination_of_nothing_is_refused(combination: Any) -> None:
    """It would confirm everything, or nothing."""
    with pytest.raises(AuditConfigurationError, match="at least one sink"):
        combination()
    with pytest.raises(AuditConfigurationError, match="takes sinks"):
        combination(MemorySink(), "/var/log/audit")


def test_all_get_the_same_bytes(make_handler: MakeHandler) -> None:
    """The same lines, in the same session."""
    one, two = MemorySink(), MemorySink()
    handler = make_handler(AllOf(one, two))

    handler.record({"action": "A"})
    handler.record({"action": "B"})
    handler.close()

    assert one.lines == two.lines
    assert actions(one) == ["A", "B"]


def test_the_first_that_fails_stops_the_rest_and_all_are_named(make_handler: MakeHandler) -> None:
    """Who confirmed, who failed, who was not tried; and the next session is for all."""
    one, two, three = Named("one"), Named("two", refusal()), Named("three")
    handler = make_handler(AllOf(one, two, three))

    with pytest.raises(AuditWriteError) as caught:
        handler.record({"action": "A"})
    two.error = None
    handler.record({"action": "B"})

    text = str(caught.value)
    assert "it does not work today; confirmed by one; not tried: three" in text
    assert caught.value.persisted == "unknown"
    assert (actions(one), actions(two), actions(three)) == (["A", "B"], ["B"], ["B"])
    assert begins(two)[0]["session"] == begins(three)[0]["session"] == begins(one)[1]["session"]


def test_a_failing_first_leaves_the_others_empty(
    make_handler: MakeHandler, audit_dir: Path
) -> None:
    """While a server is away, no file fills with entries whose callers were aborted."""
    server = Named("server", refusal())
    handler = make_handler(AllOf(server, FileSink(audit_dir)))

    for _ in range(10):
        with pytest.raises(AuditWriteError) as caught:
            handler.record({"action": "A"})

    assert caught.value.persisted == "no"
    assert not audit_dir.exists()


def test_a_line_that_the_first_refuses_fails_alone(make_handler: MakeHandler) -> None:
    """Nobody has it, and both have the others."""
    one, two = Choosy(), MemorySink()
    handler = make_handler(AllOf(one, two))
    handler.record({"action": "A"})

    with pytest.raises(AuditWriteError) as caught:
        handler.record({"action": "B", "text": "refuse"})
    handler.record({"action": "C"})

    assert caught.value.persisted == "no"
    assert one.lines == two.lines
    assert actions(two) == ["A", "C"]


def test_a_line_that_a_later_one_refuses_ends_the_session(make_handler: MakeHandler) -> None:
    """The first has it already: its number must not be used again."""
    one, two = MemorySink(), Choosy()
    handler = make_handler(AllOf(one, two))

    with pytest.raises(AuditWriteError) as caught:
        handler.record({"action": "B", "text": "refuse"})
    handler.record({"action": "C"})

    assert caught.value.persisted == "unknown"
    assert len({begin["session"] for begin in begins(one)}) == 2


def test_a_file_that_was_moved_is_noticed_before_another_sink_writes(
    make_handler: MakeHandler, audit_dir: Path
) -> None:
    """A new session begins at both, and no call fails."""
    other = MemorySink()
    handler = make_handler(AllOf(other, FileSink(audit_dir)))
    handler.record({"action": "A"})
    (path,) = session_files(audit_dir)
    path.rename(audit_dir / "moved")

    handler.record({"action": "B"})
    handler.close()

    assert actions(other) == ["A", "B"]
    assert [begin["data"].get("follows", {}).get("ended") for begin in begins(other)] == [
        None,
        "its file was deleted or moved",
    ]
    (second,) = session_files(audit_dir)
    assert json.loads(second.read_bytes().splitlines()[1])["action"] == "B"


def test_the_first_that_confirms_is_enough(make_handler: MakeHandler) -> None:
    """The second one stays untouched."""
    one, two = CountingSink(), CountingSink()

    make_handler(FirstOf(one, two)).record({"action": "A"})

    assert (one.writes, two.opens) == (1, 0)


def test_a_whole_session_is_in_one_place(make_handler: MakeHandler, audit_dir: Path) -> None:
    """When the server goes away, the file takes over with a session of its own, and says why."""
    server = Named("server")
    handler = make_handler(FirstOf(server, FileSink(audit_dir)))
    handler.record({"action": "A"})
    server.error = refusal("unknown")

    receipt = handler.record({"action": "B"})
    handler.record({"action": "C"})

    (session,) = read_sessions(audit_dir)
    assert [entry["action"] for entry in session] == ["AuditSession", "B", "C"]
    assert [entry["sequence"] for entry in session] == [1, 2, 3]
    assert receipt.session == session[0]["session"]
    follows = session[0]["data"]["follows"]
    assert follows["session"] == begins(server)[0]["session"]
    assert follows["sequence"] == 2
    assert "the next sink takes over" in follows["ended"]


def test_a_sink_that_failed_is_left_alone_for_a_while(make_handler: MakeHandler) -> None:
    """It is not asked for each call."""
    server, two = Named("server", refusal()), MemorySink()
    handler = make_handler(FirstOf(server, two))

    for _ in range(10):
        handler.record({"action": "A"})

    assert server.checks == 0
    assert len(actions(two)) == 10
    assert len(begins(two)) == 1


def test_a_sink_that_works_again_gets_the_next_session(
    make_handler: MakeHandler, soon: None
) -> None:
    """It is asked before, so that no session is begun there in vain."""
    server, two = Named("server", refusal()), MemorySink()
    handler = make_handler(FirstOf(server, two))

    def record_until(condition: Callable[[], bool]) -> None:
        eventually(lambda: condition() or not handler.record({"action": "A"}))

    record_until(lambda: server.checks > 2)
    assert actions(server) == []
    assert len(begins(two)) == 1

    server.error = None
    record_until(lambda: bool(actions(server)))
    assert begins(server)[0]["data"]["follows"]["ended"] == "a sink before it works again"
    assert handler.sink._rest[0]._pause == combine.FIRST_PAUSE


def test_a_change_of_place_is_logged(
    make_handler: MakeHandler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No caller notices it; whoever reads the log does, once for each change."""
    monkeypatch.setattr(combine, "FIRST_PAUSE", 0.01)
    first, second = BrokenSink(refusal()), MemorySink()
    handler = make_handler(FirstOf(first, second))
    handler.record({"action": "A"})
    handler.record({"action": "A"})
    first.error = None
    eventually(lambda: handler.record({"action": "A"}) and first.lines)

    away, back = [record.message for record in caplog.records if record.name == "structlog_audit"]
    assert "failed: it does not work today; entries go to" in away
    assert away.endswith("until it works again")
    assert back.startswith("entries go to")
    assert back.endswith("again")


def test_the_pause_grows_and_ends_with_a_success() -> None:
    """A second, two, four … at most a minute."""
    rest = combine._Rest()
    pauses = []
    for _ in range(9):
        rest.begin()
        pauses.append(rest._pause)

    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60, 60]
    rest.reset()
    assert not rest.resting


def test_when_all_fail_the_call_fails(make_handler: MakeHandler) -> None:
    """Nothing is confirmed by nobody; and afterwards all are tried again."""
    one, two = Named("one", refusal()), Named("two", refusal())
    handler = make_handler(FirstOf(one, two))

    for _ in range(3):
        with pytest.raises(AuditWriteError):
            handler.record({"action": "A"})
    two.error = None
    handler.record({"action": "B"})

    assert actions(two) == ["B"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_combinations_nest(make_handler: MakeHandler, depth: int, audit_dir: Path) -> None:
    """The last resort of the last resort."""
    sink: Any = FileSink(audit_dir)
    for number in range(depth):
        sink = FirstOf(Named(str(number), refusal()), AllOf(sink, MemorySink()))
    handler = make_handler(sink)

    handler.record({"action": "A"})

    assert [entry["action"] for entry in recorded(audit_dir)] == ["A"]


def test_a_check_of_all_names_the_one_that_fails(audit_dir: Path) -> None:
    """And of the first, only if none works."""
    bad = Named("bad", refusal())

    AuditHandler(FirstOf(bad, FileSink(audit_dir))).check()
    with pytest.raises(AuditConfigurationError, match="does not work today"):
        AuditHandler(AllOf(bad, FileSink(audit_dir))).check()
    with pytest.raises(AuditConfigurationError, match="every sink failed"):
        AuditHandler(FirstOf(bad, bad)).check()


def test_the_room_is_that_of_the_fullest(audit_dir: Path) -> None:
    """Sinks that do not know are left out."""
    audit_dir.mkdir()
    file = FileSink(audit_dir)

    assert AllOf(MemorySink(), file).space().where == str(audit_dir)
    with pytest.raises(SinkError, match="none of the sinks"):
        FirstOf(MemorySink()).space()


class Stuck(MemorySink):
    def close(self) -> None:
        raise OSError("stuck")


def test_one_that_cannot_close_keeps_no_other_from_it(make_handler: MakeHandler) -> None:
    """All are closed; the error is not swallowed."""
    other = CountingSink()
    sink = AllOf(Stuck(), other)
    make_handler(sink).record({"action": "A"})

    with pytest.raises(OSError, match="stuck"):
        sink.close()

    assert other.closes == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_combinations_travel_to_other_processes(audit_dir: Path) -> None:
    """Configuration travels, state does not."""
    sink = FirstOf(AllOf(FileSink(audit_dir)), FileSink(audit_dir, "second"))
    sink.open("x" * 20)

    copied = pickle.loads(pickle.dumps(sink))

    assert repr(copied) == repr(sink)
    assert copied._current is None
    sink.close()
