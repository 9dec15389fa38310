"""An engine on vLLM, for GPUs in production. Batching, cache, sampling and constrained decoding are vLLM's own.

Three things are ours: adapters are checked before vLLM sees them (`vllm_adapters`), tokens become text as in the other
engine (`TextStream`), so that stop texts mean the same, and vLLM's event loop has a thread of its own, so that the
loops of callers only wait.
"""

import asyncio
import json
import math
import os
import secrets
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

# vLLM reads these when it is imported, and its workers inherit them.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing is sent to vLLM's makers
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork would copy the locks of Ray's threads
os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = "1"  # such a request is an error, not an answer

import torch
import vllm
from vllm.config import StructuredOutputsConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs import TokensPrompt
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from ft_service.errors import FtError, ServingError
from ft_service.model.base import fingerprint, load_tokenizer, read_config
from ft_service.registry.registry import Registry
from ft_service.text import first_line
from serve.engines.batching.grammar import json_grammar, json_or_text_grammar
from serve.engines.batching.sampling import is_greedy, name_of, nonfinite_error
from serve.engines.engine import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    RefusedRequestError,
    Sampling,
    TokenLogprob,
)
from serve.engines.text_stream import TextStream, TokenBytes
from serve.engines.vllm_adapters import VllmAdapters, base_sites, bytes_of_slot
from serve.engines.vllm_worker import CacheCleaner
from serve.settings import BaseSettings

GIB = 2**30
CPU_CACHE_GIB = 1.0
"""Keys and values on a CPU, unless `cache_gib` says otherwise; vLLM would take a share of the whole memory."""
BNB_PLUGIN = "vllm-bnb-plugin"
"""vLLM has no bitsandbytes of its own since 0.28."""
LOWEST_TEMPERATURE = 0.01
"""vLLM raises lower ones to this, without an error."""
_SHORT_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

T = TypeVar("T")


class VllmEngine:
    """One base on the GPUs of one node, with its adapters. See `serve.engines.engine.Engine`."""

    def __init__(self, folder: Path, registry: Registry, settings: BaseSettings) -> None:
        sites = base_sites(folder)
        base_dtype = dtype_of(folder, settings)
        slot_bytes = bytes_of_slot(sites, settings.max_lora_rank, base_dtype.itemsize)
        args = engine_args(folder, settings, slot_bytes)
        self._tokenizer = load_tokenizer(folder)
        self._token_bytes = TokenBytes.of(self._tokenizer)
        self._recorder = _Recorder()
        self._numbers = count(1)
        self._in_flight: set[str] = set()
        self._preparing = 0
        self._counters = Counter(prompt_tokens=0, cached_tokens=0)
        self._closed = False
        self._llm = _start(args, self._recorder, settings)
        self.info = _info(self._llm.vllm_config, folder, settings)
        assert args.max_cpu_loras is not None
        self._adapters = VllmAdapters(
            registry, self.info.base_fingerprint, sites, settings.max_lora_rank, args.max_cpu_loras
        )
        self._clearing = asyncio.Lock()
        self._thread = _LoopThread()
        self._thread.call(self._adapters.pin(self._llm, settings.pinned))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """See `serve.engines.engine.Engine.generate`."""
        if self._closed:
            raise ServingError("the engine is closed.")
        request = self._with_max_tokens(request)
        self._check(request)
        params = sampling_params(request, self.info.vocab_size, self._tokenizer.eos_token_id)
        outputs = _Outputs()
        name = f"{request.id}-{next(self._numbers)}"  # several answers may belong to one HTTP request
        self._in_flight.add(name)
        self._counters["prompt_tokens"] += len(request.prompt_ids)
        producing = self._thread.begin(self._produce(name, request, params, outputs))
        answer = _Answer(request, self._tokenizer, self._token_bytes)
        try:
            while answer.finish_reason is None:
                output = await outputs.take()
                if isinstance(output, FtError):
                    raise output
                chunk = answer.chunk(output)
                self._counters["cached_tokens"] += chunk.cached_tokens
                yield chunk
        finally:
            producing.cancel()  # vLLM's generator aborts its request
            self._in_flight.discard(name)

    async def unload(self, adapter_digest: str) -> None:
        """See `serve.engines.engine.Engine.unload`."""
        await asyncio.wrap_future(self._thread.begin(self._adapters.unload(self._llm, adapter_digest)))

    def stats(self) -> EngineStats:
        """See `serve.engines.engine.Engine.stats`. Raises `ServingError` when vLLM's process has ended."""
        if self._llm.errored and not self._closed:
            raise ServingError("vLLM's engine has ended. Its last lines are in the replica's log.")
        adapters = self._adapters.stats()
        recorder = self._recorder
        # vLLM counts in its steps, and after the last request there is none.
        waiting = min(recorder.waiting + self._preparing, len(self._in_flight))
        return EngineStats(
            running=len(self._in_flight) - waiting,
            waiting=waiting,
            cache_used=recorder.cache_used if self._in_flight else 0.0,
            loaded_adapters=adapters.loaded,
            adapter_bytes=adapters.bytes,
            counters={
                **self._counters,
                **recorder.counters,
                "adapter_loads": adapters.loads,
                "adapter_load_seconds": adapters.load_seconds,
            },
        )

    async def close(self) -> None:
        """See `serve.engines.engine.Engine.close`."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._thread.stop()
        self._llm.shutdown()
        self._adapters.close()

    # -- a request -----------------------------------------------------------------------------------------------------

    async def _produce(
        self, name: str, request: GenerationRequest, params: SamplingParams, outputs: "_Outputs"
    ) -> None:
        """Runs on vLLM's loop. Every end but a cancellation puts an error, or an output that is the last one."""
        try:
            await self._run(name, request, params, outputs)
        except FtError as error:
            outputs.put(error)
        except VLLMClientError as error:
            outputs.put(_refusal(error))
        except EngineDeadError:
            outputs.put(ServingError("vLLM's engine has ended. Try again."))
        except EngineGenerateError as error:
            outputs.put(ServingError(f"vLLM failed ({first_line(error.__cause__ or error)}). Try again."))
        except asyncio.CancelledError:
            if self._closed:
                outputs.put(ServingError("the engine is closed."))
            raise
        except Exception as error:
            outputs.put(ServingError(f"the engine failed ({type(error).__name__}: {first_line(error)}). Try again."))
        finally:
            self._in_flight.discard(name)

    async def _run(self, name: str, request: GenerationRequest, params: SamplingParams, outputs: "_Outputs") -> None:
        lora = None
        if request.adapter is not None:
            self._preparing += 1
            try:
                lora = await self._adapters.acquire(self._llm, request.adapter)
            finally:
                self._preparing -= 1
        try:
            passed_on = await self._pass_on(name, request, params, lora, outputs)
            if passed_on == 0:  # the values may be those of another request, whose blocks this one got
                passed_on = await self._pass_on(f"{name}-again", request, params, lora, outputs)
            if passed_on is not None:
                outputs.put(ServingError(nonfinite_error(request.adapter.id if request.adapter else None)))
        finally:
            if request.adapter is not None:
                await asyncio.shield(self._adapters.release(self._llm, request.adapter.digest))

    async def _pass_on(
        self,
        name: str,
        request: GenerationRequest,
        params: SamplingParams,
        lora: LoRARequest | None,
        outputs: "_Outputs",
    ) -> int | None:
        """Returns None at the end of the answer, or how many outputs there were before a logit that is not finite."""
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
        async with aclosing(self._llm.generate(prompt, params, name, lora_request=lora)) as answer:
            passed_on = 0
            async for output in answer:
                if _has_nonfinite(output):
                    await asyncio.shield(self._clear_cache())
                    return passed_on
                outputs.put(self._error_of(request, output) or output)
                if outputs.is_abandoned:
                    break
                passed_on += 1
        return None

    async def _clear_cache(self) -> None:
        """Let no other request meet the values. What is in the batch is computed again from its tokens."""
        async with self._clearing:
            await self._llm.pause_generation(mode="keep", clear_cache=True)
            try:
                await self._llm.collective_rpc("clear_keys_and_values")
            finally:
                await self._llm.resume_generation()

    def _error_of(self, request: GenerationRequest, output: RequestOutput) -> ServingError | None:
        if not output.finished or output.outputs[0].finish_reason in ("stop", "length"):
            return None
        if self._closed:
            return ServingError("the engine is closed.")
        of_whom = name_of(request.adapter.id if request.adapter else None)
        return ServingError(f"{of_whom}: vLLM ended the answer. Try again.")

    def _with_max_tokens(self, request: GenerationRequest) -> GenerationRequest:
        if request.max_tokens is not None:
            return request
        return replace(request, max_tokens=max(self.info.context_length - len(request.prompt_ids), 1))

    def _check(self, request: GenerationRequest) -> None:
        """vLLM's own messages name its settings, not ours."""
        assert request.max_tokens is not None
        num_tokens = len(request.prompt_ids) + max(request.max_tokens, 1)  # vLLM always generates one
        vocab_size = self.info.vocab_size
        if not request.prompt_ids:
            raise RefusedRequestError("prompt: has no tokens.", "prompt")
        if num_tokens > self.info.context_length:
            message = f"{num_tokens} tokens of prompt and answer; this server takes {self.info.context_length}."
            raise RefusedRequestError(message, "max_tokens")
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab_size:
            raise RefusedRequestError(f"prompt: token ids go from 0 to {vocab_size - 1}.", "prompt")
        if any(not 0 <= token_id < vocab_size for token_id in request.sampling.logit_bias):
            raise RefusedRequestError(f"logit_bias: token ids go from 0 to {vocab_size - 1}.", "logit_bias")
        if request.json_schema is not None and request.logprobs is not None:
            # They would be those of the tokens that the schema allows, not the model's own.
            message = "logprobs: vLLM cannot give them beside response_format or strict tools. Leave one of them out."
            raise RefusedRequestError(message, "logprobs")


def _has_nonfinite(output: RequestOutput) -> bool:
    """vLLM counts NaN among logits; infinities are seen in log-probabilities."""
    places = [*(output.outputs[0].logprobs or ()), *(output.prompt_logprobs or ())]
    logprobs = (each.logprob for scores in places if scores for each in scores.values())
    is_corrupted = output.metrics is not None and output.metrics.is_corrupted
    return is_corrupted or not all(map(math.isfinite, logprobs))


class _Outputs:
    """What vLLM's loop hands to the loop of a caller."""

    def __init__(self) -> None:
        self.is_abandoned = False
        """The caller's loop is gone, and nobody takes anything any more."""
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[RequestOutput | FtError] = asyncio.Queue()

    def put(self, output: RequestOutput | FtError) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, output)
        except RuntimeError:  # the loop is closed
            self.is_abandoned = True

    async def take(self) -> RequestOutput | FtError:
        return await self._queue.get()


class _Answer:
    """Turns vLLM's outputs into chunks, up to a stop text."""

    def __init__(self, request: GenerationRequest, tokenizer: Any, token_bytes: TokenBytes) -> None:
        self.finish_reason: FinishReason | None = None
        self._request = request
        self._token_bytes = token_bytes
        self._text = TextStream(tokenizer, request.stop)
        self._is_first = True

    def chunk(self, output: RequestOutput) -> GenerationChunk:
        completion = output.outputs[0]
        ids = list(completion.token_ids) if self._request.max_tokens else []
        ends = completion.finish_reason == "stop"
        text = ""
        token_ids = []
        for place, token_id in enumerate(ids):
            token_ids.append(token_id)
            if ends and place == len(ids) - 1:  # the end token: the request's own, or the tokenizer's after JSON
                break
            text += self._text.push(token_id)
            if self._text.stopped:
                break
        if completion.finish_reason and not self._text.stopped:
            text += self._text.finish()
            self.finish_reason = "stop" if ends and self._request.max_tokens else "length"
        if self._text.stopped:
            self.finish_reason = "stop"
        chosen = list(completion.logprobs or ())[: len(token_ids)]
        num_top = self._request.logprobs or 0
        logprobs = tuple(
            self._scored(token_id, scores, num_top) for token_id, scores in zip(token_ids, chosen, strict=False)
        )
        is_first, self._is_first = self._is_first, False
        return GenerationChunk(
            text,
            tuple(token_ids),
            self.finish_reason,
            logprobs,
            self._prompt_logprobs(output) if is_first else (),
            output.num_cached_tokens or 0 if is_first else 0,
        )

    def _prompt_logprobs(self, output: RequestOutput) -> tuple[TokenLogprob | None, ...]:
        num_top = self._request.prompt_logprobs
        if num_top is None or output.prompt_logprobs is None:
            return ()
        return tuple(
            None if scores is None else self._scored(token_id, scores, num_top)
            for token_id, scores in zip(self._request.prompt_ids, output.prompt_logprobs, strict=True)
        )

    def _scored(self, token_id: int, scores: Mapping[int, Logprob], num_top: int) -> TokenLogprob:
        """vLLM gives the token itself and the most likely ones, which may or may not contain it."""
        name = self._token_bytes.name
        ranked = sorted(scores.items(), key=lambda item: -item[1].logprob)
        top = [(other, score) for other, score in ranked if score.rank is None or score.rank <= num_top][:num_top]
        return TokenLogprob(
            token_id,
            name(token_id),
            scores[token_id].logprob,
            tuple(TokenLogprob(other, name(other), score.logprob) for other, score in top),
        )


# -- settings ----------------------------------------------------------------------------------------------------------


def engine_args(folder: Path, settings: BaseSettings, slot_bytes: int) -> AsyncEngineArgs:
    """vLLM's arguments. `slot_bytes` is what one adapter takes on the GPU (`bytes_of_slot`)."""
    is_cpu = current_platform.is_cpu()
    num_gpus = settings.gpus or 1
    num_adapters = max(int(settings.adapter_gib * GIB // slot_bytes), 1)
    cache_gib = CPU_CACHE_GIB if settings.cache_gib is None and is_cpu else settings.cache_gib
    options: dict[str, Any] = {}
    if _is_four_bit(folder, settings):
        _raise_without_bitsandbytes()
        options |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
    return AsyncEngineArgs(
        model=str(folder),
        tokenizer=str(folder),
        dtype=str(dtype_of(folder, settings)).removeprefix("torch."),
        seed=secrets.randbits(31),  # of requests without a seed
        tensor_parallel_size=num_gpus,
        # Several GPUs are of one node: workers are processes of the replica, and end with it.
        distributed_executor_backend="mp" if num_gpus > 1 else "uni",
        max_model_len=settings.max_context or -1,  # -1: the model's, or what the cache has room for
        max_num_seqs=settings.max_batch,
        kv_cache_memory_bytes=None if cache_gib is None else int(cache_gib * GIB) // num_gpus,
        enable_prefix_caching=True,
        enable_lora=True,
        max_lora_rank=settings.max_lora_rank,
        max_loras=min(num_adapters, settings.max_batch),
        max_cpu_loras=num_adapters,
        max_logprobs=-1,  # the gateway bounds them
        structured_outputs_config=StructuredOutputsConfig(backend="guidance", disable_any_whitespace=True),
        enforce_eager=is_cpu,
        worker_extension_cls=f"{CacheCleaner.__module__}.{CacheCleaner.__qualname__}",
        disable_log_stats=True,  # the engine passes a recorder of its own
        enable_log_requests=False,
        **options,
    )


def sampling_params(request: GenerationRequest, vocab_size: int, eos_id: int | None) -> SamplingParams:
    """A request in vLLM's terms. `eos_id` is the tokenizer's end of text. Raises `RefusedRequestError`."""
    sampling = request.sampling
    greedy = is_greedy(sampling)
    if not greedy:
        _raise_on_other_draws(sampling)
    end_ids = {token_id for token_id in request.end_ids if token_id < vocab_size}
    structured = None
    if request.json_schema is not None:
        structured = _structured(request.json_schema, request.text_allowed)
        end_ids |= {eos_id} if eos_id is not None else set()  # the only end that vLLM's grammars know
    try:
        return SamplingParams(
            temperature=0.0 if greedy else sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=0 if greedy else sampling.top_k,
            min_p=0.0 if greedy else sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logit_bias=dict(sampling.logit_bias) or None,
            seed=_seed(sampling),
            max_tokens=max(request.max_tokens or 0, 1),
            stop_token_ids=sorted(end_ids),
            ignore_eos=structured is None,  # `end_ids` are all there are
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs,
            structured_outputs=structured,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
    except (VLLMClientError, ValueError) as error:
        raise _refusal(error) from None


def _raise_on_other_draws(sampling: Sampling) -> None:
    """Refuse what vLLM takes, but would draw from another distribution than `Sampling` defines."""
    if sampling.temperature < LOWEST_TEMPERATURE:
        message = f"temperature: vLLM takes 0, or at least {LOWEST_TEMPERATURE}. Use 0 for the likeliest token."
        raise RefusedRequestError(message, "temperature")
    if sampling.min_p > 0 and sampling.top_p < 1:
        message = "min_p: vLLM applies it before top_p, not after it. Leave one of the two out."
        raise RefusedRequestError(message, "min_p")


def dtype_of(folder: Path, settings: BaseSettings) -> torch.dtype:
    """What the base computes in. vLLM's own `auto` would make a float32 checkpoint bfloat16."""
    config = read_config(folder)
    name = settings.dtype
    if name == "auto":
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _structured(schema: str, text_allowed: bool) -> StructuredOutputsParams:
    """The schema with the separators that the other engine has: `json_grammar` writes them into it."""
    try:
        if text_allowed:
            return StructuredOutputsParams(grammar=json_or_text_grammar(schema))
        return StructuredOutputsParams(json=json.loads(json_grammar(schema))["grammars"][0]["json_schema"])
    except (ValueError, TypeError) as error:
        raise _schema_refusal(error) from None


def _seed(sampling: Sampling) -> int | None:
    """vLLM takes -1 as none, and nothing below."""
    return None if sampling.seed is None else sampling.seed % 2**63


def _refusal(error: Exception) -> RefusedRequestError:
    """An error of vLLM about a request; most of them name the parameter in their text only."""
    text = str(error)
    if "grammar" in text.lower() or "schema" in text.lower():
        return _schema_refusal(error)
    named = getattr(error, "parameter", None)
    if not isinstance(named, str):
        named = next((each.name for each in fields(Sampling) if text.startswith(each.name)), "prompt")
    return RefusedRequestError(f"vLLM refuses the request: {first_line(error)}", named)


def _schema_refusal(error: Exception) -> RefusedRequestError:
    message = f"response_format: the JSON schema cannot be followed ({first_line(error)[:300]}). Simplify it."
    return RefusedRequestError(message, "response_format")


def _is_four_bit(folder: Path, settings: BaseSettings) -> bool:
    return settings.precision == "nf4" or "quantization_config" in read_config(folder)


def _raise_without_bitsandbytes() -> None:
    try:
        version(BNB_PLUGIN)
    except PackageNotFoundError:
        raise ServingError(
            f"precision = 'nf4': vLLM needs {BNB_PLUGIN}. Install it beside vllm, or use engine: transformers."
        ) from None


def _info(config: VllmConfig, folder: Path, settings: BaseSettings) -> EngineInfo:
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    generation = folder / "generation_config.json"
    ids = json.loads(generation.read_bytes()).get("eos_token_id") if generation.is_file() else None
    return EngineInfo(
        engine=f"vllm {vllm.__version__}",
        base_fingerprint=fingerprint(folder),
        dtype=dtype,
        precision="nf4" if _is_four_bit(folder, settings) else _SHORT_NAMES[dtype],
        context_length=config.model_config.max_model_len,
        vocab_size=config.model_config.get_vocab_size(),
        end_ids=frozenset([ids] if isinstance(ids, int) else ids or []),
    )


# -- vLLM's process and loop -------------------------------------------------------------------------------------------


def _start(args: AsyncEngineArgs, recorder: "_Recorder", settings: BaseSettings) -> AsyncLLM:
    try:
        return AsyncLLM.from_engine_args(args, stat_loggers=[lambda *_: recorder])
    except (ValueError, RuntimeError) as error:
        raise ServingError(
            f"base = {settings.base!r}: vLLM does not start ({first_line(error)}). "
            "Check gpus, cache_gib, max_context and adapter_gib; vLLM's own reason is above in the log."
        ) from error


class _Recorder(StatLoggerBase):
    """The last numbers that vLLM gave, and totals."""

    def __init__(self) -> None:
        self.waiting = 0
        self.cache_used = 0.0
        self.counters = Counter(generated_tokens=0, steps=0, preemptions=0)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self.counters["steps"] += 1
            self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self.cache_used = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self.counters["generated_tokens"] += iteration_stats.num_generation_tokens
            self.counters["preemptions"] += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        pass


class _LoopThread:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return self.begin(work).result()

    def stop(self) -> None:
        """Cancel what runs, and end the thread."""
        self.call(self._cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel_others(self) -> None:
        others: Sequence[asyncio.Task[Any]] = [
            task for task in asyncio.all_tasks() if task is not asyncio.current_task()
        ]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
