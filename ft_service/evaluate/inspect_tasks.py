"""Tasks of Inspect AI, asked over the same server. See `ft_service.evaluate.task_scores`.

Inspect AI does not resolve with this project's pinned packages, so it has an environment of its own: its command runs
as a process, and its log (JSON) is read. In a log, a score is a letter (C, P, I, N: correct, partly, incorrect, no
answer), a number, a truth value, or several of these by name.
"""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ft_service.errors import ServingError, UsageError
from ft_service.evaluate.ask import Endpoint, address
from ft_service.evaluate.comparison import Comparison
from ft_service.evaluate.server import ServedModelFacts
from ft_service.evaluate.suite import InspectAi
from ft_service.evaluate.task_scores import ModelScores, TaskScores, measure_models
from ft_service.storage.storage import Storage
from ft_service.text import first_line, last_line

_PROVIDER = "ft"
_LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
_RETRIES = 6
_TIMEOUT_SECONDS = 600
"""Of one request. Without both, Inspect AI asks a server that is gone for ever."""


def check_inspect(settings: InspectAi) -> None:
    """Raises `UsageError` if its command cannot be run, or the folder of its tasks is missing."""
    if not Path(settings.folder).is_dir():
        raise UsageError(f"inspect_ai.folder = {settings.folder!r}: is no folder. Fix the path.")
    if shutil.which(settings.command) is None:
        raise UsageError(
            f"inspect_ai.command = {settings.command!r}: is no program. Inspect AI needs an environment of its own: "
            "python -m venv inspect-env && inspect-env/bin/pip install -c constraints-inspect.txt inspect-ai openai; "
            "then set command: inspect-env/bin/inspect"
        )


def measure_inspect(
    settings: InspectAi,
    models: Sequence[ServedModelFacts],
    endpoint: Endpoint,
    storage: Storage,
    folder: str,
    concurrency: int,
    seed: int,
) -> list[Comparison]:
    """Base and adapter, in this order, on every task and scorer. Raises `ServingError` if Inspect AI fails."""
    return measure_models(
        "inspect_ai",
        models,
        endpoint,
        storage,
        folder,
        seed,
        lambda model: _ask(settings, model, endpoint, concurrency, seed),
    )


def _ask(settings: InspectAi, model: ServedModelFacts, endpoint: Endpoint, concurrency: int, seed: int) -> ModelScores:
    with tempfile.TemporaryDirectory() as logs:
        options = {
            "--model": f"openai-api/{_PROVIDER}/{model.id}",
            "--log-dir": logs,
            "--log-format": "json",
            "--display": "none",
            "--seed": str(seed),
            "--temperature": "0",
            "--max-connections": str(concurrency),
            "--max-retries": str(_RETRIES),
            "--timeout": str(_TIMEOUT_SECONDS),
            **({"--limit": str(settings.limit)} if settings.limit else {}),
        }
        command = [settings.command, "eval", *settings.tasks, *(part for option in options.items() for part in option)]
        environment = {
            **os.environ,
            "FT_BASE_URL": address(endpoint.url),
            "FT_API_KEY": endpoint.key or "none",
        }
        # A process of another environment: variables of this one would bring this one's packages.
        environment = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(
            command,
            env=environment,
            cwd=settings.folder,  # it takes no absolute paths of tasks
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        found = [_read_log(path) for path in sorted(Path(logs).glob("*.json"))]
    failed = next((log for log in found if log.get("status") != "success"), None)
    if failed is not None:
        raise ServingError(f"{_named(settings)}: {failed['eval']['task']} failed ({_error_of(failed)})")
    if done.returncode or not found:
        reason = last_line(done.stderr.strip() or done.stdout)
        raise ServingError(f"{_named(settings)}: {settings.command} failed ({reason})")
    packages = {name: number for log in found for name, number in (log["eval"].get("packages") or {}).items()}
    return ModelScores(
        model=model,
        settings=settings.model_dump(mode="json"),
        versions={**packages, **{log["eval"]["task"]: str(log["eval"].get("task_version", 0)) for log in found}},
        scores=[scores for log in found for scores in scores_of(log)],
    )


def scores_of(log: dict[str, Any]) -> Iterator[TaskScores]:
    """Every score of a log that is a number for its samples; of several epochs, the mean."""
    values: dict[str, dict[str, list[float]]] = {}
    for sample in log.get("samples") or []:
        for scorer, score in (sample.get("scores") or {}).items():
            for name, value in _values_of(scorer, score["value"]):
                values.setdefault(name, {}).setdefault(str(sample["id"]), []).append(value)
    for name, by_sample in values.items():
        means = [(sample, statistics.fmean(found)) for sample, found in by_sample.items()]
        yield TaskScores(task=log["eval"]["task"], metric=name, higher_is_better=True, values=means)


def _values_of(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _values_of(f"{name}/{key}", part)
    elif isinstance(value, str) and value in _LETTERS:
        yield name, _LETTERS[value]
    elif isinstance(value, bool | int | float):
        yield name, float(value)


def _read_log(path: Path) -> dict[str, Any]:
    """Raises `ServingError` for a file that is no log."""
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(log["eval"]["task"], str)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ServingError(f"inspect_ai: {path.name} is no log of Inspect AI ({first_line(error)})") from None
    return dict(log)


def _error_of(log: dict[str, Any]) -> str:
    error = log.get("error") or {}
    return first_line(str(error.get("message") or log.get("status") or "no reason given"))


def _named(settings: InspectAi) -> str:
    return f"inspect_ai.tasks = {', '.join(settings.tasks)}"
