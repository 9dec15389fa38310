"""docs/planning.md shows what `ft plan` prints today: every line of an example is a line of the plan."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ft_service.catalog import models
from ft_service.cli.plan_view import show_plan
from ft_service.plan.facts import DatasetFacts, Resources
from ft_service.plan.make import make_plan
from ft_service.plan.plan import RunPlan
from ft_service.spec.load import parse_run_spec

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "planning.md"
DOCS = PAGE.read_text(encoding="utf-8")
WIDTH = 107
TICKETS = DatasetFacts(
    digest="d",
    exact=False,
    conversations=19_000,
    rows=2112,
    tokens=8_322_000,
    loss_tokens=6_384_000,
    truncated=0,
    validation_conversations=1000,
    validation_rows=111,
    validation_tokens=438_000,
    validation_loss_tokens=336_000,
)
ON_ONE_GPU = ["parallel.num_workers=1", "parallel.offload=none"]


def plan_of(name: str, overrides: list[str]) -> RunPlan:
    spec = parse_run_spec((ROOT / "jobs" / "specs" / f"{name}.yaml").read_text(encoding="utf-8"), overrides)
    facts = models.find(spec.model.base)
    assert facts is not None
    gpus = spec.parallel.max_workers
    resources = Resources(num_gpus=gpus, gpu_type=spec.parallel.accelerator_type, price_per_gpu_hour=3)
    return make_plan(spec, TICKETS, facts.shape, resources)


def shown(name: str, overrides: list[str]) -> list[str]:
    console = Console(file=io.StringIO(), width=WIDTH)
    show_plan(plan_of(name, overrides), console)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def example(first_line: str) -> list[str]:
    """The lines of the example that begins like this."""
    (block,) = [block for block in DOCS.split("```") if block.lstrip("\n").startswith(first_line)]
    return block.strip("\n").splitlines()


EXAMPLES: list[tuple[str, list[str], str]] = [
    ("lora", [], "support-bot  fits"),
    ("lora-70b", [], "support-bot-70b  fits"),
    ("lora-405b", [], "support-bot-405b  fits"),
    ("lora-70b", ON_ONE_GPU, "support-bot-70b  does not fit"),
]


@pytest.mark.parametrize(("name", "overrides", "first_line"), EXAMPLES)
def test_an_example_is_what_the_plan_says(name: str, overrides: list[str], first_line: str) -> None:
    today = shown(name, overrides)
    stale = [line for line in example(first_line) if line.rstrip() not in today]
    assert not stale, "docs/planning.md is not what `ft plan` prints now: python -m tests.plan.test_docs"


def table_of_405b() -> list[str]:
    command = [sys.executable, "-m", "ft_service.cli.app", "plan", "--table", "llama-3.1-405b", "--gpu-type", "H100"]
    environment = {**os.environ, "COLUMNS": str(WIDTH)}
    done = subprocess.run([*command, "--price", "3"], env=environment, capture_output=True, text=True, check=True)
    return [line.rstrip() for line in done.stdout.splitlines()]


def test_the_table_of_a_model_is_of_today() -> None:
    assert example("llama-3.1-405b, 405") == table_of_405b()


def test_the_table_of_the_shipped_specs_is_of_today() -> None:
    rows = [line for line in DOCS.splitlines() if line.startswith("| `")]
    for name in ("lora", "full-8b", "qlora-8b-24gb", "lora-70b", "qlora-70b-80gb", "lora-405b", "qlora-405b"):
        plan = plan_of(name, [])
        assert plan.estimate is not None
        layers = "all" if plan.activation_checkpointing else "none"
        if plan.kept_layers:
            layers = f"all but {plan.kept_layers}"
        now = f"{plan.micro_batch_size}, {layers}, {plan.memory_gib['total']:.1f} GiB, " + (
            f"{plan.estimate.tokens_per_second:,.0f}"
        )
        (row,) = [row for row in rows if row.startswith(f"| `{name}` |")]
        assert now in row, f"{name}: {now}"


def write() -> None:
    """Put today's plans into the page: whole plans, where an example is an excerpt too."""
    page = DOCS
    for name, overrides, first_line in EXAMPLES:
        page = page.replace("\n".join(example(first_line)), "\n".join(shown(name, overrides)).strip("\n"))
    page = page.replace("\n".join(example("llama-3.1-405b, 405")), "\n".join(table_of_405b()).strip("\n"))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write()
