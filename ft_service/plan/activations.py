"""Activations and loss: bytes that the passes of one micro-batch hold at their peak, from first principles.

What autograd keeps of every operation of a Llama decoder layer, in the manner of Korthikanti et al. 2022
(arXiv:2205.05198), for this stack's own operations: transformers' layers, `ft_service.model.attention`, peft's LoRA
layers, bitsandbytes' 4-bit products and `ft_service.train.objectives.sft`. No torch.

Legend: T tokens, D model width, Q width of all query heads, K of all key heads, I of the MLP, V vocabulary, e bytes of
an element.
"""

from collections.abc import Set

from ft_service.catalog.models import ModelShape

LOSS_CHUNK_BYTES = 512 * 1024 * 1024
"""Of fp32 logits, as `ft_service.train.objectives.sft` cuts them on a GPU."""

_FP32 = 4
_ALL = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


def activation_bytes(
    shape: ModelShape,
    *,
    tokens: int,
    element_bytes: int,
    method: str,
    targets: Set[str],
    lora_rank: int,
    use_dora: bool,
    checkpointing: bool,
    loss: int,
    flash: bool = True,
) -> int:
    """Peak of the passes beyond `loss`, which is held at their turn: the sum of both is the peak.

    A layer under checkpointing leaves its input alone, and is run again before its backward pass. `flash` False means
    attention as on a CPU.
    """
    full = method == "full"
    saved = tokens * saved_per_token(
        shape,
        element_bytes=element_bytes,
        full=full,
        targets=targets,
        lora_rank=lora_rank,
        use_dora=use_dora,
        flash=flash,
    )
    passing = _passing(shape, tokens, element_bytes, method, targets, use_dora)
    # Hidden states of the last norm, kept as any norm's; rotary angles.
    shared = tokens * (_norm(shape.hidden_size, element_bytes, full, False) + 2 * element_bytes * shape.head_dim)
    hidden = tokens * element_bytes * shape.hidden_size
    if checkpointing:
        kept = shape.num_layers * hidden + shared
        if element_bytes == _FP32:
            saved -= hidden  # the input is in fp32 already, and kept
        return kept + max(0, saved + passing - loss)
    return shape.num_layers * saved + shared + max(0, passing - loss)


def saved_per_token(
    shape: ModelShape,
    *,
    element_bytes: int,
    full: bool,
    targets: Set[str],
    lora_rank: int,
    use_dora: bool,
    flash: bool,
) -> int:
    """Bytes per token that one layer's forward pass leaves for its backward pass.

    A linear map keeps its input only for the gradient of a weight: its own, or that of an adapter's A. An adapter also
    keeps A's output, of the rank's width.
    """
    e = element_bytes
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    reading = _ALL if full else targets
    norms = _norm(shape.hidden_size, e, full, bool(reading & {"q_proj", "k_proj", "v_proj"}))
    norms += _norm(shape.hidden_size, e, full, bool(reading & {"gate_proj", "up_proj"}))
    # Queries, keys and values as they enter attention, its output, and fp32 log-sum-exp per head.
    attention = e * (2 * query + 2 * key_value) + _FP32 * shape.num_heads
    if not flash:
        # The outputs of several documents are joined into a new tensor for the next map.
        attention += e * query * ("o_proj" in reading)
    # gate, silu(gate), up, and their product where it is read again.
    mlp = e * shape.intermediate_size * (3 + ("down_proj" in reading))
    adapters = 0 if full else e * lora_rank * len(targets)
    if use_dora:
        # For the gradient of the magnitude: the base's output and the adapter's.
        adapters += e * 2 * sum(rows for name, rows, _ in shape.linear_shapes() if name in targets)
    return norms + attention + mlp + adapters


def _norm(width: int, element_bytes: int, trained: bool, output_read: bool) -> int:
    """Per token: RMSNorm computes in fp32 and keeps its input so; its normalised input only to train its weight."""
    return width * (_FP32 + element_bytes * (trained + output_read)) + _FP32


def _passing(shape: ModelShape, tokens: int, element_bytes: int, method: str, targets: Set[str], use_dora: bool) -> int:
    """What the widest moment of a layer adds to all that it has saved."""
    wide, width = shape.intermediate_size, shape.hidden_size
    read = method == "full" or "down_proj" in targets
    # Backward through silu(gate) * up: gradients of the product and both factors, and of the layer's output; the
    # product itself, if it was kept, is gone.
    elements = tokens * ((3 - read) * wide + width)
    if method != "lora":  # backward through down_proj, which makes its weight's gradient, or its 4-bit weight whole
        elements = max(elements, tokens * (wide + width) + wide * width)
    if use_dora:  # forward: A and B applied to an identity matrix, and the norm of W + BA, which copies both
        copies = 4 if method == "qlora" else 3
        adapted = [(rows, columns) for name, rows, columns in shape.linear_shapes() if name in targets]
        elements = max([elements, *(columns * columns + copies * rows * columns for rows, columns in adapted)])
    return element_bytes * elements


def loss_bytes(
    shape: ModelShape, *, tokens: int, element_bytes: int, full: bool, chunk_bytes: int = LOSS_CHUNK_BYTES
) -> int:
    """Peak of head and loss when every token is trained on.

    While a chunk's softmax is computed, its logits lie there twice in fp32; of the chunk before, nothing is left. The
    head's gradient is summed in fp32; scaling it makes a copy, and another in the training type.
    """
    e, head = element_bytes, shape.vocab_size * shape.hidden_size
    hidden = 2 * tokens * e * shape.hidden_size
    rows = max(1, chunk_bytes // (_FP32 * shape.vocab_size))
    logits = min(tokens, rows) * shape.vocab_size * 2 * _FP32
    if not full:
        return hidden + logits
    forward = head * _FP32 + max(logits, head * e)
    backward = head * (2 * _FP32 + (e if e < _FP32 else 0))
    return hidden + max(forward, backward)
