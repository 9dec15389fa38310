"""The data gate against known defects: each kind planted into real records, then found; precision and recall a code.

python benchmarks/data_gate.py --english gsm8k/train.jsonl --japanese jcommonsenseqa/train.jsonl [--records 4000]
python benchmarks/data_gate.py --smoke         on made-up records

A file is JSON lines with the columns `question` and `answer`, or those of `--columns instruction=...,output=...`, or of
JCommonsenseQA (then: from answer and choices to the quiz question, which is a Japanese sentence). Some records are held
out as an evaluation set; into the others every kind of defect is planted, each in records of its own. A hit counts as
right on a record where its kind was planted, and is not counted where the original had it too (those are the alarms on
the clean original, told by themselves) or where a planted defect brings it about (a cut answer is also short).
"""

import argparse
import base64
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.result import add_smoke_option, print_result, shrink
from ft_service.chat.format import ChatFormat
from ft_service.data.encode import Encoder
from ft_service.data.gate import EvaluationSets, Gate, Hit, Judgement, Source, read_source
from ft_service.data.gate.records import place_of
from ft_service.data.read import scan
from ft_service.model.scratch import train_tokenizer
from ft_service.spec.schema import DataSource

GOAL = 0.95
GOAL_NEAR = 0.9
NEAR = ("quality.near-duplicate", "quality.contradiction")
STATISTICAL = ("form.cut-off", "quality.too-short", "style.length", "style.register", "style.format", "style.language")
"""Judged by what is usual in the data, so not deterministic; held to the lower goal."""
GOAL_ALARMS = 0.01
"""Share of the clean original's records on which one code may warn."""
TRUE_OF_CLEAN = ("style.register",)
"""JCommonsenseQA really asks some questions politely (何といいますか) and others plainly (何という)."""
SHARE = 0.015
"""Of the records, for each kind of defect."""
MAX_SEQ_LEN = 512
HELD_OUT = 300
SMOKE_RECORDS = 1200

Messages = list[dict[str, Any]]


@dataclass
class Case:
    """A record to write, with what was planted in it, and which codes that brings about besides."""

    line: bytes
    planted: set[str] = field(default_factory=set)
    also: set[str] = field(default_factory=set)
    origin: bytes = b""
    """The clean line it was made of, where that is another."""


@dataclass(frozen=True)
class Pair:
    question: str
    answer: str


# -- clean records ---------------------------------------------------------------------------------------------------


def read_pairs(file: Path, columns: dict[str, str], limit: int) -> list[Pair]:
    pairs = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "choice0" in record:
            choices = [record[f"choice{number}"] for number in range(5)]
            asked = (
                f"答えが「{choices[record['label']]}」となるクイズを作ってください。選択肢は{'、'.join(choices)}です。"
            )
            pairs.append(Pair(asked, record["question"]))
        else:
            pairs.append(Pair(record[columns["instruction"]], record[columns["output"]]))
        if len(pairs) == limit:
            break
    return pairs


def messages(pair: Pair) -> Messages:
    return [{"role": "user", "content": pair.question}, {"role": "assistant", "content": pair.answer}]


def line(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


def chat_line(pair: Pair) -> bytes:
    return line({"messages": messages(pair)})


# -- defects ---------------------------------------------------------------------------------------------------------

Planter = Callable[[Pair, random.Random], bytes | None]
"""A clean pair with one defect; None where it cannot have it (too short to be cut)."""


def on_messages(change: Callable[[Messages, random.Random], Any]) -> Planter:
    def plant(pair: Pair, dice: random.Random) -> bytes:
        turns = messages(pair)
        changed = change(turns, dice)
        return line({"messages": turns if changed is None else changed})

    return plant


def on_answer(change: Callable[[str, random.Random], str | None]) -> Planter:
    def plant(pair: Pair, dice: random.Random) -> bytes | None:
        answer = change(pair.answer, dice)
        return None if answer is None else chat_line(Pair(pair.question, answer))

    return plant


def inserted(text: str, piece: str, dice: random.Random) -> str:
    at = dice.randrange(len(text) // 3, len(text))
    return text[:at] + piece + text[at:]


def role_order(turns: Messages, dice: random.Random) -> Any:
    user, assistant = turns
    return dice.choice(
        [
            [assistant, user, assistant],
            [user, user, assistant],
            [user, assistant, assistant],
            [user, {"role": "system", "content": "Be kind."}, assistant],
        ]
    )


def mojibake(text: str, dice: random.Random) -> str:
    if text.isascii():
        text = inserted(text, dice.choice([" — so to say — ", " “in short” ", " (at the café) ", " it’s "]), dice)
        return text.encode().decode(dice.choice(["cp1252", "latin-1"]), "ignore")
    written, read = dice.choice([("utf-8", "cp1252"), ("utf-8", "latin-1"), ("utf-8", "cp932"), ("cp932", "latin-1")])
    return text.encode(written, "ignore").decode(read, "ignore")


def lost_characters(text: str, dice: random.Random) -> str:
    at = dice.randrange(len(text))
    return text[:at] + "\ufffd" + text[at + 1 :]


def html(text: str, dice: random.Random) -> str:
    kind = dice.randrange(4)
    if kind == 0:
        return f"<p>{text}</p>"
    if kind == 1:
        return inserted(text, "<br />", dice)
    return inserted(text, "&nbsp;" if kind == 2 else '<span class="x">', dice)


def luhn(digits: str) -> str:
    doubled = [sum(divmod(2 * int(d), 10)) if at % 2 == 0 else int(d) for at, d in enumerate(reversed(digits))]
    return digits + str(-sum(doubled) % 10)


def digits(count: int, dice: random.Random) -> str:
    return "".join(dice.choice("0123456789") for _ in range(count))


def letters(count: int, dice: random.Random) -> str:
    return "".join(dice.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789") for _ in range(count))


def email(dice: random.Random) -> str:
    name = dice.choice(["taro.yamada", "j.smith+news", "anna_k", "info", "k-tanaka"])
    return f"{name}@{dice.choice(['gmail.com', 'mail.co.jp', 'firma-gmbh.de', 'u-tokyo.ac.jp'])}"


def phone(dice: random.Random) -> str:
    local = f"{dice.randrange(201, 990)}", f"{dice.randrange(201, 990)}", digits(4, dice)
    return dice.choice(
        [
            "({}) {}-{}".format(*local),
            "{}-{}-{}".format(*local),
            f"+1 {local[0]} {local[1]} {local[2]}",
            f"+81-90-{digits(4, dice)}-{digits(4, dice)}",
            f"090-{digits(4, dice)}-{digits(4, dice)}",
            f"03-{dice.randrange(3000, 6999)}-{digits(4, dice)}",
        ]
    )


def card(dice: random.Random) -> str:
    number = luhn(dice.choice(["4", "51", "55", "35"]).ljust(5, "2") + digits(10, dice))
    between = dice.choice(["", " ", "-"])
    parts = between.join(number[at : at + 4] for at in range(0, 16, 4))
    # An unbroken number may be any: it counts as a card's where one is spoken of.
    return parts if between else f"{dice.choice(['card', 'VISA', 'カード番号'])} {parts}"


def key(dice: random.Random) -> str:
    block = base64.b64encode(dice.randbytes(120)).decode()
    return dice.choice(
        [
            f"AKIA{letters(16, dice).upper()}",
            f"ghp_{letters(36, dice)}",
            f"sk-proj-{letters(48, dice)}",
            f"hf_{letters(34, dice)}",
            f"-----BEGIN RSA PRIVATE KEY-----\n{block}\n-----END RSA PRIVATE KEY-----",
        ]
    )


def private(make: Callable[[random.Random], str]) -> Planter:
    def change(text: str, dice: random.Random) -> str:
        japanese = any("\u3040" < c < "\u30ff" for c in text)
        ask = dice.choice(
            ["連絡先は{}です。", "（{}）", "問い合わせ：{} "] if japanese else ["Ask {}. ", "({}) ", "Contact: {}. "]
        )
        return ask.format(make(dice)) + text

    return on_answer(change)


SPECIAL = ["<|eot_id|>", "<|im_end|>", "[/INST]", "<|start_header_id|>assistant<|end_header_id|>", "</s>"]
TEMPLATES = {"en": ["### Response:\n", "\nHuman: "], "ja": ["### 応答:\n", "\nユーザー："]}
REFUSALS = {
    "en": [
        "I'm sorry, but I cannot help with that request.",
        "As an AI language model, I do not have an opinion on this.",
        "I can't assist with that. Please ask something else.",
        "I am unable to provide this; as a language model I have no access to it.",
    ],
    "ja": [
        "申し訳ありませんが、そのご質問にはお答えできません。",
        "AI言語モデルとして、個人的な意見は持っておりません。",
        "申し訳ございませんが、このご依頼はお手伝いできません。",
        "私はAIですので、その内容についてはお答えできかねます。",
    ],
}
BOILERPLATE = {
    "en": [
        "Certainly! {}",
        "Of course! {}",
        "{}\nI hope this helps!",
        "{}\nLet me know if you have any other questions.",
    ],
    "ja": [
        "もちろんです。{}",
        "承知しました。{}",
        "{}\nお役に立てれば幸いです。",
        "{}\nご不明な点がございましたら、お気軽にお尋ねください。",
    ],
}
OTHER_LANGUAGE = {
    "en": [
        "最初に全部の数を足してから、半分に分けて考えればよいことが分かります。",
        "この問題は順番に計算すれば簡単に解けます。",
    ],
    "ja": [
        "What do you call the thing that is used for this purpose?",
        "Which of these is found near the water in summer?",
    ],
}
OTHER_TONE = {
    "en": "lol yeah so basically {} and that's it dude!!",
    "ja": "{}これは大切なことです。よく覚えておきましょう。どうぞお試しください。",
}
LIST = {
    "en": "- first, read it again\n- then count\n- {}",
    "ja": "・まず読むこと、それから数えること\n・よく考えること\n・{}",
}
CUT = {"en": 150, "ja": 17}


def planters(language: str, usual: float) -> dict[str, tuple[Planter, tuple[str, ...]]]:
    """Code -> what plants it, and the codes it may bring about. `usual` is the median length of an answer."""
    shape: tuple[str, ...] = ("style.length", "form.cut-off", "style.format", "style.register", "style.language")
    shape = (*shape, "quality.too-short", "signal.truncated", "signal.end-not-trained")

    def cut(text: str, dice: random.Random) -> str | None:
        length = CUT[language]
        return text[:length] if len(text) > length + 2 and text[length - 1] not in " \n。？?.!" else None

    def truncated_line(pair: Pair, dice: random.Random) -> bytes:
        whole = chat_line(pair).decode()
        return whole[: dice.randrange(10, len(whole) - 3)].encode()

    def not_utf8(pair: Pair, dice: random.Random) -> bytes:
        if dice.random() < 0.5:
            return chat_line(Pair(lost_characters(pair.question, dice), pair.answer))
        if language == "ja":
            return chat_line(pair).decode().encode("cp932", "ignore")
        return chat_line(Pair(pair.question, pair.answer + " café")).decode().encode("latin-1", "ignore")

    def special(text: str, dice: random.Random) -> str:
        if dice.random() < 0.3:
            return dice.choice(TEMPLATES[language]).lstrip() + text
        return inserted(text, dice.choice(SPECIAL), dice)

    def long_question(pair: Pair, dice: random.Random) -> bytes:
        return chat_line(Pair(" ".join(f"{pair.question} {digits(6, dice)}" for _ in range(40)), pair.answer))

    def long_answer(pair: Pair, dice: random.Random) -> bytes:
        return chat_line(
            Pair(pair.question, "".join(f"{pair.answer}({digits(5, dice)})\n" for _ in range(45)) + pair.answer)
        )

    return {
        "form.unreadable": (truncated_line, ("form.encoding",)),
        "form.wrong-type": (
            on_messages(lambda m, d: m[d.randrange(2)].update(content=d.choice([17, None, ["a"], {"text": "x"}]))),
            (),
        ),
        "form.missing-column": (lambda p, d: line({d.choice(["mesages", "text", "conversation"]): messages(p)}), ()),
        "form.unknown-role": (
            on_messages(lambda m, d: m[d.randrange(2)].update(role=d.choice(["human", "gpt", "bot"]))),
            (),
        ),
        "form.role-order": (on_messages(role_order), shape),
        "form.no-answer": (
            on_messages(lambda m, d: m[:1] if d.random() < 0.5 else [{**m[0]}, {**m[1], "weight": 0}]),
            (),
        ),
        "form.empty-output": (on_messages(lambda m, d: m[1].update(content=d.choice(["", "  \n", "\u3000"]))), ()),
        "form.empty-input": (on_messages(lambda m, d: m[0].update(content=d.choice(["", " ", "\n\n"]))), ()),
        "form.encoding": (not_utf8, ("form.unreadable",)),
        "form.mojibake": (on_answer(mojibake), (*shape, "form.control-characters")),
        "form.control-characters": (on_answer(lambda t, d: inserted(t, d.choice("\x00\x07\x1b\u200b\ufeff"), d)), ()),
        "form.special-tokens": (on_answer(special), shape),
        "form.html": (on_answer(html), shape),
        "form.cut-off": (on_answer(cut), shape),
        "signal.no-loss-tokens": (long_question, ()),
        "signal.truncated": (long_answer, shape),
        "quality.copied-instruction": (lambda p, d: chat_line(Pair(p.question, f"{p.question}\n{p.answer}")), shape),
        "quality.refusal": (on_answer(lambda t, d: d.choice(REFUSALS[language])), shape),
        "quality.boilerplate": (on_answer(lambda t, d: d.choice(BOILERPLATE[language]).format(t)), shape),
        "quality.too-short": (
            on_answer(lambda t, d: d.choice({"en": ["Yes.", "OK", "12"], "ja": ["。", "は", "〇"]}[language])),
            shape,
        ),
        "style.length": (
            on_answer(lambda t, d: " ".join(t + digits(4, d) for _ in range(round(10 * usual / len(t)) + 1))),
            shape,
        ),
        "style.register": (on_answer(lambda t, d: OTHER_TONE[language].format(t)), shape),
        "style.format": (on_answer(lambda t, d: LIST[language].format(t)), shape),
        "style.language": (on_answer(lambda t, d: d.choice(OTHER_LANGUAGE[language])), shape),
        "private.email": (private(email), shape),
        "private.phone": (private(phone), shape),
        "private.card": (private(card), shape),
        "private.key": (private(key), shape),
    }


SWAPS = {
    "en": [
        (" the ", " a "),
        (" and ", " & "),
        (" is ", " was "),
        (". ", " . "),
        ("How ", "how "),
        (" many ", " much "),
        (", ", " "),
    ],
    "ja": [
        ("です", "でございます"),
        ("なに", "何"),
        ("こと", "事"),
        ("もの", "物"),
        ("は？", "とは？"),
        ("を", "をば"),
        ("の", "のの"),
        ("、", " "),
    ],
}


EDITED_FROM = 16
"""Characters: in a shorter answer a changed character makes another answer, so those are left as they are."""


def edited_pair(pair: Pair, language: str, dice: random.Random) -> Pair:
    """The same in slightly other words."""
    answer = edited(pair.answer, language, dice) if len(pair.answer) >= EDITED_FROM else pair.answer
    return Pair(edited(pair.question, language, dice), answer)


def edited(text: str, language: str, dice: random.Random) -> str:
    """The text with one or two small changes that leave its meaning and its numbers alone."""
    swaps = [swap for swap in SWAPS[language] if swap[0] in text]
    for old, new in dice.sample(swaps, min(len(swaps), dice.choice([1, 2] if len(text) > 60 else [1]))):
        text = text.replace(old, new, 1)
    return text


def plant(pairs: list[Pair], held_out: list[Pair], language: str, dice: random.Random) -> list[Case]:
    """Clean records in which every kind is planted, in an order of chance."""
    dice.shuffle(pairs)
    each = max(8, round(SHARE * len(pairs)))
    left = iter(pairs)
    cases: list[Case] = []
    usual = statistics.median(len(pair.answer) for pair in pairs)
    for code, (make, also) in planters(language, usual).items():
        made = 0
        while made < each:
            pair = next(left)
            if (broken := make(pair, dice)) is None:
                cases.append(Case(chat_line(pair)))
                continue
            cases.append(Case(broken, {code}, set(also), chat_line(pair)))
            made += 1
    for _ in range(each):
        pair = next(left)
        cases += [Case(chat_line(pair)), Case(chat_line(pair), {"quality.exact-duplicate"})]
        pair = next(left)
        other = edited_pair(pair, language, dice)
        while other == pair:  # nothing to change in it: it would be an exact duplicate
            cases.append(Case(chat_line(pair)))
            pair = next(left)
            other = edited_pair(pair, language, dice)
        cases += [Case(chat_line(pair), {"near:pair"}), Case(chat_line(other), {"near:pair"}, origin=chat_line(pair))]
        pair = next(left)
        wrong = next(left)
        question = pair.question if dice.random() < 0.5 else edited(pair.question, language, dice)
        cases += [
            Case(chat_line(pair), {"quality.contradiction"}),
            Case(chat_line(Pair(question, wrong.answer)), {"quality.contradiction"}, origin=chat_line(wrong)),
            Case(chat_line(wrong)),
        ]
    for pair in dice.sample(held_out, min(each, len(held_out))):
        question = pair.question if dice.random() < 0.5 else edited(pair.question, language, dice)
        cases.append(Case(chat_line(Pair(question, pair.answer)), {"leak.evaluation"}))
    cases += [Case(chat_line(pair)) for pair in left]
    dice.shuffle(cases)
    seen: dict[bytes, Case] = {}
    for case in cases:  # of two copies the later one is the duplicate
        if case.line in seen and "quality.exact-duplicate" in (case.planted | seen[case.line].planted):
            seen[case.line].planted.discard("quality.exact-duplicate")
            case.planted.add("quality.exact-duplicate")
        seen.setdefault(case.line, case)
    return cases


# -- judging ---------------------------------------------------------------------------------------------------------


@dataclass
class Judged:
    judgement: Judgement
    hits: dict[str, set[int]]
    seconds: float


def judge(lines: list[bytes], held_out: list[Pair], chat: ChatFormat, folder: Path) -> Judged:
    """The gate over a file of these lines; hits are line numbers."""
    file = folder / "train.jsonl"
    other = folder / "held-out.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    other.write_bytes(b"\n".join(map(chat_line, held_out)) + b"\n")
    source = DataSource(path=str(file), format="chat", source="planted", license="MIT")
    started = time.process_time()
    evaluation = EvaluationSets([("held-out", read_source(0, DataSource(path=str(other), format="chat")))])
    gate = Gate([Source.of(source, scan(0, source))], max_seq_len=MAX_SEQ_LEN, evaluation=evaluation, chat=chat)
    hits: dict[str, set[int]] = defaultdict(set)

    def note(hit: Hit) -> None:
        hits[hit.code].add(place_of(hit.key)[2])

    read = list(read_source(0, source))
    encoded = Encoder(chat.tokenizer, chat, MAX_SEQ_LEN)(read)
    records = [replace(record, tokens=tokens) for record, (tokens, _) in zip(read, encoded, strict=True)]
    for record in records:
        for hit in gate.check(record):
            note(hit)
    second_pass = gate.second_pass()
    for record in records:
        second_pass.add(record)
    judgement = gate.judgement(second_pass, note)
    assert judgement.read == len(lines) == judgement.usable + sum(judgement.left_out.values())
    return Judged(judgement, hits, time.process_time() - started)


def measure(cases: list[Case], judged: Judged, clean_hits: dict[str, set[bytes]]) -> dict[str, dict[str, float]]:
    """Precision and recall of each planted code."""
    pairs = {number for number, case in enumerate(cases, 1) if "near:pair" in case.planted}
    figures = {}
    codes = sorted(
        {code for case in cases for code in case.planted if code != "near:pair"} | {"quality.near-duplicate"}
    )
    for code in codes:
        found = judged.hits.get(code, set())
        truth = {number for number, case in enumerate(cases, 1) if code in case.planted}
        if code == "quality.near-duplicate":  # the later of each two
            right = len(found & pairs)
            planted = len(pairs) // 2
        else:
            right = len(found & truth)
            planted = len(truth)
        wrong = [
            number
            for number in found - truth - (pairs if code == "quality.near-duplicate" else set())
            if code not in cases[number - 1].also
            and not {cases[number - 1].line, cases[number - 1].origin} & clean_hits.get(code, set())
        ]
        figures[code] = {
            "planted": planted,
            "precision": right / max(1, right + len(wrong)),
            "recall": right / max(1, planted),
        }
        if wrong or right < planted:
            missed = sorted(truth - found)[:2]
            figures[code]["wrong"] = len(wrong)
            _explain(code, cases, wrong[:2], missed)
    return figures


EXPLAIN = False


def _explain(code: str, cases: list[Case], wrong: list[int], missed: list[int]) -> None:
    if EXPLAIN:
        for name, numbers in (("wrong", wrong), ("missed", missed)):
            for number in numbers:
                case = cases[number - 1]
                print(f"    {code} {name}: {case.planted} {case.line.decode(errors='replace')[-330:]}")


def whole_set_defects(pairs: list[Pair], chat: ChatFormat, folder: Path, language: str) -> dict[str, bool]:
    """Defects of a set as a whole: found where planted, and not in the original."""
    opening = {"en": "The answer to this is as follows: ", "ja": "この問いの答えは次の通り。"}[language]
    template = {"en": "Translate the following: ", "ja": "次の文を翻訳してください。"}[language]
    dice = random.Random(1)
    variants = {
        "balance.openings": [
            Pair(p.question, opening + p.answer if at % 3 else p.answer) for at, p in enumerate(pairs)
        ],
        "balance.templates": [Pair(template + p.question, p.answer) for p in pairs],
        "balance.labels": [Pair(p.question, "no" if dice.random() < 0.9 else "yes") for p in pairs],
        "signal.few-loss-tokens": [Pair(p.question * 2, "no" if dice.random() < 0.5 else "yes") for p in pairs],
        "size.too-few": pairs[:9],
        "size.small": pairs[:300],
    }
    clean = judge([chat_line(pair) for pair in pairs], [], chat, folder).judgement
    found = {}
    for code, variant in variants.items():
        judgement = judge([chat_line(pair) for pair in variant], [], chat, folder).judgement
        found[code] = judgement.finding(code) is not None and clean.finding(code) is None
    return found


def made_up_file() -> Path:
    """Clean made-up records with answers of three sentences, for a smoke run."""
    from tests.data.gate.gate_cases import clean_pairs

    pairs = clean_pairs(3 * SMOKE_RECORDS)
    answers = iter(answer for _, answer in pairs)
    records = (
        {"question": question, "answer": " ".join(itertools.islice(answers, 3))}
        for question, _ in pairs[:SMOKE_RECORDS]
    )
    file = Path(tempfile.mkdtemp(prefix="ft-gate-"), "made-up.jsonl")
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--english", type=Path, action="append", default=[])
    parser.add_argument("--japanese", type=Path, action="append", default=[])
    parser.add_argument("--columns", default="instruction=question,output=answer")
    parser.add_argument("--records", type=int, default=4000, help="taken of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--explain", action="store_true", help="print some misses and false alarms")
    add_smoke_option(parser)
    options = parser.parse_args()
    shrink(options, records=SMOKE_RECORDS)
    if options.smoke:
        options.english = [made_up_file()]
    if not options.english and not options.japanese:
        parser.error("name at least one file of clean records: --english FILE or --japanese FILE")
    global EXPLAIN
    EXPLAIN = options.explain
    columns = dict(pair.split("=") for pair in options.columns.split(","))
    figures: dict[str, Any] = {}
    holds = True
    files = [("en", file) for file in options.english] + [("ja", file) for file in options.japanese]
    for language, file in files:
        pairs = read_pairs(file, columns, options.records)
        tokenizer = train_tokenizer([f"{pair.question} {pair.answer}" for pair in pairs[:1000]], vocab_size=4000)
        chat = ChatFormat(tokenizer)
        dice = random.Random(options.seed)
        held_out = pairs[-HELD_OUT:]
        train = pairs[:-HELD_OUT]
        with tempfile.TemporaryDirectory() as folder:
            lines = [chat_line(pair) for pair in train]
            clean = judge(lines, held_out, chat, Path(folder))
            clean_hits = {code: {lines[number - 1] for number in found} for code, found in clean.hits.items()}
            cases = plant(list(train), held_out, language, dice)
            judged = judge([case.line for case in cases], held_out, chat, Path(folder))
            print(f"\n{language}: {file.name}, {len(cases)} records, {judged.seconds / len(cases) * 1e6:.0f} µs each")
            by_code = measure(cases, judged, clean_hits)
            whole = whole_set_defects(train[:600], chat, Path(folder), language)
        print(f"{'code':30} {'planted':>7} {'precision':>9} {'recall':>7} {'clean':>6}")
        for code, values in by_code.items():
            goal = GOAL_NEAR if code in (*NEAR, *STATISTICAL) else GOAL
            kept = min(values["precision"], values["recall"]) >= goal
            holds &= kept
            print(
                f"{code:30} {values['planted']:7.0f} {values['precision']:9.3f} {values['recall']:7.3f} "
                f"{len(clean.hits.get(code, ())):6}"
                f"{'' if kept else f'   below {goal}'}"
            )
        alarms: dict[str, float] = {code: len(found) / len(train) for code, found in clean.hits.items()}
        too_many = [code for code, share in alarms.items() if share > GOAL_ALARMS and code not in TRUE_OF_CLEAN]
        print(
            "on the clean original:",
            Counter({code: len(found) for code, found in clean.hits.items()}),
            "verdict",
            clean.judgement.verdict,
        )
        print("too many:", too_many, " of the set as a whole:", whole)
        holds &= all(whole.values()) and not too_many
        figures[f"{language}:{file.parent.name}"] = {
            "codes": {code: {k: round(v, 4) for k, v in values.items()} for code, values in by_code.items()},
            "clean_alarms": {code: round(share, 5) for code, share in sorted(alarms.items())},
            "whole": whole,
            "clean_verdict": clean.judgement.verdict,
            "microseconds_per_record": round(judged.seconds / len(cases) * 1e6),
        }
    goals = {"deterministic": GOAL, "near_and_statistical": GOAL_NEAR, "clean_alarms": GOAL_ALARMS}
    print_result(options, "data_gate", figures=figures, goal=goals, holds=bool(holds))
    return 0 if holds or options.smoke else 1


if __name__ == "__main__":
    sys.exit(main())
