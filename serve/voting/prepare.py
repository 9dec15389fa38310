"""Makes a study: asks the server's models, pairs their answers, draws who judges what, and opens it once all is there.

Answers are kept on storage as they come (`draft/`), so that a command that was interrupted asks only the rest. A study
exists once its `study.json` is written, and is open once the database has it; both happen whole or not at all.
"""

import hashlib
import itertools
import json
import math
import random
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from ft_service.errors import ServingError, StorageError, UsageError
from ft_service.evaluate.ask import Answer, Answers, Endpoint, Identity, ask_now
from ft_service.evaluate.ask import Question as Asked
from ft_service.evaluate.server import Server
from ft_service.storage.storage import Storage
from serve.voting.draw import draw_assignments
from serve.voting.files import (
    AXIS_PATTERN,
    Comparison,
    PreparedAnswer,
    Question,
    RaterFile,
    Reveal,
    Settings,
    StudyFile,
    StudyFolder,
    StudyModel,
)
from serve.voting.questions import (
    HELD_OUT,
    AttentionItem,
    QuestionSource,
    held_out_questions,
    read_attention,
    read_questions,
    sample,
)
from serve.voting.studies import open_study, study_names_in

_MOST_SHARE = 0.5
_MOST_RATERS = 1000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StudyRequest:
    """What a study is to be."""

    name: str
    adapters: tuple[str, ...]
    questions: str
    """A file, `held-out` for the validation split of the first adapter's run, or `held-out:RUN`."""
    raters: tuple[str, ...]
    votes_per_item: int
    title: str = ""
    base: bool = False
    axes: tuple[str, ...] = ()
    repeats: float = 0.1
    controls: float = 0.05
    attention: Path | None = None
    limit: int | None = None
    reveal: Reveal = "vote"
    seed: int = 0
    temperature: float = 0.7
    max_tokens: int = 512
    concurrency: int = 8

    def check(self) -> None:
        """Raises `UsageError`, which names the option."""
        _check_list("--adapters", self.adapters, least=0)
        if len(self.adapters) + self.base < 2:
            raise UsageError(
                "--adapters: a study compares at least two models. Name two adapters, or one adapter with --base."
            )
        _check_list("--raters", self.raters, least=1)
        if len(self.raters) > _MOST_RATERS:
            raise UsageError(f"--raters: {len(self.raters)} names; at most {_MOST_RATERS}.")
        if not 1 <= self.votes_per_item <= len(self.raters):
            raise UsageError(
                f"--votes-per-item = {self.votes_per_item}: a rater judges a comparison once, so it is from 1 to the "
                f"number of raters ({len(self.raters)})."
            )
        for option, share in (("--repeats", self.repeats), ("--controls", self.controls)):
            if not 0 <= share <= _MOST_SHARE:
                raise UsageError(f"{option} = {share:g}: is a share from 0 to {_MOST_SHARE}.")
        if self.axes:
            _check_list("--axes", self.axes, least=1)
        for axis in self.axes:
            if not re.fullmatch(AXIS_PATTERN, axis):
                raise UsageError(f"--axes = {axis!r}: use letters, digits, spaces and dashes, at most 40.")


@dataclass(frozen=True)
class Created:
    """A study that is open."""

    study: StudyFile
    num_cut: int
    """Answers that ended at the largest length."""
    num_identical: int
    """Comparisons of two models that gave the same answer."""


def create_study(
    engine: Engine,
    storage: Storage,
    endpoint: Endpoint,
    request: StudyRequest,
    progress: Progress = lambda done, total: None,
) -> Created:
    """Prepare the study and open it.

    Raises `UsageError` for options that do not fit and a name that is taken, `DataError` for questions that cannot be
    used, and `ServingError` if models do not answer: then nothing is open, and the same command asks the rest.
    """
    request.check()
    folder = StudyFolder(storage, request.name)
    if request.name in study_names_in(engine):
        raise UsageError(f"NAME = {request.name!r}: a study of this name exists. Choose another one.")
    if folder.exists():
        raise UsageError(
            f"NAME = {request.name!r}: is on storage, and not in this database. Open it with: ft study rebuild "
            f"{request.name}. Or choose another name."
        )
    server = Server(endpoint)
    models = _study_models(server.entries(), request)
    source = _questions(storage, server, request, models)
    attention, attention_digest = read_attention(request.attention) if request.attention else ([], None)
    questions = sample(source.questions, request.limit, request.seed)
    controls = _draw_controls(questions, models, request)
    answers = _ask(storage, folder, endpoint, request, models, questions, controls, progress)
    comparisons = _comparisons(request, models, questions, controls, attention, answers)
    raters = [RaterFile(id=secrets.token_hex(8), name=name) for name in request.raters]
    study = StudyFile(
        name=request.name,
        title=request.title,
        created=datetime.now(UTC),
        settings=Settings(
            votes_per_item=request.votes_per_item,
            repeats=request.repeats,
            controls=request.controls,
            axes=list(request.axes),
            reveal=request.reveal,
            seed=request.seed,
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            questions=request.questions,
            questions_digest=source.digest,
            attention_digest=attention_digest,
        ),
        models=models,
        questions=[*questions, *(item.question for item in attention)],
        comparisons=comparisons,
        raters=[rater.id for rater in raters],
        assignments=draw_assignments(
            comparisons,
            [rater.id for rater in raters],
            votes_per_item=request.votes_per_item,
            repeats=request.repeats,
            controls=request.controls,
            seed=request.seed,
        ),
    )
    folder.write(study, raters)
    open_study(engine, storage, request.name, action="create")
    with suppress(StorageError):  # the study is open; what is left there is only answers that it has, too
        storage.delete(folder.draft)
    real = [one for one in comparisons if one.kind == "real"]
    return Created(
        study=study,
        num_cut=sum(one.first.is_cut + one.second.is_cut for one in comparisons),
        num_identical=sum(one.first.text == one.second.text for one in real),
    )


def _study_models(entries: Mapping[str, dict[str, Any]], request: StudyRequest) -> list[StudyModel]:
    """The adapters in the order given, then their base. Raises `UsageError` for models that the server has not."""
    missing = [model for model in request.adapters if model not in entries]
    if missing:
        raise UsageError(f"--adapters: the server has no {', '.join(missing)}. It has {', '.join(entries)}.")
    wanted = list(dict.fromkeys(_behind_alias(entries, model) for model in request.adapters))
    if request.base:
        bases = {entries[model].get("parent") or model for model in wanted} or {
            entry["id"] for entry in entries.values() if not entry.get("parent")
        }
        if len(bases) != 1:
            raise UsageError(f"--base: the adapters have several bases: {', '.join(sorted(bases))}. Name it instead.")
        wanted += [base for base in bases if base not in wanted]
    if len(wanted) < 2:
        raise UsageError("--adapters: a study compares at least two models. Name another one.")
    return [_study_model(entries[model]) for model in wanted]


def _run_of(entry: dict[str, Any]) -> str:
    """The run that made an adapter. Raises `UsageError` for a base."""
    if not entry.get("record"):
        raise UsageError(f"--questions = {HELD_OUT!r}: {entry['id']} is a base, which has no run. Use {HELD_OUT}:RUN.")
    return str(entry["record"]["run_id"])


def _behind_alias(entries: Mapping[str, dict[str, Any]], model: str) -> str:
    """The adapter that an alias stands for, which is its root; else the model itself: an adapter's root is its base."""
    root = entries[model].get("root")
    return root if root and entries.get(root, {}).get("parent") else model


def _study_model(entry: dict[str, Any]) -> StudyModel:
    return StudyModel(
        id=entry["id"],
        adapter_digest=entry.get("digest"),
        base_fingerprint=entry.get("base_fingerprint"),
        base_precision=entry.get("base_precision"),
        template_digest=(entry.get("record") or {}).get("chat_template_digest"),
    )


def _questions(storage: Storage, server: Server, request: StudyRequest, models: Sequence[StudyModel]) -> QuestionSource:
    kind, _, run_id = request.questions.partition(":")
    if kind != HELD_OUT:
        return read_questions(Path(request.questions))
    first = models[0].id
    run_id = run_id or _run_of(server.entry(first))
    return held_out_questions(
        storage, run_id, lambda ids: server.texts(first, [ids])[0], limit=request.limit, seed=request.seed
    )


def _draw_controls(
    questions: Sequence[Question], models: Sequence[StudyModel], request: StudyRequest
) -> list[tuple[Question, StudyModel]]:
    """Questions whose answer by one model is compared with another answer by the same model, in turn for each model."""
    if not request.controls:
        return []
    pairs = math.comb(len(models), 2)
    of_one_rater = len(questions) * pairs * request.votes_per_item / len(request.raters)
    number = min(len(questions), max(1, math.ceil(request.controls * (of_one_rater + 1))))
    chosen = random.Random(f"controls {request.seed}").sample(list(questions), number)
    return list(zip(chosen, itertools.cycle(models), strict=False))


def _asked(request: StudyRequest, question: Question, model: StudyModel, is_second: bool = False) -> Asked:
    return Asked(
        model=model.id,
        messages=tuple((turn.role, turn.content) for turn in question.turns),
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        seed=request.seed + is_second,
    )


def _ask(
    storage: Storage,
    folder: StudyFolder,
    endpoint: Endpoint,
    request: StudyRequest,
    models: Sequence[StudyModel],
    questions: Sequence[Question],
    controls: Sequence[tuple[Question, StudyModel]],
    progress: Progress,
) -> Answers:
    """All answers, on storage. Raises `ServingError` if one is missing, or other weights answer than before."""
    asked = [_asked(request, question, model) for question in questions for model in models]
    asked += [_asked(request, question, model, is_second=True) for question, model in controls]
    answers = Answers(storage, folder.draft)
    identities = {model.id: Identity(model.adapter_digest, model.base_fingerprint) for model in models}
    result = ask_now(endpoint, asked, answers, identities, concurrency=request.concurrency, progress=progress)
    if result.failures:
        reason = result.stopped or next(iter(result.failures.values()))
        raise ServingError(
            f"{len(result.failures)} of {len({one.key for one in asked})} answers are missing ({reason}). The study is "
            "not open. The same command asks only these again."
        )
    return answers


def _comparisons(
    request: StudyRequest,
    models: Sequence[StudyModel],
    questions: Sequence[Question],
    controls: Sequence[tuple[Question, StudyModel]],
    attention: Sequence[AttentionItem],
    answers: Answers,
) -> list[Comparison]:
    def prepared(question: Question, model: StudyModel, is_second: bool = False) -> PreparedAnswer:
        answer = answers.get(_asked(request, question, model, is_second))
        assert isinstance(answer, Answer)
        return PreparedAnswer(model=model.id, text=answer.text.replace("\0", ""), is_cut=answer.is_cut)

    digests = {model.id: [model.adapter_digest, model.base_fingerprint] for model in models}
    comparisons = [
        _comparison(question, "real", prepared(question, first), prepared(question, second), digests)
        for question in questions
        for first, second in itertools.combinations(models, 2)
    ]
    comparisons += [
        _comparison(question, "control", prepared(question, model), prepared(question, model, True), digests)
        for question, model in controls
    ]
    comparisons += [
        _comparison(
            item.question,
            "attention",
            PreparedAnswer(model=None, text=item.good),
            PreparedAnswer(model=None, text=item.bad),
            digests,
        )
        for item in attention
    ]
    return comparisons


def _comparison(
    question: Question,
    kind: str,
    first: PreparedAnswer,
    second: PreparedAnswer,
    digests: dict[str, list[str | None]],
) -> Comparison:
    bound = [
        [turn.model_dump() for turn in question.turns],
        *([one.model, digests.get(one.model or ""), one.text] for one in (first, second)),
    ]
    digest = hashlib.sha256(json.dumps(bound, ensure_ascii=False).encode()).hexdigest()
    return Comparison.model_validate(
        {
            "id": secrets.token_hex(8),
            "question": question.id,
            "kind": kind,
            "first": first,
            "second": second,
            "digest": digest,
        }
    )


def _check_list(option: str, values: Sequence[str], least: int) -> None:
    if len(values) < least or not all(value.strip() for value in values):
        raise UsageError(f"{option}: is empty, or has an empty entry. Write names with commas between them.")
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise UsageError(f"{option}: {', '.join(twice)} is named twice. Name each once.")
