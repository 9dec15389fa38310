"""One evaluation: ask base and adapter, score the answers, compare, and write the result.

The id follows from the suite and the weights. So the same call continues an evaluation that was killed, asks what a
server failed to answer, and returns at once what is complete.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Literal

from ft_service.errors import ServingError, UsageError
from ft_service.evaluate.ask import DEFAULT_CONCURRENCY, Answers, Endpoint, Identity, Question, ask_now
from ft_service.evaluate.comparison import Comparison, ItemResult, compare_items
from ft_service.evaluate.evaluation import (
    Asked,
    Evaluation,
    Failure,
    asked_of,
    find_evaluation,
    folder_of,
    start,
    write_results,
)
from ft_service.evaluate.forgetting import measure_forgetting
from ft_service.evaluate.inspect_tasks import check_inspect, measure_inspect
from ft_service.evaluate.items import Item
from ft_service.evaluate.judge import Judgement, measure_judgement, questions_to
from ft_service.evaluate.lm_eval_tasks import check_tasks, measure_tasks
from ft_service.evaluate.losses import LossComparison, compare_losses, loss_of
from ft_service.evaluate.one_sidedness import measure_one_sidedness
from ft_service.evaluate.questions import QuestionPlan, make_plan, measurement_of, question_of
from ft_service.evaluate.scorecard import update_scorecard
from ft_service.evaluate.scored import item_result
from ft_service.evaluate.server import ServedModelFacts, Server, key_from_environment
from ft_service.evaluate.stability import (
    StabilityFigures,
    StabilityReport,
    Variations,
    measure_stability,
    report,
    variations_of,
)
from ft_service.evaluate.suite import LoadedSuite, Suite, draw, load_suite
from ft_service.registry.registry import Registry
from ft_service.storage.retry import RUN_RETRY_SECONDS
from ft_service.storage.storage import Storage

Show = Callable[[str, int, int], None]
"""Shows progress: the stage, its answers on storage, all its questions."""
Side = Literal["base", "adapter"]
_SHOWN_NAMES = 50
_PACKAGES = ("ft-service", "sacrebleu", "rouge-score", "jsonschema", "numpy", "scipy")


@dataclass(frozen=True)
class Request:
    """What `ft evaluate` was asked."""

    adapter: str
    suite: str
    storage: str
    against: str | None = None
    """Another adapter or model; None is the adapter's base."""
    evaluation_id: str | None = None
    concurrency: int = DEFAULT_CONCURRENCY
    limit: int | None = None
    """Items of each skill, drawn with the suite's seed: a quick look."""


def evaluate(request: Request, endpoint: Endpoint, show: Show = lambda stage, done, total: None) -> Evaluation:
    """Run an evaluation to its end, or as far as the server answers, and write the result.

    Raises `SpecError` for the suite, `UsageError`, `ServingError` for a server that does not answer, does not know a
    model, or changes its weights meanwhile, `DataError` for held-out data, and `StorageError`.
    """
    loaded = load_suite(request.suite)
    if loaded.suite.lm_eval is not None:
        check_tasks(loaded.suite.lm_eval)
    if loaded.suite.inspect_ai is not None:
        check_inspect(loaded.suite.inspect_ai)
    storage = Storage(request.storage, retry_seconds=RUN_RETRY_SECONDS)
    server = Server(endpoint)
    adapter = server.model(request.adapter)
    base = server.model(_against(request, adapter))
    asked = asked_of(loaded, adapter, base, request.limit)
    evaluation_id = request.evaluation_id or asked.default_id
    start(storage, evaluation_id, asked)
    finished = find_evaluation(storage, evaluation_id)
    if finished is not None and finished.is_complete:
        return finished
    record = Registry(storage).find(adapter.id)
    plan = make_plan(loaded, storage, server, adapter.id, record, request.limit)
    asking = _Asking(
        endpoint, request.concurrency, Answers(storage, folder_of(evaluation_id)), show, _identities(adapter, base)
    )
    evaluation, results = _measure(evaluation_id, asked, loaded, plan, asking, server)
    if evaluation.stopped is None:
        evaluation = _with_tasks(evaluation, loaded.suite, asking, storage)
    write_results(storage, evaluation, results)
    update_scorecard(storage, evaluation)
    return evaluation


def _against(request: Request, adapter: ServedModelFacts) -> str:
    against = request.against or adapter.parent
    if against is None:
        raise UsageError(
            f"--against: {request.adapter} is no adapter of this server, so it has no base to compare with. Name one."
        )
    if against == request.adapter:
        raise UsageError(f"--against = {against!r}: is the evaluated model itself. Name another one.")
    return against


def _identities(*models: ServedModelFacts) -> dict[str, Identity]:
    return {model.id: model.identity for model in models if model.names_its_weights}


@dataclass
class _Asking:
    """Asks the stages of one evaluation, and remembers what has no answer."""

    endpoint: Endpoint
    concurrency: int
    answers: Answers
    show: Show
    identities: dict[str, Identity]
    names: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Key of a question -> (what it asks, model)."""
    failures: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None
    """Why the server is given up."""

    def ask(
        self,
        stage: str,
        questions: Iterable[tuple[Question, str]],
        concurrency: int | None = None,
        judge: Endpoint | None = None,
    ) -> None:
        """Ask what has no answer yet: the server, or a judge. Does nothing once the server is given up."""
        named = list(questions)
        for question, name in named:
            self.names.setdefault(question.key, (name, question.model))
        if self.stopped is not None:
            return
        asked = ask_now(
            judge or self.endpoint,
            [question for question, _ in named],
            self.answers,
            self.identities,
            concurrency=concurrency or self.concurrency,
            progress=lambda done, total: self.show(stage, done, total),
        )
        self.failures.update(asked.failures)
        if judge is None:
            self.stopped = asked.stopped

    def first_failures(self) -> list[Failure]:
        shown = list(self.failures.items())[:_SHOWN_NAMES]
        return [Failure(item=self.names[key][0], model=self.names[key][1], reason=reason) for key, reason in shown]


def _with_tasks(evaluation: Evaluation, suite: Suite, asking: _Asking, storage: Storage) -> Evaluation:
    """The evaluation with the tasks of other harnesses. A failure there is recorded, and takes nothing else down."""
    models = (evaluation.base, evaluation.adapter)
    shared = (models, asking.endpoint, storage, folder_of(evaluation.id), asking.concurrency, suite.seed)
    harnesses: dict[str, Callable[[], list[Comparison]]] = {}
    if suite.lm_eval is not None:
        harnesses["lm_eval"] = partial(measure_tasks, suite.lm_eval, *shared)
    if suite.inspect_ai is not None:
        harnesses["inspect_ai"] = partial(measure_inspect, suite.inspect_ai, *shared)
    for name, measure in harnesses.items():
        try:
            evaluation = evaluation.model_copy(update={name: measure()})
        except ServingError as error:
            left_out = [*evaluation.left_out, str(error)]
            evaluation = evaluation.model_copy(update={"is_complete": False, "left_out": left_out})
    return evaluation


def _measure(
    evaluation_id: str, asked: Asked, loaded: LoadedSuite, plan: QuestionPlan, asking: _Asking, server: Server
) -> tuple[Evaluation, list[ItemResult]]:
    suite = loaded.suite
    base = asked.base.id
    adapter = asked.adapter.id
    pairs = zip(plan.questions(base, suite.seed), plan.questions(adapter, suite.seed), strict=True)
    asking.ask("questions", [question for pair in pairs for question in pair])  # so that a half is a half of both
    results = _results(plan.items, base, adapter, asking.answers, suite.seed)
    if not results and asking.failures:
        raise ServingError(
            f"{evaluation_id}: no item was answered by both models ({next(iter(asking.failures.values()))}). The same "
            "command continues once the server answers."
        )
    stability = _stability(plan.items, base, adapter, loaded, asking)
    judgement = _judgement(results, loaded, asking)
    general = [result for result in results if result.id in loaded.general_ids]
    texts = _losses("general text", [(text, text, None) for text in plan.texts], base, adapter, asking, suite.seed)
    answers = [(answer.name, answer.ids, answer.num_answer_tokens) for answer in plan.answers]
    evaluation = Evaluation(
        id=evaluation_id,
        time=datetime.now(UTC),
        suite=asked.suite,
        adapter=asked.adapter,
        base=asked.base,
        engine=server.engine(asked.base),
        questions_digest=hashlib.sha256("".join(sorted(asking.names)).encode()).hexdigest(),
        packages={name: version(name) for name in _PACKAGES},
        items=len(_questions(results)),
        cut_base=sum(result.base.is_cut for result in _questions(results)),
        cut_adapter=sum(result.adapter.is_cut for result in _questions(results)),
        cut_items=[one.id for one in _questions(results) if one.base.is_cut or one.adapter.is_cut][:_SHOWN_NAMES],
        is_complete=not asking.failures and asking.stopped is None,
        stopped=asking.stopped,
        failures=asking.first_failures(),
        num_failures=len(asking.failures),
        left_out=plan.left_out,
        comparison=compare_items(results, suite.seed),
        validation_loss=_losses("validation loss", answers, base, adapter, asking, suite.seed),
        forgetting=measure_forgetting(general, texts, suite.thresholds.max_forgetting, suite.seed),
        one_sidedness=measure_one_sidedness(results, plan.references),
        stability=stability,
        judge=judgement,
        lm_eval=[],
    )
    return evaluation, results


def _results(items: Sequence[Item], base: str, adapter: str, answers: Answers, seed: int) -> list[ItemResult]:
    """The items that both models answered."""
    results = []
    for item in items:
        before = answers.get(question_of(item, base, seed))
        after = answers.get(question_of(item, adapter, seed))
        if before is None or after is None:
            continue
        results.append(item_result(item, before, after))
    return results


def _questions(results: Sequence[ItemResult]) -> list[ItemResult]:
    """One result of each question, however many metrics score its answer."""
    return list({(result.cluster, result.prompt): result for result in results}.values())


def _stability(
    items: Sequence[Item], base: str, adapter: str, loaded: LoadedSuite, asking: _Asking
) -> StabilityReport | None:
    settings = loaded.suite.stability
    if settings is None or asking.stopped is not None:
        return None
    seed = loaded.suite.seed
    drawn = draw([item for item in items if item.counts], settings.limit, seed)

    def variations(model: str) -> list[Variations]:
        return [variations_of(item, lambda one: question_of(one, model, seed), settings) for item in drawn]

    both = {model: variations(model) for model in (base, adapter)}
    everything = [one for model in both for one in both[model]]
    crowded = [(question, f"{one.item.id} (stability)") for one in everything for question in one.crowded]
    alone = [(question, f"{one.item.id} (stability)") for one in everything for question in one.alone]
    asking.ask("stability", crowded, concurrency=2 * asking.concurrency)
    asking.ask("stability, one at a time", alone, concurrency=1)
    figures: dict[str, StabilityFigures | None] = {
        model: measure_stability(both[model], asking.answers) for model in both
    }
    before = figures[base]
    after = figures[adapter]
    return None if before is None or after is None else report(before, after)


def _judgement(results: Sequence[ItemResult], loaded: LoadedSuite, asking: _Asking) -> Judgement | None:
    judge = loaded.suite.judge
    if judge is None:
        return None
    drawn = draw([result for result in results if result.counts], judge.limit, loaded.suite.seed)
    both = [questions_to(judge, result) for result in drawn]
    questions = [(question, f"{one.result.id} (judge)") for one in both for question in one.questions]
    key = key_from_environment(judge.key_env) if judge.key_env else None
    asking.ask("judge", questions, judge=Endpoint(judge.url, key, asking.endpoint.transport))
    return measure_judgement(both, asking.answers, judge, loaded.suite.seed)


def _losses(
    name: str,
    measured: Sequence[tuple[str, str | tuple[int, ...], int | None]],
    base: str,
    adapter: str,
    asking: _Asking,
    seed: int,
) -> LossComparison | None:
    """Of (cluster, prompt, how many of its last tokens count), those that were measured with both models."""
    clusters = []
    before = []
    after = []
    for cluster, prompt, last in measured:
        answers = [asking.answers.get(measurement_of(prompt, model, seed)) for model in (base, adapter)]
        losses = [loss_of(answer, last) for answer in answers if answer is not None]
        if len(losses) == 2 and losses[0] is not None and losses[1] is not None:
            clusters.append(cluster)
            before.append(losses[0])
            after.append(losses[1])
    return compare_losses(name, before, after, clusters, seed)
