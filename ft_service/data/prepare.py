"""Sources to a prepared dataset on storage: checked, tokenised, masked and packed once, before any worker starts.

The digest covers everything that the result depends on. So the same data is prepared once, and a changed file never
uses an old cache. Checked shards stay on storage until the dataset is complete: an interrupted preparation, or one that
the data gate stopped, continues with them.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ft_service.chat.format import CHAT_TEMPLATE
from ft_service.data.check import FINDINGS_FILE, CheckResult, Say, check_shards, judgement_for_run
from ft_service.data.dataset import (
    CHECK_FOLDER,
    JUDGEMENT_FILE,
    MANIFEST_FILE,
    DatasetManifest,
    PreparedDataset,
    open_dataset,
)
from ft_service.data.files.shard import FileShard
from ft_service.data.gate import EvaluationSets, Judgement, Source
from ft_service.data.gate.codes import RULES_VERSION
from ft_service.data.gate.records import place_key, read_questions
from ft_service.data.read import Scan, scan
from ft_service.data.tasks import (
    PackedGroup,
    RunTasks,
    ShardGroup,
    TaskContext,
    num_tokens_of,
    pack,
    run_locally,
    shards_folder,
)
from ft_service.errors import DataError, StorageError
from ft_service.plan.facts import DatasetFacts
from ft_service.registry.registry import DatasetRef
from ft_service.spec.schema import DataSource, RunSpec, ValidationFraction
from ft_service.storage.storage import Storage
from ft_service.text import counted

OnJudgement = Callable[[Judgement, Path], None]
"""Called with the judgement and the folder of its findings; raises to stop the preparation."""
OnDigest = Callable[[str, Mapping[str, str]], None]
"""Called with the digest of the dataset, and that of each source by its path."""

_LAYOUT_VERSION = 2
"""Part of every digest: another number prepares all data again."""
_GROUP_TOKENS = 2**25
"""Tokens that are packed together: enough that a partly filled row does not matter, in half a GiB of memory."""
_KEPT_IF_WAIVED = frozenset({"quality.exact-duplicate"})
"""Records with these codes can be trained on, and are if the spec waives the code."""
_MEASURED_BYTES = 2**22
"""`measure_dataset` prepares about this much of each source, and scales up."""


def prepare_dataset(
    spec: RunSpec,
    tokenizer: PreTrainedTokenizerBase,
    storage: Storage,
    say: Say = lambda text: None,
    run_tasks: RunTasks = run_locally,
    on_judgement: OnJudgement = lambda judgement, folder: None,
    on_digest: OnDigest = lambda digest, sources: None,
) -> PreparedDataset:
    """Prepare the spec's data, or open it if it is prepared already. `on_judgement` is called in both cases.

    `on_digest` is called first, before anything is written. Raises `DataError` if a file is missing or no record can be
    used, and whatever `on_judgement` and `on_digest` raise.
    """
    inputs = _Inputs(spec, [scan(number, source) for number, source in enumerate(all_sources(spec))])
    digest = _dataset_digest(inputs, tokenizer)
    on_digest(
        digest, {source.path: found.digest for source, found in zip(all_sources(spec), inputs.scans, strict=True)}
    )
    place = f"datasets/{digest}"
    if not storage.exists(f"{place}/{MANIFEST_FILE}"):
        try:
            _prepare(inputs, tokenizer, storage, place, say, run_tasks, on_judgement)
            return open_dataset(storage, digest)
        except (StorageError, OSError):
            if not storage.exists(f"{place}/{MANIFEST_FILE}"):
                raise  # otherwise another run has prepared the same data meanwhile, and deleted the shards
    say(f"Data: already prepared, {storage.uri(place)}")
    dataset = open_dataset(storage, digest)
    on_judgement(judgement_for_run(dataset.judgement, spec), storage.local_folder(place) / CHECK_FOLDER)
    return dataset


def check_dataset(
    spec: RunSpec,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    say: Say = lambda text: None,
    run_tasks: RunTasks = run_locally,
) -> Judgement:
    """Check the spec's data without preparing it, and write the files of `check_shards` into the existing `folder`.

    Without a tokenizer, checks that need tokens are skipped. Raises `DataError` if a file is missing.
    """
    inputs = _Inputs(spec, [scan(number, source) for number, source in enumerate(all_sources(spec))])
    with tempfile.TemporaryDirectory(prefix="ft-data-") as temporary:
        context = inputs.context(Storage(temporary), "check", tokenizer, writes_examples=False)
        result = check_shards(context, inputs.shards, run_tasks, folder, inputs.fraction, spec.train.seed, say)
    judgement = judgement_for_run(result.judgement, spec)
    (folder / JUDGEMENT_FILE).write_text(judgement.model_dump_json(indent=2), encoding="utf-8")
    return judgement


def group_dataset(spec: RunSpec, folder: Path, run_tasks: RunTasks = run_locally) -> tuple[np.ndarray, ...]:
    """`Gate.groups` of the spec's training data. Writes the files of `check_shards` into the existing `folder`."""
    inputs = _Inputs(spec, [scan(number, source) for number, source in enumerate(all_sources(spec))])
    with tempfile.TemporaryDirectory(prefix="ft-data-") as temporary:
        context = inputs.context(Storage(temporary), "check", None, writes_examples=False)
        result = check_shards(
            context, inputs.shards, run_tasks, folder, 0.0, spec.train.seed, lambda text: None, with_groups=True
        )
    assert result.groups is not None
    return result.groups


def measure_dataset(
    spec: RunSpec, tokenizer: PreTrainedTokenizerBase, on_judgement: OnJudgement = lambda judgement, folder: None
) -> DatasetFacts:
    """The facts of the spec's data; stores nothing. Only a part of large data is measured (then `exact` is False).

    `on_judgement` is called with the judgement of what is measured.
    """
    scans = [scan(number, source, _MEASURED_BYTES) for number, source in enumerate(all_sources(spec))]
    parts = [replace(scan, shards=scan.shards[:1]) for scan in scans]
    with tempfile.TemporaryDirectory(prefix="ft-data-") as temporary:
        storage = Storage(temporary)
        inputs = _Inputs(spec, parts)
        facts = _prepare(inputs, tokenizer, storage, "datasets/measured", lambda text: None, run_locally, on_judgement)
    if all(len(scan.shards) <= 1 for scan in scans):
        return facts.model_copy(update={"digest": "not prepared"})
    train_scale = _scale(scans[: len(spec.data.train)])
    validation_scale = _scale(scans[len(spec.data.train) :]) if isinstance(spec.data.validation, list) else train_scale
    counts = {
        name: round(value * (validation_scale if name.startswith("validation_") else train_scale))
        for name, value in facts.model_dump(exclude={"digest", "exact"}).items()
    }
    return facts.model_copy(update={**counts, "digest": "not prepared", "exact": False})


def all_sources(spec: RunSpec) -> list[DataSource]:
    """The training sources of a spec, then its validation sources."""
    validation = spec.data.validation
    return [*spec.data.train, *(validation if isinstance(validation, list) else [])]


# -- preparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    """A spec and the scans of its sources."""

    spec: RunSpec
    scans: Sequence[Scan]

    @property
    def shards(self) -> list[FileShard]:
        return [shard for scan in self.scans for shard in scan.shards]

    @property
    def fraction(self) -> float:
        validation = self.spec.data.validation
        return validation.fraction if isinstance(validation, ValidationFraction) else 0.0

    @property
    def keep(self) -> frozenset[str]:
        return _KEPT_IF_WAIVED & frozenset(self.spec.data.waive)

    def context(
        self, storage: Storage, folder: str, tokenizer: PreTrainedTokenizerBase | None, writes_examples: bool = True
    ) -> TaskContext:
        spec = self.spec
        sources = all_sources(spec)
        evaluation = [
            (source.path, read_questions(number, source)) for number, source in enumerate(spec.data.evaluation)
        ]
        return TaskContext(
            storage=storage,
            folder=folder,
            inputs=tuple(sources),
            num_train=len(spec.data.train),
            sources=tuple(Source.of(source, scan) for source, scan in zip(sources, self.scans, strict=True)),
            tokenizer=tokenizer,
            max_seq_len=spec.data.max_seq_len,
            evaluation=EvaluationSets(evaluation) if evaluation else None,
            keep=self.keep,
            packing=spec.data.packing,
            writes_examples=writes_examples,
        )


def _prepare(
    inputs: _Inputs,
    tokenizer: PreTrainedTokenizerBase,
    storage: Storage,
    place: str,
    say: Say,
    run_tasks: RunTasks,
    on_judgement: OnJudgement,
) -> DatasetFacts:
    spec = inputs.spec
    shards = inputs.shards
    say(f"Data: reading, checking and tokenising {counted(len(shards), 'shard')}")
    context = inputs.context(storage, place, tokenizer)
    with tempfile.TemporaryDirectory(prefix="ft-data-") as temporary:
        folder = Path(temporary, CHECK_FOLDER)
        folder.mkdir()
        result = check_shards(context, shards, run_tasks, folder, inputs.fraction, spec.train.seed, say)
        on_judgement(judgement_for_run(result.judgement, spec), folder)
        if not (~result.held_out).any():
            raise _nothing_usable(result.judgement, folder)
        groups = list(_groups(context, shards, result))
        packed = []
        for number, group in enumerate(run_tasks(pack, context, groups), start=1):
            packed.append(group)
            num_rows = sum(group.rows[0] for group in packed)
            say(f"Data: packed group {number} of {len(groups)}, {counted(num_rows, 'training row')} so far")
        storage.put_folder(folder, f"{place}/{CHECK_FOLDER}", marker=JUDGEMENT_FILE)
    facts = _facts(place.rpartition("/")[2], packed)
    sources = [
        DatasetRef(
            path=source.path, source=source.source, license=source.license, records=count.read, digest=scan.digest
        )
        for source, scan, count in zip(context.inputs, inputs.scans, result.judgement.sources, strict=True)
    ]
    storage.write_json(
        f"{place}/{MANIFEST_FILE}", DatasetManifest(facts=facts, sources=sources).model_dump(mode="json")
    )
    storage.delete(shards_folder(place))
    return facts


def _groups(context: TaskContext, shards: Sequence[FileShard], result: CheckResult) -> Iterator[ShardGroup]:
    """Groups of neighbouring shards, large enough to fill rows well, with their used records."""
    starts = [place_key(shard.source, shard.file, shard.first) for shard in shards]
    starts.append(2**64 - 1)
    members: list[int] = []
    tokens = 0
    count = 0
    for number in range(len(shards)):
        members.append(number)
        tokens += num_tokens_of(context, number)
        if tokens >= _GROUP_TOKENS or number == len(shards) - 1:
            bounds = np.array([starts[members[0]], starts[number + 1]], dtype=np.uint64)
            first, last = np.searchsorted(result.keys, bounds)
            yield ShardGroup(count, tuple(members), result.keys[first:last], result.held_out[first:last])
            members = []
            tokens = 0
            count += 1


def _facts(digest: str, packed: Sequence[PackedGroup]) -> DatasetFacts:
    def total(name: str, split: int) -> int:
        return sum(getattr(group, name)[split] for group in packed)

    return DatasetFacts(
        digest=digest,
        conversations=total("conversations", 0),
        rows=total("rows", 0),
        tokens=total("tokens", 0),
        loss_tokens=total("loss_tokens", 0),
        truncated=total("truncated", 0),
        validation_conversations=total("conversations", 1),
        validation_rows=total("rows", 1),
        validation_tokens=total("tokens", 1),
        validation_loss_tokens=total("loss_tokens", 1),
    )


def _nothing_usable(judgement: Judgement, folder: Path) -> DataError:
    if judgement.read == 0:
        return DataError("data.train: has no records. Name a file that has records.")
    lines = (folder / FINDINGS_FILE).read_text(encoding="utf-8").splitlines()[:10]
    findings = [json.loads(line) for line in lines]
    first = "\n".join(f"  - {finding['file']}:{finding['line']}: {finding['detail']}" for finding in findings)
    records = f"None of {counted(judgement.read, 'record')}"
    return DataError(f"data.train: {records} can be trained on. Fix them; the first findings:\n{first}")


def _scale(scans: Sequence[Scan]) -> float:
    """The bytes of these sources, relative to those of their first shards."""
    parts = sum(shard.end - shard.start for scan in scans for shard in scan.shards[:1])
    return sum(shard.end - shard.start for scan in scans for shard in scan.shards) / max(1, parts)


def _dataset_digest(inputs: _Inputs, tokenizer: PreTrainedTokenizerBase) -> str:
    spec = inputs.spec
    evaluation = [scan(number, source) for number, source in enumerate(spec.data.evaluation)]

    def identity_of(source: DataSource, scan: Scan) -> dict[str, Any]:
        # With the names, because findings show them.
        return {
            "digest": scan.digest,
            "path": source.path,
            "files": scan.files,
            "foreign": scan.foreign,
            "format": source.format,
            "columns": source.columns,
        }

    identity = {
        "version": [_LAYOUT_VERSION, RULES_VERSION],
        "sources": [
            {**identity_of(source, scan), "source": source.source, "license": source.license}
            for source, scan in zip(all_sources(spec), inputs.scans, strict=True)
        ],
        "evaluation": [
            identity_of(source, scan) for source, scan in zip(spec.data.evaluation, evaluation, strict=True)
        ],
        "train_sources": len(spec.data.train),
        "fraction": inputs.fraction or None,
        "keep": sorted(inputs.keep),
        "seed": spec.train.seed,
        "max_seq_len": spec.data.max_seq_len,
        "packing": spec.data.packing,
        "template": CHAT_TEMPLATE,
        "tokenizer": _tokenizer_digest(tokenizer),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any]
    if backend is None:
        content = tokenizer.get_vocab()
    else:  # without truncation and padding, which the last call set
        content = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    content = {"tokenizer": content, "special": [tokenizer.bos_token_id, tokenizer.eos_token_id]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
