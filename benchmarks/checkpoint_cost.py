"""What saving costs: the training loop with a checkpoint every ten steps against the same one that never saves.

python benchmarks/checkpoint_cost.py [--methods lora,full] [--rounds 3] [--steps 60] [--smoke]

Two workers under torchrun, as a run has them, on a CPU. Both sides run in turn, each in processes of its own, and
change places every round. A side's figure is the time from step 10 to the last step, by the times in metrics.jsonl: it
holds the saves after steps 10, 20, ..., and their writing beside the steps. The median step is shown too, but decides
nothing: nine of ten steps start no save. A slow-down is of two runs that followed each other; of those the median is
taken.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.result import add_smoke_option, print_result, shrink
from ft_service.catalog.models import shape_from_config
from ft_service.data.prepare import prepare_dataset
from ft_service.errors import TrainingError
from ft_service.model.base import load_tokenizer, read_config
from ft_service.plan.facts import Resources
from ft_service.plan.make import make_plan
from ft_service.runs.events import CheckpointSaved, read_events
from ft_service.runs.folder import RunFolder
from ft_service.runs.metrics import read_metrics
from ft_service.spec.load import parse_run_spec
from ft_service.storage.storage import Storage
from tests.worlds import TINY, made_up_texts, write_base, write_records

SAVE_EVERY = 10
GOAL_PERCENT = 5.0
VOCAB_SIZE = 4096
ROW_TOKENS = 512
NUM_WORKERS = 2
TABLE_WIDTH = 150


@dataclass(frozen=True)
class Subject:
    """What is trained; `sizes` are those of the model."""

    method: str
    zero_stage: int
    rows_per_step: int
    sizes: dict[str, int]


SUBJECTS = {
    "lora": Subject(
        "{type: lora, lora_rank: 16}",
        2,
        2,
        {"hidden_size": 768, "num_layers": 24, "num_heads": 12, "num_kv_heads": 4, "intermediate_size": 2048},
    ),
    "full": Subject(
        "{type: full}",
        2,
        8,
        {"hidden_size": 384, "num_layers": 8, "num_heads": 6, "num_kv_heads": 2, "intermediate_size": 1024},
    ),
}

SMALLEST = replace(SUBJECTS["lora"], sizes=TINY)

console = Console(highlight=False, stderr=True, soft_wrap=True)


@dataclass(frozen=True)
class Side:
    """One run."""

    loop_seconds: float
    step_seconds: float
    """Median."""
    save_seconds: float | None
    """From the end of a step to its checkpoint being whole, median; none if nothing was saved."""


@dataclass(frozen=True)
class Figures:
    parameters: int
    trained: int
    checkpoint_mib: float
    never_seconds: float
    saving_seconds: float
    never_step_seconds: float
    saving_step_seconds: float
    save_seconds: float
    slow_downs_percent: list[float]
    slow_down_percent: float
    """Of the whole loop, median over rounds."""


def prepare(world: Path, subject: Subject, run_id: str, num_steps: int, every: int | None) -> RunFolder:
    """A run as the launcher leaves it to its workers."""
    spec = parse_run_spec(
        f"""
name: cost
model: {{base: {world}/base}}
method: {subject.method}
data: {{train: [{{path: {world}/train.jsonl, source: made up, license: CC0-1.0}}], max_seq_len: {ROW_TOKENS}}}
train: {{max_steps: {num_steps}, global_batch_size: {subject.rows_per_step}}}
parallel: {{num_workers: {NUM_WORKERS}, use_gpu: false, zero_stage: {subject.zero_stage}}}
checkpoint: {{every_steps: {"null" if every is None else every}}}
storage: {world}/storage
"""
    )
    run = RunFolder(Storage(spec.storage), run_id)
    dataset = prepare_dataset(spec, load_tokenizer(world / "base"), run.storage)
    shape = shape_from_config(read_config(world / "base"))
    run.write_plan(spec, make_plan(spec, dataset.facts, shape, Resources()), dataset.sources)
    return run


def train(run: RunFolder) -> Side:
    """Let its workers finish it, and measure from its files."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_WORKERS)]
    command += ["-m", "ft_service.train.worker", run.storage.root, run.run_id]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise TrainingError(f"run {run.run_id} failed. {done.stdout[-2000:]}{done.stderr[-4000:]}")
    metrics = read_metrics(run.storage, run.run_id)
    times = {m.step: m.time for m in metrics}
    timed = [m for m in metrics if m.step >= SAVE_EVERY]
    events = [event for event in read_events(run.storage, run.run_id) if isinstance(event, CheckpointSaved)]
    saves = [(event.time - times[event.step]).total_seconds() for event in events if event.time]
    return Side(
        loop_seconds=(timed[-1].time - timed[0].time).total_seconds(),
        step_seconds=statistics.median((now.time - before.time).total_seconds() for before, now in pairwise(timed)),
        save_seconds=statistics.median(saves) if saves else None,
    )


def measure(name: str, subject: Subject, rounds: int, num_steps: int) -> Figures:
    never: list[Side] = []
    saving: list[Side] = []
    with tempfile.TemporaryDirectory(prefix="ft-cost-") as temporary:
        world = Path(temporary)
        write_base(world / "base", made_up_texts(), VOCAB_SIZE, subject.sizes)
        write_records(world / "train.jsonl", 1000, num_words=(40, 120))
        for number in range(rounds):
            sides = [("never", None, never), ("saving", SAVE_EVERY, saving)]
            for side, every, found in sides if number % 2 == 0 else reversed(sides):
                run = prepare(world, subject, f"{side}-{number}", num_steps, every)
                found.append(train(run))
                console.print(
                    f"{name}, round {number + 1}, {side:6}: {found[-1].loop_seconds:.2f} s for "
                    f"{num_steps - SAVE_EVERY} steps, median step {found[-1].step_seconds * 1000:.0f} ms"
                )
        plan = run.plan()
        [part, *_] = parts = list((world / "storage").glob("runs/saving-0/checkpoints/*/part-*.safetensors"))
        checkpoint_bytes = sum(p.stat().st_size for p in parts if p.parent == part.parent)
    slow_downs = [100 * (s.loop_seconds / n.loop_seconds - 1) for s, n in zip(saving, never, strict=True)]
    return Figures(
        parameters=plan.parameters,
        trained=plan.trainable_parameters,
        checkpoint_mib=checkpoint_bytes / 2**20,
        never_seconds=statistics.median(side.loop_seconds for side in never),
        saving_seconds=statistics.median(side.loop_seconds for side in saving),
        never_step_seconds=statistics.median(side.step_seconds for side in never),
        saving_step_seconds=statistics.median(side.step_seconds for side in saving),
        save_seconds=statistics.median(side.save_seconds for side in saving if side.save_seconds is not None),
        slow_downs_percent=slow_downs,
        slow_down_percent=statistics.median(slow_downs),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(SUBJECTS), help="of " + ", ".join(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of each run, a multiple of ten, at least 20")
    add_smoke_option(parser)
    arguments = parser.parse_args()
    shrink(arguments, methods="lora", rounds=1, steps=2 * SAVE_EVERY)
    subjects = {"lora": SMALLEST} if arguments.smoke else SUBJECTS
    methods = arguments.methods.split(",")
    if unknown := [name for name in methods if name not in SUBJECTS]:
        parser.error(f"--methods = {', '.join(unknown)}: not among {', '.join(SUBJECTS)}")
    if arguments.steps % SAVE_EVERY or arguments.steps < 2 * SAVE_EVERY:
        parser.error(f"--steps = {arguments.steps}: use a multiple of {SAVE_EVERY}, at least {2 * SAVE_EVERY}.")
    figures = {name: measure(name, subjects[name], arguments.rounds, arguments.steps) for name in methods}

    columns = (
        "method",
        "parameters",
        "trained",
        "checkpoint",
        "a save takes",
        "step, never",
        "step, saving",
        "slow-down",
    )
    table = Table(*columns, title=f"A checkpoint every {SAVE_EVERY} steps")
    for name, found in figures.items():
        rounds = ", ".join(f"{percent:+.1f}" for percent in found.slow_downs_percent)
        table.add_row(
            name,
            f"{found.parameters / 1e6:.0f} M",
            f"{found.trained / 1e6:.1f} M",
            f"{found.checkpoint_mib:.0f} MiB",
            f"{found.save_seconds:.2f} s",
            f"{found.never_step_seconds * 1000:.0f} ms",
            f"{found.saving_step_seconds * 1000:.0f} ms",
            f"{found.slow_down_percent:+.1f} % ({rounds})",
        )
    Console(highlight=False, stderr=True, width=None if sys.stderr.isatty() else TABLE_WIDTH).print(table)
    goal = {"lora": GOAL_PERCENT}
    print_result(
        arguments,
        "checkpoint_cost",
        save_every_steps=SAVE_EVERY,
        workers=NUM_WORKERS,
        figures={name: asdict(found) for name, found in figures.items()},
        goal=goal,
        holds=all(figures[name].slow_down_percent <= goal[name] for name in methods if name in goal),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
