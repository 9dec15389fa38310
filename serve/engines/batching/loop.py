"""The thread that owns the model: it runs a step for all sequences, hands out their tokens, and sleeps without any."""

import asyncio
import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from ft_service.errors import ServingError
from ft_service.text import first_line
from serve.engines.batching.adapter_weights import LoadedAdapter
from serve.engines.batching.adapters import AdapterStore
from serve.engines.batching.attention import KeyValueStore
from serve.engines.batching.forward import Forward
from serve.engines.batching.sampling import sample, score
from serve.engines.batching.scheduler import Piece, Scheduler
from serve.engines.batching.scheduler import Sequence as TokenSequence
from serve.engines.batching.step import Grammar, SampledToken, SamplingRow, ScoredToken
from serve.engines.batching.threads import use_threads
from serve.engines.engine import FinishReason, GenerationRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """What a step has for one request."""

    token: SampledToken | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    prompt_scores: Sequence[ScoredToken] = ()
    cached_tokens: int = 0
    queued_seconds: float | None = None


@dataclass(eq=False)
class Answer:
    """A request in progress."""

    request: GenerationRequest
    adapter: LoadedAdapter | None
    row: SamplingRow
    answer_ids: list[int]
    sequence: "TokenSequence[Answer]" = field(init=False)
    prompt_scores: list[ScoredToken] = field(default_factory=list)
    arrived_at: float = field(default_factory=time.perf_counter)
    started_at: float | None = None
    """When its first step began."""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: list[Event] = field(default_factory=list)
    """Not yet taken. Belongs to `loop`, like `has_events`."""
    has_events: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, request: GenerationRequest, adapter: LoadedAdapter | None, grammar: Grammar | None) -> "Answer":
        assert request.max_tokens is not None
        answer_ids: list[int] = []
        row = SamplingRow(
            sampling=request.sampling,
            seed=secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed,
            prompt_ids=request.prompt_ids,
            answer_ids=answer_ids,
            adapter_id=adapter.id if adapter else None,
            num_logprobs=request.logprobs,
            grammar=grammar,
        )
        answer = cls(request, adapter, row, answer_ids)
        answer.sequence = TokenSequence(
            answer,
            list(request.prompt_ids),
            len(request.prompt_ids),
            request.max_tokens,
            adapter.digest if adapter else None,
            scores_prompt=request.prompt_logprobs is not None,
        )
        return answer

    async def take(self) -> list[Event]:
        """Everything that is ready, once something is: a slow reader gets fewer and larger pieces."""
        await self.has_events.wait()
        self.has_events.clear()
        events = self.events
        self.events = []
        return events


def _deliver(deliveries: Iterable[tuple[Answer, Event]]) -> None:
    for answer, event in deliveries:
        answer.events.append(event)
        answer.has_events.set()


class ModelLoop:
    """Runs steps on a thread of its own. `begin`, `cancel` and `stop` may be called from any thread."""

    def __init__(
        self,
        scheduler: Scheduler[Answer],
        store: KeyValueStore,
        forward: Forward,
        adapters: AdapterStore,
        num_threads: int,
    ) -> None:
        """`num_threads` of operations on a CPU."""
        self.scheduler = scheduler
        self.counters = Counter(prompt_tokens=0, cached_tokens=0, generated_tokens=0, steps=0)
        self.store = store
        self.forward = forward
        self._adapters = adapters
        self._num_threads = num_threads
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._answers: set[Answer] = set()
        self._deliveries: list[tuple[Answer, Event]] = []
        self._accepts = True
        self._accepts_lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def begin(self, answer: Answer) -> None:
        """Raises `ServingError` once `stop` was called."""
        with self._accepts_lock:  # no request may come after the last message that is read
            if self._accepts:
                self._inbox.put(partial(self._begin, answer))
                return
        self._release(answer)
        raise ServingError("the engine is closed.")

    def cancel(self, answer: Answer) -> None:
        """Take an answer out before the next step. One that has ended is no error."""
        self._inbox.put(partial(self._end, answer))

    def stop(self) -> None:
        """End the requests in flight and free the cache; returns when the thread has ended."""
        with self._accepts_lock:
            if self._accepts:
                self._accepts = False
                self._inbox.put(self._close)
        self._thread.join()
        self.store.free()

    def _run(self) -> None:
        use_threads(self._num_threads)
        with torch.inference_mode():
            while not self._closed:
                try:
                    self._receive()
                    if self._answers:
                        self._step()
                    self._send()
                except Exception:  # a thread that has ended would leave every client waiting
                    logger.exception("the model thread goes on after an error")
                    self._fail([], ServingError("internal error"))
                    self._send()  # now: the next turn may wait for a message first

    def _receive(self) -> None:
        """Take all messages; wait for one if there is nothing else to do."""
        wait = not self._answers
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                return
            message()
            wait = False

    def _begin(self, answer: Answer) -> None:
        self._answers.add(answer)
        self.counters["prompt_tokens"] += len(answer.request.prompt_ids)
        if answer.sequence.is_scoring or answer.request.max_tokens:
            self.scheduler.add(answer.sequence)
        else:
            self._finish(answer, Event(finish_reason="length"))

    def _end(self, answer: Answer) -> None:
        if answer in self._answers:
            self._answers.remove(answer)
            self.scheduler.remove(answer.sequence)
            self._release(answer)

    def _release(self, answer: Answer) -> None:
        if answer.adapter is not None:
            self._adapters.release(answer.adapter)

    def _finish(self, answer: Answer, event: Event) -> None:
        self._put(answer, event)
        self._end(answer)

    def _close(self) -> None:
        self._closed = True
        for answer in list(self._answers):
            self._finish(answer, Event(error=ServingError("the engine is closed.")))

    # -- a step --------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        pieces: list[Piece[Answer]] = []
        try:
            pieces = self.scheduler.next_step()
            self._note_start(pieces)
            self._clear_unverified()
            logits_LV = self.forward.run(pieces, [piece.sequence.owner.adapter for piece in pieces])
            self.scheduler.complete(pieces)
            self._use(pieces, logits_LV)
        except Exception as error:
            # Anything may be wrong with the batch, so its requests end; those that wait go on.
            logger.exception("a step of %d requests failed", len(pieces))
            self._fail(pieces, error)
        self.counters["steps"] += 1

    def _note_start(self, pieces: list[Piece[Answer]]) -> None:
        now = time.perf_counter()
        for piece in pieces:
            if piece.sequence.owner.started_at is None:
                piece.sequence.owner.started_at = now

    def _fail(self, pieces: list[Piece[Answer]], error: Exception) -> None:
        answers = {piece.sequence.owner for piece in pieces} or self._answers
        text = str(error) if isinstance(error, ServingError) else f"{type(error).__name__}: {first_line(error)}"
        self.scheduler.complete(pieces)  # whatever was written is not verified
        for answer in answers & self._answers:
            self._finish(answer, Event(error=ServingError(f"the engine failed in a step ({text}). Try again.")))

    def _clear_unverified(self) -> None:
        if self.scheduler.unverified_blocks:
            self.store.clear(self.scheduler.unverified_blocks)
            self.scheduler.unverified_blocks.clear()

    def _use(self, pieces: list[Piece[Answer]], logits_LV: torch.Tensor) -> None:
        """Score prompt tokens, choose the next tokens, and hand them out."""
        row = 0
        sampling = []
        rows = []
        for piece in pieces:
            if piece.num_scores:
                self._score(piece, logits_LV[row : row + piece.num_scores])
            row += piece.num_logit_rows
            if piece.samples and piece.sequence.owner in self._answers:
                sampling.append(piece)
                rows.append(row - 1)
        if not sampling:
            return
        if len(rows) < len(logits_LV):
            logits_LV = logits_LV[torch.tensor(rows, device=logits_LV.device)]
        tokens = sample(logits_LV, [piece.sequence.owner.row for piece in sampling])
        self.counters["generated_tokens"] += len(sampling)
        for piece, token in zip(sampling, tokens, strict=True):
            self._append(piece.sequence.owner, token)

    def _score(self, piece: Piece[Answer], logits_LV: torch.Tensor) -> None:
        answer = piece.sequence.owner
        end = piece.end - piece.samples
        token_ids = piece.sequence.token_ids[end - piece.num_scores + 1 : end + 1]
        try:
            scores = score(logits_LV, token_ids, answer.request.prompt_logprobs or 0)
        except ServingError as error:
            of_whom = "the base" if answer.adapter is None else f"adapter = {answer.adapter.id!r}"
            self._finish(answer, Event(error=ServingError(f"{of_whom}: {error}")))
            return
        answer.prompt_scores += scores
        if not piece.samples:
            self.scheduler.verify(piece.sequence)
        if not answer.request.max_tokens and not piece.sequence.is_scoring:
            self._finish(answer, self._first_event(answer, None, "length"))

    def _append(self, answer: Answer, token: SampledToken) -> None:
        if token.error is not None:
            error = ServingError(token.error) if isinstance(token.error, str) else token.error
            self._finish(answer, Event(error=error))
            return
        self.scheduler.verify(answer.sequence)
        is_end = token.token_id in answer.request.end_ids
        if answer.row.grammar is not None and not is_end:
            try:
                answer.row.grammar.accept(token.token_id)
            except ServingError as error:
                self._finish(answer, Event(error=error))
                return
        is_first = not answer.answer_ids
        answer.answer_ids.append(token.token_id)
        answer.sequence.token_ids.append(token.token_id)
        reason: FinishReason | None = None
        if is_end:
            reason = "stop"
        elif len(answer.answer_ids) == answer.request.max_tokens:
            reason = "length"
        event = self._first_event(answer, token, reason) if is_first else Event(token, reason)
        if reason:
            self._finish(answer, event)
        else:
            self._put(answer, event)

    def _first_event(self, answer: Answer, token: SampledToken | None, reason: FinishReason | None) -> Event:
        num_cached = answer.sequence.num_cached or 0
        self.counters["cached_tokens"] += num_cached
        queued = None if answer.started_at is None else answer.started_at - answer.arrived_at
        return Event(token, reason, None, answer.prompt_scores, num_cached, queued)

    # -- handing out ---------------------------------------------------------------------------------------------------

    def _put(self, answer: Answer, event: Event) -> None:
        self._deliveries.append((answer, event))

    def _send(self) -> None:
        """Wake each event loop once, whatever the number of its requests."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Answer, Event]]] = {}
        for answer, event in self._deliveries:
            by_loop.setdefault(answer.loop, []).append((answer, event))
        self._deliveries.clear()
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
            except RuntimeError:  # the loop is closed, and nobody waits there any more
                for answer, _ in deliveries:
                    self._end(answer)
