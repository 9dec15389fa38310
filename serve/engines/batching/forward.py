"""One step of a stock Llama on a flattened batch: the tokens of all sequences are one row.

Legend: N tokens of a step, L rows of logits, V vocabulary.
"""

from collections.abc import Sequence as Rows
from itertools import groupby
from typing import Any

import torch
from transformers import LlamaForCausalLM

from ft_service.errors import ServingError
from serve.engines.batching.adapter_weights import LoadedAdapter
from serve.engines.batching.attention import PAGED_ATTENTION, KeyValueStore, register_paged_attention
from serve.engines.batching.lora_layers import BatchedLora
from serve.engines.batching.scheduler import Piece

_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class Forward:
    """Runs steps. The model keeps its own modules; only its attention is another function."""

    def __init__(self, model: LlamaForCausalLM, store: KeyValueStore, lora: BatchedLora | None = None) -> None:
        rope_type = (model.config.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in _FIXED_ROPE:  # others rotate by the longest position in the batch
            raise ServingError(
                f"rope_type = {rope_type!r}: positions depend on what else is in a batch, so the base cannot be served."
            )
        register_paged_attention()
        model.set_attn_implementation(PAGED_ATTENTION)
        self._model = model
        self._store = store
        self._lora = lora
        self._input_device = model.model.embed_tokens.weight.device

    @torch.inference_mode()
    def run(self, pieces: Rows[Piece[Any]], adapters: Rows[LoadedAdapter | None]) -> torch.Tensor:
        """The logits [L, V] that `pieces` need, in their order, in the model's dtype; ``adapters[i]`` is piece i's."""
        if self._lora:
            self._set_rows(self._lora, pieces, adapters)
        tokens = [piece.sequence.token_ids[piece.start : piece.end] for piece in pieces]
        input_ids = torch.tensor([[token_id for piece in tokens for token_id in piece]], device=self._input_device)
        positions = [position for piece in pieces for position in range(piece.start, piece.end)]
        layout = self._store.layout(pieces, self._input_device)
        hidden_1ND = self._model.model(
            input_ids=input_ids,
            position_ids=torch.tensor([positions], device=self._input_device),
            use_cache=False,  # trap: the model's own cache would take the flattened row for one sequence
            layout=layout,
            store=self._store,
        ).last_hidden_state
        rows = _logit_rows(pieces)
        if len(rows) < len(positions):
            hidden_1ND = hidden_1ND[:, torch.tensor(rows, dtype=torch.int64, device=hidden_1ND.device)]
        return self._model.lm_head(hidden_1ND)[0]

    @staticmethod
    def _set_rows(lora: BatchedLora, pieces: Rows[Piece[Any]], adapters: Rows[LoadedAdapter | None]) -> None:
        runs = [list(run) for _, run in groupby(zip(adapters, pieces, strict=True), key=lambda pair: id(pair[0]))]
        lora.set_rows(
            [run[0][0] for run in runs],
            [sum(piece.num_tokens for _, piece in run) for run in runs],
            [sum(piece.num_logit_rows for _, piece in run) for run in runs],
        )


def _logit_rows(pieces: Rows[Piece[Any]]) -> list[int]:
    rows: list[int] = []
    end = 0
    for piece in pieces:
        end += piece.num_tokens
        rows += range(end - piece.num_logit_rows, end)
    return rows
