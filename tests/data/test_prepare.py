"""Preparing: every example is in one packed row, the same data is prepared once, and a failure leaves nothing."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from ft_service.chat.format import ChatFormat, Message, encode_texts
from ft_service.data import prepare, tasks
from ft_service.data.dataset import PreparedDataset, Row, RowTable, open_dataset
from ft_service.data.files.shard import FileShard
from ft_service.data.gate import Judgement, Record, records_of
from ft_service.data.prepare import measure_dataset, prepare_dataset
from ft_service.data.read import scan
from ft_service.errors import DataError, StorageError
from ft_service.model.scratch import train_tokenizer
from ft_service.spec.load import parse_run_spec
from ft_service.spec.schema import DataSource, RunSpec
from ft_service.storage.storage import Storage

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["how many words are there in answer number one"] * 4, vocab_size=340)


def alpaca_records(count: int, seed: int = 0) -> Records:
    """Distinct short records of 1 to 40 words."""
    lengths = np.random.default_rng(seed).integers(1, 41, size=count)
    return [
        {"instruction": f"number {at}", "input": "", "output": " ".join(["words"] * int(length))}
        for at, length in enumerate(lengths)
    ]


class Case:
    """A folder with data files, a storage, and specs over both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = Storage(str(folder / "storage"))

    def write(self, name: str, records: Records) -> str:
        path = self.folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    def spec(self, *paths: str, **data: Any) -> RunSpec:
        settings = {"max_seq_len": 2048, "format": "alpaca", "columns": {}, **data}
        source = {"format": settings.pop("format"), "columns": settings.pop("columns")}
        document = {
            "name": "case",
            "model": {"base": "none"},
            "data": {"train": [{"path": path, **source} for path in paths], **settings},
            "storage": self.storage.root,
        }
        return parse_run_spec(json.dumps(document))

    def stored(self) -> list[str]:
        return [str(file.relative_to(self.folder)) for file in self.folder.glob("storage/datasets/**/*")]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def rows_of(table: RowTable | None) -> list[Row]:
    return [] if table is None else [table[index] for index in range(len(table))]


def documents(table: RowTable | None) -> Iterator[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Ids and loss mask of every document of every row."""
    for row in rows_of(table):
        ends = np.cumsum(row.document_lengths)
        assert ends[-1] == len(row.input_ids) == len(row.loss_mask)
        for ids, mask in zip(np.split(row.input_ids, ends[:-1]), np.split(row.loss_mask, ends[:-1]), strict=True):
            yield tuple(ids.tolist()), tuple(mask.tolist())


def texts(tokenizer: PreTrainedTokenizerFast, table: RowTable | None) -> list[str]:
    return sorted(tokenizer.decode(ids, skip_special_tokens=False) for ids, _ in documents(table))


def conversation(record: dict[str, Any]) -> list[Message]:
    return [Message("user", record["instruction"]), Message("assistant", record["output"])]


# -- what lies in the rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_seq_len", [160, 2048])
def test_every_record_is_in_exactly_one_row(
    case: Case, tokenizer: PreTrainedTokenizerFast, packing: bool, max_seq_len: int
) -> None:
    records = alpaca_records(150)
    dataset = prepare_dataset(
        case.spec(case.write("a.jsonl", records), packing=packing, max_seq_len=max_seq_len), tokenizer, case.storage
    )
    chat = ChatFormat(tokenizer)
    examples = [chat.encode(conversation(record)) for record in records]
    assert Counter(documents(dataset.train)) == Counter((tuple(e.input_ids), tuple(e.loss_mask)) for e in examples)
    assert max(len(row.input_ids) for row in rows_of(dataset.train)) <= max_seq_len
    facts = dataset.facts
    assert (facts.conversations, facts.rows, facts.truncated) == (150, len(dataset.train), 0)
    assert facts.tokens == sum(len(example.input_ids) for example in examples)
    assert facts.loss_tokens == sum(sum(example.loss_mask) for example in examples)
    assert facts.exact and facts.digest == dataset.digest
    if not packing:
        assert [len(row.document_lengths) for row in rows_of(dataset.train)] == [1] * 150


def test_short_records_fill_98_percent_of_rows_of_2048(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = prepare_dataset(case.spec(case.write("a.jsonl", alpaca_records(3000))), tokenizer, case.storage)
    assert dataset.facts.tokens / (dataset.facts.rows * 2048) >= 0.98


def test_records_of_all_batches_arrive(
    case: Case, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "BATCH_RECORDS", 7)
    spec = case.spec(case.write("a.jsonl", alpaca_records(50)), packing=False)
    dataset = prepare_dataset(spec, tokenizer, case.storage)
    assert len(set(texts(tokenizer, dataset.train))) == len(dataset.train) == 50


def test_sources_of_several_formats_make_one_dataset(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    long_text = "many words " * 120
    chat = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]}]
    document = case.spec(case.write("a.jsonl", [{"q": "ask", "a": "tell"}]), max_seq_len=64).model_dump()
    document["data"]["train"] = [
        {"path": case.write("a.jsonl", [{"q": "ask", "a": "tell"}]), "columns": {"instruction": "q", "output": "a"}},
        {"path": case.write("b.jsonl", chat), "format": "chat", "source": "https://example.com/b", "license": "MIT"},
        {"path": case.write("c.jsonl", [{"text": long_text}]), "format": "text"},
    ]
    dataset = prepare_dataset(RunSpec.model_validate(document), tokenizer, case.storage)
    (pieces,) = encode_texts(tokenizer, [long_text], 64)
    expected = [
        ChatFormat(tokenizer).encode([Message("user", "ask"), Message("assistant", "tell")]),
        ChatFormat(tokenizer).encode([Message("user", "q"), Message("assistant", "a")]),
        *pieces,
    ]
    assert len(pieces) > 2
    assert Counter(documents(dataset.train)) == Counter((tuple(e.input_ids), tuple(e.loss_mask)) for e in expected)
    assert [(source.records, source.source, source.license) for source in dataset.sources] == [
        (1, None, None),
        (1, "https://example.com/b", "MIT"),
        (1, None, None),
    ]
    assert len({source.digest for source in dataset.sources}) == 3


def test_a_cut_conversation_is_counted(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "words " * 100}]
    dataset = prepare_dataset(case.spec(case.write("a.jsonl", records), max_seq_len=40), tokenizer, case.storage)
    assert (dataset.facts.truncated, dataset.facts.conversations) == (1, 2)
    assert max(len(row.input_ids) for row in rows_of(dataset.train)) == 40


# -- prepared once -----------------------------------------------------------------------------------------------------


def test_a_prepared_dataset_is_neither_read_nor_written_again(
    case: Case, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = case.spec(case.write("a.jsonl", alpaca_records(20)), validation={"fraction": 0.2})
    messages: list[str] = []
    first = prepare_dataset(spec, tokenizer, case.storage, messages.append)
    before = {name: (case.folder / name).stat().st_mtime_ns for name in case.stored()}

    def no_reading(*_: object) -> None:
        raise AssertionError("records were read again")

    monkeypatch.setattr(tasks, "records_of", no_reading)
    second = prepare_dataset(spec, tokenizer, case.storage, messages.append)
    assert {name: (case.folder / name).stat().st_mtime_ns for name in case.stored()} == before
    assert (second.digest, second.facts, second.sources) == (first.digest, first.facts, first.sources)
    assert list(documents(second.train)) == list(documents(first.train))
    assert messages[-1].startswith("Data: already prepared")


def test_a_worker_opens_the_prepared_dataset(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    spec = case.spec(case.write("a.jsonl", alpaca_records(20)), validation={"fraction": 0.2})
    prepared = prepare_dataset(spec, tokenizer, case.storage)
    opened = open_dataset(Storage(case.storage.root), prepared.digest)
    assert opened.facts == prepared.facts and opened.sources == prepared.sources
    assert list(documents(opened.train)) == list(documents(prepared.train))
    assert list(documents(opened.validation)) == list(documents(prepared.validation))
    with pytest.raises(StorageError, match="datasets/0000"):
        open_dataset(case.storage, "0000")


def test_everything_that_rows_depend_on_changes_the_digest(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    def digest(records: Records, tokenizer: PreTrainedTokenizerFast = tokenizer, seed: int = 0, **data: Any) -> str:
        spec = case.spec(case.write("a.jsonl", records), **data)
        spec = spec.model_copy(update={"train": spec.train.model_copy(update={"seed": seed})})
        return prepare_dataset(spec, tokenizer, case.storage).digest

    records = [{"instruction": f"q{at}", "output": f"a{at}", "other": "o"} for at in range(4)]
    changed_byte = [*records[:-1], {**records[-1], "output": "a4"}]
    other_tokenizer = train_tokenizer(["entirely other letters"] * 4, vocab_size=300)
    digests = [
        digest(records),
        digest(changed_byte),
        digest(records[::-1]),
        digest(records, columns={"output": "other"}),
        digest(records, max_seq_len=1024),
        digest(records, packing=False),
        digest(records, validation={"fraction": 0.5}),
        digest(records, validation={"fraction": 0.25}),
        digest(records, seed=1),
        digest(records, tokenizer=other_tokenizer),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(records) == digests[0]


def test_leftover_tokenizer_settings_do_not_change_the_digest(case: Case) -> None:
    tokenizer = train_tokenizer(["a few words"] * 4, vocab_size=300)
    spec = case.spec(case.write("a.jsonl", alpaca_records(3)))
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    first = prepare_dataset(spec, tokenizer, case.storage)
    assert prepare_dataset(spec, tokenizer, case.storage).digest == first.digest
    assert first.facts.truncated == 0


# -- held out ----------------------------------------------------------------------------------------------------------


def split(dataset: PreparedDataset, tokenizer: PreTrainedTokenizerFast) -> tuple[list[str], list[str]]:
    return texts(tokenizer, dataset.train), texts(tokenizer, dataset.validation)


def test_a_fraction_holds_out_about_that_share(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    spec = case.spec(case.write("a.jsonl", alpaca_records(1000)), validation={"fraction": 0.2})
    dataset = prepare_dataset(spec, tokenizer, case.storage)
    train, validation = split(dataset, tokenizer)
    assert len(train) + len(validation) == 1000 and not set(train) & set(validation)
    # a share of 1000 draws with p = 0.2 has a standard deviation of 12.6: 60 is nearly five of them
    assert abs(len(validation) - 200) < 60
    facts = dataset.facts
    assert (facts.conversations, facts.validation_conversations) == (len(train), len(validation))
    assert dataset.validation is not None and facts.validation_rows == len(dataset.validation)


def test_equal_conversations_are_never_split(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    def variants(at: int) -> list[dict[str, Any]]:
        """What the model reads the same: with and without a weight, with blanks around."""
        return [
            {
                "messages": [
                    {"role": "user", "content": f"{blank}q{at}"},
                    {"role": "assistant", "content": "a", **weight},
                ]
            }
            for blank in ("", "  ")
            for weight in ({}, {"weight": 1}, {"weight": None})
        ]

    records = [record for at in range(40) for record in variants(at)]
    waive = {"quality.exact-duplicate": "needed for this test"}
    spec = case.spec(case.write("a.jsonl", records), format="chat", validation={"fraction": 0.5}, waive=waive)
    train, validation = split(prepare_dataset(spec, tokenizer, case.storage), tokenizer)
    assert len(train) + len(validation) == len(records) and len(train) % 6 == len(validation) % 6 == 0
    assert train and validation and not set(train) & set(validation)


def test_held_out_records_do_not_depend_on_record_order(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    records = alpaca_records(60)
    forward, backward = (
        prepare_dataset(case.spec(case.write(name, some), validation={"fraction": 0.3}), tokenizer, case.storage)
        for name, some in (("a.jsonl", records), ("b.jsonl", records[::-1]))
    )
    assert forward.digest != backward.digest
    assert split(forward, tokenizer) == split(backward, tokenizer)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_training_and_validation_both_get_records(
    case: Case, tokenizer: PreTrainedTokenizerFast, fraction: float
) -> None:
    spec = case.spec(case.write("a.jsonl", alpaca_records(2)), validation={"fraction": fraction})
    train, validation = split(prepare_dataset(spec, tokenizer, case.storage), tokenizer)
    assert (len(train), len(validation)) == (1, 1)


def test_all_pieces_of_a_text_are_on_one_side(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"text": f"{letter} " * 50} for letter in "abcdefghijklmnop"]
    spec = case.spec(case.write("a.jsonl", records), format="text", max_seq_len=32, validation={"fraction": 0.5})
    train, validation = split(prepare_dataset(spec, tokenizer, case.storage), tokenizer)
    letters = [
        {text.removeprefix("<|begin_of_text|>").strip()[0] for text in side} - {"<"} for side in (train, validation)
    ]
    assert letters[0] and letters[1] and not letters[0] & letters[1]
    assert letters[0] | letters[1] == set("abcdefghijklmnop")


def test_a_validation_list_alone_is_held_out(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    held_out = case.write("v.jsonl", [{"instruction": "v", "output": "w"}])
    spec = case.spec(case.write("a.jsonl", alpaca_records(30)), validation=[{"path": held_out}])
    dataset = prepare_dataset(spec, tokenizer, case.storage)
    train, validation = split(dataset, tokenizer)
    assert len(train) == 30
    assert validation == [
        tokenizer.decode(ChatFormat(tokenizer).encode([Message("user", "v"), Message("assistant", "w")]).input_ids)
    ]
    assert [source.path for source in dataset.sources] == [spec.data.train[0].path, held_out]


def test_no_validation_holds_out_nothing(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = prepare_dataset(case.spec(case.write("a.jsonl", alpaca_records(5))), tokenizer, case.storage)
    assert dataset.validation is None and dataset.facts.validation_conversations == 0


# -- measured without writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validation", [None, {"fraction": 0.3}, "list"])
def test_measuring_gives_the_same_facts_and_writes_nothing(
    case: Case, tokenizer: PreTrainedTokenizerFast, validation: Any
) -> None:
    path = case.write("a.jsonl", alpaca_records(80))
    if validation == "list":
        validation = [{"path": case.write("v.jsonl", alpaca_records(20, seed=1))}]
    spec = case.spec(path, validation=validation, max_seq_len=256)
    measured = measure_dataset(spec, tokenizer)
    assert not (case.folder / "storage").exists()
    prepared = prepare_dataset(spec, tokenizer, case.storage).facts
    assert measured.model_copy(update={"digest": prepared.digest}) == prepared


def test_large_data_is_measured_in_part_and_scaled(
    case: Case, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def numbered(count: int, first: int) -> Records:
        return [{"instruction": f"{number}", "output": "length"} for number in range(first, first + count)]

    monkeypatch.setattr(prepare, "_MEASURED_BYTES", 100 * (len(json.dumps(numbered(1, 1000)[0])) + 1))
    train = case.write("a.jsonl", numbered(400, 1000))
    held_out = case.write("v.jsonl", numbered(200, 2000))
    spec = case.spec(train, validation=[{"path": held_out}], packing=False)
    measured = measure_dataset(spec, tokenizer)
    prepared = prepare_dataset(spec, tokenizer, case.storage).facts
    # records of equal length: the scaled figures are the true ones, of the validation list as well
    names = ("conversations", "rows", "validation_conversations", "validation_rows")
    assert [getattr(measured, name) for name in names] == [getattr(prepared, name) for name in names]
    assert measured.tokens == pytest.approx(prepared.tokens, rel=0.1)
    assert not measured.exact and measure_dataset(case.spec(case.write("b.jsonl", numbered(90, 1000))), tokenizer).exact


# -- what cannot be used -----------------------------------------------------------------------------------------------


GOOD = '{"instruction": "q", "output": "a"}\n'


def quarantined(case: Case, dataset: PreparedDataset) -> list[tuple[str, int, str, str]]:
    """(file, line, code, reason) of every record that is left out."""
    file = case.folder / "storage" / "datasets" / dataset.digest / "judged" / "quarantine.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return [(Path(one["file"]).name, one["line"], one["code"], one["reason"]) for one in entries]


@pytest.mark.parametrize(
    ("line", "code", "why"),
    [
        ('{"instruction": "q"', "form.unreadable", "is not JSON"),
        ('"text"', "form.unreadable", "is a JSON str, not an object"),
        ('{"instruction": "q", "output": ["a"]}', "form.wrong-type", "output is list, not text"),
        ('{"instruction": "q", "output": ""}', "form.empty-output", "output is empty"),
        ('{"instruction": "q", "answer": "a"}', "form.missing-column", "has no column 'output'"),
        ('{"instruction": "q", "output": "\\ud83d"}', "form.encoding", "output contains half a character"),
        ('{"instruction": "%s", "output": "a"}' % ("words " * 60), "signal.no-loss-tokens", "no loss token is left"),
        ('{"instruction": "q1", "output": "a"}', "quality.exact-duplicate", "same as "),
    ],
)
def test_an_unusable_record_is_left_out_and_named(
    case: Case, tokenizer: PreTrainedTokenizerFast, line: str, code: str, why: str
) -> None:
    path = case.folder / "a.jsonl"
    good = [json.dumps({"instruction": f"q{at}", "output": "a"}) for at in (1, 2, 3)]
    path.write_text("\n".join([*good[:2], line, good[2]]))
    dataset = prepare_dataset(case.spec(str(path), max_seq_len=64), tokenizer, case.storage)
    ((file, number, left_out_code, reason),) = quarantined(case, dataset)
    assert (file, number, left_out_code) == ("a.jsonl", 3, code) and why in reason
    assert dataset.facts.conversations == 3 == dataset.judgement.usable and dataset.judgement.read == 4
    assert dataset.sources[0].records == 4


def test_a_stopped_preparation_is_not_packed_or_checked_again(
    case: Case, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = case.spec(case.write("a.jsonl", alpaca_records(20)))

    def refuse(judgement: Judgement, folder: Path) -> None:
        assert (folder / "findings.jsonl").is_file()
        raise DataError(judgement.verdict)

    with pytest.raises(DataError, match="fail"):  # there is neither a source nor a license
        prepare_dataset(spec, tokenizer, case.storage, on_judgement=refuse)
    assert not list(case.folder.glob("storage/datasets/*/rows-*"))
    monkeypatch.setattr(tasks, "records_of", some_may_be_read)
    verdicts: list[str] = []
    gate = lambda judgement, folder: verdicts.append(judgement.verdict)  # noqa: E731
    first = prepare_dataset(spec, tokenizer, case.storage, on_judgement=gate)
    second = prepare_dataset(spec, tokenizer, case.storage, on_judgement=gate)
    assert first.facts == second.facts and first.facts.conversations == 20
    assert verdicts == ["fail", "fail"]  # the cache does not pass the gate by
    assert not list(case.folder.glob("storage/datasets/*/shard-*"))


def test_an_interrupted_preparation_continues_at_the_next_shard(
    case: Case, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "scan", partial(scan, shard_bytes=4000))
    path = case.write("a.jsonl", [*alpaca_records(100), {"instruction": "q", "output": 1}])
    whole = prepare_dataset(case.spec(path), tokenizer, Storage(str(case.folder / "undisturbed")))
    read: list[FileShard] = []

    def counted(shard: FileShard, source: DataSource, split: Any, is_wanted: Any) -> Iterator[Record]:
        if is_wanted is None:
            read.append(shard)
        return records_of(shard, source, split, is_wanted)

    def until_the_third(task: Any, context: Any, items: Any) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 2:
                raise KeyboardInterrupt
            yield task(context, item)

    monkeypatch.setattr(tasks, "records_of", counted)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(case.spec(path), tokenizer, case.storage, run_tasks=until_the_third)
    assert len(read) == 2
    dataset = prepare_dataset(case.spec(path), tokenizer, case.storage)
    assert len(read) == len({shard.start for shard in read}) > 3
    assert (dataset.facts, dataset.judgement) == (whole.facts, whole.judgement)
    assert texts(tokenizer, dataset.train) == texts(tokenizer, whole.train)


def some_may_be_read(shard: FileShard, source: DataSource, split: Any, is_wanted: Any) -> Iterator[Record]:
    assert is_wanted is not None, "a shard was read whole again"
    return records_of(shard, source, split, is_wanted)


def test_without_usable_records_the_first_faults_are_named(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    path = case.write("b.jsonl", [{"instruction": "q", "output": 1}] * 12)
    with pytest.raises(DataError) as caught:
        prepare_dataset(case.spec(path), tokenizer, case.storage)
    message = str(caught.value)
    assert message.startswith("data.train: None of 12 records can be trained on")
    assert f"{path}:10: output is int" in message and f"{path}:11:" not in message
    with pytest.raises(DataError, match="None of"):
        measure_dataset(case.spec(path), tokenizer)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_a_source_without_records_is_a_finding(case: Case, tokenizer: PreTrainedTokenizerFast, content: str) -> None:
    empty = case.folder / "empty.json"
    empty.write_text(content)
    dataset = prepare_dataset(case.spec(case.write("a.jsonl", alpaca_records(30)), str(empty)), tokenizer, case.storage)
    finding = dataset.judgement.finding("form.empty-source")
    assert finding is not None and finding.severity == "fail" and finding.places[0].file == str(empty)
    with pytest.raises(DataError, match="has no records"):
        prepare_dataset(case.spec(str(empty)), tokenizer, case.storage)


def test_an_absent_file_is_named(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    absent = str(case.folder / "absent.jsonl")
    for do in (
        lambda spec: measure_dataset(spec, tokenizer),
        lambda spec: prepare_dataset(spec, tokenizer, case.storage),
    ):
        with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
            do(case.spec(absent))
    assert case.stored() == []


def test_a_failure_while_writing_leaves_no_dataset(
    case: Case, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = case.spec(case.write("a.jsonl", alpaca_records(5)))

    def full_disk(*_: object, **__: object) -> None:
        raise StorageError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put_folder", full_disk)
        with pytest.raises(StorageError, match="No space left"):
            prepare_dataset(spec, tokenizer, case.storage)
    assert case.stored() == []
    assert len(prepare_dataset(spec, tokenizer, case.storage).train) == 1
