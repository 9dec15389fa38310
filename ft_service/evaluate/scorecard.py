"""The score card of an adapter: the newest evaluation of each suite, in one file.

<storage>/scorecards/<adapter id>.json
"""

from pydantic import Field

from ft_service.evaluate.evaluation import Evaluation
from ft_service.storage.formats import StoredFile
from ft_service.storage.storage import Storage

SCORECARDS = "scorecards"


class ScoreCard(StoredFile):
    """What is known of an adapter."""

    format: int = Field(default=1, description="Version of this file's layout.")
    adapter: str
    evaluations: dict[str, Evaluation] = Field(description="Name of a suite -> its newest evaluation.")


def read_scorecard(storage: Storage, adapter: str) -> ScoreCard | None:
    """The card; None if the adapter was not evaluated."""
    path = _path(adapter)
    return ScoreCard.parse(storage.read_json(path), storage.uri(path)) if storage.exists(path) else None


def update_scorecard(storage: Storage, evaluation: Evaluation) -> ScoreCard:
    """Put an evaluation in the place of the earlier one of its suite."""
    adapter = evaluation.adapter.id
    earlier = read_scorecard(storage, adapter)
    evaluations = {**(earlier.evaluations if earlier else {}), evaluation.suite.name: evaluation}
    card = ScoreCard(adapter=adapter, evaluations=evaluations)
    storage.write_json(_path(adapter), card.model_dump(mode="json"))
    return card


def _path(adapter: str) -> str:
    return f"{SCORECARDS}/{adapter.replace('/', '_')}.json"
