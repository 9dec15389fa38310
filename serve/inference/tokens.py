"""Text to token ids and back, for one base. Safe under threads, and long texts never hold up short ones.

A tokenizer whose settings are switched gives other threads other ids, so there is one for each purpose, whose settings
never change: in chat, special tokens within a text are plain text; in a completion's prompt they are special tokens.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import cast

from transformers import PreTrainedTokenizerBase

from ft_service.chat.format import ChatFormat, Message
from ft_service.errors import ModelError
from ft_service.model.base import load_tokenizer
from serve.inference.bases import ServedBase

LONG_CHARACTERS = 32_768
_SHORT_TEXTS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode")
_LONG_TEXTS = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode-long")


def executor_for(characters: int) -> ThreadPoolExecutor:
    """Where to encode a request: one thread for all long ones, so that they wait for each other and no one else."""
    return _LONG_TEXTS if characters > LONG_CHARACTERS else _SHORT_TEXTS


class BaseTokens:
    """Encodes and decodes for one base."""

    def __init__(self, base: ServedBase) -> None:
        self.base = base
        self._with_special_tokens = load_tokenizer(base.folder)
        self._chat: ChatFormat | ModelError
        try:
            self._chat = ChatFormat(load_tokenizer(base.folder))
        except ModelError as error:
            self._chat = error

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """For reading its facts, not for encoding."""
        return self._with_special_tokens

    @property
    def chat(self) -> ChatFormat:
        """Raises `ModelError` if the base has no chat format."""
        if isinstance(self._chat, ModelError):
            raise self._chat
        return self._chat

    @cached_property
    def max_token_characters(self) -> int:
        """No token stands for more characters; so a text has at least its length divided by this many tokens."""
        return max(len(token) for token in self.tokenizer.get_vocab())

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a completion's prompt. Special tokens in it count; it has one begin-of-text token, not two."""
        ids = cast(list[int], self._with_special_tokens(text, verbose=False)["input_ids"])
        begin = self.tokenizer.bos_token_id
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == begin else ids

    def ids_without_begin(self, text: str) -> list[int]:
        return cast(list[int], self._with_special_tokens(text, add_special_tokens=False, verbose=False)["input_ids"])

    def chat_ids(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        return self.chat.encode_prompt(messages) if add_generation_prompt else self.chat.encode(messages).input_ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return cast(str, self._with_special_tokens.decode(list(ids), skip_special_tokens=False))

    def strings(self, ids: Sequence[int]) -> list[str]:
        """The tokens as the tokenizer writes them."""
        return cast(list[str], self._with_special_tokens.convert_ids_to_tokens(list(ids)))
