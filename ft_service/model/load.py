"""Loading: each process reads the bytes of its own share of each weight, and holds no more than that and a chunk.

The model is built on the meta device, where weights take no memory. Then, one parameter after the other: the placement
makes what rests on this process, chunks of its bytes are read straight into it by a few threads, and, for a 4-bit base,
quantised on the way. Under ZeRO-3 no weight is ever whole on any process, and only the scales of 4-bit blocks travel
between them; the rest is what the disk, or the object store, can deliver to all processes at once.
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
from ft_service.model.attention import PACKED_ATTENTION
from ft_service.model.shards import Partitioning, Span, num_blocks, partition, whole_blocks
from ft_service.model.weight_files import TensorEntry, WeightFiles

CHUNK_BYTES = 16 * 1024 * 1024
QUANTISING_BYTES_PER_WEIGHT = 30  # while it lasts: bitsandbytes' fp32 copies, indices and packed results
# On a CPU what its caches hold, on a GPU what keeps it busy.
NF4_CHUNK_WEIGHTS = {"cpu": 64 * 1024, "cuda": 2 * 1024 * 1024}
_READERS = min(8, os.cpu_count() or 1)

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Progress = Callable[[int, int], None]
"""Told how many bytes this process has read, and how many it will."""


class WeightPlacement(Protocol):
    """Where the weights of a model rest."""

    sharing: Partitioning
    device: torch.device

    def place(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        """Turn `parameter`, whose data is a stand-in of the right shape and type, into what rests on this process.

        Returns the flat tensors to be filled, one for each of `sharing.spans`; they may be longer than the span, by
        padding.
        """

    def settle(self, parameter: nn.Parameter) -> None:
        """The tensors that `place` gave are filled."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n] on each of W processes -> [W, n] on each."""


class WholeWeights:
    """Every weight whole, in this process: what ZeRO-0 to 2, inference and merging want."""

    sharing = Partitioning()

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def place(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
        return [parameter.data.view(-1)]

    def settle(self, parameter: nn.Parameter) -> None:
        pass

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)


@torch.inference_mode(False)  # reading threads are outside it, and may not write to tensors made inside
def load_causal_lm(
    checkpoint: WeightFiles,
    *,
    dtype: torch.dtype,
    four_bit: bool = False,
    placement: WeightPlacement | None = None,
    attention: str = PACKED_ATTENTION,
    progress: Progress | None = None,
) -> LlamaForCausalLM:
    """The model of a checkpoint in `dtype`, its decoder's linear layers in NF4 if `four_bit`.

    Equal bit for bit to what `transformers` loads. Every process of a shared `placement` must call it. Raises
    `ModelError` with every missing, unexpected or wrongly shaped tensor before it reads a weight.
    """
    placement = placement or WholeWeights()
    checkpoint.check()
    model = skeleton(checkpoint, dtype, four_bit, attention)
    fills = plan_reads(model, checkpoint.tensors, placement.sharing)
    homes = _homes(model)
    total, done = sum(fill.bytes_read for fill in fills), 0
    with ThreadPoolExecutor(_READERS, thread_name_prefix="weights") as threads:
        for fill in fills:
            parameter = _stand_in(homes[fill.name], placement.device)
            targets = placement.place(parameter)
            if fill.weights_per_element:
                _fill_4bit(checkpoint, fill, parameter, homes[fill.name][0][0], targets, placement, threads)
            else:
                _fill(checkpoint, fill, targets, threads)
            placement.settle(parameter)
            for module, attribute in homes[fill.name]:
                module._parameters[attribute] = parameter
            done += fill.bytes_read
            if progress is not None:
                progress(done, total)
    checkpoint.close()
    # A buffer that no checkpoint holds; on the meta device it has no values.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(placement.device)
    return model.eval()


def stream_weights(checkpoint: WeightFiles, model: LlamaForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of each weight of `model`, a skeleton, in its type, on the CPU: one after the other, none kept.

    Raises like `load_causal_lm`.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    fills = plan_reads(model, checkpoint.tensors, Partitioning())
    with ThreadPoolExecutor(_READERS, thread_name_prefix="weights") as threads:
        for fill in fills:
            weight = torch.empty(fill.entry.shape, dtype=dtypes[fill.name])
            _fill(checkpoint, fill, [weight.view(-1)], threads)
            yield fill.name, weight
            del weight  # before the next one takes its place
    checkpoint.close()


def skeleton(checkpoint: WeightFiles, dtype: torch.dtype, four_bit: bool, attention: str) -> LlamaForCausalLM:
    """The model of a checkpoint on the meta device."""
    config = LlamaConfig.from_dict(copy.deepcopy(checkpoint.config), attn_implementation=attention)
    config._name_or_path = checkpoint.location
    model = build(config, dtype, four_bit)
    if (generation := checkpoint.json_file("generation_config.json")) is not None:
        model.generation_config = GenerationConfig.from_dict(generation)
    return model


def build(config: LlamaConfig, dtype: torch.dtype, four_bit: bool) -> LlamaForCausalLM:
    """The model of a config on the meta device, where weights take no memory."""
    config.dtype = dtype
    # The constructor itself, since transformers' own ways partition (and allocate) under ZeRO-3.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        model.to(dtype=dtype)  # type: ignore[call-arg]
    if four_bit:
        nf4.make_linears_4bit(model, dtype)
    return model


# -- what is to be read ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterRead:
    """One parameter on one process: which of its elements rest here, and which of the tensor's are read for them."""

    name: str
    entry: TensorEntry
    held: list[Span]
    read: list[Span]
    weights_per_element: int
    """Of a 4-bit parameter, whose elements are packed; otherwise 0."""

    @property
    def bytes_read(self) -> int:
        return sum(len(span) for span in self.read) * self.entry.item_bytes

    def transient_bytes(self, sharing: Partitioning, dtype: torch.dtype, device: str = "cpu") -> int:
        """The most that filling takes beside what it leaves: chunks under way in all reading threads, and scales."""
        if not self.weights_per_element:
            direct = device == "cpu" and _TORCH_DTYPES[self.entry.dtype] == dtype
            chunk = min(CHUNK_BYTES, max(len(span) for span in self.read) * self.entry.item_bytes)
            return 0 if direct else _READERS * chunk
        blocks = num_blocks(Span(0, self.entry.numel))
        mine = max(num_blocks(span) for span in self.read)
        scales = 4 * (sum(num_blocks(span) for span in self.read) + 3 * blocks)  # own, whole, less their mean, a copy
        if sharing.world_size > 1:
            scales += 4 * mine * (1 + sharing.world_size)  # padded, and gathered
        chunk = min(NF4_CHUNK_WEIGHTS[device], max(len(span) for span in self.read))
        return _READERS * chunk * QUANTISING_BYTES_PER_WEIGHT + scales


def plan_reads(model: nn.Module, tensors: Mapping[str, TensorEntry], sharing: Partitioning) -> list[ParameterRead]:
    """What the process of `sharing` reads to fill `model`, a skeleton, in the order of the files.

    Raises `ModelError` with everything in which the tensors are not those of the model.
    """
    parameters = dict(model.named_parameters())
    shapes = weight_shapes(model)
    _match(tensors, shapes, tied=set(dict(model.named_parameters(remove_duplicate=False))) - set(parameters))
    fills = []
    for name, entry in tensors.items():
        if name not in parameters:
            continue
        parameter = parameters[name]
        packing = 2 * parameter.element_size() if nf4.is_packed(parameter) else 0
        held = sharing.spans(parameter.numel())
        read = [whole_blocks(span, packing, entry.numel) for span in held] if packing else held
        fills.append(ParameterRead(name, entry, held, read, packing))
    return fills


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter of a skeleton as files hold it: 4-bit ones before they are packed."""
    linears = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        name: (linears[name].out_features, linears[name].in_features) if nf4.is_packed(p) else tuple(p.shape)
        for name, p in model.named_parameters()
    }


def _match(tensors: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]], tied: set[str]) -> None:
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    for name, entry in tensors.items():
        if name in shapes and entry.shape != shapes[name]:
            problems.append(f"{name} has shape {list(entry.shape)} instead of {list(shapes[name])}")
        elif name in shapes and entry.dtype not in _TORCH_DTYPES:
            problems.append(f"{name} is {entry.dtype}, not one of {', '.join(_TORCH_DTYPES)}")
        # A tied head may be stored beside the embedding, and old converters stored the rotary frequencies.
        elif name not in shapes and name not in tied and not name.endswith("rotary_emb.inv_freq"):
            problems.append(f"{name} is not part of the model")
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ModelError(
            f"model.base: its tensors are not those that its config.json describes:{shown}{more}\n"
            "Fetch config and weights of one and the same checkpoint."
        )


# -- reading ---------------------------------------------------------------------------------------------------------


def _fill(checkpoint: WeightFiles, fill: ParameterRead, targets: list[torch.Tensor], threads: ThreadPoolExecutor) -> None:
    """Read each span into its target; what is longer than the span is padding, and zero."""

    def read(chunk: Span, target: torch.Tensor) -> None:
        if target.device.type == "cpu" and target.dtype == _TORCH_DTYPES[fill.entry.dtype]:
            checkpoint.read_into(fill.entry, chunk.start, _bytes_of(target))
        else:
            target.copy_(_read(checkpoint, fill.entry, chunk))

    work = []
    for span, target in zip(fill.read, targets, strict=True):
        target[len(span) :].zero_()
        for chunk in _chunks(span, CHUNK_BYTES // fill.entry.item_bytes):
            work.append(threads.submit(read, chunk, target[chunk.start - span.start : chunk.stop - span.start]))
    _wait(work)


def _fill_4bit(
    checkpoint: WeightFiles,
    fill: ParameterRead,
    parameter: nn.Parameter,
    linear: nn.Module,
    targets: list[torch.Tensor],
    placement: WeightPlacement,
    threads: ThreadPoolExecutor,
) -> None:
    """Read and quantise the blocks that each span touches, keep of them what the span holds, and share the scales."""
    dtype = parameter.dtype
    # A span may begin and end within a block, so the scales of all the blocks it touches come first or last.
    scales = [torch.empty(num_blocks(span), device=placement.device) for span in fill.read]

    def quantise(chunk: Span, weights: Span, held: Span, target: torch.Tensor, scale: torch.Tensor) -> None:
        read = _read(checkpoint, fill.entry, chunk).to(placement.device, dtype)
        packed, chunk_scales = nf4.quantise(read, dtype)
        first_block = (chunk.start - weights.start) // nf4.NF4_BLOCK
        scale[first_block : first_block + len(chunk_scales)] = chunk_scales
        first = chunk.start // fill.weights_per_element  # of the packed elements
        begin, end = max(first, held.start), min(first + len(packed), held.stop)
        target[begin - held.start : end - held.start] = packed[begin - first : end - first]

    work = []
    for held, weights, target, scale in zip(fill.held, fill.read, targets, scales, strict=True):
        target[len(held) :].zero_()
        for chunk in _chunks(weights, NF4_CHUNK_WEIGHTS[placement.device.type]):
            work.append(threads.submit(quantise, chunk, weights, held, target, scale))
    _wait(work)
    whole = _gather_scales(scales[0], fill, placement)
    nf4.attach_statistics(parameter, linear, whole, torch.Size(fill.entry.shape))


def _gather_scales(scales: torch.Tensor, fill: ParameterRead, placement: WeightPlacement) -> torch.Tensor:
    """The scales of all blocks of a tensor, from those of each process."""
    world_size = placement.sharing.world_size
    if world_size == 1:
        return scales
    packed_numel = fill.entry.numel // fill.weights_per_element
    per_rank = [
        whole_blocks(partition(packed_numel, world_size, rank), fill.weights_per_element, fill.entry.numel)
        for rank in range(world_size)
    ]
    padded = torch.zeros(max(num_blocks(weights) for weights in per_rank), device=scales.device)
    padded[: len(scales)] = scales
    gathered = placement.all_gather(padded)
    whole = torch.empty(num_blocks(Span(0, fill.entry.numel)), device=scales.device)
    for weights, theirs in zip(per_rank, gathered, strict=True):
        first, count = weights.start // nf4.NF4_BLOCK, num_blocks(weights)
        whole[first : first + count] = theirs[:count]
    return whole


def _read(checkpoint: WeightFiles, entry: TensorEntry, chunk: Span) -> torch.Tensor:
    staging = torch.empty(len(chunk), dtype=_TORCH_DTYPES[entry.dtype])
    checkpoint.read_into(entry, chunk.start, _bytes_of(staging))
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


def _homes(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Name of each parameter -> every module and attribute that holds it; tied ones have two."""
    homes: dict[str, list[tuple[nn.Module, str]]] = {}
    name_of: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = name_of.setdefault(id(parameter), f"{prefix}.{attribute}")
                homes.setdefault(name, []).append((module, attribute))
    return homes


def _stand_in(homes: list[tuple[nn.Module, str]], device: torch.device) -> nn.Parameter:
    """Like the meta parameter that lives there, but on `device`: shape and type, and the memory of one element."""
    module, attribute = homes[0]
    meta = module._parameters[attribute]
    assert meta is not None
    data = torch.empty(1, dtype=meta.dtype, device=device).expand(meta.shape)
    return nf4.packed_parameter(data) if nf4.is_packed(meta) else nn.Parameter(data, requires_grad=meta.requires_grad)
