"""Settings of the server: documented, and wrong ones refused by name."""

from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from serve.settings import BaseSettings, Limits, ServeSettings
from tests.hosts import ROOT

PAGE = ROOT / "docs/serving.md"
START = "<!-- settings: made from serve/settings.py, held by a test -->\n"
END = "<!-- end of settings -->"


def rows(model: type[BaseModel], prefix: str = "") -> list[str]:
    made = []
    for name, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *_inside(field.annotation)) if _is_model(kind)]
        if kinds:
            made += rows(kinds[0], f"{prefix}{name}.")
            continue
        default = "" if field.default in (PydanticUndefined, None, ()) else f"`{field.default}`"
        made.append(f"| `{prefix}{name}` | {default} | {field.description or ''} |")
    return made


def _inside(kind: Any) -> list[Any]:
    return [inner for one in get_args(kind) for inner in (one, *_inside(one))]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def test_the_page_lists_every_setting_with_default_and_meaning():
    table = "\n".join(["| setting | default | |", "|---|---|---|", *rows(ServeSettings)]) + "\n"
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    expected = f"{before}{START}{table}{END}{after}"
    if __name__ == "__main__":
        PAGE.write_text(expected, encoding="utf-8")
    else:
        assert page == expected, "run: python -m tests.serve.test_settings"


def test_every_setting_has_a_meaning():
    without = [row for row in rows(ServeSettings) if row.endswith("|  |")]
    assert without == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"bases": [{"base": "a/x"}, {"base": "b/x"}]},
        {"bases": [{"base": "a/x", "engine": "other"}]},
        {"bases": [{"base": "a/x", "replicas": 0}]},
        {"nonsense": 1},
        {"limits": {"max_queue": -1}},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        ServeSettings.model_validate(wrong)


def test_one_base_can_be_named_in_short_and_by_the_environment(monkeypatch):
    assert ServeSettings.model_validate({"base": "a/X", "replicas": "2"}).bases == (
        BaseSettings(base="a/X", replicas=2),
    )
    monkeypatch.setenv("FT_BASE", "a/Y")
    assert ServeSettings.model_validate({}).bases[0].model_name == "y"
    assert ServeSettings.model_validate({"bases": [{"base": "a/X"}]}).bases[0].base == "a/X"
    assert ServeSettings().limits == Limits()
    monkeypatch.setenv("FT_API_KEY", "s3cret")
    assert ServeSettings().api_key.get_secret_value() == "s3cret" and "s3cret" not in repr(ServeSettings())


if __name__ == "__main__":
    test_the_page_lists_every_setting_with_default_and_meaning()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///service.db", "sqlite:////here/service.db"),
        ("sqlite:///data/service.db?timeout=5", "sqlite:////here/data/service.db?timeout=5"),
        ("sqlite:////var/lib/ft/service.db", "sqlite:////var/lib/ft/service.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql+pg8000://user@host/name", "postgresql+pg8000://user@host/name"),
        (None, None),
    ],
)
def test_a_database_file_is_relative_to_where_the_server_is_started(monkeypatch, tmp_path, url, expected):
    """Not to the working directories of its replicas."""
    monkeypatch.chdir(tmp_path)
    database = ServeSettings(database=url).with_absolute_folders().database
    assert database == (expected and expected.replace("/here", str(tmp_path)))
