"""Llama 3's chat format: a conversation to token ids and a loss mask, and back. Needs neither torch nor transformers.

    <|begin_of_text|>
    <|start_header_id|>user<|end_header_id|>\\n\\n{content}<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\\n\\n{content}<|eot_id|>      trained: {content}<|eot_id|>

Source: Meta's ``llama_models.llama3.chat_format.ChatFormat``; the tests compare every token with it. A conversation
with tools is written as Llama 3.1's stock chat template writes it (`tools.py`). The content of a message is plain text:
``<|eot_id|>`` inside it never becomes the special token.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Literal, cast

from ft_service.chat.tools import WITH_TOOLS_TEMPLATE, offer_text, system_text, to_json
from ft_service.chat.word_cache import word_cache_for
from ft_service.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")

BEGIN = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
HEADER_START = "<|start_header_id|>"
HEADER_END = "<|end_header_id|>"
END_OF_TURN = "<|eot_id|>"
END_OF_MESSAGE = "<|eom_id|>"
_PADS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|pad|>", "<pad>", "[PAD]")
# Meta calls the role that answers a tool call "ipython".
_HEADER_NAMES = {"tool": "ipython"}

CHAT_TEMPLATE = (
    "{{- '<|begin_of_text|>' }}" + WITH_TOOLS_TEMPLATE + "{%- for message in messages %}"
    "{%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}"
    "{%- if role == 'assistant' %}"
    "{% generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- endif %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
"""The same format for `tokenizer.apply_chat_template` of stock transformers; `generation` marks the trained answers."""
_DIGESTS_WITHOUT_TOOLS = frozenset({"0890d77499ecacee8b428e6cb5e2738a7fb241f9f09003051d4776b607ebcf25"})
"""SHA-256 of earlier templates. They differ from `CHAT_TEMPLATE` in conversations with tools only."""


@dataclass(frozen=True)
class Message:
    """One turn. An assistant turn of `weight` 0 is not trained on; None means 1."""

    role: Role
    content: str
    weight: int | None = None
    is_json: bool = False
    """Of an assistant turn: the content is a function call (`tools.call_text`). Of a tool turn: the content is a JSON
    value and not a text, which the template would quote."""
    functions: tuple[str, ...] = ()
    """The functions that the first user turn offers, each as JSON with an indent of 4."""

    @property
    def is_trained(self) -> bool:
        return self.role == "assistant" and self.weight != 0

    @property
    def uses_tools(self) -> bool:
        """Whether this turn makes its conversation one with tools."""
        return self.is_json or bool(self.functions)


@dataclass(frozen=True)
class Example:
    """One tokenised conversation or text: `input_ids` [T], `loss_mask` [T], and whether its end was cut off."""

    input_ids: list[int]
    loss_mask: list[bool]
    truncated: bool = False

    @property
    def num_loss_tokens(self) -> int:
        """Loss tokens that are predicted: all but the first token of a document, which has nothing before it."""
        return sum(self.loss_mask[1:])


def plain_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text; special tokens in it are plain text. Many texts in one call are faster."""
    cache = word_cache_for(tokenizer)
    use_cache = [cache is not None and cache.accepts(text) for text in texts]
    cached = iter(cache.encode(list(compress(texts, use_cache))) if cache is not None else [])
    others = iter(_uncached_ids(tokenizer, [text for text, cached in zip(texts, use_cache, strict=True) if not cached]))
    return [next(cached if from_cache else others) for from_cache in use_cache]


def _uncached_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
    return cast(list[list[int]], encoded["input_ids"])


def special_id(tokenizer: "PreTrainedTokenizerBase", token: str) -> int | None:
    """The id of a special token; None if the tokenizer lacks it."""
    return tokenizer.get_added_vocab().get(token)


class ChatFormat:
    """Llama 3's chat format over one tokenizer. Raises `ModelError` when the tokenizer lacks its special tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        needed = (BEGIN, HEADER_START, HEADER_END, END_OF_TURN)
        ids = {token: special_id(tokenizer, token) for token in needed}
        if missing := [token for token, token_id in ids.items() if token_id is None]:
            raise ModelError(
                f"tokenizer of {tokenizer.name_or_path!r}: has no {', '.join(missing)}, which Llama 3's chat format "
                "needs. Use a Llama 3 checkpoint, or data in the text format."
            )
        self.tokenizer = tokenizer
        self._begin, self._header_start, self._header_end, self._end = (cast(int, ids[token]) for token in needed)

    # -- encoding --------------------------------------------------------------------------------------------------

    def encode(self, messages: Sequence[Message], max_seq_len: int | None = None) -> Example:
        """One conversation; see `encode_batch`."""
        return self.encode_batch([messages], max_seq_len)[0]

    def encode_batch(self, conversations: Sequence[Sequence[Message]], max_seq_len: int | None = None) -> list[Example]:
        """Ids and loss mask of each conversation, up to the end of its last turn, or cut after `max_seq_len` tokens."""
        turns_of = [written_turns(messages) for messages in conversations]
        contents = iter(plain_ids(self.tokenizer, [text for turns in turns_of for _, text in turns]))
        examples = []
        for turns in turns_of:
            ids = [self._begin]
            mask = [False]
            for message, _ in turns:
                header = self._header(message.role)
                body = [*next(contents), self._end]
                ids += header + body
                mask += [False] * len(header) + [message.is_trained] * len(body)
            examples.append(
                Example(ids[:max_seq_len], mask[:max_seq_len], max_seq_len is not None and len(ids) > max_seq_len)
            )
        return examples

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation for the assistant to continue: they end with the header of its turn."""
        return self.encode(messages).input_ids + self._header("assistant")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _header(self, role: str) -> list[int]:
        return [self._header_start, *self._role_ids[role], self._header_end, *self._two_newlines]

    @cached_property
    def _role_ids(self) -> dict[str, list[int]]:
        ids = plain_ids(self.tokenizer, [_HEADER_NAMES.get(role, role) for role in ROLES])
        return dict(zip(ROLES, ids, strict=True))

    @cached_property
    def _two_newlines(self) -> list[int]:
        return plain_ids(self.tokenizer, ["\n\n"])[0]

    # -- facts -----------------------------------------------------------------------------------------------------

    @cached_property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Ids that end an answer. The first of them is the one that is trained."""
        others = (special_id(self.tokenizer, token) for token in (END_OF_TEXT, END_OF_MESSAGE))
        return (self._end, *(other for other in others if other is not None))

    @cached_property
    def pad_id(self) -> int:
        """An id for padding that never ends or begins a turn. Raises `ModelError` if the tokenizer has none."""
        taken = {self._begin, *self.end_of_turn_ids}
        candidates = (special_id(self.tokenizer, token) for token in (*_PADS, str(self.tokenizer.pad_token)))
        for candidate in candidates:
            if candidate is not None and candidate not in taken:
                return candidate
        raise ModelError(
            f"tokenizer of {self.tokenizer.name_or_path!r}: its only padding token also ends a turn. "
            f"Add one of {', '.join(_PADS)}."
        )

    @property
    def template(self) -> str:
        """A chat template that gives the same ids in stock transformers."""
        return CHAT_TEMPLATE

    @property
    def template_digest(self) -> str:
        """SHA-256 of `template`."""
        return hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()

    def agrees_without_tools(self, template_digest: str) -> bool:
        """Whether the template with this digest gives the same ids for every conversation without tools."""
        return template_digest == self.template_digest or template_digest in _DIGESTS_WITHOUT_TOOLS


def written_turns(messages: Sequence[Message]) -> list[tuple[Message, str]]:
    """The turns of a conversation as they are written, each with its exact text."""
    if not any(message.uses_tools for message in messages):
        return [(message, message.content.strip()) for message in messages]
    offers_functions = any(message.functions for message in messages)
    system = messages[0] if messages[0].role == "system" else Message("system", "")
    others = messages[1:] if messages[0] is system else messages
    return [(system, system_text(system.content, offers_functions)), *((turn, _tool_text(turn)) for turn in others)]


def _tool_text(message: Message) -> str:
    """The text of a turn other than the system turn, in a conversation with tools."""
    if message.functions:
        return offer_text(message.functions, message.content)
    if message.role == "tool" and not message.is_json:
        return to_json(message.content)
    return message.content.strip()


def encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_seq_len: int) -> list[list[Example]]:
    """The examples of each text for continued pretraining: begin, text, end. All tokens but the first are loss tokens.

    A text longer than `max_seq_len` tokens continues in further examples; nothing is cut off. Raises `DataError` when
    the tokenizer has no end-of-text token.
    """
    end = special_id(tokenizer, END_OF_TEXT)
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        raise DataError(
            f"tokenizer of {tokenizer.name_or_path!r}: has no end-of-text token, which the text format needs."
        )
    begin = tokenizer.bos_token_id
    start = [] if begin is None else [begin]
    room = max_seq_len - len(start)
    made = []
    for ids in plain_ids(tokenizer, texts):
        ids = [*ids, end]
        pieces = [ids[at : at + room] for at in range(0, len(ids), room)]
        made.append([Example([*start, *piece], [False] * len(start) + [True] * len(piece)) for piece in pieces])
    return made
