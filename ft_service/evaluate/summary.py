"""What an evaluation found, in plain words."""

from ft_service.evaluate.comparison import sentence
from ft_service.evaluate.evaluation import Evaluation
from ft_service.evaluate.losses import LossComparison
from ft_service.evaluate.one_sidedness import FEWEST_ANSWERS
from ft_service.text import counted

_SHOWN_CUT = 5


def sentences(evaluation: Evaluation) -> list[str]:
    """The findings of all parts that were measured, and what could not be measured."""
    overall = evaluation.comparison.overall
    found = [sentence(overall)] if overall else []
    found += loss_sentences(evaluation)
    found.append(evaluation.forgetting.sentence)
    if texts := evaluation.forgetting.texts:
        found.append(perplexity_sentence(texts))
    found += one_sidedness_sentences(evaluation)
    if evaluation.stability:
        found.append(evaluation.stability.sentence)
    if evaluation.judge:
        found.append(evaluation.judge.sentence)
    return [*found, *remarks(evaluation)]


def loss_sentences(evaluation: Evaluation) -> list[str]:
    """The validation loss, if it was measured."""
    loss = evaluation.validation_loss
    if loss is None:
        return []
    return [
        f"Validation loss: {loss.base:.4f} -> {loss.adapter:.4f} over {loss.tokens:,} tokens ({loss.per_text.verdict})."
    ]


def perplexity_sentence(texts: LossComparison) -> str:
    """The perplexity of general texts, before and after."""
    return (
        f"Perplexity of {counted(texts.texts, 'general text')}: {texts.base_perplexity:.2f} -> "
        f"{texts.adapter_perplexity:.2f} ({texts.per_text.verdict})."
    )


def one_sidedness_sentences(evaluation: Evaluation) -> list[str]:
    """The findings; one sentence if nothing stands out; empty if there are too few answers to say so."""
    findings = list(evaluation.one_sidedness.findings)
    if evaluation.items >= FEWEST_ANSWERS and not findings:
        return ["Nothing one-sided stands out in its answers."]
    return findings


def remarks(evaluation: Evaluation) -> list[str]:
    """Cut answers, the server's note, and what is missing."""
    found = []
    if evaluation.cut_base or evaluation.cut_adapter:
        names = ", ".join(evaluation.cut_items[:_SHOWN_CUT])
        found.append(
            f"Cut at max_tokens: {counted(evaluation.cut_adapter, 'answer')} of the adapter, {evaluation.cut_base} of "
            f"the base ({names}{', ...' if len(evaluation.cut_items) > _SHOWN_CUT else ''})."
        )
    if evaluation.adapter.note:
        found.append(f"Note: {evaluation.adapter.note}.")
    if evaluation.stopped:
        found.append(f"Incomplete: asking stopped ({evaluation.stopped}). What was measured is kept.")
    return [*found, *evaluation.left_out]
