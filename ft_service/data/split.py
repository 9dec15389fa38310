"""Splits data into training and validation without leaks: records that ask or say the same stay on one side.

OUT/train/0-NAME.jsonl ...        OUT/validation/0-NAME.jsonl ...        OUT/decisions/, as `clean` writes it
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from ft_service.data.check import FINDINGS_FILE
from ft_service.data.clean import Cleaned, clean, sources_at
from ft_service.data.gate.records import place_key
from ft_service.data.gate.text import mixed
from ft_service.data.prepare import check_dataset, group_dataset
from ft_service.data.read import DECISIONS_FOLDER, VALIDATION_FOLDER
from ft_service.data.tasks import RunTasks, run_locally
from ft_service.errors import DataError, UsageError
from ft_service.spec.schema import DataSource, RunSpec

TRAIN_FOLDER = "train"
_ROUNDS = 10
"""The check of the finished split may compare other pairs than the first one did; what it finds is moved."""


@dataclass(frozen=True)
class Split:
    """What `split` wrote."""

    cleaned: Cleaned
    train: int
    """Records for training."""
    validation: int
    groups: int
    """Groups of records that ask or say the same, of two records or more."""


def split(
    spec: RunSpec, out: Path, fraction: float, run_tasks: RunTasks = run_locally, redact_private: bool = False
) -> Split:
    """Clean the training sources, and write them into the new folder `out`, split so that the gate finds no leak.

    About `fraction` of the records is for validation, chosen by `train.seed` and content. Raises `UsageError` if `out`
    exists or the spec names validation sources, and `DataError` if there are fewer than two groups of records.
    """
    if out.exists():
        raise UsageError(f"OUT = {str(out)!r}: already exists. Name a new folder.")
    if isinstance(spec.data.validation, list):
        raise UsageError("data.validation: names sources, so the data is split already. Remove it from the spec.")
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"validation": None})})
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary)
        cleaned = clean(spec, folder / "cleaned", run_tasks, redact_private=redact_private)
        names = [file for _, file in cleaned.files]
        whole = _spec_of(spec, [folder / "cleaned" / name for name in names])
        (folder / "check").mkdir()
        keys, firsts, contents = group_dataset(whole, folder / "check", run_tasks)
        held_out = choose(firsts, contents, fraction, spec.train.seed)
        for round_number in count(1):
            copy = folder / f"split-{round_number}"
            places = _write(folder / "cleaned", names, copy, dict(zip(keys.tolist(), held_out.tolist(), strict=True)))
            leaked = _leaked(_split_spec(spec, copy, names), folder / "check", run_tasks, places)
            if not leaked:
                break
            if round_number == _ROUNDS:
                raise DataError(f"{len(leaked)} records still leak after {_ROUNDS} attempts to split the data.")
            held_out |= np.isin(firsts, firsts[np.isin(keys, np.array(sorted(leaked), dtype=np.uint64))])
        if held_out.all() or not held_out.any():
            raise DataError("The data has fewer than two groups of different records, so it cannot be split.")
        (folder / "cleaned" / DECISIONS_FOLDER).rename(copy / DECISIONS_FOLDER)
        copy.rename(out)
    _, sizes = np.unique(firsts, return_counts=True)
    return Split(cleaned, int((~held_out).sum()), int(held_out.sum()), int((sizes > 1).sum()))


def split_sources(spec: RunSpec, out: Path, done: Split) -> tuple[list[DataSource], list[DataSource]]:
    """The training and the validation sources of a spec that uses the split in `out`."""
    train, validation = (
        sources_at(spec.data.train, [out / side / file for _, file in done.cleaned.files])
        for side in (TRAIN_FOLDER, VALIDATION_FOLDER)
    )
    return train, validation


def choose(firsts: np.ndarray, contents: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which records are held out, bool [N]: whole groups, in an order by seed and content, up to `fraction`.

    `firsts` identify the group of each record, and `contents` are hashes that decide the order of the groups.
    """
    _, first, group, sizes = np.unique(firsts, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(mixed(contents[first] ^ mixed(np.array([seed + 1], dtype=np.uint64))), kind="stable")
    wanted = max(1, round(fraction * len(firsts)))
    is_chosen = np.zeros(len(sizes), dtype=bool)
    total = 0
    for number in order.tolist():
        if total + sizes[number] <= wanted:
            is_chosen[number] = True
            total += int(sizes[number])
    if not total and len(sizes) > 1:
        is_chosen[np.argmin(sizes)] = True  # every group is larger than the fraction
    return np.asarray(is_chosen[group])


def _write(cleaned: Path, names: Sequence[str], out: Path, held_out: dict[int, bool]) -> dict[str, list[int]]:
    """Write the split; returns the keys of the records of each training file, in order."""
    places: dict[str, list[int]] = {}
    for source, name in enumerate(names):
        files = [out / side / name for side in (TRAIN_FOLDER, VALIDATION_FOLDER)]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        kept = places.setdefault(str(files[0]), [])
        with (
            (cleaned / name).open(encoding="utf-8", newline="\n") as lines,
            files[0].open("w", encoding="utf-8") as train,
            files[1].open("w", encoding="utf-8") as validation,
        ):
            for number, line in enumerate(lines, 1):
                key = place_key(source, 0, number)
                if held_out[key]:
                    validation.write(line)
                else:
                    kept.append(key)
                    train.write(line)
        for file in files:
            if file.stat().st_size == 0:
                file.unlink()  # a source without records fails the check
    return places


def _leaked(spec: RunSpec, folder: Path, run_tasks: RunTasks, places: dict[str, list[int]]) -> set[int]:
    """Keys of the training records that the gate finds in validation too."""
    if not spec.data.train or not spec.data.validation:
        return set()
    check_dataset(spec, None, folder, run_tasks=run_tasks)
    with (folder / FINDINGS_FILE).open(encoding="utf-8") as stream:
        findings = [json.loads(line) for line in stream]
    return {places[one["file"]][one["line"] - 1] for one in findings if one["code"] == "leak.validation"}


def _split_spec(spec: RunSpec, folder: Path, names: Sequence[str]) -> RunSpec:
    """The spec with the files of a split."""
    train = _spec_of(spec, [folder / TRAIN_FOLDER / name for name in names])
    validation = _spec_of(spec, [folder / VALIDATION_FOLDER / name for name in names])
    return train.model_copy(update={"data": train.data.model_copy(update={"validation": validation.data.train})})


def _spec_of(spec: RunSpec, files: Sequence[Path]) -> RunSpec:
    """The spec with these files as its training sources; files that do not exist are skipped."""
    sources: list[DataSource] = [
        source.model_copy(update={"path": str(file)})
        for source, file in zip(spec.data.train, files, strict=True)
        if file.exists()
    ]
    return spec.model_copy(update={"data": spec.data.model_copy(update={"train": sources})})
