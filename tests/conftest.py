"""A clean slate for every test: structlog, logging, environment, settings."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from reading import session_files, written_when_it_says
from running import environment

from structlog_audit import (
    AuditError,
    AuditHandler,
    FileSink,
    _pytest,
    clear_audit_context,
    exclusions,
    settings,
)


def pytest_configure(config: pytest.Config) -> None:
    """Have the fixture at hand where the package is not installed but lies beside the tests."""
    if not config.pluginmanager.is_registered(_pytest):
        config.pluginmanager.register(_pytest, "structlog_audit")


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start and end without any configuration."""
    for name in list(os.environ):
        if name.startswith("AUDIT_"):
            monkeypatch.delenv(name)
    host = settings._Host()
    monkeypatch.setattr(settings, "_host", host)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    _forget_context()
    yield
    _forget_context()
    logging.disable(logging.NOTSET)
    root.setLevel(level)
    root.handlers[:] = handlers
    if host._handler is not None:
        with contextlib.suppress(AuditError):
            host._handler.close()


def _forget_context() -> None:
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    clear_audit_context()
    exclusions._in_force = exclusions._InForce()


@pytest.fixture(scope="session")
def month(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A month of a service, recorded by three processes; not to be changed."""
    directory = tmp_path_factory.mktemp("month") / "audit"
    script, keys = Path(__file__).with_name("year.py"), directory.with_name("keys.pub")
    command = [sys.executable, script, directory, keys, "--days", "30", "--processes", "3"]
    subprocess.run(list(map(str, command)), check=True, timeout=120, env=environment())
    for path in session_files(directory):
        written_when_it_says(path)
    return directory


@pytest.fixture
def audit_dir(tmp_path: Path) -> Path:
    """A directory for session files; it is not there yet."""
    return tmp_path / "audit"


@pytest.fixture
def make_handler(audit_dir: Path) -> Iterator[Callable[..., AuditHandler]]:
    """Make handlers, writing to files in `audit_dir` or to the sink given; closed afterwards."""
    made: list[AuditHandler] = []

    def make(sink: Any = None, **options: Any) -> AuditHandler:
        made.append(AuditHandler(FileSink(audit_dir) if sink is None else sink, **options))
        return made[-1]

    yield make
    for handler in made:
        with contextlib.suppress(AuditError):
            handler.close()


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each request to a server came to: an Answer or a NoAnswer."""
    from structlog_audit.sinks._exchange import Answer, Client, NoAnswer

    found: list[Any] = []
    post = Client.post

    def noted(*arguments: Any) -> Answer:
        try:
            found.append(answer := post(*arguments))
        except NoAnswer as error:
            found.append(error)
            raise
        return answer

    monkeypatch.setattr(Client, "post", noted)
    return found


@pytest.fixture
def handler(make_handler: Callable[..., AuditHandler]) -> AuditHandler:
    """A handler that writes to files in `audit_dir`."""
    return make_handler()
