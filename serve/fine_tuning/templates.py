"""The templates of `fine_tuning`: a run spec without data for each base that can be fine-tuned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ft_service.errors import SpecError, UsageError
from ft_service.text import first_line
from serve.fine_tuning.run_spec import Hyperparameters, JobSettings, unresolved_spec
from serve.settings import BaseSettings, ServeSettings

_EXAMPLE = JobSettings("example", 0, Hyperparameters(), "training.jsonl", None, "an upload", "CC0-1.0", {}, None)


def with_templates_read(settings: ServeSettings) -> ServeSettings:
    """`settings` with the content of each template instead of its file's name.

    Raises `UsageError`, which names the template, for one that cannot be read or that no job could use.
    """
    tuning = settings.fine_tuning
    if tuning is None:
        return settings
    bases = {base.model_name: base for base in settings.bases}
    templates: dict[str, str | dict[str, Any]] = {
        name: dict(_checked(name, template, bases, settings.storage or "storage"))
        for name, template in tuning.templates.items()
    }
    return settings.model_copy(update={"fine_tuning": tuning.model_copy(update={"templates": templates})})


def full_parents(settings: ServeSettings) -> list[str]:
    """Bases whose jobs train all weights, so that their models are bases too.

    Raises `UsageError` as `with_templates_read` does.
    """
    tuning = with_templates_read(settings).fine_tuning
    templates = tuning.templates if tuning else {}
    return [
        name
        for name, template in templates.items()
        if isinstance(template, dict) and (template.get("method") or {}).get("type") == "full"
    ]


def _checked(
    name: str, template: str | dict[str, Any], bases: Mapping[str, BaseSettings], storage: str
) -> Mapping[str, Any]:
    where = f"fine_tuning.templates.{name}"
    if name not in bases:
        raise UsageError(f"{where}: is no base of this server. Bases: {', '.join(bases) or 'none'}.")
    document = _read(where, template) if isinstance(template, str) else dict(template)
    base = bases[name]
    document.setdefault("model", {"base": base.base, **({"revision": base.revision} if base.revision else {})})
    if "train" in (document.get("data") or {}):
        raise UsageError(f"{where}: has data.train, and a job brings its own. Remove it.")
    try:
        unresolved_spec(document, _EXAMPLE, storage, where)
    except SpecError as error:
        raise UsageError(f"{where}: cannot be used.\n{error}") from None
    return document


def _read(where: str, file: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{where} = {file!r}: cannot be read ({first_line(error)}).") from None
    if not isinstance(content, dict):
        raise UsageError(f"{where} = {file!r}: is not a mapping of settings. See serve/config.yaml.")
    return content
