"""`ft plan --table MODEL`: memory, speed and price of a base for every method and number of GPUs. Needs no data.

Main memory is that of the cloud machines with these GPUs; each GPU gets an equal share of it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ft_service.catalog import models
from ft_service.catalog.gpus import GPUS, GPUS_PER_NODE, Gpu
from ft_service.catalog.models import ModelShape
from ft_service.errors import ModelError
from ft_service.plan import speed
from ft_service.plan.memory import Layout, Method, Offload
from ft_service.plan.search import Machine, SearchSpace, best_candidate, evaluate_layouts

METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
GPU_TYPES = ("L4", "A100-80G", "H100", "H200")
ROWS_PER_STEP = 64
LORA_RANK = 16


class TableEntry(BaseModel):
    """The best layout of one method on one number of GPUs of one type; if none fits, the closest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method
    gpu_type: str
    num_gpus: int
    fits: bool
    zero_stage: int
    offload: Offload
    hpz: bool
    micro_batch_size: int
    activation_checkpointing: bool
    kept_layers: int = Field(description="With activation checkpointing: layers that keep their activations.")
    gib_per_gpu: float
    gib_per_node: float = Field(description="Main memory.")
    tokens_per_second: float = Field(description="Over all GPUs, estimated.")
    usd_per_million_tokens: float | None


class PlanTable(BaseModel):
    """The entries, and the settings that they share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    parameters: int
    max_seq_len: int
    rows_per_step: int = ROWS_PER_STEP
    lora_rank: int = LORA_RANK
    mfu: float = speed.MFU
    mfu_source: str = speed.MFU_SOURCE
    price_per_gpu_hour: float | None
    entries: list[TableEntry]

    def smallest(self, method: Method) -> dict[str, TableEntry]:
        """By GPU type, the entry with fewest GPUs that fits."""
        smallest: dict[str, TableEntry] = {}
        for entry in sorted(self.entries, key=lambda entry: entry.num_gpus):
            if entry.method == method and entry.fits:
                smallest.setdefault(entry.gpu_type, entry)
        return smallest


def plan_table(
    model: str, gpus: Sequence[Gpu], max_seq_len: int, gpus_per_node: int = GPUS_PER_NODE, price: float | None = None
) -> PlanTable:
    """The table of a catalogue model or a checkpoint folder, in bf16.

    Raises `ModelError` if `model` is neither, or if a GPU type has no bf16.
    """
    shape = shape_of(model)
    if without_bf16 := [gpu.name for gpu in gpus if not gpu.has_bf16]:
        raise ModelError(f"--gpu-type = {without_bf16[0]}: cannot compute in bf16. Use an Ampere GPU or newer.")
    entries = [
        _entry(shape, method, gpu, count, max_seq_len, gpus_per_node, price)
        for method in METHODS
        for gpu in gpus
        for count in GPU_COUNTS
    ]
    return PlanTable(
        model=models.short_name(model),
        parameters=shape.num_parameters,
        max_seq_len=max_seq_len,
        price_per_gpu_hour=price,
        entries=entries,
    )


def default_gpus() -> list[Gpu]:
    """One common GPU type of each memory size."""
    return [GPUS[name] for name in GPU_TYPES]


def shape_of(model: str) -> ModelShape:
    """The shape of a catalogue model, or of a folder's config.json. Raises `ModelError` if `model` is neither."""
    if known := models.find(model):
        if known.vision:
            raise ModelError(
                f"--table = {model!r}: is a vision model, and only text models can be trained. "
                f"Use its text backbone, {known.text_backbone}."
            )
        return known.shape
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        names = ", ".join(facts.short_name for facts in models.MODELS if not facts.vision)
        raise ModelError(
            f"--table = {model!r}: not a known model, and not a folder with a config.json. Use one of {names}."
        )
    try:
        return models.shape_from_config(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON ({error}). Download the checkpoint again.") from None


def _entry(
    shape: ModelShape, method: Method, gpu: Gpu, count: int, max_seq_len: int, gpus_per_node: int, price: float | None
) -> TableEntry:
    layout = Layout(
        method=method,
        num_workers=count,
        workers_per_node=min(count, gpus_per_node),
        max_seq_len=max_seq_len,
        lora_rank=LORA_RANK,
    )
    space = SearchSpace(layout, rows_per_worker=max(1, ROWS_PER_STEP // count))
    host_gib = gpu.host_gib * layout.workers_per_node / GPUS_PER_NODE
    best = best_candidate(evaluate_layouts(shape, space, Machine(gpu, gpu.memory_gib, host_gib)))
    rate = best.tokens_per_second
    return TableEntry(
        method=method,
        gpu_type=gpu.name,
        num_gpus=count,
        fits=best.fits,
        zero_stage=best.layout.zero_stage,
        offload=best.layout.offload,
        hpz=best.layout.hpz,
        micro_batch_size=best.layout.micro_batch_size,
        activation_checkpointing=best.layout.activation_checkpointing,
        kept_layers=best.layout.kept_layers,
        gib_per_gpu=best.gpu_gib,
        gib_per_node=best.host_gib,
        tokens_per_second=rate,
        usd_per_million_tokens=None if price is None else price * count / 3600 / rate * 1e6,
    )
