"""What is left out of implicit auditing, and why; every exclusion is there to be seen.

Exclusions are configuration. They are looked at in their order before the handler runs, and the
first that fits counts. `doctor` lists them, and the first line of a session carries a digest of
them, so that leaving something more out cannot go unnoticed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from structlog_audit.exceptions import AuditConfigurationError

F = TypeVar("F")
Kind = Literal["health", "public_read", "own_read", "own_write", "elsewhere"]
KINDS: dict[str, str] = {
    "health": "a health probe",
    "public_read": "an unprivileged read of data that is not sensitive",
    "own_read": "an unprivileged read of data about the caller",
    "own_write": "an unprivileged write that touches only the caller",
    "elsewhere": "audited by another interceptor",
}
"""The four exclusions of the systems that we follow; a privileged caller is never left out by the
last three of them. And what is no exclusion, but said by whoever sees more of it: a GraphQL
operation is no more than a POST to the HTTP middleware."""
READS = frozenset({"GET", "HEAD", "OPTIONS", "QUERY", "SUBSCRIPTION"})
WEBSOCKET = "WEBSOCKET"
"""What stands for the method of a WebSocket, which is no read unless an exclusion says so."""
_ODD = re.compile(r"(^|/)\.{1,2}(/|$)|//|\\|%|[\x00-\x1f]")  # a path that may mean another one
EXEMPT = "__audit_exempt__"
"""Attribute of a view that carries its exclusion."""


class Asked(Protocol):
    """What is asked for."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def route(self) -> str | None: ...
    @property
    def operation(self) -> str | None: ...
    @property
    def raw(self) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclude:
    """Requests that are not audited; all that is given must fit.

    Args:
        kind: which of the four exclusions it is: `health`, `public_read`, `own_read`, `own_write`;
            or `elsewhere`, for what another interceptor audits.
        reason: why, for whoever reads the report.
        path: the path, with `*` for any text.
        method: `GET`, or several; `WEBSOCKET` for WebSockets; of GraphQL, `QUERY`, `MUTATION` or
            `SUBSCRIPTION`. Without it, what leaves out reads fits `GET`, `HEAD`, `OPTIONS`, `QUERY`
            and `SUBSCRIPTION` alone, and everything else fits any method.
        route: name of the route, with `*` for any text.
        operation: root field of a GraphQL operation, with `*` for any text; every root field of
            an operation must be left out. The name that the client gives it counts for nothing.
        when: called with the framework's request; tells whether it fits.

    Raises:
        AuditConfigurationError: it makes no sense.
    """

    kind: Kind
    reason: str
    path: str | None = None
    method: str | tuple[str, ...] | None = None
    route: str | None = None
    operation: str | None = None
    when: Callable[[Any], bool] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise AuditConfigurationError(
                f"the kind of an exclusion is one of {', '.join(KINDS)}, not {self.kind!r}"
            )
        if not isinstance(self.reason, str) or not self.reason.strip():
            raise AuditConfigurationError("an exclusion needs a reason, for who reads the report")
        for name in ("path", "route", "operation"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise AuditConfigurationError(f"{name}= of an exclusion is text, not {value!r}")
        if self.path is not None and not self.path.startswith(("/", "*")):
            raise AuditConfigurationError(f"a path begins with /, not {self.path!r}")
        if self.when is not None and not callable(self.when):
            raise AuditConfigurationError("when= must be callable: it is given the request")
        is_open = _says_nothing(self.operation) and not (self.operation and self.methods)
        if is_open and all(map(_says_nothing, (self.path, self.route))) and self.when is None:
            raise AuditConfigurationError(
                "an exclusion names a path, a route, a GraphQL operation or a condition",
                hint="to leave everything out, do not install the middleware",
            )
        self._check_methods()

    def _check_methods(self) -> None:
        given = (self.method,) if isinstance(self.method, str) else self.method
        if given is not None and not (
            isinstance(given, (tuple, list)) and given and all(map(_is_method, given))
        ):
            raise AuditConfigurationError(
                f"method= of an exclusion is a method or several, not {self.method!r}",
                hint='for example method="GET" or method=("GET", "HEAD")',
            )
        if self.kind in ("public_read", "own_read") and not self.methods <= READS | {WEBSOCKET}:
            writes = ", ".join(sorted(self.methods - READS - {WEBSOCKET}))
            raise AuditConfigurationError(f"{self.kind} leaves out reads: {writes} is none")

    def __str__(self) -> str:
        words = [
            f"{name} {value}"
            for name, value in (
                ("path", self.path),
                ("method", " or ".join(sorted(self.methods)) or None),
                ("route", self.route),
                ("operation", self.operation),
                ("when", None if self.when is None else _name(self.when)),
            )
            if value is not None
        ]
        return f"{', '.join(words)}: {KINDS[self.kind]} ({self.reason})"

    @property
    def methods(self) -> frozenset[str]:
        """The methods that fit; none given, all fit (or all reads, of what leaves out reads)."""
        if self.method is None:
            return READS if self.kind in ("public_read", "own_read") else frozenset()
        given = (self.method,) if isinstance(self.method, str) else self.method
        return frozenset(method.upper() for method in given)

    @property
    def leaves_out_privileged(self) -> bool:
        """Whether privileged callers are left out as well."""
        return self.kind in ("health", "elsewhere")

    def fits(self, asked: Asked) -> bool:
        """Tell whether it fits what is asked for."""
        if self.methods and asked.method not in self.methods:
            return False
        if self.path is not None and (
            _ODD.search(asked.path) is not None or not is_like(self.path, asked.path)
        ):
            return False
        return (
            is_like(self.route, asked.route)
            and is_like(self.operation, asked.operation)
            and (self.when is None or self.when(asked.raw) is True)
        )


def audit_exempt(*, kind: Kind, reason: str) -> Callable[[F], F]:
    """Leave a view out of auditing.

    Args:
        kind: which of the four exclusions it is.
        reason: why, for whoever reads the report.
    """

    def decorate(view: F) -> F:
        name = _name(view)
        setattr(view, EXEMPT, Exclude(kind=kind, reason=reason, route=name))
        register(f"view {name}", [getattr(view, EXEMPT)])
        return view

    return decorate


class _InForce:
    """The exclusions in force, by the place where they are configured."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[Exclude, ...]] = {}
        self.digest: str | None = None


_in_force = _InForce()


def register(place: str, exclusions: Iterable[Exclude]) -> None:
    """Take note of exclusions, for the report and the digest.

    What was noted at the same place before stays: two interceptors of a kind may be in force.
    """
    known = {str(one): one for one in _in_force.places.get(place, ())}
    _in_force.places[place] = tuple({**known, **{str(one): one for one in exclusions}}.values())
    text = "\n".join(sorted(f"{place}: {line}" for place, line in listed()))
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    _in_force.digest = digest if text else None


def listed() -> list[tuple[str, str]]:
    """Return all exclusions that are in force: where they are configured, and what they say."""
    return [(place, str(one)) for place, several in _in_force.places.items() for one in several]


def digest() -> str | None:
    """Return a digest of the exclusions in force, or None without any."""
    return _in_force.digest


def _says_nothing(pattern: str | None) -> bool:
    """Tell whether a pattern is missing, or fits everything."""
    return pattern is None or ("*" in pattern and not pattern.strip("/*")) or not pattern


def _is_method(method: object) -> bool:
    return isinstance(method, str) and method.isalpha()


def is_like(wanted: str | None, found: str | None) -> bool:
    """Tell whether a text fits a pattern in which `*` stands for any text.

    In one pass: a client chooses the text, and must not choose how long this takes.
    """
    if wanted is None:
        return True
    if found is None:
        return False
    first, *middle = wanted.split("*")
    if not middle:
        return found == wanted
    last = middle.pop()
    position, end = len(first), len(found) - len(last)
    if position > end or not (found.startswith(first) and found.endswith(last)):
        return False
    for part in middle:
        position = found.find(part, position, end)
        if position < 0:
            return False
        position += len(part)
    return True


def _name(view: object) -> str:
    module = getattr(view, "__module__", "")
    return f"{module}.{getattr(view, '__qualname__', type(view).__qualname__)}"
