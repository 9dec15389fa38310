"""Training is correct: compared with plain PyTorch, with transformers' Trainer, and across all layouts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from ft_service.data.order import step_rows
from tests.forked import run_cases
from tests.train.training_cases import DOCUMENTS_PER_ROW, documents, fixed_rows, run_case, write_base

pytestmark = pytest.mark.multiprocess

TOLERANCE = 1e-3
SWAPS = 0.02
"""Of the loss tokens."""
FULL = {"type": "full"}
LORA = {"type": "lora", "lora_rank": 4}
QLORA = {"type": "qlora", "lora_rank": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


@pytest.fixture(scope="module")
def one_worker(base: Path) -> dict[str, Any]:
    cases = {f"full-zero{stage}": {"method": FULL, "stage": stage, "micro": 1} for stage in (0, 1, 2, 3)}
    cases |= {f"lora-zero{stage}": {"method": LORA, "stage": stage, "micro": 1} for stage in (0, 3)}
    cases["full-whole-batch"] = {"method": FULL, "stage": 2, "micro": 4}
    cases["full-separate"] = {"method": FULL, "stage": 2, "micro": 4, "packed": False}
    cases["full-checkpointing"] = {"method": FULL, "stage": 3, "micro": 2, "checkpointing": True}
    cases["lora-bf16"] = {"method": LORA, "stage": 1, "micro": 2, "precision": "bf16"}
    cases["qlora-bf16"] = {"method": QLORA, "stage": 1, "micro": 2, "precision": "bf16"}
    for case in cases.values():
        case["base"] = str(base)
    return run_cases(run_case, cases, 1)


@pytest.fixture(scope="module")
def two_workers(base: Path) -> dict[str, Any]:
    cases = {f"full-zero{stage}": {"method": FULL, "stage": stage, "micro": 1} for stage in (0, 1, 2, 3)}
    cases |= {f"lora-zero{stage}": {"method": LORA, "stage": stage, "micro": 2} for stage in (0, 1, 2, 3)}
    cases["full-separate"] = {"method": FULL, "stage": 3, "micro": 2, "packed": False}
    cases["full-zero3-checkpointing"] = {"method": FULL, "stage": 3, "micro": 1, "checkpointing": True}
    cases["lora-zero3-checkpointing"] = {"method": LORA, "stage": 3, "micro": 1, "checkpointing": True}
    cases |= {f"lora-bf16-zero{s}": {"method": LORA, "stage": s, "micro": 2, "precision": "bf16"} for s in (1, 2, 3)}
    cases |= {f"qlora-bf16-zero{s}": {"method": QLORA, "stage": s, "micro": 2, "precision": "bf16"} for s in (2, 3)}
    cases["qlora-bf16-zero3-checkpointing"] = cases["qlora-bf16-zero3"] | {"checkpointing": True}
    for case in cases.values():
        case["base"] = str(base)
    return run_cases(run_case, cases, 2)


@pytest.fixture(scope="module")
def two_nodes(base: Path) -> dict[str, Any]:
    """Four workers on two nodes; each node shares a copy of the weights (ZeRO++ hpZ)."""
    cases = {name: {"method": method, "stage": 3, "micro": 1} for name, method in (("full", FULL), ("lora", LORA))}
    cases["qlora-bf16"] = {"method": QLORA, "stage": 3, "micro": 1, "precision": "bf16"}
    cases["lora-checkpointing"] = cases["lora"] | {"checkpointing": True}
    for case in cases.values():
        case |= {"base": str(base), "node_size": 2}
    return run_cases(run_case, cases, 4)


def assert_same_curve(found: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    assert found["validation_losses"] == pytest.approx(expected["validation_losses"], abs=tolerance)
    # A nearly equal pair of logits may swap places.
    assert found["accuracies"] == pytest.approx(expected["accuracies"], abs=SWAPS)
    assert found["validation_accuracies"] == pytest.approx(expected["validation_accuracies"], abs=SWAPS)


# -- the same curve on every layout ----------------------------------------------------------------------------------


def test_every_layout_trains_the_same_full_weights(one_worker: dict[str, Any], two_workers: dict[str, Any]) -> None:
    expected = one_worker["full-zero0"]
    for results in (one_worker, two_workers):
        for name, found in results.items():
            if name.startswith("full"):
                assert_same_curve(found, expected)
                assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-2), name


def test_hpz_changes_no_losses(one_worker: dict[str, Any], two_nodes: dict[str, Any]) -> None:
    assert_same_curve(two_nodes["full"], one_worker["full-zero0"])
    assert_same_curve(two_nodes["lora"], one_worker["lora-zero0"])
    assert_same_curve(two_nodes["lora-checkpointing"], one_worker["lora-zero0"])
    assert two_nodes["lora"]["moved"] > 0
    assert_same_curve(two_nodes["qlora-bf16"], one_worker["qlora-bf16"], tolerance=5e-3)


def test_every_layout_trains_the_same_adapter(one_worker: dict[str, Any], two_workers: dict[str, Any]) -> None:
    expected = one_worker["lora-zero0"]
    assert_same_curve(one_worker["lora-zero3"], expected)
    for name in ("lora-zero0", "lora-zero1", "lora-zero2", "lora-zero3", "lora-zero3-checkpointing"):
        assert_same_curve(two_workers[name], expected)


def test_bf16_curves_agree_between_stages(one_worker: dict[str, Any], two_workers: dict[str, Any]) -> None:
    # bf16 keeps 8 bits of mantissa: 2^-8 of a loss near 5.5 is 0.02, and a mean over hundreds of tokens is far closer.
    for stage in (1, 2, 3):
        assert_same_curve(two_workers[f"lora-bf16-zero{stage}"], one_worker["lora-bf16"], tolerance=5e-3)
    for stage in (2, 3):
        assert_same_curve(two_workers[f"qlora-bf16-zero{stage}"], one_worker["qlora-bf16"], tolerance=5e-3)
    assert_same_curve(two_workers["qlora-bf16-zero3-checkpointing"], one_worker["qlora-bf16"], tolerance=5e-3)


# -- independent references ------------------------------------------------------------------------------------------


def plain_pytorch_losses(base: Path, learning_rates: list[float]) -> tuple[list[float], float]:
    """Six steps of stock transformers and AdamW: a forward pass per document, no packing, no engine."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1.0
    )
    docs = documents()
    losses = []
    rows = len(docs) // DOCUMENTS_PER_ROW

    def loss_of(chosen: list[int]) -> torch.Tensor:
        total = torch.zeros(())
        count = 0
        for document in chosen:
            ids, mask = docs[document]
            tokens = torch.from_numpy(ids).long()
            predicted = torch.from_numpy(mask[1:])
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits[predicted], tokens[1:][predicted], reduction="sum")
            count += int(predicted.sum())
        return total / count

    for step, rate in enumerate(learning_rates):
        chosen = [row * DOCUMENTS_PER_ROW + k for row in step_rows(0, step, 4, rows) for k in range(DOCUMENTS_PER_ROW)]
        loss = loss_of(chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(float(loss))
    with torch.no_grad():
        return losses, float(loss_of(list(range(len(docs)))))


def test_losses_match_a_plain_pytorch_loop(base: Path, one_worker: dict[str, Any]) -> None:
    # Warm-up over ceil(0.3 x 6) = 2 steps, then a cosine over the other 4, of a peak of 1e-2.
    cosine = [0.5e-2 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    rates = [0.5e-2, 1e-2, *cosine]
    expected, validation_loss = plain_pytorch_losses(base, rates)
    found = one_worker["full-zero2"]
    assert found["learning_rates"] == pytest.approx(rates, rel=1e-9)
    assert found["losses"] == pytest.approx(expected, abs=TOLERANCE)
    assert found["validation_losses"][-1] == pytest.approx(validation_loss, abs=TOLERANCE)


def test_losses_match_transformers_trainer_on_a_fixed_batch(base: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = fixed_rows()
    longest = max(len(row.input_ids) for row in rows)
    batch = []
    for row in rows:
        ids = torch.full((longest,), 0)
        labels = torch.full((longest,), -100)
        length = len(row.input_ids)
        ids[:length] = torch.from_numpy(row.input_ids)
        labels[:length] = torch.where(torch.from_numpy(row.loss_mask), ids[:length], -100)
        batch.append({"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(longest) < length).long()})

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), arguments, train_dataset=batch)
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    fixed = {"method": FULL, "stage": 2, "micro": 2, "base": str(base), "fixed_batch": True}
    found = run_cases(run_case, {"fixed": fixed}, 2)["fixed"]
    assert found["losses"][:4] == pytest.approx(expected, abs=TOLERANCE)


# -- what is trained, and what is not --------------------------------------------------------------------------------


def test_gathered_adapter_is_whole_and_trained_under_any_stage(two_workers: dict[str, Any]) -> None:
    for stage in (0, 1, 2, 3):
        found = two_workers[f"lora-zero{stage}"]
        # 2 layers x 7 linear layers x (A, B)
        assert len(found["trained"]) == 28
        shapes = {name.split("layers.0.")[-1]: shape for name, shape in found["trained"].items() if "layers.0." in name}
        assert shapes["self_attn.q_proj.lora_A.default.weight"] == [4, 36]
        assert shapes["mlp.down_proj.lora_A.default.weight"] == [4, 75]
        assert shapes["mlp.gate_proj.lora_B.default.weight"] == [75, 4]
        assert found["moved"] > 0  # B starts at zero


def test_qlora_freezes_real_4_bit_weights(two_workers: dict[str, Any]) -> None:
    frozen = two_workers["qlora-bf16-zero2"]["frozen"]
    assert len(frozen) == 14
    for facts in frozen.values():
        assert facts["unchanged"] and facts["same_statistics"]
        assert facts["nested"]  # double quantisation
        assert facts["bytes_whole"] == pytest.approx(facts["weights"] / 2, abs=2)
        assert facts["bytes_here"] == facts["bytes_whole"]


def test_qlora_under_zero3_partitions_the_4_bit_weights(two_workers: dict[str, Any]) -> None:
    frozen = two_workers["qlora-bf16-zero3"]["frozen"]
    assert len(frozen) == 14
    for facts in frozen.values():
        assert facts["unchanged"] and facts["same_statistics"]
        assert facts["bytes_whole"] == pytest.approx(facts["weights"] / 2, abs=2)
        assert facts["bytes_here"] == pytest.approx(facts["bytes_whole"] / 2, abs=2)
