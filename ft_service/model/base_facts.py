"""`BaseFacts`: what the files of a base say, read as data without torch.

Of the weights only headers and a few rows are read, also from object storage. What cannot be read is listed in
`BaseFacts.unchecked`; it stops nothing here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ft_service.chat.format import END_OF_TURN, HEADER_END, HEADER_START
from ft_service.errors import ModelError
from ft_service.model.base import is_remote
from ft_service.model.weight_files import TensorEntry, WeightFiles
from ft_service.plan.facts import SAMPLE_CONVERSATION, BaseFacts
from ft_service.text import first_line

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_CHAT_TOKENS = (HEADER_START, HEADER_END, END_OF_TURN)
_COMPARED_ROWS = 64
"""Rows of ordinary tokens, evenly spread over the vocabulary, that the chat tokens' rows are compared with."""
_UNTRAINED_NORM = 0.01
"""A row this much shorter than the median row was never trained: weight decay has shrunk it towards zero."""
_PACKED_DTYPES = {"U8", "I8", "I32", "F8_E4M3", "F8_E5M2"}
"""Safetensors types that weight matrices have only in quantised checkpoints."""
_FROM_WEIGHTS = "whether the weights are quantised, and whether the rows of the chat tokens are trained"


def read_base_facts(base: str, folder: Path) -> BaseFacts:
    """The facts of a base, except `own_turns`. `folder` has its config and tokenizer.

    Weights are read from `folder`, or by ranges from a `base` on object storage. Raises `ModelError` if
    config.json cannot be read or is not a Llama's.
    """
    config = WeightFiles(folder).config
    unchecked: list[str] = []
    weight_files = WeightFiles(base if is_remote(base) else folder)
    try:
        tensors = weight_files.tensors
    except ModelError:
        tensors = {}
        unchecked.append(f"{_FROM_WEIGHTS} (the weights are not downloaded yet)")
    rows = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else config.get("vocab_size")
    tokens = _token_ids(folder, unchecked)
    try:
        untrained = _untrained(weight_files, tensors, tokens, rows or 0)
    except ModelError as error:
        untrained = ()
        unchecked.append(f"whether the rows of the chat tokens are trained ({first_line(error)})")
    finally:
        weight_files.close()
    return BaseFacts(
        max_positions=config.get("max_position_embeddings"),
        quantization=_quantization(config, tensors),
        embedding_rows=rows,
        tokens_beyond_embedding={
            token: token_id for token, token_id in tokens.items() if rows is not None and token_id >= rows
        },
        untrained_chat_tokens=untrained,
        unchecked=tuple(unchecked),
    )


def _quantization(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> str | None:
    stated = config.get("quantization_config")
    if stated:
        method = stated.get("quant_method") if isinstance(stated, Mapping) else None
        return str(method or "quantization_config in config.json")
    packed = {entry.dtype for name, entry in tensors.items() if name.endswith(("weight", "qweight"))} & _PACKED_DTYPES
    return f"weights of type {', '.join(sorted(packed))}" if packed else None


def _token_ids(folder: Path, unchecked: list[str]) -> dict[str, int]:
    """Token -> id, from tokenizer.json, in the order of the ids."""
    try:
        content = json.loads((folder / "tokenizer.json").read_bytes())
        vocabulary = content["model"]["vocab"]
        ids = dict(vocabulary) if isinstance(vocabulary, Mapping) else {}
        ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return dict(sorted(ids.items(), key=lambda item: item[1]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        unchecked.append(f"whether every token has an embedding (tokenizer.json: {first_line(error)})")
        return {}


# -- rows of the embedding and the head ------------------------------------------------------------------------------


def _untrained(
    weight_files: WeightFiles, tensors: Mapping[str, TensorEntry], tokens: Mapping[str, int], num_rows: int
) -> tuple[str, ...]:
    """The chat tokens whose row is nearly zero or equal to another chat token's, in the embedding or the head."""
    ids = {token: tokens[token] for token in _CHAT_TOKENS if tokens.get(token, num_rows) < num_rows}
    untrained: set[str] = set()
    for name in (EMBEDDING, HEAD):
        entry = tensors.get(name)
        if entry is None or entry.dtype not in _DECODERS or len(entry.shape) != 2:
            continue
        ordinary = range(0, entry.shape[0], max(1, entry.shape[0] // _COMPARED_ROWS))
        norms = [float(np.linalg.norm(_row(weight_files, entry, row))) for row in ordinary]
        shortest = _UNTRAINED_NORM * float(np.median(norms))
        rows = {token: _row(weight_files, entry, token_id) for token, token_id in ids.items()}
        for token, row in rows.items():
            same = [other for other in rows if other != token and np.array_equal(row, rows[other])]
            if same or float(np.linalg.norm(row)) <= shortest:
                untrained.add(token)
    return tuple(token for token in _CHAT_TOKENS if token in untrained)


def _bf16(content: bytes) -> np.ndarray:
    return (np.frombuffer(content, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


_DECODERS = {
    "BF16": _bf16,
    "F16": lambda content: np.frombuffer(content, dtype="<f2").astype(np.float32),
    "F32": lambda content: np.frombuffer(content, dtype="<f4"),
}


def _row(weight_files: WeightFiles, entry: TensorEntry, row: int) -> np.ndarray:
    width = entry.shape[1]
    content = bytearray(width * entry.item_bytes)
    weight_files.read_into(entry, row * width, memoryview(content))
    return _DECODERS[entry.dtype](bytes(content))


# -- the base's own chat template ------------------------------------------------------------------------------------


def with_own_turns(facts: BaseFacts, tokenizer: PreTrainedTokenizerBase) -> BaseFacts:
    """The facts with `own_turns`, which stays None if the base has no chat template of its own."""
    if not tokenizer.chat_template:
        return facts
    try:
        # A fixed date: Llama 3.1's template writes today's otherwise, and the plan would change from day to day.
        rendered = tokenizer.apply_chat_template(list(SAMPLE_CONVERSATION), tokenize=False, date_string="26 Jul 2024")
    except Exception as error:  # the template is the base's code: anything may fail in it
        unread = f"whether the base's own chat template writes the trained turns ({first_line(error)})"
        return facts.model_copy(update={"unchecked": (*facts.unchecked, unread)})
    return facts.model_copy(update={"own_turns": str(rendered)})
