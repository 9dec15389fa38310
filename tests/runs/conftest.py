from pathlib import Path

import pytest

from ft_service.storage.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Storage in a folder that writes as it does to an object store."""
    monkeypatch.setattr(Storage, "is_local", property(lambda self: False))
    return Storage(str(tmp_path))
