"""Size: what a number of training records is enough for, and how many epochs and steps to train."""

from collections.abc import Sequence
from typing import Literal

from ft_service.data.gate.findings import SizeAdvice
from ft_service.text import counted

TOO_FEW = 10
NARROW = 500
NARROW_END = 3_000
STABLE = 5_000
STABLE_END = 20_000
EXPERT = 50_000
"""A rule of thumb, in training records: 500-3,000 for a narrow skill, 5,000-20,000 for a stable one, 50,000 and more
for an expert model."""
_Level = Literal["too few", "little", "narrow skill", "between", "stable skill", "broad skill", "expert"]
_STEPS: Sequence[tuple[int, _Level, float, str]] = (
    (TOO_FEW, "too few", 0.0, "too few to learn from."),
    (NARROW, "little", 5.0, f"fewer than the {NARROW:,} that a narrow skill needs."),
    (NARROW_END, "narrow skill", 4.0, "enough for a narrow skill (one task, one tone, one format)."),
    (STABLE, "between", 3.0, f"more than a narrow skill needs, fewer than the {STABLE:,} for a stable one."),
    (STABLE_END, "stable skill", 3.0, "enough for a stable skill."),
    (EXPERT, "broad skill", 2.0, f"more than a stable skill needs, fewer than the {EXPERT:,} for an expert model."),
)
_EXPERT: tuple[_Level, float, str] = ("expert", 1.0, "enough for an expert model.")
"""(upper bound, level, epochs, meaning). Few records allow more epochs (LIMA, arXiv:2305.11206, trains 15 on 1,000;
Alpaca 3 on 52,000), many need one or two. With five, LoRA on a few hundred records begins to memorise."""


def advise(
    training_records: int, kept_tokens: int, max_seq_len: int | None, global_batch_size: int | None
) -> SizeAdvice:
    """Advice for this number of training records, which have `kept_tokens` tokens within max_seq_len."""
    level, epochs, meaning = next((step[1:] for step in _STEPS if training_records < step[0]), _EXPERT)
    steps = None
    if kept_tokens and max_seq_len and global_batch_size and epochs:
        rows = -(-kept_tokens // max_seq_len)
        steps = max(1, round(epochs * rows / global_batch_size))
    text = f"{counted(training_records, 'training record')}: {meaning}"
    if epochs:
        text += f" Start with {counted(int(epochs), 'epoch')}"
        text += f", {counted(steps, 'step')} of {counted(global_batch_size or 0, 'row')}." if steps else "."
    return SizeAdvice(training_records=training_records, level=level, text=text, epochs=epochs, steps=steps)
