"""Activations and loss: peak bytes of the forward and backward pass of one micro-batch, from first principles.

Counts what autograd saves for every operation of a Llama decoder layer, like Korthikanti et al. 2022
(arXiv:2205.05198), for the operations used here: `ft_service.model.training_layers`, `ft_service.model.attention`,
bitsandbytes' 4-bit products and `ft_service.train.objectives.sft`.

Legend: T tokens, D model width, Q width of all query heads, K of all key heads, I of the MLP, V vocabulary, e bytes of
an element.
"""

from collections.abc import Set

from ft_service.catalog.models import ModelShape

LOSS_CHUNK_BYTES = 512 * 1024 * 1024
"""Logits that `ft_service.train.objectives.sft` computes at a time on a GPU, if they were fp32."""
LOSS_BLOCK_BYTES = 64 * 1024 * 1024
"""Of these, the logits that are fp32 at a time."""

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
    has_dropout: bool = False,
    checkpointing: bool,
    kept_layers: int = 0,
    loss: int,
    flash: bool = True,
) -> int:
    """Peak bytes of both passes minus `loss`: the sum of the result and `loss` is the peak.

    With checkpointing, a layer saves only its input, and runs again before its backward pass; the last `kept_layers`
    layers save everything all the same. `has_dropout` is that of the adapters. `flash=False` means attention and
    dropout as on a CPU.
    """
    full = method == "full"
    saved = tokens * saved_per_token(
        shape,
        element_bytes=element_bytes,
        full=full,
        targets=targets,
        lora_rank=lora_rank,
        use_dora=use_dora,
        has_dropout=has_dropout,
        flash=flash,
    )
    temporary = _temporary(shape, tokens, element_bytes, method, targets, use_dora, has_dropout)
    final_norm = tokens * _norm(shape.hidden_size, element_bytes, False)
    rotary_angles = tokens * 2 * element_bytes * shape.head_dim
    hidden = tokens * element_bytes * shape.hidden_size
    if not checkpointing:
        kept_layers = shape.num_layers
    inputs = (shape.num_layers - kept_layers) * hidden + rotary_angles
    # Backward goes through the final norm and the kept layers first: what they saved is freed before another layer runs
    # again.
    peaks = [inputs + kept_layers * saved + final_norm + loss]
    if kept_layers:
        peaks.append(inputs + kept_layers * saved + temporary)
    if kept_layers < shape.num_layers:  # the input of its first norm is the layer's, counted in `inputs`
        peaks.append(inputs + saved - hidden + temporary)
    return max(peaks) - loss


def saved_per_token(
    shape: ModelShape,
    *,
    element_bytes: int,
    full: bool,
    targets: Set[str],
    lora_rank: int,
    use_dora: bool,
    has_dropout: bool = False,
    flash: bool,
) -> int:
    """Bytes per token that one layer's forward pass saves for its backward pass.

    A linear layer saves its input only for the gradient of a weight: its own, or that of an adapter's A. An adapter
    also saves A's output, of the width of the rank. With dropout, each adapter reads, and saves, an input of its own,
    and dropout saves which elements it keeps.
    """
    e = element_bytes
    query = shape.num_heads * shape.head_dim
    key_value = shape.num_kv_heads * shape.head_dim
    saves_input: Set[str] = _ALL if full else frozenset() if has_dropout else targets
    norms = _norm(shape.hidden_size, e, bool(saves_input & {"q_proj", "k_proj", "v_proj"}))
    norms += _norm(shape.hidden_size, e, bool(saves_input & {"gate_proj", "up_proj"}))
    # Queries, keys and values, the output of attention, and fp32 log-sum-exp per head.
    attention = e * (2 * query + 2 * key_value) + _FP32 * shape.num_heads
    if not flash:
        # The outputs of several documents are concatenated into a new tensor for the next layer.
        attention += e * query * ("o_proj" in saves_input)
    # gate, up, and silu(gate) up if the next layer saves its input.
    mlp = e * shape.intermediate_size * (2 + ("down_proj" in saves_input))
    adapters = 0 if full else e * lora_rank * len(targets)
    if has_dropout and not full:  # one byte an element on a GPU; a factor in the type of the input on a CPU
        kept = 1 if flash else e
        adapters += (e + kept) * sum(columns for name, _, columns in shape.linear_shapes() if name in targets)
    if use_dora:
        # The gradient of the magnitude needs the outputs of base and adapter.
        adapters += e * 2 * sum(rows for name, rows, _ in shape.linear_shapes() if name in targets)
    return norms + attention + mlp + adapters


def _norm(width: int, element_bytes: int, output_read: bool) -> int:
    """Bytes per token: RMSNorm saves its input and an fp32 number, and the next layer perhaps its own input."""
    return width * element_bytes * (1 + output_read) + _FP32


def _temporary(
    shape: ModelShape,
    tokens: int,
    element_bytes: int,
    method: str,
    targets: Set[str],
    use_dora: bool,
    has_dropout: bool,
) -> int:
    """Bytes that the widest operation of a layer needs in addition to what the layer has saved."""
    wide = shape.intermediate_size
    width = shape.hidden_size
    read = method == "full" or "down_proj" in targets
    # Backward through silu(gate) * up: gradients of the product, of both factors and of the layer's output. The
    # product itself, if saved, is already freed.
    elements = tokens * ((3 - read) * wide + width)
    if method != "lora":  # backward through down_proj creates its weight's gradient, or dequantises its 4-bit weight
        elements = max(elements, tokens * (wide + width) + wide * width)
    if use_dora:  # forward: A and B applied to an identity matrix, and the norm of W + BA, which copies both
        copies = 4 if method == "qlora" else 3
        adapted = [(rows, columns) for name, rows, columns in shape.linear_shapes() if name in targets]
        # With dropout, the layer's own input and product exist beside those of the adapter.
        undropped = tokens if has_dropout else 0
        products = (columns * columns + copies * rows * columns for rows, columns in adapted)
        others = (undropped * (rows + columns) for rows, columns in adapted)
        elements = max([elements, *map(sum, zip(products, others, strict=True))])
    return element_bytes * elements


def loss_bytes(
    shape: ModelShape,
    *,
    tokens: int,
    element_bytes: int,
    full: bool,
    chunk_bytes: int = LOSS_CHUNK_BYTES,
    block_bytes: int = LOSS_BLOCK_BYTES,
) -> int:
    """Peak bytes of head and loss if every token is a loss token.

    A chunk's logits have the training type. During the softmax of a block of them, the block exists once more in fp32.
    The gradient of the head is accumulated in fp32, in parts no larger than a block; scaling it makes a copy, and
    another one in the training type.
    """
    e = element_bytes
    head = shape.vocab_size * shape.hidden_size
    hidden = 2 * tokens * e * shape.hidden_size
    chunk_rows = max(1, chunk_bytes // (_FP32 * shape.vocab_size))
    block_rows = max(1, block_bytes // (_FP32 * shape.vocab_size))
    logits = min(tokens, chunk_rows) * shape.vocab_size * e
    softmax = logits + min(tokens, chunk_rows, block_rows) * shape.vocab_size * _FP32
    if not full:
        return hidden + softmax
    forward = head * _FP32 + softmax
    backward = head * (2 * _FP32 + (e if e < _FP32 else 0))
    return hidden + max(forward, backward)
