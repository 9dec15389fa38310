"""What all tests share: no hub, no stray Ray, a GPU marker that skips where there is none."""

import gc
import os
from pathlib import Path
from typing import Any

# Before any import of ray or transformers: tests never look for a hub, and start their own Ray without token files.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors, and several test processes at a time
os.environ.pop("RAY_ADDRESS", None)

import hypothesis
import pytest

pytest_plugins = ("tests.shared_cluster",)

# A deadline is a timing assertion: on a loaded machine it fails for no fault of the code.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


# Collecting the tests imports every library: many objects, hardly any garbage. A search for it takes a fifth of that.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook, too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _skip_without_gpu([item for item in items if "gpu" in item.keywords])
    # The files that take longest begin first, so that all processes end at about the same time.
    places: dict[Path, int] = {}
    for item in items:
        places[item.path] = min(places.get(item.path, 2), _place(item))
    items.sort(key=lambda item: places[item.path])


@pytest.fixture(params=["bf16", "fp32"])
def product_type_on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies bf16 matrices, and as on one that multiplies them as fp32."""
    import torch

    from ft_service.model import cpu_products

    widened = {torch.bfloat16} if request.param == "fp32" else set()
    monkeypatch.setattr(cpu_products, "WIDENED_ON_CPU", widened)


def _skip_without_gpu(items: list[pytest.Item]) -> None:
    if not items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _place(item: pytest.Item) -> int:
    return 0 if "cluster" in item.keywords else 1 if "multiprocess" in item.keywords else 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For pytest-xdist, whose own groups (3.8) do nothing under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        """A file's tests share fixtures and go to one process, as do all files that use the session's cluster."""

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "cluster" if _uses_session_cluster(config.rootpath / file) else file

    return ByFile(config, log)


def _uses_session_cluster(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    takes_it = "cluster: Cluster" in text or "tests.shared_cluster" in text
    return "mark.cluster" in text and takes_it and "def cluster(" not in text
