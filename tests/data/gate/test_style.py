"""Unusual answers and one-sided data: reported where they were planted, and nowhere else."""

import numpy as np
import pytest

from ft_service.data.gate import Hit, Record, SecondPass
from ft_service.data.gate.balance import entropy_of
from ft_service.data.gate.facts import ending, register, shape
from ft_service.data.gate.text import language
from tests.data.gate.gate_cases import check_all, clean_pairs, clean_records, lines, record

STYLE = ("form.cut-off", "quality.too-short", "style.length", "style.register", "style.format", "style.language")


def with_answers(code: str, answers: list[str], spoken: str = "en", count: int = 100) -> tuple[list[int], list[Hit]]:
    """Lines with that code, when the first records have these answers; and the hits of other kinds of style."""
    pairs = clean_pairs(count, spoken)
    records = [
        record(question, answers[at] if at < len(answers) else answer, at + 1)
        for at, (question, answer) in enumerate(pairs)
    ]
    _, hits = check_all(records)
    return lines(hits, code), [hit for hit in hits if hit.code in STYLE and hit.code != code]


@pytest.mark.parametrize("spoken", ["en", "ja"])
def test_clean_records_have_no_style_findings(spoken: str) -> None:
    judgement, hits = check_all(clean_records(600, spoken))
    assert hits == [] and judgement.verdict == "pass" and judgement.findings == []


CUT = {"en": "Near Oslo the castle lifts a bridge that the river of", "ja": "新潟では城が橋を渡った。仙台の川は"}


@pytest.mark.parametrize("spoken", ["en", "ja"])
def test_answers_cut_off_in_mid_sentence_are_found(spoken: str) -> None:
    wanting = CUT[spoken] + {"en": " Lima,", "ja": "長野、"}[spoken]
    assert with_answers("form.cut-off", [CUT[spoken], wanting], spoken) == ([1, 2], [])


def test_no_answer_is_cut_off_if_none_ends_with_a_full_stop() -> None:
    pairs = clean_pairs(100)
    records = [record(q, a.rstrip("."), line) for line, (q, a) in enumerate(pairs, 1)]
    assert lines(check_all(records)[1], "form.cut-off") == []


def test_many_answers_of_one_length_were_cut_off_by_a_limit() -> None:
    pairs = clean_pairs(200)
    records = [
        record(q, (a.rstrip(".") if at % 2 else a[:100].replace(",", " ").replace(" ", "x")), at + 1)
        for at, (q, a) in enumerate(pairs)
    ]
    at_limit = [one.line for one in records if len(one.output) == 100]
    assert len(at_limit) >= 100
    assert lines(check_all(records)[1], "form.cut-off") == at_limit


SHORT = {"en": ["OK", "Yes."], "ja": ["は", "はい"]}


@pytest.mark.parametrize("spoken", ["en", "ja"])
def test_a_one_word_answer_among_sentences_is_too_short(spoken: str) -> None:
    assert with_answers("quality.too-short", SHORT[spoken], spoken) == ([1, 2], [])


@pytest.mark.parametrize("spoken", ["en", "ja"])
def test_labels_are_not_too_short(spoken: str) -> None:
    records = [record(q, SHORT[spoken][at % 2], at) for at, (q, _) in enumerate(clean_pairs(100, spoken), 1)]
    assert check_all(records)[1] == []


@pytest.mark.parametrize("spoken", ["en", "ja"])
def test_far_longer_or_shorter_answers_are_reported(spoken: str) -> None:
    usual = clean_pairs(1, spoken, seed=5)[0][1]
    shorter = {"en": "It lifts a bridge.", "ja": "橋を渡った。"}[spoken]
    reported, others = with_answers("style.length", [usual * 6, shorter], spoken)
    assert (reported, others) == ([1, 2], [])


def test_the_rarer_tone_is_reported() -> None:
    assert with_answers("style.register", ["lol yeah the river of Oslo is gonna carry that boat, dude!!"]) == ([1], [])
    polite = "新潟では城が橋を渡りました。仙台の川は広いです。長野の先生は庭を見ています。奈良の港は遠いです。"
    assert with_answers("style.register", [polite], "ja") == ([1], [])


def test_a_casual_answer_among_polite_ones_is_reported() -> None:
    polite = [f"{place}の{noun}は広いです。船は夕方に港へ帰ります。" for place in "東西南北" for noun in "川庭港城橋窓"]
    for casual in (
        "うん、いいよ！",
        "まじでやばいじゃんw",
        "川は広いよね〜",
        "それ、再起動すればいいんじゃない？",
        "とりあえず試してみて！",
    ):
        records = [record(f"{at}番の問いは何か", answer, at) for at, answer in enumerate([*polite, casual], 1)]
        assert lines(check_all(records)[1], "style.register") == [len(records)], casual
    assert with_answers("style.register", ["yeah just restart it lol"])[0] == [1]


def test_the_languages_of_bilingual_data_are_judged_apart() -> None:
    english = [record(*pair, line) for line, pair in enumerate(clean_pairs(110), 1)]
    polite = "の川は広いです。船は夕方に港へ帰ります。"
    for share in (100, 25, 5):  # half and half, a fifth, a few
        questions = [question for question, _ in clean_pairs(share, "ja")]
        japanese = [record(question, f"{at}{polite}", 200 + at) for at, question in enumerate(questions)]
        _, hits = check_all([*english, *japanese])
        assert [hit for hit in hits if hit.code in STYLE] == []
        casual = record("何か分からない質問がある", "うん、いいよ！", 990)
        lol = record("Who says that the boats come home?", "lol yeah the boats are gonna come home, dude!!", 991)
        switched = record(clean_pairs(1, "ja", seed=8)[0][0], clean_pairs(1, "en", seed=9)[0][1], 992)
        _, hits = check_all([*english, *japanese, casual, lol, switched])
        few = share < 20  # too few for anything to be usual among them
        assert lines(hits, "style.register") == ([991] if few else [990, 991])
        assert lines(hits, "style.language") == ([] if few else [992])


def test_an_unusual_language_is_reported_but_not_two_by_design() -> None:
    japanese = clean_pairs(1, "ja")[0][1]
    english = clean_pairs(1, "en")[0][1]
    reported, _ = with_answers("style.language", [japanese], "en")
    assert reported == [1]
    reported, _ = with_answers("style.language", [english], "ja")
    assert reported == [1]
    both = [*clean_pairs(100, "en"), *clean_pairs(100, "ja")]
    records = [record(*pair, line) for line, pair in enumerate(both, 1)]
    assert lines(check_all(records)[1], "style.language") == []
    switched = record(clean_pairs(1, "ja", seed=8)[0][0], english, 999)
    assert lines(check_all([*records, switched])[1], "style.language") == [999]
    translations = [
        record(f"Translate: {q}", ja, at)
        for at, ((q, _), (_, ja)) in enumerate(zip(both[:100], both[100:], strict=True), 1)
    ]
    assert lines(check_all(translations)[1], "style.language") == []


def test_an_unusual_format_is_reported() -> None:
    for answer in (
        "- the river of Oslo\n- the castle of Lima\n- the harbor",
        '{"river": "Oslo", "castle": [1, 2, 3], "harbor": null}',
    ):
        assert with_answers("style.format", [answer])[0] == [1]
    assert with_answers("style.format", ["・新潟の城と仙台の川\n・長野の先生の庭\n・奈良の港"], "ja")[0] == [1]


def test_each_source_is_checked_by_itself() -> None:
    from ft_service.data.gate import Gate, Source

    english = clean_records(100)
    japanese = clean_records(100, "ja")
    second = [Record(1, 0, one.line, one.item) for one in japanese]
    gate = Gate([Source(name, (name,), source="s", license="MIT") for name in ("en.jsonl", "ja.jsonl")])
    hits = [hit for one in [*english, *second] for hit in gate.check(one)]
    judgement = gate.judgement(SecondPass(), hits.append)
    assert hits == [] and [(s.path, s.read, s.usable) for s in judgement.sources] == [
        ("en.jsonl", 100, 100),
        ("ja.jsonl", 100, 100),
    ]


# -- traits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ("It was a long day and the boats came home late.", "sentence"),
        ("長い一日が終わり、船は遅くに港へ帰った。", "sentence"),
        ("長い一日が終わり、船は遅くに港へ帰ったそうです（本当）", "sentence"),
        ("He asked: “why did the boats come home so late?”", "sentence"),
        ("They made 3 + 4 = 7 boats in the spring of that year.\n#### 7", "figure"),
        ("長い一日が終わり、船は遅くに港へ帰った\n答え：はい", "figure"),
        ("It was a long day and the boats came home la", "letter"),
        ("長い一日が終わり、船は遅くに港へ帰っ", "letter"),
        ("They made three boats, then four, so in sum they made 7", "digit"),
        ("It was a long day, and the boats came home late,", "open"),
        ("長い一日が終わり、船は遅くに港へ帰り、", "open"),
        ("Here it is:\n```python\nprint('boats come home late')", "open"),
        ("Paris", "short"),
        ("絵本", "short"),
    ],
)
def test_the_ending_of_an_answer_is_recognised(output: str, kind: str) -> None:
    assert ending(output) == kind


@pytest.mark.parametrize(
    ("output", "tone"),
    [
        ("川は広いです。船が来ました。", "polite"),
        ("少々お待ちください。確認いたします。", "polite"),
        ("川は広い。船が来た。これは橋である。", "plain"),
        ("絵本", "none"),
        ("川は広いですよね。船も来ますよ！", "polite"),
        ("お願いします。", "polite"),
        ("川は広いよ。船が来たね〜", "casual"),
        ("了解っす！", "casual"),
        ("はい。", "none"),
        ("nah, it's gonna be fine", "casual"),
        ("The river is wide, and the boats come home in the evening.", "neutral"),
        ("omg the river is sooo wide, you gotta see it when u come!", "casual"),
        ("Paris", "none"),
    ],
)
def test_the_tone_of_an_answer_is_recognised(output: str, tone: str) -> None:
    assert register(output) == tone


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ('{"a": 1}', "json"),
        ("[1, 2, 3]", "json"),
        ("[brackets] and nothing else in a line that is long", "prose"),
        ("```python\nprint('the boats come home in the evening')\n```", "code"),
        ("| a | b |\n|---|---|\n| the river | the boats of Oslo |", "table"),
        ("1. the river of Oslo is wide\n2. the boats come home", "list"),
        ("# Boats\nThe boats come home in the evening, and rest.", "markdown"),
        ("The boats come home in the evening, and the river is wide.", "prose"),
    ],
)
def test_the_format_of_an_answer_is_recognised(output: str, kind: str) -> None:
    assert shape(output) == kind


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("The river is wide.", "latin"),
        ("川は広いです。", "japanese"),
        ("絵本", "none"),
        ("Pythonのprint関数で文字列を表示します。", "japanese"),
        ("这条河很宽，晚上船只返回港口，人们在岸边散步聊天休息。", "chinese"),
        ("강은 넓고 배는 저녁에 돌아온다.", "korean"),
        ("Река широкая, и лодки возвращаются вечером.", "cyrillic"),
        ("النهر واسع والقوارب تعود", "other"),
        ("12 + 34 = 46", "none"),
        ("", "none"),
    ],
)
def test_the_language_of_a_text_is_recognised(content: str, name: str) -> None:
    assert language(content) == name


# -- one-sidedness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoken", ["en", "ja"])
def test_answers_that_mostly_begin_alike_are_reported(spoken: str) -> None:
    opening = {"en": "The answer to this is: ", "ja": "この問いの答えは次の通り。"}[spoken]
    pairs = clean_pairs(100, spoken)

    def begun(share: int) -> list[Record]:
        return [record(q, (opening if at <= share else "") + a, at) for at, (q, a) in enumerate(pairs, 1)]

    assert lines(check_all(begun(60))[1], "balance.openings") == list(range(1, 61))
    judgement, hits = check_all(begun(40))
    assert lines(hits, "balance.openings") == []
    entropy = judgement.entropy["answer openings"]
    assert entropy.largest_share == pytest.approx(0.4) and entropy.largest.startswith(opening[:8])


@pytest.mark.parametrize("spoken", ["en", "ja"])
def test_questions_from_one_template_are_reported(spoken: str) -> None:
    template = {"en": "Translate the following: ", "ja": "次の文を英語に訳してください："}[spoken]
    records = [record(template + q, a, at) for at, (q, a) in enumerate(clean_pairs(100, spoken), 1)]
    assert lines(check_all(records)[1], "balance.templates") == list(range(1, 101))


def test_questions_from_three_templates_are_reported_but_not_from_four() -> None:
    templates = ["Translate the text: ", "Say in French: ", "How do I say: ", "What is French for: "]
    pairs = clean_pairs(120, "en")

    def records(count: int, others: int) -> list[Record]:
        begun = (("" if at <= others else templates[at % count]) + q for at, (q, _) in enumerate(pairs, 1))
        return [record(q, a, at) for at, (q, (_, a)) in enumerate(zip(begun, pairs, strict=True), 1)]

    assert lines(check_all(records(3, others=12))[1], "balance.templates") == list(range(13, 121))
    assert lines(check_all(records(3, others=36))[1], "balance.templates") == []
    assert lines(check_all(records(4, others=0))[1], "balance.templates") == []


@pytest.mark.parametrize(("spoken", "labels"), [("en", ("yes", "no")), ("ja", ("はい", "いいえ"))])
def test_a_dominating_label_is_reported(spoken: str, labels: tuple[str, str]) -> None:
    pairs = clean_pairs(100, spoken)
    rare = {at for at in range(1, 101) if at % 10 == 0}
    records = [record(q, labels[at in rare], at) for at, (q, _) in enumerate(pairs, 1)]
    judgement, hits = check_all(records)
    assert lines(hits, "balance.labels") == [at for at in range(1, 101) if at not in rare]
    assert judgement.entropy["labels"].largest == labels[0]
    fair = [record(q, labels[at % 2], at) for at, (q, _) in enumerate(pairs, 1)]
    judgement, hits = check_all(fair)
    assert hits == [] and judgement.entropy["labels"].bits == pytest.approx(1.0)


def test_effective_entropy_is_the_number_of_equally_frequent_kinds() -> None:
    assert entropy_of(np.array([5, 5, 5, 5])).effective == pytest.approx(4)
    assert entropy_of(np.array([7])).bits == 0
    assert entropy_of(np.array([99, 1])).effective == pytest.approx(1.0576, abs=1e-4)
