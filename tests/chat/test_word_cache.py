"""The word cache: the tokenizer's own ids from any number of threads, in bounded memory."""

import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator

import pytest
from transformers import PreTrainedTokenizerFast

from ft_service.chat.word_cache import WordCache
from ft_service.model.scratch import train_tokenizer

THREADS = 4


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 4, vocab_size=320)


@pytest.fixture
def threads_switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def letters(number: int) -> str:
    """A word that stays one word: digits would be split from it."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


@pytest.mark.usefixtures("threads_switch_often")
@pytest.mark.parametrize("max_bytes", [0, 10_000, 2**20])
def test_threads_get_the_tokenizers_ids_while_the_cache_is_replaced(
    tokenizer: PreTrainedTokenizerFast, max_bytes: int
) -> None:
    cache = WordCache(tokenizer.backend_tokenizer, max_bytes)
    texts = [f"the {letters(number)} of {letters(number % 97)} over {letters(number % 13)}" for number in range(500)]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    failures: list[str] = []
    start = threading.Barrier(THREADS)

    def encode_all(shift: int) -> None:
        start.wait()
        for at in [*range(shift, len(texts)), *range(shift)]:
            try:
                (ids,) = cache.encode([texts[at]])
            except Exception as error:
                failures.append(f"{texts[at]}: {error!r}")
            else:
                failures.extend([f"{texts[at]}: other ids"] if ids != expected[at] else [])

    threads = [threading.Thread(target=encode_all, args=(100 * number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_cache_stays_within_its_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    max_bytes = 500_000
    cache = WordCache(tokenizer.backend_tokenizer, max_bytes)
    sizes = []
    tracemalloc.start()
    try:
        for start in range(0, 20_000, 100):
            # Few long words, then many short ones: the bound is in bytes, not in words.
            length = 500 if start < 5000 else 1
            cache.encode([" ".join(letters(number) * length for number in range(start, start + 100))])
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert max_bytes / 4 < max(sizes) < max_bytes


def test_words_larger_than_the_cache_are_encoded_and_not_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    cache = WordCache(tokenizer.backend_tokenizer, max_bytes=1000)
    text = "the " * 3 + "fox" * 1000
    assert cache.encode([text, "the"]) == [
        tokenizer(text, add_special_tokens=False)["input_ids"],
        tokenizer("the", add_special_tokens=False)["input_ids"],
    ]


def test_truncation_and_padding_of_earlier_calls_change_no_ids() -> None:
    tokenizer = train_tokenizer(["the quick brown fox"] * 4, vocab_size=300)
    expected = tokenizer("the quick brown fox", add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert WordCache(tokenizer.backend_tokenizer).encode(["the quick brown fox"]) == [expected]


def test_importing_the_chat_format_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, ft_service.chat.format, ft_service.chat.word_cache\n"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
