"""The mode `verbose_including_cid`: whole requests and responses are recorded.

It is meant to be switched on for a while, so it is loud: an entry and a warning when it starts, a
line in the report, and an end of its own. What keys and passwords stand in is redacted even then.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any
from urllib.parse import parse_qsl

import orjson

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.processors import Redact
from structlog_audit.settings import MODES, Mode, host_settings
from structlog_audit.values import Marker, plain

LIMIT = 64 * 1024
"""Bytes of each body that are kept."""
MOST_HEADERS = 200
_REDACT = Redact()
_log = logging.getLogger("structlog_audit")


class Verbosity:
    """Whether requests are recorded in full, now.

    Args:
        mode: what the code asks for; the host's environment decides where it says something.

    Raises:
        AuditConfigurationError: there is no such mode, or the environment names another one.
    """

    def __init__(self, mode: Mode | None = None) -> None:
        if mode is not None and mode not in MODES:
            raise AuditConfigurationError(f"mode is one of {', '.join(MODES)}, not {mode!r}")
        host = host_settings()
        if None not in (mode, host.mode) and mode != host.mode:
            raise AuditConfigurationError(
                f"the environment names a mode (AUDIT_LOG_MODE={host.mode}), so code may not name "
                "another",
                hint="remove mode= from the code, or the variable from the environment",
            )
        self._is_on = (host.mode or mode) == "verbose_including_cid"
        self._until = host.verbose_until
        self.is_announced = False

    @property
    def is_due(self) -> bool:
        """Whether it is still to be announced."""
        return not self.is_announced and self.is_active

    @property
    def is_active(self) -> bool:
        """Whether it is in force, and not over yet."""
        return self._is_on and (self._until is None or datetime.now(timezone.utc) < self._until)

    def announcement(self) -> dict[str, object]:
        """Return the entry that is recorded before the first request in full, and warn."""
        until = None if self._until is None else self._until.isoformat()
        _log.warning("requests and responses are recorded in full until %s", until or "further")
        # it is nothing that the client of the first request has done
        nobody = dict.fromkeys(("client_ip", "remote_address", "forwarded_for", "request_id",
                                "trace_id", "span_id", "type"))  # fmt: skip
        return {**nobody, "action": "AuditModeVerbose", "data": {"until": until}}


class Transcript:
    """A request and its response in full, as far as they have come.

    Args:
        line: method and path.
        headers: names in lower case, and values.
        query: the query as it was sent.
    """

    def __init__(self, line: str, headers: Iterable[tuple[str, str]], query: str) -> None:
        listed = list(headers)
        self.request: dict[str, Any] = {"line": line, "headers": _headers(listed)}
        if query:
            self.request["query"] = _form(query)
        self._received = _Body(listed)
        self._answered: _Body | None = None
        self.response: dict[str, Any] = {}

    def receive(self, chunk: bytes) -> None:
        """Take note of a part of the request's body."""
        self._received.add(chunk)

    def start(self, status: int | None, headers: Iterable[tuple[str, str]]) -> None:
        """Take note of the response's head."""
        listed = list(headers)
        self.response = {"status": status, "headers": _headers(listed)}
        self._answered = _Body(listed)

    def send(self, chunk: bytes) -> None:
        """Take note of a part of the response's body."""
        if self._answered is not None:
            self._answered.add(chunk)

    def data(self) -> dict[str, Any]:
        """Return what the outcome carries."""
        answered = {} if self._answered is None else self._answered.data()
        return {
            "request": {**self.request, **self._received.data()},
            "response": {**self.response, **answered},
        }


class _Body:
    """The begin of a body, and what is known of the rest."""

    def __init__(self, headers: Iterable[tuple[str, str]]) -> None:
        types = [value for name, value in headers if name == "content-type"]
        announced = [value for name, value in headers if name == "content-length"]
        self._announced = announced[0] if announced else "0"
        self._type = types[0].partition(";")[0].strip().lower() if types else ""
        self._kept = bytearray()
        self._size = 0
        self._hash = hashlib.sha256()

    def add(self, chunk: bytes) -> None:
        self._size += len(chunk)
        self._hash.update(chunk)
        if len(self._kept) < LIMIT:
            self._kept += chunk[: LIMIT - len(self._kept)]

    def data(self) -> dict[str, Any]:
        if not self._size and self._announced.isdigit() and int(self._announced[:18]):
            return {"body": Marker("not read", bytes=int(self._announced[:18]))}
        if not self._size:
            return {}
        return {"body": plain(self._content(), rule=_REDACT)}

    def _content(self) -> object:
        whole = self._size == len(self._kept)
        is_json = self._type == "application/json" or self._type.endswith("+json")
        if whole and is_json:
            try:
                return orjson.loads(self._kept)
            except ValueError:
                return self._marker("no json")
        if whole and self._type == "application/x-www-form-urlencoded":
            return _form(self._kept.decode("utf-8", "replace"))
        if self._type.startswith("text/"):
            text = self._kept.decode("utf-8", "replace")
            return text if whole else Marker("cut", begin=text, **self._known())
        # of what was cut, names cannot be told from values, so nothing could be redacted
        return self._marker("bytes" if whole else "cut")

    def _marker(self, what: str) -> Marker:
        return Marker(what, **self._known())

    def _known(self) -> dict[str, Any]:
        return {"bytes": self._size, "sha256": self._hash.hexdigest()}


def _headers(headers: Iterable[tuple[str, str]]) -> Any:
    return plain(_joined(list(headers)[:MOST_HEADERS]), rule=_REDACT)


def _form(text: str) -> Any:
    pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=None)[:MOST_HEADERS]
    return plain(_joined(pairs), rule=_REDACT)


def _joined(pairs: Iterable[tuple[str, str]]) -> dict[str, object]:
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}
