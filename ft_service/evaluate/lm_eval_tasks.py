"""Tasks of lm-eval, asked over the same server. See `ft_service.evaluate.task_scores`.

The package is an extra, and imported here alone.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from ft_service.errors import ServingError, UsageError
from ft_service.evaluate.ask import Endpoint, address
from ft_service.evaluate.comparison import Comparison
from ft_service.evaluate.server import ServedModelFacts
from ft_service.evaluate.suite import LmEval
from ft_service.evaluate.task_scores import ModelScores, TaskScores, measure_models
from ft_service.storage.storage import Storage
from ft_service.text import error_line


def check_tasks(settings: LmEval) -> None:
    """Raises `UsageError` without the extra, or for an unknown task."""
    if find_spec("lm_eval") is None:
        raise UsageError("lm_eval: the suite has tasks of lm-eval. Install it: pip install 'ft-service[lm-eval]'")
    known = _task_manager(settings)
    if unknown := [task for task in settings.tasks if not known.match_tasks([task])]:
        raise UsageError(
            f"lm_eval.tasks = {unknown[0]!r}: lm-eval has no such task. `lm_eval ls tasks` lists them; for tasks of "
            "your own set lm_eval.folder."
        )


def measure_tasks(
    settings: LmEval,
    models: Sequence[ServedModelFacts],
    endpoint: Endpoint,
    storage: Storage,
    folder: str,
    concurrency: int,
    seed: int,
) -> list[Comparison]:
    """Base and adapter, in this order, on every task and metric. Raises `ServingError` if lm-eval fails."""
    return measure_models(
        "lm_eval",
        models,
        endpoint,
        storage,
        folder,
        seed,
        lambda model: _ask(settings, model, endpoint, concurrency, seed),
    )


def _ask(settings: LmEval, model: ServedModelFacts, endpoint: Endpoint, concurrency: int, seed: int) -> ModelScores:
    import lm_eval

    arguments = {
        "model": model.id,
        "base_url": f"{address(endpoint.url)}/completions",
        "num_concurrent": concurrency,
        "max_retries": 6,
        **({"header": {"Authorization": f"Bearer {endpoint.key}"}, "auth_token": endpoint.key} if endpoint.key else {}),
    }
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = lm_eval.simple_evaluate(
                model="local-completions",
                model_args=arguments,
                tasks=list(settings.tasks),
                task_manager=_task_manager(settings),
                limit=settings.limit,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except Exception as error:  # those of its tasks, its data and its HTTP client; the evaluation records it
        raise ServingError(f"lm_eval.tasks = {', '.join(settings.tasks)}: {error_line(error)}") from error
    assert found is not None  # only ranks other than 0 get None
    content: dict[str, Any] = json.loads(json.dumps(found, default=str))
    versions = {task: str(number) for task, number in content["versions"].items()}
    return ModelScores(
        model=model,
        settings=settings.model_dump(mode="json"),
        versions={"lm_eval": version("lm_eval"), **versions},
        scores=list(_scores(content)),
    )


def _task_manager(settings: LmEval) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=settings.folder)


def _scores(found: dict[str, Any]) -> Iterator[TaskScores]:
    """Every metric of every task that has a number for each item."""
    for task, samples in found["samples"].items():
        directions = found.get("higher_is_better", {}).get(task, {})
        groups: dict[str, list[tuple[str, float]]] = {}
        for sample in samples:
            for metric in sample["metrics"]:
                value = sample.get(metric)
                name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                if isinstance(value, int | float):
                    groups.setdefault(name, []).append((f"{sample['doc_id']}-{sample['doc_hash'][:16]}", float(value)))
        for name, values in groups.items():
            better = directions.get(name.partition(",")[0])
            yield TaskScores(task=task, metric=name, higher_is_better=better is not False, values=values)
