"""Trains a few steps, then writes the whole model in parallel, and says what each worker did for it."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ft_service.model.trainable import TrainableModel
from ft_service.model.weight_files import WeightFiles
from ft_service.model.writer import lay_out
from ft_service.storage.storage import Storage
from ft_service.train.batches import Batches
from ft_service.train.loop import train
from ft_service.train.objectives.sft import LossModel
from ft_service.train.parallel import Parallel
from ft_service.train.protocol import Hooks, TrainingState
from ft_service.train.weights import write_model
from tests.train.training_cases import TrulyPartitioned, packed_rows, plan_of


class Allocations(TorchDispatchMode):
    """Inside, records the size of each new tensor, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = [0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        self.nbytes += [
            tensor.untyped_storage().nbytes()
            for tensor in tree_leaves(result)
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in known
        ]
        return result


class Watched(Storage):
    """A storage that records what is written; with `is_full`, this worker's weight file runs out of space."""

    def __init__(self, root: str, is_full: bool) -> None:
        super().__init__(root)
        self._is_full = is_full
        self.written: list[str] = []

    @contextmanager
    def writing(self, path: str) -> Any:
        with super().writing(path) as stream:
            if self._is_full and path.endswith(".safetensors"):
                stream.write(b"begun")
                raise OSError(28, "No space left on device")
            yield stream
        self.written.append(Path(path).name)


def run_case(case: dict[str, Any], world_size: int) -> dict[str, Any]:
    plan = plan_of(case, world_size)
    parallel = (TrulyPartitioned if case.get("truly") else Parallel)(plan)
    torch.manual_seed(0)
    base = Path(case["base"])
    with parallel.hf_deepspeed_config():
        model = TrainableModel(plan, base, WeightFiles(base), parallel.placement())
    parallel.wrap(LossModel(model.module, model.causal_lm))
    rows = packed_rows()
    batches = Batches(
        rows, plan.spec.train.seed, plan.global_batch_size, plan.micro_batch_size, parallel.rank, world_size
    )
    nothing = Hooks(on_step=lambda _: None, on_best=lambda _: None, on_checkpoint=lambda _: None)
    train(plan, parallel, batches, batches, nothing, TrainingState())

    out = Path(case["out"])
    gathered = parallel.gather_trained()
    if parallel.is_rank_zero:
        save_file(gathered, f"{out}.gathered.safetensors")
    formats = parallel.trained_formats()
    files = lay_out(formats, world_size)
    owned = [tensor.nbytes for file in files if file.owner == parallel.rank for tensor in file.tensors.values()]
    storage = Watched(str(out.parent), case.get("full_on") == parallel.rank)
    with Allocations() as allocations:
        write_model(model, parallel, storage, out.name)
    result = {
        "largest_allocation": max(allocations.nbytes),
        "largest_owned": max(owned, default=0),
        "largest": max(tensor.nbytes for tensor in formats.values()),
        "owned": sum(owned),
        "written": storage.written,
    }
    parallel.close()
    results: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(results, result)
    return {"workers": results}
