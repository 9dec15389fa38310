"""When ZeRO-3 gathers weights: a decoder layer as one, and adapters not at all.

By default DeepSpeed gathers module by module. It loses track of frozen weights that recomputation gathers again: LoRA
with recomputation gathers the base three times a micro-step, a third of it only when a module waits for it. As a "leaf
module" a layer is gathered once for its forward pass, and once for its recomputation and backward pass together. Its
hooks also run once a layer, and not once for each of the modules inside it.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def gather_whole_layers(model: nn.Module, persistence_threshold: int) -> dict[str, int]:
    """Make every decoder layer of `model` a leaf module. Call this before `deepspeed.initialize`.

    Returns the settings, in elements, with which DeepSpeed prefetches the whole next layer while one computes. With L
    the elements of the largest layer and E those of the largest weight outside the layers:

    - it prefetches until at least L elements are on their way;
    - it prefetches nothing while more than L + max(L, E) elements are gathered;
    - it keeps nothing gathered that it does not need next. By default it keeps 1e9 elements for reuse.

    Weights of at most `persistence_threshold` elements stay gathered and do not count: otherwise
    there would be room for one more weight, of any size, beside two layers. Adapters do not count either, see
    `keep_gathered`. `ft_service.plan.memory` derives the most that is gathered at once.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer._z3_leaf = True  # type: ignore[assignment]  # what deepspeed.utils.set_z3_leaf_modules does
        _list_parameters_once(layer)
    _list_parameters_once(model)
    _hide_modules_of(layers, model)
    is_full = all(parameter.requires_grad for parameter in model.parameters())
    counted = (p for p in model.parameters() if is_full or not p.requires_grad)
    sizes = {p: _numel(p) for p in counted if _numel(p) > persistence_threshold}
    in_layers = [[sizes.pop(p) for p in layer.parameters() if p in sizes] for layer in layers]
    largest_layer = max(map(sum, in_layers))
    largest_other = max(sizes.values(), default=0)
    live = largest_layer + max(largest_layer, largest_other)
    return {
        "stage3_prefetch_bucket_size": largest_layer,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": 0,
    }


def _list_parameters_once(module: nn.Module, without: Collection[nn.Parameter] = ()) -> None:
    """Let `module` remember its parameters, and list those of `without` no more.

    DeepSpeed lists those of a layer about ten times a micro-step, and those of the model three times a step.
    """
    every = tuple(pair for pair in nn.Module.named_parameters(module) if pair[1] not in without)

    def named_parameters(prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[Any]:
        if prefix or not recurse or not remove_duplicate:
            return nn.Module.named_parameters(module, prefix, recurse, remove_duplicate)
        return iter(every)

    module.named_parameters = named_parameters  # type: ignore[method-assign]


def _hide_modules_of(layers: list[GradientCheckpointingLayer], model: nn.Module) -> None:
    """Let `model.modules()` end at `layers`, and list them once.

    DeepSpeed goes through all modules twice a micro-step, and makes each check, whenever it reads a weight, that the
    weight is gathered. Within a layer, which is gathered as one, it always is.
    """
    hidden = {module for layer in layers for module in layer.modules() if module is not layer}
    visible = tuple(module for module in model.modules() if module not in hidden)

    def modules(remove_duplicate: bool = True) -> Iterator[nn.Module]:
        return iter(visible) if remove_duplicate else nn.Module.modules(model, remove_duplicate)

    model.modules = modules  # type: ignore[method-assign]


def trace_nothing() -> None:
    """Stop DeepSpeed's marks for NVIDIA's profiler, from now on, in this process, and make silent messages cheap.

    It marks every function of ZeRO-3. Before it decides not to print a message, it describes a weight and asks for the
    rank.
    """
    from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator, stage3
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False
    for module in (parameter_offload, partition_parameters, partitioned_param_coordinator, stage3):
        module.print_rank_0 = _print_rank_0
    partition_parameters.debug_param2name_id_shape_device = _not_described
    partition_parameters.debug_param2name_id_shape_status = _not_described


def count_devices_once() -> None:
    """Let DeepSpeed remember how many devices this node has.

    ZeRO-3 asks in every micro-step, and on a CPU DeepSpeed starts `numactl` each time to count the NUMA nodes.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    count = accelerator.device_count()
    accelerator.device_count = lambda: count


def mark_backward_directly(model: nn.Module) -> None:
    """Let DeepSpeed's marks around each module's backward pass skip Python's part of `autograd.Function.apply`.

    For a function of this style, that part reads the signature of its `forward` at each call: six times a layer.
    """
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            if (function := getattr(module, name, None)) is not None:
                function.apply = super(torch.autograd.Function, function).apply


def _not_described(parameter: nn.Parameter) -> str:
    return ""


def _print_rank_0(message: object, debug: bool = False, force: bool = False) -> None:
    """A replacement for DeepSpeed's function of the same parameters."""
    if (debug or force) and dist.get_rank() == 0:
        print(message)


def keep_gathered(optimizer: Any, model: nn.Module, parameters: Iterable[Any]) -> None:
    """Keep `parameters` whole on every rank between steps. `optimizer` is DeepSpeed's, of ZeRO-3.

    DeepSpeed does so with parameters below ``stage3_param_persistence_threshold``. Many adapter tensors are above it,
    and a threshold above them would also keep small weights of the base. The hooks of a layer do not see them any more.
    Whatever partitions them, as `GatheredParameters` does at its end, the next forward pass of `model` gathers them.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    kept = list(parameters)
    for parameter in kept:
        if not parameter.ds_persist:
            parameter.ds_persist = True
            optimizer.persistent_parameters.append(parameter)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            _list_parameters_once(layer, without=set(kept))

    def gather(*_: object) -> None:
        missing = [parameter for parameter in kept if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            with torch.no_grad():
                missing[0].all_gather(missing)

    model.register_forward_pre_hook(gather)


def release_by_current_prefetches(optimizer: Any) -> None:
    """Let DeepSpeed decide at every pass which weights a module may release. `optimizer` is DeepSpeed's, of ZeRO-3.

    A prefetch that reaches a weight's next use while the weight is still gathered takes it off the queue. The weight
    must then stay until that use. DeepSpeed decides this once for each place in the order of modules, in the first pass
    with prefetches, and keeps the decision. That pass also gathers the adapter, so its prefetches reach less far than
    later ones. In later passes the last layer would be released after its forward pass, and then be gathered on demand.
    """
    coordinator = optimizer.parameter_offload.get_param_coordinator()
    prefix = f"_{type(coordinator).__name__}__"

    def to_release(module: nn.Module, step: int) -> set[int]:
        next_use = getattr(coordinator, f"{prefix}most_recent_step_id_param_fetched_for")
        parameters = (parameter for parameter in _used_by(module) if not parameter.ds_persist)
        return {parameter.ds_id for parameter in parameters if next_use[parameter] <= step}

    setattr(coordinator, f"{prefix}params_to_release", to_release)


def release_weights(optimizer: Any, model: nn.Module) -> None:
    """Release every weight that is gathered for a backward pass that does not come. `optimizer` is DeepSpeed's."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    optimizer.parameter_offload.get_param_coordinator()._clean_inflight_param_registry()
    gathered: Any
    for gathered in model.parameters():
        if gathered.ds_status == ZeroParamStatus.AVAILABLE and not gathered.ds_persist:
            gathered.partition()


def _used_by(module: nn.Module) -> Iterable[Any]:
    from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
    from deepspeed.utils import z3_leaf_module

    parameters: Iterable[Any] = iter_params(module, recurse=z3_leaf_module(module))
    return parameters


def _numel(parameter: Any) -> int:
    """Elements of the whole parameter: a partitioned one has none itself."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
