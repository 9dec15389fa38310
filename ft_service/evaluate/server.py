"""What an evaluation needs to know of a server: which weights answer under a name, in which precision, by which engine.

`started_server` starts `ft serve` for one evaluation, as a process of its own.
"""

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from pydantic import Field

from ft_service.cluster.processes import end_with_parent
from ft_service.errors import ServingError, UsageError
from ft_service.evaluate.ask import Endpoint, Identity, error_text
from ft_service.evaluate.comparison import Result
from ft_service.text import last_line

_START_SECONDS = 900
_STOP_SECONDS = 120
_POLL_SECONDS = 0.5
_PROJECT = Path(__file__).resolve().parents[2]


class ServedModelFacts(Result):
    """A model as a server serves it. None is what the server does not say."""

    id: str
    parent: str | None = None
    digest: str | None = Field(default=None, description="Of the adapter; None for a base.")
    base_fingerprint: str | None = None
    base_precision: str | None = None
    chat_template_digest: str | None = None
    note: str | None = None

    @property
    def identity(self) -> Identity:
        return Identity(self.digest, self.base_fingerprint)

    @property
    def names_its_weights(self) -> bool:
        return self.base_fingerprint is not None


class EngineFacts(Result):
    """The server's version and its replicas, with a digest of what decides answers beside the weights."""

    version: str | None
    replicas: int | None
    digest: str


class Server:
    """Asks a server about its models. Methods raise `ServingError` if it does not answer."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def model(self, model_id: str) -> ServedModelFacts:
        """Raises `ServingError`, which lists the models of the server, for an unknown one."""
        response = self._get(f"models/{model_id}")
        if response.status_code == 404:
            listed = self._get("models")
            names = [str(entry.get("id")) for entry in _json(listed).get("data", [])]
            if model_id not in names:
                shown = ", ".join(names[-20:]) or "none"
                raise ServingError(f"{model_id!r}: the server {self._endpoint.url} has no such model. It has: {shown}.")
            return ServedModelFacts(id=model_id)
        if not response.is_success:
            raise ServingError(f"--server = {self._endpoint.url!r}: {error_text(response)}")
        entry = _json(response)
        return ServedModelFacts(
            id=model_id,
            parent=entry.get("parent"),
            digest=entry.get("digest"),
            base_fingerprint=entry.get("base_fingerprint"),
            base_precision=entry.get("base_precision"),
            chat_template_digest=self._template_digest(model_id),
            note=entry.get("note"),
        )

    def entry(self, model_id: str) -> dict[str, Any]:
        """What the server says of one of its models, with the record of an adapter."""
        response = self._get(f"models/{model_id}")
        if not response.is_success:
            raise ServingError(f"--server = {self._endpoint.url!r}: {error_text(response)}")
        return _json(response)

    def entries(self) -> dict[str, dict[str, Any]]:
        """Id -> what the server says of each of its models."""
        response = self._get("models")
        if not response.is_success:
            raise ServingError(f"--server = {self._endpoint.url!r}: {error_text(response)}")
        return {str(entry["id"]): entry for entry in _json(response)["data"]}

    def engine(self, base: ServedModelFacts) -> EngineFacts:
        page = self._get_or_none("../openapi.json")
        version = page.get("info", {}).get("version") if page else None
        stats = self._get_or_none("stats")
        replicas = len(stats[base.id]) if stats and isinstance(stats.get(base.id), list) else None
        content = [version, base.base_precision, base.chat_template_digest]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return EngineFacts(version=version, replicas=replicas, digest=digest)

    def texts(self, model_id: str, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each list of token ids."""
        bodies = [{"model": model_id, "tokens": list(one)} for one in ids]
        return [str(reply["prompt"]) for reply in self._post_all("detokenize", bodies)]

    def conversation_ids(
        self, model_id: str, conversations: Sequence[Sequence[tuple[str, str]]], is_question: bool
    ) -> list[list[int]]:
        """Token ids of each conversation; of a question with the header of the answer."""
        bodies = [
            {
                "model": model_id,
                "messages": [{"role": role, "content": text} for role, text in conversation],
                "add_generation_prompt": is_question,
            }
            for conversation in conversations
        ]
        return [list(reply["tokens"]) for reply in self._post_all("tokenize", bodies)]

    def _template_digest(self, model_id: str) -> str | None:
        facts = self._get_or_none(f"tokenizer_info?model={model_id}")
        template = facts.get("chat_template") if facts else None
        return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None

    def _get_or_none(self, path: str) -> dict[str, Any] | None:
        response = self._get(path)
        try:
            content = response.json() if response.is_success else None
        except ValueError:
            return None
        return content if isinstance(content, dict) else None

    def _get(self, path: str) -> httpx.Response:
        async def get() -> httpx.Response:
            async with self._endpoint.client() as client:
                return await client.get(path)

        return self._answered(get())

    def _post_all(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        async def post() -> list[httpx.Response]:
            async with self._endpoint.client() as client:
                return await asyncio.gather(*(client.post(path, json=body) for body in bodies))

        replies = self._answered(post())
        for reply in replies:
            if not reply.is_success:
                raise ServingError(f"{self._endpoint.url}/{path}: {error_text(reply)}")
        return [_json(reply) for reply in replies]

    def _answered(self, call: Any) -> Any:
        try:
            return asyncio.run(call)
        except httpx.HTTPError as error:
            raise ServingError(
                f"--server = {self._endpoint.url!r}: does not answer ({type(error).__name__}). Start one with: ft serve"
            ) from None


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        content = response.json()
        assert isinstance(content, dict)
    except (ValueError, AssertionError):
        raise ServingError(
            f"{response.url}: the reply is no JSON object, so this is no OpenAI-shaped server."
        ) from None
    return content


@contextmanager
def started_server(storage: str, base: str | None) -> Iterator[str]:
    """The address of an `ft serve` that lives as long as the block. Raises `ServingError` if it does not start.

    It joins Ray at RAY_ADDRESS, or starts one on this machine. On a cluster that already serves, name that server.
    """
    port = _free_port()
    name = f"evaluation-{port}"
    # Nobody else asks it. `ray job stop` kills it after three seconds, by when its application must have been deleted.
    options = ["--storage", storage, "--port", str(port), "--name", name, "--stop-seconds", "0"]
    options += ["--base", base] if base else []
    python_path = os.pathsep.join(filter(None, [str(_PROJECT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ft_service.cli.app", "serve", *options],
            env={**os.environ, "PYTHONPATH": python_path},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C ends the evaluation first, which then stops the server
            preexec_fn=end_with_parent(),
        )
        url = f"http://127.0.0.1:{port}/{name}/v1"
        try:
            if not _is_ready(process, url):
                output.seek(0)
                raise ServingError(
                    f"the server for this evaluation did not start: {last_line(output.read())} Start one yourself with "
                    "ft serve, and pass its address: --server URL"
                )
            yield url
        finally:
            _stop(process)


def _is_ready(process: "subprocess.Popen[bytes]", url: str) -> bool:
    """Waits until the server answers; False if it ended, or took too long."""
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", timeout=10).is_success:
                return True
        time.sleep(_POLL_SECONDS)
    return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def key_from_environment(name: str) -> str | None:
    """Raises `UsageError` if the variable is empty."""
    key = os.environ.get(name, "").strip()
    if not key:
        raise UsageError(f"{name}: the suite names this environment variable for a key, and it is not set. Export it.")
    return key
