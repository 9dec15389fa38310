"""The result of an evaluation, as it is stored, and how it is found again.

<storage>/evaluations/<id>/   settings.json    what is asked, and of which weights; written first
                              answers/         every answer, see `ft_service.evaluate.ask`
                              results.jsonl    each item with both answers and their scores
                              evaluation.json  the result; written last
"""

import hashlib
import json
import re
from datetime import datetime
from typing import Any

from pydantic import Field

from ft_service.data.read import scan
from ft_service.errors import UsageError
from ft_service.evaluate.comparison import Comparison, Comparisons, ItemResult, Result
from ft_service.evaluate.forgetting import Forgetting
from ft_service.evaluate.judge import Judgement
from ft_service.evaluate.losses import LossComparison
from ft_service.evaluate.one_sidedness import OneSidedness
from ft_service.evaluate.server import EngineFacts, ServedModelFacts
from ft_service.evaluate.stability import StabilityReport
from ft_service.evaluate.suite import LoadedSuite, Thresholds
from ft_service.storage.formats import StoredFile
from ft_service.storage.storage import Storage

EVALUATIONS = "evaluations"
RESULT_FILE = "evaluation.json"
_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,199}")


class Failure(Result):
    """A question without an answer."""

    item: str
    model: str
    reason: str


class SuiteRef(Result):
    """A suite, and a digest of its settings and items."""

    name: str
    digest: str
    data: list[str] = Field(description="SHA-256 of the held-out files, in the order of the suite.")
    seed: int
    limit: int | None = Field(description="Items of each skill, where only some were asked.")
    thresholds: Thresholds


class Asked(StoredFile):
    """What is asked, and of which weights (settings.json)."""

    format: int = Field(default=1, description="Version of this file's layout.")
    adapter: ServedModelFacts
    base: ServedModelFacts = Field(description="What the adapter is compared with.")
    suite: SuiteRef
    settings: dict[str, Any] = Field(description="The whole suite without its items.")

    @property
    def default_id(self) -> str:
        """The same for the same suite and weights."""
        content = json.dumps([_weights(self.adapter), _weights(self.base), self.suite.model_dump(mode="json")])
        name = re.sub(r"[^a-z0-9._-]", "-", self.adapter.id.lower())[:120].lstrip(".-_") or "model"
        return f"{name}-{self.suite.name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def differences(self, other: "Asked") -> list[str]:
        """Names of what is not the same."""
        pairs = {
            "the adapter": (_weights(self.adapter), _weights(other.adapter)),
            "what it is compared with": (_weights(self.base), _weights(other.base)),
            "the suite": (self.suite, other.suite),
        }
        return [name for name, (mine, theirs) in pairs.items() if mine != theirs]


def _weights(model: ServedModelFacts) -> list[str | None]:
    return [model.id, model.digest, model.base_fingerprint, model.base_precision]


class Evaluation(StoredFile):
    """The result (evaluation.json)."""

    format: int = Field(default=1, description="Version of this file's layout.")
    id: str
    time: datetime = Field(description="When it was finished.")
    suite: SuiteRef
    adapter: ServedModelFacts
    base: ServedModelFacts = Field(description="What the adapter is compared with.")
    engine: EngineFacts
    questions_digest: str = Field(description="SHA-256 over the keys of all questions.")
    packages: dict[str, str] = Field(description="Package name -> version, of what scores and compares.")
    items: int = Field(description="Questions that both models answered.")
    cut_base: int = Field(description="Answers that ended at max_tokens; they are scored as they are.")
    cut_adapter: int
    cut_items: list[str] = Field(description="Ids of the first fifty items with a cut answer.")
    is_complete: bool = Field(description="Whether every question has an answer.")
    stopped: str | None = Field(description="Why asking ended early.")
    failures: list[Failure] = Field(description="The first fifty.")
    num_failures: int
    left_out: list[str] = Field(description="What could not be used or measured, and why.")
    comparison: Comparisons
    validation_loss: LossComparison | None
    forgetting: Forgetting
    one_sidedness: OneSidedness
    stability: StabilityReport | None
    judge: Judgement | None
    lm_eval: list[Comparison] = Field(description="Tasks of lm-eval, one entry a metric.")
    inspect_ai: list[Comparison] = Field(default=[], description="Tasks of Inspect AI, one entry a scorer.")

    @property
    def other_tasks(self) -> list[Comparison]:
        """Of lm-eval and Inspect AI."""
        return [*self.lm_eval, *self.inspect_ai]


def asked_of(loaded: LoadedSuite, adapter: ServedModelFacts, base: ServedModelFacts, limit: int | None) -> Asked:
    """What an evaluation of these models by this suite asks. Raises `DataError` for held-out data that is missing."""
    suite = loaded.suite
    reference = SuiteRef(
        name=suite.name,
        digest=loaded.digest,
        data=[scan(0, held_out.source).digest for held_out in suite.held_out if held_out.path is not None],
        seed=suite.seed,
        limit=limit,
        thresholds=suite.thresholds,
    )
    return Asked(adapter=adapter, base=base, suite=reference, settings=suite.model_dump(mode="json"))


def folder_of(evaluation_id: str) -> str:
    """Its folder on storage. Raises `UsageError` for an id that cannot be one."""
    if not _ID.fullmatch(evaluation_id):
        raise UsageError(f"--id = {evaluation_id!r}: use lower-case letters, digits, dots and dashes.")
    return f"{EVALUATIONS}/{evaluation_id}"


def start(storage: Storage, evaluation_id: str, asked: Asked) -> None:
    """Write what is asked, or check that an evaluation which continues asks the same. Raises `UsageError`."""
    path = f"{folder_of(evaluation_id)}/settings.json"
    if not storage.exists(path):
        storage.write_json(path, asked.model_dump(mode="json"))
        return
    earlier = Asked.parse(storage.read_json(path), storage.uri(path))
    if differences := earlier.differences(asked):
        raise UsageError(
            f"--id = {evaluation_id!r}: was started with another state of {' and '.join(differences)}. Choose another "
            "--id, or leave it out."
        )


def find_evaluation(storage: Storage, evaluation_id: str) -> Evaluation | None:
    """The result of that id; None if there is none yet."""
    path = f"{folder_of(evaluation_id)}/{RESULT_FILE}"
    return Evaluation.parse(storage.read_json(path), storage.uri(path)) if storage.exists(path) else None


def read_results(storage: Storage, evaluation_id: str) -> list[ItemResult]:
    """Each item with both answers and their scores."""
    content = storage.read_bytes(f"{folder_of(evaluation_id)}/results.jsonl")
    return [ItemResult.model_validate_json(line) for line in content.decode().split("\n") if line]


def write_results(storage: Storage, evaluation: Evaluation, results: list[ItemResult]) -> None:
    """The items first: an evaluation with evaluation.json is complete."""
    folder = folder_of(evaluation.id)
    lines = "".join(result.model_dump_json() + "\n" for result in results)
    storage.write_bytes(f"{folder}/results.jsonl", lines.encode())
    storage.write_json(f"{folder}/{RESULT_FILE}", evaluation.model_dump(mode="json"))
