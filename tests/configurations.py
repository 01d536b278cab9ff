"""The configurations that structlog's documentation shows, each with room for our processors.

Each takes our processors (none, to see what the configuration does alone) and gives back what was
written so far.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from typing import Any

import orjson
import structlog
from structlog import dev, processors, stdlib
from structlog.contextvars import merge_contextvars

Ours = list[Any]
Output = Callable[[], str]


def _text_file() -> tuple[io.StringIO, Output]:
    file = io.StringIO()
    return file, file.getvalue


def _stdlib_file(level: int = logging.DEBUG) -> tuple[logging.Handler, Output]:
    file, output = _text_file()
    handler = logging.StreamHandler(file)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    return handler, output


def default(ours: Ours) -> Output:
    """structlog as it comes."""
    structlog.reset_defaults()
    file, output = _text_file()
    given = structlog.get_config()["processors"]
    structlog.configure(
        processors=[given[0], *ours, *given[1:]], logger_factory=structlog.PrintLoggerFactory(file)
    )
    return output


def native_filter_at_warning(ours: Ours) -> Output:
    """Native filtering: methods below WARNING do nothing at all."""
    file, output = _text_file()
    structlog.configure(
        processors=[
            merge_contextvars,
            *ours,
            processors.add_log_level,
            processors.StackInfoRenderer(),
            dev.set_exc_info,
            processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
            dev.ConsoleRenderer(colors=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(file),
        cache_logger_on_first_use=False,
    )
    return output


def best_performance(ours: Ours) -> Output:
    """JSON as bytes, cached loggers, native filtering."""
    file = io.BytesIO()
    structlog.configure(
        cache_logger_on_first_use=True,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        processors=[
            merge_contextvars,
            *ours,
            processors.add_log_level,
            processors.format_exc_info,
            processors.TimeStamper(fmt="iso", utc=True),
            processors.JSONRenderer(serializer=orjson.dumps),
        ],
        logger_factory=structlog.BytesLoggerFactory(file),
    )
    return lambda: file.getvalue().decode()


def stdlib_rendered_within_structlog(ours: Ours) -> Output:
    """Everything is done by structlog, and logging gets the text."""
    _, output = _stdlib_file()
    structlog.configure(
        processors=[
            *ours,
            stdlib.filter_by_level,
            stdlib.add_logger_name,
            stdlib.add_log_level,
            stdlib.PositionalArgumentsFormatter(),
            processors.TimeStamper(fmt="iso"),
            processors.StackInfoRenderer(),
            processors.format_exc_info,
            processors.UnicodeDecoder(),
            processors.CallsiteParameterAdder({processors.CallsiteParameter.FUNC_NAME}),
            processors.JSONRenderer(),
        ],
        wrapper_class=stdlib.BoundLogger,
        logger_factory=stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    return output


def stdlib_filter_first(ours: Ours) -> Output:
    """`filter_by_level` before everything, at the level INFO."""
    _, output = _stdlib_file(logging.INFO)
    structlog.configure(
        processors=[stdlib.filter_by_level, *ours, stdlib.add_log_level, processors.JSONRenderer()],
        wrapper_class=stdlib.BoundLogger,
        logger_factory=stdlib.LoggerFactory(),
    )
    return output


def rendered_by_logging(ours: Ours) -> Output:
    """Logging's own formatter renders keyword arguments."""
    handler, output = _stdlib_file()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s %(n)s", defaults={"n": "-"}))
    structlog.configure(
        processors=[
            merge_contextvars,
            *ours,
            stdlib.filter_by_level,
            stdlib.PositionalArgumentsFormatter(),
            processors.StackInfoRenderer(),
            stdlib.render_to_log_kwargs,
        ],
        wrapper_class=stdlib.BoundLogger,
        logger_factory=stdlib.LoggerFactory(),
    )
    return output


def processor_formatter(ours: Ours) -> Output:
    """structlog's `ProcessorFormatter` renders in logging."""
    handler, output = _stdlib_file()
    shared = [stdlib.add_log_level, processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S")]
    handler.setFormatter(
        stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, stdlib.ExtraAdder()],
            processors=[
                stdlib.ProcessorFormatter.remove_processors_meta,
                dev.ConsoleRenderer(colors=False),
            ],
        )
    )
    structlog.configure(
        processors=[
            merge_contextvars,
            *ours,
            *shared,
            stdlib.PositionalArgumentsFormatter(),
            stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=stdlib.LoggerFactory(),
        wrapper_class=stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return output


def tuple_of_processors(ours: Ours) -> Output:
    """A tuple instead of a list, as type checkers like it."""
    file, output = _text_file()
    structlog.configure(
        processors=(
            merge_contextvars,
            *ours,
            processors.dict_tracebacks,
            processors.KeyValueRenderer(),
        ),
        logger_factory=structlog.WriteLoggerFactory(file),
    )
    return output


def renamed_event(ours: Ours) -> Output:
    """`EventRenamer` after us, logfmt."""
    file, output = _text_file()
    structlog.configure(
        processors=[
            merge_contextvars,
            *ours,
            processors.add_log_level,
            processors.EventRenamer("msg", "_event"),
            processors.LogfmtRenderer(key_order=["msg"], bool_as_flag=True),
        ],
        logger_factory=structlog.PrintLoggerFactory(file),
    )
    return output


def renamed_event_first(ours: Ours) -> Output:
    """`EventRenamer` before us."""
    file, output = _text_file()
    structlog.configure(
        processors=[processors.EventRenamer("msg"), *ours, processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(file),
    )
    return output


def timestamps_and_levels_first(ours: Ours) -> Output:
    """Processors that add fields of their own stand before us."""
    file, output = _text_file()
    structlog.configure(
        processors=[
            processors.add_log_level,
            processors.TimeStamper(fmt="iso", key="time"),
            processors.CallsiteParameterAdder({processors.CallsiteParameter.PROCESS}),
            processors.StackInfoRenderer(),
            *ours,
            processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(file),
    )
    return output


def copied_event_dict(ours: Ours) -> Output:
    """A processor replaces the event dict by a copy."""
    file, output = _text_file()
    structlog.configure(
        processors=[lambda _, __, event: dict(event), *ours, processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(file),
    )
    return output


def recreated_stdlib_defaults(ours: Ours) -> Output:
    """`structlog.stdlib.recreate_defaults()`, then our processors put into it in place."""
    _, output = _stdlib_file()
    stdlib.recreate_defaults(log_level=None)
    given = structlog.get_config()["processors"]
    at = given.index(merge_contextvars) + 1
    given[at:at] = ours
    return output


ALL = [
    default,
    native_filter_at_warning,
    best_performance,
    stdlib_rendered_within_structlog,
    stdlib_filter_first,
    rendered_by_logging,
    processor_formatter,
    tuple_of_processors,
    renamed_event,
    renamed_event_first,
    timestamps_and_levels_first,
    copied_event_dict,
    recreated_stdlib_defaults,
]

MERGING = [
    default,
    native_filter_at_warning,
    best_performance,
    rendered_by_logging,
    processor_formatter,
    tuple_of_processors,
    renamed_event,
    recreated_stdlib_defaults,
]
"""Those that have `merge_contextvars` before us."""


def _failed() -> Exception:
    try:
        raise LookupError("no such order")
    except LookupError as error:
        return error


FAILED = _failed()


def ordinary_calls() -> None:
    """Make ordinary calls of many shapes; some bear names that mean something to us."""
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        log = structlog.get_logger("shop").bind(user_id=7, data={"a": 1}, n=1)
        log.debug("below most levels")
        log.info("order %s stored", "o-1", action="OrderStore", session="s", sequence=3, app="x")
        log.warning("nearly full", type="REST", time="noon", prev=None, hostname="h", n=2)
        log.error("failed", exc_info=FAILED)
        logging.getLogger("foreign").warning("from elsewhere", extra={"n": 3})
        sys.stdout.flush()
