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

import contextlib
import ipaddress
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import SplitResult, urlsplit

from structlog_audit.chain import identity
from structlog_audit.exceptions import (
    AuditConfigurationError,
    LineRefused,
    Persisted,
    SinkError,
)
from structlog_audit.formats import clef, otlp, rejected
from structlog_audit.sinks._key import Key

if TYPE_CHECKING:
    from structlog_audit.sinks._exchange import Answer, Client

Format = Literal["ndjson", "clef", "otlp"]

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
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between repetitions: doubled each time, and spread at random (full jitter)."""

_REFUSED = frozenset({400, 413, 422})  # for what is in the request
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})  # the same may work later
_NOT_STORED = frozenset({401, 403, 404, 405, 406, 411, 415, 429})  # whatever the server
_HINTS = {
    401: "the server wants a key: set api_key= or AUDIT_SERVER_API_KEY",
    403: "the key is wrong, may not ingest, or the port is not for ingestion: check the key",
    404: "there is no such page: check the URL; it names the server, not its page",
    405: "the page takes no POST: check the URL",
    415: "the server does not take this format: choose another one",
}


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
        accept: looks at the body of a confirming answer; returns what is wrong with it, or None.
        timeout: longest duration of a call in seconds, repetitions included.
        ca: file with the certificates to trust instead of the usual ones.
        client_cert: file with our own certificate.
        client_key: file with its key, if it is not in the same file.
        allow_insecure: accept `http` to another machine: whoever is in between reads and changes
            everything.
        environment_proxies: use the proxies that the environment names.
        compress: send with gzip; the server has to take that (`Content-Encoding`).
        health: path or URL of a page that answers 2xx when the server works; None to only connect.
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
        self.url = _checked_url(url, allow_insecure=allow_insecure)
        if format not in CONTENT_TYPES:
            raise AuditConfigurationError(
                f"a format is one of {', '.join(CONTENT_TYPES)}, not {format!r}"
            )
        if not isinstance(timeout, (int, float)) or not 0 < timeout <= 86_400:
            raise AuditConfigurationError("timeout must be a number of seconds above zero")
        self.format: Format = format
        self.allow_insecure = allow_insecure
        self.timeout = timeout
        self.on_sent: Callable[[], None] | None = None
        self._key = Key(api_key, api_key_file)
        encoding = {"Content-Encoding": "gzip"} if compress else {}
        self._headers = {
            "Content-Type": CONTENT_TYPES[format], **encoding, **_checked_headers(headers or {})
        }  # fmt: skip
        self._compress = compress
        self.confirm = frozenset(confirm)
        self._accept = accept
        self.files = {
            name: None if path is None else _checked_file(name, path)
            for name, path in (("ca", ca), ("client_cert", client_cert), ("client_key", client_key))
        }
        self._environment_proxies = environment_proxies
        self._health = health
        self._max_event_bytes = max_event_bytes
        self._max_payload_bytes = max_payload_bytes
        self._asks = format == "otlp"  # a request without entries is known to be taken
        self._client: Client | None = None
        self._pages = [self.url]
        _check_certificates(self.files)
        if format == "otlp":
            otlp(())  # needs the extra

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_shown(self.url)!r})"

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
            problem = f"it cannot be reached: {error.reason}", _hint_for(error.reason)
        finally:
            self.close()  # a child that is forked later must not have it
        if problem is not None:
            raise SinkError(f"{self!r}: {problem[0]}", persisted="no", hint=problem[1])

    def _health_problem(self, end: float) -> tuple[str, str | None] | None:
        status = self._connected().get(self._health or self.url, end).status
        if self._health is None or status < 300:
            return None
        return f"its health page {_shown(self._health)} answers {status}", _HINTS.get(status)

    def _entry_problem(self, end: float) -> tuple[str, str | None] | None:
        answer = self._connected().post(b"", {**self._headers, **self._proof()}, end)
        status = answer.status
        if status == 404 and self._next_page():
            return self._entry_problem(end)
        if status in self.confirm:
            problem = self._verdict(answer, ())
            return None if problem is None else (problem, None)
        if status in _REFUSED or status == 429:  # of a request without entries, that says nothing
            return None
        return f"it answers {status} to a request without entries", _HINTS.get(status)

    def open(self, session: str) -> None:
        """Do nothing: the connection is made with the first request, and kept."""

    def write(self, lines: Sequence[bytes]) -> None:
        """Post lines; return when the server has confirmed them.

        Raises:
            LineRefused: it refuses one of them.
            SinkError: it did not confirm them.
        """
        end = time.monotonic() + self.timeout
        events = self._events(lines)
        start = 0
        for size in self._portions(events):
            try:
                self._deliver(lines[start : start + size], events[start : start + size], end)
            except LineRefused as refused:
                refused.delivered += start
                raise
            start += size
        if start < len(lines):
            raise self._too_long(start, len(events[start]))

    def close(self) -> None:
        """Close the connection."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    @property
    def page(self) -> str:
        """The URL of the page to which lines are posted."""
        return self._pages[0]

    def request(self, lines: Sequence[bytes]) -> tuple[dict[str, str], bytes]:
        """Return headers (with the key) and body of the request that would post lines."""
        return self._all_headers(lines), self._body(lines, self._events(lines))

    def _all_headers(self, lines: Sequence[bytes]) -> dict[str, str]:
        session, first = identity(lines[0])
        of_these = f"{session}-{first}-{identity(lines[-1])[1]}"
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

    def _next_page(self) -> bool:
        """Turn to the page of older servers, if there is one."""
        if len(self._pages) < 2:
            return False
        del self._pages[0]
        self.close()
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_client": None, "on_sent": None}

    def _verdict(self, answer: Answer, lines: Sequence[bytes]) -> str | None:
        """Return why an answer confirms nothing, or None if it confirms."""
        if answer.status == 409:
            return None if _names(answer.body, lines[-1]) else "409 for something else"
        if self.format == "otlp":
            return _otlp_verdict(answer.body)
        return None if self._accept is None else self._accept(answer.body)

    def _connected(self) -> Client:
        if self._client is None:
            from structlog_audit.sinks._exchange import Client

            cert, key = self.files["client_cert"], self.files["client_key"]
            self._client = Client(
                self._pages[0], ca=self.files["ca"], environment_proxies=self._environment_proxies,
                certificate=None if cert is None else (cert, key or cert),
            )  # fmt: skip
        return self._client

    def _events(self, lines: Sequence[bytes]) -> Sequence[bytes]:
        return [clef(line) + b"\n" for line in lines] if self.format == "clef" else lines

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

    def _too_long(self, delivered: int, size: int) -> LineRefused:
        return LineRefused(
            f"the entry takes {size:,} bytes, and {self!r} no more than {self._max_event_bytes:,}",
            delivered=delivered, hint="lower max_entry_bytes, and big values are cut to fit",
        )  # fmt: skip

    def _deliver(self, lines: Sequence[bytes], events: Sequence[bytes], end: float) -> None:
        """Post events; in halves if the server refuses them for what is in them."""
        refused = self._post(lines, events, end)
        if refused is None:
            return
        if len(events) == 1:
            raise LineRefused(refused, delivered=0, hint="a repeat will not help: see its log")
        half = len(events) // 2
        self._deliver(lines[:half], events[:half], end)
        try:
            self._deliver(lines[half:], events[half:], end)
        except LineRefused as error:
            error.delivered += half
            raise

    def _post(self, lines: Sequence[bytes], events: Sequence[bytes], end: float) -> str | None:
        """Post events, again and again while it may help.

        Returns:
            None when they are confirmed, or why the server refuses what is in them.

        Raises:
            SinkError: they are not confirmed.
        """
        return _Delivery(self, lines, self._body(lines, events), end).run()


class _Again(Exception):
    """What an attempt came to, if another one may come to something else."""

    def __init__(self, problem: str, *, pause: float | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.pause = pause


class _Delivery:
    """One request, and its repetitions."""

    def __init__(self, sink: HttpSink, lines: Sequence[bytes], body: bytes, end: float) -> None:
        self._sink = sink
        self._lines = lines
        self._body = body
        self._end = end
        self._fate: Persisted = "no"
        self._doubt: str | None = None  # why it is not known, when it was not the first time

    def run(self) -> str | None:
        """Post until it is decided, or the time is over.

        Returns:
            None when the lines are confirmed, or why the server refuses what is in them.

        Raises:
            SinkError: they are not confirmed.
        """
        try:
            return self._attempt()
        except _Again as again:
            first = again
        try:
            return self._repeat(first)
        except _Again as again:
            problem = again.problem
        if self._doubt not in (None, problem):
            problem = f"{problem} (before that, with the request under way: {self._doubt})"
        raise self._failure(f"{problem}; no confirmation within {self._sink.timeout:g} s")

    def _repeat(self, first: _Again) -> str | None:
        """Go on after a first attempt, which costs no more than it has to."""
        from tenacity import Retrying, retry_if_exception_type

        made = [first]

        def attempt() -> str | None:
            if made:
                raise made.pop()
            return self._attempt()

        retrying = Retrying(
            retry=retry_if_exception_type(_Again), wait=_pause, stop=self._is_too_late,
            reraise=True,
        )  # fmt: skip
        return retrying(attempt)

    def _is_too_late(self, state: Any) -> bool:
        return time.monotonic() + float(state.upcoming_sleep) >= self._end

    def _attempt(self) -> str | None:
        from structlog_audit.sinks._exchange import NoAnswer

        sink = self._sink
        headers = sink._all_headers(self._lines)
        try:
            answer = sink._connected().post(self._body, headers, self._end, sink.on_sent)
        except NoAnswer as error:
            missing = error
        else:
            return self._weigh(answer)
        if missing.sent:
            self._fate, self._doubt = "unknown", self._doubt or missing.reason
        if missing.untrusted:
            raise self._failure(missing.reason)
        raise _Again(missing.reason, pause=0.0 if missing.stale else None)

    def _weigh(self, answer: Answer) -> str | None:
        status = answer.status
        if status in self._sink.confirm:
            problem = self._sink._verdict(answer, self._lines)
            if problem is None:
                return None
            self._fate = "unknown"
            raise self._failure(problem)
        if status in _REFUSED:
            return f"the server refuses the entry with {status}"
        if status not in _NOT_STORED:
            self._fate = "unknown"
        problem = f"the server answers {status}"
        if 200 <= status < 300:
            problem += ", which confirms nothing"
        if status == 404 and self._sink._next_page():
            raise _Again(problem, pause=0.0)
        if status in _BUSY:
            raise _Again(problem, pause=_retry_after(answer.headers))
        if 300 <= status < 400:
            problem = f"{problem}, a redirect, which is not followed"
        raise self._failure(problem, _HINTS.get(status))

    def _failure(self, problem: str, hint: str | None = None) -> SinkError:
        return SinkError(
            f"{self._sink!r}: {problem}", persisted=self._fate, hint=hint or _hint_for(problem)
        )


def _pause(state: Any) -> float:
    again = state.outcome.exception()
    if again.pause is not None:
        return float(again.pause)
    most = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(state.attempt_number, 10))
    return random.uniform(0, most)  # noqa: S311 - spreads callers, keeps no secret


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a `Retry-After`, which may be a date (RFC 9110, 10.2.3)."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    import email.utils  # slow to import, and rarely needed

    try:
        when = email.utils.parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    return max(0.0, when.timestamp() - time.time())


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


_WORDS = {
    "certificate has expired": "have it renewed; is this machine's clock right?",
    "not valid for": "the certificate is for another host: check the host in the URL",
    "mismatch": "the certificate is for another host: check the host in the URL",
    "certificate is not trusted": "name the authority's certificate with ca= or AUDIT_SERVER_CA",
    "certificate required": "the server wants our certificate: client_cert= and client_key=, or "
    "AUDIT_SERVER_CLIENT_CERT and AUDIT_SERVER_CLIENT_KEY",
    "looked up": "check the host name in the URL",
    "refused": "is the server running, and is the port right?",
    "SSL": "does the server speak TLS there, and does it want a certificate of ours? "
    "check https or http, and the port",
    "closed": "does the server want TLS there? check https or http, and the port",
}
"""Hints, by words of the problem; the first that fits counts."""


def _hint_for(problem: str) -> str | None:
    return next((hint for words, hint in _WORDS.items() if words in problem), None)


def _checked_url(url: str, *, allow_insecure: bool) -> str:
    parts = _parted(url)
    if parts.username is not None or parts.fragment or "apikey" in parts.query.lower():
        raise AuditConfigurationError(
            "the URL of an audit server carries a key or a password, which would end up in logs",
            hint="give it as api_key=, AUDIT_SERVER_API_KEY or AUDIT_SERVER_API_KEY_FILE",
        )
    if parts.scheme == "http" and not allow_insecure and not _is_this_machine(parts.hostname or ""):
        raise AuditConfigurationError(
            f"{_shown(url)} is not encrypted: whoever is in between reads and changes entries",
            hint="use https; where that cannot be had, allow_insecure=True or "
            "AUDIT_SERVER_ALLOW_INSECURE=1 accepts it",
        )
    return url


def _parted(url: str) -> SplitResult:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        if usable and not re.search(r"[\s\x00-\x1f]", url):
            return parts
    raise AuditConfigurationError(
        "the URL of an audit server looks like https://logs.example.com or "
        "https://logs.example.com:8443/seq"
    )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(url: str) -> str:
    """Return a URL without its query, which may hold what is nobody's business."""
    return url.partition("?")[0]


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not isinstance(value, str):
            raise AuditConfigurationError("a header is a name and a text")
        if not re.fullmatch(r"[\x20-\x7e]*", value):
            raise AuditConfigurationError(f"the header {name} has characters that none may have")
    return dict(headers)


def _check_certificates(files: Mapping[str, str | None]) -> None:
    """Read them now: a mistake in them would otherwise look like one of the server's."""
    if files["client_key"] is not None and files["client_cert"] is None:
        raise AuditConfigurationError("client_key is the key of a client_cert, and none is given")
    ca, certificate = files["ca"], files["client_cert"]
    if ca is None and certificate is None:
        return
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca is not None:
            context.load_verify_locations(ca)
    except (ssl.SSLError, OSError) as error:
        raise AuditConfigurationError(
            f"ca: {ca} has no certificate that can be read", hint="it must be in PEM format"
        ) from error
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, files["client_key"], password="")
    except (ssl.SSLError, OSError) as error:
        raise AuditConfigurationError(
            f"client_cert: {certificate} and its key do not go together, or cannot be read",
            hint="both in PEM format; a key in a file of its own is named by client_key= or "
            "AUDIT_SERVER_CLIENT_KEY, and must not have a password",
        ) from error


def _checked_file(name: str, path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if not os.access(text, os.R_OK) or os.path.isdir(text):
        raise AuditConfigurationError(f"{name}: {text} is no file that can be read")
    return text
