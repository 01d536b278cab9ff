"""Proofs: an entry that was recorded can be shown alone, and nothing else can."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from reading import session_files
from running import environment, run_python
from signing import make_key

from structlog_audit import AuditHandler, FileSink, Receipt, Signer
from structlog_audit.note import SigningKey, VerifierKey, read_keys
from structlog_audit.proof import ProofError, Proven, prove, read_receipt, verify_proof

Proof = dict[str, Any]
ENTRIES = 21


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return make_key(tmp_path / "audit.key")


@pytest.fixture
def receipts(audit_dir: Path, tmp_path: Path, key: SigningKey) -> list[Receipt]:
    """What two sessions returned, signed."""
    handler = AuditHandler(FileSink(audit_dir, signer=Signer(tmp_path / "audit.key", entries=4)))
    receipts = []
    for number in range(ENTRIES):
        receipts.append(handler.record({"action": "A", "n": number}))
        if number == 10:
            handler.close()
    handler.close()
    return receipts


def checked(proof: Proof, *keys: VerifierKey) -> Proven:
    """Verify a proof as it comes from a file."""
    return verify_proof(json.loads(json.dumps(proof)), keys)


def test_every_entry_can_be_proven(
    audit_dir: Path, key: SigningKey, receipts: list[Receipt]
) -> None:
    """With the public key alone, and without any other entry."""
    for number, receipt in enumerate(receipts):
        proof = prove(receipt, audit_dir)
        proven = checked(proof, key.verifier)

        assert json.loads(proven.line)["data"] == {"n": number}
        assert (proven.session, proven.sequence) == (receipt.session, receipt.sequence)
        assert proven.origin.startswith("example.com/audit/")
        assert '"n":' not in json.dumps({**proof, "entry": ""})


def test_a_proof_of_one_entry_proves_no_other(
    audit_dir: Path, key: SigningKey, receipts: list[Receipt]
) -> None:
    """Any part that is taken from another proof breaks it."""
    mine, other = prove(receipts[3], audit_dir), prove(receipts[15], audit_dir)
    for part in mine:
        if mine[part] != other[part]:
            with pytest.raises(ProofError):
                checked({**mine, part: other[part]}, key.verifier)


def flipped(text: str) -> str:
    data = bytearray(b64decode(text))
    data[5] ^= 1
    return b64encode(data).decode()


FORGERIES: list[Callable[[Proof], Any]] = [
    lambda p: p.update(entry=p["entry"].replace('"n":3', '"n":4')),
    lambda p: p.update(head=p["head"].replace('"pid":', '"pid":1')),
    lambda p: p["entryProof"].pop(),
    lambda p: p["entryProof"].append(p["entryProof"][0]),
    lambda p: p["headProof"].pop(),
    lambda p: p["entryProof"].__setitem__(0, flipped(p["entryProof"][0])),
    lambda p: p["receipt"].update(sequence=p["receipt"]["sequence"] + 1),
    lambda p: p["receipt"].update(hash="0" * 64),
    lambda p: p["receipt"].update(session="a" * 20),
    lambda p: p.update(checkpoint=p["checkpoint"].replace("audit/", "audit2/", 1)),
    lambda p: p.update(checkpoint=p["checkpoint"].split("\n\n")[0] + "\n"),
    lambda p: p.update(format="other"),
    lambda p: p.pop("headProof"),
    lambda p: p.update(head="[]"),
    lambda p: p.update(entry=None),
    lambda p: p.update(entryProof=["!"]),
    lambda p: p.update(receipt={"session": 1}),
    lambda p: p.update(head=json.dumps({**json.loads(p["head"]), "time": "yesterday"})),
]


@pytest.mark.parametrize("forge", FORGERIES, ids=range(len(FORGERIES)))
def test_a_forged_proof_does_not_hold(
    audit_dir: Path, key: SigningKey, receipts: list[Receipt], forge: Callable[[Proof], Any]
) -> None:
    """It is refused in words."""
    proof = copy.deepcopy(prove(receipts[3], audit_dir))
    forge(proof)

    with pytest.raises(ProofError):
        checked(proof, key.verifier)


def test_another_key_proves_nothing(audit_dir: Path, receipts: list[Receipt]) -> None:
    """Even one of the same name."""
    other = SigningKey.generate("example.com/audit")

    with pytest.raises(ProofError, match="none of the known keys"):
        checked(prove(receipts[0], audit_dir), other.verifier)


def test_a_key_proves_nothing_outside_its_time(
    audit_dir: Path, key: SigningKey, receipts: list[Receipt]
) -> None:
    """By the time of the journal's line."""
    (late,) = read_keys(f"{key.verifier} until=2020-01-01T00:00:00Z")

    with pytest.raises(ProofError, match="not valid"):
        checked(prove(receipts[0], audit_dir), late)


def test_a_changed_log_contradicts_the_receipt(audit_dir: Path, receipts: list[Receipt]) -> None:
    """That is said as such: it is no missing proof."""
    (path,) = [path for path in session_files(audit_dir) if receipts[0].session in path.name]
    path.write_bytes(path.read_bytes().replace(b'"n":0', b'"n":9'))

    with pytest.raises(ProofError, match="contradicts the receipt") as caught:
        prove(receipts[0], audit_dir)
    assert caught.value.contradicts


def test_a_log_that_was_cut_contradicts_what_was_signed(
    audit_dir: Path, receipts: list[Receipt]
) -> None:
    """The signed head says how many lines there were."""
    (path,) = [path for path in session_files(audit_dir) if receipts[0].session in path.name]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))

    with pytest.raises(ProofError, match="fewer lines") as caught:
        prove(receipts[8], audit_dir)
    assert caught.value.contradicts


def test_what_is_not_signed_yet_cannot_be_proven(audit_dir: Path, tmp_path: Path) -> None:
    """Without a key that is so for ever; the message says it."""
    handler = AuditHandler(FileSink(audit_dir))
    receipt = handler.record({"action": "A"})
    handler.close()

    with pytest.raises(ProofError, match="no checkpoint covers"):
        prove(receipt, audit_dir)
    with pytest.raises(ProofError, match="no file of the session"):
        prove(receipt._replace(session="a" * 20), audit_dir)
    with pytest.raises(ProofError, match="cannot look into"):
        prove(receipt, tmp_path / "nowhere")
    (audit_dir / "audit-journal.ndjson").unlink()
    with pytest.raises(ProofError, match="no journal"):
        prove(receipt, audit_dir)


@pytest.mark.parametrize(
    "line",
    [b"junk", b"{}", b"[1]", b'{"session":"SESSION","sequence":"x","root":"","number":1}',
     b'{"session":"SESSION","sequence":1e400,"root":"","number":1}'],
)  # fmt: skip
def test_a_hostile_journal_is_told_in_words(
    audit_dir: Path, receipts: list[Receipt], line: bytes
) -> None:
    """Or passed over."""
    path = audit_dir / "audit-journal.ndjson"
    line = line.replace(b"SESSION", receipts[0].session.encode())
    path.write_bytes(line + b"\n" + line + b' "root": "event":"Checkpoint"\n' + path.read_bytes())

    with contextlib.suppress(ProofError):
        prove(receipts[0], audit_dir)


def test_what_is_no_file_is_not_waited_for(
    audit_dir: Path, tmp_path: Path, receipts: list[Receipt]
) -> None:
    """A FIFO, or a link, in the place of the session's file."""
    (path,) = [path for path in session_files(audit_dir) if receipts[0].session in path.name]
    path.rename(tmp_path / "moved")
    os.mkfifo(path)
    with pytest.raises(ProofError, match="cannot read"):
        prove(receipts[0], audit_dir)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ProofError, match="cannot read"):
        prove(receipts[0], audit_dir)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"x", b"{}", b'{"session":"a","sequence":1,"hash":""}',
             b'{"session":"aaaaaaaaaaaaaaaaaaaa","sequence":0,"hash":""}', b"\xff"]
)  # fmt: skip
def test_what_is_no_receipt_is_refused(text: bytes) -> None:
    """In words."""
    with pytest.raises(ProofError, match="receipt"):
        read_receipt(text)


def command(*arguments: object, cwd: Path) -> tuple[int, str, str]:
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "structlog_audit", *map(str, arguments)],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_commands_prove_and_verify(
    audit_dir: Path, tmp_path: Path, key: SigningKey, receipts: list[Receipt]
) -> None:
    """From a receipt in a file to the entry on the screen, with the public key alone."""
    (tmp_path / "receipt.json").write_bytes(orjson.dumps(receipts[3]._asdict()))
    (tmp_path / "key.pub").write_text(str(key.verifier))
    status, proof, _ = command("prove", "receipt.json", audit_dir, cwd=tmp_path)
    assert status == 0
    (tmp_path / "proof.json").write_text(proof)

    status, shown, _ = command("verify-proof", "proof.json", "--key", "key.pub", cwd=tmp_path)
    assert status == 0
    assert "The proof holds" in shown
    assert '"n":3' in shown

    (tmp_path / "proof.json").write_text(proof.replace('n\\":3', 'n\\":4'))
    status, _, error = command("verify-proof", "proof.json", "--key", "key.pub", cwd=tmp_path)
    assert status == 1
    assert error.startswith("error: the proof does not hold")


def test_wrong_use_of_the_commands_is_explained(tmp_path: Path) -> None:
    """No traceback for files that are missing, empty or something else."""
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    for expected, *arguments in (
        (1, "prove", "nowhere", "."),
        (1, "prove", "x", "."),
        (3, "verify-proof", "x", "--key", "x"),
        (3, "verify-proof", "nowhere", "--key", "x"),
        (3, "verify-proof", "x"),
    ):
        status, shown, error = command(*arguments, cwd=tmp_path)
        assert status == expected, arguments
        assert not shown
        assert "rror: " in error
        assert "Traceback" not in error


def test_cryptography_is_loaded_for_signatures_alone(tmp_path: Path) -> None:
    """Who does not sign does not pay for it."""
    script = """
        import sys
        from structlog_audit import AuditHandler, FileSink
        handler = AuditHandler(FileSink(sys.argv[1]))
        handler.record({"action": "A"})
        handler.close()
        print("cryptography" in sys.modules)
    """
    assert run_python(script, tmp_path / "audit").stdout == "False\n"
