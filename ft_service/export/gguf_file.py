"""A model folder as one GGUF file, for llama.cpp and what builds on it. Needs no torch; holds one tensor at a time.

The format is that of llama.cpp's converter for `LlamaForCausalLM`:

- Its rotary embedding pairs neighbouring elements (0, 1), (2, 3), ...; transformers pairs element i of a head with
  i + head_dim / 2. So the rows of the query and key projections are permuted within each head.
- The frequency factors of Llama 3.1's rotary embedding are a tensor, `rope_freqs.weight`.
- A tokenizer is its tokens, their types and merges, and a name for how text is split before merging: `llama-bpe`.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from ft_service.catalog.models import ModelShape, shape_from_config
from ft_service.chat.word_cache import LLAMA3_SPLIT
from ft_service.errors import ModelError
from ft_service.model.weight_files import TensorEntry, WeightFiles

GgufType = Literal["same", "bf16", "q8_0"]

ROPE_FREQS = "rope_freqs.weight"
_ARCHITECTURE = "llama"
_SPLIT_NAME = "llama-bpe"
_END_OF_TURN = "<|eot_id|>"
_TYPES = {"F32": Type.F32, "F16": Type.F16, "BF16": Type.BF16}
_FILE_TYPES = {
    Type.F32: gguf.LlamaFileType.ALL_F32,
    Type.F16: gguf.LlamaFileType.MOSTLY_F16,
    Type.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}


def write_gguf(folder: Path, out: Path, name: str, gguf_type: GgufType = "same") -> None:
    """Write the model in `folder` as the new file `out`.

    "same" keeps the type of the weights, so nothing is lost. "bf16" rounds float32 weights; "q8_0" has 8.5 bits per
    weight. Norms are always float32. Raises `ModelError` for a model that GGUF's "llama" cannot describe: another
    tokenizer than Llama 3's, another scaling of the rotary embedding, another weight type.
    """
    weights = WeightFiles(folder)
    weights.check()
    shape = shape_from_config(weights.config)
    writer = gguf.GGUFWriter(out, _ARCHITECTURE)
    try:
        _add_sizes(writer, weights.config, shape, name)
        _add_tokenizer(writer, folder, shape)
        tensors = _tensors(weights, shape)
        types = {new: _type_of(entry, gguf_type) for new, (_, entry) in tensors.items()}
        writer.add_file_type(_FILE_TYPES[types["token_embd.weight"]])
        factors = rope_factors(_rope(weights.config), shape.head_dim)
        if factors is not None:
            writer.add_tensor_info(ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes)
        for new, (_, entry) in tensors.items():
            nbytes_shape = gguf.quant_shape_to_byte_shape(entry.shape, types[new])
            dtype = np.dtype(np.uint8)
            writer.add_tensor_info(new, nbytes_shape, dtype, math.prod(nbytes_shape), raw_dtype=types[new])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for new, (old, entry) in tensors.items():
            writer.write_tensor_data(_encoded(_read(weights, old, entry, shape), entry.dtype, types[new]))
    finally:
        writer.close()
        weights.close()


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The rows of a query or key projection [num_heads * head_dim, ...] in llama.cpp's order.

    Row i of a head's first half and row i of its second half become neighbours.
    """
    rows = weight.shape[0]
    return weight.reshape(num_heads, 2, rows // num_heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def rope_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray | None:
    """Llama 3.1's divisors of the rotary frequencies, float32 [head_dim / 2]; None for an unscaled embedding.

    Wavelengths up to `original / high_freq_factor` stay, those from `original / low_freq_factor` on are stretched by
    `factor`, and in between the two frequencies are blended linearly. Raises `ModelError` for another scaling.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "linear"):  # linear scaling is a key of its own
        return None
    if kind != "llama3":
        raise ModelError(
            f"config.json: its rotary embedding is scaled by {kind!r}, which cannot be exported. Export the folder."
        )
    original = rope["original_max_position_embeddings"]
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    # 0 at the longest wavelength that is stretched in full, 1 at the shortest that stays.
    blend = np.clip((original * frequencies / (2 * np.pi) - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1 - blend) / rope["factor"] + blend)).astype(np.float32)


# -- sizes -----------------------------------------------------------------------------------------------------------


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings, from either place where transformers has kept them."""
    theta = config.get("rope_theta", 10_000.0)
    return {"rope_theta": theta, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def _add_sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any], shape: ModelShape, name: str) -> None:
    rope = _rope(config)
    writer.add_name(name)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_block_count(shape.num_layers)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    if rope.get("rope_type", rope.get("type")) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


# -- tokenizer -------------------------------------------------------------------------------------------------------


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, shape: ModelShape) -> None:
    file = folder / "tokenizer.json"
    try:
        tokenizer = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({error}). Export needs the tokenizer of the base.") from None
    if tokenizer["model"]["type"] != "BPE" or LLAMA3_SPLIT not in _patterns(tokenizer.get("pre_tokenizer")):
        raise ModelError(
            f"{file}: does not split text as Llama 3's tokenizer does, so llama.cpp would tokenize differently. "
            "Export the folder, and convert it with the tools of its base."
        )
    tokens = dict(tokenizer["model"]["vocab"])
    added = {token["content"]: token for token in tokenizer.get("added_tokens", [])}
    tokens |= {content: token["id"] for content, token in added.items()}
    texts = {number: text for text, number in tokens.items()}
    if max(texts) >= shape.vocab_size:
        raise ModelError(f"{file}: has {max(texts) + 1} tokens, and the model's embedding has {shape.vocab_size}.")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_SPLIT_NAME)
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(shape.vocab_size)])
    writer.add_token_types([_token_type(texts.get(number), added) for number in range(shape.vocab_size)])
    logger = logging.getLogger("gguf.vocab")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that it cannot read how Llama 3 joins pairs of texts, which nobody does
    try:
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=shape.vocab_size)
    finally:
        logger.setLevel(level)
    special.add_to_gguf(writer, quiet=True)
    if _END_OF_TURN in tokens and "eot" not in special.special_token_ids:
        writer.add_eot_token_id(tokens[_END_OF_TURN])
    template = folder / "chat_template.jinja"
    if special.chat_template is None and template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _patterns(pre_tokenizer: Mapping[str, Any] | None) -> set[str]:
    """The regular expressions by which a tokenizer splits text."""
    if pre_tokenizer is None:
        return set()
    parts = [pre_tokenizer, *pre_tokenizer.get("pretokenizers", [])]
    return {part["pattern"].get("Regex", "") for part in parts if part.get("type") == "Split"}


def _token_type(text: str | None, added: Mapping[str, Mapping[str, Any]]) -> gguf.TokenType:
    if text is None:
        return gguf.TokenType.UNUSED
    if text in added:
        return gguf.TokenType.CONTROL if added[text]["special"] else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.NORMAL


# -- tensors ---------------------------------------------------------------------------------------------------------


def _tensors(weights: WeightFiles, shape: ModelShape) -> dict[str, tuple[str, TensorEntry]]:
    """GGUF's name of a tensor -> its name in the folder, and where it is."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_layers)
    found = {}
    for old, entry in weights.tensors.items():
        if old == "lm_head.weight" and shape.tied_embeddings:
            continue  # llama.cpp uses the embedding
        new = names.get_name(old, try_suffixes=(".weight", ".bias"))
        if new is None or entry.dtype not in _TYPES:
            raise ModelError(f"{weights.location}: {old} ({entry.dtype}) has no place in a GGUF file of a Llama.")
        found[new] = (old, entry)
    return found


def _type_of(entry: TensorEntry, gguf_type: GgufType) -> Type:
    if len(entry.shape) == 1:
        return Type.F32
    if gguf_type == "q8_0" and entry.shape[-1] % gguf.GGML_QUANT_SIZES[Type.Q8_0][0] == 0:
        return Type.Q8_0
    return _TYPES[entry.dtype] if gguf_type == "same" else Type.BF16


def _read(weights: WeightFiles, name: str, entry: TensorEntry, shape: ModelShape) -> np.ndarray:
    """A tensor in llama.cpp's row order. bfloat16 comes as its bits, uint16."""
    content = bytearray(entry.nbytes)
    weights.read_into(entry, 0, memoryview(content))
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[entry.dtype]
    tensor = np.frombuffer(content, dtype).reshape(entry.shape)
    if ".q_proj." in name:
        return permuted(tensor, shape.num_heads)
    return permuted(tensor, shape.num_kv_heads) if ".k_proj." in name else tensor


def _encoded(tensor: np.ndarray, dtype: str, to: Type) -> np.ndarray:
    """The bytes of a tensor in type `to`, uint8."""
    if _TYPES[dtype] == to:
        return np.ascontiguousarray(tensor).view(np.uint8)
    wide = (tensor.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else tensor.astype(np.float32)
    return gguf.quants.quantize(np.ascontiguousarray(wide), to).view(np.uint8)
