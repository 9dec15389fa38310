"""The text of an answer that comes token by token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from ft_service.model.scratch import train_tokenizer
from serve.engines.text_stream import TextStream, TokenBytes
from tests.serve.serving_world import SENTENCE


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["the quick brown fox"], 280)


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token_id in ids:
        pieces.append(stream.push(token_id))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_no_piece_holds_half_a_character(tokenizer):
    ids = ids_of(tokenizer, SENTENCE)
    assert len(ids) > 2 * len(SENTENCE), "the tokens must be smaller than the characters for this test to mean anything"
    pieces = pieces_of(tokenizer, ids)
    assert not [piece for piece in pieces if "\N{REPLACEMENT CHARACTER}" in piece]
    assert "".join(pieces) == SENTENCE
    assert [piece for piece in pieces if piece] == list(SENTENCE)


def test_invalid_bytes_decode_as_in_one_piece(tokenizer):
    ids = ids_of(tokenizer, SENTENCE)[1::2] + ids_of(tokenizer, "fox")
    text = "".join(pieces_of(tokenizer, ids))
    assert "\N{REPLACEMENT CHARACTER}" in text
    assert text == tokenizer.decode(ids)


def test_an_incomplete_last_character_is_left_out(tokenizer):
    assert "".join(pieces_of(tokenizer, ids_of(tokenizer, "fox 東")[:-1])) == "fox "


def test_special_tokens_are_not_text(tokenizer):
    ids = [*ids_of(tokenizer, "the "), tokenizer.eos_token_id, *ids_of(tokenizer, "fox")]
    assert "".join(pieces_of(tokenizer, ids)) == "the fox"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("brown",), "the quick "),
        (("fox", "ick b"), "the qu"),
        (("東",), "the quick brown fox"),
        (("fox!",), "the quick brown fox"),
        (("the",), ""),
    ],
)
def test_text_ends_before_the_first_stop_string(tokenizer, stop, expected):
    ids = ids_of(tokenizer, "the quick brown fox")
    by_character = [token_id for character in "the quick brown fox" for token_id in ids_of(tokenizer, character)]
    assert "".join(pieces_of(tokenizer, ids, stop)) == expected
    assert "".join(pieces_of(tokenizer, by_character, stop)) == expected


@given(data=st.binary(max_size=24), cut=st.integers(0, 30))
@settings(deadline=None)
def test_any_bytes_give_the_text_of_decoding_at_once(tokenizer, data, cut):
    """Up to one character at the end, which is left out if it is none."""
    names = {bytes(TokenBytes.of(tokenizer).name(token_id)): token_id for token_id in range(256)}
    ids = [names[bytes([byte])] for byte in data]
    ids.insert(min(cut, len(ids)), tokenizer.eos_token_id)
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces_of(tokenizer, ids)) == text.removesuffix("\N{REPLACEMENT CHARACTER}")


def test_bytes_that_are_no_text_cost_no_more_as_they_go_on(tokenizer):
    stream = TextStream(tokenizer, ())
    invalid = next(token_id for token_id in range(256) if TokenBytes.of(tokenizer).name(token_id) == b"\x80")
    assert [stream.push(invalid) for _ in range(3)] == ["", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"]


def test_a_tokenizer_that_is_not_byte_level_decodes_as_in_one_piece(tokenizer, monkeypatch):
    monkeypatch.setattr(TokenBytes.of(tokenizer), "is_byte_level", False)
    assert "".join(pieces_of(tokenizer, ids_of(tokenizer, SENTENCE))) == SENTENCE
