"""Drivers that share a queue, all of them in this process."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ft_service.cluster.queue import turn as turn_module
from tests.cluster.queue.queue_cases import World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr("ft_service.runs.lease._SETTLE_SECONDS", 0.0)
    # All drivers are this process, which a lease takes for one of an earlier boot.
    monkeypatch.setattr("ft_service.runs.lease._has_ended", lambda holder: False)
    monkeypatch.setattr(turn_module.time, "sleep", lambda seconds: None)
    with ExitStack() as stack:
        yield World(tmp_path, stack)
