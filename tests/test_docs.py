"""Every command of the pages: executed as it is printed, executed by a test that its mark names, or in need of more.

All are compared with the programs that they name: commands, arguments and options exist. What a mark means:
CONTRIBUTING.md, Documentation.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ft_service.cli.app import app
from tests.doc_commands import JAPANESE, PAGES, Block, blocks, inline_commands, leaf_of, problem_of
from tests.hosts import ROOT
from tests.serve.serving_world import change_json
from tests.worlds import SMALL, WORDS, write_base, write_records

NEEDS = ("aws", "gcp", "cluster", "machines", "kubernetes", "slurm", "docker", "index", "gpu", "server")
ALL = [block for page in PAGES for block in blocks(page)]


def of_page(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_every_block_runs_here_or_says_where() -> None:
    marks = {"run", "trained", *(f"needs={it}" for it in NEEDS)}
    unknown = [block for block in ALL if block.mark not in marks and not block.mark.startswith("test=")]
    assert [(of_page(block.page), block.mark, block.text.splitlines()[0]) for block in unknown] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_every_command_of_a_block_exists_with_its_options(page: Path) -> None:
    commands = [words for block in blocks(page) for words in block.commands()]
    assert [problem for words in commands if (problem := problem_of(words))] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [*PAGES, JAPANESE], ids=of_page)
def test_every_command_in_a_sentence_exists_with_its_options(page: Path) -> None:
    assert [problem for words in inline_commands(page) if (problem := problem_of(words, whole=False))] == []


def test_the_japanese_page_shows_no_other_commands() -> None:
    english = [words for block in blocks(ROOT / "README.md") for words in block.commands()]
    japanese = [words for block in blocks(JAPANESE) for words in block.commands()]
    others = [words for words in japanese if words not in english and words[0] != "curl"]
    assert [words for words in others if words != ["ft", "evaluate", "ID", "--suite", "general-ja"]] == []


@pytest.mark.parametrize("block", [block for block in ALL if block.mark.startswith("test=")], ids=lambda it: it.mark)
def test_the_test_that_a_mark_names_runs_these_commands(block: Block) -> None:
    """As words of a call: "study create", or "study", "create"."""
    files = [ROOT / "tests" / name for name in block.mark.removeprefix("test=").split(",")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    missing = []
    for words in block.commands():
        if words[0] == "ft":
            leaf = leaf_of(words)
            parts = leaf.split()
            spelled = rf"[\"' ]{parts[-1]}[\"' ]" if len(parts) > 1 else rf"[\"']{leaf}[\"' ]|cli\.app. {leaf}"
            if not (re.search(spelled, text) and re.search(rf"[\"']{parts[0]}[\"' ]", text)):
                missing.append(leaf)
    assert missing == []


def test_wrong_commands_are_noticed() -> None:
    for words, problem in (
        (["ft", "doktor"], "no command"),
        (["ft", "doctor", "--clusters"], "--clusters"),
        (["ft", "queue", "limit"], "owner"),
        (["ray", "job", "submit", "--no-wate", "--", "x"], "--no-wate"),
        (["serve", "deplay", "x"], "no command"),
        (["make", "coffee"], "no target"),
        (["python", "jobs/tran.py"], "not here"),
        (["aws", "efs", "create-mount-target", "--subnet-id", "S"], "without --file-system-id"),
        (["aws", "efs", "create-file-system", "--throughput", "elastic"], "no option --throughput"),
        (["aws", "ec2", "creat-subnet", "--x"], "no such operation"),
        (["aws", "ec2", "wait", "nat-gateway-redy"], "no such waiter"),
        (["rm", "-rf", "."], "unknown program"),
    ):
        assert problem in problem_of(words)
    assert "no option --clusters" in problem_of(["ft", "doctor", "--clusters"], whole=False)
    assert problem_of(["ray", "job", "submit", "--no-wait", "--", "x", "--y"]) == ""


# -- executed as they are printed --------------------------------------------------------------------------------------

SPEC = """
name: support-bot
model: {{base: {folder}/quickstart/scratch}}
method: {{type: lora, lora_rank: 16, lora_alpha: 32}}
data:
  train: [{{path: {folder}/train.jsonl, format: alpaca, source: made up, license: CC0-1.0}}]
  validation: {{fraction: 0.1}}
  max_seq_len: 128
train: {{epochs: 3, global_batch_size: 64}}
parallel: {{num_workers: 4}}
storage: {folder}/quickstart/storage
"""


@dataclass
class Reader:
    """The folder in which somebody follows the pages, and what replaces words such as RUN."""

    folder: Path
    environment: dict[str, str]
    words: dict[str, str]

    def follow(self, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
        """Commands of `ft` alone run in this process, which has its imports already."""
        commands = block.commands()
        if any(words[0] not in ("ft", "export") or words[1] == "train" for words in commands):
            self._in_bash(block.text)
            return
        monkeypatch.chdir(self.folder)
        environment = dict(self.environment)
        for number, words in enumerate(commands):
            words = [self.words.get(word, word) for word in words]
            words = [word.replace("/var/lib/ft", str(self.folder)) for word in words]
            words = [f"out-{number}" if word == "OUT" else word for word in words]
            if words[0] == "export":
                environment |= dict(word.split("=", 1) for word in words[1:])
                continue
            done = CliRunner().invoke(app, words[1:], env=environment)
            assert done.exit_code == 0, f"{' '.join(words)}\n{done.output[-2000:]}{done.exception!r}"

    def _in_bash(self, text: str) -> None:
        script = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(
            script, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return new_reader(tmp_path)


def new_reader(folder: Path) -> Reader:
    """With the shipped specs, a spec and data of the reader's own, what `make quickstart` leaves, and its own home."""
    programs = folder / ".venv/bin"
    programs.mkdir(parents=True)
    for name, module in (("ft", "ft_service.cli.app"), ("ray", "ray.scripts.scripts")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        (programs / name).chmod(0o700)
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    for name in ("data", "quickstart/records", "quickstart/storage"):
        (folder / name).mkdir(parents=True)
    write_base(folder / "quickstart/scratch", [" ".join(WORDS)], 400, SMALL)
    change_json(folder / "quickstart/scratch/config.json", max_position_embeddings=32768)  # a page tries 16384
    for file in ("train.jsonl", "data/train.jsonl", "quickstart/records/train.jsonl", "tickets.jsonl"):
        write_records(folder / file, 200)
    tickets = folder / "tickets.jsonl"
    tickets.write_text(tickets.read_text().replace('"instruction"', '"question"').replace('"output"', '"answer"'))
    for name in ("mine", "my-run"):
        (folder / f"jobs/specs/{name}.yaml").write_text(SPEC.format(folder=folder))
    git = subprocess.run(["git", "rev-parse", "--absolute-git-dir"], cwd=ROOT, capture_output=True, text=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FT_", "WANDB_"))},
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "GIT_DIR": git.stdout.strip(),
        "HF_HUB_OFFLINE": "1",
        "FT_STORAGE": str(folder / "quickstart/storage"),
    }
    return Reader(folder, environment, {"SPEC": "jobs/specs/mine.yaml"})


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in ALL if block.mark == "run"], ids=lambda it: of_page(it.page))
def test_a_block_that_needs_nothing_runs(block: Block, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    reader.follow(block, monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """After README's first run of a spec."""
    reader = new_reader(tmp_path_factory.mktemp("reader"))
    (first,) = (block for block in blocks(ROOT / "README.md") if "ft train jobs/specs/tiny-cpu.yaml" in block.text)
    with pytest.MonkeyPatch.context() as patch:
        reader.follow(first, patch)
    storage = reader.folder / "quickstart/storage"
    (run,) = (path.name for path in (storage / "runs").iterdir())
    (adapter,) = (path.name for path in (storage / "adapters").iterdir() if path.is_dir())
    reader.words |= {"RUN": run, "ID": adapter}
    yield reader


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [block for block in ALL if block.mark == "trained" and "ft train" not in block.text],
    ids=lambda it: of_page(it.page),
)
def test_a_block_that_needs_a_run_of_the_reader_runs(
    block: Block, trained: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.follow(block, monkeypatch)
