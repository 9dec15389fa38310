"""QLoRA of the 70B architecture with random weights on one large GPU: does it load, train, and take what the plan says?

python benchmarks/gpu_qlora_70b.py [--model llama-3.3-70b-instruct] [--rows 1] [--row-tokens 4096] [--steps 8]
python benchmarks/gpu_qlora_70b.py --device cpu --layers 1 --model llama-3.2-1b --row-tokens 256   # a try without one
python benchmarks/gpu_qlora_70b.py --smoke

The weights are random numbers that the loader reads as if from safetensors files, so 141 GB of disk are not needed; the
rest is the product's own path: load_causal_lm, LoRA, DeepSpeed, the training loop. Prints the time to load, tokens/s,
MFU (model FLOPs: 4 N and attention, without recomputation) and peak memory beside the plan's figures.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.result import add_smoke_option, print_result, shrink
from ft_service.catalog import models
from ft_service.catalog.gpus import GPUS, find_gpu
from ft_service.model.adapter import attach_adapter
from ft_service.model.dry_run import tensors_from_shape
from ft_service.model.load import load_causal_lm
from ft_service.model.weight_files import TensorEntry, WeightFiles
from ft_service.plan import speed
from ft_service.plan.facts import DatasetFacts, Resources
from ft_service.plan.make import make_plan
from ft_service.plan.memory import GIB
from ft_service.plan.search import search_space
from ft_service.runs.metrics import StepMetrics
from ft_service.spec.schema import RunSpec
from ft_service.train.batches import Batches
from ft_service.train.loop import train
from ft_service.train.objectives.sft import LossModel
from ft_service.train.parallel import Parallel, init_process_group
from ft_service.train.protocol import Hooks, TrainingState

WARMUP_STEPS = 2
WITHIN = 0.15
"""The plan's peak memory is to be right within this."""


class RandomWeightFiles(WeightFiles):
    """A checkpoint of a shape, whose bytes are the same few MiB of random bf16 numbers over and over."""

    def __init__(self, shape: models.ModelShape) -> None:
        super().__init__("/random-weights")
        config, self._tensors = tensors_from_shape(shape)
        self._config = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
        noise = torch.empty(8 * 1024 * 1024, dtype=torch.bfloat16).normal_(0, 0.02)
        self._noise = noise.view(torch.uint8).numpy()

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        return self._tensors

    def check(self) -> None:
        pass

    def json_file(self, name: str) -> None:
        return None

    def read_into(self, entry: TensorEntry, start: int, buffer: memoryview) -> None:
        target = np.frombuffer(buffer, dtype=np.uint8)
        for begin in range(0, len(target), len(self._noise)):
            piece = target[begin : begin + len(self._noise)]
            piece[:] = self._noise[: len(piece)]


class Row:
    """One full row: a single document, trained on in its second half."""

    def __init__(self, tokens: int, vocabulary: int, seed: int) -> None:
        self.input_ids = np.random.default_rng(seed).integers(0, vocabulary, tokens).astype(np.int32)
        self.loss_mask = np.arange(tokens) >= tokens // 2
        self.document_lengths = np.array([tokens], dtype=np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.3-70b-instruct", help="a name of the catalogue")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-step")
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8, help="timed steps, of two micro-steps each")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    add_smoke_option(parser)
    arguments = parser.parse_args()
    shrink(arguments, model="llama-3.2-1b", layers=1, row_tokens=64, steps=1, device="cpu")
    facts = models.find(arguments.model)
    if facts is None:
        sys.exit(f"--model {arguments.model}: not in the catalogue")
    shape = facts.shape
    if arguments.layers:
        shape = replace(shape, num_layers=arguments.layers)
    if arguments.smoke:
        shape = replace(shape, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=2, vocab_size=1024)
    on_gpu = arguments.device == "cuda"
    gpu_name = next((n for n in reversed(GPUS) if on_gpu and n.split("-")[0] in torch.cuda.get_device_name()), "H100")
    gpu = find_gpu(gpu_name)
    assert gpu is not None

    rows_per_step = 2 * arguments.rows
    spec = RunSpec.model_validate(
        {
            "name": "qlora-70b",
            "model": {"base": facts.id},
            "method": {"type": "qlora", "lora_rank": 16, "lora_alpha": 32},
            "data": {"train": [{"path": "generated"}], "max_seq_len": arguments.row_tokens},
            "train": {
                "max_steps": arguments.steps + WARMUP_STEPS,
                "global_batch_size": rows_per_step,
                "micro_batch_size": arguments.rows,
                "activation_checkpointing": True,
            },
            "parallel": {"num_workers": 1, "use_gpu": on_gpu, "offload": "none"},
            "storage": "unused",
        }
    )
    num_rows = rows_per_step * (arguments.steps + WARMUP_STEPS)
    tokens = num_rows * arguments.row_tokens
    data = DatasetFacts(
        digest="d", conversations=num_rows, rows=num_rows, tokens=tokens, loss_tokens=tokens // 2, truncated=0
    )
    plan = make_plan(spec, data, shape, Resources(gpu_type=gpu.name, gpu_memory_gib=gpu.memory_gib))
    init_process_group(on_gpu)
    torch.set_num_threads(os.cpu_count() or 1)
    parallel = Parallel(plan)
    started = time.perf_counter()
    base = load_causal_lm(RandomWeightFiles(shape), dtype=parallel.dtype, four_bit=True, placement=parallel.placement())
    load_seconds = time.perf_counter() - started
    loaded_gib = torch.cuda.max_memory_allocated() / GIB if on_gpu else parallel.peak_memory_gib()[0]
    print(f"loaded {shape.num_parameters:,} parameters in {load_seconds:.1f} s, peak {loaded_gib:.1f} GiB", flush=True)
    adapted = attach_adapter(base, spec.method, facts.id, None)
    base.gradient_checkpointing_enable()
    base.train()
    parallel.wrap(LossModel(adapted, base))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rows = [Row(arguments.row_tokens, shape.vocab_size, seed) for seed in range(num_rows)]
    measured: list[StepMetrics] = []

    def on_step(metrics: StepMetrics) -> None:
        measured.append(metrics)
        print(f"step {metrics.step}: loss {metrics.loss:.3f}, {metrics.tokens_per_second:,.0f} tokens/s", flush=True)

    hooks = Hooks(on_step=on_step, on_best=lambda state: None, on_checkpoint=lambda state: None)
    train(plan, parallel, Batches(rows, 0, rows_per_step, arguments.rows, 0, 1), None, hooks, TrainingState())

    rate = statistics.median(metrics.tokens_per_second for metrics in measured[WARMUP_STEPS:])
    layout = replace(search_space(spec, 1).layout, micro_batch_size=arguments.rows, activation_checkpointing=False)
    mfu = rate * speed.flops_per_token(shape, layout) / (gpu.bf16_tflops * 1e12)
    peak_gib = torch.cuda.max_memory_allocated() / GIB if on_gpu else parallel.peak_memory_gib()[0]
    # The driver's context is outside what torch counts, and so is what the plan keeps in reserve.
    planned = plan.memory_gib
    planned_gib = planned["total"] - planned["reserve"] if planned else float("nan")
    planned_rate = plan.estimate.tokens_per_second if plan.estimate else float("nan")
    print(f"\n{'':22}{'measured':>12}{'planned':>12}")
    print(f"{'tokens/s':22}{rate:12,.0f}{planned_rate:12,.0f}")
    print(f"{'peak GiB':22}{peak_gib:12.1f}{planned_gib:12.1f}")
    print(f"{'MFU (of ' + gpu.name + ')':22}{mfu:12.1%}")
    finite = all(np.isfinite(metrics.loss) for metrics in measured)
    print_result(
        arguments,
        "gpu_qlora_70b",
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        figures={
            "parameters": shape.num_parameters,
            "load_seconds": load_seconds,
            "load_peak_gib": loaded_gib,
            "tokens_per_second": rate,
            "mfu": mfu,
            "peak_gib": peak_gib,
            "planned": {**planned, "tokens_per_second": planned_rate},
        },
        goal={"peak_within": WITHIN},
        holds=bool(finite and on_gpu and abs(peak_gib / planned_gib - 1) <= WITHIN),
    )


if __name__ == "__main__":
    main()
