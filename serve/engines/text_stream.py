"""Decodes token ids piece by piece: whole characters only, no stop strings, and the same text as decoding at once."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Text of a growing answer. The pieces from `push` and `finish`, joined, are the answer up to the stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._context_start = 0
        self._unread_start = 0
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token. Returns the text that is now final. Sets `stopped` once a stop string is complete."""
        self._ids.append(token_id)
        text = self._unread_text()
        if text.endswith(_REPLACEMENT):  # the first bytes of a character that spans tokens
            return ""
        self._context_start = self._unread_start
        self._unread_start = len(self._ids)
        return self._release(text)

    def finish(self) -> str:
        """The text held back so far, at the end of the answer, without an incomplete last character."""
        text = self._release(self._unread_text().removesuffix(_REPLACEMENT))
        return text if self.stopped else text + self._held

    def _unread_text(self) -> str:
        # Decode the unread tokens together with the ones before, because some tokenizers decode a token differently at
        # the start of a text.
        before = self._decode(self._ids[self._context_start : self._unread_start])
        return self._decode(self._ids[self._context_start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, text: str) -> str:
        text = self._held + text
        ends = [text.find(stop) for stop in self._stop if stop in text]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
