"""Training throughput of our loop against TRL's SFTTrainer: same model, data, row length, threads and precision.

python benchmarks/train_throughput.py [--workers 2] [--device cuda] [--rounds 3] [--before PATH] [--smoke]

A 23 M-parameter Llama with LoRA rank 8 on all linear layers, rows of 512 tokens, bf16. Each side runs in processes of
its own, alternating; a figure is the median over rounds. TRL's `bfd` packing keeps documents apart, as ours does; its
`wrapped` packing cuts documents anywhere and lets them see each other. All sides train on every token, so that nobody
gains by skipping some; a last line trains on answers only, as instruction tuning does. `--before` is another checkout
of this project, with a `.venv` of its own, whose benchmark takes part as one more side.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.result import add_smoke_option, print_result, shrink

ROW_TOKENS = 512
ROWS_PER_STEP = 8
TRL_MICRO_BATCH_ROWS = 2
"""The fastest of 1, 2, 4 and 8 on a CPU; more make its attention mask larger."""
WARMUP_STEPS = 2
GOAL_AGAINST_BFD = 1.5
GOAL_AGAINST_WRAPPED = 1.0
GOAL_AGAINST_BEFORE = 1.5
SIDES = ("ours", "trl-bfd", "trl-wrapped")


# Layers and widths of the model that both sides train: 23 M parameters; the smallest is for a look whether it runs.
SIZES: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
}
SMALLEST: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def write_model(folder: Path, sizes: dict[str, Any]) -> None:
    """A Llama with random weights, and a tokenizer that TRL asks for but nobody uses."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ft_service.model.scratch import train_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        **sizes,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    train_tokenizer(["a small text", "and another one"], 300).save_pretrained(folder)


def documents(count: int) -> list[list[int]]:
    """Token ids of documents as long as grade-school mathematics problems with answers: 60 to 400, mostly near 180."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(170), 0.4, count), 60, 400).astype(int)
    return [rng.integers(300, 32_000, length).tolist() for length in lengths]


# -- one side, in a process of its own -------------------------------------------------------------------------------


def run_ours(model: Path, steps: int, device: str, answers_only: bool) -> dict[str, float]:
    import numpy as np

    from ft_service.catalog.models import shape_from_config
    from ft_service.data.pack import pack_lengths
    from ft_service.model.adapter import attach_adapter
    from ft_service.model.base import read_config
    from ft_service.model.load import load_causal_lm
    from ft_service.model.weight_files import WeightFiles
    from ft_service.plan.facts import DatasetFacts, Resources
    from ft_service.plan.make import make_plan
    from ft_service.runs.metrics import StepMetrics
    from ft_service.spec.schema import RunSpec
    from ft_service.train.batches import Batches
    from ft_service.train.loop import train
    from ft_service.train.objectives.sft import LossModel
    from ft_service.train.parallel import Parallel, init_process_group
    from ft_service.train.protocol import Hooks, TrainingState

    workers = int(os.environ.get("WORLD_SIZE", "1"))
    spec = RunSpec.model_validate(
        {
            "name": "throughput",
            "model": {"base": str(model)},
            "method": {"type": "lora", "lora_rank": 8, "lora_alpha": 16},
            "data": {"train": [{"path": "generated"}], "max_seq_len": ROW_TOKENS},
            "train": {
                "max_steps": steps + WARMUP_STEPS,
                "global_batch_size": ROWS_PER_STEP,
                "activation_checkpointing": False,
            },
            "parallel": {"num_workers": workers, "use_gpu": device == "cuda"},
            "storage": "unused",
        }
    )
    docs = documents(3 * ROWS_PER_STEP * (steps + WARMUP_STEPS))

    class Row:
        def __init__(self, members: list[int]) -> None:
            chosen = [docs[member] for member in members]
            self.input_ids = np.concatenate([np.array(ids, dtype=np.int32) for ids in chosen])
            trained = [np.arange(len(ids)) >= (0.6 * len(ids) if answers_only else 0) for ids in chosen]
            self.loss_mask = np.concatenate(trained)
            self.document_lengths = np.array([len(ids) for ids in chosen], dtype=np.int32)

    rows = [Row(members) for members in pack_lengths(np.array([len(ids) for ids in docs]), ROW_TOKENS)]
    facts = DatasetFacts(digest="d", conversations=len(docs), rows=len(rows), tokens=1, loss_tokens=1, truncated=0)
    plan = make_plan(spec, facts, shape_from_config(read_config(model)), Resources())
    init_process_group(device == "cuda")
    parallel = Parallel(plan)
    base = load_causal_lm(WeightFiles(model), dtype=parallel.dtype, placement=parallel.placement())
    adapted = attach_adapter(base, spec.method, str(model), None)
    base.train()
    parallel.wrap(LossModel(adapted, base))
    batches = Batches(rows, 0, plan.global_batch_size, plan.micro_batch_size, parallel.rank, workers)
    measured: list[StepMetrics] = []
    ends: list[float] = []

    def on_step(metrics: StepMetrics) -> None:
        measured.append(metrics)
        ends.append(time.perf_counter())

    train(plan, parallel, batches, None, Hooks(on_step, lambda state: None, lambda state: None), TrainingState())
    seconds = ends[-1] - ends[WARMUP_STEPS - 1]
    timed = measured[WARMUP_STEPS:]
    return {
        "tokens_per_second": sum(m.tokens for m in timed) / seconds,
        "loss_tokens_per_second": sum(m.loss_tokens for m in timed) / seconds,
        "loss": measured[-1].loss,
    }


def run_trl(model: Path, steps: int, device: str, strategy: str) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    workers = int(os.environ.get("WORLD_SIZE", "1"))
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    zero2 = {
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps + WARMUP_STEPS,
        per_device_train_batch_size=TRL_MICRO_BATCH_ROWS,
        gradient_accumulation_steps=ROWS_PER_STEP // workers // TRL_MICRO_BATCH_ROWS,
        learning_rate=2e-4,
        packing=True,
        packing_strategy=strategy,
        max_length=ROW_TOKENS,
        bf16=True,
        gradient_checkpointing=False,
        logging_steps=steps + WARMUP_STEPS,
        save_strategy="no",
        report_to=[],
        use_cpu=device == "cpu",
        deepspeed=zero2 if workers > 1 else None,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": documents(3 * ROWS_PER_STEP * (steps + WARMUP_STEPS))}),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"),
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = ends[-1] - ends[WARMUP_STEPS - 1]
    assert isinstance(trainer.train_dataset, Dataset)
    rows = trainer.train_dataset["input_ids"]
    tokens = ROWS_PER_STEP * steps * sum(len(row) for row in rows) / len(rows)
    rate = tokens / seconds
    return {
        "tokens_per_second": rate,
        "loss_tokens_per_second": rate,
        "loss": trainer.state.log_history[-1]["train_loss"],
    }


def run_side(side: str, model: Path, steps: int, device: str) -> None:
    import torch

    if device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if side.startswith("ours"):
        result = run_ours(model, steps, device, answers_only=side == "ours-answers")
    else:
        result = run_trl(model, steps, device, side.removeprefix("trl-"))
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    if int(os.environ.get("RANK", "0")) == 0:
        print("RESULT " + json.dumps({**result, "peak_memory_gib": peak / 2**30}), flush=True)


# -- all sides, alternating ------------------------------------------------------------------------------------------


def measure(side: str, model: Path, arguments: argparse.Namespace) -> dict[str, float]:
    threads = max(1, (os.cpu_count() or 1) // arguments.workers)
    is_before = side == "before"
    command = [str(arguments.before / ".venv/bin/python") if is_before else sys.executable]
    if arguments.workers > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.workers)]
    command += [
        str(arguments.before / "benchmarks/train_throughput.py") if is_before else __file__,
        "--side",
        "ours" if is_before else side,
        "--model",
        str(model),
        "--steps",
        str(arguments.steps),
        "--device",
        arguments.device,
    ]
    accelerator = "cuda" if arguments.device == "cuda" else "cpu"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": accelerator,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    result: dict[str, float] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="processes; more than one train under ZeRO-2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a round")
    parser.add_argument("--before", type=Path, metavar="PATH", help="another checkout to compare with")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    add_smoke_option(parser)
    arguments = parser.parse_args()
    shrink(arguments, workers=1, device="cpu", rounds=1, steps=1, before=None)
    if arguments.side:
        run_side(arguments.side, arguments.model, arguments.steps, arguments.device)
        return

    sides = list(SIDES[:2]) if arguments.smoke else [*SIDES, "ours-answers"]
    if arguments.before:
        arguments.before = arguments.before.resolve()
        sides.append("before")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary, "model")
        write_model(model, SMALLEST if arguments.smoke else SIZES)
        for round_number in range(arguments.rounds):
            for side in sides:
                found[side].append(measure(side, model, arguments))
                print(
                    f"round {round_number + 1}: {side:14} {found[side][-1]['tokens_per_second']:10,.0f} tok/s",
                    flush=True,
                )

    median = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in found.items()
    }
    print(f"\n{'side':14} {'tok/s':>10} {'loss tok/s':>11} {'peak GiB':>9} {'loss':>7}")
    for side, figures in median.items():
        print(
            f"{side:14} {figures['tokens_per_second']:10,.0f} {figures['loss_tokens_per_second']:11,.0f} "
            f"{figures['peak_memory_gib']:9.2f} {figures['loss']:7.3f}"
        )
    ours = median["ours"]["tokens_per_second"]
    goal = {"trl-bfd": GOAL_AGAINST_BFD, "trl-wrapped": GOAL_AGAINST_WRAPPED, "before": GOAL_AGAINST_BEFORE}
    ratios = {side: ours / median[side]["tokens_per_second"] for side in sides if side in goal}
    print("\n" + ", ".join(f"ours / {side} = {ratio:.2f}" for side, ratio in ratios.items()))
    print_result(
        arguments,
        "train_throughput",
        workers=arguments.workers,
        device=arguments.device,
        figures=median,
        ratios=ratios,
        goal=goal,
        holds=all(ratio >= goal[side] for side, ratio in ratios.items()),
    )


if __name__ == "__main__":
    main()
