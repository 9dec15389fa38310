"""Sample answers of base and adapter, side by side, for the run's report."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from ft_service.chat.format import END_OF_TURN, HEADER_END, HEADER_START
from ft_service.data.dataset import PreparedDataset, open_dataset
from ft_service.model.adapter import load_adapter
from ft_service.model.base import load_tokenizer, resolve_base
from ft_service.model.load import WholeWeights, load_causal_lm
from ft_service.model.weight_files import WeightFiles
from ft_service.plan.plan import RunPlan
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage

_TURN = re.compile(f"{re.escape(HEADER_START)}(.*?){re.escape(HEADER_END)}\n\n(.*?){re.escape(END_OF_TURN)}", re.DOTALL)


def write_samples(storage_root: str, run_id: str, adapter_id: str) -> None:
    """Answer prompts of the run's validation data (or training data) greedily; write the run's samples.json."""
    storage = Storage(storage_root)
    run = RunFolder(storage, run_id)
    registry = Registry(storage)
    plan = run.plan()
    record = registry.resolve(adapter_id)
    tokenizer = load_tokenizer(resolve_base(plan.spec.model.base, plan.spec.model.revision))
    questions = list(_questions(open_dataset(storage, plan.dataset.digest), plan.spec.report.samples))
    prompts = [prompt for prompt, _ in questions]
    before, after = _answers(plan, record, registry.folder(record), prompts)
    samples = [
        {
            "prompt": _turns(tokenizer, prompt),
            "reference": _text(tokenizer, reference),
            "base": _text(tokenizer, base),
            "adapter": _text(tokenizer, adapter),
        }
        for (prompt, reference), base, adapter in zip(questions, before, after, strict=True)
    ]
    storage.write_json(f"{run.path}/samples.json", samples)


def _questions(dataset: PreparedDataset, count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield, for the first `count` documents, the token ids of the prompt and of the first answer."""
    rows = dataset.validation if dataset.validation is not None else dataset.train
    for index in range(len(rows)):
        row = rows[index]
        ends = np.cumsum(row.document_lengths)
        for start, end in zip(ends - row.document_lengths, ends, strict=True):
            ids = row.input_ids[start:end]
            mask = row.loss_mask[start:end].astype(bool)
            first = int(np.argmax(mask))
            if count == 0:
                return
            if mask.any() and first > 0:
                stop = first + int(np.argmin(np.append(mask[first:], False)))
                yield ids[:first].tolist(), ids[first:stop].tolist()
                count -= 1


@torch.inference_mode()
def _answers(
    plan: RunPlan, record: AdapterRecord, folder: Path, prompts: list[list[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    spec = plan.spec
    device = torch.device("cuda" if spec.parallel.use_gpu else "cpu")
    dtype = torch.bfloat16 if spec.train.precision == "bf16" else torch.float32

    def load(source: Path, four_bit: bool = False) -> LlamaForCausalLM:
        placement = WholeWeights(device)
        return load_causal_lm(
            WeightFiles(source), dtype=dtype, four_bit=four_bit, placement=placement, attention="sdpa"
        )

    def answer(model: Any) -> list[list[int]]:
        return [_greedy(model, prompt, record.end_of_turn_ids, spec.report.sample_max_tokens) for prompt in prompts]

    base = load(resolve_base(spec.model.base, spec.model.revision), four_bit=spec.method.type == "qlora")
    before = answer(base)
    if record.kind == "model":
        del base
        return before, answer(load(folder))
    return before, answer(load_adapter(base, folder))


def _greedy(model: Any, prompt: list[int], end_ids: list[int], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=end_ids,
        pad_token_id=end_ids[0],
    )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer


def _turns(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """A prompt for people to read: without headers if there is one turn, otherwise with the role before each turn."""
    turns = _TURN.findall(str(tokenizer.decode(ids)))
    if not turns:
        return _text(tokenizer, ids)
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {content}" for role, content in turns)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip() if isinstance(text, str) else ""
