"""Llama 3's chat format: a conversation to token ids and a loss mask, and back. Imports neither torch nor ray.

    <|begin_of_text|>
    <|start_header_id|>user<|end_header_id|>\\n\\n{content}<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\\n\\n{content}<|eot_id|>      trained: {content}<|eot_id|>

Source: Meta's ``llama_models.llama3.chat_format.ChatFormat``, which the tests hold this against token by token. Text is
tokenised as text: ``<|eot_id|>`` inside a message never becomes the special token.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from ft_service.chat.word_cache import word_ids
from ft_service.errors import DataError, ModelError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")

BEGIN = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
HEADER_START = "<|start_header_id|>"
HEADER_END = "<|end_header_id|>"
END_OF_TURN = "<|eot_id|>"
END_OF_MESSAGE = "<|eom_id|>"
_PADS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|pad|>", "<pad>", "[PAD]")
# Meta writes the role that answers a tool call as "ipython".
_HEADER_NAMES = {"tool": "ipython"}

CHAT_TEMPLATE = (
    "{{- '<|begin_of_text|>' }}"
    "{%- for message in messages %}"
    "{%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}"
    "{%- if role == 'assistant' %}"
    "{% generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
"""The same format for stock `tokenizer.apply_chat_template`, with the marks it needs to tell answers from the rest."""


@dataclass(frozen=True)
class Message:
    """One turn. `weight` 0 keeps an assistant turn from being trained on; None means 1 there."""

    role: Role
    content: str
    weight: int | None = None

    @property
    def is_trained(self) -> bool:
        return self.role == "assistant" and self.weight != 0


@dataclass(frozen=True)
class Example:
    """One tokenised conversation or text: ids [T], which of them are loss tokens [T], whether its end was cut off."""

    input_ids: list[int]
    loss_mask: list[bool]
    truncated: bool = False

    @property
    def num_loss_tokens(self) -> int:
        """Loss tokens that are predicted; the first token of a document never is."""
        return sum(self.loss_mask[1:])


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, in which nothing is special. Many texts in one call are faster."""
    words = word_ids(tokenizer)
    takes = [words is not None and words.takes(text) for text in texts]
    from_words = iter(words.encode(list(compress(texts, takes))) if words is not None else [])
    others = iter(_plain_ids(tokenizer, [text for text, taken in zip(texts, takes, strict=True) if not taken]))
    return [next(from_words if taken else others) for taken in takes]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
    return cast(list[list[int]], encoded["input_ids"])


def special_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of a special token, or None if the tokenizer has it not."""
    return tokenizer.get_added_vocab().get(token)


class ChatFormat:
    """Llama 3's chat format over one tokenizer. Raises `ModelError` when the tokenizer lacks its special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        needed = (BEGIN, HEADER_START, HEADER_END, END_OF_TURN)
        ids = {token: special_id(tokenizer, token) for token in needed}
        if missing := [token for token, token_id in ids.items() if token_id is None]:
            raise ModelError(
                f"tokenizer of {tokenizer.name_or_path!r}: has no {', '.join(missing)}, so it cannot write Llama 3's "
                "chat format. Use a Llama 3 checkpoint, or data in the text format."
            )
        self.tokenizer = tokenizer
        self._begin, self._header_start, self._header_end, self._end = (cast(int, ids[token]) for token in needed)

    # -- encoding --------------------------------------------------------------------------------------------------

    def encode(self, messages: Sequence[Message], max_seq_len: int | None = None) -> Example:
        """One conversation; see `encode_batch`."""
        return self.encode_batch([messages], max_seq_len)[0]

    def encode_batch(self, conversations: Sequence[Sequence[Message]], max_seq_len: int | None = None) -> list[Example]:
        """Ids and loss mask of each conversation, up to the end of its last turn, or cut after `max_seq_len` tokens."""
        texts = [message.content.strip() for messages in conversations for message in messages]
        contents = iter(plain_ids(self.tokenizer, texts))
        examples = []
        for messages in conversations:
            ids, mask = [self._begin], [False]
            for message in messages:
                header, body = self._header(message.role), [*next(contents), self._end]
                ids += header + body
                mask += [False] * len(header) + [message.is_trained] * len(body)
            examples.append(
                Example(ids[:max_seq_len], mask[:max_seq_len], max_seq_len is not None and len(ids) > max_seq_len)
            )
        return examples

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that the assistant is to continue: they end with its open header."""
        return self.encode(messages).input_ids + self._header("assistant")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
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
        """Ids that end an answer, the one that is trained first."""
        others = (special_id(self.tokenizer, token) for token in (END_OF_TEXT, END_OF_MESSAGE))
        return (self._end, *(other for other in others if other is not None))

    @cached_property
    def pad_id(self) -> int:
        """An id to fill with that never ends or begins anything. Raises `ModelError` if the tokenizer offers none."""
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
        """A chat template with which stock transformers gives the same ids."""
        return CHAT_TEMPLATE

    @property
    def template_digest(self) -> str:
        """SHA-256 of `template`."""
        return hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_seq_len: int) -> list[list[Example]]:
    """Of each text the examples it makes for continued pretraining: begin, text, end, all but the first trained.

    A text longer than `max_seq_len` tokens goes on in further examples; nothing is cut off. Raises `DataError` when the
    tokenizer knows no token that ends a text.
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
