"""The reference of settings says what the schema says: the page, the file for editors, and the spec to start from."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.spec.load import load_run_spec
from ft_service.spec.reference import EDITOR_LINE, SCHEMA_FILE, as_markdown, as_yaml, json_schema, settings
from ft_service.spec.schema import RunSpec

ROOT = Path(__file__).resolve().parents[2]
SPECS = sorted((ROOT / "jobs/specs").glob("*.yaml"))


def test_every_setting_that_a_spec_accepts_is_listed_with_its_meaning() -> None:
    found = {setting.path: setting for setting in settings()}
    minimal = RunSpec.model_validate(yaml.safe_load(as_yaml()))
    for section in ("model", "method", "data", "train", "parallel", "checkpoint", "report"):
        for name in type(getattr(minimal, section)).model_fields:
            assert found[f"{section}.{name}"].description, name
    for path in ("data.train[].path", "data.validation.fraction", "parallel.num_workers.min", "name", "storage"):
        assert path in found
    assert found["train.max_steps"].type == "whole number > 0 or null"
    assert found["parallel.zero_stage"].default == "auto"


def test_the_spec_to_start_from_is_valid_and_has_only_defaults(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(as_yaml())
    spec = load_run_spec(tmp_path / "spec.yaml", [])
    assert spec.model_dump(exclude_unset=True).keys() == {"name", "model", "data", "storage"}


def test_its_commented_sections_are_the_defaults_of_the_schema() -> None:
    written = yaml.safe_load(re.sub(r"(?m)^# (?=[a-z]+:$|  )", "", as_yaml()))
    written["method"].pop("description", None)
    spec = RunSpec.model_validate(written)
    assert spec == RunSpec.model_validate(yaml.safe_load(as_yaml()))
    assert set(written["train"]) == set(RunSpec.model_fields["train"].annotation.model_fields)  # type: ignore[union-attr]


def test_the_page_of_settings_and_the_schema_file_are_up_to_date() -> None:
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == as_markdown(), (
        "ft spec --markdown > docs/settings.md"
    )
    stored = json.loads((ROOT / "jobs" / SCHEMA_FILE).read_text(encoding="utf-8"))
    assert stored == json_schema(), f"ft spec --json > jobs/{SCHEMA_FILE}"


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_editors_find_the_schema_of_a_shipped_spec(path: Path) -> None:
    assert EDITOR_LINE in path.read_text(encoding="utf-8").splitlines()
    assert (path.parent / EDITOR_LINE.partition("$schema=")[2]).resolve() == ROOT / "jobs" / SCHEMA_FILE


def test_without_a_checkout_the_schema_lies_beside_the_spec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ft_service.spec.reference._SHIPPED_SCHEMA", tmp_path / SCHEMA_FILE)
    lines = as_yaml().splitlines()
    assert (
        lines[1] == f"# yaml-language-server: $schema={SCHEMA_FILE}" and f"ft spec --json > {SCHEMA_FILE}" in lines[0]
    )


@pytest.mark.parametrize(
    ("option", "begins"),
    [
        ([], ""),
        (["--json"], "{"),
        (["--yaml"], f"# yaml-language-server: $schema={ROOT}/jobs/{SCHEMA_FILE}"),
        (["--markdown"], "# Settings of a run spec"),
    ],
)
def test_the_command_prints_each_form(option: list[str], begins: str) -> None:
    result = CliRunner().invoke(app, ["spec", *option], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and result.output.startswith(begins) and "lora_rank" in result.output
