"""An engine on transformers: continuous batching of requests for one base and for any of its adapters.

A thread owns the model (`serve.engines.batching.loop`). Event loops only wait for tokens and turn them into text.
"""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ft_service.errors import FtError, ServingError
from ft_service.model.base import fingerprint, load_tokenizer, read_config
from ft_service.model.light_imports import plain_shapes
from ft_service.registry.registry import Registry
from serve.engines.batching.adapters import AdapterStore
from serve.engines.batching.attention import PAGE_TOKENS, KeyValueStore, bytes_per_block, reads_pages
from serve.engines.batching.cache import BlockPool
from serve.engines.batching.forward import Forward
from serve.engines.batching.grammar import Grammars
from serve.engines.batching.loop import Answer, Event, ModelLoop
from serve.engines.batching.lora_layers import install_lora_layers
from serve.engines.batching.packed_linear import pack_linear_layers
from serve.engines.batching.scheduler import Scheduler
from serve.engines.batching.step import Grammar, ScoredToken
from serve.engines.batching.threads import use_threads
from serve.engines.engine import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    RefusedRequestError,
    TokenLogprob,
)
from serve.engines.text_stream import TextStream, TokenBytes
from serve.settings import BaseSettings

GIB = 2**30
CPU_CACHE_GIB = 1.0
"""Keys and values of a replica on a CPU, unless `cache_gib` says otherwise."""
_CACHE_SHARE = 0.85
"""Of the GPU memory that weights and adapters leave; the rest is for activations and logits."""
_SCORED_LOGITS_BYTES = 256 * 2**20
"""Most fp32 logits of prompt tokens in a step."""
_SHORT_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepLimits:
    """Sizes that suit a kind of device."""

    block_size: int
    """Tokens of a block of keys and values."""
    prompt_tokens_per_step: int
    """A long prompt delays others by the time that so many tokens take, in each step."""


CPU_LIMITS = StepLimits(block_size=16, prompt_tokens_per_step=128)
GPU_LIMITS = StepLimits(block_size=16, prompt_tokens_per_step=512)


class TransformersEngine:
    """One base on the GPUs of this process, or on the CPU, with all its adapters. See `serve.engines.engine.Engine`."""

    def __init__(
        self, folder: Path, registry: Registry, settings: BaseSettings, limits: StepLimits | None = None
    ) -> None:
        num_threads = torch.get_num_threads()
        # A thread that ends: of those that stay, only the model's has parallel operations (`batching.threads`).
        with ThreadPoolExecutor(1, "load", use_threads, (num_threads,)) as loading:
            loading.submit(self._load, folder, registry, settings, limits, num_threads).result()
        self._loop.start()

    def _load(
        self, folder: Path, registry: Registry, settings: BaseSettings, limits: StepLimits | None, num_threads: int
    ) -> None:
        model = _load_model(folder, settings)
        devices = [layer.self_attn.q_proj.weight.device for layer in model.model.layers]
        limits = limits or _limits(devices[0], model.dtype)
        tokenizer = load_tokenizer(folder)
        self.info = _info(model, folder, settings)
        self._tokenizer = tokenizer
        self._token_bytes = TokenBytes.of(tokenizer)
        # Its own tokenizer: llguidance's wrapper may switch settings of the one it gets.
        self._make_grammars = partial(_grammars, folder, self.info.vocab_size)
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()

        adapter_bytes = int(settings.adapter_gib * GIB)
        pack_linear_layers(model)
        lora = install_lora_layers(model)
        self._adapters = AdapterStore(registry, lora, self.info.base_fingerprint, adapter_bytes, pinned=settings.pinned)
        self._load_pinned(registry, settings.pinned)

        block_bytes = bytes_per_block(model.config, model.dtype, limits.block_size)
        num_blocks = int(_cache_bytes(settings, devices, adapter_bytes) // block_bytes)
        if num_blocks < 1:
            raise ServingError(
                f"cache_gib = {settings.cache_gib}: {limits.block_size} tokens need {block_bytes:,} bytes. Raise it."
            )
        store = KeyValueStore(devices, model.config, model.dtype, num_blocks, limits.block_size)
        scheduler: Scheduler[Answer] = Scheduler(
            BlockPool(num_blocks),
            limits.block_size,
            settings.max_batch,
            limits.prompt_tokens_per_step,
            max(_SCORED_LOGITS_BYTES // (4 * self.info.vocab_size), 1),
        )
        self._most_tokens = scheduler.max_tokens
        self._num_preparing = 0
        self._loop = ModelLoop(scheduler, store, Forward(model, store, lora), self._adapters, num_threads)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """See `serve.engines.engine.Engine.generate`."""
        arrived_at = time.perf_counter()
        request = self._with_max_tokens(request)
        self._check(request)
        answer = await self._prepare(request)
        answer.arrived_at = arrived_at
        text = _AnswerText(request, self._tokenizer, self._token_bytes)
        self._loop.begin(answer)
        try:
            while text.finish_reason is None:
                events = await answer.take()
                chunk = text.chunk(events)
                error = next((event.error for event in events if event.error), None)
                if error is None or chunk.token_ids:
                    yield chunk
                if error is not None and text.finish_reason is None:
                    raise error
        finally:
            self._loop.cancel(answer)

    async def unload(self, adapter_digest: str) -> None:
        """See `serve.engines.engine.Engine.unload`."""
        self._adapters.unload(adapter_digest)

    def stats(self) -> EngineStats:
        """See `serve.engines.engine.Engine.stats`."""
        scheduler = self._loop.scheduler
        adapters = self._adapters.stats()
        counters = {
            **self._loop.counters,
            "preemptions": scheduler.num_preemptions,
            "adapter_loads": adapters.loads,
            "adapter_load_seconds": adapters.load_seconds,
        }
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + self._num_preparing,
            cache_used=scheduler.pool.num_used / scheduler.pool.num_blocks,
            loaded_adapters=adapters.loaded,
            adapter_bytes=adapters.bytes,
            counters=counters,
        )

    async def close(self) -> None:
        """See `serve.engines.engine.Engine.close`."""
        await asyncio.to_thread(self._loop.stop)
        await asyncio.to_thread(self._adapters.close)

    def _with_max_tokens(self, request: GenerationRequest) -> GenerationRequest:
        if request.max_tokens is not None:
            return request
        room = min(self.info.context_length, self._most_tokens) - len(request.prompt_ids)
        return replace(request, max_tokens=max(room, 1))

    def _check(self, request: GenerationRequest) -> None:
        """What one request gets wrong must not fail a step that others share."""
        assert request.max_tokens is not None
        num_tokens = len(request.prompt_ids) + request.max_tokens
        vocab_size = self.info.vocab_size
        if not request.prompt_ids:
            raise RefusedRequestError("prompt: has no tokens.", "prompt")
        if num_tokens > self.info.context_length:
            message = f"{num_tokens} tokens of prompt and answer; this model takes {self.info.context_length}."
            raise RefusedRequestError(message, "max_tokens")
        if num_tokens > self._most_tokens:
            message = (
                f"{num_tokens} tokens of prompt and answer; the cache of this server has room for "
                f"{self._most_tokens}. Ask for fewer, or raise cache_gib."
            )
            raise RefusedRequestError(message, "max_tokens")
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab_size:
            raise RefusedRequestError(f"prompt: token ids go from 0 to {vocab_size - 1}.", "prompt")
        if any(not 0 <= token_id < vocab_size for token_id in request.sampling.logit_bias):
            raise RefusedRequestError(f"logit_bias: token ids go from 0 to {vocab_size - 1}.", "logit_bias")

    async def _prepare(self, request: GenerationRequest) -> "Answer":
        """Load what the request needs, off the model thread."""
        self._num_preparing += 1
        try:
            grammar = None
            if request.json_schema is not None:
                grammar = await asyncio.to_thread(self._grammar, request, request.json_schema)
            adapter = await self._adapters.acquire_async(request.adapter) if request.adapter else None
        finally:
            self._num_preparing -= 1
        return Answer.of(request, adapter, grammar)

    def _grammar(self, request: GenerationRequest, schema: str) -> Grammar:
        with self._grammars_lock:
            if self._grammars is None:
                self._grammars = self._make_grammars()
            grammars = self._grammars
        end_ids = [token_id for token_id in request.end_ids if token_id < self.info.vocab_size]
        return grammars.json(schema, end_ids, request.text_allowed)

    def _load_pinned(self, registry: Registry, adapter_ids: Iterable[str]) -> None:
        for adapter_id in adapter_ids:
            try:
                self._adapters.release(self._adapters.acquire(registry.resolve(adapter_id)))
            except FtError as error:  # the other models are served
                logger.error("pinned adapter %s is not loaded: %s", adapter_id, error)


class _AnswerText:
    """Turns tokens into text, up to a stop string."""

    def __init__(self, request: GenerationRequest, tokenizer: Any, token_bytes: TokenBytes) -> None:
        self.finish_reason: FinishReason | None = None
        self._request = request
        self._wants_prompt_logprobs = request.prompt_logprobs is not None
        self._token_bytes = token_bytes
        self._text = TextStream(tokenizer, request.stop)

    def chunk(self, events: Iterable[Event]) -> GenerationChunk:
        text = ""
        token_ids = []
        logprobs = []
        prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        cached_tokens = 0
        queued_seconds = None
        for event in events:
            cached_tokens += event.cached_tokens
            if event.queued_seconds is not None:
                queued_seconds = event.queued_seconds
            if self._wants_prompt_logprobs:
                self._wants_prompt_logprobs = False
                prompt_logprobs = (None, *map(self._logprob, event.prompt_scores))
            if event.token is not None:
                token_ids.append(event.token.token_id)
                if event.token.scored is not None:
                    logprobs.append(self._logprob(event.token.scored))
                if event.token.token_id in self._request.end_ids:
                    text += self._text.finish()
                    self.finish_reason = "stop"
                    break
                text += self._text.push(event.token.token_id)
            if event.finish_reason == "length" and not self._text.stopped:
                text += self._text.finish()
                self.finish_reason = "length"
            if self._text.stopped:
                self.finish_reason = "stop"
                break
        return GenerationChunk(
            text,
            tuple(token_ids),
            self.finish_reason,
            tuple(logprobs),
            prompt_logprobs,
            cached_tokens,
            queued_seconds,
        )

    def _logprob(self, scored: ScoredToken) -> TokenLogprob:
        name = self._token_bytes.name
        top = tuple(TokenLogprob(token_id, name(token_id), logprob) for token_id, logprob in scored.top)
        return TokenLogprob(scored.token_id, name(scored.token_id), scored.logprob, top)


# -- loading -----------------------------------------------------------------------------------------------------------


def _load_model(folder: Path, settings: BaseSettings) -> LlamaForCausalLM:
    dtype: Any = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    options: dict[str, Any] = {}
    if settings.precision == "nf4" and "quantization_config" not in read_config(folder):
        options["quantization_config"] = _nf4(folder, settings)
    with plain_shapes():
        model = LlamaForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map="auto" if torch.cuda.is_available() else None,
            local_files_only=True,
            use_safetensors=True,
            **options,
        )
    return model.eval().requires_grad_(False)


def _nf4(folder: Path, settings: BaseSettings) -> Any:
    """The settings of `ft_service.model.nf4`, with which adapters are trained by QLoRA."""
    from transformers import BitsAndBytesConfig

    stored = read_config(folder).get("dtype") or read_config(folder).get("torch_dtype") or "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, stored if settings.dtype == "auto" else settings.dtype),
    )


def _limits(device: torch.device, dtype: torch.dtype) -> StepLimits:
    if device.type == "cpu":
        return CPU_LIMITS
    return replace(GPU_LIMITS, block_size=PAGE_TOKENS) if reads_pages(device, dtype) else GPU_LIMITS


def _info(model: LlamaForCausalLM, folder: Path, settings: BaseSettings) -> EngineInfo:
    ids = model.generation_config.eos_token_id if model.generation_config else None
    dtype = str(model.dtype).removeprefix("torch.")
    context_length = model.config.max_position_embeddings
    return EngineInfo(
        engine=f"transformers {version('transformers')}",
        base_fingerprint=fingerprint(folder),
        dtype=dtype,
        precision="nf4" if getattr(model, "is_quantized", False) else _SHORT_NAMES[dtype],
        context_length=min(settings.max_context or context_length, context_length),
        vocab_size=model.config.vocab_size,
        end_ids=frozenset([ids] if isinstance(ids, int) else ids or []),
    )


def _grammars(folder: Path, vocab_size: int) -> Grammars:
    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise RefusedRequestError("response_format: the base's tokenizer cannot be constrained.", "response_format")
    return Grammars(tokenizer, vocab_size)


def _cache_bytes(settings: BaseSettings, devices: Sequence[torch.device], adapter_bytes: int) -> float:
    """For keys and values. Each GPU holds those of its own layers, so the fullest one decides."""
    if settings.cache_gib is not None:
        return settings.cache_gib * GIB
    if devices[0].type == "cpu":
        return CPU_CACHE_GIB * GIB
    per_layer = []
    for device, num_layers in Counter(devices).items():
        free, _ = torch.cuda.mem_get_info(device)
        per_layer.append((free - adapter_bytes * num_layers / len(devices)) * _CACHE_SHARE / num_layers)
    return min(per_layer) * len(devices)
