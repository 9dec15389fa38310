"""The gate: no record is lost, shards add up, memory does not grow with texts, and the judgement is plain JSON."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ft_service.chat.format import ROLES, ChatFormat, Message
from ft_service.data.gate import (
    CODES,
    LEFT_OUT,
    Fault,
    Gate,
    Hit,
    Judgement,
    Record,
    SecondPass,
    Source,
    Tokens,
)
from ft_service.data.gate.facts import FACTS
from ft_service.data.gate.gate import FIRST_PLACES, add_base_and_steps
from ft_service.data.gate.records import place_key, place_of
from ft_service.data.gate.size import advise
from ft_service.errors import DataError
from ft_service.model.scratch import train_tokenizer
from tests.data.gate.gate_cases import (
    chat,
    check_all,
    clean_pairs,
    clean_records,
    lines,
    new_gate,
    record,
    text,
    with_tokens,
)


@pytest.fixture(scope="module")
def chat_format() -> ChatFormat:
    texts = [part for language in ("en", "ja") for pair in clean_pairs(50, language) for part in pair]
    return ChatFormat(train_tokenizer(texts, vocab_size=900))


def broken(line: int, code: str = "form.unreadable") -> Record:
    return Record(0, 0, line, fault=Fault(code, "is broken"))


# -- nothing vanishes ------------------------------------------------------------------------------------------------


def test_counts_add_up_and_every_record_left_out_has_a_reason() -> None:
    good = clean_records(40)
    records = [*good, *(broken(41 + at) for at in range(3)), broken(44, "form.empty-output"), replace(good[0], line=45)]
    judgement, hits = check_all(records)
    assert judgement.read == 45
    assert judgement.left_out == {"form.unreadable": 3, "form.empty-output": 1, "quality.exact-duplicate": 1}
    assert judgement.usable == 40 == judgement.sources[0].usable
    out = [hit for hit in hits if hit.code in LEFT_OUT]
    assert sorted(hit.key for hit in out) == [41, 42, 43, 44, 45] and all(hit.detail for hit in out)


def test_checking_a_record_says_whether_it_is_left_out() -> None:
    gate = new_gate()
    hit = gate.reason_left_out(gate.check(broken(1)))
    assert hit is not None and hit.code == "form.unreadable"
    hits = gate.check(record("q?", "I'm sorry, but I cannot help you."))
    assert [hit.code for hit in hits] == ["quality.refusal"] and gate.reason_left_out(hits) is None


def test_kept_duplicates_count_as_usable() -> None:
    good = clean_records(30)
    judgement, hits = check_all([*good, replace(good[4], line=31)], keep=["quality.exact-duplicate"])
    assert lines(hits, "quality.exact-duplicate") == [31]
    assert (judgement.left_out, judgement.usable, judgement.size.training_records) == ({}, 31, 31)


def test_an_empty_dataset_fails() -> None:
    judgement, _ = check_all([])
    assert (judgement.read, judgement.usable, judgement.verdict) == (0, 0, "fail")
    assert judgement.finding("size.too-few") is not None


def test_a_finding_counts_all_places_and_names_the_first() -> None:
    numbers = random.Random(0).sample(range(1, 101), 60)
    judgement, hits = check_all([broken(line) for line in numbers])
    finding = judgement.finding("form.unreadable")
    assert finding is not None and (finding.count, finding.share, finding.severity) == (60, 1.0, "fail")
    assert [place.line for place in finding.places] == sorted(numbers)[:FIRST_PLACES]
    assert sorted(lines(hits, "form.unreadable")) == sorted(numbers)
    assert str(finding.places[0]) == f"data.jsonl:{min(numbers)}"


def test_severity_grows_with_the_share() -> None:
    assert check_all([*clean_records(100), broken(101)])[0].finding("form.unreadable").severity == "warn"  # type: ignore[union-attr]
    assert check_all([*clean_records(10), broken(101)])[0].finding("form.unreadable").severity == "fail"  # type: ignore[union-attr]


def test_every_code_says_why_and_what_to_do() -> None:
    for code in CODES.values():
        assert (
            code.why.endswith(".") and code.cure.endswith((".", ")")) and len(code.why) < 140 and len(code.cure) < 140
        )


# -- shards ----------------------------------------------------------------------------------------------------------

MESSAGES = st.lists(
    st.builds(
        Message,
        st.sampled_from(ROLES),
        st.sampled_from(["", "a", "はい", "Yes.", "I can't help with that.", "<p>x</p>"]) | st.text(max_size=60),
    ),
    min_size=1,
    max_size=4,
).map(tuple)
ITEMS = MESSAGES | st.text(max_size=80) | st.sampled_from(sorted(LEFT_OUT)).map(lambda code: Fault(code, "is broken"))


def numbered(items: list[object]) -> list[Record]:
    return [
        Record(0, 0, line, fault=item) if isinstance(item, Fault) else Record(0, 0, line, item)  # type: ignore[arg-type]
        for line, item in enumerate(items, 1)
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(ITEMS, max_size=25), st.data())
def test_shards_in_any_order_give_the_judgement_of_the_whole(items: list[object], data: st.DataObject) -> None:
    records = numbered(items)
    owners = data.draw(st.lists(st.integers(0, 2), min_size=len(records), max_size=len(records)))

    def through(gates: list[Gate], owner_of: list[int]) -> tuple[Judgement, list[str], int]:
        hits_of: list[list[list[Hit]]] = [[] for _ in gates]
        for one, owner in zip(records, owner_of, strict=True):
            hits_of[owner].append(gates[owner].check(one))
        for gate, gate_hits in list(zip(gates, hits_of, strict=True))[:0:-1]:
            gates[0].merge(gate.partial_result(), gate_hits)
        hits = [hit for gate_hits in hits_of for of_record in gate_hits for hit in of_record]
        second_pass = gates[0].second_pass()
        for one in records:
            second_pass.add(one)
        judgement = gates[0].judgement(second_pass, hits.append)
        return judgement, sorted(map(str, hits)), len(gates[0].used_records()[0])

    whole = through([new_gate()], [0] * len(records))
    assert through([new_gate() for _ in range(3)], owners) == whole
    assert whole[0].read == len(records) == whole[0].usable + sum(whole[0].left_out.values())
    assert whole[0].usable == whole[2]
    assert Judgement.model_validate_json(whole[0].model_dump_json()) == whole[0]


def test_a_gate_can_give_a_judgement_and_continue() -> None:
    gate = new_gate()
    for one in clean_records(30):
        gate.check(one)
    assert gate.judgement(SecondPass()) == gate.judgement(SecondPass())
    for one in clean_records(30, seed=1):
        gate.check(replace(one, line=one.line + 30))
    assert gate.judgement(SecondPass()).read == 60


# -- memory ----------------------------------------------------------------------------------------------------------


def test_the_facts_of_a_record_have_one_size_for_any_text() -> None:
    assert FACTS.itemsize <= 640  # a million records in 0.6 GiB

    def kept(records: list[Record]) -> int:
        table = new_gate()._table
        for one in records:
            table.add(one)
        table._flush()
        assert table._rows == [] and table._texts == []
        return sum(chunk.nbytes for chunk in table._chunks)

    short = clean_records(40)
    long = [text("x y z " * 20_000, line) for line in range(1, 41)]
    assert kept(short) == kept(long) == 40 * FACTS.itemsize


def test_hits_are_counted_but_only_the_first_are_kept() -> None:
    gate = new_gate()
    for line in range(1, 2001):
        gate.check(broken(line))
    assert len(gate._tally.first("form.unreadable")) == FIRST_PLACES and len(gate._table) == 0


def test_few_hashes_wait_for_their_signatures() -> None:
    gate = new_gate()
    for line in range(1, 60):
        gate.check(text("".join(map(chr, range(0x4E00 + line, 0x4E00 + 20_000))), line))
    waiting = 8 * sum(2 * len(prompt) + len(output) for prompt, output in gate._table._texts)  # their hashes
    assert waiting < 4 * 2**20


def test_places_as_numbers_keep_their_order() -> None:
    places = [(0, 0, 0), (0, 0, 1), (0, 3, 2**33), (0, 4, 1), (1, 0, 1), (1023, 2**20 - 1, 2**34 - 1)]
    keys = [place_key(*place) for place in places]
    assert keys == sorted(keys) and max(keys) < 2**64
    assert [place_of(key) for key in keys] == places
    with pytest.raises(DataError, match="Join small files"):
        place_key(1024, 0, 1)


# -- training signal -------------------------------------------------------------------------------------------------


def tokenised(records: list[Record], chat_format: ChatFormat, max_seq_len: int) -> tuple[Judgement, list[Hit]]:
    return check_all(with_tokens(records, chat_format, max_seq_len), chat=chat_format, max_seq_len=max_seq_len)


@pytest.mark.parametrize("language", ["en", "ja"])
def test_token_counts_agree_with_the_chat_format(chat_format: ChatFormat, language: str) -> None:
    records = clean_records(60, language)
    judgement, hits = tokenised(records, chat_format, 4096)
    examples = [chat_format.encode(one.item) for one in records]  # type: ignore[arg-type]
    signal = judgement.signal
    assert signal.tokens == sum(len(example.input_ids) for example in examples)
    assert signal.loss_tokens == sum(example.num_loss_tokens for example in examples)
    assert (signal.records, signal.lost_tokens, hits) == (60, 0, [])
    assert judgement.lengths.unit == "tokens" and sum(judgement.lengths.counts) == 60


def test_truncation_is_reported_and_a_lost_answer_is_left_out(chat_format: ChatFormat) -> None:
    question, answer = clean_pairs(1)[0]
    whole = len(chat_format.encode([Message("user", question), Message("assistant", answer)]).input_ids)
    records = [record(question, answer, 1), record(question, answer * 2, 2), record(question * 9, answer, 3)]
    judgement, hits = tokenised(records, chat_format, whole)
    assert lines(hits, "signal.truncated") == lines(hits, "signal.end-not-trained") == [2]
    assert lines(hits, "signal.no-loss-tokens") == [3]
    assert judgement.left_out == {"signal.no-loss-tokens": 1}
    longer = len(chat_format.encode(records[1].item).input_ids)  # type: ignore[arg-type]
    assert judgement.signal.lost_tokens == judgement.signal.lost_loss_tokens == longer - whole


def test_a_conversation_with_an_untrained_end_is_reported(chat_format: ChatFormat) -> None:
    one = chat(("user", "q"), ("assistant", "a"), ("user", "and then?"))
    assert lines(tokenised([one], chat_format, 512)[1], "signal.end-not-trained") == [1]


def test_few_loss_tokens_are_reported_for_the_whole_data(chat_format: ChatFormat) -> None:
    records = [record(q * 2, "no", line) for line, (q, _) in enumerate(clean_pairs(60), 1)]
    finding = tokenised(records, chat_format, 4096)[0].finding("signal.few-loss-tokens")
    assert finding is not None and finding.severity == "info"
    assert tokenised(clean_records(60), chat_format, 4096)[0].finding("signal.few-loss-tokens") is None


def test_a_text_longer_than_a_row_loses_nothing(chat_format: ChatFormat) -> None:
    one = text(" ".join(question for question, _ in clean_pairs(40)))
    (counted,) = with_tokens([one], chat_format, 64)
    assert counted.tokens is not None and counted.tokens.total == counted.tokens.kept > 640
    assert tokenised([one], chat_format, 64)[1] == []


def test_a_tokenizer_that_changes_text_is_reported(chat_format: ChatFormat) -> None:
    from tokenizers import Tokenizer, normalizers

    backend = Tokenizer.from_str(chat_format.tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    special = {name: getattr(chat_format.tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    lowering = ChatFormat(PreTrainedTokenizerFast(tokenizer_object=backend, **special))
    _, hits = check_all(clean_records(30), chat=lowering)
    assert lines(hits, "signal.round-trip") == list(range(1, 21)), "the first twenty are tried"
    assert check_all(clean_records(30), chat=chat_format)[1] == []


# -- size ------------------------------------------------------------------------------------------------------------


def test_the_size_level_follows_the_rule_of_thumb() -> None:
    sizes = [9, 10, 499, 500, 2_999, 3_000, 5_000, 19_999, 20_000, 49_999, 50_000]
    levels = ["too few", "little", "little", "narrow skill", "narrow skill", "between"]
    levels += ["stable skill", "stable skill", "broad skill", "broad skill", "expert"]
    assert [advise(size, 0, None, None).level for size in sizes] == levels


def test_steps_follow_from_tokens_rows_and_batch() -> None:
    advice = advise(1_000, kept_tokens=2_048 * 640, max_seq_len=2_048, global_batch_size=64)
    assert advice.steps == round(advice.epochs * 10)
    assert f"{advice.steps} steps of 64 rows" in advice.text


def test_nine_records_fail_and_ten_only_warn() -> None:
    nine = check_all(clean_records(9))[0]
    ten = check_all(clean_records(10))[0]
    assert (nine.verdict, [f.code for f in nine.findings]) == ("fail", ["size.too-few"])
    assert (ten.verdict, [f.code for f in ten.findings]) == ("warn", ["size.small"])


def test_the_most_severe_findings_come_first() -> None:
    source = Source("data.jsonl", ("data.jsonl",), source="made up", license="CC-BY-SA-4.0")
    gate = Gate([source])
    for one in [*clean_records(60), record("Mail?", "Write to taro@mail.co.jp, it is said.", 61)]:
        gate.check(one)
    gate.check(record("Key?", "Use AKIAIOSFODNN7ABCDEFG in the north of the town.", 62))
    severities = [finding.severity for finding in gate.judgement(SecondPass()).findings]
    assert severities == sorted(severities, key=["fail", "warn", "info"].index) and set(severities) == {
        "fail",
        "warn",
        "info",
    }


def test_counted_tokens_need_no_tokenizer() -> None:
    tokens = Tokens(total=10, loss=4, kept=10, kept_loss=4, ends=True)
    judgement, _ = check_all([replace(one, tokens=tokens) for one in clean_records(20)], max_seq_len=100)
    assert judgement.signal.loss_share == pytest.approx(0.4)
    assert add_base_and_steps(judgement, "somebody/else", max_seq_len=100, global_batch_size=1).size.steps == 10


def test_a_judgement_of_the_first_format_is_read() -> None:
    file = Path(__file__).resolve().parents[2] / "formats/1/judgement.json"
    judgement = Judgement.parse(file.read_bytes(), str(file))
    assert (judgement.read, judgement.usable, judgement.size.training_records) == (60, 60, 51)
    assert judgement.validation_records == 9


def test_the_manual_lists_every_code() -> None:
    manual = (Path(__file__).resolve().parents[3] / "docs/data.md").read_text(encoding="utf-8")
    rows = {row[1]: row[2:5] for row in (line.split("|") for line in manual.splitlines()) if len(row) == 6}

    def share(least: float | None) -> str:
        return "never" if least is None else "one" if least == 0 else f"{least:.0%}"

    for code in CODES.values():
        name = f" `{code.id}`{' ✂' if code.leaves_out else ''} "
        assert [cell.strip() for cell in rows[name]] == [share(code.warns_from), share(code.fails_from), code.why]
