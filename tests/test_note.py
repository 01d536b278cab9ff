"""Signed notes and checkpoints: the rules of C2SP, others' vectors, other implementations."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import traceback
from base64 import b64encode
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from running import run_well

from structlog_audit import AuditConfigurationError, merkle
from structlog_audit.note import (
    LARGEST_KEY_FILE,
    Checkpoint,
    NoteError,
    SigningKey,
    UnknownKeys,
    VerifierKey,
    load_signing_keys,
    open_note,
    read_keys,
    read_signing_keys,
    sign,
)

pytest.importorskip("cryptography", reason="signatures are an extra")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes and links")

# golang/mod, sumdb/note/note_test.go (BSD-3-Clause)
PETER_PRIVATE = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
PETER = VerifierKey.parse("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
ENOCH = VerifierKey.parse("EnochRoot+af0cfe78+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop")
TEXT = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
)
PETERS = (
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZ"
    "b6KE6RyyBwJnAM=\n"
)
ENOCHS = (
    "— EnochRoot rwz+eBzmZa0SO3NbfRGzPCpDckykFXSdeX+MNtCOXm2/5n2tiOHp+vAF1aGrQ5ovTG01oOTGwnWLox33"
    "WWd1RvMc+QQ=\n"
)
NOTE = f"{TEXT}\n{PETERS}"
FORGED = PETERS.replace("RyyBw", "RyyBx")

# the example of C2SP/C2SP, signed-note.md (BSD-1-Clause)
C2SP_KEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
C2SP_NOTE = (
    "This is an example message.\n\n— example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONn"
    "cAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
)
# a checkpoint that Go's checksum database signed (transparency-dev/formats, log/note_test.go,
# Apache-2.0), and its key (golang/go, cmd/go/internal/modfetch/key.go, BSD-3-Clause)
SUMDB_KEY = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"
SUMDB_NOTE = (
    "go.sum database tree\n6476701\nmb8QLQIs0Z0yP5Cstq6guj87oXWeC9gEM8oVikmm9Wk=\n\n"
    "— sum.golang.org Az3grsLX85Gz+s1SiTbgkuqxgItqFq7gsMUEyVnrsa9LM7Us9S+1xbFIGu95949rj4nPRYfvimWE"
    "PWL+o3GeoWwOoAw=\n"
)


def key_of(name: str = "example.com/audit") -> SigningKey:
    return SigningKey.generate(name)


def test_a_note_is_signed_as_go_signs_it() -> None:
    """Byte for byte: Ed25519 leaves no choice."""
    assert sign(TEXT, read_signing_keys(PETER_PRIVATE)) == NOTE


@pytest.mark.parametrize(
    ("key", "note"), [(str(PETER), NOTE), (C2SP_KEY, C2SP_NOTE), (SUMDB_KEY, SUMDB_NOTE)]
)
def test_notes_of_others_are_verified(key: str, note: str) -> None:
    """Of Go's tests, of the specification, of a real log; and their keys are written back."""
    keys = read_keys(key)

    assert open_note(note, keys) == (note[: note.rindex("\n\n") + 1], keys)
    assert str(keys[0]) == key


def test_a_checkpoint_of_a_real_log_is_read() -> None:
    """Of Go's checksum database."""
    text, _ = open_note(SUMDB_NOTE, read_keys(SUMDB_KEY))
    checkpoint = Checkpoint.parse(text)

    assert (checkpoint.origin, checkpoint.size) == ("go.sum database tree", 6_476_701)
    assert checkpoint.text() == text


def test_signatures_by_unknown_keys_are_ignored() -> None:
    """Even if they are wrong, and even if they share name or number with a known key."""
    namesake = VerifierKey("PeterNeumann", ENOCH.public)
    renamed = FORGED.replace("PeterNeumann", "EnochRoot")

    assert open_note(NOTE + ENOCHS, [PETER]) == (TEXT, (PETER,))
    assert open_note(NOTE + renamed, [PETER, ENOCH]) == (TEXT, (PETER,))
    assert open_note(NOTE + ENOCHS, [namesake, ENOCH]) == (TEXT, (ENOCH,))
    for keys in ([], [ENOCH], [namesake]):
        with pytest.raises(UnknownKeys, match="'PeterNeumann' c74f20a3, and by none"):
            open_note(NOTE, keys)


@pytest.mark.parametrize(
    "signatures",
    [
        FORGED,
        ENOCHS + FORGED,
        FORGED + ENOCHS,
        PETERS + FORGED,
        ENOCHS + "— PeterNeumann x08goww=\n",
    ],
)
def test_a_wrong_signature_by_a_known_key_rejects_the_note(signatures: str) -> None:
    """Whatever else signed it, and wherever it stands."""
    with pytest.raises(NoteError, match="by the key 'PeterNeumann' c74f20a3 is wrong") as caught:
        open_note(f"{TEXT}\n{signatures}", [PETER, ENOCH])

    assert not isinstance(caught.value, UnknownKeys)


def test_another_text_is_not_signed() -> None:
    """A letter, an empty line, a line more."""
    for other in (TEXT.replace("If", "if"), TEXT + "\n", "\n" + TEXT, TEXT + "x\n"):
        with pytest.raises(NoteError, match="is wrong"):
            open_note(f"{other}\n{PETERS}", [PETER])


def test_a_key_that_signed_twice_is_named_once() -> None:
    """And one that is known twice is known."""
    assert open_note(f"{NOTE}{PETERS}{ENOCHS}", [PETER, ENOCH, PETER]) == (TEXT, (PETER, ENOCH))


def test_two_known_keys_of_one_name_and_number_are_refused() -> None:
    """Somebody searched for the second one."""
    limited = VerifierKey(PETER.name, PETER.public, until=datetime.now(timezone.utc))
    with pytest.raises(NoteError, match="two of the known keys"):
        open_note(NOTE, [PETER, limited])


@pytest.mark.parametrize(
    "note",
    [
        "",
        "\n\n",
        TEXT,
        TEXT + "\n",
        TEXT + PETERS,
        NOTE[:-1],
        NOTE + "\n",
        NOTE + "x\n",
        NOTE + PETERS[:-1],
        NOTE.replace("\n", "\r\n"),
        NOTE.replace("If", "\tIf"),
        "\x00" + NOTE,
        "\ud800" + NOTE,
        NOTE.replace("— ", "- "),
        NOTE.replace("— ", "—  "),
        NOTE.replace("— ", "—\u00a0"),
        NOTE.replace(" x08", "  x08"),
        NOTE.replace("Neumann", "+Neumann"),
        NOTE.replace("Neumann", "\u2003Neumann"),
        NOTE.replace("PeterNeumann ", " "),
        NOTE.replace("AM=\n", "AM\n"),
        NOTE.replace("AM=\n", "AM=A\n"),
        NOTE.replace("AM=\n", "AN=\n"),
        NOTE.replace("/", "_"),
        f"{TEXT}\n— PeterNeumann x08gow==\n",
        f"{TEXT}\n{PETERS * 101}",
    ],
)
def test_a_malformed_note_is_rejected(note: str) -> None:
    """Of which the signature may be right."""
    with pytest.raises(NoteError) as caught:
        open_note(note, [PETER])

    assert not isinstance(caught.value, UnknownKeys)
    assert "is wrong" not in str(caught.value)


def test_a_note_may_have_a_hundred_signatures() -> None:
    """C2SP demands sixteen."""
    assert open_note(f"{TEXT}\n{ENOCHS * 99}{PETERS}", [PETER]) == (TEXT, (PETER,))


def test_the_last_empty_line_separates() -> None:
    """The text may have others, and look like a note itself."""
    key = key_of()
    for text in (f"{NOTE}\n", "\n", "\n\n", "a\n\nb\n", f"ü — 𝄞 \x7f\x85\u2028\n{NOTE}"):
        assert open_note(sign(text, [key]), [key.verifier, PETER]) == (text, (key.verifier,))


@pytest.mark.parametrize("text", ["", "a", "a\r\n", "a\tb\n", "\x00\n", "\ud800\n"])
def test_a_text_that_no_note_can_have_is_not_signed(text: str) -> None:
    """Or nobody could verify it."""
    with pytest.raises(NoteError, match="text of a note"):
        sign(text, [key_of()])
    with pytest.raises(NoteError, match="no key"):
        sign("a\n", [])


def test_several_keys_sign_during_a_rotation() -> None:
    """Who knows one of them, old or new, can verify."""
    old, new = key_of(), key_of()
    note = sign(TEXT, read_signing_keys(f"# old\n{old.reveal()}\n\n{new.reveal()}\n"))

    assert open_note(note, [old.verifier]) == (TEXT, (old.verifier,))
    assert open_note(note, [new.verifier]) == (TEXT, (new.verifier,))
    assert open_note(note, [new.verifier, old.verifier])[1] == (old.verifier, new.verifier)


def test_a_checkpoint_is_what_it_was() -> None:
    """From the empty log to the largest."""
    for size in (0, 1, 10, 2**63 - 1):
        checkpoint = Checkpoint("example.com/audit", size, merkle.EMPTY_ROOT)

        assert Checkpoint.parse(checkpoint.text()) == checkpoint
        assert Checkpoint.parse(checkpoint.text() + "an extension\nanother\n") == checkpoint


def test_a_checkpoint_says_how_many_leaves_are_acts_of_its_signer() -> None:
    """In an extension line, among others; without acts there is none."""
    for acts in (1, 100, 2**63 - 1):
        checkpoint = Checkpoint("example.com/audit", 2**63 - 1, merkle.EMPTY_ROOT, acts)

        assert checkpoint.text().split("\n")[3:] == [f"acts {acts}", ""]
        assert Checkpoint.parse(checkpoint.text()) == checkpoint
        assert Checkpoint.parse(checkpoint.text() + "another\nactsof x\n") == checkpoint
    assert Checkpoint.parse(f"o\n1\n{ROOT}\n").acts == 0


ROOT = b64encode(merkle.EMPTY_ROOT).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"o\n1\n{ROOT}",
        "o\n1\n",
        f"\n1\n{ROOT}\n",
        f"o\n1\n{ROOT}\n\n",
        f"o\n1\n{ROOT}\n\nx\n",
        f"o\n1\n{ROOT}\nx",
        f"o\n01\n{ROOT}\n",
        f"o\n+1\n{ROOT}\n",
        f"o\n-1\n{ROOT}\n",
        f"o\n 1\n{ROOT}\n",
        f"o\n1_0\n{ROOT}\n",
        f"o\n١\n{ROOT}\n",
        f"o\n{2**63}\n{ROOT}\n",
        f"o\n{'9' * 5000}\n{ROOT}\n",
        f"o\n1\n{ROOT[:-1]}\n",
        f"o\n1\n{ROOT[:-5]}\n",
        f"o\n1\n{ROOT[:-2]}V=\n",
        f"o\n1\n {ROOT}\n",
        f"o\n1\n{b64encode(bytes(31)).decode()}\n",
        f"o\n1\n{b64encode(bytes(33)).decode()}\n",
        f"o\r\n1\n{ROOT}\n",
        f"o\n9\n{ROOT}\nacts\n",
        f"o\n9\n{ROOT}\nacts 0\n",
        f"o\n9\n{ROOT}\nacts 01\n",
        f"o\n9\n{ROOT}\nacts -1\n",
        f"o\n9\n{ROOT}\nacts ١\n",
        f"o\n9\n{ROOT}\nacts 10\n",
        f"o\n9\n{ROOT}\nacts 1 \n",
        f"o\n9\n{ROOT}\nacts 1\nacts 1\n",
        f"o\n9\n{ROOT}\nacts {'9' * 5000}\n",
    ],
)
def test_what_is_no_checkpoint_is_rejected(text: str) -> None:
    """However much it looks like one."""
    with pytest.raises(NoteError):
        Checkpoint.parse(text)


@pytest.mark.parametrize(
    "parts",
    [
        ("", 1, bytes(32)),
        ("a\nb", 1, bytes(32)),
        ("o", -1, bytes(32)),
        ("o", 1, b""),
        ("o", 1, bytes(32), 2),
        ("o", 1, bytes(32), -1),
    ],
)
def test_a_checkpoint_that_could_not_be_read_again_is_not_made(parts: Any) -> None:
    """Above all one whose origin would be two lines."""
    with pytest.raises(NoteError):
        Checkpoint(*parts)


def test_keys_that_were_cut_or_altered_are_refused() -> None:
    """Every part of them, and every character another one; public and private."""
    readers: list[tuple[str, Callable[[str], object]]] = [
        (str(PETER), VerifierKey.parse),
        (PETER_PRIVATE, read_signing_keys),
    ]
    for whole, read in readers:
        length = len(whole)
        bad = [whole[i:j] for i in range(length) for j in range(i + 1, length + 1)
               if j - i != length]  # fmt: skip
        bad += [whole[:i] + chr(ord(whole[i]) + 1) + whole[i + 1 :] for i in range(length)]
        read(whole)
        for text in bad:
            with pytest.raises(AuditConfigurationError):
                read(text)


def test_keys_of_another_kind_are_refused() -> None:
    """As Go's tests have them, and a witness's (transparency-dev/formats, note_cosigv1_test.go)."""
    for text in (
        "PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==",
        "PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        "remora.n621.de+da77ade7+BOvN63jn/bLvkieywe8R6UYAtVtNbZpXh34x7onlmtw2",
    ):
        with pytest.raises(AuditConfigurationError, match="public key"):
            VerifierKey.parse(text)


@pytest.mark.parametrize(
    "name", ["", "a b", "a+b", "a\tb", "a\u00a0b", "\u3000", "a\nb", "a\n", "a\x1fb", "\ud800"]
)
def test_a_name_that_would_tear_a_line_is_refused(name: str) -> None:
    """No space of any kind, no plus, nothing that cannot be written."""
    with pytest.raises(AuditConfigurationError, match="name of a key"):
        key_of(name)


def test_keys_are_read_with_the_time_in_which_they_may_sign() -> None:
    """One a line, with comments."""
    text = (
        "# of the billing service\r\n\n"
        f"{PETER} since=2026-01-01T00:00:00Z   until=2026-07-01T12:00:00Z\n"
        f"  {ENOCH} until=2027-01-01T00:00:00Z"
    )
    first, second = read_keys(text)

    assert (str(first), str(second)) == (str(PETER), str(ENOCH))
    assert first.since == datetime(2026, 1, 1, tzinfo=timezone.utc)
    assert first.until == datetime(2026, 7, 1, 12, tzinfo=timezone.utc)
    assert second.since is None
    at = [datetime(2025, 12, 31, 23, 59, 59, tzinfo=timezone.utc), first.since,
          datetime(2026, 3, 1, tzinfo=timezone.utc), first.until]  # fmt: skip
    assert [first.valid_at(time) for time in at] == [False, True, True, False]
    assert [PETER.valid_at(time) for time in at] == [True] * 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no public key"),
        ("# nothing\n", "no public key"),
        ("\n\nnonsense", "line 3: no public key"),
        (f"{PETER}\n{PETER} until=2027-01-01T00:00:00Z", "line 2: the key stands in a line before"),
        (f"{PETER} since=2026-01-01", "line 1: since= is no time"),
        (f"{PETER} since=2026-1-01T00:00:00Z", "line 1: since= is no time"),
        (f"{PETER} until=2026-02-30T00:00:00Z", "line 1: until= is no time"),
        (f"{PETER} until=2026-01-01T00:00:00+01:00", "line 1: until= is no time"),
        (f"{PETER} from=2026-01-01T00:00:00Z", "line 1: behind a key"),
        (f"{PETER} # comment", "line 1: behind a key"),
        (f"{PETER} {' '.join(['since=2026-01-01T00:00:00Z'] * 2)}", "line 1: behind a key"),
        (f"{PETER} since=2026-01-01T00:00:00Z until=2026-01-01T00:00:00Z", "never valid"),
        (PETER_PRIVATE, "line 1: a private key stands where a public one belongs"),
    ],
)
def test_a_list_of_keys_with_a_slip_names_its_line(text: str, words: str) -> None:
    """Without what stands there, which may be secret."""
    with pytest.raises(AuditConfigurationError, match=re.escape(words)) as caught:
        read_keys(text)

    assert "AYEKFALV" not in str(caught.value)


def test_a_private_key_shows_only_whose_it_is() -> None:
    """Not in a repr or a text, and not pickled or copied into something that shows it."""
    (key,) = read_signing_keys(PETER_PRIVATE)

    assert repr(key) == str(key) == f"{key}" == "<SigningKey 'PeterNeumann' c74f20a3>"
    assert key.reveal() == PETER_PRIVATE
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            copying(key)


def variables(error: BaseException) -> str:
    """Return what a log of a traceback with its variables would show, without our own frames."""
    shown = ["".join(traceback.format_exception(error))]
    todo: list[BaseException | None] = [error, error.__cause__, error.__context__]
    for each in filter(None, todo):
        for frame, _ in traceback.walk_tb(each.__traceback__):
            if frame.f_code.co_filename != __file__:
                shown.append(repr(frame.f_locals))
    return "\n".join(shown)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no private key in it"),
        ("\n# nothing\n", "no private key in it"),
        (f"{PETER}\n", "line 1: a public key, where a private one belongs"),
        (f"\n{PETER_PRIVATE[:-8]}\n", "line 2: a private key that was damaged"),
        (PETER_PRIVATE[1:], "line 1: no private key"),
        (PETER_PRIVATE.replace("+c7", "+c8"), "line 1: the name and the number"),
        (PETER_PRIVATE.replace("+AY", "+BY"), "line 1: a private key of another kind"),
        (f"{PETER_PRIVATE}\n{PETER_PRIVATE}", "line 2: the key stands in a line before"),
        (PETER_PRIVATE + "\n#" + "x" * LARGEST_KEY_FILE, "larger than 64 kB"),
    ],
)
def test_a_key_file_with_a_slip_is_refused_without_a_word_of_it(
    text: str, words: str, tmp_path: Path
) -> None:
    """Neither the message nor the variables of the traceback have any of it."""
    path = tmp_path / "audit.key"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(AuditConfigurationError, match=re.escape(words)) as loaded:
        load_signing_keys(path)
    with pytest.raises(AuditConfigurationError, match=re.escape(words)) as read:
        read_signing_keys(text)

    assert str(path) in loaded.value.reason
    for caught in (loaded, read):
        assert "YEKFALV" not in variables(caught.value)


def test_keys_of_two_names_do_not_sign_together() -> None:
    """A log has one name."""
    with pytest.raises(AuditConfigurationError, match="not all the same name"):
        read_signing_keys(f"{key_of('a').reveal()}\n{key_of('b').reveal()}\n")


@posix
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o777])
def test_a_key_file_that_others_can_open_is_refused(mode: int, tmp_path: Path) -> None:
    """With what mends it."""
    path = tmp_path / "audit.key"
    path.write_text(PETER_PRIVATE)
    path.chmod(mode)
    with pytest.raises(AuditConfigurationError, match=f"others than its owner .mode {mode:04o}"):
        load_signing_keys(path)
    path.chmod(0o400)

    assert load_signing_keys(str(path))[0].verifier == PETER


@posix
def test_a_key_file_may_be_a_link_but_nothing_else(tmp_path: Path) -> None:
    """Secrets are mounted as links; a FIFO does not hang, a directory and nothing are named."""
    (tmp_path / "real").touch(0o600)
    (tmp_path / "real").write_text(PETER_PRIVATE)
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "fifo", 0o600)

    assert load_signing_keys(tmp_path / "link")[0].name == "PeterNeumann"
    for name, words in (("fifo", "no regular file"), (".", "no regular file"),
                        ("missing", "No such file")):  # fmt: skip
        with pytest.raises(AuditConfigurationError, match=words):
            load_signing_keys(tmp_path / name)


def test_without_the_package_for_signatures_it_is_named() -> None:
    """The module is imported, checkpoints and public keys are read, and a hint tells the rest."""
    done = run_well(
        """
        import sys
        sys.modules["cryptography"] = None
        sys.modules["cryptography.hazmat.primitives.asymmetric"] = None
        from structlog_audit import AuditConfigurationError, note
        (key,) = note.read_keys(sys.argv[1])
        for work in (lambda: note.SigningKey.generate("a"), lambda: note.read_signing_keys("x"),
                     lambda: note.load_signing_keys("x"),
                     lambda: note.open_note(sys.argv[2], [key])):
            try:
                work()
            except AuditConfigurationError as error:
                print(error)
        """,
        PETER,
        NOTE,
    )

    words = "signatures need the package cryptography (hint: pip install 'structlog-audit[sign]')"
    assert done.splitlines() == [words] * 4


def mangled(note: str) -> list[str]:
    """Return a note with each character taken out, doubled, and made another one."""
    found = [note]
    for place in range(len(note)):
        before, it, after = note[:place], note[place], note[place + 1 :]
        found += [before + after, before + it + it + after]
        found += [before + other + after for other in "A\n +—\x1f\u2028="]
    return found


def test_another_implementation_in_python_agrees_on_every_mangled_note() -> None:
    """aics-tlog verifies ours, we verify theirs, and both refuse the same."""
    theirs = pytest.importorskip("aics_tlog", reason="the other implementation needs Python 3.12")
    key = key_of()
    their_key = theirs.parse_vkey(str(key.verifier))
    checkpoint = Checkpoint("example.com/audit", 7, merkle.leaf_hash(b"x"), acts=2)

    def their_verdict(note: str) -> str | None:
        try:
            parsed = theirs.parse_note(note)
            return parsed.text if theirs.verify_note(parsed, [their_key]) else None
        except ValueError:
            return None

    note = sign(checkpoint.text(), [key])
    assert theirs.parse_checkpoint(theirs.parse_note(note).text).root == checkpoint.root
    made = theirs.sign_note(TEXT, key._private, key.name)
    assert theirs.Note(TEXT, (made,)).serialise() == sign(TEXT, [key])
    differing = {n for n in mangled(note) if our_verdict(n, [key.verifier]) != their_verdict(n)}
    # they take empty lines after the signatures
    assert {n.rstrip("\n") for n in differing} <= {note.rstrip("\n")}


def our_verdict(note: str, keys: list[VerifierKey]) -> str | None:
    try:
        return open_note(note, keys)[0]
    except NoteError:
        return None


def go_environment() -> dict[str, str] | None:
    """Return an environment in which Go finds golang.org/x/mod; None without it."""
    if not (go := shutil.which("go")):
        return None
    own = subprocess.run([go, "env", "GOPATH"], capture_output=True, text=True, check=True).stdout
    paths = [own.strip(), "/usr/share/gocode"]  # where Debian puts golang-golang-x-mod-dev
    if not any(Path(path, "src/golang.org/x/mod/sumdb/note").is_dir() for path in paths):
        return None
    return {**os.environ, "GO111MODULE": "off", "GOFLAGS": "", "GOPATH": os.pathsep.join(paths)}


def ask_go(question: dict[str, Any]) -> dict[str, Any]:
    environment = go_environment()
    if environment is None:
        pytest.skip("fault tool missing: Go with golang.org/x/mod")
    done = subprocess.run(
        ["go", "run", str(Path(__file__).with_name("sumdb.go"))], env=environment,
        input=json.dumps(question), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_go_agrees_on_notes_checkpoints_and_proofs() -> None:
    """golang.org/x/mod/sumdb: each side verifies what the other one made, and refuses the same."""
    leaves = [merkle.leaf_hash(b"%d" % number) for number in range(40)]
    roots = [root_of(leaves[:size]) for size in range(len(leaves) + 1)]
    places = [(size, place) for size in range(1, 41) for place in range(size)]
    inclusion = [merkle.inclusion_proof(leaves, place, size) for size, place in places]
    consistency = [merkle.consistency_proof(leaves, place + 1, size) for size, place in places]
    key = key_of()
    checkpoint = Checkpoint(key.name, 40, roots[40], acts=2)
    notes = mangled(sign(checkpoint.text(), [key]))
    answer = ask_go({
        "keys": [str(key.verifier)], "notes": notes, "private": key.reveal(), "text": TEXT,
        "size": 40,
        "inclusion": [claim(size, place, proof, roots[size], leaves[place])
                      for (size, place), proof in zip(places, inclusion, strict=True)],
        "consistency": [claim(size, place + 1, proof, roots[size], roots[place + 1])
                        for (size, place), proof in zip(places, consistency, strict=True)],
    })  # fmt: skip

    assert answer["Refused"] == 0
    assert answer["Roots"] == coded(roots[1:])
    assert [p or [] for row in answer["Inclusion"] for p in row] == [coded(p) for p in inclusion]
    assert [p or [] for row in answer["Consistency"] for p in row] == [
        coded(p) for p in consistency
    ]
    assert answer["Signed"] == sign(TEXT, [key])
    assert sign(TEXT, read_signing_keys(answer["Private"])) == answer["New"]
    assert open_note(answer["New"], read_keys(answer["Public"]))[0] == TEXT
    assert answer["Opened"][0] == f"1 {checkpoint.text()}"
    for note, theirs in zip(notes, answer["Opened"], strict=True):
        ours = our_verdict(note, [key.verifier])
        assert ours is None or theirs == f"1 {ours}"
        if ours is None and theirs:  # Go takes base64 whose last bits mean nothing
            assert theirs == answer["Opened"][0]
            assert note[-4:] != notes[0][-4:]


def root_of(leaves: list[bytes]) -> bytes:
    tree = merkle.Frontier()
    for leaf in leaves:
        tree.append(leaf)
    return tree.root()


def coded(hashes: list[bytes]) -> list[str]:
    return [b64encode(each).decode() for each in hashes]


def claim(size: int, place: int, proof: list[bytes], root: bytes, part: bytes) -> dict[str, Any]:
    root_and_part = coded([root, part])
    return {"Size": size, "Place": place, "Proof": coded(proof), "Root": root_and_part[0],
            "Part": root_and_part[1]}  # fmt: skip
