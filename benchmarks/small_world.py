"""Made-up records and a Llama with random weights, for runs that are watched rather than used."""

import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ft_service.model.scratch import train_tokenizer, write_scratch_model

_WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "house", "tree", "river", "stone")
_TOKENIZER_RECORDS = 500


def write_records(file: Path, count: int, words: tuple[int, int] = (3, 12), seed: int = 0) -> list[str]:
    """Questions of some `words` each, with their last word as the answer; returns the questions."""
    rng = random.Random(seed)
    questions = [" ".join(rng.choices(_WORDS, k=rng.randint(*words))) for _ in range(count)]
    lines = ({"instruction": f"Last word of: {question}", "output": question.split()[-1]} for question in questions)
    file.write_text("\n".join(map(json.dumps, lines)))
    return questions


def write_base(folder: Path, vocab_size: int, sizes: dict[str, int]) -> None:
    """A checkpoint folder; `sizes` are those of `write_scratch_model`."""
    rng = random.Random(0)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    # Made-up words give byte pairs enough for any vocabulary; the questions' own words are among them.
    texts = [
        " ".join("".join(rng.choices(alphabet, k=rng.randint(3, 9))) for _ in range(40)) + " " + " ".join(_WORDS)
        for _ in range(_TOKENIZER_RECORDS)
    ]
    write_scratch_model(folder, tokenizer=train_tokenizer(texts, vocab_size), seed=0, **sizes)
