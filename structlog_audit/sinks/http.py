"""Servers: lines are posted, and durable when the server confirms them.

1. One deadline bounds everything: connecting, sending, waiting, pauses and repetitions.
2. Confirmed is what `confirm` names, and nothing else.
3. Whatever may have reached the server and was not answered is neither stored nor lost: the same
   bytes, which carry session and sequence, are sent again while there is time. Then the fate of the
   lines is unknown.
4. An answer that would be the same again ends the call at once: a refused key, a wrong path, a
   redirect (which would carry the key elsewhere).
5. A request that is refused for what is in it is sent again in halves, in order, until the line is
   found that is to blame; it fails alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

from structlog_audit.chain import identity, line_hash
from structlog_audit.exceptions import AuditConfigurationError, LineRefused, SinkError
from structlog_audit.formats import clef, otlp, rejected
from structlog_audit.sinks._address import (
    check_certificates,
    checked_file,
    checked_headers,
    checked_url,
    shown,
)
from structlog_audit.sinks._delivery import HINTS, REFUSED, Attempt, Delivery, hint_for
from structlog_audit.sinks._key import Key

if TYPE_CHECKING:
    from structlog_audit.sinks._exchange import Answer, Client

Format = Literal["ndjson", "clef", "otlp"]
Problem = tuple[str, str | None]
"""What is wrong, and what to do."""

CONTENT_TYPES: dict[str, str] = {
    "ndjson": "application/x-ndjson",
    "clef": "application/vnd.serilog.clef",
    "otlp": "application/x-protobuf",
}
DEFAULT_TIMEOUT = 5.0
"""Seconds; half of a handler's, so that a second sink has its share."""
HEALTH_TIMEOUT = 3.0
"""Seconds for the question at start; Seq's page may hang while it starts (seq-tickets#2391)."""
MAX_EVENT_BYTES = 256 * 1024
MAX_PAYLOAD_BYTES = 10 * 2**20
"""Seq's limits in its default configuration: 256 KiB an event, 10 MiB a request."""


class HttpSink:
    """Posts lines to a server.

    What its confirmation proves is up to the server; `docs/servers.md` has a table.

    Args:
        url: where to post. `https`, or `http` to this machine.
        format: `ndjson` (our lines, byte for byte), `clef` (Seq's events), `otlp` (OpenTelemetry
            protobuf; needs the extra `otlp`).
        headers: sent with every request.
        api_key: sent as `Authorization: Bearer`.
        api_key_file: file that holds it; it is read again when it changes.
        confirm: status codes that confirm. With 409 among them, such an answer counts only if its
            body names session and sequence of the last line.
        accept: looks at the body of a confirming answer; returns what is wrong with it, or None. It
            must be quick: its time is not bounded.
        timeout: longest duration of a call in seconds, repetitions included.
        ca: file with the certificates to trust instead of the usual ones.
        client_cert: file with our own certificate.
        client_key: file with its key, if it is not in the same file.
        allow_insecure: accept `http` to another machine: whoever is in between reads and changes
            everything.
        environment_proxies: use the proxies that the environment names.
        compress: send with gzip; the server has to take that (`Content-Encoding`).
        health: URL of a page that answers 2xx when the server works; None to only connect.
        max_event_bytes: longest line that the server takes.
        max_payload_bytes: longest request that it takes.

    Raises:
        AuditConfigurationError: an argument is unusable.
    """

    key_header = ("Authorization", "Bearer ")

    def __init__(
        self,
        url: str,
        *,
        format: Format = "ndjson",
        headers: Mapping[str, str] | None = None,
        api_key: str | None = None,
        api_key_file: str | os.PathLike[str] | None = None,
        confirm: Sequence[int] = (200, 201, 202, 204),
        accept: Callable[[bytes], str | None] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        ca: str | os.PathLike[str] | None = None,
        client_cert: str | os.PathLike[str] | None = None,
        client_key: str | os.PathLike[str] | None = None,
        allow_insecure: bool = False,
        environment_proxies: bool = False,
        compress: bool = False,
        health: str | None = None,
        max_event_bytes: int = MAX_EVENT_BYTES,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
    ) -> None:
        self.url = checked_url(url, allow_insecure=allow_insecure)
        if health is not None:
            checked_url(health, allow_insecure=allow_insecure)
        _check_request(format, timeout, max_event_bytes, max_payload_bytes)
        _check_confirmation(confirm, accept)
        self.format: Format = format
        self.allow_insecure = allow_insecure
        self.timeout = timeout
        self.on_sent: Callable[[], None] | None = None
        self._key = Key(api_key, api_key_file)
        encoding = {"Content-Encoding": "gzip"} if compress else {}
        self._headers = {
            "Content-Type": CONTENT_TYPES[format], **encoding, **checked_headers(headers or {})
        }  # fmt: skip
        self._compress = compress
        self.confirm = frozenset(confirm)
        self._accept = accept
        self.files = {
            name: None if path is None else checked_file(name, path)
            for name, path in (("ca", ca), ("client_cert", client_cert), ("client_key", client_key))
        }
        self._environment_proxies = environment_proxies
        self._health = health
        self._max_event_bytes = max_event_bytes
        self._max_payload_bytes = max_payload_bytes
        self._asks = format == "otlp"  # a request without entries is known to be taken
        self._whole = False  # a server that refuses a request may have stored a part of it
        self._client: Client | None = None
        self._pages = [self.url]
        self._older = False
        check_certificates(self.files)
        if format == "otlp":
            otlp(())  # needs the extra

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self.url)!r})"

    def check(self) -> None:
        """Ask whether the server is there, and where that is known to be harmless, whether it lets
        us in: by a request without entries.

        Raises:
            SinkError: it is not, it is not who it should be, or it does not let us in.
        """
        from structlog_audit.sinks._exchange import NoAnswer

        end = time.monotonic() + min(HEALTH_TIMEOUT, self.timeout)
        try:
            problem = self._health_problem(end) or (
                self._entry_problem(end) if self._asks else None
            )
        except NoAnswer as error:
            problem = f"it cannot be reached: {error.reason}", hint_for(error.reason)
        if problem is not None:
            raise SinkError(f"{self!r}: {problem[0]}", persisted="no", hint=problem[1])

    def _health_problem(self, end: float) -> Problem | None:
        with closing(self._new_client(self.page)) as client:
            status = client.get(self._health or self.url, end).status
        if self._health is None or status < 300:
            return None
        return f"its health page {shown(self._health)} answers {status}", HINTS.get(status)

    def _entry_problem(self, end: float) -> Problem | None:
        problem: Problem | None = None
        for page in self._pages:
            with closing(self._new_client(page)) as client:
                answer = client.post(b"", {**self._headers, **self._proof()}, end)
            problem = self._problem_of(answer)
            if answer.status != 404:
                break
        return problem

    def _problem_of(self, answer: Answer) -> Problem | None:
        status = answer.status
        if status in self.confirm:
            problem = self.verdict(answer, ())
            return None if problem is None else (problem, None)
        if status in REFUSED or status == 429:  # of a request without entries, that says nothing
            return None
        return f"it answers {status} to a request without entries", HINTS.get(status)

    def open(self, session: str) -> None:
        """Do nothing: the connection is made with the first request, and kept."""

    def write(self, lines: Sequence[bytes]) -> None:
        """Post lines; return when the server has confirmed them.

        Raises:
            LineRefused: it refuses one of them.
            SinkError: it did not confirm them.
        """
        attempt = Attempt(time.monotonic() + self.timeout)
        events = self._events(lines)
        start = 0
        try:
            for size in self._portions(events):
                end = start + size
                self._deliver(lines[start:end], events[start:end], attempt)
                start = end
            if start < len(events):
                raise self._too_long(len(events[start]))
            if start < len(lines):
                raise LineRefused(_NO_LINE, delivered=0)
        except SinkError as error:
            error.delivered += start
            if attempt.doubt or (error.delivered and not isinstance(error, LineRefused)):
                error.persisted = "unknown"
            raise

    def close(self) -> None:
        """Close the connection."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    @property
    def page(self) -> str:
        """The URL of the page to which lines are posted."""
        return self._pages[self._older]

    @property
    def target(self) -> str:
        """Where lines go, in full and without what is secret: for the forwarder's cursors."""
        query = self.url.partition("?")[2]
        mark = f" ?{sha256(query.encode()).hexdigest()[:12]}" if query else ""
        return f"{self!r}{mark}" if self._asks else f"{self!r}{mark} {self.format}"

    def request(self, lines: Sequence[bytes]) -> tuple[dict[str, str], bytes]:
        """Return headers (with the key) and body of the request that would post lines."""
        return self._all_headers(lines), self._body(lines, self._events(lines))

    def _all_headers(self, lines: Sequence[bytes]) -> dict[str, str]:
        session, first = identity(lines[0])
        last = lines[-1]  # its hash covers all before it: other bytes have another key
        of_these = f"{session}-{first}-{identity(last)[1]}-{line_hash(last[:-1])[:16]}"
        return {**self._headers, "Idempotency-Key": of_these, **self._proof()}

    def _proof(self) -> dict[str, str]:
        key = self._key.text()
        name, before = self.key_header
        return {} if key is None else {name: before + key}

    def _body(self, lines: Sequence[bytes], events: Sequence[bytes]) -> bytes:
        body = otlp(lines) if self.format == "otlp" else b"".join(events)
        if self._compress:
            import gzip

            body = gzip.compress(body, mtime=0)  # a repetition has the same bytes
        return body

    def other_page(self) -> bool:
        """Turn to the page of older servers, or back; tell whether that was worth a try."""
        if len(self._pages) < 2:
            return False
        self.close()
        older, self._older = self._older, not self._older
        return not older

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_client": None, "on_sent": None}

    def rejects(self, answer: Answer, lines: Sequence[bytes]) -> str | None:
        """Return why a confirming answer refuses the only line, or None."""
        if self.format == "otlp" and len(lines) == 1 and answer.status != 409:
            with suppress(ValueError):
                return "the server rejects the record" if rejected(answer.body) else None
        return None

    def verdict(self, answer: Answer, lines: Sequence[bytes]) -> str | None:
        """Return why an answer confirms nothing, or None if it confirms."""
        if answer.status == 409:
            return None if _names(answer.body, lines[-1]) else "409 for something else"
        if self.format == "otlp":
            return _otlp_verdict(answer.body)
        return None if self._accept is None else self._accept(answer.body)

    def connected(self) -> Client:
        if self._client is None:
            self._client = self._new_client(self.page)
        return self._client

    def _new_client(self, page: str) -> Client:
        from structlog_audit.sinks._exchange import Client

        cert, key = self.files["client_cert"], self.files["client_key"]
        try:
            return Client(
                page, ca=self.files["ca"], environment_proxies=self._environment_proxies,
                certificate=None if cert is None else (cert, key or cert),
            )  # fmt: skip
        except ValueError as error:
            reason = f"{self!r} cannot be used as it is configured: {error}"
        raise SinkError(reason, persisted="no", hint="check the URL and the files")

    def _events(self, lines: Sequence[bytes]) -> Sequence[bytes]:
        """Return what stands for each line in a request; up to one that is none of ours."""
        if self.format != "clef":
            return lines
        events = []
        for line in lines:
            try:
                events.append(clef(line) + b"\n")
            except ValueError:
                break
        return events

    def _portions(self, events: Sequence[bytes]) -> list[int]:
        """Return how many events go into each request; ends before one that is too long."""
        portions: list[int] = []
        count = size = 0
        for event in events:
            if len(event) > min(self._max_event_bytes, self._max_payload_bytes - 1):
                break
            if count and size + len(event) >= self._max_payload_bytes:
                portions.append(count)
                count = size = 0
            count, size = count + 1, size + len(event)
        return [*portions, count] if count else portions

    def _too_long(self, size: int) -> LineRefused:
        return LineRefused(
            f"the entry takes {size:,} bytes, and {self!r} no more than {self._max_event_bytes:,}",
            delivered=0, hint="lower max_entry_bytes, and big values are cut to fit",
        )  # fmt: skip

    def _deliver(self, lines: Sequence[bytes], events: Sequence[bytes], attempt: Attempt) -> None:
        """Post events; in halves if the server refuses them for what is in them."""
        refused = self._post(lines, events, attempt)
        if refused is None:
            return
        if len(events) == 1:
            raise LineRefused(
                refused, delivered=0, doubtful=attempt.doubt,
                hint="a repeat will not help: see its log",
            )  # fmt: skip
        if not self._whole:
            attempt.doubt = True
        half = len(events) // 2
        self._deliver(lines[:half], events[:half], attempt)
        try:
            self._deliver(lines[half:], events[half:], attempt)
        except SinkError as error:
            error.delivered += half
            raise

    def _post(
        self, lines: Sequence[bytes], events: Sequence[bytes], attempt: Attempt
    ) -> str | None:
        """Post events, again and again while it may help.

        Returns:
            None when they are confirmed, or why the server refuses what is in them.

        Raises:
            SinkError: they are not confirmed.
        """
        try:
            headers, body = self._all_headers(lines), self._body(lines, events)
        except ValueError:
            return _NO_LINE
        except SinkError as error:
            raise SinkError(f"{self!r}: {error.reason}", persisted="no") from None
        before = attempt.doubt
        refused = Delivery(self, lines, headers, body, attempt).run()
        if refused is None:  # what was in doubt on the way is confirmed
            attempt.doubt = before
        return refused


def _check_request(
    format: object, timeout: object, event_bytes: object, payload_bytes: object
) -> None:
    """Refuse what no request could be made with."""
    if not isinstance(format, str) or format not in CONTENT_TYPES:
        raise AuditConfigurationError(
            f"a format is one of {', '.join(CONTENT_TYPES)}, not {format!r}"
        )
    if not isinstance(timeout, (int, float)) or not 0 < timeout <= 86_400:
        raise AuditConfigurationError("timeout must be a number of seconds above zero")
    for name, most in (("max_event_bytes", event_bytes), ("max_payload_bytes", payload_bytes)):
        if type(most) is not int or most < 1:
            raise AuditConfigurationError(f"{name} must be a number of bytes above zero")


def _check_confirmation(confirm: object, accept: object) -> None:
    """Refuse what no answer could be judged by."""
    if not isinstance(confirm, Collection) or not all(type(code) is int for code in confirm):
        raise AuditConfigurationError("confirm is a list of status codes, such as [200]")
    if not confirm:
        raise AuditConfigurationError("confirm is empty: nothing would ever be confirmed")
    if accept is not None and not callable(accept):
        raise AuditConfigurationError("accept must be callable: it is given the answer's body")


_NO_LINE = "it is no line that an AuditHandler writes"


def _names(body: bytes, line: bytes) -> bool:
    import orjson

    session, sequence = identity(line)
    try:
        named = orjson.loads(body)
        return bool(named["session"] == session and named["sequence"] == sequence)
    except (ValueError, KeyError, TypeError):
        return False


def _otlp_verdict(body: bytes) -> str | None:
    try:
        count = rejected(body)
    except ValueError:
        return "the answer is no OTLP answer"
    return f"the server rejected {count} of the records" if count else None
