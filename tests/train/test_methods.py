"""Stock software reproduces the loss of every training method: LoRA variants, offloading, training without Ray."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ft_service.evaluate.verify import verify_adapter
from ft_service.model.base import fingerprint, load_tokenizer
from ft_service.model.merge import write_merged
from ft_service.model.weight_files import WeightFiles
from ft_service.publish import publish
from ft_service.registry.registry import Registry
from ft_service.runs.folder import RunFolder
from ft_service.runs.metrics import read_metrics
from ft_service.runs.trackers import send
from tests.forked import run_cases
from tests.needs import LIBAIO, can_offload_to_nvme, needs
from tests.train.training_cases import documents, run_case, write_base
from tests.worlds import launch, prepared_run, work, write_world

pytestmark = pytest.mark.multiprocess

TOLERANCE = 1e-3
LORA = {"type": "lora", "lora_rank": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
    "pissa-rslora": {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "subset": {"target_modules": ["q_proj", "v_proj"]},
}
OFFLOADED = [("full", 2), ("full", 3), ("lora", 2), ("lora", 3)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def results(base: Path, exports: Path) -> dict[str, Any]:
    cases: dict[str, dict[str, Any]] = {}
    for stage in (2, 3):
        for variant, settings in VARIANTS.items():
            cases[f"{variant}-zero{stage}"] = {"method": LORA | settings, "stage": stage}
        cases[f"dropout-zero{stage}"] = {
            "method": LORA | {"lora_dropout": 0.5},
            "stage": stage,
            "validate_again": True,
        }
    for kind, stage in OFFLOADED:
        method = LORA if kind == "lora" else {"type": "full"}
        cases[f"{kind}-zero{stage}"] = {"method": method, "stage": stage}
        cases[f"{kind}-zero{stage}-offloaded"] = {"method": method, "stage": stage, "offload": "cpu"}
    for name, case in cases.items():
        case |= {"base": str(base), "micro": 2, "export": str(exports / name)}
    return run_cases(run_case, cases, 2)


@torch.no_grad()
def stock_loss(model: torch.nn.Module) -> float:
    """Loss per loss token over all documents, with stock software: one forward pass per document."""
    model.eval()
    total = 0.0
    count = 0
    for ids, mask in documents():
        tokens = torch.from_numpy(ids).long()
        predicted = torch.from_numpy(mask[1:])
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits[predicted], tokens[1:][predicted], reduction="sum"))
        count += int(predicted.sum())
    return total / count


def stock_base(base: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)


# -- LoRA variants ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("variant", [*VARIANTS, "dropout"])
def test_stock_peft_reproduces_the_validation_loss_of_every_variant(
    base: Path, exports: Path, results: dict[str, Any], variant: str, stage: int
) -> None:
    name = f"{variant}-zero{stage}"
    before = stock_loss(stock_base(base))
    after = stock_loss(PeftModel.from_pretrained(stock_base(base), exports / name))
    assert after == pytest.approx(results[name]["validation_losses"][-1], abs=TOLERANCE)
    assert before - after > 5 * TOLERANCE  # training had an effect: a lost adapter would be noticed


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_the_same_under_zero2_and_zero3(results: dict[str, Any], variant: str) -> None:
    whole = results[f"{variant}-zero2"]
    partitioned = results[f"{variant}-zero3"]
    assert partitioned["losses"] == pytest.approx(whole["losses"], abs=TOLERANCE)
    assert partitioned["validation_losses"] == pytest.approx(whole["validation_losses"], abs=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_weight_by_weight_equals_peft_merging_the_model(
    base: Path, exports: Path, results: dict[str, Any], variant: str, tmp_path: Path
) -> None:
    adapter = exports / f"{variant}-zero3"
    write_merged(WeightFiles(base), adapter, base, tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    expected = dict(PeftModel.from_pretrained(stock, adapter).merge_and_unload(safe_merge=True).named_parameters())
    before = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).named_parameters())
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert sum(not torch.equal(found[name], before[name]) for name in found) == (4 if variant == "subset" else 14)


def test_only_target_modules_are_adapted(results: dict[str, Any]) -> None:
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in results["subset-zero2"]["trained"]}
    assert adapted == {"q_proj", "v_proj"}


def test_variants_train_differently(results: dict[str, Any]) -> None:
    # Otherwise a setting that never reaches peft would pass all other tests here.
    curves = {tuple(results[f"{variant}-zero2"]["losses"]) for variant in (*VARIANTS, "dropout")}
    curves.add(tuple(results["lora-zero2"]["losses"]))
    assert len(curves) == len(VARIANTS) + 2


@pytest.mark.parametrize("variant", ["pissa", "pissa-rslora", "olora"])
def test_initialisation_from_the_base_starts_at_the_base_loss(results: dict[str, Any], variant: str) -> None:
    # W - B A + B A = W: the first step sees the base, whatever the rank.
    assert results[f"{variant}-zero2"]["losses"][0] == pytest.approx(results["lora-zero2"]["losses"][0], abs=TOLERANCE)


# -- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
def test_dropout_is_on_in_training_and_off_in_validation(results: dict[str, Any], stage: int) -> None:
    found = results[f"dropout-zero{stage}"]
    assert found["validated_again"] == found["validation_losses"][-1]
    # From the second step on: B = 0 hides dropout in the first.
    assert found["losses"][1:] != pytest.approx(results[f"lora-zero{stage}"]["losses"][1:], abs=1e-6)


# -- offloading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "stage"), OFFLOADED)
def test_cpu_offload_changes_no_losses(results: dict[str, Any], kind: str, stage: int) -> None:
    expected = results[f"{kind}-zero{stage}"]
    found = results[f"{kind}-zero{stage}-offloaded"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE)
    assert found["validation_losses"] == pytest.approx(expected["validation_losses"], abs=TOLERANCE)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-2)
    assert (expected["optimizer"], found["optimizer"]) == ("AdamW", "DeepSpeedCPUAdam")


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_full_run_exports_the_weights_it_validated(
    exports: Path, results: dict[str, Any], stage: int
) -> None:
    name = f"full-zero{stage}-offloaded"
    found = stock_loss(stock_base(exports / name))
    assert found == pytest.approx(results[name]["validation_losses"][-1], abs=TOLERANCE)


def test_nvme_offload_changes_no_losses(tmp_path: Path) -> None:
    needs(can_offload_to_nvme(), LIBAIO)
    # DeepSpeed leaves tensors of less than 1 MiB in memory; half of 768 x 1600 x 4 bytes is more.
    write_base(tmp_path / "base", hidden_size=768, intermediate_size=1600)
    cases: dict[str, dict[str, Any]] = {}
    for method in (LORA, {"type": "full"}):
        kept = {"base": str(tmp_path / "base"), "method": method, "stage": 3, "micro": 2}
        kept["train"] = {"learning_rate": 1e-3, "max_steps": 3, "validate_every_steps": 3}
        drive = str(tmp_path / f"drive-{method['type']}")
        cases |= {
            str(method["type"]): kept,
            f"{method['type']}-offloaded": kept | {"offload": "nvme", "nvme_path": drive},
        }
    results = run_cases(run_case, cases, 2)
    for kind in ("lora", "full"):
        expected = results[kind]
        found = results[f"{kind}-offloaded"]
        assert found["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE)
        assert found["validation_losses"] == pytest.approx(expected["validation_losses"], abs=TOLERANCE)
        swapped = [file for file in (tmp_path / f"drive-{kind}").rglob("*") if file.is_file()]
        assert any(file.stat().st_size >= 2**20 for file in swapped)


# -- without Ray -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture(scope="module")
def by_torchrun(world: Path) -> RunFolder:
    run = prepared_run(world, "two", 2, **{"report.trackers": "[tensorboard, wandb, mlflow]"})
    launch(run)
    return run


@pytest.fixture(scope="module")
def by_one_process(world: Path) -> RunFolder:
    run = prepared_run(world, "one", 1)
    launch(run)
    return run


def test_torchrun_and_one_process_train_a_prepared_run_without_ray(
    world: Path, by_torchrun: RunFolder, by_one_process: RunFolder
) -> None:
    curves = []
    for run in (by_torchrun, by_one_process):
        metrics = read_metrics(run.storage, run.run_id)
        assert [m.step for m in metrics] == [1, 2, 3, 4]
        validated = {m.step: m.validation_loss for m in metrics if m.validation_loss is not None}
        assert list(validated) == [2, 4]
        outcome = run.outcome()
        assert outcome.steps_run == 4
        assert outcome.final_loss == metrics[-1].loss
        assert outcome.validation_loss == validated[outcome.steps] == min(validated.values())
        assert outcome.base_fingerprint == fingerprint(world / "base")
        weights = world / "storage" / run.path / outcome.weights
        assert (weights / "adapter_model.safetensors").is_file()
        PeftModel.from_pretrained(stock_base(world / "base"), weights)
        assert [folder.name for folder in weights.parent.iterdir()] == [weights.name]  # only the best is kept
        curves.append([m.loss for m in metrics])
    assert curves[0] == pytest.approx(curves[1], abs=TOLERANCE)


def test_full_run_is_published_once_and_without_a_copy(world: Path) -> None:
    run = prepared_run(world, "full", 2, **{"method": "{type: full}", "parallel.zero_stage": "3"})
    work(run)
    record = publish(run)
    assert publish(run) == record
    weights = world / "storage" / run.path / run.outcome().weights
    published = Registry(run.storage).folder(record)
    assert record.kind == "model" and published.parent.name == "models"
    names = {file.name for file in published.glob("*.safetensors")}
    assert len(names) == 2  # one of each worker
    assert all((weights / name).samefile(published / name) for name in names)
    assert {file.name for file in published.iterdir()} == {*record.files, "record.json"}
    assert all(finding.passed for finding in verify_adapter(Registry(run.storage), record))
    trained = dict(stock_base(published).named_parameters())
    assert not torch.equal(trained["model.norm.weight"], stock_base(world / "base").model.norm.weight)
    load_tokenizer(published)

    first = published / sorted(names)[0]
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert [finding.passed for finding in verify_adapter(Registry(run.storage), record)] == [False]


def test_tensorboard_shows_the_metrics_of_the_run(world: Path, by_torchrun: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(world / "storage" / by_torchrun.path / "tensorboard"))
    shown.Reload()
    losses = {event.step: event.value for event in shown.Scalars("loss")}
    expected = {m.step: m.loss for m in read_metrics(by_torchrun.storage, by_torchrun.run_id)}
    assert losses == pytest.approx(expected, rel=1e-6)


def test_a_run_writes_to_all_its_trackers_and_another_is_sent_later(
    world: Path, by_torchrun: RunFolder, by_one_process: RunFolder
) -> None:
    from mlflow import MlflowClient

    assert not (world / "storage" / by_one_process.path / "tensorboard").exists()
    assert list((world / "storage" / by_torchrun.path / "wandb").glob("offline-run-*"))
    steps = len(read_metrics(by_one_process.storage, by_one_process.run_id))
    assert send(by_one_process, "mlflow").num_steps == steps
    assert send(by_one_process, "mlflow").num_steps == 0
    client = MlflowClient(tracking_uri=(world / "storage" / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("ft-service")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    for run in (by_torchrun, by_one_process):
        expected = [(metrics.step, metrics.loss) for metrics in read_metrics(run.storage, run.run_id)]
        history = client.get_metric_history(runs[run.run_id].info.run_id, "loss")
        assert [(metric.step, metric.value) for metric in history] == expected


def test_worker_failure_is_one_message_without_ray(world: Path) -> None:
    run = prepared_run(world, "no-data", 1)
    shutil.rmtree(world / "storage/datasets" / run.plan().dataset.digest)
    command = [sys.executable, "-m", "ft_service.train.worker", run.storage.root, run.run_id]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "worker 0:" in done.stderr and run.plan().dataset.digest in done.stderr
    assert "Traceback" not in done.stderr
