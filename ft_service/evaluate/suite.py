"""A suite: what an adapter is judged by. A YAML file with items, held-out data, thresholds, and optional parts.

`load_suite` reads the file and every item it names, and reports all problems at once, before anything is asked.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ft_service.data.files.datasets_library import HUB_PREFIX
from ft_service.errors import Problem, SpecError
from ft_service.evaluate.items import Item, Language, read_items, repeated_ids
from ft_service.spec.schema import DataSource

SHIPPED = Path(__file__).parent / "suites"
HeldOutMetric = Literal["exact", "number", "f1", "rouge_l", "chrf"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HeldOut(_Section):
    """Records that were not trained on: a file, or the validation split of the adapter's own run."""

    path: str | None = Field(default=None, description="A file, a folder of files, or hub:NAME:SPLIT.")
    run: bool = Field(default=False, description="The validation split of the adapter's run, instead of a file.")
    format: Literal["alpaca", "chat"] = Field(default="alpaca", description="Layout of a record.")
    columns: dict[str, str] = Field(default_factory=dict, description="Expected name -> name in the file.")
    metrics: list[HeldOutMetric] = Field(
        default=["f1"], min_length=1, description="Scores of each answer; the first one counts for the overall result."
    )
    language: Language = Field(default="en", description="Of the answers.")
    limit: int = Field(default=200, ge=1, description="Records at most, drawn with a fixed seed.")
    max_tokens: int = Field(default=256, ge=1, description="Tokens of an answer.")
    validation_loss: bool = Field(default=True, description="Measure the loss of the reference answers, too.")

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.path is None) != self.run:
            raise ValueError("needs either path, or run: true")
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("names a metric twice")
        return self

    @property
    def source(self) -> DataSource:
        assert self.path is not None
        return DataSource(path=self.path, format=self.format, columns=self.columns)


class Stability(_Section):
    """The same question asked in different ways."""

    limit: int = Field(default=24, ge=1, description="Items that are asked again, drawn with a fixed seed.")
    seeds: int = Field(default=3, ge=2, le=20, description="Answers with different seeds, at each temperature above 0.")
    temperatures: list[float] = Field(default=[0.7], description="Temperatures above 0.")
    repeats: int = Field(default=2, ge=1, le=20, description="Times that each item is asked again at temperature 0.")

    @model_validator(mode="after")
    def _above_zero(self) -> Self:
        if wrong := [value for value in self.temperatures if not 0 < value <= 2]:
            raise ValueError(f"has the temperature {wrong[0]}; seeds differ only above 0 (and up to 2)")
        return self


class Judge(_Section):
    """A language model that compares two answers. It is asked in both orders; a disagreement is a tie."""

    url: str = Field(description="Any OpenAI-shaped endpoint, up to /v1.")
    model: str
    key_env: str | None = Field(default=None, description="Environment variable with the key.")
    rubric: str = Field(
        default="Which answer is more correct, more complete and more natural? Ignore the order and the length.",
        min_length=1,
        description="What the judge is asked; recorded with its verdicts.",
    )
    limit: int = Field(default=100, ge=1, description="Items that are judged, drawn with a fixed seed.")


class LmEval(_Section):
    """Tasks of lm-eval, asked over the same server. Needs the extra: pip install 'ft-service[lm-eval]'."""

    tasks: list[str] = Field(min_length=1, description="Names of tasks.")
    folder: str | None = Field(default=None, description="A folder with tasks of your own (YAML).")
    limit: int | None = Field(default=None, ge=1, description="Items of each task.")


class InspectAi(_Section):
    """Tasks of Inspect AI, asked over the same server by its own command from an environment of its own."""

    tasks: list[str] = Field(
        min_length=1, description="Files with tasks (task.py, task.py@name), or names of installed tasks."
    )
    folder: str = Field(default=".", description="The folder of the files, relative to the suite.")
    command: str = Field(default="inspect", description="The command: a path relative to the suite, or a name on PATH.")
    limit: int | None = Field(default=None, ge=1, description="Samples of each task.")


class Thresholds(_Section):
    """What an adapter must reach to be promoted. Shares are from 0 to 1."""

    min_items: int = Field(default=100, ge=1, description="Items that both models answered, at least.")
    max_forgetting: float = Field(
        default=0.05, ge=0, le=1, description="The score on the general items may fall by so much, with confidence."
    )
    min_stability: float | None = Field(default=None, ge=0, le=1, description="Self-agreement, at least.")
    min_votes: int | None = Field(default=None, ge=1, description="Votes of people, at least.")
    min_win_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The share of people's votes that it wins lies above this, with confidence.",
    )


class Suite(_Section):
    """What an adapter is judged by."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?$", description="Part of the evaluation's id.")
    description: str = ""
    license: str | None = Field(default=None, description="SPDX id of the license of its items.")
    items: list[str] = Field(default_factory=list, description="JSONL files, relative to this one; * matches.")
    general: list[str] = Field(
        default_factory=list,
        description="Items that show what was forgotten: JSONL files, or the name of a suite. They are not part of the "
        "overall result. Default: `items`.",
    )
    texts: str | None = Field(
        default=None, description="A text file, one text a line, for perplexity. Default: prompts of the general items."
    )
    held_out: list[HeldOut] = Field(default_factory=list)
    seed: int = Field(default=0, ge=0, description="Of every draw.")
    stability: Stability | None = None
    judge: Judge | None = None
    lm_eval: LmEval | None = None
    inspect_ai: InspectAi | None = None
    thresholds: Thresholds = Thresholds()


@dataclass(frozen=True)
class LoadedSuite:
    """A suite with its items."""

    suite: Suite
    items: tuple[Item, ...]
    general_ids: frozenset[str]
    """Ids of the items that show what was forgotten."""
    texts: tuple[str, ...]
    """General texts for perplexity."""
    digest: str
    """SHA-256 over the settings, the items and the texts."""


def load_suite(suite: str) -> LoadedSuite:
    """Read a suite by its path, or a shipped one by its name. Raises `SpecError` with every problem."""
    file = find_suite(suite)
    settings = _settings(file)
    own, problems = _items(file, settings.items)
    general, general_problems = _items(file, settings.general)
    problems += general_problems
    apart = [item.model_copy(update={"counts": False}) for item in general if item not in own]
    everything = [*own, *apart]
    problems += repeated_ids(everything)
    texts, text_problems = _texts(file, settings, general or own)
    problems += text_problems
    asks_others = settings.lm_eval or settings.inspect_ai
    if not (everything or settings.held_out or asks_others or problems):
        problems.append(
            Problem(
                "SUITE", str(file), "asks nothing", "Set items, held_out, lm_eval or inspect_ai, or use general-en."
            )
        )
    if problems:
        raise SpecError(problems, str(file))
    content = [settings.model_dump(mode="json"), [item.model_dump(mode="json") for item in everything], texts]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    general_ids = frozenset(item.id for item in general or own)
    held_out = [_from_folder(one, file.parent) for one in settings.held_out]
    lm_eval = settings.lm_eval
    if lm_eval is not None and lm_eval.folder is not None:
        tasks = (file.parent / Path(lm_eval.folder).expanduser()).absolute()
        lm_eval = lm_eval.model_copy(update={"folder": str(tasks)})
    inspect_ai = settings.inspect_ai and _inspect_from_folder(settings.inspect_ai, file.parent)
    settings = settings.model_copy(update={"held_out": held_out, "lm_eval": lm_eval, "inspect_ai": inspect_ai})
    return LoadedSuite(settings, tuple(everything), general_ids, tuple(texts), digest)


def _from_folder(held_out: HeldOut, folder: Path) -> HeldOut:
    """Relative paths start at the folder of the suite."""
    if held_out.path is None or held_out.path.startswith(HUB_PREFIX):
        return held_out
    return held_out.model_copy(update={"path": str(folder / Path(held_out.path).expanduser())})


def _inspect_from_folder(settings: InspectAi, folder: Path) -> InspectAi:
    """Relative paths start at the folder of the suite; a command that is no file there is a name on PATH."""
    command = folder / Path(settings.command).expanduser()
    tasks = (folder / Path(settings.folder).expanduser()).absolute()
    update = {"folder": str(tasks), **({"command": str(command.absolute())} if command.is_file() else {})}
    return settings.model_copy(update=update)


def find_suite(suite: str) -> Path:
    """The file of a suite: a path, or the name of a shipped one. Raises `SpecError`."""
    if Path(suite).is_file():
        return Path(suite)
    shipped = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    if suite in shipped:
        return SHIPPED / f"{suite}.yaml"
    fix = f"Pass the path of a YAML file, or the name of a shipped suite: {', '.join(shipped) or 'none'}."
    raise SpecError([Problem("--suite", suite, "does not exist", fix)], "suite")


def _settings(file: Path) -> Suite:
    where = str(file)
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = Problem("SUITE", where, f"cannot be read ({' '.join(str(error).split())})", "Fix that line.")
        raise SpecError([problem], where) from None
    if not isinstance(document, dict):
        problem = Problem("SUITE", where, "is not a mapping of settings", "See docs/evaluation.md for an example.")
        raise SpecError([problem], where)
    try:
        return Suite.model_validate(document)
    except ValidationError as error:
        raise SpecError(list(_problems(error)), where) from None


def _problems(error: ValidationError) -> Sequence[Problem]:
    problems = []
    for one in error.errors(include_url=False):
        keys = [str(key) for key in one["loc"]]
        section, field = _field_of(keys)
        message = one["msg"].removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            message = "is not a setting"
            fix = f"Known settings: {', '.join(section.model_fields) if section else 'none'}."
        else:
            fix = (field and section and section.model_fields[field].description) or "Fix or remove it."
        problems.append(Problem(".".join(keys) or "SUITE", one["input"], message, fix))
    return problems


def _field_of(keys: Sequence[str]) -> tuple[type[BaseModel] | None, str | None]:
    """The section that a path of keys leads to, and its field."""
    sections: dict[str, type[BaseModel]] = {
        "held_out": HeldOut,
        "stability": Stability,
        "judge": Judge,
        "lm_eval": LmEval,
        "inspect_ai": InspectAi,
        "thresholds": Thresholds,
    }
    section = sections.get(keys[0], Suite) if len(keys) > 1 else Suite
    field = next((key for key in reversed(keys) if key in section.model_fields), None)
    return section, field


def _items(file: Path, patterns: Sequence[str]) -> tuple[list[Item], list[Problem]]:
    """The items of the files that match, and what is wrong with them. A pattern may be the name of a shipped suite."""
    items: list[Item] = []
    problems: list[Problem] = []
    for pattern in patterns:
        shipped = SHIPPED / f"{pattern}.yaml"
        if shipped.is_file():
            settings = _settings(shipped)
            found, found_problems = _items(shipped, [*settings.items, *settings.general])
            items += found
            problems += found_problems
            continue
        path = Path(pattern).expanduser()
        root, relative = (
            (Path(path.anchor), path.relative_to(path.anchor)) if path.is_absolute() else (file.parent, path)
        )
        files = sorted(root.glob(str(relative)))
        if not files:
            fix = "Fix the path; relative ones start at the suite's folder."
            problems.append(Problem("items", pattern, "matches no file", fix))
        for one in files:
            try:
                items += read_items(one)
            except SpecError as error:
                problems += [
                    Problem(f"{one.name}: {problem.setting}", problem.value, problem.message, problem.fix)
                    for problem in error.problems
                ]
    return items, problems


def _texts(file: Path, settings: Suite, general: Sequence[Item]) -> tuple[list[str], list[Problem]]:
    if settings.texts is None:
        return list(dict.fromkeys(item.prompt for item in general)), []
    path = file.parent / Path(settings.texts).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        return [], [Problem("texts", settings.texts, f"cannot be read ({error})", "Fix the path.")]
    texts = [line for line in lines if line]
    return texts, [] if texts else [Problem("texts", settings.texts, "has no text", "Write one text a line.")]


def draw(items: Sequence[Any], limit: int, seed: int) -> list[Any]:
    """At most `limit` items, drawn without replacement, in their order. The same for the same items and seed."""
    if len(items) <= limit:
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), limit))
    return [items[index] for index in chosen]
