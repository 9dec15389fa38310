"""What vLLM cannot serve is known at publishing."""

import json
from pathlib import Path

import pytest

from ft_service.registry.card import model_card
from ft_service.registry.registry import Registry
from ft_service.registry.vllm import vllm_problems
from ft_service.storage.storage import Storage
from tests.registry.test_registry import DRAFT


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "lm_head, embed_tokens"),
        ({"lora_bias": True}, "biases"),
        ({"bias": "all"}, "biases"),
        ({"r": 1024}, "rank of vLLM"),
        ({"r": 8, "rank_pattern": {"q_proj": 1024}}, "rank of vLLM"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"alora_invocation_tokens": [1, 2]}, "Activated LoRA"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "replicated layers"),
        ({"trainable_token_indices": [7]}, "tokens that are trained apart"),
        ({"use_qalora": True}, "QA-LoRA"),
    ],
)
def test_what_vllm_refuses_is_named(config: dict[str, object], problem: str) -> None:
    assert any(problem in each for each in vllm_problems(config))


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True, "modules_to_save": None, "rank_pattern": {}, "init_lora_weights": True},
        {"rank_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 64}},
        {"alpha_pattern": {"q_proj": 4}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva"},
    ],
)
def test_what_vllm_serves_is_not_flagged(config: dict[str, object]) -> None:
    """tests/serve/engines/test_engines.py compares patterns of ranks and alphas with peft, where vLLM is installed."""
    assert vllm_problems({"r": 16, "lora_alpha": 32, "bias": "none", **config}) == []


def test_record_and_card_of_an_adapter_name_what_vllm_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "use_dora": True}))
    record = Registry(Storage(str(tmp_path / "storage"))).publish(folder, DRAFT, "llama", "card")
    assert record.vllm_problems == ["use_dora: vLLM has no DoRA"]
    assert "Cannot be served by vLLM | use_dora: vLLM has no DoRA" in model_card(record.model_dump(mode="json"), None)
