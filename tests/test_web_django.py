"""Django: real requests to a small shop, in this process and through real servers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reading import recorded, session_files
from running import HANG, environment, eventually, in_threads, run_loop, run_python, stop

from structlog_audit import current_operation
from structlog_audit.context import audit_fields
from structlog_audit.exclusions import Exclude
from structlog_audit.testing import FailingSink, capture_audit

pytest.importorskip("django")

NAME = "lovelace"  # no hexadecimal digits alone
PASSWORD = "correct horse"
TESTS = Path(__file__).parent
Entry = dict[str, Any]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The shop in this process, with its database, its users and its views."""
    database = tmp_path_factory.mktemp("shop") / "shop.sqlite3"
    os.environ.update(DJANGO_SETTINGS_MODULE="django_shop.settings", SHOP_DATABASE=str(database))
    import django

    django.setup()
    from django.core.management import call_command
    from django.db import connections

    call_command("migrate", run_syncdb=True, verbosity=0)
    from django.contrib.auth.models import User

    User.objects.create_user(NAME, password=PASSWORD)
    from django_shop import views

    yield views
    connections.close_all()
    del os.environ["DJANGO_SETTINGS_MODULE"], os.environ["SHOP_DATABASE"]


@pytest.fixture(autouse=True)
def empty(shop: Any) -> None:
    """No items, no sessions."""
    from django.contrib.sessions.models import Session

    shop.Item.objects.all().delete()
    Session.objects.all().delete()
    shop.passed.clear()


def client() -> Any:
    from django.test import Client

    return Client(raise_request_exception=False)


def async_client() -> Any:
    from django.test import AsyncClient

    return AsyncClient(raise_request_exception=False)


def ask(is_async: bool, method: str, path: str, **options: Any) -> Any:
    """Make a request through one of the two stacks."""
    if is_async:
        return run_loop(getattr(async_client(), method)(path, **options))
    return getattr(client(), method)(path, **options)


def log_in(browser: Any, password: str = PASSWORD, query: str = "") -> Any:
    given = {"username": NAME, "password": password}
    return browser.post(f"/api/login/{query}", given, content_type="application/json")


def told(entries: list[Entry]) -> list[tuple[str, str]]:
    return [(entry["event"], entry["action"]) for entry in entries]


def keys(shop: Any) -> set[str]:
    return set(shop.Item.objects.values_list("key", flat=True))


both = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


# --- what is recorded ---


@both
@pytest.mark.parametrize("view", ["item", "aitem"])
def test_a_request_has_a_begin_and_an_outcome(shop: Any, is_async: bool, view: str) -> None:
    """Action, route, status and addresses are there, for views of either kind."""
    with capture_audit() as entries:
        answer = ask(is_async, "post", f"/api/{view}s/a1/")

    assert answer.status_code == 201
    assert told(entries) == [("Begin", f"shop:{view}"), ("Complete", f"shop:{view}")]
    begin, outcome = entries
    assert begin["data"] == {
        "method": "POST", "path": f"/api/{view}s/a1/", "route": f"api/{view}s/<slug:key>/",
        "userKnown": False,
    }  # fmt: skip
    assert begin["type"] == "REST"
    assert begin["clientIpAddress"] == "127.0.0.1"
    assert outcome["operationId"] == begin["operationId"]
    assert outcome["requestId"] == begin["requestId"]
    assert outcome["data"]["status"] == 201


@both
def test_the_begin_is_durable_before_any_view_or_later_middleware(
    shop: Any, is_async: bool
) -> None:
    """A sink that fails: 503, nobody was called, no row, and nothing is said of what failed."""
    with capture_audit(FailingSink()):
        answer = ask(is_async, "post", "/api/items/a1/")

    assert answer.status_code == 503
    assert answer["Content-Type"] == "application/problem+json"
    assert answer["Cache-Control"] == "no-store"
    assert json.loads(answer.content)["status"] == 503
    assert shop.passed == []
    assert keys(shop) == set()


@pytest.mark.parametrize("failing", range(1, 8))
def test_the_sink_fails_at_one_entry(shop: Any, failing: int) -> None:
    """The requests that were refused left no row, all others did, and service goes on."""
    sink = FailingSink(lambda number: number == failing)
    with capture_audit(sink):
        answers = {key: client().post(f"/api/items/{key}/").status_code for key in "abcde"}

    assert set(answers.values()) <= {201, 503}
    assert keys(shop) == {key for key, status in answers.items() if status == 201}
    assert answers["e"] == 201
    begun = {e["data"]["path"] for e in sink.entries if e["event"] == "Begin"}
    assert {f"/api/items/{key}/" for key in keys(shop)} <= begun


@both
def test_a_path_that_leads_nowhere_is_recorded_by_its_method(shop: Any, is_async: bool) -> None:
    """No view is found: the action is method and path, and a 404 is no failure of ours."""
    with capture_audit() as entries:
        answer = ask(is_async, "get", "/nowhere/")

    assert answer.status_code == 404
    assert told(entries) == [("Begin", "GET /nowhere/"), ("Complete", "GET /nowhere/")]


def test_a_url_without_a_name_is_named_after_its_view(shop: Any) -> None:
    """What Django calls such a view is the action."""
    with capture_audit() as entries:
        client().get("/unnamed/")

    assert entries[0]["action"] == "django_shop.views.about"


@both
def test_what_a_view_raises_is_in_a_fail(shop: Any, is_async: bool) -> None:
    """Django makes a 500 of it and rolls back; the outcome tells the exception."""
    with capture_audit() as entries:
        answer = ask(is_async, "post", "/api/boom/a1/")

    assert answer.status_code == 500
    assert told(entries)[-1] == ("Fail", "shop:boom")
    assert entries[-1]["data"]["exception"]["type"] == "ValueError"
    assert entries[-1]["data"]["status"] == 500
    assert keys(shop) == set()


def test_what_an_async_view_raises_is_in_a_fail(shop: Any) -> None:
    """The same without a transaction."""
    with capture_audit() as entries:
        ask(True, "post", "/api/aboom/")

    assert entries[-1]["event"] == "Fail"
    assert entries[-1]["data"]["exception"]["message"] == "the till is empty"


@pytest.mark.parametrize(("what", "status"), [("missing", 404), ("forbidden", 403)])
def test_an_exception_that_is_an_answer_is_no_failure(shop: Any, what: str, status: int) -> None:
    """Http404 and PermissionDenied are how a Django view says no."""
    with capture_audit() as entries:
        answer = client().get(f"/api/raise/{what}/")

    assert answer.status_code == status
    assert entries[-1]["event"] == "Complete"
    assert entries[-1]["data"]["status"] == status


@both
def test_a_request_that_is_refused_before_the_view_is_recorded(shop: Any, is_async: bool) -> None:
    """A 401 by a later middleware has its two entries."""
    with capture_audit() as entries:
        answer = ask(is_async, "get", "/api/who/?refuse=1")

    assert answer.status_code == 401
    assert told(entries) == [("Begin", "shop:who"), ("Complete", "shop:who")]


@both
def test_a_durable_outcome_is_on_record_before_the_response(shop: Any, is_async: bool) -> None:
    """The view asks for it; when it cannot be recorded, the response is replaced."""
    sink = FailingSink(lambda number: False)
    with capture_audit(sink):
        assert ask(is_async, "get", "/api/durable/").status_code == 200
        assert sink.entries[-1]["event"] == "Complete"
        before = sink.writes
        sink._fail = lambda number: number == before + 2
        assert ask(is_async, "get", "/api/durable/").status_code == 503


# --- who asks ---


def test_nobody_asks_the_database_who_it_is(shop: Any) -> None:
    """A view that does not look at the user: no query for the user, at no time."""
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    browser = client()
    with capture_audit() as entries:
        log_in(browser)
        del entries[:]
        with CaptureQueriesContext(
            connection,
        ) as queries:
            browser.get("/api/pid/")

    assert [query["sql"] for query in queries if "auth_user" in query["sql"]] == []
    assert "userId" not in entries[-1]


@both
def test_a_user_whom_the_view_looked_at_is_in_the_outcome(shop: Any, is_async: bool) -> None:
    """The Begin cannot know who it is; the outcome does."""
    from django.contrib.auth.models import User

    ada = User.objects.get()
    browser = async_client() if is_async else client()
    with capture_audit() as entries:
        browser.force_login(ada)
        del entries[:]
        answer = browser.get("/api/who/")
        answer = run_loop(answer) if is_async else answer

    assert answer.json() == {"user": NAME}
    assert entries[0]["data"]["userKnown"] is False
    assert entries[-1]["userId"] == str(ada.pk)


@both
def test_all_entries_of_a_request_carry_its_addresses(shop: Any, is_async: bool) -> None:
    """Also those of a sync view that an async stack runs in a thread; and nothing stays bound."""
    with capture_audit() as entries:
        answer = ask(is_async, "get", "/api/context/")

    begin, inside, outcome = entries
    assert inside["action"] == "Inside"
    assert {e["requestId"] for e in entries} == {answer.json()["request_id"]}
    assert inside["clientIpAddress"] == begin["clientIpAddress"] == outcome["clientIpAddress"]
    assert dict(audit_fields()) == {}
    assert current_operation().receipt is None


def test_options_are_functions_of_the_request(shop: Any) -> None:
    """User, company, service and action are what the functions say, by dotted path too."""
    from django.test import override_settings

    options = {
        "USER": lambda request: request.headers["x-user"],
        "COMPANY": "test_web_django.company",
        "SERVICE": lambda request: "till",
        "ACTION": lambda request: "Looked",
    }
    with override_settings(STRUCTLOG_AUDIT=options), capture_audit() as entries:
        client().get("/api/about/", headers={"x-user": "eve"})

    assert told(entries) == [("Begin", "Looked"), ("Complete", "Looked")]
    for entry in entries:
        assert (entry["userId"], entry["companyId"], entry["serviceId"]) == ("eve", "acme", "till")


def company(request: Any) -> str:
    return "acme"


def test_an_async_stack_is_audited_in_the_thread_of_its_loop(shop: Any) -> None:
    """No detour through a thread, neither at Begin nor before an excluded view nor at the end."""
    from django.test import override_settings
    from django_shop import settings

    threads: list[int] = []

    def note(request: Any) -> None:
        threads.append(threading.get_ident())

    options = {
        **settings.STRUCTLOG_AUDIT,
        "USER": note,
        "PRIVILEGED": lambda request: note(request) is not None,
    }
    with override_settings(STRUCTLOG_AUDIT=options), capture_audit():
        ask(True, "post", "/api/aitems/a1/")
        assert len(threads) == 2
        ask(True, "get", "/api/about/")

    assert len(threads) == 4
    assert set(threads) == {threading.get_ident()}


@pytest.mark.parametrize("path", ["/api/context/", "/api/aboom/", "/api/about/?tenant=1"])
def test_a_later_middleware_forces_an_async_stack_into_a_thread(shop: Any, path: str) -> None:
    """All that comes after it runs there, ours too; entries and what is bound are the same."""
    from django.conf import settings
    from django.test import override_settings

    middleware = [*settings.MIDDLEWARE, "django_shop.views.old_fashioned"]
    with override_settings(MIDDLEWARE=middleware), capture_audit() as entries:
        ask(True, "get", path)

    begin, *inside, outcome = entries
    assert begin["event"] == "Begin"
    assert outcome["event"] == ("Fail" if "boom" in path else "Complete")
    assert len(inside) == ("context" in path)
    assert len({entry["requestId"] for entry in entries}) == 1
    assert dict(audit_fields()) == {}
    assert current_operation().receipt is None


def test_a_proxy_is_believed_only_if_it_is_trusted(shop: Any) -> None:
    """By default the peer is the client; with trusted proxies, whom they name."""
    from django.test import override_settings

    headers = {"x-forwarded-for": "203.0.113.7"}
    with capture_audit() as entries:
        client().get("/api/pid/", headers=headers)
        with override_settings(STRUCTLOG_AUDIT={"TRUSTED_PROXIES": ["127.0.0.0/8"]}):
            client().get("/api/pid/", headers=headers)

    assert [entry["clientIpAddress"] for entry in entries] == ["127.0.0.1"] * 2 + [
        "203.0.113.7"
    ] * 2


# --- what is left out ---


@both
@pytest.mark.parametrize("path", ["/api/about/", "/api/health/", "/api/exempt/"])
def test_what_is_excluded_leaves_no_entry(shop: Any, is_async: bool, path: str) -> None:
    """By the name of the route, by the class of the view, by the view; even if the sink fails."""
    with capture_audit(FailingSink()) as entries:
        assert ask(is_async, "get", path).status_code == 200

    assert entries == []


def test_a_view_that_extends_an_exempt_one_is_audited(shop: Any) -> None:
    """An exemption is not inherited."""
    with capture_audit() as entries:
        client().get("/api/health/more/")

    assert told(entries)[0] == ("Begin", "shop:more")


def test_a_write_to_a_view_that_is_exempt_as_a_read_is_audited(shop: Any) -> None:
    """public_read leaves out reads alone, on a view as anywhere else."""
    with capture_audit() as entries:
        client().post("/api/exempt/")

    assert told(entries)[0] == ("Begin", "shop:exempt")


@both
def test_an_excluded_path_that_a_middleware_sends_elsewhere_is_audited(
    shop: Any, is_async: bool
) -> None:
    """A tenant's urlconf has another view there: it does not run before its Begin."""
    with capture_audit() as entries:
        assert ask(is_async, "get", "/api/about/?tenant=1").status_code == 200
    with capture_audit(FailingSink()):
        assert ask(is_async, "get", "/api/about/?tenant=1").status_code == 503

    assert told(entries) == [("Begin", "shop:tenant"), ("Complete", "shop:tenant")]


def test_a_privileged_caller_is_audited_where_others_are_not(shop: Any) -> None:
    """Who it is turns out after the authentication, and still before the view."""
    from django.contrib.auth.models import User
    from django.test import override_settings
    from django_shop import settings

    options = {**settings.STRUCTLOG_AUDIT, "PRIVILEGED": is_staff}
    browser = client()
    with capture_audit() as entries, override_settings(STRUCTLOG_AUDIT=options):
        browser.get("/api/about/")
        browser.force_login(User.objects.get())
        del entries[:]
        browser.get("/api/about/")
        assert entries == []
        User.objects.update(is_staff=True)
        browser.get("/api/about/")
        User.objects.update(is_staff=False)

    assert told(entries) == [("Begin", "shop:about"), ("Complete", "shop:about")]


def is_staff(request: Any) -> bool:
    return hasattr(request, "user") and request.user.is_staff


# --- streams and files ---


@pytest.mark.parametrize(("is_async", "kind"), [(False, "stream"), (True, "astream")])
def test_the_outcome_of_a_stream_comes_at_its_end(shop: Any, is_async: bool, kind: str) -> None:
    """What the stream records is of the same request, and nothing stays bound in between."""

    async def read(answer: Any) -> bytes:
        return b"".join([piece async for piece in answer.streaming_content])

    with capture_audit() as entries:
        answer = ask(is_async, "get", f"/api/{kind}/")
        assert told(entries) == [("Begin", f"shop:{kind}")]
        assert current_operation().receipt is None
        body = run_loop(read(answer)) if is_async else answer.getvalue()

    assert body == b"piece " * 3
    assert told(entries) == [
        ("Begin", f"shop:{kind}"),
        *[("Record", "Piece")] * 3,
        ("Complete", f"shop:{kind}"),
    ]
    assert len({entry["requestId"] for entry in entries}) == 1
    assert {e["data"]["current"] for e in entries[1:-1]} == {entries[0]["operationId"]}
    assert dict(audit_fields()) == {}


def test_a_stream_that_breaks_is_a_fail(shop: Any) -> None:
    """It raised after the status had left; the outcome knows."""
    with capture_audit() as entries:
        with pytest.raises(ValueError, match="no more"):
            client().get("/api/stream/?broken=1").getvalue()

    assert told(entries)[-1] == ("Fail", "shop:stream")
    assert entries[-1]["data"]["exception"]["message"] == "no more"


def test_an_error_page_that_streams_is_a_fail(shop: Any) -> None:
    """Its status says so, whatever comes of the stream."""
    with capture_audit() as entries:
        client().get("/api/stream/?status=502").getvalue()

    assert told(entries)[-1] == ("Fail", "shop:stream")


@pytest.mark.parametrize("how", ["close", "forget"])
@both
def test_a_stream_that_nobody_reads_to_its_end_is_abandoned(
    shop: Any, is_async: bool, how: str
) -> None:
    """It is closed, or just thrown away; in another thread than the one of the request."""
    with capture_audit() as entries:
        holder = [ask(is_async, "get", "/api/astream/" if is_async else "/api/stream/")]
        if not is_async:
            next(iter(holder[0].streaming_content))

        drop = holder[0].close if how == "close" else holder.clear
        assert in_threads([drop]) == [None]
        if how == "forget":
            gc.collect()  # the test client ties responses into circles
        del drop

    assert entries[-1]["event"] == "Abandon"
    assert entries[-1]["data"]["reason"] == "the response was closed before its end"


def test_nobody_waits_for_the_outcome_of_a_stream_that_is_closed(shop: Any) -> None:
    """It was to be durable, and the sink is down: it is kept, and recorded later."""
    down = threading.Event()
    with capture_audit(FailingSink(lambda number: down.is_set())) as entries:
        answer = client().get("/api/stream/?durable=1")
        down.set()
        answer.close()
        assert told(entries) == [("Begin", "shop:stream")]
        down.clear()
        client().get("/api/pid/")
        eventually(lambda: ("Abandon", "shop:stream") in told(entries))


def test_a_head_of_a_stream_is_complete(shop: Any) -> None:
    """It has no body that could end."""
    with capture_audit() as entries:
        client().head("/api/stream/")

    assert told(entries) == [("Begin", "shop:stream"), ("Complete", "shop:stream")]


def test_a_cancelled_request_is_abandoned(shop: Any) -> None:
    """The task ends while the view waits."""

    async def cancel() -> None:
        task = asyncio.ensure_future(async_client().get("/api/slow/"))
        while not entries:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with capture_audit() as entries:
        run_loop(cancel())

    assert told(entries) == [("Begin", "shop:slow"), ("Abandon", "shop:slow")]


def test_a_file_comes_up_and_down_whole(shop: Any) -> None:
    """Nothing is read ahead or lost by the middleware."""
    with capture_audit() as entries:
        up = client().post("/api/upload/", {"numbers": io.BytesIO(shop.FILE)})
        down = client().get("/api/file/").getvalue()

    assert up.json() == {"size": len(shop.FILE)}
    assert down == shop.FILE
    assert [event for event, _ in told(entries)] == ["Begin", "Complete"] * 2


# --- logins ---


def test_logins_are_entries_of_their_own(shop: Any) -> None:
    """Login, logout and a failed login, with the user's id, and never what was typed."""
    from django.contrib.auth.models import User

    browser = client()
    with capture_audit() as entries:
        log_in(browser)
        browser.post("/api/logout/")
        log_in(browser, "hunter2")

    own = {e["action"]: e for e in entries if e["event"] == "Record"}
    assert list(own) == ["Login", "Logout", "LoginFailed"]
    assert own["Login"]["userId"] == own["Logout"]["userId"] == str(User.objects.get().pk)
    assert own["LoginFailed"]["data"] == {}
    text = json.dumps(entries)
    assert "hunter2" not in text
    assert PASSWORD not in text
    assert NAME not in text


def test_the_outcome_of_a_logout_tells_who_it_was(shop: Any) -> None:
    """The user is gone by then; what was read of the session is not."""
    browser = client()
    with capture_audit() as entries:
        log_in(browser)
        browser.post("/api/logout/")

    assert entries[-1]["action"] == "shop:logout"
    assert entries[-1]["userId"]


def test_the_name_of_a_failed_login_is_recorded_if_configured(shop: Any) -> None:
    """The name alone, and not longer than a name may be."""
    from django.contrib.auth import authenticate
    from django.test import override_settings

    with override_settings(STRUCTLOG_AUDIT={"FAILED_LOGIN_NAMES": True}):
        with capture_audit() as entries:
            authenticate(None, username="x" * 1_000, password="hunter2", pin="1234")

    assert entries[0]["data"] == {"userName": "x" * 254}


@pytest.mark.parametrize("query", ["", "?careless=1"])
def test_who_cannot_be_recorded_is_not_logged_in(shop: Any, query: str) -> None:
    """The entry of the login fails; even a view that catches everything logs nobody in."""
    sink = FailingSink(lambda number: False)
    browser = client()
    with capture_audit(sink):
        browser.get("/api/pid/")
        before = sink.writes
        sink._fail = lambda number: number == before + 2
        answer = log_in(browser, query=query)
        sink._fail = lambda number: False
        assert "userId" not in sink.entries[-1]
        assert answer.status_code == (200 if query else 500)
        assert browser.get("/api/who/").json() == {"user": ""}


def test_a_logout_that_cannot_be_recorded_logs_nobody_out(shop: Any) -> None:
    """The user sees a failure, and can try again."""
    sink = FailingSink(lambda number: False)
    browser = client()
    with capture_audit(sink):
        log_in(browser)
        before = sink.writes
        sink._fail = lambda number: number == before + 2
        assert browser.post("/api/logout/").status_code == 500
        sink._fail = lambda number: False
        assert browser.get("/api/who/").json() == {"user": NAME}


def test_a_failed_login_that_cannot_be_recorded_is_a_failure(shop: Any) -> None:
    """Nobody tries passwords while nobody looks."""
    sink = FailingSink(lambda number: False)
    browser = client()
    with capture_audit(sink):
        browser.get("/api/pid/")
        before = sink.writes
        sink._fail = lambda number: number == before + 2
        assert log_in(browser, "hunter2").status_code == 500


def test_logins_can_be_left_to_others(shop: Any) -> None:
    """LOGIN_SIGNALS=False: no entries but those of the requests."""
    from django.test import override_settings

    with override_settings(STRUCTLOG_AUDIT={"LOGIN_SIGNALS": False}), capture_audit() as entries:
        log_in(client())

    assert [event for event, _ in told(entries)] == ["Begin", "Complete"]


# --- manage.py check ---


def complaints(**settings: Any) -> list[str]:
    """Return what the system checks say under these settings."""
    from django.core.checks import run_checks
    from django.test import override_settings

    with override_settings(**settings):
        return [
            f"{one.id} {one.msg} {one.hint}"
            for one in run_checks()
            if one.id.startswith("structlog_audit")
        ]


def test_the_shop_is_in_order(shop: Any) -> None:
    """No complaint without a reason."""
    assert complaints() == []


READ = Exclude(kind="public_read", path="/api/about/", reason="public")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"EXCLUDES": []}, "unknown key 'EXCLUDES' did you mean EXCLUDE?"),
        ({"user": None}, "did you mean USER?"),
        ({"EXCLUDE": ["/health"]}, "it is a list of Exclude"),
        ({"USER": "shop.nowhere.user"}, "'shop.nowhere.user' cannot be imported"),
        ({"USER": "django_shop.views.passed"}, "is no function"),
        ({"COMPANY": 7}, "7 is no function"),
        ({"TRUSTED_PROXIES": ["0.0.0.0/0"]}, "trusts every client"),
        ({"CLIENT": "peer"}, "it is a ClientAddress"),
        ({"LOGIN_SIGNALS": "no"}, "it is True or False, not 'no'"),
        (["EXCLUDE"], "STRUCTLOG_AUDIT is a dict, not list"),
        ({"MODE": "loud"}, "mode is one of"),
        ({"EXCLUDE": [READ]}, "who is privileged is not told"),
    ],
)
def test_a_setting_that_cannot_work_is_reported_and_stops_the_start(
    shop: Any, options: Any, expected: str
) -> None:
    """`manage.py check` says it, and no server starts with it."""
    from django.test import override_settings

    from structlog_audit import AuditConfigurationError

    (complaint,) = complaints(STRUCTLOG_AUDIT=options)
    assert expected in complaint
    with override_settings(STRUCTLOG_AUDIT=options), pytest.raises(AuditConfigurationError):
        client().get("/api/pid/")


@pytest.mark.parametrize(
    ("given", "is_met"),
    [
        ({"path": "/api/about/"}, True),
        ({"path": "/api/items/*"}, True),
        ({"path": "/api/items/a1/"}, True),
        ({"path": "*/about/"}, True),
        ({"path": "/old/1999/"}, True),
        ({"route": "shop:*"}, True),
        ({"route": "django_shop.views.about"}, True),
        ({"path": "/apis/about/"}, False),
        ({"path": "/api/about"}, False),
        ({"route": "about"}, False),
        ({"path": "/api/about/", "route": "shop:pid"}, False),
    ],
)
def test_an_exclusion_that_meets_no_url_is_reported(
    shop: Any, given: dict[str, str], is_met: bool
) -> None:
    """A slip in a path leaves audited what should not be; it is told before anybody wonders."""
    from structlog_audit.web.django import Exclude

    exclude = Exclude(kind="public_read", reason="public", **given)
    options = {"EXCLUDE": [exclude], "PRIVILEGED": lambda request: False}
    found = complaints(STRUCTLOG_AUDIT=options)
    assert [one.split()[0] for one in found] == ([] if is_met else ["structlog_audit.W002"])


def test_a_middleware_that_is_missing_or_late_is_reported(shop: Any) -> None:
    """Without it nothing is audited; after the authentication, what that refuses is missed."""
    from django.conf import settings

    ours, *others = settings.MIDDLEWARE
    (missing,) = complaints(MIDDLEWARE=others)
    (late,) = complaints(MIDDLEWARE=[*others, ours])
    assert missing.startswith("structlog_audit.E003")
    assert late.startswith("structlog_audit.W004")


def test_manage_check_says_it(shop: Any) -> None:
    """The command that people run, in a process of its own."""
    done = run_python(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        from django.conf import settings
        settings.configure(
            INSTALLED_APPS=["structlog_audit.web.django"], STRUCTLOG_AUDIT={"EXLUDE": []},
            LOGGING_CONFIG=None,
        )
        from django.core.management import execute_from_command_line
        execute_from_command_line(["manage.py", "check"])
        """,
        TESTS,
    )
    assert done.returncode == 1
    assert "(structlog_audit.E001) STRUCTLOG_AUDIT has an unknown key 'EXLUDE'" in done.stderr
    assert "HINT: did you mean EXCLUDE?" in done.stderr
    assert "(structlog_audit.E003) no request is audited" in done.stderr


# --- real servers ---

GUNICORN = ["gunicorn", "--workers=2", "--threads=4", "--bind=127.0.0.1:0", "--no-control-socket",
            "django_shop.wsgi:application"]  # fmt: skip
UVICORN = ["uvicorn", "--port=0", "--lifespan=off", "django_shop.asgi:application"]
servers = pytest.mark.parametrize("command", [GUNICORN, UVICORN], ids=["gunicorn", "uvicorn"])


class Server:
    """The shop behind a real server, at a port that the system chose."""

    def __init__(self, command: list[str], directory: Path, audit_dir: Path) -> None:
        self.database = directory / "served.sqlite3"
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            shop = os.environ["SHOP_DATABASE"]
            with contextlib.closing(sqlite3.connect(shop)) as template:
                template.backup(database)
        self.log = directory / "log"
        variables = environment(
            AUDIT_LOG_DIR=str(audit_dir), SHOP_DATABASE=str(self.database),
            DJANGO_SETTINGS_MODULE="django_shop.settings", PYTHONWARNINGS="default",
        )  # fmt: skip
        variables["PYTHONPATH"] += os.pathsep + str(TESTS)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env=variables, cwd=directory, stdout=log, stderr=log,
            )  # fmt: skip
        # uvicorn kills itself with the SIGTERM it was sent, before outcomes are written at exit
        self._end = signal.SIGINT if command is UVICORN else signal.SIGTERM
        self.port = 0
        eventually(self._is_ready)

    def _is_ready(self) -> bool:
        log = self.log.read_text()
        assert self.process.poll() is None, log
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log)
        self.port = int(found[1]) if found else 0
        return found is not None

    def ask(self, method: str, path: str) -> tuple[int, bytes]:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)

    def rows(self) -> set[str]:
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            return {key for (key,) in database.execute("SELECT key FROM django_shop_item")}

    def stop(self) -> None:
        stop(self.process, self._end)


@pytest.fixture
def serve(shop: Any, tmp_path: Path, audit_dir: Path) -> Iterator[Any]:
    made: list[Server] = []

    def start(command: list[str]) -> Server:
        made.append(Server(command, tmp_path, audit_dir))
        return made[-1]

    yield start
    for server in made:
        server.stop()


def lines(audit_dir: Path) -> list[Entry]:
    """Return all whole lines; a process that was killed may have left half a one."""
    found = []
    for path in session_files(audit_dir):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def paths(entries: list[Entry], event: str) -> list[str]:
    begun = {e["operationId"]: e["data"]["path"] for e in entries if e["event"] == "Begin"
             and "path" in e["data"]}  # fmt: skip
    return [begun[e["operationId"]] for e in entries if e["event"] == event
            and e.get("operationId") in begun]  # fmt: skip


@servers
def test_hundreds_at_once_have_one_begin_and_one_outcome_each(
    serve: Any, audit_dir: Path, command: list[str]
) -> None:
    """Nothing is missing, nothing is there twice, and no request bears another's name."""
    server = serve(command)
    kind = "items" if command is GUNICORN else "aitems"

    def load(worker: int) -> list[int]:
        return [server.ask("POST", f"/api/{kind}/k{worker}-{n}/")[0] for n in range(40)]

    answers = in_threads([lambda worker=worker: load(worker) for worker in range(8)])
    assert answers == [[201] * 40] * 8
    server.stop()

    expected = sorted(f"/api/{kind}/k{worker}-{n}/" for worker in range(8) for n in range(40))
    entries = recorded(audit_dir)
    assert sorted(paths(entries, "Begin")) == expected
    assert sorted(paths(entries, "Complete")) == expected
    assert len(server.rows()) == 320


@servers
def test_a_reader_who_leaves_in_the_middle_abandons_the_stream(
    serve: Any, audit_dir: Path, command: list[str]
) -> None:
    """The client closes the connection; a file that was read to its end is complete."""
    import django

    is_async = command is UVICORN
    if is_async and django.VERSION < (5,):
        pytest.skip("this Django does not listen for a disconnect")
    server = serve(command)
    assert server.ask("GET", "/api/astream/" if is_async else "/api/file/")[0] == 200
    connection = server.connect()
    connection.request("GET", "/api/astream/?slow=1" if is_async else "/api/stream/?endless=1")
    connection.getresponse().read(3)
    connection.sock.close()
    connection.close()
    eventually(lambda: any(e["event"] == "Abandon" for e in lines(audit_dir)))
    server.stop()

    ends = [e["event"] for e in recorded(audit_dir) if e["event"] not in ("Begin", "Record")]
    assert ends == ["Complete", "Abandon"]


def test_a_worker_is_killed_and_every_row_has_its_begin(serve: Any, audit_dir: Path) -> None:
    """kill -9 under load, again and again: no effect is without an entry."""
    server = serve(GUNICORN)
    over = threading.Event()
    made: list[str] = []

    def load(worker: int) -> int:
        number = 0
        while not over.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                if server.ask("POST", f"/api/items/k{worker}-{number}/")[0] == 201:
                    made.append(f"k{worker}-{number}")
            number += 1
        return number

    def kill() -> int:
        killed = 0
        try:
            for _ in range(6):
                enough = len(made) + 3
                eventually(lambda enough=enough: len(made) >= enough)
                with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
                    os.kill(json.loads(server.ask("GET", "/api/pid/")[1])["pid"], signal.SIGKILL)
                    killed += 1
        finally:
            over.set()
        return killed

    *_, killed = in_threads([lambda n=n: load(n) for n in range(4)] + [kill])
    server.stop()

    rows = server.rows()
    begun = set(paths(lines(audit_dir), "Begin"))
    assert killed >= 2
    assert len(made) >= 18
    assert set(made) <= rows
    assert {f"/api/items/{key}/" for key in rows} <= begun
