"""The facts that are kept of each usable record: half a KiB of hashes and counts, never its text.

A million records take about 0.6 GiB, independent of their length. All checks that compare records with each other use
this table. The tables of shards can be joined.
"""

import json
import re
from collections.abc import Sequence

import numpy as np
import rensa

from ft_service.chat.format import Message
from ft_service.data.gate.records import Record
from ft_service.data.gate.text import (
    LANGUAGES,
    hash32,
    hash64,
    is_cjk,
    language,
    numbers,
    opening,
    shingles_of_parts,
)

BANDS = 12
BAND_ROWS = 5
"""Two texts of Jaccard similarity s share a band with probability 1 - (1 - s^5)^12: 0.99 at 0.8, 0.96 at 0.75, 0.31 at
0.5 (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4). Chance matches are dropped afterwards."""
SIGNATURE = BANDS * BAND_ROWS
_SEED = 1
_BUFFER = 2048
_BUFFER_HASHES = 2**18
"""At most this many records and hashes wait for their signatures: batches are faster, and 2 MiB are enough."""
_COMPARED_CHARACTERS = 200_000
"""Only the first characters of a prompt and of an answer are compared with others."""
_SHAPE_CHARACTERS = 20_000
"""The first characters of an answer show its format."""

FACTS = np.dtype(
    [
        ("key", "u8"),
        ("exact", "u8"),  # hash of what the model reads and is trained on
        ("content", "u8"),  # hash of what the model reads
        ("prompt", "u8"),  # hash of the folded prompt; 0 without one
        ("output", "u8"),  # hash of the folded output
        ("prompt_numbers", "u4"),
        ("output_numbers", "u4"),
        ("prompt_opening", "u4"),
        ("output_opening", "u4"),
        ("output_length", "u4"),  # characters
        ("num_shingles", "u4"),  # of prompt and output, with repetitions
        ("tokens", "u4"),
        ("kept", "u4"),
        ("loss", "u4"),
        ("kept_loss", "u4"),
        ("source", "u2"),
        ("ending", "u1"),
        ("prompt_language", "u1"),
        ("output_language", "u1"),
        ("register", "u1"),
        ("shape", "u1"),
        ("validation", "?"),
        ("cjk", "?"),
        ("prompt_signature", "u4", SIGNATURE),
        ("whole_signature", "u4", SIGNATURE),
    ]
)


class FactTable:
    """Rows of `FACTS`, unordered until `freeze`."""

    def __init__(self) -> None:
        self._chunks: list[np.ndarray] = []
        self._rows: list[tuple[object, ...]] = []
        self._texts: list[tuple[str, str]] = []
        self._waiting = 0

    def __len__(self) -> int:
        return sum(map(len, self._chunks)) + len(self._rows)

    def add(self, record: Record) -> None:
        """Add the facts of a usable record."""
        prompt = record.folded_prompt
        output = record.folded_output
        content = _model_input(record)
        spoken = language(record.output)
        tokens = record.tokens
        self._rows.append(
            (
                record.key,
                hash64(content + _trained_turns(record)),  # as `hash_of_example`
                hash64(content),
                hash64(prompt) if prompt else 0,
                hash64(output),
                hash32(numbers(record.prompt)),
                hash32(numbers(record.output)),
                hash32(opening(record.question)),
                hash32(opening(record.output)),
                len(record.output.strip()),
                min(len(prompt), _COMPARED_CHARACTERS) + min(len(output), _COMPARED_CHARACTERS),
                *((tokens.total, tokens.kept, tokens.loss, tokens.kept_loss) if tokens else (0, 0, 0, 0)),
                record.source,
                ENDINGS.index(ending(record.output)),
                LANGUAGES.index(language(record.question)),
                LANGUAGES.index(spoken),
                REGISTERS.index(register(record.output, spoken)),
                SHAPES.index(shape(record.output)),
                record.split == "validation",
                is_cjk(record.output),
            )
        )
        prompt = prompt[:_COMPARED_CHARACTERS]
        output = output[:_COMPARED_CHARACTERS]
        self._texts.append((prompt, output))
        self._waiting += 2 * len(prompt) + len(output)
        if len(self._rows) >= _BUFFER or self._waiting >= _BUFFER_HASHES:
            self._flush()

    def rows(self) -> np.ndarray:
        """All rows [N] so far."""
        self._flush()
        return np.concatenate(self._chunks) if self._chunks else np.empty(0, dtype=FACTS)

    def add_rows(self, rows: np.ndarray) -> None:
        """Add the rows of another table."""
        self._chunks.append(rows)

    def freeze(self) -> "Facts":
        """The columns of all rows, in order of the data."""
        self._flush()
        return Facts(self._chunks)

    def _flush(self) -> None:
        if not self._rows:
            return
        chunk = np.zeros(len(self._rows), dtype=FACTS)
        names = [name for name in FACTS.names or () if not name.endswith("signature")]
        for name, column in zip(names, zip(*self._rows, strict=True), strict=True):
            chunk[name] = column
        signatures = _signatures(list(shingles_of_parts(self._texts)))
        chunk["prompt_signature"] = signatures[0::2]
        chunk["whole_signature"] = signatures[1::2]
        self._chunks.append(chunk)
        self._rows = []
        self._texts = []
        self._waiting = 0


class Facts:
    """The columns of a finished table, in order of the data. Each is gathered on access: no copy of the table."""

    def __init__(self, chunks: Sequence[np.ndarray]) -> None:
        self._chunks = chunks
        self._order = np.argsort(self._gather("key"), kind="stable") if chunks else np.empty(0, dtype=np.int64)
        self._starts = np.cumsum([0, *map(len, chunks)])
        self._held_out: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, name: str) -> np.ndarray:
        """A column [N]."""
        if name == "validation" and self._held_out is not None:
            return self._held_out
        return self._gather(name)[self._order]

    def hold_out(self, rows: np.ndarray) -> None:
        """Replace the column `validation` by `rows`, bool [N]."""
        self._held_out = rows

    def band(self, name: str, band: int) -> np.ndarray:
        """One band [N, BAND_ROWS] of a column of signatures."""
        part = slice(band * BAND_ROWS, (band + 1) * BAND_ROWS)
        bands = [chunk[name][:, part] for chunk in self._chunks]
        return np.concatenate(bands)[self._order] if bands else np.empty((0, BAND_ROWS), dtype=np.uint32)

    def signatures(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Signatures [len(rows), SIGNATURE] of some rows."""
        at = self._order[rows]
        chunks = np.searchsorted(self._starts, at, side="right") - 1
        signatures = np.empty((len(rows), SIGNATURE), dtype=np.uint32)
        for chunk in np.unique(chunks):
            in_chunk = chunks == chunk
            signatures[in_chunk] = self._chunks[chunk][name][at[in_chunk] - self._starts[chunk]]
        return signatures

    def _gather(self, name: str) -> np.ndarray:
        if not self._chunks:
            return np.empty(0, dtype=FACTS[name])
        return np.concatenate([chunk[name] for chunk in self._chunks])


def _signatures(sets: Sequence[np.ndarray]) -> np.ndarray:
    """MinHash signatures, uint32 [len(sets), SIGNATURE], of sets of hashes."""
    offsets = np.cumsum([0, *map(len, sets)]).astype(np.uint64)
    flat = np.concatenate(sets) if sets else np.empty(0, dtype=np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, SIGNATURE, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(sets), SIGNATURE)


def hash_of_example(record: Record) -> int:
    """A hash of what the model reads and is trained on: equal for exact duplicates."""
    return hash64(_model_input(record) + _trained_turns(record))


def _model_input(record: Record) -> str:
    """Equal for records that the model sees as equal: the chat format strips white space at the ends of a message."""
    if isinstance(record.item, str):
        return record.item
    return json.dumps([_turn_input(message) for message in record.item or ()])


def _turn_input(message: Message) -> list[str]:
    tools = ["json"] * message.is_json + list(message.functions)
    return [message.role, message.content.strip(), *tools]


def _trained_turns(record: Record) -> str:
    return "" if isinstance(record.item, str) else "".join("01"[message.is_trained] for message in record.item or ())


# -- traits of an answer ---------------------------------------------------------------------------------------------

ENDINGS = ("short", "sentence", "figure", "letter", "digit", "other", "open")
WHOLE_FROM_LATIN = 40
WHOLE_FROM_CJK = 12
"""In characters; shorter answers are names and labels, which do not end like a sentence."""
_RESULT_CHARACTERS = 16
"""A last line as short as this is a result ("#### 18", "答え：はい")."""
_RESULT = re.compile(r"[\d:：]")
_TAIL = 100
_SENTENCE_END = re.compile(
    r"""[.!?…。！？．♪☆★]["'”’」』）)\]】*_`\s]*$|[」』】）)"”’>}|;$]$|[\U0001f300-\U0001faff\u2600-\u27bf]\ufe0f?$"""
)
_OPEN_END = re.compile(r"[,、，；:：(（\[「『【＜<{\-–—&×÷\\]$")
"""Without ; / + = and $, with which complete SQL, addresses, C++, base64 and formulas end."""


def ending(output: str) -> str:
    """How an answer ends: like a sentence, with a short result, with a letter or digit, or unfinished ("open")."""
    text = output.strip()
    if len(text) < (WHOLE_FROM_CJK if is_cjk(text) else WHOLE_FROM_LATIN):
        return "short"
    if text.count("```") % 2:
        return "open"
    last_line = text[text.rfind("\n") + 1 :]
    if text.endswith("```") or _SENTENCE_END.search(text[-_TAIL:]):
        return "sentence"
    if _OPEN_END.search(last_line):
        return "open"
    if len(last_line) <= _RESULT_CHARACTERS and _RESULT.search(last_line):
        return "figure"
    last = last_line[-1]
    return "letter" if last.isalpha() else "digit" if last.isdigit() else "other"


REGISTERS = ("none", "polite", "plain", "casual", "neutral")
_SENTENCES = re.compile(r"[。！？!?\n]+")
_POLITE = re.compile(
    r"(?:です|ます|でした|ました|ません|ませんでした|でしょう|ましょう|ください|下さい|ございます)(?:か|ね|よ|よね|が|けど|し|から)?$"
)
_PLAIN = re.compile(
    r"(?:だ|た|である|だろう|であろう|ない|[うくすつぬむるぐぶ])"
    r"(?:か|ね|よ|よね|ぞ|な|さ|わ)?$"
)
_CASUAL_JA = re.compile(
    r"(?:だ|[うくすつぬむるぐぶ]|た|ない|い|の|ん)(?:よ|ね|よね|よな|な|ぜ|ぞ|わ|って|けど|もん|から|じゃん|じゃない|かな|かも|でしょ)$"
    r"|(?:じゃん|っす|だって|でしょ|ちゃう|ちゃった|じゃう|じゃった|て|てね|てよ|よろしく|ごめん|うん|ううん|おけ|りょ)$"
    r"|^(?:うん|ううん|まじ|マジ|やばい|ヤバい|ウケる)(?:[、,]|$)"
)
_LAUGH = re.compile(r"(?<=[\u3040-\u30ff\u4e00-\u9fff])(?:[wｗ]{1,9}|（?笑）?)$")
_DRAWN_OUT = "〜～ー♪☆♡♥…\u3000 」』）)"
_CASUAL = re.compile(
    r"\b(?:r u|u r|(?:do|can|are|see|for|to|with|did|will|love|thank) u(?!\.\w)|"
    r"gonna|wanna|gotta|kinda|sorta|dunno|lemme|gimme|y'all|ain't|lol|lmao|omg|btw|tbh|imo|idk|thx|pls|plz|haha+|"
    r"yeah|yep|nope|dude|cuz|ya)\b|(?<=\w)[!?]{2,}(?=\s|$)|(?:(?<=\s)|^)[:;]-?[)D(P](?!\S)|[\U0001f600-\U0001f64f\U0001f923-\U0001f92f]",
    re.IGNORECASE,
)


_CASUAL_WORDS = frozenset(
    b"u gonna wanna gotta kinda sorta dunno lemme gimme y ain lol lmao omg btw tbh imo idk thx pls plz yeah yep nope "
    b"dude cuz ya".split()
)
"""The words of `_CASUAL`, split at apostrophes."""
_CASUAL_SIGNS = (
    *("!!", "??", "!?", "?!"),
    *(f"{eyes}{mouth}" for eyes in ":;" for mouth in ")-Dd(Pp"),
)
_FIRST_FACE = "\U0001f600"
_NO_LETTERS = bytes(code if chr(code).isalnum() or chr(code) == "_" else 32 for code in range(128)) + bytes(128)


def register(output: str, spoken: str | None = None) -> str:
    """The tone of an answer: polite, plain or casual by endings (Japanese), neutral or casual by words (English).

    A short answer in English is casual or of no tone: "Restart it." is neither formal nor informal.
    """
    if is_cjk(output):
        tones = [_tone(sentence) for sentence in _SENTENCES.split(output[:4000])]
        polite = tones.count("polite")
        casual = tones.count("casual")
        plain = tones.count("plain")
        if polite == plain + casual:
            return "none"
        return "polite" if polite > plain + casual else "casual" if casual > plain else "plain"
    if (spoken or language(output)) != "latin":
        return "none"
    if _may_be_casual(output[:4000]) and _CASUAL.search(output[:4000]):
        return "casual"
    return "neutral" if len(output) >= WHOLE_FROM_LATIN else "none"


def _tone(sentence: str) -> str:
    """The tone of one Japanese sentence."""
    bare = sentence.strip().rstrip(_DRAWN_OUT)
    laughs = _LAUGH.search(bare)
    bare = bare[: laughs.start()].rstrip(_DRAWN_OUT) if laughs else bare
    if _POLITE.search(bare):
        return "polite"
    if laughs or _CASUAL_JA.search(bare):
        return "casual"
    return "plain" if _PLAIN.search(bare) else "none"


def _may_be_casual(text: str) -> bool:
    """A fast test: False if `_CASUAL`, which is slow, cannot match."""
    if any(sign in text for sign in "!?:;") and any(sign in text for sign in _CASUAL_SIGNS):
        return True
    if not text.isascii() and max(text) >= _FIRST_FACE:
        return True
    lower = text.lower()
    words = lower.encode("ascii", "replace").translate(_NO_LETTERS).split()
    return not _CASUAL_WORDS.isdisjoint(words) or "haha" in lower


SHAPES = ("short", "prose", "list", "code", "json", "table", "markdown")
_LIST_LINE = re.compile(r"^[ \t\u3000]*(?:[-*•‣]\s|・|\d{1,3}[.)．]\s|[①-⑳])", re.MULTILINE)
_TABLE_LINE = re.compile(r"^[ \t]*\|.*\|[ \t]*$", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6} \S", re.MULTILINE)
_LIST_FROM = 2


def shape(output: str) -> str:
    """The format of an answer."""
    text = output.strip()
    if text[:1] in "{[" and text[-1:] in "}]" and len(text) > 2:
        try:
            json.loads(text)
            return "json"
        except (ValueError, RecursionError):
            pass
    if len(text) < (WHOLE_FROM_CJK if is_cjk(text) else WHOLE_FROM_LATIN):
        return "short"
    text = text[:_SHAPE_CHARACTERS]
    if "```" in text:
        return "code"
    if "|" in text and len(_TABLE_LINE.findall(text)) >= _LIST_FROM:
        return "table"
    if len(_LIST_LINE.findall(text)) >= _LIST_FROM:
        return "list"
    return "markdown" if _HEADING.search(text) else "prose"
