"""A step of decoding over 1, 4 and 32 adapters: the two batched products, the choice between them, and a loop.

python benchmarks/lora_layers.py [--rank 16] [--dtype float32] [--rows 16 64] [--prefill 0] [--threads 1] [--smoke]

A 25 M-parameter Llama of random weights, one forward pass over a flattened batch in which each row belongs to the base
or to one of the adapters; attention sees only the row itself, so what is timed is linear layers, norms and the head.
`loop` computes each adapter's rows by themselves, as a server does that switches adapters. Processor seconds of the
process, the least of several rounds in which all sides alternate; so other processes disturb little.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import AttentionInterface

from benchmarks.result import add_smoke_option, print_result, shrink
from serve.engines.batching import lora_layers
from serve.engines.batching.adapter_weights import GroupWeights, LoadedAdapter, change_dtype

GOALS = {"4 of 1": 0.85, "4 of base": 0.7, "32 of 4": 0.7}
SIDES = ("chosen", "dense", "padded", "loop")
ROUNDS = 5


def values_only(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    """Attention of each row to itself alone: its value."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None


def make_model(dtype: torch.dtype) -> LlamaForCausalLM:
    AttentionInterface.register("values_only", values_only)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval().to(dtype)
    model.set_attn_implementation("values_only")
    return model


def make_adapter(lora: lora_layers.BatchedLora, number: int, rank: int) -> LoadedAdapter:
    """Random weights on all linear layers but the head."""
    members: dict[int, list[Any]] = {}
    for site in lora.sites.values():
        if site.kind == "linear" and not site.name.endswith("lm_head"):
            members.setdefault(site.group, []).append(site)
    groups = {}
    for group, sites in members.items():
        a_IR = 0.01 * torch.randn(sites[0].shape[1], rank * len(sites))
        columns = tuple(slice(rank * place, rank * (place + 1)) for place in range(len(sites)))
        dtype = change_dtype(sites[0].device, lora.dtype)
        b_rO = tuple((0.01 * torch.randn(rank, site.shape[0])).to(dtype) for site in sites)
        groups[group] = GroupWeights(a_IR.to(dtype), columns, b_rO)
    return LoadedAdapter(f"{number}", f"{number}", groups, {}, {}, {}, {}, rank, False)


class Steps:
    """Forward passes of one model over batches of the same rows."""

    def __init__(self, dtype: torch.dtype, rank: int, num_adapters: int) -> None:
        self.model = make_model(dtype)
        self.lora = lora_layers.install_lora_layers(self.model)
        self.adapters = [make_adapter(self.lora, number, rank) for number in range(num_adapters)]
        self._split = lora_layers.BatchedLora._split

    def runs(self, num_rows: int, num_adapters: int, prefill: int) -> list[lora_layers.Run]:
        """`num_rows` decoding rows, shuffled, and a prompt of the first adapter."""
        owners: list[LoadedAdapter | None] = [None] * num_rows
        if num_adapters:
            owners = [self.adapters[row % num_adapters] for row in range(num_rows)]
        random.Random(0).shuffle(owners)
        prompt: list[lora_layers.Run] = [(owners[0], prefill)] if prefill else []
        return [*((owner, 1) for owner in owners), *prompt]

    def forward(self, runs: list[lora_layers.Run]) -> None:
        counts = [count for _, count in runs]
        self.lora.set_rows([owner for owner, _ in runs], counts, [1] * len(runs))
        num_rows = sum(counts)
        ends = torch.tensor(counts).cumsum(0) - 1
        self.model(
            torch.ones(1, num_rows, dtype=torch.long),
            position_ids=torch.arange(num_rows)[None],
            use_cache=False,
            logits_to_keep=ends,
        )

    def side(self, name: str, runs: list[lora_layers.Run]) -> Callable[[], None]:
        def all_dense(_: object, used_runs: list[lora_layers.Run]) -> Any:
            return [True] * len(used_runs)

        def all_padded(_: object, used_runs: list[lora_layers.Run]) -> Any:
            return [False] * len(used_runs)

        def step() -> None:
            splits: dict[str, Any] = {"dense": all_dense, "padded": all_padded}
            lora_layers.BatchedLora._split = splits.get(name, self._split)  # type: ignore[method-assign]
            if name != "loop":
                return self.forward(runs)
            for owner in dict.fromkeys(owner for owner, _ in runs):
                self.forward([run for run in runs if run[0] is owner])

        return step


def measure(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Processor milliseconds of each side, the least of all rounds."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, step in sides.items():
            step()  # the stacks are built
            started = time.process_time()
            step()
            best[name] = min(best[name], 1000 * (time.process_time() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64], help="decoding rows")
    parser.add_argument("--prefill", type=int, default=0, help="rows of a prompt beside them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    add_smoke_option(parser)
    arguments = parser.parse_args()
    shrink(arguments, rows=[4], rounds=1)
    torch.set_num_threads(arguments.threads)
    steps = Steps(getattr(torch, arguments.dtype), arguments.rank, 32)
    figures: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    print(f"{'rows':>6}{'adapters':>10}" + "".join(f"{side:>10}" for side in SIDES) + "  ms of processor time")
    with torch.inference_mode():
        for num_rows in arguments.rows:
            chosen: dict[int, float] = {}
            for num_adapters in (0, 1, 4, 32):
                if num_adapters > num_rows:
                    continue
                runs = steps.runs(num_rows, num_adapters, arguments.prefill)
                names = SIDES if num_adapters else SIDES[:1]
                row = measure({name: steps.side(name, runs) for name in names}, arguments.rounds)
                figures[f"{num_rows} rows, {num_adapters} adapters"] = row
                chosen[num_adapters] = row["chosen"]
                cells = "".join(f"{row[name]:10.1f}" if name in row else f"{'':10}" for name in SIDES)
                print(f"{num_rows:6}{num_adapters:10}{cells}", flush=True)
            pairs = {"4 of 1": (1, 4), "4 of base": (0, 4), "32 of 4": (4, 32)}
            ratios[f"{num_rows} rows"] = {
                name: chosen[few] / chosen[many] for name, (few, many) in pairs.items() if {few, many} <= set(chosen)
            }
    for rows, row in ratios.items():
        print(f"{rows}: " + ", ".join(f"{name} {ratio:.2f} (goal {GOALS[name]})" for name, ratio in row.items()))
    holds = all(ratio >= GOALS[name] for row in ratios.values() for name, ratio in row.items())
    print_result(arguments, "lora_layers", figures=figures, ratios=ratios, goal=GOALS, holds=holds)


if __name__ == "__main__":
    main()
