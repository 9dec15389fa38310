"""`ft plan --serve`: what each GPU of a server holds, and whether its bases fit."""

import dataclasses
from pathlib import Path

from ft_service.catalog.gpus import Gpu
from ft_service.cli.common import console, new_table, print_json
from ft_service.errors import UsageError
from ft_service.plan.serving import GIB, ServingPlan
from ft_service.plan.table import shape_of
from ft_service.text import format_count

RANK = 16


def show_serving_plan(
    target: str, gpu: Gpu | None, gpu_memory_gib: float | None, gpus: int | None, as_json: bool
) -> None:
    """`target` is a model, with `gpus` for each replica, or the config of a server (`serve/config.yaml`).

    Raises `UsageError` when a base does not fit, after everything is printed, and `ModelError` for an unknown model.
    """
    from serve.fine_tuning.templates import full_parents
    from serve.fit import context_of, plan_base
    from serve.settings import BaseSettings, load_config

    memory_gib = gpu_memory_gib or (gpu.memory_gib if gpu else None)
    if memory_gib is None:
        raise UsageError("--serve: needs the GPU to plan for. Add --gpu-type, such as H100, or --gpu-memory-gib.")
    is_config = target.endswith((".yaml", ".yml"))
    if is_config and gpus is not None:
        raise UsageError(f"--gpus = {gpus}: no effect with a config, which sets gpus for each base. Leave out.")
    settings = load_config(Path(target)).settings if is_config else None
    bases = settings.bases if settings else (BaseSettings(base=target, gpus=gpus),)
    plans = {base.model_name: plan_base(base, shape_of(base.base), memory_gib) for base in bases}
    contexts = {base.model_name: context_of(base) for base in bases}
    if as_json:
        print_json({name: _as_json(plan, contexts[name]) for name, plan in plans.items()})
    else:
        _show(plans, contexts, gpu.name if gpu else f"{memory_gib:g} GiB")
        if settings and (parents := full_parents(settings)):
            console.print(
                f"Each model that a full job of {', '.join(parents)} makes is a base too: it takes what its parent "
                "takes, on GPUs of its own, while it is asked.",
                style="dim",
                highlight=False,
            )
    too_large = [name for name, plan in plans.items() if not plan.fits(contexts[name])]
    if too_large:
        raise UsageError(
            f"{', '.join(too_large)}: no room for one request of {contexts[too_large[0]]:,} tokens. Use more GPUs for "
            "a replica (gpus), precision: nf4, a GPU with more memory, or a smaller adapter_gib or max_context."
        )


def _show(plans: dict[str, ServingPlan], contexts: dict[str, int], gpu: str) -> None:
    table = new_table("base", "GPUs", "weights", "LoRA", "reserve", "cache", "tokens", "adapters")
    for name, plan in plans.items():
        fits = plan.fits(contexts[name])
        table.add_row(
            name,
            str(plan.gpus),
            *(f"{value / GIB:.1f}" for value in (plan.weights, plan.adapters, plan.reserve, plan.cache)),
            format_count(plan.cache_tokens) if fits else "[red]no room[/red]",
            str(plan.num_adapters) if fits else "",
        )
    console.print(table)
    console.print(
        f"GiB on each {gpu} of a replica. Tokens: of prompts and answers that all requests hold at once. "
        f"Adapters: in memory at once, of rank {RANK} on all linear layers (vllm: slots of max_lora_rank on every "
        "layer); others are loaded when asked for.",
        style="dim",
        highlight=False,
    )


def _as_json(plan: ServingPlan, context: int) -> dict[str, object]:
    return {
        **dataclasses.asdict(plan),
        "cache_tokens": plan.cache_tokens,
        "num_adapters": plan.num_adapters,
        "fits": plan.fits(context),
    }
