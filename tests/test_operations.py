"""Operations: a Begin that is durable before the body runs, and an outcome that is never lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from doubles import BrokenSink, refusal
from reading import recorded

from structlog_audit import (
    AuditEntryError,
    AuditHandler,
    AuditNotConfiguredError,
    AuditWriteError,
    Operation,
    audit_context,
    audit_log,
    audit_processors,
    current_operation,
)
from structlog_audit.testing import FailingSink, MemorySink, capture_audit

MakeHandler = Callable[..., AuditHandler]


@pytest.fixture
def entries(make_handler: MakeHandler) -> Callable[[], list[dict[str, Any]]]:
    """Close the handler and return what was recorded."""
    handler = make_handler(MemorySink())
    structlog.configure(processors=[*audit_processors(handler=handler)])

    def close_and_read() -> list[dict[str, Any]]:
        handler.close()
        return handler.sink.entries  # type: ignore[no-any-return, attr-defined]

    return close_and_read


Entries = Callable[[], list[dict[str, Any]]]


def test_a_begin_is_on_disk_before_the_body_runs(handler: AuditHandler, audit_dir: Path) -> None:
    """The body can read it in the file."""
    structlog.configure(processors=[*audit_processors(handler=handler)])

    with audit_log.operation(action="OrderDelete", order="o-1") as operation:
        (entry,) = recorded(audit_dir)

    assert (entry["action"], entry["event"]) == ("OrderDelete", "Begin")
    assert entry["operationId"] == operation.operation_id
    assert operation.receipt is not None
    assert operation.receipt.sequence == entry["sequence"]


def test_the_body_does_not_run_when_the_begin_cannot_be_recorded(make_handler: MakeHandler) -> None:
    """No entry, no action; neither is there an outcome of something that did not begin."""
    sink = BrokenSink(refusal())
    handler = make_handler(sink)
    structlog.configure(processors=[*audit_processors(handler=handler)])
    ran: list[int] = []

    with pytest.raises(AuditWriteError), audit_log.operation(action="OrderDelete"):
        ran.append(1)

    async def in_a_task() -> None:
        async with audit_log.operation(action="OrderDelete"):
            ran.append(2)

    with pytest.raises(AuditWriteError):
        asyncio.run(in_a_task())
    sink.error = None
    handler.close()
    assert ran == []
    assert sink.entries == []


def test_the_body_does_not_run_without_a_configuration() -> None:
    """A forgotten processor stops the action as well."""
    ran: list[int] = []

    with pytest.raises(Exception, match="audit_processors"), audit_log.operation(action="A"):
        ran.append(1)

    assert ran == []


def test_a_body_that_ends_well_is_complete(entries: Entries) -> None:
    """The outcome carries what the body left in `data`, and the fields of its Begin."""
    log = audit_log.bind(user_id="u-1", request_id="r-1")

    with log.operation("Deletes.", action="OrderDelete", order="o-1", data={"why": "test"}) as op:
        op.data["rows"] = 3

    begin, complete = entries()
    assert begin["data"] == {"order": "o-1", "why": "test", "description": "Deletes."}
    assert (complete["event"], complete["data"]) == ("Complete", {"rows": 3})
    for field in ("action", "operationId", "userId", "requestId"):
        assert begin[field] == complete[field]


def test_the_context_of_the_outcome_is_that_of_the_body(entries: Entries) -> None:
    """What was bound for the block stands in Begin and outcome."""
    with audit_context(user_id="u-1", client_ip="10.0.0.1"), audit_log.operation(action="A"):
        pass

    assert [e["userId"] for e in entries()] == ["u-1", "u-1"]


def test_an_exception_of_the_body_is_a_fail_and_propagates_unchanged(entries: Entries) -> None:
    """The very same object, with nothing chained to it."""
    error = LookupError("no such order")

    with pytest.raises(LookupError) as caught, audit_log.operation(action="OrderDelete"):
        raise error

    assert caught.value is error
    assert error.__cause__ is None
    assert error.__context__ is None
    exception = entries()[1]["data"]["exception"]
    assert entries()[1]["event"] == "Fail"
    assert (exception["type"], exception["message"]) == ("LookupError", "no such order")
    assert "test_an_exception_of_the_body" in exception["traceback"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(2), GeneratorExit()])
def test_an_interrupted_body_is_an_abandon(error: BaseException, entries: Entries) -> None:
    """Not the body's fault, and not complete."""
    with pytest.raises(type(error)), audit_log.operation(action="OrderDelete"):
        raise error

    assert [entry["event"] for entry in entries()] == ["Begin", "Abandon"]
    assert entries()[1]["data"]["exception"]["type"] == type(error).__name__


def test_a_body_may_call_itself_failed_or_abandoned(entries: Entries) -> None:
    """Without raising; the reason stands in the outcome."""
    with audit_log.operation(action="A") as operation:
        operation.fail("the bank said no")
    with audit_log.operation(action="B") as operation:
        operation.abandon("the customer hung up")

    outcomes = [(e["event"], e["data"]) for e in entries() if e["event"] != "Begin"]
    assert outcomes == [
        ("Fail", {"reason": "the bank said no"}),
        ("Abandon", {"reason": "the customer hung up"}),
    ]


def test_operations_in_tasks_end_like_others(entries: Entries) -> None:
    """`async with`: Complete, Fail, and Abandon for a cancelled task."""

    async def work(name: str, error: BaseException | None) -> None:
        async with audit_log.operation(action=name):
            if error is not None:
                raise error

    async def all_three() -> None:
        started = asyncio.Event()

        async def wait_for_ever() -> None:
            async with audit_log.operation(action="Cancelled"):
                started.set()
                await asyncio.Event().wait()

        await work("Good", None)
        with pytest.raises(LookupError):
            await work("Bad", LookupError("x"))
        task = asyncio.create_task(wait_for_ever())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(all_three())

    outcomes = {e["action"]: e["event"] for e in entries() if e["event"] != "Begin"}
    assert outcomes == {"Good": "Complete", "Bad": "Fail", "Cancelled": "Abandon"}


def test_an_operation_id_can_be_given(entries: Entries) -> None:
    """For those who have an identity already."""
    with audit_log.operation(action="A", operation_id="op-1"):
        pass

    assert [entry["operationId"] for entry in entries()] == ["op-1", "op-1"]


def test_nested_operations_have_identities_of_their_own(entries: Entries) -> None:
    """The inner one ends first."""
    with audit_log.operation(action="Outer"), audit_log.operation(action="Inner"):
        pass

    told = [(e["action"], e["event"]) for e in entries()]
    assert told == [("Outer", "Begin"), ("Inner", "Begin"), ("Inner", "Complete"),
                    ("Outer", "Complete")]  # fmt: skip
    assert len({e["operationId"] for e in entries()}) == 2


def test_an_operation_runs_once(entries: Entries) -> None:
    """Entering it again would tie two bodies to one identity."""
    operation = audit_log.operation(action="A")
    with operation:
        pass

    with pytest.raises(RuntimeError, match="runs once"), operation:
        raise AssertionError("the body ran")


@pytest.mark.parametrize("data", [5, None, ["x"], "text"])
def test_useless_data_of_the_body_neither_hides_its_exception_nor_loses_the_outcome(
    data: Any, entries: Entries
) -> None:
    """`operation.data = …` with something that is no mapping."""

    def body(operation: Operation) -> None:
        operation.data = data
        raise LookupError("mine")

    with pytest.raises(LookupError), audit_log.operation(action="A") as operation:
        body(operation)

    assert [entry["event"] for entry in entries()] == ["Begin", "Fail"]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


def test_an_exception_that_cannot_be_printed_propagates(entries: Entries) -> None:
    """It is recorded by its type."""
    with pytest.raises(Unprintable), audit_log.operation(action="A"):
        raise Unprintable

    exception = entries()[1]["data"]["exception"]
    assert exception["type"].endswith("Unprintable")
    assert exception["message"] == "<unprintable: ValueError>"


def test_the_bodys_exception_goes_before_that_of_its_outcome(
    entries: Entries, caplog: pytest.LogCaptureFixture
) -> None:
    """The chain broke meanwhile: the outcome is lost, and that is logged."""

    def body() -> None:
        structlog.reset_defaults()
        raise LookupError("mine")

    with pytest.raises(LookupError), audit_log.operation(action="A") as operation:
        body()

    assert operation.operation_id in caplog.text


def test_without_an_exception_of_the_body_that_of_the_outcome_is_raised(entries: Entries) -> None:
    """Nobody else would hear of it."""
    with pytest.raises(AuditNotConfiguredError), audit_log.operation(action="A"):
        structlog.reset_defaults()


def test_an_operation_says_who_it_is(handler: AuditHandler) -> None:
    """In a debugger."""
    structlog.configure(processors=[*audit_processors(handler=handler)])
    with audit_log.operation(action="A", operation_id="op-1") as operation:
        pass

    assert isinstance(operation, Operation)
    assert repr(operation) == "<Operation op-1>"


def test_an_operation_without_with_warns_as_a_coroutine_without_await_does() -> None:
    """Nothing was recorded, and nobody would know."""
    with pytest.warns(RuntimeWarning, match="never entered"):
        audit_log.operation(action="A")


def test_an_operation_whose_begin_fails_does_not_warn_as_well(make_handler: MakeHandler) -> None:
    """Its caller has the error."""
    sink = BrokenSink()
    sink.error = refusal()
    structlog.configure(processors=[*audit_processors(handler=make_handler(sink))])

    with pytest.raises(AuditWriteError), audit_log.operation(action="A"):
        raise AssertionError("the body ran")


def test_the_operation_under_way_is_at_hand_in_threads_and_tasks() -> None:
    """What a function deep inside learns goes into the outcome."""
    with capture_audit() as entries:

        def deep() -> None:
            operation = current_operation()
            operation.data["rows"] = 3
            operation.bind(user_id="2780")
            operation.action = "InvoiceErase"

        async def body() -> None:
            async with audit_log.operation(action="InvoiceDelete"):
                await asyncio.to_thread(deep)

        asyncio.run(body())

    begin, outcome = entries
    assert "userId" not in begin
    assert begin["action"] == "InvoiceDelete"
    assert (outcome["userId"], outcome["action"]) == ("2780", "InvoiceErase")
    assert outcome["data"]["rows"] == 3


def test_the_inner_operation_hides_the_outer_one() -> None:
    """And no longer than it takes."""
    with capture_audit():
        with audit_log.operation(action="A") as outer:
            with audit_log.operation(action="B") as inner:
                assert current_operation() is inner
            assert current_operation() is outer
        assert current_operation().receipt is None


def test_outside_of_an_operation_there_is_one_that_records_nothing() -> None:
    """A function that adds to it works in a test, and on a route that is excluded."""
    with capture_audit() as entries:
        current_operation().data["rows"] = 3
        current_operation().bind(user_id="2780")

    assert entries == []


def test_what_is_no_field_cannot_be_bound() -> None:
    """It belongs into the data."""
    with capture_audit(), audit_log.operation(action="A") as operation:
        with pytest.raises(AuditEntryError, match="rows: no field"):
            operation.bind(rows=3)


@pytest.mark.parametrize("is_async", [False, True])
def test_an_outcome_that_shall_be_durable_is_waited_for(is_async: bool) -> None:
    """Or the block raises."""
    sink = FailingSink(lambda number: number > 1)

    def body() -> None:
        with audit_log.operation(action="A") as operation:
            operation.durable = True

    async def abody() -> None:
        async with audit_log.operation(action="A") as operation:
            operation.durable = True

    with capture_audit(sink), pytest.raises(AuditWriteError):
        asyncio.run(abody()) if is_async else body()


def test_an_outcome_that_cannot_be_durable_comes_from_the_bodys_own_exception() -> None:
    """Both are told."""
    sink = FailingSink(lambda number: number > 1)

    def body() -> None:
        with audit_log.operation(action="A") as operation:
            operation.durable = True
            raise KeyError("k")

    with capture_audit(sink), pytest.raises(AuditWriteError) as caught:
        body()

    assert isinstance(caught.value.__context__, KeyError)


def test_what_is_recorded_within_says_who_and_of_which_operation() -> None:
    """Also when that became known only within; what the call says itself stands."""
    with capture_audit() as entries:
        with audit_log.operation(action="A", company_id="2350") as operation:
            audit_log.info(action="First")
            operation.bind(user_id="2780")
            audit_log.info(action="Second")
            audit_log.info(action="Third", user_id="9")
            with audit_context(user_id="7"):
                audit_log.info(action="Fourth")
        audit_log.info(action="Outside")

    found = {entry["action"]: entry for entry in entries if entry["event"] == "Record"}
    users = [found[name].get("userId") for name in ("First", "Second", "Third", "Fourth")]
    assert users == [None, "2780", "9", "7"]
    assert found["First"]["companyId"] == "2350"
    assert found["First"]["operationId"] == operation.operation_id
    assert "operationId" not in found["Outside"]
    assert "companyId" not in found["Outside"]
