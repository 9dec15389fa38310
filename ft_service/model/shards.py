"""Which rank holds which elements: the arithmetic of ZeRO-3's partitions and of 4-bit blocks. No torch.

ZeRO-3 flattens each parameter and splits it into one partition per rank, each of ceil(numel / ranks) elements; the last
partitions are padded (Rajbhandari et al. 2020, arXiv:1910.02054).
"""

from dataclasses import dataclass

from ft_service.plan.partitions import NF4_BLOCK, num_nf4_blocks, partition_numel

__all__ = ["NF4_BLOCK", "Partitioning", "Span", "num_blocks", "partition", "partition_numel", "whole_blocks"]


@dataclass(frozen=True)
class Span:
    """Elements [start, stop) of a flattened tensor."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Partitioning:
    """The number of ranks that parameters are partitioned among, and which of them this one is.

    `node_size` > 1 means a second copy, partitioned among the ranks of each node (ZeRO++ hpZ, arXiv:2306.10209). The
    ranks of a node are then consecutive.
    """

    rank: int = 0
    world_size: int = 1
    node_size: int = 1

    def spans(self, numel: int) -> list[Span]:
        """What this rank holds of a parameter: its partition and, under hpZ, its partition of the node's copy."""
        held = [partition(numel, self.world_size, self.rank)]
        if self.node_size > 1:
            # The node's copy has the padded length, so that its partitions start at boundaries of the global ones.
            padded = self.world_size * partition_numel(numel, self.world_size)
            held.append(partition(numel, self.node_size, self.rank % self.node_size, padded))
        return held


def partition(numel: int, parts: int, index: int, padded_numel: int | None = None) -> Span:
    """The elements of partition `index` of `parts`, without padding; may be empty."""
    size = partition_numel(padded_numel or numel, parts)
    return Span(min(numel, index * size), min(numel, (index + 1) * size))


def whole_blocks(packed: Span, weights_per_element: int, num_weights: int) -> Span:
    """The weights of all 4-bit blocks that a span of packed elements overlaps."""
    start = packed.start * weights_per_element // NF4_BLOCK * NF4_BLOCK
    stop = -(-packed.stop * weights_per_element // NF4_BLOCK) * NF4_BLOCK
    return Span(min(start, num_weights), min(stop, num_weights)) if len(packed) else Span(start, start)


def num_blocks(weights: Span) -> int:
    """Number of 4-bit blocks in a span of weights. The span must start at a block."""
    return num_nf4_blocks(len(weights))
