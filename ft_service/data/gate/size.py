"""Size and fit: what this many records are enough for, and the epochs and steps that follow."""

from collections.abc import Sequence
from typing import Literal

from ft_service.data.gate.findings import SizeAdvice
from ft_service.text import counted

TOO_FEW = 10
NARROW, NARROW_END = 500, 3_000
STABLE, STABLE_END = 5_000, 20_000
EXPERT = 50_000
"""The field's rule of thumb, in usable records: 500-3,000 for a narrow skill, 5,000-20,000 for a stable one, 50,000 and
more for an expert."""
_Level = Literal["too few", "little", "narrow skill", "between", "stable skill", "broad skill", "expert"]
_STEPS: Sequence[tuple[int, _Level, float, str]] = (
    (TOO_FEW, "too few", 0.0, "too few to teach anything."),
    (NARROW, "little", 5.0, f"less than the {NARROW:,} with which a narrow skill begins."),
    (NARROW_END, "narrow skill", 4.0, "enough for a narrow skill: one task, one tone, one format."),
    (STABLE, "between", 3.0, f"more than a narrow skill needs; from {STABLE:,} on a skill becomes stable."),
    (STABLE_END, "stable skill", 3.0, "enough for a stable skill."),
    (EXPERT, "broad skill", 2.0, f"more than a stable skill needs; from {EXPERT:,} on a model becomes an expert."),
)
_EXPERT: tuple[_Level, float, str] = ("expert", 1.0, "enough for an expert in its field.")
"""Fewer than, level, epochs. Few records bear more passes (LIMA, arXiv:2305.11206, takes 15 over 1,000; Alpaca 3 over
52,000), many need one or two; five is where LoRA on some hundred records begins to recite."""


def advise(usable: int, kept_tokens: int, max_seq_len: int | None, global_batch_size: int | None) -> SizeAdvice:
    """The advice for so many usable records, which come to so many tokens when packed."""
    level, epochs, meaning = next((step[1:] for step in _STEPS if usable < step[0]), _EXPERT)
    steps = None
    if kept_tokens and max_seq_len and global_batch_size and epochs:
        rows = -(-kept_tokens // max_seq_len)
        steps = max(1, round(epochs * rows / global_batch_size))
    text = f"{counted(usable, 'usable record')}: {meaning}"
    if epochs:
        text += f" Begin with {epochs:g} epoch{'s' if epochs != 1 else ''}"
        text += f", {steps:,} steps of {global_batch_size} rows." if steps else "."
    return SizeAdvice(usable=usable, level=level, text=text, epochs=epochs, steps=steps)
