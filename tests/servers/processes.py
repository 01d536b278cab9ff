"""Servers in processes of their own: the stand-in for Seq, HAProxy and nginx.

    with SeqServer(tmp_path, key="secret") as seq:
        with haproxy(tmp_path, replacing_answers(seq.port, 502)) as proxy:
            ...  # POST to proxy.url + "/ingest/clef"
        assert seq.stored() == [...]

Each is a child of the test, listens on loopback only, and ends with its `with` block.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.runner import needs

from servers.certificates import Pair
from servers.seq import requests_of

PROGRAM = Path(__file__).with_name("seq.py")
PATIENCE = 20
"""Seconds within which a server listens, or ends."""


class SeqServer:
    """The stand-in for Seq, on a port of its own that it keeps."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        base: str = "",
        key: str | None = None,
        tls: Pair | None = None,
        client_ca: Path | None = None,
    ) -> None:
        """Take more of `seq.py`'s options as words: `"--minimum-level", "Warning"`."""
        self.store = directory / "seq.clef"
        self.port = 0
        self.base = base
        self._errors = directory / "seq.stderr"
        self._options = [*options, "--base", base]
        self._options += ["--key", key] if key is not None else []
        self._options += ["--cert", str(tls.cert), "--private", str(tls.private)] if tls else []
        self._options += ["--client-ca", str(client_ca)] if client_ca else []
        self._scheme = "https" if tls else "http"
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        """The base that a client is to be given."""
        return f"{self._scheme}://127.0.0.1:{self.port}{self.base}"

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process, "not started"
        return self._process

    def __enter__(self) -> SeqServer:
        self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        _end(self.process)

    def restart(self) -> None:
        """Start, or start again at the same port with the same store."""
        if self._process:
            _end(self._process)
        command = [sys.executable, "-IS", str(PROGRAM), "--port", str(self.port)]
        with self._errors.open("a") as errors:
            self._process = subprocess.Popen(
                [*command, "--store", str(self.store), *self._options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self._process.stdout
        said = self._process.stdout.readline()
        assert said, self.errors()
        self.port = int(said)

    def clear(self) -> None:
        """Forget all that came, for the next test; it is going on, or goes on again."""
        if self.process.poll() is not None:
            self.restart()
        for file in (self.store, requests_of(self.store), self._errors):
            os.truncate(file, 0)  # all of them are appended to

    def kill(self) -> None:
        """End it with SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> None:
        """Stop it: connections are still accepted, by the kernel, and never served."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # returns when it stands

    def cont(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def stored_lines(self) -> list[bytes]:
        """Return the events as they came, without their newlines."""
        return self.store.read_bytes().split(b"\n")[:-1]

    def stored(self) -> list[dict[str, Any]]:
        """Return the events."""
        return [json.loads(line) for line in self.stored_lines()]

    def requests(self) -> list[dict[str, Any]]:
        """Return what was noted of each request."""
        return [json.loads(line) for line in requests_of(self.store).read_text().splitlines()]

    def errors(self) -> str:
        """Return what it said on standard error: nothing, or a traceback."""
        return self._errors.read_text()


def _end(process: subprocess.Popen[str]) -> None:
    """End a process, even a stopped one."""
    if process.poll() is None:
        process.terminate()
        process.send_signal(signal.SIGCONT)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(PATIENCE)
    if process.stdout:
        process.stdout.close()


NOBODY = 1
"""A port that nobody listens at; it can serve as a server that is down."""


@contextmanager
def held_port() -> Iterator[int]:
    """Keep a port, so that nobody takes it before the server that it is for.

    Linux lets both have it if both say so (SO_REUSEADDR), as HAProxy and nginx do.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


# Proxies.


@dataclass(frozen=True)
class Proxy:
    """A proxy that listens."""

    port: int
    tls: bool
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"


@contextmanager
def haproxy(directory: Path, config: str) -> Iterator[Proxy]:
    """Run HAProxy in the foreground with this configuration, in which @PORT@ is its port."""
    needs("haproxy")
    with _proxy(directory, "haproxy", config, ["haproxy", "-db", "-f"]) as proxy:
        yield proxy


@contextmanager
def nginx(directory: Path, config: str) -> Iterator[Proxy]:
    """Run nginx in the foreground with this configuration, in which @PORT@ is its port."""
    needs("nginx")
    command = ["nginx", "-p", str(directory), "-e", "stderr", "-c"]
    with _proxy(directory, "nginx", config, command) as proxy:
        yield proxy


@contextmanager
def _proxy(directory: Path, name: str, config: str, command: list[str]) -> Iterator[Proxy]:
    with held_port() as port:
        file, log = directory / f"{name}-{port}.conf", directory / f"{name}-{port}.log"
        config = config.replace("@PORT@", str(port)).replace("@DIRECTORY@", str(directory))
        file.write_text(config)
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, str(file)], stdin=subprocess.DEVNULL, stdout=out, stderr=out, text=True
            )
        try:
            _wait_until_listening(port, process, log)
            yield Proxy(port, " ssl;" in config, process)
        finally:
            _end(process)


def _wait_until_listening(port: int, process: subprocess.Popen[str], log: Path) -> None:
    for _ in range(PATIENCE * 100):
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise AssertionError(f"nothing listens at {port}: {log.read_text()}")


# HAProxy's configurations; `backend` is the port of the server behind.

_HAPROXY = """
global
    maxconn 256
defaults
    mode {mode}
    retries 0
    timeout connect 2s
    timeout client 30s
    timeout server {timeout}
listen audit
    bind 127.0.0.1:@PORT@
    server audit 127.0.0.1:{backend}
"""


def _haproxy(backend: int, *rules: str, mode: str = "http", timeout: str = "30s") -> str:
    rest = "".join(f"    {rule}\n" for rule in rules)
    return _HAPROXY.format(mode=mode, timeout=timeout, backend=backend) + rest


def passing(backend: int) -> str:
    """Pass all through; with `NOBODY` for the backend, answer 503."""
    return _haproxy(backend)


def impatient(backend: int, milliseconds: int) -> str:
    """Answer 504 when the backend takes longer, though it may have stored."""
    return _haproxy(backend, timeout=f"{milliseconds}ms")


def replacing_answers(backend: int, status: int = 502) -> str:
    """Let the backend store, and answer this error instead of its 201."""
    return _haproxy(backend, f"http-response return status {status} if {{ status 201 }}")


def dropping_answers(backend: int) -> str:
    """Let the backend store, and never let the client know."""
    return _haproxy(backend, "http-response silent-drop")


def resetting_on_connect(backend: int) -> str:
    """Accept connections at the level of TCP and reset them."""
    return _haproxy(backend, "tcp-request connection reject", mode="tcp")


def closing_on_answer(backend: int) -> str:
    """Let the backend store, and close the connection when it answers (HAProxy can't reset it)."""
    wait, reject = "tcp-response inspect-delay 5s", "tcp-response content reject"
    return _haproxy(backend, wait, f"{reject} if {{ res.len gt 0 }}", mode="tcp")


def limiting(backend: int, requests: int, retry_after: int | None = None) -> str:
    """Let so many requests pass in ten seconds, and answer 429 to the others."""
    header = "" if retry_after is None else f" hdr Retry-After {retry_after}"
    return _haproxy(
        backend,
        "stick-table type ip size 1k expire 10s store http_req_rate(10s)",
        "http-request track-sc0 src",
        f"http-request return status 429{header} if {{ sc_http_req_rate(0) gt {requests} }}",
    )


# nginx's configurations.

_NGINX = """
daemon off;
master_process off;
pid @DIRECTORY@/nginx-@PORT@.pid;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path @DIRECTORY@/nginx-body;
    proxy_temp_path @DIRECTORY@/nginx-proxy;
    fastcgi_temp_path @DIRECTORY@/nginx-fastcgi;
    uwsgi_temp_path @DIRECTORY@/nginx-uwsgi;
    scgi_temp_path @DIRECTORY@/nginx-scgi;
    server {{
        listen 127.0.0.1:@PORT@{ssl};
        client_max_body_size 20m;
        location / {{
            {location}
        }}
    }}
}}
"""


def _nginx(*location: str, ssl: str = "") -> str:
    return _NGINX.format(location="\n            ".join(location), ssl=ssl)


def _proxy_pass(backend: int) -> str:
    return (
        f'proxy_pass http://127.0.0.1:{backend}; proxy_http_version 1.1; '
        'proxy_set_header Connection "";'
    )  # fmt: skip


def terminating_tls(backend: int, pair: Pair) -> str:
    """Speak TLS with the client, and plain HTTP with the backend."""
    ssl = f" ssl; ssl_certificate {pair.cert}; ssl_certificate_key {pair.private}"
    return _nginx(_proxy_pass(backend), ssl=ssl)


def limiting_bodies(backend: int, size: int) -> str:
    """Answer 413 to bodies of more bytes."""
    return _nginx(f"client_max_body_size {size};", _proxy_pass(backend))


def redirecting(url: str) -> str:
    """Answer 302 to another host, with the path kept."""
    return _nginx(f"return 302 {url}$request_uri;")


def welcoming() -> str:
    """Answer 200 with a page, whatever comes."""
    return _nginx("default_type text/html;", "return 200 '<!doctype html><p>Please sign in.';")


def dripping(backend: int, bytes_per_second: int) -> str:
    """Let the backend store, and send its answer slowly."""
    return _nginx(f"limit_rate {bytes_per_second};", _proxy_pass(backend))
