"""The host decides, by its environment, once; what it says wrongly it is told at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from reading import recorded, session_files
from running import in_threads
from servers.certificates import make_certificates

from structlog_audit import (
    AuditConfigurationError,
    AuditHandler,
    FileSink,
    Settings,
    audit_handler,
    audit_log,
    audit_processors,
)
from structlog_audit.settings import _Host
from structlog_audit.testing import MemorySink

MakeHandler = Callable[..., AuditHandler]


@pytest.mark.parametrize(
    ("variable", "text", "attribute", "value"),
    [
        ("DIR", "/var/log/audit", "directory", "/var/log/audit"),
        ("DIR", " /var/log/audit\n", "directory", "/var/log/audit"),
        ("MODE", "basic", "mode", "basic"),
        ("MODE", "verbose_including_cid", "mode", "verbose_including_cid"),
        ("APP", "shop", "app", "shop"),
        ("PREFIX", "shop", "prefix", "shop"),
        ("MAX_BYTES", "1000000", "max_bytes", 1_000_000),
        ("MAX_BYTES", "1.5k", "max_bytes", 1_536),
        ("MAX_BYTES", "100M", "max_bytes", 100 * 2**20),
        ("MAX_BYTES", "2 G", "max_bytes", 2 * 2**30),
        ("MAX_BYTES", "none", "max_bytes", None),
        ("MAX_AGE", "30", "max_age", 30.0),
        ("MAX_AGE", "90s", "max_age", 90.0),
        ("MAX_AGE", "5m", "max_age", 300.0),
        ("MAX_AGE", "12h", "max_age", 43_200.0),
        ("MAX_AGE", "1d", "max_age", 86_400.0),
        ("MAX_AGE", "none", "max_age", None),
        ("TIMEOUT", "0.5", "timeout", 0.5),
        ("LOW_SPACE", "5%", "low_space", 0.05),
        ("LOW_SPACE", "10G", "low_space", 10 * 2**30),
        ("ALLOW_UNSAFE_DIR", "1", "allow_unsafe_dir", True),
        ("ALLOW_UNSAFE_DIR", "0", "allow_unsafe_dir", False),
    ],
)
def test_each_variable_is_read(variable: str, text: str, attribute: str, value: Any) -> None:
    """With its units."""
    assert getattr(Settings.from_environ({f"AUDIT_LOG_{variable}": text}), attribute) == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("DIR", ""),
        ("DIR", "  "),
        ("MODE", "verbose"),
        ("MODE", ""),
        ("APP", ""),
        ("MAX_BYTES", "0"),
        ("MAX_BYTES", "-1"),
        ("MAX_BYTES", "1T"),
        ("MAX_BYTES", "many"),
        ("MAX_BYTES", "9" * 400),
        ("MAX_AGE", "9" * 400),
        ("LOW_SPACE", "9" * 400),
        ("LOW_SPACE", "9" * 400 + "%"),
        ("MAX_AGE", "1w"),
        ("MAX_AGE", "1e3"),
        ("TIMEOUT", "none"),
        ("TIMEOUT", "nan"),
        ("TIMEOUT", "0"),
        ("TIMEOUT", "inf"),
        ("LOW_SPACE", "100%"),
        ("LOW_SPACE", "-5%"),
        ("LOW_SPACE", "0.05"),
        ("LOW_SPACE", "5"),
        ("MAX_BYTES", "0.5"),
        ("DIR", "$HOME/audit"),
        ("DIR", "file:///var/log/audit"),
        ("DIR", "-"),
        ("DIR", "stdout"),
        ("ALLOW_UNSAFE_DIR", "yes"),
    ],
)
def test_a_value_that_means_nothing_is_refused(variable: str, text: str) -> None:
    """The message names variable and value."""
    with pytest.raises(AuditConfigurationError) as caught:
        Settings.from_environ({f"AUDIT_LOG_{variable}": text})

    assert str(caught.value).startswith(f"AUDIT_LOG_{variable}={text!r}: ")


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("AUDIT_LOG_DIRECTORY", "AUDIT_LOG_DIR"),
        ("AUDIT_LOG_MAXBYTES", "AUDIT_LOG_MAX_BYTES"),
        ("AUDIT_LOG_TIMEOUTS", "AUDIT_LOG_TIMEOUT"),
    ],
)
def test_a_misspelled_variable_is_refused_with_a_guess(variable: str, meant: str) -> None:
    """Otherwise a typo would mean no audit log."""
    with pytest.raises(AuditConfigurationError, match=f"did you mean {meant}"):
        Settings.from_environ({variable: "x"})


def test_an_unknown_variable_is_refused_with_a_list() -> None:
    """Even when it resembles nothing."""
    with pytest.raises(AuditConfigurationError, match="known: AUDIT_LOG_DIR"):
        Settings.from_environ({"AUDIT_LOG_ZZZZZZZZZZZZZZ": "x"})


def test_variables_of_others_are_left_alone() -> None:
    """`AUDIT_` alone is not ours."""
    assert Settings.from_environ({"AUDIT_TRAIL": "x", "PATH": "y"}) == Settings()


SERVER = {"AUDIT_SERVER_URL": "https://logs.example.com/seq"}
DIRECTORY = {"AUDIT_LOG_DIR": "/var/log/audit"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (SERVER, "SeqSink('https://logs.example.com/seq')"),
        ({**SERVER, "AUDIT_SERVER_FORMAT": "clef"}, "SeqSink('https://logs.example.com/seq')"),
        ({**SERVER, "AUDIT_SERVER_FORMAT": "ndjson"}, "HttpSink('https://logs.example.com/seq')"),
        ({**SERVER, "AUDIT_SERVER_FORMAT": "otlp"}, "HttpSink('https://logs.example.com/seq')"),
        (
            {**SERVER, **DIRECTORY},
            "AllOf(SeqSink('https://logs.example.com/seq'), FileSink('/var/log/audit'))",
        ),
        (
            {**SERVER, **DIRECTORY, "AUDIT_LOG_POLICY": "first"},
            "FirstOf(SeqSink('https://logs.example.com/seq'), FileSink('/var/log/audit'))",
        ),
        (
            {**SERVER, "AUDIT_LOG_DIR": "/dev/stdout"},
            "AllOf(SeqSink('https://logs.example.com/seq'), ConsoleSink('stdout'))",
        ),
    ],
)
def test_variables_make_sinks(variables: dict[str, str], expected: str) -> None:
    """The server stands first: while it is away, no file fills with aborted entries."""
    assert repr(Settings.from_environ(variables).sink()) == expected


def test_each_variable_of_the_server_reaches_its_sink(tmp_path: Path) -> None:
    """Key, authority, certificate, time-out."""
    certificates = make_certificates(tmp_path)
    files = {
        "ca": str(certificates.ca),
        "client_cert": str(certificates.client.cert),
        "client_key": str(certificates.client.private),
    }
    variables = {
        **SERVER,
        "AUDIT_SERVER_URL": "http://logs.example.com",
        "AUDIT_SERVER_API_KEY": "hunter2",
        "AUDIT_SERVER_CA": files["ca"],
        "AUDIT_SERVER_CLIENT_CERT": files["client_cert"],
        "AUDIT_SERVER_CLIENT_KEY": files["client_key"],
        "AUDIT_SERVER_TIMEOUT": "3s",
        "AUDIT_SERVER_ALLOW_INSECURE": "1",
    }

    settings = Settings.from_environ(variables)
    sink: Any = settings.sink()

    assert sink._key.text() == "hunter2"
    assert sink.timeout == 3
    assert sink.allow_insecure
    assert sink.files == files
    assert "hunter2" not in repr(settings)


def test_a_key_in_a_file_of_the_host(tmp_path: Path) -> None:
    """As secret stores mount it."""
    (tmp_path / "key").write_text("hunter2\n")

    sink: Any = Settings.from_environ(
        {**SERVER, "AUDIT_SERVER_API_KEY_FILE": str(tmp_path / "key")}
    ).sink()

    assert sink._key.text() == "hunter2"


def test_a_server_has_half_of_the_time() -> None:
    """So that a second target has its share."""
    sink: Any = Settings.from_environ({**SERVER, "AUDIT_LOG_TIMEOUT": "4s"}).sink()

    assert sink.timeout == 2


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"AUDIT_SERVER_API_KEY": "hunter2"}, "AUDIT_SERVER_API_KEY is set, and AUDIT_SERVER_URL"),
        ({"AUDIT_SERVER_TIMEOUT": "1s", **DIRECTORY}, "AUDIT_SERVER_TIMEOUT is set, and"),
        ({**SERVER, "AUDIT_LOG_POLICY": "all"}, "there is one at most"),
        ({**DIRECTORY, "AUDIT_LOG_POLICY": "first"}, "there is one at most"),
        ({**SERVER, "AUDIT_SERVER_TIMEOUT": "10s"}, "is not shorter than that of a call"),
        ({**SERVER, "AUDIT_SERVER_FORMAT": "xml"}, "must be one of clef, ndjson, otlp"),
        ({**SERVER, "AUDIT_LOG_POLICY": "any"}, "must be one of all, first"),
        ({**SERVER, "AUDIT_LOG_STARTUP": "never"}, "must be one of strict, lazy"),
        ({"AUDIT_SERVER_URL": "http://logs.example.com"}, "AUDIT_SERVER_ALLOW_INSECURE"),
        ({"AUDIT_SERVER_URL": "https://a:hunter2@logs.example.com"}, "carries a key or a password"),
        ({**SERVER, "AUDIT_SERVER_API_KEY": ""}, "AUDIT_SERVER_API_KEY=…: it is empty"),
        ({**SERVER, "AUDIT_SERVER_API_KEY": "hunter2 x"}, "characters that no key has"),
        ({**SERVER, "AUDIT_SERVER_CA": "/nowhere"}, "ca: /nowhere is no file"),
        ({"AUDIT_SERVER_API": "x"}, "did you mean AUDIT_SERVER_(API_KEY|CA|URL)"),
    ],
)
def test_server_variables_that_contradict_are_refused(
    variables: dict[str, str], words: str
) -> None:
    """Without repeating what is secret."""
    with pytest.raises(AuditConfigurationError, match=words) as caught:
        Settings.from_environ(variables).sink()

    assert "hunter2" not in str(caught.value)


def test_a_server_that_is_away_fails_the_start_or_is_warned_of(
    audit_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the host decides; a directory that cannot be used fails it in any case."""
    monkeypatch.setenv("AUDIT_SERVER_URL", "http://127.0.0.1:1")
    with pytest.raises(AuditConfigurationError, match="cannot be reached"):
        audit_processors()

    monkeypatch.setenv("AUDIT_LOG_STARTUP", "lazy")
    monkeypatch.setattr("structlog_audit.settings._host", _Host())
    audit_processors()
    assert "starting all the same, as AUDIT_LOG_STARTUP=lazy asks" in caplog.text

    audit_dir.write_text("a file")
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))
    monkeypatch.setattr("structlog_audit.settings._host", _Host())
    with pytest.raises(AuditConfigurationError, match="ENOTDIR"):
        audit_processors()


def test_the_first_policy_starts_with_the_directory_alone(
    audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the server is away, entries go to the directory."""
    monkeypatch.setenv("AUDIT_SERVER_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AUDIT_SERVER_TIMEOUT", "0.2s")
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))
    monkeypatch.setenv("AUDIT_LOG_POLICY", "first")
    structlog.configure(processors=[*audit_processors()])

    audit_log.info(action="A")

    assert [entry["action"] for entry in recorded(audit_dir)] == ["A"]


def test_the_environment_alone_is_enough(audit_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directory, prefix and app come from it."""
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))
    monkeypatch.setenv("AUDIT_LOG_PREFIX", "shop")
    monkeypatch.setenv("AUDIT_LOG_APP", "from the host")
    structlog.configure(processors=[*audit_processors(app="from the code")])

    audit_log.info(action="A")

    (path,) = session_files(audit_dir)
    assert path.name.startswith("shop-")
    assert recorded(audit_dir)[0]["app"] == "from the host"


def test_every_setting_reaches_the_handler(
    audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from the environment, found in the handler."""
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))
    for name, text in {"MAX_BYTES": "1M", "MAX_AGE": "1h", "TIMEOUT": "7", "LOW_SPACE": "3%",
                       "APP": "shop", "ALLOW_UNSAFE_DIR": "1"}.items():  # fmt: skip
        monkeypatch.setenv(f"AUDIT_LOG_{name}", text)

    handler = audit_handler()

    assert handler._options == {
        "timeout": 7.0, "app": "shop", "max_entry_bytes": 256 * 1024, "max_bytes": 2**20,
        "max_age": 3600.0, "low_space": 0.03,
    }  # fmt: skip
    assert isinstance(handler.sink, FileSink)
    assert handler.sink.allow_unsafe_directory


@pytest.mark.parametrize("by", ["handler", "settings"])
def test_the_host_goes_before_the_code(
    by: str, audit_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    make_handler: MakeHandler,
) -> None:  # fmt: skip
    """A target in the code is refused where the host names one."""
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))
    other: Any = {
        "handler": make_handler(FileSink(tmp_path / "other")),
        "settings": Settings(directory=str(tmp_path / "other")),
    }

    with pytest.raises(AuditConfigurationError, match=r"environment names a target[\s\S]*capture_"):
        audit_processors(**{by: other[by]})

    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("by", ["handler", "settings"])
def test_the_code_decides_where_the_host_says_nothing(
    by: str, audit_dir: Path, make_handler: MakeHandler
) -> None:
    """Either way of naming a target."""
    given: Any = {"handler": make_handler(), "settings": Settings(directory=str(audit_dir))}
    structlog.configure(processors=[*audit_processors(app="shop", **{by: given[by]})])

    audit_log.info(action="A")

    assert recorded(audit_dir)[0]["app"] == "shop"
    structlog.get_config()["processors"][-1].handler.close()


def test_a_handler_and_settings_together_are_refused(
    make_handler: MakeHandler, audit_dir: Path
) -> None:
    """One of them would be ignored."""
    with pytest.raises(AuditConfigurationError, match="not both"):
        audit_processors(handler=make_handler(), settings=Settings(directory=str(audit_dir)))


def test_without_any_target_the_configuration_fails() -> None:
    """It says what to set."""
    with pytest.raises(AuditConfigurationError, match=r"no target[\s\S]*AUDIT_LOG_DIR"):
        audit_processors()


@pytest.mark.parametrize("how", ["file in the way", "prefix", "world-writable"])
def test_a_target_that_cannot_be_opened_fails_at_configuration_time(
    how: str, audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the first entry."""
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))
    if how == "prefix":
        monkeypatch.setenv("AUDIT_LOG_PREFIX", "a/b")
    elif how == "world-writable":
        audit_dir.mkdir()
        audit_dir.chmod(0o777)
    else:
        audit_dir.write_text("")

    with pytest.raises(AuditConfigurationError):
        audit_processors()


def test_the_environment_is_read_once(
    audit_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that changes its own environment changes nothing."""
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))
    first = audit_handler()
    monkeypatch.setenv("AUDIT_LOG_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("AUDIT_LOG_NONSENSE", "1")

    assert audit_handler() is first


def test_whoever_asks_gets_the_same_handler(
    audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two handlers would be two sessions; also when threads ask at once."""
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))

    handlers = in_threads([audit_handler] * 8)

    assert len(set(map(id, handlers))) == 1
    assert isinstance(handlers[0], AuditHandler)


def test_a_wrong_environment_can_be_corrected(
    audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed attempt is not remembered as an answer."""
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))
    audit_dir.write_text("in the way")
    with pytest.raises(AuditConfigurationError):
        audit_handler()
    audit_dir.unlink()

    assert audit_handler().record({"action": "A"}).sequence == 2


def test_a_hook_given_with_the_processors_is_told(make_handler: MakeHandler) -> None:
    """Also with the host's handler."""
    told: list[Any] = []
    structlog.configure(
        processors=[*audit_processors(handler=make_handler(MemorySink()), on_failure=told.append)]
    )

    with pytest.raises(Exception, match="needs an action"):
        audit_log.info()

    assert len(told) == 1


def test_a_signal_that_audits_while_the_settings_are_read_does_not_hang(
    audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It interrupts the very thread that holds the lock."""
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))
    read = Settings.from_environ
    within: list[AuditHandler] = []

    def interrupted() -> Settings:
        if not within:
            within.append(None)  # type: ignore[arg-type]
            within[0] = audit_handler()
        return read()

    monkeypatch.setattr(Settings, "from_environ", interrupted)

    (outside,) = in_threads([audit_handler])

    assert within == [outside]
