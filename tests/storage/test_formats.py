"""Stored files: those of earlier versions are read, those of later ones are rejected clearly."""

import json
from pathlib import Path
from typing import Any

import pytest

from ft_service.data.dataset import DatasetManifest
from ft_service.data.gate.findings import Judgement
from ft_service.errors import StorageError
from ft_service.plan.plan import RunPlan
from ft_service.registry.index import IndexHeader
from ft_service.registry.registry import AdapterRecord, Tombstone
from ft_service.registry.servers import ServerNotice
from ft_service.runs.folder import DataCheck, Outcome, RunDataset, RunFolder, RunStatus
from ft_service.storage.formats import StoredFile
from ft_service.storage.storage import Storage
from ft_service.train.checkpoints.manifest import Checkpoints, Manifest

FORMATS = Path(__file__).resolve().parents[1] / "formats"
"""A file of each kind, in the folder of the first format that it had."""

FIRST_KINDS: dict[str, type[StoredFile]] = {
    "record": AdapterRecord,
    "plan": RunPlan,
    "status": RunStatus,
    "outcome": Outcome,
    "dataset": RunDataset,
    "gate": DataCheck,
    "checkpoint-manifest": Manifest,
    "dataset-manifest": DatasetManifest,
    "judgement": Judgement,
}
"""Files that version 0.1.0 wrote, without a number."""
KINDS = {**FIRST_KINDS, "tombstone": Tombstone, "server-notice": ServerNotice, "index-header": IndexHeader}


def stored(name: str) -> dict[str, Any]:
    first = 1 if name in FIRST_KINDS else 2
    content: dict[str, Any] = json.loads((FORMATS / str(first) / f"{name}.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("name", FIRST_KINDS)
def test_the_first_format_is_read(name: str) -> None:
    assert "format" not in stored(name)
    assert KINDS[name].parse(stored(name), name).format == 2


@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_today_is_read_back_the_same(name: str) -> None:
    content = KINDS[name].parse(stored(name), name)
    written = content.model_dump_json()
    assert json.loads(written)["format"] == 2
    assert KINDS[name].parse(written.encode(), name) == content


@pytest.mark.parametrize("name", KINDS)
def test_a_newer_format_is_rejected_with_a_fix(name: str) -> None:
    with pytest.raises(StorageError, match=r"s3://b/x\.json: has format 3(?s:.*)Use the version of ft-service"):
        KINDS[name].parse({**stored(name), "format": 3}, "s3://b/x.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b'{"format": "two"}', b'{"format": 2}', b"\xff"])
@pytest.mark.parametrize("name", KINDS)
def test_damaged_content_is_an_error_that_names_the_file(name: str, content: bytes) -> None:
    with pytest.raises(StorageError, match=r"^runs/r/x\.json: "):
        KINDS[name].parse(content, "runs/r/x.json")


def test_values_of_the_first_format_keep_their_meaning() -> None:
    plan = RunPlan.parse(stored("plan"), "plan")
    assert plan.summary == stored("plan")["said"]
    assert plan.dataset.rows == 17 and RunDataset.parse(stored("dataset"), "dataset").facts == plan.dataset
    manifest = Manifest.parse(stored("checkpoint-manifest"), "manifest")
    assert manifest.training_digest == stored("checkpoint-manifest")["course"]
    assert manifest.parts[0].rng_offset == stored("checkpoint-manifest")["parts"][0]["random_at"]
    assert Outcome.parse(stored("outcome"), "outcome").training_digest == stored("outcome")["course"]


def test_a_run_of_the_first_format_can_be_resumed() -> None:
    """Its plan, made anew, must not count as another training."""
    plan = RunPlan.parse(stored("plan"), "plan")
    assert plan.training_digest == stored("checkpoint-manifest")["course"]


def test_checkpoints_of_a_newer_version_are_not_taken_for_none(tmp_path: Path) -> None:
    run = RunFolder(Storage(str(tmp_path)), "r")
    run.storage.write_json(f"{run.path}/checkpoints/index.json", {"format": 3, "entries": []})
    with pytest.raises(StorageError, match=r"index\.json: has format 3"):
        Checkpoints(run).entries()
