"""All workers write a full model in parallel. None of them ever holds it, and an incomplete folder never counts."""

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ft_service.errors import StorageError
from ft_service.model.weight_files import CONFIG_FILE, INDEX_FILE, WeightFiles
from ft_service.model.writer import TensorFormat, WeightWriter, index_of, lay_out
from ft_service.registry.registry import DIGESTS_FILE, sha256_of
from ft_service.storage.storage import Storage
from tests.forked import run_cases
from tests.needs import LIBAIO, can_offload_to_nvme, needs
from tests.train.training_cases import write_base
from tests.train.writing_cases import run_case

FULL = {"type": "full"}

# Llama 3.1 405B, in the order of its modules (arXiv:2407.21783, table 3).
D, KV, FFN, VOCABULARY, LAYERS = 16384, 1024, 53248, 128256, 126


def shape_of_405b() -> dict[str, TensorFormat]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, D)}
    for layer in range(LAYERS):
        inside = {"q": (D, D), "k": (KV, D), "v": (KV, D), "o": (D, D), "gate": (FFN, D), "up": (FFN, D)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}
        shapes |= {f"model.layers.{layer}.{name}": (D,) for name in ("norm1", "norm2")}
        shapes[f"model.layers.{layer}.down"] = (D, FFN)
    shapes |= {"model.norm.weight": (D,), "lm_head.weight": (VOCABULARY, D)}
    return {name: TensorFormat("BF16", shape) for name, shape in shapes.items()}


# -- who writes what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_owners", [1, 8, 16, 64])
def test_405b_is_distributed_evenly_and_every_tensor_once(num_owners: int) -> None:
    tensors = shape_of_405b()
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert total == 2 * 405_853_388_800  # its number of parameters
    files = lay_out(tensors, num_owners)
    assert sorted(name for file in files for name in file.tensors) == sorted(tensors)
    largest = max(tensor.nbytes for tensor in tensors.values())
    for owner in range(num_owners):
        mine = [file for file in files if file.owner == owner]
        share = sum(tensor.nbytes for file in mine for tensor in file.tensors.values())
        assert abs(share - total / num_owners) <= largest
        written = [name for file in mine for name in file.tensors]
        assert written == [name for name in tensors if name in set(written)]  # in the order in which they come
    assert all(sum(tensor.nbytes for tensor in file.tensors.values()) <= 5e9 for file in files)
    assert len({file.name for file in files}) == len(files)
    assert json.loads(index_of(files))["metadata"]["total_size"] == total


def test_an_owner_without_a_tensor_writes_no_file() -> None:
    files = lay_out({name: TensorFormat("F32", (4,)) for name in "ab"}, num_owners=3)
    assert [(file.owner, file.name, list(file.tensors)) for file in files] == [
        (0, "model-00001-of-00002.safetensors", ["a"]),
        (1, "model-00002-of-00002.safetensors", ["b"]),
    ]


def test_oversized_tensor_gets_a_file_of_its_own() -> None:
    tensors = {name: TensorFormat("F32", (size,)) for name, size in zip("abc", (1, 100, 1), strict=True)}
    assert [list(file.tensors) for file in lay_out(tensors, max_file_bytes=40)] == [["a"], ["b"], ["c"]]


# -- files -----------------------------------------------------------------------------------------------------------

TENSORS = {
    "matrix": torch.arange(6, dtype=torch.float32).view(2, 3).T,  # not contiguous
    "half": torch.tensor([1.5, -2.0, 3.25], dtype=torch.float16),
    "brain": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "scalar": torch.tensor(7.0),
}
FORMATS = {
    "matrix": TensorFormat("F32", (3, 2)),
    "half": TensorFormat("F16", (3,)),
    "brain": TensorFormat("BF16", (5, 7)),
    "scalar": TensorFormat("F32", ()),
}


def test_stock_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    (file,) = lay_out(FORMATS)
    with WeightWriter([file], storage.writing) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    found = load_file(tmp_path / file.name)
    assert list(found) and all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert writer.digests == {file.name: hashlib.sha256((tmp_path / file.name).read_bytes()).hexdigest()}
    (length,) = struct.unpack("<Q", (tmp_path / file.name).read_bytes()[:8])
    assert length % 8 == 0


class FullDrive:
    """Storage with free space for `room` bytes."""

    def __init__(self, folder: Path, room: int) -> None:
        self._storage, self._room = Storage(str(folder)), room

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        with self._storage.writing(name) as stream:
            write = stream.write

            def limited(content: Any) -> int:
                self._room -= len(content)
                if self._room < 0:
                    raise OSError(28, "No space left on device")
                return write(content)

            class Limited:
                write = staticmethod(limited)

            yield Limited()  # type: ignore[misc]


@pytest.mark.parametrize("room", [0, 10, 400, 470])
def test_full_disk_raises_and_leaves_no_truncated_file(tmp_path: Path, room: int) -> None:
    files = lay_out(FORMATS, max_file_bytes=30)
    with (
        pytest.raises(StorageError, match="No space left"),
        WeightWriter(files, FullDrive(tmp_path, room).writing) as writer,
    ):
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(writer.digests)
    assert len(writer.digests) < len(files)
    for name in writer.digests:
        load_file(tmp_path / name)


def test_interrupted_writer_leaves_no_truncated_file(tmp_path: Path) -> None:
    files = lay_out(FORMATS)
    with pytest.raises(KeyboardInterrupt), WeightWriter(files, Storage(str(tmp_path)).writing) as writer:
        writer.write("matrix", TENSORS["matrix"])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_missing_tensors_are_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="3 tensors were not written"),
        WeightWriter(lay_out(FORMATS), Storage(str(tmp_path)).writing) as writer,
    ):
        writer.write("matrix", TENSORS["matrix"])
    assert list(tmp_path.iterdir()) == []


# -- by all workers --------------------------------------------------------------------------------------------------

multiprocess = pytest.mark.multiprocess

WORLDS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"zero3": {"stage": 3}},
    2: {
        "zero0": {"stage": 0},
        "zero1": {"stage": 1, "precision": "bf16"},
        "zero2": {"stage": 2},
        "zero3": {"stage": 3, "precision": "bf16"},
        "zero3-offloaded": {"stage": 3, "offload": "cpu"},
        "zero3-untied": {"stage": 3, "tied": False},
    },
    3: {"zero2": {"stage": 2}, "zero3": {"stage": 3}, "zero3-truly": {"stage": 3, "truly": True}},
}
CASES = [(world_size, name) for world_size, cases in WORLDS.items() for name in cases]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], tuple[Path, dict[str, Any]]]:
    """Case -> the written folder, and the measurements of each worker."""
    place = tmp_path_factory.mktemp("bases")
    write_base(place / "tied")
    write_base(place / "untied", tied=False)
    found = {}
    for world_size, cases in WORLDS.items():
        folder = tmp_path_factory.mktemp(f"world-{world_size}")
        micro = 1 if world_size == 3 else 2
        full = {
            name: {"method": FULL, "micro": micro, "out": str(folder / name), "packed": True}
            | ({"train": {"global_batch_size": 3, "max_steps": 2}} if world_size == 3 else {"train": {"max_steps": 2}})
            | case
            | {"base": str(place / ("tied" if case.get("tied", True) else "untied"))}
            for name, case in cases.items()
        }
        results = run_cases(run_case, full, world_size)
        found |= {(world_size, name): (folder / name, results[name]["workers"]) for name in cases}
    return found


@multiprocess
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_stock_transformers_loads_exactly_the_gathered_weights(written: Any, case: Any) -> None:
    folder, _ = written[case]
    gathered = load_file(f"{folder}.gathered.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = dict(model.named_parameters())
    assert found.keys() == gathered.keys()
    for name, tensor in gathered.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@multiprocess
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_folder_is_complete_with_one_file_per_worker(written: Any, case: Any) -> None:
    folder, workers = written[case]
    checkpoint = WeightFiles(folder)
    checkpoint.check()
    assert len(checkpoint.file_names) == len(workers) == case[0]
    index = json.loads((folder / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(entry.nbytes for entry in checkpoint.tensors.values())
    assert ("lm_head.weight" in checkpoint.tensors) == case[1].endswith("untied")  # a tied head is stored once
    assert sum(worker["owned"] for worker in workers) == index["metadata"]["total_size"]


@multiprocess
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_digests_match_the_files(written: Any, case: Any) -> None:
    folder, _ = written[case]
    digests = json.loads((folder / DIGESTS_FILE).read_text())
    files = {file.name: sha256_of(file) for file in folder.iterdir() if file.name != DIGESTS_FILE}
    assert digests == files


@multiprocess
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_each_worker_writes_its_file_and_config_comes_last(written: Any, case: Any) -> None:
    _, (first, *others) = written[case]
    names = [f"model-{rank + 1:05}-of-{case[0]:05}.safetensors" for rank in range(case[0])]
    assert [worker["written"] for worker in others] == [[name] for name in names[1:]]
    assert first["written"][0] == names[0] and first["written"][-1] == CONFIG_FILE
    assert {INDEX_FILE, DIGESTS_FILE} < set(first["written"])


@multiprocess
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_no_worker_allocates_a_tensor_it_does_not_own(written: Any, case: Any) -> None:
    _, workers = written[case]
    for worker in workers:
        padding = 4 * case[0]
        if "zero3" in case[1]:
            assert 0 < worker["largest_allocation"] <= worker["largest_owned"] + padding
        else:
            assert worker["largest_allocation"] < 4096  # the names and digests that travel; weights are there already
    if case[0] > 1:  # else the claim would be empty
        assert min(worker["largest_owned"] for worker in workers) < workers[0]["largest"] / 2


@multiprocess
def test_weights_on_nvme_are_written(tmp_path: Path) -> None:
    needs(can_offload_to_nvme(), LIBAIO)
    # DeepSpeed leaves tensors of less than 1 MiB in memory; half of 768 x 1600 x 4 bytes is more.
    write_base(tmp_path / "base", hidden_size=768, intermediate_size=1600)
    case = {"base": str(tmp_path / "base"), "method": FULL, "stage": 3, "micro": 2, "train": {"max_steps": 2}}
    case |= {"offload": "nvme", "nvme_path": str(tmp_path / "drive"), "out": str(tmp_path / "out")}
    run_cases(run_case, {"nvme": case}, 2)
    gathered = load_file(tmp_path / "out.gathered.safetensors")
    swapped = [file for file in (tmp_path / "drive").rglob("*param*") if file.is_file()]
    assert swapped and math.prod(gathered["model.layers.0.mlp.up_proj.weight"].shape) * 4 / 2 > 2**20
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in gathered.items())


@multiprocess
@pytest.mark.parametrize("stage", [2, 3])
def test_failed_worker_leaves_no_complete_folder(tmp_path: Path, stage: int) -> None:
    write_base(tmp_path / "base")
    case = {"base": str(tmp_path / "base"), "method": FULL, "stage": stage, "micro": 2, "train": {"max_steps": 1}}
    case |= {"out": str(tmp_path / "out"), "full_on": 1}
    with pytest.raises(AssertionError, match="No space left"):
        run_cases(run_case, {"full": case}, 2)
    left = {file.name for file in (tmp_path / "out").glob("*") if not file.name.endswith(".partial")}
    assert left <= {"model-00001-of-00002.safetensors"}
    assert not {CONFIG_FILE, INDEX_FILE, DIGESTS_FILE} & left
