"""Scores of other harnesses, lm-eval and Inspect AI: kept for each model, and compared item by item like all others.

A harness asks the server by itself, so that weights are checked after each model instead of with every reply. A task is
not resumed in its middle; what is complete is kept.

<storage>/evaluations/<id>/<harness>/<model>.json
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import Field

from ft_service.errors import ServingError
from ft_service.evaluate.ask import Endpoint
from ft_service.evaluate.comparison import Comparison, Result, adjusted, compare_values
from ft_service.evaluate.server import ServedModelFacts, Server
from ft_service.storage.formats import StoredFile
from ft_service.storage.storage import Storage


class TaskScores(Result):
    """One metric of one task: a value for each item."""

    task: str
    metric: str = Field(description="With its filter, where the task has several: exact_match,strict.")
    higher_is_better: bool
    values: list[tuple[str, float]] = Field(description="(name or digest of the item, value)")


class ModelScores(StoredFile):
    """All tasks of one model."""

    format: int = Field(default=1, description="Version of this file's layout.")
    model: ServedModelFacts
    settings: dict[str, Any]
    versions: dict[str, str] = Field(description="Task -> its version; name of a package -> that of the package.")
    scores: list[TaskScores]


def measure_models(
    harness: str,
    models: Sequence[ServedModelFacts],
    endpoint: Endpoint,
    storage: Storage,
    folder: str,
    seed: int,
    ask: Callable[[ServedModelFacts], ModelScores],
) -> list[Comparison]:
    """Base and adapter, in this order, on every task and metric. `ask` runs the harness. Raises `ServingError`."""
    server = Server(endpoint)
    scores = []
    for model in models:
        path = f"{folder}/{harness}/{model.id.replace('/', '_')}.json"
        if storage.exists(path):
            known = ModelScores.parse(storage.read_json(path), storage.uri(path))
        else:
            known = ask(model)
            if server.model(model.id).identity != model.identity:
                raise ServingError(
                    f"{model.id}: other weights answer than before. Start a new evaluation with --id NAME."
                )
            storage.write_json(path, known.model_dump(mode="json"))
        scores.append(known.scores)
    return adjusted(list(_compared(scores[0], scores[1], seed)))


def _compared(base: Sequence[TaskScores], adapter: Sequence[TaskScores], seed: int) -> Iterator[Comparison]:
    others = {(one.task, one.metric): one for one in adapter}
    for one in base:
        other = others.get((one.task, one.metric))
        values = dict(other.values) if other else {}
        names = [name for name, _ in one.values if name in values]
        if names:
            before = dict(one.values)
            yield compare_values(
                f"{one.task} ({one.metric})",
                [before[name] for name in names],
                [values[name] for name in names],
                names,
                seed,
                is_loss=not one.higher_is_better,
            )
