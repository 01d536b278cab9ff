"""Which route a request takes, by the router of its framework, before it has taken it.

A framework's own `matches` decides, so that what is found here is what will be called. Where it
raises or is not understood, no route is known: nothing is left out of auditing on account of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from structlog_audit.exclusions import Exclude
from structlog_audit.web._request import Route

_FULL = 2
"""`starlette.routing.Match.FULL`."""
_TRANSPARENT = ("starlette", "fastapi", "structlog_audit")
"""Whose middlewares hand a request on to the application that they are around."""
_OF_A_MOUNT = {"app_root_path", "endpoint"}
"""What a scope has when another router has sent it on."""
_DEEPEST = 32
"""Middlewares around a router, and routers within routers."""


def router_of(app: Any) -> Any:
    """Return what routes requests within an application and its middlewares, or None.

    It has `routes` that match scopes, as Starlette's and FastAPI's have, or a `url_map`, as
    Quart's has.
    """
    for _ in range(_DEEPEST):
        app = getattr(app, "__self__", app)  # Quart's asgi_app is a method
        if _is_starlette(app) or hasattr(app, "url_map"):
            return app
        if type(app).__module__.partition(".")[0] not in _TRANSPARENT:
            break  # what it does with a request is its own
        app = getattr(app, "app", None)
        if app is None:
            break
    return None


def route_of(scope: Mapping[str, Any], router: Any) -> Route | None:
    """Return the route of a scope of Starlette, FastAPI, Litestar or Quart, or None.

    Args:
        scope: as it was before it was routed, except for what Litestar says of it.
        router: see `router_of`.
    """
    handler = scope.get("route_handler")
    if handler is not None:  # Litestar has routed it
        name = getattr(handler, "name", None) or getattr(handler, "handler_name", None)
        return Route(str(name or handler), scope.get("path_template"), _function(handler))
    if router is None and not _OF_A_MOUNT & scope.keys():  # the application above knows no more
        router = scope.get("app")
    if router is not None and _is_starlette(router):
        # a copy: matching leaves traces in the scope
        return _starlette(router.routes, {**scope}, "", 0)
    if hasattr(router, "url_map"):
        return _quart(router, scope)
    return None


def strangers(exclusions: Iterable[Exclude], router: Any, root: str) -> list[Exclude]:
    """Return the exclusions that no route can fit, where all routes are known.

    Args:
        exclusions: those to try.
        router: see `router_of`.
        root: the `root_path` of requests.
    """
    if not _is_starlette(router) or getattr(router, "_low_priority_routes", None):
        return []
    known = list(_listed(router.routes, "", 0))
    return [one for one in exclusions if not any(_may_fit(one, *route, root) for route in known)]


def _is_starlette(router: Any) -> bool:
    routes = getattr(router, "routes", None)
    return isinstance(routes, list) and all(hasattr(route, "matches") for route in routes[:1])


def _starlette(
    routes: Iterable[Any], scope: Mapping[str, Any], above: str, depth: int
) -> Route | None:
    for candidate in routes:
        match, child = candidate.matches(scope)
        if getattr(match, "value", None) != _FULL:
            continue
        route = candidate
        while hasattr(route, "include_context"):  # newer FastAPI keeps included routers as they are
            _, child, taken, context = route._match({**scope})
            route = (getattr(context, "starlette_route", None) or context) if context else taken
        template = above + _path(route)
        inner = getattr(route, "routes", None)
        if inner and depth < _DEEPEST:
            found = _starlette(inner, {**scope, **child}, template, depth + 1)
            if found is not None:
                return found
        name = getattr(route, "operation_id", None) or getattr(route, "name", None)
        return Route(name or template or "/", template, child.get("endpoint"))
    return None


def _quart(app: Any, scope: Mapping[str, Any]) -> Route | None:
    if app.url_map.host_matching or getattr(app, "subdomain_matching", False):
        return None  # what the host stands for is the framework's to say
    headers = dict(scope.get("headers") or ())
    is_socket = scope["type"] == "websocket"
    host = headers.get(b"host", b"localhost").decode("latin-1")
    adapter = app.url_map.bind(host, url_scheme=scope.get("scheme", "http"))
    path = scope["path"].removeprefix(scope.get("root_path") or "")
    rule, _ = adapter.match(
        path, "GET" if is_socket else scope["method"], return_rule=True, websocket=is_socket
    )
    return Route(rule.endpoint, rule.rule, app.view_functions.get(rule.endpoint))


def _function(handler: Any) -> Any:
    return getattr(handler, "fn", handler)


def _path(route: Any) -> str:
    """Return the path without the types of its parameters; that of a mount has no remainder."""
    if not hasattr(route, "routes"):
        path = getattr(route, "path_format", None)
        if path:
            return str(path)
    return getattr(route, "path", None) or ""


Known = tuple[str, "str | None", "frozenset[str] | None"]
"""A route: its path with `*` for what varies, its name, and its methods where they are known."""


def _listed(routes: Sequence[Any], above: str, depth: int) -> Iterator[Known]:
    for route in routes:
        contexts = getattr(route, "effective_route_contexts", None)
        if contexts is not None:
            within = [getattr(one, "starlette_route", None) or one for one in contexts()]
            yield from _listed(within, above, depth)
            continue
        path = above + _path(route)
        name = getattr(route, "operation_id", None) or getattr(route, "name", None) or path
        methods = getattr(route, "methods", None)
        inner = getattr(route, "routes", None)
        if inner and depth < _DEEPEST:
            yield from _listed(inner, path, depth + 1)
        is_opaque = hasattr(route, "routes") and not inner  # static files, a foreign application
        pattern = _with_stars(path) + ("/*" if is_opaque else "")
        yield pattern, name, frozenset(methods) if methods else None


def _with_stars(template: str) -> str:
    parts = template.split("{")
    return parts[0] + "".join("*" + part.partition("}")[2] for part in parts[1:])


def _may_fit(
    one: Exclude, path: str, name: str | None, methods: frozenset[str] | None, root: str
) -> bool:
    if one.methods and methods is not None and not one.methods & methods:
        return False
    return (one.path is None or _overlap(one.path, path) or _overlap(one.path, root + path)) and (
        one.route is None or _overlap(one.route, name or "")
    )


def _overlap(one: str, other: str) -> bool:
    """Tell whether a text exists that fits both patterns."""

    @cache
    def meet(i: int, j: int) -> bool:
        if i == len(one) or j == len(other):
            return not (one[i:] + other[j:]).strip("*")
        if one[i] == "*":
            return meet(i + 1, j) or meet(i, j + 1)
        if other[j] == "*":
            return meet(i, j + 1) or meet(i + 1, j)
        return one[i] == other[j] and meet(i + 1, j + 1)

    return len(one) + len(other) > 500 or meet(0, 0)
