"""Merkle trees of RFC 6962 and RFC 9162: pure rules, no files.

A leaf is `SHA-256(0x00 ‖ data)`, a node `SHA-256(0x01 ‖ left ‖ right)`; the prefixes keep a
node from being passed off as a leaf. Below a node of n leaves, the left part has the largest power
of two that is smaller than n. Of a growing tree only the roots of its full parts are kept, one for
each bit that is set in its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import islice

HASH_SIZE = 32
"""Bytes of a SHA-256."""
EMPTY_ROOT = sha256(b"").digest()
"""Root of the tree without leaves."""


def leaf_hash(data: bytes) -> bytes:
    """Return the hash of a leaf."""
    return sha256(b"\0" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of what stands above two nodes or leaves."""
    return sha256(b"\1" + left + right).digest()


class Frontier:
    """What has to be known of a tree to go on with it: 32 bytes for each bit set in its size.

    Attributes:
        size: number of leaves.
    """

    __slots__ = ("_hashes", "size")

    def __init__(self) -> None:
        self.size = 0
        self._hashes: list[bytes] = []

    @classmethod
    def restore(cls, size: int, hashes: Iterable[bytes]) -> Frontier:
        """Go on with a tree.

        Args:
            size: number of its leaves.
            hashes: its `hashes`.

        Raises:
            ValueError: they do not belong to a tree of that size.
        """
        tree = cls()
        tree._hashes = list(hashes)
        tree.size = size
        if size < 0 or len(tree._hashes) != size.bit_count():
            raise ValueError(f"a tree of {size} leaves is not kept in {len(tree._hashes)} hashes")
        if not _are_hashes(*tree._hashes):
            raise ValueError("a hash of a tree has 32 bytes")
        return tree

    def __repr__(self) -> str:
        return f"<Frontier size={self.size}>"

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """Roots of the full parts, from left to right, each smaller than the one before it."""
        return tuple(self._hashes)

    def append(self, leaf: bytes) -> None:
        """Add a leaf, given by its hash of 32 bytes."""
        hashes = self._hashes
        rest = self.size
        while rest & 1:  # a part of the same size stands to the left
            leaf = sha256(b"\1" + hashes.pop() + leaf).digest()
            rest >>= 1
        hashes.append(leaf)
        self.size += 1

    def root(self) -> bytes:
        """Return the root of the tree as it is now."""
        if not self._hashes:
            return EMPTY_ROOT
        *others, root = self._hashes
        for left in reversed(others):
            root = node_hash(left, root)
        return root


class Tree:
    """A whole tree, for many proofs: some 64 bytes for each leaf.

    Args:
        leaves: hashes of its leaves.
    """

    def __init__(self, leaves: Iterable[bytes]) -> None:
        level = b"".join(leaves)
        self.size = len(level) // HASH_SIZE
        self._levels = [level]  # roots of the full parts of 1, 2, 4 … leaves
        while len(level) >= 2 * HASH_SIZE:
            step = 2 * HASH_SIZE
            starts = range(0, len(level) - step + 1, step)
            level = b"".join([sha256(b"\1" + level[at : at + step]).digest() for at in starts])
            self._levels.append(level)

    def root(self) -> bytes:
        """Return the root."""
        return self._root(0, self.size) if self.size else EMPTY_ROOT

    def proof(self, index: int, size: int | None = None) -> list[bytes]:
        """Prove that a leaf is in the tree, as `inclusion_proof` does.

        Args:
            index: position of the leaf, from 0.
            size: number of leaves of an earlier tree, that this one begins with; its own if None.

        Raises:
            ValueError: there is no such leaf, or there are fewer leaves.
        """
        size = self.size if size is None else size
        if size > self.size:
            raise ValueError(f"fewer than {size} leaves")
        return [self._root(low, high) for low, high in _beside(index, size)]

    def _root(self, low: int, high: int) -> bytes:
        size = high - low
        if size & (size - 1) == 0:
            at = (low >> (size.bit_length() - 1)) * HASH_SIZE
            return self._levels[size.bit_length() - 1][at : at + HASH_SIZE]
        middle = low + _left_part(size)
        return node_hash(self._root(low, middle), self._root(middle, high))


def inclusion_proof(leaves: Iterable[bytes], index: int, size: int) -> list[bytes]:
    """Prove that a leaf is in a tree (RFC 9162, section 2.1.3.1).

    Args:
        leaves: hashes of the tree's leaves. They are read once, in order, and not kept.
        index: position of the leaf, from 0.
        size: number of leaves of the tree; more may follow.

    Returns:
        The hashes beside the path from the leaf to the root.

    Raises:
        ValueError: there is no such leaf, or there are fewer leaves.
    """
    return _roots(leaves, _beside(index, size))


def consistency_proof(leaves: Iterable[bytes], old: int, size: int) -> list[bytes]:
    """Prove that a tree begins with all leaves of an older one (RFC 9162, section 2.1.4.1).

    Args:
        leaves: hashes of the tree's leaves. They are read once, in order, and not kept.
        old: number of leaves of the older tree. Without any, or with all, the proof is empty.
        size: number of leaves of the tree; more may follow.

    Returns:
        The hashes from which both roots follow.

    Raises:
        ValueError: the older tree is larger, or there are fewer leaves.
    """
    if not 0 <= old <= size:
        raise ValueError(f"a tree of {size} leaves does not begin with one of {old}")
    if old == 0:
        return []
    low, high = 0, size
    parts = []
    while high != old:
        middle = low + _left_part(high - low)
        if old <= middle:
            parts.append((middle, high))
            high = middle
        else:
            parts.append((low, middle))
            low = middle
    if low:  # else it is the older tree itself, whose root the verifier has
        parts.append((low, high))
    return _roots(leaves, parts[::-1])


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> bool:
    """Tell whether a leaf is in a tree (RFC 9162, section 2.1.3.2).

    Args:
        leaf: hash of the leaf.
        index: its position, from 0.
        size: number of leaves of the tree.
        proof: what `inclusion_proof` returned.
        root: root of the tree.
    """
    if not 0 <= index < size or not _are_hashes(leaf, root, *proof):
        return False
    at, last = index, size - 1  # of the node on the path, and of the last one, in each level
    found = leaf
    for other in proof:
        if last == 0:
            return False
        if at & 1 or at == last:
            found = node_hash(other, found)
            at, last = _above_lone(at, last)
        else:
            found = node_hash(found, other)
        at >>= 1
        last >>= 1
    return last == 0 and found == root


def verify_consistency(
    old_size: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]
) -> bool:
    """Tell whether a tree begins with all leaves of an older one (RFC 9162, section 2.1.4.2).

    Args:
        old_size: number of leaves of the older tree. Without any, its root must be `EMPTY_ROOT`.
        old_root: its root.
        size: number of leaves of the tree.
        root: its root.
        proof: what `consistency_proof` returned.
    """
    if not 0 <= old_size <= size or not _are_hashes(old_root, root, *proof):
        return False
    if old_size == 0:
        return not proof and old_root == EMPTY_ROOT and (size > 0 or root == EMPTY_ROOT)
    if old_size == size:
        return not proof and old_root == root
    path = list(proof)
    if old_size & (old_size - 1) == 0:  # one full part, which is not sent
        path.insert(0, old_root)
    return bool(path) and _both_roots(old_size, size, path) == (old_root, root)


def _both_roots(old_size: int, size: int, path: list[bytes]) -> tuple[bytes, bytes] | None:
    at, last = old_size - 1, size - 1
    while at & 1:
        at >>= 1
        last >>= 1
    older = newer = path[0]
    for other in path[1:]:
        if last == 0:
            return None
        if at & 1 or at == last:
            older = node_hash(other, older)
            newer = node_hash(other, newer)
            at, last = _above_lone(at, last)
        else:
            newer = node_hash(newer, other)
        at >>= 1
        last >>= 1
    return (older, newer) if last == 0 else None


def _beside(index: int, size: int) -> list[tuple[int, int]]:
    """Return the parts of a tree beside the path from a leaf to the root."""
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has none at {index}")
    low, high = 0, size
    beside = []
    while high - low > 1:
        middle = low + _left_part(high - low)
        if index < middle:
            beside.append((middle, high))
            high = middle
        else:
            beside.append((low, middle))
            low = middle
    return beside[::-1]


def _above_lone(at: int, last: int) -> tuple[int, int]:
    """Go up to the level in which a node without a right neighbour has a left one."""
    while at and not at & 1:
        at >>= 1
        last >>= 1
    return at, last


def _left_part(size: int) -> int:
    """Return the largest power of two that is smaller; the size is 2 or more."""
    return 1 << ((size - 1).bit_length() - 1)


def _roots(leaves: Iterable[bytes], parts: list[tuple[int, int]]) -> list[bytes]:
    """Return the roots of parts of a tree, none of which lies within another one."""
    found = {}
    ahead = iter(leaves)
    done = 0
    for low, high in sorted(parts):
        part = Frontier()
        for leaf in islice(ahead, low - done, high - done):
            part.append(leaf)
        if part.size < high - low:
            raise ValueError(f"fewer than {high} leaves")
        found[low] = part.root()
        done = high
    return [found[low] for low, _ in parts]


def _are_hashes(*hashes: bytes) -> bool:
    return all(len(each) == HASH_SIZE for each in hashes)
