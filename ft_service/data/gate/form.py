"""Checks of single records: their form and the text of their answers."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import ftfy.badness

from ft_service.data.gate.cures import CONVERT_TO_CHAT, order_cure
from ft_service.data.gate.findings import Finding, Place, percent, source_finding
from ft_service.data.gate.private import detail, excerpt, find_private, visible
from ft_service.data.gate.records import Record, Source
from ft_service.data.gate.text import fold, is_cjk
from ft_service.text import counted

_LISTED_FIELDS = 50
_VALUE_CHARACTERS = 8000  # far more than an excerpt, so that masking sees private data whole


@dataclass(frozen=True)
class Hit:
    """One finding on one record."""

    code: str
    key: int
    detail: str = ""
    excerpt: str = ""
    cure: str = ""
    """What to do about this cause; empty where the cure of the code fits."""


def check_record(record: Record) -> Iterator[Hit]:
    """All findings on a record by itself."""
    if record.fault is not None:
        values = list(record.raw.values())[:5] or [record.fault.text]
        text = " ".join(str(value)[:_VALUE_CHARACTERS] for value in values)
        yield Hit(record.fault.code, record.key, detail(record.fault.reason), excerpt(text), record.fault.cure)
        return
    for check in (
        role_order,
        broken_text,
        leftovers,
        copied_instruction,
        stock_phrases,
        private_data,
    ):
        yield from check(record)


def role_order(record: Record) -> Iterator[Hit]:
    """Turns out of order. The order: system first, user and assistant in turn, tools after it, the assistant last."""
    if not isinstance(record.item, tuple):
        return
    roles = [message.role for message in record.item]
    turns = roles[1:] if roles[0] == "system" else roles
    allowed = {"user": {"assistant"}, "assistant": {"user", "tool"}, "tool": {"tool", "assistant"}, "system": set()}
    orderly = (
        (
            turns[0] == "user"
            and turns[-1] == "assistant"
            and all(later in allowed[earlier] for earlier, later in pairwise(turns))
        )
        if turns
        else False
    )
    if not orderly:
        yield Hit("form.role-order", record.key, " → ".join(roles[:12]), excerpt(record.text), order_cure(roles))


def check_files(
    sources: Sequence[Source], read: Mapping[int, int], columns: Collection[tuple[int, str]]
) -> list[Finding]:
    """Findings on sources without records, on named columns that no record has, and on files that are not read.

    `read` counts the records of each source; `columns` are the (source, column) that some record has.
    """
    empty = [
        Place(file=source.path, line=0, detail="has no records")
        for number, source in enumerate(sources)
        if not read.get(number)
    ]
    absent = [
        Place(file=source.path, line=0, detail=detail(f"no record has the column {name!r}"))
        for number, source in enumerate(sources)
        for name in source.optional
        if read.get(number) and (number, name) not in columns
    ]
    foreign = [Place(file=visible(name), line=0) for source in sources for name in source.foreign]
    notes = [
        Place(file=visible(name), line=0, detail=detail(note)) for source in sources for name, note in source.notes
    ]
    places_of = [
        ("form.empty-source", empty),
        ("form.absent-column", absent),
        ("form.foreign-file", foreign),
        ("form.other-layout", notes),
    ]
    # One source may have several places, so the share is at most 1.
    return [source_finding(code, places, min(1.0, len(places) / len(sources))) for code, places in places_of if places]


OTHER_FIELDS = "(other fields)"


def check_unused(
    sources: Sequence[Source], read: Mapping[int, int], unused: Mapping[tuple[int, str], int]
) -> list[Finding]:
    """A finding on the fields that have a value in some record and are not used.

    `unused` counts the records of each (source, field); `read` those of each source.
    """
    if not unused:
        return []
    shares = [(min(1.0, count / read[source]), source, name) for (source, name), count in unused.items()]
    shares.sort(key=lambda entry: (-entry[0], *entry[1:]))
    names = _names_of_unused(read, unused)
    places = [
        Place(file=sources[source].path, line=0, detail=detail(f"{name!r}, in {percent(share)} of its records"))
        for share, source, name in shares
    ]
    finding = source_finding("form.unused-field", places, shares[0][0])
    more = f" and {len(names) - _LISTED_FIELDS} more" if len(names) > _LISTED_FIELDS else ""
    message = visible(f"Not used: {', '.join(names[:_LISTED_FIELDS])}{more}.")
    return [finding.model_copy(update={"message": message, "places": places[:_LISTED_FIELDS]})]


def _names_of_unused(read: Mapping[int, int], unused: Mapping[tuple[int, str], int]) -> list[str]:
    """Each field once, with its share in the sources that have it, the most frequent first."""
    records: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for (source, name), count in unused.items():
        records[name] += read[source]
        counts[name] += count
    shares = sorted((-min(1.0, count / records[name]), name) for name, count in counts.items())
    return [f"{name} ({percent(-share)} of the records)" for share, name in shares]


_NULL_WORDS = frozenset({"nan", "none", "null", "<na>", "n/a", "#n/a", "nat", "undefined"})
"""What programs write for a missing value."""


def null_text(record: Record, columns: Sequence[str]) -> Iterator[Hit]:
    """A used value, or the content of a message, that is only the word for a missing value."""
    values = [(name, record.raw.get(name)) for name in columns]
    if isinstance(record.item, tuple) and not columns:
        values = [(f"the {message.role} turn", message.content) for message in record.item]
    for name, value in values:
        if isinstance(value, str) and len(value) < 12 and value.strip().casefold() in _NULL_WORDS:
            yield Hit("form.null-text", record.key, detail(f"{name} is {value.strip()!r}"), excerpt(record.text))
            return


# -- characters ------------------------------------------------------------------------------------------------------

_LOST = "\ufffd"
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
_BADNESS_REACH = 8
"""Characters before and after one beyond ASCII that a match of ftfy's pattern covers or looks at, at most."""
_UTF8_AS_SHIFT_JIS = re.compile("[縺繧繝][\u3041-\u30fe\u3400-\u9fff\uff61-\uff9f]|窶[\u3400-\u9fff\uff61-\uff9f]")
"""UTF-8 hiragana and katakana begin with E3 81, E3 82 or E3 83, which Shift-JIS reads as these rare characters (E2 80,
of typographic quotes, as the last). ftfy does not check for this error."""
_SHIFT_JIS_SIGNS_FROM = 2
"""A single one may be a rare word."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\u200b\u202a-\u202e\u2060\ufff9-\ufffb]")
"""C0 and C1 without tab and line ends, and invisible marks that copying adds. Joiners (U+200D) belong to emoji."""
_ASCII_CONTROLS = bytes(code for code in range(128) if _CONTROL.match(chr(code)))


def broken_text(record: Record) -> Iterator[Hit]:
    """Lost characters, mojibake and control characters."""
    text = record.text
    if text.isascii():
        mojibake = None
    elif (at := text.find(_LOST)) >= 0:
        yield Hit("form.encoding", record.key, "contains U+FFFD, a lost character", excerpt(text, at))
        return
    else:
        mojibake = _badness(text)
        if mojibake is None and len(signs := list(_UTF8_AS_SHIFT_JIS.finditer(text))) >= _SHIFT_JIS_SIGNS_FROM:
            mojibake = signs[0]
    if mojibake is not None:
        yield Hit("form.mojibake", record.key, "was decoded with the wrong encoding", excerpt(text, mojibake.start()))
    elif _may_hold_controls(text) and (match := _CONTROL.search(text)):
        yield Hit(
            "form.control-characters", record.key, f"contains U+{ord(match[0]):04X}", excerpt(text, match.start())
        )


def _badness(text: str) -> re.Match[str] | None:
    """The first match of ftfy's slow pattern, which needs a character beyond ASCII, searched only around those."""
    for sign in _BEYOND_ASCII.finditer(text):
        start = max(0, sign.start() - _BADNESS_REACH)
        if match := ftfy.badness.BADNESS_RE.search(text, start, sign.end() + _BADNESS_REACH):
            return match
    return None


def _may_hold_controls(text: str) -> bool:
    """A fast test: False if `_CONTROL` cannot match."""
    return not text.isascii() or len(text.encode().translate(None, _ASCII_CONTROLS)) < len(text)


# -- template and markup ---------------------------------------------------------------------------------------------

_SPECIAL = re.compile(
    r"<\|[A-Za-z_]\w{1,40}\|>"  # Llama 3, ChatML, GPT
    r"|<</?SYS>>|\[/?INST\]"  # Llama 2, Mistral
    r"|<(?:start|end)_of_turn>|<｜[^｜>\n]{2,30}｜>"  # Gemma, DeepSeek
    r"|^(?:#{2,3} ?(?:Instruction|Input|Response|指示|入力|応答|回答)\s?[:：])",  # Alpaca and its Japanese editions
    re.MULTILINE,
)
_TEMPLATE_HINTS = ("<|", "SYS>>", "_of_turn>", "<｜", "</s>")
_SECTION_NAMES = ("Instruction", "Input", "Response", "指示", "入力", "応答", "回答")
_ROLE_NAMES = ("Human", "Assistant", "User", "ユーザー", "アシスタント", "システム")
_END_TOKEN = re.compile(
    r"<\|(?:eot_id|end_of_text|im_end|endoftext|eom_id)\|>|<end_of_turn>|</s>|<｜[^｜]*end[^｜]*｜>"
)
"""Alone, it is left over at the end of an answer. Every other template text marks turns within the text."""
_END = re.compile("</s>")  # ends a turn of Llama 2 and Mistral
_STRUCK_OUT = re.compile("<s[ >]", re.IGNORECASE)  # with it, </s> is HTML
_ROLE_NAME = re.compile(r"^(?:Human|Assistant|User|ユーザー|アシスタント|システム)\s?[:：]", re.MULTILINE)
"""In answers only; a question may quote a conversation."""
_HTML = re.compile(
    r"</?(?:p|div|span|br|hr|a|li|ul|ol|table|tbody|tr|td|th|h[1-6]|b|i|u|em|strong|font|img|script|style|body|center|"
    r"blockquote|iframe|input|button|form|section|article|nav|footer|header)(?:\s(?=[^<>=]{0,300}=)[^<>]{0,600}|\s{1,9})?/?>"
    r"|&(?:nbsp|amp|lt|gt|quot|apos|hellip|mdash|ndash|rsquo|lsquo|rdquo|ldquo|copy|#\d{2,6}|#x[0-9A-Fa-f]{2,5});",
    re.IGNORECASE,
)
_HTML_START = re.compile(r"[<&][/#A-Za-z]")
"""`_HTML` matches nothing without this."""
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_ABOUT_MARKUP = re.compile(
    r"html|xml|css|svg|markup|web ?page|website|\btags?\b|javascript|\bjsx\b|\bphp\b|"
    r"\breact(?:\.?js\b| component| app\b| hook)|"
    r"タグ|ウェブ|マークアップ|ホームページ",
    re.IGNORECASE,
)
"""The answer to a question about markup may contain markup."""


def leftovers(record: Record) -> Iterator[Hit]:
    """Template text and HTML in messages."""
    messages = [(record.item, True)] if isinstance(record.item, str) else []
    messages += [(m.content, m.is_trained) for m in record.item or () if not isinstance(m, str)]
    for message, is_trained in messages:
        if match := _template_text(message, is_trained):
            cure = "" if _END_TOKEN.fullmatch(match[0]) else CONVERT_TO_CHAT
            contains = f"contains {match[0]!r}"
            yield Hit("form.special-tokens", record.key, contains, excerpt(message, match.start()), cure)
            break
    text = record.text
    if _HTML_START.search(text) and not _ABOUT_MARKUP.search(record.prompt):
        bare = _CODE.sub(lambda code: " " * len(code[0]), text)
        if match := _HTML.search(bare):
            yield Hit("form.html", record.key, detail(f"contains {match[0]!r}"), excerpt(text, match.start()))


def _template_text(message: str, is_trained: bool) -> re.Match[str] | None:
    """The first template text in a message."""
    if _may_hold_template(message):
        match = _SPECIAL.search(message) or (None if _STRUCK_OUT.search(message) else _END.search(message))
        if match:
            return match
    return _ROLE_NAME.search(message) if is_trained and any(name in message for name in _ROLE_NAMES) else None


def _may_hold_template(message: str) -> bool:
    """A fast test: False if neither `_SPECIAL` nor `_END` can match."""
    if "<" in message and any(hint in message for hint in _TEMPLATE_HINTS):
        return True
    if "[" in message and "INST]" in message:
        return True
    return "##" in message and any(name in message for name in _SECTION_NAMES)


# -- answers ---------------------------------------------------------------------------------------------------------

COPIED_FROM_LATIN = 30
COPIED_FROM_CJK = 12
"""In characters of a folded question; shorter ones occur in answers by chance ("What is the sun?")."""
_STOCK_WITHIN = 300
"""Only this many characters at the start (refusals) or at both ends (boilerplate) count; others may be quotations."""


def copied_instruction(record: Record) -> Iterator[Hit]:
    """An answer that contains the question, or its first paragraph, word for word."""
    question = record.question
    answer = record.folded_output
    for part in dict.fromkeys((question, question.split("\n\n", 1)[0])):
        folded = record.folded_prompt if part == record.prompt else fold(part)
        if len(folded) >= (COPIED_FROM_CJK if is_cjk(folded) else COPIED_FROM_LATIN) and folded in answer:
            yield Hit("quality.copied-instruction", record.key, "repeats its question", excerpt(record.output))
            return


_REFUSAL = re.compile(
    r"as an? (?:ai|artificial intelligence|large language|language)[ -](?:language )?(?:model|assistant)"
    r"|as an ai\b"
    r"|i(?:'m| am) (?:just |only )?an? (?:ai|language model)\b"
    r"|(?:^|[.!] |sorry,? (?:but )?)i(?: can(?:no|')t|(?: am|'m) (?:unable|not able) to| won't| will not) "
    r"(?:help|assist|provide|fulfill|comply|answer|generate|create|do that|engage|continue|support|discuss)"
    r"|(?:^|。|私は|わたしは)、?(?:AI|人工知能|言語モデル)(?:アシスタント|言語モデル)?(?:として[、はの]|なので|ですので)"
    r"|申し訳(?:ありません|ございません|ない).{0,60}(?:できません|できかねます|いたしかねます|わかり(?:ません|かねます))"
    r"|(?:お答え|回答|お手伝い|対応|お応え|提供)(?:する)?(?:ことは|は)?(?:できません|できかねます|いたしかねます|致しかねます)",
    re.IGNORECASE | re.DOTALL,
)
_BOILERPLATE = re.compile(
    r"^(?:certainly|of course|sure(?: thing)?|absolutely|great question|happy to help|i'd be happy to)\b[!,.]"
    r"|(?:i )?hope (?:this|that|it) (?:helps|answers)"
    r"|(?:please )?(?:let me know|feel free to (?:ask|reach)|don't hesitate to (?:ask|contact|reach))"
    r"|is there anything else (?:i|you)"
    r"|^(?:もちろんです|承知(?:いた)?しました|かしこまりました|はい、喜んで)[。！!、]"
    r"|(?:お役に立て(?:れば|たら)|参考に(?:なれば|していただければ)|ご参考になれば)"
    r"|(?:他に|ほかに|何か)?(?:ご)?(?:不明な点|質問|不明点|疑問)(?:など)?(?:が)?(?:ございましたら|ありましたら|があれば|があります場合)"
    r"|お気軽に(?:お尋ね|ご質問|お問い合わせ|お聞き)",
    re.IGNORECASE,
)
_REFUSAL_HINTS = (
    *(f"as {article} {noun}" for article in ("a", "an") for noun in ("ai", "artificial", "language", "large language")),
    *("i'm ", "i am ", "i cannot", "i can't", "i won't", "i will not"),
)
_BOILERPLATE_HINTS = ("hope ", "let me know", "feel free", "hesitate", "anything else")
_BOILERPLATE_STARTS = ("certainly", "of course", "sure", "absolutely", "great question", "happy to", "i'd be happy")
"""English text matches the slow patterns only if it contains one of the hints, or begins with one of the starts."""
_CURLY = str.maketrans("’‘", "''")


def stock_phrases(record: Record) -> Iterator[Hit]:
    """Refusals at the start of an answer, and stock phrases at either end."""
    if isinstance(record.item, str):
        return
    for output in record.outputs:
        output = output.strip()
        output = output if output.isascii() else output.translate(_CURLY)
        start = output[:_STOCK_WITHIN]
        ending = max(0, len(output) - _STOCK_WITHIN)
        if match := _may_match(start, _REFUSAL_HINTS) and _REFUSAL.search(start):
            yield Hit("quality.refusal", record.key, detail(f"says {match[0]!r}"), excerpt(output, match.start()))
            return
        if not _may_match(start + output[ending:], _BOILERPLATE_HINTS, _BOILERPLATE_STARTS):
            continue
        if match := _BOILERPLATE.search(start) or _BOILERPLATE.search(output, ending):
            yield Hit("quality.boilerplate", record.key, detail(f"says {match[0]!r}"), excerpt(output, match.start()))
            return


def _may_match(text: str, hints: Sequence[str], starts: tuple[str, ...] = ()) -> bool:
    if not text.isascii():
        return True
    lower = text.lower()
    return lower.startswith(starts) or any(hint in lower for hint in hints)


def private_data(record: Record) -> Iterator[Hit]:
    """One hit for each kind of private data; the excerpt masks it."""
    text = record.text
    starts_of: dict[str, list[int]] = {}
    for code, start, _ in find_private(text):
        starts_of.setdefault(code, []).append(start)
    for code, starts in starts_of.items():
        yield Hit(code, record.key, counted(len(starts), "occurrence"), excerpt(text, starts[0]))
