"""The import arrows: which part of the product may know which."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted(file for folder in ("ft_service", "jobs", "serve") for file in (ROOT / folder).rglob("*.py"))

LEVELS = (
    {"errors", "text"},
    {"spec", "catalog", "storage", "chat"},
    {"plan", "registry"},
    {"runs", "model", "data"},
    {"cluster", "publish", "preflight", "cleanup", "export"},
    {"train", "evaluate", "pages", "migrate"},
    {"launch"},
    {"cli"},
)
"""Parts of ft_service, lowest first. A part imports parts of its own level and below it, without circles."""

NEEDS_NEITHER_TORCH_NOR_RAY = ("errors", "text", "spec", "catalog", "storage", "chat", "plan", "registry", "runs")
HEAVY = ("torch", "ray", "transformers", "peft", "deepspeed", "bitsandbytes")
TYPES_ONLY = {"chat": {"transformers"}}
"""Imported for type checkers alone."""


@functools.cache
def imports(file: Path) -> frozenset[str]:
    """Every module a file imports, anywhere in it, dotted."""
    return frozenset(_imports(ast.parse(file.read_text(encoding="utf-8"))))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def importers(module: str) -> set[str]:
    """The product's files that import `module` or something in it."""
    return {
        name_of(file)
        for file in PRODUCT
        if any(name == module or name.startswith(f"{module}.") for name in imports(file))
    }


def part_of(dotted: str) -> str:
    """``ft_service.plan.memory`` -> ``plan``"""
    return dotted.split(".")[1] if "." in dotted else ""


def parts_imported_by(file: Path) -> set[str]:
    return {part_of(name) for name in imports(file) if name.startswith("ft_service.")} - {""}


def files_of(part: str) -> list[Path]:
    folder = ROOT / "ft_service" / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def modules() -> dict[str, set[str]]:
    """Each module of the product with the modules of the product that it imports."""
    names = {name_of(file).removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in PRODUCT}
    return {name: {found for found in imports(file) if found in names} - {name} for name, file in names.items()}


def test_every_part_has_a_level() -> None:
    on_disk = {path.stem for path in (ROOT / "ft_service").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert on_disk - {"__init__", "__pycache__"} == set().union(*LEVELS)


@pytest.mark.parametrize("part", sorted(set().union(*LEVELS)))
def test_a_part_imports_only_its_own_level_and_below(part: str) -> None:
    level = next(number for number, parts in enumerate(LEVELS) if part in parts)
    allowed = set().union(*LEVELS[: level + 1])
    for file in files_of(part):
        if part == "cli" or file.name == "__init__.py":
            continue
        above = parts_imported_by(file) - allowed
        assert not above, f"{name_of(file)} imports {sorted(above)}"


def test_modules_import_each_other_without_circles() -> None:
    graph = modules()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for imported in sorted(graph[module]):
            visit(imported, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_parts_import_each_other_without_circles() -> None:
    edges = {part: set().union(*(parts_imported_by(file) for file in files_of(part))) for part in set().union(*LEVELS)}
    for part, imported in edges.items():
        back = {other for other in imported - {part} if part in edges[other]}
        assert not back, f"{part} and {sorted(back)} import each other"


def test_each_engine_has_one_home() -> None:
    homes = ("parallel.py", "parallel_placement.py", "gathers.py")
    assert importers("deepspeed") == {f"ft_service/train/{home}" for home in homes}
    assert importers("ray.train") == {"ft_service/train/worker_group.py", "ft_service/train/ray_worker.py"}
    assert importers("opentelemetry") == {"serve/tracing.py"}
    for package in ("peft", "bitsandbytes"):
        homes = importers(package)
        assert homes
        assert all(home.startswith(("ft_service/model/", "serve/engines/")) for home in homes)


@pytest.mark.parametrize("part", NEEDS_NEITHER_TORCH_NOR_RAY)
def test_what_decides_and_records_needs_neither_torch_nor_ray(part: str) -> None:
    files = {name_of(file) for file in files_of(part)}
    for package in set(HEAVY) - TYPES_ONLY.get(part, set()):
        assert not files & importers(package)


def test_ray_stays_at_the_edge() -> None:
    train = ("ft_service/train/worker_group.py", "ft_service/train/ray_worker.py")
    allowed = ("ft_service/launch.py", *train, "ft_service/cluster/", "serve/")
    assert all(file.startswith(allowed) for file in importers("ray"))


def test_serving_knows_nothing_of_training() -> None:
    serving = {name_of(file) for file in PRODUCT if name_of(file).startswith("serve/")}
    assert not serving & (importers("ft_service.train") | importers("ft_service.launch") | importers("jobs"))
    assert all(file.startswith("ft_service/cli/") for file in importers("serve") - serving)


def test_jobs_know_nothing_of_serving() -> None:
    assert not any(file.startswith("jobs/") for file in importers("serve"))


def test_data_knows_of_the_plan_only_its_facts() -> None:
    for file in files_of("data"):
        assert all(name.startswith("ft_service.plan.facts") for name in imports(file) if part_of(name) == "plan")


def test_training_knows_neither_pages_nor_publishing_nor_evaluation() -> None:
    for file in files_of("train"):
        assert not parts_imported_by(file) & {"pages", "publish", "evaluate"}


def test_judging_data_needs_neither_torch_nor_ray() -> None:
    files = {name_of(file) for file in (ROOT / "ft_service/data/gate").glob("*.py")}
    assert files and not files & (importers("torch") | importers("ray"))


HTTP = ("fastapi", "starlette", "uvicorn", "serve.http", "serve.inference", "serve.api", "serve.gateway")


def test_an_engine_knows_neither_http_nor_the_database_nor_ray_serve() -> None:
    for file in (ROOT / "serve/engines").rglob("*.py"):
        assert not any(name.startswith((*HTTP, "serve.database", "ray.serve")) for name in imports(file)), file


def test_the_replica_of_an_engine_knows_no_http() -> None:
    assert not any(name.startswith((*HTTP, "serve.database")) for name in imports(ROOT / "serve/replica.py"))


def test_gateway_and_routes_know_engines_only_by_their_interface() -> None:
    files = [ROOT / "serve/gateway.py", ROOT / "serve/api.py", ROOT / "serve/router.py"]
    for file in (*files, *(ROOT / "serve/inference").rglob("*.py"), *(ROOT / "serve/http").rglob("*.py")):
        engines = {name for name in imports(file) if name.startswith("serve.engines.")}
        assert all(name.startswith("serve.engines.engine") for name in engines), file


def test_what_is_shared_by_all_http_apis_knows_none_of_them() -> None:
    own = ("serve.inference", "serve.fine_tuning", "serve.jobs_page", "serve.playground", "serve.voting")
    for file in (ROOT / "serve/http").rglob("*.py"):
        assert not any(name.startswith(own) for name in imports(file)), file
    for file in (ROOT / "serve/inference").rglob("*.py"):
        assert not any(name.startswith(own[1:]) for name in imports(file)), file


def test_routes_know_no_ray_serve() -> None:
    for folder in ("inference", "http", "database", "playground", "voting", "jobs_page"):
        assert not any(
            name.startswith("ray") for file in (ROOT / "serve" / folder).rglob("*.py") for name in imports(file)
        )


def test_only_the_deployment_of_fine_tuning_knows_ray() -> None:
    folder = ROOT / "serve/fine_tuning"
    knowing = {file.name for file in folder.rglob("*.py") if any(name.startswith("ray") for name in imports(file))}
    assert knowing == {"deployment.py"}


def test_nothing_unpickles_or_trusts_remote_code() -> None:
    assert importers("pickle") | importers("cloudpickle") == set()
    for file in PRODUCT:
        text = file.read_text(encoding="utf-8")
        assert "trust_remote_code" not in text
        assert "torch.load(" not in text
