"""requirements.lock: the tested versions, a hash for every file, and everything that the product needs."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:([0-9a-f]{64})")


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    found = {}
    for line in lines:
        matched = LINE.fullmatch(line)
        assert matched, line
        found[matched[1]] = matched[2]
    assert list(found) == sorted(found) and len(found) == len(lines)
    return found


def test_locked_versions_are_the_tested_ones() -> None:
    constraints = [line.split("==") for line in (ROOT / "constraints.txt").read_text().split()]
    tested = {normalised(name): pinned for name, pinned in constraints}
    different = {name: (found, tested[name]) for name, found in locked().items() if tested.get(name, found) != found}
    assert different == {}


def test_everything_the_product_asks_for_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [
        *project["dependencies"],
        *(it for name in ("postgres", "tensorboard", "wandb", "mlflow", "otel") for it in extras[name]),
    ]
    found = locked()
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(found[normalised(requirement.name)]), requirement


def test_the_locked_torch_brings_the_cuda_of_the_image() -> None:
    found = locked()
    assert "+" not in found["torch"]  # a build for CPU would have a suffix
    assert found["cuda-toolkit"].startswith("13.0.") and any(name.startswith("nvidia-nccl-cu13") for name in found)
