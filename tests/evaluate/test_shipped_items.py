"""The items that ship: complete, well formed, decidable by their metric, and none made from another by a template."""

import functools
import itertools
import json
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SUITES = ROOT / "ft_service" / "evaluate" / "suites"
ANSWERS = Path(__file__).with_name("shipped_answers.jsonl")
"""For each item, answers that its metric must accept (`good`) and must reject (`bad`)."""

SKILLS = {
    "arithmetic",
    "reading",
    "instructions",
    "common_sense",
    "summarising",
    "extraction",
    "code",
    "unanswerable",
}
MINIMUM_OF_A_SKILL = {"en": 38, "ja": 19}
FIELDS = {"id", "skill", "language", "cluster", "prompt", "system", "metric", "reference", "options", "max_tokens"}
REQUIRED_OPTIONS = {
    "exact": set(),
    "number": set(),
    "choice": {"choices"},
    "f1": set(),
    "rouge_l": set(),
    "chrf": set(),
    "regex": {"pattern"},
    "json": {"schema", "expected"},
    "rules": {"rules"},
    "unanswerable": {"pattern", "forbidden"},
}
OPTIONAL_OPTIONS = {"number": {"tolerance"}, "regex": {"forbidden"}, "json": {"code_fence"}}
WITHOUT_REFERENCE = {"json", "rules"}
RULES: dict[str, dict[str, type]] = {
    "words_at_most": {"count": int},
    "words_at_least": {"count": int},
    "characters_at_most": {"count": int},
    "characters_at_least": {"count": int},
    "sentences_exactly": {"count": int},
    "bullets_exactly": {"count": int},
    "lines_exactly": {"count": int},
    "numbered": {"count": int},
    "paragraphs_exactly": {"count": int},
    "contains": {"text": str},
    "forbids": {"text": str},
    "starts_with": {"text": str},
    "ends_with": {"text": str},
    "keyword_order": {"texts": list},
    "language": {"code": str},
    "lowercase": {},
    "uppercase": {},
    "json": {},
    "no_commas": {},
    "polite": {},
    "title": {},
}
OPTIONAL_PARAMETERS = {"contains": {"times"}}

Item = dict[str, Any]


def suites() -> list[Path]:
    return sorted(SUITES.glob("*.yaml"))


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@functools.cache
def items() -> tuple[Item, ...]:
    files = [file for suite in suites() for file in yaml.safe_load(suite.read_text(encoding="utf-8"))["items"]]
    return tuple(item for file in files for item in read_lines(SUITES / file))


@functools.cache
def answers() -> dict[str, dict[str, list[str]]]:
    return {line["id"]: line for line in read_lines(ANSWERS)}


def of_metric(*metrics: str) -> list[Item]:
    return [item for item in items() if item["metric"] in metrics]


def texts_of(reference: str | list[str]) -> list[str]:
    return [reference] if isinstance(reference, str) else reference


def test_every_file_of_items_belongs_to_one_suite() -> None:
    listed = [file for suite in suites() for file in yaml.safe_load(suite.read_text(encoding="utf-8"))["items"]]
    assert sorted(listed) == sorted(f"items/{file.name}" for file in (SUITES / "items").iterdir())


def test_suites_carry_the_license_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for suite in suites():
        settings = yaml.safe_load(suite.read_text(encoding="utf-8"))
        assert settings["name"] == suite.stem
        assert settings["description"]
        assert settings["license"] == project["license"] == "Apache-2.0"


def test_the_files_are_package_data() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folder = SUITES.parent
    packaged = {file for pattern in setuptools["package-data"]["ft_service.evaluate"] for file in folder.glob(pattern)}
    assert {file for file in SUITES.rglob("*") if file.is_file()} <= packaged


def test_ids_are_unique_and_say_language_and_skill() -> None:
    ids = [item["id"] for item in items()]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    wrong = [item["id"] for item in items() if item["id"].rsplit("-", 1)[0] != f"{item['language']}-{item['skill']}"]
    assert wrong == []


def test_every_skill_has_enough_items_in_both_languages() -> None:
    counts = Counter((item["language"], item["skill"]) for item in items())
    assert set(counts) == {(language, skill) for language in MINIMUM_OF_A_SKILL for skill in SKILLS}
    assert [key for key, count in counts.items() if count < MINIMUM_OF_A_SKILL[key[0]]] == []


def test_the_counts_in_the_descriptions_are_true() -> None:
    counts = Counter(item["language"] for item in items())
    for suite in suites():
        settings = yaml.safe_load(suite.read_text(encoding="utf-8"))
        assert settings["description"].startswith(f"{counts[suite.stem.rsplit('-', 1)[1]]} items ")


def test_items_have_the_fields_of_an_item_and_no_others() -> None:
    for item in items():
        assert set(item) == FIELDS, item["id"]
        assert item["system"] is None or item["system"].strip(), item["id"]
        assert item["prompt"] == item["prompt"].strip() != "", item["id"]
        assert item["cluster"], item["id"]
        assert 16 <= item["max_tokens"] <= 512, item["id"]


def test_options_fit_the_metric() -> None:
    for item in items():
        metric = item["metric"]
        options = set(item["options"])
        assert REQUIRED_OPTIONS[metric] <= options, item["id"]
        assert options <= REQUIRED_OPTIONS[metric] | OPTIONAL_OPTIONS.get(metric, set()), item["id"]


def test_references_are_there_where_the_metric_needs_them() -> None:
    for item in items():
        if item["metric"] in WITHOUT_REFERENCE:
            assert item["reference"] is None, item["id"]
        else:
            references = texts_of(item["reference"])
            assert references and all(text.strip() for text in references), item["id"]


def test_references_of_numbers_are_numbers() -> None:
    for item in of_metric("number"):
        assert all(float(text) is not None for text in texts_of(item["reference"])), item["id"]
        assert item["options"].get("tolerance", 0) >= 0, item["id"]


def test_the_prompt_shows_every_choice() -> None:
    for item in of_metric("choice"):
        choices = item["options"]["choices"]
        assert item["reference"] in choices, item["id"]
        assert len(set(choices.values())) == len(choices) >= 3, item["id"]
        assert [f"{letter}. {text}" in item["prompt"] for letter, text in choices.items()] == [True] * len(choices)


@pytest.mark.parametrize("language", sorted(MINIMUM_OF_A_SKILL))
def test_no_letter_is_right_much_more_often_than_the_others(language: str) -> None:
    """Whoever always answers "A" must not score far above chance."""
    letters = [item["reference"] for item in of_metric("choice") if item["language"] == language]
    assert max(Counter(letters).values()) <= 0.35 * len(letters)


@pytest.mark.parametrize("language", sorted(MINIMUM_OF_A_SKILL))
def test_refusing_everything_fails_on_the_answerable_items_between(language: str) -> None:
    metrics = [item["metric"] for item in items() if (item["language"], item["skill"]) == (language, "unanswerable")]
    assert 0.2 <= sum(metric != "unanswerable" for metric in metrics) / len(metrics) <= 0.4


def test_rules_exist_and_have_their_parameters() -> None:
    for item in of_metric("rules"):
        assert item["options"]["rules"], item["id"]
        for rule in item["options"]["rules"]:
            parameters = RULES[rule["rule"]]
            given = {name: value for name, value in rule.items() if name != "rule"}
            assert set(parameters) <= set(given), item["id"]
            assert set(given) <= set(parameters) | OPTIONAL_PARAMETERS.get(rule["rule"], set()), item["id"]
            assert all(isinstance(given[name], kind) for name, kind in parameters.items()), item["id"]


def test_every_item_has_a_good_and_a_bad_answer() -> None:
    assert set(answers()) == {item["id"] for item in items()}
    assert [name for name, answer in answers().items() if not answer["good"] or not answer["bad"]] == []


@pytest.mark.parametrize("metric", ["regex", "unanswerable"])
def test_patterns_accept_good_answers_and_reject_bad_ones(metric: str) -> None:
    for item in of_metric(metric):
        pattern = re.compile(item["options"]["pattern"])
        forbidden = re.compile(item["options"].get("forbidden", r"(?!)"))

        def accepts(answer: str, pattern: re.Pattern[str] = pattern, forbidden: re.Pattern[str] = forbidden) -> bool:
            return bool(pattern.search(answer)) and not forbidden.search(answer)

        assert [answer for answer in answers()[item["id"]]["good"] if not accepts(answer)] == [], item["id"]
        assert [answer for answer in answers()[item["id"]]["bad"] if accepts(answer)] == [], item["id"]


def test_patterns_fail_fast_on_long_answers() -> None:
    """A pattern with nested repetition would hang here, and with it an evaluation: this text ends by itself."""
    long_answers = ["word " * 600 + "!", "w" * 3000, "これは長い答えです。" * 300]
    for item in of_metric("regex", "unanswerable"):
        for pattern in (item["options"]["pattern"], item["options"].get("forbidden", r"(?!)")):
            for answer in long_answers:
                re.search(pattern, answer)


def test_schemas_are_schemas_and_fit_the_expected_values() -> None:
    for item in of_metric("json"):
        schema = item["options"]["schema"]
        expected = item["options"]["expected"]
        jsonschema.Draft202012Validator.check_schema(schema)
        assert set(schema["required"]) == set(schema["properties"]), item["id"]
        assert not expected or set(expected) == set(schema["required"]), item["id"]
        for key, value in expected.items():
            for accepted in value if isinstance(value, list) else [value]:
                jsonschema.validate(accepted, schema["properties"][key])


def test_json_answers_are_accepted_by_their_values() -> None:
    for item in of_metric("json"):
        assert [text for text in answers()[item["id"]]["good"] if not has_expected_json(item, text)] == [], item["id"]
        assert [text for text in answers()[item["id"]]["bad"] if has_expected_json(item, text)] == [], item["id"]


def has_expected_json(item: Item, text: str) -> bool:
    """A list among the expected values holds what is accepted; a value that is itself a list is therefore nested."""
    try:
        answer = json.loads(text)
        jsonschema.validate(answer, item["options"]["schema"])
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return False
    return all(
        answer[key] in (value if isinstance(value, list) else [value])
        for key, value in item["options"]["expected"].items()
    )


def test_the_prompt_names_every_key_of_the_expected_json() -> None:
    for item in of_metric("json"):
        missing = [key for key in item["options"]["schema"]["required"] if key not in item["prompt"]]
        assert missing == [], item["id"]


# No templates: neither as written, nor after numbers and names are masked.

NUMBERS = re.compile(
    r"\d[\d,.:]*|[一二三四五六七八九十百千万]+|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|twelve)\b"
)
NAMES = re.compile(r"\b[A-Z][a-z]+\b|[ァ-ヶー]{2,}")


def masked(text: str) -> str:
    return NUMBERS.sub("0", NAMES.sub("X", text))


def grams(text: str, size: int = 5) -> frozenset[str]:
    text = re.sub(r"\s+", " ", text)
    return frozenset(text[start : start + size] for start in range(max(1, len(text) - size + 1)))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    small, large = sorted((left, right), key=len)
    if len(small) < 0.3 * len(large):
        return 0.0  # bounded by the ratio of the sizes, which is below every limit used here
    common = len(left & right)
    return common / (len(left) + len(right) - common)


def too_similar(texts: dict[str, str], limit: float, clusters: dict[str, str]) -> list[tuple[str, str, float]]:
    sets = {name: grams(text) for name, text in texts.items()}
    return [
        (left, right, round(jaccard(sets[left], sets[right]), 2))
        for left, right in itertools.combinations(sets, 2)
        if clusters[left] != clusters[right] and jaccard(sets[left], sets[right]) >= limit
    ]


@pytest.mark.parametrize("language", sorted(MINIMUM_OF_A_SKILL))
def test_no_two_prompts_are_near_duplicates(language: str) -> None:
    prompts = {item["id"]: item["prompt"] for item in items() if item["language"] == language}
    clusters = {item["id"]: item["cluster"] for item in items()}
    assert too_similar(prompts, 0.5, clusters) == []


@pytest.mark.parametrize("language", sorted(MINIMUM_OF_A_SKILL))
def test_no_prompt_is_another_with_numbers_or_names_swapped(language: str) -> None:
    prompts = {item["id"]: masked(item["prompt"]) for item in items() if item["language"] == language}
    clusters = {item["id"]: item["cluster"] for item in items()}
    assert too_similar(prompts, 0.7, clusters) == []


def test_items_that_share_a_passage_ask_different_questions() -> None:
    """Compared without the lines that both prompts have: the passage, and the form of the answer."""
    by_cluster: dict[str, list[Item]] = {}
    for item in items():
        by_cluster.setdefault(item["cluster"], []).append(item)
    similar = []
    for mates in by_cluster.values():
        for left, right in itertools.combinations(mates, 2):
            lines_of_left = left["prompt"].splitlines()
            lines_of_right = right["prompt"].splitlines()
            only_left = "\n".join(line for line in lines_of_left if line not in lines_of_right)
            only_right = "\n".join(line for line in lines_of_right if line not in lines_of_left)
            assert only_left and only_right, (left["id"], right["id"])
            if jaccard(grams(masked(only_left)), grams(masked(only_right))) >= 0.7:
                similar.append((left["id"], right["id"]))
    assert similar == []


def test_the_check_for_templates_finds_one() -> None:
    template = "{} has {} apples and gives {} of them to {}. How many apples are left? Reply with the number only."
    prompts = {
        "first": masked(template.format("Anna", 12, 5, "Bert")),
        "second": masked(template.format("Carlos", 31, 8, "Dora")),
    }
    assert [pair[:2] for pair in too_similar(prompts, 0.7, {"first": "1", "second": "2"})] == [("first", "second")]


def test_passages_of_the_reading_items_are_passages() -> None:
    for item in items():
        if item["skill"] == "reading":
            length = len(item["prompt"].split()) if item["language"] == "en" else len(item["prompt"])
            assert (80 <= length <= 330) if item["language"] == "en" else (240 <= length <= 700), item["id"]
