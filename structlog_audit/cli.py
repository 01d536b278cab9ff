"""The command line."""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import replace
from typing import Any

import click
import orjson
from rich.console import Console

from structlog_audit._version import __version__
from structlog_audit.bench import Bench, run_bench, run_server_bench
from structlog_audit.cli_export import export_days, verify_received
from structlog_audit.cli_keeping import compress, hold, retain
from structlog_audit.cli_reading import READING
from structlog_audit.cli_report import report as report_command
from structlog_audit.demo import run_demo
from structlog_audit.doctor import Report, diagnose
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.forward import Forwarder
from structlog_audit.keys import generate_key_files
from structlog_audit.proof import prove, read_proof, read_receipt, verify_proof
from structlog_audit.settings import Settings
from structlog_audit.sinks.http import HttpSink
from structlog_audit.terminal import (
    LABEL,
    Commands,
    Judgement,
    mend_stdout,
    plain_console,
    public_keys,
    safe,
    with_progress,
)
from structlog_audit.verify_command import verify_command
from structlog_audit.visible import visible

MANY_DAYS = 3_650
"""Above this, the exact number says nothing."""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="structlog-audit")
def cli() -> None:
    """Audit entries that are durable when the call returns."""


@cli.command()
@click.argument("directory", required=False, type=click.Path(file_okay=False))
def demo(directory: str | None) -> None:
    """Record real entries, fill the disk, and show what a caller sees.

    Without DIRECTORY, a temporary one is used and removed.

    Example: structlog-audit demo ./audit
    """
    run_demo(plain_console(), directory)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--app", metavar="MODULE:CALLABLE", help="Call this first; it configures structlog.")
def doctor(as_json: bool, app: str | None) -> None:
    """Tell whether an entry can be recorded here, and what should be mended.

    The target is what the environment names (AUDIT_LOG_DIR, AUDIT_SERVER_URL, AUDIT_LOG_POLICY), or
    the application's. Also: how far behind a forwarder is. Exit status 0: an entry can be recorded.
    1: it cannot.

    Example: AUDIT_LOG_DIR=./audit structlog-audit doctor --app myapp.logs:configure
    """
    report = diagnose(app)
    if as_json:
        click.echo(orjson.dumps(report.as_dict(), option=orjson.OPT_INDENT_2))
    else:
        _print_report(plain_console(), report)
    sys.exit(0 if report.enabled else 1)


@cli.command()
@click.argument("directory", required=False, type=click.Path())
@click.option("--to", metavar="URL", help="Measure a server instead; it keeps the entries.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench(directory: str | None, to: str | None, as_json: bool) -> None:
    """Measure what an audit call costs on a disk or at a server, beside the bare one.

    It takes less than a minute. On a disk it works in a directory of its own below DIRECTORY (or
    AUDIT_LOG_DIR), which it removes. A server's key, format and the rest come from the
    AUDIT_SERVER_ variables.

    Example: structlog-audit bench /var/log
    """
    if to is not None and directory is not None:
        raise AuditConfigurationError("either a directory or a server is measured, not both")
    result = with_progress(
        "measuring",
        lambda show: (
            run_bench(directory, show) if to is None else run_server_bench(_server(to), show)
        ),
    )
    if as_json:
        click.echo(orjson.dumps(result.as_dict(), option=orjson.OPT_INDENT_2))
    else:
        _print_bench(plain_console(), result)


@cli.command()
@click.argument("directory", required=False, type=click.Path())
@click.option("--to", metavar="URL", help="The server; AUDIT_SERVER_URL without it.")
@click.option("--follow", is_flag=True, help="Go on with what comes, until SIGTERM or Ctrl-C.")
@click.option("--skip", nargs=2, metavar="FILE LINE", help="Leave out a line that was refused.")
def forward(
    directory: str | None, to: str | None, follow: bool, skip: tuple[str, str] | None
) -> None:
    """Ship session files that were written while a server was away.

    The key, the format and the rest come from the AUDIT_SERVER_ variables, for --to as well. Files
    stay where they are. What was shipped to one URL is shipped again, whole, to another one. Exit
    status 0: all is shipped. 1: something is not.

    Example: structlog-audit forward /var/log/audit --to https://logs.example.com --follow
    """
    forwarder = _forwarder(directory, to)
    if skip is not None:
        forwarder.skip(skip[0], _line_number(skip[1]))
    if follow:
        _follow(forwarder)
        return
    progress = with_progress(
        "shipping", lambda show: forwarder.run_once(lambda done, total: show(done / max(total, 1)))
    )
    click.echo(f"{progress.entries:,} entries of {progress.files:,} files shipped")
    for problem in progress.problems:
        _echo_problem(problem)
    sys.exit(1 if any(problem.holds for problem in progress.problems) else 0)


@cli.command("prove")
@click.argument("receipt", type=click.File("rb"))
@click.argument("directory", type=click.Path())
def prove_entry(receipt: Any, directory: str) -> None:
    """Prove that the entry of RECEIPT is in the log of DIRECTORY.

    RECEIPT is a JSON file with what the audit call returned, or - for stdin. The proof goes to
    stdout; whoever has the public key checks it with verify-proof, and sees no other entry.

    Example: structlog-audit prove receipt.json /var/log/audit > proof.json
    """
    proof = prove(read_receipt(receipt.read()), directory)
    click.echo(orjson.dumps(proof, option=orjson.OPT_INDENT_2))


@cli.command("verify-proof", cls=Judgement)
@click.argument("proof", type=click.File("rb"))
@click.option("--key", "keys", required=True, multiple=True, metavar="FILE",
              help="File with public keys; may be repeated.")  # fmt: skip
def verify_one_proof(proof: Any, keys: tuple[str, ...]) -> None:
    """Check a PROOF with the public key alone, and show its entry.

    Exit status 0: it holds. 1: it does not. 3: it cannot be read, or the command was used wrongly.

    Example: structlog-audit verify-proof proof.json --key billing.key.pub
    """
    proven = verify_proof(read_proof(proof.read()), public_keys(keys))
    console = plain_console()
    console.print(f"[bold green]The proof holds[/]: entry {proven.sequence} of the session "
                  f"{proven.session} is in the log {safe(proven.origin)}.")  # fmt: skip
    console.print(f"Signed by {safe(', '.join(proven.keys))}, at {safe(proven.time)} or later.",
                  soft_wrap=True)  # fmt: skip
    console.print(safe(proven.line.decode()), soft_wrap=True)


@cli.command()
@click.argument("name")
@click.option("--output", metavar="FILE", required=True, help="The private key's file, a new one.")
def keygen(name: str, output: str) -> None:
    """Make a pair of keys: one to sign with, one to verify with.

    The private key goes into FILE, readable for its owner alone; the public one into FILE.pub, and
    is printed. Keep a copy of the public key where nobody can change it who may change the log.

    Example: structlog-audit keygen example.com/billing/audit --output /etc/billing/audit.key
    """
    click.echo(str(generate_key_files(name, output)))


for another in (*READING, report_command, verify_command, export_days, verify_received,
                retain, hold, compress):  # fmt: skip
    cli.add_command(another)


def _forwarder(directory: str | None, to: str | None) -> Forwarder:
    settings = Settings.from_environ()
    where = settings.directory if directory is None else directory
    if where is None:
        raise AuditConfigurationError(
            "no directory to forward", hint="name it, or set AUDIT_LOG_DIR"
        )
    if to is None and settings.server_url and settings.directory and settings.policy != "first":
        raise AuditConfigurationError(
            "under the policy all, the server has every entry of the directory already",
            hint="AUDIT_LOG_POLICY=first leaves entries to forward; to ship them all the same, "
            "give --to URL",
        )
    return Forwarder(where, _server(to), prefix=settings.prefix, on_problem=_echo_problem)


def _server(url: str | None) -> HttpSink:
    """Return the server that the command or the environment names."""
    settings = Settings.from_environ()
    if url is not None:
        settings = replace(settings, server_url=url)
    if settings.server_url is None:
        raise AuditConfigurationError(
            "no server to forward to", hint="give --to URL, or set AUDIT_SERVER_URL"
        )
    return settings.server_sink()


def _line_number(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise AuditConfigurationError(f"{text!r} is no number of a line")
    return int(text)


def _follow(forwarder: Forwarder) -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    forwarder.follow(stop)


def _echo_problem(problem: object) -> None:
    click.echo(visible(str(problem)), err=True)


def _print_bench(console: Console, result: Bench) -> None:
    floor = f"the bare {'disk' if result.file_system else 'server'}"
    what = "write + sync" if result.file_system else "POST"
    rows = [("target", result.target)]
    if result.file_system:
        rows.append(("file system", _file_system_text(result.file_system)))
    rows += [
        ("", f"{'p50':>12}{'p99':>12}{'most':>12}"),
        (floor[4:], _times_text(result.floor) + f"   {what} of {result.bytes} bytes"),
        ("audit call", _times_text(result.call) + f"   {result.ratio:.2f} times {floor}"),
    ]
    rows += [
        (_count(threads), f"{rate:>10,.0f}/s   {rate / result.serial:.2f} times {floor}'s "
                          f"{result.serial:,.0f}/s, one by one")
        for threads, rate in result.rates.items()
    ]  # fmt: skip
    for label, value in rows:
        console.print(f"[bold]{label:<{LABEL}}[/]{safe(value)}", soft_wrap=True)
    for sentence in result.verdict:
        console.print(safe(sentence))


def _count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _times_text(times: dict[str, float]) -> str:
    return "".join(f"{times[name]:>9,.0f} µs" for name in ("p50_us", "p99_us", "max_us"))


def _print_report(console: Console, report: Report) -> None:
    if report.enabled:
        console.print("[bold green]Auditing is enabled[/]")
    else:
        console.print(f"[bold red]Auditing is not enabled[/]: {safe(report.reason)}")
    for label, value in _rows(report):  # in one piece each: paths are there to be copied
        console.print(f"[bold]{label:<{LABEL}}[/]{safe(value)}", soft_wrap=True)
    if report.problems:
        console.print("[bold]Open problems[/]:")
    elif report.enabled:
        console.print("No open problems.")
    for problem in report.problems:
        console.print(f"  - {safe(problem)}")


def _rows(report: Report) -> list[tuple[str, str]]:
    rows = [] if report.target is None else [
        ("target", report.target),
        *([("policy", report.policy)] if report.policy else []),
        ("mode", report.mode),
        ("app", report.app or "not named (AUDIT_LOG_APP)"),
    ]  # fmt: skip
    for label, part, text in (
        ("sessions", report.session, _sessions_text),
        ("file system", report.file_system, _file_system_text),
        ("space", report.space, _space_text),
        ("directory", report.permissions, _permissions_text),
        ("write + sync", report.latency, _latency_text),
        ("not forwarded", report.lag, _lag_text),
        ("signed", report.signing, _signing_text),
    ):
        if part:
            rows.append((label, text(part)))
    rows += [("left out", f"{place}: {what}") for place, what in report.exclusions or ()]
    if report.processors is not None:
        rows.append(("processors", " → ".join(report.processors)))
    return rows


def _sessions_text(session: dict[str, Any]) -> str:
    files = "1 file" if session["files"] == 1 else f"{session['files']:,} files"
    text = f"{files}, {session['bytes']:,} bytes"
    return (
        f"{text}; newest: {session['newest']} ({session['state']})" if session["newest"] else text
    )


def _file_system_text(system: dict[str, Any]) -> str:
    return f"{system['meaning']} (mounted at {system['mount']})"


def _space_text(space: dict[str, Any]) -> str:
    text = f"{space['free']:,} of {space['total']:,} bytes free"
    if space["days_left"] is None:
        return text
    days = "years" if space["days_left"] > MANY_DAYS else f"{space['days_left']:,} days"
    return f"{text}; {days} left at {space['bytes_per_day']:,} bytes a day"


def _permissions_text(access: dict[str, Any]) -> str:
    return f"owner {access['owner']}, mode {access['mode']}; we are {access['user']}"


def _signing_text(signing: dict[str, Any]) -> str:
    if not signing["keys"]:
        return (
            "not signed (AUDIT_LOG_SIGNING_KEY_FILE): whoever may write there can compute it anew"
        )
    anchor = f"anchored at {signing['anchor']}" if signing["anchor"] else "not anchored elsewhere"
    return (
        f"by {', '.join(signing['keys'])} every {signing['entries']:,} entries or "
        f"{signing['interval']:,.0f} s; {anchor}"
    )


def _lag_text(lag: dict[str, Any]) -> str:
    text = f"{lag['entries']:,} entries, {lag['bytes']:,} bytes"
    return text if lag["seconds"] is None else f"{text}, the oldest {lag['seconds']:,.0f} s old"


def _latency_text(latency: dict[str, Any]) -> str:
    return (
        f"p50 {latency['p50_us']:,} µs, p99 {latency['p99_us']:,} µs "
        f"({latency['samples']} times {latency['bytes']} bytes)"
    )


def run() -> None:
    """Run the command."""
    mend_stdout()
    cli(prog_name="structlog-audit")
