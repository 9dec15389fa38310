"""Sources to a prepared dataset on storage: judged, tokenised, masked and packed once, before any worker starts.

    <storage>/datasets/<digest>/   rows-00000/{train,validation}.arrow ...   manifest.json
                                   judged/{judgement.json, findings.jsonl, quarantine.jsonl}

The digest covers everything the result depends on, so the same data is prepared once and a changed file never meets an
old cache. Shards that were examined wait beside the rows until all is done: a preparation that was interrupted, or that
the gate refused, goes on from them.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ft_service.chat.format import CHAT_TEMPLATE
from ft_service.data.check import FINDINGS_FILE, JUDGEMENT_FILE, Judged, Say, for_run, judge_shards
from ft_service.data.gate import EvaluationSets, Judgement, Source
from ft_service.data.gate.codes import RULES_VERSION
from ft_service.data.gate.records import place_key, read_questions
from ft_service.data.read import Scan, Shard, scan
from ft_service.data.tasks import ROWS, Group, Packed, Run, Work, here, pack, preparing, tokens_of
from ft_service.errors import DataError, StorageError
from ft_service.plan.facts import DatasetFacts
from ft_service.registry.registry import DatasetRef
from ft_service.spec.schema import DataSource, RunSpec, ValidationFraction
from ft_service.storage.storage import Storage
from ft_service.text import counted

Gate = Callable[[Judgement, Path], None]
"""Told the judgement and the folder with all its findings; raises where the data shall not be trained on."""

_FORMAT_VERSION = 2
_MANIFEST = "manifest.json"
_JUDGED = "judged"
_GROUP_TOKENS = 2**25
"""Packed together: enough that a row or two left open make no difference, in half a GiB of memory."""
_WAIVED_IS_KEPT = frozenset({"quality.exact-duplicate"})
"""Records that can be trained on, and are where the spec waives the code."""
_MEASURED_BYTES = 2**22
"""Of each source, `measure_dataset` prepares about so much, and scales up."""


@dataclass(frozen=True)
class Row:
    """One packed sequence: ids int32 [T], loss mask bool [T], and the lengths int32 [D] of its documents (sum T)."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    document_lengths: np.ndarray


class RowTable:
    """Packed rows in Arrow files, memory-mapped: opening costs nothing, and processes of a node share the pages."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._tables = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
        self._ends = np.cumsum([table.num_rows for table in self._tables])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Row:
        number = int(np.searchsorted(self._ends, index, side="right"))
        table = self._tables[number]
        at = index - int(self._ends[number]) + table.num_rows
        ids, mask, lengths = (table.column(name)[at].values.to_numpy(zero_copy_only=False) for name in ROWS.names)
        return Row(ids, mask, lengths)


@dataclass(frozen=True)
class PreparedDataset:
    """A dataset as workers read it."""

    digest: str
    facts: DatasetFacts
    sources: list[DatasetRef]
    train: RowTable
    validation: RowTable | None
    judgement: Judgement


def prepare_dataset(
    spec: RunSpec,
    tokenizer: PreTrainedTokenizerBase,
    storage: Storage,
    say: Say = lambda text: None,
    run: Run = here,
    gate: Gate = lambda judgement, folder: None,
) -> PreparedDataset:
    """Prepare the spec's data, or open it if that was done before; `gate` sees its judgement in both cases.

    Raises `DataError` where a file is missing or no record can be used, and whatever `gate` raises.
    """
    inputs = _Inputs(spec, [scan(number, source) for number, source in enumerate(all_sources(spec))])
    digest = _dataset_digest(inputs, tokenizer)
    place = f"datasets/{digest}"
    if not storage.exists(f"{place}/{_MANIFEST}"):
        try:
            _prepare(inputs, tokenizer, storage, place, say, run, gate)
            return open_dataset(storage, digest)
        except (StorageError, OSError):
            if not storage.exists(f"{place}/{_MANIFEST}"):
                raise  # otherwise another run prepared the same data meanwhile, and has tidied up
    say(f"Data: prepared before, {storage.uri(place)}")
    dataset = open_dataset(storage, digest)
    gate(for_run(dataset.judgement, spec), storage.local_folder(place) / _JUDGED)
    return dataset


def judge_dataset(
    spec: RunSpec,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    say: Say = lambda text: None,
    run: Run = here,
) -> Judgement:
    """Judge the spec's data without preparing it; the files of `judging` go to `folder`, which must exist.

    Without a tokenizer nothing that takes tokens is judged. Raises `DataError` where a file is missing.
    """
    inputs = _Inputs(spec, [scan(number, source) for number, source in enumerate(all_sources(spec))])
    with tempfile.TemporaryDirectory(prefix="ft-data-") as temporary:
        work = inputs.work(Storage(temporary), "judged", tokenizer, writes_examples=False)
        judged = judge_shards(work, inputs.shards, run, folder, inputs.fraction, spec.train.seed, say)
    judgement = for_run(judged.judgement, spec)
    (folder / JUDGEMENT_FILE).write_text(judgement.model_dump_json(indent=2), encoding="utf-8")
    return judgement


def open_dataset(storage: Storage, digest: str) -> PreparedDataset:
    """A dataset that was prepared before; raises `StorageError` if it is not there."""
    manifest = storage.read_json(f"datasets/{digest}/{_MANIFEST}")
    folder = storage.local_folder(f"datasets/{digest}")
    train, validation = (sorted(folder.glob(f"rows-*/{split}.arrow")) for split in ("train", "validation"))
    judgement = (folder / _JUDGED / JUDGEMENT_FILE).read_text(encoding="utf-8")
    return PreparedDataset(
        digest=digest,
        facts=DatasetFacts.model_validate(manifest["facts"]),
        sources=[DatasetRef.model_validate(source) for source in manifest["sources"]],
        train=RowTable(train),
        validation=RowTable(validation) if validation else None,
        judgement=Judgement.model_validate_json(judgement),
    )


def measure_dataset(spec: RunSpec, tokenizer: PreTrainedTokenizerBase) -> DatasetFacts:
    """The facts of the spec's data, without leaving anything; of large data only a part is measured (`exact` False)."""
    scans = [scan(number, source, _MEASURED_BYTES) for number, source in enumerate(all_sources(spec))]
    parts = [replace(found, shards=found.shards[:1]) for found in scans]
    with tempfile.TemporaryDirectory(prefix="ft-data-") as temporary:
        storage, inputs = Storage(temporary), _Inputs(spec, parts)
        facts = _prepare(inputs, tokenizer, storage, "datasets/measured", lambda text: None, here, lambda *_: None)
    if all(len(found.shards) <= 1 for found in scans):
        return facts.model_copy(update={"digest": "not prepared"})
    train_scale = _scale(scans[: len(spec.data.train)])
    validation_scale = _scale(scans[len(spec.data.train) :]) if isinstance(spec.data.validation, list) else train_scale
    counts = {
        name: round(value * (validation_scale if name.startswith("validation_") else train_scale))
        for name, value in facts.model_dump(exclude={"digest", "exact"}).items()
    }
    return facts.model_copy(update={**counts, "digest": "not prepared", "exact": False})


def all_sources(spec: RunSpec) -> list[DataSource]:
    """Training sources, then validation sources."""
    validation = spec.data.validation
    return [*spec.data.train, *(validation if isinstance(validation, list) else [])]


# -- preparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    """A spec's sources, each scanned."""

    spec: RunSpec
    scans: Sequence[Scan]

    @property
    def shards(self) -> list[Shard]:
        return [shard for scan in self.scans for shard in scan.shards]

    @property
    def fraction(self) -> float:
        validation = self.spec.data.validation
        return validation.fraction if isinstance(validation, ValidationFraction) else 0.0

    @property
    def keep(self) -> frozenset[str]:
        return _WAIVED_IS_KEPT & frozenset(self.spec.data.waive)

    def work(
        self, storage: Storage, folder: str, tokenizer: PreTrainedTokenizerBase | None, writes_examples: bool = True
    ) -> Work:
        spec, sources = self.spec, all_sources(self.spec)
        held = [(source.path, read_questions(number, source)) for number, source in enumerate(spec.data.evaluation)]
        return Work(
            storage=storage,
            folder=folder,
            inputs=tuple(sources),
            num_train=len(spec.data.train),
            sources=tuple(Source.of(source, scan) for source, scan in zip(sources, self.scans, strict=True)),
            tokenizer=tokenizer,
            max_seq_len=spec.data.max_seq_len,
            evaluation=EvaluationSets(held) if held else None,
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
    run: Run,
    gate: Gate,
) -> DatasetFacts:
    spec, shards = inputs.spec, inputs.shards
    say(f"Data: reading, judging and tokenising, {counted(len(shards), 'shard')}")
    work = inputs.work(storage, place, tokenizer)
    with tempfile.TemporaryDirectory(prefix="ft-data-") as temporary:
        folder = Path(temporary, _JUDGED)
        folder.mkdir()
        judged = judge_shards(work, shards, run, folder, inputs.fraction, spec.train.seed, say)
        gate(for_run(judged.judgement, spec), folder)
        if not (~judged.held_out).any():
            raise _nothing_usable(judged.judgement, folder)
        groups = list(_groups(work, shards, judged))
        packed = []
        for number, found in enumerate(run(pack, work, groups), start=1):
            packed.append(found)
            say(f"Data: packed {number} of {len(groups)}, {sum(done.rows[0] for done in packed):,} rows")
        storage.put_folder(folder, f"{place}/{_JUDGED}", marker=JUDGEMENT_FILE)
    facts = _facts(place.rpartition("/")[2], packed)
    sources = [
        DatasetRef(
            path=source.path, source=source.source, license=source.license, records=told.read, digest=found.digest
        )
        for source, found, told in zip(work.inputs, inputs.scans, judged.judgement.sources, strict=True)
    ]
    manifest = {
        "format_version": _FORMAT_VERSION,
        "facts": facts.model_dump(mode="json"),
        "sources": [source.model_dump(mode="json") for source in sources],
    }
    storage.write_json(f"{place}/{_MANIFEST}", manifest)
    storage.delete(preparing(place))
    return facts


def _groups(work: Work, shards: Sequence[Shard], judged: Judged) -> Iterator[Group]:
    """Neighbouring shards, so many that they fill rows well, with their records that are used."""
    starts = [place_key(shard.source, shard.file, shard.first) for shard in shards]
    starts.append(2**64 - 1)
    members: list[int] = []
    tokens = count = 0
    for number in range(len(shards)):
        members.append(number)
        tokens += tokens_of(work, number)
        if tokens >= _GROUP_TOKENS or number == len(shards) - 1:
            bounds = np.array([starts[members[0]], starts[number + 1]], dtype=np.uint64)
            first, last = np.searchsorted(judged.keys, bounds)
            yield Group(count, tuple(members), judged.keys[first:last], judged.held_out[first:last])
            members, tokens, count = [], 0, count + 1


def _facts(digest: str, packed: Sequence[Packed]) -> DatasetFacts:
    def total(name: str, split: int) -> int:
        return sum(getattr(found, name)[split] for found in packed)

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
        return DataError("data.train: holds no records. Name a file that has some.")
    lines = (folder / FINDINGS_FILE).read_text(encoding="utf-8").splitlines()[:10]
    told = [json.loads(line) for line in lines]
    first = "\n".join(f"  - {found['file']}:{found['line']}: {found['detail']}" for found in told)
    return DataError(f"None of {judgement.read:,} records can be trained on. Mend them:\n{first}")


def _scale(scans: Sequence[Scan]) -> float:
    """All of these sources against the first shard of each."""
    parts = sum(shard.end - shard.start for scan in scans for shard in scan.shards[:1])
    return sum(shard.end - shard.start for scan in scans for shard in scan.shards) / max(1, parts)


def _dataset_digest(inputs: _Inputs, tokenizer: PreTrainedTokenizerBase) -> str:
    spec = inputs.spec
    evaluation = [scan(number, source) for number, source in enumerate(spec.data.evaluation)]

    def identity_of(source: DataSource, found: Scan) -> dict[str, Any]:
        # The names too, since findings tell them.
        return {
            "digest": found.digest,
            "path": source.path,
            "files": found.files,
            "foreign": found.foreign,
            "format": source.format,
            "columns": source.columns,
        }

    identity = {
        "version": [_FORMAT_VERSION, RULES_VERSION],
        "sources": [
            {**identity_of(source, found), "source": source.source, "license": source.license}
            for source, found in zip(all_sources(spec), inputs.scans, strict=True)
        ],
        "evaluation": [identity_of(s, found) for s, found in zip(spec.data.evaluation, evaluation, strict=True)],
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
    else:  # without what the last call asked for, which is no part of the tokenizer
        content = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    content = {"tokenizer": content, "special": [tokenizer.bos_token_id, tokenizer.eos_token_id]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
