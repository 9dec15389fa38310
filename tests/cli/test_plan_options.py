"""`ft plan` ignores no option without a message, says what the data check finds, and reports all problems at once."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.errors import FtError, SpecError, UsageError
from tests.worlds import write_world


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_world(folder)
    (folder / "spec.yaml").write_text(f"""
name: words
model: {{base: {folder}/base}}
data:
  train: [{{path: {folder}/train.jsonl, source: made up, license: CC0-1.0}}]
  validation: {{fraction: 0.2}}
  max_seq_len: 128
train: {{max_steps: 40, global_batch_size: 4}}
parallel: {{num_workers: 2, use_gpu: false}}
storage: {folder}/storage
""")
    return folder / "spec.yaml"


def plan(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    return done.stdout


def error_of(*arguments: object) -> FtError:
    with pytest.raises(FtError) as error:
        plan(*arguments)
    return error.value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-type", "H100"], "--gpu-type = H100: no effect with parallel.use_gpu: false"),
        (["--price", 3, "--nodes", 2], "--nodes = 2, --price = 3.0: no effect with parallel.use_gpu: false"),
        (["--host-memory-gib", 64], "add parallel.use_gpu=true"),
        (["parallel.use_gpu=true", "--price", 3], "--price = 3: needs the type of the GPU. Add --gpu-type."),
    ],
)
def test_an_option_without_effect_is_refused(spec: Path, arguments: list[Any], message: str) -> None:
    error = error_of(spec, *arguments)
    assert isinstance(error, UsageError) and message in str(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", 8], "--gpus = 8: no effect with --table"),
        (["--gpu-memory-gib", 80], "--gpu-memory-gib = 80.0: no effect with --table"),
        (["--dry-run", "--gpu-type", "H100"], "--gpu-type = H100: no effect with --table and --dry-run"),
        (["--dry-run", "--max-seq-len", 512], "--max-seq-len = 512: no effect with --table and --dry-run"),
    ],
)
def test_an_option_without_effect_on_a_table_is_refused(arguments: list[Any], message: str) -> None:
    error = error_of("--table", "llama-3.1-8b", *arguments)
    assert isinstance(error, UsageError) and message in str(error)


def test_the_header_says_what_was_not_checked(spec: Path) -> None:
    assert "words  on CPU, memory not checked  (nothing was written)" in plan(spec)
    assert "words  GPU unknown, so not checked whether it fits" in plan(spec, "parallel.use_gpu=true")
    assert "words  fits  " in plan(spec, "parallel.use_gpu=true", "--gpu-type", "H100")


def test_the_plan_says_what_the_data_check_finds(spec: Path, tmp_path: Path) -> None:
    assert "Data check: passes" in plan(spec)
    unlicensed = plan(spec, "data.train.0.license=null", "data.train.0.source=null")
    assert "Data check: fails, so the run would stop (fails on " in unlicensed
    assert "`ft data check SPEC` shows each finding." in " ".join(unlicensed.split())
    code = unlicensed.partition("(fails on ")[2].split(";")[0].split(")")[0].split(",")[0]
    waived = plan(spec, "data.train.0.license=null", "data.train.0.source=null", f"data.waive.{code}=ours")
    assert code not in waived.partition("Data check: ")[2].splitlines()[0] and "1 waived" in waived


def test_an_unknown_waiver_is_refused(spec: Path) -> None:
    assert "data.waive.no.such = 'x': is not a code" in str(error_of(spec, "data.waive.no.such=x"))


def test_typos_and_problems_with_the_base_are_reported_at_once(spec: Path) -> None:
    missing = "data.train.0.path=no/such.jsonl"
    error = error_of(spec, "train.max_stepps=3", "method.lora_rank=5000", "data.max_seq_len=100000", missing)
    assert isinstance(error, SpecError)
    assert [problem.setting for problem in error.problems] == [
        "train.max_stepps",
        "data.train.0.path",
        "method.lora_rank",
        "data.max_seq_len",
    ]
