"""The catalogue against published figures, and against transformers models of the same configuration."""

import pytest
import torch
from ray._private.accelerators import NvidiaGPUAcceleratorManager
from transformers import LlamaConfig, LlamaForCausalLM, MllamaConfig, MllamaForConditionalGeneration

from ft_service.catalog import models
from ft_service.catalog.gpus import find_gpu
from ft_service.catalog.models import MODELS, ModelFacts, ModelShape
from ft_service.cluster.room import ray_accelerator_type
from ft_service.errors import ModelError

TEXT_MODELS = [model for model in MODELS if not model.vision]
TEXT_SHAPES = {model.shape: model for model in TEXT_MODELS}.values()

# "Total parameters" of the safetensors files on the hub.
PUBLISHED_PARAMETERS = {
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.2-11B-Vision-Instruct": 10_670_220_835,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
}

# The section `vision_config` of both vision models; what is not named is transformers' default.
VISION_CONFIG = {
    "image_size": 560,
    "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
}


def config_of(shape: ModelShape) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied_embeddings,
    )


@pytest.mark.parametrize("model_id", PUBLISHED_PARAMETERS)
def test_the_catalogue_has_the_published_parameter_counts(model_id: str) -> None:
    facts = models.find(model_id)
    assert facts and facts.id == model_id and facts.num_parameters == PUBLISHED_PARAMETERS[model_id]


@pytest.mark.parametrize("facts", TEXT_MODELS, ids=lambda facts: facts.short_name)
def test_the_shape_gives_the_published_parameter_count(facts: ModelFacts) -> None:
    assert facts.shape.num_parameters == facts.num_parameters


@pytest.mark.parametrize("facts", TEXT_SHAPES, ids=lambda facts: facts.short_name)
def test_the_shape_gives_the_parameter_count_of_transformers(facts: ModelFacts) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(facts.shape))
    assert facts.shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    layer = model.model.layers[0]
    assert facts.shape.layer_parameters == sum(parameter.numel() for parameter in layer.parameters())
    linear = {name.rpartition(".")[2]: module for name, module in layer.named_modules() if "_proj" in name}
    assert facts.shape.linear_shapes() == [(name, m.out_features, m.in_features) for name, m in linear.items()]


@pytest.mark.parametrize(
    ("model_id", "cross_attention_layers"),
    [
        ("meta-llama/Llama-3.2-11B-Vision", range(3, 40, 5)),
        ("meta-llama/Llama-3.2-90B-Vision", range(3, 100, 5)),
    ],
)
def test_vision_models_have_the_parameter_count_of_transformers(model_id: str, cross_attention_layers: range) -> None:
    facts = models.find(model_id)
    assert facts
    text = {
        **config_of(facts.shape).to_diff_dict(),
        "model_type": "mllama_text_model",
        "num_hidden_layers": facts.shape.num_layers + len(cross_attention_layers),
        "cross_attention_layers": list(cross_attention_layers),
        "vocab_size": facts.shape.vocab_size,
        "pad_token_id": 128_004,
    }
    config = MllamaConfig(text_config=text, vision_config=VISION_CONFIG)
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    assert facts.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_missing_config_keys_default_as_in_transformers() -> None:
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 128,
    }
    shape = models.shape_from_config(config)
    assert (shape.num_kv_heads, shape.head_dim, shape.tied_embeddings) == (4, 16, False)
    model = LlamaForCausalLM(LlamaConfig(**config))
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_shape_of_a_transformers_config_is_read_correctly() -> None:
    for facts in TEXT_MODELS:
        assert models.shape_from_config(config_of(facts.shape).to_dict()) == facts.shape


def test_a_missing_size_is_named_in_the_error() -> None:
    with pytest.raises(ModelError, match="intermediate_size"):
        models.shape_from_config({"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9})


@pytest.mark.parametrize(
    "base",
    [
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "META-LLAMA/llama-3.1-8b-instruct",
        "Llama-3.1-8B-Instruct",
    ],
)
def test_a_model_is_found_by_each_of_its_names(base: str) -> None:
    facts = models.find(base)
    assert facts and facts.id == "meta-llama/Llama-3.1-8B-Instruct"
    assert models.short_name(base) == "llama-3.1-8b-instruct"


@pytest.mark.parametrize("base", ["./Llama-3.1-8B", "/models/Llama-3.1-8B", "someone/Llama-3.1-8B", "Llama-3.1-9B", ""])
def test_folders_and_other_models_are_not_found(base: str) -> None:
    assert models.find(base) is None


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("someone/My_Model v2", "my-model-v2"),
        ("/models/tiny.llama/", "tiny.llama"),
        ("quickstart/base", "base"),
    ],
)
def test_other_models_are_named_after_the_end_of_their_path(base: str, name: str) -> None:
    assert models.short_name(base) == name


@pytest.mark.parametrize("facts", MODELS, ids=lambda facts: facts.short_name)
def test_names_start_with_the_prefix_of_the_license(facts: ModelFacts) -> None:
    prefix = facts.license.naming_prefix
    assert facts.title.startswith(prefix)
    assert facts.short_name.startswith(prefix.lower().replace(" ", "-"))


def test_short_names_are_unique() -> None:
    assert len({facts.short_name for facts in MODELS}) == len(MODELS)


@pytest.mark.parametrize(
    ("model_id", "prefix", "display", "attribution"),
    [
        (
            "meta-llama/Meta-Llama-3-8B",
            "Llama 3",
            "Built with Meta Llama 3",
            "Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
            "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        ),
        (
            "meta-llama/Llama-3.1-405B",
            "Llama",
            "Built with Llama",
            "Llama 3.1 is licensed under the Llama 3.1 Community License, "
            "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        ),
    ],
)
def test_notices_use_the_wording_of_the_licenses(model_id: str, prefix: str, display: str, attribution: str) -> None:
    facts = models.find(model_id)
    assert facts
    terms = facts.license
    assert (terms.naming_prefix, terms.display, terms.attribution) == (prefix, display, attribution)
    assert all(any(text in duty for duty in terms.duties) for text in (prefix, display, attribution, "700 million"))


def test_only_llama_3_forbids_improving_other_models() -> None:
    forbids = {facts.family for facts in MODELS if any("Do not use" in duty for duty in facts.license.duties)}
    assert forbids == {"3"}


def test_only_vision_licenses_mention_the_european_union() -> None:
    for facts in MODELS:
        assert any("European Union" in duty for duty in facts.license.duties) == facts.vision


@pytest.mark.parametrize(
    ("base", "formats", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", {"alpaca"}, "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Llama-3.2-1B", {"text", "chat"}, "meta-llama/Llama-3.2-1B-Instruct"),
    ],
)
def test_an_unusual_base_gets_a_remark(base: str, formats: set[str], expected: str) -> None:
    facts = models.find(base)
    assert facts
    (remark,) = models.remarks(facts, formats)
    assert expected in remark


@pytest.mark.parametrize(
    ("base", "backbone"),
    [
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Llama-3.2-90B-Vision", "meta-llama/Llama-3.1-70B"),
    ],
)
def test_a_vision_model_names_its_text_backbone(base: str, backbone: str) -> None:
    facts = models.find(base)
    assert facts and facts.text_backbone == backbone and models.find(backbone)


@pytest.mark.parametrize(
    ("base", "formats"), [("meta-llama/Llama-3.1-8B", {"text"}), ("meta-llama/Llama-3.3-70B-Instruct", {"chat"})]
)
def test_a_usual_base_gets_no_remark(base: str, formats: set[str]) -> None:
    facts = models.find(base)
    assert facts and models.remarks(facts, formats) == []


def test_a_base_on_object_storage_is_named_after_its_folder() -> None:
    assert models.short_name("s3://bucket/models/My_Llama/?endpoint_override=host:9000&scheme=http") == "my-llama"


@pytest.mark.parametrize(
    ("product", "asked"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA H100 80GB HBM3", "H100-80G"),
        ("NVIDIA A40", "a40"),
    ],
)
def test_workers_are_requested_by_the_name_that_ray_gives_the_card(product: str, asked: str) -> None:
    rays_name = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(product)
    assert ray_accelerator_type(asked) == rays_name
    gpu = find_gpu(rays_name)
    assert gpu and gpu.name == rays_name
