"""The Llama 3 family as facts: shapes, parameter counts, context, and what each license asks. No torch, no network.

Any Llama-architecture checkpoint can be trained: its shape comes from its own config.json. What the catalogue adds is
what no config says: the license, its duties of naming and attribution, and whether a model was tuned to give answers.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from ft_service.errors import ModelError

_HUB_ORGANISATION = "meta-llama/"
_ANSWERING_FORMATS = {"alpaca", "chat"}
_ATTENTION_MAPS = {"q_proj", "k_proj", "v_proj", "o_proj"}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama decoder; everything that depends on size is computed from them."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool = False

    def linear_shapes(self) -> list[tuple[str, int, int]]:
        """Name, out_features and in_features of a layer's linear maps."""
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
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
        """Every parameter by the name transformers gives it, in the order of `named_parameters`, with its shape."""
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
        """Parameters of one decoder layer: its linear maps and two norms."""
        return sum(rows * columns for _, rows, columns in self.linear_shapes()) + 2 * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters: embedding, layers, final norm, and the head unless it is the embedding."""
        embedding = self.vocab_size * self.hidden_size
        head = 0 if self.tied_embeddings else embedding
        return embedding + self.num_layers * self.layer_parameters + self.hidden_size + head


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a checkpoint's config.json describes; raises `ModelError` when a size is missing.

    What may be absent has the meaning transformers gives it: as many key/value heads as heads, a head width of
    hidden_size / heads, and an untied head.
    """
    try:
        hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
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
class License:
    """What a model's license asks of whoever publishes a derived model. A summary, no legal advice: the text rules."""

    id: str
    """As model cards on the hub name it."""
    name: str
    text_url: str
    acceptable_use_url: str
    naming_prefix: str
    """The name of a derived model that is distributed or made available begins with it."""
    display: str
    """To be shown prominently on a related website, user interface, blog post, about page or documentation."""
    attribution: str
    """To be kept in a "Notice" text file within every copy that is distributed."""
    duties: tuple[str, ...]


def _community_license(
    id: str, release: str, released: str, site: str, naming_prefix: str, display: str, *further_duties: str
) -> License:
    name = f"{release} Community License"
    attribution = f"{release} is licensed under the {name}, Copyright © Meta Platforms, Inc. All Rights Reserved."
    return License(
        id=id,
        name=name,
        text_url=f"{site}/license",
        acceptable_use_url=f"{site}/use-policy",
        naming_prefix=naming_prefix,
        display=display,
        attribution=attribution,
        duties=(
            f"Pass on a copy of the {name} with the model.",
            f"Show “{display}” prominently on a related website, interface, blog post, about page or documentation.",
            f"Begin the name of a model that is distributed or made available with “{naming_prefix}”.",
            f"Keep in a “Notice” text file with every copy: “{attribution}”",
            f"Keep to the law and to the Acceptable Use Policy: {site}/use-policy",
            f"Whoever had more than 700 million monthly active users in the month before {released} needs a license of "
            "its own from Meta.",
            *further_duties,
        ),
    )


_OUTPUTS_NAME_MODELS = "The same holds for the name of a model trained with outputs of this one."

LLAMA_3 = _community_license(
    "llama3",
    "Meta Llama 3",
    "18 April 2024",
    "https://www.llama.com/llama3",
    "Llama 3",
    "Built with Meta Llama 3",
    "Do not use the model or its outputs to improve any other large language model than Llama 3 and its derivatives.",
)
LLAMA_3_1 = _community_license(
    "llama3.1",
    "Llama 3.1",
    "23 July 2024",
    "https://www.llama.com/llama3_1",
    "Llama",
    "Built with Llama",
    _OUTPUTS_NAME_MODELS,
)
LLAMA_3_2 = _community_license(
    "llama3.2",
    "Llama 3.2",
    "25 September 2024",
    "https://www.llama.com/llama3_2",
    "Llama",
    "Built with Llama",
    _OUTPUTS_NAME_MODELS,
)
LLAMA_3_2_VISION = replace(
    LLAMA_3_2,
    duties=(
        *LLAMA_3_2.duties,
        "The vision models are not licensed to individuals domiciled in the European Union, nor to companies with "
        "their principal place of business there; end users of products built on them are not concerned.",
    ),
)
LLAMA_3_3 = _community_license(
    "llama3.3",
    "Llama 3.3",
    "6 December 2024",
    "https://www.llama.com/llama3_3",
    "Llama",
    "Built with Llama",
    _OUTPUTS_NAME_MODELS,
)


@dataclass(frozen=True)
class ModelFacts:
    """One published model."""

    id: str
    """Its id on the hub."""
    family: str
    """Release, such as "3.1"."""
    shape: ModelShape
    """Of the text decoder; for a vision model that of its text backbone, without cross-attention and image encoder."""
    context_length: int
    """Tokens."""
    license: License
    instruct: bool
    vision: bool
    num_parameters: int
    """Of the whole checkpoint, as published."""

    @property
    def title(self) -> str:
        """Its name in prose, which begins as its license wants derived names to: "Llama 3 8B Instruct"."""
        return self.id.removeprefix(_HUB_ORGANISATION).removeprefix("Meta-").replace("-", " ")

    @property
    def short_name(self) -> str:
        """Its name in adapter ids and over HTTP: "llama-3-8b-instruct"."""
        return self.title.replace(" ", "-").lower()


_1B = ModelShape(2048, 16, 32, 8, 64, 8192, 128_256, tied_embeddings=True)
_3B = ModelShape(3072, 28, 24, 8, 128, 8192, 128_256, tied_embeddings=True)
_8B = ModelShape(4096, 32, 32, 8, 128, 14_336, 128_256)
_70B = ModelShape(8192, 80, 64, 8, 128, 28_672, 128_256)
_405B = ModelShape(16_384, 126, 128, 8, 128, 53_248, 128_256)

_8K, _128K = 8192, 131_072


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
    """The model of a hub id, whatever its case, with or without ``meta-llama/`` and ``Meta-``; None if there is none.

    A folder is not looked up by its name: it may hold anything.
    """
    name = base.lower().removeprefix(_HUB_ORGANISATION).removeprefix("meta-")
    return next((model for model in MODELS if model.short_name == name), None)


def short_name(base: str) -> str:
    """How a base, hub id or folder, is named in adapter ids and over HTTP: lower case, no ``/``."""
    if facts := find(base):
        return facts.short_name
    place = base.partition("?")[0] if "://" in base else base  # a URI may end in settings of its store
    return re.sub(r"[^a-z0-9.-]", "-", place.rstrip("/").rpartition("/")[2].lower())


def remarks(facts: ModelFacts, formats: Set[str]) -> list[str]:
    """What may not have been meant, when this base is trained on data of these formats (alpaca, chat, text)."""
    found = []
    if not facts.instruct and formats & _ANSWERING_FORMATS:
        found.append(
            f"{facts.title} is a base model, and the data teaches answers. {facts.title} Instruct already answers and "
            f"knows the chat tokens: it is the usual start (model.base: {facts.id}-Instruct)."
        )
    if facts.vision:
        backbone = "8B" if facts.shape == _8B else "70B"
        found.append(
            f"{facts.title} reads images as well. Only text is trained here, on LlamaForCausalLM checkpoints, so its "
            f"checkpoint is refused. Llama 3.1 {backbone} is its text half."
        )
    return found
