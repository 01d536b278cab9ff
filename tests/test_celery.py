"""Celery: a task that cannot be recorded does not run, in a real worker."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reading import session_files
from running import HANG, environment

pytest.importorskip("celery")

TASKS = """
import os, sqlite3
import structlog
from celery import Celery
from celery.signals import worker_process_init
import structlog_audit
from structlog_audit import audit_context, audit_log, current_operation
from structlog_audit.celery import AuditedTask

home = os.environ["HOME_OF_TEST"]
app = Celery("tasks", task_cls=AuditedTask)
app.conf.update(
    broker_url="filesystem://",
    broker_transport_options={
        "data_folder_in": home + "/queue", "data_folder_out": home + "/queue",
        "control_folder": home + "/control",
    },
    result_backend="file://" + home + "/results", broker_connection_retry_on_startup=True,
)
structlog.configure(processors=structlog_audit.audit_processors(app="tasks"))

def note(text):
    with open(home + "/effects", "a") as file:
        file.write(text + "\\n")

@app.task
def erase(invoice):
    current_operation().data["rows"] = 3
    audit_log.info(action="Inner")
    note(invoice)
    return invoice

@app.task(bind=True, max_retries=1)
def flaky(self):
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    note("flaky")

@app.task
def broken():
    raise RuntimeError("no")
"""


class Worker:
    """A worker with two processes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "tasks.py").write_text(TASKS)
        for name in ("queue", "results", "control"):
            (home / name).mkdir()
        self.environ = {
            **environment(),
            "HOME_OF_TEST": str(home),
            "AUDIT_LOG_DIR": str(home / "audit"),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "celery", "-A", "tasks", "worker", "-c", "2",
             "-P", "prefork", "--without-gossip", "--without-mingle", "--without-heartbeat"],
            cwd=home, env={**self.environ, "AUDIT_LOG_DIR": str(home / "audit")},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def call(self, code: str) -> str:
        """Run code beside the tasks; return what it prints."""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"from tasks import *\n{code}"], cwd=self.home,
            env={**self.environ, "AUDIT_LOG_DIR": str(self.home / "asks")},
            capture_output=True, text=True, timeout=HANG, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def entries(self, *events: str) -> list[dict[str, Any]]:
        """Return the entries of the tasks, of these kinds."""
        found = [
            json.loads(line)
            for path in session_files(self.home / "audit")
            for line in path.read_bytes().rpartition(b"\n")[0].splitlines()
        ]
        return [e for e in found if e["event"] in events and e["action"] != "AuditSession"]

    def eventually(self, count: int, *events: str) -> list[dict[str, Any]]:
        """Wait until there are so many of them."""
        end = time.monotonic() + HANG
        while len(found := self.entries(*events)) < count:
            assert time.monotonic() < end, found
            time.sleep(0.05)
        return found


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """Run a worker."""
    made = Worker(tmp_path)
    yield made
    made.process.terminate()
    made.process.wait(HANG)


def test_a_task_is_on_record_before_it_runs_with_who_asked_for_it(worker: Worker) -> None:
    """Its outcome follows, with what the body added."""
    worker.call("""
with audit_context(user_id="2780", company_id="2350"):
    print(erase.delay("inv_42").get(timeout=50))
""")
    (outcome,) = worker.eventually(1, "Complete")
    begin, inner = worker.entries("Begin", "Record")

    assert (begin["action"], begin["type"], begin["userId"]) == ("tasks.erase", "Task", "2780")
    assert (inner["action"], inner["companyId"]) == ("Inner", "2350")
    assert begin["data"]["taskId"]
    assert outcome["data"] == {"rows": 3}
    assert outcome["operationId"] == begin["operationId"]
    assert begin["session"] == outcome["session"]
    assert begin["sequence"] < inner["sequence"] < outcome["sequence"]


def test_each_attempt_of_a_task_is_an_operation(worker: Worker) -> None:
    """The one that was put off is abandoned, the one that broke has failed."""
    worker.call("""
flaky.delay().get(timeout=50)
try:
    broken.delay().get(timeout=50)
except RuntimeError:
    print("broken")
""")
    outcomes = worker.eventually(3, "Complete", "Fail", "Abandon")

    assert sorted((e["action"], e["event"]) for e in outcomes) == [
        ("tasks.broken", "Fail"),
        ("tasks.flaky", "Abandon"),
        ("tasks.flaky", "Complete"),
    ]
    assert len(worker.entries("Begin")) == 3


def test_a_task_that_cannot_be_recorded_does_not_run(worker: Worker) -> None:
    """It fails with our exception; when recording works again, so do tasks."""
    worker.call("print(erase.delay('first').get(timeout=50))")
    audit = worker.home / "audit"
    audit.rename(worker.home / "away")
    audit.write_text("a file in the way")
    said = worker.call("""
for _ in range(4):
    try:
        erase.delay("refused").get(timeout=50)
    except Exception as error:
        print("AuditWriteError" in repr(error))  # JSON has no more of it than a text
""")
    audit.unlink()
    worker.call("print(erase.delay('second').get(timeout=50))")

    effects = (worker.home / "effects").read_text().split()
    assert set(said.split()) == {"True"}
    assert effects == ["first", "second"]


def test_what_a_message_says_of_who_asked_is_no_more_than_text() -> None:
    """A broker is trusted with ids, and not with more."""
    from types import SimpleNamespace

    from structlog_audit.celery import _sent

    headers = {"audit_context": {"user_id": "7", "company_id": True, "other": "x", "type": "CLI"}}
    assert _sent(SimpleNamespace(headers=headers)) == {"user_id": "7"}
    assert _sent(SimpleNamespace(headers={"audit_context": "x"})) == {}
    assert _sent(SimpleNamespace(headers=None)) == {}
