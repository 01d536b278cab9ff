"""A line that the sink refuses for its own sake fails alone; the numbering has no gap."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from doubles import HangingSink, begins
from running import eventually, in_threads

from structlog_audit import AuditError, AuditHandler, AuditWriteError, LineRefused
from structlog_audit.testing import MemorySink

MakeHandler = Callable[..., AuditHandler]


class Choosy(HangingSink):
    """Refuses lines with a word in them, and stores those before them."""

    word = b"refuse me"

    def write(self, lines: Sequence[bytes]) -> None:
        for number, line in enumerate(lines):
            if self.word in line:
                super().write(lines[:number])
                raise LineRefused("I do not like it", delivered=number, hint="change it")
        super().write(lines)


def check_chain(sink: MemorySink) -> None:
    """Each session is numbered from 1 and linked by the hashes of the bytes that were stored."""
    sequence, prev = 0, ""
    for raw in sink.lines:
        line = json.loads(raw)
        sequence, prev = (0, "") if line["prev"] == "" else (sequence, prev)
        assert (line["sequence"], line["prev"]) == (sequence + 1, prev)
        sequence, prev = sequence + 1, hashlib.sha256(raw[:-1]).hexdigest()


def test_of_a_batch_the_refused_entries_alone_fail(make_handler: MakeHandler) -> None:
    """Three of ten that share a commit; the others are numbered without them."""
    sink = Choosy()
    handler = make_handler(sink)
    sink.hang()

    def call(number: int) -> Any:
        text = "refuse me" if number in (2, 3, 9) else "fine"
        try:
            return handler.record({"action": f"A{number}", "text": text})
        except AuditError as error:
            return error

    def release() -> None:
        eventually(lambda: len(handler._commits._queue) >= 9)
        sink.go_on()

    *answers, _ = in_threads([lambda n=n: call(n) for n in range(10)] + [release])  # type: ignore[misc]

    failed = {number for number, answer in enumerate(answers) if isinstance(answer, AuditError)}
    assert failed == {2, 3, 9}
    assert {answers[number].persisted for number in failed} == {"no"}
    assert "I do not like it" in str(answers[2])
    stored = {e["action"] for e in sink.entries}
    assert stored == {f"A{number}" for number in range(10) if number not in failed}
    check_chain(sink)


def test_a_refused_first_entry_of_a_session_leaves_the_session(make_handler: MakeHandler) -> None:
    """Its Begin is stored; the next entry goes on, and the one after a gap tells of it."""
    sink = Choosy()
    handler = make_handler(sink)

    with pytest.raises(AuditWriteError, match="I do not like it"):
        handler.record({"action": "A", "text": "refuse me"})
    handler.record({"action": "B"})
    handler.close()

    assert [e["action"] for e in sink.entries] == ["B"]
    assert begins(sink)[-1]["data"]["gap"]["failedCalls"] == 1
    check_chain(sink)


def test_a_refused_begin_of_the_session_fails_the_call(make_handler: MakeHandler) -> None:
    """Nothing can be recorded there at all."""
    sink = Choosy()
    sink.word = b"AuditSession"

    with pytest.raises(AuditWriteError, match="the session's own line: I do not like it"):
        make_handler(sink).record({"action": "A"})

    assert sink.lines == []


def test_a_refused_complete_of_the_session_is_told_of(make_handler: MakeHandler) -> None:
    """The hook hears of it; closing does not fail for it."""
    sink = Choosy()
    told: list[AuditError] = []
    handler = make_handler(sink, on_failure=told.append)
    handler.record({"action": "A"})
    sink.word = b'"event":"Complete"'

    handler.close()

    assert ["I do not like it" in str(error) for error in told] == [True]


def test_a_refused_outcome_is_given_up_after_others_were_taken(make_handler: MakeHandler) -> None:
    """It is kept for a while like any outcome that failed, and costs no other one."""
    sink = Choosy()
    handler = make_handler(sink)
    handler.submit({"action": "A", "text": "refuse me"}, "Complete")
    handler.submit({"action": "B"}, "Complete")

    with pytest.raises(AuditWriteError, match="1 outcome"):
        handler.close()

    assert [e["action"] for e in sink.entries] == ["B"]
    sink.word = b"nothing at all"  # it was kept, and is written now
    handler.close()
    assert [e["action"] for e in sink.entries] == ["B", "A"]
