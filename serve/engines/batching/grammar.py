"""Answers that must be JSON of a schema: which tokens may come next. The grammars are llguidance's.

llguidance needs no index over the vocabulary, so that a new schema costs milliseconds; it is also one of vLLM's own.
"""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import llguidance.hf
import llguidance.torch
import torch
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerFast

from ft_service.errors import ServingError
from ft_service.text import first_line
from serve.engines.engine import RefusedRequestError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

ANY_OBJECT = "{}"
_BITS = 32
_LIKE_JSON_DUMPS: "JsonCompileOptions" = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As calls are written in training. Free white space would let an answer go on with blanks until it is cut off."""


_TEXT = r"/(?s:[ \t\r\n]*[^{ \t\r\n].*)?/"


class Grammars:
    """Makes grammars over one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size)
        self._vocab_size = vocab_size

    def json(self, schema: str, end_ids: Iterable[int], text_allowed: bool = False) -> "JsonGrammar":
        """A grammar for one answer; `end_ids` may follow once the JSON is complete. See `GenerationRequest`.

        Raises `RefusedRequestError` for a schema that is invalid, or cannot be followed.
        """
        try:
            text = json_or_text_grammar(schema) if text_allowed else json_grammar(schema)
            matcher = LLMatcher(self._tokenizer, text, log_level=0)
            if not matcher.get_error():
                grammar = JsonGrammar(matcher, self._vocab_size, end_ids)
                # Some schemas compile, and then cost too much to follow. Of many that can be followed the first
                # tokens take longest, and here no other answer waits for them.
                grammar.allowed_V()
                return grammar
            error = matcher.get_error()
        except (ValueError, TypeError) as raised:
            error = str(raised)
        raise _refusal(error)


def json_grammar(schema: str) -> str:
    """The grammar of a JSON schema in llguidance's own form. Raises `ValueError` for an invalid schema."""
    if schema == ANY_OBJECT:
        schema = '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(schema, defaults=_LIKE_JSON_DUMPS)


def json_or_text_grammar(schema: str) -> str:
    """The same in Lark's form, with any text as an alternative that does not begin with ``{``. Raises `ValueError`."""
    with_separators = json.loads(json_grammar(schema))["grammars"][0]["json_schema"]
    return f"start: TEXT | json\nTEXT: {_TEXT}\njson: %json {json.dumps(with_separators)}"


def _refusal(error: str) -> RefusedRequestError:
    message = f"response_format: the JSON schema cannot be followed ({first_line(error)[:300]}). Simplify it."
    return RefusedRequestError(message, "response_format")


class JsonGrammar:
    """Where one answer is in its JSON. See `serve.engines.batching.step.Grammar`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, end_ids: Iterable[int]) -> None:
        self._matcher = matcher
        self._end_ids = torch.tensor(sorted(end_ids), dtype=torch.int64)
        self._bits = torch.zeros((1, -(-vocab_size // _BITS)), dtype=torch.int32)
        self._places = torch.arange(_BITS, dtype=torch.int32)
        self._vocab_size = vocab_size
        self._allowed_V: torch.Tensor | None = None

    def allowed_V(self) -> torch.Tensor:
        """Bool [V]: the tokens that may come next. Raises `RefusedRequestError` if finding them costs too much."""
        if self._allowed_V is None:
            self._allowed_V = self._find_allowed_V()
        return self._allowed_V

    def _find_allowed_V(self) -> torch.Tensor:
        if self._matcher.is_stopped():  # complete, and nothing can follow
            allowed_V = torch.zeros(self._vocab_size, dtype=torch.bool)
        else:
            llguidance.torch.fill_next_token_bitmask(self._matcher, self._bits)
            if error := self._matcher.get_error():
                raise _refusal(error)
            allowed_V = ((self._bits[0, :, None] >> self._places) & 1).bool().flatten()[: self._vocab_size]
        # llguidance knows one end token, and a request may have others.
        allowed_V[self._end_ids] = self._matcher.is_accepting()
        return allowed_V

    def accept(self, token_id: int) -> None:
        """Advance by a token that was allowed."""
        self._allowed_V = None
        if not self._matcher.consume_token(token_id):
            raise ServingError(f"the token {token_id} does not fit the JSON schema: {self._matcher.get_error()}")
