"""A FastAPI application of some size under load: no effect without a Begin, whatever breaks."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reading import recorded, session_files
from running import HANG, environment, run_loop

httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or importlib.util.find_spec("fastapi") is None,
    reason="needs FastAPI, and descriptors that a child inherits",
)

APPLICATION = '''
    import asyncio, os, sqlite3, time
    from contextlib import asynccontextmanager
    from pathlib import Path
    from typing import Annotated

    import structlog
    from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, WebSocket
    from fastapi.responses import FileResponse, StreamingResponse
    from fastapi.staticfiles import StaticFiles
    from structlog_audit import (
        AuditHandler, FileSink, SinkError, audit_processors, current_operation
    )
    from structlog_audit.exclusions import Exclude
    from structlog_audit.web.asgi import AuditMiddleware

    HERE = Path(os.environ["SHOP"])
    FAULT = HERE / "fault"

    class Faulty(FileSink):
        """Fails, hangs, or fails each seventh write, as a file says."""

        writes = 0

        def write(self, lines):
            self.writes += 1
            fault = FAULT.read_text()
            if fault == "fail" or (fault == "seventh" and self.writes % 7 == 0):
                raise SinkError("it was told to fail", persisted="no")
            while FAULT.read_text() == "hang":
                time.sleep(0.01)
            super().write(lines)

    handler = AuditHandler(Faulty(HERE / "audit"), timeout=1, app="shop")
    structlog.configure(processors=audit_processors(handler=handler))

    @asynccontextmanager
    async def lifespan(app):
        yield
        handler.close()  # uvicorn ends by the signal it was sent: nothing is run at exit

    class Users:
        """Knows who asks, from a header; a stand-in for an authentication middleware."""

        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            name = dict(scope.get("headers", ())).get(b"authorization", b"").decode()
            if name:
                company, role = ("acme", "admin") if name.startswith("a") else ("emca", "member")
                scope["state"] = {**scope.get("state", {}), "who": (name, company, role)}
            await self.app(scope, receive, send)

    def who(scope, which):
        return (scope.get("state", {}).get("who") or (None, None, None))[which]

    def store(text):
        with sqlite3.connect(HERE / "shop.db", timeout=30) as database:
            database.execute(
                "insert into orders values (?, ?)", (current_operation().operation_id, text)
            )
        database.close()

    def caller(request: Request):
        if who(request.scope, 0) is None:
            raise HTTPException(401)
        return who(request.scope, 0)

    def administrator(request: Request, name: Annotated[str, Depends(caller)]):
        if who(request.scope, 2) != "admin":
            raise HTTPException(403)
        return name

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(
        AuditMiddleware,
        user=lambda scope: who(scope, 0),
        company=lambda scope: who(scope, 1),
        privileged=lambda scope: who(scope, 2) == "admin",
        exclude=[
            Exclude(kind="health", path="/healthz", reason="probe"),
            Exclude(kind="public_read", path="/static/*", reason="pictures"),
            Exclude(kind="own_read", route="me", reason="own profile"),
        ],
    )
    app.add_middleware(Users)
    orders = APIRouter(prefix="/orders")

    @orders.post("", status_code=201)
    def order_create(order: dict, name: Annotated[str, Depends(caller)]):
        store(order["text"])
        return order

    @orders.put("/{text}")
    async def order_settle(text: str, name: Annotated[str, Depends(caller)]):
        current_operation().durable = True
        await asyncio.to_thread(store, text)
        return {}

    @orders.delete("/{text}")
    def order_delete(text: str, name: Annotated[str, Depends(administrator)]):
        store(text)
        return {}

    @orders.get("/export")
    def export():
        def rows():
            for number in range(20):
                yield b"x" * 1000
                time.sleep(0.001)
        return StreamingResponse(rows())

    @orders.post("/upload", status_code=201)
    async def upload(request: Request):
        size = 0
        async for part in request.stream():
            size += len(part)
        await asyncio.to_thread(store, f"upload of {size}")
        return size

    @orders.websocket("/feed")
    async def feed(websocket: WebSocket):
        await websocket.accept()
        while True:
            text = await websocket.receive_text()
            await asyncio.to_thread(store, text)
            await websocket.send_text(text)

    app.include_router(orders, prefix="/v1")

    @app.get("/me")
    def me(name: Annotated[str, Depends(caller)]):
        return name

    @app.get("/file")
    def file():
        return FileResponse(HERE / "static" / "logo.svg")

    @app.get("/healthz")
    async def health():
        return "ok"

    app.mount("/static", StaticFiles(directory=HERE / "static"))
'''
SERVERS = {
    "uvicorn": ["uvicorn", "--no-access-log", "--timeout-graceful-shutdown=5", "--fd={fd}"],
    "hypercorn": ["hypercorn", "--graceful-timeout=5", "--bind=fd://{fd}"],
}
ALICE, BOB = {"authorization": "alice"}, {"authorization": "bob"}


class Shop:
    """The application in a server of its own, and what it left behind."""

    def __init__(self, server: str, directory: Path) -> None:
        self.directory = directory
        (directory / "shop.py").write_text(textwrap.dedent(APPLICATION))
        (directory / "static").mkdir()
        (directory / "static" / "logo.svg").write_text("<svg/>" * 1_000)
        self.fault("")
        with sqlite3.connect(directory / "shop.db") as database:
            database.execute("pragma journal_mode = wal")
            database.execute("create table orders (operation text, text text)")
        database.close()
        listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = listening.getsockname()[1]
        command = [part.format(fd=listening.fileno()) for part in SERVERS[server]]
        with (directory / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, "shop:app"],
                env=environment(SHOP=str(directory), PYTHONWARNINGS="default"),
                cwd=directory, stdout=log, stderr=log, pass_fds=[listening.fileno()],
            )  # fmt: skip
        listening.close()

    def fault(self, kind: str) -> None:
        """Have the sink fail in some way from now on, or work with ``."""
        new = self.directory / "fault.new"
        new.write_text(kind)
        os.replace(new, self.directory / "fault")

    def client(self, timeout: float = HANG) -> Any:
        return httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}", timeout=timeout, trust_env=False,
            limits=httpx.Limits(max_connections=50),
        )  # fmt: skip

    def rows(self) -> list[tuple[str, str]]:
        database = sqlite3.connect(self.directory / "shop.db")
        try:
            return database.execute("select * from orders").fetchall()
        finally:
            database.close()

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(HANG)
        finally:
            self.process.kill()
            self.process.wait()

    def entries(self) -> list[dict[str, Any]]:
        """Return what is on record, after a clean end."""
        for path in session_files(self.directory / "audit"):
            if not path.stat().st_size:  # its first write was told to fail
                path.unlink()
        return recorded(self.directory / "audit")

    def lines(self) -> list[dict[str, Any]]:
        """Return the whole lines on record, after whatever end."""
        found = []
        for path in session_files(self.directory / "audit"):
            whole, _, _ = path.read_bytes().rpartition(b"\n")
            found += [json.loads(line) for line in whole.split(b"\n") if line]
        return found


@pytest.fixture(params=SERVERS)
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"needs {request.param}")
    shop = Shop(request.param, tmp_path)
    try:
        yield shop
    finally:
        shop.stop()


Ask = Callable[[Any, int], Any]


async def _upload(client: Any, number: int) -> Any:
    async def parts() -> Any:
        for _ in range(3):
            yield b"x" * 5_000

    return await client.post("/v1/orders/upload", content=parts())


TRAFFIC: list[tuple[Ask, set[int]]] = [
    (lambda c, n: c.post("/v1/orders", json={"text": f"post {n}"}, headers=BOB), {201}),
    (lambda c, n: c.put(f"/v1/orders/put-{n}", headers=BOB), {200}),
    (lambda c, n: c.delete(f"/v1/orders/delete-{n}", headers=ALICE), {200}),
    (lambda c, n: c.delete(f"/v1/orders/not-{n}", headers=BOB), {403}),
    (lambda c, n: c.post("/v1/orders", json={"text": "nobody"}), {401}),
    (_upload, {201}),
    (lambda c, n: c.get("/v1/orders/export"), {200}),
    (lambda c, n: c.get("/file"), {200}),
    (lambda c, n: c.get("/me", headers=ALICE), {200}),
]
EXCLUDED: list[tuple[Ask, set[int]]] = [
    (lambda c, n: c.get("/healthz"), {200}),
    (lambda c, n: c.get("/static/logo.svg"), {200}),
    (lambda c, n: c.get("/me", headers=BOB), {200}),
]


async def _ask_all(shop: Shop, traffic: list[tuple[Ask, set[int]]], rounds: int) -> Counter[int]:
    """Ask everything at once, so many times; return how often each status was not the usual.

    A connection that broke counts as 0.
    """
    odd: Counter[int] = Counter()

    async def ask(client: Any, one: Ask, usual: set[int], number: int) -> None:
        try:
            status = (await one(client, number)).status_code
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            status = 0
        if status not in usual:
            odd[status] += 1

    async with shop.client() as client:
        await asyncio.gather(
            *(ask(client, one, usual, n) for n in range(rounds) for one, usual in traffic)
        )
    return odd


async def _leave_early(shop: Shop, number: int) -> None:
    """Ask, and go before the answer is there, at some point or other."""
    choose = random.Random(7)

    async def leave(client: Any, n: int) -> None:
        one, _ = TRAFFIC[n % 7]
        with contextlib.suppress(httpx.HTTPError, asyncio.TimeoutError):
            await asyncio.wait_for(one(client, n), choose.uniform(0.0001, 0.003))

    async with shop.client() as client:
        await asyncio.gather(*(leave(client, n) for n in range(number)))


def assert_every_effect_has_its_begin(rows: list[Any], entries: list[dict[str, Any]]) -> None:
    """Every row has a Begin, and no outcome is before its Begin."""
    begun: set[str] = set()
    for entry in entries:
        if entry["event"] == "Begin":
            begun.add(entry.get("operationId", ""))
        elif entry["event"] in ("Complete", "Fail", "Abandon") and "operationId" in entry:
            assert entry["operationId"] in begun
    assert rows
    assert not {operation for operation, _ in rows} - begun


def test_a_sink_that_fails_hangs_and_comes_back_under_load(shop: Shop) -> None:
    """503 and no effect while it does not work, normal service afterwards, probes throughout."""
    assert not run_loop(_ask_all(shop, TRAFFIC + EXCLUDED, 30))
    served = len(shop.rows())
    assert served == 30 * 4

    for fault in ("fail", "hang"):
        shop.fault(fault)
        odd = run_loop(_ask_all(shop, TRAFFIC + EXCLUDED, 3))
        # hypercorn may break an upload off that is answered before it was read
        assert odd[503] + odd[0] == 3 * len(TRAFFIC)
        assert odd[0] <= 3
        assert len(shop.rows()) == served
        shop.fault("")
        run_loop(_until_served(shop))
        assert not run_loop(_ask_all(shop, TRAFFIC + EXCLUDED, 3))
        served = len(shop.rows())

    shop.fault("seventh")
    odd = run_loop(_ask_all(shop, TRAFFIC, 10))
    assert set(odd) <= {503, 0}
    assert odd[503]
    shop.fault("")
    run_loop(_leave_early(shop, 100))
    assert not run_loop(_ask_all(shop, TRAFFIC + EXCLUDED, 3))
    shop.stop()

    entries = shop.entries()
    assert_every_effect_has_its_begin(shop.rows(), entries)
    assert not {entry["action"] for entry in entries} & {"health", "static"}
    begins = {e["operationId"] for e in entries if e["event"] == "Begin"}
    ended = {e["operationId"] for e in entries if e["event"] in ("Complete", "Fail", "Abandon")}
    # an outcome that had to be durable, and failed, is gone: its client was told 503
    rows = {operation for operation, text in shop.rows() if not text.startswith("put-")}
    assert ended <= begins
    assert rows <= ended


async def _until_served(shop: Shop) -> None:
    async with shop.client() as client:
        while (await client.get("/file")).status_code != 200:
            await asyncio.sleep(0.01)


def test_websockets_under_load_have_begin_and_outcome(shop: Shop) -> None:
    """Each message has its effect within an operation that began before."""
    client = pytest.importorskip("websockets.asyncio.client")

    async def talk(number: int) -> None:
        url = f"ws://127.0.0.1:{shop.port}/v1/orders/feed"
        async with client.connect(url, proxy=None) as connection:
            for text in ("one", "two"):
                await connection.send(f"{text} {number}")
                await connection.recv()

    async def many() -> None:
        await asyncio.gather(*(talk(number) for number in range(20)))

    run_loop(many())
    shop.stop()

    entries = shop.entries()
    assert len(shop.rows()) == 40
    assert_every_effect_has_its_begin(shop.rows(), entries)
    assert {e["data"]["received"] for e in entries if e["event"] != "Begin"} == {2}


def test_a_server_killed_under_load_leaves_no_effect_without_a_begin(shop: Shop) -> None:
    """`kill -9` between any two steps of any request."""

    async def load() -> None:
        async with shop.client() as client:

            async def ask(number: int) -> None:
                one, _ = TRAFFIC[number % 3]
                try:
                    await one(client, number)
                except httpx.HTTPError:
                    return
                if number == 150:
                    shop.process.kill()

            await asyncio.gather(*(ask(number) for number in range(400)))

    run_loop(load())
    shop.stop()

    assert shop.process.returncode == -signal.SIGKILL
    assert_every_effect_has_its_begin(shop.rows(), shop.lines())
