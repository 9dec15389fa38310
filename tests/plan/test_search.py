"""The search tries every setting that can work, and nothing that cannot."""

from dataclasses import replace

import pytest

from ft_service.catalog import models
from ft_service.catalog.gpus import GPUS
from ft_service.plan.memory import Layout
from ft_service.plan.search import Choice, Machine, Question, best, judge_all, layouts

OPEN = Question(Layout("lora", num_workers=16, workers_per_node=8), rows_per_worker=4)


def tried(question: Question) -> set[tuple[int, str, bool, int, bool]]:
    return {
        (layout.zero_stage, layout.offload, layout.hpz, layout.micro_batch_size, layout.activation_checkpointing)
        for layout in layouts(question)
    }


def test_every_combination_is_tried_once() -> None:
    passes = [(rows, recompute) for rows in (1, 2, 4) for recompute in (False, True)]
    moves = [(2, "none", False), (3, "none", False), (3, "none", True), (2, "cpu", False), (3, "cpu", False)]
    assert tried(OPEN) == {(*move, *each) for move in moves for each in passes}
    assert len(list(layouts(OPEN))) == len(tried(OPEN))


@pytest.mark.parametrize(
    ("question", "kept"),
    [
        (replace(OPEN, has_nvme=True), {(2, "cpu"), (2, "none"), (3, "cpu"), (3, "none"), (3, "nvme")}),
        (replace(OPEN, layout=Layout("lora")), {(1, "none"), (2, "cpu"), (3, "cpu")}),
        (replace(OPEN, zero_stage=0), {(0, "none")}),
        (replace(OPEN, zero_stage=2, has_nvme=True), {(2, "none"), (2, "cpu")}),
        (replace(OPEN, offload="nvme"), {(3, "nvme")}),
        (replace(OPEN, hpz=True), {(3, "none")}),
        (replace(OPEN, layout=replace(OPEN.layout, method="qlora")), {(2, "none"), (3, "none")}),
    ],
)
def test_what_cannot_work_together_is_never_tried(question: Question, kept: set[tuple[int, str]]) -> None:
    assert {(stage, offload) for stage, offload, *_ in tried(question)} == kept


@pytest.mark.parametrize("workers", [8, 12])
def test_hpz_needs_several_whole_nodes(workers: int) -> None:
    layout = replace(OPEN.layout, num_workers=workers)
    assert not any(layout.hpz for layout in layouts(replace(OPEN, layout=layout)))


def choices(host_gib: float | None = None) -> list[Choice]:
    facts = models.find("Llama-3.1-70B")
    assert facts
    layout = Layout("full", num_workers=8, workers_per_node=8, max_seq_len=4096)
    return judge_all(facts.shape, Question(layout, rows_per_worker=8), Machine(GPUS["H100"], 79.6, host_gib))


def test_of_what_fits_nothing_is_faster_by_more_than_it_adds_risk() -> None:
    found = choices()
    chosen = best(found)
    fitting = [choice for choice in found if choice.fits]
    assert chosen.fits and fitting
    assert max(choice.tokens_per_second for choice in fitting) <= 1.5 * chosen.tokens_per_second
    assert max(choice.merit for choice in fitting) * 0.98 <= chosen.merit


def test_where_nothing_fits_the_choice_is_what_lacks_least() -> None:
    found = choices(host_gib=64.0)
    chosen = best(found)
    assert not any(choice.fits for choice in found)
    assert chosen.memory.gpu_bytes == min(choice.memory.gpu_bytes for choice in found if choice.fits_host)
