"""`@audited`: a function that cannot be recorded does not run."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

from structlog_audit import (
    AuditConfigurationError,
    AuditWriteError,
    audited,
    current_operation,
)
from structlog_audit.testing import FailingSink, capture_audit


def test_a_call_is_an_operation() -> None:
    """Its Begin, what the body adds, and its outcome."""

    @audited(action="InvoiceDelete", data=lambda invoice, *, force=False: {"invoice": invoice})
    def delete(invoice: str, *, force: bool = False) -> int:
        current_operation().data["rows"] = 3
        return 7

    with capture_audit() as entries:
        assert delete("inv_42", force=True) == 7

    assert [(e["event"], e["action"]) for e in entries] == [
        ("Begin", "InvoiceDelete"),
        ("Complete", "InvoiceDelete"),
    ]
    assert entries[0]["data"] == {"invoice": "inv_42"}
    assert entries[1]["data"] == {"rows": 3}
    assert list(inspect.signature(delete).parameters) == ["invoice", "force"]


def test_an_async_function_stays_one() -> None:
    """And does not block the loop."""

    @audited(data={"kind": "nightly"}, type="CLI")
    async def sweep() -> str:
        await asyncio.sleep(0)
        return "swept"

    assert inspect.iscoroutinefunction(sweep)
    with capture_audit() as entries:
        assert asyncio.run(sweep()) == "swept"

    assert entries[0]["action"].endswith("sweep")
    assert entries[0]["type"] == "CLI"
    assert entries[0]["data"] == {"kind": "nightly"}


def test_a_method_gets_its_object() -> None:
    """The function for the data gets it too."""

    class Invoice:
        number = 42

        @audited(action="InvoiceDelete", data=lambda self: {"number": self.number})
        def delete(self) -> int:
            return self.number

    with capture_audit() as entries:
        assert Invoice().delete() == 42
    assert entries[0]["data"] == {"number": 42}


@pytest.mark.parametrize("is_async", [False, True])
def test_a_function_that_cannot_be_recorded_does_not_run(is_async: bool) -> None:
    """Its caller gets the exception."""
    ran: list[bool] = []

    @audited(action="A")
    def body() -> None:
        ran.append(True)

    @audited(action="A")
    async def abody() -> None:
        ran.append(True)

    with capture_audit(FailingSink()), pytest.raises(AuditWriteError):
        asyncio.run(abody()) if is_async else body()
    assert ran == []


def test_what_the_function_raises_is_its_outcome() -> None:
    """And comes to the caller unchanged."""

    @audited(action="A")
    def body() -> None:
        raise KeyError("k")

    with capture_audit() as entries, pytest.raises(KeyError):
        body()
    assert entries[1]["event"] == "Fail"
    assert entries[1]["data"]["exception"]["type"] == "KeyError"


def generator() -> Any:
    yield 1


async def agenerator() -> Any:
    yield 1


@pytest.mark.parametrize("thing", [generator, agenerator, object(), staticmethod(len), 5])
def test_what_runs_later_or_is_no_function_is_refused(thing: Any) -> None:
    """When it is decorated, not when it is called."""
    with pytest.raises(AuditConfigurationError):
        audited(action="A")(thing)


def test_without_parentheses_it_says_so() -> None:
    """Not that it takes no argument."""
    with pytest.raises(AuditConfigurationError, match="without parentheses"):
        audited(lambda: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"action": ""}, {"action": 5}, {"data": "x"}])
def test_an_argument_that_cannot_work_is_refused(options: Any) -> None:
    """At once."""
    with pytest.raises(AuditConfigurationError):
        audited(**options)
