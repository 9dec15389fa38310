"""Asks an OpenAI-shaped server many questions: bounded concurrency, retries, answers that survive a kill.

<storage>/evaluations/<id>/answers/<time>-<8 hex>.jsonl   a piece of answers, one JSON object a line

An answer counts once its piece is on storage, and a piece exists whole or not at all. A killed evaluation that starts
again reads the pieces and asks the rest. Each question has a key: a digest of everything that decides its answer.
"""

import asyncio
import hashlib
import json
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from ft_service.errors import ServingError, StorageError, UsageError
from ft_service.storage.storage import Storage
from ft_service.text import counted, first_line

DIGEST_HEADER = "x-adapter-digest"
BASE_HEADER = "x-base-fingerprint"
NO_DIGEST = "none"
"""What the server sends as the adapter digest of a base."""

DEFAULT_CONCURRENCY = 8
PIECE_SUFFIX = ".jsonl"
_ATTEMPTS = 6
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 30.0
_FAILURES_IN_A_ROW = 5
"""So many questions without any reply, each after all its attempts, mean that the server is gone."""
_PIECE_ANSWERS = 32
_PIECE_SECONDS = 2.0
_TIMEOUT_SECONDS = 600.0
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_HOPELESS = frozenset({401, 403, 404, 405})
"""No question of this model will be answered: a wrong key, an unknown model, a server of another kind."""

Sleep = Callable[[float], Awaitable[object]]
Progress = Callable[[int, int], None]
"""Called with the number of answers on storage, and of all questions."""


@dataclass(frozen=True)
class Question:
    """One request: a conversation, or a text or token ids to continue."""

    model: str
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content) of each turn."""
    prompt: str | tuple[int, ...] | None = None
    """Instead of a conversation."""
    max_tokens: int = 256
    """0 measures the log-probabilities of the prompt, and generates nothing."""
    temperature: float = 0.0
    seed: int = 0
    repeat: int = 0
    """The same request again is another question only with another number."""

    @property
    def path(self) -> str:
        return "/completions" if self.prompt is not None else "/chat/completions"

    @property
    def body(self) -> dict[str, Any]:
        common = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        if self.prompt is None:
            return {**common, "messages": [{"role": role, "content": text} for role, text in self.messages]}
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        measured = {"echo": True, "logprobs": 0} if self.max_tokens == 0 else {}
        return {**common, "prompt": prompt, **measured}

    @cached_property
    def key(self) -> str:
        """32 hex digits."""
        content = json.dumps([self.path, self.body, self.repeat], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


class Answer(BaseModel):
    """What a server answered. A line of a piece."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    model: str
    """As the server names it in its reply."""
    text: str
    finish_reason: str | None = None
    completion_tokens: int = 0
    adapter_digest: str | None = None
    base_fingerprint: str | None = None
    token_logprobs: list[float | None] | None = None
    """Of the prompt's tokens, where they were asked for. The first token has none."""

    @property
    def is_cut(self) -> bool:
        """Whether the answer ended at its largest length."""
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-shaped server."""

    url: str
    """Up to /v1."""
    key: str | None = None
    transport: httpx.AsyncBaseTransport | None = None

    def client(self, concurrency: int = DEFAULT_CONCURRENCY) -> httpx.AsyncClient:
        """A client of this server. Raises `UsageError` for an address that is none."""
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            return httpx.AsyncClient(
                base_url=address(self.url),
                headers=headers,
                timeout=httpx.Timeout(_TIMEOUT_SECONDS, connect=30.0),
                limits=httpx.Limits(max_connections=concurrency),
                transport=self.transport,
            )
        except httpx.InvalidURL:
            raise UsageError(f"--server = {self.url!r}: is no address. Use http://HOST:PORT/v1.") from None


def address(url: str) -> str:
    """The address up to /v1, which may be left out."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


@dataclass(frozen=True)
class Identity:
    """Which weights answer under a model's name. None where the server does not say."""

    adapter_digest: str | None
    base_fingerprint: str | None


class Answers:
    """The answers of one evaluation on storage."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage = storage
        self._folder = f"{folder}/answers"
        self._stored: dict[str, Answer] = {}
        self._pending: list[Answer] = []
        self._written_at = time.monotonic()
        for name in storage.files(self._folder):
            if name.endswith(PIECE_SUFFIX):  # others were being written when their process was killed
                self._read_piece(name)

    def __len__(self) -> int:
        return len(self._stored)

    def get(self, question: Question) -> Answer | None:
        """The answer that is on storage."""
        return self._stored.get(question.key)

    async def add(self, answer: Answer) -> None:
        """Write the answer with the next piece, which is due after some answers or seconds."""
        self._pending.append(answer)
        if len(self._pending) >= _PIECE_ANSWERS or time.monotonic() - self._written_at > _PIECE_SECONDS:
            await self.flush()

    async def flush(self) -> None:
        """Write what has not been written. Once this returns, every answer added so far is on storage."""
        piece = self._pending
        self._pending = []
        self._written_at = time.monotonic()
        if not piece:
            return
        name = f"{self._folder}/{time.time_ns()}-{secrets.token_hex(4)}{PIECE_SUFFIX}"
        content = "".join(answer.model_dump_json(exclude_none=True) + "\n" for answer in piece)
        try:
            await asyncio.to_thread(self._storage.write_bytes, name, content.encode())
        except BaseException:
            self._pending = [*piece, *self._pending]
            raise
        self._stored.update({answer.key: answer for answer in piece})

    def _read_piece(self, name: str) -> None:
        path = f"{self._folder}/{name}"
        try:
            for line in self._storage.read_bytes(path).decode().split("\n")[:-1]:
                answer = Answer.model_validate_json(line)
                self._stored[answer.key] = answer
        except (ValidationError, UnicodeDecodeError) as error:
            raise StorageError(
                f"{self._storage.uri(path)}: is damaged ({first_line(error)}). Delete it: its answers are asked again."
            ) from None


@dataclass
class Outcome:
    """How asking went. What was answered is in `Answers`."""

    failures: dict[str, str] = field(default_factory=dict)
    """Key of a question -> why it has no answer."""
    stopped: str | None = None
    """Why the rest was not asked; None if everything was."""


class ModelChanged(ServingError):
    """Other weights answer under the same name than before."""


async def ask_all(
    endpoint: Endpoint,
    questions: Iterable[Question],
    answers: Answers,
    identities: dict[str, Identity],
    *,
    concurrency: int = DEFAULT_CONCURRENCY,
    progress: Progress = lambda done, total: None,
    sleep: Sleep = asyncio.sleep,
) -> Outcome:
    """Ask every question that has no answer on storage.

    `identities` has the weights that each model must answer with; a model that is missing there is added with its first
    answer. Raises `ModelChanged` if other weights answer, also if those of an answer on storage are others. A question
    that the server refuses, or does not answer after all attempts, is a failure. A server that is gone ends the asking.
    What was answered by then stays.
    """
    waiting = list({question.key: question for question in questions}.values())
    total = len(waiting)
    for question in waiting:
        if answer := answers.get(question):
            _check_identity(question, answer, identities)
    waiting = [question for question in waiting if answers.get(question) is None]
    before = len(answers) - (total - len(waiting))
    waiting.reverse()
    asked = Outcome()
    failed_in_a_row = 0
    progress(total - len(waiting), total)

    async def work(client: httpx.AsyncClient) -> None:
        nonlocal failed_in_a_row
        while waiting and asked.stopped is None:
            question = waiting.pop()
            try:
                answer = await _ask(client, question, sleep)
            except _Unanswered as error:
                asked.failures[question.key] = str(error)
                failed_in_a_row += error.is_away
                if error.is_hopeless or failed_in_a_row >= _FAILURES_IN_A_ROW:
                    asked.stopped = str(error)
                continue
            failed_in_a_row = 0
            _check_identity(question, answer, identities)
            await answers.add(answer)
            progress(len(answers) - before, total)

    try:
        async with endpoint.client(concurrency) as client, asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(waiting))):
                group.create_task(work(client))
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    finally:
        await answers.flush()
    progress(len(answers) - before, total)
    if asked.stopped is not None:
        for question in waiting:
            asked.failures[question.key] = f"not asked, because asking stopped: {asked.stopped}"
    return asked


def ask_now(
    endpoint: Endpoint, questions: Sequence[Question], answers: Answers, identities: dict[str, Identity], **options: Any
) -> Outcome:
    """`ask_all`, for callers without an event loop."""
    return asyncio.run(ask_all(endpoint, questions, answers, identities, **options))


def _check_identity(question: Question, answer: Answer, identities: dict[str, Identity]) -> None:
    found = Identity(answer.adapter_digest, answer.base_fingerprint)
    expected = identities.setdefault(question.model, found)
    if found != expected:
        raise ModelChanged(
            f"{question.model}: other weights answer than before (adapter {_short(found.adapter_digest)} on base "
            f"{_short(found.base_fingerprint)}; before: adapter {_short(expected.adapter_digest)} on base "
            f"{_short(expected.base_fingerprint)}). Answers of both cannot be compared. Start a new evaluation with "
            "--id NAME."
        )


def _short(digest: str | None) -> str:
    return digest[:8] if digest else "unnamed"


class _Unanswered(Exception):
    """A question without an answer."""

    def __init__(self, reason: str, is_away: bool = False, is_hopeless: bool = False) -> None:
        super().__init__(reason)
        self.is_away = is_away
        self.is_hopeless = is_hopeless


async def _ask(client: httpx.AsyncClient, question: Question, sleep: Sleep) -> Answer:
    """Raises `_Unanswered` after the last attempt, or for a refusal."""
    reason = ""
    wait = 0.0
    for attempt in range(_ATTEMPTS):
        if attempt:
            await sleep(wait)
        wait = _wait_seconds(attempt)
        try:
            response = await client.post(question.path.removeprefix("/"), json=question.body)
        except httpx.HTTPError as error:
            reason = f"no reply ({type(error).__name__}{f': {error}' if str(error) else ''})"
            continue
        if response.is_success:
            return _read(question, response)
        reason = f"status {response.status_code}: {error_text(response)}"
        if response.status_code not in _RETRIED:
            raise _Unanswered(reason, is_hopeless=response.status_code in _HOPELESS)
        wait = max(wait, _retry_after(response))
    raise _Unanswered(f"{reason} (after {counted(_ATTEMPTS, 'attempt')})", is_away=True)


def _wait_seconds(attempt: int) -> float:
    """Doubles, with a random part, so that workers do not come back all at once."""
    longest = min(_FIRST_WAIT_SECONDS * 2**attempt, _LONGEST_WAIT_SECONDS)
    return longest * (0.5 + random.random() / 2)


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(max(0.0, float(response.headers.get("retry-after", "0"))), 10 * _LONGEST_WAIT_SECONDS)
    except ValueError:
        return 0.0  # a date


def error_text(response: httpx.Response) -> str:
    """The message of an error in OpenAI's shape, or the beginning of another body."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or "no reason given"


def _read(question: Question, response: httpx.Response) -> Answer:
    try:
        reply = response.json()
        choice = reply["choices"][0]
        logprobs = choice["logprobs"]["token_logprobs"] if question.max_tokens == 0 else None
        digest = response.headers.get(DIGEST_HEADER)
        return Answer(
            key=question.key,
            model=reply["model"],
            text=("" if question.max_tokens == 0 else choice["text"])
            if question.prompt is not None
            else choice["message"]["content"] or "",
            finish_reason=choice.get("finish_reason"),
            completion_tokens=(reply.get("usage") or {}).get("completion_tokens", 0),
            adapter_digest=None if digest == NO_DIGEST else digest,
            base_fingerprint=response.headers.get(BASE_HEADER),
            token_logprobs=logprobs,
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:  # ValidationError is a ValueError
        raise _Unanswered(f"a reply of another shape ({type(error).__name__}: {first_line(error)})") from None
