"""Plans and tables of plans in the terminal: sentences, reasons, and bars of memory against the GPU's capacity."""

from itertools import takewhile
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ft_service.catalog.gpus import GPUS
from ft_service.plan.plan import RunPlan
from ft_service.plan.table import METHODS, PlanTable, TableEntry

if TYPE_CHECKING:
    from ft_service.model.dry_run import DryRun

_BAR_WIDTH = 34  # with the names, this fills a terminal of 80 columns
_NAMES = {
    "weights": "weights",
    "quantisation_statistics": "quantisation statistics",
    "gather_buffers": "gather buffers",
    "loss": "logits and loss",
    "reserve": "reserve",
}


def show_plan(plan: RunPlan, console: Console) -> None:
    """The whole plan: decisions, reasons, memory, remarks, warnings and advice."""
    unknown = (
        "GPU unknown, so not checked whether it fits" if plan.spec.parallel.use_gpu else "on CPU, memory not checked"
    )
    verdict = {True: "[green]fits[/green]", False: "[red]does not fit[/red]", None: unknown}[plan.fits]
    console.print(f"[bold]{plan.spec.name}[/bold]  {verdict}  (nothing was written)")
    for sentence in plan.summary:
        subject, colon, rest = sentence.partition(":")
        console.print(_item(Text.assemble((subject + colon, "bold"), rest)))
    if plan.reasons:
        console.print("\n[bold]Why[/bold]")
        for reason in plan.reasons:
            subject, colon, rest = reason.partition(":")
            console.print(_item(Text.assemble((subject + colon, "bold"), rest)))
    if plan.memory_gib:
        console.print(_memory(plan))
    for style, kind, lines in (
        ("cyan", "Remark", plan.remarks),
        ("yellow", "Warning", plan.warnings),
        ("green", "Advice", plan.advice),
    ):
        for line in lines:
            console.print(_item(Text.assemble((f"{kind}: ", style), line)))


def _item(text: Text) -> Padding:
    text.no_wrap = False
    return Padding(text, (0, 0, 0, 2))


# -- memory ----------------------------------------------------------------------------------------------------------


def _memory(plan: RunPlan) -> Group:
    gpu = _bars("One GPU", plan.memory_gib, plan.gpu_capacity_gib)
    host = _bars("Main memory of one node", plan.host_memory_gib, plan.host_capacity_gib)
    return Group(Text(), gpu, Text(), host, Text())


def _bars(title: str, gib_by_component: dict[str, float], capacity_gib: float | None) -> Table:
    """A bar per component, starting where the one above it ends; then the total. A line marks the capacity."""
    total = gib_by_component["total"]
    scale = _BAR_WIDTH / max(total, capacity_gib or 0.0, 1e-9)
    table = Table(title, "GiB", "", box=None, padding=(0, 1))
    table.columns[1].justify = "right"
    for column in table.columns:
        column.no_wrap = True
    end = None if capacity_gib is None else round(capacity_gib * scale)
    start = 0.0
    for component, gib in gib_by_component.items():
        if component == "total":
            continue
        first = round(start * scale)
        last = round((start + gib) * scale)
        table.add_row(f"  {_NAMES.get(component, component.replace('_', ' '))}", f"{gib:.1f}", _bar(first, last, end))
        start += gib
    label = "  total" if capacity_gib is None else f"  total, of {capacity_gib:,.1f}"
    table.add_row(label, f"{total:.1f}", _bar(0, round(total * scale), end))
    return table


def _bar(first: int, last: int, end: int | None) -> Text:
    """Blocks from `first` to `last`, red beyond `end`, which a line marks."""
    bar = Text()
    for place in range(_BAR_WIDTH + 1):
        beyond = end is not None and place >= end
        if first <= place < last:
            bar.append("█", "red" if beyond else "cyan")
        else:
            bar.append("▏" if place == end else " ", "bold" if place == end else "")
    return bar


# -- tables of plans -------------------------------------------------------------------------------------------------


def show_table(plans: PlanTable, console: Console) -> None:
    """One table per method, with one line per GPU type and number of GPUs."""
    types = list(dict.fromkeys(entry.gpu_type for entry in plans.entries))
    console.print(
        f"[bold]{plans.model}[/bold], {plans.parameters:,} parameters; rows of {plans.max_seq_len:,} tokens, "
        f"{plans.rows_per_step} per step; LoRA of rank {plans.lora_rank}. Estimates, at {plans.mfu:.0%} of peak "
        f"({plans.mfu_source}).",
        highlight=False,
    )
    for method in METHODS:
        smallest = plans.smallest(method)
        words = [_smallest_words(smallest[name]) for name in types if name in smallest]
        console.print(
            f"\n[bold]{method}[/bold]: smallest that fits: {'; '.join(words) or 'none of these'}.", highlight=False
        )
        priced = plans.price_per_gpu_hour is not None
        left = ("type", "ZeRO", "offload", "recompute")
        columns = ["GPUs", *left[:3], "rows", "recompute", "GiB/GPU", "of", "host", "tokens/s"]
        table = Table(*columns, *(["$/Mtok"] if priced else []), box=None, padding=(0, 1, 0, 0))
        for column in table.columns:
            column.no_wrap = True
            column.justify = "left" if column.header in left else "right"
        for name in types:
            of_type = [entry for entry in plans.entries if (entry.method, entry.gpu_type) == (method, name)]
            too_few = list(takewhile(lambda entry: not entry.fits, of_type))
            if too_few:  # one line for all counts that do not fit, with the values of the largest
                counts = str(too_few[-1].num_gpus) if len(too_few) == 1 else f"1-{too_few[-1].num_gpus}"
                table.add_row(counts, *_cells(too_few[-1], priced), style="dim")
            for entry in of_type[len(too_few) :]:
                table.add_row(str(entry.num_gpus), *_cells(entry, priced), style="" if entry.fits else "dim")
            table.add_section()
        console.print(table)
    console.print(
        "rows: per forward pass; recompute: layers with activation checkpointing; host: GiB of main memory per node.",
        style="dim",
    )


def _smallest_words(entry: TableEntry) -> str:
    offload = "" if entry.offload == "none" else f" with offload: {entry.offload}"
    return f"{entry.num_gpus} x {entry.gpu_type}{offload}"


def _recomputed(entry: TableEntry) -> str:
    if not entry.activation_checkpointing:
        return "no"
    return f"all but {entry.kept_layers}" if entry.kept_layers else "yes"


def _cells(entry: TableEntry, priced: bool) -> list[str]:
    cells = [
        entry.gpu_type,
        f"{entry.zero_stage}{' hpZ' if entry.hpz else ''}",
        entry.offload,
        str(entry.micro_batch_size),
        _recomputed(entry),
        f"{entry.gib_per_gpu:,.0f}",
        f"{GPUS[entry.gpu_type].memory_gib:.0f}",
        f"{entry.gib_per_node:,.0f}",
        f"{entry.tokens_per_second:,.0f}" if entry.fits else "no fit",
    ]
    price = entry.usd_per_million_tokens
    return [*cells, *([f"{price:,.2f}" if price is not None and entry.fits else ""] if priced else [])]


# -- dry runs --------------------------------------------------------------------------------------------------------


def show_dry_runs(runs: "list[DryRun]", console: Console) -> None:
    """What loading reads and needs on every rank: one line for each world size."""
    gib = 2**30
    first = runs[0]
    console.print(
        f"Loading {first.num_parameters:,} parameters, {first.checkpoint_bytes / gib:,.1f} GiB of files, under ZeRO-3. "
        "Simulated for every rank: the ranks together hold every parameter exactly once."
    )
    table = Table("base", "ranks", "GiB read", "GiB held", "GiB statistics", "GiB peak", "peak over held", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for run in runs:
        rank = run.fullest
        held = rank.held + rank.statistics
        world = str(run.world_size) + (f", {run.node_size} per node (hpZ)" if run.node_size > 1 else "")
        figures = [f"{size / gib:,.2f}" for size in (rank.read, rank.held, rank.statistics, rank.peak)]
        table.add_row("4-bit" if run.four_bit else "bf16", world, *figures, f"{(rank.peak - held) / gib:.2f}")
    console.print(table)
    console.print(
        f"Figures are of the rank with the highest peak, without the process itself. A whole decoder layer is "
        f"{first.largest_layer_bytes / gib:.2f} GiB; no rank ever holds a whole one."
    )
