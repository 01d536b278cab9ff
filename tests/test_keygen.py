"""`structlog-audit keygen`: files of keys, and what stands in the way of them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from faults.runner import needs, read_trace
from running import HANG, environment, run_python, run_well
from test_cli import run

from structlog_audit import AuditConfigurationError
from structlog_audit.keys import generate_key_files
from structlog_audit.note import load_signing_keys, open_note, read_keys, sign

pytest.importorskip("cryptography", reason="signatures are an extra")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes and limits")
NAME = "example.com/billing/audit"


def test_a_pair_of_keys_is_made_and_the_public_one_printed(tmp_path: Path) -> None:
    """What the one signs, the other one verifies; the private one is printed nowhere."""
    done = run("keygen", NAME, "--output", "audit.key", cwd=tmp_path)
    signing = load_signing_keys(tmp_path / "audit.key")
    text = (tmp_path / "audit.key.pub").read_text()
    keys = read_keys(text)

    assert (done.returncode, done.stdout, done.stderr) == (0, text, "")
    assert open_note(sign("a\n", signing), keys) == ("a\n", keys)
    assert signing[0].name == NAME
    assert sorted(os.listdir(tmp_path)) == ["audit.key", "audit.key.pub"]


def test_two_keys_are_never_the_same(tmp_path: Path) -> None:
    """Not even of one name."""
    assert generate_key_files(NAME, tmp_path / "a") != generate_key_files(NAME, tmp_path / "b")


@posix
@pytest.mark.parametrize("umask", [0o000, 0o277])
def test_the_private_key_is_for_its_owner_alone_whatever_the_umask(
    umask: int, tmp_path: Path
) -> None:
    """Mode 0600; the public one is for everybody."""
    before = os.umask(umask)
    try:
        generate_key_files(NAME, tmp_path / "k")
    finally:
        os.umask(before)

    for name, mode in (("k", 0o600), ("k.pub", 0o644)):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


@pytest.mark.parametrize("file", ["k", "k.pub"])
def test_no_file_is_overwritten_and_none_left_beside_it(file: str, tmp_path: Path) -> None:
    """Neither that of a private key nor that of a public one."""
    (tmp_path / file).write_text("precious")
    done = run("keygen", NAME, "--output", "k", cwd=tmp_path)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {tmp_path / file} exists already\nhint: ")
    assert os.listdir(tmp_path) == [file]
    assert (tmp_path / file).read_text() == "precious"


@posix
def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Somebody would have the key written to where he can read it."""
    (tmp_path / "k").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AuditConfigurationError, match="exists already"):
        generate_key_files(NAME, tmp_path / "k")

    assert os.listdir(tmp_path) == ["k"]


@pytest.mark.parametrize(
    ("name", "output", "words"),
    [
        (NAME, "missing/k", "missing cannot be opened: No such file"),
        ("two words", "k", "none of them a space or '+'"),
        ("a+b", "k", "none of them a space or '+'"),
        ("", "k", "none of them a space or '+'"),
        ("#a", "k", "begins with no '#'"),
        ("a\x1b[2J", "k", "can be printed"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(
    name: str, output: str, words: str, tmp_path: Path
) -> None:
    """And nothing is made."""
    done = run("keygen", name, "--output", output, cwd=tmp_path)

    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


@posix
@pytest.mark.parametrize("limit", [0, 10, 75])
def test_a_full_disk_leaves_no_half_of_a_pair(limit: int, tmp_path: Path) -> None:
    """The first bytes, a part of the public key, or the private one alone did not fit."""
    script = """
        import resource, sys
        from structlog_audit.keys import generate_key_files
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
        generate_key_files("example.com/audit", sys.argv[1])
    """
    done = run_python(script, tmp_path / "k", limit)

    assert done.returncode == 1
    assert f"a file of keys cannot be written in {tmp_path}: " in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == []


def test_without_the_package_for_signatures_it_is_named(tmp_path: Path) -> None:
    """And nothing is made."""
    script = """
        import sys
        sys.modules["cryptography"] = None
        sys.modules["cryptography.hazmat.primitives.asymmetric"] = None
        sys.argv = ["structlog-audit", "keygen", "a", "--output", sys.argv[1]]
        from structlog_audit.cli import run
        try:
            run()
        except SystemExit as end:
            print("status", end.code)
    """

    assert run_well(script, tmp_path / "k") == "status 1\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.fault
def test_both_files_are_synced_with_their_names_before_the_key_is_told(tmp_path: Path) -> None:
    """The public key first: after a power cut no signature is without it."""
    needs("strace")
    trace = tmp_path / "trace"
    directory = tmp_path / "keys"
    directory.mkdir()
    keygen = (sys.executable, "-m", "structlog_audit", "keygen", NAME, "--output", "k")
    subprocess.run(
        ("strace", "-f", "-y", "-o", str(trace), "-e", "trace=write,fsync", *keygen),
        cwd=directory, env=environment(), check=True, capture_output=True, timeout=HANG,
    )  # fmt: skip
    calls = [call for call in read_trace(trace)
             if call.path.startswith(str(directory)) or call.descriptor == "1"]  # fmt: skip

    assert [(call.name, call.path.removeprefix(str(directory))) for call in calls[:6]] == [
        ("write", "/k.pub"), ("fsync", "/k.pub"), ("fsync", ""),
        ("write", "/k"), ("fsync", "/k"), ("fsync", ""),
    ]  # fmt: skip
    assert {call.descriptor for call in calls[6:]} == {"1"}
