"""A loss or gradient that is not finite never changes the weights, and the error names the rows it came from."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ft_service.data.dataset import open_dataset
from ft_service.data.order import step_rows
from ft_service.model.base import load_tokenizer
from ft_service.runs.metrics import read_metrics
from tests.forked import run_cases
from tests.train.nonfinite_cases import run_case
from tests.train.training_cases import write_base
from tests.worlds import prepared_run, start, write_world

pytestmark = pytest.mark.multiprocess

METHODS = {"full": {"type": "full"}, "lora": {"type": "lora", "lora_rank": 4}}


@pytest.mark.parametrize("world_size", [1, 2])
def test_nonfinite_gradient_changes_no_weight(world_size: int, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    cases = {
        f"{method}-zero{stage}-{precision}-{poison}": {
            **{"base": str(tmp_path / "base"), "method": METHODS[method], "stage": stage, "micro": 1},
            **{"precision": precision, "poison": poison},
        }
        for method, stage, precision, poison in (
            *(("full", stage, precision, "nan") for stage in range(4) for precision in ("bf16", "fp32")),
            *(("lora", stage, precision, "inf") for stage in range(4) for precision in ("bf16", "fp32")),
            ("full", 0, "bf16", "-inf"),
            ("full", 3, "fp32", "inf"),
        )
    }
    results = run_cases(run_case, cases, world_size)
    for name, found in results.items():
        assert found["passes"] >= 2 and found["all_know"], (name, found)
        assert 0 < found["norm"] < math.inf, (name, found)
        assert found["moved_when_healthy"] and not found["moved_when_poisoned"], (name, found)


def test_error_of_a_run_names_step_row_worker_and_text(tmp_path: Path) -> None:
    write_world(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    records[21]["instruction"] += " @@"  # a token that no other record has
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    settings = {"train.max_steps": 12, "data.packing": False, "checkpoint.every_steps": 1}
    run = prepared_run(tmp_path, "bad-row", 2, **settings)
    rows = open_dataset(run.storage, run.plan().dataset.digest).train
    token = load_tokenizer(tmp_path / "base").encode("@", add_special_tokens=False)[0]
    bad = [number for number in range(len(rows)) if token in rows[number].input_ids]
    assert len(bad) == 1  # the test's own data
    make_infinite(tmp_path / "base", token)

    workers = start(run)
    printed = workers.wait(timeout=300)
    assert workers.returncode != 0
    step = next(step for step in range(12) if bad[0] in step_rows(0, step, 4, len(rows)))
    place = step_rows(0, step, 4, len(rows)).tolist().index(bad[0])
    reported = next(line for line in printed.splitlines() if "the loss is" in line)
    plan = run.plan()
    worker = place // plan.micro_batch_size % 2
    assert f"step {step + 1}: the loss is nan. " in reported
    assert f"whose loss is not finite: {bad[0]} (worker {worker}). Row {bad[0]} begins" in reported
    assert "Last word of: " in reported and "@@" in reported
    assert [metrics.step for metrics in read_metrics(run.storage, "bad-row")] == list(range(1, step + 1))


def make_infinite(base: Path, token: int) -> None:
    """Set the base's embedding of `token` to NaN, so that only rows with that token have a loss that is not finite."""
    file = base / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone()  # a tied head would spoil every row
    embedding[token] = np.nan
    save_file(weights, file, {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
