"""Items: questions with the metric that scores their answers, one JSON object a line.

An item that exists can be scored: its metric, its reference and its options fit each other.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ft_service.errors import Problem, SpecError
from ft_service.evaluate.metrics import MetricName, problem_of

Language = Literal["en", "ja"]


class Turn(BaseModel):
    """An earlier turn of the conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["user", "assistant"]
    content: str = Field(min_length=1)


class Item(BaseModel):
    """A question, and how its answer is scored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[\w./#:-]{1,200}$", description="Unique within a suite.")
    skill: str = Field(
        pattern=r"^[a-z][a-z0-9_]{0,39}$", description="What the item tests; results are given for each."
    )
    language: Language = Field(default="en", description="Of the expected answer.")
    cluster: str = Field(
        default="", description="Items that share a passage have the same; default: the item's own id."
    )
    prompt: str = Field(min_length=1)
    system: str | None = None
    history: list[Turn] = Field(default_factory=list, description="Turns before the prompt.")
    paraphrases: list[str] = Field(default_factory=list, description="The same question in other words, for stability.")
    metric: MetricName
    reference: str | list[str] | None = Field(default=None, description="The right answer, or a list of accepted ones.")
    options: dict[str, Any] = Field(default_factory=dict, description="Of the metric.")
    prompt_ids: list[int] | None = Field(
        default=None, description="The prompt as training encoded it, asked in place of the text."
    )
    counts: bool = Field(default=True, description="Whether the overall result includes it.")
    max_tokens: int = Field(default=256, ge=1, description="Tokens of an answer; a longer one is cut, and counted.")

    @model_validator(mode="before")
    @classmethod
    def _own_cluster(cls, data: Any) -> Any:
        return {**data, "cluster": data.get("cluster") or data.get("id", "")} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _metric_fits(self) -> Self:
        if not self.prompt.strip():
            raise ValueError("its prompt is empty")
        if problem := problem_of(self):
            raise ValueError(problem)
        return self


def read_items(file: Path) -> list[Item]:
    """The items of a JSONL file, in order. Raises `SpecError` with every line that is no item, and repeated ids."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            [Problem("items", str(file), f"cannot be read ({error})", "Fix the path.")], str(file)
        ) from None
    items: list[Item] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(Item.model_validate(json.loads(line)))
        except ValidationError as error:
            problems += _problems(number, line, error)
        except ValueError as error:
            problems.append(Problem(f"line {number}", line[:60], f"is not JSON ({error})", "Write one object a line."))
    problems += repeated_ids(items)
    if problems:
        raise SpecError(problems, str(file))
    return items


def repeated_ids(items: Sequence[Item]) -> list[Problem]:
    """A problem for each id that more than one item has."""
    ids = [item.id for item in items]
    return [
        Problem("id", item_id, f"is the id of {ids.count(item_id)} items", "Give each item an id of its own.")
        for item_id in sorted({item_id for item_id in ids if ids.count(item_id) > 1})
    ]


def _problems(number: int, line: str, error: ValidationError) -> Iterator[Problem]:
    data = json.loads(line)
    name = data.get("id", "without id") if isinstance(data, dict) else "no object"
    for one in error.errors(include_url=False):
        field = ".".join(map(str, one["loc"]))
        if one["type"] == "extra_forbidden":
            fix = f"Known fields: {', '.join(Item.model_fields)}."
        else:
            fix = "Fix or remove the item."
        message = one["msg"].removeprefix("Value error, ")
        shown = data.get("metric") if not field and isinstance(data, dict) else one["input"]
        yield Problem(f"line {number} ({name}){f': {field}' if field else ': metric'}", shown, message, fix)


def first_error(error: ValidationError) -> str:
    """The first reason of pydantic, behind the name of its field."""
    one = error.errors(include_url=False)[0]
    field = ".".join(map(str, one["loc"]))
    return f"{f'{field}: ' if field else ''}{one['msg'].removeprefix('Value error, ')}"
