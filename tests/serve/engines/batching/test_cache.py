"""Bookkeeping of the key/value cache: no block has two owners who did not agree to share it."""

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.engines.batching.cache import BlockPool, first_key, next_key

NUM_BLOCKS = 6
contents = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
"""Of full blocks of one token each; few values, so that many begin alike."""


def keys_of(tokens, adapter=None) -> list[bytes]:
    keys = [first_key(adapter)]
    for token in tokens:
        keys.append(next_key(keys[-1], [token]))
    return keys[1:]


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, share what they find, publish what they filled, and go. A model knows what every block holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.sequences: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(tokens=contents)
    def come(self, tokens):
        keys = keys_of(tokens)
        num_found, num_unused = self.pool.count_found(keys)
        num_new = len(tokens) - num_found
        if num_new + num_unused > self.pool.num_available:
            return
        blocks = self.pool.share(keys[:num_found])
        for number, block in enumerate(blocks, 1):
            assert self.content[block] == tokens[:number], "a found block holds other tokens"
        in_use = {block for sequence in self.sequences for block in sequence}
        new = self.pool.allocate(num_new)
        assert not in_use & set(new), "a block in use was given away"
        assert not set(blocks) & set(new)
        blocks += new
        for number, (block, key) in enumerate(zip(blocks, keys, strict=True), 1):
            self.content[block] = tokens[:number]
            self.pool.publish(block, key)
        self.sequences.append(blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def go(self, data):
        blocks = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        still_used = {block for sequence in self.sequences for block in sequence}
        assert not still_used & set(self.pool.release(blocks))

    @invariant()
    def every_block_is_used_or_available(self):
        used = Counter(block for sequence in self.sequences for block in sequence)
        assert self.pool.num_used == len(used)
        assert self.pool.num_available == NUM_BLOCKS - len(used)


TestPool = PoolMachine.TestCase


def test_the_least_recently_used_block_is_reclaimed_first_and_a_prefix_last():
    pool = BlockPool(4)
    old, recent = keys_of((1, 2)), keys_of((3, 4))
    for keys in (old, recent):
        blocks = pool.allocate(2)
        for block, key in zip(blocks, keys, strict=True):
            pool.publish(block, key)
        pool.release(blocks)
    pool.allocate(1)
    assert pool.count_found(old) == (1, 1)
    pool.allocate(1)
    assert pool.count_found(old) == (0, 0)
    assert pool.count_found(recent) == (2, 2)


def test_adapters_never_find_each_others_blocks():
    tokens = (1, 2, 3)
    keys = [keys_of(tokens, adapter) for adapter in (None, "a" * 64, "b" * 64)]
    assert len({key for chain in keys for key in chain}) == 3 * len(tokens)


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="5 blocks asked for, 4 available"):
        BlockPool(4).allocate(5)
