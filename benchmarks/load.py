"""Loading a base over several processes under ZeRO-3: our sharded loader against transformers' own, bf16 and 4-bit.

python benchmarks/load.py [--workers 4] [--rounds 2] [--gigabytes 3.0] [--device cuda] [--smoke]

Makes a bf16 Llama of several safetensors files, and loads it by both sides in turn, each in processes of its own. Timed
from a barrier to a barrier, so without imports and process groups. "Private peak" is the most anonymous memory that any
process held (RssAnon: neither page cache nor mapped files), its imports ("base") included. The files are in the page
cache for both sides. The stock QLoRA load leaves the whole 4-bit model on every process, to be partitioned later; that
time is not counted against it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.result import add_smoke_option, print_result, shrink

SIDES = ("ours", "stock", "ours-4bit", "stock-4bit")
GOAL_SPEEDUP = {"bf16": 8.0, "4bit": 2.0}
PROCESS_BASE_BYTES = 0.4e9
HIDDEN = 2048
INTERMEDIATE = 5632
VOCABULARY = 32_000
KV_HEADS = 4
HEADS = 16


def write_checkpoint(folder: Path, gigabytes: float) -> None:
    """A Llama with random weights, two layers a file, never whole in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    per_layer = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN * KV_HEADS // HEADS + 3 * HIDDEN * INTERMEDIATE)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / per_layer))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    files: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        layer = int(name.split(".")[2]) // 2 if ".layers." in name else "ends"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    torch.manual_seed(0)
    for file, members in files.items():
        weights = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for name, shape in members.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(2 * shape.numel() for shape in shapes.values())},
        "weight_map": {name: file for file, members in files.items() for name in members},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class PrivateMemory:
    """The most anonymous memory of this process while the block runs, looked at every 5 ms."""

    def __enter__(self) -> "PrivateMemory":
        self.start = self.peak = self._now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.peak = max(self.peak, self._now())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024


# -- one side, in a process group of its own -------------------------------------------------------------------------


def run_side(side: str, model: Path, device: str) -> None:
    import torch
    import torch.distributed as dist

    from ft_service.catalog.models import shape_from_config
    from ft_service.model.base import read_config
    from ft_service.model.load import load_causal_lm
    from ft_service.model.weight_files import TensorEntry, WeightFiles
    from ft_service.plan.facts import DatasetFacts, Resources
    from ft_service.plan.make import make_plan
    from ft_service.spec.schema import RunSpec
    from ft_service.train.parallel import Parallel, end_process, init_process_group

    torch.set_num_threads(1)
    init_process_group(device == "cuda")
    workers = dist.get_world_size()
    four_bit = side.endswith("4bit")
    spec = RunSpec.model_validate(
        {
            "name": "load",
            "model": {"base": str(model)},
            "method": {"type": "qlora" if four_bit else "lora"},
            "data": {"train": [{"path": "unused"}]},
            "train": {"global_batch_size": workers, "micro_batch_size": 1},
            "parallel": {"num_workers": workers, "use_gpu": device == "cuda", "zero_stage": 3},
            "storage": "unused",
        }
    )
    facts = DatasetFacts(digest="d", conversations=1, rows=1, tokens=1, loss_tokens=1, truncated=0)
    plan = make_plan(spec, facts, shape_from_config(read_config(model)), Resources())
    parallel = Parallel(plan)
    read = [0]

    class Counting(WeightFiles):
        def read_into(self, entry: TensorEntry, start: int, buffer: memoryview) -> None:
            read[0] += len(buffer)
            super().read_into(entry, start, buffer)

    if side.startswith("stock"):
        from transformers.quantizers import quantizer_bnb_4bit  # noqa: F401
    dist.barrier()
    with PrivateMemory() as memory:
        started = time.perf_counter()
        loaded: Any
        if side.startswith("ours"):
            loaded = load_causal_lm(
                Counting(model), dtype=torch.bfloat16, four_bit=four_bit, placement=parallel.placement()
            )
        else:
            loaded = load_stock(model, parallel, four_bit)
        dist.barrier()
        seconds = time.perf_counter() - started
    held = sum(getattr(p, "ds_tensor", p).nbytes for p in loaded.parameters())
    on_gpu = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    mine = {"base": memory.start, "peak": memory.peak, "read": read[0], "held": held, "gpu_peak": on_gpu}
    everyone: list[Any] = [None] * workers
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps({"seconds": seconds, "ranks": everyone}), flush=True)
    end_process()


def load_stock(model: Path, parallel: Any, four_bit: bool) -> Any:
    import torch
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    with parallel.hf_deepspeed_config():  # HfDeepSpeedConfig, as its documentation asks for
        return LlamaForCausalLM.from_pretrained(
            model,
            dtype=torch.bfloat16,
            quantization_config=nf4 if four_bit else None,
            device_map={"": parallel.device} if four_bit and parallel.device.type == "cuda" else None,
        )


# -- all sides, alternating ------------------------------------------------------------------------------------------


def measure(side: str, model: Path, workers: int, device: str) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)),
        *(__file__, "--side", side, "--model", str(model), "--device", device),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": device}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Median time; the highest peak and the largest share of any process in any round."""
    ranks = [rank for run in runs for rank in run["ranks"]]
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        **{
            f"{name}_gb": max(rank[name] for rank in ranks) / 1e9
            for name in ("base", "peak", "read", "held", "gpu_peak")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    add_smoke_option(parser)
    arguments = parser.parse_args()
    shrink(arguments, workers=2, rounds=1, gigabytes=0.1)
    if arguments.side:
        run_side(arguments.side, arguments.model, arguments.device)
        return

    found: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary, "model")
        model.mkdir()
        print(f"writing a checkpoint of {arguments.gigabytes} GB", flush=True)
        write_checkpoint(model, arguments.gigabytes)
        for round_number in range(arguments.rounds):
            for side in arguments.sides:
                found[side].append(measure(side, model, arguments.workers, arguments.device))
                print(f"round {round_number + 1}: {side:10} {found[side][-1]['seconds']:7.1f} s", flush=True)

    figures = {side: summary(runs) for side, runs in found.items()}
    print(f"\n{'side':12}{'seconds':>9}{'private peak GB':>17}{'base GB':>9}{'held GB':>9}{'read GB':>9}")
    for side, row in figures.items():
        read = f"{row['read_gb']:9.2f}" if side.startswith("ours") else "   mapped"
        print(f"{side:12}{row['seconds']:9.1f}{row['peak_gb']:17.2f}{row['base_gb']:9.2f}{row['held_gb']:9.2f}{read}")
    largest = 2 * VOCABULARY * HIDDEN / 1e9
    layer = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN * KV_HEADS // HEADS + 3 * HIDDEN * INTERMEDIATE) / 1e9
    ratios: dict[str, float] = {}
    peaks: dict[str, dict[str, float]] = {}
    holds = True
    for name, suffix, extra in (("bf16", "", largest), ("4bit", "-4bit", layer)):
        ours = figures.get(f"ours{suffix}")
        stock = figures.get(f"stock{suffix}")
        if ours is None or stock is None:
            continue
        ratios[name] = stock["seconds"] / ours["seconds"]
        peaks[name] = {"peak_gb": ours["peak_gb"], "goal_gb": ours["held_gb"] + extra + PROCESS_BASE_BYTES / 1e9}
        holds = holds and ratios[name] >= GOAL_SPEEDUP[name] and peaks[name]["peak_gb"] <= peaks[name]["goal_gb"]
        print(
            f"{name}: {ratios[name]:.1f} times faster (goal {GOAL_SPEEDUP[name]:.0f}); peak {ours['peak_gb']:.2f} GB "
            f"(goal {peaks[name]['goal_gb']:.2f})"
        )
    print_result(
        arguments,
        "load",
        workers=arguments.workers,
        device=arguments.device,
        figures=figures,
        ratios=ratios,
        peaks=peaks,
        goal=GOAL_SPEEDUP,
        holds=holds,
    )


if __name__ == "__main__":
    main()
