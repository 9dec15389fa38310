"""The plan compares the spec with the base: each mismatch is refused, with setting, value and cure, or warned of."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import ray
from safetensors.numpy import load_file, save_file

from ft_service import preflight
from ft_service.errors import ModelError, SpecError
from ft_service.launch import prepare
from ft_service.model.base_facts import read_base_facts
from ft_service.model.weight_files import WeightFiles
from ft_service.plan.facts import Resources
from ft_service.plan.plan import RunPlan
from ft_service.runs.folder import RunFolder
from ft_service.spec.load import parse_run_spec
from ft_service.storage.storage import Storage
from tests.storage.object_stores import faulty_s3, uploaded
from tests.worlds import write_world


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base_checks")
    write_world(folder)
    return folder


@pytest.fixture
def world(original: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    shutil.copytree(original, tmp_path / "world")
    return tmp_path / "world"


def plan(world: Path, *overrides: str) -> RunPlan:
    spec = parse_run_spec(
        f"""
name: words
model: {{base: {world}/base}}
method: {{type: lora, lora_rank: 4}}
data: {{train: [{{path: {world}/train.jsonl}}], max_seq_len: 128}}
train: {{max_steps: 4, global_batch_size: 4}}
parallel: {{num_workers: 1, use_gpu: false}}
storage: {world}/storage
""",
        overrides,
    )
    return preflight.plan_without_writing(spec, Resources())


def error_of(world: Path, *overrides: str) -> str:
    with pytest.raises((SpecError, ModelError)) as error:
        plan(world, *overrides)
    return str(error.value)


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def set_rows(world: Path, tokens: tuple[str, ...], values: np.ndarray) -> None:
    """Set these tokens' rows of the embedding."""
    tokenizer = json.loads((world / "base/tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    file = world / "base/model.safetensors"
    weights = {name: tensor.copy() for name, tensor in load_file(file).items()}
    for token in tokens:
        weights["model.embed_tokens.weight"][ids[token]] = values
    save_file(weights, file, metadata={"format": "pt"})


def test_a_sound_base_has_no_problem_warning_or_remark_and_its_facts_are_in_the_plan(original: Path) -> None:
    decided = plan(original)
    facts = decided.base_facts
    assert facts.max_positions and facts.embedding_rows and facts.own_turns
    assert not facts.unchecked and not facts.tokens_beyond_embedding and not facts.untrained_chat_tokens
    assert not any("base" in line.lower() for line in [*decided.warnings, *decided.remarks])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("[q_proj, v_porj]", "'v_porj' matches no linear layer"),
        ("[query, value]", "'query', 'value' match no linear layer"),
        ("[input_layernorm]", "'input_layernorm' matches no linear layer"),
        ("[]", "names no module"),
        ("q_proj", "A string is a regular expression for the whole path"),
        ("'*_proj'", "is not a valid regular expression"),
    ],
)
def test_a_target_that_matches_nothing_is_refused(original: Path, targets: str, message: str) -> None:
    error = error_of(original, f"method.target_modules={targets}")
    assert "method.target_modules" in error and message in error and "all-linear" in error


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, down_proj]", "'.*self_attn.*_proj'", "[self_attn.q_proj]"])
def test_targets_that_match_are_planned(original: Path, targets: str) -> None:
    assert plan(original, f"method.target_modules={targets}").trainable_parameters > 0


def test_a_rank_above_the_width_of_a_layer_is_refused_with_the_width(original: Path) -> None:
    assert "method.lora_rank = 5000: is greater than the width of k_proj, 16" in error_of(
        original, "method.lora_rank=5000"
    )
    assert "the width of q_proj, 32" in error_of(original, "method.lora_rank=33", "method.target_modules=[q_proj]")
    assert plan(original, "method.lora_rank=16").trainable_parameters > 0


def test_rows_longer_than_the_positions_of_the_base_are_refused(original: Path) -> None:
    error = error_of(original, "data.max_seq_len=100000")
    assert "data.max_seq_len = 100000" in error and "positions" in error and "Use at most" in error


def test_a_checkpoint_that_is_already_quantised_is_refused(world: Path) -> None:
    change_json(world / "base/config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    error = error_of(world)
    assert "already quantised (gptq)" in error and "bf16 original" in error and "qlora" in error


def test_packed_weights_are_quantised_even_if_the_config_does_not_say_so(world: Path) -> None:
    file = world / "base/model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "q_proj" in name)
    save_file({**weights, name: weights[name].astype(np.uint8)}, file, metadata={"format": "pt"})
    assert "already quantised (weights of type U8)" in error_of(world)


def test_the_original_of_a_quantised_copy_is_named(world: Path) -> None:
    copy = world / "Meta-Llama-3.1-8B-Instruct-bnb-4bit"
    (world / "base").rename(copy)
    change_json(copy / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "(meta-llama/Llama-3.1-8B-Instruct)" in error_of(world, f"model.base={copy}")


def test_tokens_beyond_the_embedding_are_refused_by_name(world: Path) -> None:
    file = world / "base/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    number = max(token["id"] for token in tokenizer["added_tokens"]) + 1
    extra = {**tokenizer["added_tokens"][-1], "id": number, "content": "<|my_token|>"}
    change_json(file, added_tokens=[*tokenizer["added_tokens"], extra])
    error = error_of(world)
    assert f"1 token without an embedding: '<|my_token|>' = {number}" in error
    assert f"the embedding has {number} rows" in error


def test_an_adapter_as_base_is_recognised_and_its_base_named(world: Path) -> None:
    adapter = world / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}))
    error = error_of(world, f"model.base={adapter}")
    assert "is an adapter, not a model" in error and "model.base: meta-llama/Llama-3.1-8B" in error


CHAT = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@pytest.mark.parametrize("values", [np.zeros(32, np.float32), np.full(32, 0.1, np.float32)], ids=["zero", "equal"])
def test_untrained_rows_of_chat_tokens_are_warned_of(world: Path, values: np.ndarray) -> None:
    set_rows(world, CHAT, values)
    (warning,) = [line for line in plan(world).warnings if "look untrained" in line]
    assert all(token in warning for token in CHAT) and "instruct model" in warning and "LoRA does not train" in warning


def test_one_untrained_row_is_named_alone_and_text_needs_none(world: Path) -> None:
    set_rows(world, CHAT[2:], np.full(32, 1e-8, np.float32))
    (warning,) = [line for line in plan(world).warnings if "look untrained" in line]
    assert "rows of <|eot_id|> look" in warning
    (world / "train.jsonl").write_text("\n".join(json.dumps({"text": f"text number {n}"}) for n in range(40)))
    decided = plan(world, "data.train.0.format=text")
    assert not any("look untrained" in line for line in decided.warnings)


def test_a_template_with_turns_of_another_format_is_warned_of(world: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    (world / "base/chat_template.jinja").write_text(template)
    (warning,) = [line for line in plan(world).warnings if "own chat template" in line]
    assert "<|im_start|>user" in warning and "<|start_header_id|>user" in warning


def test_a_template_that_adds_a_system_turn_is_remarked_on(world: Path) -> None:
    file = world / "base/chat_template.jinja"
    added = "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}<|eot_id|>"
    file.write_text(f"{added}{file.read_text().replace('<|begin_of_text|>', '')}")
    decided = plan(world)
    (remark,) = [line for line in decided.remarks if "own chat template adds" in line]
    assert "Today Date: 26 Jul 2024" in remark
    assert not any("own chat template" in line for line in decided.warnings)


def test_a_template_that_fails_is_listed_as_unchecked(world: Path) -> None:
    (world / "base/chat_template.jinja").write_text("{{ raise_exception('no') }}")
    (remark,) = [line for line in plan(world).remarks if line.startswith("Not checked against the base")]
    assert "own chat template" in remark


def test_what_was_not_downloaded_is_listed_as_unchecked(world: Path) -> None:
    (world / "base/model.safetensors").unlink()
    (unchecked,) = read_base_facts("some/hub-id", world / "base").unchecked
    assert "quantised" in unchecked and "not downloaded" in unchecked


def test_a_base_on_object_storage_is_read_by_ranges(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows(world, CHAT, np.zeros(32, np.float32))
    config_only = world / "config_only"
    config_only.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(world / "base" / name, config_only)
    read: list[int] = []
    whole = WeightFiles.read_into

    def counting(self: WeightFiles, entry: object, start: int, buffer: memoryview) -> None:
        read.append(len(buffer))
        whole(self, entry, start, buffer)  # type: ignore[arg-type]

    monkeypatch.setattr(WeightFiles, "read_into", counting)
    with faulty_s3() as s3:
        facts = read_base_facts(uploaded(s3, world / "base"), config_only)
    assert facts.untrained_chat_tokens == CHAT and not facts.unchecked
    assert set(read) == {32 * 4}, "a row at a time"


def test_a_base_from_the_catalogue_says_what_is_unchecked(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    known = ("model.base=meta-llama/Meta-Llama-3-8B-Instruct", "parallel.use_gpu=true")
    monkeypatch.setattr(preflight, "resolve_base", unreachable)
    assert any("Not checked against the base: tokenizer" in line for line in plan(world, *known).remarks)
    assert "8,192 positions" in error_of(world, *known, "data.max_seq_len=16384")
    assert "Llama-3.1-8B-Instruct" in error_of(world, "model.base=meta-llama/Llama-3.2-11B-Vision-Instruct")


def unreachable(base: str, revision: str | None, weights: bool) -> Path:
    raise ModelError(f"model.base = {base!r}: cannot be downloaded (offline).")


def test_a_run_is_refused_like_its_plan_before_data_and_workers(original: Path) -> None:
    spec = parse_run_spec(
        f"""
name: words
model: {{base: {original}/base}}
method: {{target_modules: [v_porj]}}
data: {{train: [{{path: {original}/train.jsonl}}], max_seq_len: 100000}}
parallel: {{use_gpu: false}}
storage: {original}/storage
"""
    )
    with pytest.raises(SpecError, match=r"2 problems.*\n.*v_porj.*\n.*positions"):
        prepare(spec, RunFolder(Storage(spec.storage), "refused"), print)
    assert not ray.is_initialized() and not (original / "storage/datasets").exists()
