"""`ft data`: one judgement in a terminal, as JSON and as a page; waivers; the cleaned copy; the preview."""

import csv
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ft_service.chat.format import ChatFormat, Message
from ft_service.cli.data import _guess
from ft_service.data.clean import clean
from ft_service.data.gate import CODES, Judgement
from ft_service.data.gate.waivers import GateError, check_waivers, enforce, waivers
from ft_service.data.prepare import check_dataset
from ft_service.data.preview import preview
from ft_service.data.split import split, split_sources
from ft_service.errors import DataError, SpecError, UsageError
from ft_service.model.scratch import train_tokenizer, write_scratch_model
from ft_service.pages.data_report import render_data_report
from ft_service.spec.load import parse_run_spec
from ft_service.spec.schema import RunSpec
from tests.data.gate.gate_cases import clean_pairs

Records = list[dict[str, Any]]
KEY = "AKIAIOSFODNN7ABCDEFG"


def records_of(count: int, language: str = "en") -> Records:
    return [{"instruction": question, "output": answer} for question, answer in clean_pairs(count, language)]


def write(path: Path, records: Records, *lines: str) -> Path:
    path.write_text("\n".join([*(json.dumps(record, ensure_ascii=False) for record in records), *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    texts = [f"{record['instruction']} {record['output']}" for record in records_of(60)]
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32}
    write_scratch_model(folder, tokenizer=train_tokenizer(texts, 500), seed=0, **sizes)
    return folder


def read_lines(path: Path) -> Records:
    """Not by `splitlines`, which takes U+0085 for the end of one."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def spec_of(base: Path, *paths: Path, rights: bool = True, **data: Any) -> RunSpec:
    known = {"source": "made up", "license": "CC0-1.0"} if rights else {}
    document = {
        "name": "case",
        "model": {"base": str(base)},
        "data": {"train": [{"path": str(path), **known} for path in paths], "max_seq_len": 512, **data},
        "storage": "none",
    }
    return parse_run_spec(json.dumps(document))


def check(spec: RunSpec, folder: Path) -> Judgement:
    folder.mkdir(exist_ok=True)
    return check_dataset(spec, None, folder)


def ft(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ft_service.cli.app", "data", *arguments]
    environment = {**os.environ, "COLUMNS": "160", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


# -- the gate ----------------------------------------------------------------------------------------------------------


def test_a_failing_finding_stops_until_it_is_waived(base: Path, tmp_path: Path) -> None:
    spec = spec_of(base, write(tmp_path / "a.jsonl", records_of(40)), rights=False)
    judgement = check(spec, tmp_path / "out")
    with pytest.raises(
        GateError,
        match=r"2 findings(?s:.*)rights\.no-license \(1 source, 100\.0%\)(?s:.*)report here(?s:.*)waive: {rights",
    ) as no:
        enforce(judgement, {}, "report here")
    assert str(tmp_path / "a.jsonl") in str(no.value)
    both = {"rights.no-source": "it is ours", "rights.no-license": "it is ours", "private.card": "never found"}
    with pytest.raises(GateError, match="1 finding"):
        enforce(judgement, {"rights.no-source": "it is ours"}, "")
    enforce(judgement, both, "")
    kept = {waiver.code: (waiver.severity, waiver.count, waiver.reason) for waiver in waivers(judgement, both)}
    assert kept == dict.fromkeys(("rights.no-source", "rights.no-license"), ("fail", 1, "it is ours"))


def test_a_waiver_needs_a_known_code_and_a_reason() -> None:
    check_waivers({"rights.no-source": "ours"})
    with pytest.raises(SpecError, match=r"data\.waive\.rights\.nothing = 'x': is not a code"):
        check_waivers({"rights.nothing": "x"})
    with pytest.raises(SpecError, match="is not a reason"):
        check_waivers({"rights.no-source": " "})


# -- what a judgement leaves on disk -----------------------------------------------------------------------------------


def test_files_list_every_place_and_every_record_left_out(base: Path, tmp_path: Path) -> None:
    records = records_of(50)
    path = write(tmp_path / "a.jsonl", [*records, *records[:30], {"instruction": "q", "output": ""}], "not json")
    out = tmp_path / "out"
    judgement = check(spec_of(base, path), out)
    findings = [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()]
    for finding in judgement.findings:
        if not finding.code.startswith(("rights.", "size.")):
            assert sum(one["code"] == finding.code for one in findings) == finding.count, finding.code
    quarantine = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(one["line"] for one in quarantine) == [*range(51, 81), 81, 82]
    assert judgement.read == 82 == judgement.usable + len(quarantine)
    assert Judgement.model_validate_json((out / "judgement.json").read_text()) == judgement
    exact = judgement.finding("quality.exact-duplicate")
    assert exact is not None and exact.count == 30 and len(exact.places) == 20  # the first ones only


def test_private_data_is_masked_in_every_report(base: Path, tmp_path: Path) -> None:
    secret = {"instruction": f"What is {KEY}?", "output": f"A key: {KEY}. Ask taro.yamada@mail.co.jp about it, please."}
    path = write(tmp_path / "a.jsonl", [*records_of(30), secret, {**secret, "output": 5}])
    spec = spec_of(base, path)
    out = tmp_path / "out"
    judgement = check(spec, out)
    assert judgement.finding("private.key") and judgement.finding("private.email")
    reports = [render_data_report("case", judgement), judgement.model_dump_json()]
    reports += [(out / name).read_text() for name in ("findings.jsonl", "quarantine.jsonl", "judgement.json")]
    assert not any(KEY in text or "taro.yamada" in text for text in reports)


def test_every_number_of_records_says_what_it_counts(base: Path, tmp_path: Path) -> None:
    records = records_of(60)
    path = write(tmp_path / "a.jsonl", [*records, records[0]], "broken")
    judgement = check(spec_of(base, path, validation={"fraction": 0.2}), tmp_path / "out")
    training = judgement.size.training_records
    assert (judgement.read, judgement.usable) == (62, 60) and 0 < training < 60
    text = f"62 records read, 60 usable ({training} for training, {60 - training} for validation)"
    assert judgement.records_text == f"{text}; 2 left out: 1 form.unreadable, 1 quality.exact-duplicate"
    assert judgement.size.text.startswith(f"{training} training records: ")
    page = re.sub(r"<[^>]+>|\s+", " ", render_data_report("case", judgement))
    assert text in page and f"For training {training} {60 - training} for validation" in " ".join(page.split())
    whole = check(spec_of(base, path), tmp_path / "out")
    assert whole.records_text.startswith("62 records read, 60 usable; 2 left out: ")
    assert whole.size.training_records == whole.usable


# -- cleaning ----------------------------------------------------------------------------------------------------------

VALUES = st.one_of(st.text(max_size=20), st.none(), st.integers(), st.sampled_from(["", " ", "same", "同じ"]))
LINES = st.one_of(
    st.fixed_dictionaries(
        {"instruction": VALUES, "output": VALUES},
        optional={"input": VALUES, "id": st.sampled_from([1, "a", "half a pair: \ud83d"])},
    ).map(json.dumps),
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=20))
def test_a_cleaned_copy_has_the_other_records_in_order(base: Path, lines: list[str], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("clean")
    path = folder / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    judgement = clean(spec_of(base, path), folder / "out").judgement
    kept, left_out = (read_lines(folder / "out" / name) for name in ("0-a.jsonl", "decisions/left_out.jsonl"))
    gone = {entry["line"] for entry in left_out}
    for entry in left_out:
        with suppress(ValueError):
            written = json.loads(lines[entry["line"] - 1])
            assert entry.get("record") == (written if isinstance(written, dict) else None)
    expected = [json.loads(line) for number, line in enumerate(lines, 1) if line.strip() and number not in gone]
    assert kept == expected and judgement.read == len(kept) + len(gone)
    if kept:
        again = check(spec_of(base, folder / "out"), folder / "again")
        assert again.usable == again.read == len(kept)
    again = check(spec_of(base, folder / "out" / "0-a.jsonl"), folder / "again")
    assert again.usable == again.read == len(kept)


def test_cleaning_keeps_the_text_of_unreadable_records(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", records_of(3), '{"instruction": "cut o', "[1, 2]")
    clean(spec_of(base, path), tmp_path / "out")
    broken, other = read_lines(tmp_path / "out" / "decisions" / "left_out.jsonl")
    assert (broken["line"], broken["text"], broken["excerpt"]) == (
        4,
        '{"instruction": "cut o',
        '{"instruction": "cut o',
    )
    assert (other["line"], other["text"]) == (5, "[1, 2]")
    assert "record" not in broken and "record" not in other


def test_cleaning_never_overwrites_files(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", records_of(5))
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        clean(spec_of(base, path), tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_the_folder_of_a_cleaned_copy_passes_the_check(base: Path, tmp_path: Path) -> None:
    records = records_of(600)
    path = write(tmp_path / "a.jsonl", [*records, records[3], {"instruction": "?", "output": ""}], "broken")
    held_out = write(tmp_path / "b.jsonl", [{"instruction": f"{n}?", "output": f"{n}."} for n in range(3)], "broken")
    rights = {"source": "made up", "license": "CC0-1.0"}
    spec = spec_of(base, path, validation=[{"path": str(held_out), **rights}])
    cleaned = clean(spec, tmp_path / "out")
    assert cleaned.left_out == {"form.empty-output": 1, "form.unreadable": 2, "quality.exact-duplicate": 1}
    assert cleaned.files == ((str(path), "0-a.jsonl"), (str(held_out), "validation/1-b.jsonl"))
    again = check(spec_of(base, tmp_path / "out"), tmp_path / "again")
    assert again.verdict == "pass" and again.read == again.usable == 600
    assert again.findings == []
    validation = check(spec_of(base, tmp_path / "out" / "validation"), tmp_path / "again")
    assert validation.read == validation.usable == 3


def test_redaction_masks_private_data_and_lists_each_mask(base: Path, tmp_path: Path) -> None:
    secrets = ["taro.yamada@mail.co.jp", "4539 5787 6362 1486", KEY, "090-1234-5678"]
    private = [
        {"instruction": "Whom do I ask?", "output": f"Ask {secrets[0]}, {secrets[0]}.", "meta": {"by": [secrets[3]]}},
        {"instruction": "And the next key?", "output": f"It is {secrets[2]}."},
        {"instruction": "What is your card number?", "output": "4539578763621486"},  # private only beside the question
        {"instruction": "Whom do I ask?", "output": "Ask [e-mail], [e-mail].", "meta": {}},  # equal once it is masked
        {"instruction": "", "output": secrets[1]},  # left out, and its list masked
    ]
    path = write(tmp_path / "a.jsonl", [*records_of(20), *private])
    cleaned = clean(spec_of(base, path), tmp_path / "out", redact_private=True)
    assert cleaned.redacted == {"private.card": 1, "private.email": 2, "private.key": 1, "private.phone": 1}
    kept = read_lines(tmp_path / "out" / "0-a.jsonl")
    assert kept[:20] == records_of(20)
    assert kept[20]["output"] == "Ask [e-mail], [e-mail]." and kept[20]["meta"] == {"by": ["[phone]"]}
    assert kept[22]["output"] == "[card number]" and len(kept) == 23
    masks = read_lines(tmp_path / "out" / "decisions" / "redacted.jsonl")
    assert [(mask["line"], mask["code"], mask["column"], mask["start"]) for mask in masks[:3]] == [
        (21, "private.email", "output", 4),
        (21, "private.email", "output", 28),
        (21, "private.phone", "meta.by[0]", 0),
    ]
    assert {mask["file"] for mask in masks} == {str(path)} and masks[0]["characters"] == len(secrets[0])
    left_out = read_lines(tmp_path / "out" / "decisions" / "left_out.jsonl")
    assert [(entry["line"], entry["code"]) for entry in left_out] == [
        (24, "quality.exact-duplicate"),
        (25, "form.empty-input"),
    ]
    everything = "".join(file.read_text() for file in (tmp_path / "out").rglob("*.jsonl"))
    assert not [secret for secret in (*secrets, "4539578763621486") if secret in everything]
    again = check(spec_of(base, tmp_path / "out"), tmp_path / "again")
    assert again.read == again.usable and not [f for f in again.findings if f.code.startswith("private.")]


# -- splitting ---------------------------------------------------------------------------------------------------------


def test_a_split_has_no_leak(base: Path, tmp_path: Path) -> None:
    records = records_of(200)
    edited = [{**one, "output": one["output"].replace("because", "since")} for one in records[:60]]
    other_answers = [{**one, "output": two["output"]} for one, two in zip(records[60:80], records[80:], strict=False)]
    first = write(tmp_path / "a.jsonl", [*records, *edited, records[5], {"instruction": "?", "output": ""}])
    second = write(tmp_path / "b.jsonl", [*other_answers, *records_of(100, "ja")])
    leaky = check(spec_of(base, first, second, validation={"fraction": 0.2}), tmp_path / "check")
    assert leaky.finding("leak.validation") is not None  # a split record by record leaks
    done = split(spec_of(base, first, second), tmp_path / "out", 0.2)
    assert done.train + done.validation == 380 and 70 <= done.validation <= 76 and done.groups == 80
    assert done.cleaned.left_out == {"form.empty-output": 1, "quality.exact-duplicate": 1}
    rights = {"source": "made up", "license": "CC0-1.0"}
    validation = [{"path": str(tmp_path / "out" / "validation"), **rights}]
    judgement = check(spec_of(base, tmp_path / "out" / "train", validation=validation), tmp_path / "check")
    assert judgement.finding("leak.validation") is None and judgement.read == judgement.usable == 380
    assert judgement.validation_records == done.validation
    sides: dict[str, str] = {}
    for side in ("train", "validation"):
        for file in sorted((tmp_path / "out" / side).iterdir()):
            for one in read_lines(file):
                assert sides.setdefault(one["instruction"], side) == side  # one question, one side
    split(spec_of(base, first, second), tmp_path / "again", 0.2)
    for file in (tmp_path / "out").glob("*/*-?.jsonl"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path / "out")).read_bytes()


def test_a_split_that_cannot_be_made_writes_nothing(base: Path, tmp_path: Path) -> None:
    alike = write(tmp_path / "a.jsonl", records_of(1) * 3)
    with pytest.raises(DataError, match="fewer than two groups"):
        split(spec_of(base, alike), tmp_path / "out", 0.1)
    rights = {"source": "made up", "license": "CC0-1.0"}
    with pytest.raises(UsageError, match="split already"):
        split(spec_of(base, alike, validation=[{"path": str(alike), **rights}]), tmp_path / "out", 0.1)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


# -- preview -----------------------------------------------------------------------------------------------------------


def test_a_preview_shows_every_token_once_and_what_is_trained_on(base: Path, tmp_path: Path) -> None:
    from ft_service.model.base import load_tokenizer

    tokenizer = load_tokenizer(base)
    records = [*records_of(3), {"instruction": "数えて", "output": "一、二、🎉"}]
    rows = preview(spec_of(base, write(tmp_path / "a.jsonl", records)), tokenizer, records=10)
    documents = sorted((d for row in rows for d in row.documents), key=lambda d: d.place)
    assert [document.place for document in documents] == [f"{tmp_path / 'a.jsonl'}:{n}" for n in (1, 2, 3, 4)]
    chat = ChatFormat(tokenizer)
    for document, record in zip(documents, records, strict=True):
        example = chat.encode([Message("user", record["instruction"]), Message("assistant", record["output"])])
        assert "".join(span.text for span in document.spans) == tokenizer.decode(example.input_ids)
        trained = "".join(span.text for span in document.spans if span.kind == "trained")
        assert trained == record["output"] + "<|eot_id|>"
        assert (document.tokens, document.loss_tokens) == (len(example.input_ids), example.num_loss_tokens)
        assert all(span.is_special == span.text.startswith("<|") for span in document.spans)


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_check_reports_the_same_in_every_form(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [*records_of(600), *records_of(600, "ja")], "broken")
    spec = f"""
name: case
model: {{base: {base}}}
data: {{train: [{{path: {tmp_path}/a.jsonl, source: made up, license: LicenseRef-OWN}}], max_seq_len: 512}}
storage: {tmp_path}/storage
"""
    (tmp_path / "spec.yaml").write_text(spec)
    done = ft("check", "spec.yaml", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    judgement = Judgement.model_validate_json(done.stdout)
    assert judgement.verdict == "warn" and judgement.read == 1201 and judgement.usable == 1200
    assert judgement.signal.tokens > 0 and judgement.size.steps is not None
    page = (tmp_path / "case-data-check" / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import", page)  # it needs nothing but itself
    shown = ft("check", "spec.yaml", folder=tmp_path)
    for finding in judgement.findings:
        assert finding.code in shown.stdout and finding.code in page
    assert f"{tmp_path}/a.jsonl:1201: is not JSON" in shown.stdout
    assert "form.unreadable  1 record (0.1%)" in shown.stdout and "1 record · 0.1%" in page
    refused = ft("check", "a.jsonl", folder=tmp_path)
    assert refused.returncode == 1 and "rights.no-license" in refused.stdout and "No --base" in refused.stderr
    assert not (tmp_path / "storage").exists()


@pytest.mark.multiprocess
def test_check_prints_its_guess_of_format_and_columns(tmp_path: Path) -> None:
    turns = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in clean_pairs(12)]
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "conversations"], *enumerate(map(json.dumps, turns))])
    done = ft("check", "a.csv", "--json", "--source", "s", "--license", "CC0-1.0", folder=tmp_path)
    assert "Guessed from the first records: --format chat --column messages=conversations\n" in done.stderr
    judgement = Judgement.model_validate_json(done.stdout)
    assert (judgement.read, judgement.usable) == (12, 12)
    finding = judgement.finding("form.unused-field")
    assert finding is not None and finding.message == "Not used: id (100.0% of the records)."
    given = ("--format", "chat", "--column", "messages=conversations")
    assert "Guessed" not in ft("check", "a.csv", *given, folder=tmp_path).stderr


def test_preview_and_clean_run_from_the_command_line(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"q": "Why is that?", "a": "Because of this."}] * 2)
    options = ("--column", "instruction=q", "--column", "output=a")
    done = ft("preview", "a.jsonl", *options, "--base", str(base), folder=tmp_path)
    assert done.returncode == 0 and "<|eot_id|>" in done.stdout and "a.jsonl:2" in done.stdout, done.stderr
    done = ft("preview", "a.jsonl", *options, "--base", str(base), "--html", "page.html", folder=tmp_path)
    assert done.returncode == 0 and "Because of this." in (tmp_path / "page.html").read_text()
    assert done.stdout == "Page: page.html\n"
    done = ft("preview", "a.jsonl", *options, "--base", str(base), "--html", "b.html", "--json", folder=tmp_path)
    assert json.loads(done.stdout) and (tmp_path / "b.html").exists()
    assert ft("preview", "a.jsonl", *options, folder=tmp_path).returncode == 2
    done = ft("clean", "a.jsonl", "out", *options, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["left_out"] == {"quality.exact-duplicate": 1}
    assert (tmp_path / "out" / "0-a.jsonl").read_text() == '{"q": "Why is that?", "a": "Because of this."}\n'


def test_unused_fields_of_one_source_are_shown_once(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{**one, "ticket": 1} for one in records_of(12)])
    assert ft("check", "a.jsonl", folder=tmp_path).stdout.count("ticket") == 1


def section_in(output: str) -> dict[str, Any]:
    """The part of a spec that a command printed."""
    text = output.partition("In a run spec:\n\n")[2].partition("\n\n")[0]
    return dict(yaml.safe_load(text)["data"])


def test_clean_and_split_print_the_part_of_a_spec_that_uses_what_they_wrote(tmp_path: Path) -> None:
    pairs = [{"質問": q, "回答": a, "id": n} for n, (q, a) in enumerate(clean_pairs(40, "ja"))]
    write(tmp_path / "a.jsonl", pairs)
    rights = ("--source", "our desk", "--license", "LicenseRef-OWN")
    expected = {
        "columns": {"instruction": "質問", "output": "回答"},
        "source": "our desk",
        "license": "LicenseRef-OWN",
    }
    done = ft("clean", "a.jsonl", "cleaned", *rights, folder=tmp_path)
    assert section_in(done.stdout) == {"train": [{"path": "cleaned", **expected}]}, done.stderr
    done = ft("split", "a.jsonl", "parts", *rights, folder=tmp_path)
    section = section_in(done.stdout)
    assert section == {
        "train": [{"path": "parts/train", **expected}],
        "validation": [{"path": "parts/validation", **expected}],
    }
    assert "Add source and license" not in done.stdout
    spec = {"name": "case", "model": {"base": "nobody/nothing"}, "data": section, "storage": "none"}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec, allow_unicode=True))
    done = ft("check", "spec.yaml", "--json", folder=tmp_path)
    judgement = Judgement.model_validate_json(done.stdout)
    assert judgement.read == judgement.usable == 40 and judgement.validation_records == 4
    as_json = json.loads(ft("split", "a.jsonl", "other", "--json", folder=tmp_path).stdout)
    assert as_json["data"]["validation"] == [{"path": "other/validation", "columns": expected["columns"]}]
    assert "Add source and license" in ft("clean", "a.jsonl", "another", folder=tmp_path).stdout


def test_sources_of_different_formats_stay_apart(base: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", records_of(30))
    second = write(tmp_path / "b.jsonl", [{"q": q, "output": a} for q, a in clean_pairs(30, "ja")])
    spec = spec_of(base, first, second)
    second_source = spec.data.train[1].model_copy(update={"columns": {"instruction": "q"}})
    data = spec.data.model_copy(update={"train": [spec.data.train[0], second_source]})
    spec = spec.model_copy(update={"data": data})
    train, validation = split_sources(spec, tmp_path / "out", split(spec, tmp_path / "out", 0.2))
    assert [Path(source.path).name for source in train] == ["0-a.jsonl", "1-b.jsonl"]
    assert [source.columns for source in validation] == [{}, {"instruction": "q"}]


def test_all_problems_of_a_spec_its_files_and_its_base_are_reported_at_once(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"q": "Why?", "output": "So."}])
    (tmp_path / "spec.yaml").write_text("""
name: case
model: {base: ./absent}
data:
  train: [{path: a.jsonl}, {path: b.jsonl, licence: MIT}]
  validation: [{path: c.xlsx}]
train: {epocs: 3}
storage: none
""")
    (tmp_path / "c.xlsx").write_bytes(b"PK")
    done = ft("check", "spec.yaml", folder=tmp_path)
    assert done.returncode == 2
    for problem in (
        "train.epocs = 3: is not a setting. Did you mean epochs?",
        "data.train.1.licence = 'MIT': is not a setting. Did you mean license?",
        "data.train.0 = 'a.jsonl': its first record has no column 'instruction' (its columns: q, output). Set columns",
        "data.train.1.path = 'b.jsonl': no such file. Fix the path (relative paths start at the working directory).",
        "data.validation.0.path = 'c.xlsx': files of this type are not supported. Use one of .jsonl, ",
        "model.base = './absent': no such folder. Use a model folder or a hub id.",
    ):
        assert problem in done.stderr
    assert "spec.yaml: 6 problems" in done.stderr
    fixed = "data.train.1={path: a.jsonl}", "data.validation=null", "train={}"
    done = ft("check", "spec.yaml", *fixed, folder=tmp_path)
    assert "spec.yaml: 1 problem\n" in done.stderr and "model.base" in done.stderr
    assert "model.base" not in ft("split", "spec.yaml", "out", *fixed, folder=tmp_path).stderr


def test_every_code_ends_its_sentences() -> None:
    assert all(code.why.endswith((".", "?")) and code.cure.endswith((".", ")")) for code in CODES.values())


# -- a file alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "columns", "expected"),
    [
        ({"instruction": "q", "output": "a", "text": "both"}, {}, "alpaca"),
        ({"messages": []}, {}, "chat"),
        ({"turns": []}, {"messages": "turns"}, "chat"),
        ({"text": "a book"}, {}, "text"),
        ({"question": "q", "text": "a"}, {"instruction": "question", "output": "text"}, "alpaca"),
        ({"other": 1}, {}, "alpaca"),
    ],
)
def test_the_format_of_a_file_comes_from_its_first_record(
    tmp_path: Path, record: dict[str, Any], columns: dict[str, str], expected: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"broken\n{json.dumps(record)}\n")
    assert _guess(path, None, columns).format == expected
