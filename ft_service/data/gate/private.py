"""Private data in text: found, counted, and masked wherever the gate shows a part of a record."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from stdnum import iban
from stdnum.jp import in_ as my_number
from stdnum.us import ssn

# ASCII throughout: in Unicode the は of "連絡先は090-1234-5678" is a word character, so no number could begin after it.
_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9_%+-][\w.%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}(?![\w-])", re.ASCII
)
_FOR_DOCUMENTATION = re.compile(
    r"^git@|@(?:[\w-]+\.)*(?:example\.(?:com|net|org|jp)|example|test|invalid|localhost)$", re.I
)
"""Addresses that belong to nobody (RFC 2606 and RFC 6761), and the user name of every git server."""
_PHONE = re.compile(
    r"(?<![\w,/#=$¥-])(?<!\d\.)(?:"
    r"\+\d{1,3}[ .-]?(?:\(0?\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,3}"  # international
    r"|\(\d{3}\)[ .-]?\d{3}[ .-]\d{4}"  # North America
    r"|(?:1[ .-])?(?!\d00[ .-]\d00)[2-9]\d{2}[ .-][2-9]\d{2}[ .-]\d{4}"
    r"|0\d{1,4}[-(ー]\d{1,4}[-)ー]\d{3,4}|\(0\d{1,4}\) ?\d{1,4}[-ー]\d{4}"  # Japan
    r"|0[5789]0[ ー-]?\d{4}[ ー-]?\d{4}"
    r"|0(?:20|1\d{2,3}|7\d{3}) \d{3,4} ?\d{3,4}"  # United Kingdom
    r")(?![\w-]|\.\d)",
    re.ASCII,
)
"""How numbers are written; `phonenumbers` decides whether it is one that a country assigns."""
_HOME_COUNTRIES = {"0": ("JP", "GB")}
"""Countries of a number without +, by its first digit; the others are North American."""
_FICTIONAL_PHONE = re.compile(r"555\D?01\d{2}$")
"""North America keeps 555-0100 to 555-0199 for fiction."""
_CARD = re.compile(
    r"(?<![\w.-])(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}|3\d{3}([ -])\d{6}\2\d{4,5}|\d{14,16}|\d{19})(?![\w]|[.-]\d)",
    re.ASCII,
)
_CARD_START = re.compile(r"4|5[1-5]|2[2-7]|3[47]|3[068]|35|6(?:011|4|5|2)")
"""First digits of Visa, Mastercard, American Express, Diners, JCB, Discover and UnionPay (ISO/IEC 7812)."""
_CARD_LENGTHS = (14, 15, 16, 19)
_CARD_BEFORE = re.compile(r"card|visa|master|amex|american express|jcb|diners|カード|クレジット|決済", re.IGNORECASE)
_CARD_AFTER = re.compile(r"[\s,;/]*(?:exp\w*\s*)?(?:0[1-9]|1[0-2])/\d{2}")
_NEARBY_CHARACTERS = 40
_FIGURE_BEFORE = re.compile(r"\d{4} $")
_FIGURE_AFTER = re.compile(r" \d{4}\b")
"""One number in ten passes the check digit. So a number without groups, or in a row of figures, counts as a card number
only near words about cards."""
_TEST_CARDS = frozenset(
    [
        "4111111111111111",
        "4012888888881881",
        "4242424242424242",
        "4000056655665556",
        "5555555555554444",
        "5105105105105100",
        "5500000000000004",
        "378282246310005",
        "371449635398431",
        "6011111111111117",
        "6011000990139424",
        "3530111333300000",
        "30569309025904",
        "38520000023237",
    ]
)
"""Test numbers that payment services publish."""
_KEYS = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?:(?!-----)[\s\S]){0,8000}-----END (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"|(?:(?:\s|\\[nr])*[A-Za-z0-9+/=]{40,}){1,200}(?:(?:\s|\\[nr])+[A-Za-z0-9+/=]{1,80})?)?"  # cut off
    r"|(?<![A-Za-z0-9_])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{60,255}"  # GitHub
    r"|glpat-[\w-]{20,64}"  # GitLab
    r"|sk-(?:proj-|svcacct-|admin-|ant-[a-z0-9]+-)?[A-Za-z0-9_-]{32,200}"  # OpenAI, Anthropic
    r"|[sr]k_live_[A-Za-z0-9]{20,120}"  # Stripe
    r"|AIza[\w-]{35}"  # Google
    r"|xox[abeprs]-[A-Za-z0-9-]{20,250}"  # Slack
    r"|hf_[A-Za-z0-9]{30,60}"  # Hugging Face
    r"|npm_[A-Za-z0-9]{36}|pypi-AgEIcHlwaS5vcmc[\w-]{50,}"
    r"|(?<!-)eyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,1000}"  # JSON web token
    r")(?![A-Za-z0-9])",
    re.ASCII,
)
_KEY_MATERIAL = {
    "-----BEGIN": re.compile(r"[A-Za-z0-9+/]{40}"),
    "sk-": re.compile(r"(?=[A-Za-z]*\d)[A-Za-z0-9]{16}"),
}
"""What such a key must contain: manuals show the frame alone, and names begin with `sk-` too (sk-fading-circle)."""
_DOCUMENTATION_KEY = re.compile(r"EXAMPLE$|\.eyJzdWIiOiIxMjM0NTY3ODkwI")
"""AWS's example keys, and the JSON web token of most tutorials, whose subject is 1234567890."""
_LONG_WORD = b"x" * 20
_WORDS = bytes(ord("x") if chr(code).isalnum() or chr(code) in "_-" else 32 for code in range(128)) + b" " * 128
_FIGURES = bytes(ord("0") if chr(code).isdigit() else 32 for code in range(128)) + b" " * 128
_FIGURES_TOGETHER = re.compile(rb"0(?: {0,2}0){8,}")
"""A number of interest has nine digits or more, with at most two other characters between two of them. The slow
patterns search only such regions; keys are searched only in text with a word of twenty characters."""
_REGION_MARGIN = 8
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{1,4}){2,8}(?![A-Za-z0-9])", re.ASCII)
_IBAN_CHARACTERS = 42  # with spaces
_SSN = re.compile(r"(?<![\w.-])\d{3}([ -]?)\d{2}\1\d{4}(?![\w-]|\.\d)", re.ASCII)
_SSN_BEFORE = re.compile(r"\bssn\b|social security", re.IGNORECASE)
_MY_NUMBER = re.compile(r"(?<![\w.-])\d{4}([ -]?)\d{4}\1\d{4}(?![\w-]|\.\d)", re.ASCII)
_MY_NUMBER_DIGITS = 12
_MY_NUMBER_BEFORE = re.compile(r"my ?number|individual number|マイナンバー|個人番号", re.IGNORECASE)
"""One number in eleven passes the check digit, so it counts only near these words."""
_PASSWORD = re.compile(
    r"(?:(?:password|passwd|passcode|passphrase|pwd)s?\b(?:[ \t]+(?:for|to|of|on)\b[^.:=\n]{1,40}?)?"
    r"[ \t]*(?::|=|：|\b(?:is|was)\b[ \t]*:?)(?:[ \t]+(?:now|currently|still|set to))?"
    r"|(?:パスワード|暗証番号)[ 　]*(?:は|が|を|：|:|=)(?:、)?)"
    r"[ \t　]*(?P<quote>[\"'`“‘「『]?)(?P<secret>[!-~]{4,64})",
    re.IGNORECASE,
)
_PASSWORD_END = re.compile(r"[.,;:)\]\"'`]+$")
_NOT_A_PASSWORD = re.compile(
    r"pass(?:word|wd|code)|pwd|secret|example|change|your|placeholder|dummy|test|foo|xxx|\*\*|hash|sha-?\d|md5|utf-?8|"
    r"crypt|base64|null|none|https?:|[(){}<>\[\]|\\]|^[$%@#*&]|^\w+\.\w+$",
    re.IGNORECASE,
)
"""Placeholders, code, and words about how passwords are stored."""
_SAYS_NUMBER = re.compile(r"passcode|暗証番号", re.IGNORECASE)
_WORD_OF_PROSE = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_FULL_WIDTH = {code: chr(code - 0xFEE0) for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF5B), 0xFF20, 0xFF0E)}
_FULL_WIDTH |= {0xFF0D: "-", 0x2212: "-", 0x2010: "-", 0x2011: "-", 0x30FC: "ー", 0xFF08: "(", 0xFF09: ")", 0xFF0B: "+"}

Span = tuple[int, int]

MASKS = {
    "private.key": "[key]",
    "private.card": "[card number]",
    "private.email": "[e-mail]",
    "private.iban": "[IBAN]",
    "private.ssn": "[social security number]",
    "private.my-number": "[My Number]",
    "private.phone": "[phone]",
    "private.password": "[password]",
}


def find_private(text: str, everything: bool = False) -> Iterator[tuple[str, int, int]]:
    """(code, start, end) of private data in a text. `everything` adds what belongs to nobody, such as test numbers."""
    if not text.isascii():
        text = text.translate(_FULL_WIDTH)  # one character for one, so that positions stay
    plain = text.encode("ascii", "replace")
    whole = [(0, len(text))]
    regions = _regions_of_figures(plain)
    has_key = "-----BEGIN" in text or _LONG_WORD in plain.translate(_WORDS)
    has_password = _may_hold_password(text)
    if not (regions or has_key or has_password or "@" in text):
        return
    places = {
        "private.key": whole if has_key else [],
        "private.email": whole if "@" in text else [],
        "private.iban": [(max(0, start - _IBAN_CHARACTERS), end + _IBAN_CHARACTERS) for start, end in regions],
        "private.card": _regions_of_figures(plain, min(_CARD_LENGTHS)) if regions else [],
        "private.my-number": _regions_of_figures(plain, _MY_NUMBER_DIGITS) if regions else [],
        "private.password": whole if has_password else [],
    }
    for code, pattern, span_of in _KINDS:
        spans = []
        for start, end in places.get(code, regions):
            for match in pattern.finditer(text, start, end):
                if (span := span_of(match, everything)) is not None:
                    spans.append(span)
        for start, end in spans:
            yield code, start, end
        text = _without(text, spans)


def _may_hold_password(text: str) -> bool:
    """A fast test: False if `_PASSWORD` cannot match."""
    lower = text.lower()
    return "pass" in lower or "pwd" in lower or (not text.isascii() and ("パスワード" in text or "暗証番号" in text))


def _regions_of_figures(plain: bytes, least: int = 0) -> list[Span]:
    """Where at least nine digits, or `least`, are so close to each other that they may be private; with a margin."""
    regions: list[Span] = []
    for match in _FIGURES_TOGETHER.finditer(plain.translate(_FIGURES)):
        if match[0].count(b"0") < least:
            continue
        start = max(0, match.start() - _REGION_MARGIN)
        if regions and start < regions[-1][1]:
            start = regions.pop()[0]
        regions.append((start, match.end() + _REGION_MARGIN))
    return regions


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    """The text with these spans overwritten, so that nothing is found twice."""
    pieces = []
    at = 0
    for start, end in spans:
        pieces += [text[at:start], "\0" * (end - start)]
        at = end
    return "".join([*pieces, text[at:]]) if spans else text


def is_card_number(text: str) -> bool:
    """Whether the first digits, the length and the check digit (Luhn, ISO/IEC 7812-1) are those of a card."""
    digits = [int(character) for character in text if character.isdigit()]
    if len(digits) not in _CARD_LENGTHS or not _CARD_START.match("".join(map(str, digits))) or len(set(digits)) < 2:
        return False
    doubled = [sum(divmod(2 * digit, 10)) if at % 2 else digit for at, digit in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _key(match: re.Match[str], everything: bool) -> Span | None:
    material = next((needed for start, needed in _KEY_MATERIAL.items() if match[0].startswith(start)), None)
    is_key = (material is None or material.search(match[0]) is not None) and not _DOCUMENTATION_KEY.search(match[0])
    return match.span() if everything or is_key else None


def _email(match: re.Match[str], everything: bool) -> Span | None:
    return match.span() if everything or not _FOR_DOCUMENTATION.search(match[0]) else None


def _card(match: re.Match[str], everything: bool) -> Span | None:
    if not is_card_number(match[0]):
        return None
    if everything:
        return match.span()
    if "".join(filter(str.isdigit, match[0])) in _TEST_CARDS:
        return None
    text = match.string
    start, end = match.span()
    before = text[max(0, start - _NEARBY_CHARACTERS) : start]
    groups = match[0].split()
    is_in_a_row = (
        _FIGURE_BEFORE.search(before) is not None
        or _FIGURE_AFTER.match(text, end) is not None
        or (len(groups) == 4 and groups in (sorted(groups), sorted(groups, reverse=True)))
    )
    is_card = (
        not (match[0].isdigit() or is_in_a_row)
        or _CARD_BEFORE.search(before) is not None
        or _CARD_AFTER.match(text, end) is not None
    )
    return match.span() if is_card else None


def _iban(match: re.Match[str], everything: bool) -> Span | None:
    """The longest beginning of the match that is valid in length, format and check digits (ISO 13616)."""
    text = match[0]
    ends = [at for at in range(len(text), 14, -1) if at == len(text) or text[at] == " "]
    end = next((end for end in ends if iban.is_valid(text[:end])), None)
    return None if end is None else (match.start(), match.start() + end)


def _ssn(match: re.Match[str], everything: bool) -> Span | None:
    """Without hyphens, only near words about it. Numbers that are never issued are none."""
    is_near = match[1] == "-" or _SSN_BEFORE.search(_before(match)) is not None
    return match.span() if is_near and ssn.is_valid(match[0].replace(" ", "-")) else None


def _my_number(match: re.Match[str], everything: bool) -> Span | None:
    is_near = _MY_NUMBER_BEFORE.search(_before(match)) is not None
    return match.span() if is_near and my_number.is_valid(match[0]) else None


def _before(match: re.Match[str]) -> str:
    return match.string[max(0, match.start() - _NEARBY_CHARACTERS) : match.start()]


def _phone_number(match: re.Match[str], everything: bool) -> Span | None:
    # A number that begins with 0 is Japanese or British, with ten or eleven digits.
    min_digits = 10 if match[0].lstrip("(").startswith("0") else 9
    if not min_digits <= sum(map(str.isdigit, match[0])) <= 15:
        return None
    is_number = everything or (not _FICTIONAL_PHONE.search(match[0]) and _is_assigned(match[0]))
    return match.span() if is_number else None


@lru_cache(maxsize=4096)
def _is_assigned(number: str) -> bool:
    """Whether a country assigns such phone numbers."""
    import phonenumbers  # the import takes long, and most data have no phone numbers

    for country in _HOME_COUNTRIES.get(number.lstrip("(")[0], ("US",)):
        try:
            parsed = phonenumbers.parse(number, country)
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_valid_number(parsed):
            return True
    return False


def _password(match: re.Match[str], everything: bool) -> Span | None:
    """The password alone. Without quotes, it needs letters with digits or signs, so that it is not a word of prose."""
    secret = _PASSWORD_END.sub("", match["secret"])
    has_digit = any(map(str.isdigit, secret))
    if len(secret) < 4 or _NOT_A_PASSWORD.search(secret):
        return None
    if secret.isdigit():
        is_password = _SAYS_NUMBER.search(match[0]) is not None
    elif match["quote"]:
        is_password = True
    else:
        is_password = len(secret) >= 6 and not _WORD_OF_PROSE.fullmatch(secret.rstrip("!?"))
        is_password &= has_digit or any(sign in secret for sign in "!@#$%^&*?")
        is_password &= any(map(str.isalpha, secret))
    start = match.start("secret")
    return (start, start + len(secret)) if is_password else None


_KINDS: Sequence[tuple[str, re.Pattern[str], Callable[[re.Match[str], bool], Span | None]]] = (
    ("private.key", _KEYS, _key),
    ("private.email", _EMAIL, _email),
    ("private.iban", _IBAN, _iban),
    ("private.card", _CARD, _card),
    ("private.my-number", _MY_NUMBER, _my_number),
    ("private.ssn", _SSN, _ssn),
    ("private.phone", _PHONE, _phone_number),
    ("private.password", _PASSWORD, _password),
)
"""Code, pattern, and what is private of a match; None if nothing is."""


def mask(text: str) -> str:
    """The text with all private data replaced by their kind, such as ``[phone]``."""
    return _masked(text, 0)


_SYMBOLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {0x7F: "␡"}
_SYMBOLS |= {
    code: f"<U+{code:04X}>"
    for code in (*range(0x80, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF)
}
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def visible(text: str) -> str:
    """The text, safe for a terminal, log or page: control characters and half characters are replaced by symbols."""
    if text.isascii() and text.isprintable():
        return text
    return _HALF_CHARACTER.sub(lambda match: f"<U+{ord(match[0]):04X}>", text.translate(_SYMBOLS))


DETAIL_CHARACTERS = 400
EXCERPT_CHARACTERS = 80
_WINDOW = 8200
"""Characters masked around an excerpt: private data may begin before it; a key block is at most this long."""


def detail(text: str) -> str:
    """A finding's detail, safe to print: masked first, then cut to `DETAIL_CHARACTERS`."""
    shown = visible(mask(text[:_WINDOW]))
    return shown if len(shown) <= DETAIL_CHARACTERS else shown[: DETAIL_CHARACTERS - 1] + "…"


def excerpt(text: str, at: int = 0) -> str:
    """A short piece of the text around `at`, on one line, masked and `visible`."""
    first = max(0, at - _WINDOW)
    start = max(0, at - EXCERPT_CHARACTERS // 4)
    shown = visible(" ".join(_masked(text[first : at + _WINDOW], start - first)[: 2 * EXCERPT_CHARACTERS].split()))
    return ("…" if start else "") + (
        shown if len(shown) <= EXCERPT_CHARACTERS else shown[: EXCERPT_CHARACTERS - 1] + "…"
    )


def _masked(text: str, start: int) -> str:
    """The masked text from `start` on; private data that begins before it is replaced too."""
    pieces = []
    for code, first, last in sorted(find_private(text, everything=True), key=lambda span: span[1]):
        if last > start:
            pieces += [text[start:first], MASKS[code]]
            start = last
    return "".join([*pieces, text[start:]])
