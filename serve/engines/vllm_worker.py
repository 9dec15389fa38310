"""What this project adds to vLLM's workers. vLLM imports it in each of their processes, by name."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from vllm.platforms import current_platform


class CacheCleaner:
    """Becomes a base class of vLLM's worker (`worker_extension_cls`)."""

    vllm_config: Any

    def clear_keys_and_values(self) -> None:
        """Overwrite all keys and values with 0.

        vLLM frees blocks as they are, and attention multiplies what lies behind the end of a sequence by 0. That is NaN
        if it is NaN, so whoever gets a block of a request that had NaN would have it too.
        """
        layers = self.vllm_config.compilation_config.static_forward_context
        for layer in layers.values():
            cache = getattr(layer, "kv_cache", ())
            for tensor in [cache] if isinstance(cache, torch.Tensor) else cache:
                tensor.zero_()


def keep_adapters_from_the_base() -> None:
    """Repair vLLM 0.32 on CPU: rows of the base have index -1, and so get the adapter of the last slot if it has one.

    The kernels for GPUs skip such rows.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in ("bgmv_expand", "bgmv_expand_slice"):
        repaired = _without_base_rows(getattr(lora_ops, name))
        for module in (lora_ops, punica_cpu):  # it imports them by name
            setattr(module, name, repaired)


def _without_base_rows(expand: Callable[..., None]) -> Callable[..., None]:
    @wraps(expand)
    def expand_rows_of_adapters(
        inputs: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
        slots: torch.Tensor,
        *options: Any,
        **named_options: Any,
    ) -> None:
        expand(inputs.masked_fill(slots.lt(0)[:, None], 0), weights, output, slots, *options, **named_options)

    return expand_rows_of_adapters


if current_platform.is_cpu():
    keep_adapters_from_the_base()
