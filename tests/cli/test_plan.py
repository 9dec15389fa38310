"""`ft plan` on the command line: a spec on hardware, or the table of a model. No network, and nothing is written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ft_service.plan.plan import RunPlan
from ft_service.plan.table import GPU_COUNTS, METHODS, PlanTable

pytestmark = pytest.mark.multiprocess  # each test starts the command as a process

SPEC = """
name: bot
model: {{base: meta-llama/Llama-3.1-8B-Instruct}}
data:
  train: [{{path: {data}}}]
  validation: {{fraction: 0.1}}
  max_seq_len: 256
train: {{global_batch_size: 8}}
parallel: {{num_workers: 8}}
storage: {storage}
"""
WORDS = "word " * 197  # 985 bytes without the last space: 3.94 bytes a token make 250 of them
ANSWER = "yes " * 10  # 39 bytes: 10 tokens


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    records = [{"instruction": WORDS[:400], "output": ANSWER} for _ in range(200)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "spec.yaml").write_text(SPEC.format(data=folder / "train.jsonl", storage=folder / "storage"))
    return folder / "spec.yaml"


def ft(*arguments: object) -> subprocess.CompletedProcess[str]:
    # An empty cache and no network.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "COLUMNS": "160"}
    command = [sys.executable, "-m", "ft_service.cli.app", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_hub_id_is_planned_without_a_network(spec: Path) -> None:
    done = ft(spec, "--gpu-type", "H100-80G", "--nodes", 1, "--json")
    assert done.returncode == 0, done.stderr
    plan = RunPlan.model_validate_json(done.stdout)
    assert plan.parameters == 8_030_261_248 and plan.fits and not plan.dataset.exact
    # 1 at the start; 5 around each turn; 399 / 3.94 and 39 / 3.94 bytes
    assert plan.dataset.tokens == plan.dataset.conversations * (1 + 5 + 101 + 5 + 10)
    assert plan.dataset.loss_tokens == plan.dataset.conversations * 11
    assert (plan.dataset.conversations, plan.dataset.validation_conversations) == (180, 20)
    assert plan.dataset.rows == 90  # two of 122 tokens in a row of 256
    assert any("3.94 bytes" in remark for remark in plan.remarks)
    assert not (spec.parent / "storage").exists()


def test_the_plan_shows_reasons_memory_time_and_cost(spec: Path) -> None:
    shown = ft(spec, "--gpu-type", "H100", "--price", 2.5).stdout
    for part in ("Why", "ZeRO-2: ", "Activation checkpointing", "total, of 79.1", "Main memory of one node", "█"):
        assert part in shown
    for part in ("fits", "tokens/s", "40% of the peak rate of H100", "per epoch", "GPU hours, about $"):
        assert part in shown


def test_a_plan_that_does_not_fit_shows_advice(spec: Path) -> None:
    done = ft(spec, "method.type=full", "--gpu-type", "L4", "--host-memory-gib", 32, "parallel.num_workers=1")
    assert done.returncode == 0, done.stderr
    for part in ("does not fit", "Does not fit: needs about", "Advice: Fits with", "Advice: Fits on 1 x"):
        assert part in done.stdout


def test_the_spec_is_checked_against_the_hardware(spec: Path) -> None:
    assert "Use at most 4" in ft(spec, "--gpu-type", "H100", "--nodes", 2, "--gpus-per-node", 2).stderr
    assert ft(spec, "--gpus", 8, "--gpu-memory-gib", 80, "--json").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-type", "H1000"], "--gpu-type = 'H1000': unknown type. Did you mean H100? Known types: T4,"),
        (["--nodes", 1, "--gpus", 8], "--nodes = 1: conflicts with --gpus = 8"),
        (["--max-seq-len", 512], "--max-seq-len = 512: only for --table"),
        (["--table", "llama-3.1-8b"], "needs either a SPEC, --table MODEL or --serve MODEL"),
    ],
)
def test_invalid_arguments_exit_with_code_2(spec: Path, arguments: list[Any], message: str) -> None:
    done = ft(spec, *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def test_missing_data_is_an_error_with_a_fix(spec: Path) -> None:
    done = ft(spec, "data.train.0.path=absent.jsonl")
    assert done.returncode == 1
    message = " ".join(done.stderr.split())
    assert "absent.jsonl: no such file. Fix the path" in message


def test_the_table_covers_every_method_and_number_of_gpus() -> None:
    done = ft("--table", "Llama-3.1-405B", "--gpu-type", "H100", "--max-seq-len", 2048, "--price", 3, "--json")
    assert done.returncode == 0, done.stderr
    plans = PlanTable.model_validate_json(done.stdout)
    entries = [(entry.method, entry.num_gpus) for entry in plans.entries]
    assert entries == [(method, count) for method in METHODS for count in GPU_COUNTS]
    fits = {(entry.method, entry.num_gpus): entry.fits for entry in plans.entries}
    assert fits["qlora", 8] and not fits["qlora", 1]
    assert fits["lora", 32] and not fits["lora", 1] and not fits["full", 8]
    for entry in plans.entries:
        dollars = 3 * entry.num_gpus / 3600 / entry.tokens_per_second * 1e6
        assert entry.usd_per_million_tokens == pytest.approx(dollars)


def test_the_table_of_a_folder_is_shown(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "vocab_size": 512}))
    shown = ft("--table", tmp_path).stdout
    assert "smallest that fits: 1 x L4" in shown and "tokens/s" in shown


def test_an_unknown_model_lists_the_known_ones() -> None:
    done = ft("--table", "llama-9")
    assert done.returncode == 1
    assert "llama-3.1-8b" in done.stderr
