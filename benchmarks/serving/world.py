"""The model and the adapters that all sides serve."""

import json
from pathlib import Path
from typing import Any

from benchmarks.serving.work import World

# 23 M parameters with a vocabulary of 27,000; the smallest is for a look whether it runs.
SIZES: dict[str, Any] = {
    "hidden_size": 384,
    "num_layers": 8,
    "num_heads": 6,
    "num_kv_heads": 2,
    "intermediate_size": 1024,
    "vocab_size": 27_000,
}
SMALLEST: dict[str, Any] = {
    "hidden_size": 64,
    "num_layers": 1,
    "num_heads": 2,  # of 32: vLLM's attention on CPU takes no smaller heads
    "num_kv_heads": 1,
    "intermediate_size": 64,
    "vocab_size": 600,
}
RANKS = (16, 8)
"""Of the adapters, in turn."""


def write_world(folder: Path, sizes: dict[str, Any], num_adapters: int, dtype: str) -> World:
    """Random weights; adapters of stock peft on all linear layers, published as a run publishes its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from ft_service.registry.registry import Registry
    from ft_service.storage.storage import Storage
    from tests.serve.serving_world import draft_record
    from tests.worlds import made_up_texts, write_base

    base = folder / "bench-llama"
    sizes = dict(sizes)
    write_base(base, made_up_texts(3000 if sizes["vocab_size"] > 1000 else 100), sizes.pop("vocab_size"), sizes)
    # No end token: every answer has the length that was asked for, on all sides.
    for name in ("config.json", "generation_config.json"):
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**content, "eos_token_id": None}))
    model = LlamaForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    model.save_pretrained(base)
    registry = Registry(Storage(str(folder / "storage")))
    (folder / "storage").mkdir()
    records = []
    for number in range(num_adapters):
        torch.manual_seed(number)
        rank = RANKS[number % len(RANKS)]
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        work = folder / f"adapter-{number}"
        adapted.save_pretrained(str(work))
        model = adapted.unload()  # type: ignore[assignment]
        records.append(registry.publish(work, draft_record(base, f"run-{number}"), base.name, "# {id}\n"))
    world = World(
        base=str(base),
        storage=registry.storage.root,
        adapter_ids=[record.id for record in records],
        adapter_folders=[str(registry.folder(record)) for record in records],
        vocab_size=model.config.vocab_size,
        dtype=dtype,
    )
    world.write(folder)
    return world
