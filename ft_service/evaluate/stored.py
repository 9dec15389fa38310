"""Two adapters on the items that stored evaluations asked both: nothing is asked again."""

from collections.abc import Sequence
from dataclasses import dataclass

from ft_service.errors import UsageError
from ft_service.evaluate.comparison import Comparison, Comparisons, ItemResult, compare_items, sentence
from ft_service.evaluate.evaluation import RESULT_FILE, Evaluation, folder_of, read_results
from ft_service.evaluate.scorecard import read_scorecard
from ft_service.registry.registry import AdapterRecord
from ft_service.storage.storage import Storage


@dataclass(frozen=True)
class StoredComparison:
    """The second adapter against the first, by one suite: `comparison.difference` is second - first."""

    suite: str
    first: str
    second: str
    comparison: Comparisons
    results: tuple[ItemResult, ...]
    """Answers of the first adapter are `base`, those of the second one `adapter`."""
    remarks: tuple[str, ...]
    """What to know before the figures are trusted."""

    @property
    def rows(self) -> list[Comparison]:
        """Skills, and all items that count."""
        overall = self.comparison.overall
        return [*self.comparison.skills, *([overall] if overall else [])]

    @property
    def sentence(self) -> str:
        overall = self.comparison.overall
        return sentence(overall, self.second) if overall else "None of the items that count has both answers."


def current_evaluations(storage: Storage, record: AdapterRecord) -> dict[str, Evaluation]:
    """Suite -> the newest evaluation of exactly these weights."""
    card = read_scorecard(storage, record.id)
    evaluations = card.evaluations if card else {}
    return {name: one for name, one in evaluations.items() if one.adapter.digest == record.digest}


def stored_results(storage: Storage, evaluation: Evaluation) -> list[ItemResult]:
    """Items with both answers; empty if the folder of the evaluation was deleted."""
    folder = folder_of(evaluation.id)
    return read_results(storage, evaluation.id) if storage.exists(f"{folder}/{RESULT_FILE}") else []


def compare_stored(
    storage: Storage, first: AdapterRecord, second: AdapterRecord, suite: str | None = None
) -> list[StoredComparison]:
    """By every suite that judged both, or by the one named. Raises `UsageError` if there is none.

    Only items with the same id, prompt and metric are compared; a suite that changed in between is named.
    """
    evaluations = [current_evaluations(storage, record) for record in (first, second)]
    shared = [name for name in evaluations[0] if name in evaluations[1] and suite in (None, name)]
    if not shared:
        wanted = suite or next(iter({**evaluations[0], **evaluations[1]}), "general-en")
        missing = [record.id for record, found in zip((first, second), evaluations, strict=True) if wanted not in found]
        commands = "; ".join(f"ft evaluate {adapter} --suite {wanted}" for adapter in missing)
        raise UsageError(f"{first.id} and {second.id}: no suite has judged both. Run: {commands}")
    return [_compare(storage, evaluations[0][name], evaluations[1][name]) for name in shared]


def _compare(storage: Storage, first: Evaluation, second: Evaluation) -> StoredComparison:
    before = {_key(result): result for result in stored_results(storage, first)}
    after = {_key(result): result for result in stored_results(storage, second)}
    both = tuple(
        after[key].model_copy(update={"base": before[key].adapter, "adapter": after[key].adapter})
        for key in after
        if key in before
    )
    return StoredComparison(
        suite=first.suite.name,
        first=first.adapter.id,
        second=second.adapter.id,
        comparison=compare_items(both, second.suite.seed),
        results=both,
        remarks=tuple(_remarks(first, second, len(before) + len(after) - 2 * len(both))),
    )


def _key(result: ItemResult) -> tuple[str, str, str]:
    return result.id, result.prompt, result.metric


def _remarks(first: Evaluation, second: Evaluation, unmatched: int) -> Sequence[str]:
    found = []
    if first.suite.digest != second.suite.digest:
        found.append("The suite has changed between the two evaluations; only items that are the same count.")
    if unmatched:
        found.append(f"{unmatched:,} answers are left out, because only one of the two answered the item.")
    if first.base.base_precision != second.base.base_precision or first.engine.digest != second.engine.digest:
        found.append("The two were served differently (precision, version or replicas).")
    if first.base.base_fingerprint != second.base.base_fingerprint:
        found.append("The two adapters have different bases.")
    return found
