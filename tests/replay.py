"""An application that audits what real Kubernetes API servers once saw, with eight threads.

    python replay.py EVENTS DIRECTORY RECEIPTS

It keeps each receipt beside its event, as a caller would, only after the call returned.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import structlog

from structlog_audit import (
    AuditHandler,
    FileSink,
    Redact,
    audit_context,
    audit_log,
    audit_processors,
)

ROUNDS = 20
THREADS = 8
Event = dict[str, Any]


def action(event: Event) -> str:
    """Name what happens: `create` of `namespaces` is `NamespaceCreate`."""
    reference = event.get("objectRef", {})
    resource = "".join(
        part[:1].upper() + part[1:]
        for part in (_singular(reference.get("resource", "unknown")), reference.get("subresource"))
        if part
    )
    return resource + event["verb"].capitalize()


def _singular(resource: str) -> str:
    if resource.endswith("ies"):
        return resource[:-3] + "y"
    return resource.removesuffix("s")


def rest(event: Event) -> Event:
    """Return what is neither action nor user nor address."""
    taken = {"verb", "user", "sourceIPs"}
    user = {key: value for key, value in event["user"].items() if key != "username"}
    return {**{k: v for k, v in event.items() if k not in taken}, "user": user}


def main(events: Path, directory: Path, receipts: Path) -> None:
    """Replay all events, several times."""
    handler = AuditHandler(FileSink(directory), max_bytes=500_000)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            Redact(),
            *audit_processors(app="apiserver", handler=handler),
            structlog.processors.add_log_level,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(40),
    )
    lines = events.read_text(encoding="utf-8").split("\n")
    waiting: SimpleQueue[tuple[int, Event]] = SimpleQueue()
    for number, line in enumerate([line for line in lines if line] * ROUNDS):
        waiting.put((number, json.loads(line)))
    kept: list[tuple[int, str, int, str]] = []

    def serve() -> None:
        while True:
            try:
                number, event = waiting.get_nowait()
            except Empty:
                return
            addresses = event.get("sourceIPs") or [None]
            with audit_context(
                user_id=event["user"].get("username"), client_ip=addresses[-1], type="REST"
            ):
                receipt = audit_log.info(
                    action=action(event), request_id=f"{number}", data=rest(event)
                )
            kept.append((number, *receipt[:3]))

    threads = [threading.Thread(target=serve) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    receipts.write_text(json.dumps(kept), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
