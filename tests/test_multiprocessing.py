"""multiprocessing, pickles and copies: each process has a session of its own."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from reading import ends, read_sessions, recorded
from running import run_file

from structlog_audit import AuditHandler, FileSink, Redact, audit_log, audit_processors, get_logger
from structlog_audit.testing import MemorySink

every_start_method = pytest.mark.parametrize(
    "method", [m for m in multiprocessing.get_all_start_methods() if m != "forkserver"]
)

SETUP = """
    import multiprocessing, sys
    import structlog, structlog_audit
    from structlog_audit import audit_log

    structlog.configure(
        processors=[
            *structlog_audit.audit_processors(app="shop"),
            structlog.processors.JSONRenderer(),
        ]
    )
"""
POOL = (
    SETUP
    + """
    def work(number):
        return audit_log.info(action="Work", number=number)

    if __name__ == "__main__":
        context = multiprocessing.get_context(sys.argv[1])
        audit_log.info(action="Before")
        pool = context.Pool(2)
        receipts = pool.map(work, range(40), chunksize=5)
        pool.close()
        pool.join()
        audit_log.info(action="After")
        assert len(set(receipts)) == 40
"""
)
EXECUTOR = (
    SETUP
    + """
    from concurrent.futures import ProcessPoolExecutor

    def work(number):
        with audit_log.operation(action="Work", number=number):
            return number

    if __name__ == "__main__":
        context = multiprocessing.get_context(sys.argv[1])
        audit_log.info(action="Before")
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            assert sum(pool.map(work, range(40))) == 780
        audit_log.info(action="After")
"""
)
OUTCOME_LAST = (
    SETUP
    + """
    def work():
        with audit_log.operation(action="Work"):
            pass

    if __name__ == "__main__":
        process = multiprocessing.get_context(sys.argv[1]).Process(target=work)
        process.start()
        process.join()
        assert process.exitcode == 0
"""
)
PASSED_ON = (
    SETUP
    + """
    def work(log, native, own):
        log.info(action="FromLogger")
        native.info("ordinary")
        own.record({"action": "FromHandler"})
        own.close()

    if __name__ == "__main__":
        own = structlog_audit.AuditHandler(structlog_audit.FileSink(sys.argv[2]))
        arguments = audit_log.bind(user_id="u-1"), structlog.get_logger().bind(order=1), own
        process = multiprocessing.get_context(sys.argv[1]).Process(target=work, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == 0
"""
)


def run(tmp_path: Path, audit_dir: Path, script: str, *args: object) -> str:
    return run_file(tmp_path / "main.py", script, *args, AUDIT_LOG_DIR=str(audit_dir))


@every_start_method
def test_a_pool_records_every_entry_once(method: str, tmp_path: Path, audit_dir: Path) -> None:
    """Two workers and their parent: whole sessions, one process each."""
    run(tmp_path, audit_dir, POOL, method)

    numbers = Counter(e["data"].get("number") for e in recorded(audit_dir))
    assert numbers == {**dict.fromkeys(range(40), 1), None: 2}
    pids = [session[0]["pid"] for session in read_sessions(audit_dir)]
    assert len(set(pids)) == len(pids)


@every_start_method
def test_operations_in_an_executor_all_have_their_outcomes(
    method: str, tmp_path: Path, audit_dir: Path
) -> None:
    """The last outcome of each worker is not lost when the pool shuts down."""
    run(tmp_path, audit_dir, EXECUTOR, method)

    kinds = Counter(e["event"] for e in recorded(audit_dir))
    assert kinds == {"Begin": 40, "Complete": 40, "Record": 2}


@every_start_method
def test_an_outcome_as_the_last_act_of_a_process_is_not_lost(
    method: str, tmp_path: Path, audit_dir: Path
) -> None:
    """The process ends cleanly right after the operation: outcome and end of the session stand."""
    run(tmp_path, audit_dir, OUTCOME_LAST, method)

    assert [entry["event"] for entry in recorded(audit_dir)] == ["Begin", "Complete"]
    assert None not in ends(audit_dir)


@every_start_method
def test_loggers_and_handlers_can_be_handed_to_a_process(
    method: str, tmp_path: Path, audit_dir: Path
) -> None:
    """A bound audit logger, a bound ordinary logger, a handler: as arguments of a process."""
    own = tmp_path / "own"
    out = run(tmp_path, audit_dir, PASSED_ON, method, own)

    (entry,) = recorded(audit_dir)
    assert (entry["action"], entry["userId"]) == ("FromLogger", "u-1")
    assert [e["action"] for e in recorded(own)] == ["FromHandler"]
    assert out == '{"order": 1, "event": "ordinary"}\n'


def test_a_pickled_bound_logger_records_at_the_same_handler(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """Within one process, a pickle does not open a second session."""
    structlog.configure(processors=[Redact(), *audit_processors(handler=handler, app="shop")])
    log = get_logger(user_id="u-1").bind(order=1)
    native = structlog.get_logger().bind(x=1)

    pickle.loads(pickle.dumps(log)).info(action="A", password="hunter2")
    unpickled = pickle.loads(pickle.dumps(native))

    (entry,) = recorded(audit_dir)
    assert (entry["userId"], entry["data"]["order"]) == ("u-1", 1)
    assert "hunter2" not in str(entry)
    assert unpickled._processors[-1].handler is handler


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]
)
def test_a_copied_handler_is_the_same_handler(
    duplicate: Callable[[Any], Any], handler: AuditHandler
) -> None:
    """Two copies of one handler would be two writers."""
    assert duplicate(handler) is handler
    (*_, route) = duplicate(audit_processors(handler=handler, app="shop"))
    assert route.handler is handler


def test_a_handler_unpickled_elsewhere_keeps_its_options(make_handler: Any, tmp_path: Path) -> None:
    """Configuration travels, state does not."""
    sink = FileSink(tmp_path / "other", "shop", allow_unsafe_directory=True)
    handler = make_handler(sink, timeout=3, app="shop", max_bytes=4_096, max_age=5, low_space=6)
    handler.record({"action": "A"})
    text = pickle.dumps(handler)
    identity = handler._identity
    AuditHandler._by_identity.pop(identity)

    other = pickle.loads(text)

    AuditHandler._by_identity[identity] = handler
    assert other is not handler
    assert other.current is None
    assert other._options == handler._options
    assert vars(other.sink)["directory"] == vars(sink)["directory"]
    assert other.sink.allow_unsafe_directory
    assert other.record({"action": "B"}).session != handler.record({"action": "C"}).session
    other.close()


def test_bound_loggers_can_be_copied(make_handler: Callable[..., AuditHandler]) -> None:
    """Frameworks copy contexts deeply."""
    sink = MemorySink()
    structlog.configure(processors=[*audit_processors(handler=make_handler(sink))])
    values = {"roles": ["a"]}

    log = copy.deepcopy(audit_log.bind(values=values))
    copy.copy(log).info(action="A")

    assert sink.entries[0]["data"] == {"values": {"roles": ["a"]}}
