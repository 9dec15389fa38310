"""The search tries every layout that can work, and no other."""

from dataclasses import replace
from typing import Any

import pytest

from ft_service.catalog import models
from ft_service.catalog.gpus import GPUS
from ft_service.catalog.models import ModelShape
from ft_service.plan.memory import Layout, estimate_memory
from ft_service.plan.search import (
    Candidate,
    Machine,
    SearchSpace,
    best_candidate,
    evaluate_layout,
    evaluate_layouts,
    possible_layouts,
)
from ft_service.plan.speed import flops_per_token

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


def shape_of(base: str) -> ModelShape:
    facts = models.find(base)
    assert facts
    return facts.shape


def candidates_for_70b(host_gib: float | None = None) -> list[Candidate]:
    layout = Layout("full", num_workers=8, workers_per_node=8, max_seq_len=4096)
    shape = shape_of("Llama-3.1-70B")
    return evaluate_layouts(shape, SearchSpace(layout, rows_per_worker=8), Machine(GPUS["H100"], 79.1, host_gib))


def test_no_fitting_candidate_scores_higher_than_the_chosen_one() -> None:
    candidates = candidates_for_70b()
    chosen = best_candidate(candidates)
    fitting = [candidate for candidate in candidates if candidate.fits]
    assert chosen.fits and fitting
    assert max(candidate.tokens_per_second for candidate in fitting) <= 1.5 * chosen.tokens_per_second
    assert max(candidate.score for candidate in fitting) * 0.98 <= chosen.score


def with_open_recomputation(base: str, gib: float, **layout: Any) -> tuple[Candidate, list[Candidate]]:
    space = SearchSpace(Layout("lora", max_seq_len=4096, **layout), rows_per_worker=8)
    candidates = evaluate_layouts(shape_of(base), space, Machine(GPUS["H100"], gib))
    return best_candidate(candidates), candidates


def test_free_memory_keeps_the_activations_of_some_layers() -> None:
    """Recomputing every layer costs LoRA a third of its time."""
    chosen, candidates = with_open_recomputation("Llama-3.1-70B", 79.1, num_workers=8, workers_per_node=8)
    layout = chosen.layout
    assert layout.activation_checkpointing and 0 < layout.kept_layers < 80
    assert chosen.fits and chosen.leaves_margin
    in_all_layers = [other for other in candidates if other.layout.kept_layers == 0 and other.fits]
    assert max(other.tokens_per_second for other in in_all_layers) < 0.97 * chosen.tokens_per_second
    one_more = replace(layout, kept_layers=layout.kept_layers + 1)
    shape = shape_of("Llama-3.1-70B")
    assert not evaluate_layout(shape, one_more, 8, Machine(GPUS["H100"], 79.1)).leaves_margin


def test_layers_differ_only_if_that_is_faster() -> None:
    chosen, candidates = with_open_recomputation("Llama-3.1-8B", 79.1)
    assert not chosen.layout.activation_checkpointing and chosen.layout.kept_layers == 0
    assert any(candidate.layout.kept_layers for candidate in candidates)
    fixed = SearchSpace(Layout("lora", num_workers=8, workers_per_node=8), 8, activation_checkpointing=True)
    for candidate in evaluate_layouts(shape_of("Llama-3.1-70B"), fixed, Machine(GPUS["H100"], 79.1)):
        assert candidate.layout.kept_layers == 0


def test_kept_layers_cost_memory_and_save_time_in_proportion() -> None:
    shape = shape_of("Llama-3.1-70B")
    layouts = [Layout("lora", num_workers=8, zero_stage=3, kept_layers=kept) for kept in (0, 1, 40, 79)]
    none = replace(layouts[0], activation_checkpointing=False)
    flops = [flops_per_token(shape, layout) for layout in (*layouts, none)]
    assert flops == sorted(flops, reverse=True)
    assert flops[0] - flops[2] == pytest.approx((flops[0] - flops[4]) / 2)
    activations = [estimate_memory(shape, layout).gpu["activations"] for layout in (*layouts, none)]
    assert activations == sorted(activations)
    assert activations[2] - activations[1] == pytest.approx((activations[3] - activations[1]) / 2, rel=1e-3)


def test_if_nothing_fits_the_closest_candidate_is_chosen() -> None:
    candidates = candidates_for_70b(host_gib=64.0)
    chosen = best_candidate(candidates)
    assert not any(candidate.fits for candidate in candidates)
    assert chosen.memory.gpu_bytes == min(candidate.memory.gpu_bytes for candidate in candidates if candidate.fits_host)
