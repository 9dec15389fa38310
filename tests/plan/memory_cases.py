"""Trains memory cases on the real engine and counts the storages of each worker by component."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from ft_service.train.batches import Batches
from ft_service.train.objectives.sft import LossModel
from ft_service.train.parallel import Parallel
from tests.train.training_cases import model_of, packed_rows, plan_of

SIZES = {
    # The embedding and the MLP are above DeepSpeed's persistence threshold of 100,000 elements, the rest below; few
    # counts divide by 3. In "wide" the MLP is above it even when four or more weights are packed in an element.
    "small": {"hidden_size": 140, "intermediate_size": 802, "num_attention_heads": 5, "num_key_value_heads": 1},
    "wide": {"hidden_size": 140, "intermediate_size": 3206, "num_attention_heads": 5, "num_key_value_heads": 5},
}


COMPONENTS = ("weights", "quantisation_statistics", "gradients", "optimizer")


def write_sized_base(folder: Path, size: str, tied: bool) -> None:
    write_llama(folder, vocab_size=773, num_hidden_layers=2, tie_word_embeddings=tied, **SIZES[size])


def write_llama(folder: Path, **sizes: Any) -> None:
    """A Llama with random weights."""
    torch.manual_seed(1)
    config = LlamaConfig(max_position_embeddings=2048, pad_token_id=None, bos_token_id=None, eos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


class Ledger:
    """Bytes of storages by component; a storage is counted once, where it is named first."""

    def __init__(self) -> None:
        self.seen: dict[int, torch.UntypedStorage] = {}
        self.sizes = dict.fromkeys(COMPONENTS, 0)

    def add(self, component: str, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.seen and storage.nbytes():
                self.seen[storage.data_ptr()] = storage
                self.sizes[component] += storage.nbytes()


def count(parallel: Parallel) -> dict[str, int]:
    """Bytes of this worker after a backward pass, by component."""
    engine = parallel._engine
    ledger = Ledger()
    parameters = list(engine.module.parameters())
    zero = engine.optimizer
    adam = engine.basic_optimizer
    for parameter in parameters:
        partition = getattr(parameter, "ds_tensor", None)
        ledger.add("weights", [partition if partition is not None else parameter.data])
        if partition is not None:
            ledger.add("weights", [getattr(parameter, "ds_secondary_tensor", None)])
            if parameter.ds_persist:
                ledger.add("weights", [parameter.data])
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            nested = state.state2
            ledger.add("quantisation_statistics", [state.absmax, state.code, state.offset, nested.absmax, nested.code])
    # ZeRO-3 shows the optimizer one part at a time; between updates its groups are empty.
    masters = getattr(zero, "fp32_partitioned_groups_flat", None)
    for master in masters or [p for group in adam.param_groups for p in group["params"]]:
        ledger.add("optimizer", [master.data])
        ledger.add("optimizer", [t for name, t in adam.state[master].items() if name != "step"])
    ledger.add("gradients", (parameter.grad for parameter in parameters))
    ledger.add("gradients", (getattr(parameter, "grad_accum", None) for parameter in parameters))
    for name in ("fp32_groups_gradients_flat", "grad_partitions_flat_buffer"):
        buffers = getattr(zero, name, None)
        ledger.add("gradients", buffers if isinstance(buffers, list) else [buffers])
    for tensors in [*getattr(zero, "averaged_gradients", {}).values(), *getattr(zero, "all_grad_tensors", {}).values()]:
        ledger.add("gradients", tensors or [])
        ledger.add("gradients", [getattr(tensors, "flat_partition", None)])
    return ledger.sizes


def run_case(case: dict[str, Any], world_size: int) -> list[dict[str, int]]:
    """For each worker."""
    plan = plan_of(case, world_size)
    parallel = Parallel(plan)
    torch.manual_seed(0)
    model = model_of(plan, parallel)
    parallel.wrap(LossModel(model.module, model.causal_lm))
    batches = Batches(
        packed_rows(), plan.spec.train.seed, plan.global_batch_size, plan.micro_batch_size, parallel.rank, world_size
    )
    most: dict[str, int] = {}
    for step in (0, 1):
        micro_batches = batches.step(step).micro_batches
        for number, micro_batch in enumerate(micro_batches, start=1):
            loss = parallel.loss(micro_batch)
            parallel.backward(loss.loss_sum)
            if step == 1:
                most = {name: max(size, most.get(name, size)) for name, size in count(parallel).items()}
            if number < len(micro_batches):
                parallel.micro_step()
            else:
                parallel.update(1e-3, loss, leaving=False)
    most["trainable"] = sum(tensor.numel() for tensor in parallel.gather_trained().values())
    parallel.close()
    everyones: list[Any] = [None] * world_size
    dist.all_gather_object(everyones, most)
    return everyones
