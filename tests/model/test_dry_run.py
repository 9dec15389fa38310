"""The dry run: the loader's own arithmetic for any number of ranks."""

import json

import pytest
import torch
from typer.testing import CliRunner

from ft_service.catalog import models
from ft_service.cli.app import app
from ft_service.errors import ModelError
from ft_service.model import nf4
from ft_service.model.dry_run import _check_held, dry_run, tensors_from_shape
from ft_service.model.shards import Partitioning, Span

GIB = 2**30
PARAMETERS_405B = 405_853_388_800  # as published


@pytest.fixture(scope="module")
def imagined() -> object:
    facts = models.find("meta-llama/Llama-3.1-405B")
    assert facts is not None
    return tensors_from_shape(facts.shape)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [8, 16, 64])
@pytest.mark.parametrize("four_bit", [False, True])
def test_every_rank_of_405b_holds_only_its_share(imagined: object, world_size: int, four_bit: bool) -> None:
    config, tensors = imagined  # type: ignore[misc]
    run = dry_run(config, tensors, four_bit=four_bit, world_size=world_size)
    assert run.num_parameters == PARAMETERS_405B
    assert len({entry.file for entry in tensors.values()}) == 191  # as on the hub
    assert sum(rank.read for rank in run.ranks) == pytest.approx(2 * PARAMETERS_405B, rel=1e-6)
    head_and_embedding = 2 * 128_256 * 16_384
    packed = (PARAMETERS_405B - head_and_embedding) // 2 + 2 * head_and_embedding if four_bit else 2 * PARAMETERS_405B
    assert sum(rank.held for rank in run.ranks) == pytest.approx(packed, rel=1e-4)  # norms stay bf16
    fullest = run.fullest
    # Shard, statistics (1/64 of a byte a weight and a little) and one layer are the bound that was promised.
    statistics = PARAMETERS_405B / 64 * 1.02 if four_bit else 0
    assert fullest.statistics <= statistics
    assert fullest.peak <= fullest.held + statistics + run.largest_layer_bytes


def test_hpz_copy_is_counted(imagined: object) -> None:
    config, tensors = imagined  # type: ignore[misc]
    alone = dry_run(config, tensors, four_bit=False, world_size=16).fullest
    copied = dry_run(config, tensors, four_bit=False, world_size=16, node_size=8).fullest
    assert copied.held == pytest.approx(alone.held * (1 + 16 / 8), rel=1e-6)
    assert copied.read == pytest.approx(alone.read * (1 + 16 / 8), rel=1e-6)


@pytest.mark.parametrize("node_size", [1, 2])
@pytest.mark.parametrize("numel", [1, 5, 63, 64, 1000])
def test_partitions_tile_a_parameter(numel: int, node_size: int) -> None:
    for world_size in (2, 4, 6):
        for copy in range(2 if node_size > 1 else 1):
            ranks = range(node_size if copy else world_size)
            spans = [Partitioning(rank, world_size, node_size).spans(numel)[copy] for rank in ranks]
            elements = [element for span in spans for element in range(span.start, span.stop)]
            assert elements == list(range(numel))


@pytest.mark.parametrize(
    "spans", [[Span(0, 4), Span(5, 8)], [Span(0, 4), Span(3, 8)], [Span(0, 4), Span(4, 7)], [Span(0, 8), Span(8, 9)]]
)
def test_incomplete_partitions_are_rejected(spans: list[Span]) -> None:
    with pytest.raises(ModelError, match="w: "):
        _check_held(spans, 8, "w")


@pytest.mark.parametrize("num_weights", [64, 64 * 256, 64 * 257, 1000 * 512])
def test_statistics_bytes_match_the_tensors(num_weights: int) -> None:
    from bitsandbytes.functional import quantize_4bit

    parameter = nf4.packed_parameter(torch.empty(0, dtype=torch.bfloat16))
    weights = torch.randn(num_weights).bfloat16()
    _, parameter.quant_state = quantize_4bit(weights, compress_statistics=True, quant_type="nf4")  # type: ignore[attr-defined]
    held = sum(tensor.nbytes for tensor in nf4.statistics_tensors(parameter))
    assert held == nf4.statistics_bytes(num_weights)


@pytest.mark.slow
def test_the_command_prints_a_table_or_json() -> None:
    shown = CliRunner().invoke(app, ["plan", "--table", "llama-3.2-1b", "--dry-run"])
    assert shown.exit_code == 0 and "1,235,814,400 parameters" in shown.output
    found = json.loads(CliRunner().invoke(app, ["plan", "--table", "llama-3.2-1b", "--dry-run", "--json"]).output)
    assert [run["world_size"] for run in found] == [8, 16, 64, 8, 16, 64]
    assert len(found[2]["ranks"]) == 64
