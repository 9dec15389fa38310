"""What one machine's GPUs do: does training work there, take the memory that the plan says, and keep the GPU busy?

python benchmarks/gpu_check.py [--piece lora-8b] [--out gpu-check]       # or: make gpu-check [PIECE=...] [WHEELS=DIR]
python benchmarks/gpu_check.py --dry                                     # every piece, tiny, on the CPU, in seconds

Needs torch 2.11 or newer and the packages of ``--packages``, but no Ray, no hub and no weights: bases have random
weights, which the loader reads as if from files. Each piece writes its own JSON file, so a piece can run again alone;
the table and the last line of JSON come from these files. ``stock`` is transformers and peft with torch's AdamW and
bf16 autocast, on the same base, rows and GPU. docs/benchmarks.md says what each figure means.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.result import print_result

if TYPE_CHECKING:
    import torch

    from ft_service.catalog.gpus import Gpu
    from ft_service.catalog.models import ModelShape
    from ft_service.plan.memory import Layout
    from ft_service.plan.plan import RunPlan

PIECE_SECONDS = 480
TOTAL_SECONDS = 1500
END_SECONDS = 45
"""From SIGTERM to SIGKILL: torchrun gives its workers 30."""
LEAST_SECONDS = 60
"""A piece does not start with less time left."""
MIN_TORCH = (2, 11)
PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "deepspeed": "deepspeed",
    "fsspec": "fsspec",
    "ninja": "ninja",
    "numpy": "numpy",
    "obstore": "obstore",
    "peft": "peft",
    "psutil": "psutil",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "pytest": "pytest",
    "safetensors": "safetensors",
    "transformers": "transformers",
    "yaml": "pyyaml",
}
"""Module -> package, beside torch."""
PLAN_BELOW = 0.02
PLAN_ABOVE = 0.10
"""The plan may be below the peak by 2 % of it, and above it by 10 %."""
RATIO_TO_STOCK = 1.0
WARMUP_STEPS = 2
DRY_GPU = "H100"
"""The type whose datasheet a dry run uses."""


@dataclass(frozen=True)
class Training:
    """What a piece trains: one of `models`, the first that the plan fits."""

    method: str
    models: tuple[str, ...]
    rows: int
    row_tokens: int = 4096
    steps: int = 8
    workers: int = 1
    zero_stage: int | None = None
    """None: the plan chooses it."""
    has_stock: bool = True


TRAININGS = {
    "lora-8b": Training("lora", ("llama-3.1-8b",), rows=2),
    "full": Training("full", ("llama-3.1-8b", "llama-3.2-3b", "llama-3.2-1b"), rows=1),
    "qlora-70b": Training("qlora", ("llama-3.3-70b-instruct",), rows=1, steps=4),
    "zero3-qlora": Training(
        "qlora", ("llama-3.3-70b-instruct",), rows=1, steps=4, workers=2, zero_stage=3, has_stock=False
    ),
}
PIECES = ("tests", *TRAININGS)


# -- the base, its data and its plan ---------------------------------------------------------------------------------


def random_weight_files(shape: "ModelShape") -> Any:
    """A checkpoint of a shape, whose bytes are the same few MiB of random bf16 numbers over and over."""
    import numpy as np
    import torch

    from ft_service.model.dry_run import tensors_from_shape
    from ft_service.model.weight_files import TensorEntry, WeightFiles

    llama, entries = tensors_from_shape(shape)
    noise = torch.empty(8 * 1024 * 1024, dtype=torch.bfloat16).normal_(0, 0.02).view(torch.uint8).numpy()

    class RandomWeightFiles(WeightFiles):
        @property
        def config(self) -> dict[str, Any]:
            return {**llama.to_dict(), "architectures": ["LlamaForCausalLM"]}

        @property
        def tensors(self) -> dict[str, TensorEntry]:
            return entries

        def check(self) -> None:
            pass

        def json_file(self, name: str) -> None:
            return None

        def read_into(self, entry: TensorEntry, start: int, buffer: memoryview) -> None:
            target = np.frombuffer(buffer, dtype=np.uint8)
            for begin in range(0, len(target), len(noise)):
                piece = target[begin : begin + len(noise)]
                piece[:] = noise[: len(piece)]

    return RandomWeightFiles("/random-weights")


def shape_of(model: str, dry: bool) -> "ModelShape":
    from ft_service.catalog import models

    facts = models.find(model)
    assert facts is not None, model
    if not dry:
        return facts.shape
    return replace(
        facts.shape,
        hidden_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=512,
        vocab_size=1024,
    )


@cache
def device_facts() -> dict[str, Any]:
    """Name and bytes of the first GPU, from a process of its own: this one must not hold memory of that GPU."""
    facts = "import json, torch; p = torch.cuda.get_device_properties(0); print(json.dumps([p.name, p.total_memory]))"
    printed = subprocess.run([sys.executable, "-c", facts], capture_output=True, text=True, check=True).stdout
    name, num_bytes = json.loads(printed.splitlines()[-1])
    return {"name": name, "memory_gib": num_bytes / 2**30}


def this_gpu(dry: bool) -> "Gpu":
    """The catalogue's entry for this GPU, with the memory that torch reports. Raises ValueError for an unknown GPU."""
    from ft_service.catalog.gpus import GPUS, find_gpu, known_gpus

    if dry:
        return GPUS[DRY_GPU]
    device = device_facts()
    memory_gib = device["memory_gib"]
    words = device["name"].replace("NVIDIA ", "").replace("GeForce ", "GeForce-").split()
    names = ["-".join(words[:count]) for count in range(len(words), 0, -1)]
    # "NVIDIA A100-SXM4-80GB" is an A100 of 80 GB.
    names += [f"{names[-1].split('-')[0]}-{round(memory_gib / 10) * 10}G", names[-1].split("-")[0]]
    gpu = next(filter(None, map(find_gpu, names)), None)
    if gpu is None:
        raise ValueError(f"GPU {device['name']!r} is not in the catalogue. {known_gpus(names[-1])}")
    return replace(gpu, memory_gib=memory_gib)


def plan_of(training: Training, model: str, dry: bool) -> "RunPlan":
    from ft_service.plan.facts import DatasetFacts, Resources
    from ft_service.plan.make import make_plan
    from ft_service.spec.schema import RunSpec

    gpu = this_gpu(dry)
    rows_per_step = training.rows * training.workers
    num_steps = training.steps + WARMUP_STEPS
    adapter = {} if training.method == "full" else {"lora_rank": 16, "lora_alpha": 32}
    parallel: dict[str, Any] = {"num_workers": training.workers, "use_gpu": not dry, "offload": "none"}
    if training.zero_stage is not None:
        parallel["zero_stage"] = training.zero_stage
    spec = RunSpec.model_validate(
        {
            "name": "gpu-check",
            "model": {"base": model},
            "method": {"type": training.method, **adapter},
            "data": {"train": [{"path": "generated"}], "max_seq_len": training.row_tokens},
            "train": {
                "max_steps": num_steps,
                "global_batch_size": rows_per_step,
                "micro_batch_size": training.rows,
            },
            "parallel": parallel,
            "storage": "unused",
        }
    )
    tokens = rows_per_step * num_steps * training.row_tokens
    rows = rows_per_step * num_steps
    data = DatasetFacts(digest="d", conversations=rows, rows=rows, tokens=tokens, loss_tokens=tokens, truncated=0)
    resources = Resources(gpu_type=gpu.name, gpu_memory_gib=gpu.memory_gib, gpus_per_node=training.workers)
    return make_plan(spec, data, shape_of(model, dry), resources)


def first_that_fits(training: Training, dry: bool) -> str:
    """The first of the training's models that the plan fits; otherwise the last of them, which may then fail."""
    fits = (model for model in training.models if plan_of(training, model, dry).fits is not False)
    return next(fits, training.models[-1])


def layout_of(plan: "RunPlan") -> "Layout":
    """The plan's layout, which the memory model and the time model take."""
    from ft_service.plan.search import search_space

    return replace(
        search_space(plan.spec, plan.workers_per_node).layout,
        zero_stage=plan.zero_stage,
        micro_batch_size=plan.micro_batch_size,
        activation_checkpointing=plan.activation_checkpointing,
        kept_layers=plan.kept_layers,
    )


def token_rows(training: Training, vocabulary: int) -> Any:
    """[rows of all steps, tokens]: random token ids, the same for both sides."""
    import numpy as np

    count = training.rows * training.workers * (training.steps + WARMUP_STEPS)
    return np.random.default_rng(0).integers(0, vocabulary, (count, training.row_tokens)).astype(np.int32)


# -- one side of a piece, in processes of its own --------------------------------------------------------------------


def run_ours(training: Training, model: str, dry: bool) -> dict[str, Any]:
    """The worker's own path: plan, loader, adapter, DeepSpeed, training loop."""
    import numpy as np
    import torch

    from ft_service.model.trainable import TrainableModel
    from ft_service.plan.memory import GIB, estimate_memory
    from ft_service.plan.speed import step_time
    from ft_service.runs.metrics import StepMetrics
    from ft_service.train.batches import Batches
    from ft_service.train.loop import train
    from ft_service.train.objectives.sft import LossModel
    from ft_service.train.parallel import Parallel, init_process_group
    from ft_service.train.protocol import Hooks, TrainingState

    @dataclass
    class Row:
        input_ids: np.ndarray
        loss_mask: np.ndarray
        document_lengths: np.ndarray

    shape = shape_of(model, dry)
    plan = plan_of(training, model, dry)
    gpu = this_gpu(dry)
    init_process_group(use_gpu=not dry)
    torch.set_num_threads(1 if dry else max(1, (os.cpu_count() or 1) // training.workers))
    parallel = Parallel(plan)
    started = time.perf_counter()
    with parallel.hf_deepspeed_config():
        trainable = TrainableModel(plan, Path("unused"), random_weight_files(shape), parallel.placement())
    load_seconds = time.perf_counter() - started
    load_peak_gib = parallel.peak_memory_gib()[0]
    parallel.wrap(LossModel(trainable.module, trainable.causal_lm))
    if not dry:
        torch.cuda.reset_peak_memory_stats()
    tokens = np.array([training.row_tokens], dtype=np.int32)
    all_trained = np.ones(training.row_tokens, dtype=bool)
    rows = [Row(ids, all_trained, tokens) for ids in token_rows(training, shape.vocab_size)]
    batches = Batches(rows, 0, plan.global_batch_size, plan.micro_batch_size, parallel.rank, parallel.world_size)
    measured: list[StepMetrics] = []
    hooks = Hooks(on_step=measured.append, on_best=lambda state: None, on_checkpoint=lambda state: None)
    train(plan, parallel, batches, None, hooks, TrainingState())
    allocated_gib, reserved_gib = parallel.peak_memory_gib()
    layout = layout_of(plan)
    estimate = estimate_memory(shape, layout)
    seconds = step_time(shape, layout, plan.gradient_accumulation_steps, gpu).seconds
    figures = {
        "tokens_per_second": statistics.median(step.tokens_per_second for step in measured[WARMUP_STEPS:]),
        "losses": [step.loss for step in measured],
        "load_seconds": load_seconds,
        "load_peak_gib": load_peak_gib,
        "allocated_gib": allocated_gib,
        "reserved_gib": reserved_gib,
        "device_gib": reserved_gib + outside_torch_gib(dry),
        "planned": {
            "gpu_gib": estimate.gpu_bytes / GIB,
            "components_gib": {name: size / GIB for name, size in estimate.gpu.items()},
            "tokens_per_second": plan.global_batch_size * training.row_tokens / seconds,
            "fits": plan.fits,
        },
        "layout": asdict(layout),
    }
    most = parallel.all_gather_object(figures["device_gib"])
    return {**figures, "device_gib": max(most), "ray_imported": "ray" in sys.modules}


def outside_torch_gib(dry: bool) -> float:
    """What else takes memory of this GPU now: the context, NCCL, and other processes."""
    import torch

    if dry:
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / 2**30


def run_stock(training: Training, model: str, dry: bool, recompute: bool) -> dict[str, Any]:
    """transformers, peft, bf16 autocast and torch's AdamW, without Trainer: its loop adds time."""
    import torch
    from peft import LoraConfig, get_peft_model

    from ft_service.model.load import WholeWeights, load_causal_lm

    shape = shape_of(model, dry)
    device = torch.device("cpu") if dry else torch.device("cuda", 0)
    torch.set_num_threads(1 if dry else os.cpu_count() or 1)
    is_full = training.method == "full"
    started = time.perf_counter()
    # The loader gives the same modules and bits as transformers' own, and no file of this size is needed.
    base = load_causal_lm(
        random_weight_files(shape),
        dtype=torch.float32 if is_full else torch.bfloat16,
        four_bit=training.method == "qlora",
        placement=WholeWeights(device),
        attention="sdpa",
    )
    load_seconds = time.perf_counter() - started
    if training.method == "qlora":
        use_bitsandbytes_linears(base)
    if recompute:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    module: torch.nn.Module = base if is_full else get_peft_model(base, lora)
    module.train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    if not dry:
        torch.cuda.reset_peak_memory_stats()
    ids = torch.from_numpy(token_rows(training, shape.vocab_size)).long().to(device)
    losses = []
    seconds = []
    for step in range(training.steps + WARMUP_STEPS):
        batch = ids[step * training.rows : (step + 1) * training.rows]
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = module(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - began)
    return {
        "tokens_per_second": training.rows * training.row_tokens / statistics.median(seconds[WARMUP_STEPS:]),
        "losses": losses,
        "load_seconds": load_seconds,
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if not dry else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if not dry else None,
        "recompute": recompute,
    }


def use_bitsandbytes_linears(model: "torch.nn.Module") -> None:
    """Turn our subclass of bitsandbytes' 4-bit layer back into that layer, with the same weights."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.__class__ = Linear4bit


def run_side(arguments: argparse.Namespace) -> None:
    """In a process of its own: measure, and let rank 0 write the figures."""
    import torch

    training = training_of(arguments.piece[0], arguments.dry)
    try:
        if arguments.side == "ours":
            figures = run_ours(training, arguments.model, arguments.dry)
        else:
            figures = run_stock(training, arguments.model, arguments.dry, arguments.recompute)
    except torch.OutOfMemoryError as error:
        figures = {"error": f"out of memory: {str(error).splitlines()[0]}", "out_of_memory": True}
    failed = "error" in figures
    if failed or int(os.environ.get("RANK", "0")) == 0:
        arguments.side_file.write_text(json.dumps(figures))
    # Exit without Python's shutdown: see ft_service.train.parallel.end_process. A barrier would hang after an error.
    # torchrun ends the other workers when one fails; they may wait for this one in a collective.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(failed))


# -- a piece ---------------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """The time that a piece may still take."""

    ends: float

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()


def training_of(piece: str, dry: bool) -> Training:
    training = TRAININGS[piece]
    return replace(training, row_tokens=64, steps=1) if dry else training


def side_figures(side: str, training: Training, model: str, clock: Clock, *given: str) -> dict[str, Any]:
    """What a side measured; {"error": ...} if it failed or took too long."""
    dry = "--dry" in given
    command = [sys.executable]
    if training.workers > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(training.workers)]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu" if dry else "cuda",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1" if dry else str(max(1, (os.cpu_count() or 1) // training.workers)),
    }
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)  # both sides run with expandable segments, or with the defaults
    if side == "stock" and not dry:
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "figures.json")
        command += [__file__, "--side", side, "--model", model, "--side-file", str(file), *given]
        problem, output = run_within(command, environment, clock.left)
        if file.exists():
            figures: dict[str, Any] = json.loads(file.read_text())
            return figures
    return {"error": problem or "no figures", "output": output[-2000:]}


def run_within(command: list[str], environment: dict[str, str], seconds: float) -> tuple[str, str]:
    """Run a command with all its children; returns what went wrong ('' if nothing did) and its output."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
    except BaseException as error:
        # Trap: torchrun's workers are in sessions of their own, and hold the pipe. torchrun ends them on SIGTERM.
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return f"not finished after {seconds:.0f} s", output
    return f"exit code {process.returncode}" if process.returncode else "", output


def check_training(piece: str, dry: bool, clock: Clock) -> dict[str, Any]:
    """Train our side and the stock side, and compare both with each other and with the plan."""
    training = training_of(piece, dry)
    model = first_that_fits(training, dry)
    given = ["--piece", piece, *(["--dry"] if dry else [])]
    ours = side_figures("ours", training, model, clock, *given)
    stock: dict[str, Any] = {}
    if training.has_stock:
        recompute = bool(ours.get("layout", {}).get("activation_checkpointing", True))
        stock = side_figures("stock", training, model, clock, *given, *(["--recompute"] if recompute else []))
        if stock.get("out_of_memory") and not recompute:
            stock = side_figures("stock", training, model, clock, *given, "--recompute")
    return {"model": model, **asdict(training), **judged(training, model, ours, stock, dry), "stock": stock}


def judged(training: Training, model: str, ours: dict[str, Any], stock: dict[str, Any], dry: bool) -> dict[str, Any]:
    goal = {"plan_below": PLAN_BELOW, "plan_above": PLAN_ABOVE}
    if training.has_stock:
        goal["ratio_to_stock"] = RATIO_TO_STOCK
    if "error" in ours:
        return {"ours": ours, "goal": goal, "holds": False, "error": f"ours: {ours['error']}"}
    shape = shape_of(model, dry)
    for side in (ours, stock):
        if "tokens_per_second" in side:
            side["mfu"] = mfu(shape, training, side["tokens_per_second"], dry)
    ratio = None
    if "tokens_per_second" in stock:
        ratio = ours["tokens_per_second"] / stock["tokens_per_second"]
    plan_over_peak = ours["planned"]["gpu_gib"] / ours["device_gib"]
    finite = all(loss == loss and abs(loss) != float("inf") for loss in ours["losses"])
    holds = finite and 1 - PLAN_BELOW <= plan_over_peak <= 1 + PLAN_ABOVE
    if training.has_stock:
        # A side that runs out of memory where ours trains has lost the comparison; any other failure leaves it open.
        holds = holds and (bool(stock.get("out_of_memory")) or (ratio is not None and ratio >= RATIO_TO_STOCK))
    return {
        "ours": ours,
        "ratio_to_stock": ratio,
        "plan_over_peak": plan_over_peak,
        "goal": goal,
        "holds": holds,
        "error": f"stock: {stock['error']}" if "error" in stock else None,
    }


def mfu(shape: "ModelShape", training: Training, tokens_per_second: float, dry: bool) -> float:
    """Model FLOPs a second, without recomputation, over the datasheet's peak of the GPUs."""
    from ft_service.plan.memory import Layout
    from ft_service.plan.speed import flops_per_token

    method: Any = training.method
    layout = Layout(method=method, max_seq_len=training.row_tokens, activation_checkpointing=False)
    peak = this_gpu(dry).bf16_tflops * 1e12 * training.workers
    return tokens_per_second * flops_per_token(shape, layout) / peak


def check_tests(piece: str, dry: bool, clock: Clock) -> dict[str, Any]:
    """The tests marked gpu, without conftest.py, which asks for Ray's tests as well."""
    files = [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in file.read_text(encoding="utf-8")
    ]
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
        command += ["--collect-only"] if dry else [f"--junitxml={report}"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu" if dry else "cuda"}
        problem, output = run_within([*command, *files], environment, clock.left)
        counts = {"tests": output.count("::") if dry else 0, "failures": 0, "errors": 0, "skipped": 0}
        if report.exists():
            suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
            counts = {name: int(suite.get(name, "0")) for name in counts}
    holds = not problem and counts["tests"] > counts["skipped"]
    return {
        "files": files,
        "figures": counts,
        "goal": {"failures": 0, "errors": 0},
        "holds": holds,
        "error": f"{problem}: {output[-2000:]}" if problem else None,
    }


CHECKS: dict[str, Callable[[str, bool, Clock], dict[str, Any]]] = {
    "tests": check_tests,
    **dict.fromkeys(TRAININGS, check_training),
}


def check_piece(piece: str, dry: bool, clock: Clock) -> dict[str, Any]:
    if not dry and piece in TRAININGS and TRAININGS[piece].workers > num_gpus():
        return {"skipped": f"needs {TRAININGS[piece].workers} GPUs", "goal": None, "holds": None}
    if clock.left < LEAST_SECONDS:
        return {"skipped": "no time left; run it alone", "goal": None, "holds": None}
    began = time.monotonic()
    try:
        result = CHECKS[piece](piece, dry, clock)
    except Exception as error:  # the other pieces go on
        result = {"goal": None, "holds": False, "error": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": time.monotonic() - began}


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


# -- all pieces ------------------------------------------------------------------------------------------------------


def machine(dry: bool) -> dict[str, Any]:
    """Hardware and versions, for whoever reads the figures later."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        "device": "cpu" if dry else device_facts()["name"],
        "gpus": 0 if dry else num_gpus(),
        "gpu_memory_gib": None if dry else device_facts()["memory_gib"],
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")},
    }


def require_packages(dry: bool) -> None:
    """Exit with a message if this machine cannot run the check."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if importlib.util.find_spec("torch") is None:
        missing.insert(0, "torch")
    if missing:
        sys.exit(
            f"Missing packages: {', '.join(missing)}. Install them, or carry them as wheels: make gpu-check WHEELS="
        )
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        sys.exit(f"torch {torch.__version__} is older than {'.'.join(map(str, MIN_TORCH))}.")
    if not dry and not torch.cuda.is_available():
        sys.exit("torch sees no GPU. --dry runs every piece on the CPU.")


def summary_row(piece: str, result: dict[str, Any]) -> str:
    """A line of the last table."""
    verdict = {True: "holds", False: "FAILS", None: "-"}[result["holds"]]
    if "skipped" in result:
        return f"{piece:12} {result['skipped']}"
    if "figures" not in result and "ours" not in result:
        return f"{piece:12} {result['error'][:80]}  {verdict}"
    if piece == "tests":
        return f"{piece:12} {result['figures']['tests']} tests, {result['figures']['skipped']} skipped  {verdict}"
    ours = result["ours"]
    if "error" in ours:
        return f"{piece:12} {ours['error'][:80]}  {verdict}"
    stock = result["stock"]
    theirs = f"{stock['tokens_per_second']:9,.0f} {stock['mfu']:6.1%}" if "mfu" in stock else f"{'-':>9} {'-':>6}"
    planned = ours["planned"]
    return (
        f"{piece:12} {result['model']:24} {ours['tokens_per_second']:9,.0f} {planned['tokens_per_second']:9,.0f} "
        f"{ours['mfu']:6.1%} {theirs} {ours['reserved_gib']:9.1f} {ours['device_gib']:8.1f} "
        f"{planned['gpu_gib']:8.1f}  {verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--piece", action="append", choices=PIECES, help="only this piece; can be given several times")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the pieces' JSON files")
    parser.add_argument(
        "--dry", "--smoke", dest="dry", action="store_true", help="tiny sizes on the CPU, to see that it works"
    )
    parser.add_argument("--packages", action="store_true", help="print the packages that the check needs beside torch")
    parser.add_argument("--side", choices=["ours", "stock"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--side-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--recompute", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.packages:
        print(*PACKAGES.values())
        return
    require_packages(arguments.dry)
    if arguments.side:
        run_side(arguments)
        return
    arguments.smoke = arguments.dry
    if not arguments.dry:
        check_all(arguments, arguments.out)
        return
    with tempfile.TemporaryDirectory() as temporary:
        check_all(arguments, Path(temporary))


def check_all(arguments: argparse.Namespace, out: Path) -> None:
    """Run the pieces asked for, each into its file, and print all files of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + TOTAL_SECONDS
    for piece in arguments.piece or PIECES:
        print(f"{piece} ...", flush=True)
        result = check_piece(piece, arguments.dry, Clock(min(ends, time.monotonic() + PIECE_SECONDS)))
        if arguments.dry:
            result.update(goal=None, holds=None)
        content = {"piece": piece, **machine(arguments.dry), **result}
        (out / f"{piece}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if problem := result.get("error"):
            print(f"{piece}: {problem}", file=sys.stderr, flush=True)
    results = {
        piece: json.loads((out / f"{piece}.json").read_text(encoding="utf-8"))
        for piece in PIECES
        if (out / f"{piece}.json").exists()
    }
    print(f"\n{'':37} {'':9} {'':9} {'':6} {'stock':>9} {'stock':>6} {'GiB':>9} {'GiB on':>8} {'GiB':>8}")
    print(
        f"{'piece':12} {'model':24} {'tokens/s':>9} {'planned':>9} {'MFU':>6} {'tokens/s':>9} {'MFU':>6} "
        f"{'reserved':>9} {'the GPU':>8} {'planned':>8}"
    )
    for piece, result in results.items():
        print(summary_row(piece, result))
    verdicts = [result["holds"] for result in results.values() if result["holds"] is not None]
    problems = {piece: result["error"] for piece, result in results.items() if result.get("error")}
    print_result(
        arguments,
        "gpu_check",
        figures=results,
        problems=problems,
        goal={piece: result["goal"] for piece, result in results.items()},
        holds=bool(verdicts) and all(verdicts),
    )
    if problems and arguments.dry:
        sys.exit(1)


if __name__ == "__main__":
    main()
