"""The audit logger's own methods, and who is asking: threads, tasks, precedence."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import structlog
from running import in_threads

from structlog_audit import (
    audit_context,
    audit_log,
    audit_processors,
    bind_audit_context,
    clear_audit_context,
    get_logger,
)
from structlog_audit.testing import MemorySink


@pytest.fixture
def sink(make_handler: Callable[..., Any]) -> MemorySink:
    """A sink in memory behind `merge_contextvars` and our processors."""
    memory = MemorySink()
    ours = audit_processors(app="billing", handler=make_handler(memory))
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, *ours])
    return memory


def user() -> str | None:
    """Record an entry; return the user that its line names."""
    audit_log.info(action="A")
    return structlog.get_config()["processors"][-1].handler.sink.entries[-1].get("userId")


def test_bind_adds_and_leaves_the_logger_alone(sink: MemorySink) -> None:
    """As structlog's own loggers do."""
    bound = audit_log.bind(a=1, user_id="7").bind(b=2, a=3)
    bound.info(action="A")
    audit_log.info(action="A")
    assert [entry["data"] for entry in sink.entries] == [{"a": 3, "b": 2}, {}]
    assert "userId" not in sink.entries[1]


def test_unbind_removes_and_insists(sink: MemorySink) -> None:
    """A name that is not bound is a mistake for `unbind`, and none for `try_unbind`."""
    bound = get_logger(a=1, b=2, c=3)
    with pytest.raises(KeyError):
        bound.unbind("a", "missing")
    bound.unbind("a").try_unbind("b", "missing").info(action="A")
    assert sink.entries[0]["data"] == {"c": 3}


def test_new_forgets_what_was_bound(sink: MemorySink) -> None:
    """Only the new values remain."""
    get_logger(a=1).new(b=2).info(action="A")
    assert sink.entries[0]["data"] == {"b": 2}


def test_a_call_goes_before_what_was_bound(sink: MemorySink) -> None:
    """Call, logger, audit context, structlog's context variables: in this order."""
    structlog.contextvars.bind_contextvars(user_id="contextvars")
    seen = [user()]
    bind_audit_context(user_id="context")
    seen.append(user())
    bound = audit_log.bind(user_id="bound")
    bound.info(action="A")
    bound.info(action="A", user_id="call")
    bound.info(action="A", user_id=None)
    seen += [entry["userId"] for entry in sink.entries[2:]]
    assert seen == ["contextvars", "context", "bound", "call", None]


def test_the_name_of_the_application_can_be_given_by_a_call(sink: MemorySink) -> None:
    """It serves where none is given."""
    audit_log.info(action="A")
    audit_log.info(action="A", app="other")
    assert [entry["app"] for entry in sink.entries] == ["billing", "other"]


def test_a_context_lasts_for_its_block(sink: MemorySink) -> None:
    """Blocks nest, and what was there before comes back."""
    bind_audit_context(user_id="1", company_id="c")
    with audit_context(user_id="2"):
        assert user() == "2"
        with audit_context(user_id=None):
            assert user() is None
        assert user() == "2"
        assert sink.entries[-1]["companyId"] == "c"
    assert user() == "1"


def test_a_context_ends_with_an_exception_too(sink: MemorySink) -> None:
    """The next request must not be somebody else's."""
    with pytest.raises(LookupError), audit_context(user_id="2"):
        raise LookupError
    assert user() is None


def test_a_cleared_context_is_empty(sink: MemorySink) -> None:
    """The next request on this thread is somebody else's."""
    bind_audit_context(user_id="1")
    clear_audit_context()
    user()
    assert "userId" not in sink.entries[-1]


def test_a_context_serves_operations_too(sink: MemorySink) -> None:
    """Begin and outcome name the same user."""
    with audit_context(user_id="7"), audit_log.operation(action="A"):
        pass
    structlog.get_config()["processors"][-1].handler.close()
    assert [entry["userId"] for entry in sink.entries] == ["7", "7"]


def test_an_unknown_field_is_refused() -> None:
    """A typo must not become a missing user."""
    with pytest.raises(TypeError):
        bind_audit_context(userid="7")  # type: ignore[call-arg]
    with pytest.raises(TypeError), audit_context(action="A"):  # type: ignore[call-arg]
        pass


def test_threads_do_not_see_each_others_context(sink: MemorySink) -> None:
    """Eight threads, each with its own user."""

    def work(number: int) -> None:
        bind_audit_context(user_id=number)
        for _ in range(25):
            audit_log.info(action="A", expected=number)

    results = in_threads([lambda number=number: work(number) for number in range(8)])
    assert results == [None] * 8
    assert len(sink.entries) == 200
    assert all(entry["userId"] == str(entry["data"]["expected"]) for entry in sink.entries)
    user()
    assert "userId" not in sink.entries[-1]


def test_tasks_do_not_see_each_others_context(sink: MemorySink) -> None:
    """A task starts with what its parent had, and keeps its own to itself."""

    async def task(number: int) -> None:
        await audit_log.ainfo(action="A", expected="parent")
        bind_audit_context(user_id=number)
        await asyncio.sleep(0)
        await audit_log.ainfo(action="A", expected=str(number))

    async def main() -> None:
        bind_audit_context(user_id="parent")
        await asyncio.gather(*map(task, range(20)))
        await audit_log.ainfo(action="A", expected="parent")

    asyncio.run(main())
    assert len(sink.entries) == 41
    assert all(entry["userId"] == entry["data"]["expected"] for entry in sink.entries)


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_logger_can_be_copied_and_pickled_after_use(
    sink: MemorySink, again: Callable[[Any], Any]
) -> None:
    """multiprocessing and Celery send bound loggers about."""
    log = get_logger(user_id="7", n=1)
    log.info(action="A")
    again(log).info(action="A")
    assert sink.entries[0]["data"] == sink.entries[1]["data"] == {"n": 1}
    assert sink.entries[1]["userId"] == "7"


def test_its_repr_shows_names_and_no_values() -> None:
    """A bound token stays out of tracebacks and debug output."""
    text = repr(get_logger(token="secret", user_id="7"))
    assert "token" in text
    assert "secret" not in text


def test_audit_is_another_name_for_info(sink: MemorySink) -> None:
    """For those who look for the level's name."""
    audit_log.audit(action="A")
    asyncio.run(audit_log.aaudit("text", action="B"))
    assert [entry["action"] for entry in sink.entries] == ["A", "B"]


def test_an_event_as_keyword_is_refused_with_a_clear_error(sink: MemorySink) -> None:
    """Not the TypeError of structlog's own loggers."""
    from structlog_audit import AuditEntryError

    with pytest.raises(AuditEntryError, match="event cannot be set"):
        audit_log.info("text", action="A", event="x")
