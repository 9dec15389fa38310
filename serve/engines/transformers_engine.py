"""An engine on transformers and peft: one base, many adapters, one answer at a time."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModelForCausalLM
from transformers import DynamicCache, LlamaForCausalLM

from ft_service.errors import ServingError
from ft_service.model.base import load_tokenizer
from ft_service.registry.registry import AdapterRecord, Registry
from serve.engines.engine import GenerationChunk, GenerationRequest
from serve.engines.text_stream import TextStream

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_LOADED_ADAPTERS = 32
# Initialisations that change the base weights when the adapter is loaded, and so the answers of all other models.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_GREEDY_BELOW_TEMPERATURE = 1e-5


class TransformersEngine:
    """Decodes with a KV cache, in the checkpoint's dtype, on the GPUs of this process or on the CPU.

    The active adapter is global state of a peft model. So one thread owns the model: it loads adapters, activates one,
    and decodes a whole answer before it takes the next request. The event loop never waits for it.
    """

    def __init__(self, folder: Path, registry: Registry, max_loaded_adapters: int = MAX_LOADED_ADAPTERS) -> None:
        self.tokenizer = load_tokenizer(folder)
        self._llama = LlamaForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map="auto" if torch.cuda.is_available() else None,
            local_files_only=True,
            use_safetensors=True,
        ).eval()
        self.context_length: int = self._llama.config.max_position_embeddings
        self.end_ids = _end_ids(self._llama)
        self._registry = registry
        self._max_loaded_adapters = max_loaded_adapters
        self._peft: PeftModelForCausalLM | None = None
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """See `serve.engines.engine.Engine.generate`."""
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[GenerationChunk | None] = asyncio.Queue()
        cancelled = threading.Event()

        def answer() -> None:
            try:
                if cancelled.is_set():
                    return
                with self._with_adapter(request.adapter), torch.inference_mode():
                    for chunk in self._decode(request):
                        if cancelled.is_set():
                            return
                        loop.call_soon_threadsafe(chunks.put_nowait, chunk)
            finally:
                loop.call_soon_threadsafe(chunks.put_nowait, None)

        decoding = loop.run_in_executor(self._model_thread, answer)
        try:
            while (chunk := await chunks.get()) is not None:
                yield chunk
            await decoding
        finally:
            cancelled.set()
            decoding.cancel()

    def _decode(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        device = self._llama.device
        text = TextStream(self.tokenizer, request.stop)
        sampler = _Sampler(request, device)
        cache = DynamicCache(config=self._llama.config)
        input_ids = torch.tensor([request.prompt_ids], device=device)
        for num_tokens in range(1, request.max_tokens + 1):
            output = self._llama(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token_id = sampler.choose(output.logits[0, -1])
            if token_id in request.end_ids:
                yield GenerationChunk(text.finish(), 1, "stop")
                return
            piece = text.push(token_id)
            if text.stopped:
                yield GenerationChunk(piece, 1, "stop")
                return
            if num_tokens == request.max_tokens:
                yield GenerationChunk(piece + text.finish(), 1, "length")
                return
            yield GenerationChunk(piece, 1)
            input_ids = torch.tensor([[token_id]], device=device)

    # -- adapters --------------------------------------------------------------------------------------------------

    @contextmanager
    def _with_adapter(self, adapter: AdapterRecord | None) -> Iterator[None]:
        if adapter is not None:
            self._activate(adapter)
            yield
        elif self._peft is not None:
            with self._peft.disable_adapter():
                yield
        else:
            yield

    def _activate(self, adapter: AdapterRecord) -> None:
        if adapter.digest not in self._loaded:
            self._check_files(adapter)
            self._attach(adapter)
        self._loaded[adapter.digest] = None
        self._loaded.move_to_end(adapter.digest)
        assert self._peft is not None
        self._peft.set_adapter(adapter.digest, inference_mode=True)
        if len(self._loaded) > self._max_loaded_adapters:
            least_recently_used, _ = self._loaded.popitem(last=False)
            self._detach(least_recently_used)

    def _check_files(self, adapter: AdapterRecord) -> None:
        damaged = self._registry.damaged_files(adapter)
        if WEIGHTS_FILE not in adapter.files:  # peft would fall back to a pickle file
            damaged.append(WEIGHTS_FILE)
        if damaged:
            raise ServingError(
                f"adapter = {adapter.id!r}: {', '.join(damaged)} missing or changed since "
                f"publishing (in {self._registry.folder(adapter)}). Restore the files, or publish the run again."
            )

    def _attach(self, adapter: AdapterRecord) -> None:
        folder = str(self._registry.folder(adapter))
        config = PeftConfig.from_pretrained(folder)
        initialisation = str(getattr(config, "init_lora_weights", None))
        if not isinstance(config, LoraConfig) or initialisation.startswith(CHANGES_BASE):
            raise ServingError(
                f"adapter = {adapter.id!r}: changes its base when loaded (peft_type {config.peft_type}, "
                f"init_lora_weights {initialisation}). Convert it to plain LoRA and publish that."
            )
        config.inference_mode = True
        try:
            if self._peft is None:
                self._peft = PeftModelForCausalLM(self._llama, config, adapter_name=adapter.digest)
            loaded = self._peft.load_adapter(folder, adapter_name=adapter.digest)
            mismatched = [*loaded.missing_keys, *loaded.unexpected_keys]
        except (ValueError, RuntimeError) as error:
            mismatched = [" ".join(str(error).split())]
        if mismatched:  # peft only warns, and the base would answer instead
            self._detach(adapter.digest)
            raise ServingError(
                f"adapter = {adapter.id!r}: does not fit the base ({len(mismatched)} mismatches: {mismatched[0]}). "
                f"It was trained on {adapter.base.id}; serve it on that base."
            )

    def _detach(self, name: str) -> None:
        if self._peft is None or name not in self._peft.peft_config:
            return
        if len(self._peft.peft_config) == 1:  # peft cannot disable adapters on a model that has none
            self._llama = self._peft.unload()
            self._peft = None
        else:
            self._peft.delete_adapter(name)


class _Sampler:
    """Chooses the next token: the most likely at temperature 0, else a random one of the nucleus of mass `top_p`."""

    def __init__(self, request: GenerationRequest, device: torch.device) -> None:
        self._temperature = request.temperature
        self._top_p = request.top_p
        self._generator = torch.Generator(device)
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)

    def choose(self, logits_V: torch.Tensor) -> int:
        logits_V = logits_V.float()
        if self._temperature < _GREEDY_BELOW_TEMPERATURE:
            return int(logits_V.argmax())
        probabilities_V, order_V = (logits_V / self._temperature).softmax(-1).sort(descending=True)
        mass_before_V = probabilities_V.cumsum(-1) - probabilities_V
        probabilities_V[mass_before_V > self._top_p] = 0
        return int(order_V[torch.multinomial(probabilities_V, 1, generator=self._generator)])


def _end_ids(model: LlamaForCausalLM) -> frozenset[int]:
    ids = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset([ids] if isinstance(ids, int) else ids or [])
