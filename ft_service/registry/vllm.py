"""What vLLM refuses in an adapter, or computes differently without a word, read from the adapter's configuration.

Known at publishing, so that nobody finds out in production. After `PEFTHelper` of vLLM 0.32.
"""

from collections.abc import Mapping
from typing import Any

LARGEST_RANK = 512
"""The largest that `--max-lora-rank` takes."""


def vllm_problems(config: Mapping[str, Any]) -> list[str]:
    """Why vLLM cannot serve an adapter with this ``adapter_config.json``; empty if nothing is known against it."""
    problems = []
    if config.get("use_dora"):
        problems.append("use_dora: vLLM has no DoRA")
    if saved := config.get("modules_to_save"):
        problems.append(f"modules_to_save: vLLM takes no weights saved whole ({', '.join(saved)})")
    if config.get("lora_bias") or config.get("bias", "none") != "none":
        problems.append("lora_bias, bias: vLLM takes no biases in an adapter")
    rank = max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])
    if rank > LARGEST_RANK:
        problems.append(f"r: {rank} is above the largest rank of vLLM, {LARGEST_RANK}")
    for pattern in ("rank_pattern", "alpha_pattern"):
        if config.get(pattern):
            problems.append(f"{pattern}: vLLM scales all layers alike")
    return problems
