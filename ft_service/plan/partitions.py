"""How ZeRO partitions parameters over workers, and how NF4 divides weights into blocks: counts of elements.

ZeRO-3 flattens each parameter and cuts it into one partition per worker, all of ceil(numel / workers) elements, the
last ones padded (Rajbhandari et al. 2020, arXiv:1910.02054). ZeRO-1 and 2 cut the flat buffer of an optimizer group.
"""

NF4_BLOCK = 64
"""Weights that share one scale (QLoRA, arXiv:2305.14314)."""
_FLAT_BUFFER_ALIGNMENT = 2
"""ZeRO-1 and 2 pad a group's flat buffer until every partition starts at a multiple of this many elements."""


def partition_numel(numel: int, parts: int) -> int:
    """Elements that every worker allocates for its partition of one parameter, padding included."""
    return -(-numel // parts)


def flat_partition_numel(numel: int, parts: int) -> int:
    """Elements that every worker allocates for its partition of a flat buffer under ZeRO-1 and 2, padding included."""
    return _FLAT_BUFFER_ALIGNMENT * partition_numel(numel, _FLAT_BUFFER_ALIGNMENT * parts)


def num_nf4_blocks(num_weights: int) -> int:
    """Blocks of `num_weights` weights, counted from the start of a block; the last block may be partly filled."""
    return -(-num_weights // NF4_BLOCK)
