"""Training cases on the real engine, and what is measured of them (for `tests.forked.run_cases`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from ft_service.catalog.models import shape_from_config
from ft_service.data.order import step_rows
from ft_service.model.base import read_config
from ft_service.model.trainable import TrainableModel
from ft_service.model.weight_files import WeightFiles
from ft_service.plan.facts import DatasetFacts, Resources
from ft_service.plan.make import make_plan
from ft_service.plan.plan import RunPlan
from ft_service.runs.metrics import StepMetrics
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage
from ft_service.train.batches import Batches
from ft_service.train.loop import train, validate
from ft_service.train.objectives.sft import LossModel
from ft_service.train.parallel import Parallel
from ft_service.train.protocol import Hooks, TrainingState
from ft_service.train.weights import write_adapter, write_model

VOCABULARY = 256
NUM_ROWS = 24
DOCUMENTS_PER_ROW = 2


class TrulyPartitioned(Parallel):
    """ZeRO-3 that releases every weight after each use, as it does with large weights.

    DeepSpeed keeps those of fewer than 100,000 elements gathered for good, and others when they are used again soon.
    """

    def __init__(self, plan: RunPlan, node_size: int = 1) -> None:
        """`node_size` workers are taken to be a node, with a copy of the weights of its own (hpZ)."""
        self._node_size = node_size
        super().__init__(plan)

    @property
    def hpz_partition_size(self) -> int:
        return self._node_size

    def _config(self) -> dict[str, Any]:
        config = super()._config()
        if self.plan.zero_stage == 3:
            nothing_stays = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
            config["zero_optimization"] |= {f"stage3_{name}": 0 for name in nothing_stays}
        return config


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    loss_mask: np.ndarray
    document_lengths: np.ndarray


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and loss mask of each document: the same on every call."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(6, 40, NUM_ROWS * DOCUMENTS_PER_ROW)
    return [(rng.integers(0, VOCABULARY, n).astype(np.int32), rng.random(n) < 0.6) for n in lengths]


def packed_rows() -> list[Row]:
    docs = documents()
    pairs = [docs[i : i + DOCUMENTS_PER_ROW] for i in range(0, len(docs), DOCUMENTS_PER_ROW)]
    return [
        Row(
            np.concatenate([ids for ids, _ in pair]),
            np.concatenate([mask for _, mask in pair]),
            np.array([len(ids) for ids, _ in pair], dtype=np.int32),
        )
        for pair in pairs
    ]


def separate_rows(seed: int) -> list[Row]:
    """A row per document, laid out so that each step draws the documents that the packed rows would have given it."""
    docs = documents()
    packed_order = step_rows(seed, 0, NUM_ROWS, NUM_ROWS)
    wanted = [row * DOCUMENTS_PER_ROW + k for row in packed_order for k in range(DOCUMENTS_PER_ROW)]
    drawn = step_rows(seed, 0, len(docs), len(docs))
    rows: list[Any] = [None] * len(docs)
    for place, document in zip(drawn, wanted, strict=True):
        ids, mask = docs[document]
        rows[place] = Row(ids, mask, np.array([len(ids)], dtype=np.int32))
    return rows


def fixed_rows() -> list[Row]:
    """One batch, each row a single document, so that stock code can train on it without packing."""
    return [Row(row.input_ids, row.loss_mask, np.array([len(row.input_ids)])) for row in packed_rows()[:4]]


def write_base(
    folder: Path, hidden_size: int = 36, intermediate_size: int = 75, tied: bool = True, num_layers: int = 2
) -> None:
    """A Llama with random weights; the odd sizes force ZeRO-3 to pad its partitions."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def rows_of(case: dict[str, Any]) -> list[Row]:
    if case.get("fixed_batch"):
        return fixed_rows()
    return packed_rows() if case.get("packed", True) else separate_rows(seed=0)


def plan_of(case: dict[str, Any], world_size: int) -> RunPlan:
    spec = RunSpec.model_validate(
        {
            "name": "case",
            "model": {"base": case["base"]},
            "method": case["method"],
            "data": {"train": [{"path": "unused"}], "validation": {"fraction": 0.5}, "max_seq_len": 128},
            "train": {
                "precision": case.get("precision", "fp32"),
                "max_steps": 6,
                "global_batch_size": 4 if case.get("packed", True) else 4 * DOCUMENTS_PER_ROW,
                "micro_batch_size": case["micro"],
                "learning_rate": 1e-2,
                "schedule": "constant" if case.get("fixed_batch") else "cosine",
                "warmup_ratio": 0.0 if case.get("fixed_batch") else 0.3,
                "validate_every_steps": 3,
                "weight_decay": 0.0 if case.get("fixed_batch") else 0.1,
                "activation_checkpointing": case.get("checkpointing", False),
                **case.get("train", {}),
            },
            "parallel": {
                "num_workers": world_size,
                "use_gpu": case.get("use_gpu", False),
                "zero_stage": case["stage"],
                "offload": case.get("offload", "none"),
                **({"nvme_path": case["nvme_path"]} if "nvme_path" in case else {}),
            },
            "storage": "unused",
        }
    )
    rows = len(rows_of(case))
    facts = DatasetFacts(
        digest="d", conversations=48, rows=rows, tokens=1, loss_tokens=1, truncated=0, validation_loss_tokens=1
    )
    return make_plan(spec, facts, shape_from_config(read_config(Path(case["base"]))), Resources())


def model_of(plan: RunPlan, parallel: Parallel) -> TrainableModel:
    """As a worker builds it."""
    folder = Path(plan.spec.model.base)
    with parallel.hf_deepspeed_config():
        return TrainableModel(plan, folder, WeightFiles(folder), parallel.placement())


def run_case(case: dict[str, Any], world_size: int) -> dict[str, Any]:
    plan = plan_of(case, world_size)
    parallel = TrulyPartitioned(plan, case.get("node_size", 1))
    torch.manual_seed(0)
    base_folder = Path(case["base"])
    model = model_of(plan, parallel)
    base = model.causal_lm
    parallel.wrap(LossModel(model.module, base))

    rows = rows_of(case)
    metrics: list[StepMetrics] = []

    def batches() -> Batches:
        return Batches(
            rows, plan.spec.train.seed, plan.global_batch_size, plan.micro_batch_size, parallel.rank, world_size
        )

    nothing = Hooks(on_step=metrics.append, on_best=lambda state: None, on_checkpoint=lambda state: None)
    train(plan, parallel, batches(), batches(), nothing, TrainingState())
    trained = parallel.gather_trained()
    if "export" in case:
        write = write_adapter if model.is_adapter else write_model
        write(model, parallel, Storage(str(Path(case["export"]).parent)), Path(case["export"]).name)
    result = {
        "losses": [m.loss for m in metrics],
        "accuracies": [m.accuracy for m in metrics],
        "validation_accuracies": [m.validation_accuracy for m in metrics if m.validation_accuracy is not None],
        "validation_losses": [m.validation_loss for m in metrics if m.validation_loss is not None],
        "optimizer": type(parallel._engine.basic_optimizer).__name__,
        "validated_again": validate(parallel, batches()).loss if case.get("validate_again") else None,
        "grad_norms": [m.grad_norm for m in metrics],
        "learning_rates": [m.learning_rate for m in metrics],
        "trained": {name: list(tensor.shape) for name, tensor in trained.items()},
        "moved": float(sum((tensor.float() ** 2).sum() for name, tensor in trained.items() if "lora_B" in name)),
        "frozen": frozen_facts(base, base_folder, parallel.dtype) if plan.spec.method.type == "qlora" else None,
    }
    parallel.close()
    return result


def stock_4bit(folder: Path, dtype: torch.dtype, device: torch.device | None = None) -> LlamaForCausalLM:
    """The whole model, loaded and quantised by transformers and bitsandbytes."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    placed = None if device is None else {"": device}
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=nf4, device_map=placed)


def frozen_facts(base: torch.nn.Module, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """For each 4-bit weight: its bytes on this rank and in total, and whether its share equals bitsandbytes' own."""

    def packed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous().view(torch.uint8).flatten()

    stock: dict[str, Any] = dict(stock_4bit(folder, dtype).named_parameters())
    facts = {}
    parameter: Any  # bitsandbytes and DeepSpeed add attributes to it
    for name, parameter in base.named_parameters():
        if type(parameter).__name__ != "Params4bit":
            continue
        partitioned = hasattr(parameter, "ds_tensor")
        here = packed(parameter.ds_tensor if partitioned else parameter)
        original = stock[name.replace(".base_layer", "")]
        whole = packed(original)
        start = torch.distributed.get_rank() * len(here) if partitioned else 0
        expected = whole[start : start + len(here)]
        ours = parameter.quant_state
        theirs = original.quant_state
        facts[name] = {
            "bytes_here": len(here),
            "bytes_whole": len(whole),
            "weights": int(np.prod(ours.shape)),
            "nested": ours.nested,
            "unchanged": torch.equal(here[: len(expected)], expected),
            "same_statistics": all(
                torch.equal(a, b)
                for a, b in (
                    (ours.absmax, theirs.absmax),
                    (ours.offset, theirs.offset),
                    (ours.code, theirs.code),
                    (ours.state2.absmax, theirs.state2.absmax),
                    (ours.state2.code, theirs.state2.code),
                )
            )
            and (ours.shape, ours.dtype, ours.blocksize) == (theirs.shape, theirs.dtype, theirs.blocksize),
        }
    return facts
