"""The import arrows: who may know of whom."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted(file for folder in ("ft_service", "jobs", "serve") for file in (ROOT / folder).rglob("*.py"))
NEITHER_TORCH_NOR_RAY = (
    "errors",
    "spec",
    "catalog",
    "registry",
    "storage",
    "metrics",
    "runs",
    "lease",
    "signals",
    "history",
    "detach",
    "activations",
    "memory",
    "plan",
    "throughput",
    "choices",
    "advice",
    "family",
    "runs",
    "gpus",
)


def imports(file: Path) -> Iterator[str]:
    """Every module a file imports, anywhere in it, dotted."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(module: str) -> set[str]:
    """The product's files that import `module` or something in it."""
    return {
        file.relative_to(ROOT).as_posix()
        for file in PRODUCT
        if any(name == module or name.startswith(f"{module}.") for name in imports(file))
    }


def test_each_engine_has_one_home() -> None:
    assert importers("deepspeed") == {"ft_service/train/parallel.py"}
    assert importers("ray.train") == {"ft_service/train/group.py"}
    for package in ("peft", "bitsandbytes"):
        homes = importers(package)
        assert homes
        assert all(home.startswith("ft_service/model/") or home == "serve/transformers_engine.py" for home in homes)


@pytest.mark.parametrize("module", NEITHER_TORCH_NOR_RAY)
def test_what_decides_and_records_needs_neither_torch_nor_ray(module: str) -> None:
    file = f"ft_service/{module}.py"
    assert (ROOT / file).is_file()
    for package in ("torch", "ray", "transformers", "peft", "deepspeed"):
        assert file not in importers(package)


def test_ray_stays_at_the_edge() -> None:
    names = ("train/launch", "train/group", "cluster", "submit", "doctor")
    allowed = {f"ft_service/{name}.py" for name in names}
    assert {file for file in importers("ray") if not file.startswith("serve/")} == allowed


def test_serving_and_jobs_are_siblings_and_serving_knows_nothing_of_training() -> None:
    assert not any(file.startswith("serve/") for file in importers("ft_service.train") | importers("jobs"))
    assert not any(file.startswith("jobs/") for file in importers("serve"))
    assert {file for file in importers("serve") if file.startswith("ft_service/")} == {"ft_service/cli.py"}


def test_model_and_data_know_nothing_of_training() -> None:
    below = ("ft_service/model/", "ft_service/data/", "ft_service/chat.py", "ft_service/words.py")
    assert not any(file.startswith(below) for file in importers("ft_service.train"))


def test_judging_data_needs_neither_torch_nor_ray() -> None:
    files = {file.relative_to(ROOT).as_posix() for file in (ROOT / "ft_service/data/judge").glob("*.py")}
    assert files and not files & (importers("torch") | importers("ray"))


def test_nothing_unpickles_or_trusts_remote_code() -> None:
    assert importers("pickle") | importers("cloudpickle") == set()
    for file in PRODUCT:
        text = file.read_text(encoding="utf-8")
        assert "trust_remote_code" not in text
        assert "torch.load(" not in text
