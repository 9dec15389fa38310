"""Made-up records and small Llamas; runs prepared as the launcher leaves them, and their workers without Ray."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from ft_service.catalog.models import shape_from_config
from ft_service.data.prepare import prepare_dataset
from ft_service.model.base import load_tokenizer, read_config
from ft_service.model.scratch import train_tokenizer, write_scratch_model
from ft_service.plan.facts import Resources
from ft_service.plan.make import make_plan
from ft_service.runs.folder import RunFolder
from ft_service.spec.load import parse_run_spec
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage
from tests.forked import Workers, run_module

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "house", "tree", "river", "stone")
TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 64}
SMALL = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 128}


def write_world(folder: Path, num_records: int = 60, sizes: Mapping[str, int] = TINY) -> None:
    """Records in ``train.jsonl``, and a Llama with random weights in ``base``."""
    questions = write_records(folder / "train.jsonl", num_records)
    write_base(folder / "base", [f"Last word of: {question}" for question in questions], 400, sizes)


def write_records(file: Path, count: int, num_words: tuple[int, int] = (3, 12), seed: int = 0) -> list[str]:
    """Questions of so many words, with their last word as the answer; returns the questions."""
    rng = random.Random(seed)
    questions = [" ".join(rng.choices(WORDS, k=rng.randint(*num_words))) for _ in range(count)]
    lines = ({"instruction": f"Last word of: {question}", "output": question.split()[-1]} for question in questions)
    file.write_text("\n".join(map(json.dumps, lines)))
    return questions


def write_base(folder: Path, texts: Sequence[str], vocab_size: int, sizes: Mapping[str, int]) -> None:
    """A checkpoint folder: a tokenizer trained on `texts`, random weights; `sizes` as of `write_scratch_model`."""
    write_scratch_model(folder, tokenizer=train_tokenizer(texts, vocab_size), seed=0, **sizes)


def made_up_texts(count: int = 500) -> list[str]:
    """Made-up words, enough byte pairs for a vocabulary of thousands; the words of the records are among them."""
    rng = random.Random(0)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return [
        " ".join("".join(rng.choices(alphabet, k=rng.randint(3, 9))) for _ in range(40)) + " " + " ".join(WORDS)
        for _ in range(count)
    ]


def prepared_run(world: Path, run_id: str, num_workers: int, **settings: object) -> RunFolder:
    """A run as the launcher leaves it to its workers: dataset and plan lie on storage."""
    spec = parse_run_spec(
        f"""
name: words
model: {{base: {world}/base}}
method: {{type: lora, lora_rank: 4}}
data:
  train: [{{path: {world}/train.jsonl, source: made up, license: CC0-1.0}}]
  validation: {{fraction: 0.2}}
  max_seq_len: 128
train: {{max_steps: 4, global_batch_size: 4, learning_rate: 1e-2, validate_every_steps: 2, precision: fp32}}
parallel: {{num_workers: {num_workers}, use_gpu: false}}
storage: {world}/storage
""",
        [f"{name}={value}" for name, value in settings.items()],
    )
    return prepare_run(spec, RunFolder(Storage(spec.storage), run_id))


def prepare_run(spec: RunSpec, run: RunFolder) -> RunFolder:
    base = Path(spec.model.base)
    dataset = prepare_dataset(spec, load_tokenizer(base), run.storage)
    shape = shape_from_config(read_config(base))
    run.write_plan(spec, make_plan(spec, dataset.facts, shape, Resources()), dataset.sources)
    return run


def start(run: RunFolder) -> Workers:
    """Start as many workers as the plan of a prepared run says."""
    num_workers = run.plan().spec.parallel.max_workers
    arguments = ("ft_service.train.worker", run.storage.root, run.run_id)
    return Workers(run_module, *arguments, world_size=num_workers if num_workers > 1 else None)


def work(run: RunFolder) -> str:
    """Let the workers finish; returns what they printed."""
    workers = start(run)
    printed = workers.wait(timeout=300)
    assert workers.returncode == 0, printed[-6000:]
    return printed


def kill_when(run: RunFolder, is_time: Callable[[], bool]) -> None:
    """Start the workers and kill them all, without a warning, once it is time."""
    workers = start(run)
    deadline = time.monotonic() + 240
    while not is_time():
        assert workers.poll() is None, workers.printed[-6000:]
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    printed = workers.kill()
    assert is_time(), printed[-6000:]
    assert not run.storage.exists(f"{run.path}/outcome.json"), "it was through before it was killed"


def launch(run: RunFolder) -> None:
    """Let the workers finish as a user starts them: by torchrun, or as one Python process where there is one worker."""
    num_workers = run.plan().spec.parallel.max_workers
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(num_workers), "-m")
    launcher = torchrun if num_workers > 1 else ()
    command = [sys.executable, "-m", *launcher, "ft_service.train.worker", run.storage.root, run.run_id]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        # torchrun starts each worker in a session of its own: they would train on.
        for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        raise
    assert process.returncode == 0, printed[-6000:]
