"""The command line: doctor and demo, run as a person runs them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reading import session_files
from running import HANG, environment, eventually
from servers.processes import SeqServer

from structlog_audit import AuditHandler, FileSink, bench

pytest.importorskip("click", reason="the command line is an extra")


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command with an environment of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("AUDIT_")}
    clean.setdefault("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    return subprocess.run(
        [sys.executable, "-m", "structlog_audit", *arguments],
        cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_doctor_says_that_auditing_is_enabled_and_leaves_no_trace(tmp_path: Path) -> None:
    """With a usable directory the report is good, the status 0, and the directory empty."""
    target = tmp_path / "audit"
    done = run("doctor", cwd=tmp_path, AUDIT_LOG_DIR=str(target))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Auditing is enabled\n")
    assert "write + sync" in done.stdout
    assert "does not exist yet" in done.stdout
    assert not target.exists()


def test_doctor_says_why_auditing_is_not_enabled(tmp_path: Path) -> None:
    """Without a target the status is 1, and the report says what to set."""
    done = run("doctor", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith("Auditing is not enabled: no target")
    assert "AUDIT_LOG_DIR" in done.stdout


def test_doctor_names_a_mistyped_variable(tmp_path: Path) -> None:
    """A typo in a variable is named with the name that was meant."""
    done = run("doctor", cwd=tmp_path, AUDIT_LOG_DRI="x")
    assert done.returncode == 1
    assert "did you mean AUDIT_LOG_DIR?" in done.stdout


def test_doctor_reports_a_directory_that_is_a_file(tmp_path: Path) -> None:
    """A target that cannot be opened is not enabled, without a traceback."""
    (tmp_path / "audit").write_text("x")
    done = run("doctor", cwd=tmp_path, AUDIT_LOG_DIR=str(tmp_path / "audit"))
    assert done.returncode == 1
    assert "ENOTDIR" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_doctor_as_json_carries_the_same_report(tmp_path: Path) -> None:
    """The report for machines has the session, the space and the latency."""
    audit = tmp_path / "audit"
    code = (
        "from structlog_audit import *; "
        f"h = AuditHandler(FileSink({str(audit)!r})); h.record({{'action': 'A'}}); h.close()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    done = run("doctor", "--json", cwd=tmp_path, AUDIT_LOG_DIR=str(audit))
    report = json.loads(done.stdout)
    assert report["enabled"] is True
    assert report["session"]["files"] == 1
    assert report["session"]["state"] == "closed"
    assert report["space"]["days_left"] > 0
    assert report["latency"]["p99_us"] >= report["latency"]["p50_us"] > 0
    assert report["permissions"]["mode"] == "0700"


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a memory file system")
def test_doctor_warns_of_a_file_system_on_which_a_sync_means_nothing(tmp_path: Path) -> None:
    """A memory file system is recognised."""
    target = Path("/dev/shm") / f"audit-test-{os.getpid()}"
    done = run("doctor", "--json", cwd=tmp_path, AUDIT_LOG_DIR=str(target))
    report = json.loads(done.stdout)
    assert report["file_system"]["durable"] is False
    assert any("a sync means nothing" in problem for problem in report["problems"])
    assert not target.exists()


APP = """
import structlog, structlog_audit

def good():
    structlog.configure(processors=[
        structlog.contextvars.merge_contextvars,
        *structlog_audit.audit_processors(app="billing"),
        structlog.dev.ConsoleRenderer(),
    ])

def late():
    structlog.configure(processors=[
        structlog.stdlib.filter_by_level,
        *structlog_audit.audit_processors(app="billing"),
        structlog.contextvars.merge_contextvars,
        structlog.dev.ConsoleRenderer(),
    ])

def forgotten():
    structlog.configure(processors=[structlog.dev.ConsoleRenderer()])

def broken():
    raise ValueError("no database")

def leaves():
    raise SystemExit(3)

def rendered():
    structlog.configure(processors=[
        structlog.processors.JSONRenderer(), *structlog_audit.audit_processors(),
    ])

def starless():
    structlog.configure(processors=[
        structlog_audit.audit_processors(), structlog.dev.ConsoleRenderer(),
    ])

def unredacted():
    structlog.configure(processors=[
        *structlog_audit.audit_processors(), structlog_audit.Redact(),
    ])

async def later():
    pass

def talks():
    print("hello")
    good()

def stdlib():
    import logging
    logging.getLogger("billing").addHandler(structlog_audit.audit_handler())
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A directory with an application."""
    (tmp_path / "someapp.py").write_text(APP)
    (tmp_path / "unreadable.py").write_text("def there(:")
    (tmp_path / "audit").mkdir(0o700)
    return tmp_path


def test_doctor_looks_at_an_application(app: Path) -> None:
    """The position of our processors in the application's configuration is shown."""
    done = run("doctor", "--json", "--app", "someapp:good", cwd=app, AUDIT_LOG_DIR="audit")
    report = json.loads(done.stdout)
    assert report["enabled"] is True, done.stdout
    assert report["app"] == "billing"
    assert report["processors"].index("merge_contextvars") < report["processors"].index(
        "RouteAudit"
    )
    assert report["problems"] == []


def test_doctor_finds_a_handler_of_logging(app: Path) -> None:
    """An application may audit by the standard library's logging alone."""
    done = run("doctor", "--json", "--app", "someapp:stdlib", cwd=app, AUDIT_LOG_DIR="audit")
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["problems"] == []


def test_what_an_application_prints_is_kept_out_of_the_report(app: Path) -> None:
    """It goes to stderr."""
    done = run("doctor", "--json", "--app", "someapp:talks", cwd=app, AUDIT_LOG_DIR="audit")
    assert json.loads(done.stdout)["enabled"] is True
    assert done.stderr == "hello\n"


def test_doctor_does_not_promise_to_make_what_cannot_be_made(tmp_path: Path) -> None:
    """The parent of the directory is a file."""
    (tmp_path / "file").write_text("x")
    done = run("doctor", cwd=tmp_path, AUDIT_LOG_DIR=str(tmp_path / "file" / "audit"))
    assert done.returncode == 1
    assert "will be made" not in done.stdout


def test_doctor_tells_nothing_of_a_target_that_it_did_not_read(tmp_path: Path) -> None:
    """One variable is unusable: the others are not reported as missing."""
    done = run("doctor", cwd=tmp_path, AUDIT_LOG_DIR="audit", AUDIT_LOG_TIMEOUT="soon")
    assert done.returncode == 1
    assert "AUDIT_LOG_TIMEOUT='soon'" in done.stdout
    assert "target" not in done.stdout


@pytest.mark.parametrize("command", ["doctor", "demo"])
def test_a_terminal_that_lacks_a_character_gets_another(tmp_path: Path, command: str) -> None:
    """Windows' code pages, and a plain C locale."""
    done = run(command, cwd=tmp_path, AUDIT_LOG_DIR=str(tmp_path / "a"), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout


def test_doctor_sees_processors_in_the_wrong_place(app: Path) -> None:
    """A filter before, and merge_contextvars after our processors are open problems."""
    done = run("doctor", "--json", "--app", "someapp:late", cwd=app, AUDIT_LOG_DIR="audit")
    problems = " ".join(json.loads(done.stdout)["problems"])
    assert "filter_by_level stands before" in problems
    assert "merge_contextvars stands after" in problems


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("someapp:forgotten", "has no audit processors"),
        ("someapp:late", "filter_by_level"),
        ("someapp:rendered", "JSONRenderer replaced the event dict"),
        ("someapp:starless", "put a star before it"),
        ("someapp:unredacted", "Redact stands after"),
        ("someapp:later", "is a coroutine function"),
        ("someapp:leaves", "SystemExit"),
        ("unreadable:there", "cannot load unreadable:there: SyntaxError"),
        ("someapp:broken", "no database"),
        ("someapp:missing", "cannot load someapp:missing"),
        ("nothing:there", "cannot load nothing:there"),
        ("someapp", "module:callable"),
    ],
)
def test_doctor_explains_an_application_that_does_not_audit(
    app: Path, name: str, says: str
) -> None:
    """What is wrong with the application is said in one sentence, with status 1."""
    done = run("doctor", "--app", name, cwd=app, AUDIT_LOG_DIR="audit")
    assert done.returncode == 1
    assert says in " ".join(done.stdout.split())
    assert "Traceback" not in done.stdout + done.stderr


def test_demo_aborts_its_caller_and_loses_nothing(tmp_path: Path) -> None:
    """The demonstration keeps its files where it is told, and every receipt has its line."""
    done = run("demo", "kept", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "inv_42 is still there" in done.stdout
    assert "4 of 4 receipts have their line on disk." in done.stdout
    assert "hunter2" not in done.stdout
    assert len(session_files(tmp_path / "kept")) == 2


def test_demo_cleans_up_behind_itself(tmp_path: Path) -> None:
    """Without a directory, nothing remains."""
    done = run("demo", cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_demo_explains_a_directory_that_it_cannot_use(tmp_path: Path) -> None:
    """A mistyped path gives an error and a hint, and no traceback."""
    (tmp_path / "file").write_text("x")
    done = run("demo", str(tmp_path / "file" / "below"), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_demo_refuses_a_directory_without_a_name(tmp_path: Path) -> None:
    """As an unset variable gives one."""
    done = run("demo", "", cwd=tmp_path)
    assert done.returncode == 1
    assert "no usable name" in done.stderr


def test_without_its_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    """The command is installed with the library; its libraries are not."""
    (tmp_path / "click.py").write_text("raise ImportError('No module named click', name='click')")
    paths = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])
    done = run("doctor", cwd=tmp_path, PYTHONPATH=paths)
    assert done.returncode == 2
    assert "pip install 'structlog-audit[cli]'" in done.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_bench_measures_a_disk_and_leaves_no_trace(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All figures are there, and nothing else is afterwards."""
    from click.testing import CliRunner

    from structlog_audit import cli

    shorter = functools.partial(bench.run_bench, seconds=0.05)
    monkeypatch.setattr(cli, "run_bench", shorter)
    monkeypatch.setenv("AUDIT_LOG_DIR", str(tmp_path))

    done = CliRunner().invoke(cli.cli, ["bench", "--json"] if as_json else ["bench"])

    assert done.exit_code == 0
    assert list(tmp_path.iterdir()) == []
    if not as_json:
        assert "64 threads" in done.stdout
        assert "A sync takes" in done.stdout or "Not durable" in done.stdout
        return
    result = json.loads(done.stdout)
    assert result["target"] == str(tmp_path)
    assert 400 < result["bytes"] < 600
    for times in (result["sync"], result["floor"], result["call"]):
        assert 0 < times["p50_us"] <= times["p99_us"] <= times["max_us"]
    assert sorted(result["rates"]) == ["1", "64", "8"]
    assert all(rate > 0 for rate in result["rates"].values())


def test_bench_without_a_directory_says_what_to_name(tmp_path: Path) -> None:
    """No directory, one that is not there, one that is a file: two lines, no traceback."""
    (tmp_path / "file").touch()
    for arguments in ([], ["missing"], ["file"]):
        done = run("bench", *arguments, cwd=tmp_path)

        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert "hint: name one" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_doctor_looks_at_a_server_and_a_directory(tmp_path: Path) -> None:
    """Both are there; the policy is said."""
    with SeqServer(tmp_path) as seq:
        variables = {"AUDIT_SERVER_URL": seq.url, "AUDIT_LOG_DIR": str(tmp_path / "audit")}
        done = run("doctor", "--json", cwd=tmp_path, **variables)
        report = json.loads(done.stdout)

    assert done.returncode == 0
    assert report["policy"] == "all"
    assert report["target"].startswith("AllOf(SeqSink(")
    assert report["latency"]["p50_us"] > 0
    assert not (tmp_path / "audit").exists()


@pytest.mark.parametrize(("policy", "status"), [("all", 1), ("first", 0)])
def test_doctor_names_a_server_that_is_away(policy: str, status: int, tmp_path: Path) -> None:
    """An entry can be recorded all the same if the first that confirms is enough."""
    variables = {"AUDIT_SERVER_URL": "http://127.0.0.1:1", "AUDIT_LOG_DIR": str(tmp_path / "a"),
                 "AUDIT_LOG_POLICY": policy}  # fmt: skip

    done = run("doctor", cwd=tmp_path, **variables)

    assert done.returncode == status
    assert "cannot be reached: Connection refused" in done.stdout
    assert "is the server running" in done.stdout


def test_doctor_takes_an_application_for_what_configures(tmp_path: Path) -> None:
    """As servers name it; its exclusions are listed, though FastAPI makes its middleware late."""
    (tmp_path / "shop.py").write_text(
        "import structlog, structlog_audit\n"
        "from fastapi import FastAPI\n"
        "from structlog_audit import Exclude\n"
        "from structlog_audit.web.asgi import AuditMiddleware\n"
        "structlog.configure(processors=structlog_audit.audit_processors())\n"
        "app = FastAPI()\n"
        "probe = Exclude(kind='health', path='/healthz', reason='a :key: probe')\n"
        "app.add_middleware(AuditMiddleware, exclude=[probe])\n"
    )
    done = run("doctor", "--app", "shop:app", cwd=tmp_path, AUDIT_LOG_DIR=str(tmp_path / "audit"))

    assert done.returncode == 0, done.stdout
    assert "path /healthz: a health probe (a :key: probe)" in done.stdout


def test_doctor_tells_of_a_key_that_is_wrong(tmp_path: Path) -> None:
    """Before the first entry fails."""
    with SeqServer(tmp_path, key="the-key") as seq:
        variables = {"AUDIT_SERVER_URL": seq.url, "AUDIT_SERVER_API_KEY": "hunter2"}
        done = run("doctor", cwd=tmp_path, **variables)

    assert done.returncode == 1
    assert "the key is wrong" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


def test_doctor_tells_of_entries_that_no_forwarder_has_shipped(tmp_path: Path) -> None:
    """The server was away, and nobody thought of what the directory has."""
    write_entries(tmp_path / "audit", 3)
    with SeqServer(tmp_path) as seq:
        variables = {"AUDIT_SERVER_URL": seq.url, "AUDIT_LOG_DIR": str(tmp_path / "audit"),
                     "AUDIT_LOG_POLICY": "first"}  # fmt: skip
        done = run("doctor", cwd=tmp_path, **variables)

    assert "5 entries are in" in done.stdout
    assert "no forwarder has ever been at work" in done.stdout


def test_doctor_says_what_a_server_does_not_prove(tmp_path: Path) -> None:
    """An answer of a server that is no Seq; and one that is not encrypted, loudly."""
    with SeqServer(tmp_path, "--ndjson", "200") as seq:
        variables = {"AUDIT_SERVER_URL": seq.url, "AUDIT_SERVER_FORMAT": "ndjson"}
        done = run("doctor", cwd=tmp_path, **variables, AUDIT_SERVER_ALLOW_INSECURE="1")

    assert done.returncode == 0, done.stdout
    assert "seldom that an entry is on a disk" in done.stdout
    assert "NOT ENCRYPTED" in done.stdout


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"AUDIT_SERVER_URL": "logs.example.com"}, "looks like https://logs.example.com"),
        ({"AUDIT_SERVER_URL": "https://audit.invalid"}, "its name cannot be looked up"),
        ({"AUDIT_SERVER_API_KEY": "hunter2"}, "AUDIT_SERVER_URL is not"),
    ],
)
def test_doctor_explains_a_server_that_cannot_be(
    variables: dict[str, str], words: str, tmp_path: Path
) -> None:
    """One message each, without what is secret."""
    done = run("doctor", cwd=tmp_path, **variables)

    assert done.returncode == 1
    assert words in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


def write_entries(directory: Path, count: int) -> None:
    handler = AuditHandler(FileSink(directory))
    for number in range(count):
        handler.record({"action": "A", "number": number})
    handler.close()


def test_forward_ships_what_is_there_and_the_doctor_knows(tmp_path: Path) -> None:
    """While the server is away the lag is told; afterwards nothing lags."""
    audit = tmp_path / "audit"
    write_entries(audit, 3)
    with SeqServer(tmp_path, key="the-key") as seq:
        variables = {"AUDIT_SERVER_API_KEY": "the-key"}
        done = run("forward", str(audit), "--to", seq.url, cwd=tmp_path, **variables)
        stored = seq.stored()
        here = {**variables, "AUDIT_SERVER_URL": seq.url, "AUDIT_LOG_DIR": str(audit)}
        again = run("forward", cwd=tmp_path, **here, AUDIT_LOG_POLICY="first")
        twice = run("forward", cwd=tmp_path, **here)

    assert (done.returncode, done.stdout) == (0, "5 entries of 1 files shipped\n"), done.stderr
    assert [event.get("number") for event in stored] == [None, 0, 1, 2, None]
    assert again.stdout == "0 entries of 0 files shipped\n"
    assert "the server has every entry of the directory already" in twice.stderr
    write_entries(audit, 2)
    report = run("doctor", cwd=tmp_path, AUDIT_LOG_DIR=str(audit)).stdout
    assert "not forwarded 4 entries" in report


def test_forward_follows_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """As a service: what comes is shipped; SIGTERM ends it in order."""
    audit = tmp_path / "audit"
    audit.mkdir(mode=0o700)
    command = [sys.executable, "-m", "structlog_audit", "forward", str(audit), "--follow"]
    with SeqServer(tmp_path) as seq:
        service = subprocess.Popen([*command, "--to", seq.url], env=environment())
        write_entries(audit, 2)
        eventually(lambda: seq.store.exists() and len(seq.stored()) == 4)
        service.terminate()

        assert service.wait(HANG) == 0


def test_forward_says_what_is_missing(tmp_path: Path) -> None:
    """A directory, a server, one that is away, a number: one message each."""
    write_entries(tmp_path / "audit", 1)
    cases = [
        ([], "no directory to forward"),
        (["audit"], "no server to forward to"),
        (["missing", "--to", "http://127.0.0.1:1"], "missing"),
        (["audit", "--to", "http://127.0.0.1:1"], "Connection refused"),
        (["audit", "--to", "http://a:hunter2@127.0.0.1"], "carries a key or a password"),
        (["audit", "--to", "http://127.0.0.1:1", "--skip", "x", "y"], "'y' is no number"),
    ]
    for arguments, words in cases:
        done = run("forward", *arguments, cwd=tmp_path, AUDIT_LOG_TIMEOUT="0.5s")

        assert done.returncode == 1, arguments
        assert words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert "hunter2" not in done.stderr
