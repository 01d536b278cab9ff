from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.contrib.auth import authenticate, login, logout
from django.core.exceptions import PermissionDenied
from django.db import transaction
from django.http import FileResponse, Http404, HttpRequest, JsonResponse, StreamingHttpResponse
from django.views import View

from django_shop.models import Item
from structlog_audit import audit_log, current_operation
from structlog_audit.context import audit_fields
from structlog_audit.web.django import audit_exempt

passed: list[str] = []
"""Paths that came past the first middleware."""
FILE = b"0123456789" * 100_000


class Gate:
    """Refuses some requests before any view, and sends those of tenants elsewhere."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[..., Any]) -> None:
        self.get_response = get_response
        self.is_async = iscoroutinefunction(get_response)
        if self.is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        passed.append(request.path)
        if "refuse" in request.GET:
            return self._refusal() if self.is_async else JsonResponse({}, status=401)
        if "tenant" in request.GET:
            request.urlconf = "django_shop.other_urls"
        return self.get_response(request)

    async def _refusal(self) -> JsonResponse:
        return JsonResponse({}, status=401)


def old_fashioned(get_response: Callable[..., Any]) -> Callable[..., Any]:
    """A middleware that knows only threads."""
    return lambda request: get_response(request)


def about(request: HttpRequest, **parts: str) -> JsonResponse:
    return JsonResponse({})


def item(request: HttpRequest, key: str) -> JsonResponse:
    Item.objects.create(key=key)
    return JsonResponse({"key": key}, status=201)


@transaction.non_atomic_requests
async def aitem(request: HttpRequest, key: str) -> JsonResponse:
    await Item.objects.acreate(key=key)
    return JsonResponse({"key": key}, status=201)


def boom(request: HttpRequest, key: str) -> JsonResponse:
    Item.objects.create(key=key)
    raise ValueError("the till is empty")


@transaction.non_atomic_requests
async def aboom(request: HttpRequest) -> JsonResponse:
    raise ValueError("the till is empty")


def raises(request: HttpRequest, what: str) -> JsonResponse:
    raise {"missing": Http404, "forbidden": PermissionDenied}[what]("no")


def who(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"user": request.user.get_username()})


def log_in(request: HttpRequest) -> JsonResponse:
    given = json.loads(request.body)
    user = authenticate(request, username=given["username"], password=given["password"])
    if user is None:
        return JsonResponse({}, status=401)
    try:
        login(request, user)
    except Exception:
        if "careless" not in request.GET:
            raise
    return JsonResponse({})


def log_out(request: HttpRequest) -> JsonResponse:
    logout(request)
    return JsonResponse({})


def stream(request: HttpRequest) -> StreamingHttpResponse:
    current_operation().durable = "durable" in request.GET

    def pieces() -> Iterator[bytes]:
        for number in range(3):
            audit_log.info(action="Piece", data={"current": current_operation().operation_id})
            if "broken" in request.GET and number:
                raise ValueError("no more")
            yield b"piece "
        while "endless" in request.GET:  # more than any buffer between here and the reader takes
            yield FILE

    return StreamingHttpResponse(pieces(), status=int(request.GET.get("status", 200)))


@transaction.non_atomic_requests
async def astream(request: HttpRequest) -> StreamingHttpResponse:
    async def pieces() -> AsyncIterator[bytes]:
        for number in range(3):
            await audit_log.ainfo(
                action="Piece", data={"current": current_operation().operation_id}
            )
            if "broken" in request.GET and number:
                raise ValueError("no more")
            yield b"piece "
            if "slow" in request.GET:
                await asyncio.sleep(60)

    return StreamingHttpResponse(pieces())


@transaction.non_atomic_requests
async def slow(request: HttpRequest) -> JsonResponse:
    await asyncio.sleep(60)
    return JsonResponse({})


def file(request: HttpRequest) -> FileResponse:
    return FileResponse(io.BytesIO(FILE), filename="numbers.txt")


def upload(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"size": request.FILES["numbers"].size}, status=201)


def durable(request: HttpRequest) -> JsonResponse:
    current_operation().durable = True
    return JsonResponse({})


def context(request: HttpRequest) -> JsonResponse:
    audit_log.info(action="Inside")
    return JsonResponse({key: str(value) for key, value in audit_fields().items()})


def pid(request: HttpRequest, **parts: str) -> JsonResponse:
    return JsonResponse({"pid": os.getpid()})


@audit_exempt(kind="health", reason="probe")
class Health(View):
    def get(self, request: HttpRequest) -> JsonResponse:
        return JsonResponse({})


class MoreThanHealth(Health):
    pass


@audit_exempt(kind="public_read", reason="prices are public")
def exempt(request: HttpRequest) -> JsonResponse:
    return JsonResponse({})
