"""Everything that an audit call can raise."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
from lines import line_of
from structlog import DropEvent

from structlog_audit import (
    AuditConfigurationError,
    AuditEntryError,
    AuditError,
    AuditHandler,
    AuditNotConfiguredError,
    AuditSpaceWarning,
    AuditTimeoutError,
    AuditWriteError,
    FileSink,
    LineRefused,
    SessionOver,
    SinkError,
    exceptions,
)

EXAMPLES: list[AuditError] = [
    AuditError("reason"),
    AuditConfigurationError("reason", hint="do this"),
    AuditNotConfiguredError("reason", hint="do this"),
    AuditEntryError("reason"),
    AuditWriteError(
        "reason", persisted="unknown", sink="FileSink('x')", path="/x", errno=5, hint="do this"
    ),
    AuditTimeoutError("reason", persisted="no", sink="FileSink('x')"),
    AuditSpaceWarning("reason", free=1, total=2, hint="do this"),
    SinkError("reason", persisted="no", path="/x", errno=28, hint="do this"),
    SessionOver("reason", path="/x"),
    LineRefused("reason", delivered=3, hint="do this"),
]
SECRET = "hunter2"


def name(error: object) -> str:
    return type(error).__name__


def test_the_examples_are_all_there_are() -> None:
    """A new exception is tested like the others."""
    kinds = {kind for _, kind in inspect.getmembers(exceptions, inspect.isclass)
             if issubclass(kind, AuditError)}  # fmt: skip
    assert kinds == {type(error) for error in EXAMPLES}


@pytest.mark.parametrize("error", EXAMPLES, ids=name)
def test_no_exception_looks_like_a_dropped_event(error: AuditError) -> None:
    """structlog swallows `DropEvent`; and `except Exception` must see ours."""
    assert not isinstance(error, DropEvent)
    assert isinstance(error, Exception)


@pytest.mark.parametrize("error", EXAMPLES, ids=name)
def test_an_exception_survives_pickling_and_copying(error: AuditError) -> None:
    """Process pools and Celery send exceptions about; notes and attributes go with them."""
    error.extra = "kept"  # type: ignore[attr-defined]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.args == error.args
        assert vars(again) == vars(error)
    assert str(copy.copy(error)) == str(copy.deepcopy(error)) == str(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=name)
def test_the_message_tells_what_and_what_to_do(error: AuditError) -> None:
    """Reason, hint, and for a write whether the entry may exist."""
    assert "reason" in str(error)
    assert error.hint is None or error.hint in str(error)
    if isinstance(error, AuditWriteError):
        fate = {"no": "was not stored", "unknown": "may or may not"}[error.persisted]
        assert fate in str(error)
        assert error.sink in str(error)


class Secretive:
    def __repr__(self) -> str:
        raise ValueError(SECRET)


@pytest.mark.parametrize(
    "entry",
    [
        {"action": ""},
        {"action": ["x", SECRET]},
        {"action": "A", "user_id": {"x": SECRET}},
        {"action": "A", "user_id": Secretive()},
        {"action": "A", "data": [SECRET]},
        {"action": "A", "data": SECRET},
        {"action": "A", "data": {"a": SECRET}, "a": SECRET},
        {"action": "A", "level": SECRET},
    ],
    ids=range(8),
)
def test_no_message_carries_an_entrys_data(entry: dict[str, Any]) -> None:
    """Not even an exception that was chained behind it, nor its traceback's text."""
    with pytest.raises(AuditEntryError) as refused:
        line_of({"password": SECRET, **entry})
    error: BaseException | None = refused.value
    while error is not None:
        assert SECRET not in f"{error} {error!r} {vars(error)}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_write_that_failed_does_not_show_the_entry(tmp_path: Path) -> None:
    """It names sink, path and error number."""
    target = tmp_path / "no directory"
    target.write_text("a file")
    handler = AuditHandler(FileSink(target))
    with pytest.raises(AuditWriteError) as failed:
        handler.record({"action": "A", "data": {"password": SECRET}})
    handler.close()
    assert SECRET not in f"{failed.value} {failed.value!r} {failed.value.__cause__}"
    assert failed.value.errno in (errno.ENOTDIR, errno.EEXIST)
    assert failed.value.persisted == "no"
    assert str(target) in str(failed.value)
