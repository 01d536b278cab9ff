"""Merkle trees: against their definition, others' vectors and another implementation."""

from __future__ import annotations

import itertools
from base64 import b64decode
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structlog_audit.merkle import (
    EMPTY_ROOT,
    Frontier,
    Tree,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    verify_consistency,
    verify_inclusion,
)

MOST = 70
"""Leaves of the largest tree that is tried in full."""
LEAVES = [leaf_hash(b"%d" % number) for number in range(MOST)]
OTHER = sha256(b"another").digest()


def defined_root(leaves: list[bytes]) -> bytes:
    """Return the root as RFC 9162, section 2.1.1, defines it."""
    if not leaves:
        return sha256().digest()
    if len(leaves) == 1:
        return leaves[0]
    left = 1
    while left * 2 < len(leaves):
        left *= 2
    halves = defined_root(leaves[:left]), defined_root(leaves[left:])
    return sha256(b"\x01" + b"".join(halves)).digest()


ROOTS = [defined_root(LEAVES[:size]) for size in range(MOST + 1)]


def test_leaves_and_nodes_are_told_apart() -> None:
    """Or the children of a node could be passed off as one leaf."""
    left, right = leaf_hash(b"a"), leaf_hash(b"b")

    assert leaf_hash(b"a") == sha256(b"\x00a").digest()
    assert node_hash(left, right) == sha256(b"\x01" + left + right).digest()
    assert node_hash(left, right) != leaf_hash(left + right)


def test_a_frontier_has_the_root_of_the_definition_at_every_size() -> None:
    """From the empty tree on; and it is as small as the size has bits."""
    tree = Frontier()
    assert tree.root() == EMPTY_ROOT == sha256(b"").digest()
    for size, leaf in enumerate(LEAVES, 1):
        tree.append(leaf)

        assert (tree.size, tree.root()) == (size, ROOTS[size])
        assert len(tree.hashes) == size.bit_count()
    assert tree.hashes[0] == ROOTS[64]


@given(st.integers(0, MOST), st.integers(0, MOST))
def test_a_restored_frontier_goes_on_as_if_it_had_never_ended(first: int, second: int) -> None:
    """At whatever size."""
    before, after = sorted((first, second))
    tree = Frontier()
    for leaf in LEAVES[:before]:
        tree.append(leaf)
    tree = Frontier.restore(tree.size, tree.hashes)
    for leaf in LEAVES[before:after]:
        tree.append(leaf)

    assert (tree.size, tree.root()) == (after, ROOTS[after])


@pytest.mark.parametrize(
    ("size", "hashes"),
    [(0, [OTHER]), (1, []), (3, [OTHER]), (4, [OTHER, OTHER]), (-1, [OTHER]), (1, [OTHER[:31]])],
)
def test_a_frontier_that_cannot_be_is_not_restored(size: int, hashes: list[bytes]) -> None:
    """Its hashes do not fit its size, or are none."""
    with pytest.raises(ValueError, match="hash"):
        Frontier.restore(size, hashes)


def wrong_proofs(proof: list[bytes]) -> Iterator[list[bytes]]:
    """Yield what a proof becomes by a slip or by malice."""
    yield [*proof, OTHER]
    yield [*proof, b""]
    yield [OTHER, *proof]
    for place in range(len(proof)):
        yield proof[:place] + proof[place + 1 :]
        yield [*proof[:place], OTHER, *proof[place + 1 :]]
        yield [*proof[:place], proof[place][:-1], *proof[place + 1 :]]
    for place in range(len(proof) - 1):
        yield [*proof[:place], proof[place + 1], proof[place], *proof[place + 2 :]]


def test_every_leaf_of_every_tree_is_proved() -> None:
    """With the shortest proof possible, whatever follows the tree."""
    for size in range(1, MOST + 1):
        for index in range(size):
            proof = inclusion_proof(iter(LEAVES), index, size)

            assert verify_inclusion(LEAVES[index], index, size, proof, ROOTS[size])
            assert len(proof) <= (size - 1).bit_length()


def test_a_whole_tree_proves_the_leaves_of_every_earlier_one() -> None:
    """With the proof of that tree; and none of a later one."""
    tree = Tree(LEAVES[:MOST])
    for size in range(1, MOST + 1):
        for index in range(size):
            assert tree.proof(index, size) == inclusion_proof(LEAVES, index, size)
    assert tree.proof(3) == tree.proof(3, MOST)
    with pytest.raises(ValueError, match="fewer than 71 leaves"):
        tree.proof(3, MOST + 1)


def test_no_other_leaf_place_proof_or_root_is_proved() -> None:
    """Each part of the claim is bound."""
    for size in range(1, 34):
        for index in range(size):
            proof = inclusion_proof(LEAVES, index, size)
            claims: list[tuple[Any, ...]] = [(OTHER, index, size, proof, ROOTS[size]),
                      (LEAVES[index], index, size, proof, OTHER),
                      (LEAVES[index], index, size, proof, b"")]  # fmt: skip
            claims += [(LEAVES[index], other, size, proof, ROOTS[size])
                       for other in range(-1, size + 2) if other != index]  # fmt: skip
            claims += [(LEAVES[index], index, size, wrong, ROOTS[size])
                       for wrong in wrong_proofs(proof)]  # fmt: skip

            assert not [claim for claim in claims if verify_inclusion(*claim)]


def test_a_tree_of_another_size_does_not_prove_a_leaf_unless_its_path_is_the_same() -> None:
    """The size alone is not bound where it makes no difference; the signed root has it as well."""
    for size, other in itertools.permutations(range(1, 34), 2):
        for index in range(min(size, other)):
            proof = inclusion_proof(LEAVES, index, size)

            assert not verify_inclusion(LEAVES[index], index, other, proof, ROOTS[other])


def test_a_path_that_is_longer_than_its_tree_is_high_proves_nothing() -> None:
    """It would put a leaf at another place than its own."""
    assert verify_inclusion(LEAVES[1], 1, 2, [LEAVES[0]], ROOTS[2])
    assert not verify_inclusion(LEAVES[1], 0, 1, [LEAVES[0]], ROOTS[2])


def test_bytes_cannot_be_moved_from_one_hash_to_the_next() -> None:
    """A node's hash does not tell where its left child ends; the length of a hash does."""
    both = LEAVES[0] + LEAVES[1]
    left, right = both[:31], both[31:]

    assert node_hash(left, right) == ROOTS[2]
    assert not verify_inclusion(left, 0, 2, [right], ROOTS[2])
    assert not verify_consistency(1, left, 2, ROOTS[2], [right])


def test_every_tree_is_consistent_with_every_older_one() -> None:
    """Whatever follows the newer tree."""
    for old, size in itertools.combinations_with_replacement(range(MOST + 1), 2):
        proof = consistency_proof(iter(LEAVES), old, size)

        assert verify_consistency(old, ROOTS[old], size, ROOTS[size], proof)
        assert len(proof) <= size.bit_length() + 1


def test_nothing_else_is_consistent() -> None:
    """Neither with other roots or sizes nor by another proof."""
    for old, size in itertools.combinations_with_replacement(range(34), 2):
        proof = consistency_proof(LEAVES, old, size)
        claims: list[tuple[Any, ...]] = [(old, OTHER, size, ROOTS[size], proof),
                  (old, ROOTS[old][1:], size, ROOTS[size], proof),
                  (-1, ROOTS[old], size, ROOTS[size], proof)]  # fmt: skip
        claims += [(old, ROOTS[old], size, ROOTS[size], wrong) for wrong in wrong_proofs(proof)]
        claims += [(other, ROOTS[old], size, ROOTS[size], proof)
                   for other in range(35) if other != old]  # fmt: skip
        if old or not size:  # any tree begins with the empty one
            claims += [(old, ROOTS[old], size, OTHER, proof)]

        assert not [claim for claim in claims if verify_consistency(*claim)]


def test_a_tree_of_which_a_leaf_was_changed_is_not_consistent() -> None:
    """Nor is one that lost a leaf, though its builder made the proof."""
    for size in range(2, 20):
        for old in range(1, size):
            for place in range(old):
                changed = [*LEAVES[:place], OTHER, *LEAVES[place + 1 :]]
                cut = LEAVES[:place] + LEAVES[place + 1 :]
                for forged in (changed, cut):
                    proof = consistency_proof(forged, old, size)
                    root = defined_root(forged[:size])

                    assert not verify_consistency(old, ROOTS[old], size, root, proof)


def test_proofs_of_what_is_not_there_are_refused() -> None:
    """Places outside the tree, and trees that end too early."""
    for arguments in ((LEAVES, 3, 3), (LEAVES, -1, 3), (LEAVES, 0, 0), (LEAVES[:4], 0, 5)):
        with pytest.raises(ValueError, match="leaves"):
            inclusion_proof(*arguments)
    for arguments in ((LEAVES, 4, 3), (LEAVES, -1, 3), (LEAVES[:4], 3, 5)):
        with pytest.raises(ValueError, match="leaves"):
            consistency_proof(*arguments)


# transparency-dev/merkle, proof/verify_test.go (Apache-2.0); of the same eight leaves that the
# tests of Certificate Transparency have used from the beginning
CT_LEAVES = [
    leaf_hash(bytes.fromhex(text))
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657",
                 "606162636465666768696a6b6c6d6e6f")
]  # fmt: skip
CT_ROOTS = [
    bytes.fromhex(text)
    for text in (
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    )
]
CT_INCLUSION = {
    (0, 8): ["96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
             "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
             "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"],
    (5, 8): ["bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
             "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
             "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (1, 5): ["6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
             "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
             "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"],
}  # fmt: skip
CT_CONSISTENCY = {
    (1, 1): [],
    (1, 8): ["96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
             "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
             "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"],
    (6, 8): ["0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
             "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
             "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"],
    (2, 5): ["5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
             "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"],
    (6, 7): ["0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
             "b08693ec2e721597130641e8211e7eedccb4c26413963eee6c1e2ed16ffb1a5f",
             "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"],
}  # fmt: skip


def test_the_vectors_of_certificate_transparency_are_reproduced() -> None:
    """Roots and proofs, byte for byte; and they verify."""
    tree = Frontier()
    for leaf, root in zip(CT_LEAVES, CT_ROOTS, strict=True):
        tree.append(leaf)
        assert tree.root() == root
    for (index, size), texts in CT_INCLUSION.items():
        proof = [bytes.fromhex(text) for text in texts]
        assert inclusion_proof(CT_LEAVES, index, size) == proof
        assert verify_inclusion(CT_LEAVES[index], index, size, proof, CT_ROOTS[size - 1])
    for (old, size), texts in CT_CONSISTENCY.items():
        proof = [bytes.fromhex(text) for text in texts]
        assert consistency_proof(CT_LEAVES, old, size) == proof
        assert verify_consistency(old, CT_ROOTS[old - 1], size, CT_ROOTS[size - 1], proof)


# Google's CT log argon2020: leaf 10,000 of a tree of 961,984,013, and its consistency with that of
# 3,654,490 (golang/mod, sumdb/tlog/testdata/argon2020 and ct_test.go, BSD-3-Clause)
ARGON_SIZE = 961_984_013
ARGON_ROOT = "dwlueapdd7LaOEnX2W2Wp9v2XE+KzejHRQGHwEx0oaM="
ARGON_OLD_ROOT = "AuIZ5V6sDUj1vn3Y1K85oOaQ7y+FJJKtyRTl1edIKBQ="
ARGON_LEAF = "nCs3mfIydh9x4CKyQ+u2xtmpxmFggA5MLymHwNQSlLg="
ARGON_INCLUSION = """
T46AmJsuOM/gFiGlUp+IJJebp+1Z5qratFNW7U0JyOQ= 9Jj1Feodn42uRYEfffkV4HF/EIPFQ5Zo9IwkxbQ2uhk=
D53/1oCNebF4J59HHgioovKZxrmrKcVuCVhy3Izg8Ck= wSFDgGSrsXRPA+1c8WHoAFCsWeUv8NDyP/Q/SgsyVyY=
516/RcwsgdwdzHn18v1dJHqBkgFUbNhmCIWOGjsMJaE= naTFY2ajLFgrgs5XUl+zJYZnnlJksLGsA1VYwpLfqbY=
mKBRJo6qao+0Kdh/rhGkZUbHUAxMhrtrclrTpIbNjIg= Co4ueOFE7lpifLio94irxxsv1wFMMaK3tPu2ZQkHlro=
yRgy800K6JMYCC05sWfqF2kvCg2riT/pVM+nEa6V5+0= n2O38XJZC8/Wpbwi9HhgVizlUyeUHVZvYyQB1607MRc=
go3tAjuNfNSCj87y2Rg1xOroDknGN1eaf3cgvzObf7Q= 8D0Mj3/J7ySSnFb0afIHYXv6rlOhECnsebY6XKi1IR8=
6rcez46ZU8M5vPiWVMAUfJfAOV0pPP/mch/lYzZhj/M= 2rtIeXrPvSdUyHc5maIgSAVB2BzaKaupWxSAiVayDE4=
nniW/IMFQPN5xw8UsHFn7CRStYbm1gLu7NNa6kkRqJQ= mRPPi7sQS22MduIEyvcNzCNFqIt6kLwYPkNKrVtIcu8=
JvTivzESNS9wHI8aph5a7uieVmtS/p9PciMZ5D6GyOo= UTyQd+Ym0wY4zG+qK806bBORwi1CSVvFQ/KknnqoZj8=
hXODrqN+ff+U6zPqRQ+ZQKs6im1fPcxIerDSfNwflhE= II6GE+WY/DrpZzfHztLwkR46o37zVkNLCyPYlf68zA0=
d609kWWcNBllbA8Jb/ad4XAVVGnScLRmtP8FYyr+Dck= rikBsP0G0gioXRpBFED2CzQdSLrGPvRd0bEcbEZw1rI=
GXIElfmnRuWfbA4z7ubV/UwlpSRUbUeec7oL5HDDnh0= pR0SH/NYP6s9+8azWwaeUXA4Ze/3WCIgMfh5YW6wvcE=
f3GuAKYVrF8RBg3s15jvA/YvV9oAliWtzP/imwPhQVA= WHn8zDxlVgkV+lSlmzaOdfSBrTHoRr5nT3d76q0KKWE=
f2uV2ZxVgULzLPKuZcowRY3ZY7fRlX59iDBjV1R8kNQ= NzQVjJsvQwbi7WStMr9oFkh9VbHfK7LB6o7WwAqwNTs=
C0LttBeYHZHgL+032JIcJC3CTBIyza/hsbmJUgJfmDI= nixU5CWTFVDlF4BGdcU6kA7WSYurEpe9jRWc+F/7sOc=
"""
ARGON_CONSISTENCY = """
80Sfbj6UQEdVSZCSIgh9NMPj3vCBzcc1A48B2crJSWg= FZcrgAHUk6nNPviJZq8kEK6jCG1d18pJOFE45ZDc1TQ=
Q67reWXmPBo1UfmwBap4Xi9PMPfFdUSSw3WGlRZdG7k= eJ7CyhR4PxzBxDIsWgrVYW1eFUb9ndgf46tFmiqVrxA=
QrDwp062Grm5WY8KdrhFsBuuNjGzRox2Jb8PmVL5OYw= XM4YMjMEdLH/XJam/ZWyaP14k3cmsOtnPsOWQ54lW1s=
SGiBh+jOTGccXU48ZzgQ88lRcBmtB4wz4oSDndv2QTg= WAS6txqNLYKGL1GdBdpqmV42TTfn6cJsuDsqLXuTCNI=
QFmRS0rirUA7ZN3lxFjDncV+E1OCrn3NUB4RCp+5fzc= Hdbp7It2XBNZmNDBpCN/KPd7vfVqxgzwOosqVIaEA9E=
mxvHL0ZiblBdD7j7pIa1jlfB0gSqfJ6oX0UGo7L0VsU= q5hjyvoW6TL/PThgcitpDcSTrnKX2p1+aqscqH2euRA=
jTOWDqt3IHj2NVFeezyBz2ofpru+ztEywqKUAfFclKI= GIRn0w3HqJdvU9j1WVD//eR6lk2AaTVjyzjsJNP8U88=
x52GJvxG81fnQBrgOTbll1A5tz95/LXK0Ag1NhB0r1I= 6/0OqrcTgc3o5dD5PymmoC96lB9yLPFuTHVvLy8fSGk=
Gf+iKLfcXO5l4JEFmsZvSdG5q1uEeWPfYLrds6pmjz0= DGuaco+McyM3AfRSF6qX7RwSetwe2ieYJmxw5e9rVx0=
2tQJ9V32hnYp+fdpP6TcjmgJmLeNVOMKM0Ml1kk4cNU= 3PapK+IkyJr8I9yAErAmzuZezzLMzsg+PfeRCgNW8NQ=
s6xiYeejb+wtqHA+URJZ2I/SCPyIW8coP6aB00FJbMY= z9lSpmdTcr5M5ZzKlc4EPh3SrSypKFdk6JUF/UccaZU=
GXIElfmnRuWfbA4z7ubV/UwlpSRUbUeec7oL5HDDnh0= pR0SH/NYP6s9+8azWwaeUXA4Ze/3WCIgMfh5YW6wvcE=
f3GuAKYVrF8RBg3s15jvA/YvV9oAliWtzP/imwPhQVA= WHn8zDxlVgkV+lSlmzaOdfSBrTHoRr5nT3d76q0KKWE=
f2uV2ZxVgULzLPKuZcowRY3ZY7fRlX59iDBjV1R8kNQ= NzQVjJsvQwbi7WStMr9oFkh9VbHfK7LB6o7WwAqwNTs=
C0LttBeYHZHgL+032JIcJC3CTBIyza/hsbmJUgJfmDI= nixU5CWTFVDlF4BGdcU6kA7WSYurEpe9jRWc+F/7sOc=
"""


def test_proofs_of_a_real_log_of_a_billion_leaves_verify() -> None:
    """As Google's log served them."""
    root = b64decode(ARGON_ROOT)
    inclusion = [b64decode(line) for line in ARGON_INCLUSION.split()]
    consistency = [b64decode(line) for line in ARGON_CONSISTENCY.split()]

    assert verify_inclusion(b64decode(ARGON_LEAF), 10_000, ARGON_SIZE, inclusion, root)
    assert not verify_inclusion(b64decode(ARGON_LEAF), 10_001, ARGON_SIZE, inclusion, root)
    old = 3_654_490, b64decode(ARGON_OLD_ROOT)
    assert verify_consistency(*old, ARGON_SIZE, root, consistency)
    assert not verify_consistency(*old, ARGON_SIZE, old[1], consistency)


def test_another_implementation_makes_and_takes_the_same_proofs() -> None:
    """aics-tlog: both ways, all sizes."""
    theirs = pytest.importorskip("aics_tlog", reason="the other implementation needs Python 3.12")
    tree = theirs.MerkleTree(b"%d" % number for number in range(MOST))
    for old, size in itertools.combinations_with_replacement(range(MOST + 1), 2):
        proof = consistency_proof(LEAVES, old, size)
        assert tree.root(size) == ROOTS[size]
        assert tree.consistency_proof(old, size) == proof
        assert theirs.verify_consistency(old, size, ROOTS[old], ROOTS[size], proof)
        if old < size:
            proof = inclusion_proof(LEAVES, old, size)
            assert tree.inclusion_proof(old, size) == proof
            assert theirs.verify_inclusion(LEAVES[old], old, size, proof, ROOTS[size])
