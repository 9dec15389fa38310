"""Loading: every rank reads only its own share, bit for bit the same as transformers loads."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ft_service.errors import ModelError
from ft_service.model.base import open_weight_files, resolve_base
from ft_service.model.dry_run import dry_run
from ft_service.model.load import WholeWeights, load_causal_lm
from ft_service.model.weight_files import WeightFiles
from tests.forked import run_cases
from tests.model.loading_cases import run_case, same_bits, write_base
from tests.needs import LIBAIO, can_offload_to_nvme, needs
from tests.train.training_cases import stock_4bit

LORA: dict[str, Any] = {"type": "lora", "lora_rank": 4}
QLORA: dict[str, Any] = {"type": "qlora", "lora_rank": 4}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    made = {
        "bf16-files": {"tied": False, "dtype": "bfloat16", "files": 4},
        "fp32-tied": {"tied": True, "dtype": "float32", "files": 1},
        "fp16-files": {"tied": False, "dtype": "float16", "files": 3},
        # DeepSpeed swaps out tensors of at least 1 MiB: here a half of the MLP's.
        "large": {"tied": True, "dtype": "float32", "files": 1, "width": 1152},
    }
    for name, settings in made.items():
        write_base(root / name, **settings)
    assert len(list((root / "bf16-files").glob("*.safetensors"))) > 2
    return {name: root / name for name in made}


def cases_of(bases: dict[str, Path], world_size: int) -> dict[str, Any]:
    common = {"micro": 1, "precision": "bf16"}
    cases = {
        "bf16": common | {"base": "bf16-files", "method": LORA, "stage": 3},
        "cast-to-bf16": common | {"base": "fp32-tied", "method": {"type": "full"}, "stage": 3},
        "cast-to-fp32": common | {"base": "fp16-files", "method": LORA, "stage": 3, "precision": "fp32"},
        "offloaded": common | {"base": "bf16-files", "method": LORA, "stage": 3, "offload": "cpu"},
        "4-bit": common | {"base": "bf16-files", "method": QLORA, "stage": 3},
        "4-bit-tied": common | {"base": "fp32-tied", "method": QLORA, "stage": 3},
        "4-bit-fp32": common | {"base": "fp16-files", "method": QLORA, "stage": 3, "precision": "fp32"},
        "whole": common | {"base": "bf16-files", "method": LORA, "stage": 1},
        "whole-4-bit": common | {"base": "bf16-files", "method": QLORA, "stage": 2},
    }
    if world_size == 4:
        cases["node"] = common | {"base": "bf16-files", "method": LORA, "stage": 3, "node_size": 2}
        cases["node-4-bit"] = common | {"base": "bf16-files", "method": QLORA, "stage": 3, "node_size": 2}
    if world_size == 2 and can_offload_to_nvme():
        drive = str(bases["large"].parent / "drive")
        cases["swapped"] = common | {"base": "large", "method": LORA, "stage": 3, "offload": "nvme", "nvme_path": drive}
    batch = {"train": {"global_batch_size": 12}}  # divisible by every world size
    return {name: case | batch | {"base": str(bases[case["base"]])} for name, case in cases.items()}


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def loaded(request: pytest.FixtureRequest, bases: dict[str, Path]) -> tuple[int, dict[str, Any]]:
    return request.param, run_cases(run_case, cases_of(bases, request.param), request.param)


@pytest.mark.multiprocess
def test_shares_equal_transformers_weights_bit_for_bit(loaded: tuple[int, dict[str, Any]]) -> None:
    _, results = loaded
    for name, result in results.items():
        assert result["unequal"] == [], name
        assert result["names"] and result["tied"], name


@pytest.mark.multiprocess
@pytest.mark.parametrize("loaded", [2], indirect=True)
def test_large_partitions_are_on_the_configured_drive(
    loaded: tuple[int, dict[str, Any]], bases: dict[str, Path]
) -> None:
    world_size, results = loaded
    needs(can_offload_to_nvme(), LIBAIO)
    tensors = WeightFiles(bases["large"]).tensors.values()
    large = [tensor for tensor in tensors if tensor.numel * 2 / world_size >= 2**20]
    assert results["swapped"]["swapped"] == len(large) > 0
    assert results["offloaded"]["swapped"] == 0


@pytest.mark.multiprocess
def test_every_byte_is_read_exactly_once(loaded: tuple[int, dict[str, Any]], bases: dict[str, Path]) -> None:
    _world_size, results = loaded
    for name, base in (("bf16", "bf16-files"), ("cast-to-bf16", "fp32-tied"), ("offloaded", "bf16-files")):
        tensors = WeightFiles(bases[base]).tensors.values()
        read = [tuple(piece) for ranges in results[name]["ranges"] for piece in ranges]
        assert sum(stop - start for _, start, stop in read) == sum(tensor.nbytes for tensor in tensors)
        assert len(set(read)) == len(read)
        by_file: dict[str, list[tuple[int, int]]] = {}
        for file, start, stop in read:
            by_file.setdefault(file, []).append((start, stop))
        for pieces in by_file.values():
            pieces.sort()
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(pieces))


@pytest.mark.multiprocess
def test_each_rank_reads_only_its_share(loaded: tuple[int, dict[str, Any]], bases: dict[str, Path]) -> None:
    world_size, results = loaded
    tensors = WeightFiles(bases["bf16-files"]).tensors.values()
    whole = sum(tensor.nbytes for tensor in tensors)
    # Of each tensor at most one element more than its part; where 4-bit blocks are cut, two blocks of bf16 more.
    for name, slack in (("bf16", 2), ("4-bit", 2 * 64 * 2)):
        assert max(results[name]["bytes_read"]) <= whole / world_size + slack * len(tensors)
    assert results["whole"]["bytes_read"] == [whole] * world_size


@pytest.mark.multiprocess
def test_dry_run_predicts_what_each_rank_reads_and_holds(
    loaded: tuple[int, dict[str, Any]], bases: dict[str, Path]
) -> None:
    world_size, results = loaded
    for name, result in results.items():
        case = cases_of(bases, world_size)[name]
        if case["stage"] < 3 or name == "swapped":
            continue
        checkpoint = WeightFiles(case["base"])
        run = dry_run(
            LlamaConfig.from_dict(dict(checkpoint.config)),
            checkpoint.tensors,
            four_bit=case["method"]["type"] == "qlora",
            world_size=world_size,
            node_size=case.get("node_size", 1),
            dtype=torch.bfloat16 if case["precision"] == "bf16" else torch.float32,
        )
        assert [rank.read for rank in run.ranks] == result["bytes_read"], name
        assert [rank.held for rank in run.ranks] == result["bytes_held"], name


@pytest.mark.parametrize("four_bit", [False, True])
def test_model_loaded_in_inference_mode_can_be_trained(bases: dict[str, Path], four_bit: bool) -> None:
    with torch.inference_mode():
        model = load_causal_lm(WeightFiles(bases["fp32-tied"]), dtype=torch.bfloat16, four_bit=four_bit)
    assert not any(parameter.is_inference() for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("four_bit", [False, True])
def test_gpu_weights_equal_transformers_weights_bit_for_bit(bases: dict[str, Path], four_bit: bool) -> None:
    device = torch.device("cuda", 0)
    checkpoint = WeightFiles(bases["bf16-files"])
    ours = load_causal_lm(checkpoint, dtype=torch.bfloat16, four_bit=four_bit, placement=WholeWeights(device))
    stock = (
        stock_4bit(bases["bf16-files"], torch.bfloat16, device)
        if four_bit
        else LlamaForCausalLM.from_pretrained(bases["bf16-files"], dtype=torch.bfloat16, device_map={"": device})
    )
    for (name, mine), (_, theirs) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        assert mine.device == device, name
        assert same_bits(mine, theirs), name
        if four_bit and hasattr(theirs, "quant_state"):
            assert torch.equal(mine.quant_state.absmax, theirs.quant_state.absmax), name


# -- files that are rejected before a weight is read -----------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_causal_lm(WeightFiles(folder), dtype=torch.bfloat16)
    return str(error.value)


def rewritten(source: Path, target: Path, change: Any) -> Path:
    target.mkdir()
    tensors = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def test_all_missing_unexpected_and_misshapen_tensors_are_listed(bases: dict[str, Path], tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3)
        tensors["model.norm.weight"] = torch.zeros(73)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)

    message = refusal(rewritten(bases["bf16-files"], tmp_path / "spoilt", spoil))
    assert "model.layers.1.mlp.up_proj.weight is missing" in message
    assert "model.layers.2.mlp.up_proj.weight is not part of the model" in message
    assert "model.norm.weight has shape [73] instead of [72]" in message
    assert "lm_head.weight is F8_E4M3" in message


def test_stored_copy_of_a_tied_head_is_accepted(bases: dict[str, Path], tmp_path: Path) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)  # as old converters left it

    folder = rewritten(bases["fp32-tied"], tmp_path / "both", add_head)
    ours = load_causal_lm(WeightFiles(folder), dtype=torch.float32)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


@pytest.mark.parametrize("file_index", [0, -1])
def test_truncated_file_is_rejected(bases: dict[str, Path], tmp_path: Path, file_index: int) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    for file in bases["bf16-files"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    victim = sorted(folder.glob("*.safetensors"))[file_index]
    victim.write_bytes(victim.read_bytes()[:-1])
    message = refusal(folder)
    assert victim.name in message and "half-downloaded" in message
    victim.unlink()
    assert f"{victim.name} missing" in refusal(folder)


def test_index_with_unknown_tensors_is_rejected(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    for file in bases["bf16-files"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = sorted(index["weight_map"].values())[0]
    index_file.write_text(json.dumps(index))
    assert "model.layers.9.mlp.up_proj.weight" in refusal(folder)
    index_file.write_text("{}")
    assert "weight_map" in refusal(folder)


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00[]"])
def test_file_that_is_not_safetensors_is_rejected(bases: dict[str, Path], tmp_path: Path, garbage: bytes) -> None:
    folder = rewritten(bases["fp32-tied"], tmp_path / "garbage", lambda tensors: None)
    (folder / "model.safetensors").write_bytes(garbage)
    assert "header is damaged" in refusal(folder)


def test_shape_that_does_not_match_its_bytes_is_rejected(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = rewritten(bases["fp32-tied"], tmp_path / "shape", lambda tensors: None)
    content = (folder / "model.safetensors").read_bytes()
    changed = content.replace(
        b'"model.norm.weight":{"dtype":"F32","shape":[72]', b'"model.norm.weight":{"dtype":"F32","shape":[71]'
    )
    assert changed != content
    (folder / "model.safetensors").write_bytes(changed)
    assert "model.norm.weight" in refusal(folder)


# -- object storage --------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An S3 server for this test; yields a client, and the URI of its bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="models")
    yield client, f"s3://models/{{}}?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()


def test_a_base_on_object_storage_is_read_by_ranges(bases: dict[str, Path], bucket: Any) -> None:
    client, uri = bucket
    for file in bases["bf16-files"].iterdir():
        client.upload_file(str(file), "models", f"llama/{file.name}")
    checkpoint = open_weight_files(uri.format("llama"))
    ours = load_causal_lm(checkpoint, dtype=torch.bfloat16, attention="sdpa")
    stock = LlamaForCausalLM.from_pretrained(bases["bf16-files"], dtype=torch.bfloat16)
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in stock.state_dict().items())
    assert checkpoint.fingerprint() == WeightFiles(bases["bf16-files"]).fingerprint()
    assert "nowhere" in refusal_of_uri(uri.format("nowhere"))


def test_base_on_object_storage_is_downloaded_if_files_are_needed(
    bases: dict[str, Path], bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    client, uri = bucket
    for file in bases["bf16-files"].iterdir():
        client.upload_file(str(file), "models", f"llama/{file.name}")
    settings_alone = resolve_base(uri.format("llama"), weights=False)
    assert (settings_alone / "config.json").is_file() and not list(settings_alone.glob("*.safetensors"))
    whole = resolve_base(uri.format("llama"))
    assert WeightFiles(whole).fingerprint() == WeightFiles(bases["bf16-files"]).fingerprint()
    # What is there in full length is not fetched again; what was fixed at the source is.
    fetched = {file.name: file.stat().st_mtime_ns for file in whole.glob("*.safetensors")}
    config = json.loads((bases["bf16-files"] / "config.json").read_text()) | {"fixed": True}
    client.put_object(Bucket="models", Key="llama/config.json", Body=json.dumps(config).encode())
    again = resolve_base(uri.format("llama"))
    assert {file.name: file.stat().st_mtime_ns for file in again.glob("*.safetensors")} == fetched
    assert json.loads((again / "config.json").read_text())["fixed"]


def refusal_of_uri(uri: str) -> str:
    with pytest.raises(ModelError) as error:
        open_weight_files(uri)
    return str(error.value)
