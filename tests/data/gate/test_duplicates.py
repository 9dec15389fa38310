"""Exact duplicates, near-duplicates and contradictions, in English and Japanese and in any order of shards."""

import numpy as np
import pytest

from ft_service.data.gate import Hit, Judgement, Record
from ft_service.data.gate.duplicates import jaccard
from ft_service.data.gate.text import fold, shingles
from ft_service.data.gate.wording import variants, words_of
from tests.data.gate.gate_cases import Pair, chat, check_all, clean_pairs, clean_records, lines, record, text
from tests.data.gate.helpdesk_cases import REWORDED, helpdesk_pairs

EN = (
    "How many boats cross the river of Oslo in spring when the snow melts?",
    "About 40 boats cross it, because the snow melts.",
)
JA = ("春に雪がとけるとき、オスロの川をわたる船は何隻ありますか。", "雪がとけるので、およそ40隻の船が川をわたります。")
NEAR = {
    EN: (
        "How many boats cross the river in Oslo in spring, when the snow melts?",
        "About 40 boats cross it because the snow melts!",
    ),
    JA: (
        "春に雪がとける時、オスロの川をわたる船は何隻ありますか？",
        "雪がとけるので、およそ40隻の船が川をわたりますよ。",
    ),
}
OTHER = {EN: "Nobody has ever counted them, and nobody will.", JA: "だれも数えたことがないので、わかりません。"}


def with_others(*pairs: tuple[str, str], language: str = "en") -> list[Record]:
    """These records as lines 1, 2, ... before 60 clean ones."""
    others = clean_pairs(60, language, seed=7)
    return [record(*pair, line=number) for number, pair in enumerate([*pairs, *others], 1)]


def repeated(records: list[Record], reread: bool = True) -> dict[str, list[int]]:
    _, hits = check_all(records, reread)
    codes = ("quality.exact-duplicate", "quality.near-duplicate", "quality.contradiction")
    return {code.removeprefix("quality."): found for code in codes if (found := lines(hits, code))}


CANNED = "Thank you for asking. Please write to the help desk, which answers within two days."


def test_canned_answers_are_not_leaked_questions() -> None:
    pairs = clean_pairs(60)
    train = [record(question, CANNED, line) for line, (question, _) in enumerate(pairs[:30], 1)]
    train += [record(*pair, line) for line, pair in enumerate(pairs[40:], 31)]
    held_out = [record(q, CANNED, 100 + at, split="validation") for at, (q, _) in enumerate(pairs[30:40])]
    alike = [record(f"How do I change my {what} online", CANNED, 200 + at) for at, what in enumerate(("plan", "name"))]
    asked = record("How do I change my plans online", CANNED, 300, split="validation")
    repeated = record(pairs[0][0], CANNED, 301, split="validation")
    _, hits = check_all([*train, *held_out, *alike, asked])
    assert lines(hits, "leak.validation") == []
    assert lines(hits, "leak.canned-answer") == [*range(1, 31), 200, 201]
    _, hits = check_all([*train, *held_out, *alike, asked, repeated])
    assert lines(hits, "leak.validation") == [1]  # the question itself is in validation
    assert 1 not in lines(hits, "leak.canned-answer")
    labels = [record(q, "yes", at, split="train" if at % 2 else "validation") for at, (q, _) in enumerate(pairs, 1)]
    assert lines(check_all(labels)[1], "leak.canned-answer") == []


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("reread", [True, False])
def test_clean_records_are_not_duplicates(language: str, reread: bool) -> None:
    assert repeated(clean_records(300, language), reread) == {}


@pytest.mark.parametrize("pair", [EN, JA])
def test_a_copy_is_an_exact_duplicate_and_is_left_out(pair: tuple[str, str]) -> None:
    question, answer = pair
    records = with_others(pair, pair, (f" {question}\n", answer))
    judgement, hits = check_all(records)
    assert lines(hits, "quality.exact-duplicate") == [2, 3], "white space at the ends is stripped by the chat format"
    assert {hit.detail for hit in hits if hit.code == "quality.exact-duplicate"} == {"same as data.jsonl:1"}
    assert judgement.left_out == {"quality.exact-duplicate": 2}
    assert judgement.usable == judgement.size.training_records == len(records) - 2


@pytest.mark.parametrize("pair", [EN, JA])
@pytest.mark.parametrize("reread", [True, False])
def test_a_record_with_small_edits_is_a_near_duplicate(pair: tuple[str, str], reread: bool) -> None:
    if reread:
        assert repeated(with_others(pair, NEAR[pair])) == {"near-duplicate": [2]}
    else:  # by the estimate alone, and only where the texts are equal but for what folding removes
        assert repeated(with_others(pair, (pair[0].upper(), pair[1] + "!")), reread) == {"near-duplicate": [2]}


def test_a_chain_of_near_duplicates_is_one_group() -> None:
    words = " ".join(question for question, _ in clean_pairs(4, seed=9)).split()[:60]
    texts = []
    for step in range(4):
        words[step * 4] = "changed" * (step + 1)
        texts.append(" ".join(words))
    records = [text(content, line) for line, content in enumerate([*texts, *(a for _, a in clean_pairs(30))], 1)]
    assert repeated(records) == {"near-duplicate": [2, 3, 4]}


@pytest.mark.parametrize("pair", [EN, JA])
def test_different_answers_to_one_question_contradict_each_other(pair: tuple[str, str]) -> None:
    question, _ = pair
    assert repeated(with_others(pair, (question, OTHER[pair]))) == {"contradiction": [1, 2]}
    assert repeated(with_others(pair, (f"『{question.upper()}』 ", OTHER[pair]))) == {"contradiction": [1, 2]}
    context = {
        EN: "In the north of Europe winters are long. People wait for the sun. ",
        JA: "北欧の冬は長く、人々は太陽を待ちます。川は氷でおおわれ、船は港にとどまります。",
    }
    pairs = [(context[pair] + question, pair[1]), (context[pair] + NEAR[pair][0], OTHER[pair])]
    assert repeated(with_others(*pairs)) == {"contradiction": [1, 2]}


def test_short_answers_that_differ_in_one_character_contradict() -> None:
    assert repeated(with_others((EN[0], "40"), (EN[0], "41"))) == {"contradiction": [1, 2]}
    assert repeated(with_others((JA[0], "はい"), (JA[0], "いいえ"))) == {"contradiction": [1, 2]}
    assert repeated(with_others((JA[0], "はい"), (JA[0], "はい。"))) == {"near-duplicate": [2]}
    assert repeated(with_others((JA[0], "はい"), (JA[0], "いいえ")), reread=False) == {"contradiction": [1, 2]}


def test_long_answers_with_different_results_contradict() -> None:
    answer = "First count the boats in the harbor, then those on the river, and add up. The result is "
    assert repeated(with_others((EN[0], answer + "40."), (EN[0], answer + "42."))) == {"contradiction": [1, 2]}


def test_word_problems_with_other_numbers_are_different() -> None:
    question = "A baker of Turin makes {} loaves a day and sells each for {} coins. How much does he earn in a week?"
    pairs = [(question.format(n, m), f"He earns {7 * n * m} coins.") for n, m in ((3, 4), (5, 4), (3, 9))]
    assert repeated(with_others(*pairs)) == {}
    question = "トリノのパン屋は一日に{}個のパンを作り、一つ{}円で売ります。一週間の売り上げはいくらですか。"
    pairs = [(question.format(n, m), f"{7 * n * m}円です。") for n, m in ((3, 4), (5, 4), (3, 9))]
    assert repeated(with_others(*pairs, language="ja")) == {}


def test_another_last_question_makes_another_question() -> None:
    chats = [EN, (EN[0], "About 40 boats cross it because the snow melts.")]
    story = "A baker and a smith of Turin share a cart. "
    pairs = [
        (story + "What does the baker carry?", "Bread."),
        (story + "Where did the smith learn his trade?", "In Basel."),
    ]
    assert repeated(with_others(*chats, *pairs)) == {"near-duplicate": [2]}


SYSTEM = (
    "You are a careful assistant of a large library. You answer in one short sentence, you name the shelf where a book "
    "stands if you know it, you never guess, and you say so when the question is not about books or about the library."
)
PASSAGE = (
    "The bridge of Turin was built in 1851 by a guild of masons who had come from Basel. It burned twice, was widened "
    "for the trams of 1896, and carries forty thousand people on a working day, most of them on foot."
)
INSTRUCTION = (
    "Read the review of a customer below and say in one word whether it is positive or negative, and nothing else: "
)
JA_INSTRUCTION = "次のお客様の声を読み、肯定的か否定的かを一語で答えてください。説明や理由は不要です。お客様の声："


@pytest.mark.parametrize("shared", ["system", "passage", "instruction", "japanese"])
def test_a_common_prompt_does_not_make_questions_equal(shared: str) -> None:
    pairs = clean_pairs(60, "ja" if shared == "japanese" else "en", seed=5)
    questions = [question for question, _ in pairs]
    answers = ["positive" if at % 2 else "negative" for at in range(len(pairs))]
    records = {
        "system": lambda at: chat(
            ("system", SYSTEM), ("user", questions[at]), ("assistant", pairs[at][1]), line=at + 1
        ),
        "passage": lambda at: record(f"{PASSAGE}\n\n{questions[at]}", pairs[at][1], at + 1),
        "instruction": lambda at: record(INSTRUCTION + questions[at], answers[at], at + 1),
        "japanese": lambda at: record(JA_INSTRUCTION + questions[at], answers[at], at + 1),
    }[shared]
    _, hits = check_all([records(at) for at in range(60)])
    assert [hit for hit in hits if hit.code in ("quality.contradiction", "quality.near-duplicate")] == []


WORDS = (
    "cat dog river stone bread table window garden summer winter bridge music paper cheese ladder mirror pocket rabbit "
    "silver thunder village whistle yellow zebra apple button candle dragon engine forest guitar hammer island jacket"
)
NOUNS = "犬 猫 川 石 机 窓 庭園 夏休み 冬山 橋 音楽 和紙 銀行 雷雨 村役場 笛 林檎 蝋燭 竜 機関車 森 槌 島 上着 鏡 兎"


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("reread", [True, False])
def test_a_template_with_another_word_is_another_question(language: str, labels: bool, reread: bool) -> None:
    template, fillings = (
        ("Translate the following English word into French, and say of which gender it is: {}.", WORDS.split())
        if language == "en"
        else ("次の名詞をフランス語に訳し、男性名詞か女性名詞かもあわせて答えてください。名詞：{}", NOUNS.split())
    )
    answers = [answer for _, answer in clean_pairs(len(fillings), language, seed=9)]
    records = [
        record(template.format(word), "masculine" if labels else answers[at], at + 1)
        for at, word in enumerate(fillings)
    ]
    assert repeated(records, reread) == {}


def test_repeats_are_found_under_a_common_prompt() -> None:
    pairs = clean_pairs(40, seed=5)
    records = [record(INSTRUCTION + question, "positive", line) for line, (question, _) in enumerate(pairs, 1)]
    _, hits = check_all([*records, record(INSTRUCTION + pairs[7][0], "negative", 41)])
    assert lines(hits, "quality.contradiction") == [8, 41]


def planted(pairs: list[Pair]) -> tuple[list[Pair], list[int]]:
    """Second answers to some of the questions, each differently worded; and the lines of both records of each."""
    questions = [question for question, _ in pairs]
    contradicting = []
    places = []
    for number, (part, other) in enumerate(REWORDED):
        at = next(at for at, question in enumerate(questions) if part in question and at + 1 not in places)
        answer = "それについてはお答えできません。ほかの店にお尋ねになるようお願いします。"
        contradicting.append((questions[at].replace(part, other).strip(), answer))
        places += [at + 1, len(pairs) + number + 1]
    return contradicting, sorted(places)


@pytest.mark.parametrize("products", [4, 9, 31])
@pytest.mark.parametrize("seed", range(3))
def test_a_help_desk_asks_the_same_of_many_products_without_a_contradiction(products: int, seed: int) -> None:
    pairs = helpdesk_pairs(seed, products)
    assert repeated([record(*pair, line=line) for line, pair in enumerate(pairs, 1)]) == {}
    contradicting, places = planted(pairs)
    others = [pair for line, pair in enumerate(pairs, 1) if line not in places]
    edited = [(question, answer.replace("承ります", "うけたまわります")) for question, answer in others[:3]]
    records = [record(*pair, line=line) for line, pair in enumerate([*pairs, *contradicting, *edited], 1)]
    near = [len(pairs) + len(contradicting) + number for number in (1, 2, 3)]
    assert repeated(records) == {"contradiction": places, "near-duplicate": near}


FILLED = {
    "モニター ヒーター ルーター": "先週購入した{}の調子が悪いので、修理をお願いしたいのですが、どこへ送りますか。",
    "りんご みかん ぶどう": "次のくだものについて、旬の季節とおいしい食べ方を短く説明してください。くだもの：{}",
    "東京支店 京都支店 東支店": "来月の会議は{}で行う予定ですが、最寄りの駅から会場まで歩いて何分くらいかかりますか。",
    "モデルA モデルB モデルC": "先週発売された{}の取扱説明書をなくしたので、もう一度送っていただくことはできますか。",
    "显示器 投影仪 打印机": "您好，我上个星期在网上商店购买了一台{}，请问它的保修期是多长时间，坏了应该联系哪里？",
    "프린터 라우터 모니터": "지난주에 온라인 매장에서 {}를 구입했는데 보증 기간이 얼마나 되는지 알려 주세요.",
    "fan van pan": "I bought a {} in your online shop last week and would like to know how long it is under warranty.",
    "cat cats dog dogs": "Translate the following English word into French, and say of which gender it is: {}.",
    "can cannot never": "Which animals of the European forests {} swim across a wide river when the water is cold?",
}


@pytest.mark.parametrize(("words", "template"), FILLED.items())
def test_a_few_words_in_a_long_template_make_as_many_questions(words: str, template: str) -> None:
    answers = [answer for _, answer in clean_pairs(5, seed=9)]
    pairs = [(template.format(word), answer) for word, answer in zip(words.split(), answers, strict=False)]
    assert repeated(with_others(*pairs)) == {}
    assert repeated(with_others(*pairs, (pairs[0][0], answers[4]))) == {"contradiction": [1, len(pairs) + 1]}


SAME_QUESTION = [
    ("春に雪がとけるとき、船は何隻ありますか。", "春に雪がとける時、船は何隻ありますか？"),
    ("プリンターの電源が入りません。どうすればいいですか", "プリンタの電源が入りません。どうしたらよいでしょうか。"),
    ("返品の手続きを教えてください。", "返品の手続きをおしえて下さい"),
    ("返品の手続きを教えてください。", "返品手続きを教えていただけますか。"),
    ("パスワードを変更したい場合、どこに連絡しますか。", "パスワードを変更する際はどこに連絡しますか。"),
    ("インターネットがつながりません", "インタネットがつながりません"),
    ("请问显示器的保修期是多久？", "显示器保修期是多久呢"),
    ("모니터의 보증 기간은 얼마입니까?", "모니터의 보증기간은 얼마입니까"),
    ("How many boats cross the river of Oslo", "How many boats cross the river in Oslo"),
    ("How do I change my plan online", "How do I change my plans online"),
    ("How many hours does it take", "How much hours does it take"),
    ("Please tell me the warranty on this monitor", "Tell me the waranty of this montior"),
    ("Where is the e-mail icon of the café", "Where is the email icon of the cafe"),
    ("In spring when snow melts, how many boats cross?", "How many boats cross in spring when snow melts?"),
]
OTHER_QUESTION = [
    ("モニターの保証期間は", "ヒーターの保証期間は"),
    ("メーターの値段", "モーターの値段"),
    ("ビルはどこ", "ビールはどこ"),
    ("東京支店の電話", "京都支店の電話"),
    ("東京の電話", "東京都の電話"),
    ("りんごはいくらですか", "みかんはいくらですか"),
    ("ねこの写真", "犬の写真"),
    ("会員から受け取る", "会員まで受け取る"),
    ("東京から大阪へ行く", "大阪から東京へ行く"),
    ("食べられるものは", "食べられないものは"),
    ("モデルAの色", "モデルBの色"),
    ("开机时显示器没有画面", "开机时投影仪没有画面"),
    ("北京分店的电话", "南京分店的电话"),
    ("모니터를 반품", "프린터를 반품"),
    ("from Oslo to Lima", "from Lima to Oslo"),
    ("flights from Oslo", "flights to Oslo"),
    ("the boat is red", "the coat is red"),
    ("When does the shop open?", "When does the shop open on Sunday?"),
    ("which animals can fly", "which animals can not fly"),
    ("3 + 4", "3 * 4"),
]


@pytest.mark.parametrize(("first", "second"), SAME_QUESTION)
def test_particles_endings_spellings_and_typos_are_wording(first: str, second: str) -> None:
    assert variants(words_of(first), words_of(second)) is not None
    assert variants(words_of(second), words_of(first)) is not None


@pytest.mark.parametrize(("first", "second"), OTHER_QUESTION)
def test_another_word_is_not_wording(first: str, second: str) -> None:
    assert variants(words_of(first), words_of(second)) is None
    assert variants(words_of(second), words_of(first)) is None


def test_an_open_ended_question_has_no_contradictions() -> None:
    ideas = clean_pairs(12, seed=3)
    assert repeated(with_others(*(("Tell me a story.", answer) for _, answer in ideas))) == {}
    assert repeated(with_others(*(("Tell me a story.", answer) for _, answer in ideas[:3]))) == {
        "contradiction": [1, 2, 3]
    }


def test_a_training_copy_of_validation_is_a_leak_not_a_duplicate() -> None:
    question, answer = EN
    records = [
        *with_others(EN, JA, ("Is it so?", "No.")),
        record(question, answer, 101, split="validation"),
        record(*NEAR[JA], 102, split="validation"),
    ]
    judgement, hits = check_all(records)
    assert lines(hits, "leak.validation") == [1, 2]
    assert next(hit.detail for hit in hits if hit.code == "leak.validation") == "also in validation, data.jsonl:101"
    assert judgement.left_out == {} and judgement.size.training_records == 63


# -- how -------------------------------------------------------------------------------------------------------------


def true_jaccard(a: str, b: str) -> float:
    first = set(shingles(fold(a)).tolist())
    second = set(shingles(fold(b)).tolist())
    return len(first & second) / len(first | second)


def test_similarity_is_exact_for_short_texts_and_close_for_long() -> None:
    short = EN[0], NEAR[EN][0]
    sketches = [shingles(fold(part))[:512] for part in short]
    assert jaccard(*sketches) == pytest.approx(true_jaccard(*short))
    words = [word for pair in clean_pairs(60) for word in pair[0].split()]
    long = " ".join(words), " ".join(words[: len(words) * 4 // 5] + ["else"] * 40)
    sketches = [shingles(fold(part))[:512] for part in long]
    assert min(map(len, sketches)) == 512
    assert jaccard(*sketches) == pytest.approx(true_jaccard(*long), abs=0.07)


def test_few_records_are_read_a_second_time() -> None:
    from tests.data.gate.gate_cases import new_gate

    records = with_others(EN, NEAR[EN])
    gate = new_gate()
    for one in records:
        gate.check(one)
    second_pass = gate.second_pass()
    wanted = [one.line for one in records if second_pass.is_wanted(one.key)]
    assert {1, 2} <= set(wanted) and len(wanted) < len(records) / 2


def test_findings_do_not_depend_on_shards_or_their_order() -> None:
    from tests.data.gate.gate_cases import new_gate

    records = [
        *with_others(EN, EN, NEAR[EN], (EN[0], OTHER[EN]), language="ja"),
        *(record(*JA, line=90 + n) for n in range(2)),
    ]

    def through(shards: list[list[Record]]) -> tuple[Judgement, list[Hit]]:
        gates = [new_gate() for _ in shards]
        shard_hits = [[gate.check(one) for one in shard] for gate, shard in zip(gates, shards, strict=True)]
        hits = [hit for of_shard in shard_hits for of_record in of_shard for hit in of_record]
        whole = gates[0]
        for gate, of_shard in zip(gates[1:], shard_hits[1:], strict=True):
            whole.merge(gate.partial_result(), of_shard)
        passes = [whole.second_pass() for _ in shards]
        for partial_pass, shard in zip(passes, shards, strict=True):
            for one in shard:
                partial_pass.add(one)
        for partial_pass in passes[1:]:
            passes[0].merge(partial_pass)
        return whole.judgement(passes[0], hits.append), sorted(hits, key=str)

    order = np.random.default_rng(0).permutation(len(records)).tolist()
    expected = through([records])
    assert through([records[:20], records[20:50], records[50:]]) == expected
    assert through([[records[at] for at in order[:30]], [records[at] for at in order[30:]]]) == expected
    assert expected[0].finding("quality.contradiction") and expected[0].finding("quality.exact-duplicate")
