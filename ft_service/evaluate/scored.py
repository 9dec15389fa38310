"""An item with the answers of two models, scored."""

from ft_service.evaluate.ask import Answer
from ft_service.evaluate.comparison import ItemResult, ScoredAnswer
from ft_service.evaluate.items import Item
from ft_service.evaluate.metrics import score
from ft_service.evaluate.questions import context_of


def item_result(item: Item, base: Answer, adapter: Answer) -> ItemResult:
    """Both answers to an item, scored by its metric."""
    return ItemResult(
        id=item.id,
        skill=item.skill,
        cluster=item.cluster,
        language=item.language,
        metric=item.metric,
        counts=item.counts,
        context=context_of(item),
        prompt=item.prompt,
        reference=item.reference,
        base=_scored(item, base),
        adapter=_scored(item, adapter),
    )


def _scored(item: Item, answer: Answer) -> ScoredAnswer:
    found = score(answer.text, item)
    return ScoredAnswer(text=answer.text, value=found.value, reason=found.reason, is_cut=answer.is_cut)
