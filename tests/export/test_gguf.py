"""GGUF: gguf's own reader, transformers' reader, and arithmetic on paper find the same model in the file."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ft_service.errors import ModelError
from ft_service.export.gguf_file import ROPE_FREQS, permuted, rope_factors, write_gguf
from tests.worlds import made_up_texts, write_base

SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 128}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_base(folder / "fp32", made_up_texts(20), 500, SIZES)
    model = LlamaForCausalLM.from_pretrained(folder / "fp32", dtype=torch.bfloat16)
    model.save_pretrained(folder / "bf16")
    AutoTokenizer.from_pretrained(folder / "fp32").save_pretrained(folder / "bf16")
    write_gguf(folder / "bf16", folder / "model.gguf", "my-model")
    return folder


def value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None, key
    return field.contents()


def tensors(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def unpermuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The other direction, element by element: rows 0, 2, 4, ... of each head, then rows 1, 3, 5, ..."""
    heads = np.split(weight, num_heads)
    return np.concatenate([np.concatenate([head[0::2], head[1::2]]) for head in heads])


def test_every_tensor_is_read_back_equal(world: Path) -> None:
    reader = gguf.GGUFReader(world / "model.gguf")
    found = tensors(reader)
    model = LlamaForCausalLM.from_pretrained(world / "bf16", dtype=torch.bfloat16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_layers"])
    expected = {}
    for name, parameter in model.named_parameters():
        expected[names.get_name(name, try_suffixes=(".weight",))] = parameter.detach().float().numpy()
    assert found.keys() == expected.keys()
    assert "output.weight" not in found  # tied
    for name, tensor in expected.items():
        heads = SIZES["num_heads"] if "attn_q" in name else SIZES["num_kv_heads"] if "attn_k." in name else None
        assert np.array_equal(unpermuted(found[name], heads) if heads else found[name], tensor), name
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kind for name, kind in types.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in types.items() if "norm" not in name} == {"BF16"}


def test_hyperparameters_are_read_back(world: Path) -> None:
    reader = gguf.GGUFReader(world / "model.gguf")
    config = LlamaConfig.from_pretrained(world / "bf16")
    assert value(reader, "general.architecture") == "llama"
    assert value(reader, "general.name") == "my-model"
    assert value(reader, "general.file_type") == gguf.LlamaFileType.MOSTLY_BF16
    found = {key: value(reader, f"llama.{key}") for key in ("block_count", "context_length", "embedding_length")}
    assert found == {"block_count": 2, "context_length": 2048, "embedding_length": 64}
    assert value(reader, "llama.feed_forward_length") == 128
    assert value(reader, "llama.attention.head_count") == 4
    assert value(reader, "llama.attention.head_count_kv") == 2
    assert value(reader, "llama.rope.dimension_count") == 16
    assert value(reader, "llama.rope.freq_base") == config.rope_parameters["rope_theta"]
    assert value(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(config.rms_norm_eps)
    assert value(reader, "llama.vocab_size") == config.vocab_size


def test_tokenizer_is_read_back(world: Path) -> None:
    reader = gguf.GGUFReader(world / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(world / "bf16")
    ids = range(len(tokenizer))
    assert value(reader, "tokenizer.ggml.tokens") == tokenizer.convert_ids_to_tokens(list(ids))
    types = value(reader, "tokenizer.ggml.token_type")
    special = {number for number in ids if types[number] == gguf.TokenType.CONTROL}
    assert special == {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    merges = json.loads((world / "bf16/tokenizer.json").read_text())["model"]["merges"]
    assert value(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.pre") == "llama-bpe"
    assert value(reader, "tokenizer.ggml.bos_token_id") == tokenizer.bos_token_id
    assert value(reader, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert value(reader, "tokenizer.ggml.eot_token_id") == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert value(reader, "tokenizer.ggml.add_bos_token") is True
    assert value(reader, "tokenizer.chat_template") == tokenizer.chat_template


def test_transformers_loads_the_file_and_answers_the_same(world: Path) -> None:
    ours = LlamaForCausalLM.from_pretrained(world / "bf16", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(world, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    texts = ["red cat\n\nriver 12345", "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"]
    mine = AutoTokenizer.from_pretrained(world / "bf16")
    read = AutoTokenizer.from_pretrained(world, gguf_file="model.gguf")
    for text in texts:
        assert read(text, add_special_tokens=False).input_ids == mine(text, add_special_tokens=False).input_ids


def test_other_types(world: Path, tmp_path: Path) -> None:
    exact = tensors(gguf.GGUFReader(world / "model.gguf"))
    write_gguf(world / "fp32", tmp_path / "same.gguf", "m")
    reader = gguf.GGUFReader(tmp_path / "same.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    embedding = LlamaForCausalLM.from_pretrained(world / "fp32").get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(tensors(reader)["token_embd.weight"], embedding)
    write_gguf(world / "fp32", tmp_path / "bf16.gguf", "m", "bf16")
    found = tensors(gguf.GGUFReader(tmp_path / "bf16.gguf"))
    assert all(np.array_equal(found[name], exact[name]) for name in exact if "norm" not in name)
    write_gguf(world / "bf16", tmp_path / "q8.gguf", "m", "q8_0")
    found = tensors(gguf.GGUFReader(tmp_path / "q8.gguf"))
    for name, tensor in exact.items():
        # Blocks of 32 values share a scale of their largest / 127, in float16: off by half a step and its rounding.
        assert np.abs(found[name] - tensor).max() <= np.abs(tensor).max() * (0.5 / 127 + 2**-11), name


# -- the rotary embedding --------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_permuted_rows_rotate_in_neighbouring_pairs_as_halves_did(num_heads: int, half: int, seed: int) -> None:
    """R q by transformers' rule, permuted, equals q permuted and rotated by llama.cpp's rule."""
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(num_heads * 2 * half, 1))
    angles = rng.uniform(0, 6, size=half)
    by_halves = []
    for head in np.split(query[:, 0], num_heads):
        a = head[:half]
        b = head[half:]
        by_halves += [*(a * np.cos(angles) - b * np.sin(angles)), *(b * np.cos(angles) + a * np.sin(angles))]
    by_pairs = []
    for head in np.split(permuted(query, num_heads)[:, 0], num_heads):
        for angle, (a, b) in zip(angles, head.reshape(half, 2), strict=True):
            by_pairs += [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    assert np.allclose(permuted(np.array(by_halves)[:, None], num_heads)[:, 0], by_pairs)
    assert np.array_equal(unpermuted(permuted(query, num_heads), num_heads), query)


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64), (4.0, 16)])
def test_frequency_factors_are_those_of_transformers(factor: float, head_dim: int) -> None:
    rope = LLAMA_3_1 | {"factor": factor}
    config = LlamaConfig(
        hidden_size=head_dim * 4, num_attention_heads=4, max_position_embeddings=131_072, rope_parameters=rope
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 500_000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factors = rope_factors(rope, head_dim)
    assert factors is not None and factors.dtype == np.float32
    np.testing.assert_allclose(factors, (plain / scaled.double()).numpy(), rtol=1e-5)
    assert factors.min() == 1.0 and factors.max() == factor


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_factors_are_in_the_file_wherever_the_config_has_them(world: Path, tmp_path: Path, place: str) -> None:
    folder = changed(world / "bf16", tmp_path / "model", {"rope_parameters": None, place: LLAMA_3_1, "rope_theta": 5e5})
    write_gguf(folder, tmp_path / "out.gguf", "m")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    expected = rope_factors(LLAMA_3_1, 16)
    assert expected is not None and np.array_equal(tensors(reader)[ROPE_FREQS], expected)
    assert value(reader, "llama.rope.freq_base") == 500_000.0


# -- what is refused -------------------------------------------------------------------------------------------------


def changed(source: Path, folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


def test_another_scaling_is_rejected(world: Path, tmp_path: Path) -> None:
    folder = changed(world / "bf16", tmp_path / "model", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}})
    with pytest.raises(ModelError, match="scaled by 'yarn'"):
        write_gguf(folder, tmp_path / "out.gguf", "m")


def test_another_tokenizer_is_rejected(world: Path, tmp_path: Path) -> None:
    folder = changed(world / "bf16", tmp_path / "model", {})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="does not split text as Llama 3's"):
        write_gguf(folder, tmp_path / "out.gguf", "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        write_gguf(folder, tmp_path / "out.gguf", "m")
