"""Merging weight by weight: peft's arithmetic, bounded memory, and no incomplete folder."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ft_service.errors import ModelError, StorageError, UsageError
from ft_service.evaluate.verify import verify_adapter
from ft_service.model.merge import merge_adapter, write_merged
from ft_service.model.weight_files import WeightFiles
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.storage.storage import Storage
from tests.registry.test_registry import DRAFT
from tests.storage.object_stores import faulty_s3, uploaded
from tests.train.training_cases import write_base

WEIGHTS = "adapter_model.safetensors"


def write_adapter(model: torch.nn.Module, folder: Path, **settings: Any) -> None:
    """An adapter whose weights are all random, as after training."""
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    adapted = get_peft_model(model, LoraConfig(**settings))  # type: ignore[arg-type]
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + torch.rand_like(parameter)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("a template")


def stock_merge(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    return dict(merged.named_parameters())


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    write_base(folder, tied=request.param)
    return folder


def publish(storage: Storage, base: str, adapter: Path, fingerprint: str) -> AdapterRecord:
    about = {"id": base, "revision": None, "short_name": "base", "fingerprint": fingerprint}
    return Registry(storage).publish(adapter, DRAFT | {"base": about}, "base", "card of {id}")


@pytest.fixture
def published(base: Path, tmp_path: Path) -> tuple[Registry, AdapterRecord]:
    write_adapter(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter")
    storage = Storage(str(tmp_path / "storage"))
    return Registry(storage), publish(storage, str(base), tmp_path / "adapter", WeightFiles(base).fingerprint())


# -- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", [False, True], ids=["folder", "object storage"])
def test_merged_model_equals_peft_merge(
    base: Path, published: Any, tmp_path: Path, uri: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    registry, record = published
    monkeypatch.setattr("ft_service.model.base._REMOTE_CACHE", tmp_path / "cache")
    with ExitStack() as stack:
        if uri:
            about = record.base.model_copy(update={"id": uploaded(stack.enter_context(faulty_s3()), base)})
            record = record.model_copy(update={"base": about})
        merge_adapter(registry, record, tmp_path / "out")
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    expected = stock_merge(base, registry.folder(record))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    card = (tmp_path / "out/README.md").read_text()
    assert f"with the LoRA adapter `{record.id}` merged into its weights" in card
    assert "library_name: transformers" in card and "base_model_relation: finetune" in card and "peft" not in card
    assert 'AutoModelForCausalLM.from_pretrained("out"' in card
    assert (tmp_path / "out/chat_template.jinja").read_text() == "a template"
    assert "Merging: " in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # weights are read where they are


def test_large_model_is_split_into_files(base: Path, published: Any, tmp_path: Path) -> None:
    registry, record = published
    limit = 20_000
    write_merged(WeightFiles(base), registry.folder(record), base, tmp_path / "out", max_file_bytes=limit)
    checkpoint = WeightFiles(tmp_path / "out")
    checkpoint.check()
    sizes = [sum(e.nbytes for e in checkpoint.tensors.values() if e.file == file) for file in checkpoint.file_names]
    assert len(sizes) > 2 and max(sizes) <= limit
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    expected = stock_merge(base, registry.folder(record))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# -- what is refused -------------------------------------------------------------------------------------------------


def test_existing_folder_and_other_base_are_rejected(base: Path, published: Any, tmp_path: Path) -> None:
    registry, record = published
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        merge_adapter(registry, record, tmp_path / "there")
    about = record.base.model_copy(update={"fingerprint": "another"})
    with pytest.raises(ModelError, match="not the base"):
        merge_adapter(registry, record.model_copy(update={"base": about}), tmp_path / "out")
    with pytest.raises(UsageError, match="nothing to merge"):
        merge_adapter(registry, record.model_copy(update={"kind": "model"}), tmp_path / "out")


def test_a_base_that_has_moved_is_named_and_checked_by_fingerprint(base: Path, published: Any, tmp_path: Path) -> None:
    registry, record = published
    about = record.base.model_copy(update={"id": "/gone/base", "revision": "abc"})
    record = record.model_copy(update={"base": about})
    shutil.copytree(base, tmp_path / "moved")
    write_base(tmp_path / "other", hidden_size=48)

    with pytest.raises(ModelError, match=r"'/gone/base': no such folder.*--base PATH"):
        merge_adapter(registry, record, tmp_path / "out")
    with pytest.raises(ModelError, match=r"other: is not the base that .*--base PATH"):
        merge_adapter(registry, record, tmp_path / "out", str(tmp_path / "other"))
    merge_adapter(registry, record, tmp_path / "out", str(tmp_path / "moved"))
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in stock_merge(base, registry.folder(record)).items())

    assert "--base PATH" in verify_adapter(registry, record)[-1].detail
    refused = verify_adapter(registry, record, str(tmp_path / "other"))
    assert (refused[-1].name, refused[-1].passed) == ("base", False)
    assert all(check.passed for check in verify_adapter(registry, record, str(tmp_path / "moved")))


def without_a_weight(weights: dict[str, torch.Tensor]) -> None:
    del weights[sorted(weights)[0]]


def of_more_layers(weights: dict[str, torch.Tensor]) -> None:
    name = next(name for name in weights if ".layers.1." in name)
    weights[name.replace(".layers.1.", ".layers.2.")] = weights[name].clone()


def with_a_nan(weights: dict[str, torch.Tensor]) -> None:
    next(tensor for name, tensor in weights.items() if "layers.1.mlp.down_proj.lora_B" in name)[0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [(without_a_weight, "are not those that"), (of_more_layers, "are not those that"), (with_a_nan, "NaNs detected")],
)
def test_failed_merge_leaves_nothing(
    base: Path, tmp_path: Path, damage: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ft_service.registry.registry.nonfinite_tensor", lambda _: None)  # an earlier version published
    write_adapter(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    damage(weights)
    save_file(weights, tmp_path / "adapter" / WEIGHTS)
    storage = Storage(str(tmp_path / "storage"))
    record = publish(storage, str(base), tmp_path / "adapter", WeightFiles(base).fingerprint())
    with pytest.raises(ModelError, match=message):
        merge_adapter(Registry(storage), record, tmp_path / "out")
    assert not [file for file in tmp_path.iterdir() if "out" in file.name]


def test_full_disk_leaves_nothing(published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, record = published
    count = 0
    fsync = os.fsync

    def full_at_the_third_file(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_third_file)
    with pytest.raises(StorageError, match="No space left"):
        merge_adapter(registry, record, tmp_path / "out")
    assert not [file for file in tmp_path.iterdir() if "out" in file.name]


def test_adapter_on_a_tied_head_is_rejected(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    write_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ModelError, match=r"lm_head\.weight, which head and embedding share"):
        write_merged(WeightFiles(tmp_path / "base"), tmp_path / "adapter", tmp_path / "base", tmp_path / "out")


# -- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from ft_service.model.weight_files import WeightFiles
from ft_service.model.merge import write_merged

def kib(line):
    return int(Path("/proc/self/status").read_text().split(line + ":")[1].split()[0])

small, small_adapter, large, adapter, out = map(Path, sys.argv[1:])
write_merged(WeightFiles(small), small_adapter, small, out / "small")  # libraries, threads and their memory are there
before = kib("VmHWM")
write_merged(WeightFiles(large), adapter, large, out / "large")
print(kib("VmHWM") - before)
"""


@pytest.mark.slow
def test_merging_needs_memory_for_only_a_few_weights(tmp_path: Path) -> None:
    def write(name: str, num_layers: int) -> int:
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=num_layers,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(dtype=torch.bfloat16)
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
        model.save_pretrained(tmp_path / name)
        write_adapter(model, tmp_path / f"{name}-adapter", use_dora=True)
        return sum(entry.nbytes for entry in WeightFiles(tmp_path / name).tensors.values())

    write("small", 1)
    nbytes = write("large", 24)
    folders = [str(tmp_path / name) for name in ("small", "small-adapter", "large", "large-adapter", "out")]
    done = subprocess.run([sys.executable, "-c", PEAK, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    grown = int(done.stdout.split()[-1]) * 1024
    assert nbytes > 200e6
    assert grown < nbytes / 2, f"{grown / 1e6:.0f} of {nbytes / 1e6:.0f} MB"
    WeightFiles(tmp_path / "out/large").check()
    for folder in folders:
        shutil.rmtree(folder)  # pytest would keep half a gigabyte
