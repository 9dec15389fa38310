"""`ft plan` as people call it: a spec on hardware, or a whole family, with no network and nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ft_service.plan.plan import RunPlan
from ft_service.plan.table import GPU_COUNTS, METHODS, Family

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
    # A cold cache and no network: what a newcomer's laptop on a train has.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "COLUMNS": "160"}
    command = [sys.executable, "-m", "ft_service.cli.app", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_hub_id_is_planned_without_a_network_and_the_guess_is_told(spec: Path) -> None:
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


def test_the_plan_is_shown_with_reasons_bars_time_and_cost(spec: Path) -> None:
    shown = ft(spec, "--gpu-type", "H100", "--price", 2.5).stdout
    for part in ("Why", "ZeRO-2: ", "Activation checkpointing", "in all, of 79.6", "One node's main memory", "█"):
        assert part in shown
    for part in ("fits", "tokens/s", "40% of the peak rate of H100", "per epoch", "GPU hours, about $"):
        assert part in shown


def test_what_does_not_fit_is_shown_with_advice(spec: Path) -> None:
    done = ft(spec, "method.type=full", "--gpu-type", "L4", "--host-memory-gib", 32, "parallel.num_workers=1")
    assert done.returncode == 0, done.stderr
    for part in ("does not fit", "Needs about", "Advice Fits with", "Advice Fits on 1 x"):
        assert part in done.stdout


def test_hardware_is_held_against_the_spec(spec: Path) -> None:
    assert "Use at most 4" in ft(spec, "--gpu-type", "H100", "--nodes", 2, "--gpus-per-node", 2).stderr
    assert ft(spec, "--gpus", 8, "--gpu-memory-gib", 80, "--json").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-type", "H1000"], "--gpu-type = 'H1000': not known. Use one of T4,"),
        (["--nodes", 1, "--gpus", 8], "--nodes = 1: stands beside --gpus = 8"),
        (["--max-seq-len", 512], "--max-seq-len = 512: goes with --table"),
        (["--table", "llama-3.1-8b"], "Name one of the two"),
    ],
)
def test_a_wrong_call_is_told_and_exits_with_two(spec: Path, arguments: list[Any], message: str) -> None:
    done = ft(spec, *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def test_missing_data_is_an_error_that_names_its_cure(spec: Path) -> None:
    done = ft(spec, "data.train.0.path=absent.jsonl")
    assert done.returncode == 1
    assert "absent.jsonl: no such file. Fix the path" in " ".join(done.stderr.split())


def test_the_table_covers_every_method_and_number_of_gpus() -> None:
    done = ft("--table", "Llama-3.1-405B", "--gpu-type", "H100", "--max-seq-len", 2048, "--price", 3, "--json")
    assert done.returncode == 0, done.stderr
    family = Family.model_validate_json(done.stdout)
    found = [(member.method, member.num_gpus) for member in family.members]
    assert found == [(method, count) for method in METHODS for count in GPU_COUNTS]
    fits = {(member.method, member.num_gpus): member.fits for member in family.members}
    assert fits["qlora", 8] and not fits["qlora", 1]
    assert fits["lora", 32] and not fits["lora", 1] and not fits["full", 8]
    for member in family.members:
        dollars = 3 * member.num_gpus / 3600 / member.tokens_per_second * 1e6
        assert member.usd_per_million_tokens == pytest.approx(dollars)


def test_the_table_is_shown_for_a_folder_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "vocab_size": 512}))
    shown = ft("--table", tmp_path).stdout
    assert "smallest that fits: 1 x L4" in shown and "tokens/s" in shown


def test_a_table_of_nothing_known_names_what_is_known() -> None:
    done = ft("--table", "llama-9")
    assert done.returncode == 1
    assert "llama-3.1-8b" in done.stderr
