"""The Llama 3 family: shapes, parameter counts, context lengths and licenses.

Any checkpoint of the Llama architecture can be trained; its shape comes from its config.json. The catalogue adds what a
config does not contain: the license, and whether the model is instruction-tuned.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from ft_service.catalog.licenses import LLAMA_3, LLAMA_3_1, LLAMA_3_2, LLAMA_3_2_VISION, LLAMA_3_3, License
from ft_service.errors import ModelError

_HUB_ORGANISATION = "meta-llama/"
_ANSWERING_FORMATS = {"alpaca", "chat"}
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names of the linear modules in a decoder layer."""
_ATTENTION_MAPS = {"q_proj", "k_proj", "v_proj", "o_proj"}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama decoder."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool = False

    def linear_shapes(self) -> list[tuple[str, int, int]]:
        """Name, out_features and in_features of each linear module in a decoder layer."""
        query = self.num_heads * self.head_dim
        key_value = self.num_kv_heads * self.head_dim
        return [
            ("q_proj", query, self.hidden_size),
            ("k_proj", key_value, self.hidden_size),
            ("v_proj", key_value, self.hidden_size),
            ("o_proj", self.hidden_size, query),
            ("gate_proj", self.intermediate_size, self.hidden_size),
            ("up_proj", self.intermediate_size, self.hidden_size),
            ("down_proj", self.hidden_size, self.intermediate_size),
        ]

    def parameter_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter, as in transformers and in the order of `named_parameters`."""
        norm = (self.hidden_size,)
        embedding = (self.vocab_size, self.hidden_size)
        shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", embedding)]
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            for name, rows, columns in self.linear_shapes():
                block = "self_attn" if name in _ATTENTION_MAPS else "mlp"
                shapes.append((f"{prefix}.{block}.{name}.weight", (rows, columns)))
            shapes.append((f"{prefix}.input_layernorm.weight", norm))
            shapes.append((f"{prefix}.post_attention_layernorm.weight", norm))
        shapes.append(("model.norm.weight", norm))
        if not self.tied_embeddings:
            shapes.append(("lm_head.weight", embedding))
        return shapes

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: its linear modules and two norms."""
        return sum(rows * columns for _, rows, columns in self.linear_shapes()) + 2 * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters: embedding, layers, final norm, and the head unless it is tied to the embedding."""
        embedding = self.vocab_size * self.hidden_size
        head = 0 if self.tied_embeddings else embedding
        return embedding + self.num_layers * self.layer_parameters + self.hidden_size + head


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a checkpoint's config.json describes. Raises `ModelError` if a size is missing.

    Optional keys default as in transformers: as many key/value heads as heads, a head width of hidden_size / heads, and
    an untied head.
    """
    try:
        hidden_size = config["hidden_size"]
        num_heads = config["num_attention_heads"]
        return ModelShape(
            hidden_size=hidden_size,
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or hidden_size // num_heads,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise ModelError(f"config.json: has no {error.args[0]}. Use the config.json of a Llama checkpoint.") from None


@dataclass(frozen=True)
class ModelFacts:
    """One published model."""

    id: str
    """Its id on the hub."""
    family: str
    """The release, such as "3.1"."""
    shape: ModelShape
    """Shape of the text decoder. For a vision model, of its text backbone without cross-attention and image encoder."""
    context_length: int
    """Tokens."""
    license: License
    instruct: bool
    vision: bool
    num_parameters: int
    """Parameters of the whole published checkpoint."""

    @property
    def title(self) -> str:
        """Name for prose, such as "Llama 3 8B Instruct". Starts with the license's `naming_prefix`."""
        return self.id.removeprefix(_HUB_ORGANISATION).removeprefix("Meta-").replace("-", " ")

    @property
    def text_backbone(self) -> str:
        """Id of the text model that a vision model is built on; the model's own id if it has no vision."""
        size = "8B" if self.shape == _8B else "70B"
        return f"{_HUB_ORGANISATION}Llama-3.1-{size}{'-Instruct' if self.instruct else ''}" if self.vision else self.id

    @property
    def short_name(self) -> str:
        """Name in adapter ids and over HTTP, such as "llama-3-8b-instruct"."""
        return self.title.replace(" ", "-").lower()


_1B = ModelShape(2048, 16, 32, 8, 64, 8192, 128_256, tied_embeddings=True)
_3B = ModelShape(3072, 28, 24, 8, 128, 8192, 128_256, tied_embeddings=True)
_8B = ModelShape(4096, 32, 32, 8, 128, 14_336, 128_256)
_70B = ModelShape(8192, 80, 64, 8, 128, 28_672, 128_256)
_405B = ModelShape(16_384, 126, 128, 8, 128, 53_248, 128_256)

_8K = 8192
_128K = 131_072


def _base_and_instruct(
    name: str, family: str, shape: ModelShape, context: int, license: License, parameters: int, vision: bool = False
) -> tuple[ModelFacts, ModelFacts]:
    base = ModelFacts(f"{_HUB_ORGANISATION}{name}", family, shape, context, license, False, vision, parameters)
    return base, replace(base, id=f"{base.id}-Instruct", instruct=True)


MODELS: tuple[ModelFacts, ...] = (
    *_base_and_instruct("Meta-Llama-3-8B", "3", _8B, _8K, LLAMA_3, 8_030_261_248),
    *_base_and_instruct("Meta-Llama-3-70B", "3", _70B, _8K, LLAMA_3, 70_553_706_496),
    *_base_and_instruct("Llama-3.1-8B", "3.1", _8B, _128K, LLAMA_3_1, 8_030_261_248),
    *_base_and_instruct("Llama-3.1-70B", "3.1", _70B, _128K, LLAMA_3_1, 70_553_706_496),
    *_base_and_instruct("Llama-3.1-405B", "3.1", _405B, _128K, LLAMA_3_1, 405_853_388_800),
    *_base_and_instruct("Llama-3.2-1B", "3.2", _1B, _128K, LLAMA_3_2, 1_235_814_400),
    *_base_and_instruct("Llama-3.2-3B", "3.2", _3B, _128K, LLAMA_3_2, 3_212_749_824),
    *_base_and_instruct("Llama-3.2-11B-Vision", "3.2", _8B, _128K, LLAMA_3_2_VISION, 10_670_220_835, vision=True),
    *_base_and_instruct("Llama-3.2-90B-Vision", "3.2", _70B, _128K, LLAMA_3_2_VISION, 88_593_355_323, vision=True),
    ModelFacts("meta-llama/Llama-3.3-70B-Instruct", "3.3", _70B, _128K, LLAMA_3_3, True, False, 70_553_706_496),
)


def find(base: str) -> ModelFacts | None:
    """The model with this hub id, ignoring case, with or without ``meta-llama/`` and ``Meta-``; None if unknown.

    The path of a folder is never a match, because a folder may contain anything.
    """
    name = base.lower().removeprefix(_HUB_ORGANISATION).removeprefix("meta-")
    return next((model for model in MODELS if model.short_name == name), None)


def find_within(base: str) -> ModelFacts | None:
    """The model whose name is part of the last component of a hub id or path, such as a quantised copy's; or None."""
    name = base.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
    contained = [model for model in MODELS if model.short_name in name]
    return max(contained, key=lambda model: len(model.short_name), default=None)


def short_name(base: str) -> str:
    """Name of a base (hub id, folder or URI) in adapter ids and over HTTP: lower case, without ``/``."""
    if facts := find(base):
        return facts.short_name
    place = base.partition("?")[0] if "://" in base else base  # a URI may end in options for its store
    return re.sub(r"[^a-z0-9.-]", "-", place.rstrip("/").rpartition("/")[2].lower())


def remarks(facts: ModelFacts, formats: Set[str]) -> list[str]:
    """Notes on probably unintended combinations of a base and data formats (alpaca, chat, text)."""
    notes = []
    if not facts.instruct and formats & _ANSWERING_FORMATS:
        notes.append(
            f"{facts.title} is not instruction-tuned, but the data contains instructions and answers. {facts.title} "
            f"Instruct already knows the chat format and is the usual choice (model.base: {facts.id}-Instruct)."
        )
    return notes
