"""What `manage.py check` says about auditing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from django.urls import URLResolver, get_resolver
from django.utils.module_loading import import_string

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.exclusions import Exclude
from structlog_audit.web.django._middleware import AuditMiddleware
from structlog_audit.web.django._options import SETTING, Options, problems

AUTHENTICATION = "django.contrib.auth.middleware.AuthenticationMiddleware"
_CONSTANT = re.compile(r"\^([\w/-]*)(?![*?{])")
OURS = "structlog_audit.web.django.AuditMiddleware"


def check_setting(*, app_configs: object = None, **more: object) -> list[CheckMessage]:
    """Report unknown keys, unusable values, and dotted paths that do not import."""
    return [Error(one.reason, one.hint, id="structlog_audit.E001") for one in problems()]


def check_exclusions(*, app_configs: object = None, **more: object) -> list[CheckMessage]:
    """Report exclusions that no URL of the project can meet."""
    try:
        exclude = Options().exclude
    except AuditConfigurationError:
        return []  # it is reported already
    if not exclude or not getattr(settings, "ROOT_URLCONF", None):
        return []
    known = list(_urls(get_resolver(), "", ""))
    return [
        Warning(
            f"{SETTING}['EXCLUDE'] has an exclusion that meets no URL of the project: {one}",
            "correct its path or route, or take it out",
            id="structlog_audit.W002",
        )
        for one in exclude
        if not any(_meets(one, path, name) for path, name in known)
    ]


def check_middleware(*, app_configs: object = None, **more: object) -> list[CheckMessage]:
    """Report that the middleware is missing, or stands where it misses refused requests."""
    classes = [_imported(path) for path in settings.MIDDLEWARE]
    ours = _place(classes, AuditMiddleware)
    if ours is None:
        return [
            Error(
                "no request is audited: the audit middleware is missing",
                f"put {OURS!r} first in MIDDLEWARE",
                id="structlog_audit.E003",
            )
        ]
    authentication = _place(classes, _imported(AUTHENTICATION))
    if authentication is None or ours < authentication:
        return []
    return [
        Warning(
            "the audit middleware stands after AuthenticationMiddleware: what is answered before "
            "it, requests that are refused among them, leaves no entry",
            f"put {OURS!r} first in MIDDLEWARE",
            id="structlog_audit.W004",
        )
    ]


ALL: Sequence[Callable[..., list[CheckMessage]]] = (
    check_setting,
    check_exclusions,
    check_middleware,
)


def _imported(path: str) -> Any:
    try:
        return import_string(path)
    except ImportError:
        return None  # Django says so itself when it starts


def _place(classes: Sequence[Any], wanted: Any) -> int | None:
    for place, one in enumerate(classes):
        if isinstance(one, type) and isinstance(wanted, type) and issubclass(one, wanted):
            return place
    return None


def _urls(resolver: URLResolver, above: str, space: str) -> Iterator[tuple[str, str]]:
    """Yield path and name of each URL, with `*` in the path for what varies."""
    for pattern in resolver.url_patterns:
        path = above + _as_glob(pattern.pattern)
        if isinstance(pattern, URLResolver):
            inner = f"{space}{pattern.namespace}:" if pattern.namespace else space
            yield from _urls(pattern, path, inner)
        else:
            yield f"/{path}", space + (pattern.name or pattern.lookup_str)


def _as_glob(pattern: Any) -> str:
    """Return the part of a path with `*` for what varies."""
    route = getattr(pattern, "_route", None)
    if isinstance(route, str):
        constant, *variable = route.split("<")
        return constant + "".join("*" + one.partition(">")[2] for one in variable)
    return _constant(str(pattern)) + "*"


def _constant(regex: str) -> str:
    """Return the text with which all begins that fits a regular expression, or less of it."""
    found = _CONSTANT.match(regex)
    return found[1] if found is not None and "|" not in regex else ""


def _meets(exclusion: Exclude, path: str, name: str) -> bool:
    return (exclusion.path is None or overlap(exclusion.path, path)) and (
        exclusion.route is None or overlap(exclusion.route, name)
    )


def overlap(left: str, right: str) -> bool:
    """Tell whether a text exists that both patterns fit; `*` stands for any text."""

    @cache
    def at(i: int, j: int) -> bool:
        if left[i : i + 1] == "*":
            return at(i + 1, j) or (j < len(right) and at(i, j + 1))
        if right[j : j + 1] == "*":
            return at(i, j + 1) or (i < len(left) and at(i + 1, j))
        if i == len(left) or j == len(right):
            return i == len(left) and j == len(right)
        return left[i] == right[j] and at(i + 1, j + 1)

    return at(0, 0)
