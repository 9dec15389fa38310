"""The main job on a real Ray cluster with token authentication: submitted, trained, published, and true."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from examples.quickstart.quickstart import free_ports
from ft_service.data.dataset import open_dataset
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.runs.code import code_version, commit_of
from ft_service.runs.events import read_events
from ft_service.runs.folder import RunFolder
from ft_service.runs.metrics import read_metrics
from ft_service.storage.storage import Storage
from tests.hosts import ROOT, Cluster
from tests.worlds import SMALL, write_world

pytestmark = pytest.mark.cluster

JOB_SECONDS = 300
Ft = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama, records, specs of a full and a LoRA run, and an empty storage."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_records=120, sizes=SMALL)
    spec = f"""
name: words
model: {{base: {folder}/base}}
method: {{type: lora, lora_rank: 4}}
data:
  train: [{{path: {folder}/train.jsonl, source: made up, license: CC0-1.0}}]
  validation: {{fraction: 0.2}}
  max_seq_len: 128
train: {{max_steps: 6, global_batch_size: 4, learning_rate: 1e-2, validate_every_steps: 3, precision: fp32}}
parallel: {{num_workers: 2, use_gpu: false}}
report: {{samples: 2, sample_max_tokens: 4}}
storage: {folder}/storage
"""
    (folder / "lora.yaml").write_text(spec)
    (folder / "full.yaml").write_text(spec.replace("{type: lora, lora_rank: 4}", "{type: full}"))
    return folder


FT = (sys.executable, "-m", "ft_service.cli.app")


def submit(cluster: Cluster, spec: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The first-class way, as a person types it."""
    command = ["ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--"]
    command += ["python", "jobs/train.py", str(spec), *arguments]
    return run(command, cluster.environment)


def train(cluster: Cluster, spec: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same from this checkout: a driver that joins the cluster."""
    return run([*FT, "train", str(spec), *arguments], cluster.environment)


def run(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=JOB_SECONDS)


@pytest.fixture(scope="module")
def ft() -> Ft:
    """`ft`, without a cluster."""
    environment = {**os.environ, "COLUMNS": "200"}
    return lambda *arguments: run([*FT, *map(str, arguments)], environment)


def output(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr + done.stdout


@pytest.fixture(scope="module")
def lora(cluster: Cluster, world: Path) -> AdapterRecord:
    done = submit(cluster, world / "lora.yaml", "--run-id", "lora-1")
    assert done.returncode == 0, output(done)[-4000:]
    return published(world, "lora-1")


def published(world: Path, run_id: str) -> AdapterRecord:
    storage = Storage(str(world / "storage"))
    status = RunFolder(storage, run_id).status()
    assert status is not None and status.state == "succeeded" and status.published is not None
    return Registry(storage).resolve(status.published)


# -- what a run leaves behind ----------------------------------------------------------------------------------------


def test_a_submitted_run_publishes_its_record(world: Path, lora: AdapterRecord) -> None:
    assert lora.kind == "adapter"
    assert lora.id == f"base-words-{lora.digest[:8]}"
    assert [(data.source, data.license, data.records) for data in lora.datasets] == [("made up", "CC0-1.0", 120)]
    assert lora.base.id == str(world / "base")
    assert lora.packages["deepspeed"] and lora.packages["peft"]
    digest = code_version().partition(".code.")[2]  # of this checkout; the job ran in an uploaded copy
    assert digest and lora.packages["ft-service"].endswith(f"code.{digest}")


def test_a_run_writes_metrics_plan_and_report(world: Path, lora: AdapterRecord) -> None:
    storage = Storage(str(world / "storage"))
    assert [metrics.step for metrics in read_metrics(storage, "lora-1")] == [1, 2, 3, 4, 5, 6]
    plan = RunFolder(storage, "lora-1").plan()
    assert plan.micro_batch_size * plan.gradient_accumulation_steps * 2 == plan.global_batch_size == 4
    report = (world / "storage/runs/lora-1/report.html").read_text()
    assert lora.id in report
    samples = json.loads((world / "storage/runs/lora-1/samples.json").read_text())
    assert len(samples) == 2 and all(sample["prompt"].startswith("Last word of: ") for sample in samples)


@torch.no_grad()
def stock_validation_loss(model: torch.nn.Module, storage: Storage, digest: str) -> float:
    """By stock transformers: a forward pass per validation document, its own logits, a mean over loss tokens."""
    rows = open_dataset(storage, digest).validation
    assert rows is not None
    total = 0.0
    count = 0
    for number in range(len(rows)):
        row = rows[number]
        ends = np.cumsum(row.document_lengths)
        for start, end in zip(ends - row.document_lengths, ends, strict=True):
            ids = torch.from_numpy(row.input_ids[start:end].astype(np.int64))
            predicted = torch.from_numpy(row.loss_mask[start + 1 : end].astype(bool))
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits[predicted], ids[1:][predicted], reduction="sum"))
            count += int(predicted.sum())
    return total / count


def test_plain_peft_reproduces_the_reported_validation_loss(world: Path, lora: AdapterRecord) -> None:
    storage = Storage(str(world / "storage"))
    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    before = stock_validation_loss(base, storage, lora.dataset_digest)
    adapted = PeftModel.from_pretrained(base, Registry(storage).folder(lora)).eval()
    after = stock_validation_loss(adapted, storage, lora.dataset_digest)
    assert after == pytest.approx(lora.validation_loss, abs=1e-3)
    assert abs(before - after) > 0.01  # the comparison would notice a lost adapter


def test_verify_passes_and_notices_a_flipped_byte(world: Path, lora: AdapterRecord, tmp_path: Path, ft: Ft) -> None:
    storage = str(world / "storage")
    fine = ft("adapters", "verify", lora.id, "--storage", storage)
    assert fine.returncode == 0, output(fine)
    weights = world / "storage/adapters" / lora.id / "adapter_model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        broken = ft("adapters", "verify", lora.id, "--storage", storage)
    finally:
        weights.write_bytes(content)
    assert broken.returncode == 1
    assert "adapter_model.safetensors" in broken.stdout


def test_a_merged_model_answers_like_base_and_adapter(world: Path, lora: AdapterRecord, tmp_path: Path, ft: Ft) -> None:
    done = ft("adapters", "merge", lora.id, str(tmp_path / "merged"), "--storage", str(world / "storage"))
    assert done.returncode == 0, output(done)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, world / "storage/adapters" / lora.id)(ids).logits
        folded = merged(ids).logits
    # Weights merged in bf16 carry 8 bits: far closer to the adapted model than the base is.
    assert (folded - adapted).abs().max() < 0.2 * (plain - adapted).abs().max()


def test_a_full_run_publishes_a_usable_base(cluster: Cluster, world: Path, ft: Ft) -> None:
    done = train(
        cluster, world / "full.yaml", "--run-id", "full-1", "parallel.zero_stage=3", "train.learning_rate=1e-3"
    )
    assert done.returncode == 0, output(done)[-4000:]
    record = published(world, "full-1")
    assert record.kind == "model"
    folder = world / "storage/models" / record.id
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss = stock_validation_loss(model, Storage(str(world / "storage")), record.dataset_digest)
    assert loss == pytest.approx(record.validation_loss, abs=1e-3)

    planned = ft("plan", str(world / "lora.yaml"), f"model.base={folder}", "--json")
    assert planned.returncode == 0, output(planned)
    assert json.loads(planned.stdout)["base_short_name"] == record.id


# -- the data gate ---------------------------------------------------------------------------------------------------


def test_invalid_data_fail_before_workers_are_requested(cluster: Cluster, world: Path) -> None:
    refused = train(cluster, unlicensed(world), "--run-id", "refused-1")
    assert refused.returncode == 1, output(refused)
    assert "rights.no-license" in output(refused) and "data: {waive: {rights.no-license: REASON}}" in output(refused)
    assert "Traceback" not in output(refused)
    storage = Storage(str(world / "storage"))
    run = RunFolder(storage, "refused-1")
    status = run.status()
    assert status is not None and status.state == "failed" and "rights.no-license" in status.message
    assert [event.type for event in read_events(storage, "refused-1")] == ["preparing", "failed"]
    assert "rights.no-license" in storage.read_bytes(f"{run.path}/data.html").decode()


def test_a_waiver_is_kept_in_record_and_card(cluster: Cluster, world: Path) -> None:
    reason = "our own tickets, approved on 2026-11-20"
    # Another seed: the same weights as lora-1's would keep lora-1's record.
    settings = ("train.seed=1", f'data.waive={{"rights.no-license": "{reason}"}}')
    waived = train(cluster, unlicensed(world), "--run-id", "waived-1", *settings)
    assert waived.returncode == 0, output(waived)[-4000:]
    assert f"Waived: rights.no-license, 1 place ({reason})" in output(waived)
    record = published(world, "waived-1")
    assert record.data_verdict == "fail"
    assert [(waiver.code, waiver.severity, waiver.reason) for waiver in record.waivers] == [
        ("rights.no-license", "fail", reason)
    ]
    assert reason in (world / "storage/adapters" / record.id / "README.md").read_text()


def unlicensed(world: Path) -> Path:
    spec = world / "unlicensed.yaml"
    spec.write_text((world / "lora.yaml").read_text().replace(", license: CC0-1.0", ""))
    return spec


# -- said clearly ----------------------------------------------------------------------------------------------------


def test_a_complete_run_is_not_run_again_and_says_so(cluster: Cluster, world: Path, lora: AdapterRecord) -> None:
    status = (world / "storage/runs/lora-1/status.json").read_bytes()
    done = train(cluster, world / "lora.yaml", "--run-id", "lora-1")
    assert done.returncode == 0, output(done)
    assert "The run is complete" in done.stdout
    assert lora.id in done.stdout
    assert (world / "storage/runs/lora-1/status.json").read_bytes() == status


def test_ft_submit_follows_the_job_and_returns_its_exit_code(cluster: Cluster, world: Path) -> None:
    spec = ROOT / "examples/quickstart/adapter.yaml"  # what travels is the checkout: the spec must lie in it
    missing = ("model.base=/nowhere/model", f"storage={world}/storage", f"data.train.0.path={world}/train.jsonl")
    arguments = [str(spec), *missing, "--address", cluster.dashboard, "--run-id", "absent-base"]
    done = run([*FT, "submit", *arguments], cluster.environment)
    assert done.returncode == 1, output(done)
    assert "absent-base" in done.stdout.splitlines()[0]
    assert "model.base = '/nowhere/model': no such folder" in output(done)
    assert "Traceback" not in output(done)
    status = RunFolder(Storage(str(world / "storage")), "absent-base").status()
    assert status is not None and status.state == "failed" and "/nowhere/model" in status.message
    # Later, from anywhere: Ray keeps the log, and what was submitted.
    logs = run(["ray", "job", "logs", "--address", cluster.dashboard, "absent-base"], cluster.environment)
    assert "model.base = '/nowhere/model': no such folder" in logs.stdout
    headers = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    job = httpx.get(f"{cluster.dashboard}/api/jobs/absent-base", headers=headers, trust_env=False).json()
    assert job["runtime_env"].get("env_vars", {}).get("FT_COMMIT") == commit_of()
    assert job["runtime_env"]["working_dir"].startswith("gcs://")  # a package by its digest


def test_a_bad_spec_exits_with_2_before_anything_starts(world: Path) -> None:
    arguments = [str(world / "lora.yaml"), "train.max_stepz=3", "--run-id", "bad-spec"]
    done = run([sys.executable, "jobs/train.py", *arguments], dict(os.environ))
    assert done.returncode == 2
    assert "train.max_stepz" in done.stderr and "max_steps" in done.stderr
    assert not (world / "storage/runs/bad-spec").exists()


def test_a_job_rejects_relative_storage(world: Path) -> None:
    environment = {**os.environ, "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    arguments = [str(world / "lora.yaml"), "storage=results"]
    done = run([sys.executable, "jobs/train.py", *arguments], environment)
    assert done.returncode == 2, output(done)
    assert "storage = 'results': is relative" in done.stderr
    assert not (ROOT / "results").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "token"),
        ({"RAY_ADDRESS": f"127.0.0.1:{free_ports(1)[0]}"}, "no answer"),
    ],
    ids=["wrong token", "no answer"],
)
def test_a_cluster_that_cannot_be_joined_is_one_message(
    cluster: Cluster, world: Path, environment: dict[str, str], message: str
) -> None:
    arguments = ["train", str(world / "lora.yaml"), "--run-id", f"unjoined-{len(message)}"]
    done = run([*FT, *arguments], {**cluster.environment, **environment})
    assert done.returncode == 1, output(done)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_submitting_with_a_wrong_token_is_one_message(cluster: Cluster) -> None:
    spec = ROOT / "examples/quickstart/adapter.yaml"
    arguments = [str(spec), "--address", cluster.dashboard]
    wrong = {**cluster.environment, "RAY_AUTH_TOKEN": "0" * 64}
    done = run([*FT, "submit", *arguments], wrong)
    assert done.returncode == 1, output(done)
    assert "the job was not accepted" in done.stderr
    assert "Traceback" not in done.stderr


def half_downloaded(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def without_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def another_architecture(base: Path) -> None:
    config: dict[str, Any] = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (half_downloaded, "half-downloaded"),
        (without_weights, "model.safetensors missing"),
        (another_architecture, "its architecture is GPT2LMHeadModel"),
    ],
)
def test_the_plan_rejects_an_incomplete_or_other_base(
    world: Path, tmp_path: Path, damage: Any, message: str, ft: Ft
) -> None:
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    damage(base)
    done = ft("plan", str(world / "lora.yaml"), f"model.base={base}")
    assert done.returncode == 1
    assert message in done.stderr and str(base) in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unwritable_storage_fails_before_anything_starts(world: Path, tmp_path: Path, ft: Ft) -> None:
    (tmp_path / "file").write_text("in the way")
    done = ft("train", str(world / "lora.yaml"), f"storage={tmp_path}/file/storage")
    assert done.returncode == 1
    assert f"{tmp_path}/file/storage" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_writes_nothing(world: Path, tmp_path: Path, ft: Ft) -> None:
    done = ft("plan", str(world / "lora.yaml"), f"storage={tmp_path}/storage")
    assert done.returncode == 0, output(done)
    assert "2 rows x 2 workers x 1 accumulation = 4 rows" in done.stdout
    assert not (tmp_path / "storage").exists()
