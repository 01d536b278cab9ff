"""One request to a server, repeated while that may help, within one deadline."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from structlog_audit.exceptions import Persisted, SinkError

if TYPE_CHECKING:
    from structlog_audit.sinks._exchange import Answer, Client

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between repetitions: doubled each time, and spread at random (full jitter)."""

REFUSED = frozenset({400, 413, 422})  # for what is in the request
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})  # the same may work later
_NOT_STORED = frozenset({401, 403, 404, 405, 406, 411, 415, 429})  # whatever the server
HINTS = {
    401: "the server wants a key: set api_key= or AUDIT_SERVER_API_KEY",
    403: "the key is wrong, may not ingest, or the port is not for ingestion: check the key",
    404: "there is no such page: check the URL; it names the server, not its page",
    405: "the page takes no POST: check the URL",
    415: "the server does not take this format: choose another one",
}


class Server(Protocol):
    """Where a request goes, and what its answers mean; `HttpSink` is one."""

    confirm: frozenset[int]
    on_sent: Callable[[], None] | None

    @property
    def timeout(self) -> float:
        """Longest duration of a call in seconds."""
        ...

    def connected(self) -> Client:
        """Return the connection; make it if there is none."""
        ...

    def other_page(self) -> bool:
        """Turn to another page; tell whether that was worth a try."""
        ...

    def rejects(self, answer: Answer, lines: Sequence[bytes]) -> str | None:
        """Return why a confirming answer refuses the only line, or None."""
        ...

    def verdict(self, answer: Answer, lines: Sequence[bytes]) -> str | None:
        """Return why an answer confirms nothing, or None if it confirms."""
        ...


class Attempt:
    """What is known of one call of `write`.

    Attributes:
        end: when to give up, on the monotonic clock.
        doubt: whether lines may be stored that nobody confirmed.
    """

    def __init__(self, end: float) -> None:
        self.end = end
        self.doubt = False


class _Again(Exception):
    """What an attempt came to, if another one may come to something else."""

    def __init__(self, problem: str, *, pause: float | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.pause = pause


class Delivery:
    """One request, and its repetitions."""

    def __init__(
        self,
        sink: Server,
        lines: Sequence[bytes],
        headers: Mapping[str, str],
        body: bytes,
        attempt: Attempt,
    ) -> None:
        self._sink = sink
        self._lines = lines
        self._headers = headers
        self._body = body
        self._of = attempt
        self._end = attempt.end
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
        try:
            answer = sink.connected().post(self._body, self._headers, self._end, sink.on_sent)
        except NoAnswer as error:
            missing = error
        else:
            return self._weigh(answer)
        if missing.sent:
            self._doubtful(missing.reason)
        if missing.untrusted:
            raise self._failure(missing.reason)
        raise _Again(missing.reason, pause=0.0 if missing.stale else None)

    def _doubtful(self, why: str) -> None:
        """Take note that the lines may be stored, and that nobody confirmed it."""
        self._fate, self._doubt = "unknown", self._doubt or why
        self._of.doubt = True

    def _weigh(self, answer: Answer) -> str | None:
        status = answer.status
        problem = f"the server answers {status}"
        if status in self._sink.confirm:
            return self._weigh_confirmation(answer)
        if status in REFUSED:
            return f"the server refuses the entry with {status}"
        if status not in _NOT_STORED:
            self._doubtful(problem)
        if 200 <= status < 300:
            problem += ", which confirms nothing"
        if status == 404 and self._sink.other_page():
            raise _Again(problem, pause=0.0)
        if status in _BUSY:
            raise _Again(problem, pause=_retry_after(answer.headers))
        if 300 <= status < 400:
            problem = f"{problem}, a redirect, which is not followed"
        raise self._failure(problem, HINTS.get(status))

    def _weigh_confirmation(self, answer: Answer) -> str | None:
        if not answer.asked:
            problem = f"the server answers {answer.status} to a part of the request"
            self._doubtful(problem)
            raise _Again(problem)
        refused = self._sink.rejects(answer, self._lines)
        if refused is not None:
            return refused
        wrong = self._sink.verdict(answer, self._lines)
        if wrong is None:
            return None
        self._doubtful(wrong)
        raise self._failure(wrong)

    def _failure(self, problem: str, hint: str | None = None) -> SinkError:
        return SinkError(
            f"{self._sink!r}: {problem}", persisted=self._fate, hint=hint or hint_for(problem)
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
        return max(FIRST_PAUSE, float(text[:9]))
    import email.utils  # slow to import, and rarely needed

    try:
        when = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(FIRST_PAUSE, when - time.time())


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


def hint_for(problem: str) -> str | None:
    return next((hint for words, hint in _WORDS.items() if words in problem), None)
