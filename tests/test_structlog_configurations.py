"""Whatever structlog's configuration is: recorded, or raised with words that say what to move."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import configurations
import pytest
import structlog
from reading import recorded

from structlog_audit import (
    AuditHandler,
    AuditNotConfiguredError,
    audit_log,
    audit_processors,
    get_logger,
)

TIMES = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?")

Configuration = Callable[[list[Any]], configurations.Output]
every_configuration = pytest.mark.parametrize("configure", configurations.ALL)


@pytest.fixture
def ours(handler: AuditHandler) -> list[Any]:
    return audit_processors(handler=handler, app="shop")


@every_configuration
def test_an_audit_entry_is_recorded(
    configure: Configuration, ours: list[Any], audit_dir: Path
) -> None:
    """It stands in the file when the call returns, and nothing reaches the ordinary output."""
    output = configure(ours)

    receipt = audit_log.info(action="OrderDelete", user_id="u-1", order="o-1")

    (entry,) = recorded_now(audit_dir)
    assert (entry["session"], entry["sequence"]) == (receipt.session, receipt.sequence)
    assert (entry["action"], entry["userId"], entry["app"]) == ("OrderDelete", "u-1", "shop")
    assert entry["data"]["order"] == "o-1"
    assert output() == ""


@every_configuration
def test_an_ordinary_call_renders_what_it_rendered_before(
    configure: Configuration, ours: list[Any], audit_dir: Path
) -> None:
    """Our processors leave no trace in ordinary output."""
    alone = rendered(configure, [])
    assert alone

    assert rendered(configure, ours) == alone
    assert list(audit_dir.iterdir()) == []


def rendered(configure: Configuration, ours: list[Any]) -> str:
    structlog.reset_defaults()
    output = configure(ours)
    configurations.ordinary_calls()
    return TIMES.sub("<time>", output())


def recorded_now(directory: Path) -> list[dict[str, Any]]:
    return recorded(directory) if directory.exists() else []


@every_configuration
def test_a_text_is_kept(configure: Configuration, ours: list[Any], audit_dir: Path) -> None:
    """The positional text stands in the data, under whatever name the chain gave it."""
    configure(ours)

    audit_log.info("An order was deleted.", action="OrderDelete")

    (entry,) = recorded_now(audit_dir)
    assert "An order was deleted." in entry["data"].values()


@pytest.mark.parametrize("configure", configurations.MERGING)
def test_bound_values_of_structlog_reach_the_entry(
    configure: Configuration, ours: list[Any], audit_dir: Path
) -> None:
    """Whoever has `merge_contextvars` before us finds its values in the entry."""
    configure(ours)

    with structlog.contextvars.bound_contextvars(request_id="r-1", tenant="t-1"):
        audit_log.info(action="OrderDelete")

    (entry,) = recorded_now(audit_dir)
    assert entry["requestId"] == "r-1"
    assert entry["data"] == {"tenant": "t-1"}


@every_configuration
def test_an_exception_is_kept(configure: Configuration, ours: list[Any], audit_dir: Path) -> None:
    """`exc_info` becomes type, message and traceback, whatever renders exceptions afterwards."""
    configure(ours)

    audit_log.info(action="OrderDelete", exc_info=configurations.FAILED)

    (entry,) = recorded_now(audit_dir)
    exception = entry["data"]["exception"]
    assert (exception["type"], exception["message"]) == ("LookupError", "no such order")
    assert "_failed" in exception["traceback"]


@every_configuration
def test_without_our_processors_the_call_raises(configure: Configuration) -> None:
    """A forgotten processor is told of at the call, with the line to add."""
    output = configure([])

    with pytest.raises(AuditNotConfiguredError) as caught:
        audit_log.info(action="OrderDelete")

    assert "audit_processors" in str(caught.value)
    assert output() == ""


def test_a_level_above_everything_keeps_no_audit_entry_out(
    ours: list[Any], audit_dir: Path
) -> None:
    """The native filter at CRITICAL silences ordinary calls alone."""
    structlog.configure(
        processors=[*ours, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
    )

    audit_log.info(action="OrderDelete")

    assert len(recorded(audit_dir)) == 1


def test_a_level_filter_before_us_raises_and_says_what_to_move(
    ours: list[Any], audit_dir: Path
) -> None:
    """`filter_by_level` first, at WARNING: the call does not pass in silence."""
    configurations.stdlib_filter_first(ours)
    logging.getLogger().setLevel(logging.WARNING)

    with pytest.raises(AuditNotConfiguredError, match=r"move .*audit_processors.* before filter"):
        audit_log.info(action="OrderDelete")

    assert not recorded_now(audit_dir)


def test_logging_disable_does_not_silence_the_audit_log(ours: list[Any], audit_dir: Path) -> None:
    """With our processors first, `logging.disable` concerns ordinary calls alone."""
    output = configurations.stdlib_rendered_within_structlog(ours)
    logging.disable(logging.CRITICAL)

    structlog.get_logger().error("gone")
    audit_log.info(action="OrderDelete")

    assert len(recorded(audit_dir)) == 1
    assert output() == ""


def test_logging_disable_behind_a_level_filter_is_not_silent(
    ours: list[Any], audit_dir: Path
) -> None:
    """`filter_by_level` looks at levels alone: it lets the entry through, so it is recorded."""
    configurations.stdlib_filter_first(ours)
    logging.disable(logging.CRITICAL)

    audit_log.info(action="OrderDelete")

    assert len(recorded(audit_dir)) == 1


def test_a_disabled_logger_raises(ours: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`logger.disabled`, as `dictConfig` sets it by default, makes the filter drop the entry."""
    configurations.stdlib_filter_first(ours)
    monkeypatch.setattr(logging.getLogger(__name__), "disabled", True)

    with pytest.raises(AuditNotConfiguredError, match="filter_by_level"):
        get_logger().info(action="OrderDelete")


def sampler(logger: Any, name: str, event_dict: Any) -> Any:
    raise structlog.DropEvent


class Sampler:
    def __call__(self, logger: Any, name: str, event_dict: Any) -> Any:
        raise structlog.DropEvent


@pytest.mark.parametrize("drop", [sampler, Sampler()])
def test_a_sampler_before_us_raises_and_is_named(
    drop: Any, ours: list[Any], audit_dir: Path
) -> None:
    """Whoever drops an audit entry is named in the error."""
    structlog.configure(processors=[drop, *ours, structlog.processors.JSONRenderer()])

    with pytest.raises(AuditNotConfiguredError, match=r"(?i)sampler"):
        audit_log.info(action="OrderDelete")

    assert not recorded_now(audit_dir)


def test_a_sampler_after_us_changes_nothing(ours: list[Any], audit_dir: Path) -> None:
    """Samplers behind our processors never see audit entries."""
    structlog.configure(processors=[*ours, sampler, structlog.processors.JSONRenderer()])

    audit_log.info(action="OrderDelete")

    assert len(recorded(audit_dir)) == 1


def test_a_processor_that_forgets_the_call_raises(ours: list[Any], audit_dir: Path) -> None:
    """A processor that replaces the event dict by one of its own cannot lose an entry silently."""

    def replace(logger: Any, name: str, event_dict: Any) -> Any:
        return {"event": event_dict["event"]}

    structlog.configure(processors=[replace, *ours, structlog.processors.JSONRenderer()])

    with pytest.raises(AuditNotConfiguredError, match=r"replace[\s\S]*before it"):
        audit_log.info(action="OrderDelete")

    assert not recorded_now(audit_dir)


@pytest.mark.parametrize(
    "render",
    [
        structlog.processors.JSONRenderer(),
        structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        structlog.stdlib.render_to_log_kwargs,
    ],
)
def test_a_renderer_before_us_raises_and_says_what_to_move(
    render: Any, ours: list[Any], audit_dir: Path
) -> None:
    """Our processors at the end of the chain, behind the renderer: the error says so."""
    logger = logging.getLogger("shop")
    structlog.configure(processors=[render, *ours], logger_factory=lambda *_: logger)

    with pytest.raises(AuditNotConfiguredError, match=r"move .*audit_processors"):
        audit_log.info(action="OrderDelete")

    assert not recorded_now(audit_dir)


def test_a_renderer_before_us_leaves_ordinary_calls_alone(
    ours: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where we stand wrongly, ordinary calls do not raise."""
    structlog.configure(processors=[structlog.processors.JSONRenderer(), *ours])

    structlog.get_logger().info("hello")

    assert capsys.readouterr().out == '{"event": "hello"}\n'


def test_capture_logs_raises_and_names_what_to_use_instead(
    ours: list[Any], audit_dir: Path
) -> None:
    """structlog's own test helper takes our place: that must not look like a success."""
    structlog.configure(processors=[*ours, structlog.processors.JSONRenderer()])

    with structlog.testing.capture_logs(), pytest.raises(AuditNotConfiguredError) as caught:
        audit_log.info(action="OrderDelete")

    assert "capture_audit" in str(caught.value)
    assert not recorded_now(audit_dir)


def test_reset_defaults_raises(ours: list[Any]) -> None:
    """A configuration that was reset has lost our processors, and the next call says so."""
    structlog.configure(processors=[*ours, structlog.processors.JSONRenderer()])
    audit_log.info(action="OrderDelete")
    structlog.reset_defaults()

    with pytest.raises(AuditNotConfiguredError):
        audit_log.info(action="OrderDelete")


def test_a_replaced_configuration_takes_effect_for_loggers_in_use(
    ours: list[Any], audit_dir: Path
) -> None:
    """A logger made and used before goes by the configuration in force, cached or not."""
    log = get_logger(user_id="u-1")
    configurations.best_performance(ours)
    log.info(action="First")
    configurations.best_performance([])
    with pytest.raises(AuditNotConfiguredError):
        log.info(action="Second")
    configurations.tuple_of_processors(ours)
    log.info(action="Third")

    assert [entry["action"] for entry in recorded(audit_dir)] == ["First", "Third"]


def test_a_logger_made_before_any_configuration_records(ours: list[Any], audit_dir: Path) -> None:
    """`audit_log = get_logger()` at import, `configure` later: the usual order."""
    log = get_logger().bind(user_id="u-1")

    configurations.best_performance(ours)
    log.info(action="OrderDelete")

    assert recorded(audit_dir)[0]["userId"] == "u-1"


def test_an_exception_of_a_processor_reaches_the_caller_unchanged(ours: list[Any]) -> None:
    """What a foreign processor raises is not taken for anything else."""

    def broken(logger: Any, name: str, event_dict: Any) -> Any:
        raise ZeroDivisionError("mine")

    structlog.configure(processors=[broken, *ours])

    with pytest.raises(ZeroDivisionError, match="mine"):
        audit_log.info(action="OrderDelete")


def test_fields_that_processors_add_do_not_touch_ours(ours: list[Any], audit_dir: Path) -> None:
    """A `TimeStamper` under our own name `time`, a level: ours stand, theirs do not."""
    configurations.timestamps_and_levels_first(ours)

    receipt = audit_log.info(action="OrderDelete")

    (entry,) = recorded(audit_dir)
    assert (entry["level"], entry["time"], entry["event"]) == (35, receipt.time, "Record")
    assert not {"level", "time", "event"} & set(entry["data"])


@pytest.mark.parametrize("name", ["level", "time", "pid", "hostname", "name", "session",
                                  "sequence", "prev", "event"])  # fmt: skip
def test_a_generated_field_cannot_be_set(name: str, ours: list[Any]) -> None:
    """A caller that tries is told, whether it passes or binds the name."""
    structlog.configure(processors=[*ours, structlog.processors.JSONRenderer()])

    with pytest.raises(Exception, match=f"{name} cannot be set"):
        audit_log.info(action="OrderDelete", **{name: "forged"})
    with pytest.raises(Exception, match=f"{name} cannot be set"):
        audit_log.bind(**{name: "forged"})


def test_a_processor_that_copies_the_event_dict_deeply(ours: list[Any], audit_dir: Path) -> None:
    """The call in it is the same one: it knows that it was recorded."""
    structlog.configure(processors=[lambda logger, name, event: copy.deepcopy(event), *ours])

    receipt = audit_log.info(action="A", roles=["admin"])

    (entry,) = recorded_now(audit_dir)
    assert entry["sequence"] == receipt.sequence
    assert entry["data"] == {"roles": ["admin"]}


def test_a_logger_factory_that_wants_a_name(ours: list[Any], audit_dir: Path) -> None:
    """As `logging.getLogger`-like factories of others do."""

    def factory(name: str) -> logging.Logger:
        return logging.getLogger(name)

    structlog.configure(processors=ours, logger_factory=factory)

    audit_log.info(action="A")

    assert len(recorded_now(audit_dir)) == 1
