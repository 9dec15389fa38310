"""Weights that are not finite are found by their bits, in every floating type, and are not published."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ft_service.errors import TrainingError
from ft_service.registry import finite
from ft_service.registry.finite import nonfinite_tensor
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from tests.registry.test_registry import DRAFT

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found(
    tmp_path: Path, dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "_PART_BYTES", 64)
    bad = torch.randn(9, 11).to(dtype)
    bad[8, 10] = value
    save_file(
        {"a.good": torch.randn(3, 5).to(dtype), "b.bad": bad, "c.good": torch.ones(2)}, tmp_path / "w.safetensors"
    )
    assert nonfinite_tensor(tmp_path / "w.safetensors") == "b.bad"


@pytest.mark.parametrize("dtype", TYPES)
def test_the_largest_and_smallest_numbers_are_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    numbers = torch.tensor([info.max, info.min, info.tiny, info.smallest_normal, 0.0, -0.0], dtype=dtype)
    tensors = {"numbers": numbers, "integers": torch.full((4,), -1), "empty": torch.ones(0, dtype=dtype)}
    save_file(tensors, tmp_path / "w.safetensors")
    assert nonfinite_tensor(tmp_path / "w.safetensors") is None


@pytest.mark.parametrize(
    "content", [b"", b"weights", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{}"]
)
def test_a_file_of_another_format_has_no_tensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    assert nonfinite_tensor(tmp_path / "w.safetensors") is None


def test_weights_that_are_not_finite_are_not_published(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"layer.lora_A.weight": torch.tensor([1.0, float("nan")])}, folder / "adapter_model.safetensors")
    registry = Registry(Storage(str(tmp_path / "storage")))
    with pytest.raises(TrainingError, match=r"adapter_model\.safetensors: layer\.lora_A\.weight .*not finite"):
        registry.publish(folder, DRAFT, "llama", "card")
    assert registry.records() == []
