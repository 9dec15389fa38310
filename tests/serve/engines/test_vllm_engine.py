"""Our settings and requests in vLLM's terms. What the engine answers is in test_engines.py, with the other engine's."""

import asyncio
import os
import signal
import threading
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from ft_service.errors import ServingError
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.engines.engine import GenerationRequest, RefusedRequestError, Sampling
from serve.settings import BaseSettings
from tests.worlds import SMALL, write_base

pytest.importorskip("vllm", reason="vLLM is not installed here: docs/serving.md, Engines")

from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.platforms import current_platform

from serve.engines.vllm_adapters import base_sites, bytes_of_slot
from serve.engines.vllm_engine import BNB_PLUGIN, GIB, VllmEngine, engine_args, sampling_params

SLOT_BYTES = GIB // 4
VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, ["the quick brown fox"], VOCAB_SIZE, SMALL)
    return folder


def settings_of(base: Path, **settings) -> BaseSettings:
    return BaseSettings(base=str(base), engine="vllm", **settings)


def test_settings_become_arguments(base):
    settings = settings_of(
        base, gpus=2, cache_gib=3, max_batch=6, max_context=128, adapter_gib=2.1, max_lora_rank=16, dtype="bfloat16"
    )
    args = engine_args(base, settings, SLOT_BYTES)
    assert args.tensor_parallel_size == 2
    assert args.distributed_executor_backend == "mp"
    assert args.kv_cache_memory_bytes == 3 * GIB // 2  # vLLM's is that of one GPU
    assert (args.max_num_seqs, args.max_model_len, args.dtype) == (6, 128, "bfloat16")
    assert (args.max_loras, args.max_cpu_loras, args.max_lora_rank) == (6, 8, 16)
    assert not args.enable_log_requests


def test_without_settings_the_checkpoint_decides(base):
    args = engine_args(base, settings_of(base), SLOT_BYTES)
    assert args.dtype == "float32"  # as stored; vLLM's own `auto` computes in another
    assert (args.tensor_parallel_size, args.distributed_executor_backend) == (1, "uni")
    assert args.max_model_len == -1  # what fits


def test_four_bits_need_the_plugin(base, monkeypatch):
    monkeypatch.setattr("serve.engines.vllm_engine.BNB_PLUGIN", "no-such-distribution")
    with pytest.raises(ServingError, match=r"precision = 'nf4'.*no-such-distribution"):
        engine_args(base, settings_of(base, precision="nf4"), SLOT_BYTES)
    assert BNB_PLUGIN == "vllm-bnb-plugin"


def test_a_slot_holds_the_largest_rank_of_every_layer(base):
    width, inner, num_layers = SMALL["hidden_size"], SMALL["intermediate_size"], SMALL["num_layers"]
    kv_width = width * SMALL["num_kv_heads"] // SMALL["num_heads"]
    per_layer = 2 * (width + width) + 2 * (width + kv_width) + 3 * (width + inner)
    sites = base_sites(base)
    vocab_size = sites["lm_head"].shape[0]
    assert bytes_of_slot(sites, 8, 2) == 2 * 8 * (num_layers * per_layer + 2 * (vocab_size + width))


def request_of(**changes) -> GenerationRequest:
    fields = {"id": "r", "prompt_ids": (1, 2), "adapter": None, "max_tokens": 5, "end_ids": frozenset({3, 999})}
    return GenerationRequest(**{**fields, **changes})


def test_sampling_is_translated_field_by_field():
    sampling = Sampling({7: -3.0}, 1.2, 0.3, 0.4, 0.8, 40, 0.9, 0.0, 11)
    params = sampling_params(request_of(sampling=sampling, logprobs=2, prompt_logprobs=1), VOCAB_SIZE, eos_id=4)
    assert params.logit_bias == {7: -3.0}
    assert (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) == (1.2, 0.3, 0.4)
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.seed) == (0.8, 40, 0.9, 0, 11)
    assert (params.logprobs, params.prompt_logprobs, params.max_tokens) == (2, 1, 5)
    assert params.stop_token_ids == [3] and params.ignore_eos  # an id beyond the vocabulary never comes
    params = sampling_params(request_of(sampling=Sampling(top_k=40, min_p=0.05)), VOCAB_SIZE, eos_id=4)
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.seed) == (1, 40, 1, 0.05, None)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0, min_p=0.5, top_p=0.5),
        Sampling(temperature=2, top_p=0),
        Sampling(temperature=2, top_k=1),
        Sampling(temperature=1e-6),
    ],
)
def test_the_likeliest_token_is_greedy(sampling):
    assert sampling_params(request_of(sampling=sampling), VOCAB_SIZE, eos_id=4).temperature == 0


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (Sampling(temperature=0.005), "temperature"),  # vLLM would draw with 0.01
        (Sampling(temperature=2.5), "temperature"),
        (Sampling(min_p=0.1, top_p=0.9), "min_p"),  # vLLM would apply them the other way round
        (Sampling(presence_penalty=3), "presence_penalty"),
        (Sampling(frequency_penalty=-3), "frequency_penalty"),
        (Sampling(repetition_penalty=0), "repetition_penalty"),
    ],
)
def test_a_distribution_that_vllm_cannot_draw_from_is_refused_by_name(sampling, param):
    with pytest.raises(RefusedRequestError, match=param) as error:
        sampling_params(request_of(sampling=sampling), VOCAB_SIZE, eos_id=4)
    assert error.value.param == param


def test_no_field_of_a_request_is_left_out():
    """A new field needs a place in `sampling_params`, or a refusal."""
    assert [field.name for field in fields(Sampling)] == [
        "logit_bias",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
    ]


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_every_seed_is_a_seed(seed):
    params = sampling_params(request_of(sampling=Sampling(seed=seed)), VOCAB_SIZE, eos_id=4)
    assert params.seed is not None and 0 <= params.seed < 2**63


def test_json_may_end_with_the_end_of_text_of_the_tokenizer():
    params = sampling_params(request_of(json_schema="{}"), VOCAB_SIZE, eos_id=4)
    assert params.stop_token_ids == [3, 4]
    assert params.structured_outputs.json["type"] == "object"
    assert params.structured_outputs.json["x-guidance"]["item_separator"] == ", "


def test_text_beside_a_schema_is_a_grammar():
    structured = sampling_params(request_of(json_schema="{}", text_allowed=True), VOCAB_SIZE, eos_id=4)
    assert structured.structured_outputs.grammar.startswith("start: TEXT | json")


def test_a_schema_that_is_none_is_refused():
    with pytest.raises(RefusedRequestError, match="response_format"):
        sampling_params(request_of(json_schema="{"), VOCAB_SIZE, eos_id=4)


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the kernels for GPUs are others")
def test_rows_of_the_base_get_nothing_from_the_adapter_of_the_last_slot():
    slots = torch.tensor([-1, 0])
    output = torch.zeros(2, 5)
    punica_cpu.bgmv_expand(torch.ones(2, 3), torch.ones(1, 1, 5, 3), output, slots, add_inputs=True)
    lora_ops.bgmv_expand_slice(torch.ones(2, 3), torch.ones(1, 1, 2, 3), output, slots, 0, 2, True)
    assert output.tolist() == [[0] * 5, [6, 6, 3, 3, 3]]


def test_an_engine_whose_process_has_died_says_so(tmp_path):
    sizes = {**SMALL, "num_heads": 2, "num_kv_heads": 1}
    write_base(tmp_path, ["the quick brown fox"], VOCAB_SIZE, sizes)
    engine = VllmEngine(tmp_path, Registry(Storage(str(tmp_path))), settings_of(tmp_path, cache_gib=0.05))
    has_begun = threading.Event()

    async def die_in_between() -> None:
        answer = engine.generate(request_of(max_tokens=1000, end_ids=frozenset()))
        assert (await anext(answer)).token_ids
        has_begun.set()
        for process in engine._llm.engine_core.resources.engine_manager.processes:
            os.kill(process.pid, signal.SIGKILL)
        async for _ in answer:
            pass

    try:
        engine.stats()
        with pytest.raises(ServingError, match="engine has ended"):
            asyncio.run(die_in_between())
        assert has_begun.is_set()
        with pytest.raises(ServingError, match="engine has ended"):
            engine.stats()  # what the replica's health check calls
    finally:
        asyncio.run(engine.close())
