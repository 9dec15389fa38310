"""Chooses the next token of every sequence of a batch, and scores tokens.

A draw depends on its request's seed, on its place in the answer and on its own row of logits, on nothing else in the
batch. It inverts the cumulative distribution in the order of the vocabulary, not of probability: the same logits up to
rounding then give the same token, unless the draw falls within that rounding of a boundary.

Legend: L rows of logits, V vocabulary, R rows that are drawn.
"""

import hashlib
from collections.abc import Sequence

import torch

from ft_service.errors import ServingError
from serve.engines.batching.step import SampledToken, SamplingRow, ScoredToken
from serve.engines.engine import RefusedRequestError, Sampling

GREEDY_BELOW_TEMPERATURE = 1e-5
_LIKELY_TOKENS = 1024
"""`top_p` looks at so many of the most likely tokens first; sorting a vocabulary of 128,256 takes ten times as long."""


def sample(logits_LV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """The next token of each row, or why there is none. See `serve.engines.batching.step.Sample`."""
    is_finite_L = _are_finite(logits_LV)
    changed = [index for index, row in enumerate(rows) if _changes_logits(row)]
    drawn = [index for index, row in enumerate(rows) if not is_greedy(row.sampling)]
    chosen_L = _likeliest(logits_LV)
    has_choice_L = is_finite_L
    failed: dict[int, str | RefusedRequestError] = {}
    if changed or drawn:
        touched = sorted({*changed, *drawn})
        of_touched = torch.tensor(touched, device=logits_LV.device)
        values_RV = logits_LV[of_touched].float()
        for at, index in enumerate(touched):
            try:
                _change(values_RV[at], rows[index])
            except RefusedRequestError as error:
                failed[index] = error
                values_RV[at] = -torch.inf
            except Exception as error:  # of a grammar, say: the other rows go on
                failed[index] = f"the engine failed to constrain the answer ({type(error).__name__}: {error})."
                values_RV[at] = -torch.inf
        tokens_R = values_RV.argmax(dim=-1)
        possible_R = values_RV.amax(dim=-1) > -torch.inf
        if drawn:
            places = [touched.index(index) for index in drawn]
            tokens_R[places] = _draw(values_RV[places], [rows[index] for index in drawn])
        chosen_L = chosen_L.index_copy(0, of_touched, tokens_R)
        has_choice_L = is_finite_L.index_copy(0, of_touched, is_finite_L[of_touched] & possible_R)
    # One read of the device for all rows: ids, and which of them count.
    chosen_L = chosen_L.where(has_choice_L, 0)  # of a row without a choice even the id may be none
    ids, finite, choice = torch.stack([chosen_L, is_finite_L.long(), has_choice_L.long()]).tolist()
    scored = _scored(logits_LV, ids, rows)
    return [
        SampledToken(
            token_id,
            scored[index],
            None if choice[index] else failed.get(index) or _error(rows[index], bool(finite[index])),
        )
        for index, token_id in enumerate(ids)
    ]


def _are_finite(logits_LV: torch.Tensor) -> torch.Tensor:
    """Whether all logits of each row are finite [L]."""
    # Both extremes are NaN where any logit is. Reducing twice costs less than a look at each logit.
    return logits_LV.amax(dim=-1).isfinite() & logits_LV.amin(dim=-1).isfinite()


def _likeliest(logits_LV: torch.Tensor) -> torch.Tensor:
    """The first of the largest logits of each row [L]."""
    if logits_LV.device.type == "cpu":
        return torch.from_numpy(logits_LV.float().numpy().argmax(axis=-1))  # torch's takes ten times as long
    return logits_LV.argmax(dim=-1)


def score(logits_LV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[ScoredToken]:
    """Log-probabilities of given tokens. Raises `ServingError` when a logit is not finite."""
    if not bool(logits_LV.isfinite().all()):
        raise ServingError(f"the logits of a prompt of {len(token_ids)} tokens are not finite.")
    logprobs_LV = logits_LV.float().log_softmax(dim=-1)
    given_L = logprobs_LV.gather(1, torch.tensor(token_ids, device=logits_LV.device)[:, None])[:, 0]
    values_LK, ids_LK = logprobs_LV.topk(min(num_top, logprobs_LV.shape[-1]), dim=-1)
    tops = zip(ids_LK.tolist(), values_LK.tolist(), strict=True)
    return [
        ScoredToken(token_id, logprob, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, (ids, values) in zip(token_ids, given_L.tolist(), tops, strict=True)
    ]


def _scored(logits_LV: torch.Tensor, ids: list[int], rows: Sequence[SamplingRow]) -> list[ScoredToken | None]:
    wanted = [index for index, row in enumerate(rows) if row.num_logprobs is not None]
    scored: list[ScoredToken | None] = [None] * len(rows)
    if not wanted:
        return scored
    num_top = max(rows[index].num_logprobs or 0 for index in wanted)
    # A row that is not finite has an error of its own; its zeros are never shown.
    values = logits_LV[wanted].nan_to_num(0.0, 0.0, 0.0)
    for index, token in zip(wanted, score(values, [ids[index] for index in wanted], num_top), strict=True):
        scored[index] = ScoredToken(token.token_id, token.logprob, token.top[: rows[index].num_logprobs])
    return scored


def _error(row: SamplingRow, is_finite: bool) -> str:
    if is_finite:
        return f"{name_of(row.adapter_id)}: no token may come next: logit_bias and the JSON schema leave none."
    return nonfinite_error(row.adapter_id)


def nonfinite_error(adapter_id: str | None) -> str:
    of_whom = name_of(adapter_id)
    return f"{of_whom}: its logits are not finite, so that it cannot answer. Check its weights: ft adapters verify."


def name_of(adapter_id: str | None) -> str:
    return "the base" if adapter_id is None else f"adapter = {adapter_id!r}"


# -- one row -----------------------------------------------------------------------------------------------------------


def is_greedy(sampling: Sampling) -> bool:
    """Whether only the likeliest token can be chosen."""
    return sampling.temperature < GREEDY_BELOW_TEMPERATURE or sampling.top_k == 1 or sampling.top_p == 0


def _changes_logits(row: SamplingRow) -> bool:
    """Whether even the most likely token may be another one than by the model's own logits."""
    sampling = row.sampling
    has_penalty = sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
    return has_penalty or bool(sampling.logit_bias) or row.grammar is not None


def _change(logits_V: torch.Tensor, row: SamplingRow) -> None:
    """Bias, penalties and grammar, in place."""
    sampling = row.sampling
    device = logits_V.device
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=device)
        logits_V[ids] += torch.tensor(list(sampling.logit_bias.values()), device=device)
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.answer_ids}), device=device)
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (sampling.frequency_penalty or sampling.presence_penalty) and row.answer_ids:
        ids, counts = torch.tensor(row.answer_ids, device=device).unique(return_counts=True)
        logits_V[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    if row.grammar is not None:
        logits_V.masked_fill_(~row.grammar.allowed_V().to(device), -torch.inf)


# -- drawing -----------------------------------------------------------------------------------------------------------


def _draw(logits_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """One random token of each row [R]."""
    device = logits_RV.device
    temperatures_R = torch.tensor([row.sampling.temperature for row in rows], device=device)
    logits_RV = logits_RV / temperatures_R[:, None]
    for at, row in enumerate(rows):
        _limit(logits_RV[at], row.sampling)
    # In double precision, so that the sum over 128,256 tokens rounds far below any probability that matters.
    mass_RV = logits_RV.double().softmax(dim=-1).cumsum(dim=-1)
    uniforms_R = torch.tensor([_uniform(row) for row in rows], dtype=torch.float64, device=device)
    # right=True and a target below the total: a token of probability 0 begins and ends at the same mass, and is never
    # the answer, not even the last one.
    total_R = mass_RV[:, -1]
    targets_R = torch.minimum(uniforms_R * total_R, total_R.nextafter(torch.zeros_like(total_R)))
    return torch.searchsorted(mass_RV, targets_R[:, None], right=True)[:, 0]


def _uniform(row: SamplingRow) -> float:
    """A number in [0, 1) from seed and place alone (53 bits of BLAKE2b)."""
    digest = hashlib.blake2b(f"{row.seed} {len(row.answer_ids)}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def _limit(logits_V: torch.Tensor, sampling: Sampling) -> None:
    """`top_k`, `top_p` and `min_p`, in place, in this order: as transformers' warpers."""
    vocab_size = logits_V.shape[-1]
    if 0 < sampling.top_k < vocab_size:
        smallest = logits_V.topk(sampling.top_k).values[-1]
        logits_V.masked_fill_(logits_V < smallest, -torch.inf)
    if sampling.top_p < 1:
        logits_V.masked_fill_(logits_V < _smallest_of_nucleus(logits_V, sampling.top_p), -torch.inf)
    if sampling.min_p > 0:  # p / p_max >= min_p is the same as logit - largest >= log(min_p)
        floor = logits_V.max() + torch.tensor(sampling.min_p).log().to(logits_V.device)
        logits_V.masked_fill_(logits_V < floor, -torch.inf)


def _smallest_of_nucleus(logits_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """The logit of the last token that belongs to the most likely ones of mass `top_p`."""
    log_total = logits_V.logsumexp(dim=-1)
    for count in (min(_LIKELY_TOKENS, logits_V.shape[-1]), logits_V.shape[-1]):
        values = logits_V.topk(count).values
        mass_before = (values - log_total).exp().cumsum(dim=-1) - (values - log_total).exp()
        inside = int((mass_before < top_p).sum())
        if inside < count:
            break
    return values[inside - 1]
