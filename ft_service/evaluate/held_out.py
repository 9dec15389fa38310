"""Held-out records become items, and reference answers whose loss is measured.

A file is read by the same code as training data. Of a conversation the last answer is the reference, and what comes
before it is the question. The validation split of a run is read from its prepared dataset, as token ids, so that the
questions and the loss are those of training.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from ft_service.chat.format import END_OF_TURN, HEADER_END, HEADER_START, Message
from ft_service.data.convert import BadRecord, convert
from ft_service.data.dataset import RowTable, open_dataset
from ft_service.data.files.shard import Fault
from ft_service.data.read import read_source
from ft_service.errors import DataError, FtError
from ft_service.evaluate.items import Item, Turn, first_error
from ft_service.evaluate.suite import HeldOut, draw
from ft_service.registry.registry import AdapterRecord
from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage

HELD_OUT = "held_out"
"""The skill of held-out records."""
_SHOWN_PROBLEMS = 3
_TURN = re.compile(f"{re.escape(HEADER_START)}(.*?){re.escape(HEADER_END)}\n\n(.*?){re.escape(END_OF_TURN)}", re.DOTALL)


@dataclass(frozen=True)
class HeldOutRecord:
    """A question and its reference answer, as a conversation or as token ids."""

    name: str
    """``file:line``, or the number of a document in the validation split."""
    turns: tuple[Message, ...] = ()
    """The conversation; its last turn is the reference answer."""
    prompt_ids: tuple[int, ...] = ()
    answer_ids: tuple[int, ...] = ()
    """The ids that training learnt from, the end of the turn included."""


@dataclass(frozen=True)
class HeldOutRecords:
    """The records that are used, and how many were left out."""

    records: tuple[HeldOutRecord, ...]
    left_out: int
    problems: tuple[str, ...]
    """Why the first of them were left out, with their places; the others before those with tools."""
    with_tools: int = 0
    """How many of them use tools: no metric scores a call."""


class _UsesToolsError(BadRecord):
    """A conversation with tools, for which there is no metric."""


def read_held_out(held_out: HeldOut, storage: Storage, adapter: AdapterRecord | None, seed: int) -> HeldOutRecords:
    """The records of one source. Those that cannot be used are left out. Raises `DataError` if none is left."""
    if held_out.run:
        records = draw(_validation_split(storage, adapter), held_out.limit, seed)
        return HeldOutRecords(tuple(records), 0, ())
    good: list[HeldOutRecord] = []
    problems: list[str] = []
    with_tools: list[str] = []
    for place, record in read_source(held_out.source):
        if isinstance(record, Fault):
            problems.append(f"{place}: {record.reason}")
            continue
        try:
            turns = convert(record, held_out.source)
            assert not isinstance(turns, str)
            good.append(HeldOutRecord(place, _until_last_answer(turns)))
        except _UsesToolsError as error:
            with_tools.append(f"{place}: {error}")
        except BadRecord as error:
            problems.append(f"{place}: {error}")
    problems += with_tools
    if not good:
        reasons = "; ".join(problems[:_SHOWN_PROBLEMS]) or "the file is empty"
        raise DataError(f"held_out.path = {held_out.path!r}: no record can be used ({reasons}). Fix the file.")
    drawn = tuple(draw(good, held_out.limit, seed))
    return HeldOutRecords(drawn, len(problems), tuple(problems[:_SHOWN_PROBLEMS]), len(with_tools))


def _until_last_answer(turns: Sequence[Message]) -> tuple[Message, ...]:
    """Raises `BadRecord` for a conversation that cannot be asked as one question."""
    last = max((number for number, turn in enumerate(turns) if turn.role == "assistant"), default=0)
    kept = tuple(turns[: last + 1])
    if any(turn.uses_tools or turn.role == "tool" for turn in kept):
        raise _UsesToolsError("uses tools, and no metric scores a call")
    if len(kept) < 2 or kept[-2].role != "user":
        raise BadRecord("has no question before its last answer")
    return kept


def _validation_split(storage: Storage, adapter: AdapterRecord | None) -> list[HeldOutRecord]:
    if adapter is None:
        raise DataError("held_out.run = true: needs an adapter that this storage has published. Name a file instead.")
    try:
        dataset = open_dataset(storage, RunFolder(storage, adapter.run_id).plan().dataset.digest)
    except FtError as error:
        raise DataError(
            f"held_out.run = true: the prepared data of {adapter.run_id} are gone ({error}). Name a file instead."
        ) from None
    if dataset.validation is None:
        raise DataError(
            f"held_out.run = true: the run {adapter.run_id} had no validation data. Name a file, or train with "
            "data.validation."
        )
    return list(documents(dataset.validation))


def documents(rows: RowTable) -> Iterator[HeldOutRecord]:
    """The records of a validation split as token ids, up to their first answer. One without a question is skipped."""
    for index in range(len(rows)):
        row = rows[index]
        yield from _documents(row.input_ids, row.loss_mask, row.document_lengths)


def _documents(ids: np.ndarray, mask: np.ndarray, lengths: np.ndarray) -> Iterator[HeldOutRecord]:
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
        document = ids[start:end]
        trained = mask[start:end].astype(bool)
        first = int(np.argmax(trained))
        if not trained.any() or first == 0:
            continue
        stop = first + int(np.argmin(np.append(trained[first:], False)))
        prompt = tuple(document[:first].tolist())
        name = hashlib.sha256(document[:stop].tobytes()).hexdigest()[:12]
        yield HeldOutRecord(name, prompt_ids=prompt, answer_ids=tuple(document[first:stop].tolist()))


def items_of(record: HeldOutRecord, held_out: HeldOut, name: str, texts: tuple[str, str] | None) -> list[Item]:
    """One item for each metric; all of them ask the same question.

    Raises `DataError` if a metric cannot score the reference.

    `texts` are question and reference of a record of token ids, for people and for the metrics.
    """
    if record.turns:
        *before, question, answer = record.turns
        system = before.pop(0).content if before and before[0].role == "system" else None
        history = [Turn(role=turn.role, content=turn.content) for turn in before]  # type: ignore[arg-type]
        prompt = question.content
        reference = answer.content
    else:
        assert texts is not None
        prompt, reference = texts
        system = None
        history = []
    fields = {
        "cluster": f"{name}-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}",
        "language": held_out.language,
        "prompt": prompt,
        "prompt_ids": list(record.prompt_ids) or None,
        "system": system,
        "history": history,
        "reference": reference,
        "max_tokens": held_out.max_tokens,
    }
    try:
        return [
            Item.model_validate(
                {
                    **fields,
                    "id": f"{name}/{_short(record.name)}/{metric}",
                    "skill": HELD_OUT if number == 0 else f"{HELD_OUT}_{metric}",
                    "metric": metric,
                    "counts": number == 0,
                }
            )
            for number, metric in enumerate(held_out.metrics)
        ]
    except ValidationError as error:
        raise DataError(f"{record.name}: {first_error(error)}") from None


def _short(name: str) -> str:
    file, _, line = name.rpartition(":")
    return re.sub(r"[^\w.:-]", "_", f"{file.rsplit('/', 1)[-1]}:{line}" if file else name)


def encoded_turns(text: str) -> list[tuple[str, str]]:
    """Role and content of each turn of a decoded conversation; empty for another text."""
    return _TURN.findall(text)


def readable(text: str) -> str:
    """An encoded conversation for people: the content of its turns, each behind its role if there are several."""
    turns = encoded_turns(text)
    if not turns:
        return text.strip()
    return str(turns[0][1]) if len(turns) == 1 else "\n\n".join(f"{role}: {content}" for role, content in turns)
