"""An invalid run spec fails before anything starts, with all problems at once: setting, value and fix of each."""

import subprocess
import sys
from pathlib import Path

import pytest

from ft_service.catalog.gpus import find_gpu
from ft_service.errors import SpecError
from ft_service.spec.load import dump_run_spec, load_run_spec, parse_run_spec

SPEC = """
name: bot
model: {base: some/model}
data: {train: [{path: a.jsonl}]}
storage: there
"""


def error_of(*overrides: str, text: str = SPEC) -> str:
    with pytest.raises(SpecError) as error:
        parse_run_spec(text, overrides)
    return str(error.value)


def test_all_problems_are_reported_at_once() -> None:
    message = error_of(
        "model.revisio=x",  # unknown
        "train.learning_rate=fast",  # type
        "train.global_batch_size=0",  # range
        "method={type: full, lora_rank: 8}",  # contradiction
        "nonsense",  # no override
    )
    assert "5 problems" in message
    for part in ("model.revisio = 'x'", "Did you mean revision?", "train.learning_rate = 'fast'"):
        assert part in message
    for part in ("train.global_batch_size = 0", "method.lora_rank = 8", "set method.type to lora", "nonsense"):
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "setting", "fix"),
    [
        (["method={type: full, lora_alpha: 8}"], "method.lora_alpha = 8", "Remove it"),
        (["method={type: qlora, init_lora_weights: pissa}"], "method.init_lora_weights = 'pissa'", "method.type: lora"),
        (["method.type=qlora", "train.precision=fp32"], "train.precision = 'fp32'", "bf16"),
        (["train.epochs=1", "train.max_steps=5"], "train.max_steps = 5", "train.max_steps=null"),
        (["train.micro_batch_size=3", "parallel.num_workers=2"], "train.global_batch_size = 64", "multiple of 6"),
        (["parallel.num_workers=5"], "train.global_batch_size = 64", "multiple of 5"),
        (["parallel.num_workers={min: 4, max: 2}"], "parallel.num_workers.min = 4", "at most max"),
        (["parallel.zero_stage=0", "parallel.offload=cpu"], "parallel.offload = 'cpu'", "zero_stage: auto"),
        (
            ["parallel.zero_stage=2", "parallel.offload=nvme", "parallel.nvme_path=/x"],
            "parallel.offload = 'nvme'",
            "zero_stage: 3",
        ),
        (["parallel.offload=nvme"], "parallel.nvme_path = None", "Set it to a folder"),
        (["parallel.nvme_path=/x", "parallel.offload=none"], "parallel.nvme_path = '/x'", "Remove it"),
        (["parallel.hpz=true", "parallel.zero_stage=2"], "parallel.hpz = True", "zero_stage: 3"),
        (["parallel.hpz=true", "parallel.offload=cpu"], "parallel.hpz = True", "offload: none"),
        (["parallel.hpz=true", "parallel.use_gpu=false"], "parallel.hpz = True", "hpz: false"),
        (["parallel.use_gpu=false", "parallel.accelerator_type=H100"], "parallel.accelerator_type", "use_gpu: true"),
        (["train.early_stopping={patience: 2}"], "train.early_stopping", "data.validation"),
        (["train.validate_every_steps=2"], "train.validate_every_steps = 2", "data.validation"),
        (["model.base=.", "model.revision=main"], "model.revision = 'main'", "Remove it"),
        (["model.base=s3://bucket/llama", "model.revision=main"], "model.revision = 'main'", "Remove it"),
    ],
)
def test_a_contradiction_names_setting_and_fix(overrides: list[str], setting: str, fix: str) -> None:
    message = error_of(*overrides)
    assert "1 problem" in message
    assert setting in message
    assert fix in message


def test_an_invalid_union_member_is_one_problem() -> None:
    message = error_of("data.validation={fraction: 2}")
    assert "1 problem" in message
    assert "data.validation.fraction = 2" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("- a\n- b", "is not a mapping"),
        ("", "is not a mapping"),
        (SPEC + "name: other\n", "duplicate keys: name"),
        ("storage: x", "data = None: is missing"),
    ],
)
def test_text_that_is_not_a_spec_is_an_error(text: str, message: str) -> None:
    assert message in error_of(text=text)


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot be read.*Pass the path of a YAML file"):
        load_run_spec(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot be read"):
        load_run_spec(tmp_path / "binary.yaml")


def test_overrides_reach_sections_list_items_and_numbers() -> None:
    spec = parse_run_spec(
        SPEC, ["train.learning_rate=2e-4", "data.train.0.format=chat", "train.early_stopping=null", "name=7b"]
    )
    assert spec.train.learning_rate == 2e-4
    assert spec.data.train[0].format == "chat"
    assert spec.name == "7b"
    for override in ("data.train.3.format=chat", "name.inner=3"):
        assert override.partition("=")[0] in error_of(override)


def test_null_unsets_a_setting_and_never_hides_a_misspelt_one() -> None:
    text = SPEC + "\nmethod: {lora_rank: 8, lora_alpha: 9}\n" if "method:" not in SPEC else SPEC
    assert parse_run_spec(text, ["method.lora_rank=null"]).method.lora_rank == 16
    assert parse_run_spec(text, ["checkpoint.every_steps=null"]).checkpoint.every_steps is None, "null has a meaning"
    assert parse_run_spec(text, ["data.waive.form.bad=known", "data.waive.form.bad=null"]).data.waive == {}
    assert "method.lora_rnak" in error_of("method.lora_rnak=null")


@pytest.mark.parametrize("reason", ["see ticket #4", "#4", "a#b", "they said: no #2"])
def test_an_override_keeps_its_whole_value(reason: str) -> None:
    if ":" in reason:
        assert "Quote it" in error_of(f"data.waive.form.unreadable={reason}")
        reason = f"'{reason}'"
    spec = parse_run_spec(SPEC, [f"data.waive.form.unreadable={reason}"])
    assert spec.data.waive == {"form.unreadable": reason.strip("'")}


def test_text_after_a_value_is_not_dropped() -> None:
    assert "Quote it" in error_of("train={epochs: 2} # a comment")


def test_full_fine_tuning_can_be_tried_over_a_lora_spec() -> None:
    text = SPEC + "method: {type: lora, lora_rank: 8, lora_alpha: 9}\n"
    method = parse_run_spec(text, ["method.type=full"]).method
    assert method.type == "full" and method.model_fields_set == {"type"}
    with pytest.raises(SpecError, match=r"method\.lora_rank"):
        parse_run_spec(text, ["method.type=full", "method.lora_rank=4"])


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("GeForce-RTX-4090", "GeForce-RTX-4090"),
        ("rtx-4090", "GeForce-RTX-4090"),
        ("RTX4090", "GeForce-RTX-4090"),
        ("RTX_4090", "GeForce-RTX-4090"),
        ("NVIDIA GeForce RTX 4090", "GeForce-RTX-4090"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000"),
        ("H100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("A100-SXM4-80GB", "A100-80G"),
        ("A100 80GB", "A100-80G"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("B300", "B300"),
    ],
)
def test_gpu_types_that_people_own_are_known(name: str, known: str) -> None:
    spec = parse_run_spec(SPEC, [f"parallel.accelerator_type={name}"])
    gpu = find_gpu(spec.parallel.accelerator_type)
    assert gpu is not None and gpu.name == known


def test_an_unknown_gpu_type_lists_the_known_ones() -> None:
    message = error_of("parallel.accelerator_type=RTX-4900")
    assert "Did you mean GeForce-RTX-4090?" in message and "A100-80G" in message


def test_credentials_in_a_uri_are_rejected_and_not_printed() -> None:
    for setting in ("model.base", "storage"):
        message = error_of(f"{setting}=s3://AKIA:secret@bucket/llama")
        assert setting in message and "secret" not in message and "s3://***@bucket" in message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data.train.0.source", "https://me:c4nary@example.com/tickets"),
        ("data.train.0.source", "from the hub with hf_c4naryc4naryc4naryc4nary"),
        ("data.train.0.path", "s3://bucket/train.jsonl?X-Amz-Signature=c4nary&X-Amz-Expires=60"),
        ("data.train.0.license", "AKIAC4NARYC4NARYC4NA"),
    ],
)
def test_a_secret_in_any_setting_is_rejected_and_not_printed(setting: str, value: str) -> None:
    message = error_of(f"{setting}={value}")
    assert f"{setting} = " in message and "contains credentials" in message and "***" in message
    assert "c4nary" not in message.lower()


def test_an_address_without_a_secret_is_no_problem() -> None:
    source = "https://example.com/@team/tickets?page=2, by me@example.com"
    spec = parse_run_spec(SPEC, [f"data.train.0.source={source}"])
    assert spec.data.train[0].source == source


def test_a_container_of_azure_is_no_user_name() -> None:
    root = "abfss://container@desk.dfs.core.windows.net/ft"
    assert parse_run_spec(SPEC, [f"storage={root}"]).storage == root
    message = error_of("storage=abfss://me:c4nary@desk.dfs.core.windows.net/ft")
    assert "contains credentials" in message and "c4nary" not in message


def test_a_dumped_spec_loads_unchanged() -> None:
    spec = parse_run_spec(SPEC, ["train.learning_rate=2e-4", "data.validation={fraction: 0.1}", "method.lora_rank=3"])
    assert parse_run_spec(dump_run_spec(spec)) == spec


@pytest.mark.multiprocess
def test_planning_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, ft_service.spec.load, ft_service.plan.plan, ft_service.plan.memory, "
        "ft_service.catalog.models, ft_service.registry.registry;"
        "sys.exit(', '.join({'torch', 'ray', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
