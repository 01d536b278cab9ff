"""Seq: a log server whose confirmation means that the entries are on its disk.

Sources: docs.datalust.co (posting raw events, API keys, audit logging). `docs/servers.md` has the
mapping of the fields.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import orjson

from structlog_audit.sinks.http import DEFAULT_TIMEOUT, HttpSink

if TYPE_CHECKING:
    from structlog_audit.sinks._exchange import Answer

PAGES = ("/ingest/clef", "/api/events/raw?clef")
"""Where Seq takes events: since 2024, and before."""


class SeqSink(HttpSink):
    """Posts entries to Seq, or to a server that keeps the same contract.

    Confirmed is 201 and nothing else, from a key that drops nothing.

    Args:
        url: address of the server; it may have a path.
        api_key: the key that may ingest.
        api_key_file: file that holds it; it is read again when it changes.
        timeout: longest duration of a call in seconds, repetitions included.
        ca: file with the certificates to trust instead of the usual ones.
        client_cert: file with our own certificate.
        client_key: file with its key, if it is not in the same file.
        allow_insecure: accept `http` to another machine.
        environment_proxies: use the proxies that the environment names.

    Raises:
        AuditConfigurationError: an argument is unusable.
    """

    key_header = ("X-Seq-ApiKey", "")

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        api_key_file: str | os.PathLike[str] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        ca: str | os.PathLike[str] | None = None,
        client_cert: str | os.PathLike[str] | None = None,
        client_key: str | os.PathLike[str] | None = None,
        allow_insecure: bool = False,
        environment_proxies: bool = False,
    ) -> None:
        super().__init__(
            url, format="clef", api_key=api_key, api_key_file=api_key_file, confirm=(201,),
            timeout=timeout, ca=ca, client_cert=client_cert, client_key=client_key,
            allow_insecure=allow_insecure, environment_proxies=environment_proxies,
        )  # fmt: skip
        self.url = base = self.url.partition("?")[0].rstrip("/")
        self._pages = [base + page for page in PAGES]
        self._health = f"{base}/health"
        self._asks = self._whole = True

    def verdict(self, answer: Answer, lines: Sequence[bytes]) -> str | None:
        try:
            said = orjson.loads(answer.body)
            level = said.get("MinimumLevelAccepted")
        except (ValueError, AttributeError):
            return "it answers 201, and not as Seq does: is something in between?"
        if level is None:
            return None
        return "the key has a minimum level, which drops audit entries: remove it from the key"
