"""Dry run of loading: what every rank would read and hold, computed without weights and without ranks.

The model is built on the meta device with its real shape. The loader's own arithmetic then gives, for every rank, the
bytes it reads, the bytes it holds, and its peak memory. 405B on 64 ranks takes seconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ft_service.catalog.models import ModelShape
from ft_service.errors import ModelError
from ft_service.model import nf4
from ft_service.model.load import ParameterRead, meta_model_of, plan_reads, weight_shapes
from ft_service.model.shards import Partitioning, Span, num_blocks, partition_numel
from ft_service.model.weight_files import ITEM_BYTES, TensorEntry

_FILE_BYTES = 5 * 10**9
_BUG = "This is a bug; please report it."


@dataclass(frozen=True)
class RankLoad:
    """What one rank reads and holds, in bytes."""

    rank: int
    read: int
    held: int
    """Its partitions with padding, and under hpZ its partitions of the node's copy."""
    statistics: int
    """Quantisation statistics of 4-bit weights; whole on every rank."""
    peak: int
    """Highest total while loading, without the process itself."""


@dataclass(frozen=True)
class DryRun:
    """The result for one world size."""

    four_bit: bool
    world_size: int
    node_size: int
    """Ranks that share a second copy (hpZ); 1 without hpZ."""
    num_parameters: int
    checkpoint_bytes: int
    largest_layer_bytes: int
    """A whole decoder layer in the dtype of the file."""
    ranks: list[RankLoad]

    @property
    def fullest(self) -> RankLoad:
        return max(self.ranks, key=lambda rank: rank.peak)


def tensors_from_shape(shape: ModelShape, dtype: str = "BF16") -> tuple[LlamaConfig, dict[str, TensorEntry]]:
    """The config and tensors that a model of this shape has, in files of 5 GB as on the hub."""
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
    number = 1
    used = 0
    for name, lengths in weight_shapes(meta_model_of(config, torch.bfloat16, four_bit=False)).items():
        entry = TensorEntry("", dtype, lengths, 0, 0)
        nbytes = entry.numel * ITEM_BYTES[dtype]
        if used and used + nbytes > _FILE_BYTES:
            number += 1
            used = 0
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
    """What every rank would read and hold under ZeRO-3.

    Raises `ModelError` if the tensors are not those of the model, or if the partitions do not cover every element of
    every parameter exactly once.
    """
    model = meta_model_of(config, dtype, four_bit)
    per_rank = [plan_reads(model, tensors, Partitioning(rank, world_size, node_size)) for rank in range(world_size)]
    for reads in zip(*per_rank, strict=True):
        _check_held([read.held[0] for read in reads], model.get_parameter(reads[0].name).numel(), reads[0].name)
        _check_read([read.read[0] for read in reads], reads[0])
    ranks = [
        _load(model, reads, Partitioning(rank, world_size, node_size), dtype, device)
        for rank, reads in enumerate(per_rank)
    ]
    layer_bytes = [entry.nbytes for name, entry in tensors.items() if name.startswith("model.layers.0.")]
    return DryRun(
        four_bit=four_bit,
        world_size=world_size,
        node_size=node_size,
        num_parameters=sum(read.entry.numel for read in per_rank[0]),
        checkpoint_bytes=sum(entry.nbytes for entry in tensors.values()),
        largest_layer_bytes=sum(layer_bytes),
        ranks=ranks,
    )


def _load(
    model: LlamaForCausalLM, reads: Iterable[ParameterRead], partitioning: Partitioning, dtype: torch.dtype, device: str
) -> RankLoad:
    bytes_read = held = statistics = peak = 0
    for read in reads:
        numel = model.get_parameter(read.name).numel()
        aligned = partition_numel(numel, partitioning.world_size) * partitioning.world_size
        held += aligned // partitioning.world_size * dtype.itemsize
        held += aligned // partitioning.node_size * dtype.itemsize if partitioning.node_size > 1 else 0
        bytes_read += read.bytes_read
        if read.weights_per_element:
            statistics += nf4.statistics_bytes(read.entry.numel)
        peak = max(peak, held + statistics + read.transient_bytes(partitioning, dtype, device))
    return RankLoad(partitioning.rank, bytes_read, held, statistics, peak)


def _check_held(spans: list[Span], numel: int, name: str) -> None:
    reached = 0
    for span in spans:
        if span.start != reached and len(span):
            raise ModelError(f"{name}: partitions skip or repeat elements at {reached:,}. {_BUG}")
        reached += len(span)
    if reached != numel:
        raise ModelError(f"{name}: partitions hold {reached:,} of {numel:,} elements. {_BUG}")


def _check_read(spans: list[Span], read: ParameterRead) -> None:
    """Every weight is read by the rank that holds it; a 4-bit block that two ranks share is read by both."""
    reached = 0
    for span in spans:
        if len(span) and span.start > reached:
            raise ModelError(f"{read.name}: weights from {reached:,} on are not read. {_BUG}")
        reached = max(reached, span.stop)
    if num_blocks(Span(0, reached)) != num_blocks(Span(0, read.entry.numel)):
        raise ModelError(f"{read.name}: {reached:,} of {read.entry.numel:,} weights are read. {_BUG}")
