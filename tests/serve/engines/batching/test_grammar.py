"""Whatever a model would rather say, its answer is JSON of the schema."""

import json
import random

import jsonschema
import pytest
import torch

from ft_service.model.scratch import train_tokenizer
from serve.engines.batching.grammar import Grammars, JsonGrammar
from serve.engines.batching.sampling import sample
from serve.engines.batching.step import SamplingRow
from serve.engines.engine import RefusedRequestError, Sampling
from serve.inference.tools import answer_constraint
from serve.inference.wire import Tool
from tests.worlds import made_up_texts

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "東京"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CALL = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": {"type": "object", "additionalProperties": False}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name in ("add", "subtract")
    ]
}


_PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["東京", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
_GO = {"type": "object", "$defs": {"Place": _PLACE}, "properties": {"to": {"$ref": "#/$defs/Place"}}}
_GO |= {"required": ["to"], "additionalProperties": False}
_TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": name, "parameters": _GO}}) for name in ("stop", "go")
]


def _forced(tools: list[Tool]) -> dict:
    constraint = answer_constraint(tools, "required", None)
    assert constraint and not constraint.text_allowed
    return json.loads(constraint.json_schema)


NESTED_CALLS = _forced(_TOOLS)
NESTED_CALL = _forced(_TOOLS[:1])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*made_up_texts(50), '{"name": "東京", "age": 12}' * 5], 500)


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(tokenizer, len(tokenizer) + 3)  # embeddings may have more rows than the tokenizer has tokens


def answer(tokenizer, grammar: JsonGrammar, end_id: int, seed: int) -> str:
    """What a model of random logits says under the grammar."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while len(ids) < 400:
        logits = torch.randn(1, len(tokenizer) + 3, generator=generator)
        row = SamplingRow(Sampling(temperature=0.5), seed, [1], ids, grammar=grammar)
        token = sample(logits, [row])[0]
        assert token.error is None
        if token.token_id == end_id:
            return tokenizer.decode(ids)
        grammar.accept(token.token_id)
        ids.append(token.token_id)
    raise AssertionError(f"no end: {tokenizer.decode(ids)}")


@pytest.mark.parametrize("schema", [PERSON, CALL, NESTED_CALL, NESTED_CALLS])
@pytest.mark.parametrize("seed", range(6))
def test_every_answer_is_valid_whatever_the_logits_are(tokenizer, grammars, schema, seed):
    end_id = random.Random(seed).choice(tokenizer.all_special_ids)
    grammar = grammars.json(json.dumps(schema), [end_id])
    jsonschema.validate(json.loads(answer(tokenizer, grammar, end_id, seed)), schema)


def test_any_object_is_an_object(tokenizer, grammars):
    end_id = tokenizer.eos_token_id
    grammar = grammars.json("{}", [end_id])
    allowed = {tokenizer.decode([int(index)]) for index in grammar.allowed_V().nonzero()[:, 0]}
    assert allowed and all(text.startswith("{") for text in allowed)


def test_the_end_is_allowed_only_where_the_json_is_complete(tokenizer, grammars):
    end_id = tokenizer.eos_token_id
    grammar = grammars.json('{"const": {"a": 1}}', [end_id])
    for token_id in tokenizer('{"a": 1}', add_special_tokens=False)["input_ids"]:
        assert not grammar.allowed_V()[end_id]
        grammar.accept(token_id)
    assert grammar.allowed_V().nonzero()[:, 0].tolist() == [end_id]


@pytest.mark.parametrize("schema", ['{"type": "nonsense"}', "not json", '{"$ref": "https://example.com/x.json"}'])
def test_a_schema_that_cannot_be_followed_is_refused_by_name(grammars, schema):
    with pytest.raises(RefusedRequestError) as error:
        grammars.json(schema, [0])
    assert error.value.param == "response_format"


def test_a_schema_that_costs_too_much_to_follow_is_the_requests_own_fault(tokenizer, grammars):
    grammar = grammars.json(json.dumps({"type": "string", "pattern": "(a|b)*" * 3000}), [tokenizer.eos_token_id])
    grammar.accept(int(grammar.allowed_V().nonzero()[0]))
    logits = torch.zeros(2, len(tokenizer) + 3)
    costly, other = sample(
        logits, [SamplingRow(Sampling(), 1, [1], [], grammar=grammar), SamplingRow(Sampling(), 1, [1], [])]
    )
    assert isinstance(costly.error, RefusedRequestError) and costly.error.param == "response_format"
    assert "too many expressions" in costly.error.message
    assert other.error is None


def test_a_base_without_end_tokens_answers_in_json_too(grammars):
    assert grammars.json('{"const": 1}', []).allowed_V().any()


def choice(tokenizer, grammar: JsonGrammar, text: str) -> bool:
    """Whether a whole answer may be `text`."""
    end_id = tokenizer.eos_token_id
    for token_id in [*tokenizer(text, add_special_tokens=False)["input_ids"], end_id]:
        if not grammar.allowed_V()[token_id]:
            return False
        if token_id != end_id:
            grammar.accept(token_id)
    return True


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ("hello {x} 日本", True),
        ("", True),
        (" \n hello", True),
        ('"name": "go"', True),
        ('{"name": "go", "parameters": {"to": {"city": "Oslo"}}}', True),
        ('{"name": "rm", "parameters": {}}', False),
        ('{"name": "go", "parameters": {"to": {"city": "Rome"}}}', False),
        ('{"name": "go", "parameters": {"to": {"city": "Oslo"}}} and text', False),
        ('{"name": "go"', False),
        (' {"name": "go", "parameters": {}}', False),
    ],
)
def test_an_answer_that_may_be_text_is_text_or_json_of_the_schema(tokenizer, grammars, text, is_allowed):
    grammar = grammars.json(json.dumps(NESTED_CALLS), [tokenizer.eos_token_id], text_allowed=True)
    assert choice(tokenizer, grammar, text) == is_allowed


@pytest.mark.parametrize("seed", range(6))
def test_what_begins_as_json_is_valid_where_text_is_allowed_too(tokenizer, grammars, seed):
    end_id = tokenizer.eos_token_id
    grammar = grammars.json(json.dumps(NESTED_CALLS), [end_id], text_allowed=True)
    begin = tokenizer("{", add_special_tokens=False)["input_ids"]
    for token_id in begin:
        grammar.accept(token_id)
    jsonschema.validate(json.loads("{" + answer(tokenizer, grammar, end_id, seed)), NESTED_CALLS)
