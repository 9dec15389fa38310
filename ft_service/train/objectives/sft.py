"""Cross entropy summed over loss tokens, and right predictions counted, without holding all logits at once.

At a vocabulary of 128,256, the fp32 logits of 8,192 tokens take 4.2 GB, and autograd keeps three such tensors. Here the
head runs only on positions whose next token is a loss token, one chunk at a time. The gradient of a chunk is computed
while its logits exist, so no tensor of the vocabulary's width outlives its chunk (as in Liger's fused linear cross
entropy, arXiv:2410.10989). Within a chunk, only a block of rows is fp32 at a time; its gradient takes the place of its
logits.

Legend: N positions whose next token is a loss token, D model width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from ft_service.model.cpu_products import for_product
from ft_service.model.training_layers import use_training_layers
from ft_service.train.batches import MicroBatch

_CHUNK_BYTES = {"cuda": 512 * 1024 * 1024, "cpu": 64 * 1024 * 1024}
"""Of one chunk's logits if they were fp32: enough rows for a fast product with the head."""
_BLOCK_BYTES = {"cuda": 64 * 1024 * 1024, "cpu": 2 * 1024 * 1024}
"""Of the fp32 logits that exist at a time. On a CPU they fit its caches."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # With p = softmax(h W^T) and y one-hot:  d loss / dh = (p - y) W,  d loss / dW = (p - y)^T h.
        needs_hidden_grad, needs_weight_grad = ctx.needs_input_grad[:2]
        chunk_rows = max(1, _CHUNK_BYTES[hidden.device.type] // (4 * weight.shape[0]))
        dtype = hidden.dtype
        device = hidden.device
        hidden = for_product(hidden)
        wide_weight = for_product(weight)
        grad_hidden = torch.empty_like(hidden) if needs_hidden_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight_grad else None
        figures = torch.zeros(2, dtype=torch.float32, device=device)
        # One tensor for all chunks: on a CPU, touching fresh memory takes a good part of the time of the product.
        logits = hidden.new_empty(min(chunk_rows, hidden.shape[0]), weight.shape[0])
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            grad_rows = None if grad_hidden is None else grad_hidden[rows]
            figures += _chunk_loss(hidden[rows], wide_weight, targets[rows], logits, dtype, grad_rows, grad_weight)
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden.to(dtype), grad_weight)
        ctx.weight_dtype = weight.dtype
        return figures

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0][0]  # the number of right predictions has no gradient
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype),
            None,
        )


def _chunk_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    buffer: torch.Tensor,
    dtype: torch.dtype,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> torch.Tensor:
    """Loss sum and right predictions of a chunk [2]; writes `buffer` and `grad_hidden`, and adds to `grad_weight`.

    `dtype` is the model's, to which logits are rounded; `hidden` and `weight` have the type that is multiplied.
    """
    logits = torch.mm(hidden, weight.T, out=buffer[: hidden.shape[0]])
    block_rows = max(1, _BLOCK_BYTES[hidden.device.type] // (4 * weight.shape[0]))
    needs_gradient = grad_hidden is not None or grad_weight is not None
    blocks = zip(logits.split(block_rows), targets.split(block_rows), strict=True)
    figures = [_block_figures(block, picked.unsqueeze(1), dtype, needs_gradient) for block, picked in blocks]
    if grad_hidden is not None:
        torch.mm(logits, weight, out=grad_hidden)
    if grad_weight is not None:
        # In parts, because the product has the training type, and a CPU also makes an fp32 copy of it.
        part_rows = max(1, _BLOCK_BYTES[hidden.device.type] // (4 * weight.shape[1]))
        for part, columns in zip(grad_weight.split(part_rows), logits.split(part_rows, dim=1), strict=True):
            part += columns.T @ hidden
    return torch.stack(figures).sum(0)


def _block_figures(
    logits: torch.Tensor, picked: torch.Tensor, dtype: torch.dtype, needs_gradient: bool
) -> torch.Tensor:
    """Loss sum and right predictions of a block [2]; if `needs_gradient`, its gradient takes the place of `logits`."""
    of_targets = logits.gather(1, picked).to(dtype).squeeze(1).float()
    p, highest, log_sum = _softmax_in_fp32(logits, dtype)
    losses = (highest - of_targets) + log_sum
    if needs_gradient:
        p.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=p.dtype))
        logits.copy_(p)
    return torch.stack([losses.sum(), (of_targets >= highest).sum()])


def _softmax_in_fp32(logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p, m and log(sum(exp(logits - m))) of logits rounded to `dtype`, with m the highest [rows]; may overwrite them.

    Not the index of m: torch's argmax takes many times as long on a CPU.
    """
    if logits.device.type != "cpu":
        p = F.softmax(logits, dim=-1, dtype=torch.float32)
        return p, logits.amax(1).float(), -p.amax(1).log()  # p of m is 1 / sum(exp(logits - m))
    # A CPU's softmax makes two new tensors, and takes longer than its parts.
    wide = logits.copy_(logits.to(dtype)) if logits.dtype == torch.float32 else logits.float()
    highest = wide.amax(1, keepdim=True)
    exponentials = wide.sub_(highest).exp_()
    total = exponentials.sum(1, keepdim=True)
    return exponentials.div_(total), highest.squeeze(1), total.log().squeeze(1)


def chunked_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over N of -log softmax(`hidden` `weight`^T)[target], and how many targets are the most likely token.

    fp32 [2]; only the first has a gradient. A target that shares the highest logit counts as most likely.
    `hidden` [N, D] and `weight` [V, D] share a dtype; `targets` [N] is int64. Logits are rounded to that dtype before
    the softmax, as transformers does, and the softmax itself is fp32.
    """
    figures: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets)
    return figures


class LossHead(nn.Linear):
    """A language-model head whose forward returns the figures of `chunked_cross_entropy`.

    It is a module, so that ZeRO-3 gathers its weight.
    """

    @classmethod
    def with_weight_of(cls, head: nn.Linear) -> "LossHead":
        """A head with the same parameter object as `head`, which may be tied to the embeddings, or partitioned."""
        with torch.device("meta"):
            shared = cls(head.in_features, head.out_features, bias=False)
        shared.weight = head.weight
        return shared

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return chunked_cross_entropy(hidden, self.weight, targets)


class LossModel(nn.Module):
    """The module that DeepSpeed trains: its forward returns the figures of one micro-batch."""

    def __init__(self, model: nn.Module, causal_lm: LlamaForCausalLM) -> None:
        """`model` is `causal_lm` itself, or the peft model that wraps it."""
        super().__init__()
        use_training_layers(model)
        self.model = model
        causal_lm.lm_head = LossHead.with_weight_of(causal_lm.lm_head)
        self._causal_lm = (causal_lm,)  # in a tuple, so that its parameters are not registered twice

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Loss sum, in nats, over the micro-batch's loss tokens, and how many of them are predicted: fp32 [2].

        Only the first has a gradient. They are one tensor, which passes DeepSpeed's hooks like any output.
        """
        (causal_lm,) = self._causal_lm
        output = causal_lm.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            document_lengths=batch.document_lengths,
            document_offsets=batch.document_offsets,
        )
        hidden = output.last_hidden_state[0].index_select(0, batch.target_positions)
        del output  # its hidden states are not needed any more, and the head needs memory
        figures: torch.Tensor = causal_lm.lm_head(hidden, batch.targets)
        return figures
