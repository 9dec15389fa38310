"""Adapters of every kind that can be batched, on a tiny base; what stock peft computes, and what the layers compute."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from ft_service.registry.registry import AdapterRecord, Registry
from serve.engines.batching.adapter_weights import LoadedAdapter, load_weights, parse_config
from serve.engines.batching.lora_layers import BatchedLora, install_lora_layers

PROMPT_TOKENS = 7
VOCABULARY = 64

KINDS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "rank 8, rsLoRA": {"target_modules": ["q_proj", "v_proj"], "r": 8, "use_rslora": True},
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 32},
    },
    "rsLoRA with patterns": {
        "target_modules": ["k_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"k_proj": 3},
    },
    "lora_bias": {"target_modules": ["k_proj", "up_proj"], "lora_bias": True},
    "embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "a whole layer saved": {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]},
    "DoRA on the embedding": {"target_modules": ["o_proj", "embed_tokens"], "use_dora": True},
    "one layer": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "a pattern of names": {"target_modules": r".*\.0\..*(gate|up)_proj", "r": 3},
    "excluded": {"target_modules": ["v_proj", "o_proj"], "exclude_modules": r".*\.1\.self_attn\.v_proj"},
}


class LoraWorld:
    """One base with the batched layers, and one adapter of each of `KINDS` (or of the given ones)."""

    def __init__(
        self,
        folder: Path,
        kinds: dict[str, dict[str, Any]] = KINDS,
        *,
        in_4bit: bool = False,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> None:
        torch.manual_seed(0)
        self.in_4bit = in_4bit
        settings: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attn_implementation": "sdpa",
        }
        self.base = LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval().to(dtype)
        self.folders = {
            kind: save_adapter(self.base, folder / str(number), **kinds[kind]) for number, kind in enumerate(kinds)
        }
        self.plain = self.base
        if in_4bit:
            self.base.save_pretrained(folder / "base")
            self.base = load_4bit(folder / "base")
        self.model = load_4bit(folder / "base") if in_4bit else copy.deepcopy(self.base)
        self.lora = install_lora_layers(self.model)
        self.adapters = {kind: load(self.lora, folder, kind) for kind, folder in self.folders.items()}
        self._stock: dict[tuple[str | None, tuple[int, ...]], torch.Tensor] = {}

    def stock_logits(self, kind: str | None, ids: tuple[int, ...]) -> torch.Tensor:
        """What stock transformers and peft compute for one prompt alone [T, V]."""
        if (kind, ids) not in self._stock:
            model: Any = load_4bit(Path(self.base.name_or_path)) if self.in_4bit else copy.deepcopy(self.base)
            if kind is not None:
                model = PeftModel.from_pretrained(model, self.folders[kind]).eval()
            with torch.inference_mode():
                self._stock[kind, ids] = model(torch.tensor([ids]), use_cache=False).logits[0]
        return self._stock[kind, ids]

    def batched_logits(self, rows: list[tuple[str | None, tuple[int, ...]]]) -> list[torch.Tensor]:
        """What the layers compute for these prompts in one flattened batch: [T, V] for each."""
        self.set_rows([(kind, len(ids)) for kind, ids in rows])
        logits = forward(self.model, [ids for _, ids in rows])
        return list(logits.split([len(ids) for _, ids in rows]))

    def set_rows(self, runs: list[tuple[str | None, int]]) -> None:
        counts = [count for _, count in runs]
        self.lora.set_rows([self.adapters[kind] if kind else None for kind, _ in runs], counts, counts)


def load_4bit(folder: Path) -> LlamaForCausalLM:
    """The base in NF4, computing in fp32. Without bitsandbytes' packed kernel for CPUs, which rounds to bf16."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings).eval()
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def save_adapter(base: LlamaForCausalLM, folder: Path, **settings: Any) -> Path:
    """A stock peft folder of random weights, large enough to change the logits."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, **settings}))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    return folder


def load(lora: BatchedLora, folder: Path, name: str) -> LoadedAdapter:
    config = parse_config((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    return load_weights(name, name, config, tensors, lora.sites, lora.dtype)


@torch.inference_mode()
def forward(model: LlamaForCausalLM, prompts: list[tuple[int, ...]], **options: Any) -> torch.Tensor:
    """Logits of several prompts in one row, each of which sees only itself [N, V]."""
    lengths = [len(prompt) for prompt in prompts]
    num_rows = sum(lengths)
    mask = torch.full((num_rows, num_rows), float("-inf"))
    start = 0
    for length in lengths:
        mask[start : start + length, start : start + length].fill_(float("-inf")).triu_(1)
        start += length
    logits: torch.Tensor = model(
        torch.tensor([[token for prompt in prompts for token in prompt]]),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        attention_mask=mask[None, None],
        use_cache=False,
        **options,
    ).logits
    return logits[0]


FINGERPRINT = "f" * 64


def publish(registry: Registry, folder: Path, run_name: str, fingerprint: str = FINGERPRINT) -> AdapterRecord:
    """Publish a peft folder as the adapter of a base with this fingerprint."""
    draft: dict[str, object] = {
        "kind": "adapter",
        "run_id": f"{run_name}-1",
        "run_name": run_name,
        "plan_digest": "0" * 64,
        "base": {"id": "the/base", "revision": None, "short_name": "base", "fingerprint": fingerprint},
        "method": {"type": "lora", "lora_rank": 4},
        "datasets": [],
        "dataset_digest": "0" * 64,
        "data_verdict": "pass",
        "waivers": [],
        "steps": 1,
        "final_loss": 1.0,
        "validation_loss": None,
        "chat_template_digest": "0" * 64,
        "end_of_turn_ids": [],
        "packages": {},
    }
    return registry.publish(folder, draft, "base", "# {id}\n")
