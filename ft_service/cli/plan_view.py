"""Plans and tables of plans in the terminal: sentences, reasons, and memory as bars against the card's size."""

from itertools import takewhile
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ft_service.catalog.gpus import GPUS
from ft_service.plan.plan import RunPlan
from ft_service.plan.table import METHODS, Family, FamilyMember

if TYPE_CHECKING:
    from ft_service.model.dry_run import DryRun

_BAR_WIDTH = 34  # with the names beside them, a terminal of 80 columns
_NAMES = {
    "weights": "weights",
    "quantisation_statistics": "quantisation statistics",
    "gather_buffers": "gather buffers",
    "loss": "logits and loss",
    "reserve": "reserve",
}


def show_plan(plan: RunPlan, console: Console) -> None:
    """The whole plan, from what was decided to what would be better."""
    verdict = {True: "[green]fits[/green]", False: "[red]does not fit[/red]", None: ""}[plan.fits]
    console.print(f"[bold]{plan.spec.name}[/bold]  {verdict}  (nothing is written)")
    for sentence in plan.summary:
        subject, _, rest = sentence.partition(": ")
        console.print(_item(Text.assemble((f"{subject}: ", "bold"), rest)))
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
            console.print(_item(Text.assemble((f"{kind} ", style), line)))


def _item(text: Text) -> Padding:
    text.no_wrap = False
    return Padding(text, (0, 0, 0, 2))


# -- memory ----------------------------------------------------------------------------------------------------------


def _memory(plan: RunPlan) -> Group:
    gpu = _bars("One GPU", plan.memory_gib, plan.gpu_capacity_gib)
    host = _bars("One node's main memory", plan.host_memory_gib, plan.host_capacity_gib)
    return Group(Text(), gpu, Text(), host, Text())


def _bars(title: str, gib_by_component: dict[str, float], has_gib: float | None) -> Table:
    """A bar a component, each starting where the one above it ends; the last is all of them. A line marks the card."""
    total = gib_by_component["total"]
    scale = _BAR_WIDTH / max(total, has_gib or 0.0, 1e-9)
    table = Table(title, "GiB", "", box=None, padding=(0, 1))
    table.columns[1].justify = "right"
    for column in table.columns:
        column.no_wrap = True
    end = None if has_gib is None else round(has_gib * scale)
    start = 0.0
    for component, gib in gib_by_component.items():
        if component == "total":
            continue
        first, last = round(start * scale), round((start + gib) * scale)
        table.add_row(f"  {_NAMES.get(component, component.replace('_', ' '))}", f"{gib:.1f}", _bar(first, last, end))
        start += gib
    label = "  in all" if has_gib is None else f"  in all, of {has_gib:,.1f}"
    table.add_row(label, f"{total:.1f}", _bar(0, round(total * scale), end))
    return table


def _bar(first: int, last: int, end: int | None) -> Text:
    """Blocks from `first` to `last`, red beyond `end`, which is marked by a line."""
    bar = Text()
    for place in range(_BAR_WIDTH + 1):
        beyond = end is not None and place >= end
        if first <= place < last:
            bar.append("█", "red" if beyond else "cyan")
        else:
            bar.append("▏" if place == end else " ", "bold" if place == end else "")
    return bar


# -- the family ------------------------------------------------------------------------------------------------------


def show_family(family: Family, console: Console) -> None:
    """A line a method and number of GPUs, a block of columns a GPU type."""
    types = list(dict.fromkeys(member.gpu_type for member in family.members))
    console.print(
        f"[bold]{family.model}[/bold], {family.parameters:,} parameters; rows of {family.max_seq_len:,} tokens, "
        f"{family.rows_per_step} a step; LoRA of rank {family.lora_rank}. Estimates, at {family.mfu:.0%} of peak "
        f"({family.mfu_source}).",
        highlight=False,
    )
    for method in METHODS:
        smallest = family.smallest(method)
        words = [_smallest_words(smallest[name]) for name in types if name in smallest]
        console.print(
            f"\n[bold]{method}[/bold]: smallest that fits: {'; '.join(words) or 'none of these'}.", highlight=False
        )
        priced = family.price_per_gpu_hour is not None
        left = ("type", "ZeRO", "offload", "recompute")
        columns = ["GPUs", *left[:3], "rows", "recompute", "GiB/GPU", "of", "host", "tokens/s"]
        table = Table(*columns, *(["$/Mtok"] if priced else []), box=None, padding=(0, 1, 0, 0))
        for column in table.columns:
            column.no_wrap = True
            column.justify = "left" if column.header in left else "right"
        for name in types:
            of_type = [member for member in family.members if (member.method, member.gpu_type) == (method, name)]
            too_few = list(takewhile(lambda member: not member.fits, of_type))
            if too_few:  # one line for all of them: that of the most GPUs
                counts = str(too_few[-1].num_gpus) if len(too_few) == 1 else f"1-{too_few[-1].num_gpus}"
                table.add_row(counts, *_cells(too_few[-1], priced), style="dim")
            for member in of_type[len(too_few) :]:
                table.add_row(str(member.num_gpus), *_cells(member, priced), style="" if member.fits else "dim")
            table.add_section()
        console.print(table)
    console.print(
        "rows: of one forward pass; recompute: activation checkpointing; host: GiB of each node's main memory.",
        style="dim",
    )


def _smallest_words(member: FamilyMember) -> str:
    offload = "" if member.offload == "none" else f" with offload: {member.offload}"
    return f"{member.num_gpus} x {member.gpu_type}{offload}"


def _cells(member: FamilyMember, priced: bool) -> list[str]:
    cells = [
        member.gpu_type,
        f"{member.zero_stage}{' hpZ' if member.hpz else ''}",
        member.offload,
        str(member.micro_batch_size),
        "yes" if member.activation_checkpointing else "no",
        f"{member.gib_per_gpu:,.0f}",
        f"{GPUS[member.gpu_type].memory_gib:.0f}",
        f"{member.gib_per_node:,.0f}",
        f"{member.tokens_per_second:,.0f}" if member.fits else "no fit",
    ]
    price = member.usd_per_million_tokens
    return [*cells, *([f"{price:,.2f}" if price is not None and member.fits else ""] if priced else [])]


# -- dry runs --------------------------------------------------------------------------------------------------------


def show_dry_runs(runs: "list[DryRun]", console: Console) -> None:
    """What loading asks of every rank: one line for each world."""
    gib = 2**30
    first = runs[0]
    console.print(
        f"Loading {first.num_parameters:,} parameters, {first.checkpoint_bytes / gib:,.1f} GiB of files, under ZeRO-3: "
        "every rank walked, every parameter held exactly once."
    )
    table = Table("base", "ranks", "GiB read", "GiB held", "GiB statistics", "GiB peak", "peak over rest", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for run in runs:
        rank = run.fullest
        rest = rank.held + rank.statistics
        world = str(run.world_size) + (f", {run.node_size} a node (hpZ)" if run.node_size > 1 else "")
        figures = [f"{size / gib:,.2f}" for size in (rank.read, rank.held, rank.statistics, rank.peak)]
        table.add_row("4-bit" if run.four_bit else "bf16", world, *figures, f"{(rank.peak - rest) / gib:.2f}")
    console.print(table)
    console.print(
        f"Of the fullest rank, beside what its process takes. A whole decoder layer is "
        f"{first.largest_layer_bytes / gib:.2f} GiB; none is ever whole."
    )
