"""How every command ends: when nobody reads it, when nothing can be printed, and at Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import textwrap
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import click
import pytest
from reading import session_files
from running import HANG, environment, eventually, run_python
from servers.processes import SeqServer
from signing import make_key
from terminal import big, command, run

from structlog_audit import AuditHandler, FileSink, Signer
from structlog_audit.cli import cli
from structlog_audit.terminal import Command, Commands

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes and signals")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")

TODAY = datetime.now(timezone.utc).date().isoformat()
EXPORT = ["--from", TODAY, "--to", TODAY, "--output"]
HOLD = ["--reason", "case 4711"]
UNTOLD = "error: cannot print to stdout: {}; what was done is done\n"
COMMANDS = {
    1: [
        "doctor", "doctor --json", "demo", "bench", "bench --json", "forward idle --to http://[::1]:1",
        "prove receipt.json log", "keygen example.com/x --output {new}", "retain log --keep 90d",
        "retain log --keep 90d --yes", "compress log", "compress log --yes", "hold list log",
        "hold list log --json", "hold add log --reason x", "hold release log {hold} --reason x",
        f"export log --from {TODAY} --to {TODAY} --output {{new}}", "keygen --help",
    ],
    2: [
        "search log", "search log --json", "tail log", "tail log --json", "show {session}:2 log",
        "show {session}:2 log --json", "report log", "report log --format json",
        "report log --format csv", "report log --format html", "search --help", "--help",
        "--version", "hold --help",
    ],
    3: [
        "verify log", "verify log --json", "verify-proof proof.json --key key.pub",
        "verify-export log.zip --key key.pub", "verify --help",
    ],
}  # fmt: skip
"""What each prints to stdout, by the status of what goes wrong."""
CASES = [(line, status) for status, lines in COMMANDS.items() for line in lines]
SHORT_BENCH = """
    import functools, sys
    from structlog_audit import bench, cli
    cli.run_bench = functools.partial(bench.run_bench, seconds=0.05)
    sys.argv[0] = "structlog-audit"
    cli.run()
"""


def buffered(**variables: str) -> dict[str, str]:
    """Return an environment in which stdout has its buffer, whatever ours says."""
    return environment(PYTHONUNBUFFERED="", **variables)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a signed log, and all that the commands take."""
    made = tmp_path_factory.mktemp("home")
    key = make_key(made / "audit.key")
    (made / "key.pub").write_text(str(key.verifier))
    (made / "idle").mkdir(0o700)
    handler = AuditHandler(FileSink(made / "log", signer=Signer(made / "audit.key", interval=9)))
    receipts = [handler.record({"action": "A", "data": {"n": n}}) for n in range(5)]
    handler.close()
    assert receipts[1] is not None
    (made / "receipt.json").write_text(json.dumps(receipts[1]._asdict()))
    (made / "proof.json").write_text(done(made, "prove", "receipt.json", "log"))
    done(made, "export", "log", *EXPORT, "log.zip")
    return made


def done(home: Path, *arguments: str) -> str:
    ran = subprocess.run(
        command(*arguments), cwd=home, capture_output=True, encoding="utf-8", timeout=HANG,
        env=buffered(AUDIT_LOG_SIGNING_KEY_FILE="audit.key", AUDIT_LOG_DIR="log"),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def ended(
    home: Path, line: str, stdout: int | IO[Any], stderr: int | IO[Any] = subprocess.PIPE
) -> tuple[int, str]:
    """Run a command; return its status, and what it says on stderr."""
    session = session_files(home / "log")[0].stem.split("-")[-1]
    hold = done(home, "hold", "add", "log", *HOLD).strip() if "{hold}" in line else ""
    new = str(home / f"new-{len(os.listdir(home))}")
    words = [word.format(session=session, hold=hold, new=new) for word in line.split()]
    program = command(*words)
    if words[0] == "bench":
        program = [sys.executable, "-c", textwrap.dedent(SHORT_BENCH), *words]
    ran = subprocess.run(
        program, cwd=home, stdout=stdout, stderr=stderr, encoding="utf-8", timeout=HANG,
        env=buffered(AUDIT_LOG_SIGNING_KEY_FILE="audit.key", AUDIT_LOG_DIR="log"),
    )  # fmt: skip
    return ran.returncode, ran.stderr


def _all(group: click.Group, name: str = "") -> Iterator[tuple[str, click.Command]]:
    for each, member in group.commands.items():
        if isinstance(member, click.Group):
            yield from _all(member, f"{name}{each} ")
        yield f"{name}{each}", member


def test_every_command_stands_in_the_table_and_ends_like_the_others() -> None:
    """A new one is put there."""
    names = dict(_all(cli))

    for name, member in names.items():
        assert isinstance(member, Command), name
        assert isinstance(member, Commands) or any(
            line.startswith(f"{name} ") or line == name for line, _ in CASES
        ), name
    assert isinstance(cli, Commands)


@pytest.mark.parametrize(("line", "_"), CASES)
def test_nobody_reads_what_it_prints(home: Path, line: str, _: int) -> None:
    """As `| head` does, once it has enough; a shell gives the status of SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        assert ended(home, line, pipe) == (141, "")


@full
@pytest.mark.parametrize(("line", "status"), CASES)
def test_what_it_prints_finds_no_room(home: Path, line: str, status: int) -> None:
    """A report that was cut is not taken for a whole one."""
    with open("/dev/full", "wb") as device:
        assert ended(home, line, device) == (status, UNTOLD.format("No space left on device"))


@full
@pytest.mark.parametrize(("line", "status"), [("doctor", 1), ("search log", 2), ("verify log", 3),
                                              ("verify nowhere", 3), ("verify", 3)])  # fmt: skip
def test_not_even_the_error_finds_room(home: Path, line: str, status: int) -> None:
    """The status still tells of it."""
    with open("/dev/full", "wb") as device:
        assert ended(home, line, device, device)[0] == status


@pytest.mark.parametrize(
    ("line", "status"),
    [("search log", 2), ("search log --json", 2), ("report log", 2), ("doctor", 1),
     ("verify log", 3), ("hold list log --key key.pub", 1)],
)  # fmt: skip
@pytest.mark.parametrize("closed", [">&-", "<&- >&-"])
def test_a_stdout_that_is_closed_takes_nothing(
    home: Path, line: str, status: int, closed: str
) -> None:
    """Which is an error like others."""
    ran = subprocess.run(
        ["bash", "-c", f'"$@" {closed}', "bash", *command(*line.split())], cwd=home, timeout=HANG,
        env=buffered(AUDIT_LOG_DIR="log"), stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (status, UNTOLD.format("Bad file descriptor"))


@pytest.mark.parametrize(("line", "status"), [("search log", 0), ("verify log", 0),
                                              ("search nowhere", 2), ("verify", 3)])  # fmt: skip
def test_a_stderr_that_is_closed_changes_no_status(home: Path, line: str, status: int) -> None:
    """It is only told less."""
    ran = subprocess.run(["bash", "-c", '"$@" 2>&-', "bash", *command(*line.split())], cwd=home,
                         env=buffered(), stdout=subprocess.PIPE, timeout=HANG)  # fmt: skip
    assert ran.returncode == status


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("doctor --nothing", 1), ("demo a b", 1), ("bench --to", 1), ("forward --nothing", 1),
        ("prove nowhere log", 1), ("keygen", 1), ("retain log", 1), ("compress --nothing", 1),
        ("export log", 1), ("hold add log", 1), ("hold list nowhere", 1), ("search", 2),
        ("tail log -n x", 2), ("show x", 2), ("report log --format x", 2), ("verify", 3),
        ("verify log --key nowhere", 3), ("verify-proof proof.json", 3),
        ("verify-export x --key no", 3), ("nothing", 2), ("hold nothing", 2), ("--nothing", 2),
    ],
)  # fmt: skip
def test_wrong_use_has_the_status_of_its_kind(home: Path, line: str, status: int) -> None:
    """Whether the arguments are wrong, or what they name."""
    ran = run(*line.split(), cwd=home)

    assert (ran.returncode, ran.stdout) == (status, "")
    assert "rror: " in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(("name", "status"), [("doctor", 1), ("search", 2), ("verify", 3)])
def test_a_mistake_of_ours_is_an_error_like_others(name: str, status: int) -> None:
    """Its place is told, and not its text, which may have something of an entry in it."""
    script = f"""
        import sys
        from structlog_audit import cli

        def callback(**given):
            raise ValueError("hunter2")

        cli.cli.commands[{name!r}].callback = callback
        sys.argv[1:] = [{name!r}, *sys.argv[1:]]
        cli.run()
    """
    ran = run_python(script, *([] if name == "doctor" else ["x"]))

    assert ran.returncode == status
    assert ran.stderr == "error: ValueError in this command, at line 6 of <string>\n"


READERS = ["verify -", "verify - --json", "search -", "search - --json", "show x -",
           "report -", "report - --format json", "prove - log",
           "verify-proof - --key key.pub"]  # fmt: skip


@contextlib.contextmanager
def start(
    home: Path, line: str, stdout: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command that Ctrl-C ends: a shell may have us ignore it."""
    script = """
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from structlog_audit.__main__ import main
        main()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *line.split()],
        cwd=home, env=buffered(), stdin=subprocess.PIPE, stdout=stdout,
        stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def interrupted(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    """Press Ctrl-C: a terminal sends it to all processes of the command."""
    os.killpg(process.pid, signal.SIGINT)
    status = process.wait(HANG)
    assert process.stderr is not None
    return status, process.stderr.read()


@linux
@pytest.mark.parametrize("line", READERS)
def test_ctrl_c_ends_a_reader_without_a_word(home: Path, line: str) -> None:
    """With the status that a shell gives it."""
    entry = session_files(home / "log")[0].read_bytes().splitlines(keepends=True)[1]
    with start(home, line, subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write(entry * 2000)
        process.stdin.flush()
        eventually(lambda: waits(process))

        assert interrupted(process) == (130, b"")


def waits(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether a process has read all that there is, and sleeps until there is more."""
    assert process.stdin is not None
    return not unread(process.stdin) and sleeps(process)


def unread(pipe: IO[bytes]) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def sleeps(process: subprocess.Popen[bytes]) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] == "S"


def test_ctrl_c_ends_a_tail_that_follows_without_a_word(home: Path) -> None:
    """That is how it is meant to end."""
    with start(home, "tail -f log") as process:
        assert process.stdout is not None
        assert process.stdout.readline()

        assert interrupted(process) == (130, b"")


@linux
@pytest.mark.parametrize("line", ["verify big", "verify big --json", "search big --text nowhere"])
def test_ctrl_c_ends_work_on_a_big_log_without_a_word(
    home: Path, tmp_path: Path, line: str
) -> None:
    """Also that of several processes."""
    path = session_files(home / "log")[0]
    (tmp_path / "big").mkdir(0o700)
    for number in (1, 2):
        made = big(tmp_path / "big", path, 60_000_000)
        made.rename(made.with_name(f"audit-2026010{number}-{'a' * 19}{'bc'[number - 1]}.ndjson"))
    with start(tmp_path, line) as process:
        eventually(lambda: reads(process.pid, tmp_path / "big"))

        assert interrupted(process) == (130, b"")


def reads(group: int, directory: Path) -> bool:
    """Tell whether a process of a group has a session file of a directory open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            path = os.readlink(descriptor)
            if path.startswith(f"{directory}/audit-") and os.getpgid(
                int(descriptor.parts[2])
            ) == group:  # fmt: skip
                return True
        except OSError:  # it has ended, or belongs to somebody else
            continue
    return False


def test_ctrl_c_ends_a_measurement_without_a_word_or_trace(tmp_path: Path) -> None:
    """Its directory goes as always."""
    with start(tmp_path, "bench .") as process:
        eventually(lambda: any(tmp_path.iterdir()))

        assert interrupted(process) == (130, b"")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_how_a_forwarder_that_follows_ends(home: Path, tmp_path: Path) -> None:
    """In order, as at SIGTERM."""
    handler = AuditHandler(FileSink(tmp_path / "audit"))
    handler.record({"action": "A"})
    handler.close()
    with (
        SeqServer(tmp_path) as seq,
        start(tmp_path, f"forward audit --follow --to {seq.url}") as process,
    ):
        eventually(lambda: seq.store.exists() and len(seq.stored()) == 3)

        assert interrupted(process) == (0, b"")


def test_ctrl_c_ends_a_command_whose_reader_has_stopped() -> None:
    """As a pager does, while nobody turns the page: what it has not taken is not waited for."""
    script = """
        import os, sys
        from structlog_audit import cli

        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        try:
            while True:
                os.write(writing, b"x")
        except BlockingIOError:
            os.set_blocking(writing, True)
        os.dup2(writing, 1)

        def callback(**given):
            sys.stdout.write("more")
            raise KeyboardInterrupt

        cli.cli.commands["doctor"].callback = callback
        sys.argv[1:] = ["doctor"]
        cli.run()
    """
    ran = run_python(script, PYTHONUNBUFFERED="")

    assert (ran.returncode, ran.stderr) == (130, "")


@pytest.mark.parametrize(
    ("name", "status"),
    [("verify", 3), ("verify-proof", 3), ("verify-export", 3), ("search", 2), ("doctor", 2)],
)
@pytest.mark.parametrize("package", ["click", "rich"])
def test_without_its_extra_no_status_tells_of_a_log(
    tmp_path: Path, name: str, status: int, package: str
) -> None:
    """Where 2 is a verdict, it is another one."""
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('no', name={package!r})")
    paths = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])
    ran = subprocess.run(command(name, "x"), env=buffered(PYTHONPATH=paths),
                         capture_output=True, encoding="utf-8", timeout=HANG)  # fmt: skip

    assert ran.returncode == status
    assert f"the command needs the package {package}" in ran.stderr
