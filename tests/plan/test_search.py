"""The search tries every layout that can work, and no other."""

from dataclasses import replace

import pytest

from ft_service.catalog import models
from ft_service.catalog.gpus import GPUS
from ft_service.plan.memory import Layout
from ft_service.plan.search import Candidate, Machine, SearchSpace, best_candidate, evaluate_layouts, possible_layouts

OPEN = SearchSpace(Layout("lora", num_workers=16, workers_per_node=8), rows_per_worker=4)


def tried(space: SearchSpace) -> set[tuple[int, str, bool, int, bool]]:
    return {
        (layout.zero_stage, layout.offload, layout.hpz, layout.micro_batch_size, layout.activation_checkpointing)
        for layout in possible_layouts(space)
    }


def test_every_combination_is_tried_once() -> None:
    passes = [(rows, recompute) for rows in (1, 2, 4) for recompute in (False, True)]
    moves = [(2, "none", False), (3, "none", False), (3, "none", True), (2, "cpu", False), (3, "cpu", False)]
    assert tried(OPEN) == {(*move, *each) for move in moves for each in passes}
    assert len(list(possible_layouts(OPEN))) == len(tried(OPEN))


@pytest.mark.parametrize(
    ("space", "expected"),
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
def test_impossible_combinations_are_never_tried(space: SearchSpace, expected: set[tuple[int, str]]) -> None:
    assert {(stage, offload) for stage, offload, *_ in tried(space)} == expected


@pytest.mark.parametrize("workers", [8, 12])
def test_hpz_needs_several_whole_nodes(workers: int) -> None:
    layout = replace(OPEN.layout, num_workers=workers)
    assert not any(layout.hpz for layout in possible_layouts(replace(OPEN, layout=layout)))


def candidates_for_70b(host_gib: float | None = None) -> list[Candidate]:
    facts = models.find("Llama-3.1-70B")
    assert facts
    layout = Layout("full", num_workers=8, workers_per_node=8, max_seq_len=4096)
    return evaluate_layouts(facts.shape, SearchSpace(layout, rows_per_worker=8), Machine(GPUS["H100"], 79.1, host_gib))


def test_no_fitting_candidate_scores_higher_than_the_chosen_one() -> None:
    candidates = candidates_for_70b()
    chosen = best_candidate(candidates)
    fitting = [candidate for candidate in candidates if candidate.fits]
    assert chosen.fits and fitting
    assert max(candidate.tokens_per_second for candidate in fitting) <= 1.5 * chosen.tokens_per_second
    assert max(candidate.score for candidate in fitting) * 0.98 <= chosen.score


def test_if_nothing_fits_the_closest_candidate_is_chosen() -> None:
    candidates = candidates_for_70b(host_gib=64.0)
    chosen = best_candidate(candidates)
    assert not any(candidate.fits for candidate in candidates)
    assert chosen.memory.gpu_bytes == min(candidate.memory.gpu_bytes for candidate in candidates if candidate.fits_host)
