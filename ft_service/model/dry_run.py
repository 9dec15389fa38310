"""Loading without loading: the loader's own arithmetic for every rank of a world that need not exist.

The model is built on the meta device from its real shape, and every rank is asked what the loader would ask of it:
which bytes it reads, what rests with it, and what it holds at its fullest moment. 405B on 64 ranks takes seconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ft_service.catalog.models import ModelShape
from ft_service.errors import ModelError
from ft_service.model import nf4
from ft_service.model.load import ParameterRead, build, plan_reads, weight_shapes
from ft_service.model.shards import Partitioning, Span, num_blocks, partition_numel
from ft_service.model.weight_files import ITEM_BYTES, TensorEntry

_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class RankLoad:
    """What one rank does and holds, in bytes."""

    rank: int
    read: int
    held: int
    """Its partitions with their padding, and under hpZ its part of the node's copy."""
    statistics: int
    """Of 4-bit weights; whole on every rank."""
    peak: int
    """At the fullest moment of loading, beside what the process itself takes."""


@dataclass(frozen=True)
class DryRun:
    """One world's loading."""

    four_bit: bool
    world_size: int
    node_size: int
    """Ranks that share a copy of their own (hpZ); 1 without."""
    num_parameters: int
    checkpoint_bytes: int
    largest_layer_bytes: int
    """Of a decoder layer in the file's type: what holding a whole one would take."""
    ranks: list[RankLoad]

    @property
    def fullest(self) -> RankLoad:
        return max(self.ranks, key=lambda rank: rank.peak)


def tensors_from_shape(shape: ModelShape, dtype: str = "BF16") -> tuple[LlamaConfig, dict[str, TensorEntry]]:
    """Config and tensors of a checkpoint of that shape, in files of 5 GB, as on the hub."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied_embeddings,
    )
    tensors: dict[str, TensorEntry] = {}
    number, used = 1, 0
    for name, lengths in weight_shapes(build(config, torch.bfloat16, four_bit=False)).items():
        entry = TensorEntry("", dtype, lengths, 0, 0)
        nbytes = entry.numel * ITEM_BYTES[dtype]
        if used and used + nbytes > _FILE_BYTES:
            number, used = number + 1, 0
        tensors[name] = TensorEntry(f"model-{number:05d}.safetensors", dtype, lengths, used, nbytes)
        used += nbytes
    return config, tensors


def dry_run(
    config: LlamaConfig,
    tensors: dict[str, TensorEntry],
    *,
    four_bit: bool,
    world_size: int,
    node_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> DryRun:
    """What every rank of a ZeRO-3 world of that size would do.

    Raises `ModelError` if the tensors are not those of the model, or if the partitions do not add up to every
    parameter exactly once.
    """
    model = build(config, dtype, four_bit)
    per_rank = [plan_reads(model, tensors, Partitioning(rank, world_size, node_size)) for rank in range(world_size)]
    for fills in zip(*per_rank, strict=True):
        _adds_up([fill.held[0] for fill in fills], model.get_parameter(fills[0].name).numel(), fills[0].name)
        _covers([fill.read[0] for fill in fills], fills[0])
    ranks = [
        _load(model, fills, Partitioning(rank, world_size, node_size), dtype, device) for rank, fills in enumerate(per_rank)
    ]
    linears = [entry.nbytes for name, entry in tensors.items() if name.startswith("model.layers.0.")]
    return DryRun(
        four_bit=four_bit,
        world_size=world_size,
        node_size=node_size,
        num_parameters=sum(fill.entry.numel for fill in per_rank[0]),
        checkpoint_bytes=sum(entry.nbytes for entry in tensors.values()),
        largest_layer_bytes=sum(linears),
        ranks=ranks,
    )


def _load(
    model: LlamaForCausalLM, fills: Iterable[ParameterRead], sharing: Partitioning, dtype: torch.dtype, device: str
) -> RankLoad:
    read = held = statistics = peak = 0
    for fill in fills:
        numel = model.get_parameter(fill.name).numel()
        aligned = partition_numel(numel, sharing.world_size) * sharing.world_size
        held += aligned // sharing.world_size * dtype.itemsize
        held += aligned // sharing.node_size * dtype.itemsize if sharing.node_size > 1 else 0
        read += fill.bytes_read
        if fill.weights_per_element:
            statistics += nf4.statistics_bytes(fill.entry.numel)
        peak = max(peak, held + statistics + fill.transient_bytes(sharing, dtype, device))
    return RankLoad(sharing.rank, read, held, statistics, peak)


def _adds_up(spans: list[Span], numel: int, name: str) -> None:
    reached = 0
    for span in spans:
        if span.start != reached and len(span):
            raise ModelError(
                f"{name}: partitions leave out or repeat elements at {reached:,}. This is a fault of ours."
            )
        reached += len(span)
    if reached != numel:
        raise ModelError(f"{name}: partitions hold {reached:,} of {numel:,} elements. This is a fault of ours.")


def _covers(reads: list[Span], fill: ParameterRead) -> None:
    """Each weight is read by whoever holds it; where 4-bit blocks are cut, by two."""
    reached = 0
    for span in reads:
        if len(span) and span.start > reached:
            raise ModelError(f"{fill.name}: weights from {reached:,} on are not read. This is a fault of ours.")
        reached = max(reached, span.stop)
    if num_blocks(Span(0, reached)) != num_blocks(Span(0, fill.entry.numel)):
        raise ModelError(f"{fill.name}: {reached:,} of {fill.entry.numel:,} weights are read. This is a fault of ours.")
