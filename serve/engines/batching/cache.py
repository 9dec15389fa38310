"""Bookkeeping of the key/value cache: blocks with reference counts, and a prefix cache. Knows no tensors.

Keys and values of a sequence are in blocks of a fixed number of tokens, anywhere in a pool of fixed size. A full block
is known by its key: a hash over the adapter and all tokens up to the block's end. Sequences with the same beginning
share its blocks, and a block that no sequence uses stays findable until its place is needed.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

_KEY_BYTES = 16

BlockKey = bytes


def first_key(adapter_digest: str | None) -> BlockKey:
    """What the chain of keys of an adapter, or of the base, starts with: weights never share keys and values."""
    return _hashed(b"base" if adapter_digest is None else b"adapter " + adapter_digest.encode())


def next_key(before: BlockKey, token_ids: Sequence[int]) -> BlockKey:
    """Key of the full block with these tokens, after the block of key `before`.

    Trap: a hash that others can steer would let one user's prompt find another's blocks, so it is a cryptographic one.
    """
    return _hashed(before + array("q", token_ids).tobytes())


def _hashed(content: bytes) -> BlockKey:
    return hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()


class BlockPool:
    """Which of `num_blocks` blocks are free, in use, or unused but findable by their key.

    Every block is in exactly one of these states. Not safe between threads.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._key_of: dict[int, BlockKey] = {}
        self._block_of: dict[BlockKey, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Blocks with a key and without users, least recently used first."""

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free ones, and those that are only kept for their key."""
        return len(self._free) + len(self._unused)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with one user each: free ones first, then the least recently used. Raises if too few."""
        if count > self.num_available:
            raise ValueError(f"{count} blocks asked for, {self.num_available} available")
        blocks = [self._free.pop() if self._free else self._reclaim() for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
        return blocks

    def count_found(self, keys: Iterable[BlockKey]) -> tuple[int, int]:
        """How many of the first keys have a block, and how many of those have no user at present."""
        num_found = 0
        num_unused = 0
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            num_found += 1
            num_unused += self._users[block] == 0
        return num_found, num_unused

    def share(self, keys: Iterable[BlockKey]) -> list[int]:
        """Use the blocks of these keys, all of which must have one."""
        blocks = [self._block_of[key] for key in keys]
        for block in blocks:
            if self._users[block] == 0:
                del self._unused[block]
            self._users[block] += 1
        return blocks

    def publish(self, block: int, key: BlockKey) -> None:
        """Make a full block findable. If another block has this key already, `block` stays private."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> list[int]:
        """End one use of each of a sequence's blocks, given in order. Returns those that are free now.

        A block that is found leads on to the next one, so the last is the first to be reclaimed.
        """
        freed = []
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._key_of:
                self._unused[block] = None
            else:
                self._free.append(block)
                freed.append(block)
        return freed

    def _reclaim(self) -> int:
        block, _ = self._unused.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
