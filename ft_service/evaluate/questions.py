"""What an evaluation asks: the suite's items, held-out records, and the tokens whose loss is measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ft_service.errors import DataError, ServingError
from ft_service.evaluate.ask import Question
from ft_service.evaluate.held_out import HELD_OUT, HeldOutRecord, items_of, read_held_out, readable
from ft_service.evaluate.items import Item
from ft_service.evaluate.server import Server
from ft_service.evaluate.suite import HeldOut, LoadedSuite, draw
from ft_service.registry.registry import AdapterRecord
from ft_service.storage.storage import Storage
from ft_service.text import counted


@dataclass(frozen=True)
class MeasuredAnswer:
    """A held-out record as token ids, of which the last `num_answer_tokens` are the answer."""

    name: str
    ids: tuple[int, ...]
    num_answer_tokens: int


@dataclass
class QuestionPlan:
    """Everything that is asked of each of both models."""

    items: list[Item] = field(default_factory=list)
    answers: list[MeasuredAnswer] = field(default_factory=list)
    """Held-out answers whose loss is measured."""
    texts: list[str] = field(default_factory=list)
    """General texts whose loss is measured."""
    references: list[tuple[str, str]] = field(default_factory=list)
    """(text, language) of held-out answers."""
    left_out: list[str] = field(default_factory=list)
    """What cannot be used or measured, and why."""

    def questions(self, model: str, seed: int) -> list[tuple[Question, str]]:
        """Every question to one model, with the name of what it asks."""
        return [
            *((question_of(item, model, seed), item.id) for item in self.items),
            *((measurement_of(answer.ids, model, seed), answer.name) for answer in self.answers),
            *((measurement_of(text, model, seed), f"text {text[:40]!r}") for text in self.texts),
        ]


def question_of(item: Item, model: str, seed: int) -> Question:
    """An item at temperature 0."""
    if item.prompt_ids is not None:
        return Question(model, prompt=tuple(item.prompt_ids), max_tokens=item.max_tokens, seed=seed)
    turns = (
        *([("system", item.system)] if item.system else []),
        *((turn.role, turn.content) for turn in item.history),
        ("user", item.prompt),
    )
    return Question(model, messages=turns, max_tokens=item.max_tokens, seed=seed)


def context_of(item: Item) -> str:
    """What a question's model is shown before the prompt, for people and judges; empty if there is nothing."""
    turns = [
        *([("system", item.system)] if item.system else []),
        *((turn.role, turn.content) for turn in item.history),
    ]
    return "\n\n".join(f"{role}: {content}" for role, content in turns)


def measurement_of(prompt: str | tuple[int, ...], model: str, seed: int) -> Question:
    """The log-probabilities of a text or of token ids."""
    return Question(model, prompt=prompt, max_tokens=0, seed=seed)


def make_plan(
    loaded: LoadedSuite, storage: Storage, server: Server, model: str, adapter: AdapterRecord | None, limit: int | None
) -> QuestionPlan:
    """Read the held-out data and encode them as `model` does.

    `adapter` is the record of the evaluated adapter, if it is published on `storage`. With `limit`, that many items of
    each skill, texts and answers are drawn. Raises `DataError` or `ServingError`.
    """
    plan = QuestionPlan(items=list(loaded.items), texts=list(loaded.texts))
    seed = loaded.suite.seed
    for number, source in enumerate(loaded.suite.held_out, 1):
        name = HELD_OUT if len(loaded.suite.held_out) == 1 else f"{HELD_OUT}{number}"
        read = read_held_out(source, storage, adapter, seed)
        if read.left_out:
            reasons = "; ".join(read.problems)
            plan.left_out.append(f"{source.path}: {counted(read.left_out, 'record')} cannot be used ({reasons})")
        _add(plan, source, name, draw(read.records, limit or source.limit, seed), server, model, adapter)
    if limit is not None:
        skills = dict.fromkeys(item.skill for item in plan.items)
        groups = [[item for item in plan.items if item.skill == skill] for skill in skills]
        plan.items = [
            item
            for group in groups
            for item in (group if group[0].skill.startswith(HELD_OUT) else draw(group, limit, seed))
        ]
        plan.texts = draw(plan.texts, limit, seed)
    return plan


def _add(
    plan: QuestionPlan,
    source: HeldOut,
    name: str,
    records: Sequence[HeldOutRecord],
    server: Server,
    model: str,
    adapter: AdapterRecord | None,
) -> None:
    texts = _texts(records, server, model, adapter)
    unfit: list[str] = []
    for record in records:
        try:
            items = items_of(record, source, name, texts.get(record.name))
        except DataError as error:
            unfit.append(str(error))
            continue
        plan.items += items
        plan.references.append((str(items[0].reference), source.language))
    if len(unfit) == len(records):
        raise DataError(f"{name}: no record can be scored ({unfit[0]}). Choose other metrics.")
    if unfit:
        plan.left_out.append(f"{name}: {counted(len(unfit), 'record')} cannot be scored ({'; '.join(unfit[:3])})")
    if source.validation_loss:
        try:
            plan.answers += _measured(records, server, model)
        except ServingError as error:
            plan.left_out.append(f"{name}: its loss is not measured; the server does not tokenize ({error})")


def _texts(
    records: Sequence[HeldOutRecord], server: Server, model: str, adapter: AdapterRecord | None
) -> dict[str, tuple[str, str]]:
    """Question and reference of each record of token ids, by its name."""
    encoded = [record for record in records if record.prompt_ids]
    ends = set(adapter.end_of_turn_ids) if adapter else set()
    prompts = server.texts(model, [record.prompt_ids for record in encoded])
    references = server.texts(model, [[one for one in record.answer_ids if one not in ends] for record in encoded])
    return {
        record.name: (readable(prompt), reference.strip())
        for record, prompt, reference in zip(encoded, prompts, references, strict=True)
    }


def _measured(records: Sequence[HeldOutRecord], server: Server, model: str) -> list[MeasuredAnswer]:
    """Of a conversation, the answer's tokens are those that the question, encoded by itself, lacks."""
    measured = [
        MeasuredAnswer(record.name, (*record.prompt_ids, *record.answer_ids), len(record.answer_ids))
        for record in records
        if record.prompt_ids
    ]
    conversations = [record for record in records if record.turns]
    turns = [[(turn.role, turn.content) for turn in record.turns] for record in conversations]
    questions = server.conversation_ids(model, [one[:-1] for one in turns], is_question=True)
    wholes = server.conversation_ids(model, turns, is_question=False)
    return measured + [
        MeasuredAnswer(record.name, tuple(whole), len(whole) - len(question))
        for record, question, whole in zip(conversations, questions, wholes, strict=True)
        if whole[: len(question)] == question
    ]
