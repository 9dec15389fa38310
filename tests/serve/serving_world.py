"""A small Llama that has learnt one Japanese sentence, adapters that say other things, and what stock code answers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ft_service.chat.format import ChatFormat
from ft_service.model.base import fingerprint
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.storage.storage import Storage
from tests.worlds import SMALL, write_base

SENTENCE = "日本の首都は東京です。😀🗼人口は約千四百万人。"
PROMPT = "Tell me: "


@dataclass(frozen=True)
class World:
    """A base folder, and a storage root with two adapters published for it."""

    base: Path
    storage: str
    registry: Registry
    adapters: list[AdapterRecord]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.base)

    def stock_model(self, adapter: AdapterRecord | None = None, **options) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.base, **options)
        return PeftModel.from_pretrained(model, self.registry.folder(adapter)) if adapter is not None else model

    def stock_answer(
        self, prompt_ids: list[int], max_tokens: int, adapter: AdapterRecord | None = None, **options
    ) -> list[int]:
        """What stock transformers and peft generate greedily, end token included; `options` are for loading."""
        output = self.stock_model(adapter, **options).generate(
            input_ids=torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return output[0, len(prompt_ids) :].tolist()

    def stock_logprobs(self, ids: list[int], adapter: AdapterRecord | None = None) -> torch.Tensor:
        """Of every token after each but the last of `ids` [tokens - 1, V]."""
        with torch.inference_mode():
            logits = self.stock_model(adapter)(input_ids=torch.tensor([ids[:-1]])).logits
            return logits[0].log_softmax(-1)


def make_world(folder: Path, sizes: Mapping[str, int] = SMALL) -> World:
    """Write a base that continues PROMPT with SENTENCE, and publish two adapters for it."""
    base = folder / "Tiny-Llama"
    # Too few merges for the Japanese: most of its characters, and the emoji, are spread over two to four tokens.
    write_base(base, [PROMPT * 4 + "the quick brown fox. " * 4], 300, sizes)
    _teach(base)
    registry = Registry(Storage(str(folder / "storage")))
    adapters = [publish_adapter(registry, base, folder / f"adapter-{seed}", seed) for seed in (1, 2)]
    return World(base, registry.storage.root, registry, adapters)


def publish_adapter(
    registry: Registry, base: Path, work: Path, seed: int, base_fingerprint: str | None = None, std: float = 0.2
) -> AdapterRecord:
    """Publish a LoRA adapter of random weights, large enough to change every answer."""
    write_adapter(base, work, seed, std)
    return registry.publish(work, draft_record(base, f"run-{seed}", base_fingerprint), base.name, "# {id}\n")


def write_adapter(base: Path, work: Path, seed: int, std: float = 0.2) -> None:
    """A stock peft folder, as yet unpublished."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(str(work))


def draft_record(base: Path, run_name: str, base_fingerprint: str | None = None) -> dict[str, object]:
    chat = ChatFormat(AutoTokenizer.from_pretrained(base))
    return {
        "kind": "adapter",
        "run_id": f"{run_name}-1",
        "run_name": run_name,
        "plan_digest": "0" * 64,
        "base": {
            "id": str(base),
            "revision": None,
            "short_name": base.name.lower(),
            "fingerprint": base_fingerprint or fingerprint(base),
        },
        "method": {"type": "lora", "lora_rank": 4},
        "datasets": [],
        "dataset_digest": "0" * 64,
        "data_verdict": "pass",
        "waivers": [],
        "steps": 1,
        "final_loss": 1.0,
        "validation_loss": None,
        "chat_template_digest": chat.template_digest,
        "end_of_turn_ids": list(chat.end_of_turn_ids),
        "packages": {},
    }


def damage(registry: Registry, adapter: AdapterRecord, file: str = "adapter_model.safetensors") -> None:
    """Flip the last bit of a published file."""
    path = registry.folder(adapter) / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _teach(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(PROMPT + SENTENCE, return_tensors="pt")["input_ids"]
    ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(base)
