"""Records for the tests of the data gate: clean ones in English and Japanese, and short ways to check some."""

import random
from collections.abc import Sequence
from dataclasses import replace

from ft_service.chat.format import ChatFormat, Message
from ft_service.data.encode import Encoder
from ft_service.data.gate import Gate, Hit, Judgement, Record, Source

Pair = tuple[str, str]


def record(question: str, answer: str, line: int = 1, **more: object) -> Record:
    item = (Message("user", question), Message("assistant", answer))
    return Record(0, 0, line, item, **more)  # type: ignore[arg-type]


def chat(*turns: tuple[str, str], line: int = 1) -> Record:
    return Record(0, 0, line, tuple(Message(role, content) for role, content in turns))  # type: ignore[arg-type]


def text(content: str, line: int = 1) -> Record:
    return Record(0, 0, line, content)


def new_gate(**settings: object) -> Gate:
    source = Source("data.jsonl", ("data.jsonl",), source="made up", license="CC0-1.0")
    return Gate([source], **settings)  # type: ignore[arg-type]


def check_all(records: Sequence[Record], reread: bool = True, **settings: object) -> tuple[Judgement, list[Hit]]:
    """The judgement of records, and all hits."""
    gate = new_gate(**settings)
    hits = [hit for one in records for hit in gate.check(one)]
    second_pass = gate.second_pass()
    for one in records if reread else ():
        second_pass.add(one)
    return gate.judgement(second_pass, hits.append), hits


def with_tokens(records: Sequence[Record], chat: ChatFormat, max_seq_len: int) -> list[Record]:
    """The records as the gate gets them after encoding."""
    encoded = Encoder(chat.tokenizer, chat, max_seq_len)(records)
    return [replace(one, tokens=tokens) for one, (tokens, _) in zip(records, encoded, strict=True)]


def lines(hits: Sequence[Hit], code: str) -> list[int]:
    """Lines of the hits of a code, in order (there is one source and one file, so a key is a line)."""
    return sorted(hit.key for hit in hits if hit.code == code)


_NOUNS = [
    "river",
    "bridge",
    "candle",
    "garden",
    "window",
    "teacher",
    "market",
    "planet",
    "engine",
    "ladder",
    "basket",
    "violin",
    "harbor",
    "pepper",
    "castle",
]
_VERBS = ["carries", "builds", "watches", "repairs", "paints", "follows", "measures", "lifts", "covers", "crosses"]
_PLACES = ["Oslo", "Lima", "Cairo", "Quito", "Dakar", "Hanoi", "Perth", "Turin", "Basel", "Kyoto"]
_JA_NOUNS = [
    "川",
    "橋",
    "ろうそく",
    "庭",
    "窓",
    "先生",
    "市場",
    "惑星",
    "機関車",
    "はしご",
    "かご",
    "バイオリン",
    "港",
    "胡椒",
    "城",
]
_JA_VERBS = ["運んだ", "建てた", "眺めた", "直した", "塗った", "追いかけた", "測った", "持ち上げた", "覆った", "渡った"]
_JA_PLACES = ["札幌", "仙台", "新潟", "長野", "金沢", "奈良", "松山", "高知", "長崎", "那覇"]


def clean_pairs(count: int, language: str = "en", seed: int = 0) -> list[Pair]:
    """Distinct questions and answers of one style, of which none is like another."""
    dice = random.Random(seed)
    pairs = []
    for _ in range(count):
        if language == "en":
            pick = (
                [dice.choice(_NOUNS) for _ in range(6)],
                [dice.choice(_VERBS) for _ in range(3)],
                dice.sample(_PLACES, 3),
            )
            (a, b, c, d, e, f), (v, w, x), (p, q, r) = pick
            opening = dice.choice(["Why do people say", "Explain how", "Tell me whether", "Describe when", "Who says"])
            question = f"{opening} the {a} of {p} {v} a {b} and the {c} near {q} {w} {dice.randrange(999)} items?"
            answer = f"{dice.choice(['Near', 'In', 'Far from'])} {r} the {d} {x} a {e} that the {f} of {q} {v}, "
            answer += f"because {dice.randrange(999)} people of {p} once said that the {a} {w} every {c}."
        else:
            pick = (
                [dice.choice(_JA_NOUNS) for _ in range(6)],
                [dice.choice(_JA_VERBS) for _ in range(3)],
                dice.sample(_JA_PLACES, 3),
            )
            (a, b, c, d, e, f), (v, w, x), (p, q, r) = pick
            opening = dice.choice(["なぜ", "どのように", "いつ", "どうして", "だれのために"])
            question = f"{opening}{p}の{a}は{b}を{v}のか。また{q}の{c}が{dice.randrange(999)}個の{f}を{w}理由を教えて。"
            answer = f"{r}では{d}が{e}を{x}。{q}の{f}は{dice.randrange(999)}人で{a}を{v}。そのため{p}の{c}は{b}を{w}。"
        pairs.append((question, answer))
    assert len(set(pairs)) == count
    return pairs


def clean_records(count: int, language: str = "en", seed: int = 0) -> list[Record]:
    return [record(*pair, line=number) for number, pair in enumerate(clean_pairs(count, language, seed), 1)]
