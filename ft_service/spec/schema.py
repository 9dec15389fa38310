"""RunSpec: what was asked. YAML in, one validated object out, or every problem at once.

This module imports neither torch nor ray, so a spec can be checked anywhere in a few milliseconds.
"""

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator

from ft_service.errors import Problem, SpecError

RUN_NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?$"

_CREDENTIALS = re.compile(r"^(\w+://)[^/@]+@")
PositiveInt = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(_Section):
    """The base model that is fine-tuned."""

    base: str = Field(
        min_length=1,
        description="Hub id, or a Llama-architecture checkpoint (safetensors): a folder, or an s3:// or gs:// URI.",
    )
    revision: str | None = Field(default=None, description="Hub revision (branch, tag or commit); none for a folder.")


class MethodSpec(_Section):
    """How the base is changed. The `lora_*` fields and those below them go to `peft.LoraConfig` as they are."""

    type: Literal["full", "lora", "qlora"] = Field(default="lora", description="What is trained, and in how many bits.")
    lora_rank: PositiveInt = Field(default=16, description="Width of the matrices A and B.")
    lora_alpha: PositiveInt = Field(default=32, description="The update is scaled by alpha / rank.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the input of A.")
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="'all-linear' (every linear layer but the head), module names, or a regular expression.",
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (rank-stabilised LoRA).")
    use_dora: bool = Field(default=False, description="Decompose the update into magnitude and direction (DoRA).")
    init_lora_weights: bool | Annotated[str, Field(pattern=r"^(gaussian|olora|pissa(_niter_\d+)?)$")] = Field(
        default=True, description="True (B = 0), 'gaussian', 'pissa', 'pissa_niter_16', 'olora': how A and B start."
    )

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation moves a part of the base weights into the adapter."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(("pissa", "olora"))


COLUMNS = ("instruction", "input", "output", "system", "messages", "text")
OPTIONAL_COLUMNS = ("input", "system")


class DataSource(_Section):
    """One file or folder of records, and the right to use them."""

    path: str = Field(
        min_length=1, description="A .jsonl, .json, .csv or .parquet file, a folder of them, or hub:NAME."
    )
    format: Literal["alpaca", "chat", "text"] = Field(default="alpaca", description="What a record means.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our name -> the file's: instruction, input, output, system | messages | text.",
    )
    source: str | None = Field(default=None, description="Where the data comes from; kept in the adapter's record.")
    license: str | None = Field(default=None, description="SPDX id of its license; kept in the adapter's record.")

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(set(columns) - set(COLUMNS)):
            raise ValueError(f"{unknown[0]!r} is none of ours: {', '.join(COLUMNS)}")
        return columns


class ValidationFraction(_Section):
    """Hold out a share of the training conversations."""

    fraction: float = Field(gt=0, lt=1, description="Share of the training conversations held out.")


def _validation_kind(value: object) -> str:
    return "sources" if isinstance(value, list) else "fraction"


ValidationData = Annotated[
    Annotated[ValidationFraction, Tag("fraction")] | Annotated[list[DataSource], Tag("sources")],
    Discriminator(_validation_kind),
]


class DataSpec(_Section):
    """What is trained on."""

    train: list[DataSource] = Field(min_length=1, description="Training sources, in order.")
    validation: ValidationData | None = Field(
        default=None, description="{fraction: 0.05}, or a list of sources like train; none measures no validation loss."
    )
    evaluation: list[DataSource] = Field(
        default_factory=list,
        description="Sets that the result is to be judged on: training records that hold their questions are told.",
    )
    waive: dict[str, str] = Field(
        default_factory=dict,
        description="Code of the data gate -> why its finding is accepted; kept in the adapter's record.",
    )
    max_seq_len: int = Field(default=2048, ge=8, le=131_072, description="Length of a packed row, in tokens.")
    packing: bool = Field(default=True, description="Put several short examples in one row, kept apart in attention.")


class EarlyStoppingSpec(_Section):
    """Stop when the validation loss no longer falls."""

    patience: PositiveInt = Field(description="Validations without improvement before the run stops.")
    min_delta: float = Field(default=0.0, ge=0, description="Smallest fall of the loss that counts as an improvement.")


class TrainSpec(_Section):
    """The optimization."""

    epochs: float | None = Field(default=None, gt=0, le=1000, description="Passes over the rows (default 3).")
    max_steps: PositiveInt | None = Field(default=None, description="Optimizer steps; instead of epochs.")
    global_batch_size: PositiveInt = Field(default=64, description="Packed rows per optimizer step, over all workers.")
    micro_batch_size: PositiveInt | Literal["auto"] = Field(
        default="auto", description="Packed rows per forward pass of one worker."
    )
    learning_rate: float | None = Field(
        default=None, gt=0, le=1, description="Peak rate (default 2e-4 for LoRA and QLoRA, 1e-5 for full)."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="Shape after the warm-up.")
    min_learning_rate_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Where cosine and linear end, as a share of the peak rate."
    )
    warmup_ratio: float = Field(default=0.03, ge=0, le=1, description="Share of the steps that warm up.")
    weight_decay: float = Field(
        default=0.0, ge=0, le=1, description="Decoupled decay of matrices; norms, biases: none."
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first decay rate.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's second decay rate.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Global gradient norm is clipped to this; 0: no clipping."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of row order, adapter initialisation and dropout.")
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="Type of weights and activations.")
    activation_checkpointing: bool | Literal["auto"] = Field(
        default="auto", description="Recompute activations in the backward pass (auto: where that is the faster fit)."
    )
    validate_every_steps: PositiveInt | None = Field(
        default=None, description="Steps between validation losses (default: ten times a run)."
    )
    early_stopping: EarlyStoppingSpec | None = Field(default=None, description="Stop when validation loss stalls.")


class WorkerRange(_Section):
    """As many workers as the cluster has to give, between two bounds."""

    min: PositiveInt = Field(description="Fewest workers that the run goes on with.")
    max: PositiveInt = Field(description="Most workers it uses.")


def _workers_kind(value: object) -> str:
    return "range" if isinstance(value, dict | WorkerRange) else "count"


Workers = Annotated[
    Annotated[WorkerRange, Tag("range")] | Annotated[PositiveInt, Tag("count")], Discriminator(_workers_kind)
]


class ParallelSpec(_Section):
    """How the run is spread over the cluster."""

    num_workers: Workers = Field(
        default=1,
        description="Training processes, one GPU each; {min: 4, max: 8} goes on with fewer when a node is lost.",
    )
    use_gpu: bool = Field(default=True, description="False trains on CPU (small models, tests).")
    cpus_per_worker: PositiveInt = Field(default=1, description="CPUs reserved, and threads used, per worker.")
    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(default="auto", description="What DeepSpeed ZeRO shards.")
    offload: Literal["auto", "none", "cpu", "nvme"] = Field(
        default="auto", description="Where optimizer and, under ZeRO-3, weights rest (auto: nvme only with nvme_path)."
    )
    hpz: Literal["auto"] | bool = Field(
        default="auto", description="A second copy of the weights, sharded within each node (ZeRO-3 over several)."
    )
    nvme_path: str | None = Field(default=None, description="Folder on a local NVMe drive; needed for offload: nvme.")
    accelerator_type: str | None = Field(default=None, description="Ray's name of the GPU to ask for, such as H100.")
    max_failures: int = Field(
        default=3, ge=0, description="Times the workers may die and be started again from the newest checkpoint."
    )
    hang_timeout_seconds: PositiveInt = Field(
        default=600,
        description="Seconds after which a worker that does not get on saves its Python stacks and dies. More than the "
        "slowest micro-step, validation batch, checkpoint, or load of a weight, the wait for slower workers included.",
    )

    @property
    def most_workers(self) -> int:
        return self.num_workers.max if isinstance(self.num_workers, WorkerRange) else self.num_workers

    @property
    def fewest_workers(self) -> int:
        return self.num_workers.min if isinstance(self.num_workers, WorkerRange) else self.num_workers


class CheckpointSpec(_Section):
    """Saving what a run needs to resume."""

    every_steps: PositiveInt | None = Field(default=50, description="Steps between checkpoints; null saves none.")
    keep: PositiveInt = Field(default=2, description="Newest checkpoints kept.")
    on_failure: Literal["continue", "stop"] = Field(
        default="continue", description="Whether a run whose checkpoint, or best weights, cannot be written trains on."
    )


class ReportSpec(_Section):
    """What people look at after the run."""

    tensorboard: bool = Field(
        default=False, description="Also write TensorBoard event files (pip install tensorboard)."
    )
    samples: int = Field(default=4, ge=0, le=64, description="Validation prompts answered by base and adapter.")
    sample_max_tokens: PositiveInt = Field(default=128, description="Longest sample answer, in tokens.")


class RunSpec(_Section):
    """One training run, as its author asked for it."""

    name: str = Field(pattern=RUN_NAME_PATTERN, description="Lower-case letters, digits and dashes, at most 48.")
    model: ModelSpec
    method: MethodSpec = Field(default_factory=MethodSpec)
    data: DataSpec
    train: TrainSpec = Field(default_factory=TrainSpec)
    parallel: ParallelSpec = Field(default_factory=ParallelSpec)
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    report: ReportSpec = Field(default_factory=ReportSpec)
    storage: str = Field(min_length=1, description="A folder that all machines see, or an s3:// or gs:// URI.")

    @field_validator("name", mode="before")
    @classmethod
    def _a_name_is_text(cls, name: object) -> object:
        return str(name) if isinstance(name, int) else name

    def worker_counts(self) -> list[int]:
        """The numbers of workers that may train this run, most first: all that divide the global batch evenly."""
        rows = self.train.micro_batch_size if isinstance(self.train.micro_batch_size, int) else 1
        counts = range(self.parallel.most_workers, self.parallel.fewest_workers - 1, -1)
        return [count for count in counts if self.train.global_batch_size % (rows * count) == 0]

    def with_workers(self, count: int) -> "RunSpec":
        """The same run on exactly so many workers."""
        return self.model_copy(update={"parallel": self.parallel.model_copy(update={"num_workers": count})})

    def contradictions(self) -> list[Problem]:
        """Settings that are each valid and together make no sense; empty when there are none."""
        problems: list[Problem] = []

        def refuse(setting: str, value: object, message: str, cure: str) -> None:
            problems.append(Problem(setting, value, message, cure))

        method, train, parallel = self.method, self.train, self.parallel
        if method.type == "full":
            for field in sorted(method.model_fields_set - {"type"}):
                refuse(
                    f"method.{field}",
                    getattr(method, field),
                    "has no meaning when method.type is 'full'",
                    "Remove it, or set method.type to lora or qlora.",
                )
        if method.type == "qlora" and method.changes_base:
            refuse(
                "method.init_lora_weights",
                method.init_lora_weights,
                "decomposes the base weights, which are 4-bit under qlora",
                "Use method.type: lora, or init_lora_weights: true.",
            )
        if method.type == "qlora" and train.precision == "fp32" and parallel.use_gpu:
            refuse(
                "train.precision",
                train.precision,
                "doubles the memory that qlora is chosen to save",
                "Use train.precision: bf16.",
            )
        if train.epochs is not None and train.max_steps is not None:
            refuse("train.max_steps", train.max_steps, "stands beside train.epochs", "Keep one of the two.")
        if parallel.fewest_workers > parallel.most_workers:
            refuse("parallel.num_workers.min", parallel.fewest_workers, "is above max", "Write the smaller one as min.")
        elif parallel.most_workers not in self.worker_counts():
            # With a range, the most must divide too: else capacity would be asked for that is never used.
            rows = train.micro_batch_size if isinstance(train.micro_batch_size, int) else 1
            of = f"{rows} rows x {parallel.most_workers} workers" if rows > 1 else f"{parallel.most_workers} workers"
            refuse(
                "train.global_batch_size",
                train.global_batch_size,
                f"is not a multiple of {of} (parallel.num_workers)",
                f"Use a multiple of {rows * parallel.most_workers}.",
            )
        if parallel.offload in ("cpu", "nvme") and parallel.zero_stage == 0:
            refuse(
                "parallel.offload",
                parallel.offload,
                "needs ZeRO, and parallel.zero_stage is 0",
                "Use zero_stage: auto (or 1, 2, 3), or offload: none.",
            )
        if parallel.offload == "nvme" and parallel.zero_stage in (1, 2):
            refuse(
                "parallel.offload",
                parallel.offload,
                f"needs ZeRO-3, and parallel.zero_stage is {parallel.zero_stage}",
                "Use zero_stage: 3 or auto, or offload: cpu.",
            )
        if parallel.offload == "nvme" and not parallel.nvme_path:
            refuse(
                "parallel.nvme_path", parallel.nvme_path, "is needed for offload: nvme", "Name a folder on the drive."
            )
        if parallel.nvme_path and parallel.offload in ("none", "cpu"):
            refuse("parallel.nvme_path", parallel.nvme_path, "is only used with offload: nvme or auto", "Remove it.")
        if parallel.hpz is True and parallel.zero_stage in (0, 1, 2):
            refuse(
                "parallel.hpz",
                True,
                f"copies sharded weights, and parallel.zero_stage is {parallel.zero_stage}",
                "Use zero_stage: 3 or auto, or hpz: false.",
            )
        if parallel.hpz is True and parallel.offload in ("cpu", "nvme"):
            refuse(
                "parallel.hpz",
                True,
                f"keeps a copy on the GPUs of what parallel.offload: {parallel.offload} takes off them",
                "Use offload: none, or hpz: false.",
            )
        if parallel.hpz is True and not parallel.use_gpu:
            refuse("parallel.hpz", True, "is for GPUs of several nodes", "Use hpz: false.")
        if parallel.accelerator_type and not parallel.use_gpu:
            refuse(
                "parallel.accelerator_type",
                parallel.accelerator_type,
                "asks for a GPU while parallel.use_gpu is false",
                "Remove it, or set use_gpu: true.",
            )
        if train.early_stopping and self.data.validation is None:
            refuse(
                "train.early_stopping",
                train.early_stopping.model_dump(),
                "needs a validation loss, and data.validation is not set",
                "Add data.validation, e.g. {fraction: 0.05}.",
            )
        if train.validate_every_steps and self.data.validation is None:
            refuse(
                "train.validate_every_steps",
                train.validate_every_steps,
                "is set while data.validation is not",
                "Add data.validation, e.g. {fraction: 0.05}.",
            )
        for setting, place in (("model.base", self.model.base), ("storage", self.storage)):
            if _CREDENTIALS.match(place):
                hidden = _CREDENTIALS.sub(r"\1***@", place)
                cure = "Give them by the environment (AWS_ACCESS_KEY_ID, ...) or the machine's role."
                refuse(setting, hidden, "holds credentials, which would stand in records and logs", cure)
        if self.model.revision and "://" in self.model.base:
            refuse("model.revision", self.model.revision, "means nothing on object storage", "Remove it.")
        if self.model.revision and Path(self.model.base).expanduser().is_dir():
            refuse("model.revision", self.model.revision, "means nothing for a folder", "Remove it.")
        return problems


def load_run_spec(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a run spec from YAML, apply dotted overrides such as ``train.max_steps=10``, and validate it.

    Raises `SpecError` with every problem found: unreadable YAML, unknown keys, wrong types, values out of range, and
    contradictions between settings.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError([Problem("SPEC", str(path), f"cannot be read ({error})", "Name a YAML file.")]) from None
    return parse_run_spec(text, overrides, where=str(path))


def parse_run_spec(text: str, overrides: Sequence[str] = (), where: str = "run spec") -> RunSpec:
    """Like `load_run_spec`, from YAML text; `where` names it in errors."""
    try:
        document = yaml.load(text, Loader=_SpecLoader)
    except yaml.YAMLError as error:
        problem = Problem("SPEC", where, f"is not valid YAML ({' '.join(str(error).split())})", "Mend the line named.")
        raise SpecError([problem], where) from None
    if not isinstance(document, dict):
        problem = Problem("SPEC", where, "is not a mapping of settings", "Start from jobs/specs/lora.yaml.")
        raise SpecError([problem], where)
    refused = [_apply_override(document, override) for override in overrides]
    problems = [problem for problem in refused if problem is not None]
    try:
        spec = RunSpec.model_validate(document)
    except ValidationError as error:
        problems += _problems_of(error, document)
        # Contradictions among the settings that are fine are told too: one round of mending, not several.
        try:
            spec = RunSpec.model_validate(_without(document, error))
        except ValidationError:
            raise SpecError(problems, where) from None
    problems += spec.contradictions()
    if problems:
        raise SpecError(problems, where)
    return spec


def dump_run_spec(spec: RunSpec) -> str:
    """The spec as YAML, without the settings its author left alone."""
    return yaml.safe_dump(spec.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)


class _SpecLoader(yaml.SafeLoader):
    """YAML 1.1 reads ``2e-4`` as text; people mean a number. A key given twice is a mistake, not a choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{sorted(twice)} given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_SpecLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


_WAIVE = "data.waive."


def _apply_override(document: dict[str, Any], override: str) -> Problem | None:
    setting, equals, text = override.partition("=")
    if not equals or not setting:
        return Problem(setting or "override", override, "is not setting=value", "Write e.g. train.max_steps=10.")
    try:
        value = yaml.load(text, Loader=_SpecLoader)
    except yaml.YAMLError:
        return Problem(setting, text, "is not a YAML value", "Quote it.")
    *parents, last = setting.split(".", 2 if setting.startswith(_WAIVE) else -1)  # its keys have dots themselves
    node: Any = document
    for depth, parent in enumerate(parents):
        node = _child(node, parent)
        if not isinstance(node, dict | list):
            return Problem(
                setting, text, f"has no section {'.'.join(parents[: depth + 1])!r} to go to", "Check the name."
            )
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            return Problem(setting, text, "names no item of the list", f"Use a number from 0 to {len(node) - 1}.")
        node[int(last)] = value
    else:
        node[last] = value
    return None


def _child(node: Any, key: str) -> Any:
    if isinstance(node, list):
        return node[int(key)] if key.isdigit() and int(key) < len(node) else None
    if node.get(key) is None:
        node[key] = {}
    return node[key]


_WANTED = {
    "missing": "is missing",
    "extra_forbidden": "is not a setting",
}


def _setting_path(item: Any, document: Any) -> tuple[list[str | int], Any]:
    """Where in the document an error lies, and the value there; pydantic's path also names union members."""
    keys: list[str | int] = []
    node = document
    for index, key in enumerate(location := item["loc"]):
        if (isinstance(node, dict) and key in node) or (
            isinstance(node, list) and isinstance(key, int) and key < len(node)
        ):
            node = node[key]
        elif item["type"] == "missing" and index == len(location) - 1:
            node = None
        else:
            continue
        keys.append(key)
    return keys, node


def _field_of(keys: Sequence[str | int]) -> tuple[type[BaseModel] | None, str]:
    """The section that holds the setting, and the setting's description in the schema ('' where there is none)."""
    section: type[BaseModel] | None = RunSpec
    description = ""
    for key in keys:
        if isinstance(key, int):
            continue
        field = section.model_fields.get(key) if section else None
        if field is None:
            return section, ""
        description = field.description or ""
        section = _section_in(field.annotation)
    return section, description


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_in(inner)) is not None:
            return found
    return None


def _problems_of(error: ValidationError, document: dict[str, Any]) -> list[Problem]:
    by_setting: dict[str, Problem] = {}
    for item in error.errors(include_url=False):
        keys, value = _setting_path(item, document)
        setting = ".".join(str(key) for key in keys) or "SPEC"
        message = item["msg"].removeprefix("Value error, ")
        message = _WANTED.get(item["type"], message[:1].lower() + message[1:])
        if item["type"] == "extra_forbidden":
            section, _ = _field_of(keys[:-1])
            known = list(section.model_fields) if section else []
            close = difflib.get_close_matches(str(keys[-1]), known, n=1)
            cure = f"Did you mean {close[0]}?" if close else f"Settings here: {', '.join(known)}."
        else:
            _, description = _field_of(keys)
            cure = description or "Mend or remove it."
        if setting in by_setting:  # the members of a union each complain: keep one line a setting
            earlier = by_setting[setting]
            message, cure = f"{earlier.message}; or {message}", earlier.cure
        by_setting[setting] = Problem(setting, value, message, cure)
    return list(by_setting.values())


def _without(document: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """A copy of the document without the settings that `error` names, and with something for the required ones."""
    pruned = copy.deepcopy(document)
    for item in error.errors(include_url=False):
        keys, _ = _setting_path(item, pruned)
        node: Any = pruned
        for key in keys[:-1]:
            node = node[key]
        if keys and isinstance(node, dict):
            node.pop(keys[-1], None)
    return {"name": "unnamed", "storage": "unnamed", **pruned}
