"""`ft plan --table MODEL`: what a base takes by every method on every number of GPUs. No torch, no network, no data.

A worker is given its share of the main memory of the machines that are rented with such GPUs.
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
from ft_service.plan.memory import GIB, Layout, Method, Offload
from ft_service.plan.search import Choice, Machine, Question, best, gib, judge_all

METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
GPU_TYPES = ("L4", "A100-80G", "H100", "H200")
ROWS_PER_STEP = 64
LORA_RANK = 16


class FamilyMember(BaseModel):
    """One method on one number of GPUs of one type, at its best; where it does not fit, what it lacks least."""

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
    gib_per_gpu: float
    gib_per_node: float = Field(description="Of main memory.")
    tokens_per_second: float = Field(description="Over all GPUs, estimated.")
    usd_per_million_tokens: float | None


class Family(BaseModel):
    """All of them, and what they were asked with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    parameters: int
    max_seq_len: int
    rows_per_step: int = ROWS_PER_STEP
    lora_rank: int = LORA_RANK
    mfu: float = speed.MFU
    mfu_source: str = speed.MFU_SOURCE
    price_per_gpu_hour: float | None
    members: list[FamilyMember]

    def smallest(self, method: Method) -> dict[str, FamilyMember]:
        """By GPU type, the fewest GPUs on which the method fits without offloading, or else with it."""
        found: dict[str, FamilyMember] = {}
        for member in sorted(self.members, key=lambda member: (member.offload != "none", member.num_gpus)):
            if member.method == method and member.fits:
                found.setdefault(member.gpu_type, member)
        return found


def family(
    model: str, gpus: Sequence[Gpu], max_seq_len: int, gpus_per_node: int = GPUS_PER_NODE, price: float | None = None
) -> Family:
    """Every choice for a model of the catalogue or a checkpoint folder. Raises `ModelError` if it is neither."""
    shape = shape_of(model)
    members = [
        _member(shape, method, gpu, count, max_seq_len, gpus_per_node, price)
        for method in METHODS
        for gpu in gpus
        for count in GPU_COUNTS
    ]
    return Family(
        model=models.short_name(model),
        parameters=shape.num_parameters,
        max_seq_len=max_seq_len,
        price_per_gpu_hour=price,
        members=members,
    )


def default_gpus() -> list[Gpu]:
    """One type of every size that is commonly rented."""
    return [GPUS[name] for name in GPU_TYPES]


def shape_of(model: str) -> ModelShape:
    """The shape of a catalogue's model or of a folder's config.json; raises `ModelError` if `model` is neither."""
    if known := models.find(model):
        return known.shape
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        names = ", ".join(facts.short_name for facts in models.MODELS)
        raise ModelError(f"--table = {model!r}: neither a folder with a config.json nor known. Use one of {names}.")
    try:
        return models.shape_from_config(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ModelError(f"{file}: is not JSON ({error}). Fetch the checkpoint again.") from None


def _member(
    shape: ModelShape, method: Method, gpu: Gpu, count: int, max_seq_len: int, gpus_per_node: int, price: float | None
) -> FamilyMember:
    layout = Layout(
        method=method,
        num_workers=count,
        workers_per_node=min(count, gpus_per_node),
        max_seq_len=max_seq_len,
        lora_rank=LORA_RANK,
    )
    question = Question(layout, rows_per_worker=max(1, ROWS_PER_STEP // count))
    host_gib = gpu.host_gib * layout.workers_per_node / GPUS_PER_NODE
    choice: Choice = best(judge_all(shape, question, Machine(gpu, gpu.memory_gib, host_gib)))
    rate = choice.tokens_per_second
    return FamilyMember(
        method=method,
        gpu_type=gpu.name,
        num_gpus=count,
        fits=choice.fits,
        zero_stage=choice.layout.zero_stage,
        offload=choice.layout.offload,
        hpz=choice.layout.hpz,
        micro_batch_size=choice.layout.micro_batch_size,
        activation_checkpointing=choice.layout.activation_checkpointing,
        gib_per_gpu=gib(choice),
        gib_per_node=choice.memory.host_bytes / GIB,
        tokens_per_second=rate,
        usd_per_million_tokens=None if price is None else price * count / 3600 / rate * 1e6,
    )
