"""What takes the place of OpenAI's models, files and hyperparameters: a mapping file in YAML, and `--map` options.

models:
  gpt-4o-mini-2024-07-18: llama-3.1-8b-instruct
  gpt-3.5-*: llama-3.1-8b-instruct      # the beginning of names, and *
hyperparameters:                         # of every job; those not named keep the job's own value
  learning_rate_multiplier: auto
files:                                   # those that are not in --files as <id>.jsonl
  file-abc123: data/train.jsonl
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ft_service.errors import UsageError
from ft_service.text import first_line


class HyperparameterMapping(BaseModel):
    """Values in place of a job's own; OpenAI's bounds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Literal["auto"] | None = None
    batch_size: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] | None = None
    learning_rate_multiplier: Annotated[float, Field(gt=0)] | Literal["auto"] | None = None


class Mapping(BaseModel):
    """What takes the place of models, hyperparameters and files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, str] = {}
    hyperparameters: HyperparameterMapping = HyperparameterMapping()
    files: dict[str, Path] = {}

    def model(self, name: str) -> str | None:
        """The served model for OpenAI's `name`: the exact entry, or the longest beginning with a ``*``."""
        if name in self.models:
            return self.models[name]
        beginnings = [key for key in self.models if key.endswith("*") and name.startswith(key[:-1])]
        return self.models[max(beginnings, key=len)] if beginnings else None


def read_mapping(file: Path | None, pairs: Sequence[str]) -> Mapping:
    """The mapping file, with the `--map` options over it. Paths count from the file's folder. Raises `UsageError`."""
    mapping = _from_file(file) if file is not None else Mapping()
    models = dict(mapping.models)
    for pair in pairs:
        name, separator, served = pair.partition("=")
        if not (name and separator and served):
            raise UsageError(f"--map = {pair!r}: is no pair. Write OPENAI_MODEL=SERVED_MODEL.")
        models[name] = served
    return mapping.model_copy(update={"models": models})


def _from_file(file: Path) -> Mapping:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        mapping = Mapping.model_validate(content)
    except OSError as error:
        raise UsageError(f"--mapping = {str(file)!r}: cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--mapping = {str(file)!r}: is not YAML ({first_line(error)}).") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(f"--mapping = {str(file)!r}: {place}: {first['msg']}.") from None
    files = {name: file.parent / path for name, path in mapping.files.items()}
    return mapping.model_copy(update={"files": files})
