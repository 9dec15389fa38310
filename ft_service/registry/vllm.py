"""What vLLM refuses in an adapter, read from the adapter's configuration.

Known at publishing, so that nobody finds out in production. After `PEFTHelper` and `LoRAModel` of vLLM 0.32.
"""

from collections.abc import Mapping
from typing import Any

LARGEST_RANK = 512
"""The largest that `--max-lora-rank` takes."""
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of `init_lora_weights` that vLLM takes beside true and false."""
_MISSING = {
    "alora_invocation_tokens": "Activated LoRA",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "tokens that are trained apart",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
}
"""Settings -> what vLLM does not have."""


def vllm_problems(config: Mapping[str, Any]) -> list[str]:
    """Why vLLM cannot serve an adapter with this ``adapter_config.json``; empty if nothing is known against it."""
    problems = [f"{setting}: vLLM has no {what}" for setting, what in _MISSING.items() if config.get(setting)]
    if saved := config.get("modules_to_save"):
        problems.append(f"modules_to_save: vLLM takes no weights saved whole ({', '.join(saved)})")
    if config.get("lora_bias") or config.get("bias", "none") != "none":
        problems.append("lora_bias, bias: vLLM takes no biases in an adapter")
    rank = max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])
    if rank > LARGEST_RANK:
        problems.append(f"r: {rank} is above the largest rank of vLLM, {LARGEST_RANK}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        problems.append(f"init_lora_weights: vLLM takes no adapter that changes its base when loaded ({start})")
    return problems
