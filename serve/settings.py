"""What a server is configured with: one YAML file, which is also a Ray Serve config (`serve/config.yaml`)."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from ft_service.errors import UsageError
from ft_service.model.base import looks_like_folder, short_name
from ft_service.text import first_line

IMPORT_PATH = "serve.app:app"
_SQLITE = "sqlite:///"


def _from_env(name: str, description: str) -> Any:
    return Field(
        default_factory=lambda: os.environ.get(name) or None,
        validate_default=True,
        description=f"{description} Default: {name}.",
    )


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Autoscaling(_Settings):
    """Replicas of a base by the number of its requests. A base without requests for a while can go down to none."""

    min_replicas: int = Field(default=0, ge=0, description="Replicas while nobody asks.")
    max_replicas: int = Field(ge=1, description="Replicas at most. `autoscaling` takes the place of `replicas`.")
    target_requests: float = Field(default=16, gt=0, description="Requests in progress or waiting for each replica.")
    downscale_delay_seconds: float = Field(default=600, ge=0, description="How long fewer replicas must be enough.")


class BaseSettings(_Settings):
    """One base model and how it is served, with all adapters published for it."""

    base: str = Field(description="Hub id, folder, or URI of the model.")
    revision: str | None = Field(default=None, description="Hub revision.")
    name: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$",
        description="The base's model name over HTTP. Default: the last part of `base`, lower case.",
    )
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="What runs the base. transformers: CPU and GPU. vllm: GPUs in production; it must be installed.",
    )
    python: str | None = Field(
        default=None,
        description="Interpreter of the replicas, where their engine has its own environment. Default: the cluster's.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="What the base computes in; auto is the checkpoint's own."
    )
    precision: Literal["auto", "nf4"] = Field(
        default="auto", description="How the base's weights are stored; nf4 takes a quarter of the memory of bf16."
    )
    gpus: int | None = Field(
        default=None, ge=0, description="GPUs of one node for each replica. Default: 1 if the cluster has one, else 0."
    )
    cpus: float = Field(
        default=1,
        ge=0,
        description="CPUs that Ray reserves for each replica. On a CPU, also the threads of its operations.",
    )
    replicas: int = Field(default=1, ge=1, description="Replicas of the base.")
    autoscaling: Autoscaling | None = Field(default=None, description="Takes the place of `replicas`.")
    max_batch: int = Field(default=64, ge=1, description="Requests that a replica works on at once.")
    max_context: int | None = Field(
        default=None, ge=1, description="Tokens of prompt and answer. Default: the model's."
    )
    cache_gib: float | None = Field(
        default=None,
        gt=0,
        description="Keys and values of a replica. Default: what its device has left.",
    )
    adapter_gib: float = Field(default=4.0, gt=0, description="Loaded adapters of a replica.")
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(
        default=64, description="vllm: the largest rank of an adapter. Every adapter takes the memory of that rank."
    )
    pinned: tuple[str, ...] = Field(default=(), description="Adapter ids that are loaded at the start and stay.")

    @property
    def model_name(self) -> str:
        return self.name or short_name(self.base)

    @property
    def may_scale_to_zero(self) -> bool:
        return self.autoscaling is not None and self.autoscaling.min_replicas == 0


class Limits(_Settings):
    """What one request, or all of them, may take. More is refused by name, before any work is done."""

    max_body_mib: float = Field(default=8, gt=0, description="Bytes of a request's body.")
    max_queue: int = Field(default=256, ge=1, description="Requests that wait for a base; more get 429.")
    # At most: the files of a deleted adapter go after `SERVED_AFTER_HIDING`, and OpenAI's clients wait no longer.
    queue_seconds: float = Field(default=120, gt=0, le=600, description="How long a request waits for its first token.")
    request_seconds: float = Field(default=1800, gt=0, description="How long a request may take in all.")
    stop_seconds: float = Field(
        default=60, ge=0, description="How long `ft serve` lets answers go on after Ctrl-C or SIGTERM."
    )
    max_choices: int = Field(default=128, ge=1, description="Answers of one request: prompts times `n`.")


class WebhookSettings(_Settings):
    """An address that is called when a fine-tuning job ends."""

    url: str = Field(pattern=r"^https?://", description="Receives a POST for each job that ends.")
    secret: SecretStr | None = _from_env(
        "FT_WEBHOOK_SECRET", "Signs the calls; whsec_ and base64, or any text. Verified by `client.webhooks.unwrap`."
    )
    events: tuple[Literal["succeeded", "failed", "cancelled"], ...] = Field(
        default=("succeeded", "failed", "cancelled"), description="Ends that are reported."
    )

    @model_validator(mode="after")
    def _has_secret(self) -> Self:
        if self.secret is None:
            raise ValueError("secret: is required to sign the calls. Set it, or FT_WEBHOOK_SECRET")
        return self


class FileSettings(_Settings):
    """Files that clients upload."""

    max_file_mib: float = Field(default=512, gt=0, description="Size of a file that is sent in one request.")
    max_upload_mib: float = Field(default=8192, gt=0, description="Size of a file that is sent in parts.")
    max_part_mib: float = Field(default=64, gt=0, description="Size of a part.")
    upload_seconds: float = Field(default=3600, gt=0, description="How long the parts of a file may take to come.")
    key_gib: float = Field(default=100, gt=0, description="Files and parts of one key, in all.")
    min_examples: int = Field(default=10, ge=1, description="Examples that a training file has at least.")


class FullModelReplicas(Autoscaling):
    """Replicas of each model that a `full` job has made. All else is as its base has it."""

    max_replicas: int = Field(default=1, ge=1, description="Replicas at most of each model that a `full` job has made.")


class FineTuningSettings(_Settings):
    """OpenAI's fine-tuning API: jobs become runs on a Ray cluster. It needs a database."""

    ray_address: str = Field(
        default="auto", description="Dashboard of the cluster that trains, http://host:8265; auto: the server's own."
    )
    organization: str = Field(
        default="ft",
        pattern=r"^[a-z0-9][a-z0-9-]{0,39}$",
        description="In the names of models: ft:<base>:<organization>:<suffix>:<id>.",
    )
    templates: dict[str, str | dict[str, Any]] = Field(
        default_factory=dict,
        description="Base name -> run spec without data: a YAML file, or the settings themselves. Jobs change it.",
    )
    data_license: str = Field(
        default="LicenseRef-OWN",
        description="License that is recorded of uploaded files, if a job's metadata has no `license`.",
    )
    checked_mib: float = Field(
        default=2,
        ge=0,
        description="Files up to this size are checked before a job is accepted; larger ones by the job itself.",
    )
    gpu_type: str | None = Field(default=None, description="GPU type of the cluster, for plans and estimates.")
    price_per_gpu_hour: float | None = Field(default=None, ge=0, description="US dollars, for estimates.")
    full_models: FullModelReplicas = FullModelReplicas()
    files: FileSettings = FileSettings()
    webhooks: tuple[WebhookSettings, ...] = Field(default=(), description="Called when a job ends.")
    private_webhooks: bool = Field(
        default=False, description="Whether webhooks may go to private addresses, such as 10.0.0.1 or localhost."
    )


class ServeSettings(_Settings):
    """Settings of a server. Those that are not given come from the environment."""

    storage: str | None = _from_env("FT_STORAGE", "Where runs and adapters are.")
    bases: tuple[BaseSettings, ...] = ()
    database: str | None = _from_env("FT_DATABASE_URL", "SQLAlchemy URL of the service's database.")
    api_key: SecretStr | None = _from_env("FT_API_KEY", "A key that opens everything; others come from `ft keys`.")
    limits: Limits = Limits()
    gateways: int = Field(default=1, ge=1, description="Replicas of the gateway.")
    allowed_origins: tuple[str, ...] = Field(
        default=(), description="Web pages of other addresses that may call this server (CORS)."
    )
    fine_tuning: FineTuningSettings | None = Field(
        default=None, description="The fine-tuning API. Without it the server only answers."
    )
    log_prompts: bool = Field(default=False, description="Whether prompts and answers may be in the log.")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: Any) -> Any:
        """`base=...` (or FT_BASE) is short for one entry of `bases`, so that `serve run` can name a base."""
        if not isinstance(data, dict) or data.get("bases"):
            return data
        names = ("base", "revision", "replicas", "gpus", "engine", "python", "dtype")
        short = {key: data[key] for key in names if key in data}
        if "base" not in short and (base := os.environ.get("FT_BASE")):
            short = {"base": base, "revision": os.environ.get("FT_BASE_REVISION") or None, **short}
        rest = {key: value for key, value in data.items() if key not in short}
        return {**rest, "bases": [short]} if "base" in short else data

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [base.model_name for base in self.bases]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"bases: {', '.join(sorted(twice))} is named twice. Give one of them another `name`")
        return self

    def with_absolute_folders(self) -> Self:
        """Replicas run in other working directories."""
        bases = [
            base.model_copy(update={"base": absolute(base.base)}) if looks_like_folder(base.base) else base
            for base in self.bases
        ]
        database = self.database and _absolute_sqlite(self.database)
        copy = self.model_copy(update={"bases": tuple(bases), "database": database})
        if self.fine_tuning is None:
            return copy
        templates = {
            name: absolute(template) if isinstance(template, str) else template
            for name, template in self.fine_tuning.templates.items()
        }
        return copy.model_copy(update={"fine_tuning": self.fine_tuning.model_copy(update={"templates": templates})})


@dataclass(frozen=True)
class ServerConfig:
    """A config file: where the server listens, and its settings."""

    settings: ServeSettings
    host: str
    port: int


def load_config(file: Path) -> ServerConfig:
    """Read a Ray Serve config with this project's application. Raises `UsageError`."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        application = next(one for one in content["applications"] if one["import_path"] == IMPORT_PATH)
        http_options = content.get("http_options") or {}
        arguments = application.get("args") or {}
    except OSError as error:
        raise UsageError(f"--config = {str(file)!r}: cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config = {str(file)!r}: is not YAML ({first_line(error)}).") from None
    except (TypeError, KeyError, AttributeError, StopIteration):
        raise UsageError(
            f"--config = {str(file)!r}: has no application with import_path: {IMPORT_PATH}. See serve/config.yaml."
        ) from None
    if application.get("deployments"):
        raise UsageError(
            f"--config = {str(file)!r}: deployments are Ray Serve's own settings, which only serve deploy reads. Set "
            "replicas or autoscaling in args, and leave deployments out."
        )
    settings = read_settings(arguments, f"{file}: args.")
    return ServerConfig(settings, http_options.get("host", "127.0.0.1"), http_options.get("port", 8000))


def read_settings(given: Mapping[str, object], prefix: str) -> ServeSettings:
    """Raises `UsageError`, which names the setting behind `prefix`; behind ``FT_``, as a variable."""
    try:
        return ServeSettings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        place = f"{prefix}{path.upper() if prefix == 'FT_' else path}"
        raise UsageError(f"{place} = {first['input']!r}: {first['msg']}. Correct or unset it.") from None


def _absolute_sqlite(url: str) -> str:
    """The URL of a database, whose file is relative to this process: `sqlite:///service.db`."""
    file = url.removeprefix(_SQLITE)
    is_relative = file != url and file and not file.startswith(("/", ":", "file:", "?"))
    return f"{_SQLITE}{absolute(file)}" if is_relative else url


def absolute(folder: str) -> str:
    return str(Path(folder).expanduser().absolute())
