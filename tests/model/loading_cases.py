"""Loads models over a process group with our loader, and compares each share with what transformers loads."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

from ft_service.model.load import load_causal_lm
from ft_service.model.weight_files import TensorEntry, WeightFiles
from tests.train.training_cases import TrulyPartitioned, plan_of, stock_4bit


class CountingWeightFiles(WeightFiles):
    """Records every byte range that is read."""

    def __init__(self, location: str | Path) -> None:
        super().__init__(location)
        self.ranges: list[tuple[str, int, int]] = []

    def read_into(self, entry: TensorEntry, start: int, buffer: memoryview) -> None:
        first = entry.start + start * entry.item_bytes
        self.ranges.append((entry.file, first, first + len(buffer)))
        super().read_into(entry, start, buffer)


def write_base(folder: Path, *, tied: bool, dtype: str, files: int, width: int = 72) -> None:
    """Two layers of odd sizes (so that partitions are padded and cut 4-bit blocks), in one or several files."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=width,
        intermediate_size=104 * width // 72,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="5GB" if files == 1 else f"{240 // files}KB")


def run_case(case: dict[str, Any], world_size: int) -> dict[str, Any]:
    plan = plan_of(case, world_size)
    parallel = TrulyPartitioned(plan, case.get("node_size", 1))
    folder = Path(case["base"])
    checkpoint = CountingWeightFiles(folder)
    four_bit = case["method"]["type"] == "qlora"
    placement = parallel.placement()
    model = load_causal_lm(checkpoint, dtype=parallel.dtype, four_bit=four_bit, placement=placement, attention="sdpa")
    if four_bit:
        stock = stock_4bit(folder, parallel.dtype)
    else:
        stock = LlamaForCausalLM.from_pretrained(folder, dtype=parallel.dtype, attn_implementation="sdpa")
    expected = dict(stock.named_parameters())
    found = dict(model.named_parameters())
    unequal = []
    for name, parameter in found.items():
        whole = expected[name].detach()
        if plan.zero_stage == 3:
            flat = whole.reshape(-1)
            size = -(-len(flat) // world_size)
            padded = torch.nn.functional.pad(flat, (0, size * world_size - len(flat)))
            share = padded[parallel.rank * size : (parallel.rank + 1) * size]
            if not is_swapped(parameter) and not same_bits(parameter.ds_tensor, share):
                unequal.append(f"{name} (share)")
            if case.get("node_size", 1) > 1:
                size = len(padded) // case["node_size"]
                place = parallel.rank % case["node_size"]
                if not same_bits(parameter.ds_secondary_tensor, padded[place * size : (place + 1) * size]):
                    unequal.append(f"{name} (node's share)")
            with deepspeed.zero.GatheredParameters([parameter]):
                if not same_bits(parameter, whole):
                    unequal.append(f"{name} (gathered)")
        elif not same_bits(parameter, whole):
            unequal.append(name)
    theirs = dict(stock.named_buffers())
    ours = dict(model.named_buffers())
    unequal += [name for name in theirs if not same_bits(ours[name], theirs[name])]
    held = [
        tensor.nbytes
        for p in found.values()
        for tensor in (getattr(p, "ds_tensor", p), getattr(p, "ds_secondary_tensor", None))
        if tensor is not None
    ]
    everyones: list[Any] = [None] * world_size
    dist.all_gather_object(everyones, (checkpoint.ranges, sum(held), unequal))
    result = {
        "unequal": [problem for _, _, problems in everyones for problem in problems],
        "names": sorted(found) == sorted(expected),
        "tied": (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings,
        "trainable": sum(p.requires_grad for p in found.values()),
        "swapped": sum(is_swapped(p) for p in found.values()),
        "bytes_read": [sum(stop - start for _, start, stop in ranges) for ranges, _, _ in everyones],
        "bytes_held": [held for _, held, _ in everyones],
        "ranges": [ranges for ranges, _, _ in everyones],
        "on": {str(getattr(p, "ds_tensor", p).device) for p in found.values()} == {"cpu"},
    }
    parallel.barrier()
    return result


def is_swapped(parameter: Any) -> bool:
    """Whether its partition is only in a file on a drive."""
    return hasattr(parameter, "ds_tensor") and parameter.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (
        ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
        and torch.equal(ours.detach().contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
    )
