"""The code of a run is named by commit and digest: in a checkout, an archive, an installation, and a submitted job."""

import fnmatch
import io
import shutil
import subprocess
import tarfile
import tomllib
from pathlib import Path

import pytest

from ft_service.cluster import submit
from ft_service.runs import code
from ft_service.runs.code import COMMIT_VARIABLE, PACKAGE, code_version, commit_of

ROOT = PACKAGE.parent


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=me", "-c", "user.email=me@example.com")
    done = subprocess.run(["git", *who, "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small one, committed; its commit file is as in the project."""
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = tmp_path / "checkout/ft_service"
    found.mkdir(parents=True)
    (found / "loop.py").write_text("x = 1\n")
    shutil.copy(PACKAGE / "COMMIT", found)
    shutil.copy(ROOT / ".gitattributes", found.parent)
    git(found.parent, "init", "--quiet")
    git(found.parent, "add", ".")
    git(found.parent, "commit", "--quiet", "--message", "one")
    return found


def test_a_checkout_has_its_commit_and_says_if_it_was_changed(package: Path) -> None:
    commit = git(package.parent, "rev-parse", "HEAD")
    before = code_version(package)
    assert commit_of(package) == commit and f"+g{commit[:12]}.code." in before
    (package / "__pycache__").mkdir()
    (package / "__pycache__/loop.pyc").write_bytes(b"compiled")
    code_version.cache_clear()
    assert code_version(package).rpartition(".")[2] == before.rpartition(".")[2]
    (package / "loop.py").write_text("x = 2\n")
    code_version.cache_clear()
    assert f"+g{commit[:12]}.changed.code." in code_version(package)
    assert code_version(package).rpartition(".")[2] != before.rpartition(".")[2]


def test_an_archive_has_the_commit_and_the_digest_of_the_checkout(package: Path, tmp_path: Path) -> None:
    archive = subprocess.run(["git", "-C", str(package.parent), "archive", "HEAD"], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(tmp_path / "archive", filter="data")
    assert code_version(tmp_path / "archive/ft_service") == code_version(package)


def test_a_copy_takes_the_commit_from_the_job_or_has_none(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "copy/ft_service"
    shutil.copytree(package, copied)
    assert commit_of(copied) is None and ".code." not in code_version(copied) and "+code." in code_version(copied)
    monkeypatch.setenv(COMMIT_VARIABLE, "a" * 40)
    assert commit_of(copied) == "a" * 40


def test_another_projects_commit_is_not_taken_for_this_ones(package: Path) -> None:
    installed = package.parent / ".venv/lib/ft_service"
    shutil.copytree(package, installed)
    assert commit_of(installed) is None


def test_a_submitted_job_gets_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "commit_of", lambda: "b" * 40)
    assert submit._runtime_env()["env_vars"] == {COMMIT_VARIABLE: "b" * 40}
    monkeypatch.setattr(submit, "commit_of", lambda: None)
    assert "env_vars" not in submit._runtime_env()


def test_an_installation_has_every_file_of_the_digest() -> None:
    """Otherwise the same code would have two digests."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = [f"{name.replace('.', '/')}/{pattern}" for name, its in data.items() for pattern in its]
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    others = [path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".py"]
    assert [name for name in others if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []
    assert code._version() != ""
