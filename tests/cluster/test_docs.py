"""docs/cluster.md, operations.md and security.md: what can run here runs, and every `ft` and `ray` command exists."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from ft_service.cli.app import app
from tests.plan.test_docs import shown
from tests.worlds import write_records

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("cluster", "operations", "security")]
BLOCK = re.compile(r"^```bash *(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
NEEDS = ("aws", "gcp", "cluster", "machines", "kubernetes", "slurm", "docker", "index")
MARKS = {"run", *(f"needs={it}" for it in NEEDS)}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(mark, text) of each block of commands."""
    return [(found[1], found[2]) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each `ft` and `ray` command of a page; in quotes too, as `ray exec` runs them."""
    for _, text in blocks(page):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for part in [words, *(shlex.split(word) for word in words if re.match(r"(\w+=\S+ )*(ft|ray) ", word))]:
                while part and re.fullmatch(r"[A-Z_]+=\S*", part[0]):
                    part = part[1:]
                if part and part[0] in ("ft", "ray"):
                    yield [word for word in part if word != "&"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs_here_or_says_what_it_needs(page: Path) -> None:
    assert [mark for mark, _ in blocks(page) if mark not in MARKS] == []


def problem_of(words: list[str]) -> str:
    """What is wrong with the command or the options; empty if the program would accept them."""
    if words[0] == "ft":
        group: Any = typer.main.get_command(app)
    else:
        from ray.scripts.scripts import cli as group
    arguments = words[1:]
    context: Any = None
    try:
        while hasattr(group, "commands"):
            if group.invoke_without_command and (not arguments or arguments[0].startswith("-")):
                break
            if not arguments or arguments[0] not in group.commands:
                return f"no command {' '.join(words)}"
            context = group.make_context(group.name, [arguments[0]], parent=context)
            group = group.commands[arguments[0]]
            arguments = arguments[1:]
        group.make_context(group.name, arguments, parent=context)
    except Exception as error:
        # A file of the reader is not here.
        return "" if "does not exist" in str(error) else f"{' '.join(words)}: {error or type(error).__name__}"
    return ""


def test_a_wrong_command_is_noticed() -> None:
    assert "no command" in problem_of(["ft", "doktor"])
    assert "--clusters" in problem_of(["ft", "doctor", "--clusters"])
    assert "--no-wate" in problem_of(["ray", "job", "submit", "--no-wate", "--", "x"])
    assert problem_of(["ray", "job", "submit", "--no-wait", "--", "x", "--y"]) == ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_ft_and_ray_command_exists_with_its_options(page: Path) -> None:
    found = list(commands(page))
    assert found or page.stem == "security"
    assert [problem for words in found if (problem := problem_of(words))] == []


@pytest.mark.multiprocess
@pytest.mark.slow
def test_the_blocks_that_need_nothing_run(tmp_path: Path) -> None:
    """In an empty folder with the shipped specs and a data file, and a home of its own."""
    (tmp_path / "bin").mkdir()
    for name, module in (("ft", "ft_service.cli.app"), ("ray", "ray.scripts.scripts")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o700)
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    (tmp_path / "data").mkdir()
    write_records(tmp_path / "data/train.jsonl", 200)
    git = subprocess.run(["git", "rev-parse", "--absolute-git-dir"], cwd=ROOT, capture_output=True, text=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FT_"))},
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "GIT_DIR": git.stdout.strip(),
        "HF_HUB_OFFLINE": "1",
    }
    ran = 0
    for page in PAGES:
        for mark, text in blocks(page):
            if mark == "run":
                script = ["bash", "-euo", "pipefail", "-c", text]
                done = subprocess.run(
                    script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
                )
                assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
                ran += 1
    assert ran == 2
    assert (tmp_path / "build/cluster/constraints.txt").exists() and (tmp_path / ".ray/auth_token").exists()


def plan_in_the_page() -> str:
    text = PAGES[0].read_text(encoding="utf-8")
    (example,) = [block for block in text.split("```") if block.lstrip("\n").startswith("support-bot-70b  fits")]
    return example.strip("\n")


def plan_of_today() -> list[str]:
    """Without the table of memory."""
    lines = shown("lora-70b", ["parallel.num_workers=16"])
    return "\n".join(lines).strip("\n").partition("\n\n One GPU")[0].splitlines()


def test_the_plan_of_the_70b_run_is_of_today() -> None:
    stale = "docs/cluster.md is not what `ft plan` prints now: python -m tests.cluster.test_docs"
    assert plan_in_the_page().splitlines() == plan_of_today(), stale


def write() -> None:
    """Put today's plan into the page."""
    text = PAGES[0].read_text(encoding="utf-8")
    PAGES[0].write_text(text.replace(plan_in_the_page(), "\n".join(plan_of_today())), encoding="utf-8")


if __name__ == "__main__":
    write()
