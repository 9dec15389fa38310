"""CPU time of the Python between kernels: of one decoder layer in a micro-step, by method and ZeRO stage.

python benchmarks/host_time.py [--before PATH] [--rounds 3] [--cases CASE ...] [--profile CASE] [--smoke]

`--before` is another checkout of this project, with a `.venv` of its own. Each round trains every case on two gloo
workers, with each checkout in turn; a figure is the median over rounds. The layers are so narrow that their kernels
cost little. What is left is the host's work, which a GPU needs as well: modules, autograd, and DeepSpeed's hooks. The
figure is the CPU time of rank 0's training thread in a step, divided by micro-steps and layers, so waiting does not
count.

ZeRO-3 keeps no small weight gathered here: it releases each after use, and prefetches as for an 8B model. `--profile`
prints cProfile's table of one case instead, in seconds of CPU time.
"""

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IS_WORKER = "FT_MEASURED_CHECKOUT" in os.environ
"""A worker imports the project from the checkout that it measures: its parent sets PYTHONPATH."""
if not IS_WORKER:
    sys.path.insert(0, str(ROOT))

ACCUMULATION = 8
"""Micro-steps of a step. The update, once a step, is part of the figure: an eighth of it here."""
ROW_TOKENS = 32
VOCABULARY = 256
HIDDEN = 64
INTERMEDIATE = 128
LAYER_ELEMENTS = HIDDEN * (3 * HIDDEN + 3 * INTERMEDIATE)
WARMUP_STEPS = 3
"""DeepSpeed records the order of the modules in two passes, and prefetches from the third."""
LORA = {"type": "lora", "lora_rank": 4}
QLORA = {"type": "qlora", "lora_rank": 4}
FULL = {"type": "full"}
CASES: dict[str, dict[str, Any]] = {
    "LoRA, ZeRO-3, recomputed": {"method": LORA, "stage": 3, "recomputed": True},
    "LoRA, ZeRO-3": {"method": LORA, "stage": 3, "recomputed": False},
    "LoRA, ZeRO-1, recomputed": {"method": LORA, "stage": 1, "recomputed": True},
    "LoRA, ZeRO-1": {"method": LORA, "stage": 1, "recomputed": False},
    "QLoRA, ZeRO-3, recomputed": {"method": QLORA, "stage": 3, "recomputed": True},
    "full, ZeRO-3, recomputed": {"method": FULL, "stage": 3, "recomputed": True},
    "full, ZeRO-3": {"method": FULL, "stage": 3, "recomputed": False},
    "full, ZeRO-1, recomputed": {"method": FULL, "stage": 1, "recomputed": True},
    "full, ZeRO-1": {"method": FULL, "stage": 1, "recomputed": False},
}
HEADLINE = "LoRA, ZeRO-3, recomputed"
GOAL = {HEADLINE: 1 / 3}
"""The most that a case may take, as a ratio of what it took before."""


def write_base(folder: Path, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


# -- one checkout, in processes of its own ---------------------------------------------------------------------------


def measure_case(case: dict[str, Any], arguments: argparse.Namespace, profiler: cProfile.Profile | None) -> float:
    """Milliseconds of CPU time of this rank's training thread, per layer and micro-step: the median over steps."""
    import numpy as np

    from ft_service.catalog.models import shape_from_config
    from ft_service.model.base import read_config
    from ft_service.model.trainable import TrainableModel
    from ft_service.model.weight_files import WeightFiles
    from ft_service.plan.facts import DatasetFacts, Resources
    from ft_service.plan.make import make_plan
    from ft_service.runs.metrics import StepMetrics
    from ft_service.spec.schema import RunSpec
    from ft_service.train.batches import Batches
    from ft_service.train.loop import train
    from ft_service.train.objectives.sft import LossModel
    from ft_service.train.parallel import Parallel
    from ft_service.train.protocol import Hooks, TrainingState

    class AsForLargeModels(Parallel):
        def _config(self) -> dict[str, Any]:
            config = super()._config()
            if self.plan.zero_stage == 3:
                zero = config["zero_optimization"]
                zero["stage3_param_persistence_threshold"] = 0
                if not getattr(self, "gathers_whole_layers", False):
                    # What 50M and 1e9 elements, DeepSpeed's defaults, are to the layers of an 8B model.
                    zero["stage3_prefetch_bucket_size"] = LAYER_ELEMENTS // 4
                    zero["stage3_max_live_parameters"] = LAYER_ELEMENTS * 9 // 2
                    zero["stage3_max_reuse_distance"] = LAYER_ELEMENTS * 9 // 2
            return config

    class Row:
        def __init__(self, number: int) -> None:
            self.input_ids = (np.arange(ROW_TOKENS, dtype=np.int32) * 7 + number) % VOCABULARY
            self.loss_mask = np.ones(ROW_TOKENS, dtype=bool)
            self.document_lengths = np.array([ROW_TOKENS], dtype=np.int32)

    base = arguments.model
    workers = arguments.workers
    spec = RunSpec.model_validate(
        {
            "name": "host-time",
            "model": {"base": str(base)},
            "method": case["method"],
            "data": {"train": [{"path": "generated"}], "max_seq_len": ROW_TOKENS},
            "train": {
                "precision": "bf16",
                "max_steps": WARMUP_STEPS + arguments.steps,
                "global_batch_size": workers * ACCUMULATION,
                "micro_batch_size": 1,
                "activation_checkpointing": case["recomputed"],
            },
            "parallel": {"num_workers": workers, "use_gpu": False, "zero_stage": case["stage"]},
            "storage": "unused",
        }
    )
    rows = [Row(number) for number in range(workers * ACCUMULATION * 2)]
    facts = DatasetFacts(digest="d", conversations=1, rows=len(rows), tokens=1, loss_tokens=1, truncated=0)
    plan = make_plan(spec, facts, shape_from_config(read_config(base)), Resources())
    parallel = AsForLargeModels(plan)
    with parallel.hf_deepspeed_config():
        model = TrainableModel(plan, base, WeightFiles(base), parallel.placement())
    parallel.wrap(LossModel(model.module, model.causal_lm))
    batches = Batches(rows, 0, plan.global_batch_size, plan.micro_batch_size, parallel.rank, workers)
    ends: list[float] = []

    def on_step(metrics: StepMetrics) -> None:
        ends.append(time.thread_time())
        if profiler is not None and len(ends) == WARMUP_STEPS:
            profiler.enable()

    train(plan, parallel, batches, None, Hooks(on_step, lambda state: None, lambda state: None), TrainingState())
    if profiler is not None:
        profiler.disable()
    parallel.close()
    spent = [end - start for start, end in zip(ends[WARMUP_STEPS - 1 :], ends[WARMUP_STEPS:], strict=False)]
    return 1e3 * statistics.median(spent) / ACCUMULATION / arguments.layers


def run_worker(arguments: argparse.Namespace) -> None:
    from ft_service.model.light_imports import light_imports

    names = [arguments.profile] if arguments.profile else list(arguments.cases)
    # As a worker of a run does. A compiler that nobody calls would still wrap functions of each micro-step.
    with light_imports(four_bit=any(CASES[name]["method"] is QLORA for name in names)):
        import torch

        from ft_service.train import worker  # noqa: F401
        from ft_service.train.parallel import end_process, import_deepspeed, init_process_group

        import_deepspeed(use_gpu=False)

    torch.set_num_threads(1)
    init_process_group(use_gpu=False)
    rank = torch.distributed.get_rank()
    profiler = cProfile.Profile(time.thread_time) if arguments.profile and rank == 0 else None
    figures = {name: measure_case(CASES[name], arguments, profiler) for name in names}
    if profiler is not None:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(60)
    if rank == 0:
        print("RESULT " + json.dumps(figures), flush=True)
    end_process()


# -- all checkouts, alternating --------------------------------------------------------------------------------------


def measure(checkout: Path, model: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Case -> milliseconds, as the code of `checkout` takes; cases with 4-bit weights in processes of their own."""
    names = [arguments.profile] if arguments.profile else list(arguments.cases)
    figures: dict[str, float] = {}
    for is_4bit in (False, True):
        if of_kind := [name for name in names if (CASES[name]["method"] is QLORA) == is_4bit]:
            figures |= measure_together(of_kind, checkout, model, arguments)
    return {name: figures[name] for name in names}


def measure_together(names: list[str], checkout: Path, model: Path, arguments: argparse.Namespace) -> dict[str, float]:
    python = sys.executable if checkout == ROOT else str(checkout / ".venv/bin/python")
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.workers)]
    command += [__file__, "--model", str(model)]
    for name in ("workers", "layers", "steps"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--profile", arguments.profile] if arguments.profile else ["--cases", *names]
    environment = {
        **os.environ,
        "FT_MEASURED_CHECKOUT": str(checkout),
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{checkout} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    if arguments.profile:
        print(done.stdout)
    figures: dict[str, float] = json.loads(lines[-1].removeprefix("RESULT "))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="PATH", help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--profile", choices=list(CASES), metavar="CASE", help="profile this case instead")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    if IS_WORKER:
        run_worker(parser.parse_args())
        return
    from benchmarks.result import add_smoke_option, print_result, shrink

    add_smoke_option(parser)
    arguments = parser.parse_args()
    shrink(arguments, before=None, rounds=1, workers=1, layers=1, steps=1, cases=[HEADLINE])

    sides = {"before": arguments.before.resolve(), "after": ROOT} if arguments.before else {"after": ROOT}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary, "model")
        write_base(model, arguments.layers)
        for number in range(arguments.rounds):
            for side, checkout in sides.items():
                figures = measure(checkout, model, arguments)
                runs[side].append(figures)
                print(f"round {number + 1}: {side:6} " + ", ".join(f"{ms:.1f}" for ms in figures.values()), flush=True)
    if arguments.profile:
        return
    medians = {
        side: {case: statistics.median(figures[case] for figures in found) for case in arguments.cases}
        for side, found in runs.items()
    }
    ratios = {}
    if arguments.before:
        ratios = {case: medians["after"][case] / medians["before"][case] for case in arguments.cases}
    print("\nms of CPU time, per layer and micro-step")
    print(f"{'case':28}" + "".join(f"{side:>9}" for side in sides) + ("    ratio" if ratios else ""))
    for case in arguments.cases:
        cells = "".join(f"{medians[side][case]:9.2f}" for side in sides)
        print(f"{case:28}{cells}" + (f"{ratios[case]:9.2f}" if ratios else ""))
    print()
    print_result(
        arguments,
        "host_time",
        figures=medians,
        ratios=ratios,
        goal=GOAL,
        holds=all(ratios[case] <= limit for case, limit in GOAL.items()) if GOAL.keys() <= ratios.keys() else None,
    )


if __name__ == "__main__":
    main()
