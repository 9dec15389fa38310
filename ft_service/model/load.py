"""Loading a base: each rank reads only the bytes of its own share of each weight.

The model is built on the meta device, where weights take no memory. Then, for one parameter after the other, the
placement allocates this rank's share, and a few threads read chunks of the file directly into it; for a 4-bit base they
quantise each chunk. Under ZeRO-3 no rank ever holds a whole weight, and the ranks exchange only the scales of 4-bit
blocks.
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from ft_service.errors import ModelError
from ft_service.model import nf4
from ft_service.model.attention import PACKED_ATTENTION, register_packed_attention
from ft_service.model.light_imports import plain_shapes
from ft_service.model.shards import Partitioning, Span, num_blocks, partition, whole_blocks
from ft_service.model.weight_files import TensorEntry, WeightFiles

CHUNK_BYTES = 16 * 1024 * 1024
QUANTISING_BYTES_PER_WEIGHT = 30  # temporary: bitsandbytes' fp32 copies, indices and packed results
# On a CPU a chunk fits in the cache; on a GPU it is large enough to keep the GPU busy.
NF4_CHUNK_WEIGHTS = {"cpu": 64 * 1024, "cuda": 2 * 1024 * 1024}
_READERS = min(8, os.cpu_count() or 1)

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Progress = Callable[[int, int], None]
"""Called with the bytes that this rank has read so far, and in total."""


class WeightPlacement(Protocol):
    """Where the weights of a model are kept: whole or partitioned, and on which device."""

    partitioning: Partitioning
    device: torch.device

    def allocate(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        """Allocate this rank's share of `parameter`, whose data is a placeholder of the right shape and dtype.

        Returns the flat tensors to fill, one for each of `partitioning.spans`. They may be longer than the span: the
        rest is padding.
        """

    def finish(self, parameter: nn.Parameter) -> None:
        """Called once the tensors that `allocate` returned are filled."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n] on each of W ranks -> [W, n] on each."""


class WholeWeights:
    """Keeps every weight whole on this rank: for ZeRO-0 to 2, inference and merging."""

    partitioning = Partitioning()

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def allocate(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
        return [parameter.data.view(-1)]

    def finish(self, parameter: nn.Parameter) -> None:
        pass

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)


@torch.inference_mode(False)  # threads do not inherit it, and must not write to inference tensors
def load_causal_lm(
    weight_files: WeightFiles,
    *,
    dtype: torch.dtype,
    four_bit: bool = False,
    placement: WeightPlacement | None = None,
    attention: str = PACKED_ATTENTION,
    progress: Progress | None = None,
) -> LlamaForCausalLM:
    """Load a model in `dtype`; with `four_bit`, the linear layers of its decoder are in NF4.

    Bit for bit the same as `transformers` loads. If `placement` partitions weights, every rank must call this. Raises
    `ModelError` with all missing, unexpected and wrongly shaped tensors before it reads any weight.
    """
    placement = placement or WholeWeights()
    weight_files.check()
    model = meta_model(weight_files, dtype, four_bit, attention)
    reads = plan_reads(model, weight_files.tensors, placement.partitioning)
    owners = _owners_of_parameters(model)
    total = sum(read.bytes_read for read in reads)
    done = 0
    with ThreadPoolExecutor(_READERS, thread_name_prefix="weights") as threads:
        for read in reads:
            parameter = _placeholder(owners[read.name], placement.device)
            targets = placement.allocate(parameter)
            if read.weights_per_element:
                _read_4bit(weight_files, read, parameter, owners[read.name][0][0], targets, placement, threads)
            else:
                _read_parameter(weight_files, read, targets, threads)
            placement.finish(parameter)
            for module, attribute in owners[read.name]:
                module._parameters[attribute] = parameter
            done += read.bytes_read
            if progress is not None:
                progress(done, total)
    weight_files.close()
    # No file contains this buffer, and on the meta device it has no values.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(placement.device)
    return model.eval()


def stream_weights(weight_files: WeightFiles, model: LlamaForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and values of each weight of `model`, a meta model, in its dtype on the CPU; keeps none of them.

    Raises `ModelError` as `load_causal_lm` does.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    reads = plan_reads(model, weight_files.tensors, Partitioning())
    with ThreadPoolExecutor(_READERS, thread_name_prefix="weights") as threads:
        for read in reads:
            weight = torch.empty(read.entry.shape, dtype=dtypes[read.name])
            _read_parameter(weight_files, read, [weight.view(-1)], threads)
            yield read.name, weight
            del weight  # free it before the next one is allocated
    weight_files.close()


def meta_model(weight_files: WeightFiles, dtype: torch.dtype, four_bit: bool, attention: str) -> LlamaForCausalLM:
    """The model of these files on the meta device, where weights take no memory."""
    register_packed_attention()
    config = LlamaConfig.from_dict(copy.deepcopy(weight_files.config), attn_implementation=attention)
    config._name_or_path = weight_files.location
    model = meta_model_of(config, dtype, four_bit)
    if (generation := weight_files.json_file("generation_config.json")) is not None:
        model.generation_config = GenerationConfig.from_dict(generation)
    return model


def meta_model_of(config: LlamaConfig, dtype: torch.dtype, four_bit: bool) -> LlamaForCausalLM:
    """The model of a config on the meta device."""
    config.dtype = dtype
    # The constructor, because from_config and from_pretrained allocate and partition weights under ZeRO-3.
    with plain_shapes(), torch.device("meta"):
        model = LlamaForCausalLM(config)
        model.to(dtype=dtype)  # type: ignore[call-arg]
    if four_bit:
        nf4.make_linears_4bit(model, dtype)
    return model


# -- planning what to read -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterRead:
    """One parameter on one rank: which of its elements the rank holds, and which weights it reads for them."""

    name: str
    entry: TensorEntry
    held: list[Span]
    """Elements of the parameter; packed ones if it is 4-bit"""
    read: list[Span]
    """Elements of the tensor in the file: whole blocks if the parameter is 4-bit"""
    weights_per_element: int
    """Of a packed 4-bit parameter; otherwise 0."""

    @property
    def bytes_read(self) -> int:
        return sum(len(span) for span in self.read) * self.entry.item_bytes

    def transient_bytes(self, partitioning: Partitioning, dtype: torch.dtype, device: str = "cpu") -> int:
        """Peak of the temporary memory while reading: one chunk per thread, and the scales of 4-bit blocks."""
        if not self.weights_per_element:
            direct = device == "cpu" and _TORCH_DTYPES[self.entry.dtype] == dtype
            chunk = min(CHUNK_BYTES, max(len(span) for span in self.read) * self.entry.item_bytes)
            return 0 if direct else _READERS * chunk
        blocks = num_blocks(Span(0, self.entry.numel))
        own = max(num_blocks(span) for span in self.read)
        # Own scales; scales of the whole tensor, these minus their mean, and a copy.
        scales = 4 * (sum(num_blocks(span) for span in self.read) + 3 * blocks)
        if partitioning.world_size > 1:
            scales += 4 * own * (1 + partitioning.world_size)  # padded, and gathered
        chunk = min(NF4_CHUNK_WEIGHTS[device], max(len(span) for span in self.read))
        return _READERS * chunk * QUANTISING_BYTES_PER_WEIGHT + scales


def plan_reads(model: nn.Module, tensors: Mapping[str, TensorEntry], partitioning: Partitioning) -> list[ParameterRead]:
    """What a rank reads to fill `model`, a meta model, in the order of the files.

    Raises `ModelError` with all differences between the tensors in the files and the model's parameters.
    """
    parameters = dict(model.named_parameters())
    shapes = weight_shapes(model)
    _check_tensors(tensors, shapes, tied=set(dict(model.named_parameters(remove_duplicate=False))) - set(parameters))
    reads = []
    for name, entry in tensors.items():
        if name not in parameters:
            continue
        parameter = parameters[name]
        packing = 2 * parameter.element_size() if nf4.is_packed(parameter) else 0
        held = partitioning.spans(parameter.numel())
        read = [whole_blocks(span, packing, entry.numel) for span in held] if packing else held
        reads.append(ParameterRead(name, entry, held, read, packing))
    return reads


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter of a meta model as in the files: 4-bit parameters before packing."""
    linears = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        name: (linears[name].out_features, linears[name].in_features) if nf4.is_packed(p) else tuple(p.shape)
        for name, p in model.named_parameters()
    }


def _check_tensors(tensors: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]], tied: set[str]) -> None:
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    for name, entry in tensors.items():
        if name in shapes and entry.shape != shapes[name]:
            problems.append(f"{name} has shape {list(entry.shape)} instead of {list(shapes[name])}")
        elif name in shapes and entry.dtype not in _TORCH_DTYPES:
            problems.append(f"{name} is {entry.dtype}, not one of {', '.join(_TORCH_DTYPES)}")
        # Files may contain a tied head as well as the embedding, and old converters stored the rotary frequencies.
        elif name not in shapes and name not in tied and not name.endswith("rotary_emb.inv_freq"):
            problems.append(f"{name} is not part of the model")
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ModelError(
            f"model.base: its tensors do not match its config.json:{shown}{more}\n"
            "Fetch config and weights of the same model again."
        )


# -- reading ---------------------------------------------------------------------------------------------------------


def _read_parameter(
    weight_files: WeightFiles, read: ParameterRead, targets: list[torch.Tensor], threads: ThreadPoolExecutor
) -> None:
    """Read each span into its target; the rest of a target is padding, and set to zero."""

    def read_chunk(chunk: Span, target: torch.Tensor) -> None:
        if target.device.type == "cpu" and target.dtype == _TORCH_DTYPES[read.entry.dtype]:
            weight_files.read_into(read.entry, chunk.start, _bytes_of(target))
        else:
            target.copy_(_read_values(weight_files, read.entry, chunk))

    work = []
    for span, target in zip(read.read, targets, strict=True):
        target[len(span) :].zero_()
        for chunk in _chunks(span, CHUNK_BYTES // read.entry.item_bytes):
            work.append(threads.submit(read_chunk, chunk, target[chunk.start - span.start : chunk.stop - span.start]))
    _wait(work)


def _read_4bit(
    weight_files: WeightFiles,
    read: ParameterRead,
    parameter: nn.Parameter,
    linear: nn.Module,
    targets: list[torch.Tensor],
    placement: WeightPlacement,
    threads: ThreadPoolExecutor,
) -> None:
    """Read and quantise every block that overlaps a span, keep the elements in the span, and exchange the scales."""
    dtype = parameter.dtype
    # A span may start and end inside a block: the scales of both blocks belong to it.
    scales = [torch.empty(num_blocks(span), device=placement.device) for span in read.read]

    def quantise_chunk(chunk: Span, weights: Span, held: Span, target: torch.Tensor, scale: torch.Tensor) -> None:
        values = _read_values(weight_files, read.entry, chunk).to(placement.device, dtype)
        packed, chunk_scales = nf4.quantise(values, dtype)
        first_block = (chunk.start - weights.start) // nf4.NF4_BLOCK
        scale[first_block : first_block + len(chunk_scales)] = chunk_scales
        first = chunk.start // read.weights_per_element  # of the packed elements
        begin = max(first, held.start)
        end = min(first + len(packed), held.stop)
        target[begin - held.start : end - held.start] = packed[begin - first : end - first]

    work = []
    for held, weights, target, scale in zip(read.held, read.read, targets, scales, strict=True):
        target[len(held) :].zero_()
        for chunk in _chunks(weights, NF4_CHUNK_WEIGHTS[placement.device.type]):
            work.append(threads.submit(quantise_chunk, chunk, weights, held, target, scale))
    _wait(work)
    whole = _gather_scales(scales[0], read, placement)
    nf4.attach_statistics(parameter, linear, whole, torch.Size(read.entry.shape))


def _gather_scales(scales: torch.Tensor, read: ParameterRead, placement: WeightPlacement) -> torch.Tensor:
    """The scales of all blocks of a tensor, from those of each rank."""
    world_size = placement.partitioning.world_size
    if world_size == 1:
        return scales
    packed_numel = read.entry.numel // read.weights_per_element
    per_rank = [
        whole_blocks(partition(packed_numel, world_size, rank), read.weights_per_element, read.entry.numel)
        for rank in range(world_size)
    ]
    padded = torch.zeros(max(num_blocks(weights) for weights in per_rank), device=scales.device)
    padded[: len(scales)] = scales
    gathered = placement.all_gather(padded)
    whole = torch.empty(num_blocks(Span(0, read.entry.numel)), device=scales.device)
    for weights, rank_scales in zip(per_rank, gathered, strict=True):
        first = weights.start // nf4.NF4_BLOCK
        count = num_blocks(weights)
        whole[first : first + count] = rank_scales[:count]
    return whole


def _read_values(weight_files: WeightFiles, entry: TensorEntry, chunk: Span) -> torch.Tensor:
    staging = torch.empty(len(chunk), dtype=_TORCH_DTYPES[entry.dtype])
    weight_files.read_into(entry, chunk.start, _bytes_of(staging))
    return staging


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _chunks(span: Span, size: int) -> Iterator[Span]:
    for start in range(span.start, span.stop, size):
        yield Span(start, min(start + size, span.stop))


def _wait(work: Iterable[Future[None]]) -> None:
    for future in work:
        future.result()


# -- parameters ------------------------------------------------------------------------------------------------------


def _owners_of_parameters(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Name of each parameter -> every module and attribute that holds it; tied parameters have two."""
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    name_of: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = name_of.setdefault(id(parameter), f"{prefix}.{attribute}")
                owners.setdefault(name, []).append((module, attribute))
    return owners


def _placeholder(owners: list[tuple[nn.Module, str]], device: torch.device) -> nn.Parameter:
    """The owners' meta parameter on `device`: the same shape and dtype, in the memory of one element."""
    module, attribute = owners[0]
    meta = module._parameters[attribute]
    assert meta is not None
    data = torch.empty(1, dtype=meta.dtype, device=device).expand(meta.shape)
    return nf4.packed_parameter(data) if nf4.is_packed(meta) else nn.Parameter(data, requires_grad=meta.requires_grad)
