"""Stored files: those of earlier versions are read, those of later ones are rejected clearly."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ft_service.cluster.queue.entry import Entry
from ft_service.cluster.queue.snapshot import Snapshot
from ft_service.data.dataset import DatasetManifest
from ft_service.data.gate.findings import Judgement
from ft_service.errors import NewerFormatError, StorageError
from ft_service.plan.plan import RunPlan
from ft_service.registry.index import IndexHeader
from ft_service.registry.registry import AdapterRecord, Tombstone
from ft_service.registry.servers import ServerNotice
from ft_service.runs.events import EventLog
from ft_service.runs.folder import DataCheck, Outcome, RunDataset, RunFolder, RunStatus
from ft_service.storage.formats import StoredFile
from ft_service.storage.storage import Storage
from ft_service.train.checkpoints.manifest import Checkpoints, Manifest
from ft_service.train.checkpoints.resume import resume
from ft_service.train.parallel import Parallel
from serve.voting.files import AddedFile, ClosedFile, RaterFile, RevealedFile, StudyFile, VoteFile, WithdrawnFile

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
KINDS: dict[str, type[StoredFile]] = {
    **FIRST_KINDS,
    "tombstone": Tombstone,
    "server-notice": ServerNotice,
    "index-header": IndexHeader,
    "queue-entry": Entry,
    "queue-snapshot": Snapshot,
    "study": StudyFile,
    "study-rater": RaterFile,
    "study-added": AddedFile,
    "study-vote": VoteFile,
    "study-withdrawn": WithdrawnFile,
    "study-revealed": RevealedFile,
    "study-closed": ClosedFile,
}
LATER_FILES = {(2, "plan"), (2, "checkpoint-manifest"), (3, "plan"), (3, "checkpoint-manifest")}
"""Files of kinds that have changed since, in the folders of their formats."""


def stored(name: str, written: int | None = None) -> dict[str, Any]:
    first = 1 if name in FIRST_KINDS else 2
    file = FORMATS / str(written or first) / f"{name}.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def current(name: str) -> int:
    """The format that is written today."""
    return 3 if (3, name) in LATER_FILES else 2


def overlaid(parsed: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """`parsed` with every value that the file has; a setting that is newer than the file has its default."""
    new = {name: value for name, value in parsed.items() if name not in content}
    return new | {
        name: overlaid(parsed[name], value) if isinstance(value, dict) else value for name, value in content.items()
    }


@pytest.mark.parametrize("name", FIRST_KINDS)
def test_the_first_format_is_read(name: str) -> None:
    assert "format" not in stored(name)
    assert KINDS[name].parse(stored(name), name).format == current(name)


@pytest.mark.parametrize(("written", "name"), sorted(LATER_FILES))
def test_a_later_format_is_read(written: int, name: str) -> None:
    content = stored(name, written)
    assert content["format"] == written
    parsed = KINDS[name].parse(content, name).model_dump(mode="json")
    assert parsed == {**overlaid(parsed, content), "format": current(name)}


def test_a_checkpoint_of_the_second_format_has_one_part_a_rank_and_of_the_third_several() -> None:
    second = Manifest.parse(stored("checkpoint-manifest", 2), "manifest")
    assert [part.file for part in second.parts] == ["part-00000-of-00001.safetensors"]
    third = Manifest.parse(stored("checkpoint-manifest", 3), "manifest")
    assert len(third.parts) > 1 and [bool(part.rng_bytes) for part in third.parts].index(True) == len(third.parts) - 1


def test_a_plan_of_the_second_format_recomputes_every_layer_as_it_did() -> None:
    assert "kept_layers" not in stored("plan", 2)
    assert RunPlan.parse(stored("plan", 2), "plan").kept_layers == 0


@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_today_is_read_back_the_same(name: str) -> None:
    content = KINDS[name].parse(stored(name), name)
    written = content.model_dump_json()
    assert json.loads(written)["format"] == current(name)
    assert KINDS[name].parse(written.encode(), name) == content


@pytest.mark.parametrize("name", KINDS)
def test_a_newer_format_is_rejected_with_a_fix(name: str) -> None:
    newer = current(name) + 1
    with pytest.raises(NewerFormatError) as caught:
        KINDS[name].parse({**stored(name), "format": newer}, "s3://b/x.json")
    assert str(caught.value) == (
        f"s3://b/x.json: a newer version of ft-service wrote it (format {newer}; this version reads formats up to "
        f"{newer - 1}). Use that version, or a newer one."
    )


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
    with pytest.raises(NewerFormatError, match=r"index\.json: a newer version of ft-service wrote it"):
        Checkpoints(run).entries()


@pytest.mark.parametrize("damaged_index", [False, True])
def test_a_checkpoint_of_a_newer_version_is_not_skipped_as_damaged(tmp_path: Path, damaged_index: bool) -> None:
    run = RunFolder(Storage(str(tmp_path)), "r")
    checkpoints = Checkpoints(run)
    older = Manifest.parse(stored("checkpoint-manifest", 3), "manifest")
    checkpoints.commit("older", older)
    checkpoints.commit("newer", older.model_copy(update={"step": older.step + 1, "format": 4}))
    if damaged_index:
        run.storage.write_bytes(f"{run.path}/checkpoints/index.json", b"{")
    with pytest.raises(NewerFormatError, match=r"newer/manifest\.json: a newer version of ft-service wrote it"):
        checkpoints.manifest(checkpoints.entries()[-1])
    rank = cast(Parallel, SimpleNamespace(is_rank_zero=True, broadcast_from_rank_zero=lambda value: value))
    rank.all_gather_object = lambda value: [value]  # type: ignore[method-assign]
    plan = RunPlan.parse(stored("plan", 3), "plan")
    with pytest.raises(NewerFormatError):
        resume(run, rank, plan, EventLog(run.storage, "r"))
