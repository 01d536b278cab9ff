"""Which route a request takes, by the router of its framework, before it has taken it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from structlog_audit.web._request import Route

_FULL = 2
"""`starlette.routing.Match.FULL`."""


def route_of(scope: MutableMapping[str, Any]) -> Route | None:
    """Return the route of a scope of Starlette, FastAPI or Litestar, or None."""
    handler = scope.get("route_handler")
    if handler is not None:  # Litestar has routed it
        name = getattr(handler, "name", None) or getattr(handler, "handler_name", None)
        return Route(str(name or handler), scope.get("path_template"), _function(handler))
    routes = getattr(scope.get("app"), "routes", None)
    if not isinstance(routes, list) or not all(hasattr(route, "matches") for route in routes[:1]):
        return None
    return _starlette(routes, scope, "")


def _starlette(routes: Iterable[Any], scope: Mapping[str, Any], above: str) -> Route | None:
    for route in routes:
        match, child = route.matches(scope)
        if getattr(match, "value", None) != _FULL:
            continue
        template = above + (getattr(route, "path", None) or "")
        inner = getattr(route, "routes", None)
        if inner:
            found = _starlette(inner, {**scope, **child}, template)
            if found is not None:
                return found
        endpoint = child.get("endpoint")
        name = getattr(route, "operation_id", None) or getattr(route, "name", None)
        return Route(name or template or "/", template, endpoint)
    return None


def _function(handler: Any) -> Any:
    return getattr(handler, "fn", handler)
