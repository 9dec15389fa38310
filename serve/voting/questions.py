"""Questions of a study: a JSONL file, or the validation split of a run; and attention items with a known answer.

A line of questions is ``{"prompt": "..."}`` with an optional ``system``, or ``{"messages": [...]}`` in OpenAI's shape,
or ``{"instruction": "...", "input": "..."}``. A last answer is left out: the models give theirs. A line of attention
items is ``{"prompt": "...", "good": "...", "bad": "..."}``.
"""

import hashlib
import json
import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ft_service.data.dataset import open_dataset
from ft_service.errors import DataError
from ft_service.evaluate.held_out import documents, encoded_turns
from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage
from serve.voting.files import Question, Turn

HELD_OUT = "held-out"
_SHOWN_PROBLEMS = 5

Detokenize = Callable[[list[int]], str]


@dataclass(frozen=True)
class QuestionSource:
    """Questions, and the digest of where they come from."""

    questions: list[Question]
    digest: str


@dataclass(frozen=True)
class AttentionItem:
    """A question to which one of two answers is plainly right."""

    question: Question
    good: str
    bad: str


def read_questions(file: Path) -> QuestionSource:
    """The questions of a file, without repetitions. Raises `DataError` with the lines that cannot be used."""
    lines, digest = _read_lines(file, "--questions")
    return QuestionSource(_distinct(_parse(lines, file, "--questions", _question)), digest)


def read_attention(file: Path) -> tuple[list[AttentionItem], str]:
    """The items of a file, and its digest. Raises `DataError` with the lines that cannot be used."""
    lines, digest = _read_lines(file, "--attention")
    return _parse(lines, file, "--attention", _attention_item), digest


def held_out_questions(
    storage: Storage, run_id: str, detokenize: Detokenize, limit: int | None, seed: int
) -> QuestionSource:
    """What comes before the first answer of each record of a run's validation split; at most `limit`, by the seed.

    Raises `DataError` if the run has no validation data, or records of another form, and `StorageError` if it is gone.
    """
    dataset = open_dataset(storage, RunFolder(storage, run_id).plan().dataset.digest)
    if dataset.validation is None:
        raise DataError(f"--questions = {HELD_OUT!r}: the run {run_id} had no validation data. Name a file.")
    prompts = list(dict.fromkeys(record.prompt_ids for record in documents(dataset.validation)))
    questions: dict[int, Question] = {}
    for place in random.Random(f"held-out {seed}").sample(range(len(prompts)), len(prompts)):
        if len(questions) == limit:
            break
        turns = [
            Turn.model_validate({"role": role, "content": content})
            for role, content in encoded_turns(detokenize(list(prompts[place])))
        ]
        if turns and turns[-1].role == "user":
            questions[place] = Question(id=_new_id(), name=f"{run_id}:{place + 1}", turns=turns)
    if not questions:
        raise DataError(f"--questions = {HELD_OUT!r}: no validation record of {run_id} asks anything. Name a file.")
    return QuestionSource(_distinct([questions[place] for place in sorted(questions)]), dataset.digest)


def sample(questions: Sequence[Question], limit: int | None, seed: int) -> list[Question]:
    """At most `limit` of them, drawn by the seed, in their order."""
    if limit is None or limit >= len(questions):
        return list(questions)
    chosen = sorted(random.Random(f"questions {seed}").sample(range(len(questions)), limit))
    return [questions[index] for index in chosen]


def _read_lines(file: Path, option: str) -> tuple[list[str], str]:
    try:
        content = file.read_bytes()
        return content.decode("utf-8-sig").split("\n"), hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise DataError(f"{option} = {str(file)!r}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise DataError(f"{option} = {str(file)!r}: is not UTF-8. Save it as UTF-8.") from None


def _parse(lines: list[str], file: Path, option: str, convert: Callable[[dict[str, Any], str], Any]) -> list[Any]:
    items = []
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError("is no JSON object")
            items.append(convert(content, f"{file.name}:{number}"))
        except ValidationError as error:
            problems.append(f"line {number}: {error.errors()[0]['msg']}")
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        shown = "; ".join(problems[:_SHOWN_PROBLEMS])
        raise DataError(f"{option} = {str(file)!r}: {shown}{more}. Fix these lines. See docs/voting.md.")
    if not items:
        raise DataError(f"{option} = {str(file)!r}: is empty. Write one JSON object a line. See docs/voting.md.")
    return items


def _question(content: dict[str, Any], name: str) -> Question:
    if "messages" in content:
        turns = [Turn(role=one["role"], content=_text(one, "content")) for one in content["messages"]]
        while turns and turns[-1].role == "assistant":
            turns.pop()
    else:
        if "prompt" in content:
            prompt = _text(content, "prompt")
        elif "instruction" in content:
            prompt = "\n\n".join(part for part in (_text(content, "instruction"), content.get("input") or "") if part)
        else:
            raise ValueError("has neither `prompt`, `messages` nor `instruction`")
        system = [Turn(role="system", content=_text(content, "system"))] if content.get("system") else []
        turns = [*system, Turn(role="user", content=prompt)]
    if not turns or turns[-1].role != "user":
        raise ValueError("asks nothing: the last turn is not the user's")
    return Question(id=_new_id(), name=str(content.get("id") or name), turns=turns)


def _attention_item(content: dict[str, Any], name: str) -> AttentionItem:
    good = _text(content, "good")
    bad = _text(content, "bad")
    if good == bad:
        raise ValueError("`good` and `bad` are the same")
    return AttentionItem(_question(content, name), good, bad)


def _text(content: dict[str, Any], key: str) -> str:
    text = content.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"`{key}` is no text")
    return text.replace("\0", "")


def _distinct(questions: Sequence[Question]) -> list[Question]:
    """The first of each."""
    found: dict[str, Question] = {}
    for one in questions:
        found.setdefault(json.dumps([turn.model_dump() for turn in one.turns]), one)
    return list(found.values())


def _new_id() -> str:
    return secrets.token_hex(8)
