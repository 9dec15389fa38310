"""Text to token ids and back, for one base. Safe under threads, and long texts never hold up short ones.

A tokenizer whose settings are switched gives other threads other ids, so there is one for each purpose, whose settings
never change: in chat, special tokens within a text are plain text; in a completion's prompt they are special tokens.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ft_service.chat.format import ChatFormat, Message
from ft_service.errors import ModelError
from ft_service.model.base import load_tokenizer
from serve.inference.bases import ServedBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONG_CHARACTERS = 32_768
_LIKELY_CHARACTERS = 4
"""Of a token. A text with more of them than fit is measured in pieces before it is encoded as a whole."""
_SHORT_TEXTS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode")
_LONG_TEXTS = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode-long")


def executor_for(characters: int) -> ThreadPoolExecutor:
    """Where to encode a request: one thread for all long ones, so that they wait for each other and no one else."""
    return _LONG_TEXTS if characters > LONG_CHARACTERS else _SHORT_TEXTS


class BaseTokens:
    """Encodes and decodes for one base."""

    def __init__(self, base: ServedBase) -> None:
        self.base = base
        self._with_special_tokens = _whole_texts(load_tokenizer(base.folder))
        self.max_token_characters = max(len(token) for token in self.tokenizer.get_vocab())
        """No token stands for more characters; so a text has at least its length divided by this many tokens."""
        self.special_ids = frozenset(self.tokenizer.all_special_ids) | {
            token_id for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        self._special_by_text = {self.text([token_id]): token_id for token_id in self.special_ids}
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

    def exceeds(self, texts: Sequence[str], max_tokens: int) -> bool:
        """Whether texts certainly have more tokens, found out without encoding more than about twice as many.

        Encoding a text of megabytes as a whole takes hundreds of bytes a token. Cut into pieces it may have other
        tokens, a few for each cut, and never half as many.
        """
        characters = sum(len(text) for text in texts)
        if characters // self.max_token_characters > max_tokens:
            return True
        if characters <= _LIKELY_CHARACTERS * max_tokens:
            return False
        counted = 0
        for text in texts:
            for start in range(0, len(text), LONG_CHARACTERS):
                counted += len(self.ids_without_begin(text[start : start + LONG_CHARACTERS]))
                if counted > 2 * max_tokens:
                    return True
        return False

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a completion's prompt. Special tokens in it count; it has one begin-of-text token, not two."""
        ids = self._ids(text, add_special_tokens=True)
        begin = self.tokenizer.bos_token_id
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == begin else ids

    def special_tokens(self, texts: Sequence[str]) -> frozenset[int]:
        """The ids of those texts that are special tokens. An answer's text never has them."""
        return frozenset(self._special_by_text[text] for text in texts if text in self._special_by_text)

    def ids_without_begin(self, text: str) -> list[int]:
        return self._ids(text, add_special_tokens=False)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self._with_special_tokens
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            return cast(list[int], tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
        # The tokenizer's own call also notes where each token is in the text. Freeing that of a million tokens takes
        # 0.1 s, in which the process stands still.
        encoded = tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoded[0].ids

    def chat_ids(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        return self.chat.encode_prompt(messages) if add_generation_prompt else self.chat.encode(messages).input_ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return cast(str, self._with_special_tokens.decode(list(ids), skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, which may be part of a character. Special tokens are written out."""
        text = self.text([token_id])
        if _REPLACEMENT not in text:
            return text.encode()
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        try:
            return bytes(byte_of[character] for character in self.strings([token_id])[0])
        except KeyError:  # not a byte-level vocabulary
            return text.encode()

    def strings(self, ids: Sequence[int]) -> list[str]:
        """The tokens as the tokenizer writes them."""
        return cast(list[str], self._with_special_tokens.convert_ids_to_tokens(list(ids)))


def _whole_texts(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`tokenizer.json` may ask for truncation or padding, as training left them."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer
