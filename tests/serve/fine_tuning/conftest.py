"""What tests of the fine-tuning API share."""

from pathlib import Path

import pytest

from tests.worlds import write_world


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model. No test changes it."""
    folder = tmp_path_factory.mktemp("base")
    write_world(folder)
    return folder / "base"
