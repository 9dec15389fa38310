"""Answers that differ from the others of their source: cut off, too short, of unusual length, tone, format or language.

The data define what is usual. Each source is checked by itself, because two sources may differ on purpose, and so may
the languages of one source: tones and lengths are compared within a language.
"""

from collections.abc import Iterator

import numpy as np

from ft_service.data.gate.facts import ENDINGS, REGISTERS, SHAPES, WHOLE_FROM_CJK, WHOLE_FROM_LATIN, Facts
from ft_service.data.gate.form import Hit
from ft_service.data.gate.text import LANGUAGES, LATIN_LETTERS_PER_CJK_CHARACTER

FEWEST = 20
"""With fewer answers, nothing counts as usual."""
RARE_ENDING = 0.1
"""If fewer answers than this share end with a letter (digit, other sign) in mid-line, those were cut off."""
SPIKE_FROM = 5
SPIKE_TIMES = 6
"""A length is a limit if at least 5 answers end there in mid-sentence, and 6 times the median of nearby lengths."""
_SPIKE_NEIGHBOURS = 10
TOO_SHORT_LATIN = 10
TOO_SHORT_CJK = 4
"""In characters: about two words."""
SHORT_AGAINST_MEDIAN = 0.1
FAR_OUT = 2.0
"""In interquartile ranges beyond the quartiles, of the logarithm of lengths: 1 in 1,300 of a normal distribution,
between Tukey's outliers (1.5) and his "far out" (3)."""
FAR_OUT_AT_LEAST = 4.0
"""At least this factor beyond the quartile: the range alone is too strict if all lengths are nearly equal."""
DOMINANT = 0.8
"""From this share on, one format or language is the usual one."""
DOMINANT_TONE = 0.5
"""There is no reason to mix the tones of one language: the rarer ones are always reported."""


def check_style(facts: Facts) -> Iterator[Hit]:
    """All these checks, on the training records."""
    keys = facts["key"]
    train = ~facts["validation"]
    sources = facts["source"]
    columns = {
        name: facts[name]
        for name in (
            "output",
            "output_length",
            "kept_loss",
            "ending",
            "cjk",
            "register",
            "shape",
            "prompt_language",
            "output_language",
        )
    }
    for source in np.unique(sources):
        rows = np.flatnonzero((sources == source) & train)
        if len(rows) >= FEWEST:
            part = {name: column[rows] for name, column in columns.items()}
            for code, where, detail in _findings(part):
                yield from (Hit(code, int(keys[rows[at]]), detail) for at in where)


_Findings = Iterator[tuple[str, np.ndarray, str]]


def _findings(part: dict[str, np.ndarray]) -> _Findings:
    yield from _cut_off(part)
    for among in _scripts(part["cjk"]):
        answers = {name: column[among] for name, column in part.items()}
        short = _too_short(answers)
        yield "quality.too-short", among[short], "far shorter than the other answers"
        for name, where, detail in _lengths(_as_of_most(answers["output_length"], answers["cjk"]), short):
            yield name, among[where], detail
    for language in np.unique(part["output_language"]).tolist():
        among = np.flatnonzero(part["output_language"] == language)
        tones = part["register"][among]
        for name, where, detail in _exceptions("style.register", tones, REGISTERS, ("none",), DOMINANT_TONE):
            yield name, among[where], detail
    yield from _exceptions("style.format", part["shape"], SHAPES, unknown=("short",))
    yield from _languages(part)


def _scripts(cjk: np.ndarray) -> list[np.ndarray]:
    """The rows of each script, because a text has other lengths in each; all rows if one script has few."""
    parts = [np.flatnonzero(cjk), np.flatnonzero(~cjk)]
    return parts if min(map(len, parts)) >= FEWEST else [np.arange(len(cjk))]


def _as_of_most(lengths: np.ndarray, cjk: np.ndarray) -> np.ndarray:
    """Lengths in characters of the script of most answers; those of the other are converted."""
    of_most = cjk.mean() > 0.5
    factor = np.where(cjk, LATIN_LETTERS_PER_CJK_CHARACTER, 1) / (LATIN_LETTERS_PER_CJK_CHARACTER if of_most else 1)
    return np.maximum(1, lengths) * factor


def _cut_off(part: dict[str, np.ndarray]) -> _Findings:
    ending = part["ending"]
    whole = ending != ENDINGS.index("short")
    reported = ending == ENDINGS.index("open")
    if reported.sum() >= DOMINANT_TONE * whole.sum():
        reported[:] = False  # most end so, so it is intended
    yield "form.cut-off", np.flatnonzero(reported), "ends with an open bracket, comma or the like"
    for name in ("letter", "digit", "other"):
        unusual = (ending == ENDINGS.index(name)) & (part["shape"] == SHAPES.index("prose"))
        if whole.sum() >= FEWEST and unusual.sum() < RARE_ENDING * whole.sum():
            yield "form.cut-off", np.flatnonzero(unusual), "ends in the middle of a sentence"
            reported |= unusual
    unfinished = whole & ~np.isin(ending, [ENDINGS.index("sentence"), ENDINGS.index("figure")])
    for unit, lengths in (("characters", part["output_length"]), ("tokens", part["kept_loss"])):
        spikes = _spikes(lengths[unfinished], part["output"][unfinished])
        for spike in spikes:
            at_limit = unfinished & ~reported & (lengths == spike)
            reported |= at_limit
            yield (
                "form.cut-off",
                np.flatnonzero(at_limit),
                f"ends after {spike:,} {unit}, like many others: probably a length limit",
            )


def _spikes(lengths: np.ndarray, outputs: np.ndarray) -> list[int]:
    """Lengths that far more answers have than nearby lengths; a repeated answer counts once."""
    lengths = lengths[np.unique(outputs, return_index=True)[1]]
    lengths = lengths[lengths > 0]
    values, counts = np.unique(lengths, return_counts=True)
    by_length = dict(zip(values.tolist(), counts.tolist(), strict=True))
    spikes = []
    for value, count in by_length.items():
        if count >= SPIKE_FROM:
            near = range(value - _SPIKE_NEIGHBOURS, value + _SPIKE_NEIGHBOURS + 1)
            usual = np.median([by_length.get(other, 0) for other in near if other != value])
            if count >= SPIKE_TIMES * max(1.0, float(usual)):
                spikes.append(value)
    return spikes


def _too_short(part: dict[str, np.ndarray]) -> np.ndarray:
    lengths = part["output_length"]
    cjk = part["cjk"]
    usual = float(np.median(lengths))
    least = np.where(cjk, TOO_SHORT_CJK, TOO_SHORT_LATIN)
    whole = WHOLE_FROM_CJK if cjk.mean() > 0.5 else WHOLE_FROM_LATIN
    return (lengths <= least) & (lengths < SHORT_AGAINST_MEDIAN * usual) if usual >= whole else np.zeros(len(cjk), bool)


def _lengths(lengths: np.ndarray, reported: np.ndarray) -> _Findings:
    logs = np.log(np.maximum(1, lengths))
    low, high = np.quantile(logs, [0.25, 0.75])
    reach = max(FAR_OUT * (high - low), np.log(FAR_OUT_AT_LEAST))
    usual = f"(half of them have {np.exp(low):,.0f} to {np.exp(high):,.0f} characters)"
    yield (
        "style.length",
        np.flatnonzero((logs > high + reach) & ~reported),
        f"far longer than the other answers {usual}",
    )
    yield (
        "style.length",
        np.flatnonzero((logs < low - reach) & ~reported),
        f"far shorter than the other answers {usual}",
    )


def _exceptions(
    code: str, values: np.ndarray, names: tuple[str, ...], unknown: tuple[str, ...], dominant: float = DOMINANT
) -> _Findings:
    """Known values that differ from the dominant one."""
    known = ~np.isin(values, [names.index(name) for name in unknown])
    if known.sum() < FEWEST:
        return
    counts = np.bincount(values[known], minlength=len(names))
    usual = int(counts.argmax())
    if counts[usual] < dominant * known.sum():
        return
    for value in np.flatnonzero(counts):
        if value != usual:
            yield code, np.flatnonzero(known & (values == value)), f"{names[value]}; most others are {names[usual]}"


def _languages(part: dict[str, np.ndarray]) -> _Findings:
    """Answers in an unusual language for the language of their question, or for their source.

    An answer in the language of its question is none of them, however rare the language is.
    """
    asked = part["prompt_language"].astype(np.int64)
    answered = part["output_language"].astype(np.int64)
    code = np.isin(part["shape"], [SHAPES.index("code"), SHAPES.index("json")])
    answered = np.where(code, 0, answered)
    reported = np.zeros(len(asked), dtype=bool)
    for language in (None, *np.unique(asked).tolist()):
        among = np.ones(len(asked), dtype=bool) if language is None else asked == language
        for name, where, detail in _exceptions("style.language", answered[among], LANGUAGES, unknown=("none",)):
            rows = np.flatnonzero(among)[where]
            rows = rows[~reported[rows] & (answered[rows] != asked[rows])]
            reported[rows] = True
            yield name, rows, detail
