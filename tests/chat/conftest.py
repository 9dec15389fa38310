"""Meta's own Llama 3 code, and its tokenizer as a Llama 3 checkpoint has it."""

from pathlib import Path

import llama_models.llama3.tokenizer as meta_tokenizer
import pytest
from llama_models.llama3.chat_format import ChatFormat as MetaChatFormat
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter


@pytest.fixture(scope="session")
def meta() -> MetaChatFormat:
    return MetaChatFormat(meta_tokenizer.Tokenizer.get_instance())


@pytest.fixture(scope="session")
def llama3(meta: MetaChatFormat) -> PreTrainedTokenizerFast:
    """Meta's tokenizer file as the transformers tokenizer that a Llama 3 checkpoint has."""
    converter = TikTokenConverter(
        vocab_file=str(Path(meta_tokenizer.__file__).parent / "tokenizer.model"),
        pattern=meta.tokenizer.pat_str,
        extra_special_tokens=list(meta.tokenizer.special_tokens),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
